"""What gpu_check measures of ``attentive_stats_pool_from_hidden``."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu.case import Case
from benchmarks.shapes import Frames
from spkfast import functional, reference
from spkfast.backends import Backend

_CHUNK = 16  # rows that the definition takes at once, to save memory
_UNITS = 128

# Frames, type, whether lengths go from half to full, whether channels lie side by side, and whether peers are timed.
_GPU_WORKLOADS = (
    (Frames(256, 1536, 200), torch.float32, False, False, True),
    (Frames(256, 1536, 200), torch.bfloat16, False, False, False),
    (Frames(256, 1536, 200), torch.bfloat16, False, True, False),
    (Frames(256, 1536, 298), torch.float32, True, False, False),
    (Frames(1, 1536, 200), torch.float32, False, False, False),
)
_CPU_WORKLOADS = ((Frames(2, 3, 40), torch.float32, True, False, False),)


def cases(device: torch.device) -> list[Case]:
    """The workloads for this kind of device, on it."""
    workloads = _GPU_WORKLOADS if device.type == "cuda" else _CPU_WORKLOADS
    return [_case(*workload, device) for workload in workloads]


def _case(
    frames: Frames, dtype: torch.dtype, ragged: bool, channels_last: bool, with_peers: bool, device: torch.device
) -> Case:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(frames.batch, _UNITS, frames.frames, generator=generator).tanh()
    weight = 2 * _UNITS**-0.5 * torch.randn(frames.channels, _UNITS, generator=generator)
    given = (frames.inputs()[0], hidden, weight, torch.randn(frames.channels, generator=generator))
    x, hidden, weight, bias = (value.to(device, dtype) for value in given)
    if channels_last:
        x, hidden = (value.transpose(1, 2).contiguous().transpose(1, 2) for value in (x, hidden))
    lengths = frames.ragged().to(device) if ragged else None

    def run(backend: Backend) -> Tensor:
        return functional.weighted_moments_from_hidden(x, hidden, weight, bias, lengths, backend=backend).var

    def definition(wide: torch.dtype) -> Tensor:
        found = []
        for start in range(0, frames.batch, _CHUNK):
            rows = slice(start, start + _CHUNK)
            own_lengths = None if lengths is None else lengths[rows]
            args = (x[rows].to(wide), hidden[rows].to(wide), weight.to(wide), bias.to(wide), own_lengths)
            found.append(reference.attentive_stats_pool_from_hidden(*args)[1])
        return torch.cat(found)

    peers: dict[str, Callable[[], Tensor]] = {}
    if with_peers:
        pool = reference.attentive_stats_pool_from_hidden
        for name, function in (("eager", pool), ("torch.compile", torch.compile(pool))):
            peers[name] = functools.partial(lambda called: called(x, hidden, weight, bias, lengths)[1], function)
    real = 1.0 if lengths is None else float(lengths.double().mean()) / frames.frames
    return Case(
        name=f"{frames}, {_UNITS} units, {str(dtype).removeprefix('torch.')}"
        + (", lengths from half to full" if ragged else "")
        + (", channels last" if channels_last else ""),
        run=run,
        definition=definition,
        bytes_moved=int(real * (x.nbytes + hidden.nbytes)) + weight.nbytes + 2 * 4 * frames.batch * frames.channels,
        flops=(2 * _UNITS + 12) * real * x.numel(),
        peers=peers,
    )
