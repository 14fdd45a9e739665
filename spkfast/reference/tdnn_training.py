"""Definition of what TDNN layers are trained with: convolution and ReLU with moments, and what follows them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from spkfast.reference.tdnn_layer import Precision, as_multiplied, frames_at, output_type, weight_as_multiplied


def conv_relu(
    x: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    *,
    dilation: int,
    reflect: bool,
    precision: Precision,
    relu: bool = True,
    wide: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """ReLU of a convolution of the inputs one after the other, and the moments of each row over its frames.

    Args:
        x: Inputs (B, C_i, T), whose channels together are those of the weight.
        weight: Shape (N, C, K), K odd.
        bias: Shape (N,), or None.
        dilation: Spacing of the taps in frames.
        reflect: Pad with mirrored frames in place of zeros.
        precision: What is multiplied; sums are float32 or wider.
        relu: Apply ReLU.
        wide: Give float32 or wider whatever is multiplied.

    Returns:
        The output, shape (B, N, T), in the type of ``output_type``; and of its values mean and biased variance, shape
        (B, N), float32 or wider.
    """
    inputs = torch.cat(list(x), dim=1)
    dtype = torch.promote_types(inputs.dtype, torch.float32)
    values = as_multiplied(inputs.to(dtype), precision, None)
    matrix = weight_as_multiplied(weight.to(dtype), precision)
    taps = weight.shape[2]
    out = sum(
        torch.matmul(matrix[..., tap], frames_at(values, (tap - taps // 2) * dilation, None, reflect))
        for tap in range(taps)
    )
    assert isinstance(out, Tensor)
    if bias is not None:
        out = out + bias.to(dtype)[:, None]
    y = (out.relu() if relu else out).to(dtype if wide else output_type(inputs.dtype, precision))
    mean, var = _moments(y.to(dtype), (2,))
    return y, mean, var


def conv_batch_norm(
    x: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    added: Tensor | None,
    *,
    eps: float,
    dilation: int,
    reflect: bool,
    precision: Precision,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`conv_relu`, batch norm by the statistics of the batch, and :func:`channel_affine`'s sum.

    Args:
        x: As of :func:`conv_relu`.
        weight: As of :func:`conv_relu`.
        bias: As of :func:`conv_relu`.
        gamma: Factor after the normalisation, shape (N,), or None for 1.
        beta: Added after it, shape (N,), or None for 0.
        added: Shape (B, N, T), or None.
        eps: Added to the variance.
        dilation: As of :func:`conv_relu`.
        reflect: As of :func:`conv_relu`.
        precision: As of :func:`conv_relu`.

    Returns:
        As :func:`channel_affine`, and mean and biased variance of the batch, shape (N,).
    """
    y, _, _ = conv_relu(x, weight, bias, dilation=dilation, reflect=reflect, precision=precision)
    mean, var = _moments(y.to(torch.promote_types(y.dtype, torch.float32)), (0, 2))
    scale = (var + eps).rsqrt() * (1 if gamma is None else gamma.to(var.dtype))
    shift = (0 if beta is None else beta.to(var.dtype)) - mean * scale
    return *channel_affine(y, scale[None], shift[None], added), mean, var


def _moments(y: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over dimensions; 0 of nothing."""
    count = max(math.prod(y.shape[dim] for dim in dims), 1)
    mean = y.sum(dim=dims, keepdim=True) / count
    return mean.squeeze(dims), (y - mean).square().sum(dim=dims) / count


def channel_affine(x: Tensor, scale: Tensor, shift: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
    """Each channel times a factor plus a number, and the sum of that and another tensor.

    Args:
        x: Shape (B, N, T).
        scale: By channel, shape (1, N), or by row too, (B, N); float32 or wider.
        shift: As ``scale``.
        added: Shape and type of ``x``, or None.

    Returns:
        The affine map and the sum, in the type of ``x``; without ``added`` the map twice.
    """
    wide = x.to(scale.dtype)
    y = wide * scale[..., None] + shift[..., None]
    total = y if added is None else y + added.to(scale.dtype)
    return y.to(x.dtype), total.to(x.dtype)


def conv_weight_gradient(
    x: Sequence[Tensor], grad: Tensor, *, taps: int, dilation: int, reflect: bool, precision: Precision
) -> Tensor:
    """Gradient of the weight of a convolution.

    Args:
        x: Its inputs (B, C_i, T).
        grad: Gradient of its output, shape (B, N, T).
        taps: Taps K of the weight.
        dilation: Their spacing in frames.
        reflect: Whether frames outside are mirrored, not 0.
        precision: What is multiplied.

    Returns:
        Shape (N, C, K), float32 or wider.
    """
    inputs = torch.cat(list(x), dim=1)
    wide = torch.promote_types(inputs.dtype, torch.float32)
    values, slope = (as_multiplied(value.to(wide), precision, None) for value in (inputs, grad))
    found = [
        torch.matmul(slope, frames_at(values, (tap - taps // 2) * dilation, None, reflect).transpose(1, 2)).sum(dim=0)
        for tap in range(taps)
    ]
    return torch.stack(found, dim=2)


def conv_input_gradient(grad: Tensor, weight: Tensor, *, dilation: int, precision: Precision) -> Tensor:
    """Gradient of the inputs of a convolution that pads with zeros, one after the other.

    Args:
        grad: Gradient of its output, shape (B, N, T).
        weight: Shape (N, C, K).
        dilation: Spacing of the taps in frames.
        precision: What is multiplied.

    Returns:
        Shape (B, C, T), in the type of ``output_type``.
    """
    wide = torch.promote_types(grad.dtype, torch.float32)
    slope, matrix = as_multiplied(grad.to(wide), precision, None), weight_as_multiplied(weight.to(wide), precision)
    taps = weight.shape[2]
    found = sum(
        torch.matmul(matrix[..., tap].T, frames_at(slope, (taps // 2 - tap) * dilation, None, False))
        for tap in range(taps)
    )
    assert isinstance(found, Tensor)
    return found.to(output_type(grad.dtype, precision))


def conv_relu_backward(
    grad_y: Tensor | None, grad_mean: Tensor | None, grad_var: Tensor | None, y: Tensor, mean: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of the sums that :func:`conv_relu` puts through ReLU, and of its bias.

    Args:
        grad_y: Gradient of its output, shape (B, N, T), or None for 0.
        grad_mean: Gradient of the mean, shape (B, N), or None.
        grad_var: Gradient of the variance, shape (B, N), or None.
        y: The output.
        mean: Its mean.

    Returns:
        The gradient of the sums, shape (B, N, T), in the type of ``y``; and of the bias for each row, shape (B, N),
        float32 or wider.
    """
    wide = torch.promote_types(y.dtype, torch.float32)
    values = y.to(wide)
    grad = torch.zeros_like(values) if grad_y is None else grad_y.to(wide)
    frames = max(y.shape[2], 1)
    if grad_mean is not None:
        grad = grad + grad_mean[..., None] / frames
    if grad_var is not None:
        grad = grad + (2 / frames) * grad_var[..., None] * (values - mean[..., None])
    grad = torch.where(values <= 0, 0, grad)  # NaN stays
    return grad.to(y.dtype), grad.sum(dim=2)


def channel_affine_backward(
    grad_y: Tensor | None, grad_total: Tensor | None, x: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`channel_affine`, where that of ``added`` is ``grad_total``.

    Args:
        grad_y: Gradient of the map, shape (B, N, T), or None for 0.
        grad_total: Gradient of the sum, or None for 0.
        x: Shape (B, N, T).
        scale: Shape (1, N) or (B, N).

    Returns:
        Gradients of ``x``, in its type, and for each row of scale and shift, shape (B, N), in that of ``scale``.
    """
    grads = [value.to(scale.dtype) for value in (grad_y, grad_total) if value is not None]
    grad = sum(grads[1:], grads[0]) if grads else torch.zeros_like(x, dtype=scale.dtype)
    return (grad * scale[..., None]).to(x.dtype), (grad * x.to(scale.dtype)).sum(dim=2), grad.sum(dim=2)
