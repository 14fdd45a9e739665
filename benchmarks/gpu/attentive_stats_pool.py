"""What gpu_check measures of ``attentive_stats_pool``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu.case import Case
from benchmarks.shapes import Frames
from spkfast import functional, reference
from spkfast.backends import Backend

Pool = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]

# Rows that the definition takes at once, to save memory.
_CHUNK = 16


@dataclasses.dataclass(frozen=True)
class _Workload:
    frames: Frames
    dtype: torch.dtype = torch.float32
    ragged: bool = False
    channels_last: bool = False
    shared: bool = False
    gradient: bool = False
    peers: bool = False

    def __str__(self) -> str:
        words = [str(self.frames), str(self.dtype).removeprefix("torch.")]
        words += ["lengths from half to full"] * self.ragged + ["channels last"] * self.channels_last
        words += ["shared logits"] * self.shared + ["forward + backward" if self.gradient else "forward"]
        return ", ".join(words)


_CROPS, _HALF = Frames(256, 1536, 200), torch.bfloat16
_GPU_WORKLOADS = (
    _Workload(_CROPS, peers=True),
    _Workload(_CROPS, gradient=True, peers=True),
    _Workload(_CROPS, _HALF),
    _Workload(_CROPS, _HALF, gradient=True),
    _Workload(_CROPS, channels_last=True),
    _Workload(_CROPS, _HALF, channels_last=True, gradient=True),
    _Workload(Frames(256, 1536, 298), ragged=True),
    _Workload(_CROPS, shared=True, gradient=True),
    _Workload(Frames(1, 1536, 200)),
    _Workload(Frames(4, 1536, 12000), ragged=True),
)
_CPU_WORKLOADS = (_Workload(Frames(2, 3, 40)), _Workload(Frames(2, 3, 40), ragged=True, gradient=True))


def cases(device: torch.device) -> list[Case]:
    """The workloads for this kind of device, on it."""
    workloads = _GPU_WORKLOADS if device.type == "cuda" else _CPU_WORKLOADS
    return [_case(workload, device) for workload in workloads]


def _case(workload: _Workload, device: torch.device) -> Case:
    x, logits = (value.to(device, workload.dtype) for value in workload.frames.inputs())
    if workload.shared:
        logits = logits[:, :1].contiguous()
    if workload.channels_last:
        x, logits = (value.transpose(1, 2).contiguous().transpose(1, 2) for value in (x, logits))
    lengths = workload.frames.ragged().to(device) if workload.ragged else None
    grads = tuple(torch.randn(x.shape[:2], generator=torch.Generator().manual_seed(k)).to(device) for k in range(2))

    def output(pool: Pool, rows: slice = slice(None), dtype: torch.dtype | None = None) -> Tensor:
        given = x[rows].to(dtype or x.dtype), logits[rows].to(dtype or x.dtype)
        own_lengths = None if lengths is None else lengths[rows]
        if not workload.gradient:
            return pool(*given, own_lengths)[1]
        leaves = [value.detach().requires_grad_() for value in given]
        moments = pool(leaves[0], leaves[1], own_lengths)
        own_grads = [grad[rows].to(moment.dtype) for grad, moment in zip(grads, moments, strict=True)]
        # Gradients of a half type are rounded to it: moments are compared in their place. The op's tests compare all.
        found = torch.autograd.grad(moments, leaves, own_grads)[1]
        return found if x.dtype == torch.float32 else moments[1].detach()

    def of_backend(backend: Backend) -> Pool:
        return lambda x, logits, lengths: tuple(functional.weighted_moments(x, logits, lengths, backend=backend))

    def definition(dtype: torch.dtype) -> Tensor:
        starts = range(0, x.shape[0], _CHUNK)
        pool = reference.attentive_stats_pool
        return torch.cat([output(pool, slice(start, start + _CHUNK), dtype) for start in starts])

    peers: dict[str, Callable[[], Tensor]] = {}
    if workload.peers:
        compiled = torch.compile(reference.attentive_stats_pool)
        peers = {
            "eager": lambda: output(reference.attentive_stats_pool),
            "torch.compile": lambda: output(compiled),
        }
    real = 1.0 if lengths is None else float(lengths.double().mean()) / x.shape[2]
    passes = 3 if workload.gradient else 1  # The gradient reads the input again, and writes as much.
    return Case(
        name=str(workload),
        run=lambda backend: output(of_backend(backend)),
        definition=definition,
        bytes_moved=int(passes * real * (x.nbytes + logits.nbytes)) + 2 * 4 * x.shape[0] * x.shape[1],
        # An exponential, and what the sums and the centred sums take; as much again for the gradient.
        flops=(24.0 if workload.gradient else 12.0) * real * x.numel(),
        peers=peers,
    )
