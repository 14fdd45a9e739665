"""Error rates by condition: what a table of metadata tells of the utterances of a trial."""

from __future__ import annotations

import csv
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spkfast.data.lists import TrialList
from spkfast.errors import InputError, nearest
from spkfast.evaluation.metrics import Estimate, estimates

_KEYS = ("path", "utterance", "utt", "id", "key", "file")
_MOST_VALUES = 30  # of a column that is worth a table
_PARTS = 3  # of numbers: short, middle, long


class Condition(NamedTuple):
    """Figures of some trials of a list.

    Attributes:
        name: Column and value; ``a / b`` where the two sides differ.
        targets: Trials of the same speaker.
        nontargets: Trials of different ones.
        figures: By the name of the metric; None where targets or nontargets are missing.
    """

    name: str
    targets: int
    nontargets: int
    figures: dict[str, Estimate] | None


def read_metadata(path: str | os.PathLike[str]) -> dict[str, dict[str, str]]:
    """Columns of a table of utterances, each by utterance.

    Args:
        path: File with a head, separated by commas or tabs. The utterance stands in the column ``path``, ``utterance``,
            ``utt``, ``id``, ``key`` or ``file``, as the trials spell it.

    Raises:
        InputError: If the file is missing or empty, has no such column, a line has another number of columns, or an
            utterance is there twice.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"{file}: no such table")
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            first = text.readline()
            text.seek(0)
            rows = list(csv.reader(text, delimiter="\t" if "\t" in first else ","))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{file}: not a table") from error
    if not rows:
        raise InputError(f"{file}: the table is empty")
    head = rows[0]
    if len({*head}) < len(head):
        raise InputError(f"{file}: has a column twice: {', '.join(head)}")
    key = next((name for name in _KEYS if name in head), None)
    if key is None:
        raise InputError(f"{file}: has none of the columns {', '.join(_KEYS)}, but {', '.join(head)}")
    found: dict[str, dict[str, str]] = {name: {} for name in head if name != key}
    place = head.index(key)
    seen = set()
    for number, row in enumerate(rows[1:], start=2):
        if not row:
            continue
        if len(row) != len(head):
            raise InputError(f"{file}:{number}: expected {len(head)} columns, got {len(row)}")
        if row[place] in seen:
            raise InputError(f"{file}:{number}: {row[place]} is there twice")
        seen.add(row[place])
        for name, value in zip(head, row, strict=True):
            if name != key:
                found[name][row[place]] = value
    return found


def check_columns(columns: Sequence[str], metadata: Mapping[str, Any]) -> None:
    """Refuses columns that metadata does not have."""
    for column in columns:
        if column not in metadata:
            raise InputError(
                f"unknown column {column!r}{nearest(column, list(metadata))}; known: {', '.join(metadata)}"
            )


def by_condition(
    trials: TrialList,
    scores: np.ndarray,
    metadata: Mapping[str, Mapping[str, str]],
    columns: Sequence[str] = (),
    *,
    metrics: Sequence[str] = ("eer",),
    speakers: tuple[np.ndarray, np.ndarray] | None = None,
    num_resamples: int = 1000,
    seed: int = 0,
) -> list[Condition]:
    """Figures of the trials of each value of each column.

    A trial belongs to the values of both sides, in either order. Numbers count by the lesser of both sides, such as the
    shorter duration, in three parts of as many trials.

    Args:
        trials: With labels.
        scores: Shape (trials,).
        metadata: Columns by name, each a value by utterance, as :func:`read_metadata` gives them.
        columns: Which; none for all that are numbers or have between 2 and 30 values.
        metrics: As of :func:`spkfast.evaluation.estimates`.
        speakers: Speakers of both sides of each trial, for intervals.
        num_resamples: As of :func:`spkfast.evaluation.estimates`.
        seed: As of :func:`spkfast.evaluation.estimates`.

    Raises:
        InputError: If the trials have no labels, a column is unknown, or it has no value for an utterance.
    """
    if trials.labels is None:
        raise InputError(f"{trials.source}: the trials have no labels")
    check_columns(columns, metadata)
    rows = []
    for column in columns or metadata:
        of_column = []
        for name, chosen in _parts(trials, column, metadata[column], named=bool(columns)):
            labels = trials.labels[chosen]
            targets, total = int(labels.sum()), len(labels)
            figures = None
            if 0 < targets < total:
                sides = (None, None) if speakers is None else tuple(side[chosen] for side in speakers)
                figures = estimates(
                    scores[chosen],
                    labels,
                    metrics,
                    enrol_speakers=sides[0],
                    test_speakers=sides[1],
                    num_resamples=num_resamples,
                    seed=seed,
                )
            of_column.append(Condition(name, targets, total - targets, figures))
        # Such as the speaker, of which no value has both kinds of trial.
        if columns or any(one.figures for one in of_column):
            rows += of_column
    return rows


def _parts(
    trials: TrialList, column: str, values: Mapping[str, str], *, named: bool
) -> Iterator[tuple[str, np.ndarray]]:
    """Names of the conditions of a column, and the trials of each."""
    missing = next((name for name in trials.names if name not in values), None)
    if missing is not None:
        raise InputError(f"{missing}: the trials name this path, but the table has no {column} of it")
    texts = [values[name] for name in trials.names]
    numbers = _numbers(texts)
    if numbers is not None:
        lesser = np.minimum(numbers[trials.enrol], numbers[trials.test])
        edges = np.unique(np.quantile(lesser, np.linspace(0, 1, _PARTS + 1)))
        for low, high in itertools.pairwise(edges):
            last = high == edges[-1]
            chosen = (lesser >= low) & ((lesser <= high) if last else (lesser < high))
            yield f"{column} from {low:g} to {'' if last else 'below '}{high:g}", np.flatnonzero(chosen)
        return
    kinds, kind = np.unique(texts, return_inverse=True)
    if named and len(kinds) > _MOST_VALUES:
        raise InputError(f"column {column} has {len(kinds)} values; conditions are for {_MOST_VALUES} at most")
    if not named and not 2 <= len(kinds) <= _MOST_VALUES:
        return
    sides = np.sort(np.stack([kind[trials.enrol], kind[trials.test]]), axis=0)
    for first, second in np.unique(sides, axis=1).T:
        name = kinds[first] if first == second else f"{kinds[first]} / {kinds[second]}"
        yield f"{column} {name}", np.flatnonzero((sides[0] == first) & (sides[1] == second))


def _numbers(texts: Sequence[str]) -> Any:
    try:
        numbers = np.array([float(text) for text in texts])
    except ValueError:
        return None
    return numbers if np.isfinite(numbers).all() and len(np.unique(numbers)) > _PARTS else None
