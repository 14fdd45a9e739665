"""Speed of tdnn_layer on the CPU, layers of ECAPA-TDNN: ``python -m benchmarks.ops.bench_tdnn_layer --out FILE``."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import comparison
from benchmarks.comparison import Call
from benchmarks.machine import describe_machine
from spkfast import functional
from spkfast.memory import keep_freed_memory
from spkfast.ops.tdnn_layer import pack_tdnn_layer
from spkfast.reference import Precision, TdnnParams

_THREADS, _FRAMES = 2, 300
_RANGE = (-4.0, 4.0)
TYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class _Size:
    """A layer of ECAPA-TDNN."""

    name: str
    inputs: int
    outputs: int
    taps: int = 1
    dilation: int = 1

    def params(self) -> TdnnParams:
        return drawn_layer(self.outputs, self.inputs, self.taps, seed=1)


def sizes(channels: int) -> list[_Size]:
    """Each kind of layer once."""
    return [
        _Size("first layer", 80, channels, 5),
        _Size("layer of a block", channels, channels),
        _Size("Res2 convolution", channels // 8, channels // 8, 3, 2),
        _Size("last layer", 3 * channels, 1536),
    ]


def main() -> None:
    """Prints times; with ``--out`` writes JSON too."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=10, help="rounds, each contender once a round")
    parser.add_argument("--channels", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()

    torch.set_num_threads(_THREADS)
    keep_freed_memory()
    machine = describe_machine()
    results = [
        _row(size, channels, batch, precision, args.repeats)
        for channels in args.channels
        for size in sizes(channels)
        for batch in args.batches
        for precision in TYPES
    ]
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        record = {"op": "tdnn_layer", "machine": machine, "threads": _THREADS, "remark": comparison.REMARK}
        args.out.write_text(json.dumps(record | {"results": results}, indent=1) + "\n")


def _row(size: _Size, channels: int, batch: int, precision: Precision, repeats: int) -> dict[str, Any]:
    dtype = TYPES[precision]
    x = frames(batch, size.inputs, _FRAMES, dtype)
    contenders = _contenders(size, x, precision)
    parts: dict[str, Call] = {}
    if precision == "int8":  # peers are those of the other precisions
        parts["bf16"] = _native(size, x, "bf16")
    elif size.taps == 1:
        parts["oneDNN, product alone"] = prepacked_products([(x, size.params().weight[..., 0])], dtype)
    result = comparison.compare(
        f"{size.name} of {channels} channels, {precision}",
        f"{batch} x {size.inputs} x {_FRAMES} to {size.outputs}, {size.taps} taps",
        contenders,
        exact=_definition(size, x, precision, torch.float64),
        definition=_definition(size, x, precision, torch.float32),
        repeats=repeats,
        calls=max(1, 8 // batch),
        parts=parts,
        flops=2.0 * batch * _FRAMES * size.inputs * size.outputs * size.taps,
    )
    names = [name for name in (*contenders, *parts) if name != "native"]
    return comparison.finish(result, [comparison.ratio(result, name, "native") for name in names])


def _contenders(size: _Size, x: Tensor, precision: Precision) -> dict[str, Call]:
    contenders = {"native": _native(size, x, precision)}
    if precision == "int8":
        return contenders
    torch._dynamo.reset()
    params = TdnnParams(*(value.to(x.dtype) for value in size.params() if value is not None))
    assert params.bias is not None and params.scale is not None and params.shift is not None
    options = {"dilation": size.dilation, "padding": size.taps // 2 * size.dilation}
    for name, layer in (("eager", eager_layer), ("torch.compile", torch.compile(eager_layer, dynamic=False))):
        contenders[name] = in_inference(layer, x.contiguous(), params, **options)
    if size.taps == 1:
        rows, scale, shift = x.transpose(1, 2).flatten(0, 1), params.scale, params.shift
        packed = torch.ops.mkldnn._reorder_linear_weight(params.weight[..., 0], len(rows))

        def onednn() -> Tensor:
            out = torch.ops.mkldnn._linear_pointwise(rows, packed, params.bias, "relu", [], "")
            return torch.addcmul(shift, out, scale).unflatten(0, (len(x), -1)).transpose(1, 2)

        contenders["oneDNN, then batch norm"] = in_inference(onednn)
    return contenders


def _native(size: _Size, x: Tensor, precision: Precision) -> Call:
    params = size.params()
    packed = pack_tdnn_layer(params, precision=precision, input_range=_RANGE)
    return in_inference(
        functional.tdnn_layer, x, params, dilation=size.dilation, precision=precision, input_range=_RANGE,
        packed=packed, backend="native",
    )  # fmt: skip


def _definition(size: _Size, x: Tensor, precision: Precision, dtype: torch.dtype) -> list[Tensor]:
    params = TdnnParams(*(value.to(dtype) for value in size.params() if value is not None))
    layer = in_inference(
        functional.tdnn_layer, x.to(dtype), params, dilation=size.dilation, precision=precision, input_range=_RANGE,
        backend="reference",
    )  # fmt: skip
    return [value.double() for value in layer()]


def drawn_layer(outputs: int, inputs: int, taps: int, seed: int) -> TdnnParams:
    """Weights like those of a trained layer."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, taps, generator=generator) / (inputs * taps) ** 0.5
    bias, scale, shift = torch.randn(3, outputs, generator=generator)
    return TdnnParams(weight, 0.3 * bias, 1 + 0.1 * scale, 0.3 * shift)


def frames(batch: int, channels: int, count: int, dtype: torch.dtype) -> Tensor:
    """(B, C, T), channels last."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, count, channels, generator=generator).to(dtype).transpose(1, 2)


def eager_layer(x: Tensor, params: TdnnParams, dilation: int = 1, padding: int = 0) -> Tensor:
    """The layer as toolkits run it."""
    out = F.relu(F.conv1d(x, params.weight, params.bias, dilation=dilation, padding=padding))
    assert params.scale is not None and params.shift is not None
    return torch.addcmul(params.shift[:, None], out, params.scale[:, None])


def prepacked_products(products: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Call:
    """oneDNN's products of inputs (B, C, T) and weights (N, C) that were packed before."""
    operands = []
    for x, weight in products:
        rows = x.to(dtype).transpose(1, 2).flatten(0, 1)
        operands.append((rows, torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype), len(rows))))

    def call() -> list[Tensor]:
        return [torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "") for rows, weight in operands]

    return lambda: torch.inference_mode()(call)()


def in_inference(function: Callable[..., Tensor], *args: Any, **options: Any) -> Call:
    """The function on these arguments, without gradients."""

    def call() -> list[Tensor]:
        with torch.inference_mode():
            return [function(*args, **options)]

    return call


if __name__ == "__main__":
    main()
