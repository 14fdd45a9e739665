"""Public function ``top_moments``: checks, and the choice of the implementation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spkfast import reference
from spkfast.backends import Backend
from spkfast.errors import InputError
from spkfast.ops._registration import full_precision, register_without_gradient
from spkfast.ops._scoring import check_rows, resolve

_definition = full_precision(reference.top_moments)


class TopMoments(NamedTuple):
    """Moments of the greatest values of each row.

    Attributes:
        mean: Shape (R,).
        std: Standard deviation: the root of the mean squared distance from the mean, shape (R,).
    """

    mean: Tensor
    std: Tensor


def top_moments(scores: Tensor, n: int, *, backend: Backend = "auto") -> TopMoments:
    """Mean and standard deviation of the ``n`` greatest values of each row.

    Args:
        scores: Floating, shape (R, C). Where a value is not finite, the moments of its row are not either.
        n: From 1 to C.
        backend: ``reference`` (plain torch), ``native`` (C++, on a CPU), or ``auto``.

    Returns:
        Moments in the type of the scores. ``std`` divides by n; times ``(n / (n - 1)) ** 0.5`` it is the unbiased one.

    Raises:
        InputError: If the shape is wrong, n lies outside, or the backend cannot run here.
    """
    check_rows("scores", scores)
    if not 1 <= n <= scores.shape[1]:
        raise InputError(f"n must lie in 1..{scores.shape[1]}, the values of a row, got {n}")
    if resolve("top_moments", backend, scores) == "native":
        return TopMoments(*torch.ops.spkfast.top_moments(scores, n))
    return TopMoments(*_definition(scores, n))


def _fake(scores: Tensor, n: int) -> tuple[Tensor, Tensor]:
    return scores.new_empty(scores.shape[:1]), scores.new_empty(scores.shape[:1])


register_without_gradient("top_moments", fake=_fake)
