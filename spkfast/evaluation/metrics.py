"""Equal error rate and detection cost of a list of trials, with an interval over speakers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from spkfast.errors import InputError

_CONFIDENCE = 0.95


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


class EerDifference(NamedTuple):
    """By how much the equal error rate of one system exceeds that of another on the same trials.

    Attributes:
        value: The difference, a fraction; positive where the second system is worse.
        low: Lower end of the 95 % interval over speakers, or None with fewer than three speakers.
        high: Upper end.
    """

    value: float
    low: float | None
    high: float | None


def error_rates(scores: Any, labels: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Miss and false-alarm rate at every threshold that makes a difference.

    A trial is accepted if its score lies above the threshold; equal scores are one threshold, so the order of the
    trials does not matter.

    Args:
        scores: Finite scores, higher for the same speaker, shape (trials,); numpy, torch or a sequence.
        labels: 1 (or True) for the same speaker, 0 for different ones, shape (trials,).

    Returns:
        Miss rate, false-alarm rate and threshold, each of shape (different scores + 1,), thresholds ascending from
        minus infinity, where everything is accepted.

    Raises:
        InputError: If shapes differ, a score is not finite, a label is not 0 or 1, or one of the two is missing.
    """
    trials = _Trials(*_checked(scores, labels))
    misses, false_alarms = trials.errors(np.ones(len(trials.target)))
    return misses / misses[-1], false_alarms / false_alarms[0], trials.thresholds


def eer(
    scores: Any,
    labels: Any,
    *,
    enrol_speakers: Sequence[Any] | np.ndarray | None = None,
    test_speakers: Sequence[Any] | np.ndarray | None = None,
    method: str = "interp",
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
    Resamples without targets or without nontargets are left out.

    Args:
        scores: Finite scores, higher for the same speaker, shape (trials,); numpy, torch or a sequence.
        labels: 1 (or True) for the same speaker, 0 for different ones, shape (trials,).
        enrol_speakers: Speaker of the first side of each trial (any hashable names), shape (trials,).
        test_speakers: Speaker of the second side.
        method: ``interp``, ``clova`` or ``speechbrain``.
        num_resamples: Bootstrap resamples.
        seed: Of the resampling.

    Raises:
        InputError: As :func:`error_rates`; or if the method is unknown, or the speakers of one side alone are given.

    Reference: Bisani and Ney, "Bootstrap estimates for confidence intervals in ASR performance evaluation", ICASSP
    2004 (resampling of speakers rather than trials).
    """
    if method not in _METHODS:
        raise InputError(f"method must be one of {', '.join(_METHODS)}, got {method!r}")
    score, target = _checked(scores, labels)
    trials = _Trials(score, target)
    find = _METHODS[method]
    value, index = find(*trials.errors(np.ones(len(target))))
    low, high = None, None
    if enrol_speakers is not None or test_speakers is not None:
        if enrol_speakers is None or test_speakers is None:
            raise InputError("enrol_speakers and test_speakers must be given together")
        low, high = _interval(
            lambda errors: find(*errors[0])[0], [trials], enrol_speakers, test_speakers, num_resamples, seed
        )
    return Eer(float(value), float(trials.thresholds[index]), low, high)


def eer_difference(
    first_scores: Any,
    second_scores: Any,
    labels: Any,
    *,
    enrol_speakers: Sequence[Any] | np.ndarray,
    test_speakers: Sequence[Any] | np.ndarray,
    method: str = "interp",
    num_resamples: int = 1000,
    seed: int = 0,
) -> EerDifference:
    """Equal error rate of a second system minus that of a first one, with a paired bootstrap interval over speakers.

    Both are computed on the same resamples, so that what is hard for both cancels.

    Args:
        first_scores: As of :func:`eer`.
        second_scores: As of :func:`eer`, of the same trials.
        labels: As of :func:`eer`.
        enrol_speakers: As of :func:`eer`.
        test_speakers: As of :func:`eer`.
        method: As of :func:`eer`.
        num_resamples: Bootstrap resamples.
        seed: Of the resampling.

    Raises:
        InputError: As :func:`eer`.

    Reference: Bisani and Ney, "Bootstrap estimates for confidence intervals in ASR performance evaluation", ICASSP
    2004.
    """
    if method not in _METHODS:
        raise InputError(f"method must be one of {', '.join(_METHODS)}, got {method!r}")
    find = _METHODS[method]
    named = {"first_scores": first_scores, "second_scores": second_scores}
    systems = [_Trials(*_checked(scores, labels, name)) for name, scores in named.items()]
    once = np.ones(len(systems[0].target))

    def difference(errors: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
        first, second = (find(*of_system)[0] for of_system in errors)
        return second - first

    value = difference([system.errors(once) for system in systems])
    low, high = _interval(difference, systems, enrol_speakers, test_speakers, num_resamples, seed)
    return EerDifference(float(value), low, high)


def _interval(
    statistic: Callable[[Sequence[tuple[np.ndarray, np.ndarray]]], float],
    systems: Sequence[_Trials],
    enrol_speakers: Any,
    test_speakers: Any,
    num_resamples: int,
    seed: int,
) -> tuple[float | None, float | None]:
    """Ends of the 95 % interval over speakers of a statistic of the errors of all systems."""
    if num_resamples < 1:
        raise InputError(f"num_resamples must be at least 1, got {num_resamples}")
    values = []
    for weights in _resamples(enrol_speakers, test_speakers, len(systems[0].target), num_resamples, seed):
        errors = [system.errors(weights) for system in systems]
        misses, false_alarms = errors[0]
        if misses[-1] > 0 and false_alarms[0] > 0:
            values.append(statistic(errors))
    # Two speakers have one resample with both of them: an interval without width, which would claim certainty.
    if not values or len({*enrol_speakers, *test_speakers}) <= 2:
        return None, None
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def min_dcf(scores: Any, labels: Any, p_target: float = 0.01, c_miss: float = 1.0, c_fa: float = 1.0) -> float:
    """Least detection cost over all thresholds, divided by the cost of the better constant decision.

    Args:
        scores: Finite scores, higher for the same speaker, shape (trials,); numpy, torch or a sequence.
        labels: 1 (or True) for the same speaker, 0 for different ones, shape (trials,).
        p_target: Prior of the same speaker; figures for different priors cannot be compared.
        c_miss: Cost of a rejected target.
        c_fa: Cost of an accepted nontarget.

    Raises:
        InputError: As :func:`error_rates`; or if the prior or a cost is out of range.

    Reference: NIST 2016 Speaker Recognition Evaluation Plan, section 3.
    """
    if not 0 < p_target < 1:
        raise InputError(f"p_target must lie between 0 and 1, got {p_target}")
    if not (c_miss > 0 and c_fa > 0):
        raise InputError(f"c_miss and c_fa must be positive, got {c_miss} and {c_fa}")
    miss_rate, false_alarm_rate, _ = error_rates(scores, labels)
    cost_miss, cost_fa = c_miss * p_target, c_fa * (1 - p_target)
    return float((cost_miss * miss_rate + cost_fa * false_alarm_rate).min() / min(cost_miss, cost_fa))


class _Trials:
    """Trials sorted once, so that errors under any weights are two cumulative sums."""

    def __init__(self, scores: np.ndarray, target: np.ndarray) -> None:
        self._order = np.argsort(scores, kind="stable")
        ordered = scores[self._order]
        self._last = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))  # of each run of equal scores
        self.thresholds = np.append(-np.inf, ordered[self._last])
        self.target = target[self._order]

    def errors(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weight of rejected targets and of accepted nontargets at each threshold."""
        ordered = weights[self._order]
        rejected = np.append(0.0, np.cumsum(ordered)[self._last])
        misses = np.append(0.0, np.cumsum(ordered * self.target)[self._last])
        rejected_nontargets = rejected - misses
        return misses, rejected_nontargets[-1] - rejected_nontargets


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


def _resamples(enrol: Any, test: Any, num_trials: int, num_resamples: int, seed: int) -> Any:
    sides = [np.asarray(side) for side in (enrol, test)]
    for name, side in zip(("enrol_speakers", "test_speakers"), sides, strict=True):
        if side.shape != (num_trials,):
            raise InputError(f"{name} must have shape (trials,) = ({num_trials},), got {side.shape}")
    names, index = np.unique(np.concatenate(sides), return_inverse=True)
    first, second = index[:num_trials], index[num_trials:]
    same = first == second
    rng = np.random.default_rng(seed)
    for _ in range(num_resamples):
        drawn = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names)).astype(float)
        yield drawn[first] * np.where(same, 1.0, drawn[second])


def _checked(scores: Any, labels: Any, name: str = "scores") -> tuple[np.ndarray, np.ndarray]:
    score, label = (_numpy(value) for value in (scores, labels))
    if score.ndim != 1 or score.shape != label.shape:
        raise InputError(f"{name} and labels must have one shape (trials,), got {score.shape} and {label.shape}")
    score = score.astype(np.float64)
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
