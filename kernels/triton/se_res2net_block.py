"""The block of ECAPA-TDNN in Triton: products with what follows them, and all Res2 convolutions in one kernel."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tdnn_layer import (
    FP32_TILE,
    UNALIGNED_TILE,
    add_product,
    add_step,
    address,
    channels_side_by_side,
    empty_frames,
    followed,
    length_of,
    multiple,
    multiply,
    pointers,
    rounded,
    tile_of,
    unit_of,
)

# Tile sizes: T frames, N channels of an output, C of an input; B rows, K slots of sums, S units.
_CHAIN_TILE = {"BLOCK_T": 64, "BLOCK_N": 128, "BLOCK_C": 32, "num_warps": 8, "num_stages": 4}
_CHAIN_64_TILE = {"BLOCK_T": 128, "BLOCK_N": 64, "BLOCK_C": 32, "num_warps": 8, "num_stages": 4}
_GATES_TILE = {"BLOCK_B": 16, "BLOCK_K": 16, "BLOCK_C": 64, "BLOCK_S": 64, "num_warps": 8, "num_stages": 2}
_RESIDUAL_TILE = {"BLOCK_T": 16, "BLOCK_N": 256, "num_warps": 4, "num_stages": 1}
_OPTIONS = {"enable_fp_fusion": True}
# Programs of the chain that a large GPU runs at once: two on each multiprocessor. It does not follow the device, so
# that results do not.
_PROGRAMS = 256

_ANY_SIZE = {
    "do_not_specialize": [
        "total", "batch", "frames", "width", "convolutions", "span", "spans", "kept", "weight_step", "vectors_step",
        "taps", "dilation", "channels", "units", "slots", "tile_frames", "rest_row", "rest_frame",
    ],
    "do_not_specialize_on_alignment": [
        "hidden", "weights", "vectors", "lengths", "chained", "scratch", "sums", "counted", "squeeze",
        "squeeze_vectors", "excite", "excite_vectors", "squeezed", "gates", "y", "rest",
    ],
}  # fmt: skip


@triton.jit(**_ANY_SIZE)
def _chain_kernel(
    hidden, weights, vectors, lengths, chained, scratch,
    frames, width, convolutions, span, spans, kept, weight_step, vectors_step, taps, dilation,
    FIRST: tl.constexpr, REFLECT: tl.constexpr, RAGGED: tl.constexpr, UNIT: tl.constexpr, WEIGHT_UNIT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """All Res2 convolutions over a span of frames of one row, and the group that passes.

    What a convolution reads, a group plus the output of the convolution before, goes through ``scratch`` (programs, 2,
    kept, width) in the type of the product. It never leaves the caches, and no program reads what another one wrote:
    where a row has several spans, each makes the frames beyond its ends that it needs itself.
    """
    program = tl.program_id(0)
    row = program // spans
    first = (program % spans) * span
    length = length_of(lengths, row, frames, RAGGED)
    last = tl.minimum(first + span, length)
    end = tl.where(first < length, length, 0)  # nothing to do where all is padding
    reach = taps // 2 * dilation
    base = tl.maximum(first - convolutions * reach, 0)  # frame of the first line of the scratch
    width = multiple(width, UNIT if UNIT > WEIGHT_UNIT else WEIGHT_UNIT)
    channels = (convolutions + 1) * width
    line = row.to(tl.int64) * frames * channels
    hidden += line
    chained += line
    half = kept.to(tl.int64) * width
    # Frame 0 of the row, had it its place in the scratch.
    inputs = scratch + (program * 2 * half - base.to(tl.int64) * width)
    steps = tl.cdiv(width, BLOCK_C)
    i, j = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_N)

    # Past the end tiles make the last frame again: what is written there twice is the same.
    stop = tl.minimum(last + convolutions * reach, end)
    for start in range(base, stop, BLOCK_T):
        t = tl.minimum(start + i, stop - 1)  # [T]
        own = ((t >= first) & (t < last))[:, None]
        of_frame = t.to(tl.int64) * channels
        for first_n in range(0, width, BLOCK_N):
            n = first_n + j  # [N]
            known = (n < width)[None, :]
            passing = of_frame + (0 if FIRST else convolutions * width)
            values = tl.load(pointers(hidden, passing, n, UNIT), mask=own & known, other=0.0)
            tl.store(pointers(chained, passing, n, UNIT), values, mask=own & known)
            group = of_frame + (width if FIRST else 0)
            values = tl.load(pointers(hidden, group, n, UNIT), mask=known, other=0.0)
            place = pointers(inputs, t.to(tl.int64) * width, n, WEIGHT_UNIT)
            tl.store(place, rounded(values, inputs.dtype.element_ty), mask=known)
    tl.debug_barrier()

    for k in range(0, convolutions):
        beyond = (convolutions - 1 - k) * reach
        source, target = inputs + k % 2 * half, inputs + (k + 1) % 2 * half
        weight, follow = weights + weight_step.to(tl.int64) * k, vectors + vectors_step.to(tl.int64) * k
        group = (k + 1 if FIRST else k) * width
        stop = tl.minimum(last + beyond, end)
        for start in range(tl.maximum(first - beyond, 0), stop, BLOCK_T):
            t = tl.minimum(start + i, stop - 1)
            own = ((t >= first) & (t < last))[:, None]
            for first_n in range(0, width, BLOCK_N):
                n = first_n + j
                known = n < width
                total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32) + tl.load(follow + n, mask=known, other=0.0)[None, :]
                for step in range(0, steps * taps):
                    tap = step // steps
                    total = add_step(
                        total, source, 0, width, width, (step - tap * steps) * BLOCK_C, (tap - taps // 2) * dilation,
                        t, length, weight, tap * width, n, width, False, REFLECT, WEIGHT_UNIT, WEIGHT_UNIT, BLOCK_C,
                    )  # fmt: skip
                total = followed(total, follow, n, width, True, True)
                of_frame = t.to(tl.int64) * channels + group
                stored = rounded(total, chained.dtype.element_ty)
                tl.store(pointers(chained, of_frame, n, UNIT), stored, mask=own & known[None, :])
                if k + 1 < convolutions:
                    mask = known[None, :]
                    total += tl.load(pointers(hidden, of_frame + width, n, UNIT), mask=mask, other=0.0).to(tl.float32)
                    place = pointers(target, t.to(tl.int64) * width, n, WEIGHT_UNIT)
                    tl.store(place, rounded(total, inputs.dtype.element_ty), mask=mask)
        # The next convolution reads what all threads of this program have written.
        tl.debug_barrier()


@triton.jit(**_ANY_SIZE)
def _gates_kernel(
    sums, counted, squeeze, squeeze_vectors, excite, excite_vectors, squeezed, gates,
    batch, frames, channels, units, slots, tile_frames,
    COUNTED: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Squeeze-and-excitation of a few rows: means out of the sums of tiles, two dense layers, the sigmoid."""
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    exists = (row < batch)[:, None]
    row = tl.minimum(row, batch - 1)
    count = tl.maximum(length_of(counted, row, frames, COUNTED), 1).to(tl.float32)
    used = ((row + 1) * frames - 1) // tile_frames - row * frames // tile_frames + 1  # tiles that a row lies in
    k, c, s = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_S)
    for first_s in range(0, units, BLOCK_S):
        of_unit = first_s + s
        known = (of_unit < units)[None, :]
        bias = tl.load(squeeze_vectors + of_unit, mask=of_unit < units, other=0.0)
        total = tl.zeros([BLOCK_B, BLOCK_S], tl.float32) + bias[None, :]
        for first_c in range(0, channels, BLOCK_C):
            of_channel = first_c + c
            real = of_channel < channels
            mean = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
            for first_k in range(0, slots, BLOCK_K):
                slot = first_k + k
                lines = (row.to(tl.int64) * slots)[:, None] + slot[None, :]  # [B, K]
                mask = (slot[None, :] < used[:, None])[:, :, None] & real[None, None, :]
                place = sums + (lines * channels)[:, :, None] + of_channel[None, None, :]
                mean += tl.sum(tl.load(place, mask=mask, other=0.0), axis=1)
            place = squeeze + (of_channel.to(tl.int64) * units)[:, None] + of_unit[None, :]
            part = tl.load(place, mask=real[:, None] & known, other=0.0)  # [C, S]
            total = add_product(total, mean / count[:, None], part)
        place = squeezed + (row.to(tl.int64) * units)[:, None] + of_unit[None, :]
        tl.store(place, tl.where(total < 0, 0.0, total), mask=exists & known)
    # The second layer reads what all threads of this program have written.
    tl.debug_barrier()
    for first_n in range(0, channels, BLOCK_S):
        n = first_n + s
        known = (n < channels)[None, :]
        bias = tl.load(excite_vectors + n, mask=n < channels, other=0.0)
        total = tl.zeros([BLOCK_B, BLOCK_S], tl.float32) + bias[None, :]
        for first_s in range(0, units, BLOCK_C):
            of_unit = first_s + c
            real = of_unit < units
            place = squeezed + (row.to(tl.int64) * units)[:, None] + of_unit[None, :]
            values = tl.load(place, mask=real[None, :], other=0.0)
            place = excite + (of_unit.to(tl.int64) * channels)[:, None] + n[None, :]
            part = tl.load(place, mask=real[:, None] & known, other=0.0)  # [C, N]
            total = add_product(total, values, part)
        place = gates + (row.to(tl.int64) * channels)[:, None] + n[None, :]
        tl.store(place, 1 / (1 + tl.exp(-total)), mask=exists & known)


@triton.jit(**_ANY_SIZE)
def _residual_kernel(
    y, gates, rest, lengths, total, frames, channels, rest_row, rest_frame,
    RAGGED: tl.constexpr, UNIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``y = y * gate + rest`` in the real frames, else 0."""
    channels = multiple(channels, UNIT)
    columns = tl.cdiv(channels, BLOCK_N)
    n = (tl.program_id(0) % columns) * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]
    m = (tl.program_id(0) // columns) * BLOCK_T + tl.arange(0, BLOCK_T)  # [T]
    mask = (m < total)[:, None] & (n < channels)[None, :]
    m = tl.minimum(m, total - 1)
    row = m // frames
    t = m - row * frames
    real = (t < length_of(lengths, row, frames, RAGGED))[:, None]
    line = row.to(tl.int64)
    place = pointers(y, m.to(tl.int64) * channels, n, UNIT)
    gate = tl.load(pointers(gates, line * channels, n, UNIT), mask=mask, other=0.0)
    value = tl.load(place, mask=mask & real, other=0.0).to(tl.float32) * gate
    added = pointers(rest, line * rest_row + t.to(tl.int64) * rest_frame, n, UNIT)
    value += tl.load(added, mask=mask & real, other=0.0).to(tl.float32)
    tl.store(place, rounded(tl.where(real, value, 0.0), y.dtype.element_ty), mask=mask)


def forward(
    x: Tensor,
    params: Sequence[Tensor],
    padded: Tensor | None,
    excited: Tensor | None,
    integers: Sequence[int],
    floats: Sequence[float],
) -> Tensor:
    """The block's outputs, shape (B, C, T), channels last, in the type of ``x``.

    Args:
        x: Shape (B, C_in, T), float32, float16 or bfloat16.
        params: Weight (R, N) and vectors (4, N) of in, out, squeeze, excite, the shortcut where there is one, and the
            Res2 convolutions. Weights are in the type of the products, squeeze and excite float32.
        padded: Real frames per row, int64, shape (B,); None where all T are.
        excited: Frames per row that the squeeze-and-excitation takes, as ``padded``.
        integers: Precision, number of Res2 convolutions, taps, dilation, flags (1 to reflect, 2 where the first group
            passes), and whether there is a shortcut.
        floats: Of quantised products alone.
    """
    _, convolutions, taps, dilation, flags, has_shortcut = integers
    layers = [(w.contiguous(), v.contiguous()) for w, v in zip(params[::2], params[1::2], strict=True)]
    in_, out, squeeze, excite = layers[:4]
    batch, frames, channels = x.shape[0], x.shape[2], in_[0].shape[1]
    values = channels_side_by_side(x)
    y = empty_frames(x, channels, x.dtype)
    if not y.numel():
        return y
    hidden = empty_frames(x, channels, x.dtype)
    multiply([values], *in_, padded, hidden)
    if convolutions:
        res = layers[-convolutions:]
        hidden = _chain(hidden, res, padded, taps, dilation, reflect=bool(flags & 1), first_passes=bool(flags & 2))
    tile_frames = tile_of([hidden], out[0], batch * frames)["BLOCK_T"]
    slots = (frames - 1) // tile_frames + 2
    sums = x.new_empty((batch, slots, channels), dtype=torch.float32)
    multiply([hidden], *out, padded, y, sums=sums, counted=excited)
    rest = values
    if has_shortcut:
        rest = empty_frames(x, channels, x.dtype)
        multiply([values], *layers[4], padded, rest, relu=False, affine=False)

    units = squeeze[0].shape[1]
    squeezed = x.new_empty((batch, units), dtype=torch.float32)
    gates = x.new_empty((batch, channels), dtype=torch.float32)
    lengths = [gates if value is None else value.contiguous() for value in (excited, padded)]
    with torch.cuda.device_of(x):
        _gates_kernel[(triton.cdiv(batch, _GATES_TILE["BLOCK_B"]),)](
            sums, lengths[0], *squeeze, *excite, squeezed, gates, batch, frames, channels, units, slots, tile_frames,
            COUNTED=excited is not None, **_GATES_TILE, **_OPTIONS,
        )  # fmt: skip
        pieces = triton.cdiv(batch * frames, _RESIDUAL_TILE["BLOCK_T"]) * triton.cdiv(
            channels, _RESIDUAL_TILE["BLOCK_N"]
        )
        _residual_kernel[(pieces,)](
            y, gates, rest, lengths[1], batch * frames, frames, channels, rest.stride(0), rest.stride(2),
            RAGGED=padded is not None, UNIT=math.gcd(4, unit_of([y, rest])), **_RESIDUAL_TILE, **_OPTIONS,
        )  # fmt: skip
    return y


def _chain(
    hidden: Tensor,
    layers: Sequence[tuple[Tensor, ...]],
    lengths: Tensor | None,
    taps: int,
    dilation: int,
    *,
    reflect: bool,
    first_passes: bool,
) -> Tensor:
    """What the layer after the Res2 convolutions reads: their outputs and the group that passes, like ``hidden``."""
    batch, channels, frames = hidden.shape
    width = channels // (len(layers) + 1)
    weights, weight_step = _evenly_spaced([weight for weight, _ in layers])
    vectors, vectors_step = _evenly_spaced([values for _, values in layers])
    widest, weight_widest = 16 // hidden.element_size(), 16 // weights.element_size()
    unit = math.gcd(widest, width)
    weight_unit = math.gcd(weight_widest, address(weights), weight_step, width)
    if unit < widest or weight_unit < weight_widest:
        tile = UNALIGNED_TILE
    elif weights.dtype == torch.float32:
        tile = FP32_TILE
    else:
        tile = _CHAIN_64_TILE if width <= _CHAIN_64_TILE["BLOCK_N"] else _CHAIN_TILE
    reach = len(layers) * (taps // 2) * dilation
    span = _frames_of_program(batch, frames, reach, tile["BLOCK_T"])
    spans, kept = triton.cdiv(frames, span), min(frames, span + 2 * reach)
    chained = torch.empty_like(hidden)
    scratch = hidden.new_empty((batch * spans, 2, kept, width), dtype=weights.dtype)
    with torch.cuda.device_of(hidden):
        _chain_kernel[(batch * spans,)](
            hidden, weights, vectors, vectors if lengths is None else lengths.contiguous(), chained, scratch,
            frames, width, len(layers), span, spans, kept, weight_step, vectors_step, taps, dilation,
            FIRST=first_passes, REFLECT=reflect, RAGGED=lengths is not None, UNIT=unit, WEIGHT_UNIT=weight_unit,
            **tile, **_OPTIONS,
        )  # fmt: skip
    return chained


@functools.lru_cache(maxsize=1024)
def _frames_of_program(batch: int, frames: int, reach: int, block: int) -> int:
    """Frames of the outputs that one program of the chain makes.

    A whole row, or as many as leave, with the frames beyond both ends, whole tiles: whatever takes the fewest tiles one
    after the other. Rows alone are few programs; cut too short they do much twice.
    """
    best, fewest = frames, triton.cdiv(batch, _PROGRAMS) * triton.cdiv(frames, block)
    for tiles in range(1, triton.cdiv(frames, block)):
        span = tiles * block - 2 * reach
        if span > 0:
            found = triton.cdiv(batch * triton.cdiv(frames, span), _PROGRAMS) * tiles
            if found < fewest:
                best, fewest = span, found
    return best


def _evenly_spaced(tensors: Sequence[Tensor]) -> tuple[Tensor, int]:
    """A tensor that begins where the first one does, and the elements from each to the next."""
    steps = {address(after) - address(before) for before, after in itertools.pairwise(tensors)}
    if len(steps) > 1:
        stacked = torch.stack(list(tensors))
        return stacked, stacked.stride(0)
    return tensors[0], next(iter(steps), 0)
