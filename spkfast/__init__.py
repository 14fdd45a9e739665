"""spkfast: fast and exact kernels, layers and tools for speaker embeddings."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from spkfast.backends import info
from spkfast.errors import InputError
from spkfast.frontends import FrontendSpec, frontend

if TYPE_CHECKING:
    from spkfast.arrays import NumpyFbank, StreamingFbank
    from spkfast.inference import SpeakerEncoder

__version__ = "0.1.0"

__all__ = [
    "FrontendSpec",
    "InputError",
    "NumpyFbank",
    "SpeakerEncoder",
    "StreamingFbank",
    "__version__",
    "frontend",
    "info",
]

_SUBMODULES = ("data", "evaluation", "export", "functional", "models", "nn", "reference")
_CLASSES = {
    "NumpyFbank": "spkfast.arrays",
    "SpeakerEncoder": "spkfast.inference",
    "StreamingFbank": "spkfast.arrays",
}


def __getattr__(name: str) -> Any:
    # Subpackages load on first use, so that `import spkfast` and the command line start fast.
    if name in _CLASSES:
        return getattr(importlib.import_module(_CLASSES[name]), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"spkfast.{name}")
    raise AttributeError(f"module 'spkfast' has no attribute {name!r}")
