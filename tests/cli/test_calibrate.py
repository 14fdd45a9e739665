"""The command ``calibrate``, and ``--precision`` of the commands that embed."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

import spkfast as package
from spkfast.cli import common
from spkfast.nn import input_ranges
from spkfast.ops._packing import PRECISIONS
from tests.models.foreign import foreign_state, small_model


@pytest.fixture
def own(model, tmp_path):
    """A copy of the model to write into."""
    return shutil.copytree(model, tmp_path / "own")


def test_precisions_are_those_of_the_ops():
    assert common.PRECISIONS == PRECISIONS


def test_calibrates_in_place(spkfast, own, data):
    before = package.SpeakerEncoder.load(own)
    result = json.loads(spkfast("calibrate", own, data, "--json").out)
    assert (result["out"], result["calibrated_on"], result["held_out"], result["skipped"]) == (str(own), 8, 1, 0)
    assert [row["precision"] for row in result["check"]] == ["int8", "bf16"]
    for row, bound in zip(result["check"], (0.995, 0.9995), strict=True):
        assert bound < row["lowest_cosine"] <= row["mean_cosine"] < 1
    after = package.SpeakerEncoder.load(own, precision="int8")
    found = {
        name: {key: list(bounds) for key, bounds in of_layer.items()}
        for name, of_layer in input_ranges(after.model).items()
    }
    assert found == result["input_ranges"] and set(found["encoder.blk1"]) == {"in", "out", "res.0", "res.1", "res.2"}
    assert package.SpeakerEncoder.load(own).fingerprint == before.fingerprint
    assert sorted(path.name for path in own.iterdir()) == ["config.yaml", "model.safetensors"]


def test_calibrates_into_another_folder(spkfast, model, data, tmp_path):
    before = (model / "config.yaml").read_bytes()
    outcome = spkfast("calibrate", model, data, "--out", tmp_path / "new", "--max-utterances", "4")
    assert outcome.status == 0 and (model / "config.yaml").read_bytes() == before
    out = outcome.out
    assert f"written to     {tmp_path}/new\n" in out and "calibrated on  4 utterances\n" in out
    assert "cosine with fp32, 1 other utterances" in out
    assert [line.split()[0] for line in out.splitlines() if line.startswith("encoder.")] == [
        f"encoder.{name}" for name in ("stem", "blk1", "blk2", "blk3", "mfa")
    ]
    lowest = {line.split()[0]: line.split() for line in out.splitlines() if line.startswith(("int8", "bf16"))}
    assert all(0.99 < float(low) <= float(mean) <= 1 for _, mean, low in lowest.values()) and len(lowest) == 2
    ranges = input_ranges(package.SpeakerEncoder.load(tmp_path / "new", precision="int8").model)
    stem = next(line for line in out.splitlines() if line.startswith("encoder.stem")).split()
    assert stem[1:] == ["1", *(f"{bound:.4g}" for bound in ranges["encoder.stem"]["in"])]


def test_a_lack_of_kernels_is_told_before_audio_is_read(spkfast, own, data, monkeypatch):
    monkeypatch.setattr("spkfast.backends.resolve", lambda *_: "reference")
    monkeypatch.setattr(package.SpeakerEncoder, "load_audio", lambda *_: pytest.fail("read"))
    before = (own / "config.yaml").read_bytes()
    error = spkfast("calibrate", own, data).error
    assert "needs kernels of" in error and (own / "config.yaml").read_bytes() == before


def test_keeps_unknown_keys(spkfast, own, data):
    with open(own / "config.yaml", "a") as file:
        file.write("trained_on: much\n")
    assert spkfast("calibrate", own, data).status == 0
    assert "trained_on: much\n" in (own / "config.yaml").read_text()


def test_choice_follows_from_the_seed(spkfast, model, data, tmp_path):
    def ranges(name, *arguments):
        spkfast("calibrate", model, *arguments, "--out", tmp_path / name, "--max-utterances", "2")
        return input_ranges(package.SpeakerEncoder.load(tmp_path / name).model)

    first = ranges("a", data)
    files = sorted(data.rglob("*.wav"))
    assert ranges("b", *reversed(files)) == first  # however they are named
    assert ranges("c", data, data / "s0", files[0]) == first  # and however often
    assert ranges("d", data, "--seed", "1") != first


def test_calibrates_on_what_can_be_read(spkfast, own, data):
    for name in ("s0/r0", "s1/r1"):
        (data / name / "u.wav").write_bytes(b"")
    status, out, err = spkfast("calibrate", own, data, "--json")
    result = json.loads(out)
    assert status == 0 and (result["calibrated_on"], result["held_out"], result["skipped"]) == (6, 1, 2)
    lines = err.splitlines()
    assert sorted(lines[:2]) == [
        f"skipped: {data}/{name}/u.wav: the file is empty (0 bytes)" for name in ("s0/r0", "s1/r1")
    ]
    assert lines[2] == "2 of 9 files skipped"


def test_calibrates_a_checkpoint_of_another_toolkit(spkfast, data, tmp_path):
    path = tmp_path / "avg_model.pt"
    torch.save(foreign_state(small_model("wespeaker", feature_dim=80), "wespeaker"), path)
    error = spkfast("calibrate", path, data).error
    assert (
        error
        == f"spkfast calibrate: error: {path}: is another toolkit's checkpoint; name the folder to write with --out"
    )
    assert spkfast("calibrate", path, data, "--out", tmp_path / "new").status == 0
    assert package.SpeakerEncoder.load(tmp_path / "new", precision="int8").precision == "int8"


def test_bad_input(spkfast, own, data, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there/notes.txt").write_text("mine")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.wav").write_bytes(b"")
    one = data / "s0/r0/u.wav"
    for arguments, error in (
        ((tmp_path / "none", data), f"{tmp_path}/none: no such model"),
        ((own, tmp_path / "there"), f"{tmp_path}/there: no audio files in this folder"),
        ((own, data, "--out", tmp_path / "there"), f"--out {tmp_path}/there: is there already"),
        ((own, data, "--out", own), f"--out {own}: is there already; name another, or leave it out"),
        (
            (own, data, "--max-utterances", "0"),
            "--max-utterances must be at least 1 and --seed at least 0, got 0 and 0",
        ),
        ((own, one), "calibration needs at least 2 utterances, one of them for the check; got 1"),
        ((own, tmp_path / "bad"), "none of the 1 files could be used"),
        ((own, data, "--sed", "1"), "unknown option --sed (did you mean '--seed'?)"),
    ):
        lines = spkfast("calibrate", *arguments).err.splitlines()
        assert lines[-1].startswith(f"spkfast calibrate: error: {error}"), lines
    (own / "notes.txt").write_text("mine")
    error = spkfast("calibrate", own, data).error
    assert (
        error == f"spkfast calibrate: error: {own}: holds 'notes.txt', which saving would remove; name another folder"
    )
    assert "input_ranges" not in (own / "config.yaml").read_text()


def test_precision_of_the_commands_that_embed(spkfast, own, data):
    a, b, out = data / "s0/r0/u.wav", data / "s1/r0/u.wav", data / "x.npz"
    wrong = f"{own}: precision 'int8' needs calibration: encoder.stem has no range of 'in'; 'spkfast calibrate' finds"
    for arguments in (
        ("verify", a, b, "--model", own),
        ("embed", data, "--out", out, "--model", own),
        ("evaluate", "--data", data, "--model", own),
    ):
        error = spkfast(*arguments, "--precision", "int8").error
        assert error.startswith(f"spkfast {arguments[0]}: error: {wrong}")
    assert spkfast("calibrate", own, data).status == 0
    scores = {}
    for precision in ("fp32", "bf16", "int8"):
        encoder = package.SpeakerEncoder.load(own, precision=precision)
        score = json.loads(spkfast("verify", a, b, "--model", own, "--precision", precision, "--json").out)["score"]
        assert score == pytest.approx(encoder.verify(a, b).score, abs=1e-6)
        npz = data / f"{precision}.npz"
        assert spkfast("embed", data, "--model", own, "--out", npz, "--precision", precision).status == 0
        with np.load(npz) as arrays:
            assert str(arrays["model"]) == encoder.fingerprint
            want = np.stack([encoder.embed(data / key).numpy() for key in arrays["keys"]])
            assert np.abs(arrays["embeddings"] - want).max() < 1e-5 * np.abs(want).max()
        result = json.loads(spkfast("evaluate", "--model", own, "--data", data, "--precision", precision, "--json").out)
        assert result["precision"] == precision
        scores[precision] = want
    assert not np.array_equal(scores["bf16"], scores["fp32"]) and not np.array_equal(scores["int8"], scores["fp32"])
    error = spkfast("embed", data, "--model", own, "--out", data / "bf16.npz").error
    assert "holds embeddings of another model or precision" in error
    trials = ("--embeddings", data / "bf16.npz", "--trials", data / "trials.txt")
    error = spkfast("evaluate", *trials, "--precision", "bf16").error
    assert error.startswith("spkfast evaluate: error: --precision goes with --model: stored embeddings have theirs")
    assert json.loads(spkfast("evaluate", *trials, "--json").out)["precision"] is None
    error = spkfast("verify", a, b, "--model", own, "--precision", "int4").error
    assert error.startswith("spkfast verify: error: argument --precision: invalid choice: 'int4'")
