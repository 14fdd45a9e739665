"""top_moments: the definition, values of all kinds, registration, messages."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spkfast import InputError, ops
from spkfast.backends import Backend


def values(kind: str, rows: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    normal = torch.randn(rows, count, generator=generator)
    return {
        "normal": normal,
        "ties": (2 * normal).round(),
        "equal": torch.full((rows, count), 0.3),
        "heavy": normal**7,  # far from what the kernel expects
        "steps": (normal > 1.5).float(),
        "ascending": normal.sort(dim=1).values,
        "distant": normal + 1e4,
        "large": normal * 1e37,  # whose squares are not finite
    }[kind]


@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "heavy", "steps", "ascending", "distant", "large"])
@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 100, 6000])
def test_native_follows_the_definition(count: int, kind: str) -> None:
    x = values(kind, 40, count)
    for n in sorted({1, max(count // 20, 1), max(count // 2, 1), max(count - 1, 1), count}):
        found = ops.top_moments(x, n, backend="native")
        want = ops.top_moments(x.double(), n, backend="reference")
        # Both are computed in double and rounded once. The deviation of equal values need not be 0 in either.
        torch.testing.assert_close(found.mean, want.mean.float(), rtol=2.0**-23, atol=0)
        torch.testing.assert_close(found.std, want.std.float(), rtol=2.0**-23, atol=2e-15 * x.abs().max().item())


def test_reference_by_hand() -> None:
    mean, std = ops.top_moments(torch.tensor([[1.0, 5.0, 3.0, -2.0]]), 2, backend="reference")
    assert mean.tolist() == [4] and std.tolist() == [1]


def test_a_row_is_the_same_in_every_batch() -> None:
    x = values("normal", 100, 777)
    want = ops.top_moments(x, 50)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for part in (slice(0, 100), slice(7, 8), slice(20, 60)):
            found = ops.top_moments(x[part], 50)
            assert torch.equal(found.mean, want.mean[part]) and torch.equal(found.std, want.std[part])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(ops.top_moments(x.T.contiguous().T, 50).mean, want.mean)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("n", [3, 20])
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_a_row_that_is_not_finite_stays_alone(backend: Backend, n: int, value: float) -> None:
    x = values("normal", 3, 20)
    want = ops.top_moments(x, n)
    x[1, 17] = value
    found = ops.top_moments(x, n, backend=backend)
    assert found.mean[1].isnan() and found.std[1].isnan()
    for row in (0, 2):
        torch.testing.assert_close(found.mean[row], want.mean[row], rtol=2.0**-23, atol=0)
        torch.testing.assert_close(found.std[row], want.std[row], rtol=2.0**-23, atol=0)


def test_registration_and_other_types() -> None:
    x = values("normal", 4, 30)
    torch.library.opcheck(torch.ops.spkfast.top_moments.default, (x, 5))
    compiled = torch.compile(lambda x: ops.top_moments(x, 5).mean, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), ops.top_moments(x, 5).mean)
    assert ops.top_moments(x.double(), 5).mean.dtype == torch.float64
    assert ops.top_moments(torch.zeros(0, 5), 2).mean.shape == (0,)
    leaf = x.clone().requires_grad_()
    ops.top_moments(leaf, 5).std.sum().backward()
    assert leaf.grad is not None and leaf.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("x", "n", "message"),
    [
        (torch.zeros(3), 1, r"scores must be floating of shape \(rows, values\)"),
        (torch.zeros(3, 4).long(), 1, "scores must be floating"),
        (torch.zeros(3, 4), 0, r"n must lie in 1\.\.4, the values of a row, got 0"),
        (torch.zeros(3, 4), 5, "got 5"),
    ],
)
def test_messages(x: Tensor, n: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ops.top_moments(x, n)
