"""Results of evaluations as files: with all that they depend on, and comparable with one another."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spkfast.data.lists import TrialList, speaker_of
from spkfast.errors import InputError
from spkfast.evaluation.metrics import Difference, Estimate, McNemar, Watch, differences, eer, estimates, mcnemar

FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class ListResult:
    """Figures of one trial list.

    Attributes:
        name: Of the list.
        sha256: Of labels and paths of its trials, in their order: equal for equal trials, however the file is written.
        scores: Shape (trials,).
        labels: Whether both sides are the same speaker, bool, shape (trials,).
        speakers: Numbers of the speakers of both sides; None where the first components of the paths contradict the
            labels and so are no speakers.
        threshold: Score above which trials are accepted at the equal error rate.
        figures: By the name of the metric.
    """

    name: str
    sha256: str
    scores: np.ndarray
    labels: np.ndarray
    speakers: tuple[np.ndarray, np.ndarray] | None
    threshold: float
    figures: dict[str, Estimate]

    @property
    def num_speakers(self) -> int | None:
        """Different speakers of the list."""
        return None if self.speakers is None else len(np.union1d(*self.speakers))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the scores."""
        targets = int(self.labels.sum())
        return {
            "name": self.name,
            "sha256": self.sha256,
            "trials": len(self.labels),
            "targets": targets,
            "nontargets": len(self.labels) - targets,
            "speakers": self.num_speakers,
            "scores_sha256": hashlib.sha256(np.ascontiguousarray(self.scores).tobytes()).hexdigest(),
            "eer_threshold": self.threshold,
            "metrics": {name: figure._asdict() for name, figure in self.figures.items()},
        }


def list_result(
    name: str,
    trials: TrialList,
    scores: np.ndarray,
    metrics: Sequence[str] = ("eer", "min_dcf:0.01"),
    *,
    num_resamples: int = 1000,
    seed: int = 0,
    watch: Watch | None = None,
) -> ListResult:
    """Figures of a trial list, with intervals where its paths begin with the speaker.

    Args:
        name: Of the list.
        trials: With labels.
        scores: Shape (trials,).
        metrics: As of :func:`spkfast.evaluation.estimates`.
        num_resamples: As of :func:`spkfast.evaluation.estimates`; 0 for no intervals.
        seed: Of the resampling.
        watch: As of :func:`spkfast.evaluation.estimates`.

    Raises:
        InputError: As :func:`spkfast.evaluation.estimates`; or if the trials have no labels.
    """
    if trials.labels is None:
        raise InputError(f"{trials.source}: the trials have no labels")
    first, second = trials.speakers(speaker_of)
    # Paths laid out otherwise do not tell the speaker; an interval over what they do tell would be wrong.
    told = bool(((first == second) == trials.labels).all())
    sides: dict[str, Any] = {}
    if told and num_resamples:
        sides = {"enrol_speakers": first, "test_speakers": second, "num_resamples": num_resamples, "seed": seed}
        sides["watch"] = watch
    try:
        figures = estimates(scores, trials.labels, metrics, **sides)
        method = next((name.split(":")[1] for name in metrics if name.startswith("eer:")), "interp")
        threshold = eer(scores, trials.labels, method="interp" if "eer" in metrics else method).threshold
    except InputError as error:
        raise InputError(f"{trials.source}: {error}") from error
    return ListResult(
        name, _digest(trials), scores, trials.labels, (first, second) if told else None, threshold, figures
    )


def write_record(path: str | os.PathLike[str], facts: Mapping[str, Any], lists: Sequence[ListResult]) -> None:
    """Writes what was measured, and beside it the scores, which comparisons need.

    Args:
        path: JSON file; the scores are in ``X.scores.npz`` for ``X.json``.
        facts: Plain values: protocol, model, front-end, and whatever else the figures depend on.
        lists: Results.
    """
    from spkfast import __version__

    target = Path(path)
    if target.exists() and not target.is_file():
        raise InputError(f"{target}: is no file that a record could replace")
    target.parent.mkdir(parents=True, exist_ok=True)
    versions = {"spkfast": __version__, "python": platform.python_version()}
    versions |= {name: __import__(name).__version__ for name in ("torch", "numpy")}
    record = {"format_version": FORMAT_VERSION, **facts, "versions": versions}
    record["lists"] = [result.to_dict() for result in lists]
    arrays: dict[str, Any] = {}
    for k, result in enumerate(lists):
        arrays |= {f"scores_{k}": result.scores, f"labels_{k}": result.labels}
        if result.speakers is not None:
            arrays[f"speakers_{k}"] = np.stack(result.speakers).astype(np.int32)
    fresh = [file.with_name(f".{file.name}.{os.getpid()}") for file in (_scores_of(target), target)]
    try:
        with fresh[0].open("wb") as file:
            np.savez(file, **arrays)
        fresh[1].write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        fresh[0].replace(_scores_of(target))
        fresh[1].replace(target)
    finally:
        for left in fresh:
            left.unlink(missing_ok=True)


class Record(NamedTuple):
    """What :func:`write_record` wrote.

    Attributes:
        path: The file.
        facts: Its contents.
        lists: Scores and figures by name of the list.
    """

    path: Path
    facts: dict[str, Any]
    lists: dict[str, ListResult]


def read_record(path: str | os.PathLike[str]) -> Record:
    """A record and its scores.

    Raises:
        InputError: If a file is missing, damaged, or something else.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"{file}: no such file")
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        if facts["format_version"] != FORMAT_VERSION:
            raise InputError(
                f"{file}: has format version {facts['format_version']}, this spkfast reads version {FORMAT_VERSION}"
            )
        if not isinstance(facts["lists"], list):
            raise TypeError("no lists")
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{file}: not a record of spkfast evaluate --out") from error
    scores = _scores_of(file)
    if not scores.is_file():
        raise InputError(f"{scores}: is missing, which {file.name} was written with")
    try:
        lists = _lists(facts, scores)
    except (zipfile.BadZipFile, OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise InputError(f"{scores}: damaged, or not of {file.name}") from error
    return Record(file, facts, lists)


def _lists(facts: dict[str, Any], scores: Path) -> dict[str, ListResult]:
    """Results by name, with the scores of a file."""
    lists = {}
    with np.load(scores) as arrays:
        for k, row in enumerate(facts["lists"]):
            if hashlib.sha256(arrays[f"scores_{k}"].tobytes()).hexdigest() != row["scores_sha256"]:
                raise ValueError("other scores")
            sides = arrays.get(f"speakers_{k}")
            lists[row["name"]] = ListResult(
                row["name"],
                row["sha256"],
                arrays[f"scores_{k}"],
                arrays[f"labels_{k}"],
                None if sides is None else (sides[0], sides[1]),
                row["eer_threshold"],
                {name: Estimate(**figure) for name, figure in row["metrics"].items()},
            )
    return lists


class Comparison(NamedTuple):
    """Two systems on one list.

    Attributes:
        name: Of the list.
        first: Figures of the first system.
        second: Figures of the second one.
        differences: Second minus first, by the name of the metric; None where speakers are unknown.
        mcnemar: Errors that one alone makes, each at the threshold of its equal error rate.
    """

    name: str
    first: dict[str, Estimate]
    second: dict[str, Estimate]
    differences: dict[str, Difference] | None
    mcnemar: McNemar


def compare_records(
    first: Record, second: Record, *, num_resamples: int = 1000, seed: int = 0, watch: Watch | None = None
) -> list[Comparison]:
    """Compares two systems on the lists that both were evaluated on, trial by trial, by all metrics of either.

    Lists are the same whose trials are, whatever their files are called.

    Args:
        first: From :func:`read_record`.
        second: From :func:`read_record`.
        num_resamples: As of :func:`spkfast.evaluation.differences`; 0 for no differences.
        seed: Of the resampling.
        watch: As of :func:`spkfast.evaluation.estimates`.

    Raises:
        InputError: If they have no list in common.
    """
    same = {result.sha256: result for result in second.lists.values()}
    pairs = [(result, same[result.sha256]) for result in first.lists.values() if result.sha256 in same]
    if not pairs:
        told = [f"{record.path} has {', '.join(record.lists)}" for record in (first, second)]
        raise InputError(f"no list in common, none has the same trials: {', '.join(told)}")
    found = []
    for a, b in pairs:
        metrics = list(dict.fromkeys([*a.figures, *b.figures]))
        changes = None
        if a.speakers is not None and num_resamples:
            changes = differences(
                a.scores,
                b.scores,
                a.labels,
                metrics,
                enrol_speakers=a.speakers[0],
                test_speakers=a.speakers[1],
                num_resamples=num_resamples,
                seed=seed,
                watch=watch,
            )
        alone = mcnemar(a.scores, b.scores, a.labels, first_threshold=a.threshold, second_threshold=b.threshold)
        figures = [estimates(result.scores, result.labels, metrics) for result in (a, b)]
        name = a.name if a.name == b.name else f"{a.name} / {b.name}"
        found.append(Comparison(name, figures[0], figures[1], changes, alone))
    return found


def _scores_of(path: Path) -> Path:
    return path.with_suffix(".scores.npz")


def _digest(trials: TrialList) -> str:
    digest = hashlib.sha256("\n".join(trials.names).encode())
    labels = trials.labels if trials.labels is not None else np.zeros(0, dtype=bool)
    for array in (trials.enrol.astype("<i8"), trials.test.astype("<i8"), labels):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
