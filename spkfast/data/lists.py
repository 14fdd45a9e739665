"""Training and trial lists in the VoxCeleb format."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from spkfast.errors import InputError


@dataclasses.dataclass(frozen=True)
class Utterance:
    """One line of a training list: a speaker and an audio path relative to the list's root."""

    speaker: str
    path: str


@dataclasses.dataclass(frozen=True)
class Trial:
    """One line of a trial list; ``target`` says whether both sides are the same speaker."""

    target: bool
    enrol: str
    test: str


def read_train_list(path: str | os.PathLike[str]) -> list[Utterance]:
    """Lines ``speaker path``.

    Raises:
        InputError: If the file is missing or empty, or a line has other columns (file and line number are named).
    """
    return [Utterance(*columns) for _, columns in _rows(path, 2, "speaker path")]


def read_trials(path: str | os.PathLike[str]) -> list[Trial]:
    """Lines ``label enrol test`` with label 1 for the same speaker and 0 for different ones.

    Raises:
        InputError: If the file is missing or empty, or a line has other columns or another label.
    """
    trials = []
    for number, (label, enrol, test) in _rows(path, 3, "label enrol test"):
        if label not in ("0", "1"):
            raise InputError(f"{path}:{number}: the label must be 0 or 1, got {label!r}")
        trials.append(Trial(label == "1", enrol, test))
    return trials


def trial_paths(trials: Iterable[Trial]) -> list[str]:
    """Every path of a trial list once, in order of appearance."""
    return list(dict.fromkeys(path for trial in trials for path in (trial.enrol, trial.test)))


def speaker_of(path: str) -> str:
    """The speaker of an utterance: the first component of its path."""
    return Path(path).parts[0]


def _rows(path: str | os.PathLike[str], columns: int, form: str) -> Iterator[tuple[int, list[str]]]:
    file = Path(path)
    if not file.is_file():
        raise InputError(f"{file}: no such list file")
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not a text file") from error
    found = False
    for number, line in enumerate(lines, start=1):
        fields = line.split()
        if not fields:
            continue
        if len(fields) != columns:
            raise InputError(f"{file}:{number}: expected {columns} columns '{form}', got {len(fields)}")
        found = True
        yield number, fields
    if not found:
        raise InputError(f"{file}: the list is empty")
