"""Steps that are timed compute the gradients of one network, and only what is in bounds counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.models import bench_ecapa_training as bench
from benchmarks.peers import contenders, ecapa
from benchmarks.timing import Figure

CHANNELS, BATCH, FRAMES = 16, 8, 30
THREADS = torch.get_num_threads()


@pytest.fixture(scope="module")
def features():
    # Utterances that differ, or the last batch norm would show little but rounding.
    generator = torch.Generator().manual_seed(3)
    return torch.randn(BATCH, FRAMES, 80, generator=generator) + 2 * torch.randn(BATCH, 1, 80, generator=generator)


@pytest.fixture
def prepared(features, tmp_path):
    return tmp_path, bench._prepare(tmp_path, CHANNELS, features)


@pytest.mark.parametrize("maker", ["spkfast", "eager", "eager, context once"])
# One value on the other side of ReLU, or the roundings of bf16, weigh more in so small a network than the bounds allow.
@pytest.mark.parametrize(("precision", "least"), [("fp32", 0.999), ("bf16", 0.95)])
def test_gradients_and_steps(maker, precision, least, prepared, monkeypatch):
    folder, exact = prepared
    nets = []
    make = contenders._training_step

    def remember(folder, net, *rest):
        nets.append(net)
        return make(folder, net, *rest)

    monkeypatch.setattr(contenders, "_training_step", remember)
    if maker == "spkfast":
        contender = contenders.spkfast_training(folder, CHANNELS, precision, threads=THREADS)
    else:
        contender = contenders.torch_training(
            folder, CHANNELS, precision, once="once" in maker, compiled=False, threads=THREADS
        )
    assert bench.assess(contender.output, exact, precision, "")["cosine"] > least
    (net,) = nets
    weights = torch.load(folder / "weights.pt")
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=0)  # the check has left no trace
    contender.call()
    assert not torch.equal(net.get_parameter("encoder.stem.conv.weight"), weights["encoder.stem.conv.weight"])
    assert all(value.grad is None for value in net.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_products_are_those_of_a_step(precision, monkeypatch):
    operations = []
    monkeypatch.setattr(torch, "mm", lambda a, b: operations.append(2 * a.numel() * b.shape[1]))
    contender = contenders.training_products(2, FRAMES, 64, precision, threads=THREADS)
    assert contender.output is None
    assert sum(operations) == bench.flops_of_step(2, FRAMES, 64)


def test_operations_are_three_forward_passes_without_the_gradient_of_the_features():
    forward = 2 * sum(m * k * n for m, k, n in ecapa.products(32, 200, 512))
    assert bench.flops_of_step(32, 200, 512) == 3 * forward - 2 * 32 * 200 * 400 * 512


@pytest.mark.parametrize(
    ("precision", "error", "loss_error", "note"),
    [
        ("fp32", 2e-3, 1e-7, ""),
        ("fp32", 3e-3, 0.0, "error of the gradients out of bounds"),
        ("fp32", 0.0, 1e-5, "error of the loss out of bounds"),
        ("bf16", 0.1, 1e-3, ""),
        ("bf16", 0.15, 0.0, "error of the gradients out of bounds"),  # at a right angle: the cosine is too low
        ("bf16", np.nan, np.nan, "error of the gradients out of bounds; error of the loss out of bounds"),
    ],
)
def test_what_is_out_of_bounds_does_not_count(precision, error, loss_error, note):
    exact = np.array([4.0, 3.0, 0.0])
    row = bench.assess(np.array([4 * (1 + loss_error), 3.0, 3 * error]), exact, precision, "")
    assert (row["counts"], row["note"]) == (not note, note)
    if not note:
        assert row["relative_error"] == pytest.approx(error)
        assert row["loss_error"] == pytest.approx(loss_error)


def test_gradients_too_large_do_not_count():
    exact = np.array([4.0, 3.0, 0.0])
    assert not bench.assess(exact * [1, 1.5, 1], exact, "bf16", "")["counts"]  # a cosine does not see it


def test_figures_leave_out_what_does_not_count():
    times = {
        "spkfast fp32": 10.0, "spkfast bf16": 5.0, "torch eager fp32": 15.0, "torch.compile fp32": 11.0,
        "torch eager bf16": 6.0, "torch.compile bf16": 5.5, "torch eager fp32, context once": 12.0,
        "products fp32": 8.0, "products bf16": 4.0,
    }  # fmt: skip
    rows = {name: {"median_ms": value} for name, value in times.items()}
    rows["torch.compile bf16"]["counts"] = False
    figures = {figure.name: figure for figure in bench.figures_of(rows)}
    name = "torch eager fp32 / spkfast fp32"
    assert figures[name] == Figure(name, 1.5, 1.25)
    assert figures["torch.compile fp32 / spkfast fp32"].at_least == 1.1
    assert figures["torch eager bf16 / spkfast bf16"].verdict == "missed"
    assert "torch.compile bf16 / spkfast bf16" not in figures
    assert figures["torch eager fp32, context once / spkfast fp32"].goal == ""
    assert figures["products bf16 / spkfast bf16"].value == pytest.approx(0.8)
    wrong = rows | {"spkfast fp32": rows["spkfast fp32"] | {"counts": False}}
    assert {figure.name: figure for figure in bench.figures_of(wrong)}[name].verdict == "missed"


def test_row_has_all_contenders(features, monkeypatch):
    class Instant:
        absent, note = "", ""

        def __init__(self, builder, options, threads):
            self.output = None if "products" in builder else self.exact.astype(np.float32)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def seconds(self):
            return 0.5

    def prepare(folder, channels, features):
        Instant.exact = np.array([4.0, 3.0, 0.0])
        return Instant.exact

    monkeypatch.setattr(bench, "Worker", Instant)
    monkeypatch.setattr(bench, "_prepare", prepare)
    monkeypatch.setattr(bench, "_peak_elsewhere", lambda entry: 2**20)
    result = bench.row(features, CHANNELS, repeats=2)
    assert len(result["contenders"]) == 12
    ours = result["contenders"]["spkfast bf16"]
    assert (ours["counts"], ours["peak_mib"], ours["utterances_per_s"]) == (True, 1.0, 2 * BATCH)
    assert ours["gflop_per_s"] == pytest.approx(2e-9 * bench.flops_of_step(BATCH, FRAMES, CHANNELS))
    assert "relative_error" not in result["contenders"]["products fp32"]


def test_peak_of_a_step(prepared):
    folder, _ = prepared
    options = {"folder": folder, "channels": CHANNELS, "precision": "fp32", "threads": THREADS}
    peak = bench._peak_elsewhere(bench._Entry("fp32", "torch_training", options | {"once": False, "compiled": False}))
    if peak is None:
        pytest.skip("this kernel does not tell the peak of a process")
    # At least all gradients, at most more than any such step needs.
    gradients = sum(4 * value.numel() for value in ecapa.Ecapa(CHANNELS).parameters())
    assert gradients < peak < 100 * gradients
