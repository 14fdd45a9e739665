"""Definition of ``change_speed``: playing a signal faster or slower, by a windowed sinc at exact positions."""

from __future__ import annotations

import contextlib
import functools
import math
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv1d
from torch.utils._python_dispatch import _disable_current_modes

# Zero crossings of the sinc to each side, and the Kaiser window's shape: 80 dB of attenuation, reached at half the
# lower of the two rates, from 0.892 of it on. Kaiser's formulas miss by up to a decibel, and images add another.
_CROSSINGS = 48
_ATTENUATION = 82
_BETA = 0.1102 * (_ATTENUATION - 8.7)
_TRANSITION = (_ATTENUATION - 8) / (2.285 * 2 * _CROSSINGS) / math.pi


def ratio(speed: float) -> Fraction:
    """The speed as a fraction of small numbers: 0.9 is 9/10."""
    return Fraction(speed).limit_denominator(1000)


def half_width(speed: float) -> int:
    """Samples of the input to each side of an output that it depends on."""
    return 0 if ratio(speed) == 1 else math.ceil(_CROSSINGS * max(1.0, float(ratio(speed))))


def source_samples(num_samples: int, speed: float) -> int:
    """Samples of the input between which ``num_samples`` of the output stand: fewer would give fewer."""
    return math.ceil((num_samples - 1) * ratio(speed)) + 1


@functools.lru_cache(maxsize=64)
def filters(speed: float) -> np.ndarray:
    """Weights of the input samples around each output of a period, float64, shape (q, 2 half_width + 1).

    Output n of speed p/q stands at input position n p/q. Row n mod q weighs the inputs from ``half_width`` before to
    ``half_width`` after the position rounded down.
    """
    fraction, half = ratio(speed), half_width(speed)
    if half == 0:
        return np.ones((1, 1))
    p, q = fraction.numerator, fraction.denominator
    band = min(1.0, q / p)
    cutoff = band * (1 - _TRANSITION / 2)
    phase = (np.arange(q) * p % q) / q
    distance = np.arange(-half, half + 1) - phase[:, None]  # [q, taps]
    inside = np.clip(1 - np.square(distance * band / _CROSSINGS), 0, None)
    weights = cutoff * np.sinc(cutoff * distance) * np.i0(_BETA * np.sqrt(inside)) / np.i0(_BETA) * (inside > 0)
    return weights / weights.sum(axis=1, keepdims=True)


@torch.compiler.assume_constant_result  # not to be traced, nor computed at every call of a compiled graph
def _windows(speed: float, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    # In a list: torch.compile would take the sizes of a bare tensor for unknown.
    return [_cached_windows(speed, dtype, device)]


@functools.lru_cache(maxsize=64)
def _cached_windows(speed: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Weights of all q outputs of a period over one window of the input: output j reads from floor(j p / q) on."""
    p, q = ratio(speed).as_integer_ratio()
    taps = 2 * half_width(speed) + 1
    windows = np.zeros((q, taps + (q - 1) * p // q))
    for j, row in enumerate(filters(speed)):
        windows[j, j * p // q : j * p // q + taps] = row
    # Kept for later calls: neither made under inference mode nor fake, as a call that is being traced would have them.
    with torch.inference_mode(False), _disable_current_modes():
        return torch.from_numpy(windows).to(device, dtype)


def _exact_convolutions(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Keeps cuDNN from TF32, its default, whose errors are far above the stop band."""
    if not x.is_cuda or torch.compiler.is_compiling():  # which cannot follow
        return contextlib.nullcontext()
    return torch.backends.cudnn.flags(True, deterministic=torch.backends.cudnn.deterministic, allow_tf32=False)


def change_speed(
    waveforms: Tensor, lengths: Tensor, which: Tensor, speeds: list[float], context: int, num_samples: int
) -> Tensor:
    """See :func:`spkfast.functional.change_speed`."""
    x = waveforms if waveforms.is_floating_point() else waveforms.float() / 32768
    batch, total = x.shape
    position = torch.arange(total, device=x.device) - context
    x = x.masked_fill(position >= lengths[:, None], 0.0)
    outputs = x.new_zeros(batch, num_samples)
    n = torch.arange(num_samples, device=x.device)
    for k, speed in enumerate(speeds):
        p, q = ratio(speed).as_integer_ratio()
        half, blocks = half_width(speed), max(-(-num_samples // q), 1)
        (weights,) = _windows(speed, x.dtype, x.device)
        needed = (blocks - 1) * p + weights.shape[1]
        padded = torch.nn.functional.pad(x, (half, needed))[:, context : context + needed]
        with _exact_convolutions(x):
            y = conv1d(padded[:, None], weights[:, None], stride=p).transpose(1, 2).reshape(batch, blocks * q)
        available = torch.div((lengths - 1) * q, p, rounding_mode="floor") + 1  # outputs that an utterance has
        repeated = y.gather(1, n % available.clamp(1, num_samples)[:, None])
        outputs = torch.where((which == k)[:, None], repeated, outputs)
    return outputs.masked_fill(lengths[:, None] <= 0, 0.0)
