"""Trains ``configs/mini.yaml`` on a folder of real speech with several seeds and records time and EER.

    python -m benchmarks.accuracy.real_speech --data FOLDER --out RESULT.json [--seeds 0 1 2] [--fixture FOLDER]

The folder holds ``train_list.txt``, ``trials*.txt``, ``noise/`` and ``rir/``. Every step is a command that a user would
type, so the time is that of the command, start of Python included.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import describe_machine

CONFIG = Path(__file__).parents[2] / "configs" / "mini.yaml"


def main() -> None:
    """Runs every seed and writes the result after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--fixture", type=Path, help="copy the model of the first seed to this folder")
    args = parser.parse_args()
    trials = sorted(args.data.glob("trials*.txt"))
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            out = Path(folder) / str(seed)
            runs.append({"seed": seed, **run_seed(args.data, trials, seed, out)})
            if args.fixture and seed == args.seeds[0]:
                write_fixture(args.fixture, out / "model", runs[0]["lists"])
            write(args.out, runs)


def run_seed(data: Path, trials: list[Path], seed: int, out: Path) -> dict[str, Any]:
    """Training time in minutes, and for each list what ``spkfast evaluate`` says."""
    started = time.monotonic()
    spkfast(
        "train", str(CONFIG), "--out", str(out), "--seed", str(seed), "--data.train_list", str(data / "train_list.txt"),
        "--data.noise", str(data / "noise"), "--data.rir", str(data / "rir"), "--json",
    )  # fmt: skip
    minutes = (time.monotonic() - started) / 60
    names = [str(path) for path in trials]
    result = spkfast("evaluate", "--model", str(out), "--data", str(data), "--trials", *names, "--json")
    return {"training_minutes": minutes, "lists": {Path(row.pop("trials")).name: row for row in result["lists"]}}


def probe() -> np.ndarray:
    """Three seconds of a signal that needs no file: a harmonic glide with pauses."""
    time = np.arange(48000) / 16000
    phase = 2 * np.pi * (110 * time + 15 * time**2)
    signal = sum(np.sin(k * phase) / k for k in range(1, 20)) * (np.sin(2 * np.pi * 2.5 * time) > -0.5)
    return (0.1 * signal).astype(np.float32)


def write_fixture(folder: Path, model: Path, lists: dict[str, Any]) -> None:
    """The model, with the numbers that it gave when it was made."""
    from spkfast import SpeakerEncoder

    shutil.copytree(model, folder, dirs_exist_ok=True)
    expected = {
        "probe_embedding": SpeakerEncoder.load(folder).embed(probe(), backend="reference").tolist(),
        "eer_percent": {name: row["eer_percent"] for name, row in lists.items()},
    }
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def spkfast(*arguments: str) -> Any:
    """The JSON result of a command."""
    run = subprocess.run([sys.executable, "-m", "spkfast", *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout)


def write(path: Path, runs: list[dict[str, Any]]) -> None:
    """The record of all runs so far, with the median and the range over seeds."""
    summary = {}
    for name in runs[0]["lists"]:
        rates = [run["lists"][name]["eer_percent"] for run in runs]
        summary[name] = {"median": statistics.median(rates), "lowest": min(rates), "highest": max(rates)}
    record = {
        "benchmark": "real_speech",
        "config": CONFIG.read_text(),
        "date": datetime.date.today().isoformat(),
        "machine": describe_machine(),
        "eer_percent": summary,
        "training_minutes": max(run["training_minutes"] for run in runs),
        "runs": runs,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
