"""Products over frames in Triton: a layer with what follows it, and the parts that other ops make products of."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tile sizes: T frames, N output channels, C input channels. The small tile is for products that would leave most of a
# GPU idle, the mixed one for float32 inputs of half products, which take twice the shared memory. Splitting float32
# takes registers, and so do loads of less than 16 bytes: their tiles are small in any case. Without a limit, the
# assembler spills a few of their registers so that more blocks fit on a multiprocessor.
_TILE = {"BLOCK_T": 128, "BLOCK_N": 128, "BLOCK_C": 64, "num_warps": 8, "num_stages": 3}
_SMALL_TILE = {"BLOCK_T": 64, "BLOCK_N": 32, "BLOCK_C": 64, "num_warps": 4, "num_stages": 4}
_MIXED_TILE = {"BLOCK_T": 128, "BLOCK_N": 128, "BLOCK_C": 32, "num_warps": 8, "num_stages": 3}
FP32_TILE = {"BLOCK_T": 64, "BLOCK_N": 64, "BLOCK_C": 16, "num_warps": 4, "num_stages": 3, "maxnreg": 232}
UNALIGNED_TILE = {"BLOCK_T": 64, "BLOCK_N": 32, "BLOCK_C": 32, "num_warps": 8, "num_stages": 1, "maxnreg": 232}
# Triton 3.10 turns fusion off unless asked; asking keeps the numbers the same across versions.
_OPTIONS = {"enable_fp_fusion": True}
# Programs below which the small tile is taken: about the multiprocessors of a large GPU. It does not follow the device,
# so that results do not.
_PROGRAMS = 128
# Inputs that the kernel reads where they lie; more are joined first.
_PARTS = 3

# Of interpreted bfloat16 numbers the conversion cuts, and a product takes the bits for integers.
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

# How wide loads can be is said by the UNITs alone: a few compiled forms of the kernel, not one for each mixture of
# sizes and strides.
_ANY_SIZE = {
    "do_not_specialize": [
        "total", "frames", "outputs", "channels_0", "channels_1", "channels_2", "row_0", "row_1", "row_2",
        "frame_0", "frame_1", "frame_2", "taps", "dilation", "slots",
    ],
    "do_not_specialize_on_alignment": [
        "x_0", "x_1", "x_2", "weight", "vectors", "offset", "lengths", "counted", "out", "sums",
    ],
}  # fmt: skip


@triton.jit
def _split(x):
    """Two numbers of 11 significant bits, which tensor cores take, whose sum is ``x`` but for its last bit."""
    high = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def add_product(total, x, y):
    """``total`` plus the matrix product, in float32.

    That of float32 is tf32x3, three products of tensor cores with an error near that of float32: one of tf32 alone errs
    by 1e-3, and float32 without tensor cores is slower. It is split by rounding; ``tl.dot`` would cut, for twice the
    error. Each step has sums of its own, as tensor cores cut what they add to. Infinite operands give NaN.
    """
    if x.dtype == tl.float32:
        high_x, low_x = _split(x)
        high_y, low_y = _split(y)
        part = tl.dot(low_x, high_y, input_precision="tf32")
        part = tl.dot(high_x, low_y, acc=part, input_precision="tf32")
        return total + tl.dot(high_x, high_y, acc=part, input_precision="tf32")
    elif _INTERPRETED:
        return tl.dot(x.to(tl.float32), y.to(tl.float32), acc=total, input_precision="ieee")
    else:
        return tl.dot(x, y, acc=total)


@triton.jit
def rounded(x, TYPE: tl.constexpr):
    """``x`` in another type, rounded to nearest, ties to even."""
    if _INTERPRETED and x.dtype == tl.float32 and tl.bfloat16 == TYPE:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(TYPE)


@triton.jit
def multiple(n, UNIT: tl.constexpr):
    """``n``, which is a multiple of ``UNIT``, in a form that tells the compiler so."""
    return n // UNIT * UNIT


@triton.jit
def pointers(base, offsets, inside, UNIT: tl.constexpr):
    """Where the elements ``inside`` [N] of lines begin, [M, N], whose lines [M] all begin at a multiple of ``UNIT``."""
    lines = tl.multiple_of(base + offsets, base.dtype.element_ty.primitive_bitwidth // 8 * UNIT)
    return lines[:, None] + inside[None, :]


@triton.jit
def length_of(lengths, row, frames, GIVEN: tl.constexpr):
    """Real frames of rows. A length outside 0..T would read out of bounds and is taken as the nearer of the two."""
    if GIVEN:
        return tl.minimum(tl.maximum(tl.load(lengths + row), 0), frames).to(tl.int32)
    else:
        return row * 0 + frames


@triton.jit
def add_step(
    total, x, start, frame, channels, first_c, shift, t, length, weight, first_row, n, outputs,
    POINT: tl.constexpr, REFLECT: tl.constexpr, UNIT: tl.constexpr, WEIGHT_UNIT: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``total`` [T, N] plus what one tap adds to it of a few channels of an input.

    Args:
        total: Sums, float32.
        x: Input, whose frame f of the row of ``t[i]`` begins at ``start[i] + f * frame``.
        start: [T].
        frame: Distance of frames.
        channels: Of the input.
        first_c: The first channel, a multiple of ``BLOCK_C``.
        shift: Frames from the one that is made to the one that is read.
        t: Frames [T], each one that can be read. One in the padding gives a sum of no meaning.
        length: Real frames of each row, [T].
        weight: Matrix (R, N) in the type of the product.
        first_row: Row of the first channel of this tap.
        n: Output channels [N].
        outputs: How many there are.
        POINT: There is one tap only.
        REFLECT: Frames outside are mirrored, not 0.
        UNIT: Elements of the input that one load can take.
        WEIGHT_UNIT: Of the weight.
    """
    c = tl.arange(0, BLOCK_C)
    known = c < multiple(channels, UNIT) - first_c
    mask = known[None, :]
    if not POINT:
        t += shift
        if REFLECT:
            period = tl.maximum(2 * length - 2, 1)
            t = tl.abs(t) % period
            t = tl.minimum(t, period - t)
        else:
            mask = mask & ((t >= 0) & (t < length))[:, None]
    # A mask of rows where none is needed would take registers.
    values = tl.load(pointers(x, start + t.to(tl.int64) * frame, first_c + c, UNIT), mask=mask, other=0.0)  # [T, C]
    rows = (first_row + first_c + c).to(tl.int64) * outputs
    place = pointers(weight, rows, n, WEIGHT_UNIT)
    part = tl.load(place, mask=known[:, None] & (n < outputs)[None, :], other=0.0)  # [C, N]
    return add_product(total, rounded(values, part.dtype), part)


@triton.jit
def followed(total, vectors, n, outputs, RELU: tl.constexpr, AFFINE: tl.constexpr):
    """Sums [T, N] after ReLU and batch norm."""
    if RELU:
        total = tl.where(total < 0, 0.0, total)  # keeps NaN
    if AFFINE:
        scale = tl.load(vectors + outputs + n, mask=n < outputs, other=0.0)
        shift = tl.load(vectors + 2 * outputs + n, mask=n < outputs, other=0.0)
        total = total * scale[None, :] + shift[None, :]
    return total


@triton.jit
def _tanh(x):
    """Hyperbolic tangent: its series around 0, where the closed form cancels."""
    square = x * x
    series = square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    power = tl.exp(-2 * tl.abs(x))
    far = (1 - power) / (1 + power)
    return tl.where(tl.abs(x) < 0.25, x + x * series, tl.where(x < 0, -far, far))


@triton.jit(**_ANY_SIZE)
def _product_kernel(
    x_0, x_1, x_2, weight, vectors, offset, lengths, counted, out, sums,
    total, frames, outputs, channels_0, channels_1, channels_2, row_0, row_1, row_2, frame_0, frame_1, frame_2,
    taps, dilation, slots,
    PARTS: tl.constexpr, POINT: tl.constexpr, REFLECT: tl.constexpr, RELU: tl.constexpr, AFFINE: tl.constexpr,
    TANH: tl.constexpr, OFFSET: tl.constexpr, RAGGED: tl.constexpr, SUMS: tl.constexpr, COUNTED: tl.constexpr,
    UNIT: tl.constexpr, WEIGHT_UNIT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A tile of the outputs (B * T, N), and of their sums over the frames of each row.

    Tiles follow one another through the frames of all rows: a tile may hold the end of one row and the start of the
    next, and none is lost at the end of each row.
    """
    outputs = multiple(outputs, WEIGHT_UNIT)
    columns = tl.cdiv(outputs, BLOCK_N)
    tile = tl.program_id(0) // columns
    n = (tl.program_id(0) % columns) * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]
    m = tile * BLOCK_T + tl.arange(0, BLOCK_T)  # [T]
    exists = m < total
    m = tl.minimum(m, total - 1)
    row = m // frames
    t = m - row * frames
    length = length_of(lengths, row, frames, RAGGED)
    real = exists & (t < length)
    known = n < outputs
    stored = exists[:, None] & known[None, :]
    # The bias comes first: after the product its registers would come on top of those of scale and shift.
    result = tl.zeros([BLOCK_T, BLOCK_N], tl.float32) + tl.load(vectors + n, mask=known, other=0.0)[None, :]
    if OFFSET:
        result += tl.load(offset + (row.to(tl.int64) * outputs)[:, None] + n[None, :], mask=stored, other=0.0)
    steps_0, steps_1, steps_2 = tl.cdiv(channels_0, BLOCK_C), tl.cdiv(channels_1, BLOCK_C), tl.cdiv(channels_2, BLOCK_C)
    taps = 1 if POINT else taps
    steps = steps_0 if PARTS == 1 else steps_0 + steps_1 if PARTS == 2 else steps_0 + steps_1 + steps_2
    work = tl.max(real.to(tl.int32)) if RAGGED else 1  # none where all is padding
    for step in range(0, steps * taps * work):
        x, channels, of_row, of_frame, tap_steps, first_row = x_0, channels_0, row_0, frame_0, steps_0, 0
        if PARTS > 1:
            other = step >= steps_0 * taps
            x = tl.where(other, x_1, x)
            of_row = tl.where(other, row_1, of_row)
            of_frame = tl.where(other, frame_1, of_frame)
            channels = tl.where(other, channels_1, channels)
            first_row = tl.where(other, channels_0 * taps, 0)
            tap_steps = tl.where(other, steps_1, steps_0)
            step = tl.where(other, step - steps_0 * taps, step)
        if PARTS > 2:
            other = other & (step >= steps_1 * taps)
            x = tl.where(other, x_2, x)
            of_row = tl.where(other, row_2, of_row)
            of_frame = tl.where(other, frame_2, of_frame)
            channels = tl.where(other, channels_2, channels)
            first_row = tl.where(other, (channels_0 + channels_1) * taps, first_row)
            tap_steps = tl.where(other, steps_2, tap_steps)
            step = tl.where(other, step - steps_1 * taps, step)
        tap = 0 if POINT else step // tap_steps
        result = add_step(
            result, x, row.to(tl.int64) * of_row, of_frame, channels, (step - tap * tap_steps) * BLOCK_C,
            (tap - taps // 2) * dilation, t, length, weight, first_row + tap * channels, n, outputs,
            POINT, REFLECT, UNIT, WEIGHT_UNIT, BLOCK_C,
        )  # fmt: skip
    result = followed(result, vectors, n, outputs, RELU, AFFINE)
    if TANH:
        result = _tanh(result)
    result = tl.where(real[:, None], result, 0.0)
    tl.store(
        pointers(out, m.to(tl.int64) * outputs, n, WEIGHT_UNIT), rounded(result, out.dtype.element_ty), mask=stored
    )
    if SUMS:
        first, last = tile * BLOCK_T, tl.minimum(tile * BLOCK_T + BLOCK_T, total) - 1
        for r in range(first // frames, last // frames + 1):
            begin = r * frames
            end = begin + length_of(counted, r, frames, COUNTED)
            added = tl.sum(tl.where((exists & (m >= begin) & (m < end))[:, None], result, 0.0), axis=0)  # [N]
            slot = tile - begin // BLOCK_T
            tl.store(sums + (r * slots + slot).to(tl.int64) * outputs + n, added, mask=known)


def channels_side_by_side(x: Tensor) -> Tensor:
    """(B, C, T), or a copy, whose channels lie side by side."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.transpose(1, 2).contiguous().transpose(1, 2)


def unit_of(tensors: Sequence[Tensor]) -> int:
    """How many elements of (B, C, T) tensors, channels side by side, one load can take: up to 16 bytes."""
    unit = 16 // tensors[0].element_size()
    for x in tensors:
        unit = math.gcd(unit, address(x), x.shape[1], x.stride(0), x.stride(2))
    return unit


def address(x: Tensor) -> int:
    """Of the first element, in elements."""
    return x.data_ptr() // x.element_size()


def weight_unit_of(weight: Tensor) -> int:
    """How many elements of a row of a matrix one load can take."""
    return math.gcd(16 // weight.element_size(), address(weight), weight.shape[1])


def tile_of(inputs: Sequence[Tensor], weight: Tensor, total: int) -> dict[str, int]:
    """The tile for a product of this weight over so many frames of all rows."""
    if unit_of(inputs) < 16 // inputs[0].element_size() or weight_unit_of(weight) < 16 // weight.element_size():
        return UNALIGNED_TILE
    if weight.dtype == torch.float32:
        return FP32_TILE
    programs = triton.cdiv(total, _TILE["BLOCK_T"]) * triton.cdiv(weight.shape[1], _TILE["BLOCK_N"])
    if programs < _PROGRAMS:
        return _SMALL_TILE
    return _TILE if inputs[0].element_size() == weight.element_size() else _MIXED_TILE


def multiply(
    inputs: Sequence[Tensor],
    weight: Tensor,
    vectors: Tensor,
    lengths: Tensor | None,
    out: Tensor,
    *,
    offset: Tensor | None = None,
    taps: int = 1,
    dilation: int = 1,
    reflect: bool = False,
    relu: bool = True,
    affine: bool = True,
    tanh: bool = False,
    sums: Tensor | None = None,
    counted: Tensor | None = None,
) -> None:
    """Writes a layer's outputs.

    Args:
        inputs: Up to three (B, C_i, T), channels side by side.
        weight: Matrix (R, N) in the type of the product.
        vectors: Bias, scale, shift (and one more) by output channel, float32, shape (4, N).
        lengths: Real frames per row, int64, shape (B,); None where all T are.
        out: Shape (B, N, T), its channels side by side and its frames one after the other.
        offset: Added to the bias of each row, float32, shape (B, N).
        taps: Taps of the convolution.
        dilation: Their distance in frames.
        reflect: Frames outside are mirrored, not 0.
        relu: Apply ReLU.
        affine: Apply scale and shift.
        tanh: Apply the hyperbolic tangent last.
        sums: Takes sums of the outputs over the frames of each row, by tile: float32, shape (B, slots, N).
        counted: Frames per row that ``sums`` takes, as ``lengths``.
    """
    batch, outputs, frames = out.shape
    total = batch * frames
    if total >= 2**30:
        raise ValueError(f"x must have fewer than 2**30 frames in all rows, got {total}")
    tile = tile_of(inputs, weight, total)
    grid = (triton.cdiv(total, tile["BLOCK_T"]) * triton.cdiv(outputs, tile["BLOCK_N"]),)
    if not grid[0]:
        return
    x = [*inputs, *[inputs[0]] * (_PARTS - len(inputs))]
    sizes = [part.shape[1] for part in x] + [part.stride(0) for part in x] + [part.stride(2) for part in x]
    # What is not there is not read, and any tensor will do.
    others = [vectors if value is None else value.contiguous() for value in (offset, lengths, counted)]
    with torch.cuda.device_of(out):
        _product_kernel[grid](
            *x, weight, vectors, *others, out, vectors if sums is None else sums,
            total, frames, outputs, *sizes, taps, dilation, 0 if sums is None else sums.shape[1],
            PARTS=len(inputs), POINT=taps == 1, REFLECT=reflect, RELU=relu, AFFINE=affine, TANH=tanh,
            OFFSET=offset is not None, RAGGED=lengths is not None, SUMS=sums is not None, COUNTED=counted is not None,
            UNIT=unit_of(inputs), WEIGHT_UNIT=weight_unit_of(weight), **tile, **_OPTIONS,
        )  # fmt: skip


def empty_frames(like: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """(B, N, T) with a frame's channels side by side."""
    batch, _, frames = like.shape
    return like.new_empty_strided((batch, channels, frames), (frames * channels, 1, channels), dtype=dtype)


def forward(
    x: Sequence[Tensor],
    weight: Tensor,
    vectors: Tensor,
    offset: Tensor | None,
    lengths: Tensor | None,
    integers: Sequence[int],
    floats: Sequence[float],
) -> Tensor:
    """The layer's outputs, shape (B, N, T), channels last: float32, float16 or bfloat16, as the product.

    Args:
        x: Inputs (B, C_i, T), float32, float16 or bfloat16, all alike.
        weight: Matrix (R, N) in the type of the product.
        vectors: Bias, scale and shift by output channel, and one row more, float32, shape (4, N).
        offset: Added to the bias of each row, float32, shape (B, N), or None.
        lengths: Real frames per row, int64, shape (B,); None where all T are.
        integers: Precision, taps, dilation, and whether to reflect, and to apply ReLU, scale and shift, and tanh.
        floats: Of quantised products alone.
    """
    _, taps, dilation, reflect, relu, affine, tanh = integers
    inputs = list(x)
    if len(inputs) > _PARTS:
        rows = weight.split([taps * part.shape[1] for part in inputs])
        last = torch.cat([part.unflatten(0, (taps, -1)) for part in rows[_PARTS - 1 :]], dim=1).flatten(0, 1)
        weight = torch.cat([*rows[: _PARTS - 1], last])
        inputs = [*inputs[: _PARTS - 1], torch.cat(inputs[_PARTS - 1 :], dim=1)]
    out = empty_frames(inputs[0], weight.shape[1], weight.dtype)
    multiply(
        [channels_side_by_side(part) for part in inputs], weight.contiguous(), vectors.contiguous(), lengths, out,
        offset=offset, taps=taps, dilation=dilation,
        reflect=bool(reflect), relu=bool(relu), affine=bool(affine), tanh=bool(tanh),
    )  # fmt: skip
    return out
