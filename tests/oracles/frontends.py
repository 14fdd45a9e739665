"""Acoustic front-ends of other toolkits, each written out in float64 from its own definition.

Nothing here is shared with the package: no import of it, no FFT routine, every transform an explicit matrix.
All take a mono signal in [-1, 1] at 16 kHz and give ``(frames, bins)``.
"""

from __future__ import annotations

import numpy as np

RATE, WINDOW, HOP, FFT = 16000, 400, 160, 512


def thin(x: np.ndarray, *, normalise: bool = True, scale: float = 1.0) -> np.ndarray:
    """Thin ResNet-34 (``ResNetSE34`` of clovaai/voxceleb_trainer, removed in November 2020): 257 magnitudes, no log.

    Args:
        x: Samples in [-1, 1].
        normalise: Instance normalisation over time; without it, the magnitudes.
        scale: Factor on the samples. 32768 is what that trainer fed (it read 16-bit integers); it matters, because
            the 1e-5 beside the variance does not scale with the signal.
    """
    x = scale * np.asarray(x, dtype=np.float64)
    window = np.zeros(FFT)
    for n in range(WINDOW):  # periodic Hann, in the middle of the FFT frame
        window[(FFT - WINDOW) // 2 + n] = 0.5 - 0.5 * np.cos(2 * np.pi * n / WINDOW)
    cos, sin = _fourier(rows=FFT, bins=FFT // 2 + 1)
    frames = max(0, 1 + (len(x) - FFT) // HOP)  # whole FFT frames inside the signal
    out = np.zeros((frames, FFT // 2 + 1))
    for t in range(frames):
        piece = window * x[t * HOP : t * HOP + FFT]
        out[t] = np.sqrt((piece @ cos) ** 2 + (piece @ sin) ** 2)
    if not normalise or not frames:
        return out
    mean = out.sum(axis=0) / frames
    variance = ((out - mean) ** 2).sum(axis=0) / frames
    return (out - mean) / np.sqrt(variance + 1e-5)


def titanet(x: np.ndarray, *, normalise: bool = True) -> np.ndarray:
    """TitaNet-large (NVIDIA NeMo, from July 2025, 2.5 on): 80 log-mel values, mean and deviation per bin.

    Args:
        x: Samples in [-1, 1].
        normalise: Mean and deviation over the valid frames; without it, the log-mel values.
    """
    x = np.asarray(x, dtype=np.float64)
    emphasised = x.copy()  # the first sample stays
    for n in range(1, len(x)):
        emphasised[n] = x[n] - 0.97 * x[n - 1]
    padded = np.concatenate([np.zeros(FFT // 2), emphasised, np.zeros(FFT // 2)])
    window = np.zeros(FFT)
    for n in range(WINDOW):  # symmetric Hann, in the middle of the FFT frame
        window[(FFT - WINDOW) // 2 + n] = 0.5 - 0.5 * np.cos(2 * np.pi * n / (WINDOW - 1))
    cos, sin = _fourier(rows=FFT, bins=FFT // 2 + 1)
    mel = _slaney_mel(80)
    frames, valid = len(x) // HOP + 1, len(x) // HOP  # the last frame is computed, but not valid
    out = np.zeros((frames, 80))
    for t in range(frames):
        piece = window * padded[t * HOP : t * HOP + FFT]
        power = (piece @ cos) ** 2 + (piece @ sin) ** 2
        out[t] = np.log(power @ mel + 2.0**-24)
    out = out[:valid]
    if normalise and valid:
        mean = out.sum(axis=0) / valid
        deviation = np.sqrt(((out - mean) ** 2).sum(axis=0) / (valid - 1)) if valid > 1 else np.zeros(80)
        out = (out - mean) / (deviation + 1e-5)
    return out


def redimnet2(x: np.ndarray, *, normalise: bool = True, waveform_norm: bool = True, n_mels: int = 72) -> np.ndarray:
    """ReDimNet2 with the TFMel front-end (wespeaker's recipe of July 2026): log-mel values less their mean.

    Args:
        x: Samples in [-1, 1].
        normalise: Subtract the mean over the frames; without it, the log-mel values.
        waveform_norm: Zero mean and unit deviation of the waveform: on in the recipe, off in the class.
        n_mels: 72 in the recipe, 80 in the class.
    """
    eps = 1e-8
    x = np.asarray(x, dtype=np.float64)
    if waveform_norm:
        mean = x.sum() / len(x)
        x = (x - mean) / (np.sqrt(((x - mean) ** 2).sum() / len(x)) + eps)
    emphasised = np.zeros(len(x))
    emphasised[0] = x[0] - 0.97 * x[1]  # reflected: the sample before the first is the second
    for n in range(1, len(x)):
        emphasised[n] = x[n] - 0.97 * x[n - 1]
    padded = np.concatenate([np.zeros(HOP // 2), emphasised, np.zeros(HOP // 2)])
    window = np.array([0.54 - 0.46 * np.cos(2 * np.pi * n / (WINDOW - 1)) for n in range(WINDOW)])  # symmetric Hamming
    cos, sin = _fourier(rows=WINDOW, bins=FFT // 2)  # without the Nyquist bin
    mel = _tf_mel(n_mels)
    frames = max(0, 1 + (len(padded) - WINDOW) // HOP)
    out = np.zeros((frames, n_mels))
    for t in range(frames):
        piece = window * padded[t * HOP : t * HOP + WINDOW]
        power = np.clip((piece @ cos) ** 2 + (piece @ sin) ** 2, eps, 1 / eps)
        out[t] = np.log(np.clip(power @ mel, eps, 1 / eps) + eps)
    return out - out.sum(axis=0) / frames if normalise and frames else out


def _fourier(rows: int, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of the first bins of a 512-point transform, for that many samples; angles reduced exactly."""
    angle = 2 * np.pi * (np.outer(np.arange(rows), np.arange(bins)) % FFT) / FFT
    return np.cos(angle), np.sin(angle)


def _slaney_mel(n_mels: int) -> np.ndarray:
    """Triangles over Hz between points equally spaced on Slaney's scale, 0 to 8000 Hz, each of unit area in Hz."""

    def to_hz(mel: float) -> float:
        # 3 mel for 200 Hz up to 1000 Hz (15 mel), from there 27 mel for a factor of 6.4
        return mel * 200 / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)

    top = 15 + 27 * np.log(RATE / 2 / 1000) / np.log(6.4)
    edges = [to_hz(top * i / (n_mels + 1)) for i in range(n_mels + 2)]
    out = np.zeros((FFT // 2 + 1, n_mels))
    for m in range(n_mels):
        low, centre, high = edges[m : m + 3]
        for k in range(FFT // 2 + 1):
            hz = k * RATE / FFT
            out[k, m] = max(0.0, min((hz - low) / (centre - low), (high - hz) / (high - centre))) * 2 / (high - low)
    return out


def _tf_mel(n_mels: int) -> np.ndarray:
    """Triangles over mel, 20 to 7600 Hz.

    The 256 bins are taken to span 0 to 8000 Hz inclusive, so bin k stands at ``k * 8000 / 255`` Hz and not at its true
    ``k * 31.25`` Hz: a quirk of that front-end.  Bin 0 has no weight.
    """

    def to_mel(hz: float) -> float:
        return float(2595 * np.log10(1 + hz / 700))

    step = (to_mel(7600) - to_mel(20)) / (n_mels + 1)
    out = np.zeros((FFT // 2, n_mels))
    for m in range(n_mels):
        low = to_mel(20) + m * step
        for k in range(1, FFT // 2):
            place = (to_mel(k * (RATE / 2) / (FFT // 2 - 1)) - low) / step  # 0 at the lower edge, 1 at the centre
            out[k, m] = max(0.0, min(place, 2 - place))
    return out
