"""A training step of ECAPA-TDNN, from features to changed weights, beside plain torch.

    python -m benchmarks.models.bench_ecapa_training [--out FILE] [--repeats N] [--channels C ...] [--batch B]

Features are those of the speech in the folder SPKFAST_SPEECH, or of the synthetic corpus.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import multiprocessing
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from benchmarks import comparison, memory, timing
from benchmarks.machine import describe_machine
from benchmarks.models.bench_ecapa_inference import features_of_speech
from benchmarks.peers import contenders, ecapa
from benchmarks.peers.worker import Worker
from benchmarks.timing import Figure

_THREADS, _FRAMES, _CLASSES, _EMBEDDING = 2, 200, 64, 192
_PAUSE_SECONDS = 0.02  # before each turn: threads of the contender before it stop spinning

# What loss and gradients must keep for a time to count. Plain torch has, at 512 channels and a batch of 32: gradients
# off by 6e-4 in float32 and 0.10 (cosine 0.995) under autocast, the loss by 2e-7 and 6e-4 (4e-3 in small networks).
_MOST_ERROR = {"fp32": 2.5e-3, "bf16": 0.2}
_LEAST_COSINE = {"fp32": 0.99999, "bf16": 0.99}
_MOST_LOSS_ERROR = {"fp32": 1e-6, "bf16": 1e-2}
# Contenders that are given the network as no toolkit writes it, with the attention's context multiplied once.
_ONCE = ", context once"

_REMARK = (
    "A step is forward pass, cross entropy of cosines with fixed directions, backward pass and SGD with momentum; "
    "batch norm takes the statistics of the batch, bf16 is autocast. Every contender ran in a process of its own; a "
    "turn is one step that does not count and then one that does. GFLOP/s are those of the least products of a step, "
    "for all contenders alike: forward, for the gradients of weights, and for those of inputs except of the first "
    "layer's. Errors are those of the first step against the plain network in float64: of the gradients of all "
    "parameters together, relative to their norm and as their cosine, and of the loss, relative to it. Those of "
    "float32 gradients are mostly those of ReLU: about one value in four million lies on the other side of 0 than in "
    "float64, which turns a gradient on or off. What leaves the bounds of its precision (gradients "
    + " and ".join(f"{error:g} in {precision}" for precision, error in _MOST_ERROR.items())
    + ", four and two times what plain torch has) counts in no figure. Memory is the peak of what a step grows the "
    "process by, gradients included, and not weights and momentum; it was taken in yet another process, with the "
    "allocator as it is delivered. The plain network is as toolkits write it; where marked "
    f"*{_ONCE.strip(', ')}* its attention multiplies mean and deviation of the utterance once in place of once per "
    "frame, as spkfast does."
)


class _Entry(NamedTuple):
    """How a contender is made: a function of :mod:`benchmarks.peers.contenders` and its keywords."""

    precision: str
    function: str
    options: Mapping[str, Any]


def main() -> None:
    """Prints times and goals; with ``--out`` writes JSON too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10, help="rounds, each contender once a round")
    parser.add_argument(
        "--channels", type=int, nargs="+", default=[512], help="512 at a batch of 32 take 14 GiB in all"
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()

    torch.set_num_threads(_THREADS)
    machine = describe_machine()
    features = features_of_speech(args.batch)[:, :_FRAMES].contiguous()
    results = [row(features, channels, args.repeats) for channels in args.channels]
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        record = {"op": "ecapa_training", "machine": machine, "threads": _THREADS, "remark": _REMARK}
        args.out.write_text(json.dumps(record | {"results": results}, indent=1) + "\n")


def row(features: Tensor, channels: int, repeats: int) -> dict[str, Any]:
    """Times all contenders on one batch of features (B, T, 80), for the record."""
    batch, frames, _ = features.shape
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        exact = _prepare(folder, channels, features)
        workers: dict[str, Worker] = {}
        peaks: dict[str, int | None] = {}
        absent: dict[str, str] = {}
        entries = _entries(folder, channels, batch, frames)
        for contender, entry in entries.items():
            builder = f"{contenders.__name__}:{entry.function}"
            worker = stack.enter_context(Worker(builder, entry.options, threads=_THREADS))
            if worker.absent:
                absent[contender] = worker.absent
                continue
            workers[contender] = worker
            if worker.output is not None:
                peaks[contender] = _peak_elsewhere(entry)
        clocks = {name: functools.partial(_turn, worker) for name, worker in workers.items()}
        timings, spread = timing.in_turns(clocks, repeats=repeats)
        flops = flops_of_step(batch, frames, channels)
        rows: dict[str, dict[str, Any]] = {}
        for contender, worker in workers.items():
            seconds = timings[contender].median
            rows[contender] = timings[contender].to_dict() | {"gflop_per_s": 1e-9 * flops / seconds}
            if worker.output is None:
                continue
            rows[contender]["utterances_per_s"] = batch / seconds
            if (peak := peaks[contender]) is not None:
                rows[contender]["peak_mib"] = peak / 2**20
            rows[contender] |= assess(worker.output, exact, entries[contender].precision, worker.note)
    result = {
        "case": f"{channels} channels",
        "workload": f"{batch} x {frames} frames",
        "aa_spread": spread,
        "contenders": rows,
        "absent": absent,
    }
    return comparison.finish(result, figures_of(rows))


def flops_of_step(batch: int, frames: int, channels: int) -> int:
    """Operations of the products of a step; those of the input's gradient are not needed for the features."""
    first, *others = (m * k * n for m, k, n in ecapa.products(batch, frames, channels))
    return 2 * (2 * first + 3 * sum(others))


def assess(got: NDArray[np.float32], exact: NDArray[np.float64], precision: str, note: str) -> dict[str, Any]:
    """Errors of a loss and the gradients after it, whether they keep the bounds, and the note that says so."""
    values = got.astype(np.float64)
    loss_error = float(abs(values[0] - exact[0]) / abs(exact[0]))
    gradients, wanted = values[1:], exact[1:]
    norm = np.linalg.norm(wanted)
    error = float(np.linalg.norm(gradients - wanted) / norm)
    cosine = float(gradients @ wanted / (np.linalg.norm(gradients) * norm))
    # So written that NaN is out of bounds.
    kept = {
        "gradients": error <= _MOST_ERROR[precision] and cosine >= _LEAST_COSINE[precision],
        "loss": loss_error <= _MOST_LOSS_ERROR[precision],
    }
    notes = [note] if note else []
    notes += [f"error of the {name} out of bounds" for name, inside in kept.items() if not inside]
    return {
        "relative_error": error,
        "cosine": cosine,
        "loss_error": loss_error,
        "counts": all(kept.values()),
        "note": "; ".join(notes),
    }


def figures_of(rows: Mapping[str, Mapping[str, Any]]) -> list[Figure]:
    """Ratios to the peers, of contenders whose errors are in bounds."""
    times = {name: row["median_ms"] for name, row in rows.items() if row.get("counts", True)}
    wanted = [
        ("torch eager", "fp32", 1.25),
        ("torch.compile", "fp32", 1.1),
        ("torch eager", "bf16", 1.3),
        ("torch.compile", "bf16", None),
    ]
    pairs = [(f"{peer} {precision}", f"spkfast {precision}", at_least) for peer, precision, at_least in wanted]
    # The network as toolkits write it has goals, the same that spkfast computes has none.
    pairs += [(peer + _ONCE, ours, None) for peer, ours, _ in pairs]
    pairs += [(f"products {precision}", f"spkfast {precision}", None) for precision in ("fp32", "bf16")]
    # A contender of this project that is absent or out of bounds misses its goals.
    return [
        Figure(f"{peer} / {ours}", times[peer] / times.get(ours, math.inf), at_least)
        for peer, ours, at_least in pairs
        if peer in times
    ]


def _turn(worker: Worker) -> float:
    time.sleep(_PAUSE_SECONDS)
    return worker.seconds()


def _peak_elsewhere(entry: _Entry) -> int | None:
    """Bytes that a step needs, in a new process: workers keep memory that was freed, which hides and adds some."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak, entry).result()


def _peak(entry: _Entry) -> int | None:
    step = getattr(contenders, entry.function)(**entry.options).call
    step()  # allocates the momentum
    return memory.peak_bytes(step)


def _prepare(folder: Path, channels: int, features: Tensor) -> NDArray[np.float64]:
    """Writes what workers read, and gives loss and gradients in float64."""
    generator = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(_CLASSES, _EMBEDDING, generator=generator))
    labels = torch.randint(_CLASSES, (len(features),), generator=generator)
    weights = ecapa.random_weights(channels, features)
    torch.save(weights, folder / "weights.pt")
    torch.save((features, directions, labels), folder / "batch.pt")
    net = ecapa.Ecapa(channels).double()
    net.load_state_dict(weights)
    loss = contenders.training_loss(net.train()(features.double()), directions, labels)
    return contenders.loss_and_gradients(net, loss).numpy()


def _entries(folder: Path, channels: int, batch: int, frames: int) -> dict[str, _Entry]:
    network = {"folder": folder, "channels": channels, "threads": _THREADS}
    sizes = {"batch": batch, "frames": frames, "channels": channels, "threads": _THREADS}
    entries = {}
    for precision in ("fp32", "bf16"):
        entries[f"spkfast {precision}"] = _Entry(precision, "spkfast_training", network | {"precision": precision})
    for once, suffix in ((False, ""), (True, _ONCE)):
        for compiled, name in ((False, "torch eager"), (True, "torch.compile")):
            for precision in ("fp32", "bf16"):
                options = network | {"precision": precision, "once": once, "compiled": compiled}
                entries[f"{name} {precision}{suffix}"] = _Entry(precision, "torch_training", options)
    for precision in ("fp32", "bf16"):
        entries[f"products {precision}"] = _Entry(precision, "training_products", sizes | {"precision": precision})
    return entries


if __name__ == "__main__":
    main()
