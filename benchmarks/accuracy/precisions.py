"""EER of one trained model at every precision of its kernels, on real speech.

    python -m benchmarks.accuracy.precisions --data FOLDER --out RESULT.json [--model MODEL]

The folder holds ``train_list.txt`` and ``trials*.txt``. The weights are the same throughout; int8 is calibrated on
utterances of the training list. Differences are against the network's modules in float32, in place of its kernels for
inference, and paired over speakers.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.machine import describe_machine
from spkfast import SpeakerEncoder, nn
from spkfast.data.lists import read_train_list, read_trials, speaker_of, trial_paths
from spkfast.evaluation import cosine_scores, differences, eer, min_dcf

MODEL = "ecapa-mini"
_CALIBRATION = 200  # utterances
# At most: change of EER in percentage points, and of any score.
_BOUNDS = {
    "fp32": {"change_percent": 0.01, "score": 1e-4},
    "bf16": {"change_percent": 0.15, "score": 0.01},
    "int8": {"change_percent": 0.5, "score": 0.05},
}


def main() -> None:
    """Embeds all utterances of the trials in each way and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default=MODEL, help="folder, or a bundled model's name")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    encoder = SpeakerEncoder.load(args.model, device="cpu")
    lists = {path.name: read_trials(path) for path in sorted(args.data.glob("trials*.txt"))}
    paths = sorted({path for trials in lists.values() for path in trial_paths(trials)})
    calibrate(encoder, args.data, args.seed)
    found = {name: embed(encoder, [args.data / path for path in paths], setting) for name, setting in ways().items()}
    record: dict[str, Any] = {
        "benchmark": "precisions",
        "date": datetime.date.today().isoformat(),
        "machine": describe_machine(),
        "model": {"name": Path(args.model).name, "fingerprint": encoder.fingerprint, "config": encoder.model.config},
        "lists": {name: compare(trials, paths, found, _BOUNDS) for name, trials in lists.items()},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=2) + "\n")
    for name, rows in record["lists"].items():
        for way, row in rows.items():
            print(name, way, json.dumps(row))


def ways() -> dict[str, Callable[[SpeakerEncoder], Any]]:
    """What is set before a pass, by its name in the record; the first one is what all are compared with."""

    def modules(encoder: SpeakerEncoder) -> Any:
        # A hook makes every layer run its modules in place of its kernels.
        return torch.nn.modules.module.register_module_forward_hook(lambda *_: None)

    def at(precision: Any) -> Callable[[SpeakerEncoder], Any]:
        return lambda encoder: nn.set_precision(encoder.model, precision)

    return {"modules": modules, "fp32": at("fp32"), "bf16": at("bf16"), "int8": at("int8")}


def calibrate(encoder: SpeakerEncoder, data: Path, seed: int) -> None:
    """Finds the ranges for int8 on utterances of the training list."""
    utterances = read_train_list(data / "train_list.txt")
    chosen = np.random.default_rng(seed).permutation(len(utterances))[:_CALIBRATION]
    encoder.calibrate([data / utterances[i].path for i in chosen])


def embed(encoder: SpeakerEncoder, paths: list[Path], setting: Callable[[SpeakerEncoder], Any]) -> Tensor:
    """Embeddings under a setting, which is undone."""
    handle = setting(encoder)
    found = encoder.embed_batch(paths)
    if hasattr(handle, "remove"):
        handle.remove()
    nn.set_precision(encoder.model, "fp32")
    return found


def compare(
    trials: list[Any], paths: list[str], found: Mapping[str, Tensor], bounds: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, Any]]:
    """What each way gives on a list, and how that differs from the first one.

    Args:
        trials: Of the list.
        paths: Of the utterances.
        found: Their embeddings, shape (N, E), in each way.
        bounds: Of each way but the first: most ``change_percent`` of the EER, in points and either direction, most
            change of any ``score``, least ``cosine`` of an embedding. The interval of the first one must hold 0, too.
    """
    index = {path: i for i, path in enumerate(paths)}
    enrol, test = ([index[getattr(trial, side)] for trial in trials] for side in ("enrol", "test"))
    speakers = {
        "enrol_speakers": [speaker_of(paths[i]) for i in enrol],
        "test_speakers": [speaker_of(paths[i]) for i in test],
    }
    labels = [trial.target for trial in trials]
    scores = {way: np.asarray(cosine_scores(of_way.double(), enrol, test)) for way, of_way in found.items()}
    first = next(iter(scores))
    rows = {}
    for way, of_way in scores.items():
        rate = eer(of_way, labels, **speakers)
        rows[way] = {
            "eer_percent": 100 * rate.value,
            "eer_low_percent": None if rate.low is None else 100 * rate.low,
            "eer_high_percent": None if rate.high is None else 100 * rate.high,
            "min_dcf": min_dcf(of_way, labels),
            "lowest_cosine": float(torch.cosine_similarity(found[way].double(), found[first].double()).min()),
        }
        if way == first:
            continue
        change = differences(scores[first], of_way, labels, **speakers)["eer"]
        low, high = (None if bound is None else 100 * bound for bound in (change.low, change.high))
        largest = float(np.abs(of_way - scores[first]).max())
        most = {"change_percent": abs(100 * change.value), "score": largest}
        within = all(
            rows[way]["lowest_cosine"] >= bound if key == "cosine" else most[key] <= bound
            for key, bound in bounds[way].items()
        )
        rows[way] |= {
            "change_percent": 100 * change.value,
            "change_low_percent": low,
            "change_high_percent": high,
            "largest_score_difference": largest,
            "bounds": dict(bounds[way]),
            "within_bounds": within and low is not None and high is not None and low <= 0 <= high,
        }
    return rows


if __name__ == "__main__":
    main()
