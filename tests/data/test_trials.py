"""Speakers held out, and trials among speakers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from spkfast.data.corpus import Corpus, Entry
from spkfast.data.lists import Trial
from spkfast.data.trials import draw_trials, hold_out
from spkfast.errors import InputError


def corpus_of(speakers, utterances=2):
    return Corpus(
        [Entry(f"id {s:02d}", f"{s}/{u}", f"/x/{s}/{u}", 0.0, 1.0) for u in range(utterances) for s in range(speakers)]
    )


def refuse(match, *arguments):
    with pytest.raises(InputError, match=match):
        hold_out(*arguments)


def test_holds_out_the_speakers_of_a_file(tmp_path):
    listed = tmp_path / "held.txt"
    listed.write_text("id 03\r\n\n id 01 \nid 03\n")
    corpus = corpus_of(6)
    training, held = hold_out(corpus, str(listed), seed=0)
    assert held.speakers == ["id 01", "id 03"] and training.speakers == ["id 00", "id 02", "id 04", "id 05"]
    assert sorted([*training, *held]) == sorted(corpus)


def test_holds_out_a_number_of_speakers():
    corpus = corpus_of(9)
    training, held = hold_out(corpus, 4, seed=5)
    assert len(held.speakers) == 4 and {*held.speakers} | {*training.speakers} == {*corpus.speakers}
    assert len(training.speakers) == 5 and len(training) + len(held) == len(corpus)
    assert [list(part) for part in hold_out(corpus, "4", seed=5)] == [list(training), list(held)]
    drawn = [speaker for seed in range(300) for speaker in hold_out(corpus, 4, seed)[1].speakers]
    counts = [drawn.count(speaker) for speaker in corpus.speakers]
    # 300 draws at a chance of 4/9: six standard deviations.
    assert max(abs(count - 300 * 4 / 9) for count in counts) < 6 * (300 * 4 / 9 * 5 / 9) ** 0.5


def test_what_cannot_be_held_out(tmp_path):
    corpus, listed = corpus_of(6), tmp_path / "held.txt"
    for number in (-3, 0, 1, True):
        refuse(r"held_out: .* to hold out; trials need at least 2", corpus, number, 0)
    for number in (5, 6, 1000):
        refuse(
            rf"held_out: {number} of the 6 speakers of the corpus to hold out; at least 2 must remain",
            corpus,
            number,
            0,
        )
    assert len(hold_out(corpus, 4, 0)[0].speakers) == 2
    refuse("missing.txt: no such file of speakers", corpus, str(tmp_path / "missing.txt"), 0)
    listed.write_text("id 00\nid 07\n")
    refuse(r"held.txt:2: 'id 07' is no speaker of the corpus \(did you mean 'id 0", corpus, str(listed), 0)
    listed.write_text("id 00\nid 00\n")
    refuse(r"held.txt: 1 speakers to hold out; trials need at least 2", corpus, str(listed), 0)
    listed.write_text("".join(f"id {k:02d}\n" for k in range(5)))
    refuse(r"held.txt: 5 of the 6 speakers .* at least 2 must remain", corpus, str(listed), 0)
    listed.write_bytes(b"id 00\nid \xff\n")
    refuse(r"held.txt:2: not UTF-8 text", corpus, str(listed), 0)


def recordings(rng):
    """Utterances of some speakers: in folders, in files, or with nothing that tells recordings apart."""
    found = {}
    for speaker in "abcdef"[: rng.integers(2, 7)]:
        kind, number = rng.integers(4), int(rng.integers(1, 12))
        places = [
            (f"{speaker}/{rng.integers(3)}/{k}.wav", f"{speaker}/{k}.wav", f"x/{rng.integers(3)}.wav", "x/one.wav")[
                kind
            ]
            for k in range(number)
        ]
        found[speaker] = {f"{speaker}{k}": place for k, place in enumerate(places)}
    return found


def targets_of(those):
    """All pairs that may be targets of a speaker, by the words of the documentation."""
    pairs = list(itertools.combinations(those, 2))
    folders = [pair for pair in pairs if those[pair[0]].rpartition("/")[0] != those[pair[1]].rpartition("/")[0]]
    files = [pair for pair in pairs if those[pair[0]] != those[pair[1]]]
    return folders or files or pairs


@pytest.mark.parametrize("seed", range(40))
def test_trials_are_among_those_that_may_be(seed):
    rng = np.random.default_rng(seed)
    utterances = recordings(rng)
    allowed = {speaker: targets_of(those) for speaker, those in utterances.items()}
    for most in (1, 5, 60):
        trials = draw_trials(utterances, np.random.default_rng(seed), per_speaker=most)
        assert trials == draw_trials(utterances, np.random.default_rng(seed), per_speaker=most)
        assert len({frozenset((trial.enrol, trial.test)) for trial in trials}) == len(trials)
        for speaker, pairs in allowed.items():
            mine = [
                (trial.enrol, trial.test) for trial in trials if trial.target and trial.enrol in utterances[speaker]
            ]
            assert set(mine) <= set(pairs) and len(mine) == min(most, len(pairs))
        others = [(trial.enrol, trial.test) for trial in trials if not trial.target]
        assert all(one[0] != other[0] for one, other in others)
        possible = sum(len(a) * len(b) for a, b in itertools.combinations(utterances.values(), 2))
        assert len(others) == min(len(trials) - len(others), possible)


def test_every_pair_is_as_likely_as_any_other():
    utterances = {"a": {f"a{k}": f"a/{k % 3}/{k}" for k in range(6)}, "b": {"b0": "b/0"}, "c": {"c0": "c/0"}}
    rng = np.random.default_rng(0)
    drawn = [trial for _ in range(1200) for trial in draw_trials(utterances, rng, per_speaker=2)]
    targets = [(trial.enrol, trial.test) for trial in drawn if trial.target]
    counts = [targets.count(pair) for pair in targets_of(utterances["a"])]
    assert len(counts) == 12 and sum(counts) == 2400
    assert max(abs(count - 200) for count in counts) < 6 * (1200 / 6 * 5 / 6) ** 0.5  # standard deviations
    assert Trial(False, "b0", "c0") in drawn


def test_many_utterances_of_a_speaker_are_drawn_from_quickly():
    """All pairs of these would take tens of gigabytes."""
    utterances = {s: {f"{s}{k}": f"{s}/{k % 900}/{k}" for k in range(30000)} for s in "ab"}
    trials = draw_trials(utterances, np.random.default_rng(0))
    assert sum(trial.target for trial in trials) == 120 and len(trials) == 240
    places = utterances["a"] | utterances["b"]
    assert all(places[t.enrol].split("/")[:2] != places[t.test].split("/")[:2] for t in trials)


def test_no_target():
    with pytest.raises(InputError, match="none of 2 speakers has two utterances, so there is no same-speaker trial"):
        draw_trials({"a": {"x": "x"}, "b": {"y": "y"}}, np.random.default_rng(0))
