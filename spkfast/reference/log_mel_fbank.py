"""The definition of ``log_mel_fbank``: acoustic features of every front-end that a FrontendSpec describes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spkfast.frontend_tables import Settings
from spkfast.reference.random import philox


def log_mel_fbank(
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
    """Features (B, T, D) of type ``dtype`` and frame counts (B,); frames past an utterance's end are zero.

    Computed in the type of ``window``. ``integers`` and ``floats`` are those of
    :class:`spkfast.frontend_tables.Settings`; ``validate`` is for kernels that meet bad samples on their way.
    """
    s = Settings(*integers, *floats)
    frame_lengths = count_frames(lengths, s)
    num_frames = padded_frames(waveforms.shape[1], s)
    if waveforms.dtype == torch.int16:
        waveforms = waveforms.to(window.dtype) / 32768
    frames = _frames(_signal(waveforms, lengths, seeds, s), lengths, window.shape[0], num_frames, s)
    if s.remove_dc:
        frames = frames - frames.mean(dim=-1, keepdim=True)
    raw = frames
    if s.preemphasis_mode == 0:
        frames = frames - s.preemphasis * torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
    frames = frames * window
    features = _compress(_spectrum(frames, s).clamp(s.spectrum_low, s.spectrum_high) @ mel.T, s)
    if cosines is not None:
        features = features @ cosines.T
    if s.energy:
        energy = (raw if s.energy == 1 else frames).square().sum(dim=-1, keepdim=True).clamp_min(s.energy_floor).log()
        features = torch.cat([features, energy] if s.energy_last else [energy, features], dim=-1)
    return _mask(_normalize(features, frame_lengths, s), masks).to(dtype), frame_lengths


def count_frames(samples: Tensor, s: Settings) -> Tensor:
    """Frames of each utterance, int64."""
    return torch.where(samples < max(1, s.first_frame), 0, (samples - s.first_frame) // s.frame_shift + 1)


def padded_frames(samples: int, s: Settings) -> int:
    """Frames of the output, which holds those of ``samples`` samples; also of a symbolic number."""
    # A padded row of no samples is left one frame where its utterances would have one: symbolic sizes know no branches.
    frames = torch.sym_max(0, (samples - s.first_frame) // s.frame_shift + 1)
    return (frames + s.frame_multiple - 1) // s.frame_multiple * s.frame_multiple


def gaussian_noise(seeds: Tensor, samples: int, dtype: torch.dtype) -> Tensor:
    """Standard normal noise (B, S): value n of a row depends on its seed and n alone, on every device.

    Words of :func:`spkfast.reference.random.philox`, then Box and Muller's cosine.

    Reference: Box and Muller, "A note on the generation of random normal deviates", Annals of Mathematical Statistics
    1958.
    """
    low, high = philox(torch.arange(samples, device=seeds.device), seeds[:, None])
    # 23 bits and a half, which keeps the logarithm finite, are exact in float32.
    radius = (((low >> 9).to(dtype) + 0.5) * 2.0**-23).log().mul(-2).sqrt()
    return radius * ((high >> 8).to(dtype) * (2 * math.pi * 2.0**-24)).cos()


def _signal(waveforms: Tensor, lengths: Tensor, seeds: Tensor | None, s: Settings) -> Tensor:
    """Samples (B, S) normalised, scaled, with noise, and pre-emphasised where that is done to the whole signal."""
    samples = waveforms.shape[1]
    # Whatever lies past the end, NaN too, must reach neither the features nor the gradient.
    past = torch.arange(samples, device=waveforms.device) >= lengths[:, None]
    x = waveforms.masked_fill(past, 0)
    if s.waveform_norm:
        count = lengths.clamp_min(1)[:, None]
        x = (x - x.sum(dim=1, keepdim=True) / count).masked_fill(past, 0)
        squares = x.square().sum(dim=1, keepdim=True)
        if s.waveform_norm == 1:
            x = x / ((squares / count).clamp_min(1e-20).sqrt() + 1e-8)
        else:
            x = x / (squares / count + 1e-4).sqrt()
    x = x * s.sample_scale
    if seeds is not None:
        x = x + s.dither * gaussian_noise(seeds, samples, x.dtype)
    if s.preemphasis_mode:
        before = x.new_zeros(x.shape[0], min(samples, 1))
        if s.preemphasis_mode == 1:
            # The reflection of an utterance of one sample is that sample.
            second = (lengths > 1).long()[:, None].expand_as(before)
            before = x.gather(1, second.clamp_max(max(samples - 1, 0)))
        x = x - s.preemphasis * torch.cat([before, x[:, :-1]], dim=1)
    return x.masked_fill(past, 0)


def _frames(signal: Tensor, lengths: Tensor, frame_length: int, num_frames: int, s: Settings) -> Tensor:
    """Frames (B, T, L) of the signal, padded at both ends of each utterance."""
    width = torch.sym_max(0, (num_frames - 1) * s.frame_shift + frame_length)
    position = s.offset + torch.arange(width, device=signal.device)
    end = lengths[:, None]
    if s.padding == 1:
        position = position.remainder((2 * end - 2).clamp_min(1))
        position = torch.minimum(position, (2 * end - 2 - position).abs())
    elif s.padding == 2:
        position = position.remainder((2 * end).clamp_min(1))
        position = torch.minimum(position, (2 * end - 1 - position).abs())
    else:
        position = position.expand(signal.shape[0], -1)
    outside = (position < 0) | (position >= end)
    # One more column, for utterances without samples.
    signal = torch.nn.functional.pad(signal, (0, 1))
    padded = signal.gather(1, position.masked_fill(outside, 0)).masked_fill(outside, 0)
    if num_frames == 0:
        return padded.new_zeros(signal.shape[0], 0, frame_length) + signal[:, :1, None] * 0
    return padded.unfold(-1, frame_length, s.frame_shift)[:, :num_frames]


def _spectrum(frames: Tensor, s: Settings) -> Tensor:
    if frames.shape[0] == 0 or frames.shape[1] == 0:  # which FFT libraries refuse
        return frames[..., :1].expand(-1, -1, s.fft_size // 2 + 1)
    spectrum = torch.fft.rfft(frames, n=s.fft_size)
    power = spectrum.real.square() + spectrum.imag.square()
    # The square root has no derivative at zero, where that of the magnitude is taken as zero.
    return torch.where(power == 0, 1, power).sqrt() * (power != 0) if s.magnitude else power


def _compress(energies: Tensor, s: Settings) -> Tensor:
    energies = energies.clamp(s.spectrum_low, s.spectrum_high)
    if not s.log_scale:
        return energies
    return (energies.clamp_min(s.log_floor) + s.log_offset).log() * s.log_scale


def _normalize(features: Tensor, frame_lengths: Tensor, s: Settings) -> Tensor:
    """Zeros past the end; floor, mean and variance over the frames of each utterance alone."""
    padding = (torch.arange(features.shape[1], device=features.device) >= frame_lengths[:, None])[..., None]
    count = frame_lengths.clamp_min(1)[:, None, None]
    if s.top_db != math.inf and features.shape[1]:
        highest = features.masked_fill(padding, -math.inf).amax(dim=(1, 2), keepdim=True)
        features = torch.maximum(features, highest - s.top_db)
    features = features.masked_fill(padding, 0)
    if s.mean_norm or s.std_norm:
        mean = features.sum(dim=1, keepdim=True) / count
        centred = (features - mean).masked_fill(padding, 0)
        if s.mean_norm:
            features = centred
        if s.std_norm:
            squares = centred.square().sum(dim=1, keepdim=True)
            variance = squares / (count - s.std_unbiased).clamp_min(1) + s.var_eps
            deviation = variance.clamp_min(1e-20).sqrt() + s.std_eps
            features = (features / deviation).masked_fill(padding, 0)  # a row of NaN too ends in zeros
    return features


def _mask(features: Tensor, masks: Tensor | None) -> Tensor:
    """Zeros in each rectangle (first frame, last frame, first bin, last bin), half open, of ``masks`` (B, N, 4)."""
    if masks is None:
        return features
    t = torch.arange(features.shape[1], device=features.device)[:, None]
    k = torch.arange(features.shape[2], device=features.device)
    first_t, last_t, first_k, last_k = masks[..., None, None].unbind(2)
    inside = (t >= first_t) & (t < last_t) & (k >= first_k) & (k < last_k)
    return features.masked_fill(inside.any(dim=1), 0)
