"""What gpu_check measures of training TDNN layers: forward, and back to the gradient of the input."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.gpu.case import Case
from benchmarks.shapes import Frames
from spkfast.nn.se_res2net import SERes2NetBlock, TdnnLayer
from spkfast.nn.training import Kernels
from spkfast.reference import Precision


@dataclasses.dataclass(frozen=True)
class _Workload:
    frames: Frames
    outputs: int
    precision: Precision = "bf16"
    taps: int = 1
    block: bool = False
    peers: bool = False

    def __str__(self) -> str:
        words = ["block of" if self.block else "", f"{self.frames} to {self.outputs} channels", self.precision]
        return " ".join(word for word in words if word) + f", {self.taps} taps" * (self.taps > 1)


_GPU_WORKLOADS = (
    _Workload(Frames(512, 512, 200), 512, peers=True),
    _Workload(Frames(512, 1536, 200), 1536, peers=True),
    _Workload(Frames(512, 64, 200), 64, taps=3, peers=True),
    _Workload(Frames(512, 80, 200), 512, taps=5),
    _Workload(Frames(512, 512, 200), 512, taps=3, block=True, peers=True),
    _Workload(Frames(64, 512, 200), 512, "fp32", peers=True),
    _Workload(Frames(3, 61, 131), 67, "fp32", taps=3),
)
_CPU_WORKLOADS = (_Workload(Frames(2, 6, 20), 5, "fp32", taps=3), _Workload(Frames(2, 16, 8), 16, "fp32", block=True))


def cases(device: torch.device) -> list[Case]:
    """The workloads for this kind of device, on it."""
    workloads = _GPU_WORKLOADS if device.type == "cuda" else _CPU_WORKLOADS
    return [_case(workload, device) for workload in workloads]


def _case(workload: _Workload, device: torch.device) -> Case:
    frames, half = workload.frames, workload.precision == "bf16"
    torch.manual_seed(1)
    layer: SERes2NetBlock | TdnnLayer
    if workload.block:
        layer = SERes2NetBlock(workload.outputs, dilation=2)
    else:
        layer = TdnnLayer(frames.channels, workload.outputs, workload.taps)
    layer = layer.to(device).train()
    dtype = torch.bfloat16 if half else torch.float32
    x, grad = (
        torch.randn(frames.batch, frames.frames, channels).transpose(1, 2).to(device, dtype)
        for channels in (frames.channels, workload.outputs)
    )
    x.requires_grad_()

    def step(module: Callable[[Tensor], Tensor], x: Tensor, *, autocast: bool) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            out = module(x)
        weights = [value for value in layer.parameters() if value.requires_grad]
        found = torch.autograd.grad(out, [x, *weights], grad.to(out.dtype), allow_unused=True)[0]
        assert found is not None
        return found

    def run(backend: str) -> Tensor:
        kernels = Kernels(workload.precision, backend)
        if isinstance(layer, TdnnLayer):
            return step(lambda value: layer.train_on([value], kernels)[0], x, autocast=half)
        return step(lambda value: layer.train_on(value, kernels), x, autocast=half)

    def definition(wide: torch.dtype) -> Tensor:
        plain = copy.deepcopy(layer).to(wide)
        own = x.detach().to(wide).requires_grad_()
        # Rows have batch norm in common, and cannot be taken a few at a time.
        with torch.autocast(device.type, torch.bfloat16, enabled=half and wide == torch.float32):
            out = _plain(plain, own)
        return torch.autograd.grad(out, own, grad.to(out.dtype))[0]

    peers: dict[str, Callable[[], Tensor]] = {}
    if workload.peers:
        apart = x.detach().contiguous().requires_grad_()
        compiled = torch.compile(lambda value: _plain(layer, value), mode="max-autotune-no-cudagraphs")
        peers = {
            "eager": lambda: step(lambda value: _plain(layer, value), apart, autocast=half),
            "torch.compile": lambda: step(compiled, apart, autocast=half),
        }
    products = sum(value.numel() for value in layer.parameters() if value.ndim > 2)
    return Case(
        name=str(workload),
        run=run,
        definition=definition,
        bytes_moved=2 * (x.nbytes + grad.nbytes),
        flops=6.0 * products * frames.batch * frames.frames,
        peers=peers,
    )


def _plain(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer by its modules, as toolkits write it."""
    if isinstance(layer, TdnnLayer):
        out: Tensor = layer.conv(x).relu()
        return out if layer.bn is None else layer.bn(out)  # type: ignore[no-any-return]
    assert isinstance(layer, SERes2NetBlock)
    *groups, passed = _plain(layer.in_, x).split(layer.res.width, dim=1)
    outputs: list[Tensor] = []
    for inner, group in zip(layer.res, groups, strict=True):
        outputs.append(_plain(inner, group + outputs[-1] if outputs else group))
    found: Tensor = layer.se(_plain(layer.out, torch.cat([*outputs, passed], dim=1))) + x
    return found
