"""A part of a corpus."""

from __future__ import annotations

import numpy as np
import pytest

from spkfast.data.corpus import Corpus, Entry, Strings
from spkfast.errors import InputError


def some_corpus(rng, size=40):
    entries = [
        Entry(
            f"s{rng.integers(7)}", f"é{k}" * int(rng.integers(1, 4)), f"/x/{rng.integers(9)}.wav", k, 0.5 * k, k - 1, k
        )
        for k in range(size)
    ]
    return Corpus(entries, "these")


@pytest.mark.parametrize("seed", range(5))
def test_part_equals_a_corpus_of_its_utterances(seed):
    rng = np.random.default_rng(seed)
    corpus = some_corpus(rng)
    before = list(corpus)
    chosen = rng.random(len(corpus)) < rng.choice([0.1, 0.5, 0.9])
    chosen[seed] = True
    part = corpus.select(chosen)
    expected = Corpus([entry for entry, is_chosen in zip(corpus, chosen, strict=True) if is_chosen], "these")
    assert list(part) == list(expected) and part.name == "these"
    assert part.speakers == expected.speakers and part.labels.tolist() == expected.labels.tolist()
    assert sorted(part.files) == sorted(expected.files) and part.fingerprint == expected.fingerprint
    for name in ("labels", "file_of", "starts", "seconds", "offsets", "sizes"):
        assert getattr(part, name).dtype == getattr(expected, name).dtype
    assert list(part.select(np.ones(len(part), dtype=bool))) == list(part)
    assert list(corpus) == before


def test_part_of_nothing():
    with pytest.raises(InputError, match="these: none of its utterances is chosen"):
        some_corpus(np.random.default_rng(0)).select(np.zeros(40, dtype=bool))


def test_part_of_strings():
    values = ["", "a", "", "bé", "c\udcff", ""]
    for number in range(2 ** len(values)):
        chosen = np.array([number >> k & 1 for k in range(len(values))], dtype=bool)
        assert list(Strings(values).select(chosen)) == [
            v for v, is_chosen in zip(values, chosen, strict=True) if is_chosen
        ]
