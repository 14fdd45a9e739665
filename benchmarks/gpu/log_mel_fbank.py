"""What gpu_check measures of ``log_mel_fbank``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import spkfast
from benchmarks.gpu.case import Case
from spkfast import functional, reference
from spkfast.reference.log_mel_fbank import count_frames, fbank_tables

_GPU_WORKLOADS = ((256, 2.0), (64, 10.0), (4, 120.0))  # (utterances, seconds)
_CPU_WORKLOADS = ((1, 0.05),)


def cases(device: torch.device) -> list[Case]:
    """The workloads for this kind of device, on it."""
    workloads = _GPU_WORKLOADS if device.type == "cuda" else _CPU_WORKLOADS
    return [_case(batch, seconds, device) for batch, seconds in workloads]


def _case(batch: int, seconds: float, device: torch.device) -> Case:
    spec = spkfast.frontend("wespeaker")
    generator = torch.Generator().manual_seed(0)
    samples = int(seconds * spec.sample_rate)
    waveforms = (0.1 * torch.randn(batch, samples, generator=generator)).to(device)
    lengths = torch.randint(samples // 2, samples + 1, (batch,), generator=generator)
    lengths[0] = samples
    lengths = lengths.to(device)
    settings = (spec.frame_shift, spec.fft_size, spec.sample_scale, spec.preemphasis, spec.remove_dc, spec.log_floor)

    def definition(dtype: torch.dtype) -> Tensor:
        window, mel = (table.to(device, dtype) for table in fbank_tables(spec))
        rows = zip(waveforms.to(dtype).split(1), lengths.split(1), strict=True)  # row by row, to save memory
        return torch.cat([reference.log_mel_fbank(*row, window, mel, *settings, spec.mean_norm)[0] for row in rows])

    frames = int(count_frames(lengths, spec.frame_length, spec.frame_shift).sum())
    nonzero = int((fbank_tables(spec)[1] != 0).sum())
    # A real FFT of half size, offset and pre-emphasis and window per sample, power per bin, the filters.
    work = 2.5 * spec.fft_size * math.log2(spec.fft_size) + 6 * spec.frame_length + 1.5 * spec.fft_size + 2 * nonzero
    padded_frames = (samples - spec.frame_length) // spec.frame_shift + 1
    return Case(
        name=f"{batch} x {seconds:g} s",
        run=lambda backend: functional.log_mel_fbank(waveforms, lengths, spec=spec, backend=backend, validate=False)[0],
        definition=definition,
        bytes_moved=4 * int(lengths.sum()) + 4 * batch * padded_frames * spec.n_mels,
        flops=frames * work,
    )
