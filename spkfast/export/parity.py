"""How near an exported graph must be to its model, and what the two are compared on."""

from __future__ import annotations

import copy
from typing import cast

import numpy as np

from spkfast.inference import SpeakerEncoder
from spkfast.nn.inference import InferenceLayer

# Largest relative error of an embedding, or smallest cosine, to what PyTorch gives at float32.
BOUNDS: dict[str, tuple[str, float]] = {
    "fp32": ("max_error", 1e-4),
    "fp16": ("min_cosine", 0.9995),
    "bf16": ("min_cosine", 0.9995),
    "int8": ("min_cosine", 0.995),
}


def within_bounds(precision: str, max_error: float | None, min_cosine: float | None) -> bool | None:
    """Whether errors are as small as the precision promises (:data:`BOUNDS`); None where they are not known."""
    name, bound = BOUNDS[precision]
    value = max_error if name == "max_error" else min_cosine
    if value is None:
        return None
    return bool(value <= bound if name == "max_error" else value >= bound)


def exact_encoder(encoder: SpeakerEncoder) -> SpeakerEncoder:
    """A copy at float32 on the CPU, which exported graphs are compared with."""
    network = copy.deepcopy(encoder.model).cpu().float()
    for module in network.modules():
        if isinstance(module, InferenceLayer):
            module.precision = "fp32"
    return SpeakerEncoder(network, encoder.frontend, device="cpu")


def model_hash(encoder: SpeakerEncoder) -> str:
    """Fingerprint of the model at float32, whatever its precision; empty for a network that is not of spkfast.models.

    An exported graph has no weights at another precision, and knows whose it is.
    """
    if hasattr(encoder.model, "takes_waveforms"):
        return encoder.fingerprint
    return exact_encoder(encoder).fingerprint if hasattr(encoder.model, "config") else ""


def voice(seed: int, samples: int, rate: int) -> np.ndarray:
    """Harmonics of a gliding pitch under a slow envelope with some noise, float32 (S,), within [-1, 1]."""
    rng = np.random.default_rng(seed)
    t = np.arange(samples) / rate
    f0 = rng.uniform(90, 220)
    phase = 2 * np.pi * (f0 * t + 15 * np.sin(2 * np.pi * 0.7 * t))
    voiced = sum(np.sin(k * phase + k * k) / k for k in range(1, 20)) * (1 + np.sin(2 * np.pi * 3 * t))
    return cast(np.ndarray, (0.1 * voiced + 0.01 * rng.standard_normal(samples)).clip(-1, 1).astype(np.float32))
