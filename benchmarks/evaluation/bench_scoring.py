"""Scoring and metrics at the size of large public lists, beside the loops of other toolkits.

    python -m benchmarks.evaluation.bench_scoring [--out FILE] [--repeats N] [--wespeaker CHECKOUT]

The loops over trials take many minutes at this size: they run on a list of the same kind with a two-hundredth of the
utterances and of the trials, and their time is scaled.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import comparison, memory, timing
from benchmarks.machine import describe_machine
from benchmarks.timing import Figure
from spkfast import functional
from spkfast.evaluation import as_norm, cohort_statistics, cosine_scores, eer, metrics

_UTTERANCES, _DIM, _TRIALS, _COHORT, _TOP = 100_000, 192, 10_000_000, 6000, 300
_LOOPED = 1 / 200  # of the utterances and of the trials, for a loop
_CHECKED = 100_000  # trials compared with float64
_MIB = 2**20

_REMARK = (
    "Random embeddings with a common part for each speaker, and random pairs, the worst order for caches. Loops are "
    "those of the toolkits' own programs, from files in memory to a file in memory, on a two-hundredth of the "
    "utterances and trials with the whole cohort; their time is scaled to all, but for reading the cohort. spkfast "
    "gets arrays and gives arrays. Errors are the largest against float64 on 100,000 trials, or 5,000 of AS-norm; "
    "those of loops, which print five decimals, on their own. Memory is what the process grew by."
)


class Workload:
    """Embeddings, a cohort and trials."""

    def __init__(self, share: float) -> None:
        rng = np.random.default_rng(0)
        utterances, self.trials = round(share * _UTTERANCES), round(share * _TRIALS)
        speakers = rng.standard_normal((max(utterances // 50, 2), _DIM), dtype=np.float32)
        speaker = rng.integers(len(speakers), size=utterances)
        self.embeddings = speakers[speaker] + 1.5 * rng.standard_normal((utterances, _DIM), dtype=np.float32)
        self.cohort = rng.standard_normal((_COHORT, _DIM), dtype=np.float32)
        self.enrol, self.test = rng.integers(utterances, size=(2, self.trials))
        own = rng.random(self.trials) < 0.01  # some targets, which random pairs hardly have
        order = np.argsort(speaker, kind="stable")
        place = np.empty(utterances, dtype=np.int64)
        place[order] = np.arange(utterances)
        self.test[own] = order[np.minimum(place[self.enrol[own]] + 1, utterances - 1)]
        self.labels = speaker[self.enrol] == speaker[self.test]

    def __str__(self) -> str:
        return f"{self.trials:,} trials over {len(self.embeddings):,} embeddings of {_DIM}"


def cosines(work: Workload, loops: Loops | str, repeats: int) -> dict[str, Any]:
    """Cosines of all trials."""

    def by_definition() -> np.ndarray:
        unit = torch.nn.functional.normalize(torch.from_numpy(work.embeddings))
        parts = [torch.from_numpy(side).split(1 << 16) for side in (work.enrol, work.test)]
        scores = [functional.paired_dot(unit, unit, *pair, backend="reference") for pair in zip(*parts, strict=True)]
        return torch.cat(scores).numpy()

    contenders: dict[str, Callable[[], Any]] = {
        "spkfast": lambda: cosine_scores(work.embeddings, work.enrol, work.test),
        "torch, gathered in blocks": by_definition,
    }
    some = slice(0, min(_CHECKED, work.trials))
    want = cosine_scores(work.embeddings.astype(np.float64), work.enrol[some], work.test[some])
    errors = {name: float(np.abs(call()[some] - want).max()) for name, call in contenders.items()}
    result = _timed("cosine scores", work, contenders, repeats, errors)
    figures = [Figure("seconds", result["contenders"]["spkfast"]["median_ms"] / 1e3, at_most=5.0)]
    figures += [comparison.ratio(result, "torch, gathered in blocks", "spkfast")]
    return _with_loop(result, loops, lambda found: (found.cosine, lambda: None), figures)


def normalised(work: Workload, loops: Loops | str, repeats: int) -> dict[str, Any]:
    """AS-norm of all trials, and the statistics alone."""
    scores = cosine_scores(work.embeddings, work.enrol, work.test)

    def by_definition() -> tuple[np.ndarray, np.ndarray]:
        unit, cohort = (torch.nn.functional.normalize(torch.from_numpy(x)) for x in (work.embeddings, work.cohort))
        parts = [functional.top_moments(rows @ cohort.T, _TOP, backend="reference") for rows in unit.split(700)]
        mean, std = (torch.cat(column) for column in zip(*parts, strict=True))
        return mean.numpy(), std.numpy()

    contenders: dict[str, Callable[[], Any]] = {
        "spkfast": lambda: as_norm(scores, work.enrol, work.test, work.embeddings, work.cohort, top_n=_TOP),
        "spkfast, statistics alone": lambda: cohort_statistics(work.embeddings, work.cohort, top_n=_TOP),
        "torch matmul and topk, statistics alone": by_definition,
    }
    some = slice(0, min(_CHECKED, work.trials) // 20)
    rows = [side[some] for side in (work.enrol, work.test)]
    exact = [array.astype(np.float64) for array in (work.embeddings, work.cohort)]
    raw = cosine_scores(exact[0], *rows)
    want = as_norm(raw, rows[0], rows[1], exact[0], exact[1], top_n=_TOP)
    errors = {"spkfast": float(np.abs(contenders["spkfast"]()[some] - want).max())}
    result = _timed(f"AS-norm, cohort of {_COHORT:,}, top {_TOP}", work, contenders, repeats, errors)
    statistics = result["contenders"]["spkfast, statistics alone"]["median_ms"] / 1e3
    result["contenders"]["spkfast, statistics alone"]["gflop_per_s"] = (
        2e-9 * len(work.embeddings) * _COHORT * _DIM / statistics
    )
    figures = [Figure("seconds", result["contenders"]["spkfast"]["median_ms"] / 1e3, at_most=12.0)]
    figures += [comparison.ratio(result, "torch matmul and topk, statistics alone", "spkfast, statistics alone")]
    return _with_loop(result, loops, lambda found: (found.norm, found.read_cohort), figures)


def equal_error_rate(work: Workload, loops: Loops | str, repeats: int) -> dict[str, Any]:
    """EER of all scores."""
    scores = cosine_scores(work.embeddings, work.enrol, work.test)
    contenders: dict[str, Callable[[], Any]] = {
        "spkfast": lambda: eer(scores, work.labels).value,
        "scikit-learn roc_curve": lambda: _by_roc_curve(scores, work.labels),
    }
    if not isinstance(loops, str):
        contenders["wespeaker"] = lambda: loops.eer(scores, work.labels)
    want = eer(scores, work.labels).value
    errors = {name: abs(call() - want) for name, call in contenders.items()}
    if max(errors.values()) > 1e-4:
        raise SystemExit(f"not timed: error rates differ by {max(errors.values()):.1e}")
    result = _timed("EER", work, contenders, repeats, {}, peaks=False)
    figures = [Figure("seconds", result["contenders"]["spkfast"]["median_ms"] / 1e3, at_most=3.0)]
    figures += [comparison.ratio(result, name, "spkfast") for name in contenders if name != "spkfast"]
    return comparison.finish(result, figures)


def interval(repeats: int) -> dict[str, Any]:
    """EER of 40,000 trials of 40 speakers with an interval from 1,000 resamples."""
    rng = np.random.default_rng(0)
    enrol, test = rng.integers(40, size=(2, 40_000))
    test = np.where(rng.random(40_000) < 0.5, enrol, test)
    labels = enrol == test
    scores = rng.normal(size=40_000) + 2 * labels
    drawn = list(metrics._draws(40, 20, 0))

    def resampled() -> list[float]:
        found = []
        for counts in drawn:  # of the thousand
            weights = counts[enrol] * np.where(labels, 1, counts[test])
            repeated = np.repeat(np.arange(len(scores)), weights.astype(int))
            found.append(_by_roc_curve(scores[repeated], labels[repeated]))
        return found

    contenders: dict[str, Callable[[], Any]] = {
        "spkfast": lambda: eer(scores, labels, enrol_speakers=enrol, test_speakers=test),
        "scikit-learn roc_curve, repeated trials": resampled,
    }
    result = _timed("EER with interval, 1,000 resamples", "40,000 trials of 40 speakers", contenders, repeats, {})
    row = result["contenders"]["scikit-learn roc_curve, repeated trials"]
    _scale(row, 1000 / len(drawn), f"{len(drawn)} resamples, scaled")
    figures = [Figure("seconds", result["contenders"]["spkfast"]["median_ms"] / 1e3, at_most=10.0)]
    figures += [comparison.ratio(result, "scikit-learn roc_curve, repeated trials", "spkfast")]
    return comparison.finish(result, figures)


class Loops:
    """wespeaker's own programs, from a checkout."""

    def __init__(self, checkout: Path, work: Workload) -> None:
        from kaldiio import WriteHelper

        package = types.ModuleType("wespeaker")  # its own imports what only its command line needs
        package.__path__ = [str(checkout / "wespeaker")]
        sys.modules["wespeaker"] = package
        sys.modules.setdefault("fire", types.ModuleType("fire"))
        self.score = importlib.import_module("wespeaker.bin.score")
        self.score_norm = importlib.import_module("wespeaker.bin.score_norm")
        self.metrics = importlib.import_module("wespeaker.utils.score_metrics")
        for module in (self.score, self.score_norm):
            module.tqdm = lambda lines, **_: lines  # type: ignore[attr-defined]
        self.work = work
        self.scores = cosine_scores(work.embeddings, work.enrol, work.test)
        self._folder = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
        self.folder = Path(self._folder.name)
        for name, matrix in (("eval", work.embeddings), ("cohort", work.cohort)):
            with WriteHelper(f"ark,scp:{self.folder}/{name}.ark,{self.folder}/{name}.scp") as writer:
                for row, embedding in enumerate(matrix):
                    writer(f"u{row}", embedding)
        with (self.folder / "trials").open("w") as trials, (self.folder / "raw").open("w") as raw:
            for e, t, target, score in zip(work.enrol, work.test, work.labels, self.scores, strict=True):
                label = "target" if target else "nontarget"
                trials.write(f"u{e} u{t} {label}\n")
                raw.write(f"u{e} u{t} {score:.7f} {label}\n")

    def cosine(self) -> float:
        """Scores the trials; its error is returned."""
        self.score.trials_cosine_score(
            str(self.folder / "eval.scp"), str(self.folder), None, [str(self.folder / "trials")]
        )
        return self._error("trials.score", self.scores)

    def read_cohort(self) -> None:
        """What normalising does once, however many trials there are."""
        cohort, _ = zip(*self.score_norm.read_table(str(self.folder / "cohort.scp")), strict=True)
        matrix, _ = self.score_norm.split_embedding(cohort, str(self.folder / "cohort.scp"), 0.0)
        matrix / np.sqrt(np.sum(matrix**2, axis=1, keepdims=True))

    def norm(self) -> float:
        """Normalises the scores; its error is returned."""
        names = [str(self.folder / name) for name in ("raw", "normed", "cohort.scp", "eval.scp")]
        self.score_norm.main("asnorm", _TOP, *names)
        work = self.work
        want = as_norm(self.scores, work.enrol, work.test, work.embeddings, work.cohort, top_n=_TOP)
        return self._error("normed", want)

    def _error(self, name: str, want: np.ndarray) -> float:
        return float(np.abs(np.loadtxt(self.folder / name, usecols=2) - want).max())

    def eer(self, scores: np.ndarray, labels: np.ndarray) -> float:
        """Its equal error rate."""
        rates = self.metrics.compute_pmiss_pfa_rbst(scores, labels.astype(np.int64))
        return float(self.metrics.compute_eer(*rates, scores)[0])


def _with_loop(
    result: dict[str, Any],
    loops: Loops | str,
    choose: Callable[[Loops], tuple[Callable[[], float], Callable[[], None]]],
    figures: list[Figure],
) -> dict[str, Any]:
    """Adds the row of a loop over a part of the trials, scaled to all of them."""
    name = "wespeaker, loop over trials"
    if isinstance(loops, str):
        result["absent"] = {name: loops}
        return comparison.finish(result, figures)
    call, once = choose(loops)
    errors: list[float] = []
    timings, _ = timing.interleaved({name: lambda: errors.append(call()), "once": once}, repeats=2)
    row: dict[str, Any] = timings[name].to_dict()
    _scale(row, 1 / _LOOPED, f"{loops.work.trials:,} trials, scaled", once=1e3 * timings["once"].median)
    row["max_error"] = max(errors)
    result["contenders"][name] = row
    return comparison.finish(result, [*figures, comparison.ratio(result, name, "spkfast", 50.0)])


def _scale(row: dict[str, Any], factor: float, note: str, once: float = 0.0) -> None:
    """Times of a part as those of all, but for the milliseconds that do not grow with it."""
    for key in ("median_ms", "min_ms", "max_ms"):
        row[key] = once + factor * (row[key] - once)
    row["note"] = note


def _timed(
    case: str,
    work: object,
    contenders: dict[str, Callable[[], Any]],
    repeats: int,
    errors: dict[str, float],
    *,
    peaks: bool = True,
) -> dict[str, Any]:
    found = {name: memory.peak_bytes(call) for name, call in contenders.items()} if peaks else {}
    timings, spread = timing.interleaved(contenders, repeats=repeats)
    rows = {name: time.to_dict() for name, time in timings.items()}
    for name, row in rows.items():
        if found.get(name) is not None:
            row["peak_mib"] = found[name] / _MIB  # type: ignore[operator]
        if name in errors:
            row["max_error"] = errors[name]
    return {"case": case, "workload": str(work), "aa_spread": spread, "contenders": rows}


def _by_roc_curve(scores: np.ndarray, labels: np.ndarray) -> float:
    """The definition of voxceleb_trainer."""
    from sklearn.metrics import roc_curve

    false_alarms, hits, _ = roc_curve(labels, scores)
    nearest = np.nanargmin(np.abs(1 - hits - false_alarms))
    return float(max(1 - hits[nearest], false_alarms[nearest]))


def main() -> None:
    """Prints times and goals; with ``--out`` writes JSON too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="rounds, each contender once a round")
    parser.add_argument("--share", type=float, default=1.0, help="of the embeddings and trials; goals are for 1")
    parser.add_argument("--wespeaker", type=Path, help="folder with a checkout of wespeaker, whose loops are timed")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    machine = describe_machine()
    work = Workload(args.share)
    loops: Loops | str = "no checkout was named (--wespeaker)"
    if args.wespeaker:
        loops = Loops(args.wespeaker, Workload(args.share * _LOOPED))
    results = [
        cosines(work, loops, args.repeats),
        normalised(work, loops, args.repeats),
        equal_error_rate(work, loops, args.repeats),
        interval(args.repeats),
    ]
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        record = {"op": "scoring", "machine": machine, "threads": torch.get_num_threads(), "remark": _REMARK}
        args.out.write_text(json.dumps(record | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
