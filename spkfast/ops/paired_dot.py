"""Public function ``paired_dot``: checks, and the choice of the implementation."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from spkfast import reference
from spkfast.backends import Backend
from spkfast.errors import InputError
from spkfast.ops._registration import full_precision, register_without_gradient
from spkfast.ops._scoring import check_rows, resolve, shown

_definition = full_precision(reference.paired_dot)


def paired_dot(a: Tensor, b: Tensor, first: Tensor, second: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Dot products of pairs of rows: ``out[t] = a[first[t]] . b[second[t]]``, no row being copied.

    Args:
        a: Rows of the first sides, floating, shape (U, E).
        b: Rows of the second sides, shape (V, E), of the same type; may be ``a`` itself.
        first: Row of ``a`` in each pair, int64, shape (T,).
        second: Row of ``b`` in each pair, int64, shape (T,).
        backend: ``reference`` (plain torch, which gathers both sides), ``native`` (C++, on a CPU), or ``auto``.

    Returns:
        Shape (T,), in the type of the rows.

    Raises:
        InputError: If shapes or types are wrong, an index lies outside (on a CPU; elsewhere torch tells of it), or the
            backend cannot run here.
    """
    check_rows("a", a)
    check_rows("b", b, a)
    for name, index, rows in (("first", first, len(a)), ("second", second, len(b))):
        if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.shape != first.shape[:1]:
            raise InputError(f"{name} must be int64 of shape (pairs,), got {shown(index)}")
        if index.device != a.device:
            raise InputError(f"{name} must be on {a.device}, where a is, got {index.device}")
        if a.device.type == "cpu" and len(index) and not torch.compiler.is_compiling():
            low, high = (int(end) for end in index.aminmax())
            if low < 0 or high >= rows:
                raise InputError(f"{name} must lie in [0, {rows}), got {low} to {high}")
    if resolve("paired_dot", backend, a, b) == "native":
        return cast(Tensor, torch.ops.spkfast.paired_dot(a, b, first, second))
    return cast(Tensor, _definition(a, b, first, second))


def _fake(a: Tensor, b: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return a.new_empty(first.shape)


register_without_gradient("paired_dot", fake=_fake)
