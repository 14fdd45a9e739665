"""Networks that turn features into speaker embeddings, by name."""

from __future__ import annotations

import builtins
import inspect
from collections.abc import Callable
from typing import Any

from spkfast.errors import InputError, nearest
from spkfast.models.base import SpeakerModel
from spkfast.models.ecapa_tdnn import EcapaTdnn

__all__ = ["EcapaTdnn", "SpeakerModel", "create", "list"]

_MODELS: dict[str, Callable[..., SpeakerModel]] = {"ecapa_tdnn": EcapaTdnn}


def list() -> builtins.list[str]:
    """Names that :func:`create` knows."""
    return sorted(_MODELS)


def create(name: str, **config: Any) -> SpeakerModel:
    """A network with fresh weights.

    Args:
        name: One of :func:`list`.
        **config: Keywords of its class.

    Raises:
        InputError: If the name or a keyword is unknown.
    """
    if name not in _MODELS:
        raise InputError(f"unknown model {name!r}{nearest(name, list())}; known: {', '.join(list())}")
    known = [p for p in inspect.signature(_MODELS[name]).parameters if p != "self"]
    for key in config:
        if key not in known:
            raise InputError(f"unknown option {key!r} of model {name}{nearest(key, known)}")
    return _MODELS[name](**config)
