"""Speed and memory of margin softmax heads on the CPU, forward and backward.

python -m benchmarks.ops.bench_margin_softmax [--out FILE] [--repeats N] [--speakers N] [--batch B]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import comparison, memory, timing
from benchmarks.machine import describe_machine
from benchmarks.peers import heads
from benchmarks.peers.heads import Head
from benchmarks.peers.worker import Contender, Worker
from benchmarks.timing import Figure, Timing
from spkfast import functional
from spkfast.memory import keep_freed_memory
from spkfast.reference import MarginForm
from spkfast.reference import margin_softmax_loss as definition

_THREADS, _SIZE = 2, 192
_BUILDER = "benchmarks.ops.bench_margin_softmax:contender"
# What must hold for a time to count: of the loss absolute, of each gradient relative to its norm.
_MOST_ERROR = {"fp32": (1e-4, 1e-3), "bf16": (5e-3, 2e-2)}
_HEADS = {"1 center": Head(1, 0), "3 sub-centers, the 5 hardest penalised": Head(3, 5)}
_KEPT = ", memory kept"
_REMARK = (
    "AAM-softmax, margin 0.2, scale 32, from embeddings to the gradients of embeddings and weights. *Over all classes* "
    "is how toolkits write it, *on targets* the best of plain torch; *plain softmax* is torch's own fused loss of the "
    "same cosines, without margin and sub-centers, and *products* the bare ones by torch.mm, one forward and two "
    "backward. Errors are those of the gradients against float64, relative to the norm of either, the larger of both. "
    f"What leaves its bounds ({_MOST_ERROR['fp32'][1]:g}, in bf16 {_MOST_ERROR['bf16'][1]:g}; of the loss "
    f"{_MOST_ERROR['fp32'][0]:g} and {_MOST_ERROR['bf16'][0]:g}) counts in no figure. Memory is the peak of what the "
    "process grew by in a second call, without the gradients; the kernels keep a few MiB from the first one. GFLOP/s "
    "are those of the three products that a head must make, for all contenders alike; the kernels make the first one "
    "twice, and keep no cosines. The allocator is as it is delivered, and as a training run has it: it takes fresh "
    "pages for each large tensor, which is much of the time of whatever writes all cosines. In the rows *memory kept* "
    "it keeps them in the process, which few people know to ask for; these have no goals, and contenders run in one "
    "process, elsewhere each in its own."
)

Call = Callable[[], tuple[Tensor, ...]]


def main() -> None:
    """Prints times, memory and goals; with ``--out`` writes JSON too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10, help="rounds, each contender once a round")
    parser.add_argument("--speakers", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--most-speakers", type=int, default=1_000_000, help="of the head that is timed alone")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()

    torch.set_num_threads(_THREADS)
    machine = describe_machine()
    results = rows(args.speakers, args.batch, args.most_speakers, args.repeats)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        record = {"op": "margin_softmax_loss", "machine": machine, "threads": _THREADS, "remark": _REMARK}
        args.out.write_text(json.dumps(record | {"results": results}, indent=1) + "\n")


def rows(speakers: int, batch: int, most_speakers: int, repeats: int) -> list[dict[str, Any]]:
    """All rows of the record."""
    peaks = {name: _peaks(_contenders(head, speakers, batch), head, speakers) for name, head in _HEADS.items()}
    alone = {"native fp32": _call(Head(1, 0), most_speakers, batch // 4, "fp32")}
    peak_alone = _peaks(alone, Head(1, 0), most_speakers)
    found = [_row(name, head, speakers, batch, peaks[name], repeats) for name, head in _HEADS.items()]
    found.append(_row_alone(most_speakers, batch // 4, alone, peak_alone, repeats))
    keep_freed_memory()
    return [*found, *(_row(name + _KEPT, head, speakers, batch, None, repeats) for name, head in _HEADS.items())]


def inputs(head: Head, speakers: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings (B, E), weight (N * K, E) and targets (B,), as they are in the middle of a training run."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(speakers * head.subcenters, _SIZE, generator=generator)
    target = torch.randint(speakers, (batch,), generator=generator)
    noise = torch.randn(batch, _SIZE, generator=generator)
    return weight[target * head.subcenters] + 1.5 * noise, weight, target


def _row(
    name: str, head: Head, speakers: int, batch: int, peaks: Mapping[str, int | None] | None, repeats: int
) -> dict[str, Any]:
    torch._dynamo.reset()  # each row is compiled for itself, as if it were the only one
    calls = _contenders(head, speakers, batch)
    exact = _exact(head, speakers, batch)
    errors = {contender: _errors(call(), exact) for contender, call in calls.items()}
    if peaks is None:
        timings, spread = timing.interleaved({**calls, **_yardsticks(head, speakers, batch)}, repeats=repeats)
    else:
        names = [*calls, *_yardsticks(head, speakers, batch)]
        del calls
        timings, spread = _apart(names, head, speakers, batch, repeats)
    flops = 3 * 2 * batch * _SIZE * speakers * head.subcenters
    found: dict[str, dict[str, Any]] = {}
    for contender, time in timings.items():
        found[contender] = time.to_dict()
        if contender != "plain softmax":
            found[contender]["gflop_per_s"] = 1e-9 * flops / time.median
        peak = peaks.get(contender) if peaks else None
        if peak is not None:
            found[contender]["peak_mib"] = peak / 2**20
        if contender in errors:
            loss_error, error = errors[contender]
            most_loss_error, most_error = _MOST_ERROR["bf16" if contender.endswith("bf16") else "fp32"]
            counts = loss_error <= most_loss_error and error <= most_error  # so written that NaN is out of bounds
            note = "" if counts else "error out of bounds"
            found[contender] |= {"relative_error": error, "loss_error": loss_error, "counts": counts, "note": note}
    result = {"case": name, "workload": _size(head, speakers, batch), "aa_spread": spread, "contenders": found}
    figures = _figures(found, head)
    if peaks is None:
        figures = [dataclasses.replace(figure, at_least=None) for figure in figures]
    return comparison.finish(result, figures)


def _apart(
    names: Sequence[str], head: Head, speakers: int, batch: int, repeats: int
) -> tuple[dict[str, Timing], float]:
    """Times of contenders in processes of their own: what one frees would else be what another gets."""
    with contextlib.ExitStack() as stack:
        clocks = {}
        for name in names:
            options = {"name": name, "head": head, "speakers": speakers, "batch": batch}
            worker = stack.enter_context(Worker(_BUILDER, options, threads=_THREADS, keep_memory=False))
            if worker.absent:
                raise SystemExit(f"{name}: {worker.absent}")
            clocks[name] = worker.seconds
        return timing.in_turns(clocks, repeats=repeats)


def contender(name: str, head: Head, speakers: int, batch: int) -> Contender:
    """What a worker times."""
    torch.set_num_threads(_THREADS)
    call = {**_contenders(head, speakers, batch), **_yardsticks(head, speakers, batch)}[name]
    call()
    return Contender(call)


def _yardsticks(head: Head, speakers: int, batch: int) -> dict[str, Callable[[], object]]:
    x, weight, target = inputs(head, speakers, batch)
    found: dict[str, Callable[[], object]] = {"products": _products(x, weight)}
    if head.subcenters == 1 and hasattr(F, "linear_cross_entropy"):
        plain = functools.partial(heads.plain_softmax, target=target, head=head)
        found["plain softmax"] = _with_gradients(plain, x, weight)
    return found


def _figures(found: Mapping[str, Mapping[str, Any]], head: Head) -> list[Figure]:
    times = {name: row["median_ms"] for name, row in found.items() if row.get("counts", True)}
    goals = {
        ("eager, over all classes", "native fp32"): 4.0 if head.subcenters == 1 else 3.0,
        ("eager, on targets", "native fp32"): 1.15,
        ("torch.compile, on targets", "native fp32"): 1.15,
        ("eager, on targets", "native bf16"): 2.0,
        ("torch.compile, on targets", "native bf16"): 2.0,
        ("products", "native fp32"): None,
        ("plain softmax", "native fp32"): None,
    }
    # A contender of this project that is out of bounds misses its goals.
    figures = [
        Figure(f"{peer} / {ours}", times[peer] / times.get(ours, math.inf), goal)
        for (peer, ours), goal in goals.items()
        if peer in times
    ]
    for ours in ("native fp32", "native bf16"):
        mine, eager = (found.get(name, {}).get("peak_mib") for name in (ours, "eager, over all classes"))
        if mine is not None and eager is not None:
            figures.append(Figure(f"{ours} / eager, peak memory, %", 100 * mine / eager, at_most=5))
    return figures


def _row_alone(
    speakers: int, batch: int, calls: dict[str, Call], peaks: Mapping[str, int | None], repeats: int
) -> dict[str, Any]:
    head = Head(1, 0)
    timings, spread = timing.interleaved(calls, repeats=repeats)
    found = {name: time.to_dict() for name, time in timings.items()}
    figures = []
    for name, peak in peaks.items():
        if peak is not None:
            found[name]["peak_mib"] = peak / 2**20
            held = peak + 2 * 4 * _SIZE * speakers
            figures.append(Figure("weights, gradients and peak, GB", 1e-9 * held, at_most=8))
    result = {"case": "1 center", "workload": _size(head, speakers, batch), "aa_spread": spread, "contenders": found}
    return comparison.finish(result, figures)


def _size(head: Head, speakers: int, batch: int) -> str:
    return f"{speakers} speakers, batch {batch}, {_SIZE} values"


def _contenders(head: Head, speakers: int, batch: int) -> dict[str, Call]:
    x, weight, target = inputs(head, speakers, batch)
    written = {
        "eager, over all classes": heads.over_all_classes,
        "eager, on targets": heads.on_targets,
        "torch.compile, on targets": torch.compile(heads.on_targets, dynamic=False),
    }
    calls = {f"native {precision}": _call(head, speakers, batch, precision) for precision in ("fp32", "bf16")}
    for name, function in written.items():
        calls[name] = _with_gradients(functools.partial(function, target=target, head=head), x, weight)
    return calls


def _call(head: Head, speakers: int, batch: int, precision: str) -> Call:
    x, weight, target = inputs(head, speakers, batch)
    settings = _form(head)._asdict()

    def loss(x: Tensor, weight: Tensor) -> Any:
        return functional.margin_softmax_loss(x, weight, target, precision=precision, backend="native", **settings)

    return _with_gradients(loss, x, weight)


def _form(head: Head) -> MarginForm:
    return MarginForm(
        margin=head.margin,
        scale=head.scale,
        num_subcenters=head.subcenters,
        topk=head.topk,
        topk_margin=head.topk_margin,
    )


def _with_gradients(loss: Callable[..., Tensor], x: Tensor, weight: Tensor) -> Call:
    leaves = [value.detach().requires_grad_() for value in (x, weight)]

    def call() -> tuple[Tensor, ...]:
        found = loss(*leaves)
        return (found.detach(), *torch.autograd.grad(found, leaves))

    return call


def _exact(head: Head, speakers: int, batch: int) -> tuple[Tensor, ...]:
    x, weight, target = inputs(head, speakers, batch)
    return _with_gradients(
        lambda x, w: definition(x, w, target, None, _form(head)).loss.mean(), x.double(), weight.double()
    )()


def _errors(got: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> tuple[float, float]:
    """Of the loss, and of the gradients relative to their norm."""
    errors = [float((one - other).norm() / other.norm()) for one, other in zip(got[1:], exact[1:], strict=True)]
    return float(abs(got[0] - exact[0])), max(errors)


def _products(x: Tensor, weight: Tensor) -> Callable[[], object]:
    grad = torch.randn(len(x), len(weight), generator=torch.Generator().manual_seed(1))

    def run() -> object:
        return x @ weight.T, grad.T @ x, grad @ weight

    return run


def _peaks(calls: Mapping[str, Call], head: Head, speakers: int) -> dict[str, int | None]:
    """Bytes that each needs above weights and their gradients."""
    kept = 4 * _SIZE * speakers * head.subcenters
    found = {}
    for name, call in calls.items():
        call()  # compiles, and starts the threads
        peak = memory.peak_bytes(call)
        found[name] = None if peak is None else peak - kept
    return found


if __name__ == "__main__":
    main()
