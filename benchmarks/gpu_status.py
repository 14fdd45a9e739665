"""Generates docs/gpu-status.md: what was verified and measured on a GPU, where and when, from the committed results."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks.timing import Figure

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/gpu"
PAGE = ROOT / "docs/gpu-status.md"

# Entry files by backend, as the op's stem; what they include belongs to the kernel too.
_ENTRIES = {
    "native": ("kernels/cuda/{op}.cu", "csrc/cuda/{op}.cpp"),
    "triton": ("kernels/triton/{op}.py",),
}
# By part of benchmarks/models/bench_ecapa_gpu.py (whole networks), benchmarks/data/bench_augmentation_gpu.py (the
# batches that go in), benchmarks/models/bench_latency_gpu.py (a waveform, by each way without TensorRT) and
# benchmarks/models/bench_training_gpu.py (a training run): the ratio ``peer / ours``, or
# ``what of whom``, and the bound that it is to keep, where there is one.
FIGURES: dict[str, dict[str, dict[str, float]]] = {
    "embeddings, 512 channels": {
        "torch eager bf16 / spkfast bf16": {"at_least": 3.0},
        "torch.compile bf16 / spkfast bf16": {"at_least": 1.5},
        "utterances/s of spkfast bf16": {"at_least": 150e3},
        "utterances/s of spkfast fp16": {},
        "utterances/s of spkfast fp32": {},
    },
    "embeddings, 1024 channels": {
        "torch eager bf16 / spkfast bf16": {"at_least": 2.0},
        "torch.compile bf16 / spkfast bf16": {"at_least": 1.25},
        "utterances/s of spkfast bf16": {"at_least": 70e3},
        "utterances/s of spkfast fp16": {},
        "utterances/s of spkfast fp32": {},
    },
    "latency, 512 channels": {
        "microseconds of replay of the graph": {"at_most": 60.0},
        "microseconds of spkfast bf16 in a graph": {},
        "torch eager bf16 / spkfast bf16 in a graph": {},
        "torch.compile bf16 / spkfast bf16 in a graph": {},
    },
    "training, 512 channels": {
        "torch eager bf16 / spkfast bf16": {"at_least": 1.8},
        "torch.compile bf16 / spkfast bf16": {"at_least": 1.25},
        "utterances/s of spkfast bf16": {},
    },
    "augmentation and features": {
        "milliseconds of spkfast, int16 to features": {"at_most": 5.0},
        "milliseconds of spkfast, draws included": {},
        "milliseconds of spkfast, int16 to waveforms": {},
        "milliseconds of spkfast, waveforms to features": {},
    },
    "latency of a waveform, 512 channels": {
        "microseconds of kernels, network in a graph": {},
        "microseconds of AOTInductor in a graph": {},
        "microseconds of torch.compile": {},
        "torch.compile / kernels, network in a graph": {},
    },
    "training, from files": {
        "usual way / spkfast": {"at_least": 1.8},
        "percent loader wait of spkfast": {"at_most": 5.0},
        "utterances/s of spkfast": {},
    },
}
_INCLUDE = re.compile(r'^\s*#include "([^"]+)"', re.MULTILINE)
_SIBLING = re.compile(r"^from spkfast\.kernels\.triton\.(\w+) import|^from \.(\w+) import", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One op on one backend: ``native`` (CUDA C++) or ``triton``."""

    op: str
    backend: str
    root: Path = ROOT

    def sources(self) -> list[Path]:
        """Entry files and everything of ours that they include, sorted."""
        pending = [self.root / entry.format(op=self.op) for entry in _ENTRIES[self.backend]]
        found: set[Path] = set()
        while pending:
            path = pending.pop().resolve()
            if path in found or not path.exists():
                continue
            found.add(path)
            text = path.read_text()
            for name in _INCLUDE.findall(text):
                pending += [folder / name for folder in (path.parent, self.root / "kernels/cuda", self.root / "csrc")]
            pending += [path.parent / f"{first or second}.py" for first, second in _SIBLING.findall(text)]
        return sorted(found)

    def source_hash(self) -> str:
        """Digest of the sources: names below the root and contents."""
        digest = hashlib.sha256()
        for path in self.sources():
            digest.update(f"{path.relative_to(self.root.resolve())}\0".encode() + path.read_bytes() + b"\0")
        return digest.hexdigest()[:16]


def kernels(root: Path = ROOT) -> list[Kernel]:
    """Every kernel of the project, by op, then backend."""
    found = []
    for backend, (entry, *_) in _ENTRIES.items():
        folder, suffix = entry.split("{op}")
        names = (path.name.removesuffix(suffix) for path in (root / folder).glob(f"*{suffix}"))
        found += [Kernel(op, backend, root) for op in names if not op.startswith("_")]
    return sorted(found, key=lambda kernel: (kernel.op, kernel.backend))


def network_hash(root: Path = ROOT) -> str:
    """Digest of what whole networks and their batches are computed by: kernels, definitions, and what is over them."""
    digest = hashlib.sha256("".join(kernel.source_hash() for kernel in kernels(root)).encode())
    others = [root / "spkfast/data/augmentation.py", *(root / "spkfast/reference").glob("*.py")]
    for path in sorted([*(root / "spkfast/nn").glob("*.py"), *others]):
        digest.update(f"{path.name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Results of runs on a GPU, oldest first; runs of the plumbing on a CPU are left out."""
    results = []
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        if result["device"] == "cuda":
            results.append({**result, "file": path.name})
    return sorted(results, key=lambda result: result["created"])


def page(root: Path = ROOT, folder: Path = RESULTS) -> str:
    """Text of the status page."""
    results = read_results(folder)
    rows = [_row(kernel, results) for kernel in kernels(root)]
    lines = [
        "# GPU status",
        "",
        "<!-- Generated by `python -m benchmarks.gpu_status` from benchmarks/results/gpu; do not edit. -->",
        "",
        "Whether each kernel has run on a GPU, in its present form. *verified*: its tests passed there and its error",
        "stayed within the bound; *failed*: they did not; *stale*: it ran, but its sources have changed since; *never",
        "run*: checked by compilation and on the host alone. `make gpu-check RESULTS=DIR` on a machine with an NVIDIA",
        "GPU writes a result; put the file into `benchmarks/results/gpu` and run `make gpu-status`.",
        "",
        "| op | backend | status | GPU | date | versions | max error | fastest workload | result |",
        "|---|---|---|---|---|---|---|---|---|",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        "## Whole networks, the batches that go in, and training",
        "",
        "ECAPA-TDNN beside plain torch in one run, as `benchmarks/models/bench_ecapa_gpu.py` measures it: embeddings",
        "of 256 utterances of 200 frames, the latency of one, a training step of 512. And 512 crops of 2 s of int16",
        "that change their speed, get a room and a noise, and become features, by",
        "`benchmarks/data/bench_augmentation_gpu.py`. And one waveform of 2 s to its embedding, by",
        "`benchmarks/models/bench_latency_gpu.py`. And training runs from FLAC files, batches of 512, of this",
        "project's loop and of the usual pipeline, by `benchmarks/models/bench_training_gpu.py`, which needs scipy,",
        "soundfile and accelerate too. What errs too much counts in no figure.",
        "",
        "| part | figure | value | goal | status | GPU | date | result |",
        "|---|---|---|---|---|---|---|---|",
        *("| " + " | ".join(row) + " |" for part in FIGURES for row in _figure_rows(part, results, network_hash(root))),
    ]
    return "\n".join(lines) + "\n"


def _row(kernel: Kernel, results: list[dict[str, Any]]) -> list[str]:
    runs = [
        (result, entry)
        for result in results
        for entry in result["kernels"]
        if (entry["op"], entry["backend"]) == (kernel.op, kernel.backend) and entry["finished"]
    ]
    current = [run for run in runs if run[1]["source_hash"] == kernel.source_hash()]
    label = {"native": "CUDA C++", "triton": "Triton"}[kernel.backend]
    if not runs:
        return [kernel.op, label, "never run", "", "", "", "", "", ""]
    result, entry = (current or runs)[-1]
    status = ("verified" if entry["verified"] else "failed") if current else "stale"
    machine = result["machine"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "triton", "cuda", "driver"))
    errors = [load["max_abs_error"] for load in entry["workloads"]]
    timed = [load for load in entry["workloads"] if "median_ms" in load]
    best = max(timed, key=lambda load: load["gb_s"], default=None)
    speed = ""
    if best:
        speed = f"{best['name']}: {best['median_ms']:.3f} ms, {best['gb_s']:.0f} GB/s ({best['percent_of_copy']:.0f} %)"
    error = f"{max(errors):.1e}" if errors else ""
    return [kernel.op, label, status, machine["gpu"], result["created"][:10], versions, error, speed, result["file"]]


def _figure_rows(part: str, results: list[dict[str, Any]], source_hash: str) -> list[list[str]]:
    runs = [
        (result, entry)
        for result in results
        for entry in result.get("models", [])
        if entry["name"] == part and entry["finished"]
    ]
    current = [run for run in runs if run[1]["source_hash"] == source_hash]
    result, entry = (current or runs or [({}, {})])[-1]
    where = [result["machine"]["gpu"], result["created"][:10], result["file"]] if runs else ["", "", ""]
    found = {figure["name"]: Figure(**figure) for figure in entry.get("figures", [])}
    rows = []
    for name, goal in FIGURES[part].items():
        figure = found.get(name)
        value = "" if figure is None else f"{figure.value:.4g}"
        status = "never run" if not runs else "not measured" if figure is None else figure.verdict or "measured"
        if runs and not current:
            status = "stale"
        rows.append([part, name, value, Figure(name, 0.0, **goal).goal, status, *where])
    return rows


def main(argv: list[str] | None = None) -> int:
    """Writes the page, or with ``--check`` tells whether it is up to date (exit status 1 if not)."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_status", description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="fail where the page is out of date; write nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of result files")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page")
    args = parser.parse_args(argv)
    text = page(folder=args.results)
    if args.check:
        if args.page.exists() and args.page.read_text() == text:
            return 0
        print(f"{args.page} is out of date: run python -m benchmarks.gpu_status", file=sys.stderr)
        return 1
    args.page.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
