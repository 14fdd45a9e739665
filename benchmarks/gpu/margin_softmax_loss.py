"""What gpu_check measures of ``margin_softmax_loss``: forward, and back to the gradients of embeddings and weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.gpu.case import Case
from benchmarks.peers import heads
from benchmarks.peers.heads import Head
from spkfast import functional


@dataclasses.dataclass(frozen=True)
class _Workload:
    speakers: int
    head: Head
    precision: Literal["fp32", "bf16"]
    batch: int = 512
    size: int = 192
    peers: bool = True

    def __str__(self) -> str:
        words = f"{self.batch} x {self.size}, {self.speakers} speakers, {self.precision}"
        if self.head.subcenters > 1:
            words += f", {self.head.subcenters} sub-centers"
        return words + (f", the {self.head.topk} hardest penalised" if self.head.topk else "")


_PLAIN, _SUBCENTERS = Head(1, 0), Head(3, 5)
_GPU_WORKLOADS = (
    _Workload(100_000, _PLAIN, "bf16"),
    _Workload(100_000, _PLAIN, "fp32"),
    _Workload(100_000, _SUBCENTERS, "bf16"),
    _Workload(100_000, _SUBCENTERS, "fp32"),
    _Workload(5994, _PLAIN, "bf16"),
    _Workload(5994, _SUBCENTERS, "fp32", peers=False),
    _Workload(1001, _SUBCENTERS, "bf16", batch=37, size=250, peers=False),
)
_CPU_WORKLOADS = (
    _Workload(11, _SUBCENTERS, "fp32", batch=3, size=10, peers=False),
    _Workload(11, _PLAIN, "bf16", batch=3, size=10, peers=False),
)


def cases(device: torch.device) -> list[Case]:
    """The workloads for this kind of device, on it."""
    workloads = _GPU_WORKLOADS if device.type == "cuda" else _CPU_WORKLOADS
    return [_case(workload, device) for workload in workloads]


def _case(workload: _Workload, device: torch.device) -> Case:
    head, half = workload.head, workload.precision == "bf16"
    rows = workload.speakers * head.subcenters
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(n, workload.size, generator=generator) for n in (workload.batch, rows))
    target = torch.randint(workload.speakers, (workload.batch,), generator=generator).to(device)
    leaves = [value.to(device).requires_grad_() for value in (x, weight)]

    def both(loss: Callable[[Tensor, Tensor], Any], given: list[Tensor]) -> Tensor:
        # A few rows of the weight's: of all of them the copy would be timed too.
        of_x, of_weight = torch.autograd.grad(loss(*given), given)
        step = max(1, len(of_weight) // len(of_x))
        return torch.cat([of_x, of_weight[::step]])

    def run(backend: Any) -> Tensor:
        return both(
            lambda x, weight: functional.margin_softmax_loss(
                x, weight, target, num_subcenters=head.subcenters, topk=head.topk, margin=head.margin,
                topk_margin=head.topk_margin, scale=head.scale, precision=workload.precision, validate=False,
                backend=backend,
            ),
            leaves,
        )  # fmt: skip

    def definition(wide: torch.dtype) -> Tensor:
        given = [value.detach().to(wide).requires_grad_() for value in leaves]
        with torch.autocast(device.type, torch.bfloat16, enabled=half and wide == torch.float32):
            return both(lambda x, weight: heads.on_targets(x, weight, target, head), given)

    peers: dict[str, Callable[[], Tensor]] = {}
    if workload.peers:
        for name, function in (("as toolkits write it", heads.over_all_classes), ("eager", heads.on_targets)):
            peers |= _peers(name, function, leaves, target, head, half, both)
    return Case(
        name=str(workload),
        run=run,
        definition=definition,
        bytes_moved=3 * leaves[1].nbytes + 2 * leaves[0].nbytes,
        flops=10.0 * workload.batch * rows * workload.size,
        peers=peers,
    )


def _peers(
    name: str,
    function: Callable[[Tensor, Tensor, Tensor, Head], Tensor],
    leaves: list[Tensor],
    target: Tensor,
    head: Head,
    half: bool,
    both: Callable[[Callable[[Tensor, Tensor], Any], list[Tensor]], Tensor],
) -> dict[str, Callable[[], Tensor]]:
    """A head in plain torch, and the same compiled."""
    compiled = torch.compile(function)

    def step(called: Callable[[Tensor, Tensor, Tensor, Head], Tensor]) -> Tensor:
        with torch.autocast(leaves[0].device.type, torch.bfloat16, enabled=half):
            return both(lambda x, weight: called(x, weight, target, head), leaves)

    return {name: lambda: step(function), f"torch.compile of {name}": lambda: step(compiled)}
