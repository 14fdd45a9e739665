"""The plumbing of gpu_check on a CPU, its verdicts, and the status page."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmarks.gpu.log_mel_fbank as fbank_cases
import spkfast
from benchmarks import gpu_check, gpu_status
from tests.test_layout import CPU_ALONE, SCORING

KERNELS = {("log_mel_fbank", "native"), ("log_mel_fbank", "triton")}


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts run in this process, which has torch loaded; only pytest gets one of its own."""
    run = gpu_check._Check._run

    def call(self: gpu_check._Check, command: list[str], variables: dict[str, str]) -> tuple[int | None, str]:
        if command[:2] == ["-m", "benchmarks.gpu_check"]:
            return gpu_check.main(command[2:]), ""
        return run(self, command, variables)

    monkeypatch.setattr(gpu_check._Check, "_run", call)


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def check(folder: Path, *options: str) -> int:
    return gpu_check.main(["--device", "cpu", "--ops", "log_mel_fbank", "--results", str(folder), *options])


def test_plumbing_on_a_cpu(
    in_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(tmp_path) == 0
    (result,) = read(tmp_path)
    assert {(entry["op"], entry["backend"]) for entry in result["kernels"]} == KERNELS
    assert result["device"] == "cpu" and result["machine"]["copy_gb_s"] > 0
    assert set(result["machine"]["matmul_tflop_s"]) == {"fp32", "tf32", "bf16"}
    for entry in result["kernels"]:
        assert entry["finished"] and not entry["failed"] and not entry["verified"]
        assert entry["tests"]["skipped"] > 0 and not entry["tests"]["failed"]  # GPU tests, collected without a GPU
        (load,) = entry["workloads"]
        assert load["within_bound"] and load["median_ms"] > 0 and load["gb_s"] > 0 and load["percent_of_copy"] > 0
    assert all(row[2] == "never run" for row in rows(gpu_status.page(folder=tmp_path)))

    assert check(tmp_path) == 0  # Everything is recorded: nothing is left to do.
    assert "0 of 2 kernels to do" in capsys.readouterr().out
    assert len(read(tmp_path)) == 1

    monkeypatch.setattr(gpu_status.Kernel, "source_hash", lambda self: f"changed {self.backend == 'triton'}")
    assert check(tmp_path, "--budget", "1") == 3  # Too little time to begin anything.
    assert "2 of 2 kernels to do" in capsys.readouterr().out
    assert len(read(tmp_path)) == 1


@pytest.mark.full
def test_every_part_in_a_process_of_its_own(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu", "--results", str(tmp_path)]
    command += ["--budget", "3600"]  # nothing here is about how long a loaded machine takes
    result = subprocess.run(command, cwd=gpu_check.ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (written,) = read(tmp_path)
    assert all(entry["finished"] and not entry["failed"] and not entry["error"] for entry in written["kernels"])


def test_unknown_op(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--ops", "log_mel_fbank,fft", "--results", str(tmp_path)]) == 2
    # The ops that have a form for GPUs, and what layers are trained with.
    known = ", ".join(sorted({*spkfast.info()["ops"], "tdnn_training"} - CPU_ALONE - SCORING))
    assert capsys.readouterr().err == f"gpu_check: unknown op 'fft'; known: {known}\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu(in_process: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--results", str(tmp_path)]) == 2
    assert "finds no CUDA device" in capsys.readouterr().err


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    (right,) = fbank_cases.cases(torch.device("cpu"))
    wrong = [
        dataclasses.replace(right, run=lambda backend: right.run(backend) * 1.001),
        dataclasses.replace(right, run=lambda backend: right.run(backend) * float("nan")),
    ]
    monkeypatch.setattr(fbank_cases, "cases", lambda device: [right, *wrong])
    loads = gpu_check._benchmark("log_mel_fbank:reference", "cpu")["workloads"]
    assert [load["within_bound"] for load in loads] == [True, False, False]
    assert ["median_ms" in load for load in loads] == [True, False, False]


LOAD = {"name": "w", "max_abs_error": 1e-5, "own_error": 1e-5, "within_bound": True}
LOAD |= {"median_ms": 1.0, "gb_s": 100.0, "tflop_s": 1.0}
TESTS = {
    "passed": ["test_a[native-cuda]", "test_a[triton-cuda]"],
    "failed": [],
    "skipped": [],
    "timed_out": False,
    "output": "",
}
MACHINE = {"gpu": "Some GPU", "capability": "9.0", "driver": "1", "cuda": "13.0", "torch": "2.11", "triton": "3.6"}
MACHINE |= {"copy_gb_s": 1000.0, "matmul_tflop_s": {"fp32": 50.0}}


def run_with(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    tests: dict[str, Any] | None = None,
    part: dict[str, Any] | None = None,
) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit status and entries by backend of a call whose parts and tests are given."""
    measured = {"workloads": [dict(LOAD)], **(part or {})}
    monkeypatch.setattr(gpu_check._Check, "_part", lambda self, name: MACHINE if name == "machine" else measured)
    monkeypatch.setattr(gpu_check._Check, "_pytest", lambda self, op: {**TESTS, **(tests or {})})
    monkeypatch.setattr(gpu_check._Check, "_build", lambda self, machine: {})
    status = gpu_check.main(["--ops", "log_mel_fbank", "--results", str(folder)])
    return status, {entry["backend"]: entry for entry in read(folder)[-1]["kernels"]}


@pytest.mark.parametrize(
    ("tests", "part", "status", "verified"),
    [
        ({}, {}, 0, {"native": True, "triton": True}),
        ({"failed": ["test_b[native-cuda]"]}, {}, 1, {"native": False, "triton": True}),
        ({"failed": ["test_b[cuda]"]}, {}, 1, {"native": False, "triton": False}),
        ({"skipped": ["test_b[triton-cuda]"]}, {}, 1, {"native": True, "triton": False}),
        ({"passed": ["test_a[native-cuda]", "test_b[cuda]"]}, {}, 1, {"native": True, "triton": False}),
        ({}, {"workloads": []}, 1, {"native": False, "triton": False}),
        ({}, {"workloads": [{**LOAD, "within_bound": False}]}, 1, {"native": False, "triton": False}),
        ({}, {"error": "killed"}, 1, {"native": False, "triton": False}),
        ({"timed_out": True}, {}, 3, {"native": False, "triton": False}),
    ],
    ids=str,
)
def test_verdicts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tests: dict[str, Any],
    part: dict[str, Any],
    status: int,
    verified: dict[str, bool],
) -> None:
    got, entries = run_with(tmp_path, monkeypatch, tests, part)
    assert got == status
    assert {backend: entry["verified"] for backend, entry in entries.items()} == verified


def rows(page: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| log_")]


def test_status_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, page = tmp_path / "results", tmp_path / "page.md"
    options = ["--results", str(results), "--page", str(page)]
    assert gpu_status.main([*options, "--check"]) == 1
    run_with(results, monkeypatch, {"failed": ["test_b[triton-cuda]"]})
    assert gpu_status.main(options) == 0 and gpu_status.main([*options, "--check"]) == 0
    native, triton = rows(page.read_text())
    assert native[:4] == ["log_mel_fbank", "CUDA C++", "verified", "Some GPU"]
    assert native[5:8] == ["torch 2.11, triton 3.6, cuda 13.0, driver 1", "1.0e-05", "w: 1.000 ms, 100 GB/s (10 %)"]
    assert triton[:4] == ["log_mel_fbank", "Triton", "failed", "Some GPU"]
    monkeypatch.setattr(gpu_status.Kernel, "source_hash", lambda self: "changed")
    assert gpu_status.main([*options, "--check"]) == 1
    assert [row[2] for row in rows(gpu_status.page(folder=results))] == ["stale", "stale"]


def test_hash_covers_what_a_kernel_includes(tmp_path: Path) -> None:
    files = {
        "kernels/cuda/op.cu": '#include "op.cuh"\n',
        "kernels/cuda/op.cuh": '#include "common/a.cuh"\n',
        "kernels/cuda/common/a.cuh": '#include "b.cuh"\n',
        "kernels/cuda/common/b.cuh": "",
        "kernels/cuda/common/other.cuh": "",
        "csrc/cuda/op.cpp": '#include "../checks.h"\n#include "op.cuh"\n',
        "csrc/checks.h": "",
        "kernels/triton/op.py": "from spkfast.kernels.triton._shared import add\n",
        "kernels/triton/_shared.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    native, triton = gpu_status.kernels(tmp_path)
    assert (native.backend, triton.backend) == ("native", "triton")
    for kernel, names in (
        (native, [name for name in files if "triton" not in name and "other" not in name]),
        (triton, ["kernels/triton/op.py", "kernels/triton/_shared.py"]),
    ):
        assert [str(path.relative_to(tmp_path)) for path in kernel.sources()] == sorted(names)
        for name in files:
            before = kernel.source_hash()
            (tmp_path / name).write_text((tmp_path / name).read_text() + "\n")
            assert (kernel.source_hash() != before) == (name in names)


def test_committed_page_is_up_to_date() -> None:
    assert gpu_status.main(["--check"]) == 0, "run: make gpu-status"
