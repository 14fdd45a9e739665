"""EER of one trained model through its exported graphs at every precision, on real speech.

    python -m benchmarks.accuracy.exports --data FOLDER --out RESULT.json [--model MODEL] [--precisions NAME ...]

MODEL is a bundled one, or a training run of mini.yaml, of which the record tells how it differs from that recipe. The
folder holds ``train_list.txt`` and ``trials*.txt``. Each graph takes waveforms, padded in batches, and runs in
onnxruntime; of half precision every tensor is rounded as if it were kept in it, as a CPU has no products of it. int8 is
calibrated on utterances of the training list. Differences are against PyTorch's modules in float32, and paired over
speakers.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.accuracy import bundle, precisions
from benchmarks.machine import describe_machine
from spkfast import SpeakerEncoder
from spkfast.data.lists import read_trials, trial_paths
from spkfast.export.onnx import emulated, feed, session, to_onnx

_BATCH = 8
# At most: change of EER in percentage points; at least: cosine of an embedding.
_BOUNDS = {
    "fp32": {"change_percent": 0.01},
    "fp16": {"change_percent": 0.15, "cosine": 0.9995},
    "bf16": {"change_percent": 0.15, "cosine": 0.9995},
    "int8": {"change_percent": 0.5, "cosine": 0.995},
}


def main() -> None:
    """Embeds all utterances of the trials through each graph and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default=precisions.MODEL, help="folder of a training run, or a bundled model's name")
    parser.add_argument("--precisions", nargs="+", choices=list(_BOUNDS), default=list(_BOUNDS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    encoder = SpeakerEncoder.load(args.model, device="cpu")
    lists = {path.name: read_trials(path) for path in sorted(args.data.glob("trials*.txt"))}
    paths = sorted({path for trials in lists.values() for path in trial_paths(trials)})
    if "int8" in args.precisions:
        precisions.calibrate(encoder, args.data, args.seed)
    files = [args.data / path for path in paths]
    found = {"torch": precisions.embed(encoder, files, precisions.ways()["modules"])}
    bounds = {}
    waveforms = [encoder.load_audio(file) for file in files]
    for name, precision, target in ways(args.precisions):
        found[name] = embed(graph(encoder, precision, target), precision, waveforms)
        bounds[name] = _BOUNDS[precision]
    record: dict[str, Any] = {
        "benchmark": "exports",
        "date": datetime.date.today().isoformat(),
        "machine": describe_machine(),
        "model": {"name": Path(args.model).name, "fingerprint": encoder.fingerprint, "config": encoder.model.config},
        "training": training(Path(args.model)),
        "lists": {name: precisions.compare(trials, paths, found, bounds) for name, trials in lists.items()},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=2) + "\n")
    for name, rows in record["lists"].items():
        for way, row in rows.items():
            print(name, way, json.dumps(row))


def training(run: Path) -> dict[str, Any] | None:
    """Recipe of a training run, what it sets otherwise, and the steps taken; None where this is none."""
    if not (run / "config.json").is_file():
        return None
    settings = bundle.read_settings(run)
    changed = bundle.differences(settings, bundle.ROOT / bundle.TEACHER_RECIPE)
    return {"recipe": Path(bundle.TEACHER_RECIPE).name, "differences": changed, "steps": settings["run"]["steps"]}


def ways(chosen: list[Any]) -> Iterator[tuple[str, Any, Any]]:
    """Name in the record, precision, and who runs it, of each graph."""
    for precision in chosen:
        for target in ("cpu", "tensorrt") if precision == "int8" else ("cpu",):
            yield f"int8, {target}" if precision == "int8" else precision, precision, target


def graph(encoder: SpeakerEncoder, precision: Any, target: Any) -> Any:
    """The model that an export writes."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        return onnx.load(to_onnx(encoder, f"{folder}/x.onnx", precision=precision, target=target, validate=False).path)


def embed(model: Any, precision: str, waveforms: list[np.ndarray]) -> Tensor:
    """Embeddings (N, E) that a graph gives."""
    half = precision in ("fp16", "bf16")
    runtime = session(emulated(model) if half else model, exact=half)
    order = sorted(range(len(waveforms)), key=lambda i: len(waveforms[i]))
    found: dict[int, Tensor] = {}
    for batch in (order[i : i + _BATCH] for i in range(0, len(order), _BATCH)):
        rows = [torch.from_numpy(waveforms[i]) for i in batch]
        lengths = torch.tensor([len(row) for row in rows])
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        (output,) = runtime.run(None, feed(padded, lengths, "waveform", "padded"))
        found |= zip(batch, torch.from_numpy(output), strict=True)
    return torch.stack([found[i] for i in range(len(waveforms))])


if __name__ == "__main__":
    main()
