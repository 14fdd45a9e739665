"""The sums of margin_softmax_loss on a CPU: each level against the definition, ties, extremes, threads, messages."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spkfast.reference.margin_softmax_loss import BINARY_A, BINARY_C, LOG_SUM, margin_softmax_sums
from tests.fuzz.fuzz_attentive_stats_pool import same
from tests.fuzz.fuzz_margin_softmax_loss import BATCHES, CLASSES, FEATURES, NAMES, SUBCENTERS, Case
from tests.ops.pooling import cut_out
from tests.ops.products import LEVELS, at_level, noise, threads, whole

OPS = torch.ops.spkfast
TOPKS = (0, 1, 5, 131)
# What is summed, whether of cosines, with a bias, the scale.
FORMS = {
    "cosines": (LOG_SUM, True, False, 32.0),
    "logits": (LOG_SUM, False, False, 1.0),
    "logits and bias": (LOG_SUM, False, True, 1.0),
    "cosines and bias": (LOG_SUM, True, True, 8.0),
    "binary C": (BINARY_C, True, False, 30.0),
    "binary A and bias": (BINARY_A, True, True, 20.0),
}


def case_of(
    form: str, batch: int, classes: int, subcenters: int, features: int, topk: int, *, bf16: bool = False
) -> Case:
    """Random values; two classes are equal, and one is 0."""
    summed, normalise, biased, scale = FORMS[form]
    x = F.normalize(noise(batch, features), dim=1)
    weight = noise(classes * subcenters, features, seed=1)
    if classes > 3:
        weight[-subcenters:] = 0
        weight[subcenters : 2 * subcenters] = weight[:subcenters]
    bias = noise(classes if summed == LOG_SUM else 1, seed=2) if biased else None
    target = torch.randint(-1, classes, (batch,), generator=torch.Generator().manual_seed(3))
    grads = noise(batch, seed=4), noise(batch, seed=5) / classes, noise(batch, 1 + topk, features, seed=6)
    return Case(x, weight, bias, target, normalise, subcenters, topk, bf16, summed, 3, scale, 0.2, grads)


def sizes(count: int) -> list[tuple[int, ...]]:
    """Each size of each kind, beside others of the other kinds."""
    rng, found = random.Random(7), list[tuple[int, ...]]()
    while len(found) < count:
        lists = [rng.sample(values, len(values)) for values in (BATCHES, CLASSES, SUBCENTERS, FEATURES, TOPKS)]
        found += [tuple(values[i % len(values)] for values in lists) for i in range(6)]
    return found[:count]


def defined(case: Case, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """What :meth:`Case.run` has, by the definition."""
    leaves = [value.to(dtype).requires_grad_() for value in (case.x, case.weight)]
    bias = None if case.bias is None else case.bias.to(dtype).requires_grad_()
    integers = [int(case.normalise), case.subcenters, case.topk, 0, case.summed, case.power]
    out = margin_softmax_sums(*leaves, bias, case.target, integers, [case.scale, case.margin])
    grads = [grad.to(dtype) for grad in case.grads]
    there = out[0].isfinite()  # of no ordinary classes there is no gradient
    loss = (out[0] * grads[0])[there].sum() + (out[1] * grads[1]).sum() + (out[2] * grads[2]).sum()
    leaves = leaves if bias is None else [*leaves, bias]
    found = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    named = dict(zip(("of x", "of weight", "of bias"), (*found, case.x.new_empty(0)), strict=False))
    return {name: value.detach() for name, value in (dict(zip(NAMES, out, strict=True)) | named).items()}


# The definition


@pytest.mark.parametrize("form", FORMS)
def test_the_definition_is_what_kernels_are_compared_with(form: str) -> None:
    for size in sizes(18):
        case = case_of(form, *size)
        if case.grads[2].numel() > 1e5:  # the gradient of chosen rows takes long
            continue
        found = {name: value if name == "rows" else value.float() for name, value in defined(case).items()}
        assert case.compare(found) > 0
        # Of one feature all cosines are equal, and a gradient may go to any sub-center.
        if found["of x"].any() and len(case.x[0]) > 1:
            found["of x"] = found["of x"] + 1e-3 * found["of x"].abs().amax()
            with pytest.raises(AssertionError, match="of x"):
                case.compare(found)


def test_values_by_hand() -> None:
    # Cosines 0.6, 1, -0.6, 0 of classes 0 to 3.
    weight = torch.tensor([[3.0, 4.0], [2.0, 0.0], [-3.0, 4.0], [0.0, 0.0]])
    case = case_of("cosines", 1, 4, 1, 2, 1)
    case = dataclasses.replace(case, x=torch.tensor([[1.0, 0.0]]), weight=weight, target=torch.tensor([2]), scale=1.0)
    got = case.run()
    assert got["rows"].tolist() == [[2, 1]] and got["chosen"].tolist() == [[[-3.0, 4.0], [2.0, 0.0]]]
    assert got["best"].item() == 1 and got["own"].item() == pytest.approx(-0.6)
    assert got["sums"].item() == pytest.approx(math.log(math.exp(0.6) + 1)) and got["total"].item() == pytest.approx(
        0.6
    )
    nothing = torch.zeros(1), torch.zeros(1, 2, 2)
    share = math.exp(0.6) / (math.exp(0.6) + 1)
    got = dataclasses.replace(case, grads=(torch.ones(1), *nothing)).run()
    torch.testing.assert_close(got["of x"], torch.tensor([[0.6, 0.8]]) * share)
    want = torch.tensor([[0.64, -0.48], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]) * share / 5
    torch.testing.assert_close(got["of weight"], want)
    got = dataclasses.replace(case, grads=(torch.zeros(1), torch.ones(1), nothing[1]), normalise=False).run()
    # Products 3, 2, -3, 0: the first one is the hardest.
    assert got["of x"].tolist() == [[2.0, 0.0]] and got["of weight"].tolist() == [[0, 0], [1, 0], [0, 0], [1, 0]]


# Every level


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("level", LEVELS)
def test_outputs_and_gradients_match_the_definition(monkeypatch: pytest.MonkeyPatch, level: str, form: str) -> None:
    at_level(monkeypatch, level)
    for size, bf16 in itertools.product(sizes(12 if level == "scalar" else 18), (False, True)):
        case = case_of(form, *size, bf16=bf16)
        got = case.run()
        try:
            case.compare(got)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


@pytest.mark.parametrize("level", LEVELS)
def test_equal_classes_come_in_order(monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    at_level(monkeypatch, level)
    # Products are small whole numbers, and lengths powers of 2.
    classes, k, topk = 700, 3, 9
    weight = (noise(classes * k, 16) > 0) * 2.0 - 1
    weight = weight * 2.0 ** whole(classes * k, 1, seed=1)
    case = case_of("cosines", 20, classes, k, 16, topk)
    case = dataclasses.replace(case, x=whole(20, 16, seed=2), weight=weight)
    got, want = case.run(), defined(case)
    cosine = (case.x @ F.normalize(weight).T).unflatten(1, (-1, k))
    largest = cosine.amax(dim=2)
    center = (cosine == largest[..., None]).int().argmax(dim=2)
    others = largest.clone()
    for row, target in enumerate(case.target.tolist()):
        if target >= 0:
            others[row, target] = -torch.inf
    hardest = others.sort(dim=1, descending=True, stable=True).indices[:, :topk]
    assert torch.equal(got["rows"][:, 1:], hardest * k + center.gather(1, hardest))
    assert torch.equal(got["best"].double(), want["best"]) and torch.equal(got["own"].double(), want["own"])
    case.compare(got)


@pytest.mark.parametrize("level", LEVELS)
def test_values_may_be_extreme(monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    at_level(monkeypatch, level)
    # Logits of thousands, of which a hardest one is far above all that are summed.
    case = case_of("logits", 17, 300, 1, 8, 2)
    case = dataclasses.replace(case, x=10 * case.x, weight=1e3 * case.weight)
    case.weight[7] = 1e4 * case.x[3] / case.x[3].norm()
    assert case.run()["best"].abs().amax() > 1e4
    case.compare(case.run())
    # Cosines of 1 and -1.
    for form in FORMS:
        case = case_of(form, 16, 65, 2, 24, 1)
        case = dataclasses.replace(case, target=case.target.clamp_min(0))
        case.weight[4:20] = case.x
        case.weight[30:46] = -3 * case.x
        got = case.run()
        assert all(value.isfinite().all() for value in got.values())
        case.compare(got)
    # Nothing has a direction.
    case = case_of("cosines", 5, 40, 2, 24, 3)
    case = dataclasses.replace(case, x=0 * case.x, weight=1e-13 * case.weight, target=torch.zeros(5, dtype=torch.int64))
    got = case.run()
    torch.testing.assert_close(got["sums"], torch.full((5,), math.log(36)))
    assert (got["of x"] == 0).all() and got["rows"].tolist() == [[0, 2, 4, 6]] * 5
    case.compare(got)


def test_a_row_may_have_no_ordinary_class() -> None:
    for classes, topk in ((1, 0), (3, 2), (3, 7)):
        case = case_of("cosines", 4, classes, 2, 8, topk)
        case = dataclasses.replace(case, target=torch.tensor([0, 0, -1, 0]))
        got = case.run()
        assert got["sums"].isinf().tolist() == [True, True, topk >= classes, True]
        assert got["of x"].isfinite().all() and (got["of x"][0] == 0).all()
        case.compare(got)
    case = dataclasses.replace(case, weight=torch.empty(0, 8))
    out = OPS.margin_softmax_loss(case.x, case.weight, None, case.target, [1, 2, 1, 0, 0, 1], [1.0, 0.0])
    assert out[0].tolist() == out[3].tolist() == out[4].tolist() == [-math.inf] * 4 and (out[5] == -1).all()
    grads = OPS.margin_softmax_loss_backward(
        out[0], out[1], out[2], case.x, case.weight, None, case.target, [1, 2, 1, 0, 0, 1], [1.0, 0.0], *out
    )
    assert (grads[0] == 0).all() and grads[1].shape == (0, 8)


def test_a_target_that_is_no_class_is_none() -> None:
    case = case_of("cosines", 4, 9, 1, 8, 2)
    outside = dataclasses.replace(case, target=torch.tensor([9, -5, 2**62, -(2**62)]))
    none = dataclasses.replace(case, target=torch.full((4,), -1))
    for name, value in outside.run().items():
        assert torch.equal(value, none.run()[name]), name


def test_sums_of_many_classes_lose_nothing() -> None:
    classes = 1_000_000
    case = case_of("cosines", 2, classes, 1, 3, 1)
    for form in ("cosines", "binary C"):
        summed, *_, scale = FORMS[form]
        rest = case.target, [1, 1, 1, 0, summed, 3], [scale, 0.2]
        sums, total, *_ = OPS.margin_softmax_loss(case.x, case.weight, None, *rest)
        want, of_cosines, *_ = margin_softmax_sums(case.x.double(), case.weight.double(), None, *rest)
        assert ((sums - want).abs() / want).amax() < 1e-6
        # A cosine is off by a unit in the last place or so, now up and now down.
        assert (total - of_cosines).abs().amax() < 10 * 2**-23 * math.sqrt(classes)


@pytest.mark.parametrize("form", FORMS)
def test_results_do_not_depend_on_threads(form: str) -> None:
    for bf16 in (False, True):
        case = case_of(form, 37, 2100, 2, 40, 3, bf16=bf16)
        one, *more = [case.run() for _ in threads(1, 2, 3)]
        for name, value in one.items():
            assert all(same(value, other[name]) for other in more), name


def test_tensors_may_lie_in_any_way() -> None:
    case = case_of("cosines and bias", 9, 70, 2, 20, 3)
    plain = case.run()
    assert case.bias is not None
    strided = dataclasses.replace(
        case,
        x=case.x.T.contiguous().T,
        weight=cut_out(case.weight[None])[0],
        bias=torch.stack([case.bias, case.bias], dim=1)[:, 0],
        target=torch.stack([case.target, case.target], dim=1)[:, 1],
        grads=(
            torch.stack([case.grads[0]] * 2, dim=1)[:, 0],
            case.grads[1][:, None].expand(-1, 2)[:, 1],
            cut_out(case.grads[2]),
        ),
    )
    assert not strided.x.is_contiguous() and not strided.weight.is_contiguous()
    for name, value in strided.run().items():
        assert torch.equal(value, plain[name]), name


# The op


def arguments(**other: Any) -> list[Any]:
    case = case_of("cosines", 3, 5, 2, 8, 1)
    given = {
        "x": case.x, "weight": case.weight, "bias": None, "target": case.target,
        "integers": [1, 2, 1, 0, 0, 3], "floats": [32.0, 0.2],
    }  # fmt: skip
    return list((given | other).values())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": torch.ones(3)}, r"x must have shape \(any, any\), got \(3\)"),
        ({"x": torch.ones(3, 8).double()}, "x must be Float, got Double"),
        ({"weight": torch.ones(10, 7)}, r"weight must have shape \(any, 8\), got \(10, 7\)"),
        ({"weight": torch.ones(9, 8)}, "weight must have num_subcenters = 2 rows a class, got 9"),
        ({"weight": torch.ones(10, 8).half()}, "weight must be Float, got Half"),
        ({"bias": torch.ones(4)}, r"bias must have shape \(5\), got \(4\)"),
        ({"bias": torch.ones(5), "integers": [1, 2, 1, 0, 1, 3]}, r"bias must have shape \(1\), got \(5\)"),
        ({"target": torch.zeros(3)}, "target must be Long, got Float"),
        ({"target": torch.zeros(2, dtype=torch.int64)}, r"target must have shape \(3\), got \(2\)"),
        ({"integers": [1, 2, 1, 0, 0]}, "takes 6 integers, got 5"),
        ({"integers": [1, 0, 1, 0, 0, 3]}, "num_subcenters must be at least 1, got 0"),
        ({"integers": [1, 2, -1, 0, 0, 3]}, "topk must be at least 0, got -1"),
        ({"integers": [1, 2, 1, 2, 0, 3]}, "precision must be 0 or 1, got 2"),
        ({"integers": [1, 2, 1, 0, 3, 3]}, "what is summed must be 0, 1 or 2, got 3"),
        ({"integers": [1, 2, 1, 0, 1, 0]}, "power must be at least 1, got 0"),
        ({"floats": [32.0]}, "takes 2 floats, got 1"),
        ({"floats": [0.0, 0.2]}, "scale must be positive, got 0"),
        ({"floats": [1.0, math.nan]}, "margin must be finite, got -?nan"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_wrong_arguments_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OPS.margin_softmax_loss(*arguments(**wrong))


def test_wrong_arguments_of_the_gradient_are_refused() -> None:
    given = arguments()
    out = list(OPS.margin_softmax_loss(*given))
    grads = [torch.ones(3), torch.ones(3), torch.ones(3, 2, 8)]
    for place, value, message in (
        (0, torch.ones(2), r"grad_sums must have shape \(3\), got \(2\)"),
        (1, torch.ones(3).double(), "grad_total must be Float, got Double"),
        (2, torch.ones(3, 2, 7), r"grad_chosen must have shape \(3, 2, 8\), got \(3, 2, 7\)"),
        (-1, torch.full((3, 2), 10), "rows must be less than 10"),
    ):
        values = [*grads, *given, *out]
        values[place] = value
        with pytest.raises(ValueError, match=message):
            OPS.margin_softmax_loss_backward(*values)


@pytest.mark.parametrize("form", ["cosines", "logits and bias", "binary A and bias"])
def test_op_check(form: str) -> None:
    case = case_of(form, 3, 5, 2, 8, 1)
    bias = None if case.bias is None else case.bias.requires_grad_()
    integers = [int(case.normalise), 2, 1, 0, case.summed, 3]
    given = (case.x.requires_grad_(), case.weight.requires_grad_(), bias, case.target, integers, [case.scale, 0.2])
    torch.library.opcheck(OPS.margin_softmax_loss.default, given)
    out = [value.detach() for value in OPS.margin_softmax_loss(*given)]
    given = (*case.grads, *[value.detach() if isinstance(value, Tensor) else value for value in given], *out)
    torch.library.opcheck(OPS.margin_softmax_loss_backward.default, given)


def test_it_compiles_whole() -> None:
    case = case_of("cosines", 3, 20, 2, 8, 1)

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        out = OPS.margin_softmax_loss(x, weight, None, case.target, [1, 2, 1, 0, 0, 3], [32.0, 0.2])
        return (out[0] * case.grads[0]).sum() + (out[1] * case.grads[1]).sum() + (out[2] * case.grads[2]).sum()

    leaves = [value.requires_grad_() for value in (case.x, case.weight)]
    plain = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for got, want in zip(torch.autograd.grad(compiled(*leaves), leaves), plain, strict=True):
        assert torch.equal(got, want)
