"""Networks that turn features into speaker embeddings, by name."""

from __future__ import annotations

import builtins
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from spkfast.errors import check_name, check_options
from spkfast.models import bundled
from spkfast.models.base import SpeakerModel
from spkfast.models.checkpoints import Imported, import_state_dict
from spkfast.models.ecapa_tdnn import EcapaTdnn

__all__ = [
    "EcapaTdnn",
    "Imported",
    "SpeakerModel",
    "bundled",
    "create",
    "from_state_dict",
    "import_state_dict",
    "list",
]

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
    check_name("model", name, list())
    known = [p for p in inspect.signature(_MODELS[name]).parameters if p != "self"]
    check_options("model", name, config, known)
    return _MODELS[name](**config)


def from_state_dict(state_dict: Mapping[str, Tensor], family: str | None = None, **config: Any) -> SpeakerModel:
    """The network of another toolkit's weights, in evaluation mode; all sizes follow from their shapes.

    Args:
        state_dict: Weights under that toolkit's own names.
        family: ``wespeaker``, ``speechbrain`` (= ``3dspeaker``), ``taoruijie`` or ``espnet``; None to tell from the
            names.
        **config: Keywords of the network that names and shapes cannot tell, such as ``dilations``.

    Raises:
        InputError: If the family is unknown, a tensor is missing, left over or of a wrong shape, or a keyword
            contradicts the shapes.

    Warns:
        UserWarning: If dilations are assumed, which the weights of speechbrain and 3D-Speaker do not tell.
    """
    imported = import_state_dict(state_dict, family, **config)
    if "dilations" in imported.assumed:
        assumed = ", ".join(f"{name} {imported.config[name]}" for name in imported.assumed)
        warnings.warn(
            f"assumed {assumed}, as the weights of {imported.family} do not tell; for others, pass dilations=...",
            stacklevel=2,
        )
    return imported.model
