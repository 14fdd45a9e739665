"""Makes a finished training run the model that comes with the package, and records what it is worth.

    python -m benchmarks.accuracy.bundle RUN HELD_OUT --data FOLDER --out RESULT.json [--name ecapa-mini]

RUN, of mini_distilled.yaml, trained on all speakers, as its teachers did, which are of mini.yaml; HELD_OUT is a run
like it from which some were held out, and the threshold is set on these. It may have fewer teachers.
The folder holds ``utterances.csv`` and ``trials*.txt``, on each of which the model is evaluated, once. To be run on the
machine that trained. ``python -m benchmarks.report`` then writes the model card, which is a part of the model.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import describe_machine
from spkfast import InputError, SpeakerEncoder
from spkfast.cli.common import embed_all, rates
from spkfast.cli.train import FINE_TUNING, parse
from spkfast.data.lists import read_trials, trial_paths
from spkfast.evaluation import TrialResult, evaluate_trials
from spkfast.inference import Threshold
from spkfast.training.best import taken_validation
from spkfast.training.config import FREE_ON_RESUME, flatten
from spkfast.training.log import LOG, VALIDATION, read_log
from spkfast.training.validation import HELD_OUT

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "configs/mini_distilled.yaml"
TEACHER_RECIPE = "configs/mini.yaml"
MODELS = "spkfast/models/bundled"
EXPECTED = "tests/fixtures/{}/expected.json"
_FILES = ("config.yaml", "model.safetensors")
_TEACHERS = "distillation.teachers"
_FRONTEND = ("sample_rate", "n_mels", "frame_length_ms", "frame_shift_ms")


def main() -> None:
    """Bundles a run and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", default="ecapa-mini")
    args = parser.parse_args()
    try:
        record = bundle(args.run, args.held_out, args.data, args.name)
    except InputError as error:
        sys.exit(f"error: {error}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=2) + "\n")


def bundle(
    run: Path,
    held_out: Path,
    data: Path,
    name: str,
    *,
    recipe: Path = ROOT / RECIPE,
    teacher_recipe: Path = ROOT / TEACHER_RECIPE,
    root: Path = ROOT,
) -> dict[str, Any]:
    """Saves the model of a run below ``root``, writes the numbers that it gives for the tests, and makes the record.

    Raises:
        InputError: If the runs differ in their settings, or are not on this data, or the one has speakers held out or
            the other none, or a log does not tell the time of training, or a teacher is not of its recipe.
    """
    settings, other = map(read_settings, (run, held_out))
    changed = differences(settings, recipe)
    if changed != differences(other, recipe):
        raise InputError(f"{held_out}: differs from the recipe in {differences(other, recipe)}, {run} in {changed}")
    speakers = other["run"]["held_out_speakers"]
    if settings["run"]["held_out_speakers"] or not speakers:
        raise InputError(f"{run} must have no speakers held out, and {held_out} some")
    parts = describe_parts(data / "utterances.csv", speakers)
    for key in ("speakers", "utterances"):
        found, there = settings["run"][key], sum(part[key] for part in parts["train"].values())
        if found != there:
            raise InputError(f"{run}: was trained on {found} {key}, {data} has {there}")
    validation = held_out_rates(held_out)
    encoder = SpeakerEncoder.load(stages(run)[-1], device="cpu")
    encoder.threshold = Threshold(validation["threshold"], HELD_OUT)
    folder = root / MODELS / name
    with tempfile.TemporaryDirectory() as temporary:  # a folder with a card is not one to save to
        encoder.save(Path(temporary) / "model")
        folder.mkdir(parents=True, exist_ok=True)
        for file in _FILES:
            shutil.copyfile(Path(temporary) / "model" / file, folder / file)
    weights = folder / "model.safetensors"
    record = {
        "benchmark": "bundled",
        "name": name,
        "date": datetime.date.today().isoformat(),
        "machine": describe_machine(),
        "recipe": recipe.name,
        "config": recipe.read_text(),
        "differences": differences(settings, recipe),
        "seed": settings["seed"],
        "steps": sum(read_settings(stage)["run"]["steps"] for stage in stages(run)),
        "training_minutes": sum(map(logged_minutes, stages(run))),
        "teachers": describe_teachers(settings[_TEACHERS], teacher_recipe),
        "held_out": {**validation, "speakers": len(speakers), "teachers": len(other[_TEACHERS])},
        "threshold": encoder.threshold.value,
        "data": parts,
        "model": {
            "name": encoder.model.name,
            "config": encoder.model.config,
            "parameters": sum(value.numel() for value in encoder.model.parameters()),
            "bytes": weights.stat().st_size,
            "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        },
        "frontend": {
            "preset": settings["frontend.preset"],
            "hash": encoder.frontend.hash,
            **{key: getattr(encoder.frontend, key) for key in _FRONTEND},
        },
        "lists": evaluate(encoder, data),
    }
    expected = {
        "probe_embedding": SpeakerEncoder.load(folder, device="cpu").embed(probe(), backend="reference").tolist(),
        "eer_percent": {path: row["eer_percent"] for path, row in record["lists"].items()},
    }
    fixture = root / EXPECTED.format(name)
    fixture.parent.mkdir(parents=True, exist_ok=True)
    fixture.write_text(json.dumps(expected, indent=1) + "\n")
    return record


def differences(settings: Mapping[str, Any], recipe: Path) -> dict[str, Any]:
    """Settings of a run, other than its data and its seed, that are not those of the recipe."""
    wanted = json.loads(json.dumps(flatten(parse([str(recipe)])[0])))  # as a run writes them
    names = sorted(wanted.keys() - (FREE_ON_RESUME - {FINE_TUNING}) - {"seed"})
    return {name: settings.get(name) for name in names if settings.get(name) != wanted[name]}


def stages(run: Path) -> list[Path]:
    """Folder of a run, and that of its fine-tuning where there was one: the model is of the last."""
    return [run] if read_settings(run).get(FINE_TUNING) is None else [run, run / FINE_TUNING]


def held_out_rates(run: Path) -> dict[str, Any]:
    """What the log of a run says of its model on the speakers held out.

    Raises:
        InputError: If it says nothing.
    """
    last = stages(run)[-1]
    taken = taken_validation(last, read_settings(last)["validation.take"])
    if taken is None:
        raise InputError(f"{run}: no validation in its log")
    found: dict[str, Any] = taken["lists"][HELD_OUT]
    return found


def read_settings(run: Path) -> dict[str, Any]:
    """All settings of a run by dotted name, and under ``run`` what was found."""
    settings: dict[str, Any] = json.loads((run / "config.json").read_text())
    return settings


def logged_minutes(run: Path) -> float:
    """Minutes of training and validation.

    Raises:
        InputError: If the log of the run does not tell them.
    """
    seconds = [entry.get("seconds") for name in (LOG, VALIDATION) for entry in read_log(run, name)]
    if not seconds or None in seconds:
        raise InputError(f"{run}: its log does not tell the time of training")
    return sum(seconds) / 60


def describe_teachers(runs: list[str], recipe: Path) -> dict[str, Any] | None:
    """Seeds and minutes of the runs that a run learned from; None where there were none.

    Raises:
        InputError: If one is not of the recipe, or had speakers held out.
    """
    if not runs:
        return None
    found = [read_settings(Path(run)) for run in runs]
    for run, settings in zip(runs, found, strict=True):
        if (changed := differences(settings, recipe)) or settings["run"]["held_out_speakers"]:
            raise InputError(f"{run}: a teacher must be of {recipe.name} and on all speakers, differs in {changed}")
    return {
        "recipe": recipe.name,
        "config": recipe.read_text(),
        "seeds": [settings["seed"] for settings in found],
        "training_minutes": sum(logged_minutes(Path(run)) for run in runs),
    }


def describe_parts(table: Path, held_out: list[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Speakers, utterances and minutes of each corpus, by what it served for: ``train``, ``held_out`` or ``test``.

    Speakers held out of one run are among those that the other was trained on.
    """
    rows: dict[tuple[str, str], list[dict[str, str]]] = {}
    with open(table, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for part in (row["split"], *(["held_out"] if row["speaker"] in held_out else [])):
                rows.setdefault((part, row["corpus"]), []).append(row)
    parts: dict[str, dict[str, dict[str, float]]] = {part: {} for part in ("train", "held_out", "test")}
    for (part, corpus), found in rows.items():
        parts[part][corpus] = {
            "speakers": len({row["speaker"] for row in found}),
            "utterances": len(found),
            "minutes": sum(float(row["seconds"]) for row in found) / 60,
        }
    return parts


def evaluate(encoder: SpeakerEncoder, data: Path) -> dict[str, dict[str, Any]]:
    """Figures of every trial list of a folder, and what the threshold of the model gives on it."""
    assert encoder.threshold is not None
    lists = {path.name: read_trials(path) for path in sorted(data.glob("trials*.txt"))}
    paths = trial_paths(trial for trials in lists.values() for trial in trials)
    embeddings = embed_all(encoder, data, paths)
    results = {name: evaluate_trials(trials, paths, embeddings) for name, trials in lists.items()}
    return {name: row(result, encoder.threshold.value) for name, result in results.items()}


def row(result: TrialResult, threshold: float) -> dict[str, Any]:
    """Figures of a list, as ``spkfast evaluate`` names them, and misses and false alarms at a threshold."""
    targets, nontargets = (result.scores[result.labels == label] for label in (1, 0))
    return {
        **rates(result),
        "eer_threshold": result.eer.threshold,
        "misses_percent": 100 * float((targets <= threshold).mean()),
        "false_alarms_percent": 100 * float((nontargets > threshold).mean()),
        "targets": len(targets),
        "nontargets": len(nontargets),
        "speakers": result.num_speakers,
    }


def probe() -> np.ndarray:
    """Three seconds of a signal that needs no file: a harmonic glide with pauses."""
    time = np.arange(48000) / 16000
    phase = 2 * np.pi * (110 * time + 15 * time**2)
    signal = sum(np.sin(k * phase) / k for k in range(1, 20)) * (np.sin(2 * np.pi * 2.5 * time) > -0.5)
    return (0.1 * signal).astype(np.float32)


if __name__ == "__main__":
    main()
