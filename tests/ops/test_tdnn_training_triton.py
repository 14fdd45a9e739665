"""Triton kernels of training TDNN layers, on a GPU or interpreted: each against its definition in float64."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from spkfast.reference import Precision
from spkfast.reference import tdnn_training as reference
from spkfast.reference.tdnn_layer import frames_at
from tests.fuzz.bounds_products import UNIT
from tests.ops.pooling import LAYOUTS, channels_last, cut_out
from tests.ops.products import assert_near, assert_near_definition, noise

pytest.importorskip("triton")
from spkfast.kernels.triton import tdnn_training as module

# NaN beside what a kernel may read, and infinite or undefined moments of it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

PRECISIONS: dict[Precision, int] = {"fp32": 0, "bf16": 1, "fp16": 3}
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Roundings of a product of float32 numbers in parts that tensor cores take, beyond those of its sum.
SPLIT = 8
# With the programs to aim for: rows are one span or several.
FORMS: list[tuple[Precision, int]] = [("fp32", 1), ("fp32", 512), ("bf16", 512), ("fp16", 6)]
# N, C, K, T
SIZES = [(1, 1, 1, 1), (3, 2, 5, 1), (35, 33, 3, 13), (72, 136, 1, 40), (64, 16, 3, 70)]


def multiplied(value: Tensor, precision: Precision) -> Tensor:
    """What a product sees, in float64."""
    return value.to(TYPES[precision]).double()


def moved(values: Any, device: torch.device) -> Any:
    """Tensors on a device, laid out as they were."""
    if isinstance(values, Tensor):
        return values.to(device)
    return [moved(value, device) for value in values] if isinstance(values, (list, tuple)) else values


def copied(values: Any) -> Any:
    """Tensors apart from the larger ones that they are slices of."""
    if isinstance(values, Tensor):
        return values.clone()
    return [copied(value) for value in values] if isinstance(values, list) else values


def run(name: str, *args: Any, device: torch.device) -> Any:
    """Calls a function of the module; results on the CPU."""
    found = getattr(module, name)(*moved(args, device))
    return found.cpu() if isinstance(found, Tensor) else tuple(value.cpu() for value in found)


def run_conv(
    x: Sequence[Tensor], weight: Tensor, bias: Tensor | None, precision: Precision, device: torch.device, *,
    dilation: int = 1, reflect: bool = False, moments: bool = True, relu: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    integers = [PRECISIONS[precision], dilation, int(reflect), int(moments), int(relu), 0]
    y, mean, var = run("conv_relu", list(x), weight, bias, integers, device=device)
    return y, mean, var


def check_conv(
    x: Sequence[Tensor], weight: Tensor, bias: Tensor | None, precision: Precision, y: Tensor, **options: Any
) -> None:
    values, matrix = [multiplied(part, precision) for part in x], multiplied(weight, precision)
    offset = None if bias is None else bias.double()
    exact: dict[str, Any] = {"dilation": 1, "reflect": False, "precision": "fp32"} | options
    want = reference.conv_relu(values, matrix, offset, **exact)[0]
    absolute = [part.abs() for part in values], matrix.abs(), None if offset is None else offset.abs()
    size = reference.conv_relu(*absolute, **exact)[0]
    assert y.dtype == TYPES[precision] and y.stride(1) == 1
    assert_near(y, want, size, weight[0].numel() + SPLIT)


# conv_relu


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_conv_matches_the_definition(precision: Precision, size: tuple[int, ...], device: torch.device) -> None:
    outputs, channels, taps, frames = size
    weight, bias = noise(outputs, channels, taps, seed=1), noise(outputs, seed=2)
    for dtype, reflect in ((torch.float32, False), (TYPES[precision], True)):
        x = channels_last(noise(2, channels, frames).to(dtype))
        options: dict[str, Any] = {"dilation": 2, "reflect": reflect}
        given = bias if reflect else None
        y, mean, var = run_conv([x], weight, given, precision, device, **options)
        check_conv([x], weight, given, precision, y, **options)
        assert mean.dtype == var.dtype == torch.float32
        assert_near_definition(mean, lambda dtype, y=y: y.to(dtype).mean(dim=2))
        assert_near_definition(var, lambda dtype, y=y: y.to(dtype).var(dim=2, unbiased=False))


@pytest.mark.parametrize("parts", range(1, 9))
@pytest.mark.parametrize("taps", [1, 3])
def test_inputs_are_taken_one_after_the_other(taps: int, parts: int, device: torch.device) -> None:
    sizes = [5, 8, 1, 3, 16, 2, 7, 4][:parts]
    weight, grad = noise(11, sum(sizes), taps, seed=1), noise(2, 11, 9, seed=3)
    x = noise(2, sum(sizes), 9).split(sizes, dim=1)
    given = [cut_out(part.transpose(1, 2).to(device)).transpose(1, 2) for part in x]
    check_conv(x, weight, None, "fp32", run_conv(given, weight, None, "fp32", device, dilation=2)[0], dilation=2)
    got = run("conv_weight_gradient", given, grad, [taps, 2, 0, 0], device=device)
    check_weight_gradient(x, grad, "fp32", got, taps=taps, dilation=2, reflect=False)


def test_moments_may_be_left_out(device: torch.device) -> None:
    x, weight = noise(2, 5, 9), noise(7, 5, 3, seed=1)
    y, *moments = run_conv([x], weight, None, "bf16", device, moments=False)
    assert torch.equal(y, run_conv([x], weight, None, "bf16", device)[0])
    assert [value.shape for value in moments] == [(0, 7)] * 2


def test_variance_keeps_its_digits_beside_a_large_mean(device: torch.device) -> None:
    x, weight = noise(2, 4, 300), noise(6, 4, 1, seed=1)
    y, mean, var = run_conv([x], weight, torch.full((6,), 3000.0), "fp32", device)
    want = y.double().var(dim=2, unbiased=False)
    torch.testing.assert_close(mean, y.double().mean(dim=2).float(), rtol=1e-6, atol=0)
    # Off by what the means of tiles, rounded, differ from those: of squares it would be off by UNIT * mean**2.
    assert ((var - want).abs() <= 4 * UNIT * mean * want.sqrt()).all()


def test_relu_keeps_nan(device: torch.device) -> None:
    x = torch.tensor([[[float("nan"), -1.0, 2.0]]])
    y, mean, var = run_conv([x], torch.ones(1, 1, 1), None, "fp32", device)
    assert y[0, 0, 0].isnan() and y[0, 0, 1:].tolist() == [0.0, 2.0] and mean.isnan().all() and var.isnan().all()


# conv_relu_backward


@pytest.mark.parametrize(("precision", "programs"), FORMS)
def test_relu_gradient_matches_the_definition(
    programs: int, precision: Precision, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(module, "_PROGRAMS", programs)
    for channels, frames in ((1, 1), (5, 70), (72, 8)):
        y = channels_last(noise(2, channels, frames).relu().to(TYPES[precision]))
        mean = y.double().mean(dim=2).float()
        given = channels_last(noise(2, channels, frames, seed=1).to(y.dtype)), *noise(2, 2, channels, seed=2)
        for chosen in itertools.product((True, False), repeat=3):
            grads = [value if taken else None for value, taken in zip(given, chosen, strict=True)]
            grad, grad_bias = run("conv_relu_backward", *grads, y, mean, device=device)
            exact: Any = [None if value is None else value.double() for value in grads]
            want = reference.conv_relu_backward(*exact, y.double(), mean.double())[0]
            size = (given[0].double().abs() * chosen[0]) + (given[1].double().abs() * chosen[1])[..., None] / frames
            spread = y.double() + mean.double()[..., None]
            size += 2 / frames * (given[2].double().abs() * chosen[2])[..., None] * spread
            assert grad.dtype == y.dtype and grad.stride(1) == 1 and grad_bias.dtype == torch.float32
            assert_near(grad, want, size, 8)
            assert_near(grad_bias, grad.double().sum(dim=2), grad.double().abs().sum(dim=2), frames)


def test_relu_gradient_without_moments(device: torch.device) -> None:
    y, grad_y = noise(2, 5, 9).relu(), noise(2, 5, 9, seed=1)
    grad, grad_bias = run("conv_relu_backward", grad_y, None, None, y, torch.empty(0, 5), device=device)
    assert torch.equal(grad, torch.where(y > 0, grad_y, 0))
    torch.testing.assert_close(grad_bias, grad.sum(dim=2))


# conv_input_gradient and conv_weight_gradient


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_input_gradient_matches_the_definition(
    precision: Precision, size: tuple[int, ...], device: torch.device
) -> None:
    outputs, channels, taps, frames = size
    weight = noise(outputs, channels, taps, seed=1)
    for dtype, dilation in ((torch.float32, 1), (TYPES[precision], 3)):
        grad = channels_last(noise(2, outputs, frames).to(dtype))
        got = run("conv_input_gradient", grad, weight, [PRECISIONS[precision], dilation], device=device)
        slope, matrix = multiplied(grad, precision), multiplied(weight, precision)
        want, bound = (
            reference.conv_input_gradient(*operands, dilation=dilation, precision="fp32")
            for operands in ((slope, matrix), (slope.abs(), matrix.abs()))
        )
        assert got.dtype == TYPES[precision] and got.stride(1) == 1
        assert_near(got, want, bound, outputs * taps + SPLIT)


def check_weight_gradient(x: Sequence[Tensor], grad: Tensor, precision: Precision, got: Tensor, **options: Any) -> None:
    values, slope = [multiplied(part, precision) for part in x], multiplied(grad, precision)
    want = reference.conv_weight_gradient(values, slope, precision="fp32", **options)
    size = reference.conv_weight_gradient([part.abs() for part in values], slope.abs(), precision="fp32", **options)
    assert got.dtype == torch.float32 and got.is_contiguous()
    assert_near(got, want, size, grad.shape[0] * grad.shape[2] + SPLIT)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("reflect", [False, True])
def test_weight_gradient_matches_the_definition(
    reflect: bool, precision: Precision, size: tuple[int, ...], device: torch.device
) -> None:
    outputs, channels, taps, frames = size
    for dtype, dilation in ((torch.float32, 1), (TYPES[precision], 3)):
        x, grad = channels_last(noise(2, channels, frames).to(dtype)), channels_last(noise(2, outputs, frames, seed=1))
        grad = grad.to(TYPES[precision])
        integers = [taps, dilation, int(reflect), PRECISIONS[precision]]
        got = run("conv_weight_gradient", [x], grad, integers, device=device)
        check_weight_gradient([x], grad, precision, got, taps=taps, dilation=dilation, reflect=reflect)


def test_weight_gradient_is_float32_under_autocast(device: torch.device) -> None:
    x, grad = noise(2, 5, 9), noise(2, 7, 9, seed=1)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = run("conv_weight_gradient", [x], grad, [3, 1, 0, 0], device=device)
    check_weight_gradient([x], grad, "fp32", got, taps=3, dilation=1, reflect=False)


@pytest.mark.parametrize("frames", [1, 2, 3, 7, 40])
def test_frames_beyond_both_ends(frames: int, device: torch.device) -> None:
    # Further out than the row is long: mirrored again and again.
    x = noise(2, 9, frames)
    for reflect in (False, True):
        got = module._taps(channels_last(x).to(device), 5, 4, reflect, torch.float32)
        want = torch.stack([frames_at(x, (tap - 2) * 4, None, reflect) for tap in range(5)])  # [K, B, C, T]
        assert torch.equal(got.cpu(), want.permute(1, 3, 0, 2).reshape(2 * frames, -1))


# channel_affine


@pytest.mark.parametrize(("precision", "programs"), FORMS)
@pytest.mark.parametrize("rows", [1, 3])
def test_affine_matches_the_definition(
    programs: int, rows: int, precision: Precision, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(module, "_PROGRAMS", programs)
    for channels, frames in ((1, 1), (5, 70), (72, 8)):
        x, added = channels_last(noise(2, 3, channels, frames).to(TYPES[precision]).flatten(0, 1)).split(3)
        scale, shift = noise(rows, channels, seed=1), noise(rows, channels, seed=2)
        exact = [value.double() for value in (x, scale, shift, added)]
        want, size = reference.channel_affine(*exact), reference.channel_affine(*(value.abs() for value in exact))
        for plain, given in itertools.product((True, False), (added, None)):
            got = run("channel_affine", x, scale, shift, given, plain, device=device)
            for k, computed in enumerate((plain, given is not None)):
                assert got[k].dtype == x.dtype
                if computed:
                    assert got[k].stride(1) == 1
                    assert_near(got[k], want[k], size[k], 3)
                else:
                    assert got[k].shape == (0,)


@pytest.mark.parametrize(("precision", "programs"), FORMS)
@pytest.mark.parametrize("rows", [1, 3])
def test_affine_gradient_matches_the_definition(
    programs: int, rows: int, precision: Precision, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(module, "_PROGRAMS", programs)
    for channels, frames in ((1, 1), (5, 70), (72, 8)):
        values = noise(3, 3, channels, frames).to(TYPES[precision])
        x, *grads = (channels_last(value) for value in values)
        scale = noise(rows, channels, seed=1)
        for chosen in itertools.product((True, False), repeat=2):
            given = [value if taken else None for value, taken in zip(grads, chosen, strict=True)]
            exact: Any = [None if value is None else value.double() for value in given]
            want = reference.channel_affine_backward(*exact, x.double(), scale.double())
            sizes: Any = [None if value is None else value.abs() for value in exact]
            size = reference.channel_affine_backward(*sizes, x.double().abs(), scale.double().abs())
            got = run("channel_affine_backward", *given, x, scale, device=device)
            assert [value.dtype for value in got] == [x.dtype, torch.float32, torch.float32] and got[0].stride(1) == 1
            for k in range(3):
                assert_near(got[k], want[k], size[k], 3 if k == 0 else frames + 3)


# All of them


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_changes_no_bit(layout: str, device: torch.device) -> None:
    def laid_out(name: str) -> list[Any]:
        place, (x, y, grad) = LAYOUTS[name], noise(3, 2, 5, 9).to(device)
        weight, vectors = noise(7, 5, 3, seed=1), noise(2, 2, 5, seed=2)
        y = y.relu()
        return [
            *run_conv([place(x), place(y)], torch.cat([weight, weight], dim=1), None, "fp32", device, reflect=True),
            *run("conv_relu_backward", place(grad), *vectors, place(y), y.mean(dim=2), device=device),
            run("conv_input_gradient", place(grad), weight.transpose(0, 1).contiguous(), [0, 2], device=device),
            run("conv_weight_gradient", [place(x), place(y)], place(grad), [3, 2, 0, 0], device=device),
            run("conv_weight_gradient", [place(x)], place(grad), [1, 1, 0, 1], device=device),
            *run("channel_affine", place(x), *vectors, place(y), True, device=device),
            *run("channel_affine_backward", place(grad), place(y), place(x), vectors[0], device=device),
        ]  # fmt: skip

    for got, want in zip(laid_out(layout), laid_out("channels last"), strict=True):
        assert torch.equal(got, want)


def test_groups_of_channels_are_read_where_they_lie(device: torch.device) -> None:
    # As Res2Net has them: frames of all channels, of which a group is taken, with loads of 16 bytes.
    whole = channels_last(noise(2, 48, 40).bfloat16()).to(device)
    x, grad = whole[:, 16:32], whole[:, 32:]
    weight = noise(16, 16, 3, seed=1)
    assert module.unit_of([x, grad]) == 8
    for function, args in (
        ("conv_relu", ([x], weight, None, [1, 2, 0, 1, 1, 0])),
        ("conv_relu_backward", (grad, None, None, x, torch.empty(0, 16))),
        ("conv_input_gradient", (grad, weight, [1, 2])),
        ("conv_weight_gradient", ([x], grad, [3, 2, 1, 1])),
        ("channel_affine", (x, weight[:1, :, 0], weight[1:2, :, 0], grad, True)),
        ("channel_affine_backward", (grad, None, x, weight[:1, :, 0])),
    ):
        got = run(function, *args, device=device)
        want = run(function, *(copied(value) for value in args), device=device)
        # What cuBLAS adds up in which order may depend on how far frames are apart.
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 5, 9), (2, 5, 0)], ids=str)
def test_nothing_in_gives_nothing_or_zero(shape: tuple[int, ...], device: torch.device) -> None:
    x, weight, vectors = noise(*shape), noise(5, 5, 3), noise(2, 1, 5)
    assert run_conv([x], weight, None, "fp32", device)[0].shape == shape
    assert run("conv_input_gradient", x, weight, [1, 1], device=device).shape == shape
    assert not run("conv_weight_gradient", [x], x, [3, 1, 1, 1], device=device).any()
    assert run("channel_affine", x, *vectors, x, True, device=device)[1].shape == shape
    for found in (
        run("conv_relu_backward", x, None, None, x, torch.empty(0, 5), device=device),
        run("channel_affine_backward", x, x, x, vectors[0], device=device),
    ):
        assert found[0].shape == shape
        assert all(value.shape == shape[:2] and not value.any() for value in found[1:])


def test_gradients_are_those_of_autograd(device: torch.device) -> None:
    leaves = [value.double().requires_grad_() for value in (noise(2, 6, 20), noise(8, 6, 3, seed=1), noise(8, seed=2))]
    y = torch.conv1d(leaves[0], leaves[1], leaves[2], padding=2, dilation=2).relu()
    var, mean = torch.var_mean(y, dim=2, unbiased=False)
    slopes = noise(2, 8, 20, seed=3), *noise(2, 2, 8, seed=4)
    want = torch.autograd.grad((y, mean, var), leaves, [slope.double() for slope in slopes])
    x, weight, bias = (leaf.detach().float() for leaf in leaves)
    out, out_mean, _ = run_conv([x], weight, bias, "fp32", device, dilation=2)
    grad, grad_bias = run("conv_relu_backward", *slopes, out, out_mean, device=device)
    got = (
        run("conv_input_gradient", grad, weight, [0, 2], device=device),
        run("conv_weight_gradient", [x], grad, [3, 2, 0, 0], device=device),
        grad_bias.sum(dim=0),
    )
    for ours, exact in zip(got, want, strict=True):
        torch.testing.assert_close(ours, exact.float(), rtol=1e-5, atol=2e-5)
