"""Definition of ``paired_dot``: dot products of pairs of rows."""

from __future__ import annotations

from torch import Tensor


def paired_dot(a: Tensor, b: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """See :func:`spkfast.functional.paired_dot`."""
    return (a[first] * b[second]).sum(dim=1)
