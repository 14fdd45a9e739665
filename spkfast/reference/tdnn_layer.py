"""Definition of ``tdnn_layer``: a convolution over time with what follows it, at a precision of its products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Precision = Literal["fp32", "bf16", "fp16", "int8"]
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TdnnParams(NamedTuple):
    """Weights of a layer in inference form.

    Attributes:
        weight: Of the convolution, shape (N, C, K).
        bias: Shape (N,), or None.
        scale: Batch norm as a factor and what is added after it, shape (N,); None where there is none.
        shift: Shape (N,), with ``scale``.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None


def tdnn_layer(
    x: Sequence[Tensor],
    params: TdnnParams,
    offset: Tensor | None,
    lengths: Tensor | None,
    *,
    dilation: int,
    reflect: bool,
    relu: bool,
    tanh: bool,
    precision: Precision,
    input_range: tuple[float, float] | None,
) -> Tensor:
    """Convolution of the inputs one after the other, bias, ReLU, batch norm, hyperbolic tangent.

    Args:
        x: Inputs (B, C_i, T), whose channels together are those of the weight.
        params: The weights.
        offset: Added to the bias of each row, shape (B, N), or None.
        lengths: Real frames per row, at whose ends the convolution pads, int64, shape (B,); None where all T are.
        dilation: Spacing of the taps in frames.
        reflect: Pad with mirrored frames in place of zeros.
        relu: Apply ReLU.
        tanh: Apply the hyperbolic tangent last.
        precision: What is multiplied; sums are float32 or wider.
        input_range: Smallest and largest value of the inputs, for ``int8``.

    Returns:
        Shape (B, N, T), 0 in the padding, in the type of :func:`output_type`.
    """
    inputs = torch.cat(list(x), dim=1)
    wide = torch.promote_types(inputs.dtype, torch.float32)
    values = as_multiplied(inputs.to(wide), precision, input_range)
    weight = weight_as_multiplied(params.weight.to(wide), precision)
    taps = weight.shape[2]
    out = sum(
        torch.matmul(weight[..., tap], frames_at(values, (tap - taps // 2) * dilation, lengths, reflect))
        for tap in range(taps)
    )
    assert isinstance(out, Tensor)
    for added in (params.bias, offset):
        if added is not None:
            out = out + added.to(wide)[..., None]
    if relu:
        out = out.relu()
    if params.scale is not None and params.shift is not None:
        out = out * params.scale.to(wide)[:, None] + params.shift.to(wide)[:, None]
    if tanh:
        out = out.tanh()
    if lengths is not None:
        out = out.masked_fill(torch.arange(out.shape[2], device=out.device) >= lengths[:, None, None], 0)
    return out.to(output_type(inputs.dtype, precision))


def output_type(dtype: torch.dtype, precision: Precision) -> torch.dtype:
    """At ``fp32`` float32, or float64 for inputs of it; at ``fp16`` float16, else bfloat16."""
    return torch.promote_types(dtype, torch.float32) if precision == "fp32" else HALF.get(precision, torch.bfloat16)


def frames_at(x: Tensor, shift: int, lengths: Tensor | None, reflect: bool) -> Tensor:
    """Frame t + shift of (B, C, T) at frame t; beyond the real frames a mirrored one, or 0."""
    batch, channels, frames = x.shape
    if lengths is None:
        lengths = torch.full((batch,), frames, device=x.device)
    source = (torch.arange(frames, device=x.device) + shift).expand(batch, -1)
    outside = (source < 0) | (source >= lengths[:, None])
    if reflect:
        period = (2 * lengths[:, None] - 2).clamp_min(1)
        source = source.remainder(period)
        source = torch.minimum(source, period - source)
    source = source.clamp(0, max(frames - 1, 0))
    found = x.gather(2, source[:, None].expand(-1, channels, -1))
    return found if reflect else found.masked_fill(outside[:, None], 0)


def quantiser(input_range: tuple[float, float]) -> tuple[float, int]:
    """Scale and zero of unsigned bytes for values of a range, widened to hold 0: value = (byte - zero) * scale."""
    low, high = min(input_range[0], 0.0), max(input_range[1], 0.0)
    scale = max((high - low) / 255, 1e-30)
    return scale, min(255, max(0, round(-low / scale)))


def as_multiplied(x: Tensor, precision: Precision, input_range: tuple[float, float] | None) -> Tensor:
    """Values as a product of this precision sees them, in their own type."""
    if precision in HALF:
        return x.to(HALF[precision]).to(x.dtype)
    if precision == "int8":
        assert input_range is not None
        scale, zero = quantiser(input_range)
        return (((x * (1 / scale)).round() + zero).clamp(0, 255) - zero) * scale
    return x


def quantised_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers from -127 to 127 for a weight (N, C, K), and what one of them stands for, shape (N,)."""
    unit = (weight.abs().amax(dim=(1, 2)) / 127).clamp_min(1e-30)
    return (weight / unit[:, None, None]).round(), unit


def weight_as_multiplied(weight: Tensor, precision: Precision) -> Tensor:
    """A weight (N, C, K) as a product of this precision sees it, in its own type."""
    if precision in HALF:
        return weight.to(HALF[precision]).to(weight.dtype)
    if precision == "int8":
        whole, unit = quantised_weight(weight)
        return whole * unit[:, None, None]
    return weight
