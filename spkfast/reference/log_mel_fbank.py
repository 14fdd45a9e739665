"""The definition of ``log_mel_fbank``: Kaldi-style log-mel filterbank features and their gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spkfast.errors import InputError
from spkfast.frontends import FrontendSpec


def log_mel_fbank(
    waveforms: Tensor,
    lengths: Tensor,
    window: Tensor,
    mel: Tensor,
    frame_shift: int,
    fft_size: int,
    sample_scale: float,
    preemphasis: float,
    remove_dc: bool,
    log_floor: float,
    mean_norm: bool,
) -> tuple[Tensor, Tensor]:
    """Log-mel energies (B, T, M) and frame counts (B,); frames past an utterance's end are zero."""
    frame_lengths = count_frames(lengths, window.shape[0], frame_shift)
    spectrum = _spectrum(waveforms, lengths, window, frame_shift, fft_size, sample_scale, preemphasis, remove_dc)
    energies = (spectrum.real.square() + spectrum.imag.square()) @ mel.T
    return _project(energies.clamp_min(log_floor).log(), frame_lengths, mean_norm), frame_lengths


def log_mel_fbank_backward(
    grad: Tensor,
    waveforms: Tensor,
    lengths: Tensor,
    window: Tensor,
    mel: Tensor,
    frame_shift: int,
    fft_size: int,
    sample_scale: float,
    preemphasis: float,
    remove_dc: bool,
    log_floor: float,
    mean_norm: bool,
) -> Tensor:
    """Gradient with respect to the waveforms (B, S): each step of the definition transposed, last step first."""
    out = torch.zeros_like(waveforms, memory_format=torch.contiguous_format)
    if grad.shape[0] == 0 or grad.shape[1] == 0:
        return out
    frame_lengths = count_frames(lengths, window.shape[0], frame_shift)
    grad = _project(grad, frame_lengths, mean_norm)
    spectrum = _spectrum(waveforms, lengths, window, frame_shift, fft_size, sample_scale, preemphasis, remove_dc)
    energies = (spectrum.real.square() + spectrum.imag.square()) @ mel.T
    grad = torch.where(energies > log_floor, grad / energies.clamp_min(log_floor), 0)
    # irfft counts twice every bin but the first and, for an even size, the last; and it divides by the size.
    counted = torch.full_like(mel[0], 2)
    counted[0] = 1
    if fft_size % 2 == 0:
        counted[-1] = 1
    spectrum_grad = spectrum * (grad @ mel) * (2 * fft_size / counted)
    frames = torch.fft.irfft(spectrum_grad, n=fft_size)[..., : window.shape[0]] * window
    following = torch.cat([frames[..., 1:], torch.zeros_like(frames[..., :1])], dim=-1)
    first = torch.zeros_like(window)
    first[0] = preemphasis
    frames = frames * (1 - first) - preemphasis * following
    if remove_dc:
        frames = frames - frames.mean(dim=-1, keepdim=True)
    index = torch.arange(frames.shape[1], device=grad.device)[:, None] * frame_shift
    index = (index + torch.arange(window.shape[0], device=grad.device)).flatten()
    return out.index_add(1, index, frames.flatten(1)) * sample_scale


def count_frames(samples: Tensor, frame_length: int, frame_shift: int) -> Tensor:
    """Frames that lie wholly inside each utterance, int64."""
    return torch.where(samples < frame_length, 0, (samples - frame_length) // frame_shift + 1)


def fbank_tables(spec: FrontendSpec) -> tuple[Tensor, Tensor]:
    """Window (L,) and mel matrix (M, fft_size // 2 + 1) of a spec, in float64.

    Raises:
        InputError: If the spec asks for something that ``log_mel_fbank`` does not compute.
    """
    _check_supported(spec)
    n = torch.arange(spec.frame_length, dtype=torch.float64)
    phase = 2 * math.pi * n / (spec.frame_length - (0 if spec.window_periodic else 1))
    hann = 0.5 - 0.5 * phase.cos()
    window = {
        "hamming": 0.54 - 0.46 * phase.cos(),
        "hann": hann,
        "povey": hann.pow(0.85),
        "rectangular": torch.ones_like(hann),
    }[spec.window]

    def to_mel(hertz: Tensor) -> Tensor:
        return 1127.0 * torch.log1p(hertz / 700.0)

    edges = to_mel(torch.tensor([spec.f_min, spec.high_frequency], dtype=torch.float64))
    points = edges[0] + (edges[1] - edges[0]) / (spec.n_mels + 1) * torch.arange(spec.n_mels + 2, dtype=torch.float64)
    left, centre, right = (points[k : k + spec.n_mels, None] for k in range(3))
    bins = to_mel(torch.arange(spec.fft_size // 2, dtype=torch.float64) * spec.sample_rate / spec.fft_size)
    rising, falling = (bins - left) / (centre - left), (right - bins) / (right - centre)
    mel = torch.minimum(rising, falling).clamp_min(0)
    return window, torch.nn.functional.pad(mel, (0, 1))  # Kaldi leaves the Nyquist bin out


def _spectrum(
    waveforms: Tensor,
    lengths: Tensor,
    window: Tensor,
    frame_shift: int,
    fft_size: int,
    sample_scale: float,
    preemphasis: float,
    remove_dc: bool,
) -> Tensor:
    # Whatever lies past the end, NaN too, must reach neither the features nor the gradient.
    past = torch.arange(waveforms.shape[1], device=waveforms.device) >= lengths[:, None]
    waveforms = waveforms.masked_fill(past, 0)
    if waveforms.shape[0] == 0 or waveforms.shape[1] < window.shape[0]:
        # No frames at all, which FFT libraries refuse; the expansion keeps the result part of the autograd graph.
        empty = waveforms[:, :0, None].expand(-1, -1, fft_size // 2 + 1)
        return torch.complex(empty, empty)
    frames = waveforms.unfold(-1, window.shape[0], frame_shift) * sample_scale  # (B, T, L)
    if remove_dc:
        frames = frames - frames.mean(dim=-1, keepdim=True)
    previous = torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
    return torch.fft.rfft((frames - preemphasis * previous) * window, n=fft_size)


def _project(features: Tensor, frame_lengths: Tensor, mean_norm: bool) -> Tensor:
    """Zeros past the end, and no mean over the frames where ``mean_norm``: a projection, so its own transpose."""
    padding = (torch.arange(features.shape[1], device=features.device) >= frame_lengths[:, None])[..., None]
    features = features.masked_fill(padding, 0)
    if not mean_norm:
        return features
    mean = features.sum(dim=1, keepdim=True) / frame_lengths.clamp_min(1)[:, None, None]
    return (features - mean).masked_fill(padding, 0)


def _check_supported(spec: FrontendSpec) -> None:
    kaldi = FrontendSpec()
    for name in (
        "waveform_norm", "preemphasis_mode", "snip_edges", "center", "power", "spectrum_clip", "mel_scale", "mel_norm",
        "use_energy", "num_ceps", "log", "log_offset", "top_db", "std_norm", "pad_frames_to", "dither",
    ):  # fmt: skip
        if getattr(spec, name) != getattr(kaldi, name):
            raise InputError(
                f"log_mel_fbank computes {name}={getattr(kaldi, name)!r} only, the front-end asks for "
                f"{getattr(spec, name)!r}"
            )
    if spec.n_mels < 1:
        raise InputError(f"log_mel_fbank needs n_mels of at least 1, got {spec.n_mels}")
