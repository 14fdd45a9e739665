"""Other toolkits' implementations, called as their users call them, and the best that plain torch can do."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spkfast import frontend_tables
from spkfast.frontends import FrontendSpec

Features = NDArray[np.float32]

# Frames transformed at once: the buffers of more fall out of the caches, fewer drown in the overhead of the calls.
_BLOCK = 1000
# Filters per product where the mel matrix is taken in bands: what its zeros cost against the size that MKL likes.
_BAND = 16


def kaldi_native_fbank(
    spec: FrontendSpec, waveforms: Tensor, samples: Literal["list", "numpy"]
) -> Callable[[], list[Features]] | None:
    """Kaldi's features of each row by kaldi-native-fbank, one row after the other; None where it is not installed.

    Samples are scaled, and made what ``samples`` says, before the clock runs. Its Python binding declares a list and
    converts a numpy array value by value. Frames are read out one by one, which is the only way that it offers.
    """
    options = _kaldi_options(spec)
    if options is None:
        return None
    import kaldi_native_fbank as knf

    scaled = waveforms * spec.sample_scale
    rows: list[Any] = scaled.tolist() if samples == "list" else list(scaled.numpy())

    def run() -> list[Features]:
        features = []
        for row in rows:
            fbank = knf.OnlineFbank(options)
            fbank.accept_waveform(spec.sample_rate, row)
            fbank.input_finished()
            frames = _read(fbank, 0)
            features.append(frames - frames.mean(axis=0) if spec.mean_norm else frames)
        return features

    return run


def kaldi_native_fbank_stream(spec: FrontendSpec, pieces: list[list[float]]) -> Callable[[], list[Features]] | None:
    """A call pushes ``pieces`` of scaled samples into one kaldi-native-fbank stream and reads new frames after each.

    The stream is kept from call to call, as its users keep it, and frames that were read are dropped from it, which
    makes it faster. None where the package is not installed.
    """
    options = _kaldi_options(spec)
    if options is None:
        return None
    import kaldi_native_fbank as knf

    fbank, done = knf.OnlineFbank(options), 0

    def run() -> list[Features]:
        nonlocal done
        features = []
        for piece in pieces:
            fbank.accept_waveform(spec.sample_rate, piece)
            frames = _read(fbank, done)
            fbank.pop(len(frames))
            done += len(frames)
            features.append(frames)
        return features

    return run


def _kaldi_options(spec: FrontendSpec) -> Any:
    try:
        import kaldi_native_fbank as knf
    except ImportError:
        return None
    options = knf.FbankOptions()
    frame, mel = options.frame_opts, options.mel_opts
    frame.dither, frame.samp_freq, frame.window_type = 0.0, spec.sample_rate, spec.window
    frame.frame_length_ms, frame.frame_shift_ms = spec.frame_length_ms, spec.frame_shift_ms
    frame.preemph_coeff, frame.remove_dc_offset = spec.preemphasis, spec.remove_dc
    mel.num_bins, mel.low_freq, mel.high_freq = spec.n_mels, spec.f_min, spec.f_max
    options.use_energy = False
    return options


def _read(fbank: Any, first: int) -> Features:
    count = fbank.num_frames_ready
    frames = np.empty((count - first, fbank.dim), np.float32)
    for k in range(first, count):
        frames[k - first] = fbank.get_frame(k)
    return frames


class BatchedTorchFbank:
    """The features of whole rows by plain float32 torch operations on the CPU, as fast as they go.

    Each of these was kept because it measured faster: one row at a time, in blocks of frames, so that data stays in the
    caches, with all scratch memory allocated beforehand; pre-emphasis and padding of the signal rather than of its
    overlapping frames, whose means are taken off the result; frames as a strided view, multiplied by the window
    straight into zero-padded rows; MKL's real FFT of these; squares in place, and the sum of those of real and
    imaginary part left to the product with the mel filters; that product in bands of filters, which skip most of the
    zeros of the matrix; everything after it in place. Slower were torch.stft, ``n=`` of rfft, abs() of the spectrum,
    the DFT as a product of matrices, a sparse mel matrix, and numpy, whose rfft alone takes as long as all this.

    Args:
        spec: The front-end; any preset. Dither is left out.
        waveforms: Rows without padding, float32 (B, S).
        banded: False for the plain product with the whole mel matrix.

    Raises:
        ValueError: If the spec has an energy column, or frames past the edges without ``center``.
    """

    def __init__(self, spec: FrontendSpec, waveforms: Tensor, *, banded: bool = True) -> None:
        if spec.use_energy or not (spec.snip_edges or spec.center):
            raise ValueError("no energy column, and no frames past the edges: no preset has them")
        self.spec, self.waveforms = spec, waveforms
        self.s = s = frontend_tables.settings(spec)
        tables = frontend_tables.tables(spec)
        samples, bins = waveforms.shape[1], spec.fft_size // 2 + 1
        self.frames = (samples - s.first_frame) // s.frame_shift + 1
        blocks = math.ceil(self.frames / _BLOCK)
        self.block = math.ceil(self.frames / blocks)
        self.before = max(0, -s.offset)
        self.after = max(0, (self.frames - 1) * s.frame_shift + spec.frame_length + s.offset - samples)

        self.window = torch.from_numpy(tables.window * s.sample_scale).float()
        self.cosines = None if tables.cosines is None else torch.from_numpy(tables.cosines).float().T.contiguous()
        # Bounds and the square root act on the power of a bin, which then must exist by itself.
        self.power_in_mel = banded and spec.n_mels > 0 and spec.spectrum_clip is None and not s.magnitude
        self.bands = []
        if spec.n_mels:
            mel = torch.from_numpy(tables.mel).float()
            self.bands = _mel_bands(mel, _BAND if banded else spec.n_mels, 1 + self.power_in_mel)

        self.emphasised = torch.zeros(self.before + samples + self.after)
        self.padded = torch.zeros(self.block, s.fft_size)
        self.power = torch.empty(self.block, bins)
        self.log_mel = torch.empty(self.block, spec.n_mels)

    @torch.inference_mode()
    def __call__(self) -> Tensor:
        """Features (B, T, D)."""
        padded_frames = math.ceil(self.frames / self.s.frame_multiple) * self.s.frame_multiple
        features = torch.empty(len(self.waveforms), padded_frames, self.spec.output_size)
        features[:, self.frames :] = 0
        for row, out in zip(self.waveforms, features, strict=True):
            signal = self._signal(row)
            if self._emphasises_frames:
                torch.sub(signal[1:], signal[:-1], alpha=self.s.preemphasis, out=self.emphasised[1 : len(signal)])
            for first in range(0, self.frames, self.block):
                last = min(first + self.block, self.frames)
                windowed = self._windowed(signal, first, last - first)
                if self.cosines is None:
                    self._log_mel(windowed, out[first:last])
                else:
                    log_mel = self.log_mel[: last - first]
                    self._log_mel(windowed, log_mel)
                    torch.mm(log_mel, self.cosines, out=out[first:last])
            self._normalise(out[: self.frames])
        return features

    @property
    def _emphasises_frames(self) -> bool:
        return self.s.preemphasis != 0 and self.s.preemphasis_mode == 0

    def _signal(self, row: Tensor) -> Tensor:
        s = self.s
        if s.waveform_norm:
            row = row - row.mean()
            variance = row.dot(row) / len(row)
            row.div_(variance.sqrt() + 1e-8 if s.waveform_norm == 1 else (variance + 1e-4).sqrt())
        if s.preemphasis and s.preemphasis_mode:
            emphasised = self.emphasised[: len(row)]
            torch.sub(row[1:], row[:-1], alpha=s.preemphasis, out=emphasised[1:])
            emphasised[0] = row[0] - s.preemphasis * row[1] if s.preemphasis_mode == 1 else row[0]
            row = emphasised
        if self.before or self.after:
            mode = "reflect" if s.padding else "constant"
            row = torch.nn.functional.pad(row[None], (self.before, self.after), mode=mode)[0]
        return row[max(0, s.offset) :]

    def _windowed(self, signal: Tensor, first: int, count: int) -> Tensor:
        s, window, start = self.s, self.window, first * self.s.frame_shift
        shape, strides = (count, len(window)), (s.frame_shift, 1)
        frames = signal[start:].as_strided(shape, strides)
        out = self.padded[:count, : len(window)]
        if s.remove_dc:
            means = frames.mean(dim=1, keepdim=True)
        if self._emphasises_frames:
            rest = 1 - s.preemphasis  # what is left of a constant, so of the mean, and of the first sample
            differences = self.emphasised[start:].as_strided(shape, strides)
            if s.remove_dc:
                torch.sub(differences, means.mul_(rest), out=out).mul_(window)
                torch.mul(frames[:, 0] * rest - means[:, 0], window[0], out=out[:, 0])
            else:
                torch.mul(differences, window, out=out)
                torch.mul(frames[:, 0], rest * window[0], out=out[:, 0])
        elif s.remove_dc:
            torch.sub(frames, means, out=out).mul_(window)
        else:
            torch.mul(frames, window, out=out)
        return self.padded[:count]

    def _log_mel(self, frames: Tensor, out: Tensor) -> None:
        s, clip = self.s, self.spec.spectrum_clip
        parts = torch.view_as_real(torch.fft.rfft(frames))
        parts.mul_(parts)
        if self.power_in_mel:
            spectrum = parts.view(len(frames), -1)
        else:
            power = self.power[: len(frames)] if self.bands else out
            spectrum = torch.add(parts[..., 0], parts[..., 1], out=power)
            if s.magnitude:
                spectrum.sqrt_()
            if clip:
                spectrum.clamp_(*clip)
        for band in self.bands:
            torch.mm(spectrum[:, band.bins], band.weights, out=out[:, band.filters])
        if self.bands and clip:
            out.clamp_(*clip)
        if s.log_scale:
            if s.log_floor:
                out.clamp_min_(s.log_floor)
            if s.log_offset:
                out.add_(s.log_offset)
            out.log_()
            if s.log_scale != 1:
                out.mul_(s.log_scale)

    def _normalise(self, features: Tensor) -> None:
        s = self.s
        if s.top_db < math.inf:
            features.clamp_min_(float(features.max()) - s.top_db)
        if s.mean_norm or s.std_norm:
            mean = features.mean(dim=0)
            centred = features.sub_(mean) if s.mean_norm else features - mean
        if s.std_norm:
            variance = centred.square().sum(dim=0).div_(max(1, len(features) - s.std_unbiased))
            features.div_((variance + s.var_eps).sqrt_() + s.std_eps)


def attentive_stats(
    x: Tensor, logits: Tensor, lengths: Tensor | None = None, *, one_pass: bool = False
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation under softmax weights, in the operators that toolkits write them in.

    Args:
        x: Shape (B, C, T).
        logits: Shape (B, C, T).
        lengths: Real frames, int64 (B,): the others get the logit minus infinity, as SpeechBrain has it.
        one_pass: Variance as ``E[x^2] - E[x]^2``, as wespeaker and ESPnet have it; else about the mean, as SpeechBrain.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    x, logits = x.to(wide), logits.to(wide)
    if lengths is not None:
        padding = torch.arange(x.shape[2]) >= lengths[:, None, None]
        logits = logits.masked_fill(padding, -torch.inf)
    weights = logits.softmax(dim=2)
    mean = (weights * x).sum(dim=2)
    deviation = x if one_pass else x - mean[:, :, None]
    var = (weights * deviation**2).sum(dim=2)
    if one_pass:
        var = var - mean**2
    return mean, var.clamp_min(1e-7).sqrt()


def attentive_pooling(x: Tensor, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """The whole of wespeaker's attentive pooling with global context: (B, C, T) to (B, 2C).

    The mean and standard deviation that the attention sees beside each frame are repeated for all of them.

    Args:
        x: Shape (B, C, T).
        first: Weight (H, 3C, 1) and bias (H,) of the first convolution.
        second: Weight (C, H, 1) and bias (C,) of the second one.
    """
    mean = x.mean(dim=2, keepdim=True)
    std = (x.var(dim=2, keepdim=True) + 1e-7).sqrt()
    context = torch.cat([x, mean.expand_as(x), std.expand_as(x)], dim=1)
    hidden = torch.nn.functional.conv1d(context, *first).tanh()
    logits = torch.nn.functional.conv1d(hidden, *second)
    return torch.cat(attentive_stats(x, logits, one_pass=True), dim=1)


class _Band(NamedTuple):
    filters: slice
    bins: slice
    weights: Tensor  # (bins, filters)


def _mel_bands(mel: Tensor, size: int, repeats: int) -> list[_Band]:
    """The matrix (M, K) in bands of ``size`` filters, each column ``repeats`` times in a row."""
    bands = []
    for first in range(0, len(mel), size):
        rows = mel[first : first + size]
        used = rows.any(dim=0).nonzero()[:, 0]
        bins = slice(int(used[0]), int(used[-1]) + 1)
        weights = rows[:, bins].T.repeat_interleave(repeats, dim=0).contiguous()
        bands.append(_Band(slice(first, first + len(rows)), slice(repeats * bins.start, repeats * bins.stop), weights))
    return bands
