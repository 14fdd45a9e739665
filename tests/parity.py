"""One comparison for every op: a backend against the definition in float64, outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# A backend may err this many times as much as the float32 definition does, in the largest element.
FACTOR = 4.0
# Float32 runs of the definition that say how much that is, beside the one on the input itself. One run alone may be
# lucky in the one element that is worst conditioned, which decides the largest error.
NEIGHBOURS = 4


def assert_parity(
    op: Callable[..., Any],
    inputs: Sequence[Any],
    *,
    backend: str,
    by_row: bool = False,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> None:
    """Checks every output and the gradient of every floating-point input of ``op`` under ``backend``.

    The bound is derived, not tuned: ``FACTOR`` times the error that the definition itself makes in float32, against the
    definition in float64, and never less than one unit of rounding of the largest value. The error of the definition is
    the largest over the inputs and a few that differ from them in the last place, as rounding would leave them.
    With ``by_row`` each row of an output has a bound of its own, so that a badly conditioned one hides no other.
    Under a narrower ``dtype``, which the inputs must have, sums are float32 all the same: what comes back in that type
    may differ by one unit in its last place more.
    """
    exact = _run(op, inputs, "reference", torch.float64, options)
    plain = [_run(op, _moved(inputs, seed), "reference", torch.float32, options) for seed in (None, *range(NEIGHBOURS))]
    got = _run(op, inputs, backend, dtype, options)
    assert exact.keys() == got.keys()
    for name, want in exact.items():
        have = got[name]
        assert have.shape == want.shape, f"{name}: shape {tuple(have.shape)}, expected {tuple(want.shape)}"
        if not want.is_floating_point():
            assert torch.equal(have, want), f"{name} differs"
        elif want.numel():
            assert have.isfinite().all(), f"{name} has NaN or infinite values"
            rounding = torch.finfo(torch.float32).eps * _largest(want, by_row)
            allowed = FACTOR * torch.stack([rounding, *(_largest(run[name] - want, by_row) for run in plain)]).amax(0)
            error = _largest(((have - want).abs() - _last_place(have)).clamp_min(0), by_row)
            row = int((error - allowed).argmax())
            assert (error <= allowed).all(), f"{name}, row {row}: error {error[row]:.3g} exceeds {allowed[row]:.3g}"


def _last_place(value: Tensor) -> Tensor:
    """One unit in the last place of each value of a type narrower than float32; else 0."""
    if value.dtype not in (torch.float16, torch.bfloat16):
        return value.new_zeros(())
    limits = torch.finfo(value.dtype)
    return (value.double().abs() * limits.eps).clamp_min(limits.smallest_normal * limits.eps)


def _largest(value: Tensor, by_row: bool) -> Tensor:
    """Largest absolute value, of each row or of all as if they were one."""
    return value.abs().reshape(value.shape[0] if by_row else 1, -1).amax(dim=1)


def _moved(inputs: Sequence[Any], seed: int | None) -> list[Any]:
    """Inputs in float32, each value moved by at most one unit in the last place where there is a seed."""
    if seed is None:
        return list(inputs)
    generator, eps = torch.Generator().manual_seed(seed), torch.finfo(torch.float32).eps
    moved = []
    for value in inputs:
        if isinstance(value, Tensor) and value.is_floating_point():
            steps = torch.randint(-1, 2, value.shape, generator=generator)
            value = value.float() * (1 + eps * steps.to(value.device))
        moved.append(value)
    return moved


def _run(
    op: Callable[..., Any], inputs: Sequence[Any], backend: str, dtype: torch.dtype, options: dict[str, Any]
) -> dict[str, Tensor]:
    arguments = [
        value.detach().to(dtype).requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
        for value in inputs
    ]
    outputs = op(*arguments, backend=backend, **options)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    generator = torch.Generator().manual_seed(0)
    loss = torch.zeros((), dtype=dtype, device=outputs[0].device)
    for output in outputs:
        if output.is_floating_point():
            weights = torch.randn(output.shape, generator=generator, dtype=torch.float64)
            loss = loss + (output * weights.to(output)).sum()
    leaves = [value for value in arguments if isinstance(value, Tensor) and value.requires_grad]
    gradients = torch.autograd.grad(loss, leaves)
    found = {f"output {k}": output for k, output in enumerate(outputs)}
    found |= {f"gradient {k}": gradient for k, gradient in enumerate(gradients)}
    return {name: value.detach().cpu() for name, value in found.items()}
