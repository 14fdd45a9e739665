"""How far rounding in float32 may move each value of attentive_stats_pool and of its gradient, in any order of sums.

First-order bounds: each step passes on the error of what it reads and adds its own roundings.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

UNIT = 2.0**-24  # of rounding of float32
TINY = 2.0**-146  # a few units of its smallest numbers
_LOST = 2.0**-124  # a weight so small may be taken as zero
_MOST = float(torch.finfo(torch.float32).max)
_SHORTEST_BLOCK = 16  # frames; between blocks sums are merged
_HEADROOM = 1000.0  # what gradients and sums over channels may come to, times the square of a deviation
_LARGEST_LOGIT_ERROR = 0.1  # beyond which the first order is not enough


class Bounds(NamedTuple):
    """Largest errors: of mean and variance (B, C), of the gradients (B, C, T) and (B, K, T), K = 1 for shared logits.

    ``free`` (B, C): where float32 may overflow or knows the logits too badly, and where all weights are zero.
    """

    mean: Tensor
    var: Tensor
    grad_x: Tensor
    grad_logits: Tensor
    free: Tensor


def error_bounds(
    x: Tensor,
    logits: Tensor | None,
    counts: Tensor,
    grad_mean: Tensor,
    grad_var: Tensor,
    logit_error: Tensor | None = None,
) -> Bounds:
    """Bounds for the values of a call, all float64.

    Args:
        x: Shape (B, C, T).
        logits: Shape (B, C, T) or (B, 1, T); None for equal weights.
        counts: Real frames per row, int64, shape (B,).
        grad_mean: Gradient of the mean, shape (B, C).
        grad_var: Gradient of the variance, shape (B, C).
        logit_error: Largest error of each logit where the op computes them itself.
    """
    u = UNIT
    shared = logits is None or logits.shape[1] == 1
    logits = x.new_zeros(len(x), 1, x.shape[2]) if logits is None else logits
    padding = torch.arange(x.shape[2]) >= counts[:, None, None]
    n = counts[:, None, None].to(x.dtype)
    merges = n / _SHORTEST_BLOCK
    x = x.masked_fill(padding, 0)
    logits = logits.masked_fill(padding, -torch.inf)
    weights = logits.softmax(dim=-1).masked_fill(padding, 0)
    largest = _largest(x)
    # Of the exponent, the exponential, and factors of earlier blocks as the highest logit rises.
    below = (_largest(logits, signed=True) - logits).masked_fill(padding | logits.isneginf(), 0)
    error = u * (2 * below + 8 + 4 * merges)
    free = ~(_HEADROOM * n * (2 * largest).square() < _MOST) & ~largest.isnan()
    free = free | (padding | logits.isneginf()).all(dim=-1, keepdim=True) & (n > 0)
    if logit_error is not None:
        error = error + 1.1 * logit_error.masked_fill(padding, 0)
        free = free | (_largest(logit_error.masked_fill(padding, 0)) > _LARGEST_LOGIT_ERROR)
    lost = torch.where(padding, 0.0, _LOST)

    mean = (weights * x).sum(dim=-1, keepdim=True)
    d = (x - mean).masked_fill(padding, 0)
    var = (weights * d.square()).sum(dim=-1, keepdim=True)
    of_mean = ((weights * error + lost) * d.abs()).sum(dim=-1, keepdim=True)
    of_mean = of_mean + (2 * n + 4) * u * (weights * x.abs()).sum(dim=-1, keepdim=True)
    of_mean = of_mean + 3 * merges * u * largest + n * TINY
    of_var = ((weights * error + lost) * (d.square() + var)).sum(dim=-1, keepdim=True)
    of_var = of_var + 4 * var.sqrt() * of_mean + 4 * of_mean.square() + (2 * n + 10 + 4 * merges) * u * var + n * TINY

    # The weights are made again: of the total, too.
    again = error + (weights * error).sum(dim=-1, keepdim=True) + (n + 4) * u
    gm, gv = grad_mean[..., None], grad_var[..., None]
    of_d = of_mean + u * d.abs()
    inner = gm + 2 * gv * d
    of_inner = 2 * gv.abs() * of_d + 4 * u * (gm.abs() + 2 * gv.abs() * d.abs())
    grad_x = weights * (again * inner.abs() + of_inner) + lost * inner.abs() + TINY
    inner = gm * d + gv * (d.square() - var)
    sizes = gm.abs() * d.abs() + gv.abs() * (d.square() + var)
    of_inner = gm.abs() * of_d + gv.abs() * (2 * d.abs() * of_d + of_d.square() + of_var) + 6 * u * sizes
    grad_logits = weights * (again * inner.abs() + of_inner) + lost * sizes + TINY
    if shared:
        added = (x.shape[1] + 4) * u * (weights * sizes).sum(dim=1, keepdim=True)
        grad_logits = grad_logits.sum(dim=1, keepdim=True) + added
    none = padding.all(dim=-1, keepdim=True)
    return Bounds(
        of_mean.masked_fill(none, 0)[..., 0],
        of_var.masked_fill(none, 0)[..., 0],
        grad_x.masked_fill(padding, 0),
        grad_logits.masked_fill(padding, 0),
        free.expand(-1, x.shape[1], -1)[..., 0],
    )


def rounded(error: Tensor, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The bound once the value is rounded to ``dtype``."""
    if dtype == torch.float32:
        return error
    limits = torch.finfo(dtype)
    error = error + limits.eps / 2 * (exact.abs() + error) + limits.smallest_normal * limits.eps / 2
    return error.masked_fill(exact.abs() + error > limits.max, torch.inf)


def _largest(values: Tensor, *, signed: bool = False) -> Tensor:
    if values.shape[-1] == 0:
        return values.new_zeros(*values.shape[:-1], 1)
    return (values if signed else values.abs()).amax(dim=-1, keepdim=True)
