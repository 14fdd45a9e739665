"""Trains ``configs/mini.yaml`` and ``configs/mini_distilled.yaml`` on real speech and records time and EER.

    python -m benchmarks.accuracy.real_speech --data FOLDER --out RESULT.json [--seeds 0 1 2] [--jobs 2] [--runs FOLDER]

The folder holds ``train_list.txt``, ``trials*.txt``, ``noise/`` and ``rir/``. Each seed is one run of the distilled
recipe, with two runs of the other that no one else has as its teachers. For the first seed there is another such
family, not trained on the speakers of ``held_out_speakers.txt``: on these the recipes were chosen. The others are
trained on all, and their last models are evaluated on the trials, once. Every step is a command that a user would type;
runs that go on side by side share the cores out among them. A run that has ended in the folder is not made again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.accuracy.bundle import differences, held_out_rates, logged_minutes, read_settings
from benchmarks.machine import describe_machine

CONFIGS = Path(__file__).parents[2] / "configs"
PLAIN, DISTILLED = "mini.yaml", "mini_distilled.yaml"
HELD_OUT = Path(__file__).parent / "held_out_speakers.txt"
_TEACHERS = 2  # of a run of the distilled recipe


def main() -> None:
    """Trains and evaluates what is missing, and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs that go on side by side")
    parser.add_argument("--runs", type=Path, help="keep the runs in this folder")
    args = parser.parse_args()
    threads = max(1, len(os.sched_getaffinity(0)) // args.jobs)
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(args.jobs) as pool:
        folder = args.runs or Path(temporary)
        families = {seed: teachers(seed) for seed in args.seeds}
        names = {(seed, None): str(seed) for seed in args.seeds} | {(args.seeds[0], HELD_OUT): "held_out"}
        plain = {
            name: [
                pool.submit(train, args.data, PLAIN, one, folder / f"{name}_teacher_{one}", held_out, threads)
                for one in families[seed]
            ]
            for (seed, held_out), name in names.items()
        }
        distilled = {
            name: pool.submit(distil, args.data, seed, folder / name, held_out, threads, plain[name])
            for (seed, held_out), name in names.items()
        }
        for run in distilled.values():
            run.result()

        def row(seed: int, out: Path, **more: Any) -> dict[str, Any]:
            return {
                "seed": seed,
                **more,
                "training_minutes": logged_minutes(out),
                "lists": evaluate(args.data, out, threads),
            }

        rows = {
            PLAIN: [row(one, folder / f"{seed}_teacher_{one}") for seed, family in families.items() for one in family],
            DISTILLED: [row(seed, folder / str(seed), teachers=family) for seed, family in families.items()],
        }
        first = families[args.seeds[0]][0]
        held = {PLAIN: folder / f"held_out_teacher_{first}", DISTILLED: folder / "held_out"}
        recipes = {name: summary(name, rows[name], held_out_rates(held[name])) for name in rows}
        write(args.out, recipes, threads)


def teachers(seed: int) -> list[int]:
    """Seeds of the teachers of a run; those of a run of another seed are others."""
    return [seed * _TEACHERS + number for number in range(_TEACHERS)]


def distil(data: Path, seed: int, out: Path, held_out: Path | None, threads: int, taught_by: Sequence[Any]) -> Path:
    """Trains the distilled recipe when its teachers are there."""
    sources = [str(run.result()) for run in taught_by]
    more = ("--distillation.teachers", json.dumps(sources), "--init_from", sources[0])
    return train(data, DISTILLED, seed, out, held_out, threads, *more)


def train(data: Path, recipe: str, seed: int, out: Path, held_out: Path | None, threads: int, *more: str) -> Path:
    """Folder of the run, which is made unless it has ended; one of other settings is refused."""
    if not (out / "model").is_dir():
        spkfast(
            "train", str(CONFIGS / recipe), "--out", str(out), "--seed", str(seed),
            "--data.train_list", str(data / "train_list.txt"), "--data.noise", str(data / "noise"),
            "--data.rir", str(data / "rir"), "--validation.held_out", str(held_out or 0), "--json", *more,
            threads=threads,
        )  # fmt: skip
    settings = read_settings(out)
    found = (settings["seed"], bool(settings["run"]["held_out_speakers"]), differences(settings, CONFIGS / recipe))
    if found != (seed, held_out is not None, {}):
        raise SystemExit(f"{out}: a run of other settings: {found}")
    return out


def evaluate(data: Path, model: Path, threads: int) -> dict[str, Any]:
    """What ``spkfast evaluate`` says of each list."""
    names = [str(path) for path in sorted(data.glob("trials*.txt"))]
    result = spkfast(
        "evaluate", "--model", str(model), "--data", str(data), "--trials", *names, "--json", threads=threads
    )
    return {Path(row.pop("trials")).name: row for row in result["lists"]}


def spkfast(*arguments: str, threads: int) -> Any:
    """The JSON result of a command."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "spkfast", *arguments]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(run.stdout)


def summary(recipe: str, runs: list[dict[str, Any]], held_out: dict[str, Any]) -> dict[str, Any]:
    """All runs of a recipe, with the mean and the range over seeds."""
    rates = {name: [run["lists"][name]["eer_percent"] for run in runs] for name in runs[0]["lists"]}
    return {
        "config": (CONFIGS / recipe).read_text(),
        "held_out": held_out,
        "eer_percent": {
            name: {"mean": statistics.fmean(found), "lowest": min(found), "highest": max(found)}
            for name, found in rates.items()
        },
        "training_minutes": max(run["training_minutes"] for run in runs),
        "runs": runs,
    }


def write(path: Path, recipes: dict[str, Any], threads: int) -> None:
    """The record."""
    record = {
        "benchmark": "real_speech",
        "date": datetime.date.today().isoformat(),
        "machine": describe_machine(),
        "threads": threads,
        "recipes": recipes,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
