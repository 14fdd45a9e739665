"""Trains ``configs/mini.yaml`` on a folder of real speech with several seeds and records time and EER.

    python -m benchmarks.accuracy.real_speech --data FOLDER --out RESULT.json [--seeds 0 1 2] [--jobs 2] [--runs FOLDER]

The folder holds ``train_list.txt``, ``trials*.txt``, ``noise/`` and ``rir/``. One more run, with the first seed, is not
trained on the speakers of ``held_out_speakers.txt``: on these the recipe was chosen. The others are trained on all, and
their last models are evaluated on the trials, once. Every step is a command that a user would type, so the time is that
of the command, start of Python included. Runs that go on side by side share the cores out among them.
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
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine

CONFIG = Path(__file__).parents[2] / "configs" / "mini.yaml"
HELD_OUT = Path(__file__).parent / "held_out_speakers.txt"


def main() -> None:
    """Runs every seed and writes the result after each."""
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
        held_out = pool.submit(train, args.data, args.seeds[0], folder / "held_out", HELD_OUT, threads)
        trained = {seed: pool.submit(train, args.data, seed, folder / str(seed), None, threads) for seed in args.seeds}
        results = {seed: run.result() for seed, run in trained.items()}
        runs = [
            {
                "seed": seed,
                "training_minutes": result["minutes"],
                "lists": evaluate(args.data, Path(result["model"]), threads),
            }
            for seed, result in results.items()
        ]
        write(args.out, runs, held_out.result()["lists"]["held_out"], threads)


def train(data: Path, seed: int, out: Path, held_out: Path | None, threads: int) -> dict[str, Any]:
    """What ``spkfast train`` says, and its minutes."""
    started = time.monotonic()
    result: dict[str, Any] = spkfast(
        "train", str(CONFIG), "--out", str(out), "--seed", str(seed), "--data.train_list", str(data / "train_list.txt"),
        "--data.noise", str(data / "noise"), "--data.rir", str(data / "rir"),
        "--validation.held_out", str(held_out or 0), "--json", threads=threads,
    )  # fmt: skip
    return result | {"minutes": (time.monotonic() - started) / 60}


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


def write(path: Path, runs: list[dict[str, Any]], held_out: dict[str, Any], threads: int) -> None:
    """The record of all runs, with the mean and the range over seeds."""
    summary = {}
    for name in runs[0]["lists"]:
        rates = [run["lists"][name]["eer_percent"] for run in runs]
        summary[name] = {"mean": statistics.fmean(rates), "lowest": min(rates), "highest": max(rates)}
    record = {
        "benchmark": "real_speech",
        "config": CONFIG.read_text(),
        "date": datetime.date.today().isoformat(),
        "machine": describe_machine(),
        "threads": threads,
        "held_out": held_out,
        "eer_percent": summary,
        "training_minutes": max(run["training_minutes"] for run in runs),
        "runs": runs,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
