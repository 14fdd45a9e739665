"""A row of a benchmark whose contenders return tensors: checked first, then timed against one another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import memory, timing
from benchmarks.timing import Figure

# Both on average over an output, as the largest error is that of one value that happens to be badly conditioned; that
# one may be _OUTLIER times the bound of the average, which a wrong value exceeds.
_OURS = 4.0  # times the error of the float32 definition
_OUTLIER = 1000.0
_PEERS = 1e-4  # of the standard deviation of the output, beside the rounding of its type

REMARK = (
    "An error is the largest of any output, gradients included, as a share of that output's largest value. Memory is "
    "the peak of what the process grew by, inputs and their gradients left out."
)

Call = Callable[[], Sequence[Tensor]]


def call_of(function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor | None], *, gradient: bool) -> Call:
    """The function on these inputs; with ``gradient`` the gradients of all floating-point inputs follow its outputs.

    The gradients of its two outputs are random, of the shape (B, C) of the first two axes of the first input.
    """
    if not gradient:
        return lambda: function(*inputs)
    values = [value if value is None else value.detach() for value in inputs]
    leaves = [value.requires_grad_() for value in values if value is not None and value.is_floating_point()]
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(leaves[0].shape[:2], generator=generator) for _ in range(2)]

    def call() -> list[Tensor]:
        outputs = function(*values)
        return [*outputs, *torch.autograd.grad(outputs, leaves, [grad.to(outputs[0]) for grad in grads])]

    return call


def peaks_of(contenders: Mapping[str, Call], *, gradients_of: Sequence[Tensor] = ()) -> dict[str, int | None]:
    """Bytes that each needs above its inputs and their gradients; before ``keep_freed_memory``."""
    kept = sum(value.nbytes for value in gradients_of)
    peaks = {}
    for name, call in contenders.items():
        call()  # compiles, and starts the threads
        peak = memory.peak_bytes(call)
        peaks[name] = None if peak is None else peak - kept
    return peaks


def compare(
    case: str,
    workload: object,
    contenders: Mapping[str, Call],
    *,
    exact: Sequence[Tensor],
    definition: Sequence[Tensor],
    repeats: int,
    calls: int = 1,
    parts: Mapping[str, Call] | None = None,
    bytes_moved: float | None = None,
    flops: float | None = None,
    peaks: Mapping[str, int | None] | None = None,
) -> dict[str, Any]:
    """Checks and times contenders, for the record; figures are for the caller to add.

    Args:
        case: What is computed, in words.
        workload: Its size, printed with ``str``.
        contenders: Calls by name, ours first; those whose name starts with ``native`` are ours.
        exact: Their outputs in float64.
        definition: Their outputs by the float32 definition, from whose errors the bound of ours follows.
        repeats: Rounds.
        calls: Calls of a contender in its turn.
        parts: Calls that compute something else, as a yardstick: timed with the others, not checked.
        bytes_moved: Least traffic, every input read once and every output written once.
        flops: Operations of a good algorithm.
        peaks: Bytes by contender.
    """
    errors = {name: _checked(name, call(), exact, definition) for name, call in contenders.items()}
    timings, spread = timing.interleaved({**contenders, **(parts or {})}, repeats=repeats, calls=calls)
    rows = {}
    for name, time in timings.items():
        row: dict[str, Any] = time.to_dict()
        if bytes_moved is not None:
            row["gb_per_s"] = 1e-9 * bytes_moved / time.median
        if flops is not None:
            row["gflop_per_s"] = 1e-9 * flops / time.median
        if peaks and peaks.get(name) is not None:
            row["peak_mib"] = peaks[name] / 2**20
        if name in errors:
            row["max_error"] = errors[name]
        rows[name] = row
    return {"case": case, "workload": str(workload), "aa_spread": spread, "contenders": rows, "figures": []}


def ratio(result: Mapping[str, Any], slower: str, faster: str, at_least: float | None = None) -> Figure:
    """How many times as long ``slower`` takes."""
    rows = result["contenders"]
    return Figure(f"{slower} / {faster}", rows[slower]["median_ms"] / rows[faster]["median_ms"], at_least)


def finish(result: dict[str, Any], figures: Sequence[Figure]) -> dict[str, Any]:
    """Puts the figures into the row, and prints it."""
    result["figures"] = [dataclasses.asdict(figure) for figure in figures]
    noisy = "  NOISY: repeat on an idle machine" if result["aa_spread"] > timing.NOISY else ""
    print(f"{result['case']}, {result['workload']}, A/A spread {100 * result['aa_spread']:.1f} %{noisy}")
    for name, row in result["contenders"].items():
        parts = [f"{row['median_ms']:9.3f} ms ({row['min_ms']:.3f} to {row['max_ms']:.3f})"]
        for key, text in (
            ("gb_per_s", "{:6.1f} GB/s"),
            ("gflop_per_s", "{:6.1f} GFLOP/s"),
            ("peak_mib", "{:7.1f} MiB"),
            ("max_error", "largest error {:.1e}"),
            ("relative_error", "relative error {:.1e}"),
            ("cosine", "lowest cosine {:.6f}"),
            ("note", "{}"),
        ):
            if row.get(key, "") != "":
                parts.append(text.format(row[key]))
        print(f"  {name:32} {', '.join(parts)}")
    for name, reason in result.get("absent", {}).items():
        print(f"  {name:32} absent: {reason}")
    for figure in figures:
        print(f"  {figure.name}: {figure.value:.2f} {f'({figure.goal}: {figure.verdict})' if figure.goal else ''}")
    return result


def _checked(name: str, got: Sequence[Tensor], exact: Sequence[Tensor], definition: Sequence[Tensor]) -> float:
    """Largest error of one contender; ends the program where it is wrong."""
    largest = 0.0
    for value, want, plain in zip(*([x.detach() for x in values] for values in (got, exact, definition)), strict=True):
        errors = (value.double() - want).abs()
        rounding = torch.finfo(value.dtype).eps * float(want.std())
        if name.startswith("native"):
            allowed = max(_OURS * float((plain.double() - want).abs().mean()), rounding)
        else:
            allowed = _PEERS * float(want.std()) + rounding
        if not float(errors.mean()) <= allowed:
            raise SystemExit(f"not timed: {name} errs by {errors.mean():.1e} on average, more than {allowed:.1e}")
        if not float(errors.max()) <= _OUTLIER * allowed:
            raise SystemExit(f"not timed: {name} errs by {errors.max():.1e}, more than {_OUTLIER * allowed:.1e}")
        largest = max(largest, float(errors.max() / want.abs().max()))
    return largest
