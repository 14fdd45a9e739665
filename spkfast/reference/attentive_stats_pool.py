"""Definition of ``attentive_stats_pool``: mean and variance over time under softmax weights."""

from __future__ import annotations

import torch
from torch import Tensor


def attentive_stats_pool(x: Tensor, logits: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weighted mean and variance of each channel, in float32 or wider.

    Args:
        x: Shape (B, C, T).
        logits: The weights are their softmax over the real frames, shape (B, C, T) or (B, 1, T); None for equal ones.
        lengths: Real frames per row, int64, shape (B,); None where all T are.

    Returns:
        Mean and variance, shape (B, C); both 0 for a row without frames.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    logits = x.new_zeros(x.shape[0], 1, x.shape[2]) if logits is None else logits.to(x.dtype)
    if lengths is None:
        weights = logits.softmax(dim=-1)
    else:
        padding = torch.arange(x.shape[2], device=x.device) >= lengths[:, None, None]
        x = x.masked_fill(padding, 0)
        # Filled twice: where all is padding, the softmax is NaN.
        weights = logits.masked_fill(padding, -torch.inf).softmax(dim=-1).masked_fill(padding, 0)
    mean = (weights * x).sum(dim=-1)
    var = (weights * (x - mean[..., None]).square()).sum(dim=-1)
    return mean, var
