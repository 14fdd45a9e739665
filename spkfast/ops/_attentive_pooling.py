"""Attentive statistics pooling from frames to moments as one op of a CPU: frames are read from memory once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spkfast.ops._packing import PackedLayer
from spkfast.ops._registration import register_without_gradient


class PackedAttention(NamedTuple):
    """Weights of the attention in the form that the kernels read.

    Attributes:
        hidden: Its hidden layer, of the frames' own channels.
        context: What the hidden layer reads of mean and standard deviation of all frames, with its bias; or None.
        weight: From the hidden layer to logits, shape (C, H), in the type of the frames.
        bias: Shape (C,).
    """

    hidden: PackedLayer
    context: PackedLayer | None
    weight: Tensor
    bias: Tensor


def fits(x: Tensor, attention: PackedAttention) -> bool:
    """Whether the op takes these sizes: two bfloat16 numbers share a word."""
    return x.dtype == torch.float32 or (x.shape[1] % 2 == 0 and attention.weight.shape[1] % 2 == 0)


def attentive_moments(
    x: Tensor,
    attention: PackedAttention,
    lengths: Tensor | None,
    *,
    relu: bool,
    tanh: bool,
    unbiased: bool,
    add: float,
    low: float,
    high: float,
    offset: float,
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance under the attention.

    Args:
        x: Frames, shape (B, C, T), in any layout.
        attention: The weights.
        lengths: Real frames per row, int64, shape (B,); None where all T are.
        relu: Apply ReLU to the hidden layer.
        tanh: And last the hyperbolic tangent.
        unbiased: The variance of the context divides by T - 1; its standard deviation is
            ``sqrt(clamp(var + add, low, high)) + offset``.
        add: See ``unbiased``.
        low: See ``unbiased``.
        high: See ``unbiased``.
        offset: See ``unbiased``.

    Returns:
        Mean and variance, shape (B, C), float32.
    """
    context = attention.context
    mean, var = torch.ops.spkfast.attentive_pooling(
        x,
        attention.hidden.weight,
        attention.hidden.vectors,
        None if context is None else context.weight,
        None if context is None else context.vectors,
        attention.weight,
        attention.bias,
        lengths,
        [int(relu), int(attention.hidden.affine), int(tanh), int(unbiased)],
        [add, low, high, offset],
    )
    return mean, var


def _fake(
    x: Tensor,
    hidden: Tensor,
    hidden_vectors: Tensor,
    context: Tensor | None,
    context_vectors: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    lengths: Tensor | None,
    integers: Sequence[int],
    floats: Sequence[float],
) -> tuple[Tensor, Tensor]:
    mean, var = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    return mean, var


register_without_gradient("attentive_pooling", fake=_fake)
