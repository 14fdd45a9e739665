"""Speaker models from several utterances each."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from spkfast.data.manifests import numbered_lines
from spkfast.errors import InputError

Array = TypeVar("Array", np.ndarray, torch.Tensor)

_ROWS_AT_ONCE = 65536


@torch.inference_mode()
def enrol(
    embeddings: Array,
    groups: Sequence[str] | Mapping[str, Any],
    *,
    weights: Any = None,
    normalize: bool = True,
) -> tuple[list[str], Array]:
    """One embedding per speaker: the weighted mean of those of its utterances.

    For the speaker with the rows R it is sum of w_i x_i over R, divided by the sum of w_i, where x_i is the embedding
    or, as for cosine scoring, the embedding divided by its length. Sums are in float64. The mean of vectors of length
    one is shorter than one; :func:`spkfast.evaluation.cosine_scores` does not mind.

    Args:
        embeddings: One row per utterance, floating, shape (U, E).
        groups: Name of the speaker of each row, length U; or the rows of each speaker by name, where an utterance
            serves several models or none.
        weights: Of each row, at least 0, shape (U,), for instance seconds of speech; None for equal ones.
        normalize: Divide each embedding by its length first.

    Returns:
        Names, in the order in which they come, and models, shape (G, E), of the type and on the device of
        ``embeddings``; numpy for numpy, torch for torch.

    Raises:
        InputError: If shapes disagree, a row lies outside, a speaker has no rows or only weights of 0, a weight is
            negative or not finite, or an embedding that is used is not finite, or zero where lengths are divided by.

    Reference: Snyder et al., "X-vectors: Robust DNN embeddings for speaker recognition", ICASSP 2018 (several
    enrolment utterances are averaged).
    """
    every = torch.as_tensor(embeddings)
    if every.ndim != 2 or not every.is_floating_point():
        raise InputError(f"embeddings must be floating with shape (U, E), got {every.dtype} {tuple(every.shape)}")
    if isinstance(groups, Mapping):
        names, row, group = _of_mapping(groups, len(every))
    else:
        names, row, group = _of_sequence(groups, len(every))
    weight = _weights(weights, len(every)).to(every.device)
    row, group = row.to(every.device), group.to(every.device)
    sums = torch.zeros(len(names), every.shape[1], dtype=torch.float64, device=every.device)
    for start in range(0, len(row), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        used = every[row[part]].double()
        norms = used.norm(dim=1, keepdim=True)
        wrong = ~(torch.isfinite(norms) & ((norms > 0) | (not normalize))).flatten()
        if wrong.any():
            first = int(wrong.nonzero()[0]) + start
            what = "finite and not zero" if normalize else "finite"
            raise InputError(f"embeddings must be {what}, row {int(row[first])} of {names[int(group[first])]!r} is not")
        scale = weight[row[part], None] / norms if normalize else weight[row[part], None]
        sums.index_add_(0, group[part], used * scale)
    total = torch.zeros(len(names), dtype=torch.float64, device=every.device).index_add_(0, group, weight[row])
    if not (total > 0).all():
        raise InputError(f"weights of {names[int((total > 0).int().argmin())]!r} must not all be 0")
    models = (sums / total[:, None]).to(every.dtype)
    return names, models.numpy() if isinstance(embeddings, np.ndarray) else models


def read_spk2utt(path: str | os.PathLike[str]) -> dict[str, list[str]]:
    """Lines ``speaker utterance utterance ...`` of Kaldi: the utterances of each speaker.

    ``{speaker: stored.rows(utterances) for speaker, utterances in read_spk2utt(path).items()}`` are groups for
    :func:`enrol`.

    Raises:
        InputError: If the file is missing or empty, or a line names a speaker that was there, no utterance, or one
            twice.
    """
    file = os.fspath(path)
    if not os.path.isfile(file):
        raise InputError(f"{file}: no such file")
    found: dict[str, list[str]] = {}
    for number, line in numbered_lines(file):
        speaker, *utterances = line.split()
        if not utterances:
            raise InputError(f"{file}:{number}: expected 'speaker utterance utterance ...', got 1 column")
        if speaker in found:
            raise InputError(f"{file}:{number}: the speaker {speaker!r} is there twice")
        if len(set(utterances)) < len(utterances):
            again = next(name for name in utterances if utterances.count(name) > 1)
            raise InputError(f"{file}:{number}: {speaker!r} has the utterance {again!r} twice")
        found[speaker] = utterances
    if not found:
        raise InputError(f"{file}: the file is empty")
    return found


def _of_sequence(groups: Sequence[str], count: int) -> tuple[list[str], Tensor, Tensor]:
    if len(groups) != count:
        raise InputError(f"groups must have length U = {count}, got {len(groups)}")
    number: dict[str, int] = {}
    names = groups.tolist() if isinstance(groups, np.ndarray) else groups
    group = np.fromiter((number.setdefault(name, len(number)) for name in names), np.int64, count=count)
    return list(number), torch.arange(count), torch.from_numpy(group)


def _of_mapping(groups: Mapping[str, Any], count: int) -> tuple[list[str], Tensor, Tensor]:
    rows = []
    for name, of_name in groups.items():
        given = np.asarray(of_name)
        if given.ndim != 1 or not given.size or given.dtype.kind not in "iu":
            raise InputError(
                f"groups[{name!r}] must be rows, integers of shape (rows,), got {given.dtype} {given.shape}"
            )
        if given.min() < 0 or given.max() >= count:
            raise InputError(f"groups[{name!r}] must lie in [0, {count}), got {given.min()} to {given.max()}")
        rows.append(given.astype(np.int64))
    sizes = np.array([len(of_name) for of_name in rows], dtype=np.int64)
    group = np.repeat(np.arange(len(rows)), sizes)
    return list(groups), torch.from_numpy(np.concatenate([np.empty(0, np.int64), *rows])), torch.from_numpy(group)


def _weights(weights: Any, count: int) -> Tensor:
    if weights is None:
        return torch.ones(count, dtype=torch.float64)
    given = torch.as_tensor(weights).double().cpu()
    if given.shape != (count,):
        raise InputError(f"weights must have shape (U,) = ({count},), got {tuple(given.shape)}")
    wrong = ~(torch.isfinite(given) & (given >= 0))
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise InputError(f"weights must be finite and at least 0, got {float(given[first])} for row {first}")
    return given
