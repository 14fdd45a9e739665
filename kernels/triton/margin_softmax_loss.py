"""Sums over the classes of a margin softmax in Triton: a tile of cosines is made, used and forgotten."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .tdnn_layer import add_product, multiple, pointers, rounded

# Tile sizes: B rows of the batch, R rows of the weight, E of their elements. Without a limit, the assembler spills some
# registers. Rows of up to three parts are read once a tile, and the next tile meanwhile. There are no registers for
# that where rows are longer, a bias has a gradient or sums are binary, and fewer still where products are float32,
# which is split.
_SUMS_TILE = {"BLOCK_B": 128, "BLOCK_R": 32, "BLOCK_E": 64, "num_warps": 8, "num_stages": 2, "maxnreg": 232}
_WEIGHT_TILE = _SUMS_TILE | {"BLOCK_B": 32, "BLOCK_R": 64}
_BATCH_TILE = _SUMS_TILE | {"BLOCK_B": 64, "BLOCK_R": 32}
_LONG = {"num_stages": 1, "maxnreg": 248}
_FP32 = {"num_stages": 1, "BLOCK_E": 32}
_LONG_SUMS_TILE, _FP32_SUMS_TILE = _SUMS_TILE | _LONG, _SUMS_TILE | _FP32
_LONG_WEIGHT_TILE, _FP32_WEIGHT_TILE = _WEIGHT_TILE | _LONG, _WEIGHT_TILE | _FP32
_LONG_BATCH_TILE, _FP32_BATCH_TILE = _BATCH_TILE | _LONG, _BATCH_TILE | _FP32
_TILES = {
    "SUMS": (_SUMS_TILE, _LONG_SUMS_TILE, _FP32_SUMS_TILE),
    "WEIGHT": (_WEIGHT_TILE, _LONG_WEIGHT_TILE, _FP32_WEIGHT_TILE),
    "BATCH": (_BATCH_TILE, _LONG_BATCH_TILE, _FP32_BATCH_TILE),
}
# Triton 3.10 turns fusion off unless asked; asking keeps the numbers the same across versions.
_OPTIONS = {"enable_fp_fusion": True}
# Programs that the classes are divided among, times tiles of the batch: about twice the multiprocessors of a large GPU.
# It does not follow the device, so that results do not.
_PROGRAMS = 256
# Parts of E that a program of a gradient has sums of.
_PARTS = 3
# What is summed (SUMMED of the kernels): logarithms of sums of exponentials, or losses of binary classifiers.
_LOG_SUM, _BINARY_C, _BINARY_A = range(3)
# A row of the weight shorter than this has cosines 0.
_SHORTEST_SQUARED = tl.constexpr(1e-24)

_ANY_SIZE = {
    "do_not_specialize": ["batch", "classes", "width", "spans", "span"],
    "do_not_specialize_on_alignment": [
        "x", "weight", "bias", "target", "found", "found_rows", "values", "left_out", "sums", "grad_sums", "grad_total",
        "grad_weight", "grad_bias", "grad_x",
    ],
}  # fmt: skip


@triton.jit
def _rows_of(tile, classes, CENTERS: tl.constexpr, PLACES: tl.constexpr, BLOCK_R: tl.constexpr):
    """Rows [R] of a tile of classes, and which of them there are.

    Each class has places for a power of two of sub-centers, so that a reshape brings them together.
    """
    r = tl.arange(0, BLOCK_R)
    n, k = tile * (BLOCK_R // PLACES) + r // PLACES, r % PLACES
    return n * CENTERS + k, (n < classes) & (k < CENTERS)


@triton.jit
def _place(matrix, rows, first, width, BLOCK_E: tl.constexpr):
    """Where some elements of rows are, [rows, E], and which of these [1, E] there are."""
    UNIT: tl.constexpr = 128 // matrix.dtype.element_ty.primitive_bitwidth
    width = multiple(width, 8)
    e = first + tl.arange(0, BLOCK_E)
    return pointers(matrix, rows.to(tl.int64) * width, e, UNIT), (e < width)[None, :]


@triton.jit
def _part(matrix, rows, known, first, width, BLOCK_E: tl.constexpr):
    """Some elements of rows, [rows, E]."""
    place, inside = _place(matrix, rows, first, width, BLOCK_E)
    return tl.load(place, mask=known[:, None] & inside, other=0.0)


@triton.jit
def _add_part(
    total, square, x, weight, b, rows, real, known, first, width,
    ACROSS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Products and squares with those of some elements more."""
    values = _part(x, b, real, first, width, BLOCK_E)
    part = _part(weight, rows, known, first, width, BLOCK_E)
    square += tl.sum(part * part, axis=1)
    part = rounded(part, values.dtype)
    if ACROSS:
        return add_product(total, part, tl.trans(values)), square
    else:
        return add_product(total, values, tl.trans(part)), square


@triton.jit
def _cosines(
    x, weight, b, rows, real, known, width, NORMALISE: tl.constexpr, ACROSS: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Cosines [B, R], or [R, B] where they go ``ACROSS``, and what makes rows [R] of the weight of length 1."""
    total = tl.zeros([BLOCK_R, BLOCK_B] if ACROSS else [BLOCK_B, BLOCK_R], tl.float32)
    square = tl.zeros([BLOCK_R], tl.float32)
    if PARTS > 0:
        # Without a loop inside that over tiles, parts of the next tile are read meanwhile.
        for k in tl.static_range(PARTS):
            total, square = _add_part(
                total, square, x, weight, b, rows, real, known, k * BLOCK_E, width,
                ACROSS, BLOCK_E,
            )  # fmt: skip
    else:
        for first in range(0, width, BLOCK_E):
            total, square = _add_part(total, square, x, weight, b, rows, real, known, first, width, ACROSS, BLOCK_E)
    factor = tl.full([BLOCK_R], 1.0, tl.float32)
    if NORMALISE:
        short = square < _SHORTEST_SQUARED
        factor = tl.where(short, 0.0, 1 / tl.sqrt(tl.where(short, 1.0, square)))
        total *= factor[:, None] if ACROSS else factor[None, :]
    return total, factor


@triton.jit
def _of_classes(
    cosine, ACROSS: tl.constexpr, CENTERS: tl.constexpr, PLACES: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The largest cosine of each class, and which sub-center it is of: the first of equal ones."""
    if PLACES == 1:
        return cosine, tl.zeros(cosine.shape, tl.int32)
    else:
        k = tl.arange(0, PLACES)
        if ACROSS:
            apart = tl.reshape(cosine, [BLOCK_R // PLACES, PLACES, BLOCK_B])
            return tl.max(tl.where((k < CENTERS)[None, :, None], apart, float("-inf")), axis=1, return_indices=True)
        else:
            apart = tl.reshape(cosine, [BLOCK_B, BLOCK_R // PLACES, PLACES])
            return tl.max(tl.where((k < CENTERS)[None, None, :], apart, float("-inf")), axis=2, return_indices=True)


@triton.jit
def _of_rows(
    value, center, ACROSS: tl.constexpr, PLACES: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    """Values of classes at the sub-centers that were chosen, 0 at the others."""
    if PLACES == 1:
        return value
    else:
        k = tl.arange(0, PLACES)
        if ACROSS:
            apart = tl.where(k[None, :, None] == center[:, None, :], value[:, None, :], 0.0)
            return tl.reshape(apart, [BLOCK_R, BLOCK_B])
        else:
            apart = tl.where(k[None, None, :] == center[:, :, None], value[:, :, None], 0.0)
            return tl.reshape(apart, [BLOCK_B, BLOCK_R])


@triton.jit
def _offset(bias, n, classes, BIAS: tl.constexpr, SUMMED: tl.constexpr):
    """What is added to the cosines of classes [N], or to all binary logits."""
    if not BIAS:
        return tl.zeros(n.shape, tl.float32)
    elif SUMMED == 0:
        return tl.load(bias + n, mask=n < classes, other=0.0)
    else:
        return tl.load(bias + n * 0)


@triton.jit
def _binary(
    cosine, offset, scale, margin, narrow_cosine, narrow_sine, SUMMED: tl.constexpr, POWER: tl.constexpr
):  # fmt: skip
    """Logits of the binary classifiers of other classes, and their slopes."""
    angle = cosine
    slope = tl.full(cosine.shape, POWER * 1.0, tl.float32) * scale
    if SUMMED == 2:
        square = (1 - cosine) * (1 + cosine)
        sine = tl.sqrt(tl.maximum(square, 1e-12))
        angle = cosine * narrow_cosine + sine * narrow_sine
        slope *= narrow_cosine - tl.where(square < 1e-12, 0.0, cosine / sine * narrow_sine)
        margin = margin * 0
    half = (angle + 1) * 0.5
    power = tl.full(cosine.shape, 2.0, tl.float32)
    for _ in tl.static_range(POWER - 1):
        power *= half
    return (power * half - 1 + margin) * scale + offset, slope * (power * 0.5)


@triton.jit
def _softplus(x):
    """log(1 + exp(x)), as a series that keeps the digits of small values."""
    power = tl.exp(-tl.abs(x))
    s = power / (2 + power)  # log(1 + power) = 2 atanh(s)
    q = s * s
    series = 1 / 9 + q * (1 / 11 + q * (1 / 13 + q * (1 / 15)))
    return tl.maximum(x, 0.0) + 2 * s * (1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * series))))


@triton.jit(**_ANY_SIZE)
def _sums_kernel(
    x, weight, bias, target, found, found_rows, values,
    batch, classes, width, spans, span, scale, margin, narrow_cosine, narrow_sine,
    NORMALISE: tl.constexpr, CENTERS: tl.constexpr, PLACES: tl.constexpr, TOPK: tl.constexpr, SLOTS: tl.constexpr,
    SUMMED: tl.constexpr, POWER: tl.constexpr, BIAS: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Of a tile of the batch over a span of classes.

    ``found``, (5, spans, B): the highest logit, the sum over that, the sum of cosines, the highest cosine but for the
    target's, and that. ``found_rows``, (spans, B, 1 + topk): the rows of the target and of the hardest others, whose
    cosines are ``values``, (spans, B, topk).
    """
    columns = tl.cdiv(batch, BLOCK_B)
    part = tl.program_id(0) // columns
    b = tl.program_id(0) % columns * BLOCK_B + tl.arange(0, BLOCK_B)  # [B]
    real = b < batch
    wanted = tl.load(target + b, mask=real, other=-1)
    inside = tl.arange(0, BLOCK_R // PLACES)  # [N]
    slot = tl.arange(0, SLOTS)  # [S]
    highest = tl.full([BLOCK_B], float("-inf"), tl.float32)
    best = tl.full([BLOCK_B], float("-inf"), tl.float32)
    own = tl.full([BLOCK_B], float("-inf"), tl.float32)
    own_row = tl.full([BLOCK_B], -1, tl.int32)
    sums = tl.zeros([BLOCK_B], tl.float32)
    total = tl.zeros([BLOCK_B], tl.float32)
    # No cosine drives out what fills the slots up to a power of two. Those that are empty differ in their row, so that
    # one is filled at a time.
    held = tl.zeros([BLOCK_B, SLOTS], tl.float32) + tl.where(slot < TOPK, float("-inf"), float("inf"))[None, :]
    held_row = tl.zeros([BLOCK_B, SLOTS], tl.int32) - 1 - slot[None, :]
    for tile in range(part * span, tl.minimum(part * span + span, tl.cdiv(classes, BLOCK_R // PLACES))):
        rows, known = _rows_of(tile, classes, CENTERS, PLACES, BLOCK_R)
        cosine, _ = _cosines(
            x, weight, b, rows, real, known, width, NORMALISE, False, PARTS, 
            BLOCK_B, BLOCK_R, BLOCK_E,
        )  # fmt: skip
        cosine, center = _of_classes(cosine, False, CENTERS, PLACES, BLOCK_B, BLOCK_R)  # [B, N]
        n = tile * (BLOCK_R // PLACES) + inside
        offset = _offset(bias, n, classes, BIAS, SUMMED)
        if SUMMED == 0:
            cosine += offset[None, :]
        row = n[None, :] * CENTERS + center
        is_own = (n[None, :] == wanted[:, None]) & (n < classes)[None, :]
        here = tl.max(tl.where(is_own, row, -1), axis=1)
        own = tl.where(here >= 0, tl.sum(tl.where(is_own, cosine, 0.0), axis=1), own)
        own_row = tl.maximum(own_row, here)
        cosine = tl.where(is_own | (n >= classes)[None, :], float("-inf"), cosine)
        top, place = tl.max(cosine, axis=1, return_indices=True)
        best = tl.maximum(best, top)
        if TOPK > 0:
            low = tl.min(held, axis=1)
            while tl.max((top > low).to(tl.int32), axis=0) > 0:
                # A larger cosine takes the place of the lowest, of equal ones that of the last class. What it drives
                # out is summed in its stead: no sum has to lose again what was added to it.
                larger = (top > low)[:, None]
                taken = larger & (inside[None, :] == place[:, None])  # [B, N]
                lowest = held == low[:, None]  # [B, S]
                last = tl.max(tl.where(lowest, held_row, -SLOTS - 1), axis=1)
                lowest = larger & lowest & (held_row == last[:, None])
                held = tl.where(lowest, top[:, None], held)
                held_row = tl.where(lowest, tl.max(tl.where(taken, row, -1), axis=1)[:, None], held_row)
                cosine = tl.where(taken, low[:, None], cosine)
                top, place = tl.max(cosine, axis=1, return_indices=True)
                low = tl.min(held, axis=1)
        none = cosine == float("-inf")
        if SUMMED == 0:
            total += tl.sum(tl.where(none, 0.0, cosine), axis=1)
            before = highest
            highest = tl.maximum(before, scale * top)
            pivot = tl.where(highest == float("-inf"), 0.0, highest)  # infinity less infinity is NaN
            sums = sums * tl.exp(before - pivot) + tl.sum(tl.exp(scale * cosine - pivot[:, None]), axis=1)
        else:
            logit, _ = _binary(
                tl.where(none, 0.0, cosine), offset[None, :], scale, margin, narrow_cosine, narrow_sine, SUMMED, POWER
            )
            sums += tl.sum(tl.where(none, 0.0, _softplus(logit)), axis=1)
    place = part.to(tl.int64) * batch + b
    step = spans.to(tl.int64) * batch
    tl.store(found + place, highest, mask=real)
    tl.store(found + step + place, sums, mask=real)
    tl.store(found + 2 * step + place, total, mask=real)
    tl.store(found + 3 * step + place, best, mask=real)
    tl.store(found + 4 * step + place, own, mask=real)
    tl.store(found_rows + place * (1 + TOPK), own_row, mask=real)
    if TOPK > 0:
        stored = real[:, None] & (slot < TOPK)[None, :]
        tl.store(found_rows + (place * (1 + TOPK))[:, None] + 1 + slot[None, :], held_row, mask=stored)
        tl.store(values + (place * TOPK)[:, None] + slot[None, :], held, mask=stored)


@triton.jit
def _slopes(
    cosine, b, n, real, bias, left_out, sums, grad_sums, grad_total, classes, scale, margin, narrow_cosine, narrow_sine,
    ACROSS: tl.constexpr, TOPK: tl.constexpr, SUMMED: tl.constexpr, POWER: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Gradients of cosines of classes [B, N], or [N, B] where they go ``ACROSS``, and of what has the bias added."""
    b = b[None, :] if ACROSS else b[:, None]
    real = real[None, :] if ACROSS else real[:, None]
    offset = _offset(bias, n, classes, BIAS, SUMMED)
    offset = offset[:, None] if ACROSS else offset[None, :]
    n = n[:, None] if ACROSS else n[None, :]
    ordinary = real & (n < classes)
    for k in tl.static_range(1 + TOPK):
        ordinary = ordinary & (n != tl.load(left_out + b * (1 + TOPK) + k, mask=real, other=-1))
    of_sums = tl.load(grad_sums + b, mask=real, other=0.0)
    if SUMMED == 0:
        # A row without ordinary classes has a sum of minus infinity, and no gradient.
        sum = tl.load(sums + b, mask=real, other=0.0)
        sum = tl.where(sum == float("-inf"), float("inf"), sum)
        slope = of_sums * scale * tl.exp(scale * (cosine + offset) - sum)
        slope = tl.where(ordinary, slope + tl.load(grad_total + b, mask=real, other=0.0), 0.0)
        return slope, slope
    else:
        logit, slope = _binary(cosine, offset, scale, margin, narrow_cosine, narrow_sine, SUMMED, POWER)
        of_logit = tl.where(ordinary, of_sums / (1 + tl.exp(-logit)), 0.0)
        return of_logit * slope, of_logit


@triton.jit(**_ANY_SIZE)
def _weight_gradient_kernel(
    x, weight, bias, left_out, sums, grad_sums, grad_total, grad_weight, grad_bias,
    batch, classes, width, scale, margin, narrow_cosine, narrow_sine,
    NORMALISE: tl.constexpr, CENTERS: tl.constexpr, PLACES: tl.constexpr, TOPK: tl.constexpr, SUMMED: tl.constexpr,
    POWER: tl.constexpr, BIAS: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of the weight, up to three parts of it, and by class of what has the bias added."""
    SUMS: tl.constexpr = PARTS if PARTS > 0 else 3
    columns = tl.cdiv(width, SUMS * BLOCK_E)
    tile = tl.program_id(0) // columns
    column = tl.program_id(0) % columns
    first = column * SUMS * BLOCK_E
    rows, known = _rows_of(tile, classes, CENTERS, PLACES, BLOCK_R)
    n = tile * (BLOCK_R // PLACES) + tl.arange(0, BLOCK_R // PLACES)
    along = tl.zeros([BLOCK_R], tl.float32)
    factor = tl.zeros([BLOCK_R], tl.float32)
    of_bias = tl.zeros([BLOCK_R // PLACES], tl.float32)
    total_0 = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
    total_1 = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
    total_2 = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
    for start in range(0, batch, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        real = b < batch
        cosine, factor = _cosines(
            x, weight, b, rows, real, known, width, NORMALISE, True, PARTS, 
            BLOCK_B, BLOCK_R, BLOCK_E,
        )  # fmt: skip
        largest, center = _of_classes(cosine, True, CENTERS, PLACES, BLOCK_B, BLOCK_R)  # [N, B]
        slope, of_logit = _slopes(
            largest, b, n, real, bias, left_out, sums, grad_sums, grad_total, classes, scale, margin, narrow_cosine,
            narrow_sine, True, TOPK, SUMMED, POWER, BIAS,
        )  # fmt: skip
        if BIAS:
            of_bias += tl.sum(of_logit, axis=1)
        slope = _of_rows(slope, center, True, PLACES, BLOCK_B, BLOCK_R)  # [R, B]
        if NORMALISE:
            along += tl.sum(slope * cosine, axis=1)
        slope = rounded(slope, x.dtype.element_ty)
        total_0 = add_product(total_0, slope, _part(x, b, real, first, width, BLOCK_E))
        if SUMS > 1:
            total_1 = add_product(total_1, slope, _part(x, b, real, first + BLOCK_E, width, BLOCK_E))
        if SUMS > 2:
            total_2 = add_product(total_2, slope, _part(x, b, real, first + 2 * BLOCK_E, width, BLOCK_E))
    if BIAS:
        tl.store(grad_bias + n, of_bias, mask=n < tl.where(column == 0, classes, 0))
    _store_gradient(total_0, along, factor, weight, grad_weight, rows, known, first, width, NORMALISE, BLOCK_E)
    if SUMS > 1:
        _store_gradient(
            total_1, along, factor, weight, grad_weight, rows, known, first + BLOCK_E, width,
            NORMALISE, BLOCK_E,
        )  # fmt: skip
    if SUMS > 2:
        _store_gradient(
            total_2, along, factor, weight, grad_weight, rows, known, first + 2 * BLOCK_E, width,
            NORMALISE, BLOCK_E,
        )  # fmt: skip


@triton.jit
def _store_gradient(
    total, along, factor, weight, grad_weight, rows, known, first, width,
    NORMALISE: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of some elements of rows, given that of the rows at length 1 and its product with them."""
    if NORMALISE:
        unit = _part(weight, rows, known, first, width, BLOCK_E) * factor[:, None]
        total = (total - unit * along[:, None]) * factor[:, None]
    place, inside = _place(grad_weight, rows, first, width, BLOCK_E)
    tl.store(place, total, mask=known[:, None] & inside)


@triton.jit(**_ANY_SIZE)
def _batch_gradient_kernel(
    x, weight, bias, left_out, sums, grad_sums, grad_total, grad_x,
    batch, classes, width, span, scale, margin, narrow_cosine, narrow_sine,
    NORMALISE: tl.constexpr, CENTERS: tl.constexpr, PLACES: tl.constexpr, TOPK: tl.constexpr, SUMMED: tl.constexpr,
    POWER: tl.constexpr, BIAS: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """What a span of classes adds to the gradients of a tile of the batch, up to three parts of it: (spans, B, E)."""
    SUMS: tl.constexpr = PARTS if PARTS > 0 else 3
    blocks = tl.cdiv(batch, BLOCK_B)
    columns = tl.cdiv(width, SUMS * BLOCK_E)
    b = tl.program_id(0) % blocks * BLOCK_B + tl.arange(0, BLOCK_B)  # [B]
    first = tl.program_id(0) // blocks % columns * SUMS * BLOCK_E
    part = tl.program_id(0) // blocks // columns
    real = b < batch
    total_0 = tl.zeros([BLOCK_B, BLOCK_E], tl.float32)
    total_1 = tl.zeros([BLOCK_B, BLOCK_E], tl.float32)
    total_2 = tl.zeros([BLOCK_B, BLOCK_E], tl.float32)
    for tile in range(part * span, tl.minimum(part * span + span, tl.cdiv(classes, BLOCK_R // PLACES))):
        rows, known = _rows_of(tile, classes, CENTERS, PLACES, BLOCK_R)
        n = tile * (BLOCK_R // PLACES) + tl.arange(0, BLOCK_R // PLACES)
        cosine, factor = _cosines(
            x, weight, b, rows, real, known, width, NORMALISE, False, PARTS, 
            BLOCK_B, BLOCK_R, BLOCK_E,
        )  # fmt: skip
        largest, center = _of_classes(cosine, False, CENTERS, PLACES, BLOCK_B, BLOCK_R)  # [B, N]
        slope, _ = _slopes(
            largest, b, n, real, bias, left_out, sums, grad_sums, grad_total, classes, scale, margin, narrow_cosine,
            narrow_sine, False, TOPK, SUMMED, POWER, BIAS,
        )  # fmt: skip
        slope = _of_rows(slope, center, False, PLACES, BLOCK_B, BLOCK_R) * factor[None, :]  # [B, R]
        slope = rounded(slope, x.dtype.element_ty)
        values = _part(weight, rows, known, first, width, BLOCK_E)
        total_0 = add_product(total_0, slope, rounded(values, slope.dtype))
        if SUMS > 1:
            values = _part(weight, rows, known, first + BLOCK_E, width, BLOCK_E)
            total_1 = add_product(total_1, slope, rounded(values, slope.dtype))
        if SUMS > 2:
            values = _part(weight, rows, known, first + 2 * BLOCK_E, width, BLOCK_E)
            total_2 = add_product(total_2, slope, rounded(values, slope.dtype))
    line = part.to(tl.int64) * batch + b
    place, inside = _place(grad_x, line, first, width, BLOCK_E)
    tl.store(place, total_0, mask=real[:, None] & inside)
    if SUMS > 1:
        place, inside = _place(grad_x, line, first + BLOCK_E, width, BLOCK_E)
        tl.store(place, total_1, mask=real[:, None] & inside)
    if SUMS > 2:
        place, inside = _place(grad_x, line, first + 2 * BLOCK_E, width, BLOCK_E)
        tl.store(place, total_2, mask=real[:, None] & inside)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, integers: Sequence[int], floats: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The sums over the ordinary classes of each row; see ``spkfast.reference.margin_softmax_sums``.

    Args:
        x: Float32, shape (B, E).
        weight: Float32, shape (N * K, E).
        bias: Float32, shape (N,), or (1,) for binary sums; or None.
        target: Int64, shape (B,).
        integers: Whether to normalise, K, topk, precision, what is summed, and power of the binary sums.
        floats: Scale, and margin of the binary sums.
    """
    _, centers, topk, precision, summed, _ = integers
    operand, matrix = _operands(x, weight, precision)
    tile = _tile("SUMS", operand, bias is None and summed == _LOG_SUM)
    batch, classes = x.shape[0], weight.shape[0] // centers
    form = _form(operand, weight, bias, integers, floats, tile)
    blocks = triton.cdiv(batch, tile["BLOCK_B"])
    span, spans = _spans(classes, blocks, tile["BLOCK_R"] // form["PLACES"])
    found = x.new_empty((5, spans, batch))
    found_rows = target.new_empty((spans, batch, 1 + topk), dtype=torch.int32)
    values = x.new_empty((spans, batch, topk))
    if batch:
        with torch.cuda.device_of(x):
            _sums_kernel[(spans * blocks,)](
                operand, matrix, matrix if bias is None else bias.contiguous(), target.contiguous(),
                found, found_rows, values, batch, classes, matrix.shape[1], spans, span,
                SLOTS=triton.next_power_of_2(max(topk, 1)), **form, **tile, **_OPTIONS,
            )  # fmt: skip
    highest, part_sums, part_total, part_best, part_own = found
    own_row, place = found_rows[..., 0].max(dim=0, keepdim=True)
    own = part_own.gather(0, place)[0]
    hardest, hardest_rows, rest = _largest(values, found_rows[..., 1:], topk)
    none = rest == -torch.inf
    scale = floats[0]
    if summed == _LOG_SUM:
        parts = torch.cat([highest.double() + part_sums.double().log(), scale * rest.double().T])
        sums, total = parts.logsumexp(dim=0), part_total.sum(dim=0) + rest.masked_fill(none, 0).sum(dim=1)
    else:
        others = F.softplus(_binary_logits(rest.double(), bias, integers, floats)).masked_fill(none, 0)
        sums, total = part_sums.double().sum(dim=0) + others.sum(dim=1), part_total[0]
    rows = torch.cat([own_row[0, :, None].long(), hardest_rows.long().masked_fill(hardest == -torch.inf, -1)], dim=1)
    chosen = weight[rows.clamp_min(0)].masked_fill((rows < 0)[..., None], 0)
    return sums.float(), total, chosen, part_best.amax(dim=0), own, rows


def backward(
    grad_sums: Tensor,
    grad_total: Tensor,
    grad_chosen: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    integers: Sequence[int],
    floats: Sequence[float],
    sums: Tensor,
    total: Tensor,
    chosen: Tensor,
    best: Tensor,
    own: Tensor,
    rows: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``x``, ``weight`` and ``bias``, of shape (0,) without one.

    Args:
        grad_sums: Gradient of the sums, shape (B,).
        grad_total: Of their cosines' sum, shape (B,).
        grad_chosen: Of the chosen rows, shape (B, 1 + topk, E).
        x: As of :func:`forward`, and so on.
        weight: Also.
        bias: Also.
        target: Also.
        integers: Also.
        floats: Also.
        sums: First output of :func:`forward`, and so on.
        total: Also.
        chosen: Also.
        best: Also.
        own: Also.
        rows: Also.
    """
    _, centers, _, precision, summed, _ = integers
    operand, matrix = _operands(x, weight, precision)
    batch, width = operand.shape
    classes = weight.shape[0] // centers
    left_out = torch.where(rows < 0, -1, rows // centers).int().contiguous()
    given = (
        operand, matrix, matrix if bias is None else bias.contiguous(), left_out,
        sums.contiguous(), grad_sums.contiguous(), grad_total.contiguous(),
    )  # fmt: skip
    grad_matrix = torch.empty_like(matrix)
    grad_bias = x.new_empty(0 if bias is None else classes)
    tile = _tile("WEIGHT", operand, bias is None and summed == _LOG_SUM)
    form = _form(operand, weight, bias, integers, floats, tile)
    columns = triton.cdiv(width, (form["PARTS"] or _PARTS) * tile["BLOCK_E"])
    tiles = triton.cdiv(classes, tile["BLOCK_R"] // form["PLACES"])
    with torch.cuda.device_of(x):
        _weight_gradient_kernel[(tiles * columns,)](
            *given, grad_matrix, grad_bias, batch, classes, width, **form, **tile, **_OPTIONS
        )

    tile = _tile("BATCH", operand, bias is None and summed == _LOG_SUM)
    form = _form(operand, weight, bias, integers, floats, tile)
    columns = triton.cdiv(width, (form["PARTS"] or _PARTS) * tile["BLOCK_E"])
    blocks = triton.cdiv(batch, tile["BLOCK_B"])
    span, spans = _spans(classes, blocks * columns, tile["BLOCK_R"] // form["PLACES"])
    parts = x.new_empty((spans, batch, width))
    if batch:
        with torch.cuda.device_of(x):
            _batch_gradient_kernel[(spans * columns * blocks,)](
                *given, parts, batch, classes, width, span, **form, **tile, **_OPTIONS
            )

    grad_x, grad_weight = (value[:, : x.shape[1]].contiguous() for value in (parts.sum(dim=0), grad_matrix))
    missing = rows.flatten() < 0
    added = grad_chosen.flatten(0, 1).masked_fill(missing[:, None], 0)
    grad_weight.index_add_(0, rows.flatten().clamp_min(0), added)
    if bias is not None and summed != _LOG_SUM:
        grad_bias = grad_bias.sum(dim=0, keepdim=True, dtype=torch.float64).float()
    return grad_x, grad_weight, grad_bias


def _operands(x: Tensor, weight: Tensor, precision: int) -> tuple[Tensor, Tensor]:
    """Rows of the batch in the type of the products, and of the weight, which is rounded where it is read.

    Loads of 16 bytes need rows that begin at a multiple of that: others are copied, with zeros at their end.
    """
    x = x.to(torch.bfloat16 if precision else torch.float32)
    ragged = -x.shape[1] % 8
    if ragged:
        x, weight = F.pad(x, (0, ragged)), F.pad(weight, (0, ragged))
    x, weight = x.contiguous(), weight.contiguous()
    return x.clone() if x.data_ptr() % 16 else x, weight.clone() if weight.data_ptr() % 16 else weight


def _tile(name: str, x: Tensor, plain: bool) -> dict[str, int]:
    """The tile of a kernel for rows of the batch in the type of the products, with plain sums or others."""
    short, long, fp32 = _TILES[name]
    if x.dtype == torch.float32:
        return fp32
    return short if plain and x.shape[1] <= _PARTS * short["BLOCK_E"] else long


def _form(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    integers: Sequence[int],
    floats: Sequence[float],
    tile: dict[str, int],
) -> dict[str, Any]:
    """What the kernels have in common."""
    normalise, centers, topk, _, summed, power = integers
    scale, margin = floats
    places = triton.next_power_of_2(centers)
    if places > tile["BLOCK_R"]:
        raise ValueError(f"num_subcenters must be at most {tile['BLOCK_R']} here, got {centers}")
    if weight.shape[0] >= 2**30:
        raise ValueError(f"weight must have fewer than 2**30 rows, got {weight.shape[0]}")
    return {
        "scale": scale,
        "margin": margin,
        "narrow_cosine": math.cos(margin),
        "narrow_sine": math.sin(margin),
        "NORMALISE": bool(normalise),
        "CENTERS": centers,
        "PLACES": places,
        "TOPK": topk,
        "SUMMED": summed,
        "POWER": power,
        "BIAS": bias is not None,
        "PARTS": triton.cdiv(x.shape[1], tile["BLOCK_E"]) if tile["num_stages"] > 1 else 0,
    }


def _spans(classes: int, programs: int, classes_of_tile: int) -> tuple[int, int]:
    """Tiles of classes that one program takes, and into how many spans that divides them."""
    tiles = triton.cdiv(classes, classes_of_tile)
    span = triton.cdiv(tiles, triton.cdiv(_PROGRAMS, max(programs, 1)))
    return span, triton.cdiv(tiles, span)


def _largest(values: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest values (B, count) among those of all spans, (spans, B, count), with their rows; and the other ones.

    Of equal ones the first class is taken.
    """
    values, rows = (value.transpose(0, 1).flatten(1) for value in (values, rows))
    order = rows.argsort(dim=1)
    values, rows = values.gather(1, order), rows.gather(1, order)
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values[:, :count], rows.gather(1, order)[:, :count], values[:, count:]


def _binary_logits(cosine: Tensor, bias: Tensor | None, integers: Sequence[int], floats: Sequence[float]) -> Tensor:
    """As :func:`_binary`, of a few cosines."""
    scale, margin = floats
    if integers[4] == _BINARY_A:
        sine = (1 - cosine.square()).clamp_min(1e-12).sqrt()
        cosine, margin = cosine * math.cos(margin) + sine * math.sin(margin), 0.0
    logits = scale * (2 * ((cosine + 1) / 2) ** integers[5] - 1 + margin)
    return logits if bias is None else logits + bias
