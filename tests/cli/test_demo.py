"""The demo: its default means something, and it takes folders of one's own."""

from __future__ import annotations

import json

import pytest

from spkfast.cli.main import main
from tests.training.corpus import make_tones


def run(capsys, *arguments):
    assert main(["demo", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.full
def test_default_is_hard_enough_to_mean_something(tmp_path, capsys):
    result = run(capsys, "--out", str(tmp_path / "demo"))
    assert "synthetic" in result["data"]
    untrained, reference, fast, bundled = result["systems"]
    assert 2 < fast["eer_percent"] < 25
    assert fast["eer_percent"] == pytest.approx(reference["eer_percent"], abs=0.5)
    assert untrained["eer_percent"] > fast["eer_percent"] + 10
    assert untrained["eer_percent"] > bundled["eer_percent"]
    assert fast["max_relative_difference"] < 1e-3
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "synthetic" in page and f"{fast['eer_percent']:.2f}" in page
    speakers = {line.split()[0] for line in (tmp_path / "demo" / "data" / "train_list.txt").read_text().splitlines()}
    assert len(speakers) >= 40


def test_takes_a_folder_and_runs_again_over_itself(tmp_path, capsys):
    make_tones(tmp_path / "voices", speakers=7, utterances=4)
    (tmp_path / "voices" / "train_list.txt").unlink()
    options = ("--data", str(tmp_path / "voices"), "--out", str(tmp_path / "demo"), "--steps", "2")
    first, second = run(capsys, *options), run(capsys, *options)
    assert first["trials"] == {"targets": 12, "nontargets": 12}
    rates = [[row["eer_percent"] for row in result["systems"]] for result in (first, second)]
    assert rates[0] == rates[1]
    assert [row["system"] for row in second["systems"]][-1] == "ecapa-mini"
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "synthetic" not in page
    assert "ecapa-mini comes with the package and was not trained on this data" in page and "Scores, ecapa-mini" in page


def test_spares_a_folder_that_is_not_a_demo(tmp_path, capsys):
    (tmp_path / "training").mkdir()
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "holds something else than a demo" in capsys.readouterr().err
    assert (tmp_path / "training").is_dir()


def test_bad_test_file_is_told_before_training(tmp_path, capsys):
    make_tones(tmp_path, speakers=4)
    lines = [line for line in (tmp_path / "train_list.txt").read_text().splitlines() if line < "spk2"]
    (tmp_path / "train_list.txt").write_text("\n".join(lines))
    (tmp_path / "trials.txt").write_text("1 spk2/s/0.wav spk2/s/1.wav\n0 spk2/s/0.wav spk3/s/1.wav\n")
    (tmp_path / "spk3" / "s" / "1.wav").write_bytes(b"")
    assert main(["demo", "--data", str(tmp_path), "--out", str(tmp_path / "demo")]) == 2
    assert "spk3/s/1.wav: the file is empty" in capsys.readouterr().err
    assert not (tmp_path / "demo" / "training").exists()


def test_refuses_test_speakers_that_are_trained_on(tmp_path, capsys):
    make_tones(tmp_path, speakers=2)
    (tmp_path / "trials.txt").write_text("1 spk0/s/0.wav spk0/s/1.wav\n0 spk0/s/0.wav spk1/s/1.wav\n")
    assert main(["demo", "--data", str(tmp_path), "--out", str(tmp_path / "demo")]) == 2
    assert "speaker spk0 of the trials is in the training list" in capsys.readouterr().err
