"""ECAPA-TDNN from features to embedding beside other runtimes.

    python -m benchmarks.models.bench_ecapa_inference [--out FILE] [--repeats N] [--channels C ...] [--batches B ...]

Features are those of the speech in the folder SPKFAST_SPEECH, or of the synthetic corpus. OpenVINO is a contender where
it is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import random
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import spkfast
from benchmarks import comparison, timing
from benchmarks.machine import describe_machine
from benchmarks.peers import ecapa, graphs
from benchmarks.peers.worker import Worker
from benchmarks.timing import Figure
from spkfast.data.audio import read_audio
from spkfast.data.lists import read_train_list
from spkfast.data.synthetic import make_corpus

_THREADS, _FRAMES, _CALIBRATION = 2, 300, 64
_PAUSE_SECONDS = 0.02  # before each turn: threads of the contender before it stop spinning

# What the embeddings must keep for a time to count.
_MOST_ERROR = {"fp32": 2e-5}
_LEAST_COSINE = {"bf16": 0.9995, "int8": 0.995}
# Contenders that are given the network as no toolkit writes it, with the attention's context multiplied once.
_ONCE = ", context once"

_REMARK = (
    "Every contender ran in a process of its own; a turn is one call that does not count and then those that do. "
    "GFLOP/s are those of the least products that give the embedding, for all contenders alike. Errors are those of "
    "the embeddings against the plain network in float64: of all together relative to their norm, and the lowest "
    "cosine of one; what leaves the bounds of its precision counts in no figure. Graphs are the plain network as "
    f"toolkits write it; in those marked *{_ONCE.strip(', ')}* the attention multiplies mean and deviation of the "
    "utterance once in place of once per frame, as spkfast does."
)


@dataclasses.dataclass(frozen=True)
class _Entry:
    """How a contender is made."""

    precision: str
    builder: str
    options: Mapping[str, Any]


def main() -> None:
    """Prints times and goals; with ``--out`` writes JSON too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10, help="rounds, each contender once a round")
    parser.add_argument("--channels", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()

    torch.set_num_threads(_THREADS)
    machine = describe_machine()
    utterances = features_of_speech(_CALIBRATION + max(args.batches))
    results = [row(utterances, channels, batch, args.repeats) for channels in args.channels for batch in args.batches]
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        record = {"op": "ecapa_inference", "machine": machine, "threads": _THREADS, "remark": _REMARK}
        args.out.write_text(json.dumps(record | {"results": results}, indent=1) + "\n")


def features_of_speech(count: int) -> Tensor:
    """Features (count, T, 80) of as many speakers."""
    spec = spkfast.frontend("wespeaker")
    samples = spec.frame_length + (_FRAMES - 1) * spec.frame_shift
    rows: dict[str, NDArray[np.float32]] = {}
    with contextlib.ExitStack() as stack:
        folder = Path(os.environ.get("SPKFAST_SPEECH", ""))
        if not (folder / "train_list.txt").is_file():
            folder = make_corpus(
                stack.enter_context(tempfile.TemporaryDirectory()) + "/corpus",
                num_speakers=count + 4, test_speakers=4, utterances_per_speaker=4,
            )  # fmt: skip
        utterances = read_train_list(folder / "train_list.txt")
        random.Random(0).shuffle(utterances)  # a list is in the order of its corpora
        for utterance in utterances:
            if utterance.speaker not in rows and len(rows) < count:
                waveform, rate = read_audio(folder / utterance.path, num_samples=samples)
                if len(waveform) == samples and rate == spec.sample_rate:
                    rows[utterance.speaker] = waveform
    if len(rows) < count:
        raise SystemExit(f"{folder} has {len(rows)} speakers with {_FRAMES} frames of speech, {count} are needed")
    features, _ = spkfast.functional.log_mel_fbank(torch.from_numpy(np.stack(list(rows.values()))), spec=spec)
    return features


def row(utterances: Tensor, channels: int, batch: int, repeats: int) -> dict[str, Any]:
    """Times all contenders on one size, for the record."""
    features, calibration = utterances[_CALIBRATION:][:batch], utterances[:_CALIBRATION]
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        exact = _prepare(folder, channels, features, calibration)
        workers: dict[str, Worker] = {}
        absent: dict[str, str] = {}
        entries = _entries(folder, channels, batch)
        for contender, entry in entries.items():
            worker = stack.enter_context(Worker(entry.builder, entry.options, threads=_THREADS))
            if worker.absent:
                absent[contender] = worker.absent
            else:
                workers[contender] = worker
        # In one turn as long as a batch of one takes, a busy moment of the machine would be the whole of it.
        clocks = {name: functools.partial(_turn, worker, 5 if batch == 1 else 1) for name, worker in workers.items()}
        timings, spread = timing.in_turns(clocks, repeats=repeats)
        flops = 2 * sum(m * k * n for m, k, n in ecapa.products(batch, _FRAMES, channels))
        rows = {
            name: timings[name].to_dict()
            | {"gflop_per_s": 1e-9 * flops / timings[name].median}
            | assess(worker.output, exact, entries[name].precision, worker.note)
            for name, worker in workers.items()
        }
    result = {
        "case": f"{channels} channels",
        "workload": f"{batch} x {_FRAMES} frames",
        "aa_spread": spread,
        "contenders": rows,
        "absent": absent,
    }
    return comparison.finish(result, figures_of(rows, channels, batch))


def assess(got: NDArray[np.float32] | None, exact: NDArray[np.float64], precision: str, note: str) -> dict[str, Any]:
    """Errors of embeddings (B, E), whether they keep the bounds of the precision, and the note that says so."""
    if got is None:
        return {"note": note} if note else {}
    got = got.astype(np.float64)
    error = float(np.linalg.norm(got - exact) / np.linalg.norm(exact))
    norms = np.linalg.norm(got, axis=1) * np.linalg.norm(exact, axis=1)
    cosine = float(((got * exact).sum(axis=1) / norms).min())
    # So written that NaN is out of bounds.
    counts = error <= _MOST_ERROR.get(precision, np.inf) and cosine >= _LEAST_COSINE.get(precision, -1)
    notes = [note] if note else []
    if not counts:
        notes.append("error out of bounds")
    return {"relative_error": error, "cosine": cosine, "counts": bool(counts), "note": "; ".join(notes)}


def figures_of(rows: Mapping[str, Mapping[str, Any]], channels: int, batch: int) -> list[Figure]:
    """Ratios to the peers, of contenders whose errors are in bounds."""
    times = {name: row["median_ms"] for name, row in rows.items() if row.get("counts", True)}
    # The network as toolkits write it has goals, the same that spkfast computes has none.
    best = functools.partial(_best, times)
    fp32 = 1.1 if (channels, batch) == (512, 1) else 1.0
    wanted = [
        ("best fp32 peer", best("fp32"), "spkfast fp32", fp32),
        ("openvino bf16", times.get("openvino bf16"), "spkfast bf16", 1.3 if channels == 512 else 1.12),
        ("bare products bf16", times.get("products bf16"), "spkfast bf16", 0.85),
        ("best int8 peer", best("int8"), "spkfast int8", 1.3),
        ("best bf16 peer", best("bf16"), "spkfast bf16", None),
        *(
            (f"best {precision} peer{_ONCE} or not", best(precision, True), f"spkfast {precision}", None)
            for precision in ("fp32", "bf16", "int8")
        ),
    ]
    # A contender of this project that is absent or out of bounds misses its goals.
    return [
        Figure(f"{name} / {ours}", peer / times.get(ours, math.inf), at_least)
        for name, peer, ours, at_least in wanted
        if peer is not None
    ]


def _best(times: Mapping[str, float], precision: str, once: bool = False) -> float | None:
    peers: Iterable[float] = (
        time
        for name, time in times.items()
        if f" {precision}" in name and not name.startswith(("spkfast", "products")) and (once or _ONCE not in name)
    )
    return min(peers, default=None)


def _turn(worker: Worker, calls: int) -> float:
    time.sleep(_PAUSE_SECONDS)
    return worker.seconds(calls)


def _prepare(folder: Path, channels: int, features: Tensor, calibration: Tensor) -> NDArray[np.float64]:
    """Writes what workers read, and gives the embeddings in float64."""
    weights = ecapa.random_weights(channels, calibration)
    batches = calibration.unfold(0, len(features), len(features)).movedim(-1, 1).contiguous()  # [N, B, T, M]
    torch.save(weights, folder / "weights.pt")
    torch.save(features, folder / "features.pt")
    torch.save(batches, folder / "calibration.pt")
    for name, once in (("plain", False), ("once", True)):
        net = ecapa.Ecapa(channels, context_once=once).eval()
        net.load_state_dict(weights)
        graphs.export(net, features, folder / f"{name}.onnx")
        graphs.quantise(folder / f"{name}.onnx", batches, folder / f"{name}_int8.onnx")
    exact = ecapa.Ecapa(channels).double().eval()
    exact.load_state_dict(weights)
    with torch.inference_mode():
        return exact(features.double()).numpy()


def _entries(folder: Path, channels: int, batch: int) -> dict[str, _Entry]:
    network = {"folder": folder, "channels": channels, "threads": _THREADS}
    entries = {}

    def add(name: str, precision: str, function: str, /, **options: Any) -> None:
        entries[name] = _Entry(precision, f"benchmarks.peers.contenders:{function}", options)

    for precision in ("fp32", "bf16", "int8"):
        add(f"spkfast {precision}", precision, "spkfast", **network, precision=precision)
    for precision in ("fp32", "bf16"):
        add(f"torch eager {precision}", precision, "torch_eager", **network, precision=precision)
        add(f"torch.compile {precision}", precision, "torch_compile", **network, precision=precision)
    for graph, suffix in (("plain", ""), ("once", _ONCE)):
        runtime = {"folder": folder, "threads": _THREADS}
        for precision, file in (("fp32", f"{graph}.onnx"), ("int8", f"{graph}_int8.onnx")):
            add(f"onnxruntime {precision}{suffix}", precision, "onnxruntime", **runtime, graph=file)
        for precision, file, hint in (
            ("fp32", f"{graph}.onnx", "f32"),
            ("bf16", f"{graph}.onnx", "bf16"),
            # What is not quantised stays in fp32.
            ("int8", f"{graph}_int8.onnx", "f32"),
        ):
            add(f"openvino {precision}{suffix}", precision, "openvino", **runtime, graph=file, precision=hint)
    sizes = {"batch": batch, "frames": _FRAMES, "channels": channels, "threads": _THREADS}
    for name, form in (("fp32 by torch.mm", "mm"), ("fp32", "fp32"), ("bf16", "bf16"), ("int8", "int8")):
        add(f"products {name}", form, "products", **sizes, form=form)
    return entries


if __name__ == "__main__":
    main()
