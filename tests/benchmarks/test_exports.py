"""Exported graphs are compared with what they were exported from, and their front-ends with their bare products."""

from __future__ import annotations

import importlib
import json
import math

import numpy as np
import pytest
import torch

from benchmarks import report
from benchmarks.accuracy import exports, precisions
from benchmarks.models import bench_export as bench
from benchmarks.peers import ecapa, exported
from benchmarks.timing import Timing
from spkfast import SpeakerEncoder, frontend, functional, models
from spkfast.data.lists import Trial
from spkfast.export.fbank import FbankGraph
from tests.export.conftest import voice

run = importlib.import_module("benchmarks.__main__")

CHANNELS = 16
SPEC = frontend("wespeaker")


@pytest.fixture(scope="module")
def speech():
    return torch.stack([torch.from_numpy(voice(seed, 16000)) for seed in range(bench._CALIBRATION)])


@pytest.fixture(scope="module")
def encoder(speech):
    features, _ = functional.log_mel_fbank(speech[:8], spec=SPEC)
    net = models.create("ecapa_tdnn", channels=CHANNELS)
    net.load_state_dict(ecapa.random_weights(CHANNELS, features))
    made = SpeakerEncoder(net, SPEC, device="cpu")
    made.calibrate(list(speech[:8].numpy()))
    return made


def _needs_exporter():
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)


def test_ways_are_the_precisions_and_both_targets_of_int8():
    assert [name for name, *_ in exports.ways(list(exports._BOUNDS))] == [
        "fp32", "fp16", "bf16", "int8, cpu", "int8, tensorrt",
    ]  # fmt: skip
    assert list(exports.ways(["fp16"])) == [("fp16", "fp16", "cpu")]


@pytest.mark.parametrize(
    ("precision", "target"),
    [
        ("fp16", "cpu"),
        *(
            pytest.param(*way, marks=pytest.mark.full)
            for way in (("fp32", "cpu"), ("int8", "cpu"), ("int8", "tensorrt"))
        ),
    ],
)
def test_embeddings_of_a_graph_keep_the_order_of_utterances(precision, target, encoder, speech):
    _needs_exporter()
    # More than a batch, the longest first.
    waveforms = [row[: 9000 - 500 * i].numpy() for i, row in enumerate(speech[: exports._BATCH + 3])]
    got = exports.embed(exports.graph(encoder, precision, target), precision, waveforms)
    want = encoder.embed_batch(waveforms)
    assert torch.cdist(got, want).argmin(dim=1).tolist() == list(range(len(waveforms)))
    errors = (got - want).norm(dim=1) / want.norm(dim=1)
    # The bound of fp32; half precision, or bytes, cannot come below it by rounding each of some thirty layers.
    assert (errors.max() < 1e-4) == (precision == "fp32")


def _embeddings(error):
    """Of four speakers with six utterances each, the last of which is turned so that its cosine is 1 - error."""
    generator = torch.Generator().manual_seed(0)
    paths = [f"s{speaker}/{k}.wav" for speaker in range(4) for k in range(6)]
    voices = torch.randn(4, 16, generator=generator).repeat_interleave(6, dim=0)
    plain = torch.nn.functional.normalize(voices + torch.randn(24, 16, generator=generator), dim=1)
    turned = plain.clone()
    aside = torch.nn.functional.normalize(
        torch.randn(16, generator=generator) @ (torch.eye(16) - plain[-1:].T @ plain[-1:]), dim=0
    )
    turned[-1] = (1 - error) * plain[-1] + math.sqrt(1 - (1 - error) ** 2) * aside
    trials = [Trial(enrol=a, test=b, target=a[:2] == b[:2]) for i, a in enumerate(paths) for b in paths[i + 1 :]]
    return trials, paths, {"torch": plain, "way": turned}


@pytest.mark.parametrize(
    ("error", "bounds", "within"),
    [
        (0.001, {"change_percent": 100.0, "cosine": 0.998}, True),
        (0.003, {"change_percent": 100.0, "cosine": 0.998}, False),
        (0.003, {"change_percent": 100.0}, True),
        (0.003, {"score": 1e-3}, False),  # turned by acos(0.997) = 0.08
        (0.0, {"change_percent": 0.0, "score": 1e-6, "cosine": 1 - 1e-6}, True),
        (0.9, {"change_percent": 0.001}, False),
    ],
)
def test_only_what_keeps_all_of_its_bounds_is_within(error, bounds, within):
    rows = precisions.compare(*_embeddings(error), {"way": bounds})
    assert rows["way"]["within_bounds"] == within and rows["way"]["bounds"] == bounds
    assert rows["way"]["lowest_cosine"] == pytest.approx(1 - error, abs=1e-6)
    assert "within_bounds" not in rows["torch"]


def test_products_are_those_of_the_front_end(speech, tmp_path):
    _needs_exporter()
    import onnx
    import onnxruntime

    bench.write_products(SPEC, tmp_path / "products.onnx")
    assert [node.op_type for node in onnx.load(tmp_path / "products.onnx").graph.node] == ["Conv", "MatMul"]
    session = onnxruntime.InferenceSession(str(tmp_path / "products.onnx"))
    waveform = speech[:1, :4000]
    power = torch.rand(1, FbankGraph(SPEC).get_buffer("_mel").shape[1], 23)
    spectrum, energies = session.run(None, {"samples": waveform[:, None].numpy(), "power": power.numpy()})
    # The kernel takes the mean of a frame out, so that only the logarithm's own steps are missing.
    real, imaginary = np.split(spectrum, 2, axis=1)
    mel = FbankGraph(SPEC).get_buffer("_mel").numpy()
    features = np.log(np.maximum(mel @ (real**2 + imaginary**2), np.finfo(np.float32).eps))[0].T
    want, _ = functional.log_mel_fbank(waveform, spec=SPEC)
    np.testing.assert_allclose(features - features.mean(axis=0), want[0], atol=1e-3)
    assert energies.shape == (1, 80, 23)


@pytest.mark.full
def test_contenders_compute_what_pytorch_does(encoder, speech, tmp_path):
    _needs_exporter()
    prepared = bench.prepare(tmp_path, CHANNELS, SPEC, speech)
    wanted = bench.write_inputs(tmp_path, prepared, speech[0, :8000])
    for name, entry in bench._entries():
        # Each in a process of its own: OpenVINO frees the stack that the next signal of its process needs.
        with bench.start(tmp_path, entry) as worker:
            if worker.absent and entry.builder == "openvino" and importlib.util.find_spec("openvino") is None:
                continue
            row = bench.assess(worker.output, wanted.get(entry.wanted), entry.precision, worker.note)
            if entry.wanted:
                # So few channels average little of the rounding of bytes away.
                assert row["counts"] or (row["cosine"] > 0.9 and entry.precision == "int8"), (name, row)
            else:
                assert "counts" not in row
            assert worker.seconds() > 0


def test_native_contender_embeds(encoder, speech, tmp_path):
    encoder.save(tmp_path / exported.MODEL)
    wanted = bench.write_inputs(tmp_path, encoder, speech[0, :8000])
    contender = exported.native(tmp_path, "fp32", threads=torch.get_num_threads())
    assert bench.assess(contender.output, wanted["embedding"], "fp32", "")["counts"]
    assert wanted["feats"].shape == (1, 48, 80)


@pytest.mark.parametrize(
    ("precision", "error", "counts"),
    [("fp32", 5e-5, True), ("fp32", 2e-4, False), ("fp16", 0.03, True), ("fp16", 0.04, False), ("int8", np.nan, False)],
)
def test_what_is_out_of_bounds_does_not_count(precision, error, counts):
    exact = np.array([[1.0, 0.0]], np.float32)
    row = bench.assess(exact + np.array([[0.0, error]], np.float32), exact, precision, "said")
    assert row["counts"] == counts
    assert row["note"] == ("said" if counts else "said; error out of bounds")


def test_interval_of_a_median_is_exact():
    # Of 20 values the 6th and the 15th: P(at most 5 of 20 coins) = 0.0207, the largest below 2.5 %.
    assert bench.median_interval(np.arange(1.0, 21.0)) == (6.0, 10.5, 15.0)
    low, middle, high = bench.median_interval(np.array([3.0, 1.0, 2.0]))
    assert middle == 2.0 and math.isnan(low) and math.isnan(high)


def test_figures_are_of_differences_within_rounds():
    milliseconds = {
        "spkfast fp32": 10, "spkfast bf16": 4, "spkfast int8": 2, "onnxruntime fp32, padded": 12,
        "onnxruntime fp32, padded, features": 11, "onnxruntime front-end, padded": 1.2, "onnxruntime bare products": 1,
        "openvino fp32, padded": 14, "openvino fp16, padded": 10, "onnxruntime int8, padded": 1,
    }  # fmt: skip
    timings = {name: Timing((time / 1e3,)) for name, time in milliseconds.items()}
    rounds = np.linspace(1, 3, 20)  # a machine that grows slower: medians apart would hide the difference
    paired = {
        "onnxruntime fp32, padded": Timing(tuple(8e-3 * rounds + 1.4e-3)),
        "onnxruntime fp32, padded, features": Timing(tuple(8e-3 * rounds)),
        "onnxruntime bare products": Timing((1e-3,)),
    }
    rows = {name: {"note": "fast"} for name in milliseconds}
    rows["onnxruntime int8, padded"]["counts"] = False
    figures = {figure.name: figure for figure in bench.figures_of(timings, paired, rows, 512)}
    name = "onnxruntime, padded: graph of waveforms - features, over bare products"
    assert figures[name].value == pytest.approx(1.4) and figures[name].verdict == "missed"
    assert rows["onnxruntime fp32, padded"]["note"].startswith("fast; 1.40 ms (1.40 to 1.40) more than")
    alone = figures["onnxruntime, padded: graph of the front-end alone, over bare products"]
    assert alone.value == pytest.approx(1.2) and not alone.goal
    best = figures["best fp32 graph / spkfast fp32"]
    assert best.value == pytest.approx(1.2) and best.at_least == 1.1
    assert figures["best fp16 graph / spkfast bf16"].value == pytest.approx(2.5)
    assert not any("int8" in name or "openvino," in name for name in figures)  # out of bounds, and incomplete
    rows["spkfast fp32"]["counts"] = False
    wrong = {figure.name: figure for figure in bench.figures_of(timings, paired, rows, 1024)}
    assert wrong["best fp32 graph / spkfast fp32"].value == 0 and wrong[best.name].at_least == 1.0


def test_speech_is_enough_for_calibration_and_timing(monkeypatch):
    monkeypatch.delenv("SPKFAST_SPEECH", raising=False)
    speech = bench.read_speech(SPEC, [1, 4])
    assert speech.shape == (bench._CALIBRATION + 2, 48000)
    assert (speech.std(axis=1) > 0).all()


def test_benchmarks_are_in_the_table_with_a_quick_form(monkeypatch, tmp_path):
    monkeypatch.setenv("SPKFAST_SPEECH", "/speech")
    programs = {program.name: program for program in run.find()}
    assert (programs["exports"].group, programs["exports"].needs) == ("accuracy", ("speech",))
    assert (programs["export"].group, programs["export"].needs) == ("models", ())
    out = ["--out", str(tmp_path)]
    quick = programs["exports"].arguments(tmp_path, quick=True)
    assert quick == [*out, "--data", "/speech", "--precisions", "fp32"]
    quick = programs["export"].arguments(tmp_path, quick=True)
    assert quick == [*out, "--repeats", "2", "--channels", "512", "--seconds", "1"]


def test_exports_have_a_section_of_their_own(tmp_path):
    rate = {"eer_percent": 5.0, "eer_low_percent": 1.0, "eer_high_percent": 9.0, "min_dcf": 0.5, "lowest_cosine": 1.0}
    change = {"change_percent": -0.25, "change_low_percent": -0.5, "change_high_percent": 0.125}
    way = rate | change | {"largest_score_difference": 0.01, "bounds": {}, "within_bounds": True}
    record = {
        "benchmark": "exports",
        "date": "2026-01-01",
        "machine": {"cpu": "some CPU", "cores": 2, "torch": "2.11.0"},
        "model": {"name": "some_model", "config": {"channels": 128}},
        "training": {"recipe": "mini.yaml", "differences": {"steps": 7, "frontend.preset": "espnet"}, "steps": 7},
        "lists": {"a.txt": {"torch": rate, "int8, tensorrt": way}},
    }
    folder = tmp_path / "some-machine"
    folder.mkdir()
    (folder / "exports.json").write_text(json.dumps(record))
    lines = report.page(tmp_path).splitlines()
    assert "## The same weights through exported graphs: EER and scores, `some_model`" in lines
    assert 'of 128 channels, trained by `configs/mini.yaml` with `steps: 7; frontend.preset: "espnet"`; ' in "".join(
        lines
    )
    changed = "-0.25 (-0.50 to +0.12) | 1.0e-02 | 1.000000 | yes |"
    assert f"| a.txt | int8, tensorrt | 5.00 (1.00 to 9.00) | 0.5000 | {changed}" in lines
