"""Public function ``attentive_stats_pool_from_hidden``: pooling with its last product, whose result is never kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from spkfast import backends, reference
from spkfast.backends import Backend
from spkfast.errors import InputError
from spkfast.ops._registration import register_with_backward
from spkfast.ops._tdnn_training import conv_relu
from spkfast.ops.attentive_stats_pool import (
    Moments,
    Stats,
    channels_last,
    check_device,
    check_floating,
    check_frames,
    check_lengths,
    empty_gradient,
    limits,
    with_std,
)
from spkfast.reference import Precision

# Of the logits and their gradient, which are made again a few rows at a time.
_CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}


def attentive_stats_pool_from_hidden(
    x: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    lengths: Tensor | None = None,
    *,
    eps: float = 1e-7,
    max_var: float | None = None,
    backend: Backend = "auto",
) -> Stats:
    """:func:`attentive_stats_pool` with ``logits = weight @ hidden + bias``, which never reach memory as a whole.

    The gradient makes them again a few rows at a time. Differentiable in everything but ``lengths``.

    Args:
        x: Frames, shape (B, C, T), in any layout.
        hidden: Hidden layer of the attention, shape (B, H, T).
        weight: Shape (C, H), or (C, H, 1) as a convolution has it.
        bias: Shape (C,).
        lengths: Real frames per row, int64, 0 to T, shape (B,); None where all T are.
        eps: Lower bound of the variance.
        max_var: Upper bound of the variance, or None.
        backend: As :func:`attentive_stats_pool`.

    Returns:
        Mean and standard deviation, shape (B, C), float32 (float64 for float64 input).

    Raises:
        InputError: As :func:`attentive_stats_pool`.

    Reference: Okabe et al., "Attentive Statistics Pooling for Deep Speaker Embedding", Interspeech 2018.
    """
    moments = weighted_moments_from_hidden(x, hidden, weight, bias, lengths, backend=backend)
    return with_std(moments, eps, max_var)


def weighted_moments_from_hidden(
    x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, lengths: Tensor | None = None, *, backend: Backend = "auto"
) -> Moments:
    """Mean and biased variance; the part of :func:`attentive_stats_pool_from_hidden` before the square root.

    Args:
        x: Shape (B, C, T).
        hidden: Shape (B, H, T).
        weight: Shape (C, H) or (C, H, 1).
        bias: Shape (C,).
        lengths: Real frames per row, int64, shape (B,), or None.
        backend: As :func:`attentive_stats_pool`.

    Raises:
        InputError: As :func:`attentive_stats_pool`.
    """
    check_frames("x", x)
    check_frames("hidden", hidden)
    check_lengths(lengths, x)
    check_floating("weight", weight)
    check_floating("bias", bias)
    if weight.ndim == 3 and weight.shape[2] == 1:
        weight = weight[:, :, 0]
    (batch, channels, frames), units = x.shape, hidden.shape[1]
    if not units:
        raise InputError(f"hidden must have at least one unit, got shape {tuple(hidden.shape)}")
    for name, value, letters, shape in (
        ("hidden", hidden, "(B, H, T)", (batch, units, frames)),
        ("weight", weight, "(C, H)", (channels, units)),
        ("bias", bias, "(C,)", (channels,)),
    ):
        if value.shape != shape:
            raise InputError(f"{name} must have shape {letters} = {shape}, got {tuple(value.shape)}")
        check_device(name, value, x)
    tensors = [x, hidden, weight, bias]
    common = x.dtype
    for value in tensors[1:]:
        common = torch.promote_types(common, value.dtype)
    tensors = [value.to(common) for value in tensors]
    chosen = backends.resolve(x.device, backend, "attentive_stats_pool_from_hidden", limits(tensors[0]))
    return Moments(*_IMPLEMENTATIONS[chosen](*tensors, lengths)[:2])


def _fake(x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, lengths: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(4))


def _backward_fake(
    grad_mean: Tensor, grad_var: Tensor, x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor | None
) -> tuple[Tensor, ...]:
    return (
        empty_gradient(x),
        empty_gradient(hidden),
        weight.new_empty(weight.shape),
        bias.new_empty(bias.shape),
    )


class _Products:
    """Products of the attention with a weight (C, H), in the layout of what they multiply, in float32."""

    def __init__(self, weight: Tensor, bias: Tensor, hidden: Tensor) -> None:
        self.weight, self.bias = weight.float(), bias.float()
        # The kernels take channels that lie side by side. Products of bfloat16 numbers are exact, whatever multiplies
        # them.
        types = (torch.float32, torch.bfloat16)
        self.by_kernels = hidden.device.type == "cpu" and hidden.dtype in types and channels_last(hidden)
        self.precision: Precision = "bf16" if hidden.dtype == weight.dtype == torch.bfloat16 else "fp32"

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, H, T) to (B, C, T)."""
        if self.by_kernels:
            return conv_relu(
                [hidden], self.weight[..., None], self.bias,
                precision=self.precision, moments=False, relu=False, wide=True,
            )[0]  # fmt: skip
        return self._multiplied(self.weight, hidden.float()).add_(self.bias[:, None])

    def gradient(self, grad: Tensor) -> Tensor:
        """Of the hidden layer: (B, C, T) to (B, H, T)."""
        if self.by_kernels:
            return cast(Tensor, torch.ops.spkfast.conv_input_gradient(grad, self.weight[..., None], [0, 1]))
        return self._multiplied(self.weight.T, grad)

    def weight_gradient(self, grad: Tensor, hidden: Tensor) -> Tensor:
        """(B, C, T) and (B, H, T) to (C, H)."""
        if self.by_kernels:
            found = torch.ops.spkfast.conv_weight_gradient([hidden.float()], grad, [1, 1, 0, 0])
            return cast(Tensor, found[..., 0])
        return torch.matmul(grad, hidden.float().transpose(1, 2)).sum(dim=0)

    @staticmethod
    def _multiplied(weight: Tensor, x: Tensor) -> Tensor:
        if x.device.type == "cpu":  # oneDNN is up to twice as fast at it as MKL
            return F.conv1d(x, weight[..., None])
        return torch.matmul(weight, x)


def _formula(backend: str) -> Callable[..., tuple[Tensor, ...]]:
    def backward(
        grad_mean: Tensor,
        grad_var: Tensor,
        x: Tensor,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        lengths: Tensor | None,
        *outputs: Tensor,
    ) -> tuple[Tensor, ...]:
        op = "attentive_stats_pool_backward" if backend == "native" else "attentive_stats_pool_triton_backward"
        pool_backward = getattr(torch.ops.spkfast, op)
        batch, channels, frames = x.shape
        grad_x, grad_hidden = empty_gradient(x), empty_gradient(hidden)
        products = _Products(weight, bias, hidden)
        grad_weight = products.weight.new_zeros(weight.shape)
        row_bytes = 2 * 4 * channels * frames
        if not channels * frames:
            return grad_x, grad_hidden.zero_(), grad_weight.to(weight.dtype), bias.new_zeros(bias.shape)
        rows = max(1, _CHUNK_BYTES.get(x.device.type, _CHUNK_BYTES["cpu"]) // max(1, row_bytes))
        if lengths is not None:
            hidden = hidden.masked_fill(torch.arange(frames, device=x.device) >= lengths[:, None, None], 0)
        for start in range(0, batch, rows):
            part = slice(start, start + rows)
            units = hidden[part]
            grad_part, grad_logits = pool_backward(
                grad_mean[part],
                grad_var[part],
                x[part].float(),
                products.logits(units),
                None if lengths is None else lengths[part],
                *(output[part] for output in outputs),
            )
            grad_x[part] = grad_part
            grad_hidden[part] = products.gradient(grad_logits)
            grad_weight += products.weight_gradient(grad_logits, units)
        # A softmax over time does not see what it adds to all frames alike.
        return grad_x, grad_hidden, grad_weight.to(weight.dtype), bias.new_zeros(bias.shape)

    return backward


_IMPLEMENTATIONS = register_with_backward(
    "attentive_stats_pool_from_hidden",
    reference.attentive_stats_pool_from_hidden,
    fake=_fake,
    backward_fake=_backward_fake,
    num_outputs=2,
    differentiable=(0, 1, 2, 3),
    formula=_formula,
)
