"""A training step of ECAPA-TDNN from waveforms to changed weights, beside eager torch that augments crop by crop.

    python -m benchmarks.models.bench_training_pipeline [--out FILE] [--repeats N] [--sizes NAME ...]
        [--precisions NAME ...] [--rows NAME ...]

Needs the speech, noise and impulse responses of the folder SPKFAST_SPEECH.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks import comparison, timing
from benchmarks.data import bench_augmentation
from benchmarks.machine import describe_machine
from benchmarks.models.bench_ecapa_training import assess
from benchmarks.peers import pipeline
from benchmarks.peers.pipeline import Size
from benchmarks.peers.worker import Worker
from benchmarks.timing import Figure, Timing
from spkfast.memory import keep_freed_memory

_THREADS = 2
_PAUSE_SECONDS = 0.02  # before each turn: threads of the contender before it stop spinning
_SIZES = {
    "small": Size(128, 384, 64, 64, batch=64, seconds=1.8, speakers=205),
    "standard": Size(512, 1536, 128, 128, batch=32, seconds=2.0, speakers=5994),
}
_TRIALS = 3  # rounds in which ways to arrange the usual way are tried
# Crops of speed 1 are the same to rounding both ways; of others the usual way's filter is another.
_MOST_ERROR, _LEAST_COSINE = 1e-5, 0.99

_OURS, _USUAL, _GIVEN = "spkfast", "usual way", ", from features"

_REMARK = (
    "A step takes crops of int16 to changed weights: a change of speed (0.9, 1 or 1.1), a noise or a room response for "
    "60 % of them, 80 mel features of Kaldi without their mean, ECAPA-TDNN, AAM-softmax, backward pass, clipping of "
    f"gradients at a norm of {pipeline.CLIP:g}, SGD with Nesterov momentum and weight decay; loss and norm are read at "
    "its end, by spkfast accuracy and target cosine too. *Small* is the network of `configs/mini.yaml`; bf16 is "
    "autocast. spkfast augments whole batches in the training process. The usual way augments crop by crop with scipy, "
    "noises and responses being in memory; its network, head and clipping are plain eager torch, its optimiser is the "
    "fastest that torch has for the network. Draws are part of spkfast's time, and not of the usual way's. It makes "
    "features by kaldi-native-fbank or plain torch where a crop is augmented, or by plain torch of a batch in the "
    "training process, beside which it has up to two loader processes of one thread. Each such arrangement is tried "
    f"for {_TRIALS} rounds, and the fastest is the usual way of a row, named in its note. Crops are decoded "
    "beforehand, or FLAC, which spkfast decodes in one loader process and the usual way where it augments. Loader "
    f"processes read up to {pipeline.PREFETCH} batches ahead, and rest while others have their turn. Contenders ran in "
    "processes of their own; a turn is one step that does not count and then those that do, of which a time is the "
    "mean. spkfast keeps freed memory in the process, as `spkfast train` has it; the usual way has the allocator as "
    "it is delivered, which takes fresh pages for each large tensor. Where *memory* is *kept* the usual way keeps it "
    "too, which few people know to ask for; these rows have no goals. *From features* is a step without what comes "
    "before the network. The "
    "largest error is the difference of crops of speed 1 augmented in both ways, relative to the largest sample; crops "
    f"of other speeds pass another filter in each, and have a cosine of at least {_LEAST_COSINE:g}. The other errors "
    "are those of the first step, from the same features and weights, against the definition in float64: of the "
    "gradients of all parameters together, relative to their norm and as their cosine, and of the loss; notes tell the "
    "error of the features that each makes of the same waveforms. Rows of parts time spkfast's step in one process, "
    "from the end of one part to that of the next."
)


class _Row(NamedTuple):
    """How a network is timed.

    Attributes:
        source: What crops are read from.
        keep_memory: Whether the usual way too keeps memory that it freed; see :func:`spkfast.memory.keep_freed_memory`.
        goal: Least ratio of the usual way and spkfast, or None.
    """

    source: pipeline.Source
    keep_memory: bool = False
    goal: float | None = None


_ROWS = {
    "crops decoded": _Row("decoded", goal=1.5),
    "FLAC": _Row("FLAC"),
    "crops decoded, memory kept": _Row("decoded", keep_memory=True),
}


class _Prepared(NamedTuple):
    """What contenders of one size share.

    Attributes:
        folder: What they read.
        size: The network and its batches.
        exact: Loss and gradients of the first step in float64.
        error: Largest difference of augmented crops.
    """

    folder: Path
    size: Size
    exact: np.ndarray
    error: float

    @property
    def workload(self) -> str:
        """The size as text."""
        return f"{self.size.batch} x {self.size.seconds:g} s, {self.size.classes} classes"


class _Arrangement(NamedTuple):
    """What makes the features of the usual way, and how many loader processes it has."""

    features: pipeline.Features
    workers: int

    def __str__(self) -> str:
        return f"features by {self.features}, loader processes: {self.workers}"


_ARRANGEMENTS = [
    *(_Arrangement("torch, of a batch", workers) for workers in (0, 1, 2)),
    _Arrangement("torch, of a crop", 1),
    *(_Arrangement("kaldi-native-fbank, of a crop", workers) for workers in (1, 2)),
]


def main() -> None:
    """Prints times and goals; with ``--out`` writes JSON too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10, help="rounds, each contender once a round")
    parser.add_argument("--steps", type=int, default=2, help="steps of a turn that count")
    parser.add_argument("--sizes", choices=[*_SIZES], nargs="+", default=[*_SIZES])
    parser.add_argument("--precisions", choices=["fp32", "bf16"], nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--rows", choices=[*_ROWS], nargs="+", default=[*_ROWS])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    root = os.environ.get("SPKFAST_SPEECH")
    if not root:
        raise SystemExit("nothing measured: SPKFAST_SPEECH names no folder of speech")

    torch.set_num_threads(_THREADS)
    keep_freed_memory()  # parts of a step are timed in this process
    machine = describe_machine()
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = bench_augmentation.prepare(Path(root), Path(temporary))
        for key in args.sizes:
            prepared = prepare(folder, _SIZES[key])
            for precision in args.precisions:
                for name in args.rows:
                    case = f"{key}, {precision}, {name}"
                    results.append(row(prepared, case, precision, _ROWS[name], args.repeats, args.steps))
                case = f"{key}, {precision}, parts of spkfast's step"
                results.append(parts(prepared, case, precision, args.repeats))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        record = {"op": "training_pipeline", "machine": machine, "threads": _THREADS, "remark": _REMARK}
        args.out.write_text(json.dumps(record | {"results": results}, indent=1) + "\n")


def prepare(folder: Path, size: Size) -> _Prepared:
    """Writes what contenders of one size read.

    Raises:
        SystemExit: If the augmented crops of the two ways are not the same ones.
    """
    pipeline.prepare(folder, size)
    batches = pipeline.load_crops(folder).batches
    augment = pipeline.augment_of(folder, size)
    ours = [augment(*batch[:3], batch.keys) for batch in batches]
    items = pipeline.Items(folder, size, None, "decoded")
    theirs = np.stack([items.waveform(index) for index in range(len(items))])
    speeds = np.array([item.speed for item in items.items])
    error, cosine = differences(torch.cat(ours).numpy(), theirs, speeds)
    if not (error <= _MOST_ERROR and cosine >= _LEAST_COSINE):
        raise SystemExit(
            f"not timed: crops of the two ways differ by {error:.1e}, or those of other speeds: their lowest cosine is "
            f"{cosine:.4f}"
        )
    return _Prepared(folder, size, pipeline.prepare_check(folder, size, ours[0], batches[0].labels), error)


def differences(ours: np.ndarray, theirs: np.ndarray, speeds: np.ndarray) -> tuple[float, float]:
    """Largest difference of crops of speed 1, relative to the largest sample, and lowest cosine of the others."""
    same = speeds == 1
    error = float(np.abs(ours - theirs)[same].max(initial=0) / np.abs(theirs).max())
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    cosines = (ours * theirs).sum(axis=1) / norms
    return error, float(cosines[~same].min(initial=1))


def row(prepared: _Prepared, case: str, precision: str, kind: _Row, repeats: int, steps: int) -> dict[str, Any]:
    """Times one network at one precision, for the record.

    Args:
        prepared: What contenders share.
        case: What it is called.
        precision: ``fp32`` or ``bf16``.
        kind: How it is timed.
        repeats: Rounds.
        steps: Steps of a turn that count.
    """
    folder, size, exact, error = prepared
    common = {"folder": folder, "size": size, "precision": precision, "threads": _THREADS}
    with contextlib.ExitStack() as stack:

        def start(function: str, **options: Any) -> Worker:
            builder = f"{pipeline.__name__}:{function}"
            # As 'spkfast train' has it.
            keep = kind.keep_memory or function == "spkfast"
            worker = Worker(builder, common | options, threads=_THREADS, keep_memory=keep)
            return stack.enter_context(worker)

        tried = {str(one): start("usual_way", **one._asdict(), source=kind.source) for one in _ARRANGEMENTS}
        absent = {f"tried: {one}": worker.absent for one, worker in tried.items() if worker.absent}
        trials, _ = timing.in_turns(
            {one: functools.partial(_turn, worker, steps) for one, worker in tried.items() if not worker.absent},
            repeats=_TRIALS, warm_up=0,
        )  # fmt: skip
        best = min(trials, key=lambda one: trials[one].median)
        for one, worker in tried.items():
            if one != best:
                worker.close()
        workers = {_OURS: start("spkfast", source=kind.source), _USUAL: tried[best]}
        if kind.source == "decoded":
            workers[_OURS + _GIVEN] = start("spkfast", given=True)
            workers[_USUAL + _GIVEN] = start("usual_way", given=True)
        for contender, worker in workers.items():
            if worker.absent:
                raise SystemExit(f"{contender}: {worker.absent}")
        clocks = {one: functools.partial(_turn, worker, steps) for one, worker in workers.items()}
        timings, spread = timing.in_turns(clocks, repeats=repeats)
    rows: dict[str, dict[str, Any]] = {}
    for contender, worker in workers.items():
        rows[contender] = timings[contender].to_dict() | {"crops_per_s": size.batch / timings[contender].median}
        note = f"{best}, {worker.note}" if contender == _USUAL else worker.note
        assert worker.output is not None
        rows[contender] |= assess(worker.output, exact, precision, note) | {"max_error": error}
    tries = {f"tried: {one}": trial.to_dict() for one, trial in trials.items()}
    result = {
        "case": case,
        "workload": prepared.workload,
        "aa_spread": spread,
        "contenders": rows | tries,
        "absent": absent,
    }
    return comparison.finish(result, figures_of(rows, kind.goal))


def figures_of(rows: Mapping[str, Mapping[str, Any]], goal: float | None) -> list[Figure]:
    """Ratios of contenders whose errors are in bounds; where ours are not, the goal is missed."""
    times = {name: row["median_ms"] for name, row in rows.items() if row["counts"]}
    pairs = [(_USUAL, _OURS, goal), (_USUAL + _GIVEN, _OURS + _GIVEN, None), (_OURS, _OURS + _GIVEN, None)]
    return [
        Figure(f"{slower} / {faster}", times[slower] / times.get(faster, math.inf), at_least)
        for slower, faster, at_least in pairs
        if slower in times and faster in rows
    ]


def parts(prepared: _Prepared, case: str, precision: str, repeats: int) -> dict[str, Any]:
    """Times the parts of a step of this project in this process, for the record."""
    torch.set_num_threads(_THREADS)
    step, update, features = pipeline.spkfast_step(prepared.folder, prepared.size, precision)
    ends: list[tuple[str, float]] = []

    def mark(part: str) -> None:
        ends.append((part, time.perf_counter()))

    features.augment.register_forward_hook(lambda *_: mark("augmentation"))
    update.task.net.register_forward_hook(lambda *_: mark("network, forward"))
    seconds: dict[str, list[float]] = {}
    for repeat in range(1 + 2 * repeats):
        ends.clear()
        mark("")
        step(mark)
        if not repeat:
            continue
        for (_, before), (part, after) in itertools.pairwise(ends):
            seconds.setdefault(part, []).append(after - before)
        seconds.setdefault("the whole step", []).append(ends[-1][1] - ends[0][1])
    whole = seconds["the whole step"]
    result = {
        "case": case,
        "workload": prepared.workload,
        "aa_spread": abs(statistics.median(whole[1::2]) / statistics.median(whole[::2]) - 1),
        "contenders": {part: Timing(tuple(values)).to_dict() for part, values in seconds.items()},
    }
    return comparison.finish(result, [])


def _turn(worker: Worker, steps: int) -> float:
    time.sleep(_PAUSE_SECONDS)
    return worker.seconds(steps)


if __name__ == "__main__":
    main()
