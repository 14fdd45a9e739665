"""Speakers that are held out of a corpus, and trials drawn among speakers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np

from spkfast.data.corpus import Corpus
from spkfast.data.lists import Trial
from spkfast.data.manifests import numbered_lines
from spkfast.errors import InputError, nearest

TRIALS_PER_SPEAKER = 60


def hold_out(corpus: Corpus, held_out: str | int, seed: int) -> tuple[Corpus, Corpus]:
    """Parts a corpus by speakers, in linear time.

    Args:
        corpus: The utterances.
        held_out: File that lists speakers, one a line; or how many are drawn, as a number or its digits, each speaker
            as likely as any other.
        seed: Seed of the draw.

    Returns:
        The utterances of the other speakers, for training, and those of the speakers held out.

    Raises:
        InputError: If the file cannot be read or lists a speaker that the corpus does not have (file and line are
            named), fewer than 2 speakers are held out, or fewer than 2 remain.
    """
    if isinstance(held_out, str) and held_out.isdecimal():  # as a command line has it
        held_out = int(held_out)
    num_speakers = len(corpus.speakers)
    if isinstance(held_out, str):
        source, labels = held_out, np.array(_listed(held_out, corpus))
        count = len(labels)
    else:
        source, count = "held_out", held_out
        # Of a number that is too large, all.
        labels = np.random.default_rng(seed).permutation(num_speakers)[: max(count, 0)]
    if count < 2:
        raise InputError(f"{source}: {count} speakers to hold out; trials need at least 2")
    if num_speakers - count < 2:
        raise InputError(
            f"{source}: {count} of the {num_speakers} speakers of {corpus.name} to hold out; at least 2 must remain "
            "for training"
        )
    is_held = np.zeros(num_speakers, dtype=bool)
    is_held[labels] = True
    chosen = is_held[corpus.labels]
    return corpus.select(~chosen), corpus.select(chosen)


def draw_trials(
    utterances: Mapping[str, Mapping[str, str]], rng: np.random.Generator, *, per_speaker: int = TRIALS_PER_SPEAKER
) -> list[Trial]:
    """Trials among speakers: same-speaker ones, then as many of different speakers, none twice.

    A target pairs two recordings of a speaker, so that room and device cannot be recognised in place of the voice: two
    folders, where the speaker's audio is in several; else two files; else any two utterances. Of all such pairs of a
    speaker ``per_speaker`` are drawn, so that a speaker of many utterances does not outweigh the others. For a
    non-target two speakers are drawn, any two being as likely as others, then an utterance of each.

    Args:
        utterances: Of each speaker, where the audio of every utterance lies, by the name that trials give it.
        rng: Source of the draws.
        per_speaker: Most targets of a speaker.

    Raises:
        InputError: If no speaker has two utterances.
    """
    of = [list(those) for those in utterances.values()]
    targets = [
        Trial(True, names[one], names[other])
        for names, those in zip(of, utterances.values(), strict=True)
        for one, other in _pairs(list(those.values()), per_speaker, rng)
    ]
    if not targets:
        raise InputError(f"none of {len(of)} speakers has two utterances, so there is no same-speaker trial")
    # Drawn one by one: all pairs of a large corpus would not fit in memory.
    counts = [len(names) for names in of]
    possible = (sum(counts) ** 2 - sum(count**2 for count in counts)) // 2
    nontargets: dict[tuple[str, str], None] = {}
    while len(nontargets) < min(len(targets), possible):
        first, second = sorted(rng.choice(len(of), 2, replace=False).tolist())
        nontargets[of[first][rng.integers(counts[first])], of[second][rng.integers(counts[second])]] = None
    return targets + [Trial(False, *pair) for pair in nontargets]


def _listed(file: str, corpus: Corpus) -> list[int]:
    """Labels of the speakers that a file lists."""
    if not os.path.isfile(file):
        raise InputError(f"{file}: no such file of speakers to hold out")
    label = {speaker: k for k, speaker in enumerate(corpus.speakers)}
    found = set()
    for number, line in numbered_lines(file):
        speaker = line.strip()
        if speaker not in label:
            raise InputError(
                f"{file}:{number}: {speaker!r} is no speaker of {corpus.name}{nearest(speaker, corpus.speakers)}"
            )
        found.add(label[speaker])
    return sorted(found)


def _pairs(places: Sequence[str], most: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Pairs of a speaker's utterances from different recordings, in order; ``most`` of them where there are more.

    Time and memory grow with the utterances, not with their pairs.
    """
    for told in ([os.path.dirname(place) for place in places], places, range(len(places))):
        recording = np.unique(told, return_inverse=True)[1]
        left = np.bincount(recording)
        later = []  # how many pairs each utterance is the first one of
        for place, which in enumerate(recording):
            left[which] -= 1
            later.append(len(places) - 1 - place - left[which])
        ends = np.cumsum(later)
        total = int(ends[-1])
        if total:
            break
    numbers = range(total) if total <= most else sorted(rng.choice(total, most, replace=False).tolist())
    pairs = []
    for number in numbers:
        one = int(np.searchsorted(ends, number, side="right"))
        others = np.flatnonzero(recording[one + 1 :] != recording[one])
        pairs.append((one, one + 1 + int(others[number - (ends[one] - later[one])])))
    return pairs
