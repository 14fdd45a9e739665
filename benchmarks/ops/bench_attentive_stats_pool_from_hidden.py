"""Speed of attentive_stats_pool_from_hidden on the CPU, alone and in the whole attentive module.

``python -m benchmarks.ops.bench_attentive_stats_pool_from_hidden --out FILE``
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import baselines, comparison, shapes
from benchmarks.comparison import Call
from benchmarks.machine import describe_machine
from spkfast import functional
from spkfast.memory import keep_freed_memory
from spkfast.nn import poolings

_THREADS = 2
_UNITS = 128

Pool = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def main() -> None:
    """Prints times, memory and goals; with ``--out`` writes JSON too."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=10, help="rounds, each contender once a round")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()

    torch.set_num_threads(_THREADS)
    machine = describe_machine()
    module_peaks = comparison.peaks_of(_modules(*_module_inputs()))
    op_peaks = {
        gradient: comparison.peaks_of(_pools(gradient), gradients_of=_op_inputs() if gradient else ())
        for gradient in (False, True)
    }
    keep_freed_memory()
    results = [_module_row(module_peaks, args.repeats)]
    results += [_op_row(gradient, op_peaks[gradient], args.repeats) for gradient in (False, True)]
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "op": "attentive_stats_pool_from_hidden",
            "machine": machine,
            "threads": _THREADS,
            "remark": comparison.REMARK,
            "results": results,
        }
        args.out.write_text(json.dumps(record, indent=1) + "\n")


def _module_row(peaks: dict[str, int | None], repeats: int) -> dict[str, Any]:
    x, module = _module_inputs()
    exact = _in_inference(copy.deepcopy(module).double(), x.double())()
    contenders = _modules(x, module)
    batch, channels, frames = x.shape
    result = comparison.compare(
        f"the whole module, {3 * channels} to {_UNITS} to {channels}, forward",
        shapes.POOLING,
        contenders,
        exact=exact,
        definition=contenders["eager"](),
        repeats=repeats,
        # Both products, the first without the context, whose share is one vector an utterance.
        flops=4.0 * batch * channels * _UNITS * frames,
        peaks=peaks,
    )
    figures = [
        comparison.ratio(result, "eager", "native", 4),
        comparison.ratio(result, "torch.compile", "native"),
    ]
    return comparison.finish(result, figures)


def _module_inputs() -> tuple[Tensor, torch.nn.Module]:
    torch.manual_seed(0)
    module = poolings.create("astp", channels=shapes.POOLING.channels, bottleneck=_UNITS).eval()
    return shapes.POOLING.inputs()[0], module


def _modules(x: Tensor, module: torch.nn.Module) -> dict[str, Call]:
    torch._dynamo.reset()
    weights = dict(module.named_parameters())
    layers = [(weights[f"{name}.weight"], weights[f"{name}.bias"]) for name in ("fc1", "fc2")]
    compiled = torch.compile(baselines.attentive_pooling, dynamic=False)
    return {
        "native": _in_inference(module, x),
        "eager": _in_inference(baselines.attentive_pooling, x, *layers),
        "torch.compile": _in_inference(compiled, x, *layers),
    }


def _in_inference(function: Callable[..., Tensor], *args: Any) -> Call:
    def call() -> list[Tensor]:
        with torch.inference_mode():
            return [function(*args)]

    return call


def _op_row(gradient: bool, peaks: dict[str, int | None], repeats: int) -> dict[str, Any]:
    inputs = _op_inputs()
    (batch, channels, frames), hidden, weight = inputs[0].shape, *inputs[1:]
    definition = _with_bias(functional.attentive_stats_pool_from_hidden, backend="reference")
    products = 3 if gradient else 1
    result = comparison.compare(
        "the op, forward + backward" if gradient else "the op, forward",
        f"{shapes.POOLING}, {_UNITS} units",
        _pools(gradient),
        parts=None if gradient else {"the product alone": lambda: [_logits(hidden, weight, _bias(torch.float32))]},
        exact=comparison.call_of(definition, [value.double() for value in inputs], gradient=gradient)(),
        definition=comparison.call_of(definition, inputs, gradient=gradient)(),
        repeats=repeats,
        flops=2.0 * products * batch * channels * _UNITS * frames,
        peaks=peaks,
    )
    names = ["product, then native pooling", "eager", "torch.compile"] + ([] if gradient else ["the product alone"])
    return comparison.finish(result, [comparison.ratio(result, name, "native") for name in names])


def _op_inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    batch, channels, frames = shapes.POOLING.batch, shapes.POOLING.channels, shapes.POOLING.frames
    hidden = torch.randn(batch, _UNITS, frames, generator=generator).tanh()
    return [shapes.POOLING.inputs()[0], hidden, torch.randn(channels, _UNITS, generator=generator) / 8]


def _bias(dtype: torch.dtype) -> Tensor:
    return torch.randn(shapes.POOLING.channels, generator=torch.Generator().manual_seed(3)).to(dtype)


def _with_bias(pool: Callable[..., tuple[Tensor, Tensor]], **options: Any) -> Pool:
    """The pooling without gradient of the bias: it is zero, as a softmax does not see it, and its error no measure."""
    bias = {dtype: _bias(dtype) for dtype in (torch.float32, torch.float64)}
    return lambda x, hidden, weight: pool(x, hidden, weight, bias[x.dtype], **options)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.nn.functional.conv1d(hidden, weight[:, :, None], bias)


def _native_pooling(x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return functional.attentive_stats_pool(x, _logits(hidden, weight, bias), backend="native")


def _eager(x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return baselines.attentive_stats(x, _logits(hidden, weight, bias))


def _pools(gradient: bool) -> dict[str, Call]:
    torch._dynamo.reset()
    pools = {
        "native": _with_bias(functional.attentive_stats_pool_from_hidden, backend="native"),
        "product, then native pooling": _with_bias(_native_pooling),
        "eager": _with_bias(_eager),
        "torch.compile": _with_bias(torch.compile(_eager, dynamic=False)),
    }
    inputs = _op_inputs()
    return {name: comparison.call_of(pool, inputs, gradient=gradient) for name, pool in pools.items()}


if __name__ == "__main__":
    main()
