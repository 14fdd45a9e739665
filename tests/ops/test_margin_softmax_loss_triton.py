"""Triton kernels of margin_softmax_loss, on a GPU or interpreted: sums, rows and gradients against the definition."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from spkfast import ops  # noqa: F401  loads the libraries
from spkfast.reference.margin_softmax_loss import BINARY_A, BINARY_C, LOG_SUM, margin_softmax_sums, unit
from tests.fuzz.bounds_products import BFLOAT_UNIT, UNIT
from tests.ops.pooling import cut_out
from tests.ops.products import noise
from tests.parity import assert_parity

pytest.importorskip("triton")
from spkfast.kernels.triton import margin_softmax_loss as module

# NaN beside what a kernel may read, and infinite logarithms of no sum.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

NONE = -7.0  # in place of minus infinity, which no error can be taken of


class Form(NamedTuple):
    """Settings of the sums."""

    normalise: bool = True
    subcenters: int = 1
    topk: int = 0
    precision: int = 0
    summed: int = LOG_SUM
    power: int = 3
    scale: float = 32.0
    margin: float = 0.2
    bias: bool = False

    @property
    def integers(self) -> list[int]:
        return [int(self.normalise), *self[1:6]]

    @property
    def floats(self) -> list[float]:
        return [self.scale, self.margin]


PLAIN = Form(normalise=False, scale=1.0, bias=True)
FORMS = [
    Form(),
    Form(subcenters=2, topk=1),
    Form(subcenters=3, topk=6),
    PLAIN,
    PLAIN._replace(subcenters=3, topk=2),
    Form(summed=BINARY_C),
    Form(summed=BINARY_C, subcenters=3, topk=2, bias=True, power=1),
    Form(summed=BINARY_A, subcenters=2, bias=True),
]
# B, N, E, and the programs to aim for: classes are one span, or as many as there are tiles of them.
SIZES = [(1, 1, 1, 256), (3, 2, 5, 1), (5, 70, 40, 1), (5, 40, 32, 256), (67, 20, 100, 2)]


def drawn(batch: int, classes: int, width: int, form: Form, seed: int = 0) -> list[Any]:
    """Arguments: some rows have no target here, some have one in common, and rows of the weight differ in length."""
    x = noise(batch, width, seed=seed)
    weight = noise(classes * form.subcenters, width, seed=seed + 1)
    if form.normalise:
        x, weight = unit(x), weight * torch.logspace(-3, 3, weight.shape[0])[:, None]
    bias = noise(classes if form.summed == LOG_SUM else 1, seed=seed + 2) if form.bias else None
    target = torch.arange(batch) * 7 // 2 % (classes + 1) - 1
    return [x, weight, bias, target]


def placed(values: Sequence[Any], device: torch.device) -> list[Any]:
    """Arguments on a device."""
    return [None if value is None else value.to(device) for value in values]


def sums(arguments: Sequence[Any], form: Form, backend: str = "triton") -> tuple[Tensor, ...]:
    """Outputs of the op for x, weight, bias and target."""
    op = margin_softmax_sums if backend == "reference" else torch.ops.spkfast.margin_softmax_loss_triton
    found = op(*arguments, form.integers, form.floats)
    return *(torch.where(value == -torch.inf, NONE, value) for value in found[:5]), found[5]


def check(values: Sequence[Any], form: Form, device: torch.device) -> None:
    x, weight, bias, target = placed(values, device)

    # Every tensor that is given has to have a gradient.
    def op(*args: Any, backend: str) -> tuple[Tensor, ...]:
        return sums([*args[:2], args[3] if form.bias else None, args[2]], form, backend)

    assert_parity(op, [x, weight, target, *([bias] if form.bias else [])], backend="triton")


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form.integers)))
def test_matches_the_definition(
    form: Form, size: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    *shape, programs = size
    monkeypatch.setattr(module, "_PROGRAMS", programs)
    check(drawn(*shape, form), form, device)


@pytest.mark.parametrize("topk", [0, 2])
def test_rows_that_are_zero(topk: int, device: torch.device) -> None:
    form = Form(subcenters=2, topk=topk)
    x, weight, bias, target = drawn(4, 9, 12, form)
    weight[[0, 1, 5]] = 0  # a class, and one sub-center of another
    if not topk:  # which are the hardest of equal ones the definition leaves open
        x[1] = 0
        weight[8:10] = 1e-20
    check([x, weight, bias, target], form, device)


def test_cosines_of_plus_and_minus_one(device: torch.device) -> None:
    x, width = unit(noise(4, 16)), 16
    weight = torch.cat([3 * x, -x, noise(3, width, seed=1)])
    target = torch.tensor([0, 1, 5, -1])
    for form in (Form(), Form(topk=2), Form(summed=BINARY_C)):
        check([x, weight, None, target], form, device)
    leaves = [value.to(device).requires_grad_() for value in (x, weight)]
    found = sums([*leaves, None, target.to(device)], Form(summed=BINARY_A))
    assert found[0].isfinite().all()
    assert all(value.isfinite().all() for value in torch.autograd.grad(found[0].sum(), leaves))


def test_large_logits(device: torch.device) -> None:
    x, weight, bias, target = drawn(5, 70, 20, PLAIN)
    check([100 * x, 30 * weight, bias, target], PLAIN, device)


@pytest.mark.parametrize("programs", [1, 256])
@pytest.mark.parametrize("topk", [1, 2, 5])
def test_of_equal_cosines_the_first_class_is_taken(
    topk: int, programs: int, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(module, "_PROGRAMS", programs)
    # One that is larger comes after some that are equal, and drives one of them out.
    classes, largest, equal = 130, 100, [7, 40, 41, 129]
    cosine = -torch.arange(1.0, classes + 1) / 256
    cosine[equal], cosine[largest] = 0.5, 1
    weight = torch.stack([cosine, (1 - cosine.square()).sqrt()], dim=1).repeat_interleave(2, dim=0)
    x, target = torch.tensor([[1.0, 0.0]] * 3), torch.tensor([40, 3, -1])
    form = Form(subcenters=2, topk=topk)
    found = sums(placed([x, weight, None, target], device), form)
    for row, own in enumerate(target.tolist()):
        order = [largest, *equal, *(n for n in range(classes) if n not in [largest, *equal])]
        others = [n for n in order if n != own]
        assert found[5][row].tolist() == [2 * own if own >= 0 else -1, *(2 * n for n in others[:topk])]
        want = (form.scale * cosine.double()[others[topk:]]).logsumexp(dim=0)
        torch.testing.assert_close(found[0][row].cpu().double(), want, rtol=0, atol=8 * UNIT * form.scale)


def test_more_are_wanted_than_there_are(device: torch.device) -> None:
    for classes, form in itertools.product((1, 2, 4), (Form(topk=5), Form(topk=9, subcenters=3, scale=1.0))):
        check(drawn(6, classes, 10, form), form, device)


@pytest.mark.parametrize("form", [Form(), Form(subcenters=3, topk=2), PLAIN], ids=lambda form: str(form.integers))
@pytest.mark.parametrize("width", [3, 192, 200])
def test_bfloat16_products(width: int, form: Form, device: torch.device) -> None:
    form = form._replace(precision=1)
    batch, classes = 37, 50
    x, weight, bias, target = drawn(batch, classes, width, form)
    # Of numbers that are bfloat16 already only what the gradients multiply is rounded.
    x, weight = (value.bfloat16().float() for value in (x, weight))
    exact = form._replace(precision=0)
    grads = [noise(batch, seed=5), noise(batch, seed=6), noise(batch, 1 + form.topk, width, seed=7)]
    wide: list[Any] = [None if value is None else value.double() for value in (x, weight, bias)]
    want = margin_softmax_sums(*wide, target, exact.integers, exact.floats)
    device_args = [*placed([x, weight, bias, target], device), form.integers, form.floats]
    got = module.forward(*device_args)
    rows = unit(wide[1]) if form.normalise else wide[1]
    size = wide[0].abs() @ rows.abs().T
    cosine_error = (width + 8) * UNIT * float(size.max()) + 2 * UNIT * (bias is not None)
    largest = form.scale * float(want[3].abs().max() + 3 * cosine_error)
    allowed = [form.scale * cosine_error + UNIT * (classes + 4 * largest), classes * (cosine_error + UNIT * classes)]
    for value, exact_value, bound in zip(got[:2], want[:2], allowed, strict=True):
        torch.testing.assert_close(value.cpu().double(), exact_value, rtol=2 * UNIT, atol=bound)
    assert torch.equal(got[5].cpu(), want[5]) and torch.equal(got[2].cpu().double(), want[2])

    found = [value.cpu().double() for value in module.backward(*placed(grads, device), *device_args, *got)]
    # Sums of the same cosines, which stand in for rows of the batch: their gradients are slopes.
    cosine = (wide[0] @ rows.T).requires_grad_()
    plain = exact._replace(normalise=False)
    basis = torch.eye(rows.shape[0], dtype=torch.float64)
    of_cosine = margin_softmax_sums(cosine, basis, wide[2], target, plain.integers, plain.floats)
    (slope,) = torch.autograd.grad(of_cosine[:2], cosine, [grad.double() for grad in grads[:2]])
    # Rounding, and the error of an exponential whose logit has that of its cosine and of the sum.
    off = BFLOAT_UNIT + 2 * allowed[0] + 8 * UNIT * largest + UNIT * batch * classes
    of_rows, of_rows_size = slope.T @ wide[0], slope.abs().T @ wide[0].abs()
    if form.normalise:
        length = wide[1].norm(dim=1, keepdim=True)
        of_rows = (of_rows - rows * (rows * of_rows).sum(dim=1, keepdim=True)) / length
        along = (slope.abs() * cosine.abs()).sum(dim=0)[:, None] + of_rows_size.sum(dim=1, keepdim=True) * UNIT
        of_rows_size = (of_rows_size + rows.abs() * along) / length
    is_chosen = want[5].flatten() >= 0
    of_rows.index_add_(0, want[5].flatten()[is_chosen], grads[2].flatten(0, 1)[is_chosen].double())
    for got_grad, want_grad, magnitude in (
        (found[0], slope @ rows, slope.abs() @ rows.abs()),
        (found[1], of_rows, of_rows_size),
    ):
        error = (got_grad - want_grad).abs()
        assert (error <= off * magnitude + 8 * UNIT * (want_grad.abs() + 1)).all(), float((error / magnitude).max())
    if bias is not None:
        by_class = slope.unflatten(1, (classes, -1)).sum(dim=2)
        assert ((found[2] - by_class.sum(dim=0)).abs() <= off * by_class.abs().sum(dim=0)).all()


def test_layout_changes_no_bit(device: torch.device) -> None:
    for width, precision in ((6, 0), (64, 1)):
        form = Form(precision=precision, subcenters=2, topk=2)
        x, weight, _, target = placed(drawn(5, 40, width, form), device)
        found = []
        for place in (lambda value: value, lambda value: cut_out(value[None])[0], lambda value: value.T.contiguous().T):
            given = [place(value).requires_grad_() for value in (x, weight)]
            outputs = sums([*given, None, target], form)
            found.append([*outputs, *torch.autograd.grad(outputs[0].sum() + outputs[2].square().sum(), given)])
        for other in found[1:]:
            assert all(torch.equal(value, first) for value, first in zip(other, found[0], strict=True))


def test_slots_of_one_product_are_as_many_as_sub_centers_may_be(device: torch.device) -> None:
    form = Form(subcenters=33)
    with pytest.raises(ValueError, match="num_subcenters must be at most 32 here, got 33"):
        module.backward(
            *placed([torch.zeros(1), torch.zeros(1), torch.zeros(1, 1, 4)], device),
            *placed([torch.zeros(1, 4), torch.zeros(33, 4), None, torch.zeros(1, dtype=torch.int64)], device),
            form.integers, form.floats,
            *placed([*torch.zeros(5, 1), torch.zeros(1, 1, dtype=torch.int64)], device),
        )  # fmt: skip


def test_no_rows_in_a_batch(device: torch.device) -> None:
    form = Form(topk=2)
    leaves = [value.to(device).requires_grad_() for value in (torch.empty(0, 6), noise(5, 6))]
    target = torch.empty(0, dtype=torch.int64, device=device)
    found = sums([*leaves, None, target], form)
    assert [tuple(value.shape) for value in found] == [(0,), (0,), (0, 3, 6), (0,), (0,), (0, 3)]
    grads = torch.autograd.grad(found[0].sum(), leaves)
    assert grads[0].shape == (0, 6) and not grads[1].any()


def test_registration(device: torch.device) -> None:
    form = Form(topk=1)
    x, weight, bias, target = placed(drawn(3, 5, 6, form), device)
    op = torch.ops.spkfast.margin_softmax_loss_triton.default
    given = (x.requires_grad_(), weight.requires_grad_(), bias, target, form.integers, form.floats)
    torch.library.opcheck(op, given, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
