"""Speed and memory of attentive_stats_pool on the CPU: ``python -m benchmarks.ops.bench_attentive_stats_pool``."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import baselines, comparison, shapes
from benchmarks.comparison import Call
from benchmarks.machine import describe_machine
from benchmarks.timing import Figure
from spkfast import functional
from spkfast.memory import keep_freed_memory

_THREADS = 2
_SHORT_CALLS = 10  # in a row, for what takes about a millisecond

Pool = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]


@dataclasses.dataclass(frozen=True)
class _Setting:
    """What a row measures; ``name`` is empty for the one that has goals."""

    name: str = ""
    workload: shapes.Frames = shapes.POOLING
    dtype: torch.dtype = torch.float32
    threads: int = _THREADS
    ragged: bool = False
    channels_last: bool = False

    def inputs(self) -> tuple[Tensor, Tensor, Tensor | None]:
        x, logits = (self._laid_out(value.to(self.dtype)) for value in self.workload.inputs())
        return x, logits, self.workload.ragged() if self.ragged else None

    def _laid_out(self, value: Tensor) -> Tensor:
        return value.transpose(1, 2).contiguous().transpose(1, 2) if self.channels_last else value


_SETTINGS = (
    _Setting(),
    _Setting("lengths from half to full", ragged=True),
    _Setting("channels last", channels_last=True),
    _Setting("bfloat16", dtype=torch.bfloat16),
    _Setting("1 thread", threads=1),
    _Setting("one utterance", workload=shapes.POOLING_ROW),
)


def main() -> None:
    """Prints times, memory and goals; with ``--out`` writes JSON too."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=10, help="rounds, each contender once a round")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()

    torch.set_num_threads(_THREADS)
    machine = describe_machine()
    inputs = _SETTINGS[0].inputs()[:2]
    peaks = {
        gradient: comparison.peaks_of(_contenders(_SETTINGS[0], gradient), gradients_of=inputs if gradient else ())
        for gradient in (False, True)
    }
    keep_freed_memory()
    results = []
    for setting in _SETTINGS:
        for gradient in (False, True):
            results.append(_row(setting, gradient, None if setting.name else peaks[gradient], args.repeats))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "op": "attentive_stats_pool",
            "machine": machine,
            "threads": _THREADS,
            "remark": comparison.REMARK,
            "results": results,
        }
        args.out.write_text(json.dumps(record, indent=1) + "\n")


def _row(setting: _Setting, gradient: bool, peaks: dict[str, int | None] | None, repeats: int) -> dict[str, Any]:
    torch.set_num_threads(setting.threads)
    x, logits, lengths = setting.inputs()
    definition = functools.partial(functional.attentive_stats_pool, backend="reference")
    outputs = 2 * 4 * x.shape[0] * x.shape[1]
    real = 1.0 if lengths is None else float(lengths.double().mean()) / x.shape[2]
    moved = real * (x.nbytes + logits.nbytes) + outputs
    if gradient:  # reads all that once more, and writes as many gradients as there are inputs
        moved += moved + x.nbytes + logits.nbytes
    native = functools.partial(functional.attentive_stats_pool, backend="native")
    unmasked = {"native, without lengths": comparison.call_of(native, (x, logits, None), gradient=gradient)}
    name = "forward + backward" if gradient else "forward"
    result = comparison.compare(
        f"{name}, {setting.name}" if setting.name else name,
        setting.workload,
        _contenders(setting, gradient),
        exact=comparison.call_of(definition, (x.double(), logits.double(), lengths), gradient=gradient)(),
        definition=comparison.call_of(definition, (x, logits, lengths), gradient=gradient)(),
        repeats=repeats,
        calls=_SHORT_CALLS if setting.workload == shapes.POOLING_ROW else 1,
        parts=unmasked if setting.ragged else None,
        bytes_moved=moved,
        peaks=peaks,
    )
    torch.set_num_threads(_THREADS)

    goal = None if setting.name else (1.7 if gradient else 2)
    figures = [
        comparison.ratio(result, "torch.compile", "native", goal),
        comparison.ratio(result, "eager", "native"),
    ]
    if setting.ragged:
        cost = comparison.ratio(result, "native", "native, without lengths")
        figures.append(
            dataclasses.replace(cost, name="native, with lengths / without", at_most=None if gradient else 1.1)
        )
    if not setting.name:
        figures += [
            comparison.ratio(result, "torch.compile, one pass", "native"),
            comparison.ratio(result, "eager, one pass", "native"),
        ]
    if peaks and peaks["native"] is not None and peaks["eager"]:
        share = 100 * peaks["native"] / peaks["eager"]
        figures.append(Figure("native / eager, peak memory, %", share, at_most=33.3))
    return comparison.finish(result, figures)


def _contenders(setting: _Setting, gradient: bool) -> dict[str, Call]:
    torch._dynamo.reset()  # each setting is compiled for itself, as if it were the only one
    native = functools.partial(functional.attentive_stats_pool, backend="native")
    one_pass = functools.partial(baselines.attentive_stats, one_pass=True)
    pools: dict[str, Pool] = {
        "native": native,
        "eager": baselines.attentive_stats,
        "torch.compile": torch.compile(baselines.attentive_stats, dynamic=False),
    }
    if not setting.name:
        pools["eager, one pass"] = one_pass
        pools["torch.compile, one pass"] = torch.compile(one_pass, dynamic=False)
    inputs = setting.inputs()
    return {name: comparison.call_of(pool, inputs, gradient=gradient) for name, pool in pools.items()}


if __name__ == "__main__":
    main()
