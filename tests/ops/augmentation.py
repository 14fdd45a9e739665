"""What the tests of the ops of augmentation have in common: instruction levels, and the bound on a kernel's error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import spkfast
from tests.parity import FACTOR, NEIGHBOURS

_ALL = ("scalar", "avx2", "avx512", "avx512bf16")
LEVELS = _ALL[: _ALL.index(spkfast.info()["cpu"]["level"]) + 1][:3]  # the last has no kernel of its own
_EPS = torch.finfo(torch.float32).eps


def white(*shape: int, seed: int = 0, scale: float = 0.1) -> Tensor:
    """White noise, float32."""
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def places(*rows: Any) -> Tensor:
    """Whole numbers, int64."""
    return torch.tensor(rows, dtype=torch.int64)


def assert_near_definition(op: Callable[..., Tensor], waveforms: Tensor, *inputs: Tensor, **options: Any) -> Tensor:
    """Checks the native kernel against the definition in float64, each row for itself; returns what it gave.

    A row may err ``FACTOR`` times as much as the definition in float32 errs in it, at the waveforms or at a few that
    differ from them in the last place, and at least by as many units of rounding of its largest value. That is the
    bound of tests/parity.py, without the gradients, which these kernels do not have.
    """
    got = op(waveforms, *inputs, **options, backend="native")
    doubles = waveforms.double() / (32768 if waveforms.dtype == torch.int16 else 1)
    exact = op(doubles, *inputs, **options, backend="reference")
    assert exact.dtype == torch.float64 and got.dtype == torch.float32 and got.shape == exact.shape
    assert got.isfinite().all()
    if not got.numel():
        return got
    allowed = _EPS * exact.abs().amax(dim=1)
    for seed in (None, *range(NEIGHBOURS)):
        plain = op(_moved(doubles.float(), seed), *inputs, **options, backend="reference")
        allowed = torch.maximum(allowed, (plain - exact).abs().amax(dim=1))
    error = (got - exact).abs().amax(dim=1)
    row = int((error - FACTOR * allowed).argmax())
    assert (error <= FACTOR * allowed).all(), f"row {row}: error {error[row]:.3g}, allowed {FACTOR * allowed[row]:.3g}"
    return got


def _moved(waveforms: Tensor, seed: int | None) -> Tensor:
    if seed is None:
        return waveforms
    steps = torch.randint(-1, 2, waveforms.shape, generator=torch.Generator().manual_seed(seed))
    return waveforms * (1 + _EPS * steps)
