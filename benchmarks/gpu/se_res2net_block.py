"""What gpu_check measures of ``se_res2net_block``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu.case import Case
from benchmarks.shapes import Frames
from spkfast import functional, reference
from spkfast.backends import Backend
from spkfast.ops.se_res2net_block import BLOCK_FORMS, pack_block, run_block
from spkfast.reference import Precision, SERes2NetParams, TdnnParams

# Rows that the definition takes at once, to save memory.
_CHUNK = 16


@dataclasses.dataclass(frozen=True)
class _Workload:
    frames: Frames
    precision: Precision = "bf16"
    groups: int = 8
    units: int = 128
    dialect: str = "wespeaker"
    dilation: int = 2
    ragged: bool = False
    peers: bool = False

    def __str__(self) -> str:
        words = [str(self.frames), self.precision, self.dialect, f"dilation {self.dilation}"]
        return ", ".join(words + ["lengths from half to full"] * self.ragged)


_GPU_WORKLOADS = (
    _Workload(Frames(256, 512, 200), peers=True),
    _Workload(Frames(256, 1024, 200), peers=True),
    _Workload(Frames(256, 512, 298), dialect="speechbrain", dilation=4, ragged=True),
    _Workload(Frames(256, 512, 200), "fp16"),
    _Workload(Frames(256, 512, 200), "fp32", peers=True),
    _Workload(Frames(1, 512, 200), peers=True),
    _Workload(Frames(8, 512, 3000), dilation=4),
    _Workload(Frames(3, 40, 131), "fp32", units=10, dialect="speechbrain", ragged=True),
)
_CPU_WORKLOADS = (
    _Workload(Frames(2, 12, 20), "fp32", groups=3, units=5, ragged=True),
    _Workload(Frames(2, 12, 20), "fp32", groups=3, units=5, dialect="speechbrain"),
)


def cases(device: torch.device) -> list[Case]:
    """The workloads for this kind of device, on it."""
    workloads = _GPU_WORKLOADS if device.type == "cuda" else _CPU_WORKLOADS
    return [_case(workload, device) for workload in workloads]


def _params(workload: _Workload, device: torch.device) -> SERes2NetParams:
    generator = torch.Generator().manual_seed(1)
    channels, width = workload.frames.channels, workload.frames.channels // workload.groups

    def dense(outputs: int, inputs: int, taps: int = 1) -> TdnnParams:
        weight = torch.randn(outputs, inputs, taps, generator=generator) / (inputs * taps) ** 0.5
        return TdnnParams(weight.to(device), 0.3 * torch.randn(outputs, generator=generator).to(device))

    def layer(outputs: int, inputs: int, taps: int = 1) -> TdnnParams:
        scale, shift = (torch.randn(outputs, generator=generator).to(device) for _ in range(2))
        return dense(outputs, inputs, taps)._replace(scale=1 + 0.3 * scale, shift=0.3 * shift)

    return SERes2NetParams(
        layer(channels, channels),
        [layer(width, width, 3) for _ in range(workload.groups - 1)],
        layer(channels, channels),
        dense(workload.units, channels),
        dense(channels, workload.units),
    )


def _case(workload: _Workload, device: torch.device) -> Case:
    frames = workload.frames
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(workload.precision, torch.float32)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(frames.batch, frames.frames, frames.channels, generator=generator).transpose(1, 2).to(device, dtype)
    lengths = frames.ragged().to(device) if workload.ragged else None
    params, form = _params(workload, device), BLOCK_FORMS[workload.dialect]
    packed = {name: pack_block(params, workload.precision, backend=name) for name in ("native", "triton")}

    def run(backend: Backend) -> Tensor:
        if backend not in packed:
            return functional.se_res2net_block(
                x, params, lengths,
                dialect=workload.dialect, dilation=workload.dilation, precision=workload.precision, backend=backend,
            )  # fmt: skip
        with torch.no_grad():
            return run_block(
                x, params, lengths, lengths, form, workload.dilation, workload.precision, None,
                packed=packed[backend], backend=backend,
            )  # fmt: skip

    def definition(wide: torch.dtype) -> Tensor:
        found = []
        for start in range(0, frames.batch, _CHUNK):
            rows = slice(start, start + _CHUNK)
            own_lengths = None if lengths is None else lengths[rows]
            found.append(
                reference.se_res2net_block(
                    x[rows].to(wide), _in(params, wide), own_lengths, own_lengths,
                    dilation=workload.dilation, reflect=form.padding_mode == "reflect",
                    first_passes=form.identity == "first", precision=workload.precision, input_ranges=None,
                )
            )  # fmt: skip
        out = torch.cat(found)
        # What it errs by has the rounding of the op's output in it.
        return out.to(dtype).to(wide) if wide == torch.float32 else out

    peers: dict[str, Callable[[], Tensor]] = {}
    if workload.peers:
        weights = _in(params, dtype)

        def eager() -> Tensor:
            return _as_written(x_first, weights, workload)

        x_first = x.contiguous()
        peers = {"eager": eager, "torch.compile": torch.compile(eager, mode="max-autotune-no-cudagraphs")}
    real = 1.0 if lengths is None else float(lengths.double().mean()) / frames.frames
    layers = [params.in_, params.out, *params.res]
    products = sum(layer.weight.numel() for layer in layers)
    return Case(
        name=str(workload),
        run=run,
        definition=definition,
        bytes_moved=int(real * x.nbytes) + x.nbytes + products * x.element_size(),
        flops=2.0 * products * real * frames.batch * frames.frames,
        peers=peers,
    )


def _in(params: SERes2NetParams, dtype: torch.dtype) -> SERes2NetParams:
    """The weights in another type."""

    def cast(layer: TdnnParams) -> TdnnParams:
        return TdnnParams(*(None if value is None else value.to(dtype) for value in layer))

    res = [cast(layer) for layer in params.res]
    return SERes2NetParams(cast(params.in_), res, cast(params.out), cast(params.squeeze), cast(params.excite))


def _as_written(x: Tensor, params: SERes2NetParams, workload: _Workload) -> Tensor:
    """The block as toolkits write it: channels first, a call for each step."""

    def layer(values: Tensor, weights: TdnnParams, dilation: int = 1) -> Tensor:
        padding = weights.weight.shape[2] // 2 * dilation
        out = torch.nn.functional.conv1d(values, weights.weight, weights.bias, padding=padding, dilation=dilation)
        assert weights.scale is not None and weights.shift is not None
        return torch.addcmul(weights.shift[:, None], out.relu(), weights.scale[:, None])

    groups = layer(x, params.in_).chunk(workload.groups, dim=1)
    outputs: list[Tensor] = []
    for group, weights in zip(groups, params.res, strict=False):
        outputs.append(layer(group + outputs[-1] if outputs else group, weights, workload.dilation))
    y = layer(torch.cat([*outputs, groups[-1]], dim=1), params.out)
    squeezed = torch.nn.functional.conv1d(y.mean(dim=2, keepdim=True), params.squeeze.weight, params.squeeze.bias)
    gate = torch.nn.functional.conv1d(squeezed.relu(), params.excite.weight, params.excite.bias).sigmoid()
    return y * gate + x
