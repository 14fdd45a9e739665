"""Definition of ``top_moments``: mean and standard deviation of the greatest values of each row."""

from __future__ import annotations

import torch
from torch import Tensor


def top_moments(scores: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """See :func:`spkfast.functional.top_moments`."""
    finite = scores.isfinite().all(dim=1, keepdim=True)
    top = scores.topk(n, dim=1, sorted=False).values.double().where(finite, torch.nan)
    return top.mean(dim=1).to(scores.dtype), top.std(dim=1, correction=0).to(scores.dtype)
