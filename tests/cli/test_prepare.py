"""The command ``prepare``."""

import json
import os
import shutil
import tarfile

import numpy as np
import pytest
import soundfile

from spkfast.data.audio import read_audio
from spkfast.data.lists import read_train_list, read_trials, speaker_of
from spkfast.data.shards import open_member, read_index

RATE = 16000


@pytest.fixture
def recordings(tmp_path):
    """Six speakers with two sessions of two files each, and their samples by path."""
    found = {}
    for number in range(24):
        path = f"s{number // 4}/r{number // 2 % 2}/{number % 2}.wav"
        found[path] = np.random.default_rng(number).integers(-3000, 3000, 2000).astype(np.int16)
        (tmp_path / "data" / path).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / "data" / path, found[path], RATE)
    return tmp_path / "data", found


def packed(folder, path, inside="wrapped/once"):
    with tarfile.open(path, "w:gz") as file:
        file.add(folder, inside)
    return path


def samples(entry):
    return np.rint(read_audio(open_member(entry.path, entry.offset, entry.size, entry.id))[0] * 32768).astype(np.int16)


def test_help_and_kinds(spkfast):
    assert spkfast("prepare", "--help").out.startswith("usage: spkfast prepare")
    for kind in ("folder", "shards", "noise"):
        assert spkfast("prepare", kind, "--help").out.startswith(f"usage: spkfast prepare {kind}")
    assert "invalid choice: 'sharts'" in spkfast("prepare", "sharts", "a", "b").error
    assert "required: kind, SOURCE, OUT" in spkfast("prepare").error
    assert "unknown option --formt (did you mean '--format'?)" in spkfast("prepare", "shards", "--formt", "a").error


@pytest.mark.parametrize("archived", [False, True])
def test_folder(spkfast, tmp_path, recordings, archived):
    folder, _ = recordings
    (folder / "loose.wav").touch()
    source = packed(folder, tmp_path / "corpus.v1.tgz") if archived else folder
    status, out, err = spkfast("prepare", "folder", source, tmp_path / "out", "--test-speakers", 3, "--json")
    assert status == 0 and "loose.wav: passed over" in err
    result = json.loads(out)
    train, trials = read_train_list(tmp_path / "out/train_list.txt"), read_trials(tmp_path / "out/trials.txt")
    assert len(train) == result["utterances"] == 12 and result["speakers"] == 6 and result["test_speakers"] == 3
    assert result["targets"] + result["nontargets"] == len(trials) > 0
    assert not {u.speaker for u in train} & {speaker_of(trial.enrol) for trial in trials}
    root = tmp_path / "out/corpus/wrapped/once" if archived else folder
    assert result["root"] == str(root) and all((root / u.path).is_file() for u in train)
    lists = (tmp_path / "out/train_list.txt").read_text()
    assert "train_list.txt: is there already" in spkfast("prepare", "folder", root, tmp_path / "out").error
    spkfast("prepare", "folder", root, tmp_path / "same", "--test-speakers", 3)
    spkfast("prepare", "folder", root, tmp_path / "other", "--test-speakers", 3, "--seed", 1)
    assert (tmp_path / "same/train_list.txt").read_text() == lists != (tmp_path / "other/train_list.txt").read_text()


def test_folder_with_names_that_no_list_can_hold(spkfast, tmp_path, recordings):
    folder, _ = recordings
    try:
        shutil.copy(folder / "s0/r0/0.wav", os.fsdecode(bytes(folder / "s0/r0") + b"/1\xe9.wav"))
    except OSError:
        pytest.skip("the file system takes names of UTF-8 alone")
    status, out, err = spkfast("prepare", "folder", folder, tmp_path / "out", "--test-speakers", 3, "--json")
    assert status == 0 and "1\\xe9.wav: passed over" in err and json.loads(out)["utterances"] == 12
    assert sorted(os.listdir(tmp_path / "out")) == ["train_list.txt", "trials.txt"]


def test_folder_errors(spkfast, tmp_path, recordings):
    folder, _ = recordings
    out = tmp_path / "out"
    assert "no such folder" in spkfast("prepare", "folder", tmp_path / "none", out).error
    assert "6 speakers do not leave 2" in spkfast("prepare", "folder", folder, out, "--test-speakers", 5).error
    assert "--seed must be at least 0, got -1" in spkfast("prepare", "folder", folder, out, "--seed", -1).error
    assert not out.exists()


@pytest.mark.parametrize("archived", [False, True])
def test_shards_of_a_folder(spkfast, tmp_path, recordings, archived):
    folder, found = recordings
    source = packed(folder, tmp_path / "corpus.tar.gz") if archived else folder
    status, out, _ = spkfast("prepare", "shards", source, tmp_path / "out", "--shard-megabytes", 0.02, "--json")
    result = json.loads(out)
    corpus = read_index(tmp_path / "out")
    assert status == 0 and result["utterances"] == len(corpus) == 24 and result["speakers"] == 6
    assert result["shards"] == len(corpus.files) > 1 and result["left_out"] == {}
    assert result["hours"] == pytest.approx(24 * 2000 / RATE / 3600)
    for entry in corpus:
        np.testing.assert_array_equal(samples(entry), found[entry.id])
    assert not list(tmp_path.glob("out.*"))  # the extracted files are gone
    status, out, _ = spkfast("prepare", "shards", tmp_path / "out", "--verify", "--json")
    assert status == 0 and json.loads(out) == {"shards": str(tmp_path / "out"), "utterances": 24, "damaged": 0}
    assert "out: is there already" in spkfast("prepare", "shards", source, tmp_path / "out").error
    assert not list(tmp_path.glob("out.*"))


def test_shards_of_a_list(spkfast, tmp_path, recordings):
    folder, found = recordings
    shutil.move(folder / "s0/r0/0.wav", tmp_path / "away.wav")
    (tmp_path / "list.txt").write_text("".join(f"{path[:2]} {path}\n" for path in found))
    status, out, err = spkfast("prepare", "shards", tmp_path / "list.txt", tmp_path / "out", "--root", folder)
    assert status == 0 and "left_out    1" in out and "left out: " in err and "s0/r0/0.wav: no such file" in err
    assert set(read_index(tmp_path / "out").ids) == found.keys() - {"s0/r0/0.wav"}


def test_shards_in_other_formats(spkfast, tmp_path, recordings):
    folder, _ = recordings
    for options, text in ((("--format", "opus"), b"OggS"), (("--format", "copy"), b"RIFF"), ((), b"fLaC")):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        assert spkfast("prepare", "shards", folder, tmp_path / "out", *options).status == 0
        entry = read_index(tmp_path / "out")[0]
        assert open_member(entry.path, entry.offset, entry.size, entry.id).getvalue()[:4] == text


def test_verify_names_what_is_damaged(spkfast, tmp_path, recordings):
    spkfast("prepare", "shards", recordings[0], tmp_path / "out")
    entry = read_index(tmp_path / "out")[3]
    with open(entry.path, "r+b") as file:
        file.seek(entry.offset + entry.size // 2)
        file.write(bytes(20))
    status, out, err = spkfast("prepare", "shards", tmp_path / "out", "--verify")
    assert status == 2 and not out
    first, last = err.splitlines()
    assert repr(entry.id) in first and "out: 1 of 24 utterances are damaged" in last


def test_verify_stops_telling_at_some_point(spkfast, tmp_path, recordings):
    spkfast("prepare", "shards", recordings[0], tmp_path / "out")
    for path in set(read_index(tmp_path / "out").files):
        with open(path, "r+b") as file:
            file.write(bytes(os.path.getsize(path)))
    status, _, err = spkfast("prepare", "shards", tmp_path / "out", "--verify")
    lines = err.splitlines()
    assert status == 2 and len(lines) == 22
    assert lines[20] == "and 4 more" and "24 of 24 utterances are damaged" in lines[21]


def test_shards_errors(spkfast, tmp_path, recordings):
    folder, _ = recordings
    out = tmp_path / "out"
    assert "give either OUT or --verify" in spkfast("prepare", "shards", folder).error
    assert "give either OUT or --verify" in spkfast("prepare", "shards", folder, out, "--verify").error
    assert "not a folder of shards" in spkfast("prepare", "shards", folder, "--verify").error
    assert "no such file or folder" in spkfast("prepare", "shards", tmp_path / "none", out).error
    assert "shard_megabytes must be" in spkfast("prepare", "shards", folder, out, "--shard-megabytes", 0).error
    with tarfile.open(tmp_path / "evil.tar", "w") as file:
        file.addfile(tarfile.TarInfo("../evil"))
    assert "'../evil' would be written outside" in spkfast("prepare", "shards", tmp_path / "evil.tar", out).error
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("archived", [False, True])
def test_noise(spkfast, tmp_path, archived):
    from spkfast.data.banks import Bank

    for number, path in enumerate(("musan/music/a/1.wav", "musan/speech/2.wav", "musan/speech/3.wav", "loose.wav")):
        (tmp_path / "noise" / path).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / "noise" / path, np.random.default_rng(number).normal(size=8000) / 10, RATE)
    (tmp_path / "noise/bad.wav").write_text("not audio")
    source = packed(tmp_path / "noise", tmp_path / "noise.tgz") if archived else tmp_path / "noise"
    status, out, err = spkfast("prepare", "noise", source, tmp_path / "bank", "--json")
    assert status == 0 and "bad.wav" in err
    result = json.loads(out)
    assert result["recordings"] == {"music": 1, "noise": 1, "speech": 2} and result["sample_rate"] == RATE
    assert result["hours"] == pytest.approx(4 * 0.5 / 3600)
    assert len(Bank.load(tmp_path / "bank")) == 4 and not list(tmp_path.glob("bank.*"))
    assert "bank: is there already" in spkfast("prepare", "noise", source, tmp_path / "bank").error
    status, out, _ = spkfast("prepare", "noise", source, tmp_path / "rirs", "--rir", "--sample-rate", 8000, "--json")
    assert status == 0 and json.loads(out)["recordings"] == {"rir": 4} and json.loads(out)["sample_rate"] == 8000


@pytest.fixture
def music(tmp_path):
    folder = tmp_path / "musan" / "music"
    folder.mkdir(parents=True)
    for number in range(3):
        soundfile.write(folder / f"{number}.wav", np.random.default_rng(number).normal(size=800) / 10, RATE)
    return folder


@pytest.mark.parametrize("archived", [False, True])
def test_noise_of_one_category(spkfast, tmp_path, music, archived):
    source = packed(music, tmp_path / "musan.tgz", "musan/music/free") if archived else music
    status, out, _ = spkfast("prepare", "noise", source, tmp_path / "bank", "--json")
    assert status == 0 and json.loads(out)["recordings"] == {"music": 3}


def test_noise_shows_how_far_it_is(spkfast, tmp_path, music, monkeypatch):
    monkeypatch.setattr("spkfast.cli.common._SECONDS_BETWEEN_LINES", 0.0)
    err = spkfast("prepare", "noise", music, tmp_path / "bank").err
    assert [line.split(",")[0] for line in err.splitlines()] == [f"reading recordings: {n}/3" for n in (1, 2, 3)]


def test_noise_after_a_killed_run(spkfast, tmp_path, music):
    (tmp_path / "bank").mkdir()
    for name in ("samples.npy", "samples.npy.partial"):
        (tmp_path / "bank" / name).write_bytes(b"half")
    assert spkfast("prepare", "noise", music, tmp_path / "bank").status == 0
    assert sorted(os.listdir(tmp_path / "bank")) == ["bank.json", "samples.npy"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "samples.npy").write_bytes(b"of someone")
    assert "other: is there already" in spkfast("prepare", "noise", music, tmp_path / "other").error


def test_noise_of_a_bank_of_the_other_kind(spkfast, tmp_path, music):
    spkfast("prepare", "noise", music, tmp_path / "bank")
    wrong = spkfast("prepare", "noise", tmp_path / "bank", tmp_path / "rirs", "--rir").error
    assert "bank: holds a bank of noise, one of room impulse responses is needed" in wrong


def test_noise_errors(spkfast, tmp_path):
    assert "none: no such folder" in spkfast("prepare", "noise", tmp_path / "none", tmp_path / "bank").error
    wrong = spkfast("prepare", "noise", tmp_path, tmp_path / "bank", "--sample-rate", 0)
    assert "--sample-rate must be at least 1, got 0" in wrong.error
    (tmp_path / "empty").mkdir()
    assert "no audio files" in spkfast("prepare", "noise", tmp_path / "empty", tmp_path / "bank").error
    assert not (tmp_path / "bank").exists()
