"""Speed of se_res2net_block on the CPU: ``python -m benchmarks.ops.bench_se_res2net_block --out FILE``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import comparison
from benchmarks.comparison import Call
from benchmarks.machine import describe_machine
from benchmarks.ops.bench_tdnn_layer import TYPES, drawn_layer, eager_layer, frames, in_inference, prepacked_products
from spkfast import functional
from spkfast.memory import keep_freed_memory
from spkfast.ops.se_res2net_block import BlockForm, pack_block, run_block
from spkfast.reference import Precision, SERes2NetParams, TdnnParams

_THREADS, _FRAMES, _GROUPS, _TAPS, _DILATION, _UNITS = 2, 300, 8, 3, 3, 128
_RANGES = {name: (-4.0, 4.0) for name in ("in", *(f"res.{j}" for j in range(_GROUPS - 1)), "out")}


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
        _row(channels, batch, precision, args.repeats)
        for channels in args.channels
        for batch in args.batches
        for precision in TYPES
    ]
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        record = {"op": "se_res2net_block", "machine": machine, "threads": _THREADS, "remark": comparison.REMARK}
        args.out.write_text(json.dumps(record | {"results": results}, indent=1) + "\n")


def _row(channels: int, batch: int, precision: Precision, repeats: int) -> dict[str, Any]:
    dtype, params, width = TYPES[precision], _params(channels), channels // _GROUPS
    x = frames(batch, channels, _FRAMES, dtype)
    contenders = {"native": _native(x, params, precision)}
    parts: dict[str, Call] = {}
    if precision == "int8":  # peers are those of the other precisions
        parts["bf16"] = _native(x, params, "bf16")
    else:
        torch._dynamo.reset()
        narrow = _cast(params, dtype)
        for name, block in (("eager", _eager), ("torch.compile", torch.compile(_eager, dynamic=False))):
            contenders[name] = in_inference(block, x.contiguous(), narrow)
        # A convolution as one product, on inputs that are already laid out for it.
        columns = frames(batch, _TAPS * width, _FRAMES, dtype)
        products = [(x, layer.weight[..., 0]) for layer in (params.in_, params.out)]
        products += [(columns, layer.weight.flatten(1)) for layer in params.res]
        parts["oneDNN, products alone"] = prepacked_products(products, dtype)
    result = comparison.compare(
        f"block of {channels} channels, {precision}",
        f"{batch} x {channels} x {_FRAMES}",
        contenders,
        exact=_definition(x, params, precision, torch.float64),
        definition=_definition(x, params, precision, torch.float32),
        repeats=repeats,
        calls=max(1, 8 // batch),
        parts=parts,
        flops=2.0 * batch * _FRAMES * (2 * channels**2 + (_GROUPS - 1) * _TAPS * width**2),
    )
    names = [name for name in (*contenders, *parts) if name != "native"]
    return comparison.finish(result, [comparison.ratio(result, name, "native") for name in names])


def _params(channels: int) -> SERes2NetParams:
    width = channels // _GROUPS
    squeeze, excite = drawn_layer(_UNITS, channels, 1, seed=20), drawn_layer(channels, _UNITS, 1, seed=21)
    return SERes2NetParams(
        drawn_layer(channels, channels, 1, seed=1),
        [drawn_layer(width, width, _TAPS, seed=2 + j) for j in range(_GROUPS - 1)],
        drawn_layer(channels, channels, 1, seed=10),
        squeeze._replace(scale=None, shift=None),
        excite._replace(scale=None, shift=None),
    )


def _cast(params: SERes2NetParams, dtype: torch.dtype) -> SERes2NetParams:
    def layer(given: TdnnParams) -> TdnnParams:
        vectors = (value if value is None else value.to(dtype) for value in given[1:])
        return TdnnParams(given.weight.to(dtype), *vectors)

    in_, res, out, squeeze, excite, _ = params
    return SERes2NetParams(layer(in_), [layer(part) for part in res], layer(out), layer(squeeze), layer(excite))


def _native(x: Tensor, params: SERes2NetParams, precision: Precision) -> Call:
    packed = pack_block(params, precision, _RANGES)
    return in_inference(
        run_block, x, params, None, None, BlockForm(), _DILATION, precision, _RANGES, packed=packed, backend="native"
    )


def _definition(x: Tensor, params: SERes2NetParams, precision: Precision, dtype: torch.dtype) -> list[Tensor]:
    block = in_inference(
        functional.se_res2net_block, x.to(dtype), _cast(params, dtype), dilation=_DILATION, precision=precision,
        input_ranges=_RANGES, backend="reference",
    )  # fmt: skip
    return [value.double() for value in block()]


def _eager(x: Tensor, params: SERes2NetParams) -> Tensor:
    """The block as toolkits run it."""
    *groups, last = eager_layer(x, params.in_).chunk(_GROUPS, dim=1)
    outputs: list[Tensor] = []
    for group, convolution in zip(groups, params.res, strict=True):
        group = group + outputs[-1] if outputs else group
        outputs.append(eager_layer(group, convolution, dilation=_DILATION, padding=_TAPS // 2 * _DILATION))
    y = eager_layer(torch.cat([*outputs, last], dim=1), params.out)
    squeezed = F.relu(F.conv1d(y.mean(dim=2, keepdim=True), params.squeeze.weight, params.squeeze.bias))
    return y * torch.sigmoid(F.conv1d(squeezed, params.excite.weight, params.excite.bias)) + x


if __name__ == "__main__":
    main()
