"""Small trained models that come with the package: each a folder with its configuration, weights and card."""

from __future__ import annotations

import builtins
from pathlib import Path

from spkfast.errors import check_name

_FOLDER = Path(__file__).parent


def list() -> builtins.list[str]:
    """Names that :meth:`spkfast.SpeakerEncoder.load` takes in place of a path."""
    return sorted(path.parent.name for path in _FOLDER.glob("*/config.yaml"))


def folder(name: str) -> Path:
    """Folder of a bundled model, to read from only.

    Args:
        name: One of :func:`list`.

    Raises:
        InputError: If the name is unknown.
    """
    check_name("bundled model", name, list())
    return _FOLDER / name
