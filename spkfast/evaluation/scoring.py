"""Scores of trials from embeddings, and the figures of a trial list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from spkfast import functional
from spkfast.data.lists import Trial, TrialList
from spkfast.errors import InputError
from spkfast.evaluation.metrics import Eer
from spkfast.evaluation.records import list_result

Array = TypeVar("Array", np.ndarray, torch.Tensor)

_TRIALS_AT_ONCE = 1 << 18


@torch.inference_mode()
def cosine_scores(embeddings: Array, enrol_index: Any, test_index: Any) -> Array:
    """Cosine of the two sides of each trial.

    Args:
        embeddings: One row per utterance, floating, shape (U, E); need not be normalised.
        enrol_index: Row of the first side of each trial, integer, shape (trials,).
        test_index: Row of the second side.

    Returns:
        Scores in [-1, 1], shape (trials,); numpy for numpy, torch (on the same device) for torch.

    Raises:
        InputError: If shapes disagree, an index lies outside, or an embedding is zero or not finite.
    """
    unit = unit_rows(embeddings)
    scores = paired(unit, unit, *indexes(unit, enrol_index, test_index)).clamp_(-1, 1)
    return _like(embeddings, scores)


@torch.inference_mode()
def cosine_matrix(enrol: Array, test: Array | None = None) -> Array:
    """Cosine of every row of one matrix with every row of another.

    Args:
        enrol: Floating, shape (U, E); need not be normalised.
        test: Shape (V, E), of the same type; None for ``enrol`` itself.

    Returns:
        Scores in [-1, 1], shape (U, V); numpy for numpy, torch for torch.

    Raises:
        InputError: If shapes or types disagree, or an embedding is zero or not finite.
    """
    rows = unit_rows(enrol, "enrol")
    columns = rows if test is None else unit_rows(test, "test")
    require_same_kind("test", columns, rows)
    return _like(enrol, (rows @ columns.T).clamp_(-1, 1))


def unit_rows(embeddings: Any, name: str = "embeddings") -> torch.Tensor:
    """Rows of length 1; refuses what is no matrix of embeddings."""
    rows = as_matrix(embeddings, name)
    norms, wrong = lengths(rows)
    if wrong is not None:
        raise InputError(f"{name} must be finite and not zero, row {wrong} is not")
    return rows / norms[:, None].to(rows.dtype)


def lengths(rows: torch.Tensor) -> tuple[torch.Tensor, int | None]:
    """Length of each row, float64, and the first row that has no direction: one that is zero or not finite."""
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)  # squares of large values
    wrong = (~(torch.isfinite(norms) & (norms > 0))).nonzero()
    return norms, int(wrong[0]) if len(wrong) else None


def as_matrix(value: Any, name: str) -> torch.Tensor:
    """A floating matrix of any kind as a tensor, without a copy where torch can read it; refuses what is none."""
    matrix = value if isinstance(value, torch.Tensor) else np.asarray(value)
    floating = matrix.is_floating_point() if isinstance(matrix, torch.Tensor) else matrix.dtype.kind == "f"
    if matrix.ndim != 2 or not floating:
        raise InputError(f"{name} must be floating with shape (U, E), got {matrix.dtype} {tuple(matrix.shape)}")
    if isinstance(matrix, torch.Tensor):
        return matrix
    # torch reads neither other byte orders nor negative steps, and warns of memory that cannot be written to.
    native = matrix.astype(matrix.dtype.newbyteorder("="), copy=False)
    return torch.from_numpy(np.require(native, requirements=("C", "W")))


def indexes(rows: torch.Tensor, enrol_index: Any, test_index: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Both sides of trials as int64 on the device of the embeddings; refuses what names no row of them."""
    sides = [torch.as_tensor(index, device=rows.device) for index in (enrol_index, test_index)]
    for name, side in zip(("enrol_index", "test_index"), sides, strict=True):
        if side.ndim != 1 or len(side) != len(sides[0]):
            raise InputError(f"{name} must have shape (trials,), got {tuple(side.shape)}")
    return index_of(rows, "enrol_index", sides[0]), index_of(rows, "test_index", sides[1])


def index_of(rows: torch.Tensor, name: str, index: Any) -> torch.Tensor:
    """Rows as int64 on their device; refuses what is none."""
    found = torch.as_tensor(index, device=rows.device)
    if found.ndim != 1 or found.is_floating_point() or found.dtype == torch.bool:
        raise InputError(f"{name} must hold integers, shape (n,), got {found.dtype} {tuple(found.shape)}")
    found = found.long()
    if len(found):
        low, high = (int(end) for end in found.aminmax())
        if low < 0 or high >= len(rows):
            raise InputError(f"{name} must lie in [0, {len(rows)}), got {low} to {high}")
    return found


def paired(a: torch.Tensor, b: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Dot products of pairs of rows in bounded memory; see :func:`spkfast.functional.paired_dot`."""
    scores = a.new_empty(len(first))
    # Gathering two rows for each trial at once would take gigabytes for the large public lists.
    for start in range(0, len(scores), _TRIALS_AT_ONCE):
        part = slice(start, start + _TRIALS_AT_ONCE)
        scores[part] = functional.paired_dot(a, b, first[part], second[part])
    return scores


def require_same_kind(name: str, value: torch.Tensor, like: torch.Tensor) -> None:
    """Refuses embeddings of another type, device or dimension."""
    if (value.dtype, value.device, value.shape[1]) != (like.dtype, like.device, like.shape[1]):
        raise InputError(
            f"{name} must be {like.dtype} of dimension {like.shape[1]} on {like.device}, as the others are, got "
            f"{value.dtype} of dimension {value.shape[1]} on {value.device}"
        )


def _like(given: Any, found: torch.Tensor) -> Any:
    return found if isinstance(given, torch.Tensor) else found.numpy()


class TrialResult(NamedTuple):
    """Figures of one trial list.

    Attributes:
        eer: With its interval over speakers.
        min_dcf: At a target prior of 0.01.
        scores: Shape (trials,).
        labels: 1 for the same speaker, shape (trials,).
        num_speakers: Different speakers in the list; None, as the interval, where the first components of the paths
            contradict the labels and so are no speakers.
    """

    eer: Eer
    min_dcf: float
    scores: np.ndarray
    labels: np.ndarray
    num_speakers: int | None


def evaluate_trials(
    trials: Sequence[Trial], keys: Sequence[str], embeddings: np.ndarray, *, method: str = "interp"
) -> TrialResult:
    """Cosine scores of a trial list and their figures; a speaker is the first component of a path.

    Args:
        trials: From :func:`spkfast.data.lists.read_trials`.
        keys: Path of each embedding as the trials spell it, length U.
        embeddings: Shape (U, E).
        method: Definition of the equal error rate, see :func:`spkfast.evaluation.eer`.

    Raises:
        InputError: If a path of the trials has no embedding, or the list lacks targets or nontargets.
    """
    listed = TrialList.of(trials)
    scores = cosine_scores(embeddings, *listed.rows(keys))
    metrics = (f"eer:{method}", "min_dcf:0.01")
    found = list_result(listed.source, listed, scores, metrics)
    rate, cost = (found.figures[name] for name in metrics)
    return TrialResult(
        Eer(rate.value, found.threshold, rate.low, rate.high),
        cost.value,
        scores,
        found.labels.astype(np.int64),
        found.num_speakers,
    )
