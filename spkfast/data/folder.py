"""Training and trial lists for a folder of recordings laid out as ``<speaker>/<session>/<utterance>``."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from spkfast.data.audio import audio_files
from spkfast.data.lists import Trial, Utterance, speaker_of, trial_paths
from spkfast.data.trials import draw_trials
from spkfast.errors import InputError


def scan(folder: str | os.PathLike[str], warn: Callable[[str], None] = lambda message: None) -> list[Utterance]:
    """Utterances of a folder, sorted; audio that lies elsewhere than ``<speaker>/<session>/<utterance>`` is reported.

    Raises:
        InputError: If no audio lies where it should.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder")
    found = []
    for path in audio_files(root):
        parts = path.relative_to(root).parts
        name = "/".join(parts)
        shown = os.fsencode(name).decode(errors="backslashreplace")
        if shown != name:
            warn(f"{root}/{shown}: passed over, a name that is not UTF-8 cannot stand in a list")
        elif len(parts) != 3:
            warn(f"{path}: passed over, not at <speaker>/<session>/<utterance>")
        elif any(letter.isspace() for part in parts for letter in part):
            warn(f"{path}: passed over, a name with white space cannot stand in a list")
        else:
            found.append(Utterance(parts[0], name))
    if not found:
        raise InputError(f"{root}: holds no lists and no audio at <speaker>/<session>/<utterance>")
    return found


def split(
    utterances: list[Utterance], test_speakers: int, *, trials_per_speaker: int = 60, seed: int = 0
) -> tuple[list[Utterance], list[Trial]]:
    """Training utterances, and trials among speakers that are not in them.

    The trials are those of :func:`spkfast.data.trials.draw_trials`.

    Args:
        utterances: All utterances.
        test_speakers: Speakers kept for the trials.
        trials_per_speaker: Most targets a speaker, and as many non-targets.
        seed: Seed of the draw.

    Raises:
        InputError: If there are too few speakers, or no test speaker has two utterances.
    """
    speakers = sorted({utterance.speaker for utterance in utterances})
    if test_speakers < 2 or len(speakers) < test_speakers + 2:
        raise InputError(f"{len(speakers)} speakers do not leave 2 for training and {test_speakers} for trials")
    rng = np.random.default_rng(seed)
    held = sorted(rng.permutation(speakers)[:test_speakers].tolist())
    of: dict[str, dict[str, str]] = {speaker: {} for speaker in held}
    for utterance in utterances:
        if utterance.speaker in of:
            of[utterance.speaker][utterance.path] = utterance.path
    trials = draw_trials(of, rng, per_speaker=trials_per_speaker)
    return [u for u in utterances if u.speaker not in of], trials


def write_lists(folder: str | os.PathLike[str], train: list[Utterance], trials: list[Trial]) -> tuple[Path, Path]:
    """Write ``train_list.txt`` and ``trials.txt`` into a folder and return their paths."""
    train_list, trial_list = Path(folder) / "train_list.txt", Path(folder) / "trials.txt"
    contents = {
        train_list: "".join(f"{u.speaker} {u.path}\n" for u in train).encode(),
        trial_list: "".join(f"{int(t.target)} {t.enrol} {t.test}\n" for t in trials).encode(),
    }
    train_list.parent.mkdir(parents=True, exist_ok=True)
    # Renamed when both are whole: a list that is cut off reads like a shorter one.
    for path, content in contents.items():
        _partial(path).write_bytes(content)
    for path in contents:
        os.replace(_partial(path), path)
    return train_list, trial_list


def check_disjoint(train: list[Utterance], trials: Sequence[Trial]) -> None:
    """Refuse trials of speakers that are trained on.

    Raises:
        InputError: If a speaker is in both.
    """
    seen = {utterance.speaker for utterance in train}
    for path in trial_paths(trials):
        if speaker_of(path) in seen:
            raise InputError(f"speaker {speaker_of(path)} of the trials is in the training list")


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")
