"""Random numbers by counting: a value depends on its seed and its number alone, on every device, in every batch."""

from __future__ import annotations

from torch import Tensor

_WORD = 0xFFFFFFFF


def philox(counters: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
    """Two random words for each counter and seed, which broadcast: int64 in 0..2**32 - 1.

    Philox2x32-10 of counter (n, upper half of the seed) and key (lower half).

    Args:
        counters: Numbers n, int64 in 0..2**32 - 1.
        seeds: Seeds, int64.

    Reference: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    key = seeds & _WORD
    low, high = counters & _WORD, seeds >> 32 & _WORD
    for _ in range(10):
        product = low * 0xD256D193  # wraps, as the unsigned product does
        low, high = (product >> 32 & _WORD) ^ key ^ high, product & _WORD
        key = (key + 0x9E3779B9) & _WORD
    return low, high
