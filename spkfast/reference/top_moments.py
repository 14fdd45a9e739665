"""Definition of ``top_moments``: mean and standard deviation of the greatest values of each row."""

from __future__ import annotations

from torch import Tensor


def top_moments(scores: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """See :func:`spkfast.functional.top_moments`."""
    top = scores.topk(n, dim=1, sorted=False).values.double()
    return top.mean(dim=1).to(scores.dtype), top.std(dim=1, correction=0).to(scores.dtype)
