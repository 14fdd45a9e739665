"""What the kernels need of a FrontendSpec: window, mel filters, cosine transform, and its settings as numbers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from spkfast.frontends import FrontendSpec

Table = NDArray[np.float64]

# Asked for once: dataclasses.fields costs more than to read them.
_FIELDS = [field.name for field in dataclasses.fields(FrontendSpec)]
_PADDING = {"none": 0, "constant": 0, "reflect": 1}
_SYMMETRIC = 2
_WAVEFORM_NORM = {"none": 0, "mean_std": 1, "instance": 2}
_PREEMPHASIS = {"frame": 0, "signal": 1, "signal_zero": 2}


class Settings(NamedTuple):
    """A FrontendSpec as plain numbers, in the order in which every kernel takes them.

    The integers up to ``std_unbiased`` travel as one list, the floats from ``sample_scale`` on as another.

    Attributes:
        frame_shift: Hop in samples.
        fft_size: Points of the DFT.
        first_frame: Samples that the first frame takes, less the padding, so that it may be negative; each further
            ``frame_shift`` gives one more. An utterance without samples has no frames.
        offset: Position of the first window sample of frame 0; negative where the signal is padded.
        padding: What lies outside the signal: 0 zeros, 1 its reflection, 2 its reflection with the edge repeated.
        frame_multiple: The number of frames is padded with zeros to a multiple of this.
        waveform_norm: Of the waveform of an utterance: 0 none, 1 mean_std, 2 instance.
        preemphasis_mode: 0 of each frame, 1 of the signal with a reflected first sample, 2 with zero before it.
        remove_dc: Subtract the mean of each frame.
        magnitude: The square root of the power spectrum.
        energy: A column of log energy: 0 none, 1 before pre-emphasis and window, 2 after them.
        energy_last: That column comes last, not first.
        mean_norm: Subtract the mean over the frames of an utterance.
        std_norm: Divide by the standard deviation over the frames of an utterance.
        std_unbiased: The variance is divided by one less than the frames.
        sample_scale: Factor on samples in [-1, 1].
        preemphasis: Pre-emphasis coefficient.
        spectrum_low: Lower bound on the spectrum.
        spectrum_high: Upper bound on the spectrum.
        energy_floor: Lower bound on the energy.
        log_floor: Lower bound before the logarithm.
        log_offset: Added before the logarithm.
        log_scale: Factor on the natural logarithm; 0 for none.
        top_db: Floor below the maximum of the utterance, in units of the features; infinite for none.
        var_eps: Added to the variance.
        std_eps: Added to the standard deviation.
        dither: Standard deviation of the noise on the scaled samples.
    """

    frame_shift: int
    fft_size: int
    first_frame: int
    offset: int
    padding: int
    frame_multiple: int
    waveform_norm: int
    preemphasis_mode: int
    remove_dc: int
    magnitude: int
    energy: int
    energy_last: int
    mean_norm: int
    std_norm: int
    std_unbiased: int
    sample_scale: float
    preemphasis: float
    spectrum_low: float
    spectrum_high: float
    energy_floor: float
    log_floor: float
    log_offset: float
    log_scale: float
    top_db: float
    var_eps: float
    std_eps: float
    dither: float

    @property
    def integers(self) -> list[int]:
        """The integers, as the ops take them."""
        return [int(value) for value in self[:_NUM_INTEGERS]]

    @property
    def floats(self) -> list[float]:
        """The floats, as the ops take them."""
        return list(self[_NUM_INTEGERS:])


_NUM_INTEGERS = Settings._fields.index("sample_scale")


class Tables(NamedTuple):
    """Constant arrays of a FrontendSpec in float64.

    Attributes:
        window: Window (L,).
        mel: Filters (M, fft_size // 2 + 1); the identity for a plain spectrum.
        cosines: Cosine transform with its lifter (C, M); None where the features are no cepstra.
    """

    window: Table
    mel: Table
    cosines: Table | None


def settings(spec: FrontendSpec) -> Settings:
    """The settings of a spec as plain numbers."""
    length, shift, size = spec.frame_length, spec.frame_shift, spec.fft_size
    padding = _PADDING[spec.pad_mode]
    if spec.center:  # the window in the middle of a frame of fft_size samples
        offset, first = (size - length) // 2, size
        if spec.pad_mode != "none":
            offset, first = offset - size // 2, size - 2 * (size // 2)
    elif spec.snip_edges:
        offset, first = -spec.pad_samples, length - 2 * spec.pad_samples
    else:  # frames centred on the middle of each hop
        offset, first, padding = shift // 2 - length // 2, shift - shift // 2, _SYMMETRIC
    first += shift * spec.drop_last_frame
    low, high = spec.spectrum_clip or (0.0, math.inf)
    return Settings(
        frame_shift=shift,
        fft_size=size,
        first_frame=first,
        offset=offset,
        padding=padding,
        frame_multiple=spec.pad_frames_to,
        waveform_norm=_WAVEFORM_NORM[spec.waveform_norm],
        preemphasis_mode=_PREEMPHASIS[spec.preemphasis_mode],
        remove_dc=int(spec.remove_dc),
        magnitude=int(spec.power == 1),
        energy=0 if not spec.use_energy else 1 if spec.raw_energy else 2,
        energy_last=int(spec.htk_compat),
        mean_norm=int(spec.mean_norm),
        std_norm=int(spec.std_norm),
        std_unbiased=int(spec.std_unbiased),
        sample_scale=float(spec.sample_scale),
        preemphasis=float(spec.preemphasis),
        spectrum_low=float(low),
        spectrum_high=float(high),
        energy_floor=max(float(spec.energy_floor), 2.0**-23),
        log_floor=float(spec.log_floor),
        log_offset=float(spec.log_offset),
        log_scale={"none": 0.0, "ln": 1.0, "db": 10 / math.log(10)}[spec.log],
        top_db=math.inf if spec.top_db is None else float(spec.top_db),
        var_eps=float(spec.var_eps),
        std_eps=float(spec.std_eps),
        dither=float(spec.dither),
    )


def tables(spec: FrontendSpec) -> Tables:
    """Window, mel filters and cosine transform of a spec, in float64."""
    return Tables(_window(spec), _mel(spec), _cosines(spec) if spec.num_ceps else None)


def field_values(spec: FrontendSpec) -> tuple[Any, ...]:
    """The fields in order: under torch 2.11 a compiled graph can hold these, but not the spec itself."""
    return tuple([getattr(spec, name) for name in _FIELDS])


def _window(spec: FrontendSpec) -> Table:
    phase = 2 * math.pi * np.arange(spec.frame_length) / (spec.frame_length - (0 if spec.window_periodic else 1))
    hann = 0.5 - 0.5 * np.cos(phase)
    return {
        "hamming": 0.54 - 0.46 * np.cos(phase),
        "hann": hann,
        "povey": hann**0.85,
        "blackman": 0.42 - 0.5 * np.cos(phase) + 0.08 * np.cos(2 * phase),
        "rectangular": np.ones_like(hann),
    }[spec.window]


def _to_mel(hertz: Table, scale: str) -> Table:
    if scale != "slaney":
        return 1127.0 * np.log1p(hertz / 700.0)
    # Linear below 1 kHz, then 27 steps for each factor of 6.4.
    above = 15 + 27 * np.log(np.maximum(hertz, 1000.0) / 1000.0) / math.log(6.4)
    return np.where(hertz < 1000.0, hertz * 3 / 200, above)


def _to_hertz(mel: Table, scale: str) -> Table:
    if scale != "slaney":
        return 700.0 * np.expm1(mel / 1127.0)
    return np.where(mel < 15, mel * 200 / 3, 1000.0 * 6.4 ** ((mel - 15) / 27))


def _mel(spec: FrontendSpec) -> Table:
    bins: Table = np.arange(spec.fft_size // 2 + 1, dtype=np.float64) * (spec.sample_rate / spec.fft_size)
    if spec.mel_scale == "redimnet2":
        bins *= bins[-1] / bins[-2]
    if spec.n_mels == 0:
        return np.eye(len(bins))
    edges = _to_mel(np.array([spec.f_min, spec.high_frequency]), spec.mel_scale)
    points: Table = edges[0] + (edges[1] - edges[0]) / (spec.n_mels + 1) * np.arange(spec.n_mels + 2)
    hertz = _to_hertz(points, spec.mel_scale)
    over_mel = spec.mel_scale in ("kaldi", "redimnet2")  # triangles over mel; over hertz in the other scales
    if over_mel:
        left, centre, right = points[:-2, None], points[1:-1, None], points[2:, None]
        at = _to_mel(bins, spec.mel_scale)
    else:
        left, centre, right = hertz[:-2, None], hertz[1:-1, None], hertz[2:, None]
        at = bins
    if spec.mel_scale == "speechbrain":  # both sides as wide as the left one
        right = 2 * centre - left
    mel = np.maximum(np.minimum((at - left) / (centre - left), (right - at) / (right - centre)), 0)
    mel[mel < 1e-12] = 0  # what rounding leaves at the feet of the triangles
    if over_mel and spec.fft_size % 2 == 0:
        mel[:, -1] = 0  # they leave the Nyquist bin out
    if spec.mel_norm == "slaney":
        mel *= 2 / (hertz[2:] - hertz[:-2])[:, None]
    return mel


def _cosines(spec: FrontendSpec) -> Table:
    """Orthonormal DCT-II rows with Kaldi's lifter, in the order in which they are put out."""
    k, m = np.arange(spec.num_ceps)[:, None], np.arange(spec.n_mels)[None, :]
    rows = math.sqrt(2 / spec.n_mels) * np.cos(math.pi / spec.n_mels * (m + 0.5) * k)
    rows[0] /= math.sqrt(2)
    if spec.cepstral_lifter:
        rows *= 1 + 0.5 * spec.cepstral_lifter * np.sin(math.pi * k / spec.cepstral_lifter)
    if spec.use_energy:
        return rows[1:]  # the energy takes the place of the first
    if spec.htk_compat:
        return np.concatenate([rows[1:], rows[:1] * math.sqrt(2)])
    return rows
