"""What the tests of tdnn_layer and se_res2net_block share: weights, numbers that no precision rounds, levels."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spkfast
from spkfast.reference import Precision, SERes2NetParams, TdnnParams
from tests.fuzz.bounds_products import UNIT
from tests.parity import FACTOR

LEVELS = ("scalar", "avx2", "avx512", "avx512bf16")
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "int8")
Range = tuple[float, float]
# Steps of 1/16, 0 at byte 128.
EXACT_RANGE: Range = (-8.0, 127 / 16)
NOISE: Range = (-4.0, 4.0)


def at_level(monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    """Has the kernels run at an instruction level, or skips where this CPU is below."""
    monkeypatch.delenv("SPKFAST_CPU_LEVEL", raising=False)
    highest = spkfast.info()["cpu"]["level"]
    if LEVELS.index(level) > LEVELS.index(highest):
        pytest.skip(f"this CPU has {highest}")
    monkeypatch.setenv("SPKFAST_CPU_LEVEL", level)


def skip_interpreted(backend: str, device: torch.device) -> None:
    if backend == "triton" and device.type == "cpu":
        pytest.skip("tests/ops/test_products_triton.py has Triton interpreted")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def noisy_layer(outputs: int, inputs: int, taps: int, seed: int = 1) -> TdnnParams:
    """Weights like those of a trained layer."""
    weight, *vectors = (
        noise(*shape, seed=seed + k) for k, shape in enumerate(((outputs, inputs, taps), *3 * [(outputs,)]))
    )
    return TdnnParams(weight / (inputs * taps) ** 0.5, 0.3 * vectors[0], 1 + 0.3 * vectors[1], 0.3 * vectors[2])


def dense_layer(outputs: int, inputs: int, seed: int) -> TdnnParams:
    return noisy_layer(outputs, inputs, 1, seed)._replace(scale=None, shift=None)


def noisy_block(
    inputs: int, width: int, groups: int, taps: int = 3, units: int = 6, *, se_bn: bool = False, seed: int = 1
) -> SERes2NetParams:
    channels, seeds = width * groups, itertools.count(seed, 10)
    squeeze = noisy_layer(units, channels, 1, next(seeds))
    return SERes2NetParams(
        noisy_layer(channels, inputs, 1, next(seeds)),
        [noisy_layer(width, width, taps, next(seeds)) for _ in range(groups - 1)],
        noisy_layer(channels, channels, 1, next(seeds)),
        squeeze if se_bn else squeeze._replace(scale=None, shift=None),
        dense_layer(channels, units, next(seeds)),
        None if inputs == channels else dense_layer(channels, inputs, next(seeds)),
    )


def whole(*shape: int, most: int = 3, seed: int = 0) -> Tensor:
    """Whole numbers up to ``most``."""
    return torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


def exact_layer(precision: Precision, outputs: int, inputs: int, taps: int, seed: int = 1) -> TdnnParams:
    """Weights with which no sum is rounded, at inputs of few bits: only operands are, and those by rule.

    Each output has two weights of 1 or -1. For ``int8`` all weights are 128ths, 127 of them the largest.
    """
    generator = torch.Generator().manual_seed(seed)
    if precision == "int8":
        weight = torch.randint(-127, 128, (outputs, inputs, taps), generator=generator).float()
        weight[:, 0, 0] = 127 * (weight[:, 0, 0].sign() + 0.5).sign()
        weight /= 128
    else:
        weight = torch.zeros(outputs, inputs * taps)
        for row in weight:
            chosen = torch.randperm(inputs * taps, generator=generator)[:2]
            row[chosen] = torch.randint(0, 2, chosen.shape, generator=generator).float() * 2 - 1
        weight = weight.reshape(outputs, inputs, taps)
    bias, shift = whole(outputs, most=2, seed=seed + 1), whole(outputs, most=1, seed=seed + 2)
    return TdnnParams(weight, bias, whole(outputs, most=1, seed=seed + 3).sign().add(0.5).sign(), shift)


def exact_block(
    precision: Precision, inputs: int, width: int, groups: int, taps: int, seed: int = 1
) -> SERes2NetParams:
    """As :func:`exact_layer`; the squeeze-and-excitation takes the half of every channel."""
    channels, seeds = width * groups, itertools.count(seed, 10)
    shortcut = None
    if inputs != channels:
        shortcut = exact_layer(precision, channels, inputs, 1, next(seeds))._replace(scale=None, shift=None)
    return SERes2NetParams(
        exact_layer(precision, channels, inputs, 1, next(seeds)),
        [exact_layer(precision, width, width, taps, next(seeds)) for _ in range(groups - 1)],
        exact_layer(precision, channels, channels, 1, next(seeds)),
        dense_layer(3, channels, next(seeds)),
        TdnnParams(torch.zeros(channels, 3, 1)),
        shortcut,
    )


def block_ranges(groups: int, value: Range) -> dict[str, Range]:
    """Ranges of one size, whose zeros lie at other bytes."""
    names = ("in", "out", *(f"res.{j}" for j in range(groups - 1)))
    return {name: (value[0] + 0.5 * k, value[1] + 0.5 * k) for k, name in enumerate(names)}


def mapped(params: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Weights of a layer or a block after ``function``."""
    if params is None or isinstance(params, Tensor):
        return params if params is None else function(params)
    values = [mapped(value, function) for value in params]
    return values if isinstance(params, list) else type(params)(*values)


def folded(convolution: Any, norm: Any) -> TdnnParams:
    """The weights of modules in evaluation."""
    weight = convolution.weight if convolution.weight.ndim == 3 else convolution.weight[..., None]
    if norm is None:
        return TdnnParams(weight, convolution.bias)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return TdnnParams(weight, convolution.bias, scale, norm.bias - norm.running_mean * scale)


def trained(module: Any) -> Any:
    """The module in evaluation and float64, its batch norms with statistics of their own."""
    generator = torch.Generator().manual_seed(3)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d):
            assert part.running_var is not None and part.running_mean is not None
            part.running_mean.copy_(torch.randn(part.num_features, generator=generator))
            part.running_var.copy_(torch.rand(part.num_features, generator=generator) + 0.5)
            for value in (part.weight, part.bias):
                nn.init.normal_(value, generator=generator)
    return module.double().eval()


def assert_near_definition(got: Tensor, definition: Callable[[torch.dtype], Tensor]) -> None:
    """Allows a small multiple of the error that the definition itself makes in float32, as ``assert_parity`` does."""
    want, plain = definition(torch.float64).cpu(), definition(torch.float32).cpu().double()
    rounding = torch.finfo(torch.float32).eps * want.abs().amax()
    allowed = FACTOR * max(float(rounding), float((plain - want).abs().amax()))
    error = float((got.cpu().double() - want).abs().amax())
    assert error <= allowed, f"error {error:.3g} exceeds {allowed:.3g}"


def threads(*counts: int) -> Iterator[int]:
    """Each number of threads in turn, and the one before at last."""
    before = torch.get_num_threads()
    try:
        for count in counts:
            torch.set_num_threads(count)
            yield count
    finally:
        torch.set_num_threads(before)


def assert_near(got: Tensor, want: Tensor, size: Tensor, terms: int) -> None:
    """Allows what float32 sums of so many terms may lose, and half a unit in the last place of the type it is in.

    Args:
        got: What a kernel gave.
        want: The same in float64.
        size: The same of absolute values, which nothing cancels.
        terms: How many numbers are added, with what is done to them before and after.
    """
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    limits = torch.finfo(got.dtype)
    error = (got.double() - want).abs()
    carried = 1.01 * UNIT * terms * size
    allowed = carried + limits.eps / 2 * (want.abs() + carried) + limits.smallest_normal
    wrong = ~(error <= allowed)
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {wrong.numel()} values are wrong, up to {(error / allowed).max():.3g}"
    )
