"""Scores into log-likelihood ratios: calibration, fusion, quality measures; and a threshold for a false-alarm rate."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch

from spkfast.errors import InputError
from spkfast.evaluation.metrics import _check_choice, _checked, _numpy

_SOLVERS = ("newton", "espnet")
# Values that are worked on at once: what a block needs stays in the cache.
_BLOCK = 16384
_MAX_ITERATIONS = 100
_STEP_TOLERANCE = 1e-8
_MAX_CONDITION = 1e12  # of the Hessian: beyond, steps would hold the rounding of the gradient
# A direction in which the inputs vary a hundred thousand times less than in the widest one holds but the rounding of
# numbers with a few decimals, as where minimum, maximum and difference are all inputs. This is the square.
_RANK_TOLERANCE = 1e-10


class FarThreshold(NamedTuple):
    """A threshold for a wanted false-alarm rate.

    Attributes:
        threshold: A trial is accepted if its score lies above it; minus infinity accepts all.
        far: Share of the nontargets that it accepts: the wanted rate or, with ties or between two counts, less.
        miss_rate: Share of the targets that it rejects.
    """

    threshold: float
    far: float
    miss_rate: float


def threshold_at_far(scores: Any, labels: Any, far: float) -> FarThreshold:
    """The least threshold whose false-alarm rate is not above the wanted one, on these trials.

    Args:
        scores: Finite scores, higher for the same speaker, shape (trials,); numpy, torch or a sequence.
        labels: 1 (or True) for the same speaker, 0 for different ones, shape (trials,).
        far: Wanted false-alarm rate, a fraction; 0, or at least one nontarget's share: lower rates cannot be measured.

    Raises:
        InputError: As :func:`spkfast.evaluation.error_rates`; or if the rate lies outside [0, 1] or is too low for the
            number of nontargets.
    """
    score, target = _checked(scores, labels)
    targets, nontargets = score[target], score[~target]
    count = len(nontargets)
    if not 0 <= far <= 1:
        raise InputError(f"far must lie in [0, 1], got {far}")
    if 0 < far < 1 / count:
        raise InputError(f"far must be 0 or at least the share of one of the {count} nontargets, got {far}; add some")
    # The greatest count whose share is not above the rate. The product may be off by one rounding, the shares are not.
    allowed = math.floor(far * count) + 1
    while allowed / count > far:
        allowed -= 1
    # The greatest score of a nontarget that must not be accepted: any lower threshold accepts one too many.
    rejected = count - 1 - allowed
    threshold = float(np.partition(nontargets, rejected)[rejected]) if rejected >= 0 else -math.inf
    return FarThreshold(threshold, float(np.mean(nontargets > threshold)), float(np.mean(targets <= threshold)))


class _AffineMap:
    """Weights and an offset: ``inputs @ weights + offset``; how they are found is left to the classes below."""

    _INPUTS = "inputs"

    def __init__(self, weights: Any, offset: float, fitted_on: Mapping[str, Any] | None = None) -> None:
        self.weights = _numpy(weights).astype(np.float64)
        self.offset = float(offset)
        self.fitted_on = dict(fitted_on or {})
        if self.weights.ndim != 1 or not self.weights.size:
            raise InputError(f"weights must have shape ({self._INPUTS},), got {self.weights.shape}")
        if not (np.isfinite(self.weights).all() and math.isfinite(self.offset)):
            raise InputError(f"weights and offset must be finite, got {self.weights} and {self.offset}")

    def _apply(self, inputs: Any) -> Any:
        matrix = _matrix(inputs, self._INPUTS)
        if matrix.shape[1] != len(self.weights):
            raise InputError(
                f"{self._INPUTS} must have shape (trials, {len(self.weights)}), as those of the fit, "
                f"got {tuple(np.shape(inputs))}"
            )
        result = np.empty(len(matrix))
        for part in _blocks(len(matrix)):
            result[part] = matrix[part].astype(np.float64, copy=False) @ self.weights + self.offset
        return torch.from_numpy(result).to(inputs.device) if isinstance(inputs, torch.Tensor) else result

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "kind": type(self).__name__,
            "weights": self.weights.tolist(),
            "offset": self.offset,
            "fitted_on": dict(self.fitted_on),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """The opposite of :meth:`to_dict`.

        Raises:
            InputError: If the content is of another kind or incomplete.
        """
        kind = content.get("kind")
        if kind != cls.__name__:
            raise InputError(f"kind must be {cls.__name__!r}, got {kind!r}")
        try:
            return cls(content["weights"], content["offset"], content["fitted_on"])
        except InputError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{cls.__name__} needs numbers weights and offset, and fitted_on: {error!r}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file that :meth:`load` reads; its folder is made, and a file that is there is replaced."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.partial")  # a reader never sees half a file
        partial.write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        partial.replace(target)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file of :meth:`save`.

        Raises:
            InputError: If the file cannot be read, is no JSON, or holds something else.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read as JSON: {error}") from error
        if not isinstance(content, dict):
            raise InputError(f"{path}: must hold an object with kind {cls.__name__!r}, got {type(content).__name__}")
        try:
            return cls.from_dict(content)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    def __repr__(self) -> str:
        return f"{type(self).__name__}(weights={self.weights.tolist()}, offset={self.offset})"


class LogisticCalibration(_AffineMap):
    """Affine map of scores to natural logarithms of likelihood ratios; of several systems, their linear fusion.

    Args:
        weights: One per system, shape (systems,).
        offset: Added to the weighted sum.
        fitted_on: What is known of the fit, plain values.

    Raises:
        InputError: If the weights have another shape, or a value is not finite.
    """

    _INPUTS = "scores"

    @classmethod
    def fit(
        cls, scores: Any, labels: Any, *, p_target: float = 0.5, l2: float = 0.0, description: str = ""
    ) -> LogisticCalibration:
        """Logistic regression, weighted so that targets count as a share ``p_target`` of all.

        At 0.5 this is the map with the least Cllr on these trials; another prior gives more weight to what matters at
        the operating points around it. The optimum does not depend on unit or origin of the scores. Systems that are
        sums of each other share their weight in the least way (that of least norm, of standardised scores).

        Where the classes can be told apart without error, the likelihood ratios of the optimum are infinite: that is
        an error, unless ``l2`` is positive.

        Args:
            scores: Finite, shape (trials,), or (trials, systems) for a fusion; numpy, torch or a sequence.
            labels: 1 (or True) for the same speaker, 0 for different ones, shape (trials,).
            p_target: Prior of the same speaker, between 0 and 1.
            l2: Half of it times the sum of squared weights of the standardised scores is added to the cost, which is
                the mean over trials in nats. 0 is the unregularised optimum.
            description: Of the trials, such as name and hash of their list; kept in ``fitted_on``.

        Raises:
            InputError: If shapes differ, a score is not finite, a label is not 0 or 1, one of the two is missing, an
                option is out of range, all trials have the same score, or the classes separate.

        Reference: Bruemmer and du Preez, "Application-independent evaluation of speaker detection", Computer Speech
        and Language 2006; Bruemmer et al., "Fusion of heterogeneous speaker recognition systems in the STBU submission
        for the NIST SRE 2006", IEEE TASLP 2007.
        """
        matrix, target = _labelled(scores, labels, cls._INPUTS)
        weights, offset = _least_cost(matrix, target, p_target, l2, cls._INPUTS)
        return cls(weights, offset, _facts(target, p_target=p_target, l2=l2, description=description))

    def apply(self, scores: Any) -> Any:
        """Log-likelihood ratios, float64, shape (trials,); torch, on the same device, for torch, otherwise numpy.

        Args:
            scores: Finite, shape (trials,), or (trials, systems) as in :meth:`fit`.

        Raises:
            InputError: If the shape is another, or a score is not finite.
        """
        return self._apply(scores)


class Qmf(_AffineMap):
    """Calibration that also looks at the quality of the two sides of a trial (quality measure functions).

    Args:
        weights: One per feature, shape (features,).
        offset: Added to the weighted sum.
        fitted_on: What is known of the fit, plain values.

    Raises:
        InputError: If the weights have another shape, or a value is not finite.
    """

    _INPUTS = "features"

    @classmethod
    def fit(
        cls,
        features: Any,
        labels: Any,
        *,
        solver: str = "newton",
        p_target: float = 0.5,
        l2: float = 0.0,
        description: str = "",
    ) -> Qmf:
        """Fit on features of trials whose labels are known, from :func:`wespeaker_quality` or :func:`espnet_quality`.

        * ``newton``: the optimum, as :meth:`LogisticCalibration.fit` has it. It is what wespeaker's optimiser is on the
          way to when it stops.
        * ``espnet``: scikit-learn's liblinear with its default penalty. Classes are not weighted, so that the result
          holds the share of targets of these trials: it is the logarithm of odds, not of a likelihood ratio.

        Args:
            features: Finite, shape (trials, features); numpy, torch or a sequence.
            labels: 1 (or True) for the same speaker, 0 for different ones, shape (trials,).
            solver: ``newton`` or ``espnet``.
            p_target: As of :meth:`LogisticCalibration.fit`; for ``newton``.
            l2: As of :meth:`LogisticCalibration.fit`; for ``newton``.
            description: Of the trials; kept in ``fitted_on``.

        Raises:
            InputError: As :meth:`LogisticCalibration.fit`; or if the solver is unknown or lacks an option, or
                scikit-learn is missing for ``espnet``.
        """
        _check_choice("solver", solver, list(_SOLVERS))
        matrix, target = _labelled(features, labels, cls._INPUTS)
        if solver == "newton":
            weights, offset = _least_cost(matrix, target, p_target, l2, cls._INPUTS)
            facts = _facts(target, p_target=p_target, l2=l2, description=description)
        elif (p_target, l2) != (0.5, 0.0):
            raise InputError(f"p_target and l2 are options of the solver newton, got solver {solver!r} with them")
        else:
            weights, offset = _liblinear(matrix, target)
            facts = _facts(target, description=description)
        return cls(weights, offset, {"solver": solver, **facts})

    def apply(self, features: Any) -> Any:
        """Log-likelihood ratios (log odds after ``espnet``), float64, shape (trials,); torch for torch, else numpy.

        Args:
            features: Finite, shape (trials, features) as in :meth:`fit`.

        Raises:
            InputError: If the shape is another, or a feature is not finite.
        """
        return self._apply(features)

    def probability(self, features: Any) -> Any:
        """ESPnet's score, the probability of the same speaker: ``1 / (1 + exp(-apply(features)))``.

        Near 1 different trials round to the same probability; :meth:`apply` keeps their order.

        Args:
            features: As of :meth:`apply`.

        Raises:
            InputError: As :meth:`apply`.
        """
        probability = torch.as_tensor(self._apply(features)).sigmoid()
        return probability if isinstance(features, torch.Tensor) else probability.numpy()


def wespeaker_quality(
    scores: Any,
    enrol_index: Any,
    test_index: Any,
    *,
    magnitudes: Any,
    cohort_means: Any,
    durations_s: Any = None,
    max_duration_s: float = 20.0,
) -> Any:
    """wespeaker's features of trials: the score and minimum, maximum, difference and ratio of each quality measure.

    The measures are duration, magnitude and cohort mean, in this order; the ratio is maximum over minimum. wespeaker
    passes them through text files: it rounds the scores to 5 decimals, magnitudes, cohort means and features to 4.

    Args:
        scores: Normalised scores, shape (trials,); numpy, torch or a sequence.
        enrol_index: Row of the first side of each trial in the arrays of utterances, integer, shape (trials,).
        test_index: Row of the second side.
        magnitudes: L2 norm of each embedding before it is normalised and after the mean is subtracted, shape (U,).
        cohort_means: Mean of the cohort scores that normalisation uses, of each utterance, shape (U,).
        durations_s: Duration of each utterance in seconds, shape (U,), or None to leave it out.
        max_duration_s: Longer durations count as this.

    Returns:
        Features, float64, shape (trials, 13), or (trials, 9) without durations; torch for torch scores.

    Raises:
        InputError: If shapes disagree, an index lies outside, a value is not finite, a duration or magnitude is not
            positive, or the lower cohort mean of a trial is zero.
    """
    given = scores
    scores, sides = _trials(scores, enrol_index, test_index)
    measures = {"magnitudes": magnitudes, "cohort_means": cohort_means}
    if durations_s is not None:
        if not max_duration_s > 0:
            raise InputError(f"max_duration_s must be positive, got {max_duration_s}")
        measures = {"durations_s": durations_s, **measures}
    features = np.empty((len(scores), 1 + 4 * len(measures)))
    features[:, 0] = scores
    for column, (name, values) in zip(range(1, features.shape[1], 4), measures.items(), strict=True):
        of_utterance = _per_utterance(name, values, len(magnitudes), positive=name != "cohort_means")
        if name == "durations_s":
            of_utterance = np.minimum(of_utterance, max_duration_s)
        first, second = _picked(of_utterance, sides, name)
        low, high, difference, ratio = features[:, column : column + 4].T
        np.minimum(first, second, out=low)
        np.maximum(first, second, out=high)
        np.subtract(high, low, out=difference)
        if (low == 0).any():
            raise InputError(
                f"{name} must not be zero where they are the lower ones, that of trial {np.argmax(low == 0)} is: "
                "the ratio would be infinite"
            )
        np.divide(high, low, out=ratio)
    return torch.from_numpy(features).to(given.device) if isinstance(given, torch.Tensor) else features


def espnet_quality(scores: Any, enrol_index: Any, test_index: Any, *, embeddings: Any, durations_s: Any) -> Any:
    """ESPnet's features of trials: the score and, of each side, duration, norms and spread of its crops' embeddings.

    In this order, and within each of them the first side before the second: score, logarithm of the duration, mean L1
    norm of the crops, mean L2 norm, standard deviation over the dimensions of the mean embedding, standard deviation
    over the crops of each dimension (zero for one crop). Deviations are divided by the number of values.

    Args:
        scores: Raw or normalised scores, shape (trials,); numpy, torch or a sequence.
        enrol_index: Row of the first side of each trial in the arrays of utterances, integer, shape (trials,).
        test_index: Row of the second side.
        embeddings: Embeddings of the crops of each utterance, not normalised, shape (U, crops, E).
        durations_s: Duration of each utterance in seconds, shape (U,).

    Returns:
        Features, float32 as ESPnet has them, shape (trials, 9 + 2 E); torch for torch scores.

    Raises:
        InputError: If shapes disagree, an index lies outside, a value is not finite, or a duration is not positive.

    Reference: ID R&D, "VoxCeleb Speaker Recognition Challenge 2023 system description" (the deviations).
    """
    given = scores
    scores, sides = _trials(scores, enrol_index, test_index)
    crops = _numpy(embeddings)
    if crops.ndim != 3 or not all(crops.shape[1:]) or crops.dtype.kind != "f":
        raise InputError(f"embeddings must be floating with shape (U, crops, E), got {crops.dtype} {crops.shape}")
    dimensions = crops.shape[2]
    of_utterance = np.empty((len(crops), 4 + dimensions), dtype=np.float32)
    for part in _blocks(len(crops), crops.shape[1] * dimensions):
        block = crops[part].astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is reported below
            of_utterance[part, 1] = np.abs(block).sum(axis=2).mean(axis=1)
            of_utterance[part, 2] = np.linalg.norm(block, axis=2).mean(axis=1)
            of_utterance[part, 3] = block.mean(axis=1).std(axis=1)
            of_utterance[part, 4:] = block.std(axis=1)
    wrong = ~np.isfinite(of_utterance[:, 1:]).all(axis=1)
    if wrong.any():
        raise InputError(f"embeddings must be finite, those of utterance {np.argmax(wrong)} are not")
    of_utterance[:, 0] = np.log(_per_utterance("durations_s", durations_s, len(crops), positive=True))

    features = np.empty((len(scores), 9 + 2 * dimensions), dtype=np.float32)
    features[:, 0] = scores
    for side, picked in enumerate(_picked(of_utterance, sides, "embeddings")):
        features[:, 1 + side : 9 : 2] = picked[:, :4]
        start = 9 + side * dimensions
        features[:, start : start + dimensions] = picked[:, 4:]
    return torch.from_numpy(features).to(given.device) if isinstance(given, torch.Tensor) else features


def _facts(target: np.ndarray, **settings: Any) -> dict[str, Any]:
    return {"targets": int(target.sum()), "nontargets": int((~target).sum()), **settings}


def _blocks(rows: int, values_per_row: int = 1) -> Iterator[slice]:
    size = max(1024, _BLOCK // values_per_row)
    for start in range(0, rows, size):
        yield slice(start, start + size)


def _matrix(inputs: Any, name: str) -> np.ndarray:
    """Finite numbers of shape (trials, inputs)."""
    matrix = _numpy(inputs)
    given = matrix.shape
    if matrix.ndim == 1:
        matrix = matrix[:, None]
    if matrix.ndim != 2 or matrix.dtype.kind not in "fiub" or not matrix.shape[1]:
        raise InputError(f"{name} must be numbers of shape (trials,) or (trials, {name}), got {matrix.dtype} {given}")
    for part in _blocks(len(matrix), matrix.shape[1]):
        wrong = ~np.isfinite(matrix[part]).all(axis=1)
        if wrong.any():
            row = part.start + int(np.argmax(wrong))
            raise InputError(f"{name} must be finite, got {matrix[row]} for trial {row}")
    return matrix


def _labelled(inputs: Any, labels: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    matrix = _matrix(inputs, name)
    return matrix, _checked(matrix[:, 0], labels, name)[1]


def _trials(scores: Any, enrol_index: Any, test_index: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    score = _numpy(scores)
    if score.ndim != 1:
        raise InputError(f"scores must have shape (trials,), got {score.shape}")
    if not np.isfinite(score).all():
        raise InputError(f"scores must be finite, that of trial {np.argmax(~np.isfinite(score))} is not")
    sides = {"enrol_index": _numpy(enrol_index), "test_index": _numpy(test_index)}
    for name, side in sides.items():
        if side.shape != score.shape:
            raise InputError(f"{name} must have shape {score.shape}, as the scores, got {side.shape}")
        if side.dtype.kind not in "iu":
            raise InputError(f"{name} must hold integers, got {side.dtype}")
    return score, sides


def _per_utterance(name: str, values: Any, count: int, *, positive: bool) -> np.ndarray:
    array = _numpy(values)
    if array.shape != (count,) or array.dtype.kind not in "fiu":
        raise InputError(f"{name} must be numbers, one per utterance ({count},), got {array.dtype} {array.shape}")
    wrong = ~np.isfinite(array) | (positive & (array <= 0))
    if wrong.any():
        row = int(np.argmax(wrong))
        kind = "finite and positive" if positive else "finite"
        raise InputError(f"{name} must be {kind}, got {array[row]} for utterance {row}")
    return array.astype(np.float64)


def _picked(of_utterance: np.ndarray, sides: Mapping[str, np.ndarray], name: str) -> list[np.ndarray]:
    """Values of the two sides of each trial."""
    for index_name, side in sides.items():
        if len(side) and not (side.min() >= 0 and side.max() < len(of_utterance)):
            raise InputError(
                f"{index_name} must lie in [0, {len(of_utterance)}), the rows of {name}, "
                f"got {side.min()} to {side.max()}"
            )
    return [of_utterance[side] for side in sides.values()]


def _least_cost(
    matrix: np.ndarray, target: np.ndarray, p_target: float, l2: float, name: str
) -> tuple[np.ndarray, float]:
    """Weights and offset of the logistic regression, by Newton's method."""
    if not 0 < p_target < 1:
        raise InputError(f"p_target must lie between 0 and 1, got {p_target}")
    if not 0 <= l2 < math.inf:
        raise InputError(f"l2 must be finite and not negative, got {l2}")
    mean, basis, variances = _principal_basis(matrix, name)
    # Along this basis the inputs have variance 1, so the penalty of the standardised weights has another scale in each.
    penalty = np.append(l2 / variances, 0.0)
    prior_log_odds = math.log(p_target / (1 - p_target))
    sides = [
        (1.0, p_target / target.sum(), matrix[target]),
        (-1.0, (1 - p_target) / (~target).sum(), matrix[~target]),
    ]

    def cost(coefficients: np.ndarray) -> _Cost:
        value = 0.5 * penalty @ coefficients**2
        gradient = penalty * coefficients
        hessian = np.diag(penalty)
        least_margin = math.inf
        for sign, weight, rows in sides:
            for part in _blocks(len(rows), len(coefficients)):
                block = rows[part].astype(np.float64, copy=False)
                inputs = np.ones((len(block), len(coefficients)))
                np.matmul(block - mean, basis, out=inputs[:, :-1])
                margin = inputs @ (sign * coefficients)
                small = np.exp(-np.abs(margin))
                share = 1 / (1 + small)
                value += weight * (np.maximum(-margin, 0) + np.log1p(small)).sum()
                gradient -= sign * weight * (np.where(margin > 0, small * share, share) @ inputs)
                hessian += weight * (inputs * (small * share**2)[:, None]).T @ inputs
                least_margin = min(least_margin, float(margin.min()))
        return _Cost(float(value), gradient, hessian, least_margin)

    unresolved = InputError(
        f"{name} have no optimum that can be found: they tell the two labels apart but for ties, or single ones lie "
        "too far from all others; look at them, or set l2 above 0"
    )
    coefficients = np.append(np.zeros(basis.shape[1]), prior_log_odds)  # says nothing: a likelihood ratio of 1
    now = cost(coefficients)
    for _ in range(_MAX_ITERATIONS):
        # Margins that are all positive can be scaled up without end, and with each step the cost falls.
        if l2 == 0 and now.least_margin > 0:
            raise InputError(
                f"{name} tell the two labels apart without error: no finite log-likelihood ratios are best; "
                "add harder trials, or set l2 above 0"
            )
        # Where ties alone keep the classes apart, the cost flattens out in one direction and stays curved in others.
        if not np.linalg.cond(now.hessian) < _MAX_CONDITION:
            raise unresolved
        step = np.linalg.solve(now.hessian, -now.gradient)
        # The slack is above the rounding of the sums and below anything that matters.
        size, slope, slack = 1.0, float(now.gradient @ step), 1e-12 * now.value
        following = cost(coefficients + step)
        while not following.value <= now.value + 1e-4 * size * slope + slack:
            size /= 2
            if size < _STEP_TOLERANCE:
                raise unresolved
            following = cost(coefficients + size * step)
        coefficients, now = coefficients + size * step, following
        # Near the optimum the error is squared in each step: this was the last one that counts.
        if size == 1 and np.abs(step).max() <= _STEP_TOLERANCE * max(1.0, np.abs(coefficients).max()):
            weights = basis @ coefficients[:-1]
            return weights, float(coefficients[-1] - mean @ weights - prior_log_odds)
    raise unresolved


class _Cost(NamedTuple):
    value: float
    gradient: np.ndarray
    hessian: np.ndarray
    least_margin: float


def _principal_basis(matrix: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, and the directions in which standardised inputs vary: (inputs, rank), scaled to variance 1; variances."""
    first = matrix[0].astype(np.float64)
    rows, count = matrix.shape
    # Seen from the first row, an input that is constant comes out as exactly that.
    mean = first + sum((matrix[part] - first).sum(axis=0) for part in _blocks(rows, count)) / rows
    covariance = np.zeros((count, count))
    for part in _blocks(rows, count):
        centred = matrix[part] - mean
        covariance += centred.T @ centred / rows
    deviation = np.sqrt(np.diag(covariance))
    standardise = np.divide(1, deviation, out=np.zeros(count), where=deviation > 0)
    variances, directions = np.linalg.eigh(covariance * np.outer(standardise, standardise))
    kept = variances > _RANK_TOLERANCE * variances[-1]
    if not kept.any():
        raise InputError(f"{name} must differ, all trials have {first}")
    variances = variances[kept]
    return mean, standardise[:, None] * directions[:, kept] / np.sqrt(variances), variances


def _liblinear(features: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, float]:
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise InputError("solver 'espnet' needs scikit-learn: pip install 'spkfast[eval]'") from error
    model = LogisticRegression(random_state=0, solver="liblinear").fit(features, target)
    return model.coef_[0], float(model.intercept_[0])
