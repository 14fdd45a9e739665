"""Scores of trials from embeddings, and the figures of a trial list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from spkfast.data.lists import Trial, speaker_of, trial_paths
from spkfast.errors import InputError
from spkfast.evaluation.metrics import Eer, eer, min_dcf

Array = TypeVar("Array", np.ndarray, torch.Tensor)

_TRIALS_AT_ONCE = 65536


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
    rows = torch.as_tensor(embeddings)
    if rows.ndim != 2 or not rows.is_floating_point():
        raise InputError(f"embeddings must be floating with shape (U, E), got {rows.dtype} {tuple(rows.shape)}")
    sides = [torch.as_tensor(index, device=rows.device) for index in (enrol_index, test_index)]
    for name, side in zip(("enrol_index", "test_index"), sides, strict=True):
        if side.ndim != 1 or len(side) != len(sides[0]):
            raise InputError(f"{name} must have shape (trials,), got {tuple(side.shape)}")
        if side.is_floating_point() or side.dtype == torch.bool:
            raise InputError(f"{name} must hold integers, got {side.dtype}")
        if len(side) and not (int(side.min()) >= 0 and int(side.max()) < len(rows)):
            raise InputError(f"{name} must lie in [0, {len(rows)}), got {int(side.min())} to {int(side.max())}")
    norms = rows.norm(dim=1, keepdim=True)
    wrong = ~(torch.isfinite(norms) & (norms > 0)).flatten()
    if wrong.any():
        raise InputError(f"embeddings must be finite and not zero, row {int(wrong.nonzero()[0])} is not")
    unit = rows / norms
    scores = rows.new_empty(len(sides[0]))
    # Gathering two rows for each trial at once would take gigabytes for the large public lists.
    for start in range(0, len(scores), _TRIALS_AT_ONCE):
        part = slice(start, start + _TRIALS_AT_ONCE)
        scores[part] = (unit[sides[0][part].long()] * unit[sides[1][part].long()]).sum(dim=1)
    scores = scores.clamp(-1, 1)
    return scores.numpy() if isinstance(embeddings, np.ndarray) else scores


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
    row = {key: i for i, key in enumerate(keys)}
    for path in trial_paths(trials):
        if path not in row:
            raise InputError(f"{path}: the trials name this path, but it has no embedding")
    enrol, test = [trial.enrol for trial in trials], [trial.test for trial in trials]
    scores = cosine_scores(embeddings, np.array([row[p] for p in enrol]), np.array([row[p] for p in test]))
    labels = np.array([int(trial.target) for trial in trials])
    first, second = ([speaker_of(path) for path in side] for side in (enrol, test))
    # Paths laid out otherwise do not tell the speaker; an interval over what they do tell would be wrong.
    told = all((a == b) == trial.target for a, b, trial in zip(first, second, trials, strict=True))
    sides = (first, second) if told else (None, None)
    rate = eer(scores, labels, enrol_speakers=sides[0], test_speakers=sides[1], method=method)
    return TrialResult(rate, min_dcf(scores, labels), scores, labels, len({*first, *second}) if told else None)
