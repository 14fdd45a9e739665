"""Acoustic features in Triton: the DFT and the filters as matrix products over tiles of frames."""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tile sizes by dimension: S samples, T frames, L samples of a frame, F bins, M mel bins, C cepstra, D features.
_STATISTICS_TILE = {"BLOCK_S": 4096}
_SIGNAL_TILE = {"BLOCK_S": 1024}
_POWER_TILE = {"BLOCK_T": 32, "BLOCK_L": 16, "BLOCK_F": 128}
_MEL_TILE = {"BLOCK_T": 64, "BLOCK_F": 32, "BLOCK_M": 32}
_CEPSTRA_TILE = {"BLOCK_T": 32, "BLOCK_M": 32, "BLOCK_C": 32}
_HIGHEST_TILE = {"BLOCK_T": 32, "BLOCK_D": 128}
_NORMALIZE_TILE = {"BLOCK_T": 128, "BLOCK_D": 32}
# Staged loads double the barriers of the power kernel. Without a limit, the assembler spills a few of its registers so
# that a second block fits on a multiprocessor. Triton 3.10 turns fusion off unless asked; asking keeps the numbers the
# same across versions.
_OPTIONS = {"num_warps": 8, "num_stages": 1, "maxnreg": 232, "enable_fp_fusion": True}

# One compiled form whatever the sizes and alignment: sums then add in the same order, and a row alone equals the row in
# a batch to the last bit. Widths of tables and of the spectrum are not here: they are multiples of 16 in any case.
_ANY_SIZE = {
    "do_not_specialize": [
        "num_samples", "row_size", "offset", "first_frame", "frame_shift", "frame_length", "num_frames", "fold",
        "num_bins", "num_mels", "num_cepstra", "size", "value_size", "energy_value", "first_column", "energy_column",
        "num_masks", "num_tiles", "unbiased",
    ],
    "do_not_specialize_on_alignment": [
        "waveforms", "lengths", "window", "mel", "cosines", "masks", "seeds", "statistics", "signal", "values",
        "features", "highest", "frame_lengths",
    ],
}  # fmt: skip


@triton.jit
def _count_frames(lengths, utterance, num_samples, first_frame, frame_shift):
    """Frames of an utterance. A length past the row would read out of bounds and is taken as the row's."""
    samples = tl.minimum(tl.load(lengths + utterance), num_samples).to(tl.int32)
    return tl.where(samples < tl.maximum(first_frame, 1), 0, (samples - first_frame) // frame_shift + 1)


@triton.jit
def _at_least(x, low):
    return tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _at_most(x, high):
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _highest(x):
    """Highest value of a tensor; NaN where there is one, which ``tl.max`` leaves out."""
    bad = tl.max((x != x).to(tl.int32))
    return tl.where(bad > 0, float("nan"), tl.max(x))


@triton.jit
def _split(x):
    """Two numbers of 11 significant bits, which tensor cores take, whose sum is ``x`` but for its last bit."""
    high = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def _add_product(total, x, y):
    """``total`` plus the matrix product: tf32x3, split by rounding. ``tl.dot`` would cut, for twice the error."""
    high_x, low_x = _split(x)
    high_y, low_y = _split(y)
    part = tl.dot(low_x, high_y, input_precision="tf32")
    part = tl.dot(high_x, low_y, acc=part, input_precision="tf32")
    return total + tl.dot(high_x, high_y, acc=part, input_precision="tf32")


@triton.jit
def _masked(values, masks, num_masks, utterance, t, column):
    """Values [T, D] with zeros in each rectangle of an utterance."""
    for k in range(0, num_masks):
        mask = masks + (utterance * num_masks + k) * 4
        frame = (t >= tl.load(mask)) & (t < tl.load(mask + 1))  # [T]
        bin = (column >= tl.load(mask + 2)) & (column < tl.load(mask + 3))  # [D]
        values = tl.where(frame[:, None] & bin[None, :], 0.0, values)
    return values


@triton.jit
def _gaussian_noise(seed, n):
    """Values ``n`` of the noise of a seed: Philox2x32-10, Box and Muller."""
    low, high = n.to(tl.uint32), tl.zeros_like(n).to(tl.uint32) + (seed >> 32).to(tl.uint32)
    key = seed.to(tl.uint32)
    for _ in tl.static_range(10):
        product = low.to(tl.uint64) * 0xD256D193
        low, high = (product >> 32).to(tl.uint32) ^ key ^ high, product.to(tl.uint32)
        key += 0x9E3779B9
    radius = tl.sqrt(-2 * tl.log(((low >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07))
    # The cosine by its series, over an eighth of a turn on both sides of zero: the one of the library has a slow path
    # for large angles, which needs a stack.
    turn = (high >> 8).to(tl.int32)  # in units of 2**-24
    quarter = (turn + 0x200000) >> 22
    angle = (turn - (quarter << 22)).to(tl.float32) * 3.745070282923929e-07
    square = angle * angle
    sine = ((-1.9515296e-04 * square + 8.3321609e-03) * square - 1.6666655e-01) * square * angle + angle
    cosine = ((2.4433157e-05 * square - 1.3887316e-03) * square + 4.1666646e-02) * square * square - 0.5 * square + 1
    value = tl.where(quarter & 1 == 1, sine, cosine)
    return radius * tl.where((quarter + 1) & 2 == 2, -value, value)


@triton.jit(**_ANY_SIZE)
def _statistics_kernel(
    waveforms, lengths, statistics, num_samples, unit, INSTANCE: tl.constexpr, BLOCK_S: tl.constexpr
):
    """Mean and standard deviation (B, 2) of one utterance."""
    utterance = tl.program_id(0).to(tl.int64)
    samples = tl.minimum(tl.load(lengths + utterance), num_samples).to(tl.int32)
    count = tl.maximum(samples, 1).to(tl.float32)
    row = waveforms + utterance * num_samples
    total = tl.zeros([BLOCK_S], tl.float32)
    for first in range(0, samples, BLOCK_S):
        n = first + tl.arange(0, BLOCK_S)  # [BLOCK_S]
        total += tl.load(row + n, mask=n < samples, other=0).to(tl.float32) * unit
    mean = tl.div_rn(tl.sum(total, axis=0), count)
    squares = tl.zeros([BLOCK_S], tl.float32)
    for first in range(0, samples, BLOCK_S):
        n = first + tl.arange(0, BLOCK_S)  # [BLOCK_S]
        centred = tl.load(row + n, mask=n < samples, other=0).to(tl.float32) * unit - mean
        squares += tl.where(n < samples, centred * centred, 0.0)
    variance = tl.div_rn(tl.sum(squares, axis=0), count)
    deviation = tl.sqrt_rn(variance + 1e-4) if INSTANCE else tl.sqrt_rn(_at_least(variance, 1e-20)) + 1e-8
    tl.store(statistics + utterance * 2, mean)
    tl.store(statistics + utterance * 2 + 1, deviation)


@triton.jit
def _sample(row, n, seed, mean, deviation, unit, sample_scale, dither, NORM: tl.constexpr, NOISE: tl.constexpr):
    """Samples ``n`` of an utterance, normalised, scaled and with noise."""
    x = tl.load(row + n).to(tl.float32) * unit
    if NORM:
        x = (x - mean) / deviation
    x = x * sample_scale
    if NOISE:
        x += dither * _gaussian_noise(seed, n)
    return x


@triton.jit(**_ANY_SIZE)
def _signal_kernel(
    waveforms, lengths, seeds, statistics, signal,
    num_samples, row_size, offset, unit, sample_scale, dither, preemphasis,
    PADDING: tl.constexpr, NORM: tl.constexpr, NOISE: tl.constexpr, PREEMPHASIS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One tile of the padded signal (B, row_size) that all frames lie in, with all that is done sample by sample."""
    tiles = tl.cdiv(row_size, BLOCK_S)
    utterance = (tl.program_id(0) // tiles).to(tl.int64)
    end = tl.minimum(tl.load(lengths + utterance), num_samples).to(tl.int32)
    column = (tl.program_id(0) % tiles) * BLOCK_S + tl.arange(0, BLOCK_S)  # [BLOCK_S]
    n = offset + column
    if PADDING != 0:
        period = tl.maximum(2 * end - 2 * (2 - PADDING), 1)
        n = n % period
        n = tl.where(n < 0, n + period, n)  # the remainder has the sign of the dividend
        n = tl.minimum(n, tl.abs(2 * end - (3 - PADDING) - n))
    inside = (n >= 0) & (n < end)
    n = tl.where(inside, n, 0)
    if end > 0:
        row = waveforms + utterance * num_samples
        seed = tl.load(seeds + utterance)
        mean = tl.load(statistics + utterance * 2)
        deviation = tl.load(statistics + utterance * 2 + 1)
        x = _sample(row, n, seed, mean, deviation, unit, sample_scale, dither, NORM, NOISE)
        if PREEMPHASIS != 0:
            # The reflection of an utterance of one sample is that sample.
            before = tl.where(n > 0, n - 1, tl.minimum(end - 1, 1))
            y = _sample(row, before, seed, mean, deviation, unit, sample_scale, dither, NORM, NOISE)
            if PREEMPHASIS == 2:
                y = tl.where(n > 0, y, 0.0)
            x -= preemphasis * y
        tl.store(signal + utterance * row_size + column, tl.where(inside, x, 0.0), mask=column < row_size)


@triton.jit
def _frame_samples(signal, start, mean, n, valid, scale, preemphasis, PREEMPHASIS: tl.constexpr):
    """Samples ``n`` [L] of each frame [T, L]: scaled, without their mean, pre-emphasised."""
    x = tl.load(signal + (start + n[None, :]), mask=valid[None, :], other=0).to(tl.float32) * scale - mean[:, None]
    if PREEMPHASIS:
        before = tl.load(signal + (start + tl.maximum(n - 1, 0)[None, :]), mask=valid[None, :], other=0)
        x -= preemphasis * (before.to(tl.float32) * scale - mean[:, None])
    return x


@triton.jit
def _windowed(signal, start, mean, window, n, valid, scale, preemphasis, PREEMPHASIS: tl.constexpr):
    weights = tl.load(window + n, mask=valid, other=0.0)
    return _frame_samples(signal, start, mean, n, valid, scale, preemphasis, PREEMPHASIS) * weights[None, :]


@triton.jit(**_ANY_SIZE)
def _power_kernel(
    signal, lengths, window, cosine, sine, mel, power,
    num_samples, row_size, offset, first_frame, frame_shift, frame_length, num_frames,
    fold, table_rows, table_width, power_width, class_width, num_bins, num_mels,
    scale, preemphasis, spectrum_low, spectrum_high, energy_floor,
    CLASSES: tl.constexpr, PREEMPHASIS: tl.constexpr, REMOVE_DC: tl.constexpr, MAGNITUDE: tl.constexpr,
    ENERGY: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Spectrum (B, T, classes, class_width) of one tile of frames, and after it their log energy."""
    frame_tiles = tl.cdiv(num_frames, BLOCK_T)
    utterance = (tl.program_id(0) // frame_tiles).to(tl.int64)
    frames = _count_frames(lengths, utterance, num_samples, first_frame, frame_shift)
    first_t = (tl.program_id(0) % frame_tiles) * BLOCK_T

    if first_t < frames:  # A tile past the end has nothing to compute.
        # Rows past the end repeat the last frame, so that no load needs a mask for them.
        t = tl.minimum(tl.arange(0, BLOCK_T), frames - 1 - first_t)[:, None]  # [BLOCK_T, 1]
        signal += utterance * row_size + offset + first_t * frame_shift
        power += (utterance * num_frames + first_t) * power_width
        start = t * frame_shift
        mean = tl.zeros([BLOCK_T], tl.float32)
        if REMOVE_DC:
            total = tl.zeros([BLOCK_T, 4 * BLOCK_L], tl.float32)
            for first in range(0, frame_length, 4 * BLOCK_L):
                n = first + tl.arange(0, 4 * BLOCK_L)  # [4 * BLOCK_L]
                x = tl.load(signal + (start + n[None, :]), mask=(n < frame_length)[None, :], other=0)
                total += x.to(tl.float32) * scale
            mean = tl.div_rn(tl.sum(total, axis=1), frame_length.to(tl.float32))
        if ENERGY != 0:
            squares = tl.zeros([BLOCK_T, 4 * BLOCK_L], tl.float32)
            for first in range(0, frame_length, 4 * BLOCK_L):
                n = first + tl.arange(0, 4 * BLOCK_L)  # [4 * BLOCK_L]
                inside = n < frame_length
                if ENERGY == 1:
                    x = _frame_samples(signal, start, mean, n, inside, scale, preemphasis, False)
                    x = tl.where(inside[None, :], x, 0.0)
                else:
                    x = _windowed(signal, start, mean, window, n, inside, scale, preemphasis, PREEMPHASIS)
                squares += x * x
            energy = tl.log(_at_least(tl.sum(squares, axis=1), energy_floor))
            tl.store(power + (t * power_width + CLASSES * class_width), energy[:, None])

        # Four samples share a cosine or sine but for its sign: two on either side of the centre of the window, which is
        # the origin of time, and their mirror images about a quarter of the period. The sign of the latter depends on
        # whether the bin is even or odd, the two classes. So the samples are added first and multiplied once.
        right, left = frame_length // 2, (frame_length - 1) // 2
        for step in range(0, CLASSES * (table_width // BLOCK_F)):
            parity = step % CLASSES
            first_j = step // CLASSES * BLOCK_F
            j = first_j + tl.arange(0, BLOCK_F)  # [BLOCK_F]
            count = (num_bins - parity + CLASSES - 1) // CLASSES - first_j  # bins of the class from here on
            used = count
            if count <= 16:
                # Of few bins, mostly the Nyquist bin alone, maybe no filter takes any.
                k = (first_j + tl.arange(0, 16)) * CLASSES + parity  # [16]
                found = tl.zeros([16, 64], tl.float32)
                for first in range(0, num_mels, 64):
                    m = first + tl.arange(0, 64)  # [64]
                    mask = (k < num_bins)[:, None] & (m < num_mels)[None, :]
                    found += tl.abs(tl.load(mel + m[None, :] * num_bins + k[:, None], mask=mask, other=0.0))
                used = (tl.max(found) > 0).to(tl.int32)
            sign = (1 - 2 * parity).to(tl.float32)
            real = tl.zeros([BLOCK_T, BLOCK_F], tl.float32)
            imaginary = tl.zeros([BLOCK_T, BLOCK_F], tl.float32)
            if used > 0:
                for first in range(0, table_rows, BLOCK_L):
                    i = first + tl.arange(0, BLOCK_L)  # [BLOCK_L]
                    near, far = i <= left, (i <= fold) & (fold - i <= left)
                    a = _windowed(signal, start, mean, window, right + i, near, scale, preemphasis, PREEMPHASIS)
                    b = _windowed(signal, start, mean, window, left - i, near, scale, preemphasis, PREEMPHASIS)
                    c = _windowed(signal, start, mean, window, right + fold - i, far, scale, preemphasis, PREEMPHASIS)
                    d = _windowed(signal, start, mean, window, left - fold + i, far, scale, preemphasis, PREEMPHASIS)
                    table = (parity * table_rows + i)[:, None] * table_width + j[None, :]  # [BLOCK_L, BLOCK_F]
                    x, y = a + b + sign * (c + d), a - b - sign * (c - d)
                    real = _add_product(real, x, tl.load(cosine + table))
                    imaginary = _add_product(imaginary, y, tl.load(sine + table))
            value = real * real + imaginary * imaginary
            if MAGNITUDE:
                value = tl.sqrt(value)
            value = _at_most(_at_least(value, spectrum_low), spectrum_high)
            tl.store(
                power + (t * power_width + (parity * class_width + j)[None, :]), value, mask=(j < class_width)[None, :]
            )


@triton.jit(**_ANY_SIZE)
def _mel_kernel(
    power, lengths, mel, masks, features, frame_lengths,
    num_samples, first_frame, frame_shift, num_frames, power_width, class_width, num_bins, num_mels,
    size, first_column, energy_column, num_masks, spectrum_low, spectrum_high, log_floor, log_offset, log_scale,
    CLASSES: tl.constexpr, ENERGY: tl.constexpr, LOG: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Filter energies (B, T, size) of one tile of frames and filters, log energies, and the frame counts (B,)."""
    mel_tiles, frame_tiles = tl.cdiv(num_mels, BLOCK_M), tl.cdiv(num_frames, BLOCK_T)
    mel_tile, tile = tl.program_id(0) % mel_tiles, tl.program_id(0) // mel_tiles
    utterance = (tile // frame_tiles).to(tl.int64)
    frames = _count_frames(lengths, utterance, num_samples, first_frame, frame_shift)
    tl.store(frame_lengths + utterance, frames)  # Every tile of an utterance stores the same value.
    t = (tile % frame_tiles) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    m = mel_tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    row = (utterance * num_frames + t)[:, None]  # [BLOCK_T, 1]
    energies = tl.zeros([BLOCK_T, BLOCK_M], tl.float32)

    if (tile % frame_tiles) * BLOCK_T < frames:
        # Filters that are neighbours take few of the bins, which lie together.
        lowest = tl.full([BLOCK_F, BLOCK_M], num_bins, tl.int32)
        highest = tl.zeros([BLOCK_F, BLOCK_M], tl.int32)
        for first in range(0, num_bins, BLOCK_F):
            k = (first + tl.arange(0, BLOCK_F))[:, None]  # [BLOCK_F, 1]
            filters = tl.load(mel + m[None, :] * num_bins + k, mask=(k < num_bins) & (m < num_mels)[None, :], other=0.0)
            lowest = tl.where(filters != 0, tl.minimum(lowest, k), lowest)
            highest = tl.where(filters != 0, k + 1, highest)
        begin, end = tl.min(lowest), tl.max(highest)
        live = (utterance * num_frames + tl.minimum(t, frames - 1))[:, None]  # [BLOCK_T, 1]
        for first in range(begin, end, BLOCK_F):
            k = first + tl.arange(0, BLOCK_F)  # [BLOCK_F]
            column = (k % CLASSES * class_width + k // CLASSES)[None, :]
            x = tl.load(power + live * power_width + column, mask=(k < end)[None, :], other=0.0)  # [BLOCK_T, BLOCK_F]
            mask = (k < end)[:, None] & (m < num_mels)[None, :]
            filters = tl.load(mel + m[None, :] * num_bins + k[:, None], mask=mask, other=0.0)  # [BLOCK_F, BLOCK_M]
            energies = _add_product(energies, x, filters)

    energies = _at_most(_at_least(energies, spectrum_low), spectrum_high)
    if LOG:
        energies = tl.log(_at_least(energies, log_floor) + log_offset) * log_scale
    energies = tl.where((t < frames)[:, None], energies, 0.0)
    energies = _masked(energies, masks, num_masks, utterance, t, first_column + m)
    mask = (t < num_frames)[:, None] & (m < num_mels)[None, :]
    tl.store(features + row * size + (first_column + m)[None, :], energies, mask=mask)
    if ENERGY:
        column = energy_column + tl.arange(0, 1)
        energy = tl.load(power + row * power_width + CLASSES * class_width, mask=(t < frames)[:, None], other=0.0)
        energy = _masked(energy, masks, num_masks, utterance, t, column)  # [BLOCK_T, 1]
        tl.store(features + row * size + column[None, :], energy, mask=(t < num_frames)[:, None])


@triton.jit(**_ANY_SIZE)
def _cepstra_kernel(
    values, lengths, cosines, masks, features,
    num_samples, first_frame, frame_shift, num_frames, num_mels, num_cepstra,
    value_size, energy_value, size, first_column, energy_column, num_masks,
    ENERGY: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Cepstra (B, T, size) of one tile of frames, from log energies of filters (B, T, value_size)."""
    tiles, frame_tiles = tl.cdiv(num_cepstra, BLOCK_C), tl.cdiv(num_frames, BLOCK_T)
    tile = tl.program_id(0) // tiles
    utterance = (tile // frame_tiles).to(tl.int64)
    frames = _count_frames(lengths, utterance, num_samples, first_frame, frame_shift)
    t = (tile % frame_tiles) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    c = (tl.program_id(0) % tiles) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    live, row = t < frames, (utterance * num_frames + t)[:, None]
    cepstra = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for first in range(0, num_mels, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        used = (m < num_mels)[None, :]
        x = tl.load(values + row * value_size + first_column + m[None, :], mask=live[:, None] & used, other=0.0)
        y = tl.load(cosines + c[:, None] * num_mels + m[None, :], mask=(c < num_cepstra)[:, None] & used, other=0.0)
        cepstra = _add_product(cepstra, x, tl.trans(y))
    cepstra = _masked(cepstra, masks, num_masks, utterance, t, first_column + c)
    mask = (t < num_frames)[:, None] & (c < num_cepstra)[None, :]
    tl.store(features + row * size + (first_column + c)[None, :], cepstra, mask=mask)
    if ENERGY:
        column = energy_column + tl.arange(0, 1)
        energy = tl.load(values + row * value_size + energy_value, mask=live[:, None], other=0.0)  # [BLOCK_T, 1]
        energy = _masked(energy, masks, num_masks, utterance, t, column)
        tl.store(features + row * size + column[None, :], energy, mask=(t < num_frames)[:, None])


@triton.jit(**_ANY_SIZE)
def _highest_kernel(
    values, lengths, highest, num_samples, first_frame, frame_shift, num_frames, size,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Highest value (B, tiles) of one tile of frames (B, T, size); NaN where there is one."""
    frame_tiles = tl.cdiv(num_frames, BLOCK_T)
    utterance = (tl.program_id(0) // frame_tiles).to(tl.int64)
    frames = _count_frames(lengths, utterance, num_samples, first_frame, frame_shift)
    t = (tl.program_id(0) % frame_tiles) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    row = values + (utterance * num_frames + t)[:, None] * size
    found = tl.full([BLOCK_T, BLOCK_D], -float("inf"), tl.float32)
    for first in range(0, size, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)  # [BLOCK_D]
        mask = (t < frames)[:, None] & (d < size)[None, :]
        found = _at_least(found, tl.load(row + d[None, :], mask=mask, other=-float("inf")))
    tl.store(highest + tl.program_id(0), _highest(found))


@triton.jit(**_ANY_SIZE)
def _normalize_kernel(
    values, lengths, highest, masks, features,
    num_samples, first_frame, frame_shift, num_frames, size, num_tiles, num_masks, top_db, unbiased, var_eps, std_eps,
    TOP_DB: tl.constexpr, MEAN: tl.constexpr, STD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of columns of the features (B, T, size): their floor, mean and deviation over the frames."""
    tiles = tl.cdiv(size, BLOCK_D)
    utterance = (tl.program_id(0) // tiles).to(tl.int64)
    d = (tl.program_id(0) % tiles) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    frames = _count_frames(lengths, utterance, num_samples, first_frame, frame_shift)
    count = tl.maximum(frames, 1)
    column = utterance * num_frames * size + d[None, :]  # [1, BLOCK_D]
    low = -float("inf")
    if TOP_DB:
        found = tl.full([BLOCK_T], -float("inf"), tl.float32)
        for first in range(0, num_tiles, BLOCK_T):
            k = first + tl.arange(0, BLOCK_T)  # [BLOCK_T]
            part = tl.load(highest + utterance * num_tiles + k, mask=k < num_tiles, other=-float("inf"))
            found = _at_least(found, part)
        low = _highest(found) - top_db

    mean = tl.zeros([BLOCK_D], tl.float32)
    if MEAN or STD:
        for first in range(0, frames, BLOCK_T):
            t = first + tl.arange(0, BLOCK_T)  # [BLOCK_T]
            mask = (t < frames)[:, None] & (d < size)[None, :]
            x = _at_least(tl.load(values + column + t.to(tl.int64)[:, None] * size, mask=mask, other=0.0), low)
            mean += tl.sum(tl.where(mask, x, 0.0), axis=0)
        mean = tl.div_rn(mean, count.to(tl.float32))
    deviation = tl.full([BLOCK_D], 1.0, tl.float32)
    if STD:
        squares = tl.zeros([BLOCK_D], tl.float32)
        for first in range(0, frames, BLOCK_T):
            t = first + tl.arange(0, BLOCK_T)  # [BLOCK_T]
            mask = (t < frames)[:, None] & (d < size)[None, :]
            x = _at_least(tl.load(values + column + t.to(tl.int64)[:, None] * size, mask=mask, other=0.0), low)
            x = tl.where(mask, x - mean[None, :], 0.0)
            squares += tl.sum(x * x, axis=0)
        variance = tl.div_rn(squares, tl.maximum(count - unbiased, 1).to(tl.float32)) + var_eps
        deviation = tl.sqrt_rn(_at_least(variance, 1e-20)) + std_eps

    for first in range(0, num_frames, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)  # [BLOCK_T]
        mask = (t < frames)[:, None] & (d < size)[None, :]
        address = column + t.to(tl.int64)[:, None] * size
        x = _at_least(tl.load(values + address, mask=mask, other=0.0), low)
        if MEAN:
            x -= mean[None, :]
        if STD:
            x = x / deviation[None, :]
        x = _masked(tl.where(mask, x, 0.0), masks, num_masks, utterance, t, d)
        tl.store(features + address, x, mask=(t < num_frames)[:, None] & (d < size)[None, :])


@functools.lru_cache(maxsize=16)
def _dft_tables(frame_length: int, fft_size: int, device: torch.device) -> tuple[Tensor, Tensor, int, int]:
    """Cosine and sine of the DFT by class of bins, distance from the centre of the window, and bin.

    Returns:
        Both tables (classes, rows, width), rounded once from float64 and padded with zeros to whole tiles; the number
        of classes; and the sum of the indices of a distance and of its mirror image.
    """
    # Bins of an odd size are the even bins of its double.
    classes, size = (2, fft_size) if fft_size % 2 == 0 else (1, 2 * fft_size)
    # Distance i is i samples, or i and a half where the window has no sample at its centre.
    between = 1 - frame_length % 2
    fold = size // 2 - between
    num_rows, num_bins = min((frame_length + 1) // 2, fold // 2 + 1), (fft_size // 2 + classes) // classes
    i = torch.arange(triton.cdiv(num_rows, _POWER_TILE["BLOCK_L"]) * _POWER_TILE["BLOCK_L"])
    j = torch.arange(triton.cdiv(num_bins, _POWER_TILE["BLOCK_F"]) * _POWER_TILE["BLOCK_F"])
    k = 2 * j + torch.arange(classes)[:, None, None]
    # Whole turns are taken off while the phase is still an integer.
    phase = (k * (2 * i + between)[:, None] % (2 * size)).double() * (math.pi / size)
    # The centre is on both of its sides, and a distance may be its own mirror image.
    weight = torch.where((2 * i + between == 0) | (2 * i == fold), 0.5, 1.0) * (i < num_rows)
    cosine, sine = ((function(phase) * weight[:, None]).float().to(device) for function in (torch.cos, torch.sin))
    return cosine, sine, classes, fold


def _grid(batch: int, *tiled: tuple[int, int]) -> tuple[int]:
    """One program per utterance and tile of each (size, tile size)."""
    return (batch * math.prod(triton.cdiv(size, tile) for size, tile in tiled),)


def forward(
    waveforms: Tensor,
    lengths: Tensor,
    window: Tensor,
    mel: Tensor,
    cosines: Tensor | None,
    seeds: Tensor | None,
    masks: Tensor | None,
    integers: list[int],
    floats: list[float],
    dtype: torch.dtype,
    validate: bool,
) -> tuple[Tensor, Tensor]:
    """Features (B, T, D) and frame counts (B,); frames past an utterance's end are zero.

    Args:
        waveforms: Samples, float32, or int16 for those times 32768, shape (B, S).
        lengths: Samples per utterance, int64, shape (B,).
        window: Window, float32, shape (L,).
        mel: Filters, float32, shape (M, fft_size // 2 + 1).
        cosines: Cosine transform of the filter energies, float32, shape (C, M), or None.
        seeds: Seeds of the noise, int64, shape (B,), or None for none.
        masks: Rectangles that become zero, int64, shape (B, N, 4): first frame, one past the last, first bin, one past
            the last; or None.
        integers: Settings, as the names below say.
        floats: More of them.
        dtype: Type of the features.
        validate: Not for this kernel.

    Raises:
        ValueError: If a tensor is of another type, or a row is too long for 32-bit positions.
    """
    (frame_shift, fft_size, first_frame, offset, padding, frame_multiple, waveform_norm, preemphasis_mode, remove_dc,
     magnitude, energy, energy_last, mean_norm, std_norm, std_unbiased) = integers  # fmt: skip
    (sample_scale, preemphasis, spectrum_low, spectrum_high, energy_floor, log_floor, log_offset, log_scale, top_db,
     var_eps, std_eps, dither) = floats  # fmt: skip
    for name, tensor in (("window", window), ("mel", mel), ("cosines", cosines)):
        if tensor is not None and tensor.dtype != torch.float32:
            raise ValueError(f"{name} must be float32 for the Triton kernel, got {tensor.dtype}")
    if waveforms.dtype not in (torch.float32, torch.int16):
        raise ValueError(f"waveforms must be float32 or int16 for the Triton kernel, got {waveforms.dtype}")
    batch, num_samples = waveforms.shape
    if num_samples >= 2**30:
        raise ValueError(f"waveforms must have less than 2**30 samples for the Triton kernel, got {num_samples}")
    waveforms, lengths, window, mel = (tensor.contiguous() for tensor in (waveforms, lengths, window, mel))
    frame_length, (num_mels, num_bins) = window.shape[0], mel.shape
    frames = max(0, (num_samples - first_frame) // frame_shift + 1)
    num_frames = triton.cdiv(frames, frame_multiple) * frame_multiple
    num_values = num_mels if cosines is None else cosines.shape[0]
    has_energy = int(energy > 0)
    size = num_values + has_energy
    features = waveforms.new_empty(batch, num_frames, size, dtype=dtype)
    frame_lengths = torch.empty_like(lengths)
    if features.numel() == 0:
        return features, frame_lengths.zero_()

    normalize = bool(mean_norm or std_norm or top_db != math.inf)
    scratch = functools.partial(torch.empty, dtype=torch.float32, device=waveforms.device)
    combined = scratch(batch, num_frames, size) if normalize and dtype != torch.float32 else features
    energies = combined if cosines is None else scratch(batch, num_frames, num_mels + has_energy)
    first_column = 0 if energy_last else has_energy
    num_masks = 0 if masks is None else masks.shape[1]
    # What is not there is not read, and any tensor will do.
    masks = lengths if masks is None else masks.contiguous()
    unit = 2.0**-15 if waveforms.dtype == torch.int16 else 1.0
    cosine, sine, classes, fold = _dft_tables(frame_length, fft_size, waveforms.device)
    class_width = triton.cdiv(num_bins, 16 * classes) * 16
    power_width = classes * class_width + 16 * has_energy
    power = scratch(batch, num_frames, power_width)
    counting = {"first_frame": first_frame, "frame_shift": frame_shift, "num_samples": num_samples}
    counting["num_frames"] = num_frames
    with torch.cuda.device_of(waveforms):
        signal, row_size, scale = waveforms, num_samples, sample_scale
        filtered = preemphasis_mode if preemphasis else 0
        # Frames of plain samples that lie inside the waveform are read from there.
        padded = offset < 0 or offset + frame_length > first_frame
        if waveforms.dtype == torch.int16 or waveform_norm or filtered or seeds is not None or padded:
            row_size, scale = (frames - 1) * frame_shift + frame_length, 1.0
            signal, statistics = scratch(batch, row_size), scratch(batch, 2)
            if waveform_norm:
                _statistics_kernel[(batch,)](
                    waveforms, lengths, statistics, num_samples, unit,
                    INSTANCE=waveform_norm == 2, **_STATISTICS_TILE, **_OPTIONS,
                )  # fmt: skip
            _signal_kernel[_grid(batch, (row_size, _SIGNAL_TILE["BLOCK_S"]))](
                waveforms, lengths, lengths if seeds is None else seeds.contiguous(), statistics, signal,
                num_samples, row_size, offset, unit, sample_scale, dither, preemphasis,
                PADDING=padding, NORM=waveform_norm > 0, NOISE=seeds is not None, PREEMPHASIS=filtered,
                **_SIGNAL_TILE, **_OPTIONS,
            )  # fmt: skip
            offset = 0
        spectrum = {"spectrum_low": spectrum_low, "spectrum_high": spectrum_high, "num_bins": num_bins}
        spectrum |= {"num_mels": num_mels, "class_width": class_width, "power_width": power_width, "CLASSES": classes}
        _power_kernel[_grid(batch, (num_frames, _POWER_TILE["BLOCK_T"]))](
            signal, lengths, window, cosine, sine, mel, power,
            row_size=row_size, offset=offset, frame_length=frame_length, fold=fold,
            table_rows=cosine.shape[1], table_width=cosine.shape[2],
            scale=scale, preemphasis=preemphasis, energy_floor=energy_floor,
            PREEMPHASIS=preemphasis_mode == 0 and preemphasis != 0, REMOVE_DC=bool(remove_dc),
            MAGNITUDE=bool(magnitude), ENERGY=energy, **spectrum, **counting, **_POWER_TILE, **_OPTIONS,
        )  # fmt: skip
        _mel_kernel[_grid(batch, (num_frames, _MEL_TILE["BLOCK_T"]), (num_mels, _MEL_TILE["BLOCK_M"]))](
            power, lengths, mel, masks, energies, frame_lengths,
            size=energies.shape[2], first_column=first_column, energy_column=num_mels if energy_last else 0,
            num_masks=num_masks if energies is features and not normalize else 0,
            log_floor=log_floor, log_offset=log_offset, log_scale=log_scale,
            ENERGY=bool(energy), LOG=log_scale != 0, **spectrum, **counting, **_MEL_TILE, **_OPTIONS,
        )  # fmt: skip
        if cosines is not None:
            tile = _CEPSTRA_TILE
            _cepstra_kernel[_grid(batch, (num_frames, tile["BLOCK_T"]), (num_values, tile["BLOCK_C"]))](
                energies, lengths, cosines.contiguous(), masks, combined,
                num_mels=num_mels, num_cepstra=num_values, value_size=energies.shape[2],
                energy_value=num_mels if energy_last else 0, size=size, first_column=first_column,
                energy_column=num_values if energy_last else 0, num_masks=0 if normalize else num_masks,
                ENERGY=bool(energy), **counting, **tile, **_OPTIONS,
            )  # fmt: skip
        if normalize:
            num_tiles = triton.cdiv(num_frames, _HIGHEST_TILE["BLOCK_T"])
            highest = scratch(batch, num_tiles)
            if top_db != math.inf:
                _highest_kernel[(batch * num_tiles,)](
                    combined, lengths, highest, size=size, **counting, **_HIGHEST_TILE, **_OPTIONS
                )
            _normalize_kernel[_grid(batch, (size, _NORMALIZE_TILE["BLOCK_D"]))](
                combined, lengths, highest, masks, features,
                size=size, num_tiles=num_tiles, num_masks=num_masks, top_db=top_db, unbiased=std_unbiased,
                var_eps=var_eps, std_eps=std_eps, TOP_DB=top_db != math.inf, MEAN=bool(mean_norm), STD=bool(std_norm),
                **counting, **_NORMALIZE_TILE, **_OPTIONS,
            )  # fmt: skip
    return features, frame_lengths
