"""The model that comes with the package: found by its name, whole, never written to, and second to a path."""

from __future__ import annotations

import json

import pytest
import torch

from spkfast import InputError, SpeakerEncoder, models
from spkfast.cli.common import MODEL_HELP
from spkfast.cli.main import main
from spkfast.models import bundled
from tests.training.corpus import make_tones

NAME = "ecapa-mini"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def save_small(folder):
    sizes = {"mfa_channels": 32, "embedding_dim": 24, "attention_channels": 8, "se_channels": 8, "scale": 4}
    SpeakerEncoder(models.create("ecapa_tdnn", channels=16, **sizes), "wespeaker").save(folder)


def test_is_found_by_its_name():
    assert bundled.list() == [NAME] and all(name in MODEL_HELP for name in bundled.list())
    assert sorted(path.name for path in bundled.folder(NAME).iterdir()) == [
        "README.md",
        "config.yaml",
        "model.safetensors",
    ]
    encoder = SpeakerEncoder.load(NAME, device="cpu")
    assert encoder.embed(0.1 * torch.randn(16000)).shape == (encoder.model.embedding_dim,)
    assert 0 < encoder.threshold.value < 1 and encoder.threshold.list == "held_out"
    assert SpeakerEncoder.load(NAME, frontend="wespeaker").frontend == encoder.frontend


def test_path_of_that_name_wins(tmp_path):
    save_small(tmp_path / NAME)
    assert SpeakerEncoder.load(NAME, device="cpu").model.embedding_dim == 24
    (tmp_path / NAME / "config.yaml").unlink()
    with pytest.raises(InputError, match=r"config\.yaml: no such file"):
        SpeakerEncoder.load(NAME)


@pytest.mark.parametrize("source", ["ecapa-mni", f"./{NAME}", "none"])
def test_unknown_name_tells_those_that_are_known(source):
    with pytest.raises(InputError, match=rf"^{source}: no such model.*comes with the package \({NAME}\)") as caught:
        SpeakerEncoder.load(source)
    assert (f"did you mean '{NAME}'?" in str(caught.value)) == (source != "none")
    with pytest.raises(InputError, match=f"unknown bundled model '{source}'"):
        bundled.folder(source)


def test_is_not_written_to(tmp_path, capsys):
    before = {path.name: path.read_bytes() for path in bundled.folder(NAME).iterdir()}
    encoder = SpeakerEncoder.load(NAME, device="cpu")
    with pytest.raises(InputError, match=r"holds 'README\.md', which saving would remove; name another folder"):
        encoder.save(bundled.folder(NAME))
    make_tones(tmp_path / "voices", speakers=2)
    assert main(["calibrate", NAME, str(tmp_path / "voices")]) == 2
    assert "holds 'README.md', which saving would remove" in capsys.readouterr().err
    assert main(["convert", NAME, "--out", "own"]) == 2
    assert f"{NAME}: already a spkfast model folder" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in bundled.folder(NAME).iterdir()} == before
    encoder.save("own")
    assert SpeakerEncoder.load("own", device="cpu").fingerprint == encoder.fingerprint


def test_every_command_takes_the_name(tmp_path, capsys):
    make_tones(tmp_path, speakers=2, utterances=2)
    a, b, c = (str(tmp_path / path) for path in ("spk0/s/0.wav", "spk0/s/1.wav", "spk1/s/0.wav"))
    (tmp_path / "trials.txt").write_text("1 spk0/s/0.wav spk0/s/1.wav\n0 spk0/s/0.wav spk1/s/0.wav\n")
    encoder = SpeakerEncoder.load(NAME)
    for first, second in ((a, a), (a, b), (a, c)):
        assert main(["verify", first, second, "--model", NAME, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["score"] == pytest.approx(encoder.verify(first, second).score, abs=1e-6)
        assert found["threshold"] == encoder.threshold.value and found["threshold_list"] == "held_out"
        assert found["same_speaker"] is (found["score"] > encoder.threshold.value)
    assert main(["verify", a, a, "--model", NAME]) == 0
    said = f"same speaker (threshold {encoder.threshold.value:.4f}, set on speakers held out of its training)"
    assert said in capsys.readouterr().out
    assert main(["evaluate", "--model", NAME, "--data", str(tmp_path), "--json"]) == 0
    assert main(["embed", a, "--model", NAME, "--out", "x.npz"]) == 0
    assert main(["calibrate", NAME, str(tmp_path), "--out", "calibrated"]) == 0
    assert SpeakerEncoder.load("calibrated").threshold == encoder.threshold


def test_verifies_real_speech(speech):
    """Most of a few trials of each kind are decided rightly."""
    encoder = SpeakerEncoder.load(NAME)
    lines = [line.split() for line in (speech / "trials.txt").read_text().splitlines()]
    for label in ("0", "1"):
        pairs = [(speech / a, speech / b) for kind, a, b in lines if kind == label][::450]
        right = sum(encoder.verify(a, b).same_speaker is (label == "1") for a, b in pairs)
        assert len(pairs) >= 3 and right > len(pairs) / 2
