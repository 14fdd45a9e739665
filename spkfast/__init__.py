"""spkfast: fast and exact kernels, layers and tools for speaker embeddings."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from spkfast.backends import info
from spkfast.errors import InputError
from spkfast.frontends import FrontendSpec, frontend

if TYPE_CHECKING:
    from spkfast.acceleration import accelerate
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
    "accelerate",
    "frontend",
    "info",
]

_SUBMODULES = ("acceleration", "data", "evaluation", "export", "functional", "models", "nn", "reference")
_NAMES = {
    "NumpyFbank": "spkfast.arrays",
    "SpeakerEncoder": "spkfast.inference",
    "StreamingFbank": "spkfast.arrays",
    "accelerate": "spkfast.acceleration",
}


def __getattr__(name: str) -> Any:
    # Subpackages load on first use, so that `import spkfast` and the command line start fast.
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"spkfast.{name}")
    raise AttributeError(f"module 'spkfast' has no attribute {name!r}")
