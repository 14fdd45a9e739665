"""conv_weight_gradient: oracles, each level against the definition, layouts, threads, messages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spkfast.reference import Precision
from spkfast.reference.tdnn_layer import as_multiplied, frames_at, output_type
from spkfast.reference.tdnn_training import conv_weight_gradient
from tests.ops.pooling import LAYOUTS, channels_last, cut_out
from tests.ops.products import LEVELS, assert_near_definition, at_level, noise, threads, whole

CODES: dict[Precision, int] = {"fp32": 0, "bf16": 1}
# C_i, N, K, B, T, dilation: on either side of a vector, a tile, a panel; frames that leave half a step of two; taps
# that reach further than the frames do.
SIZES = [
    ((1,), 1, 1, 1, 1, 1),
    ((3,), 2, 3, 3, 1, 2),
    ((5,), 17, 3, 1, 13, 2),
    ((7,), 33, 5, 2, 6, 3),
    ((64,), 64, 3, 2, 33, 4),
    ((6, 12), 65, 1, 3, 16, 1),
    ((31, 1, 0, 35), 130, 3, 2, 21, 3),
    ((8,) * 5, 16, 5, 5, 2, 4),
]


def run(x: Sequence[Tensor], grad: Tensor, taps: int, dilation: int, reflect: bool, precision: Precision) -> Tensor:
    return torch.ops.spkfast.conv_weight_gradient(list(x), grad, [taps, dilation, int(reflect), CODES[precision]])


def definition(x: Sequence[Tensor], grad: Tensor, *options: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    names = ("taps", "dilation", "reflect", "precision")
    wide = [value.to(dtype) for value in (*x, grad)]
    return conv_weight_gradient(wide[:-1], wide[-1], **dict(zip(names, options, strict=True)))


def bound(x: Sequence[Tensor], grad: Tensor, taps: int, dilation: int, reflect: bool, precision: Precision) -> Tensor:
    """What rounding may do to a sum: each product and each addition once, and those of two parts and of a block."""
    sizes = [as_multiplied(value.double(), precision, None).abs() for value in (*x, grad)]
    terms = grad.shape[0] * grad.shape[2] + 4
    return 2 * terms * 2.0**-24 * definition(sizes[:-1], sizes[-1], taps, dilation, reflect, "fp32")


def assert_within(got: Tensor, x: Sequence[Tensor], grad: Tensor, *options: Any) -> None:
    assert got.dtype == torch.float32 and got.is_contiguous()
    error = (got - definition(x, grad, *options)).abs()
    assert (error <= bound(x, grad, *options)).all(), f"error {float(error.amax()):.3g}"


# The definition


def test_values_by_hand() -> None:
    x, grad = torch.tensor([[[1.0, 2.0, 4.0]]]), torch.tensor([[[1.0, 10.0, 100.0]]])
    for precision in CODES:
        assert run([x], grad, 1, 1, False, precision).tolist() == [[[421.0]]]
        assert run([x], grad, 3, 1, False, precision).tolist() == [[[210.0, 421.0, 42.0]]]
        assert run([x], grad, 3, 1, True, precision).tolist() == [[[212.0, 421.0, 242.0]]]
        assert run([x], grad, 3, 2, False, precision).tolist() == [[[100.0, 421.0, 4.0]]]
    # Operands of two bytes are rounded: 1 + 2**-8 + 2**-9 to 1 + 2**-7.
    x = torch.tensor([[[1.0 + 2.0**-8 + 2.0**-9]]])
    assert run([x], torch.ones(1, 1, 1), 1, 1, False, "bf16").tolist() == [[[1.0078125]]]
    assert run([torch.ones(1, 1, 1)], x, 1, 1, False, "bf16").tolist() == [[[1.0078125]]]


@pytest.mark.parametrize("reflect", [False, True])
@pytest.mark.parametrize(("taps", "dilation"), [(1, 1), (3, 1), (3, 4), (5, 2)])
def test_definition_is_the_gradient_of_the_convolution(taps: int, dilation: int, reflect: bool) -> None:
    x, grad = noise(3, 5, 20).double(), noise(3, 7, 20, seed=1).double()
    weight = noise(7, 5, taps).double().requires_grad_()
    shifts = [(tap - taps // 2) * dilation for tap in range(taps)]
    inputs = torch.cat([frames_at(x, shift, None, reflect) for shift in shifts], dim=1)
    out = F.conv1d(inputs, weight.transpose(1, 2).reshape(7, -1, 1))
    (want,) = torch.autograd.grad(out, weight, grad)
    torch.testing.assert_close(definition([x[:, :2], x[:, 2:]], grad, taps, dilation, reflect, "fp32"), want)
    if not reflect:
        (want,) = torch.autograd.grad(F.conv1d(x, weight, padding="same", dilation=dilation), weight, grad)
        torch.testing.assert_close(definition([x], grad, taps, dilation, reflect, "fp32"), want)


# Every level and precision


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("precision", CODES)
@pytest.mark.parametrize("level", LEVELS)
def test_every_level_matches_the_definition(
    monkeypatch: pytest.MonkeyPatch, level: str, precision: Precision, size: tuple[Any, ...]
) -> None:
    at_level(monkeypatch, level)
    parts, outputs, taps, batch, frames, dilation = size
    for x_type, reflect in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False)):
        x = [channels_last(noise(batch, channels, frames, seed=k)).to(x_type) for k, channels in enumerate(parts)]
        grad = channels_last(noise(batch, outputs, frames, seed=99)).to(output_type(torch.float32, precision))
        got = run(x, grad, taps, dilation, reflect, precision)
        assert got.shape == (outputs, sum(parts), taps)
        assert_within(got, x, grad, taps, dilation, reflect, precision)


# B, T: one block of time and several, whose ends lie within rows, and parts of the time; many short rows.
@pytest.mark.parametrize("shape", [(1, 3), (3, 131), (1, 2001), (7, 333), (801, 2), (1100, 1)], ids=str)
@pytest.mark.parametrize("precision", CODES)
@pytest.mark.parametrize("level", LEVELS)
def test_every_level_is_exact_where_nothing_rounds(
    monkeypatch: pytest.MonkeyPatch, level: str, precision: Precision, shape: tuple[int, int]
) -> None:
    at_level(monkeypatch, level)
    batch, frames = shape
    for dtype in (torch.float32, torch.bfloat16):
        x = [channels_last(whole(batch, channels, frames, seed=channels)).to(dtype) for channels in (9, 20)]
        grad = channels_last(whole(batch, 70, frames, seed=1)).to(dtype)
        for taps, dilation, reflect in ((1, 1, False), (3, 3, True), (5, 2, False)):
            got = run(x, grad, taps, dilation, reflect, precision)
            assert torch.equal(got.double(), definition(x, grad, taps, dilation, reflect, precision))


@pytest.mark.parametrize("inputs", [257, 259, 600])
@pytest.mark.parametrize("precision", CODES)
def test_blocks_of_channels(precision: Precision, inputs: int) -> None:
    x, grad = whole(2, inputs, 11), whole(2, 5, 11, seed=1)
    x = channels_last(x)
    parts = [x[:, :100], x[:, 100:258], x[:, 258:]]  # beside one another in memory, the last one perhaps empty
    assert torch.equal(run(parts, grad, 3, 2, True, precision).double(), definition([x], grad, 3, 2, True, precision))


@pytest.mark.parametrize("shape", [(512, 512, 1), (64, 64, 3), (80, 130, 5)], ids=str)
def test_matches_reference(shape: tuple[int, int, int]) -> None:
    inputs, outputs, taps = shape
    x, grad = channels_last(noise(8, inputs, 120)), channels_last(noise(8, outputs, 120, seed=1))
    got = run([x], grad, taps, 2, False, "fp32")
    assert_near_definition(got, lambda dtype: definition([x], grad, taps, 2, False, "fp32", dtype=dtype))


# Layouts, threads, memory


@pytest.mark.parametrize("precision", CODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout: str, precision: Precision) -> None:
    # A slice lies among NaN.
    for dtype in (torch.float32, torch.bfloat16):
        x, grad = (noise(3, channels, 21, seed=channels).to(dtype) for channels in (17, 19))
        want = run([x], grad, 3, 2, True, precision)
        assert torch.equal(run([LAYOUTS[layout](x)], LAYOUTS[layout](grad), 3, 2, True, precision), want)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_expanded(dim: int) -> None:
    x, grad = (noise(3, 5, 9, seed=seed).narrow(dim, 0, 1).expand(3, 5, 9) for seed in (0, 1))
    want = run([x.contiguous()], grad.contiguous(), 3, 1, False, "fp32")
    assert torch.equal(run([x], grad, 3, 1, False, "fp32"), want)


@pytest.mark.parametrize("precision", CODES)
@pytest.mark.parametrize("level", LEVELS)
def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch, level: str, precision: Precision) -> None:
    at_level(monkeypatch, level)
    # Enough frames for both parts of the time, panels and inputs that 5 threads share.
    for batch, frames in ((7, 230), (3, 90)):
        x, grad = channels_last(noise(batch, 40, frames)), channels_last(noise(batch, 70, frames, seed=1))
        found = [run([x[:, :13], x[:, 13:]], grad, 3, 3, True, precision) for _ in threads(1, 2, 3, 5)]
        for other in found[1:]:
            assert torch.equal(other, found[0])


@pytest.mark.parametrize("precision", CODES)
@pytest.mark.parametrize("level", LEVELS)
def test_nan_stays_with_its_channel(monkeypatch: pytest.MonkeyPatch, level: str, precision: Precision) -> None:
    at_level(monkeypatch, level)
    x, grad = channels_last(noise(2, 20, 11)), channels_last(noise(2, 30, 11, seed=1))
    clean = run([x], grad, 3, 2, False, precision)
    for value, channel, at in ((x, 7, (slice(None), 7)), (grad, 5, (5,))):
        dirty = value.clone()
        dirty[1, channel, 4] = math.nan
        got = run([dirty if value is x else x], dirty if value is grad else grad, 3, 2, False, precision)
        assert got[at].isnan().any()
        got[at] = clean[at]
        assert torch.equal(got, clean)


@pytest.mark.parametrize("precision", CODES)
def test_nothing_is_left_of_an_earlier_call(precision: Precision) -> None:
    # Odd frames: a last step of two has room for one that does not exist.
    x, grad = cut_out(channels_last(noise(2, 5, 41))), noise(2, 7, 41, seed=1)
    want = run([x], grad, 3, 2, False, precision)
    run([torch.full((3, 9, 900), math.nan)], torch.full((3, 70, 900), math.nan), 5, 3, True, precision)
    assert torch.equal(run([x], grad, 3, 2, False, precision), want)


@pytest.mark.parametrize("precision", CODES)
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 4, 0), (2, 0, 4, 5), (2, 3, 0, 5)], ids=str)
def test_empty(shape: tuple[int, int, int, int], precision: Precision) -> None:
    batch, inputs, outputs, frames = shape
    got = run([noise(batch, inputs, frames)], noise(batch, outputs, frames), 3, 1, True, precision)
    assert got.shape == (outputs, inputs, 3) and (got == 0).all()


# Messages


def test_messages() -> None:
    x, grad, kernel = noise(2, 3, 5), noise(2, 4, 5), torch.ops.spkfast.conv_weight_gradient
    for inputs, outer, integers, message in (
        ([], grad, [3, 1, 0, 0], "x must have at least one tensor"),
        ([x], grad, [3, 1, 0], "conv_weight_gradient takes 4 integers, got 3"),
        ([x], grad, [2, 1, 0, 0], "taps must be odd, got 2"),
        ([x], grad, [3, 0, 0, 0], "dilation must be at least 1, got 0"),
        ([x], grad, [3, 1, 0, 2], "precision must be 0 or 1, got 2"),
        ([x], grad[0], [3, 1, 0, 0], r"grad must have shape \(any, any, any\), got \(4, 5\)"),
        ([x, x[..., :4]], grad, [3, 1, 0, 0], r"x must have shape \(2, any, 5\), got \(2, 3, 4\)"),
        ([x[:1]], grad, [3, 1, 0, 0], r"x must have shape \(2, any, 5\), got \(1, 3, 5\)"),
        ([x, x.bfloat16()], grad, [3, 1, 0, 0], "x must be Float, got BFloat16"),
        ([x.double()], grad, [3, 1, 0, 0], "x must be Float or BFloat16, got Double"),
        ([x], grad.half(), [3, 1, 0, 0], "grad must be Float or BFloat16, got Half"),
    ):
        with pytest.raises(ValueError, match=message):
            kernel(inputs, outer, integers)
