"""What gpu_check measures of ``log_mel_fbank``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import spkfast
from benchmarks.gpu.case import Case
from spkfast import frontend_tables, functional, reference
from spkfast.reference.log_mel_fbank import count_frames, padded_frames

# (utterances, seconds, whether they are of different lengths)
_GPU_WORKLOADS = ((256, 3.0, False), (1, 3.0, False), (64, 10.0, True), (4, 120.0, True))
_CPU_WORKLOADS = ((1, 0.05, False),)


def cases(device: torch.device) -> list[Case]:
    """The workloads for this kind of device, on it."""
    workloads = _GPU_WORKLOADS if device.type == "cuda" else _CPU_WORKLOADS
    return [_case(*workload, device) for workload in workloads]


def _case(batch: int, seconds: float, ragged: bool, device: torch.device) -> Case:
    spec = spkfast.frontend("wespeaker")
    generator = torch.Generator().manual_seed(0)
    samples = int(seconds * spec.sample_rate)
    waveforms = (0.1 * torch.randn(batch, samples, generator=generator)).to(device)
    lengths = torch.randint(samples // 2 if ragged else samples, samples + 1, (batch,), generator=generator)
    lengths[0] = samples
    lengths = lengths.to(device)
    settings, tables = frontend_tables.settings(spec), frontend_tables.tables(spec)

    def definition(dtype: torch.dtype) -> Tensor:
        window, mel = (torch.from_numpy(table).to(device, dtype) for table in (tables.window, tables.mel))
        rest: Any = (window, mel, None, None, None, settings.integers, settings.floats, dtype, False)
        rows = zip(waveforms.to(dtype).split(1), lengths.split(1), strict=True)  # row by row, to save memory
        return torch.cat([reference.log_mel_fbank(*row, *rest)[0] for row in rows])

    frames = int(count_frames(lengths, settings).sum())
    nonzero = int((tables.mel != 0).sum())
    # A real FFT of half size, offset and pre-emphasis and window per sample, power per bin, the filters.
    work = 2.5 * spec.fft_size * math.log2(spec.fft_size) + 6 * spec.frame_length + 1.5 * spec.fft_size + 2 * nonzero
    return Case(
        name=f"{batch} x {'up to ' if ragged else ''}{seconds:g} s",
        run=lambda backend: functional.log_mel_fbank(waveforms, lengths, spec=spec, backend=backend, validate=False)[0],
        definition=definition,
        bytes_moved=4 * int(lengths.sum()) + 4 * batch * padded_frames(samples, settings) * spec.output_size,
        flops=frames * work,
    )
