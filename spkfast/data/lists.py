"""Training and trial lists in the VoxCeleb format."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np

from spkfast.errors import InputError

_LINES_AT_ONCE = 1 << 10  # few lists at a time: the collector of garbage goes over them again and again


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


class TrialList(Sequence[Trial]):
    """Trials in columns, so that millions of them take megabytes; a sequence of :class:`Trial` for who reads few.

    Attributes:
        names: Every path once, in order of appearance.
        enrol: Place of the first side of each trial among the names, int64, shape (trials,).
        test: Place of the second side.
        labels: Whether both sides are the same speaker, bool, shape (trials,); None for a list without labels.
        source: The file, for messages.
        lines: Line of each trial in it, shape (trials,).
        scores: Score of each trial where the file has them, float64, shape (trials,); else None.
    """

    def __init__(
        self,
        names: list[str],
        enrol: np.ndarray,
        test: np.ndarray,
        labels: np.ndarray | None,
        *,
        source: str = "the trials",
        lines: np.ndarray | None = None,
        scores: np.ndarray | None = None,
        form: _Form | None = None,
    ) -> None:
        self.names, self.enrol, self.test, self.labels = names, enrol, test, labels
        self.source, self.scores = source, scores
        self._form = form or (_PLAIN if labels is None else _VOX)
        self.lines = np.arange(1, len(enrol) + 1) if lines is None else lines

    @classmethod
    def of(cls, trials: Iterable[Trial]) -> TrialList:
        """The same trials in columns."""
        if isinstance(trials, cls):
            return trials
        rows = list(trials)
        names = _Places()
        sides = names.of_pairs((trial.enrol, trial.test) for trial in rows)
        return cls(list(names), *sides, np.array([trial.target for trial in rows], dtype=bool))

    def __len__(self) -> int:
        return len(self.enrol)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(operator.eq, self, other))

    __hash__ = None  # type: ignore[assignment]  # as of other lists

    @overload
    def __getitem__(self, at: int) -> Trial: ...
    @overload
    def __getitem__(self, at: slice) -> TrialList: ...
    def __getitem__(self, at: int | slice) -> Trial | TrialList:
        if isinstance(at, slice):
            labels, scores = (None if column is None else column[at] for column in (self.labels, self.scores))
            parts = self.names, self.enrol[at], self.test[at], labels
            return TrialList(*parts, source=self.source, lines=self.lines[at], scores=scores, form=self._form)
        if self.labels is None:
            raise InputError(f"{self.source}: the trials have no labels")
        return Trial(bool(self.labels[at]), self.names[self.enrol[at]], self.names[self.test[at]])

    def where(self, at: int) -> str:
        """File and line of a trial."""
        return f"{self.source}:{self.lines[at]}"

    def rows(self, keys: Sequence[str], sides: str = "both") -> tuple[np.ndarray, ...]:
        """Rows of a matrix whose rows have these keys, for the sides of each trial.

        Args:
            keys: Of the matrix.
            sides: ``both``, ``enrol`` or ``test``.

        Raises:
            InputError: If a path of these sides is no key; its line is named.
        """
        row = {key: k for k, key in enumerate(keys)}
        of_name = np.fromiter((row.get(name, -1) for name in self.names), np.int64, len(self.names))
        asked = {"both": (self.enrol, self.test), "enrol": (self.enrol,), "test": (self.test,)}[sides]
        missing = [np.flatnonzero(of_name[side] < 0) for side in asked]
        if any(map(len, missing)):
            at, side = min((int(found[0]), k) for k, found in enumerate(missing) if len(found))
            name = self.names[asked[side][at]]
            raise InputError(f"{name}: {self.where(at)} names this path, but it has no embedding")
        return tuple(of_name[side] for side in asked)

    def text(self, scores: np.ndarray) -> Iterator[str]:
        """The lines of the list with a score at the end of each, in its form; reading them gives the same scores."""
        digits = 9 if scores.dtype == np.float32 else 17
        order = [name for name in self._form.columns if name != "score"]
        shown = {value: text for text, value in self._form.labels.items()}
        for start in range(0, len(self), _LINES_AT_ONCE):
            part = slice(start, start + _LINES_AT_ONCE)
            columns = {
                "enrol": [self.names[k] for k in self.enrol[part].tolist()],
                "test": [self.names[k] for k in self.test[part].tolist()],
                "score": [f"{score:.{digits}g}" for score in scores[part].tolist()],
            }
            if self.labels is not None:
                columns["label"] = [shown[label] for label in self.labels[part].tolist()]
            yield from map(" ".join, zip(*(columns[name] for name in (*order, "score")), strict=True))

    def speakers(self, speaker_of: Callable[[str], str]) -> tuple[np.ndarray, np.ndarray]:
        """Speakers of both sides of each trial, as numbers in the order of their names."""
        spoken = [speaker_of(name) for name in self.names]
        number = {speaker: k for k, speaker in enumerate(sorted(set(spoken)))}
        of_name = np.array([number[speaker] for speaker in spoken])
        return of_name[self.enrol], of_name[self.test]


def read_train_list(path: str | os.PathLike[str]) -> list[Utterance]:
    """Lines ``speaker path``.

    Raises:
        InputError: If the file is missing or empty, or a line has other columns (file and line number are named).
    """
    return [Utterance(*columns) for _, columns in _rows(path, 2, "speaker path")]


def read_trials(
    path: str | os.PathLike[str], *, labelled: bool | None = True, scored: bool = False, duplicates: bool = False
) -> TrialList:
    """Trials, one a line: ``label enrol test`` as VoxCeleb's, or ``enrol test label`` as Kaldi's and wespeaker's.

    The first has labels 1 for the same speaker and 0 for different ones, the second ``target`` and ``nontarget``. The
    first line tells which it is.

    Args:
        path: The file.
        labelled: Whether there must be labels; False for lines ``enrol test``, None for either.
        scored: Whether a score ends each line, as ``spkfast score`` writes it.
        duplicates: Whether a trial may be there twice; never with two labels.

    Raises:
        InputError: If the file is missing or empty, a line has other columns or another label, a score is no finite
            number, or a trial is there twice (file and line number are named).
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"{file}: no such list file")
    names = _Places()
    parts: list[list[np.ndarray]] = []
    form: _Form | None = None
    read = 0
    try:
        with file.open(encoding="utf-8-sig") as text:
            while lines := list(itertools.islice(text, _LINES_AT_ONCE)):
                rows = [line.split() for line in lines]
                numbers = np.arange(read + 1, read + 1 + len(rows))
                read += len(rows)
                if not all(rows):
                    kept = [k for k, row in enumerate(rows) if row]
                    rows, numbers = [rows[k] for k in kept], numbers[kept]
                if rows:
                    form = form or _form(f"{file}:{numbers[0]}", rows[0], labelled, scored)
                    parts.append([numbers, *_columns(file, numbers, rows, form, names)])
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not a text file") from error
    if form is None:
        raise InputError(f"{file}: the list is empty")
    numbers, enrol, test, *others = (np.concatenate(column) for column in zip(*parts, strict=True))
    scores = others.pop() if scored else None
    labels = others.pop() if others else None
    trials = TrialList(list(names), enrol, test, labels, source=str(file), lines=numbers, scores=scores, form=form)
    _check_repeated(trials, duplicates)
    return trials


class _Form(NamedTuple):
    """Columns of a trial list, and what its labels are."""

    columns: tuple[str, ...]
    labels: dict[str, bool]

    def scored(self) -> _Form:
        return self._replace(columns=(*self.columns, "score"))


_VOX = _Form(("label", "enrol", "test"), {"1": True, "0": False})
_KALDI = _Form(("enrol", "test", "label"), {"target": True, "nontarget": False})
_PLAIN = _Form(("enrol", "test"), {})


def _form(where: str, row: list[str], labelled: bool | None, scored: bool) -> _Form:
    """Which form a list has, by its first line."""
    if labelled is False or (labelled is None and len(row) == 2 + scored):
        form = _PLAIN
    else:
        form = _KALDI if len(row) > 2 and row[2] in _KALDI.labels and row[0] not in _VOX.labels else _VOX
    form = form.scored() if scored else form
    if len(row) != len(form.columns):
        raise InputError(f"{where}: expected {len(form.columns)} columns '{' '.join(form.columns)}', got {len(row)}")
    return form


def _columns(file: Path, numbers: np.ndarray, rows: list[list[str]], form: _Form, names: _Places) -> list[np.ndarray]:
    """Places of both sides, and labels and scores where there are any."""
    count = len(form.columns)
    if {*map(len, rows)} != {count}:
        at = next(k for k, row in enumerate(rows) if len(row) != count)
        raise InputError(
            f"{file}:{numbers[at]}: expected {count} columns '{' '.join(form.columns)}', got {len(rows[at])}"
        )
    columns = dict(zip(form.columns, zip(*rows, strict=True), strict=True))
    found = list(names.of_pairs(zip(columns["enrol"], columns["test"], strict=True)))
    if "label" in columns:
        try:
            found.append(np.fromiter(map(form.labels.__getitem__, columns["label"]), bool, len(rows)))
        except KeyError as error:
            at = columns["label"].index(error.args[0])
            known = " or ".join(sorted(form.labels))
            raise InputError(f"{file}:{numbers[at]}: the label must be {known}, got {error.args[0]!r}") from None
    if "score" in columns:
        scores = np.array([_number(text) for text in columns["score"]])
        wrong = np.flatnonzero(~np.isfinite(scores))
        if len(wrong):
            at = int(wrong[0])
            raise InputError(f"{file}:{numbers[at]}: the score must be a finite number, got {columns['score'][at]!r}")
        found.append(scores)
    return found


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


class _Places(collections.defaultdict[str, int]):
    """Places of names in the order in which they are first asked for."""

    def __init__(self) -> None:
        super().__init__(itertools.count().__next__)

    def of_pairs(self, pairs: Iterable[tuple[str, str]]) -> tuple[np.ndarray, np.ndarray]:
        """Places of the first and of the second names."""
        places = np.fromiter(map(self.__getitem__, itertools.chain.from_iterable(pairs)), np.int64)
        return places[::2], places[1::2]


def _check_repeated(trials: TrialList, duplicates: bool) -> None:
    """Refuses a trial that is there twice, or with both labels."""
    pairs = trials.enrol * len(trials.names) + trials.test
    order = np.argsort(pairs, kind="stable")
    again = np.flatnonzero(pairs[order][1:] == pairs[order][:-1])
    contrary = np.zeros(len(again), dtype=bool)
    if trials.labels is not None:
        contrary = trials.labels[order[again]] != trials.labels[order[again + 1]]
    wrong = again[contrary] if duplicates else again
    if len(wrong):
        first = wrong[np.argmin(order[wrong + 1])]
        at, before = int(order[first + 1]), int(order[first])
        other = ", with the other label" if contrary[again == first].any() else ""
        raise InputError(f"{trials.where(at)}: the trial of line {trials.lines[before]} again{other}")


def trial_paths(trials: Iterable[Trial]) -> list[str]:
    """Every path of a trial list once, in order of appearance."""
    if isinstance(trials, TrialList):
        used = np.zeros(len(trials.names), dtype=bool)
        used[trials.enrol] = used[trials.test] = True
        return [name for name, is_used in zip(trials.names, used, strict=True) if is_used]
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
