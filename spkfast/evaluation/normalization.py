"""Score normalisation with a cohort: the statistics of each utterance are computed once, not once for each trial."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from spkfast import functional
from spkfast.errors import InputError
from spkfast.evaluation.scoring import indexes, require_same_kind, unit_rows

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
    embeddings: Array, cohort: Array, *, top_n: int | None = None, unbiased: bool = False
) -> CohortStatistics:
    """Mean and standard deviation of the cosines of each utterance with a cohort.

    Args:
        embeddings: One row per utterance, floating, shape (U, E); need not be normalised.
        cohort: One row per speaker or utterance of the cohort, shape (C, E), of the same type.
        top_n: Of the greatest cosines of each utterance alone; None for all.
        unbiased: Divide by one less, as speechbrain and ESPnet do; wespeaker and 3D-Speaker do not.

    Returns:
        Statistics of shape (U,), numpy for numpy, torch for torch.

    Raises:
        InputError: If the cohort is smaller than ``top_n`` or has another dimension, an embedding is zero or not
            finite, or all cosines of an utterance that count are equal, so that they have no deviation to divide by.
    """
    mean, std = _statistics(unit_rows(embeddings), unit_rows(cohort, "cohort"), top_n, unbiased)
    if isinstance(embeddings, np.ndarray):
        return CohortStatistics(mean.numpy(), std.numpy())
    return CohortStatistics(mean, std)


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
    return _normalised(scores, enrol_index, test_index, embeddings, cohort, top_n, unbiased, (True, True))


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
    return _normalised(scores, enrol_index, test_index, embeddings, cohort, top_n, unbiased, (True, True))


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
    return _normalised(scores, enrol_index, test_index, embeddings, cohort, top_n, unbiased, (True, False))


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
    return _normalised(scores, enrol_index, test_index, embeddings, cohort, top_n, unbiased, (False, True))


@torch.inference_mode()
def _normalised(
    scores: Any,
    enrol_index: Any,
    test_index: Any,
    embeddings: Any,
    cohort: Any,
    top_n: int | None,
    unbiased: bool,
    counted: tuple[bool, bool],
) -> Any:
    unit = unit_rows(embeddings)
    raw = torch.as_tensor(scores, device=unit.device)
    sides = indexes(unit, enrol_index, test_index)
    if raw.shape != sides[0].shape or not raw.is_floating_point():
        raise InputError(
            f"scores must be floating of shape {tuple(sides[0].shape)}, got {raw.dtype} {tuple(raw.shape)}"
        )
    if not torch.isfinite(raw).all():
        raise InputError(f"scores must be finite, got {raw[~torch.isfinite(raw)][0]:g}")
    which = [side for side, counts in zip(sides, counted, strict=True) if counts]
    # Utterances of other lists may be in the matrix too.
    used = torch.zeros(len(unit), dtype=torch.bool, device=unit.device)
    for side in which:
        used[side] = True
    rows = used.nonzero().flatten()
    place = torch.zeros(len(unit), dtype=torch.int64, device=unit.device)
    place[rows] = torch.arange(len(rows), device=unit.device)
    mean, std = _statistics(unit[rows], unit_rows(cohort, "cohort"), top_n, unbiased, rows)
    mean, inverse = mean.to(raw.dtype), std.reciprocal().to(raw.dtype)
    found = torch.zeros_like(raw)
    for side in which:
        at = place[side]
        found += (raw - mean[at]) * inverse[at]
    found /= len(which)
    return found if isinstance(scores, torch.Tensor) else found.cpu().numpy()


def _statistics(
    unit: torch.Tensor, cohort: torch.Tensor, top_n: int | None, unbiased: bool, rows: torch.Tensor | None = None
) -> CohortStatistics:
    """Statistics of unit rows; ``rows`` are their numbers for messages."""
    require_same_kind("cohort", cohort, unit)
    count = len(cohort) if top_n is None else top_n
    least = 2 if unbiased else 1
    if not least <= count <= len(cohort):
        raise InputError(f"top_n must lie in {least}..{len(cohort)}, the size of the cohort, got {count}")
    mean, std = unit.new_empty(2, len(unit))
    step = max(1, _SCORES_AT_ONCE // len(cohort))
    for start in range(0, len(unit), step):
        part = slice(start, start + step)
        mean[part], std[part] = functional.top_moments(unit[part] @ cohort.T, count)
    if (std == 0).any():
        row = int((std == 0).nonzero()[0])
        row = row if rows is None else int(rows[row])
        raise InputError(
            f"the {count} cosines of the cohort that count are all equal for row {row} of the embeddings: give a "
            "larger cohort, or one without copies"
        )
    return CohortStatistics(mean, std * math.sqrt(count / (count - 1)) if unbiased else std)
