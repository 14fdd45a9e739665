"""paired_dot: the definition, awkward sizes, registration, messages."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spkfast import InputError, ops


def rows(count: int, size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pairs(count: int, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return tuple(torch.randint(len(side), (count,), generator=generator) for side in (a, b))  # type: ignore[return-value]


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 31, 192, 256, 1000])
@pytest.mark.parametrize("count", [1, 3, 5, 9000])
def test_native_follows_the_definition(count: int, size: int) -> None:
    a, b = rows(20, size), rows(33, size, seed=1)
    first, second = pairs(count, a, b)
    found = ops.paired_dot(a, b, first, second, backend="native")
    want = ops.paired_dot(a.double(), b.double(), first, second, backend="reference")
    # Sixteen running sums, then their sum: each product passes through that many roundings.
    bound = ops.paired_dot(a.double().abs(), b.double().abs(), first, second) * (size / 16 + 6) * 2.0**-24
    assert ((found - want).abs() <= bound).all()


def test_same_for_any_threads_and_layout() -> None:
    a = rows(50, 192)
    first, second = pairs(20000, a, a)
    want = ops.paired_dot(a, a, first, second)
    threads = torch.get_num_threads()
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            assert torch.equal(ops.paired_dot(a, a, first, second), want)
    finally:
        torch.set_num_threads(threads)
    wide = torch.cat([a, a], dim=1)[:, :192]
    assert not wide.is_contiguous()
    assert torch.equal(ops.paired_dot(wide, a, first, second), want)
    assert torch.equal(ops.paired_dot(a, a, first.repeat_interleave(2)[::2], second), want)


def test_other_types_take_the_definition() -> None:
    a = rows(9, 5, dtype=torch.float64)
    first, second = pairs(4, a, a)
    assert torch.equal(ops.paired_dot(a, a, first, second), (a[first] * a[second]).sum(1))
    with pytest.raises(InputError, match=r"native.* cannot run paired_dot on cpu: it takes float32, and a tensor is"):
        ops.paired_dot(a, a, first, second, backend="native")
    leaf = rows(9, 5).requires_grad_()
    ops.paired_dot(leaf, leaf, first, second).sum().backward()
    assert leaf.grad is not None and leaf.grad.abs().sum() > 0
    with pytest.raises(InputError, match="no gradient"):
        ops.paired_dot(leaf, leaf, first, second, backend="native")


def test_no_pairs_and_empty_rows() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert ops.paired_dot(rows(3, 4), rows(2, 4), none, none).shape == (0,)
    assert ops.paired_dot(rows(0, 4), rows(2, 4), none, none).shape == (0,)
    assert ops.paired_dot(rows(3, 0), rows(2, 0), none + 1, none).shape == (0,)


def test_registration() -> None:
    a = rows(6, 20)
    torch.library.opcheck(torch.ops.spkfast.paired_dot.default, (a, a, *pairs(5, a, a)))
    compiled = torch.compile(lambda *args: ops.paired_dot(*args), fullgraph=True, backend="aot_eager")
    first, second = pairs(5, a, a)
    assert torch.equal(compiled(a, a, first, second), ops.paired_dot(a, a, first, second))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a": torch.zeros(3)}, r"a must be floating of shape \(rows, values\), got float32 \(3,\) on cpu"),
        ({"b": torch.zeros(3, 5)}, r"b must have type, device and row length of float32 \(3, 4\)"),
        ({"b": torch.zeros(3, 4).double()}, "b must have type"),
        ({"first": torch.tensor([0, 3])}, r"first must lie in \[0, 3\), got 0 to 3"),
        ({"second": torch.tensor([-1, 0])}, r"second must lie in \[0, 3\), got -1 to 0"),
        ({"second": torch.tensor([0])}, r"second must be int64 of shape \(pairs,\), got int64 \(1,\)"),
        ({"first": torch.tensor([0.0, 1.0])}, "first must be int64"),
    ],
)
def test_messages(changes: dict[str, Tensor], message: str) -> None:
    index = torch.tensor([0, 1])
    arguments = {"a": torch.zeros(3, 4), "b": torch.zeros(3, 4), "first": index, "second": index}
    with pytest.raises(InputError, match=message):
        ops.paired_dot(**{**arguments, **changes})


def test_the_kernel_itself_refuses_places_outside() -> None:
    index = torch.tensor([0, 1])
    for first, second in ((index + 2, index), (index, index - 1)):
        with pytest.raises(ValueError, match=r"(first|second) must lie in 0\.\.2"):
            torch.ops.spkfast.paired_dot(torch.zeros(3, 4), torch.zeros(3, 4), first, second)
