"""Exported files in place of a model: the same embeddings, and a line on what is wrong with a file."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import spkfast
from spkfast import InputError, SpeakerEncoder
from spkfast.errors import BatchSizeError
from spkfast.export import runners, to_onnx
from spkfast.export.aotinductor import to_aotinductor
from tests.export.conftest import relative_errors, voice

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

LENGTHS = (16000, 400, 16000, 7001, 48000, 16000)


@pytest.fixture(scope="module")
def folder(mini, tmp_path_factory):
    """Files of ecapa-mini in each layout."""
    path = tmp_path_factory.mktemp("graphs")
    for layout in ("padded", "equal", "ragged"):
        to_onnx(mini, path / f"{layout}.onnx", layout=layout, validate=False)
    to_onnx(mini, path / "feats.onnx", inputs="features", validate=False)
    to_onnx(mini, path / "half.onnx", inputs="features", precision="fp16", validate=False)
    return path


def changed(path, out, **metadata):
    """A copy of a file with other metadata; None takes a key away."""
    model = onnx.load(path)
    facts = {prop.key: prop.value for prop in model.metadata_props} | metadata
    del model.metadata_props[:]
    for key, value in facts.items():
        if value is not None:
            model.metadata_props.add(key=key, value=value)
    onnx.save(model, out)
    return out


@pytest.mark.parametrize("layout", ["padded", "equal", "ragged", "feats"])
def test_gives_what_the_model_gives(mini, folder, layout):
    encoder = SpeakerEncoder.load(folder / f"{layout}.onnx")
    waveforms = [voice(seed, length) for seed, length in enumerate(LENGTHS)]
    assert relative_errors(encoder.embed_batch(waveforms), mini.embed_batch(waveforms)).max() < 1e-5
    assert encoder.fingerprint == mini.fingerprint and encoder.frontend == mini.frontend
    assert encoder.threshold == mini.threshold and encoder.model.embedding_dim == 192
    score = mini.verify(waveforms[0], waveforms[2])
    assert encoder.verify(waveforms[0], waveforms[2]) == pytest.approx(score, abs=1e-6)
    eight = waveforms[4][::2]
    torch.testing.assert_close(encoder.embed(eight, 8000), mini.embed(eight, 8000), rtol=1e-4, atol=1e-3)


def test_precision_is_that_of_the_file(mini, folder):
    encoder = SpeakerEncoder.load(folder / "half.onnx")
    assert encoder.precision == "fp16" and encoder.fingerprint != mini.fingerprint
    assert SpeakerEncoder.load(folder / "half.onnx", precision="fp16").precision == "fp16"
    waveform = voice(0, 16000)
    cosine = torch.cosine_similarity(encoder.embed(waveform), mini.embed(waveform), dim=0)
    assert cosine > 0.9995
    with pytest.raises(InputError, match=r"half.onnx: was exported at precision 'fp16', 'bf16' was asked for"):
        SpeakerEncoder.load(folder / "half.onnx", precision="bf16")
    with pytest.raises(InputError, match="no layer with an inference form"):
        encoder.precision = "bf16"


def test_audio_is_checked_as_ever(folder):
    encoder = SpeakerEncoder.load(folder / "padded.onnx")
    with pytest.raises(InputError, match="too short: 399 samples at 16000 Hz, one frame needs 400"):
        encoder.embed(voice(0, 399))
    with pytest.raises(InputError, match="holds NaN or infinite samples"):
        encoder.embed(np.full(16000, np.nan, np.float32))
    with pytest.raises(InputError, match="the graph takes at least 400 samples, got 10"):
        encoder.model(torch.zeros(1, 10))
    for nothing in (lambda: encoder.save(folder / "saved"), lambda: encoder.calibrate([voice(0, 16000)])):
        with pytest.raises(InputError, match="this is an exported graph; load the model that it was made of"):
            nothing()
    for export, suffix in ((to_onnx, "onnx"), (to_aotinductor, "pt2")):
        with pytest.raises(InputError, match="has no weights to export: it is an exported graph itself"):
            export(encoder, folder / f"again.{suffix}")
    with pytest.raises(InputError, match="encoder must be a SpeakerEncoder, as its load\\(\\) gives it, got a str"):
        to_onnx("ecapa-mini", folder / "again.onnx")


def test_files_that_cannot_be_used_are_told(mini, folder, tmp_path):
    def message(path, **options):
        with pytest.raises(InputError) as caught:
            SpeakerEncoder.load(path, **options)
        return str(caught.value)

    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes((folder / "feats.onnx").read_bytes()[:1000])
    assert f"{damaged}: onnxruntime cannot load it" in message(damaged)
    assert "no such model" in message(tmp_path / "none.onnx")
    assert "family='wespeaker' was asked for" in message(folder / "feats.onnx", family="wespeaker")
    assert "front-end differs from that of the caller: " in message(folder / "feats.onnx", frontend="3dspeaker")
    for key, value, part in (
        ("spec_hash", "0", "damaged: spec_hash is 0"),
        ("frontend", "{", "damaged: front-end"),
        ("frontend", None, "does not tell its front-end; name it in Python"),
        ("threshold", "{", "damaged metadata"),
        ("threshold", "[1]", "damaged metadata"),
        ("embedding_dim", "many", "damaged metadata"),
    ):
        other = changed(folder / "feats.onnx", tmp_path / "other.onnx", **{key: value})
        assert part in message(other)
    single = onnx.TensorProto.FLOAT
    values = [onnx.helper.make_tensor_value_info(name, single, [1]) for name in ("a", "b", "c")]
    node = onnx.helper.make_node("Add", ["a", "b"], ["c"])
    graph = onnx.helper.make_graph([node], "g", values[:2], values[2:])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10), damaged)
    assert "has the inputs a, b" in message(damaged)


def test_a_foreign_file_of_features_needs_a_front_end(mini, folder, tmp_path):
    foreign = changed(folder / "feats.onnx", tmp_path / "foreign.onnx", frontend=None, spec_hash=None, model_hash=None)
    encoder = SpeakerEncoder.load(foreign, frontend=mini.frontend)
    waveforms = [voice(seed, length) for seed, length in enumerate(LENGTHS)]
    assert relative_errors(encoder.embed_batch(waveforms), mini.embed_batch(waveforms)).max() < 1e-5
    assert encoder.fingerprint and encoder.fingerprint != mini.fingerprint


def test_a_foreign_file_of_fixed_sizes(mini, folder, tmp_path):
    def fixed(axis, size):
        model = onnx.load(folder / "feats.onnx")
        for value in model.graph.input:
            if axis < len(value.type.tensor_type.shape.dim):
                value.type.tensor_type.shape.dim[axis].dim_value = size
        onnx.save(model, tmp_path / "fixed.onnx")
        return tmp_path / "fixed.onnx"

    encoder = SpeakerEncoder.load(fixed(0, 1))
    waveforms = [voice(seed, length) for seed, length in enumerate(LENGTHS)]
    assert relative_errors(encoder.embed_batch(waveforms), mini.embed_batch(waveforms)).max() < 1e-5
    with pytest.raises(InputError, match=r"fixed\.onnx: takes batches of 4 only; export it with that axis free"):
        SpeakerEncoder.load(fixed(0, 4))
    with pytest.raises(InputError, match=r"fixed\.onnx: takes utterances of one length only, 200; export"):
        SpeakerEncoder.load(fixed(1, 200))


def test_limits_of_a_graph_are_kept(mini, folder, tmp_path):
    encoder = SpeakerEncoder.load(folder / "padded.onnx")
    sizes = []
    inner = encoder.model.graph

    def call(inputs):
        sizes.append(tuple(inputs["waveform"].shape))
        return inner(inputs)

    encoder.model.max_batch, encoder.model.max_samples = 2, 16000
    encoder.model._call = lambda values: call(dict(zip(inner.inputs, values, strict=True)))
    waveforms = [voice(seed, 8000 + seed) for seed in range(5)]
    have = encoder.embed_batch(waveforms)
    assert relative_errors(have, mini.embed_batch(waveforms)).max() < 1e-5
    assert sizes == [(2, 8001), (2, 8003), (1, 8004)]
    with pytest.raises(InputError, match=r"audio 1: has 1\.500 s, the exported graph takes 1\.000 s at most"):
        encoder.embed_batch([waveforms[0], voice(0, 24000)])


def test_a_batch_beyond_the_limits_goes_row_by_row(mini, folder):
    encoder = SpeakerEncoder.load(folder / "padded.onnx")
    forward, sizes = encoder.model.forward, []

    def narrow(signal, lengths):  # as an engine whose largest batch and longest row lie in different profiles
        sizes.append(tuple(signal.shape))
        if len(signal) * signal.shape[1] > 16000:
            raise BatchSizeError(f"{len(signal)} x {signal.shape[1]} lies in no profile")
        return forward(signal, lengths)

    encoder.model.forward = narrow
    waveforms = [voice(seed, length) for seed, length in enumerate((8000, 12000, 12000, 7000))]
    assert relative_errors(encoder.embed_batch(waveforms), mini.embed_batch(waveforms)).max() < 1e-5
    assert sizes == [(4, 12000), (1, 7000), (1, 8000), (1, 12000), (1, 12000)]
    with pytest.raises(InputError, match=r"audio 1: 1 x 20000 lies in no profile"):
        encoder.embed_batch([waveforms[0], voice(0, 20000)])


def test_an_export_at_another_precision_is_of_the_same_model(mini, tmp_path):
    encoder = SpeakerEncoder.load("ecapa-mini", device="cpu", precision="bf16")
    assert encoder.fingerprint != mini.fingerprint
    report = to_onnx(encoder, tmp_path / "model.onnx", inputs="features", validate=False)
    assert report.metadata["model_hash"] == mini.fingerprint and encoder.precision == "bf16"


def test_a_device_is_chosen_by_the_file_and_not_by_the_precision(monkeypatch, tmp_path):
    def refuse(path, device):
        raise InputError(f"asked for {device}")

    monkeypatch.setitem(runners.RUNNERS, ".engine", refuse)
    (tmp_path / "model.engine").touch()
    with pytest.raises(InputError, match="asked for None"):
        SpeakerEncoder.load(tmp_path / "model.engine", precision="int8")


def test_every_suffix_has_a_runner():
    from spkfast.inference import GRAPHS

    assert set(runners.RUNNERS) == set(GRAPHS)


def test_metadata_hold_the_whole_front_end(folder):
    facts = {prop.key: prop.value for prop in onnx.load(folder / "padded.onnx").metadata_props}
    assert spkfast.FrontendSpec.from_dict(json.loads(facts["frontend"])).hash == facts["spec_hash"]
