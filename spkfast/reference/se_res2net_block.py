"""Definition of ``se_res2net_block``: the block of ECAPA-TDNN in inference form, at a precision of its products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spkfast.reference.tdnn_layer import Precision, TdnnParams, as_multiplied, tdnn_layer, weight_as_multiplied


class SERes2NetParams(NamedTuple):
    """Weights of an SE-Res2Net block in inference form.

    Attributes:
        in_: Layer before the Res2 convolutions, of one tap.
        res: The Res2 convolutions.
        out: Layer after them, of one tap.
        squeeze: First linear layer of the squeeze-and-excitation, weight (S, C, 1); its batch norm, where it has one,
            as scale and shift.
        excite: Second one, weight (C, S, 1).
        shortcut: Convolution of one tap from the input to the sum; None for the input itself.
    """

    in_: TdnnParams
    res: Sequence[TdnnParams]
    out: TdnnParams
    squeeze: TdnnParams
    excite: TdnnParams
    shortcut: TdnnParams | None = None


def se_res2net_block(
    x: Tensor,
    params: SERes2NetParams,
    padded: Tensor | None,
    excited: Tensor | None,
    *,
    dilation: int,
    reflect: bool,
    first_passes: bool,
    precision: Precision,
    input_ranges: Mapping[str, tuple[float, float]] | None,
) -> Tensor:
    """Layer, Res2 convolutions, layer, squeeze-and-excitation, residual sum.

    Args:
        x: Shape (B, C_in, T).
        params: The weights.
        padded: Frames per row at whose ends the convolutions pad, int64, shape (B,); None for all T.
        excited: Frames per row over which the squeeze-and-excitation takes its mean, as ``padded``.
        dilation: Of the Res2 convolutions.
        reflect: They pad with mirrored frames in place of zeros.
        first_passes: The first group of channels passes through, not the last.
        precision: What the convolutions multiply; the squeeze-and-excitation is float32 or wider.
        input_ranges: Smallest and largest input of ``in``, ``res.0`` and so on, and ``out``, for ``int8``.

    Returns:
        Shape (B, C, T) in the type of ``x``, 0 in the padding.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    ranges = input_ranges or {}

    def layer(name: str, layer_params: TdnnParams, values: Tensor, *, relu: bool = True) -> Tensor:
        # Products of the wanted precision; what is between them stays wide.
        return _wide_tdnn_layer(values, layer_params, padded, dilation, reflect, relu, precision, ranges.get(name))

    hidden = layer("in", params.in_, x.to(wide))
    groups = list(hidden.chunk(len(params.res) + 1, dim=1))
    outputs: list[Tensor] = []
    for j, convolution in enumerate(params.res):
        group = groups[j + first_passes]
        outputs.append(layer(f"res.{j}", convolution, group + outputs[-1] if outputs else group))
    y = layer("out", params.out, torch.cat([groups[0], *outputs] if first_passes else [*outputs, groups[-1]], dim=1))
    squeezed = dense(mean_over(y, excited), params.squeeze).relu()
    if params.squeeze.scale is not None and params.squeeze.shift is not None:
        squeezed = squeezed * params.squeeze.scale.to(wide) + params.squeeze.shift.to(wide)
    rest = x.to(wide)
    if params.shortcut is not None:
        rest = layer("in", params.shortcut, rest, relu=False)
    out = y * dense(squeezed, params.excite).sigmoid()[..., None] + rest
    if padded is not None:
        out = out.masked_fill(torch.arange(x.shape[2], device=x.device) >= padded[:, None, None], 0)
    return out.to(x.dtype)


def _wide_tdnn_layer(
    x: Tensor,
    params: TdnnParams,
    lengths: Tensor | None,
    dilation: int,
    reflect: bool,
    relu: bool,
    precision: Precision,
    input_range: tuple[float, float] | None,
) -> Tensor:
    values = as_multiplied(x, precision, input_range)
    weights = params._replace(weight=weight_as_multiplied(params.weight.to(x.dtype), precision))
    return tdnn_layer(
        [values], weights, None, lengths,
        dilation=dilation, reflect=reflect, relu=relu, tanh=False, precision="fp32", input_range=None,
    )  # fmt: skip


def dense(x: Tensor, params: TdnnParams) -> Tensor:
    """A linear layer whose weight is that of a convolution of one tap, on (B, C)."""
    out = torch.matmul(x, params.weight[..., 0].to(x.dtype).T)
    return out if params.bias is None else out + params.bias.to(x.dtype)


def mean_over(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Mean over the real frames of (B, C, T), shape (B, C); 0 for a row of length 0, NaN for T = 0 without lengths."""
    if lengths is None:
        return x.mean(dim=-1)
    padding = torch.arange(x.shape[2], device=x.device) >= lengths[:, None, None]
    return x.masked_fill(padding, 0).sum(dim=-1) / lengths[:, None].clamp_min(1)
