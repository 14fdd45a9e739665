"""Weighted mean and variance over time in Triton: one pass over tiles of channels and frames, and its gradient."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tile sizes: C channels, T frames. Channels that lie side by side are read 64 bytes or more at a time. Where frames do,
# a thread keeps sums for each channel that it reads, and the narrower its loads are, the more of these there are.
_CHANNELS_TILE = {"BLOCK_C": 32, "BLOCK_T": 64}
_FRAMES_TILE = {"BLOCK_C": 16, "BLOCK_T": 128}
_NARROW_TILE = {"BLOCK_C": 8, "BLOCK_T": 128}
# Triton 3.10 turns fusion off unless asked; asking keeps the numbers the same across versions.
_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}

# How wide loads can be is said by UNIT alone: a few compiled forms of a kernel, not one for each mixture of sizes and
# strides.
_ANY_SIZE = {
    "do_not_specialize": ["channels", "num_frames", "x_row", "x_outer", "logits_row", "logits_outer"],
    "do_not_specialize_on_alignment": [
        "x", "logits", "lengths", "mean", "var", "highest", "total", "grad_mean", "grad_var", "grad_x", "grad_logits",
    ],
}  # fmt: skip

# Values of LOGITS.
_NONE, _SHARED, _FULL = 0, 1, 2


@triton.jit
def _count_frames(lengths, row, num_frames, RAGGED: tl.constexpr):
    """Frames of a row. A length outside 0..T would read out of bounds and is taken as the nearer of the two."""
    frames = num_frames
    if RAGGED:
        frames = tl.minimum(tl.maximum(tl.load(lengths + row), 0), num_frames).to(tl.int32)
    return frames


@triton.jit
def _last_read(frames, LAST: tl.constexpr, UNIT: tl.constexpr):
    """One past the last frame that a load may touch: a mask that cuts no wide load in two, where frames are read so."""
    return frames if LAST else tl.cdiv(frames, UNIT) * UNIT


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
    """Adds a tile [C, T] to the sum of weights [C or 1], the mean [C] and the sum of squared deviations [C].

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
    x, logits, lengths, mean, var, highest, total, channels, num_frames, x_row, x_outer, logits_row, logits_outer,
    LOGITS: tl.constexpr, RAGGED: tl.constexpr, LAST: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Mean and variance (B, C) of one tile of channels; highest logit and sum of weights (B, C) or (B, 1)."""
    channels = _multiple(channels, UNIT) if LAST else channels
    tiles = tl.maximum(tl.cdiv(channels, BLOCK_C), 1)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    first_c = (tl.program_id(0) % tiles) * BLOCK_C
    c = tl.arange(0, BLOCK_C)
    t = tl.arange(0, BLOCK_T)
    known = c < channels - first_c  # [BLOCK_C]
    frames = _count_frames(lengths, row, num_frames, RAGGED)
    end = _last_read(frames, LAST, UNIT)
    x += row * x_row
    logits += row * logits_row
    x_outer, logits_outer = _multiple(x_outer, UNIT), _multiple(logits_outer, UNIT)
    x_inside = _inside(BLOCK_C, BLOCK_T, x_outer, LAST)
    logits_inside = _inside(BLOCK_C, BLOCK_T, logits_outer, LAST)

    # [K]: the weights of all channels are one where they share it.
    BLOCK_K: tl.constexpr = BLOCK_C if LOGITS == 2 else 1
    found = tl.full([BLOCK_K], float("-inf") if LOGITS else 0.0, tl.float32)
    count = tl.zeros([BLOCK_K], tl.float32)
    centre = tl.zeros([BLOCK_C], tl.float32)
    spread = tl.zeros([BLOCK_C], tl.float32)
    for first in range(0, frames, BLOCK_T):
        real = (t < frames - first)[None, :]  # [1, BLOCK_T]
        mask = known[:, None] & (t < end - first)[None, :]  # [BLOCK_C, BLOCK_T]
        values = tl.load(_tile(x, first_c, first, x_outer, LAST, UNIT) + x_inside, mask=mask, other=0.0).to(tl.float32)
        if LOGITS == 0:
            weights = real.to(tl.float32)  # [1, BLOCK_T]
            scale = 1.0
        else:
            if LOGITS == 1:
                scores = tl.load(logits + first + t[None, :], mask=real, other=0.0)
            else:
                place = _tile(logits, first_c, first, logits_outer, LAST, UNIT) + logits_inside
                scores = tl.load(place, mask=mask, other=0.0)
            scores = tl.where(real, scores.to(tl.float32), float("-inf"))  # [BLOCK_K, BLOCK_T]
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
    found = tl.where(none, 0.0, found)
    if LOGITS == 2:
        tl.store(highest + statistic, found, mask=known)
        tl.store(total + statistic, count, mask=known)
    elif first_c == 0:
        k = row + tl.arange(0, BLOCK_K)
        tl.store(highest + k, found)
        tl.store(total + k, count)


@triton.jit(**_ANY_SIZE)
def _gradient_kernel(
    grad_mean, grad_var, x, logits, lengths, mean, var, highest, total, grad_x, grad_logits,
    channels, num_frames, x_row, x_outer, logits_row, logits_outer,
    LOGITS: tl.constexpr, RAGGED: tl.constexpr, LAST: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of frames and one of channels, or all of them where these share logits."""
    if LAST:
        channels = _multiple(channels, UNIT)
        outer = channels
    else:
        num_frames = _multiple(num_frames, UNIT)
        outer = num_frames
    time_tiles = tl.cdiv(num_frames, BLOCK_T)
    # Where channels share logits one program adds up all of them, always in the same order.
    channel_tiles = 1 if LOGITS == 1 else tl.cdiv(channels, BLOCK_C)
    tile = tl.program_id(0) % (time_tiles * channel_tiles)
    row = (tl.program_id(0) // (time_tiles * channel_tiles)).to(tl.int64)
    first = (tile % time_tiles) * BLOCK_T
    t = first + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    frames = _count_frames(lengths, row, num_frames, RAGGED)
    end = _last_read(frames, LAST, UNIT)
    real = (t < frames)[None, :]
    x += row * x_row
    logits += row * logits_row
    x_outer, logits_outer = _multiple(x_outer, UNIT), _multiple(logits_outer, UNIT)
    grad_x += row * channels * num_frames
    grad_logits += row * (channels if LOGITS == 2 else 1) * num_frames
    first_c = (tile // time_tiles) * BLOCK_C
    stop_c = channels if LOGITS == 1 else first_c + BLOCK_C
    x_inside = _inside(BLOCK_C, BLOCK_T, x_outer, LAST)
    logits_inside = _inside(BLOCK_C, BLOCK_T, logits_outer, LAST)
    grad_inside = _inside(BLOCK_C, BLOCK_T, outer, LAST)

    if LOGITS != 2:
        k = row + tl.arange(0, 1)
        weights = 1 / tl.load(total + k)[:, None]  # [1, 1]
        if LOGITS == 1:
            scores = tl.load(logits + t[None, :], mask=real, other=0.0).to(tl.float32)  # [1, BLOCK_T]
            weights *= tl.exp(scores - tl.load(highest + k)[:, None])
        summed = tl.zeros([BLOCK_C, BLOCK_T], tl.float32)
    for channel in range(first_c, stop_c, BLOCK_C):
        c = channel + tl.arange(0, BLOCK_C)  # [BLOCK_C]
        known = c < channels
        mask = known[:, None] & (t < end)[None, :]  # [BLOCK_C, BLOCK_T]
        statistic = row * channels + c
        mean_grad = tl.load(grad_mean + statistic, mask=known, other=0.0)[:, None]
        var_grad = tl.load(grad_var + statistic, mask=known, other=0.0)[:, None]
        variance = tl.load(var + statistic, mask=known, other=0.0)[:, None]
        values = tl.load(_tile(x, channel, first, x_outer, LAST, UNIT) + x_inside, mask=mask, other=0.0).to(tl.float32)
        deviation = values - tl.load(mean + statistic, mask=known, other=0.0)[:, None]
        if LOGITS == 2:
            place = _tile(logits, channel, first, logits_outer, LAST, UNIT) + logits_inside
            scores = tl.load(place, mask=mask, other=0.0).to(tl.float32)
            weights = 1 / tl.load(total + statistic, mask=known, other=1.0)[:, None]
            weights = weights * tl.exp(scores - tl.load(highest + statistic, mask=known, other=0.0)[:, None])
        mask = known[:, None] & (t < num_frames)[None, :]
        # Padding may hold anything, and so may what follows from it.
        value = tl.where(real, weights * (mean_grad + 2 * var_grad * deviation), 0.0)
        tl.store(_tile(grad_x, channel, first, outer, LAST, UNIT) + grad_inside, value, mask=mask)
        if LOGITS != 0:
            value = mean_grad * deviation + var_grad * (deviation * deviation - variance)
            value = tl.where(real, weights * value, 0.0)
            if LOGITS == 2:
                tl.store(_tile(grad_logits, channel, first, outer, LAST, UNIT) + grad_inside, value, mask=mask)
            else:
                summed += tl.where(known[:, None], value, 0.0)
    if LOGITS == 1:
        tl.store(grad_logits + t, tl.sum(summed, axis=0), mask=t < num_frames)


def _channels_last(x: Tensor) -> bool:
    """Whether the channels of a frame lie side by side, and the frames of a channel do not."""
    return x.stride(1) == 1 and x.stride(2) != 1


def _laid_out(value: Tensor, last: bool) -> Tensor:
    """The tensor, or a copy where what should lie side by side does not."""
    if last:
        return value if value.stride(1) == 1 else value.transpose(1, 2).contiguous().transpose(1, 2)
    return value if value.stride(2) == 1 else value.contiguous()


def _unit(last: bool, *tensors: Tensor) -> int:
    """How many values that lie side by side one load can take, up to 16 bytes of them, anywhere in the tensors."""
    inner, outer = (1, 2) if last else (2, 1)
    unit = 16 // tensors[0].element_size()
    for tensor in tensors:
        address = tensor.data_ptr() // tensor.element_size()
        unit = math.gcd(unit, address, tensor.shape[inner], tensor.stride(0), tensor.stride(outer))
    return unit


def _arguments(x: Tensor, logits: Tensor | None, lengths: Tensor | None) -> tuple[list[Tensor], dict[str, int]]:
    """What both kernels take: ``x``, ``logits`` and ``lengths`` as they can read them, then sizes and settings."""
    last = _channels_last(x)
    x = _laid_out(x, last)
    kind, scores = _NONE, x  # what is not there is not read, and any tensor will do
    if logits is not None:
        kind = _FULL if logits.shape[1] == x.shape[1] else _SHARED
        scores = _laid_out(logits, last and kind == _FULL)
    outer = 2 if last else 1
    unit = _unit(last, x, scores) if kind == _FULL else _unit(last, x)
    tile = _CHANNELS_TILE if last else _FRAMES_TILE if unit * x.element_size() == 16 else _NARROW_TILE
    sizes = {"channels": x.shape[1], "num_frames": x.shape[2], "x_row": x.stride(0), "x_outer": x.stride(outer)}
    sizes |= {"logits_row": scores.stride(0), "logits_outer": scores.stride(outer)}
    sizes |= {"LOGITS": kind, "RAGGED": lengths is not None, "LAST": last, "UNIT": unit, **tile}
    return [x, scores, x if lengths is None else lengths.contiguous()], sizes


def forward(x: Tensor, logits: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and variance (B, C), then the highest logit and the sum of weights over it (B, K), all float32.

    Args:
        x: Shape (B, C, T), float32, float16 or bfloat16.
        logits: Shape (B, C, T), or (B, 1, T) for all channels, in the type of ``x``; None for equal weights.
        lengths: Real frames per row, int64, shape (B,); None where all T are.
    """
    batch, channels, _ = x.shape
    kinds = 1 if logits is None else logits.shape[1]
    mean, var, highest, total = (
        x.new_empty(batch, size, dtype=torch.float32) for size in (channels, channels, kinds, kinds)
    )
    tensors, sizes = _arguments(x, logits, lengths)
    grid = (batch * max(1, triton.cdiv(channels, sizes["BLOCK_C"])),)
    if batch:
        with torch.cuda.device_of(x):
            _moments_kernel[grid](*tensors, mean, var, highest, total, **sizes, **_OPTIONS)
    return mean, var, highest, total


def backward(
    grad_mean: Tensor,
    grad_var: Tensor,
    x: Tensor,
    logits: Tensor | None,
    lengths: Tensor | None,
    mean: Tensor,
    var: Tensor,
    highest: Tensor,
    total: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and ``logits`` in the layout of ``x``; the latter is (B, 1, T) for shared ones, (0,) for none.

    Args:
        grad_mean: Gradient of the mean, float32, shape (B, C).
        grad_var: Gradient of the variance, float32, shape (B, C).
        x: As :func:`forward`.
        logits: As :func:`forward`.
        lengths: As :func:`forward`.
        mean: Output of :func:`forward`, as the three that follow.
        var: Variance, shape (B, C).
        highest: Highest logit, shape (B, K).
        total: Sum of weights, shape (B, K).
    """
    batch, channels, num_frames = x.shape
    tensors, sizes = _arguments(x, logits, lengths)
    last = sizes["LAST"]

    def like_x() -> Tensor:
        return x.new_empty(batch, num_frames, channels).transpose(1, 2) if last else x.new_empty(x.shape)

    kind = sizes["LOGITS"]
    grad_x = like_x()
    grad_logits = like_x() if kind == _FULL else x.new_empty((batch, 1, num_frames) if kind == _SHARED else 0)
    statistics = [value.contiguous() for value in (mean, var, highest, total)]
    channel_tiles = 1 if kind == _SHARED else triton.cdiv(channels, sizes["BLOCK_C"])
    grid = (batch * channel_tiles * triton.cdiv(num_frames, sizes["BLOCK_T"]),)
    if grid[0]:
        with torch.cuda.device_of(x):
            _gradient_kernel[grid](
                grad_mean.contiguous(), grad_var.contiguous(), *tensors, *statistics,
                grad_x, grad_x if kind == _NONE else grad_logits, **sizes, **_OPTIONS,
            )  # fmt: skip
    return grad_x, grad_logits
