"""Whole networks on a GPU: what is timed is checked, figures take what counts, and gpu_check records them once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_check, gpu_status
from benchmarks.data import bench_augmentation_gpu
from benchmarks.gpu_status import FIGURES
from benchmarks.models import bench_ecapa_gpu as bench
from benchmarks.models import bench_latency_gpu, bench_training_gpu
from benchmarks.timing import Figure

EMBEDDINGS, TRAINING, LATENCY = "embeddings, 512 channels", "training, 512 channels", "latency, 512 channels"
PEERS = {"torch eager bf16", "torch.compile bf16"}


def test_every_part_has_figures() -> None:
    modules = (bench, bench_augmentation_gpu, bench_latency_gpu, bench_training_gpu)
    assert [name for module in modules for name in module.PARTS] == list(FIGURES)


def test_augmentation_on_a_cpu() -> None:
    (name,) = bench_augmentation_gpu.PARTS
    result = bench_augmentation_gpu.measure(name, "cpu")
    assert [figure["name"] for figure in result["figures"]] == list(FIGURES[name])
    assert all(row["counts"] and row["max_error"] == 0 for row in result["contenders"].values())
    json.dumps(result)


@pytest.mark.full
def test_latency_of_a_waveform_on_a_cpu() -> None:
    torch._dynamo.reset()
    (name,) = bench_latency_gpu.PARTS
    result = bench_latency_gpu.measure(name, "cpu")
    # A network of few channels with random weights, whose rounding bfloat16 does not average out as a full one's.
    assert not result["absent"] and all(row["cosine"] > 0.99 for row in result["contenders"].values())
    figures = {figure["name"] for figure in result["figures"]}
    assert figures and figures <= set(FIGURES[name])
    json.dumps(result)


def test_training_from_files_on_a_cpu() -> None:
    (name,) = bench_training_gpu.PARTS
    result = bench_training_gpu.measure(name, "cpu")
    assert [figure["name"] for figure in result["figures"]] == list(FIGURES[name])
    ours, usual = (result["contenders"][key] for key in ("spkfast", "usual way"))
    assert ours["repeats"] == usual["repeats"] == 2 and 0 <= ours["loader_wait_percent"] <= 100
    json.dumps(result)


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        (EMBEDDINGS, {"spkfast bf16", "spkfast fp16", "spkfast fp32"}),
        (LATENCY, {"spkfast bf16", "spkfast bf16 in a graph"}),  # without a GPU there is no graph to replay
        (TRAINING, {"spkfast bf16"}),
    ],
)
def test_parts_on_a_cpu(name: str, ours: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    nets = []
    if name == LATENCY:
        torch._dynamo.reset()
    else:
        monkeypatch.setattr(bench, "_compiled", lambda net, device: nets.append(net) or net)
    result = bench.measure(name, "cpu")
    assert set(result["contenders"]) == ours | PEERS and not result["absent"]
    for key, row in result["contenders"].items():
        # Half precision weighs more in so small a network; of its gradients more than the bounds allow.
        assert row["cosine"] > (0.9 if name == TRAINING else 0.999), key
        assert row["counts"] or name == TRAINING, key
        assert row["utterances_per_s"] == pytest.approx(1e3 * (1 if name == LATENCY else 4) / row["median_ms"])
    # No figure names what is never made.
    rows = {key: {"median_ms": 1.0, "utterances_per_s": 1.0} for key in (*result["contenders"], "replay of the graph")}
    assert [figure.name for figure in bench.figures_of(name, rows)] == list(FIGURES[name])
    json.dumps(result)
    if name == TRAINING:  # steps are whole ones
        (net,) = nets
        part = bench.Part("training", 16, 4, 12)
        before = bench._prepare(part, torch.device("cpu"))[1]
        for key in ("projector.fc.weight", "encoder.stem.conv.bias", "encoder.stem.bn.running_mean"):
            assert not torch.equal(net.state_dict()[key], before[key])
        assert all(value.grad is None for value in net.parameters())


def test_what_cannot_be_made_is_absent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(net: object, device: object) -> None:
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(bench, "_compiled", refuse)
    result = bench.measure(LATENCY, "cpu")
    assert result["absent"] == {"torch.compile bf16": "RuntimeError: no compiler"}
    assert "torch.compile bf16" not in result["contenders"]
    assert "absent: RuntimeError: no compiler" in capsys.readouterr().out


def test_figures_leave_out_what_does_not_count() -> None:
    times = {"spkfast bf16": 2.0, "spkfast fp32": 8.0, "torch eager bf16": 8.0, "torch.compile bf16": 2.5}
    rows: dict[str, dict[str, Any]] = {
        name: {"median_ms": value, "utterances_per_s": 256e3 / value} for name, value in times.items()
    }
    figures = {figure.name: figure for figure in bench.figures_of(EMBEDDINGS, rows)}
    assert figures["torch eager bf16 / spkfast bf16"] == Figure("torch eager bf16 / spkfast bf16", 4.0, 3.0)
    assert figures["torch.compile bf16 / spkfast bf16"].verdict == "missed"
    assert figures["utterances/s of spkfast bf16"] == Figure("utterances/s of spkfast bf16", 128e3, 150e3)
    assert "utterances/s of spkfast fp16" not in figures
    rows["torch.compile bf16"]["counts"] = rows["spkfast bf16"]["counts"] = False
    figures = {figure.name: figure for figure in bench.figures_of(EMBEDDINGS, rows)}
    assert list(figures) == ["torch eager bf16 / spkfast bf16", "utterances/s of spkfast fp32"]
    assert figures["torch eager bf16 / spkfast bf16"].value == 0  # ours is out of bounds
    latency = bench.figures_of(LATENCY, {"replay of the graph": {"median_ms": 0.05}})
    assert [(figure.value, figure.verdict) for figure in latency] == [(pytest.approx(50), "met")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr("sys.argv", ["bench", "--out", str(tmp_path / "out.json")])
    bench.main()
    assert capsys.readouterr().out == "nothing measured: torch finds no CUDA device\n"
    assert not (tmp_path / "out.json").exists()


def check(
    folder: Path, monkeypatch: pytest.MonkeyPatch, part: dict[str, Any], failed: tuple[str, ...] = (), ops: str = "all"
) -> int:
    """Exit status of a call where there are no kernels, and every part of a network is measured like this."""
    machine = {"gpu": "Some GPU", "copy_gb_s": 1.0, "matmul_tflop_s": {"fp32": 1.0}}
    tests = {"passed": [], "failed": list(failed), "skipped": [], "timed_out": False, "output": ""}
    monkeypatch.setattr(gpu_check, "kernels", list)
    monkeypatch.setattr(gpu_check._Check, "_part", lambda self, name: machine if name == "machine" else part)
    monkeypatch.setattr(gpu_check._Check, "_pytest", lambda self, op: tests)
    monkeypatch.setattr(gpu_check._Check, "_build", lambda self, machine: {})
    return gpu_check.main(["--ops", ops, "--results", str(folder)])


def rows_of(folder: Path) -> dict[tuple[str, str], list[str]]:
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in gpu_status.page(folder=folder).splitlines() if line
    ]
    return {(row[0], row[1]): row[2:] for row in cells if row and row[0] in FIGURES}


RATIO = "torch eager bf16 / spkfast bf16"
MEASURED = {
    "case": EMBEDDINGS,
    "contenders": {"spkfast bf16": {"median_ms": 1.0, "relative_error": 1e-3}},
    "absent": {"torch.compile bf16": "none here"},
    "figures": [{"name": RATIO, "value": 2.5, "at_least": 3.0, "at_most": None}],
}


def test_networks_are_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(tmp_path, monkeypatch, MEASURED) == 0
    shown = capsys.readouterr().out
    assert f"{RATIO}: 2.5 (at least 3: missed)" in shown and "torch.compile bf16: absent: none here" in shown
    assert "spkfast bf16: 1.000 ms, relative error 1.0e-03" in shown
    (path,) = tmp_path.glob("*.json")
    assert [entry["name"] for entry in json.loads(path.read_text())["models"]] == list(FIGURES)
    assert check(tmp_path, monkeypatch, MEASURED) == 0
    assert len(list(tmp_path.glob("*.json"))) == 1
    monkeypatch.setattr(gpu_check, "network_hash", lambda: "changed")
    assert check(tmp_path, monkeypatch, MEASURED) == 0
    assert len(list(tmp_path.glob("*.json"))) == 2


def test_networks_come_with_all_ops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = gpu_status.Kernel("log_mel_fbank", "triton"), gpu_status.Kernel("tdnn_layer", "triton")
    check(tmp_path, monkeypatch, MEASURED)
    asked = []
    monkeypatch.setattr(gpu_check, "kernels", lambda: list(kernel))
    monkeypatch.setattr(gpu_check._Check, "run", lambda self: asked.append(self.networks) or 0)
    for ops in ("all", "tdnn_layer", "tdnn_layer,log_mel_fbank"):
        gpu_check.main(["--ops", ops, "--results", str(tmp_path)])
    assert asked == [True, False, False]


@pytest.mark.parametrize(
    ("part", "failed", "status"),
    [
        ({"error": "killed"}, (), 1),
        ({"error": "out of time", "timed_out": True}, (), 3),
        (MEASURED, ("test_on_a_gpu",), 1),
    ],
    ids=["error", "time", "tests"],
)
def test_what_failed_is_done_again(
    part: dict[str, Any], failed: tuple[str, ...], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check(tmp_path, monkeypatch, part, failed) == status
    assert check(tmp_path, monkeypatch, MEASURED) == 0
    first, second = (json.loads(path.read_text())["models"] for path in sorted(tmp_path.glob("*.json")))
    assert (
        [entry["name"] for entry in second]
        == [entry["name"] for entry in first if entry["failed"] or not entry["finished"]]
        != []
    )


def test_status_of_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {row[2] for row in rows_of(tmp_path).values()} == {"never run"}
    assert rows_of(tmp_path)[EMBEDDINGS, RATIO] == ["", "at least 3", "never run", "", "", ""]
    check(tmp_path, monkeypatch, {"error": "out of time", "timed_out": True})
    assert {row[2] for row in rows_of(tmp_path).values()} == {"never run"}
    check(tmp_path, monkeypatch, MEASURED)
    rows = rows_of(tmp_path)
    assert rows[EMBEDDINGS, RATIO][:4] == ["2.5", "at least 3", "missed", "Some GPU"]
    assert rows[EMBEDDINGS, "utterances/s of spkfast bf16"][:4] == ["", "at least 150000", "not measured", "Some GPU"]
    monkeypatch.setattr(gpu_status, "network_hash", lambda root: "changed")
    assert {row[2] for row in rows_of(tmp_path).values()} == {"stale"}
