"""Attentive pooling with its last product in Triton: a tile of logits is made, used and forgotten."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tile sizes: C channels, T frames, H hidden units.
_TILE = {"BLOCK_C": 64, "BLOCK_T": 32, "BLOCK_H": 32}
# Triton 3.10 turns fusion off unless asked; asking keeps the numbers the same across versions.
_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}

# How wide loads can be is said by UNIT alone: a few compiled forms of the kernel, not one for each mixture of sizes and
# strides.
_ANY_SIZE = {
    "do_not_specialize": ["channels", "num_frames", "units", "x_row", "x_outer", "hidden_row", "hidden_outer"],
    "do_not_specialize_on_alignment": [
        "x", "hidden", "weight", "bias", "lengths", "mean", "var", "highest", "total"
    ],
}  # fmt: skip


@triton.jit
def _split(x):
    """Two numbers of 11 significant bits, which tensor cores take, whose sum is ``x`` but for its last bit."""
    high = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def _add_product(total, x, y):
    """``total`` plus the matrix product; that of float32 by tf32x3, split by rounding. ``tl.dot`` would cut."""
    if x.dtype == tl.float32:
        high_x, low_x = _split(x)
        high_y, low_y = _split(y)
        part = tl.dot(low_x, high_y, input_precision="tf32")
        part = tl.dot(high_x, low_y, acc=part, input_precision="tf32")
        return total + tl.dot(high_x, high_y, acc=part, input_precision="tf32")
    else:
        return tl.dot(x, y, acc=total)


@triton.jit
def _multiple(n, UNIT: tl.constexpr):
    """``n``, which is a multiple of ``UNIT``, in a form that tells the compiler so."""
    return n // UNIT * UNIT


@triton.jit
def _tile(base, c, t, outer, LAST: tl.constexpr, UNIT: tl.constexpr):
    """Where the tile of a row begins whose first channel is ``c`` and whose first frame is ``t``."""
    start = base + (outer.to(tl.int64) * t + c if LAST else outer.to(tl.int64) * c + t)
    return tl.multiple_of(start, base.dtype.element_ty.primitive_bitwidth // 8 * UNIT)


@triton.jit
def _inside(BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, outer, LAST: tl.constexpr):
    """Offsets [C, T] inside a tile."""
    c, t = tl.arange(0, BLOCK_C)[:, None].to(tl.int64), tl.arange(0, BLOCK_T)[None, :].to(tl.int64)
    return t * outer + c if LAST else c * outer + t


@triton.jit
def _add_tile(total, mean, spread, x, weights, scale):
    """Adds a tile [C, T] to the sum of weights, the mean and the sum of squared deviations [C].

    Two passes inside the tile, then the merge of Chan et al. ``scale`` brings earlier weights to those of the tile.
    """
    total *= scale
    added = tl.sum(weights, axis=1)
    # A tile whose weights are all zero divides by one: zero, or NaN where a frame is.
    tile_mean = tl.sum(weights * x, axis=1) / tl.where(added == 0, 1.0, added)
    deviation = x - tile_mean[:, None]
    tile_spread = tl.sum(weights * deviation * deviation, axis=1)
    both = total + added
    share = added / tl.where(both == 0, 1.0, both)
    shift = tile_mean - mean
    return both, mean + shift * share, spread * scale + tile_spread + shift * shift * (total * share)


@triton.jit(**_ANY_SIZE)
def _moments_kernel(
    x, hidden, weight, bias, lengths, mean, var, highest, total,
    channels, num_frames, units, x_row, x_outer, hidden_row, hidden_outer,
    RAGGED: tl.constexpr, LAST: tl.constexpr, UNIT: tl.constexpr, WEIGHT_UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Mean, variance, highest logit and sum of weights (B, C) of one tile of channels."""
    channels = _multiple(channels, UNIT) if LAST else channels
    tiles = tl.cdiv(channels, BLOCK_C)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    first_c = (tl.program_id(0) % tiles) * BLOCK_C
    c, t, h = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_H)
    known = c < channels - first_c  # [BLOCK_C]
    frames = num_frames
    if RAGGED:
        # A length outside 0..T would read out of bounds and is taken as the nearer of the two.
        frames = tl.minimum(tl.maximum(tl.load(lengths + row), 0), num_frames).to(tl.int32)
    # Where frames lie side by side a mask at their very end would cut wide loads in two.
    end = frames if LAST else tl.cdiv(frames, UNIT) * UNIT
    x += row * x_row
    hidden += row * hidden_row
    units, x_outer, hidden_outer = (
        _multiple(units, WEIGHT_UNIT),
        _multiple(x_outer, UNIT),
        _multiple(hidden_outer, UNIT),
    )
    x_inside = _inside(BLOCK_C, BLOCK_T, x_outer, LAST)
    hidden_inside = _inside(BLOCK_H, BLOCK_T, hidden_outer, LAST)
    weight_inside = _inside(BLOCK_C, BLOCK_H, units, False)
    offset = tl.load(bias + first_c + c, mask=known, other=0.0).to(tl.float32)[:, None]

    found = tl.full([BLOCK_C], float("-inf"), tl.float32)
    count = tl.zeros([BLOCK_C], tl.float32)
    centre = tl.zeros([BLOCK_C], tl.float32)
    spread = tl.zeros([BLOCK_C], tl.float32)
    for first in range(0, frames, BLOCK_T):
        real, readable = (t < frames - first)[None, :], (t < end - first)[None, :]
        scores = tl.zeros([BLOCK_C, BLOCK_T], tl.float32)
        for first_h in range(0, units, BLOCK_H):
            inside = h < units - first_h  # [BLOCK_H]
            place = _tile(weight, first_c, first_h, units, False, WEIGHT_UNIT) + weight_inside
            part = tl.load(place, mask=known[:, None] & inside[None, :], other=0.0)  # [BLOCK_C, BLOCK_H]
            place = _tile(hidden, first_h, first, hidden_outer, LAST, UNIT) + hidden_inside
            layer = tl.load(place, mask=inside[:, None] & readable, other=0.0)  # [BLOCK_H, BLOCK_T]
            scores = _add_product(scores, part, layer)
        scores = tl.where(real, scores + offset, float("-inf"))
        place = _tile(x, first_c, first, x_outer, LAST, UNIT) + x_inside
        values = tl.load(place, mask=known[:, None] & readable, other=0.0).to(tl.float32)  # [BLOCK_C, BLOCK_T]
        before = found
        found = tl.maximum(before, tl.max(scores, axis=1))
        pivot = tl.where(found == float("-inf"), 0.0, found)  # infinity less infinity is NaN
        weights = tl.exp(scores - pivot[:, None])
        scale = tl.exp(before - pivot)
        count, centre, spread = _add_tile(count, centre, spread, tl.where(real, values, 0.0), weights, scale)

    none = frames == 0
    # Of weights that are all zero there is no mean, but a row without frames has mean 0.
    centre = tl.where((count == 0) & (frames > 0), float("nan"), centre)
    statistic = row * channels + first_c + c
    tl.store(mean + statistic, centre, mask=known)
    tl.store(var + statistic, tl.where(none, 0.0, spread / tl.where(none, 1.0, count)), mask=known)
    tl.store(highest + statistic, tl.where(none, 0.0, found), mask=known)
    tl.store(total + statistic, count, mask=known)


def _laid_out(value: Tensor, last: bool) -> Tensor:
    """The tensor, or a copy where what should lie side by side does not."""
    if last:
        return value if value.stride(1) == 1 else value.transpose(1, 2).contiguous().transpose(1, 2)
    return value if value.stride(2) == 1 else value.contiguous()


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr() // tensor.element_size()


def forward(
    x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and variance, then the highest logit and the sum of weights over it, all float32 of shape (B, C).

    Args:
        x: Shape (B, C, T), float32, float16 or bfloat16, as all but the lengths.
        hidden: Shape (B, H, T).
        weight: Shape (C, H).
        bias: Shape (C,).
        lengths: Real frames per row, int64, shape (B,); None where all T are.
    """
    batch, channels, num_frames = x.shape
    mean, var, highest, total = (x.new_empty(batch, channels, dtype=torch.float32) for _ in range(4))
    if triton.knobs.runtime.interpret and x.dtype == torch.bfloat16:
        # The interpreter multiplies the bits of bfloat16 as if they were integers. Products are exact in float32 too.
        hidden, weight = hidden.float(), weight.float()
    last = x.stride(1) == 1 and x.stride(2) != 1
    x, hidden, weight = _laid_out(x, last), _laid_out(hidden, last), weight.contiguous()
    inner, outer = (1, 2) if last else (2, 1)
    widest = 16 // x.element_size()
    weight_unit = math.gcd(widest, _address(weight), weight.shape[1])
    unit = widest
    for tensor in (x, hidden):
        unit = math.gcd(unit, _address(tensor), tensor.shape[inner], tensor.stride(0), tensor.stride(outer))
    # What is not there is not read, and any tensor will do.
    tensors = [x, hidden, weight, bias.contiguous(), x if lengths is None else lengths.contiguous()]
    sizes = {"channels": channels, "num_frames": num_frames, "units": weight.shape[1]}
    sizes |= {"x_row": x.stride(0), "x_outer": x.stride(outer)}
    sizes |= {"hidden_row": hidden.stride(0), "hidden_outer": hidden.stride(outer)}
    grid = (batch * triton.cdiv(channels, _TILE["BLOCK_C"]),)
    if grid[0]:
        with torch.cuda.device_of(x):
            _moments_kernel[grid](
                *tensors, mean, var, highest, total, **sizes,
                RAGGED=lengths is not None, LAST=last, UNIT=unit, WEIGHT_UNIT=weight_unit, **_TILE, **_OPTIONS,
            )  # fmt: skip
    return mean, var, highest, total
