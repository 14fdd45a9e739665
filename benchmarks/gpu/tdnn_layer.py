"""What gpu_check measures of ``tdnn_layer``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.gpu.case import Case
from benchmarks.shapes import Frames
from spkfast import functional, reference
from spkfast.backends import Backend
from spkfast.ops._packing import pack_layer
from spkfast.reference import Precision, TdnnParams

# Rows that the definition takes at once, to save memory.
_CHUNK = 16


@dataclasses.dataclass(frozen=True)
class _Workload:
    frames: Frames
    outputs: int
    precision: Precision = "bf16"
    taps: int = 1
    parts: int = 1
    ragged: bool = False
    peers: bool = False

    def __str__(self) -> str:
        words = [f"{self.frames} to {self.outputs} channels", self.precision]
        words += [f"{self.taps} taps"] * (self.taps > 1) + [f"{self.parts} inputs"] * (self.parts > 1)
        return ", ".join(words + ["lengths from half to full"] * self.ragged)


# The layers of ECAPA-TDNN: the first one, those of a block, and the one over three blocks.
_GPU_WORKLOADS = (
    _Workload(Frames(256, 512, 200), 512, peers=True),
    _Workload(Frames(256, 1024, 200), 1024, peers=True),
    _Workload(Frames(256, 1536, 200), 1536, parts=3, peers=True),
    _Workload(Frames(256, 80, 200), 512, taps=5, peers=True),
    _Workload(Frames(256, 512, 298), 512, ragged=True),
    _Workload(Frames(256, 512, 200), 512, "fp16"),
    _Workload(Frames(256, 512, 200), 512, "fp32", peers=True),
    _Workload(Frames(1, 512, 200), 512, peers=True),
    _Workload(Frames(3, 61, 131), 67, "fp32", taps=3, ragged=True),
)
_CPU_WORKLOADS = (
    _Workload(Frames(2, 6, 20), 5, "fp32", taps=3, ragged=True),
    _Workload(Frames(2, 6, 20), 5, "fp32", parts=3),
)


def cases(device: torch.device) -> list[Case]:
    """The workloads for this kind of device, on it."""
    workloads = _GPU_WORKLOADS if device.type == "cuda" else _CPU_WORKLOADS
    return [_case(workload, device) for workload in workloads]


def _case(workload: _Workload, device: torch.device) -> Case:
    frames, outputs, taps = workload.frames, workload.outputs, workload.taps
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(workload.precision, torch.float32)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(frames.batch, frames.frames, frames.channels, generator=generator).transpose(1, 2).to(device, dtype)
    weight = torch.randn(outputs, frames.channels, taps, generator=generator) / (frames.channels * taps) ** 0.5
    vectors = [torch.randn(outputs, generator=generator) for _ in range(3)]
    params = TdnnParams(*(value.to(device) for value in (weight, *vectors)))
    parts = list(x.chunk(workload.parts, dim=1))
    lengths = frames.ragged().to(device) if workload.ragged else None
    sizes = [part.shape[1] for part in parts]
    packed = {name: pack_layer(params, sizes, workload.precision, backend=name) for name in ("native", "triton")}

    def run(backend: Backend) -> Tensor:
        with torch.no_grad():
            return functional.tdnn_layer(
                parts, params, lengths, precision=workload.precision, packed=packed.get(backend), backend=backend
            )

    def definition(wide: torch.dtype) -> Tensor:
        found = []
        for start in range(0, frames.batch, _CHUNK):
            rows = slice(start, start + _CHUNK)
            own = [part[rows].to(wide) for part in parts]
            weights = TdnnParams(*(value.to(wide) for value in params if value is not None))
            found.append(
                reference.tdnn_layer(
                    own, weights, None, None if lengths is None else lengths[rows],
                    dilation=1, reflect=False, relu=True, tanh=False, precision=workload.precision, input_range=None,
                )
            )  # fmt: skip
        return torch.cat(found)

    peers: dict[str, Callable[[], Tensor]] = {}
    if workload.peers:
        modules = nn.Sequential(
            nn.Conv1d(frames.channels, outputs, taps, padding=taps // 2), nn.ReLU(), nn.BatchNorm1d(outputs)
        )
        modules = modules.to(device, dtype).eval().requires_grad_(False)
        apart = [part.contiguous() for part in parts]

        def eager() -> Tensor:
            found: Tensor = modules(torch.cat(apart, dim=1) if len(apart) > 1 else apart[0])
            return found

        peers = {"eager": eager, "torch.compile": torch.compile(eager, mode="max-autotune-no-cudagraphs")}
    real = 1.0 if lengths is None else float(lengths.double().mean()) / frames.frames
    written = frames.batch * outputs * frames.frames * x.element_size()
    return Case(
        name=str(workload),
        run=run,
        definition=definition,
        bytes_moved=int(real * x.nbytes) + written + weight.numel() * x.element_size(),
        flops=2.0 * weight.numel() * real * frames.batch * frames.frames,
        peers=peers,
    )
