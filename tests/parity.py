"""One comparison for every op: a backend against the definition in float64, outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# A backend may err this many times as much as the float32 definition does, in the largest element.
FACTOR = 4.0


def assert_parity(op: Callable[..., Any], inputs: Sequence[Any], *, backend: str, **options: Any) -> None:
    """Checks every output and the gradient of every floating-point input of ``op`` under ``backend``.

    The bound is derived, not tuned: ``FACTOR`` times the error that the definition itself makes in float32, against the
    definition in float64, and never less than one unit of rounding of the largest value.
    """
    exact = _run(op, inputs, "reference", torch.float64, options)
    plain = _run(op, inputs, "reference", torch.float32, options)
    got = _run(op, inputs, backend, torch.float32, options)
    assert exact.keys() == got.keys()
    for name, want in exact.items():
        have = got[name]
        assert have.shape == want.shape, f"{name}: shape {tuple(have.shape)}, expected {tuple(want.shape)}"
        if not want.is_floating_point():
            assert torch.equal(have, want), f"{name} differs"
        elif want.numel():
            assert have.isfinite().all(), f"{name} has NaN or infinite values"
            rounding = torch.finfo(torch.float32).eps * want.abs().max().item()
            bound = FACTOR * max((plain[name] - want).abs().max().item(), rounding)
            error = (have - want).abs().max().item()
            assert error <= bound, f"{name}: error {error:.3g} exceeds {bound:.3g}"


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
    return {
        name: value.detach().cpu().to(torch.float64 if value.is_floating_point() else value.dtype)
        for name, value in found.items()
    }
