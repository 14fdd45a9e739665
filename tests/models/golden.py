"""The recipe by which golden numbers fill a network with weights."""

from __future__ import annotations

import math
import zlib

import numpy as np


def golden_weight(key: str, shape: list[int], rule: str) -> np.ndarray:
    """The weight that the golden recipe assigns to a key."""
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    if rule == "one":
        return np.ones(shape, dtype=np.int64)
    if rule == "var":
        return np.float32(1) + np.float32(0.2) * rng.random(shape).astype(np.float32)
    value = rng.standard_normal(shape).astype(np.float32)
    return {
        "mean": lambda: np.float32(0.1) * value,
        "bias": lambda: np.float32(0.1) * value,
        "unit": lambda: value,
        "column": lambda: value * np.float32(1 / math.sqrt(shape[0])),
        "gain": lambda: np.float32(1) + np.float32(0.1) * value,
        "fan_in": lambda: value * np.float32(1 / math.sqrt(np.prod(shape[1:]))),
    }[rule]()
