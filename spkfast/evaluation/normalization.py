"""Score normalisation with a cohort: the statistics of each utterance are computed once, not once for each trial."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from spkfast import functional
from spkfast.errors import InputError
from spkfast.evaluation.scoring import as_matrix, index_of, indexes, require_same_kind, unit_rows

Array = TypeVar("Array", np.ndarray, torch.Tensor)

_SCORES_AT_ONCE = 4 << 20  # of utterances with the cohort: they stay in the caches until they are read again


class CohortStatistics(NamedTuple):
    """How an utterance scores against the cohort.

    Attributes:
        mean: Of its scores, or of the greatest ones, shape (U,).
        std: Standard deviation of the same, shape (U,).
    """

    mean: Any
    std: Any


@torch.inference_mode()
def cohort_statistics(
    embeddings: Array, cohort: Array, *, top_n: int | None = None, unbiased: bool = False, index: Any = None
) -> CohortStatistics:
    """Mean and standard deviation of the cosines of each utterance with a cohort.

    Args:
        embeddings: One row per utterance, floating, shape (U, E); need not be normalised.
        cohort: One row per speaker or utterance of the cohort, shape (C, E), of the same type.
        top_n: Of the greatest cosines of each utterance alone; None for all.
        unbiased: Divide by one less, as speechbrain and ESPnet do; wespeaker and 3D-Speaker do not.
        index: Rows that are needed, in any order and number; the others get NaN. None for all.

    Returns:
        Statistics of shape (U,), numpy for numpy, torch for torch.

    Raises:
        InputError: If the cohort is smaller than ``top_n`` or has another dimension, an embedding is zero or not
            finite, or all cosines of an utterance that count are equal, so that they have no deviation to divide by.
    """
    unit, of_cohort = unit_rows(embeddings), unit_rows(cohort, "cohort")
    require_same_kind("cohort", of_cohort, unit)
    count = len(of_cohort) if top_n is None else top_n
    least = 2 if unbiased else 1
    if not least <= count <= len(of_cohort):
        raise InputError(f"top_n must lie in {least}..{len(of_cohort)}, the size of the cohort, got {count}")
    needed = torch.ones(len(unit), dtype=torch.bool, device=unit.device)
    if index is not None:
        needed = torch.zeros_like(needed).index_fill_(0, index_of(unit, "index", index), True)
    rows = needed.nonzero().flatten()
    mean, std = unit.new_full((2, len(unit)), torch.nan)
    for part in rows.split(max(1, _SCORES_AT_ONCE // len(of_cohort))):
        mean[part], std[part] = functional.top_moments(unit[part] @ of_cohort.T, count)
    if (std == 0).any():
        raise InputError(
            f"the {count} cosines of the cohort that count are all equal for row {int((std == 0).nonzero()[0])} of the "
            "embeddings: give a larger cohort, or one without copies"
        )
    if unbiased:
        std *= math.sqrt(count / (count - 1))
    return CohortStatistics(*((mean, std) if isinstance(embeddings, torch.Tensor) else (mean.numpy(), std.numpy())))


@torch.inference_mode()
def normalized(
    scores: Any, enrol_index: Any, test_index: Any, statistics: CohortStatistics, *, sides: str = "both"
) -> Any:
    """Scores standardised by the statistics of their utterances: the mean of ``(s - mean) / std`` over the sides.

    Args:
        scores: Shape (trials,), floating; numpy or torch.
        enrol_index: Row of the first side of each trial, integer, shape (trials,).
        test_index: Row of the second side.
        statistics: From :func:`cohort_statistics`.
        sides: ``both``, ``enrol`` or ``test``.

    Returns:
        Shape (trials,), numpy for numpy scores, torch for torch.

    Raises:
        InputError: If shapes disagree, an index lies outside, a score is not finite, or a row that is named has no
            statistics.
    """
    if sides not in ("both", "enrol", "test"):
        raise InputError(f"sides must be one of both, enrol, test, got {sides!r}")
    raw = torch.as_tensor(scores)
    mean, std = (torch.as_tensor(value, device=raw.device) for value in statistics)
    both = dict(zip(("enrol", "test"), indexes(mean, enrol_index, test_index), strict=True))
    if raw.shape != both["enrol"].shape or not raw.is_floating_point():
        wanted = tuple(both["enrol"].shape)
        raise InputError(f"scores must be floating of shape {wanted}, got {raw.dtype} {tuple(raw.shape)}")
    if not torch.isfinite(raw).all():
        raise InputError(f"scores must be finite, got {raw[~torch.isfinite(raw)][0]:g}")
    mean, inverse = mean.to(raw.dtype), std.reciprocal().to(raw.dtype)
    counted = [side for name, side in both.items() if sides in ("both", name)]
    found = torch.zeros_like(raw)
    for side in counted:
        found += (raw - mean[side]) * inverse[side]
    found /= len(counted)
    if found.isnan().any():
        raise InputError("statistics must have a mean and a deviation of every row that the trials name")
    return found if isinstance(scores, torch.Tensor) else found.numpy()


def as_norm(
    scores: Any,
    enrol_index: Any,
    test_index: Any,
    embeddings: Any,
    cohort: Any,
    *,
    top_n: int,
    unbiased: bool = False,
) -> Any:
    """Adaptive symmetric normalisation: each score standardised by the nearest part of the cohort, from both sides.

    ``s' = ((s - mean[enrol]) / std[enrol] + (s - mean[test]) / std[test]) / 2`` with the statistics of the ``top_n``
    greatest cosines of either utterance with the cohort. Toolkits that subtract a mean from all embeddings do that
    before.

    Args:
        scores: Cosines of the trials, shape (trials,); numpy or torch.
        enrol_index: Row of the first side of each trial, integer, shape (trials,).
        test_index: Row of the second side.
        embeddings: As of :func:`cohort_statistics`.
        cohort: As of :func:`cohort_statistics`.
        top_n: How many of the cohort count for an utterance.
        unbiased: As of :func:`cohort_statistics`.

    Returns:
        Normalised scores, shape (trials,), numpy for numpy scores, torch for torch.

    Raises:
        InputError: As :func:`cohort_statistics`; or if shapes disagree, or an index lies outside.

    Reference: Matejka et al., "Analysis of score normalization in multilingual speaker recognition", Interspeech 2017
    (adaptive S-norm 1).
    """
    return _normalised(scores, enrol_index, test_index, embeddings, cohort, top_n, unbiased, "both")


def s_norm(
    scores: Any,
    enrol_index: Any,
    test_index: Any,
    embeddings: Any,
    cohort: Any,
    *,
    top_n: int | None = None,
    unbiased: bool = False,
) -> Any:
    """Symmetric normalisation: :func:`as_norm` with the whole cohort, unless ``top_n`` is given.

    Reference: Kenny, "Bayesian speaker verification with heavy-tailed priors", Odyssey 2010.
    """
    return _normalised(scores, enrol_index, test_index, embeddings, cohort, top_n, unbiased, "both")


def z_norm(
    scores: Any,
    enrol_index: Any,
    test_index: Any,
    embeddings: Any,
    cohort: Any,
    *,
    top_n: int | None = None,
    unbiased: bool = False,
) -> Any:
    """Zero normalisation: as :func:`s_norm`, from the first side alone.

    Reference: Auckenthaler, Carey and Lloyd-Thomas, "Score normalization for text-independent speaker verification
    systems", Digital Signal Processing 2000.
    """
    return _normalised(scores, enrol_index, test_index, embeddings, cohort, top_n, unbiased, "enrol")


def t_norm(
    scores: Any,
    enrol_index: Any,
    test_index: Any,
    embeddings: Any,
    cohort: Any,
    *,
    top_n: int | None = None,
    unbiased: bool = False,
) -> Any:
    """Test normalisation: as :func:`s_norm`, from the second side alone.

    Reference: Auckenthaler, Carey and Lloyd-Thomas, "Score normalization for text-independent speaker verification
    systems", Digital Signal Processing 2000.
    """
    return _normalised(scores, enrol_index, test_index, embeddings, cohort, top_n, unbiased, "test")


def _normalised(
    scores: Any,
    enrol_index: Any,
    test_index: Any,
    embeddings: Any,
    cohort: Any,
    top_n: int | None,
    unbiased: bool,
    sides: str,
) -> Any:
    both = indexes(as_matrix(embeddings, "embeddings"), enrol_index, test_index)
    # Utterances of other lists may be in the matrix too.
    needed = {"both": torch.cat(both), "enrol": both[0], "test": both[1]}[sides]
    statistics = cohort_statistics(embeddings, cohort, top_n=top_n, unbiased=unbiased, index=needed)
    return normalized(scores, enrol_index, test_index, statistics, sides=sides)
