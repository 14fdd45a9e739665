"""The networks that peers are given compute what spkfast computes, and only what is in bounds counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.models import bench_ecapa_inference as bench
from benchmarks.peers import contenders, ecapa, graphs
from benchmarks.peers.worker import Worker
from benchmarks.timing import Figure
from spkfast import models

CHANNELS = 16


@pytest.fixture(scope="module")
def features():
    # Utterances that differ, or the last batch norm would show little but rounding.
    generator = torch.Generator().manual_seed(3)
    return torch.randn(8, 30, 80, generator=generator) + 2 * torch.randn(8, 1, 80, generator=generator)


@pytest.fixture(scope="module")
def weights(features):
    return ecapa.random_weights(CHANNELS, features)


@pytest.fixture(scope="module")
def exact(features, weights):
    net = ecapa.Ecapa(CHANNELS).double().eval()
    net.load_state_dict(weights)
    with torch.no_grad():
        return net(features.double()).numpy()


@pytest.fixture
def folder(features, weights, tmp_path):
    torch.save(weights, tmp_path / "weights.pt")
    torch.save(features, tmp_path / "features.pt")
    torch.save(features[None], tmp_path / "calibration.pt")
    return tmp_path


def _cosine(got, exact):
    return bench.assess(got, exact, "fp32", "")["cosine"]


@pytest.mark.parametrize("once", [False, True], ids=["as toolkits", "context once"])
def test_plain_network_is_spkfasts(once, features, weights):
    ours = models.create("ecapa_tdnn", channels=CHANNELS).double().eval()
    plain = ecapa.Ecapa(CHANNELS, context_once=once).double().eval()
    for net in (ours, plain):
        net.load_state_dict(weights)
    with torch.no_grad():
        torch.testing.assert_close(plain(features.double()), ours(features.double()), rtol=1e-10, atol=1e-10)


def test_random_weights_have_statistics_of_what_they_see(features, weights):
    running = torch.cat([v.flatten() for k, v in weights.items() if k.endswith("running_mean")])
    assert running.std() > 0.1
    net = ecapa.Ecapa(CHANNELS).eval()
    net.load_state_dict(weights)
    with torch.no_grad():
        normalised = torch.nn.functional.normalize(net(features))
    # Not one embedding for all.
    assert (normalised @ normalised.T).fill_diagonal_(0).max() < 0.9


def test_products_are_those_of_the_network():
    # Per frame: the sum that the design notes of ECAPA give, and the linear layers once per utterance.
    c, frames = 512, 300
    per_frame = 400 * c + 3 * (2 * c * c + 21 * (c // 8) ** 2) + 3 * c * 1536 + 2 * 1536 * 128
    per_utterance = 3 * 2 * c * 128 + 2 * 1536 * 128 + 2 * 1536 * 192
    total = sum(m * k * n for m, k, n in ecapa.products(2, frames, c))
    assert total == 2 * (frames * per_frame + per_utterance)


@pytest.mark.parametrize("maker", [contenders.torch_eager, contenders.spkfast], ids=["eager", "spkfast"])
@pytest.mark.parametrize(("precision", "least"), [("fp32", 1 - 1e-9), ("bf16", 0.999)])
def test_contenders_embed(maker, precision, least, folder, exact):
    contender = maker(folder, CHANNELS, precision, threads=torch.get_num_threads())
    assert _cosine(contender.output, exact) > least
    assert contender.call().shape == exact.shape


def test_onnxruntime_runs_the_graphs(folder, features, weights, exact):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    net = ecapa.Ecapa(CHANNELS)
    net.load_state_dict(weights)
    graphs.export(net, features, folder / "plain.onnx")
    graphs.quantise(folder / "plain.onnx", features[None], folder / "int8.onnx")
    assert _cosine(contenders.onnxruntime(folder, "plain.onnx", threads=1).output, exact) > 1 - 1e-9
    quantised = _cosine(contenders.onnxruntime(folder, "int8.onnx", threads=1).output, exact)
    assert 0.9 < quantised < 1 - 1e-9  # so few channels average little of the rounding away


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_openvino_runs_the_graph(precision, folder, features, weights, exact):
    pytest.importorskip("openvino")
    net = ecapa.Ecapa(CHANNELS)
    net.load_state_dict(weights)
    graphs.export(net, features, folder / "plain.onnx")
    options = {"folder": folder, "graph": "plain.onnx", "precision": precision, "threads": 1}
    # In a process of its own: it frees the stack that the next signal of its process needs.
    with Worker("benchmarks.peers.contenders:openvino", options, threads=1) as worker:
        assert _cosine(worker.output, exact) > 0.999
        assert "products run in" in worker.note


@pytest.mark.parametrize("form", ["mm", "fp32", "bf16", "int8"])
def test_products_run(form):
    contender = contenders.products(1, 20, 64, form, threads=torch.get_num_threads())
    assert contender.output is None
    contender.call()


@pytest.mark.parametrize(
    ("precision", "error", "counts"),
    [("fp32", 1e-5, True), ("fp32", 3e-5, False), ("bf16", 0.03, True), ("bf16", 0.04, False), ("int8", np.nan, False)],
)
def test_what_is_out_of_bounds_does_not_count(precision, error, counts):
    exact = np.eye(3)
    got = exact + error * np.roll(exact, 1, axis=1)  # at a right angle: the cosine is 1 - error^2 / 2
    row = bench.assess(got, exact, precision, "in threes")
    assert row["counts"] == counts
    assert row["note"] == ("in threes" if counts else "in threes; error out of bounds")
    if counts:
        assert row["relative_error"] == pytest.approx(error)


def test_figures_take_the_best_peer_that_counts():
    times = {
        "spkfast fp32": 10.0, "spkfast bf16": 5.0, "torch eager fp32": 30.0, "openvino fp32": 14.0,
        "onnxruntime fp32": 8.0, "openvino fp32, context once": 12.0, "openvino bf16": 6.0, "torch.compile bf16": 5.5,
        "products fp32": 1.0, "products bf16": 4.5,
    }  # fmt: skip
    rows = {name: {"median_ms": value} for name, value in times.items()}
    rows["onnxruntime fp32"]["counts"] = False
    figures = {figure.name: figure for figure in bench.figures_of(rows, 512, 1)}
    assert figures["best fp32 peer / spkfast fp32"] == Figure("best fp32 peer / spkfast fp32", 1.4, 1.1)
    assert figures["openvino bf16 / spkfast bf16"] == Figure("openvino bf16 / spkfast bf16", 1.2, 1.3)
    assert figures["bare products bf16 / spkfast bf16"].value == pytest.approx(0.9)
    assert figures["best bf16 peer / spkfast bf16"].value == pytest.approx(1.1)
    assert figures["best fp32 peer, context once or not / spkfast fp32"].value == pytest.approx(1.2)
    assert not any("int8" in name for name in figures)  # there is none
    assert {f.at_least for f in bench.figures_of(rows, 1024, 8)} == {1.0, 1.12, 0.85, None}
    wrong = rows | {"spkfast fp32": rows["spkfast fp32"] | {"counts": False}}
    missed = {figure.name: figure for figure in bench.figures_of(wrong, 512, 1)}["best fp32 peer / spkfast fp32"]
    assert missed.value == 0 and missed.verdict == "missed"


def test_absent_contenders_are_shown(monkeypatch, capsys):
    class Absent:
        absent, output, note = "ModuleNotFoundError: No module named 'openvino'", None, ""

        def __init__(self, builder, options, threads):
            if "openvino" not in builder:
                self.absent, self.output = "", self.embeddings

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def seconds(self, calls):
            return 0.001

    def prepare(folder, channels, features, calibration):
        Absent.embeddings = np.ones((len(features), 4))
        return Absent.embeddings

    monkeypatch.setattr(bench, "Worker", Absent)
    monkeypatch.setattr(bench, "_prepare", prepare)
    result = bench.row(torch.zeros(70, 3, 80), 16, 2, repeats=2)
    assert result["absent"]["openvino bf16"] == Absent.absent
    assert "openvino bf16" not in result["contenders"]
    assert result["contenders"]["spkfast fp32"]["relative_error"] == 0
    assert "absent: ModuleNotFoundError" in capsys.readouterr().out


def test_features_are_of_as_many_speakers(monkeypatch):
    monkeypatch.delenv("SPKFAST_SPEECH", raising=False)
    features = bench.features_of_speech(3)
    assert features.shape == (3, 300, 80)
    assert features.std() > 1
