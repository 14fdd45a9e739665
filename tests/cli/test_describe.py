"""The command ``describe``."""

from __future__ import annotations

import json
import shutil
import sys


def test_table(spkfast, data):
    outcome = spkfast("describe", data)
    assert outcome.status == 0, outcome
    lines = [line.split() for line in outcome.out.splitlines()]
    assert ["speakers", "3"] in lines and ["utterances", "9"] in lines and ["16000", "9"] in lines
    assert ["utterances", "per", "speaker", "3", "3", "3"] in lines
    assert ["unreadable", "0", "0.00%"] in lines and "= s" not in outcome.out


def test_json_of_a_list_with_root_and_speakers(spkfast, data, tmp_path):
    source, speakers = tmp_path / "list.txt", tmp_path / "speakers"
    source.write_text("x s0/r0/u.wav\nx s0/r1/u.wav\nx s0/r2/none.wav\n")
    speakers.write_text("s0/r1/u.wav y\n")
    shutil.copy(data / "s0/r0/u.wav", data / "s0/r1/u.wav")
    outcome = spkfast("describe", source, "--root", data, "--speakers", speakers, "--json")
    found = json.loads(outcome.out)
    assert found["speakers"] == 2 and found["read"] == 2
    assert found["duplicates_across_speakers"] == [["s0/r0/u.wav", "s0/r1/u.wav"]]
    assert list(found["unreadable"]) == ["s0/r2/none.wav"]
    assert "2 of 3 utterances are not in it" in outcome.err
    shown = spkfast("describe", source, "--root", data, "--speakers", speakers).out
    assert "s0/r0/u.wav = s0/r1/u.wav" in shown and "none.wav: no such file" in shown
    assert ["SAME", "AUDIO,", "ANOTHER", "SPEAKER", "2", "66.67%"] in [line.split() for line in shown.splitlines()]


def test_long_lists_of_faults_are_cut(spkfast, data, tmp_path):
    source = tmp_path / "list.txt"
    source.write_text("x s0/r0/u.wav\n" + "".join(f"x none{k}.wav\n" for k in range(12)))
    outcome = spkfast("describe", source, "--root", data)
    assert "unreadable (the first 10 of 12; --json has all)" in outcome.out
    assert outcome.out.count("no such file") == 10


def test_sample(spkfast, data):
    assert json.loads(spkfast("describe", data, "--sample", 4, "--json").out)["read"] == 4
    assert "in a choice of 4 utterances; about" in spkfast("describe", data, "--sample", 4).out


def test_plot(spkfast, data, tmp_path):
    assert spkfast("describe", data, "--plot", tmp_path / "p.svg").status == 0
    assert "utterances per speaker" in (tmp_path / "p.svg").read_text()


def test_plot_without_matplotlib_reads_nothing(spkfast, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("spkfast.data.manifests.read_corpus", lambda *args, **options: 1 / 0)
    assert "matplotlib" in spkfast("describe", data, "--plot", "p.png").error


def test_errors(spkfast, data, tmp_path):
    assert "none: no such file or folder" in spkfast("describe", tmp_path / "none").error
    assert "--plot must end with .png, .svg or .pdf" in spkfast("describe", data, "--plot", "p.jpg").error
    assert "no such folder" in spkfast("describe", data, "--plot", tmp_path / "none" / "p.png").error
    assert "--seed must be at least 0, got -1" in spkfast("describe", data, "--seed", "-1").error
    assert "sample must be at least 1" in spkfast("describe", data, "--sample", 0).error
    assert "--root" in spkfast("describe", data, "--rot", "x").error
