"""How far rounding in float32 may move each value of log_mel_fbank: the definition in float64 with intervals.

Each step passes on the error of its input and adds its own rounding, so that a bin far below the loudest of its frame,
a floor that is nearly met and a deviation of nearly nothing are allowed what they cost, and nothing else is.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from spkfast import FrontendSpec, frontend_tables
from spkfast.frontend_tables import Settings
from spkfast.reference.log_mel_fbank import _frames, _mask, _signal, count_frames, gaussian_noise, padded_frames

_U = 2.0**-24  # unit of rounding of float32
_TINY = 2.0**-146  # a few units of its smallest numbers
_MOST = float(np.finfo(np.float32).max)
_INF = float("inf")
_DEVIATIONS = 6.0  # within which a sum of independent errors lies, whatever frame and bin of a long run


class Bounds(NamedTuple):
    """Between what each value (B, T, D) may lie; anywhere, and be NaN, where ``free``."""

    low: Tensor
    high: Tensor
    free: Tensor


def error_bounds(
    spec: FrontendSpec,
    waveforms: Tensor,
    lengths: Tensor,
    seeds: Tensor | None,
    masks: Tensor | None,
    independent: Tensor,
) -> Bounds:
    """Bounds of the features of float64 ``waveforms`` (B, S).

    ``independent`` (B,) says in which rows no two roundings have to agree, as they do where samples repeat: there
    errors add up as random numbers do.
    """
    s = frontend_tables.settings(spec)
    window, mel, cosines = (
        None if table is None else torch.from_numpy(table) for table in frontend_tables.tables(spec)
    )
    assert window is not None and mel is not None
    num_frames = padded_frames(waveforms.shape[1], s)
    if num_frames == 0 or len(waveforms) == 0:
        empty = waveforms.new_zeros(len(waveforms), num_frames, spec.output_size)
        return Bounds(empty, empty, empty.bool())
    signals = _signal_errors(waveforms, lengths, seeds if s.dither else None, s)
    frames, error, most = (_frames(x, lengths, len(window), num_frames, s) for x in signals[:3])
    shared = signals.shared[..., None]  # error of all samples of a frame
    independent = independent[:, None, None]
    # A frame is free once any of its intermediate results can leave the range of float32.
    largest, size = most.amax(dim=-1), len(window)
    if s.remove_dc:
        mean, sizes = frames.mean(dim=-1, keepdim=True), frames.abs().mean(dim=-1, keepdim=True)
        sizes = sizes + frames[..., :1].abs()
        largest = torch.maximum(largest, size * sizes[..., 0])
        shared = (
            _added(error, independent) / size + _roundings(size / 4, independent) * _U * sizes + 4 * _U * mean.abs()
        )
        frames = frames - mean
        error = error + 2 * _U * frames.abs()
    raw = plain = frames
    raw_error = error + shared
    if s.preemphasis_mode == 0:
        before, slope = torch.cat([frames[..., :1], frames[..., :-1]], dim=-1), abs(s.preemphasis)
        error = error + slope * torch.cat([error[..., :1], error[..., :-1]], dim=-1)
        sizes = frames.abs() + slope * before.abs()
        largest = torch.maximum(largest, sizes.amax(dim=-1))
        error = error + 2 * _U * sizes
        shared = shared * abs(1 - s.preemphasis)
        frames = frames - s.preemphasis * before
    elif s.preemphasis:
        plain = _frames(signals.plain, lengths, len(window), num_frames, s)
    frames = frames * window
    error = error * window.abs() + 2 * _U * frames.abs() + _TINY

    spectrum = torch.fft.rfft(frames, n=s.fft_size).abs()
    of_bin = _added(error, independent) + s.fft_size * _TINY
    of_bin = of_bin + _roundings(_transform_depth(s.fft_size), independent) * _U * _added(frames, independent, 1)
    of_bin = of_bin + 2 * _U * (spectrum + spectrum.amax(dim=-1, keepdim=True))
    of_bin = of_bin + shared * torch.fft.rfft(window, n=s.fft_size).abs()
    if s.preemphasis:  # is a coefficient in float32 too
        of_bin = of_bin + 2 * _U * abs(s.preemphasis) * torch.fft.rfft(plain * window, n=s.fft_size).abs()
    largest = torch.maximum(largest, 4 * frames.abs().sum(dim=-1))
    low = ((spectrum - of_bin).clamp_min(0).square() * (1 - 4 * _U) - _TINY).clamp_min(0)
    high = (spectrum + of_bin).square() * (1 + 4 * _U) + _TINY
    high = high.masked_fill(high > _MOST, _INF)
    if s.magnitude:
        low, high = low.sqrt() * (1 - _U), high.sqrt() * (1 + _U)
    low, high = _clip(low, high, s)
    free = (~(largest < _MOST) | high.isinf().any(dim=-1))[..., None]
    low, high = low.masked_fill(free, 0), high.masked_fill(free, 0)

    terms = _U * (4 + (mel > 0).sum(dim=1))
    lost = s.fft_size * _TINY
    low, high = low @ mel.T * (1 - terms) - lost, high @ mel.T * (1 + terms) + lost
    low, high = _clip(low.clamp_min(0), high.masked_fill(high > _MOST, _INF), s)
    if s.log_scale:
        floor, offset = _either(s.log_floor), _either(s.log_offset)
        low, high = low.clamp_min(floor[0]) + offset[0], high.clamp_min(floor[1]) + offset[1]
        low, high = _logarithm(low, high, s.log_scale)
    if cosines is not None:
        middle, radius = (low + high) / 2, (high - low) / 2
        size_of_terms = middle.abs() @ cosines.abs().T
        radius = radius @ cosines.abs().T + (4 + len(mel)) * _U * size_of_terms
        middle = middle @ cosines.T
        low, high = middle - radius, middle + radius
    if s.energy:
        x, change = (raw, raw_error) if s.energy == 1 else (frames, error + shared * window.abs())
        energy = x.square().sum(dim=-1, keepdim=True)
        change = _added(2 * x.abs() * change, independent) + change.square().sum(dim=-1, keepdim=True)
        change = change + _roundings(size + 8, independent) * _U * energy + size * _TINY
        floor = _either(s.energy_floor)
        above = energy + change
        column = _logarithm(
            (energy - change).clamp_min(floor[0]), above.masked_fill(above > _MOST, _INF).clamp_min(floor[1]), 1.0
        )
        order = -1 if s.energy_last else 1
        low, high = (torch.cat(pair[::order], dim=-1) for pair in ((column[0], low), (column[1], high)))
    low, high, free = _freed(low, high, free | low.isnan() | high.isnan())
    return Bounds(*(_mask(x, masks) for x in _normalized(low, high, free, count_frames(lengths, s), s)))


class _Signals(NamedTuple):
    """The signal (B, S); error and largest intermediate result of each sample; the signal before pre-emphasis; an error
    that all samples of a row (B, 1) share."""

    signal: Tensor
    error: Tensor
    most: Tensor
    plain: Tensor
    shared: Tensor


def _signal_errors(waveforms: Tensor, lengths: Tensor, seeds: Tensor | None, s: Settings) -> _Signals:
    past = torch.arange(waveforms.shape[1]) >= lengths[:, None]
    x = waveforms.masked_fill(past, 0)
    size, gain = x.abs(), torch.full_like(lengths[:, None], s.sample_scale, dtype=x.dtype)
    mean = torch.zeros_like(gain)
    if s.waveform_norm:
        count = lengths.clamp_min(1)[:, None]
        mean = x.sum(dim=1, keepdim=True) / count
        variance = (x - mean).masked_fill(past, 0).square().sum(dim=1, keepdim=True) / count
        if s.waveform_norm == 1:
            gain = gain / (variance.clamp_min(1e-20).sqrt() + 1e-8)
        else:
            gain = gain / (variance + 1e-4).sqrt()
        size = size + mean.abs()
    most = torch.maximum(size, size * gain)
    # The gain of an utterance as loud as float32 goes is itself one of the smallest numbers.
    error = size * (4 * _U * gain + _TINY) + _TINY * (1 + gain)
    shared = 2 * _U * mean.abs() * gain
    plain = signal = _signal(waveforms, lengths, seeds, s._replace(preemphasis_mode=0))
    if seeds is not None:
        noise = gaussian_noise(seeds, x.shape[1], x.dtype).abs()
        error = error + _U * (s.dither * (60 + 8 * noise) + signal.abs())
        most = most + s.dither * noise
    if s.preemphasis_mode and x.shape[1]:
        slope, sizes = abs(s.preemphasis), signal.abs()
        error_before, before = (
            torch.cat([value[:, :2].amax(dim=1, keepdim=True), value[:, :-1]], dim=1) for value in (error, sizes)
        )
        error = error + slope * error_before + 2 * _U * (sizes + slope * before)
        most = most + slope * before
        shared = shared * abs(1 - s.preemphasis)
        signal = _signal(waveforms, lengths, seeds, s)
    return _Signals(signal, error.masked_fill(past, 0), most.masked_fill(past, 0), plain, shared)


def _added(error: Tensor, independent: Tensor, deviations: float = _DEVIATIONS) -> Tensor:
    """What errors of the samples of a frame add up to in any sum of them with factors up to 1."""
    worst = error.abs().sum(dim=-1, keepdim=True)
    return torch.where(independent, torch.minimum(deviations * error.norm(dim=-1, keepdim=True), worst), worst)


def _roundings(count: float, independent: Tensor) -> Tensor:
    """How many units of rounding this many roundings one after the other come to."""
    return torch.where(independent, min(count, _DEVIATIONS * count**0.5), count)


def _transform_depth(points: int) -> float:
    """Roundings on the way of a sample to a bin."""
    depth, radix = 8.0, 2
    while points > 1:
        while points % radix == 0:
            points //= radix
            depth += 4 if radix <= 5 else 6 + radix  # a prime above 5 is summed up term by term
        radix += 1
    return depth


def _either(value: float) -> tuple[float, float]:
    """A setting in float64 and float32, in order."""
    with np.errstate(over="ignore", under="ignore"):
        single = float(np.float32(value))
    return min(value, single), max(value, single)


def _clip(low: Tensor, high: Tensor, s: Settings) -> tuple[Tensor, Tensor]:
    bottom, top = _either(s.spectrum_low), _either(s.spectrum_high)
    return low.clamp(bottom[0], top[0]), high.clamp(bottom[1], top[1])


def _logarithm(low: Tensor, high: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    low, high = (low * (1 - 2 * _U)).log() * scale, (high * (1 + 2 * _U)).log() * scale
    return low - _rounding(low), high + _rounding(high)


def _rounding(x: Tensor) -> Tensor:
    """A few units of rounding of each finite value."""
    return torch.where(x.isfinite(), 6 * _U * x.abs(), 0)


def _freed(low: Tensor, high: Tensor, free: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    free = free.expand_as(low)
    return low.masked_fill(free, -_INF), high.masked_fill(free, _INF), free


def _normalized(low: Tensor, high: Tensor, free: Tensor, frames: Tensor, s: Settings) -> tuple[Tensor, Tensor, Tensor]:
    past = (torch.arange(low.shape[1]) >= frames[:, None])[..., None]
    free = free & ~past
    if s.top_db != _INF:
        floor = low.masked_fill(past, -_INF).amax(dim=(1, 2), keepdim=True) - s.top_db
        ceiling = high.masked_fill(past, -_INF).amax(dim=(1, 2), keepdim=True) - s.top_db
        margin = 2 * _U * s.top_db
        low = torch.maximum(low, floor - _rounding(floor) - margin)
        high = torch.maximum(high, ceiling + _rounding(ceiling) + margin)
        low, high, free = _freed(low, high, free.any(dim=(1, 2), keepdim=True))
    low, high, free = low.masked_fill(past, 0), high.masked_fill(past, 0), free & ~past
    if not (s.mean_norm or s.std_norm):
        return low, high, free
    # An infinite value makes all of its column NaN.
    lost = ~(low.isfinite() & high.isfinite()).all(dim=1, keepdim=True)
    low, high = low.masked_fill(lost, 0), high.masked_fill(lost, 0)
    count = frames.clamp_min(1)[:, None, None]
    rounding = 20 * _U * torch.maximum(low.abs(), high.abs()).sum(dim=1, keepdim=True) / count
    mean_low, mean_high = (x.sum(dim=1, keepdim=True) / count for x in (low, high))
    centred_low, centred_high = low - mean_high - rounding, high - mean_low + rounding
    centred_low = (centred_low - _rounding(centred_low)).masked_fill(past, 0)
    centred_high = (centred_high + _rounding(centred_high)).masked_fill(past, 0)
    if s.mean_norm:
        low, high = centred_low, centred_high
    if s.std_norm:
        middle, radius = (
            (x.square().sum(dim=1, keepdim=True) / (count - s.std_unbiased).clamp_min(1)).sqrt()
            for x in ((centred_low + centred_high) / 2, (centred_high - centred_low) / 2)
        )
        smallest, largest = (
            ((deviation.square() + s.var_eps).clamp_min(1e-20).sqrt() + s.std_eps) * (1 + sign * 8 * _U)
            for deviation, sign in (((middle - radius).clamp_min(0), -1), (middle + radius, 1))
        )
        low, high = torch.minimum(low / smallest, low / largest), torch.maximum(high / smallest, high / largest)
        low, high = low - _rounding(low), high + _rounding(high)
    return _freed(low, high, lost & ~past)
