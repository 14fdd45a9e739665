"""Lists for a folder of recordings."""

from __future__ import annotations

import os

import pytest

from spkfast.data.folder import check_disjoint, scan, split, write_lists
from spkfast.data.lists import Trial, Utterance, read_train_list, read_trials, speaker_of
from spkfast.errors import InputError


def make(folder, *paths):
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()


def test_scan_takes_one_layout_and_reports_the_rest(tmp_path):
    make(tmp_path, "a/1/x.wav", "a/1/y.flac", "b/2/z.WAV", "b/notes.txt", "loose.wav", "b/deep/er/w.wav", "c d/1/v.wav")
    told = []
    found = scan(tmp_path, warn=told.append)
    assert [u.path for u in found] == ["a/1/x.wav", "a/1/y.flac", "b/2/z.WAV"]
    assert [u.speaker for u in found] == ["a", "a", "b"]
    assert [any(word in line for line in told) for word in ("deep", "loose.wav", "white space")] == [True] * 3
    assert len(told) == 3


def test_scan_passes_over_names_that_are_not_utf8(tmp_path):
    folder = tmp_path / "données"
    try:
        make(folder, "a/1/é.wav", os.fsdecode(b"a/1/1\xe9.wav"), os.fsdecode(b"b\xff/1/x.wav"))
    except OSError:
        pytest.skip("the file system takes names of UTF-8 alone")
    told = []
    assert scan(folder, warn=told.append) == [Utterance("a", "a/1/é.wav")]
    assert [line.encode() for line in told] and len(told) == 2
    assert f"{folder}/a/1/1\\xe9.wav: passed over, a name that is not UTF-8" in told[0]
    assert f"{folder}/b\\xff/1/x.wav: passed over, a name that is not UTF-8" in told[1]


def test_lists_are_written_whole_or_not_at_all(tmp_path):
    one, trial = Utterance("a", "a/1/x.wav"), Trial(True, "a/1/x.wav", "a/1/y.wav")
    with pytest.raises(UnicodeEncodeError):
        write_lists(tmp_path, [one, Utterance("b\udcff", "b\udcff/1/x.wav")], [trial])
    with pytest.raises(UnicodeEncodeError):
        write_lists(tmp_path, [one], [Trial(True, "b\udcff/1/x.wav", "a/1/y.wav")])
    assert not os.listdir(tmp_path)
    write_lists(tmp_path, [one], [trial])
    (tmp_path / "trials.txt.partial").mkdir()  # what comes second cannot be written
    with pytest.raises(IsADirectoryError):
        write_lists(tmp_path, [one, one], [trial, trial])
    assert read_train_list(tmp_path / "train_list.txt") == [one] and read_trials(tmp_path / "trials.txt") == [trial]


def test_scan_of_nothing(tmp_path):
    with pytest.raises(InputError, match="no audio files"):
        scan(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        scan(tmp_path / "missing")


def test_split_keeps_speakers_apart_and_pairs_sessions(tmp_path):
    utterances = [Utterance(f"s{k}", f"s{k}/{session}/{n}.wav") for k in range(9) for session in "ab" for n in range(3)]
    train, trials = split(utterances, 3, trials_per_speaker=5)
    check_disjoint(train, trials)
    assert len(train) == 6 * 6
    targets = [t for t in trials if t.target]
    assert len(targets) == 15 and len(trials) == 30
    assert all(speaker_of(t.enrol) == speaker_of(t.test) for t in targets)
    assert all(t.enrol.split("/")[1] != t.test.split("/")[1] for t in targets)
    assert all(speaker_of(t.enrol) != speaker_of(t.test) for t in trials if not t.target)
    assert split(utterances, 3, trials_per_speaker=5) == (train, trials)
    train_list, trial_list = write_lists(tmp_path / "lists", train, trials)
    assert read_train_list(train_list) == train and read_trials(trial_list) == trials


def test_split_and_overlap_errors():
    few = [Utterance(f"s{k}", f"s{k}/a/0.wav") for k in range(6)]
    with pytest.raises(InputError, match="do not leave"):
        split(few, 5)
    with pytest.raises(InputError, match="no same-speaker trial"):
        split(few, 2)
    with pytest.raises(InputError, match="speaker s1 of the trials"):
        check_disjoint(few, [Trial(False, "t/a/0.wav", "s1/a/0.wav")])
