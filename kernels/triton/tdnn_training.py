"""What TDNN layers are trained with, in Triton: products, and one pass over memory for all that is not a product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attentive_stats_pool import forward as weighted_moments
from .tdnn_layer import channels_side_by_side, empty_frames, multiple, multiply, pointers, rounded, unit_of

# Tile sizes: T frames, N channels. Without a limit, the assembler spills a few registers so that more blocks fit on a
# multiprocessor.
_TILE = {"BLOCK_T": 32, "BLOCK_N": 64, "num_warps": 4, "num_stages": 1, "maxnreg": 232}
# Triton 3.10 turns fusion off unless asked; asking keeps the numbers the same across versions.
_OPTIONS = {"enable_fp_fusion": True}
# Programs that keep the memory of a large GPU busy: about four on each multiprocessor. It does not follow the device,
# so that results do not.
_PROGRAMS = 512
# Inputs that a product reads where they lie; more are joined first.
_PARTS = 3
_TYPES = {0: torch.float32, 1: torch.bfloat16, 3: torch.float16}

_ANY_SIZE = {
    "do_not_specialize": [
        "total", "channels", "frames", "span", "spans", "taps", "dilation", "line", "x_row", "x_frame", "y_row",
        "y_frame", "grad_row", "grad_frame", "other_row", "other_frame", "scale_row", "shift_row",
    ],
    "do_not_specialize_on_alignment": [
        "x", "y", "grad", "other", "mean", "grad_mean", "grad_var", "scale", "shift", "out", "other_out", "sums",
        "other_sums",
    ],
}  # fmt: skip


@triton.jit
def _place(channels, span, spans, BLOCK_N: tl.constexpr):
    """Of a program: its row, its span, the first frame of that, and its channels [N].

    A program takes a few channels of a span of frames of one row. What lies side by side is read at the same time.
    """
    columns = tl.cdiv(channels, BLOCK_N)
    n = (tl.program_id(0) % columns) * BLOCK_N + tl.arange(0, BLOCK_N)
    piece = tl.program_id(0) // columns
    return (piece // spans).to(tl.int64), piece % spans, (piece % spans) * span, n


@triton.jit(**_ANY_SIZE)
def _relu_gradient_kernel(
    grad, grad_mean, grad_var, y, mean, out, sums, channels, frames, span, spans, grad_row, grad_frame, y_row, y_frame,
    GRAD: tl.constexpr, MEAN: tl.constexpr, VAR: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradient of what ReLU takes, and its sums over a span of frames."""
    channels = multiple(channels, UNIT)
    row, part, first, n = _place(channels, span, spans, BLOCK_N)
    end = tl.minimum(first + span, frames)
    known = n < channels
    if MEAN:
        of_mean = tl.load(grad_mean + row * channels + n, mask=known, other=0.0) / frames
    if VAR:
        of_var = tl.load(grad_var + row * channels + n, mask=known, other=0.0) * (2 / frames.to(tl.float32))
        centre = tl.load(mean + row * channels + n, mask=known, other=0.0)
    total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for start in range(first, end, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        mask = (t < end)[:, None] & known[None, :]
        t = t.to(tl.int64)
        values = tl.load(pointers(y, row * y_row + t * y_frame, n, UNIT), mask=mask, other=0.0).to(tl.float32)
        value = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
        if GRAD:
            place = pointers(grad, row * grad_row + t * grad_frame, n, UNIT)
            value += tl.load(place, mask=mask, other=0.0).to(tl.float32)
        if MEAN:
            value += of_mean[None, :]
        if VAR:
            value += of_var[None, :] * (values - centre[None, :])
        stored = rounded(tl.where(values <= 0, 0.0, value), out.dtype.element_ty)
        tl.store(pointers(out, (row * frames + t) * channels, n, UNIT), stored, mask=mask)
        total += stored.to(tl.float32)
    tl.store(sums + (row * spans + part) * channels + n, tl.sum(total, axis=0), mask=known)


@triton.jit(**_ANY_SIZE)
def _affine_kernel(
    x, scale, shift, other, out, other_out, channels, frames, span, spans,
    x_row, x_frame, other_row, other_frame, scale_row, shift_row,
    PLAIN: tl.constexpr, ADDED: tl.constexpr, UNIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The affine map of each channel in ``out``, and its sum with ``other`` in ``other_out``."""
    channels = multiple(channels, UNIT)
    row, _, first, n = _place(channels, span, spans, BLOCK_N)
    end = tl.minimum(first + span, frames)
    known = n < channels
    factor = tl.load(scale + row * scale_row + n, mask=known, other=0.0)[None, :]
    constant = tl.load(shift + row * shift_row + n, mask=known, other=0.0)[None, :]
    for start in range(first, end, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        mask = (t < end)[:, None] & known[None, :]
        t = t.to(tl.int64)
        value = tl.load(pointers(x, row * x_row + t * x_frame, n, UNIT), mask=mask, other=0.0).to(tl.float32)
        value = value * factor + constant
        place = (row * frames + t) * channels
        if PLAIN:
            tl.store(pointers(out, place, n, UNIT), rounded(value, out.dtype.element_ty), mask=mask)
        if ADDED:
            added = tl.load(pointers(other, row * other_row + t * other_frame, n, UNIT), mask=mask, other=0.0)
            value += added.to(tl.float32)
            tl.store(pointers(other_out, place, n, UNIT), rounded(value, other_out.dtype.element_ty), mask=mask)


@triton.jit(**_ANY_SIZE)
def _affine_gradient_kernel(
    grad, other, x, scale, out, sums, other_sums, channels, frames, span, spans,
    grad_row, grad_frame, other_row, other_frame, x_row, x_frame, scale_row,
    GRADS: tl.constexpr, UNIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradient of an affine map's input; of factor and constant sums over a span in ``sums`` and ``other_sums``."""
    channels = multiple(channels, UNIT)
    row, part, first, n = _place(channels, span, spans, BLOCK_N)
    end = tl.minimum(first + span, frames)
    known = n < channels
    factor = tl.load(scale + row * scale_row + n, mask=known, other=0.0)[None, :]
    total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    product = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for start in range(first, end, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        mask = (t < end)[:, None] & known[None, :]
        t = t.to(tl.int64)
        value = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
        if GRADS > 0:
            place = pointers(grad, row * grad_row + t * grad_frame, n, UNIT)
            value += tl.load(place, mask=mask, other=0.0).to(tl.float32)
        if GRADS > 1:
            place = pointers(other, row * other_row + t * other_frame, n, UNIT)
            value += tl.load(place, mask=mask, other=0.0).to(tl.float32)
        total += value
        product += value * tl.load(pointers(x, row * x_row + t * x_frame, n, UNIT), mask=mask, other=0.0).to(tl.float32)
        place = pointers(out, (row * frames + t) * channels, n, UNIT)
        tl.store(place, rounded(value * factor, out.dtype.element_ty), mask=mask)
    place = (row * spans + part) * channels + n
    tl.store(sums + place, tl.sum(product, axis=0), mask=known)
    tl.store(other_sums + place, tl.sum(total, axis=0), mask=known)


@triton.jit(**_ANY_SIZE)
def _taps_kernel(
    x, out, total, channels, frames, taps, dilation, x_row, x_frame,
    REFLECT: tl.constexpr, UNIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What each tap of a convolution reads at each frame, (B * T, K, C), in the type of the product."""
    channels = multiple(channels, UNIT)
    columns = tl.cdiv(channels, BLOCK_N)
    n = (tl.program_id(0) % columns) * BLOCK_N + tl.arange(0, BLOCK_N)
    tap = tl.program_id(0) // columns % taps
    m = tl.program_id(0) // columns // taps * BLOCK_T + tl.arange(0, BLOCK_T)
    mask = (m < total)[:, None] & (n < channels)[None, :]
    m = m.to(tl.int64)
    row = m // frames
    t = m - row * frames + (tap - taps // 2) * dilation
    real = mask
    if REFLECT:
        period = tl.maximum(2 * frames - 2, 1)
        t = tl.abs(t) % period
        t = tl.minimum(t, period - t)
    else:
        real = mask & ((t >= 0) & (t < frames))[:, None]
    values = tl.load(pointers(x, row * x_row + t * x_frame, n, UNIT), mask=real, other=0.0)
    place = pointers(out, (m * taps + tap) * channels, n, UNIT)
    tl.store(place, rounded(values, out.dtype.element_ty), mask=mask)


def conv_relu(
    x: Sequence[Tensor], weight: Tensor, bias: Tensor | None, integers: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """A convolution with ReLU, channels side by side, shape (B, N, T); of its values mean and biased variance, (B, N).

    Args:
        x: Inputs (B, C_i, T), float32, float16 or bfloat16, all alike.
        weight: Shape (N, C, K), K odd, float32.
        bias: Float32, shape (N,), or None.
        integers: Precision, dilation, and whether to reflect, to take moments (without, these have shape (0, N)), and
            to apply ReLU; and whether to give float32 whatever is multiplied.
    """
    precision, dilation, reflect, moments, relu, wide = integers
    inputs = _inputs(x)
    outputs, channels, taps = weight.shape
    # Rows by input, tap and channel, in this order.
    matrix = weight.new_empty((taps * channels, outputs), dtype=_TYPES[precision])
    sizes = [part.shape[1] for part in inputs]
    for rows, part in zip(matrix.split([taps * size for size in sizes]), weight.split(sizes, dim=1), strict=True):
        rows.unflatten(0, (taps, -1)).copy_(part.permute(2, 1, 0))
    y = empty_frames(inputs[0], outputs, torch.float32 if wide else matrix.dtype)
    vector = weight.new_zeros(outputs) if bias is None else bias.contiguous()
    multiply(
        inputs, matrix, vector, None, y,
        taps=taps, dilation=dilation, reflect=bool(reflect), relu=bool(relu), affine=False,
    )  # fmt: skip
    if moments:
        return (y, *weighted_moments(y, None, None)[:2])
    return y, y.new_empty((0, outputs), dtype=torch.float32), y.new_empty((0, outputs), dtype=torch.float32)


def conv_relu_backward(
    grad_y: Tensor | None, grad_mean: Tensor | None, grad_var: Tensor | None, y: Tensor, mean: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of what ReLU takes, as ``y``, and its sums over the frames of each row, float32, shape (B, N).

    Args:
        grad_y: Gradient of ``y``, or None for 0.
        grad_mean: Gradient of the mean, float32, shape (B, N), or None for 0.
        grad_var: Gradient of the variance, float32, shape (B, N), or None for 0.
        y: Output of :func:`conv_relu`, shape (B, N, T).
        mean: Its mean; read for ``grad_var`` alone.
    """
    y = channels_side_by_side(y)
    grad = y if grad_y is None else channels_side_by_side(grad_y)  # what is not there is not read
    # Beside a mean of shape (0, N) there is no gradient to read it for.
    statistics = [y if value is None else value.contiguous() for value in (grad_mean, grad_var, mean)]
    out = empty_frames(y, y.shape[1], y.dtype)
    grid, span, spans = _spans(y)
    sums = y.new_empty((y.shape[0], spans, y.shape[1]), dtype=torch.float32)
    if grid[0]:
        with torch.cuda.device_of(y):
            _relu_gradient_kernel[grid](
                grad, *statistics[:2], y, statistics[2], out, sums, y.shape[1], y.shape[2], span, spans,
                grad.stride(0), grad.stride(2), y.stride(0), y.stride(2),
                GRAD=grad_y is not None, MEAN=grad_mean is not None, VAR=grad_var is not None,
                UNIT=unit_of([y, grad]), **_TILE, **_OPTIONS,
            )  # fmt: skip
    return out, _over_spans(sums)


def conv_input_gradient(grad: Tensor, weight: Tensor, integers: Sequence[int]) -> Tensor:
    """Gradient of the inputs of a convolution that pads with zeros, channels side by side, shape (B, C, T).

    Args:
        grad: Gradient of its output, shape (B, N, T), float32, float16 or bfloat16.
        weight: Shape (N, C, K), K odd, float32.
        integers: Precision and dilation.
    """
    precision, dilation = integers
    outputs, channels, taps = weight.shape
    matrix = weight.new_empty((taps, outputs, channels), dtype=_TYPES[precision]).copy_(weight.permute(2, 0, 1))
    out = empty_frames(grad, channels, matrix.dtype)
    # Taps look the other way.
    multiply(
        [channels_side_by_side(grad)], matrix.flatten(0, 1), weight.new_zeros(channels), None, out,
        taps=taps, dilation=-dilation, relu=False, affine=False,
    )  # fmt: skip
    return out


def conv_weight_gradient(x: Sequence[Tensor], grad: Tensor, integers: Sequence[int]) -> Tensor:
    """Gradient of the weight of a convolution, float32, shape (N, C, K).

    Its products are those of torch: at float32 with TF32 where ``torch.backends`` allows that.

    Args:
        x: Inputs (B, C_i, T) of the convolution, float32, float16 or bfloat16, all alike.
        grad: Gradient of its output, shape (B, N, T).
        integers: Taps, dilation, whether to reflect, and precision.
    """
    taps, dilation, reflect, precision = integers
    dtype = _TYPES[precision]
    slope = _frames(grad.to(dtype)).T
    found = []
    for part in _inputs(x):
        values = _frames(part.to(dtype)) if taps == 1 else _taps(part, taps, dilation, bool(reflect), dtype)
        product = _product(slope, values)
        found.append(product.unflatten(1, (taps, -1)).transpose(1, 2))
    return torch.cat(found, dim=1)


def channel_affine(x: Tensor, scale: Tensor, shift: Tensor, added: Tensor | None, plain: bool) -> tuple[Tensor, Tensor]:
    """``x * scale + shift`` where ``plain``, and its sum with ``added`` where there is that; else of shape (0,).

    Args:
        x: Shape (B, N, T), float32, float16 or bfloat16.
        scale: Float32, shape (1, N) or (B, N).
        shift: As ``scale``.
        added: Shape and type of ``x``, or None.
        plain: Whether the map itself is wanted.
    """
    x = channels_side_by_side(x)
    other = x if added is None else channels_side_by_side(added)
    y, total = (
        empty_frames(x, x.shape[1], x.dtype) if wanted else x.new_empty(0) for wanted in (plain, added is not None)
    )
    grid, span, spans = _spans(x)
    if grid[0]:
        with torch.cuda.device_of(x):
            _affine_kernel[grid](
                x, scale.contiguous(), shift.contiguous(), other, y, total, x.shape[1], x.shape[2], span, spans,
                x.stride(0), x.stride(2), other.stride(0), other.stride(2), _row_step(scale), _row_step(shift),
                PLAIN=plain, ADDED=added is not None, UNIT=unit_of([x, other]), **_TILE, **_OPTIONS,
            )  # fmt: skip
    return y, total


def channel_affine_backward(
    grad_y: Tensor | None, grad_total: Tensor | None, x: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``x``, as that, and for each row of scale and shift, float32, shape (B, N).

    Args:
        grad_y: Gradient of the map, shape (B, N, T), or None for 0.
        grad_total: Gradient of the sum, or None for 0.
        x: Shape (B, N, T), float32, float16 or bfloat16.
        scale: Float32, shape (1, N) or (B, N).
    """
    x = channels_side_by_side(x)
    grads = [channels_side_by_side(value) for value in (grad_y, grad_total) if value is not None]
    grad, other = [*grads, x, x][:2]  # what is not there is not read
    out = empty_frames(x, x.shape[1], x.dtype)
    grid, span, spans = _spans(x)
    sums, other_sums = (x.new_empty((x.shape[0], spans, x.shape[1]), dtype=torch.float32) for _ in range(2))
    if grid[0]:
        with torch.cuda.device_of(x):
            _affine_gradient_kernel[grid](
                grad, other, x, scale.contiguous(), out, sums, other_sums, x.shape[1], x.shape[2], span, spans,
                grad.stride(0), grad.stride(2), other.stride(0), other.stride(2), x.stride(0), x.stride(2),
                _row_step(scale), GRADS=len(grads), UNIT=unit_of([x, grad, other]), **_TILE, **_OPTIONS,
            )  # fmt: skip
    return out, _over_spans(sums), _over_spans(other_sums)


def _inputs(x: Sequence[Tensor]) -> list[Tensor]:
    """Inputs with channels side by side, few enough for a product."""
    if len(x) > _PARTS:
        return [torch.cat([part.transpose(1, 2) for part in x], dim=2).transpose(1, 2)]
    return [channels_side_by_side(part) for part in x]


def _frames(x: Tensor) -> Tensor:
    """The frames of all rows (B * T, C), where they lie if channels do side by side."""
    return channels_side_by_side(x).transpose(1, 2).flatten(0, 1)


def _taps(x: Tensor, taps: int, dilation: int, reflect: bool, dtype: torch.dtype) -> Tensor:
    """What each tap reads at each frame of all rows, (B * T, K * C)."""
    batch, channels, frames = x.shape
    total = batch * frames
    out = x.new_empty((total, taps * channels), dtype=dtype)
    grid = (triton.cdiv(total, _TILE["BLOCK_T"]) * taps * triton.cdiv(channels, _TILE["BLOCK_N"]),)
    if grid[0]:
        with torch.cuda.device_of(x):
            _taps_kernel[grid](
                x, out, total, channels, frames, taps, dilation, x.stride(0), x.stride(2),
                REFLECT=reflect, UNIT=unit_of([x]), **_TILE, **_OPTIONS,
            )  # fmt: skip
    return out


def _product(x: Tensor, y: Tensor) -> Tensor:
    """Matrix product in float32."""
    with torch.autocast(x.device.type, enabled=False):
        if x.is_cuda and x.dtype != torch.float32:
            return torch.mm(x, y, out_dtype=torch.float32)
        return torch.mm(x.float(), y.float())  # of halves these are the same products


def _spans(x: Tensor) -> tuple[tuple[int], int, int]:
    """The grid of the kernels that go through (B, N, T) once, and the frames and number of a row's spans.

    A row has one span where rows and channels alone keep a GPU busy.
    """
    batch, channels, frames = x.shape
    pieces = batch * triton.cdiv(channels, _TILE["BLOCK_N"])
    tiles = triton.cdiv(frames, _TILE["BLOCK_T"])
    span = triton.cdiv(tiles, triton.cdiv(_PROGRAMS, max(pieces, 1))) * _TILE["BLOCK_T"]
    spans = triton.cdiv(frames, max(span, 1))
    return (pieces * spans,), span, spans


def _over_spans(sums: Tensor) -> Tensor:
    """Sums of rows, shape (B, N), out of those of spans."""
    return sums[:, 0] if sums.shape[1] == 1 else sums.sum(dim=1)


def _row_step(vectors: Tensor) -> int:
    """From one row to the next of (B, N), or (1, N) for all of them."""
    return vectors.shape[1] if vectors.shape[0] > 1 else 0
