"""Error rates, detection costs and calibration costs of a list of trials, with intervals over speakers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import torch

from spkfast.errors import InputError, nearest

# Passes resamples on and shows how many have come, as a progress bar does; gets them and their number.
Watch = Callable[[Iterable[np.ndarray], int], Iterable[np.ndarray]]

_CONFIDENCE = 0.95
_FEWEST_RESAMPLES = 20


class Eer(NamedTuple):
    """An equal error rate.

    Attributes:
        value: The rate, a fraction.
        threshold: Score above which a trial is accepted at that point.
        low: Lower end of the 95 % interval over speakers, or None where fewer than three speakers were given.
        high: Upper end.
    """

    value: float
    threshold: float
    low: float | None
    high: float | None


class Estimate(NamedTuple):
    """A figure of a list of trials.

    Attributes:
        value: The figure; rates are fractions.
        low: Lower end of the 95 % interval over speakers, or None where fewer than three speakers were given.
        high: Upper end.
    """

    value: float
    low: float | None
    high: float | None


class Difference(NamedTuple):
    """By how much a figure of one system exceeds that of another on the same trials.

    Attributes:
        value: The difference; positive where the second system is worse.
        low: Lower end of the paired 95 % interval over speakers, or None with fewer than three speakers.
        high: Upper end.
        p_value: Of the two-sided test that there is none: 1 less the confidence of the interval of that kind that ends
            at 0, or two over the number of resamples and one, if that is more. None without an interval.
    """

    value: float
    low: float | None
    high: float | None
    p_value: float | None


class McNemar(NamedTuple):
    """Which of two systems errs where the other does not.

    Attributes:
        first_alone: Trials that the first system alone decides wrongly.
        second_alone: Trials that the second one alone decides wrongly.
        p_value: Of the exact two-sided test that each is as likely.
    """

    first_alone: int
    second_alone: int
    p_value: float


def error_rates(scores: Any, labels: Any, *, ties: str = "together") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Miss and false-alarm rate at every threshold that makes a difference.

    A trial is accepted if its score lies above the threshold. Equal scores are one threshold, so that the order of the
    trials does not matter, unless ``ties`` asks for it.

    Args:
        scores: Finite scores, higher for the same speaker, shape (trials,); numpy, torch or a sequence.
        labels: 1 (or True) for the same speaker, 0 for different ones, shape (trials,).
        ties: ``together``; or ``in_order``: one after the other, as they stand in the list, which no threshold can do,
            but the detection costs of voxceleb_trainer and ESPnet do.

    Returns:
        Miss rate, false-alarm rate and threshold, each of shape (different scores + 1,), thresholds ascending from
        minus infinity, where everything is accepted.

    Raises:
        InputError: If shapes differ, a score is not finite, a label is not 0 or 1, or one of the two is missing;
            or if ``ties`` is unknown.
    """
    trials = _Trials(*_checked(scores, labels), ties=ties)
    misses, false_alarms = trials.errors()
    return misses / misses[-1], false_alarms / false_alarms[0], trials.thresholds


def eer(
    scores: Any,
    labels: Any,
    *,
    enrol_speakers: Sequence[Any] | np.ndarray | None = None,
    test_speakers: Sequence[Any] | np.ndarray | None = None,
    method: str = "interp",
    ties: str = "together",
    num_resamples: int = 1000,
    seed: int = 0,
) -> Eer:
    """Equal error rate, a fraction, with a 95 % bootstrap interval over speakers where they are given.

    The definitions differ in the last digits, and by a lot with few trials:

    * ``interp`` (wespeaker, 3D-Speaker): linear between the two points around equal rates.
    * ``clova`` (voxceleb_trainer, ESPnet): the greater rate at the corner of the ROC curve nearest to equality.
    * ``speechbrain``: the mean of both rates at the point nearest to equality.

    Speakers are resampled with replacement, because trials of one speaker are far from independent: a trial counts as
    often as both of its speakers were drawn (the product; for two sides of one speaker, the count of that speaker).
    Resamples without targets or without nontargets are left out. The interval is bias-corrected and expanded for the
    number of speakers. It is somewhat wide where each speaker meets few others, since the product then counts what
    is peculiar to single trials twice; it is too narrow with a dozen speakers, which tell too little of how much
    speakers differ.

    Args:
        scores: Finite scores, higher for the same speaker, shape (trials,); numpy, torch or a sequence.
        labels: 1 (or True) for the same speaker, 0 for different ones, shape (trials,).
        enrol_speakers: Speaker of the first side of each trial, names or numbers, shape (trials,).
        test_speakers: Speaker of the second side.
        method: ``interp``, ``clova`` or ``speechbrain``.
        ties: As of :func:`error_rates`.
        num_resamples: Bootstrap resamples.
        seed: Of the resampling.

    Raises:
        InputError: As :func:`error_rates`; or if the method is unknown, or the speakers of one side alone are given.

    Reference: Bisani and Ney, "Bootstrap estimates for confidence intervals in ASR performance evaluation", ICASSP
    2004 (resampling of speakers rather than trials); Efron, "Better bootstrap confidence intervals", JASA 1987 (bias
    correction); Hesterberg, "What teachers should know about the bootstrap", The American Statistician 2015
    (expansion).
    """
    _check_choice("method", method, list(_METHODS))
    trials = _Trials(*_checked(scores, labels), ties=ties)
    find = _METHODS[method]
    value, index = find(*trials.errors())
    low, high = None, None
    speakers = _speakers(enrol_speakers, test_speakers, len(trials.target))
    if speakers is not None:
        rates = _resampled([trials], {"eer": lambda drawn: find(*drawn.errors)[0]}, speakers, num_resamples, seed)
        low, high = _interval(rates["eer"][:, 0], value, speakers.total)
    return Eer(float(value), float(trials.thresholds[index]), low, high)


def estimates(
    scores: Any,
    labels: Any,
    metrics: Sequence[str] = ("eer", "min_dcf:0.01"),
    *,
    enrol_speakers: Sequence[Any] | np.ndarray | None = None,
    test_speakers: Sequence[Any] | np.ndarray | None = None,
    num_resamples: int = 1000,
    seed: int = 0,
    watch: Watch | None = None,
) -> dict[str, Estimate]:
    """Several figures of a list of trials, with 95 % bootstrap intervals over speakers where they are given.

    A metric is one of

    * ``eer``, or ``eer:clova`` and ``eer:speechbrain`` for the definitions of :func:`eer`;
    * ``min_dcf:P``: the least detection cost at a target prior of P, or ``min_dcf:P:MISS:FA`` with costs other than 1;
    * ``act_dcf:P`` or ``act_dcf:P:MISS:FA``: the detection cost at the threshold that scores which are natural
      logarithms of likelihood ratios should have, :func:`bayes_threshold`;
    * ``cllr``: what such scores cost over all operating points, in bits; ``min_cllr``: the same after the best
      increasing map of the scores.

    Args:
        scores: As of :func:`eer`; for ``act_dcf`` and ``cllr``, natural logarithms of likelihood ratios.
        labels: As of :func:`eer`.
        metrics: Which figures.
        enrol_speakers: As of :func:`eer`.
        test_speakers: As of :func:`eer`.
        num_resamples: Bootstrap resamples, the same ones for all figures.
        seed: Of the resampling.
        watch: Gets the resamples and their number, and passes them on, as a progress bar does.

    Returns:
        The figures by the name of the metric.

    Raises:
        InputError: As :func:`eer`; or if a metric is unknown.

    Reference: Bruemmer and du Preez, "Application-independent evaluation of speaker detection", Computer Speech and
    Language 2006 (Cllr); NIST 2016 Speaker Recognition Evaluation Plan, section 3 (detection cost).
    """
    found = {name: _metric(name) for name in metrics}
    trials = _Trials(*_checked(scores, labels))
    values = {name: float(metric(_Drawn(trials))) for name, metric in found.items()}
    speakers = _speakers(enrol_speakers, test_speakers, len(trials.target))
    if speakers is None:
        return {name: Estimate(value, None, None) for name, value in values.items()}
    drawn = _resampled([trials], found, speakers, num_resamples, seed, watch)
    return {
        name: Estimate(value, *_interval(drawn[name][:, 0], value, speakers.total)) for name, value in values.items()
    }


def check_metrics(metrics: Sequence[str]) -> None:
    """Refuses names that are no metric, as :func:`estimates` does."""
    for name in metrics:
        _metric(name)


def differences(
    first_scores: Any,
    second_scores: Any,
    labels: Any,
    metrics: Sequence[str] = ("eer",),
    *,
    enrol_speakers: Sequence[Any] | np.ndarray,
    test_speakers: Sequence[Any] | np.ndarray,
    num_resamples: int = 1000,
    seed: int = 0,
    watch: Watch | None = None,
) -> dict[str, Difference]:
    """Figures of a second system minus those of a first one, with paired bootstrap intervals over speakers.

    Both are computed on the same resamples, so that what is hard for both cancels.

    Args:
        first_scores: As of :func:`estimates`.
        second_scores: As of :func:`estimates`, of the same trials.
        labels: As of :func:`eer`.
        metrics: As of :func:`estimates`.
        enrol_speakers: As of :func:`eer`.
        test_speakers: As of :func:`eer`.
        num_resamples: Bootstrap resamples.
        seed: Of the resampling.
        watch: Gets the resamples and their number, and passes them on, as a progress bar does.

    Raises:
        InputError: As :func:`estimates`.

    Reference: Bisani and Ney, "Bootstrap estimates for confidence intervals in ASR performance evaluation", ICASSP
    2004.
    """
    found = {name: _metric(name) for name in metrics}
    named = {"first_scores": first_scores, "second_scores": second_scores}
    systems = [_Trials(*_checked(scores, labels, name)) for name, scores in named.items()]
    speakers = _speakers(enrol_speakers, test_speakers, len(systems[0].target))
    if speakers is None:
        raise InputError(
            "enrol_speakers and test_speakers must be given: differences have no meaning without intervals"
        )
    drawn = _resampled(systems, found, speakers, num_resamples, seed, watch)
    result = {}
    for name, metric in found.items():
        first, second = (float(metric(_Drawn(system))) for system in systems)
        values = drawn[name][:, 1] - drawn[name][:, 0]
        low, high = _interval(values, second - first, speakers.total)
        p_value = None if low is None else _p_value(values, second - first, speakers.total)
        result[name] = Difference(second - first, low, high, p_value)
    return result


def mcnemar(
    first_scores: Any, second_scores: Any, labels: Any, *, first_threshold: float, second_threshold: float
) -> McNemar:
    """Exact test of whether two systems err equally often on the same trials, each at its own threshold.

    It takes the trials for independent. Those of one speaker are not, so the value is too small where speakers have
    many trials: :func:`differences` resamples speakers and does not claim more than they tell.

    Args:
        first_scores: As of :func:`eer`.
        second_scores: As of :func:`eer`, of the same trials.
        labels: As of :func:`eer`.
        first_threshold: Score above which the first system accepts.
        second_threshold: Score above which the second one accepts.

    Raises:
        InputError: As :func:`error_rates`; or if SciPy is missing.

    Reference: McNemar, "Note on the sampling error of the difference between correlated proportions or percentages",
    Psychometrika 1947.
    """
    binomtest = _scipy("stats", "binomtest")
    first, target = _checked(first_scores, labels, "first_scores")
    second, _ = _checked(second_scores, labels, "second_scores")
    wrong = [(first > first_threshold) != target, (second > second_threshold) != target]
    alone = [int((wrong[0] & ~wrong[1]).sum()), int((wrong[1] & ~wrong[0]).sum())]
    p_value = float(binomtest(alone[0], sum(alone)).pvalue) if sum(alone) else 1.0
    return McNemar(alone[0], alone[1], p_value)


def min_dcf(
    scores: Any,
    labels: Any,
    p_target: float = 0.01,
    c_miss: float = 1.0,
    c_fa: float = 1.0,
    *,
    ties: str = "together",
) -> float:
    """Least detection cost over all thresholds, divided by the cost of the better constant decision.

    Args:
        scores: Finite scores, higher for the same speaker, shape (trials,); numpy, torch or a sequence.
        labels: 1 (or True) for the same speaker, 0 for different ones, shape (trials,).
        p_target: Prior of the same speaker; figures for different priors cannot be compared.
        c_miss: Cost of a rejected target.
        c_fa: Cost of an accepted nontarget.
        ties: As of :func:`error_rates`.

    Raises:
        InputError: As :func:`error_rates`; or if the prior or a cost is out of range.

    Reference: NIST 2016 Speaker Recognition Evaluation Plan, section 3.
    """
    point = _costs(p_target, c_miss, c_fa)
    return float(_min_dcf(_Drawn(_Trials(*_checked(scores, labels), ties=ties)), point))


def act_dcf(scores: Any, labels: Any, p_target: float = 0.01, c_miss: float = 1.0, c_fa: float = 1.0) -> float:
    """Detection cost at the threshold of Bayes, divided by the cost of the better constant decision.

    Args:
        scores: Natural logarithms of likelihood ratios, finite, shape (trials,).
        labels: As of :func:`min_dcf`.
        p_target: As of :func:`min_dcf`.
        c_miss: As of :func:`min_dcf`.
        c_fa: As of :func:`min_dcf`.

    Raises:
        InputError: As :func:`min_dcf`.

    Reference: NIST 2016 Speaker Recognition Evaluation Plan, section 3.
    """
    point = _costs(p_target, c_miss, c_fa)
    return float(_act_dcf(_Drawn(_Trials(*_checked(scores, labels))), point))


def bayes_threshold(p_target: float = 0.01, c_miss: float = 1.0, c_fa: float = 1.0) -> float:
    """Natural logarithm of the likelihood ratio above which accepting a trial costs less than rejecting it.

    Raises:
        InputError: If the prior or a cost is out of range.
    """
    cost_miss, cost_fa = _costs(p_target, c_miss, c_fa)
    return math.log(cost_fa / cost_miss)


def cllr(scores: Any, labels: Any) -> float:
    """Cost of the logarithm of the likelihood ratio, in bits: 0 for certain and right scores, 1 for none at all.

    Args:
        scores: Natural logarithms of likelihood ratios, finite, shape (trials,).
        labels: As of :func:`error_rates`.

    Raises:
        InputError: As :func:`error_rates`.

    Reference: Bruemmer and du Preez, "Application-independent evaluation of speaker detection", Computer Speech and
    Language 2006.
    """
    return float(_cllr(_Drawn(_Trials(*_checked(scores, labels)))))


def min_cllr(scores: Any, labels: Any) -> float:
    """:func:`cllr` after the best increasing map of the scores: what they tell, however they are calibrated.

    Args:
        scores: Finite scores, higher for the same speaker, shape (trials,).
        labels: As of :func:`error_rates`.

    Raises:
        InputError: As :func:`error_rates`; or if SciPy is missing.

    Reference: Bruemmer and du Preez, "Application-independent evaluation of speaker detection", Computer Speech and
    Language 2006 (by pool adjacent violators).
    """
    return float(_min_cllr(_Drawn(_Trials(*_checked(scores, labels)))))


class _Trials:
    """Trials sorted once, so that errors under any weights are two cumulative sums."""

    def __init__(self, scores: np.ndarray, target: np.ndarray, ties: str = "together") -> None:
        _check_choice("ties", ties, ["together", "in_order"])
        ordered, order = (part.numpy() for part in torch.sort(torch.from_numpy(scores), stable=True))
        self.order = order
        self.ordered = ordered
        self.target = target[order]
        ends = ordered[1:] != ordered[:-1]  # of runs of equal scores
        # Without ties nothing has to be picked out.
        self._last = None if ties == "in_order" or ends.all() else np.append(np.flatnonzero(ends), len(ordered) - 1)
        self.thresholds = np.append(-np.inf, self.at_thresholds(ordered))

    def at_thresholds(self, values: np.ndarray) -> np.ndarray:
        """Of values by trial in order, those of the last trial of each threshold."""
        return values if self._last is None else values[self._last]

    def errors(self, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Weight of rejected targets and of accepted nontargets at each threshold; weights are given in order."""
        targets = self.target if weights is None else weights * self.target
        misses = np.append(0.0, self.at_thresholds(np.cumsum(targets, dtype=np.float64)))
        passed = np.arange(1.0, len(targets) + 1) if weights is None else np.cumsum(weights)
        rejected = np.append(0.0, self.at_thresholds(passed))
        rejected -= misses
        return misses, rejected[-1] - rejected

    @functools.cached_property
    def bits(self) -> np.ndarray:
        """What each score costs as the logarithm of a likelihood ratio, in order."""
        return np.logaddexp(0, np.where(self.target, -self.ordered, self.ordered)) / math.log(2)


class _Drawn:
    """Trials under weights, each figure's common part computed once."""

    def __init__(self, trials: _Trials, weights: np.ndarray | None = None) -> None:
        self.trials, self.weights = trials, weights
        self.errors = trials.errors(weights)


def _metric(name: str) -> Callable[[_Drawn], float]:
    kind, *texts = name.split(":")
    if kind == "eer" and len(texts) <= 1:
        method = texts[0] if texts else "interp"
        _check_choice("method", method, list(_METHODS))
        return lambda drawn: _METHODS[method](*drawn.errors)[0]
    if kind in _COSTS and len(texts) in (1, 3):
        try:
            point = _costs(*map(float, texts))
        except ValueError as error:
            raise InputError(f"metric {name!r}: {error}") from None
        return lambda drawn: _COSTS[kind](drawn, point)
    if kind in _CLLRS and not texts:
        return _CLLRS[kind]
    known = ["eer", "eer:clova", "eer:speechbrain", *(f"{kind}:{end}" for kind in _COSTS for end in ("P", "P:MISS:FA"))]
    known += _CLLRS
    raise InputError(f"unknown metric {name!r}{nearest(name, known)}; known: {', '.join(known)}")


def _costs(p_target: float, c_miss: float = 1.0, c_fa: float = 1.0) -> tuple[float, float]:
    """Cost of rejecting all targets and of accepting all nontargets."""
    if not 0 < p_target < 1:
        raise InputError(f"p_target must lie between 0 and 1, got {p_target}")
    if not (0 < c_miss < math.inf and 0 < c_fa < math.inf):
        raise InputError(f"c_miss and c_fa must be positive and finite, got {c_miss} and {c_fa}")
    return c_miss * p_target, c_fa * (1 - p_target)


def _dcf(drawn: _Drawn, point: tuple[float, float]) -> np.ndarray:
    misses, false_alarms = drawn.errors
    return (point[0] / misses[-1] * misses + point[1] / false_alarms[0] * false_alarms) / min(point)


def _min_dcf(drawn: _Drawn, point: tuple[float, float]) -> float:
    return _dcf(drawn, point).min()


def _act_dcf(drawn: _Drawn, point: tuple[float, float]) -> float:
    at = np.searchsorted(drawn.trials.thresholds, math.log(point[1] / point[0]), side="right") - 1
    return _dcf(drawn, point)[at]


def _cllr(drawn: _Drawn) -> float:
    bits, target = drawn.trials.bits, drawn.trials.target
    weighted = bits if drawn.weights is None else drawn.weights * bits
    misses, false_alarms = drawn.errors
    of_targets = weighted[target].sum()
    return (of_targets / misses[-1] + (weighted.sum() - of_targets) / false_alarms[0]) / 2


def _min_cllr(drawn: _Drawn) -> float:
    isotonic_regression = _scipy("optimize", "isotonic_regression")
    misses, false_alarms = drawn.errors
    targets, nontargets = np.diff(misses), -np.diff(false_alarms)
    counted = targets + nontargets > 0
    targets, nontargets = targets[counted], nontargets[counted]
    both = targets + nontargets
    share = isotonic_regression(targets / both, weights=both).x
    # The likelihood ratio of a block is share / (1 - share) over that of the whole list.
    prior = misses[-1] / false_alarms[0]
    with np.errstate(divide="ignore"):
        of_targets = np.where(targets > 0, np.log2(1 + prior * (1 - share) / share), 0)
        of_nontargets = np.where(nontargets > 0, np.log2(1 + share / (1 - share) / prior), 0)
    return (targets @ of_targets / misses[-1] + nontargets @ of_nontargets / false_alarms[0]) / 2


_COSTS = {"min_dcf": _min_dcf, "act_dcf": _act_dcf}
_CLLRS = {"cllr": _cllr, "min_cllr": _min_cllr}


# Each definition takes the misses and false alarms at ascending thresholds, the first of which accepts everything, and
# returns the rate and the index of its threshold. Weights are whole numbers: comparing products of counts is exact.


def _interpolated(misses: np.ndarray, false_alarms: np.ndarray) -> tuple[float, int]:
    targets, nontargets = misses[-1], false_alarms[0]
    after = int(np.argmax(misses * nontargets >= false_alarms * targets))
    before = after - 1
    gap_after = misses[after] / targets - false_alarms[after] / nontargets
    gap_before = misses[before] / targets - false_alarms[before] / nontargets
    share = gap_after / (gap_after - gap_before)
    return (misses[after] - share * (misses[after] - misses[before])) / targets, after


def _nearest_corner(misses: np.ndarray, false_alarms: np.ndarray) -> tuple[float, int]:
    targets, nontargets = misses[-1], false_alarms[0]
    index = np.arange(len(misses))
    # A threshold at which nothing happens is none (a resample may have drawn no trial with that score), ...
    index = index[np.append(True, (np.diff(misses) != 0) | (np.diff(false_alarms) != 0))]
    # ... and the curve drops points in the middle of equal steps. Rejecting everything is added after that.
    steps = np.stack([misses[index[:-1]], false_alarms[index[:-1]]])
    corner = (np.diff(steps, n=2) != 0).any(axis=0)
    index = index[np.concatenate([[True], corner, [True] * min(2, len(index) - 1)])]
    gap = np.abs(misses[index] * nontargets - false_alarms[index] * targets)
    nearest = int(index[len(gap) - 1 - np.argmin(gap[::-1])])  # of equals, the highest threshold
    return max(misses[nearest] / targets, false_alarms[nearest] / nontargets), nearest


def _nearest_mean(misses: np.ndarray, false_alarms: np.ndarray) -> tuple[float, int]:
    targets, nontargets = misses[-1], false_alarms[0]
    gap = np.abs(misses[1:] * nontargets - false_alarms[1:] * targets)
    nearest = 1 + int(np.argmin(gap))
    return (misses[nearest] / targets + false_alarms[nearest] / nontargets) / 2, nearest


_METHODS = {"interp": _interpolated, "clova": _nearest_corner, "speechbrain": _nearest_mean}


class _Speakers(NamedTuple):
    """Speakers of the two sides of each trial, as numbers; the second is that of nobody where both are one."""

    first: np.ndarray
    second: np.ndarray
    total: int


def _speakers(enrol: Any, test: Any, num_trials: int) -> _Speakers | None:
    if enrol is None and test is None:
        return None
    if enrol is None or test is None:
        raise InputError("enrol_speakers and test_speakers must be given together")
    sides = [np.asarray(side) for side in (enrol, test)]
    for name, side in zip(("enrol_speakers", "test_speakers"), sides, strict=True):
        if side.shape != (num_trials,):
            raise InputError(f"{name} must have shape (trials,) = ({num_trials},), got {side.shape}")
    names, index = np.unique(np.concatenate(sides), return_inverse=True)
    first, second = index[:num_trials], index[num_trials:]
    return _Speakers(first, np.where(first == second, len(names), second), len(names))


def _draws(count: int, num_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each speaker was drawn, and 1 for nobody."""
    if num_resamples < _FEWEST_RESAMPLES:
        raise InputError(f"num_resamples must be at least {_FEWEST_RESAMPLES}, got {num_resamples}")
    rng = np.random.default_rng(seed)
    for _ in range(num_resamples):
        yield np.append(np.bincount(rng.integers(count, size=count), minlength=count), 1).astype(float)


def _resampled(
    systems: Sequence[_Trials],
    metrics: dict[str, Callable[[_Drawn], float]],
    speakers: _Speakers,
    num_resamples: int,
    seed: int,
    watch: Watch | None = None,
) -> dict[str, np.ndarray]:
    """Each metric of each system on the resamples that have targets and nontargets, shape (resamples, systems)."""
    rows: dict[str, list[list[float]]] = {name: [] for name in metrics}
    if speakers.total > 2:  # of two, one resample has both: an interval without width, which would claim certainty
        sides = [(speakers.first[system.order], speakers.second[system.order]) for system in systems]
        draws: Iterable[np.ndarray] = _draws(speakers.total, num_resamples, seed)
        for drawn in watch(draws, num_resamples) if watch else draws:
            weighted = [
                _Drawn(system, drawn[first] * drawn[second])
                for system, (first, second) in zip(systems, sides, strict=True)
            ]
            misses, false_alarms = weighted[0].errors
            if misses[-1] > 0 and false_alarms[0] > 0:
                for name, metric in metrics.items():
                    rows[name].append([float(metric(one)) for one in weighted])
    return {name: np.array(values).reshape(-1, len(systems)) for name, values in rows.items()}


def _interval(values: np.ndarray, value: float, num_speakers: int) -> tuple[float | None, float | None]:
    """Ends of the 95 % interval of a figure, from those of its resamples; None where these are too few.

    Plain quantiles of the resamples lie too close together with few speakers, and too low for rates, which few speakers
    tell too low. Hence the quantiles of Student instead of the normal ones, and those around the rank of the figure
    itself in place of the median: the expanded interval of Hesterberg with the bias correction of Efron.
    """
    if len(values) < _FEWEST_RESAMPLES:
        return None, None
    reach = math.sqrt(num_speakers / (num_speakers - 1)) * _student((1 + _CONFIDENCE) / 2, num_speakers - 1)
    shift = 2 * _deviation(values, value)
    ends = [NormalDist().cdf(shift - reach), NormalDist().cdf(shift + reach)]
    low, high = np.quantile(values, ends)
    return float(low), float(high)


def _p_value(values: np.ndarray, value: float, num_speakers: int) -> float:
    """How improbable 0 is for a figure: 1 less the confidence at which the interval of :func:`_interval` ends there."""
    least = 2 / (len(values) + 1)  # that so many resamples can tell
    if (values > 0).all() or (values < 0).all():
        return least
    reach = abs(_deviation(values, 0) - 2 * _deviation(values, value))
    student = _scipy("stats", "t")
    found = 2 * student.sf(reach / math.sqrt(num_speakers / (num_speakers - 1)), num_speakers - 1)
    return max(least, float(found))


def _deviation(values: np.ndarray, value: float) -> float:
    """Rank of a value among others, as the quantile of a normal distribution."""
    rank = float((values < value).mean() + (values <= value).mean()) / 2
    least = 1 / (len(values) + 1)
    return NormalDist().inv_cdf(min(max(rank, least), 1 - least))


def _student(probability: float, degrees: int) -> float:
    """Quantile of the distribution of Student, by its expansion around the normal one (Fisher and Cornish 1960)."""
    z = NormalDist().inv_cdf(probability)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3


def _check_choice(name: str, value: str, known: list[str]) -> None:
    if value not in known:
        raise InputError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def _scipy(module: str, name: str) -> Any:
    import importlib

    try:
        return getattr(importlib.import_module(f"scipy.{module}"), name)
    except ImportError as error:
        raise InputError("this needs SciPy: pip install spkfast[eval]") from error


def _checked(scores: Any, labels: Any, name: str = "scores") -> tuple[np.ndarray, np.ndarray]:
    score, label = (_numpy(value) for value in (scores, labels))
    if score.ndim != 1 or score.shape != label.shape:
        raise InputError(f"{name} and labels must have one shape (trials,), got {score.shape} and {label.shape}")
    try:
        score = score.astype(np.float64)
    except (ValueError, TypeError):
        raise InputError(f"{name} must be numbers, got {score.dtype}") from None
    if not np.isfinite(score).all():
        raise InputError(
            f"{name} must be finite, got {score[~np.isfinite(score)][0]} for trial {_first(~np.isfinite(score))}"
        )
    wrong = (label != 0) & (label != 1)
    if wrong.any():
        raise InputError(f"labels must be 0 or 1, got {label[wrong][0]!r} for trial {_first(wrong)}")
    target = label == 1
    if target.all() or not target.any():
        raise InputError(f"labels must hold both 0 and 1, got {int(target.sum())} targets in {len(target)} trials")
    return score, target


def _first(mask: np.ndarray) -> int:
    return int(np.argmax(mask))


def _numpy(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if value.is_floating_point():
            value = value.double()  # numpy has no bfloat16
    return np.asarray(value)
