"""Ops that train TDNN layers on a CPU: each level against the definition, gradients, layouts, threads, messages.

The gradient of the weight has a file of its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import spkfast
from spkfast.ops._tdnn_training import channel_affine, conv_batch_norm, conv_relu
from spkfast.reference import Precision
from spkfast.reference import tdnn_training as reference
from tests.fuzz.bounds_products import UNIT
from tests.ops.pooling import LAYOUTS, channels_last, cut_out
from tests.ops.products import LEVELS, assert_near, assert_near_definition, at_level, noise, threads, whole
from tests.parity import assert_parity

CODES: dict[Precision, int] = {"fp32": 0, "bf16": 1}
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# C_i, N, K, B, T, dilation: on either side of a vector, a tile, a panel; taps that reach further than the frames do.
SIZES = [
    ((1,), 1, 1, 1, 1, 1),
    ((3,), 2, 5, 3, 1, 2),
    ((5,), 17, 3, 1, 13, 2),
    ((64,), 64, 3, 2, 33, 4),
    ((6, 12), 65, 1, 3, 16, 1),
    ((31, 1, 0, 35), 130, 3, 2, 21, 3),
    ((16,) * 3, 33, 5, 5, 2, 4),
]
# B, N, T
SHAPES = [(1, 1, 1), (3, 5, 70), (2, 72, 8), (5, 130, 3)]
OPS = torch.ops.spkfast


def multiplied(value: Tensor, precision: Precision) -> Tensor:
    """What a product sees, in float64."""
    return value.to(TYPES[precision]).double()


def run_conv(
    x: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None, precision: Precision = "fp32", *,
    dilation: int = 1, reflect: bool = False, moments: bool = True, relu: bool = True, wide: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    integers = [CODES[precision], dilation, int(reflect), int(moments), int(relu), int(wide)]
    y, mean, var = OPS.conv_relu(list(x), weight, bias, integers)
    return y, mean, var


def optional(values: Sequence[Tensor], chosen: Sequence[bool]) -> list[Any]:
    return [value if taken else None for value, taken in zip(values, chosen, strict=True)]


def mapped(function: Callable[[Tensor], Tensor], values: Sequence[Tensor | None]) -> list[Any]:
    return [None if value is None else function(value) for value in values]


# The definition


def test_values_by_hand() -> None:
    x, weight = torch.tensor([[[1.0, 2.0, 4.0]]]), torch.tensor([[[1.0, 10.0, -100.0]]])
    grad = torch.tensor([[[1.0, 10.0, 100.0]]])
    for precision in CODES:
        y, mean, var = run_conv([x], weight, torch.tensor([198.0]), precision)  # sums 8, -181, 240
        assert y.tolist() == [[[8.0, 0.0, 240.0]]]
        assert mean.item() == pytest.approx(248 / 3) and var.item() == pytest.approx(
            (8**2 + 240**2) / 3 - (248 / 3) ** 2
        )
        assert run_conv([x], weight, None, precision, relu=False)[0].tolist() == [[[-190.0, -379.0, 42.0]]] or (
            precision == "bf16"  # which has no 379
        )
        assert OPS.conv_input_gradient(grad, weight, [CODES[precision], 1]).tolist() == [[[20.0, 100.0, 0.0]]]
    grad_x, grad_bias = OPS.conv_relu_backward(grad, torch.tensor([[3.0]]), torch.tensor([[1.5]]), x - 1, x.mean(2) - 1)
    # One frame is 0 after ReLU; to the others the mean adds 3 / 3 and the variance 2 / 3 * 1.5 * (y - 4 / 3).
    torch.testing.assert_close(grad_x, torch.tensor([[[0.0, 11 - 1 / 3, 101 + 5 / 3]]]))
    torch.testing.assert_close(grad_bias, torch.tensor([[112 + 4 / 3]]))
    scale, shift = torch.tensor([[2.0]]), torch.tensor([[-1.0]])
    y, total = OPS.channel_affine(x, scale, shift, grad, True)
    assert y.tolist() == [[[1.0, 3.0, 7.0]]] and total.tolist() == [[[2.0, 13.0, 107.0]]]
    found = OPS.channel_affine_backward(grad, torch.ones_like(x), x, scale)
    assert [value.tolist() for value in found] == [[[[4.0, 22.0, 202.0]]], [[428.0]], [[114.0]]]


@pytest.mark.parametrize(("taps", "dilation"), [(1, 1), (3, 1), (3, 4), (5, 2)])
def test_definitions_of_gradients_are_those_of_autograd(taps: int, dilation: int) -> None:
    x, weight, bias = noise(2, 6, 20).double(), noise(8, 6, taps, seed=1).double(), noise(8, seed=2).double()
    leaves = [value.requires_grad_() for value in (x, weight, bias)]
    y = F.conv1d(x, weight, bias, padding="same", dilation=dilation).relu()
    var, mean = torch.var_mean(y, dim=2, unbiased=False)
    slopes = [noise(2, 8, 20, seed=3).double(), *noise(2, 2, 8, seed=4).double()]
    want = torch.autograd.grad((y, mean, var), leaves, slopes)
    options: dict[str, Any] = {"dilation": dilation, "precision": "fp32"}
    for got, exact in zip(
        reference.conv_relu([x], weight, bias, reflect=False, **options), (y, mean, var), strict=True
    ):
        torch.testing.assert_close(got, exact)
    grad, grad_bias = reference.conv_relu_backward(*slopes, y, mean)
    found = reference.conv_input_gradient(grad, weight, **options), grad_bias.sum(dim=0)
    torch.testing.assert_close(found, (want[0], want[2]))
    leaves = [noise(2, 6, 20).double(), noise(1, 6).double(), noise(1, 6, seed=1).double(), noise(2, 6, 20).double()]
    for leaf in leaves:
        leaf.requires_grad_()
    outputs = reference.channel_affine(*leaves)
    slopes = list(noise(2, 2, 6, 20, seed=5).double())
    grads = torch.autograd.grad(outputs, leaves, slopes)
    grad_x, grad_scale, grad_shift = reference.channel_affine_backward(*slopes, leaves[0], leaves[1])
    torch.testing.assert_close((grad_x, grad_scale.sum(0, True), grad_shift.sum(0, True), slopes[1]), grads)


# Every level and precision


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("precision", CODES)
@pytest.mark.parametrize("level", LEVELS)
def test_convolution_matches_the_definition(
    monkeypatch: pytest.MonkeyPatch, level: str, precision: Precision, size: tuple[Any, ...]
) -> None:
    at_level(monkeypatch, level)
    parts, outputs, taps, batch, frames, dilation = size
    weight, bias = noise(outputs, sum(parts), taps, seed=1), noise(outputs, seed=2)
    for x_type, reflect, added, relu in (
        (torch.float32, False, None, True),
        (torch.float32, True, bias, False),
        (torch.bfloat16, True, bias, True),
    ):
        x = [channels_last(noise(batch, channels, frames, seed=k)).to(x_type) for k, channels in enumerate(parts)]
        y, mean, var = run_conv(x, weight, added, precision, dilation=dilation, reflect=reflect, relu=relu)
        options: dict[str, Any] = {"dilation": dilation, "reflect": reflect, "precision": "fp32"}
        operands = (
            [multiplied(part, precision) for part in x],
            multiplied(weight, precision),
            mapped(Tensor.double, [added])[0],
        )
        want = reference.conv_relu(*operands, **options, relu=relu)[0]
        sizes = [part.abs() for part in operands[0]], operands[1].abs(), mapped(Tensor.abs, [operands[2]])[0]
        assert y.dtype == TYPES[precision] and y.stride(1) == 1
        assert_near(y, want, reference.conv_relu(*sizes, **options)[0], weight[0].numel() + 4)
        assert mean.dtype == var.dtype == torch.float32
        assert_near_definition(mean, lambda dtype, y=y: y.to(dtype).mean(dim=2))
        assert_near_definition(var, lambda dtype, y=y: y.to(dtype).var(dim=2, unbiased=False))
        again, *empty = run_conv(
            x, weight, added, precision, dilation=dilation, reflect=reflect, relu=relu, moments=False
        )
        assert torch.equal(again, y) and [value.shape for value in empty] == [(0, outputs)] * 2


@pytest.mark.parametrize("precision", CODES)
@pytest.mark.parametrize("level", LEVELS)
def test_convolution_is_exact_where_nothing_rounds(
    monkeypatch: pytest.MonkeyPatch, level: str, precision: Precision
) -> None:
    at_level(monkeypatch, level)
    # Blocks of time, channels and outputs; sums stay below 2**8.
    for batch, channels, outputs, frames in ((1, 600, 20, 40), (2, 20, 300, 700)):
        x, grad = channels_last(whole(batch, channels, frames)), channels_last(whole(batch, outputs, frames, seed=1))
        weight = whole(outputs, channels, 3, most=1, seed=2) * (torch.arange(channels) % 29 == 0)[:, None]
        weight = weight * (torch.arange(outputs) % 13 == 0)[:, None, None]
        for reflect in (False, True):
            y = run_conv([x], weight, None, precision, dilation=2, reflect=reflect, relu=False)[0]
            want = reference.conv_relu(
                [x.double()], weight.double(), None, dilation=2, reflect=reflect, precision="fp32", relu=False
            )[0]
            assert want.any() and torch.equal(y.double(), want)
        found = OPS.conv_input_gradient(grad, weight, [CODES[precision], 2])
        want = reference.conv_input_gradient(grad.double(), weight.double(), dilation=2, precision="fp32")
        assert want.any() and torch.equal(found.double(), want)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("precision", CODES)
@pytest.mark.parametrize("level", LEVELS)
def test_input_gradient_matches_the_definition(
    monkeypatch: pytest.MonkeyPatch, level: str, precision: Precision, size: tuple[Any, ...]
) -> None:
    at_level(monkeypatch, level)
    parts, outputs, taps, batch, frames, dilation = size
    weight = noise(outputs, sum(parts), taps, seed=1)
    for dtype in (torch.float32, torch.bfloat16):
        grad = channels_last(noise(batch, outputs, frames)).to(dtype)
        got = OPS.conv_input_gradient(grad, weight, [CODES[precision], dilation])
        operands = multiplied(grad, precision), multiplied(weight, precision)
        want, size_of_terms = (
            reference.conv_input_gradient(*pair, dilation=dilation, precision="fp32")
            for pair in (operands, [value.abs() for value in operands])
        )
        assert got.dtype == TYPES[precision] and got.stride(1) == 1
        assert_near(got, want, size_of_terms, outputs * taps + 4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("precision", CODES)
@pytest.mark.parametrize("level", LEVELS)
def test_relu_gradient_matches_the_definition(
    monkeypatch: pytest.MonkeyPatch, level: str, precision: Precision, shape: tuple[int, int, int]
) -> None:
    at_level(monkeypatch, level)
    frames = shape[2]
    y = channels_last(noise(*shape).relu()).to(TYPES[precision])
    mean = y.double().mean(dim=2).float()
    given = channels_last(noise(*shape, seed=1).to(y.dtype)), *noise(2, *shape[:2], seed=2)
    for chosen in itertools.product((True, False), repeat=3):
        grads = optional(given, chosen)
        grad, grad_bias = OPS.conv_relu_backward(*grads, y, mean)
        want = reference.conv_relu_backward(*mapped(Tensor.double, grads), y.double(), mean.double())[0]
        by_y, by_mean, by_var = (value.double().abs() * taken for value, taken in zip(given, chosen, strict=True))
        spread = y.double() + mean.double()[..., None]
        size = by_y + by_mean[..., None] / frames + 2 / frames * by_var[..., None] * spread
        assert grad.dtype == y.dtype and grad.stride(1) == 1 and grad_bias.dtype == torch.float32
        assert_near(grad, want, size, 8)
        # The kernel may add up the gradients before or after they are rounded.
        assert_near(
            grad_bias,
            want.sum(dim=2),
            (1 + torch.finfo(y.dtype).eps / UNIT * (y.dtype != torch.float32)) * size.sum(dim=2),
            frames + 8,
        )


@pytest.mark.parametrize("rows", ["one", "all"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("precision", CODES)
@pytest.mark.parametrize("level", LEVELS)
def test_affine_matches_the_definition(
    monkeypatch: pytest.MonkeyPatch, level: str, precision: Precision, shape: tuple[int, int, int], rows: str
) -> None:
    at_level(monkeypatch, level)
    batch, channels, frames = shape
    x, added, *grads = (channels_last(value).to(TYPES[precision]) for value in noise(4, *shape))
    scale, shift = noise(2, 1 if rows == "one" else batch, channels, seed=1)
    exact = [value.double() for value in (x, scale, shift, added)]
    want, size = reference.channel_affine(*exact), reference.channel_affine(*(value.abs() for value in exact))
    for plain, given in itertools.product((True, False), (added, None)):
        got = OPS.channel_affine(x, scale, shift, given, plain)
        for k, computed in enumerate((plain, given is not None)):
            assert got[k].dtype == x.dtype
            if computed:
                assert got[k].stride(1) == 1
                assert_near(got[k], want[k], size[k], 3)
            else:
                assert got[k].shape == (0,)
    for chosen in itertools.product((True, False), repeat=2):
        taken = optional(grads, chosen)
        got = OPS.channel_affine_backward(*taken, x, scale)
        want = reference.channel_affine_backward(*mapped(Tensor.double, taken), x.double(), scale.double())
        sizes = mapped(lambda value: value.double().abs(), taken)
        size = reference.channel_affine_backward(*sizes, x.double().abs(), scale.double().abs())
        assert [value.dtype for value in got] == [x.dtype, torch.float32, torch.float32] and got[0].stride(1) == 1
        for k in range(3):
            assert_near(got[k], want[k], size[k], 3 if k == 0 else frames + 3)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("level", LEVELS)
def test_sums_that_stay_float32(monkeypatch: pytest.MonkeyPatch, level: str, relu: bool) -> None:
    at_level(monkeypatch, level)
    x, weight = (value.bfloat16().float() for value in (noise(2, 7, 19), noise(33, 7, 3, seed=1)))
    bias = noise(33, seed=2)
    y, mean, var = run_conv([x], weight, bias, "bf16", relu=relu, wide=True)
    operands = [multiplied(x, "bf16")], multiplied(weight, "bf16"), bias.double()
    options: dict[str, Any] = {"dilation": 1, "reflect": False, "precision": "fp32"}
    size = reference.conv_relu([operands[0][0].abs()], operands[1].abs(), bias.double().abs(), **options)[0]
    assert y.dtype == torch.float32
    assert_near(y, reference.conv_relu(*operands, relu=relu, **options)[0], size, weight[0].numel() + 4)
    assert torch.equal(y.bfloat16(), run_conv([x], weight, bias, "bf16", relu=relu)[0])
    assert_near_definition(mean, lambda dtype: y.to(dtype).mean(dim=2))
    assert_near_definition(var, lambda dtype: y.to(dtype).var(dim=2, unbiased=False))
    leaf = x.clone().requires_grad_()
    out, _ = conv_relu([leaf], weight, bias, precision="bf16", moments=False, relu=relu, wide=True)
    (grad,) = torch.autograd.grad(out, leaf, noise(2, 33, 19, seed=3))
    exact = x.double().requires_grad_()
    want = reference.conv_relu([exact], weight.double(), bias.double(), relu=relu, **options)[0]
    (true,) = torch.autograd.grad(want, exact, noise(2, 33, 19, seed=3).double())
    assert grad.dtype == torch.float32 and (grad - true).norm() <= 2.0**-6 * true.norm()


def test_variance_keeps_its_digits_beside_a_large_mean() -> None:
    y, mean, var = run_conv([noise(2, 4, 300)], noise(6, 4, 1, seed=1), torch.full((6,), 3000.0))
    want = y.double().var(dim=2, unbiased=False)
    torch.testing.assert_close(mean, y.double().mean(dim=2).float(), rtol=1e-6, atol=0)
    # Of squares it would be off by UNIT * mean**2.
    assert ((var - want).abs() <= 4 * UNIT * mean * want.sqrt()).all()


@pytest.mark.parametrize("precision", CODES)
@pytest.mark.parametrize("level", LEVELS)
def test_nan_is_not_hidden(monkeypatch: pytest.MonkeyPatch, level: str, precision: Precision) -> None:
    at_level(monkeypatch, level)
    x = channels_last(noise(2, 20, 11))
    x[1, 7, 4] = math.nan
    weight = noise(30, 20, 3, seed=1)
    y, mean, var = run_conv([x], weight, None, precision)
    spoilt = torch.zeros(2, 11, dtype=torch.bool)
    spoilt[1, 3:6] = True
    assert torch.equal(y.isnan(), spoilt[:, None].expand(2, 30, 11))
    for moment in (mean, var):
        assert moment[1].isnan().all() and moment[0].isfinite().all()
    ones = torch.ones_like(y)
    grad, grad_bias = OPS.conv_relu_backward(ones * math.nan, None, None, ones, mean)
    assert grad.isnan().all() and grad_bias.isnan().all()


# Gradients


def trained_on(*values: Tensor, backend: str, relu: bool, **options: Any) -> tuple[Tensor, ...]:
    """Inputs, weight and bias to the output and, with ReLU, its moments: of the kernels or of the definition."""
    *x, weight, bias = values
    if backend == "reference":
        found = reference.conv_relu(x, weight, bias, relu=relu, **options)
        return found if relu else found[:1]
    y, moments = conv_relu(x, weight, bias, relu=relu, moments=relu, backend=backend, **options)
    return (y,) if moments is None else (y, *moments)


# C_i, N, K, T, dilation, reflect, relu: frames fewer than the margin, and as many
GRADIENTS = [
    ((7,), 9, 1, 20, 1, False, True),
    ((4, 5, 3), 17, 3, 21, 2, False, True),
    ((4, 5, 3), 17, 3, 21, 2, False, False),
    ((7,), 9, 5, 30, 3, True, True),
    ((7,), 9, 5, 7, 3, True, True),
    ((7,), 9, 5, 6, 3, True, True),
    ((5, 2), 9, 5, 4, 3, True, False),
    ((7,), 9, 5, 2, 3, True, True),
    ((7,), 9, 3, 1, 2, True, True),
    ((7,), 9, 3, 1, 2, False, True),
]


def conv_case(case: tuple[Any, ...]) -> tuple[list[Tensor], dict[str, Any]]:
    parts, outputs, taps, frames, dilation, reflect, relu = case
    x = [channels_last(noise(3, channels, frames, seed=k)) for k, channels in enumerate(parts)]
    values = [*x, noise(outputs, sum(parts), taps, seed=8), noise(outputs, seed=9)]
    return values, {"dilation": dilation, "reflect": reflect, "relu": relu}


@pytest.mark.parametrize("case", GRADIENTS, ids=str)
def test_gradients_of_the_convolution(case: tuple[Any, ...]) -> None:
    values, options = conv_case(case)
    assert_parity(trained_on, values, backend="native", precision="fp32", **options)


@pytest.mark.parametrize("case", GRADIENTS, ids=str)
def test_gradients_of_half_the_digits(case: tuple[Any, ...]) -> None:
    values, options = conv_case(case)
    values = [value.bfloat16().float() for value in values]

    def gradients(backend: str, precision: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [value.to(dtype).requires_grad_() for value in values]
        outputs = trained_on(*leaves, backend=backend, precision=precision, **options)
        slopes = [noise(*output.shape, seed=k).to(output) for k, output in enumerate(outputs)]
        return [grad.double() for grad in torch.autograd.grad(outputs, leaves, slopes)]

    want = gradients("reference", "fp32", torch.float64)
    got, whole_digits = (gradients("native", precision, torch.float32) for precision in ("bf16", "fp32"))
    for k, exact in enumerate(want):
        # Output, its gradient and that of the inputs are rounded; mirrored frames are added to rounded ones.
        assert (got[k] - exact).norm() <= 2.0**-7 * exact.norm(), f"gradient {k}"
        assert (got[k] - exact).norm() > 2.0**-16 * exact.norm() >= (whole_digits[k] - exact).norm()


def affine_of(*values: Tensor, backend: str, plain: bool = True) -> tuple[Tensor, ...]:
    x, scale, shift, *added = values
    given = added[0] if added else None
    if backend == "reference":
        y, total = reference.channel_affine(x, scale, shift, given)
    else:
        y, total = channel_affine(x, scale, shift, given, plain=plain, backend=backend)
    return (*([y] if plain else []), *([total] if added else []))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("added", "plain"), [(True, True), (True, False), (False, True)])
def test_gradients_of_the_affine_map(added: bool, plain: bool, rows: int) -> None:
    x, rest = noise(2, 3, 7, 20)
    values = [channels_last(x), *noise(2, rows, 7, seed=1), *([rest] if added else [])]
    assert_parity(affine_of, values, backend="native", plain=plain)


def normalised(*values: Tensor, backend: str, added: bool = False, plain: bool = True, **options: Any) -> Any:
    """Inputs, weight, bias, factor and offset, and what is added, to the outputs and the moments of the batch."""
    *x, weight, bias, gamma, beta = values[: len(values) - added]
    rest = values[-1] if added else None
    if backend == "reference":
        y = reference.conv_relu(x, weight, bias, dilation=2, precision="fp32", **options)[0]
        out = F.batch_norm(y, None, None, gamma, beta, training=True, eps=1e-3)
        var, mean = torch.var_mean(y.detach(), dim=(0, 2), unbiased=False)
        total = None if rest is None else out + rest
    else:
        found = conv_batch_norm(x, weight, bias, gamma, beta, rest, plain=plain, eps=1e-3, dilation=2, **options)
        out, total, mean, var = found
        assert total.shape == out.shape or not added or not plain
    with torch.no_grad():
        moments = mean.clone(), var.clone()
    return (*([out] if plain else []), *([total] if added else []), *moments)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("added", "plain"), [(False, True), (True, True), (True, False)])
def test_gradients_of_batch_norm(monkeypatch: pytest.MonkeyPatch, added: bool, plain: bool, level: str) -> None:
    at_level(monkeypatch, level)
    for parts, outputs, taps, batch, frames, reflect in (
        ((7,), 9, 1, 3, 20, False),
        ((4, 5, 3), 70, 3, 2, 21, True),
        ((5,), 17, 5, 7, 2, True),
        ((5,), 17, 3, 3, 1, False),
    ):
        x = [channels_last(noise(batch, channels, frames, seed=k)) for k, channels in enumerate(parts)]
        vectors = noise(outputs, seed=9), 1 + 0.3 * noise(outputs, seed=10), noise(outputs, seed=11)
        rest = [channels_last(noise(batch, outputs, frames, seed=12))] if added else []
        values = [*x, noise(outputs, sum(parts), taps, seed=8), *vectors, *rest]
        assert_parity(normalised, values, backend="native", added=added, plain=plain, reflect=reflect)


def test_batch_norm_without_factor_offset_and_bias() -> None:
    def alone(x: Tensor, weight: Tensor, backend: str) -> Tensor:
        if backend == "reference":
            y = reference.conv_relu([x], weight, None, dilation=1, reflect=False, precision="fp32")[0]
            return F.batch_norm(y, None, None, None, None, training=True)
        return conv_batch_norm([x], weight, None, None, None).y

    assert_parity(alone, [noise(3, 5, 9), noise(7, 5, 3, seed=1)], backend="native")


@pytest.mark.parametrize("wanted", range(7))
def test_batch_norm_gives_only_gradients_that_are_wanted(wanted: int) -> None:
    shapes = ((2, 3, 9), (2, 2, 9), (7, 5, 3), (7,), (7,), (7,), (2, 7, 9))
    values = [noise(*shape, seed=k).requires_grad_() for k, shape in enumerate(shapes)]

    def loss(*given: Tensor) -> Tensor:
        found = conv_batch_norm(given[:2], *given[2:])
        return (found.y * found.total).sum()

    want = torch.autograd.grad(loss(*values), values)
    given = [value.detach().requires_grad_(k == wanted) for k, value in enumerate(values)]
    loss(*given).backward()
    for k, value in enumerate(given):
        assert value.grad is None if k != wanted else torch.equal(value.grad, want[k])


def test_batch_norm_keeps_its_digits_beside_a_large_mean() -> None:
    x, weight, bias = noise(3, 4, 200), noise(6, 4, 1, seed=1), torch.full((6,), 3000.0)
    found, (y, *_) = conv_batch_norm([x], weight, bias, None, None), run_conv([x], weight, bias)
    var, mean = torch.var_mean(y.double(), dim=(0, 2), unbiased=False)
    torch.testing.assert_close(found.mean, mean.float(), rtol=1e-6, atol=0)
    # Off by what the means of rows, rounded, differ from theirs: of squares it would be off by UNIT * mean**2.
    assert ((found.var - var).abs() <= 4 * UNIT * mean * var.sqrt()).all()


def test_batch_norm_of_half_the_digits() -> None:
    values = [noise(8, 5, 30), noise(16, 5, 3, seed=1), *noise(3, 16, seed=2)]
    leaves = [value.bfloat16().float().requires_grad_() for value in values]
    found = conv_batch_norm(leaves[:1], *leaves[1:], eps=1e-3, dilation=2, precision="bf16")
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    want, *_ = normalised(*exact, backend="reference", reflect=False)
    slope = noise(8, 16, 30, seed=3)
    grads = torch.autograd.grad(found.y, leaves, slope.to(found.y.dtype))
    assert found.y.dtype == torch.bfloat16 and found.mean.dtype == found.var.dtype == torch.float32
    for got, true in zip((found.y, *grads), (want, *torch.autograd.grad(want, exact, slope.double())), strict=True):
        assert 2.0**-16 * true.norm() < (got.double() - true).norm() <= 2.0**-6 * true.norm()


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_outputs_that_are_not_used(used: tuple[int, ...]) -> None:
    def some(*values: Tensor, backend: str) -> tuple[Tensor, ...]:
        found = trained_on(*values, backend=backend, relu=True, dilation=2, reflect=True, precision="fp32")
        return tuple(found[k] for k in used)

    assert_parity(some, [noise(2, 5, 9), noise(7, 5, 3, seed=1), noise(7, seed=2)], backend="native")


def test_sum_alone_of_an_affine_map() -> None:
    def total(*values: Tensor, backend: str) -> Tensor:
        return affine_of(*values, backend=backend)[1]

    assert_parity(total, [noise(2, 5, 9), *noise(2, 1, 5, seed=1), noise(2, 5, 9, seed=2)], backend="native")


@pytest.mark.parametrize("wanted", list(itertools.product((False, True), repeat=4))[1:], ids=str)
def test_only_gradients_that_are_wanted(wanted: tuple[bool, ...]) -> None:
    values = [noise(2, 3, 9), noise(2, 2, 9, seed=1), noise(7, 5, 3, seed=2), noise(7, seed=3)]
    want = torch.autograd.grad(
        trained_on(*(value.requires_grad_() for value in values), backend="native", relu=True, **DEFAULTS)[0].sum(),
        values,
    )
    given = [value.detach().requires_grad_(needed) for value, needed in zip(values, wanted, strict=True)]
    with torch.autograd.profiler.profile() as profile:
        trained_on(*given, backend="native", relu=True, **DEFAULTS)[0].sum().backward()
    for value, exact, needed in zip(given, want, wanted, strict=True):
        assert torch.equal(value.grad, exact) if needed else value.grad is None
    names = {event.name for event in profile.function_events}
    assert "spkfast::conv_relu_backward" in names
    assert ("spkfast::conv_input_gradient" in names) == any(wanted[:2])
    assert ("spkfast::conv_weight_gradient" in names) == wanted[2]


DEFAULTS: dict[str, Any] = {"dilation": 1, "reflect": False, "precision": "fp32"}


def test_inputs_keep_their_type_and_weights_float32_gradients() -> None:
    for dtype, precision in itertools.product((torch.float32, torch.bfloat16), CODES):
        x = noise(2, 5, 9).to(dtype).requires_grad_()
        weight, bias = noise(7, 5, 3, seed=1).requires_grad_(), noise(7, seed=2).requires_grad_()
        y, _ = conv_relu([x], weight, bias, precision=precision)
        assert y.dtype == TYPES[precision]
        y.float().square().sum().backward()
        found = [leaf.grad for leaf in (x, weight, bias)]
        assert [None if grad is None else grad.dtype for grad in found] == [dtype, torch.float32, torch.float32]


def test_autocast_changes_nothing() -> None:
    def gradients() -> tuple[Tensor, ...]:
        leaves = [
            noise(2, 5, 9).requires_grad_(),
            noise(5, 5, 3, seed=1).requires_grad_(),
            noise(5, seed=2).requires_grad_(),
        ]
        y, moments = conv_relu(leaves[:1], leaves[1], leaves[2], reflect=True)
        assert moments is not None
        y, total = channel_affine(y, moments.mean, moments.var, leaves[0])
        return y, total, *torch.autograd.grad((y * total).sum(), leaves)

    want = gradients()
    with torch.autocast("cpu", torch.bfloat16):
        for got, exact in zip(gradients(), want, strict=True):
            assert got.dtype == torch.float32 and torch.equal(got, exact)


def test_second_derivative() -> None:
    x, weight = noise(2, 5, 9).requires_grad_(), noise(7, 5, 3, seed=1).requires_grad_()
    vectors = [value.requires_grad_() for value in noise(2, 1, 5, seed=2)]
    normalised_frames = conv_batch_norm([x], weight, None, None, None).y
    for y in (conv_relu([x], weight, None)[0], channel_affine(x, *vectors)[0], normalised_frames):
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(spkfast.InputError, match="the training kernels have no second derivative"):
            grad.sum().backward()


# Layouts, threads, memory


def everything(x: Tensor, y: Tensor, grad: Tensor, precision: Precision = "fp32") -> list[Tensor]:
    """All outputs of all ops on tensors of one shape, of which ``y`` is what a ReLU gave."""
    rows, channels, _ = x.shape
    weight, bias = noise(7, 2 * channels, 3, seed=1), noise(7, seed=2)
    back, vectors = noise(channels, 4, 3, seed=3), noise(2, rows, channels, seed=4)
    mean, normal = (
        noise(rows, channels, seed=5),
        (noise(channels, 2 * channels, 3, seed=6), *noise(3, channels, seed=7)),
    )
    return [
        *run_conv([x, y], weight, bias, precision, dilation=2, reflect=True),
        *run_conv([y, x], weight, None, precision, relu=False),
        *OPS.conv_relu_backward(grad, *vectors, y, mean),
        *OPS.conv_relu_backward(grad, None, None, y, mean[:0]),
        OPS.conv_input_gradient(grad, back, [CODES[precision], 2]),
        *OPS.channel_affine(x, *vectors, y, True),
        *OPS.channel_affine(x, *vectors[:, :1], y, False),
        *OPS.channel_affine_backward(grad, y, x, vectors[0]),
        *OPS.conv_batch_norm([x, y], *normal, grad, [CODES[precision], 2, 1, 1], 1e-3),
        *OPS.conv_batch_norm_backward(grad, x, y, y.new_ones(channels).float(), *vectors[:, 0].square(), 1e-3),
    ]


def assert_equal(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    for k, (have, exact) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(have, exact), f"output {k}"


@pytest.mark.parametrize("precision", CODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout: str, precision: Precision) -> None:
    # A slice lies among NaN.
    x, y, grad = noise(3, 3, 19, 21).to(TYPES[precision])
    want = everything(*(channels_last(value) for value in (x, y.relu(), grad)), precision)
    assert_equal(everything(*(LAYOUTS[layout](value) for value in (x, y.relu(), grad)), precision), want)


@pytest.mark.parametrize("precision", CODES)
def test_groups_of_channels_are_read_where_they_lie(precision: Precision) -> None:
    wide = channels_last(noise(2, 57, 11).relu().to(TYPES[precision]))
    parts = wide.split(19, dim=1)
    assert_equal(everything(*parts, precision), everything(*(part.contiguous() for part in parts), precision))


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_expanded(dim: int) -> None:
    x, y, grad = (value.narrow(dim, 0, 1).expand(3, 5, 9) for value in noise(3, 3, 5, 9).relu())
    assert_equal(everything(x, y, grad), everything(*(value.contiguous() for value in (x, y, grad))))


def test_vectors_of_any_layout() -> None:
    x, y, vectors = noise(3, 5, 9), noise(3, 5, 9, seed=1).relu(), noise(5, 3, 2, seed=2)
    spread = vectors[..., 0].T, vectors[..., 1].T
    near = [value.contiguous() for value in spread]
    weight, bias = noise(3, 5, 7, seed=3), noise(14, seed=4)
    assert_equal(OPS.channel_affine(x, *spread, y, True), OPS.channel_affine(x, *near, y, True))
    assert_equal(OPS.channel_affine_backward(x, None, y, spread[0]), OPS.channel_affine_backward(x, None, y, near[0]))
    assert_equal(OPS.conv_relu_backward(x, *spread, y, spread[0]), OPS.conv_relu_backward(x, *near, y, near[0]))
    assert_equal(
        run_conv([x], weight.permute(2, 1, 0), bias[::2]),
        run_conv([x], weight.permute(2, 1, 0).contiguous(), bias[::2].clone()),
    )
    got = OPS.conv_input_gradient(x, weight.permute(1, 2, 0), [0, 1])
    assert torch.equal(got, OPS.conv_input_gradient(x, weight.permute(1, 2, 0).contiguous(), [0, 1]))


@pytest.mark.parametrize("precision", CODES)
@pytest.mark.parametrize("level", LEVELS)
def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch, level: str, precision: Precision) -> None:
    at_level(monkeypatch, level)
    # Rows, panels and spans of time that threads share; one row, and more than there are threads.
    for batch, channels, frames in ((1, 150, 300), (7, 70, 230), (2, 33, 5)):
        values = noise(3, batch, channels, frames).relu().to(TYPES[precision])
        inputs = [channels_last(value) for value in values]
        found = [everything(*inputs, precision) for _ in threads(1, 2, 3)]
        for other in found[1:]:
            assert_equal(other, found[0])


@pytest.mark.parametrize("precision", CODES)
def test_nothing_is_left_of_an_earlier_call(precision: Precision) -> None:
    x, y, grad = (cut_out(channels_last(value)) for value in noise(3, 2, 5, 41).relu().to(TYPES[precision]))
    want = everything(x, y, grad, precision)
    worst = torch.full((3, 90, 500), math.nan)
    run_conv([worst], torch.full((70, 90, 5), math.nan), torch.full((70,), math.nan), precision)
    OPS.conv_input_gradient(worst, torch.full((90, 70, 5), math.nan), [CODES[precision], 1])
    assert_equal(everything(x, y, grad, precision), want)


@pytest.mark.parametrize("precision", CODES)
@pytest.mark.parametrize("shape", [(0, 5, 9), (2, 5, 0), (2, 0, 9)], ids=str)
def test_nothing_in_gives_nothing_or_zero(shape: tuple[int, int, int], precision: Precision) -> None:
    batch, channels, frames = shape
    x, vectors = noise(*shape).to(TYPES[precision]), noise(2, 1, channels)
    y, mean, var = run_conv([x], noise(7, channels, 3), torch.full((7,), 2.0), precision, reflect=True)
    assert y.shape == (batch, 7, frames) and mean.shape == var.shape == (batch, 7) and (y == 2).all()
    assert OPS.conv_input_gradient(x, noise(channels, 4, 3), [CODES[precision], 1]).shape == (batch, 4, frames)
    assert not OPS.conv_input_gradient(x, noise(channels, 4, 3), [CODES[precision], 1]).any()
    assert OPS.channel_affine(x, *vectors, x, True)[1].shape == shape
    for found in (
        OPS.conv_relu_backward(x, None, None, x, noise(0, channels)),
        OPS.channel_affine_backward(x, x, x, vectors[0]),
    ):
        assert found[0].shape == shape
        assert all(value.shape == shape[:2] and not value.any() for value in found[1:])


@pytest.mark.parametrize("reflect", [False, True])
@pytest.mark.parametrize("shape", [(0, 5, 9), (2, 5, 0)], ids=str)
def test_gradients_of_nothing(shape: tuple[int, int, int], reflect: bool) -> None:
    x = noise(*shape).requires_grad_()
    leaves = [x, *(value.requires_grad_() for value in (noise(5, 5, 3), noise(5), *noise(2, 1, 5)))]
    y, moments = conv_relu([x], leaves[1], leaves[2], reflect=reflect)
    assert moments is not None
    grads = torch.autograd.grad(channel_affine(y, leaves[3], leaves[4], x)[1].sum(), leaves)
    assert all(grad.shape == leaf.shape and not grad.any() for grad, leaf in zip(grads, leaves, strict=True))


# Registration and messages


NAMES = [
    "channel_affine", "channel_affine_backward", "conv_batch_norm", "conv_batch_norm_backward", "conv_input_gradient",
    "conv_relu", "conv_relu_backward", "conv_weight_gradient",
]  # fmt: skip


def op_arguments(name: str, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    code = CODES["fp32" if dtype == torch.float32 else "bf16"]
    wide = channels_last(noise(2, 11, 9)).to(dtype)
    x, grad, y = wide[:, :5], noise(2, 7, 9, seed=1).to(dtype), noise(2, 7, 9, seed=2).relu().to(dtype)
    weight, bias, rows = noise(7, 5, 3, seed=3), noise(7, seed=4), noise(2, 2, 7, seed=5)
    both = noise(7, 11, 3, seed=6)
    return {
        "conv_relu": [
            ([x], weight, bias, [code, 2, 0, 1, 1, 0]),
            ([x, wide[:, 5:]], both, None, [code, 1, 1, 0, 0, 1]),
            ([x.float()], weight, bias, [1, 1, 0, 1, 1, 1]),
        ],
        "conv_relu_backward": [
            (grad, *rows, y, rows[0]),
            (None, rows[0], None, y, rows[1]),
            (grad, None, None, y, rows[0][:0]),
        ],
        "conv_input_gradient": [(grad, weight, [code, 2])],
        "conv_weight_gradient": [([x, wide[:, 5:]], grad, [3, 2, 1, code])],
        "channel_affine": [(y, *rows, grad, True), (y, *rows[:, :1], None, True), (y, *rows[:, :1], grad, False)],
        "conv_batch_norm": [
            ([x], weight, bias, *rows[0], grad, [code, 2, 0, 1], 1e-3),
            ([x, wide[:, 5:]], both, None, None, None, None, [code, 1, 1, 1], 1e-5),
            ([x.float()], weight, None, None, bias, grad.bfloat16(), [1, 1, 0, 0], 1e-5),
        ],
        "conv_batch_norm_backward": [
            (grad, y, y, *rows[0].square(), bias, 1e-3),
            (None, grad, y, *rows[0].square(), None, 1e-3),
            (grad, None, y, *rows[0].square(), bias, 1e-3),
        ],
        "channel_affine_backward": [(grad, y, y, rows[0]), (None, grad, y, rows[0][:1]), (grad, None, y, rows[0])],
    }[name]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    for arguments in op_arguments(name, dtype):
        torch.library.opcheck(getattr(OPS, name), arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["conv_relu", "conv_batch_norm", "channel_affine"])
def test_opcheck_with_gradients(name: str, dtype: torch.dtype) -> None:
    def leaf(value: Any) -> Any:
        if isinstance(value, list) and value and isinstance(value[0], Tensor):
            return [leaf(part) for part in value]
        return value.detach().clone().requires_grad_() if isinstance(value, Tensor) else value

    # Empty outputs, as of moments that are not wanted, take part: opcheck sums all of them.
    for arguments in op_arguments(name, dtype):
        torch.library.opcheck(getattr(OPS, name), tuple(leaf(value) for value in arguments))


def test_messages() -> None:
    x, weight, bias, vectors = noise(2, 3, 5), noise(4, 3, 3), noise(4), noise(2, 2, 3)
    ints, y = [0, 1, 0, 1, 1, 0], noise(2, 3, 5).relu()
    cases: list[tuple[str, tuple[Any, ...], str]] = [
        ("conv_relu", ([], weight, bias, ints), "x must have at least one tensor"),
        ("conv_relu", ([x], weight, bias, ints[:4]), "conv_relu takes 6 integers, got 4"),
        ("conv_relu", ([x[0]], weight, bias, ints), r"x must have shape \(any, any, any\), got \(3, 5\)"),
        ("conv_relu", ([x, x[..., :4]], weight, bias, ints), r"x must have shape \(2, any, 5\), got \(2, 3, 4\)"),
        ("conv_relu", ([x, x[:1]], weight, bias, ints), r"x must have shape \(2, any, 5\), got \(1, 3, 5\)"),
        ("conv_relu", ([x, x], weight, bias, ints), "x must have 3 channels, got 6"),
        ("conv_relu", ([x[:, :2], x[:, 2:].bfloat16()], weight, bias, ints), "x must be Float, got BFloat16"),
        ("conv_relu", ([x.double()], weight, bias, ints), "x must be Float or BFloat16, got Double"),
        ("conv_relu", ([x], weight[0], bias, ints), r"weight must have shape \(any, any, any\), got \(3, 3\)"),
        ("conv_relu", ([x], weight.bfloat16(), bias, ints), "weight must be Float, got BFloat16"),
        ("conv_relu", ([x], weight[..., :2], bias, ints), "taps must be odd, got 2"),
        ("conv_relu", ([x], weight, bias[:3], ints), r"bias must have shape \(4\), got \(3\)"),
        ("conv_relu", ([x], weight, bias.double(), ints), "bias must be Float, got Double"),
        ("conv_relu", ([x], weight, bias, [2, 1, 0, 1, 1, 0]), "precision must be 0 or 1, got 2"),
        ("conv_relu", ([x], weight, bias, [0, 0, 0, 1, 1, 0]), "dilation must be at least 1, got 0"),
        ("conv_input_gradient", (x, weight, [0, 1]), r"grad must have shape \(any, 4, any\), got \(2, 3, 5\)"),
        ("conv_input_gradient", (x, weight.transpose(0, 1), [0]), "conv_input_gradient takes 2 integers, got 1"),
        ("conv_input_gradient", (x, weight.transpose(0, 1), [3, 1]), "precision must be 0 or 1, got 3"),
        ("conv_input_gradient", (x, weight.transpose(0, 1), [0, 0]), "dilation must be at least 1, got 0"),
        ("conv_input_gradient", (x.half(), weight.transpose(0, 1), [0, 1]), "grad must be Float or BFloat16, got Half"),
        ("conv_input_gradient", (x, weight.transpose(0, 1)[..., :2], [0, 1]), "taps must be odd, got 2"),
        ("conv_input_gradient", (x, weight.transpose(0, 1).double(), [0, 1]), "weight must be Float, got Double"),
        ("conv_relu_backward", (x[0], None, None, y[0], vectors[0]), r"y must have shape \(any, any, any\), got"),
        ("conv_relu_backward", (x, None, None, y.half(), vectors[0]), "y must be Float or BFloat16, got Half"),
        ("conv_relu_backward", (x.bfloat16(), None, None, y, vectors[0]), "grad_y must be Float, got BFloat16"),
        ("conv_relu_backward", (x[..., :4], None, None, y, vectors[0]), r"grad_y must have shape \(2, 3, 5\)"),
        ("conv_relu_backward", (x, vectors[0, :1], None, y, vectors[0]), r"grad_mean must have shape \(2, 3\)"),
        ("conv_relu_backward", (x, None, vectors[0].double(), y, vectors[0]), "grad_var must be Float, got Double"),
        ("conv_relu_backward", (x, None, vectors[0], y, vectors[0, :0]), r"mean must have shape \(2, 3\), got"),
        ("channel_affine", (x[0], *vectors, None, True), r"x must have shape \(any, any, any\), got \(3, 5\)"),
        ("channel_affine", (x.double(), *vectors, None, True), "x must be Float or BFloat16, got Double"),
        ("channel_affine", (x, vectors[0, 0], vectors[1], None, True), r"scale must have 1 or 2 rows, got shape \(3\)"),
        ("channel_affine", (x, noise(3, 3), vectors[1], None, True), r"scale must have 1 or 2 rows, got shape"),
        ("channel_affine", (x, vectors[0], noise(2, 4), None, True), r"shift must have shape \(2, 3\), got \(2, 4\)"),
        ("channel_affine", (x, vectors[0], vectors[1, :1], None, True), "scale and shift must have the same rows"),
        ("channel_affine", (x, vectors[0].double(), vectors[1], None, True), "scale must be Float, got Double"),
        ("channel_affine", (x, *vectors, x.bfloat16(), True), "added must be Float, got BFloat16"),
        ("channel_affine", (x, *vectors, x[:1], True), r"added must have shape \(2, 3, 5\), got \(1, 3, 5\)"),
        ("conv_batch_norm", ([x], weight, bias, bias, bias, None, ints, 1e-5), "conv_batch_norm takes 4 integers"),
        ("conv_batch_norm", ([x], weight, bias, bias[:3], bias, None, ints[:4], 1e-5), r"gamma must have shape \(4\)"),
        ("conv_batch_norm", ([x], weight, bias, bias, bias[:3], None, ints[:4], 1e-5), r"beta must have shape \(4\)"),
        ("conv_batch_norm", ([x], weight, bias, bias, bias, x, ints[:4], 1e-5), r"added must have shape \(2, 4, 5\)"),
        ("conv_batch_norm", ([x[..., :0]], weight, bias, bias, bias, None, ints[:4], 1e-5), "x must have frames, got"),
        ("conv_batch_norm_backward", (x, None, y, bias, bias[:3], None, 1e-5), r"mean must have shape \(3\)"),
        ("conv_batch_norm_backward", (x, None, y, bias[:3], bias, None, 1e-5), r"var must have shape \(3\)"),
        ("conv_batch_norm_backward", (x, None, y, bias[:3], bias[:3], bias, 1e-5), r"gamma must have shape \(3\)"),
        ("conv_batch_norm_backward", (y, x[:1], y, bias[:3], bias[:3], None, 1e-5), r"grad_total must have shape"),
        ("channel_affine_backward", (x[:1], None, x, vectors[0]), r"grad_y must have shape \(2, 3, 5\), got"),
        ("channel_affine_backward", (x, x.bfloat16(), x, vectors[0]), "grad_total must be Float, got BFloat16"),
        ("channel_affine_backward", (x, None, x, noise(3, 3)), r"scale must have 1 or 2 rows, got shape"),
    ]  # fmt: skip
    for name, arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            getattr(OPS, name)(*arguments)
