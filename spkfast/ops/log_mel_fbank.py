"""Public function ``log_mel_fbank``: checks, tables, and the choice of the implementation."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from spkfast import backends, reference
from spkfast.backends import Backend
from spkfast.errors import InputError
from spkfast.frontends import FrontendSpec
from spkfast.ops._registration import register_op
from spkfast.reference.log_mel_fbank import fbank_tables

_LARGEST_CUDA_FFT = 2048
_FIELDS = tuple(field.name for field in dataclasses.fields(FrontendSpec))


def log_mel_fbank(
    waveforms: Tensor,
    lengths: Tensor | None = None,
    *,
    spec: FrontendSpec,
    backend: Backend = "auto",
    validate: bool = True,
) -> tuple[Tensor, Tensor]:
    """Log-mel filterbank features, as Kaldi computes them.

    Each row of a padded batch equals the same utterance alone. Samples past an utterance's end do not count, and frames
    past its end are zero. Differentiable in ``waveforms``.

    Args:
        waveforms: Samples in [-1, 1], float32 or float64, or int16 (divided by 32768), shape (B, S).
        lengths: Samples per utterance, int64, 0 to S, shape (B,); None means that all have S.
        spec: The front-end.
        backend: ``reference`` (plain torch), ``native`` (C++, or CUDA C++ on a GPU), ``triton``, or ``auto``, which
            takes the fastest one that exists here for this device and these settings.
        validate: Check the values of ``lengths`` and ``waveforms``. On a GPU this waits for the device. Never done
            inside ``torch.compile`` and ``torch.export``.

    Returns:
        Features (B, T, M), where T is the number of frames of S samples, and frames per utterance (B,), int64.

    Raises:
        InputError: If shapes or dtypes are wrong, a length lies outside 0..S, a sample is NaN or infinite, the spec
            asks for what this op does not compute, or the backend cannot run here.
    """
    _check(waveforms, lengths)
    if lengths is None:
        lengths = waveforms.new_full(waveforms.shape[:1], waveforms.shape[1], dtype=torch.int64)
    if validate and not torch.compiler.is_compiling():
        _check_values(waveforms, lengths)
    if waveforms.dtype == torch.int16:
        waveforms = waveforms.float() / 32768
    limits = _limits(waveforms.dtype, waveforms.device.type, spec.fft_size)
    implementation = _IMPLEMENTATIONS[backends.resolve(waveforms.device, backend, "log_mel_fbank", limits)]
    # As plain values: under torch 2.11 a compiled graph cannot hold the spec itself.
    fields = tuple([getattr(spec, name) for name in _FIELDS])
    window, mel = _tables(fields, waveforms.dtype, waveforms.device)
    features, frame_lengths = implementation(
        waveforms,
        lengths,
        window,
        mel,
        spec.frame_shift,
        spec.fft_size,
        spec.sample_scale,
        spec.preemphasis,
        spec.remove_dc,
        spec.log_floor,
        spec.mean_norm,
    )
    return features, frame_lengths


def _check(waveforms: Tensor, lengths: Tensor | None) -> None:
    for name, value in (("waveforms", waveforms), ("lengths", lengths)):
        if value is not None and not isinstance(value, Tensor):
            raise InputError(f"{name} must be a torch tensor, got {type(value).__name__}")
    if waveforms.ndim != 2:
        raise InputError(f"waveforms must have shape (B, S), got {tuple(waveforms.shape)}")
    if waveforms.dtype not in (torch.float32, torch.float64, torch.int16):
        raise InputError(f"waveforms must be float32, float64 or int16, got {waveforms.dtype}")
    if lengths is None:
        return
    if lengths.dtype != torch.int64:
        raise InputError(f"lengths must be int64 counts of samples, got {lengths.dtype}")
    if lengths.ndim != 1 or lengths.shape[0] != waveforms.shape[0]:
        raise InputError(f"lengths must have shape (B,) = ({waveforms.shape[0]},), got {tuple(lengths.shape)}")
    if lengths.device != waveforms.device:
        raise InputError(f"lengths must be on {waveforms.device}, where waveforms are, got {lengths.device}")


def _check_values(waveforms: Tensor, lengths: Tensor) -> None:
    samples = waveforms.shape[1]
    outside = (lengths < 0) | (lengths > samples)
    if outside.any():
        row = int(outside.nonzero()[0])
        raise InputError(f"lengths must lie in 0..{samples}, row {row} has {int(lengths[row])}")
    # One pass over the samples decides nearly always: a sum is finite only where every term is.
    if not waveforms.is_floating_point() or waveforms.sum(dim=1).isfinite().all():
        return
    inside = torch.arange(samples, device=waveforms.device) < lengths[:, None]
    bad = ~waveforms.isfinite() & inside
    if bad.any():
        row, sample = bad.nonzero()[0].tolist()
        raise InputError(
            f"waveforms row {row} holds a NaN or infinite value at sample {sample}: mend or drop that audio"
        )


def _limits(dtype: torch.dtype, device: str, fft_size: int) -> dict[str, str]:
    """Why a backend cannot take this call, by backend."""
    limits = {}
    if fft_size & (fft_size - 1):
        limits["native"] = f"it takes FFT sizes that are powers of two, the front-end has {fft_size}"
    elif device == "cuda" and fft_size > _LARGEST_CUDA_FFT:
        limits["native"] = f"it takes FFT sizes up to {_LARGEST_CUDA_FFT}, the front-end has {fft_size}"
    if dtype != torch.float32:
        limits |= dict.fromkeys(("native", "triton"), f"it computes in float32, waveforms are {dtype}")
    return limits


@torch.compiler.assume_constant_result  # not to be traced, nor computed at every call of a compiled graph
def _tables(fields: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    return _cached_tables(fields, dtype, device)


@functools.lru_cache(maxsize=64)
def _cached_tables(fields: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # tables made under inference mode could not be saved for a gradient later
        window, mel = fbank_tables(FrontendSpec(*fields))
        return window.to(device, dtype), mel.to(device, dtype)


def _fake(
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
    batch, samples = waveforms.shape
    frames = torch.sym_max(0, (samples - window.shape[0]) // frame_shift + 1)
    return waveforms.new_empty(batch, frames, mel.shape[0]), lengths.new_empty(batch)


_IMPLEMENTATIONS = register_op(
    "log_mel_fbank", reference.log_mel_fbank, fake=_fake, formula=reference.log_mel_fbank_backward
)
