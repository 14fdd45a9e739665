"""Definition of ``attentive_stats_pool_from_hidden``: the logits of the pooling are a product with a hidden layer."""

from __future__ import annotations

import torch
from torch import Tensor

from spkfast.reference.attentive_stats_pool import attentive_stats_pool


def attentive_stats_pool_from_hidden(
    x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """:func:`attentive_stats_pool` with ``logits = weight @ hidden + bias``, all in float32 or wider.

    Args:
        x: Shape (B, C, T).
        hidden: Shape (B, H, T).
        weight: Shape (C, H).
        bias: Shape (C,).
        lengths: Real frames per row, int64, shape (B,); None where all T are.

    Returns:
        Mean and variance, shape (B, C).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    if lengths is not None:  # what padding holds must not reach the gradient of the weight
        padding = torch.arange(x.shape[2], device=x.device) >= lengths[:, None, None]
        hidden = hidden.masked_fill(padding, 0)
    logits = torch.matmul(weight.to(wide), hidden.to(wide)) + bias.to(wide)[:, None]
    return attentive_stats_pool(x, logits, lengths)
