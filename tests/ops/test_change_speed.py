"""change_speed: other resamplers, exact positions, pass and stop band, every kernel, registration, messages."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spkfast import InputError, ops, reference
from spkfast.backends import Backend
from spkfast.ops.change_speed import _tables
from spkfast.reference.change_speed import filters, half_width, ratio, source_samples
from tests.ops.augmentation import LEVELS, assert_near_definition, white

SPEEDS = (0.9, 1.0, 1.1, 0.95, 1.25, 0.5, 2.0, 0.937)
IMPLEMENTATIONS: tuple[Backend, ...] = ("reference", "native")
# What the docstring says of half the lower of the two rates: the pass band's end, and the error of either band.
PASSED, DECIBELS = 0.892, 80.0
WITHIN = 10 ** (-DECIBELS / 20)


def one(waveforms: Tensor, speed: float, num_samples: int, **options: Any) -> Tensor:
    """All rows at one speed."""
    which = torch.zeros(len(waveforms), dtype=torch.int64, device=waveforms.device)
    return ops.change_speed(waveforms, which, speeds=[speed], num_samples=num_samples, **options)


def outputs_of(samples: int, speed: float) -> int:
    """Outputs that so many samples give: those whose position is not past the last one."""
    return math.floor(Fraction(samples - 1) / ratio(speed)) + 1


def sines(speed: float, samples: int, part: float) -> tuple[Tensor, np.ndarray]:
    """Sines up to ``part`` of half the lower rate, and their angular frequencies a sample, float64."""
    half_rate = min(1.0, 1 / float(ratio(speed))) * math.pi
    omega = half_rate * part * np.array([0.003, 0.1, 0.37, 0.6, 0.83, 1.0])
    return torch.from_numpy(np.sin(np.outer(omega, np.arange(samples)) + 1.0)), omega


# Where outputs stand, and what passes


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
@pytest.mark.parametrize("speed", SPEEDS)
def test_a_sine_comes_out_at_its_exact_frequency_and_phase(speed: float, backend: Backend) -> None:
    x, omega = sines(speed, 3000, PASSED)
    context, count = 600, outputs_of(1800, speed)
    y = one(x.float() if backend == "native" else x, speed, count, context=context, backend=backend)
    want = np.sin(np.outer(omega, context + float(ratio(speed)) * np.arange(count)) + 1.0)
    # In float32 the sums of a few hundred weights, of which those that are not small are few, add as much as this.
    assert np.abs(y.numpy() - want).max() <= WITHIN + (2e-6 if backend == "native" else 0)


@pytest.mark.parametrize("speed", [1.1, 1.25, 2.0, 1.5, 10.0])
def test_what_would_fold_back_is_80_decibels_down(speed: float) -> None:
    half_rate = math.pi / float(ratio(speed))
    omega = half_rate + (math.pi - half_rate) * np.linspace(0, 1, 40)
    x = torch.from_numpy(np.exp(1j * np.outer(omega, np.arange(4000))))
    count = outputs_of(2000, speed)
    real, imaginary = (
        one(part.contiguous(), speed, count, context=1000, backend="reference") for part in (x.real, x.imag)
    )
    assert (real.square() + imaginary.square()).sqrt().max() <= WITHIN


@pytest.mark.parametrize("speed", [0.9, 0.95, 0.5, 0.937])
def test_images_above_the_old_rate_are_80_decibels_down(speed: float) -> None:
    p, q = ratio(speed).as_integer_ratio()
    half, size = half_width(speed), 256 * q
    x = torch.from_numpy(np.sin(0.85 * math.pi * np.arange(256 * p + 2 * half + 1)))[None]
    # This window's main lobe is 7 bins to each side, and all beside it far below.
    y = one(x, speed, size, context=half, backend="reference")[0].numpy() * np.kaiser(size, 20.0)
    spectrum = np.abs(np.fft.rfft(y))
    tone, old_half_rate = round(size / 2 * 0.85 * p / q), size // 2 * p // q
    assert spectrum[tone - 1 : tone + 2].max() == spectrum.max()
    assert 0 < spectrum[old_half_rate:].max() <= WITHIN * spectrum.max()


@pytest.mark.parametrize("speed", SPEEDS)
def test_a_constant_passes_unchanged(speed: float) -> None:
    y = one(torch.ones(1, 800, dtype=torch.float64), speed, outputs_of(400, speed), context=200, backend="reference")
    torch.testing.assert_close(y, torch.ones_like(y), rtol=0, atol=1e-14)


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
@pytest.mark.parametrize("speed", [s for s in SPEEDS if s != 1.0])
def test_an_impulse_gives_the_windowed_sinc_around_it(speed: float, backend: Backend) -> None:
    p, q = ratio(speed).as_integer_ratio()
    at, samples = 2 * p + 150, 4 * p + 300
    x = torch.zeros(1, samples)
    x[0, at] = 1
    y = one(x, speed, outputs_of(samples, speed), backend=backend)[0].numpy()
    # Kaiser's window around the sinc, said once more, from the positions of outputs alone.
    distance = np.array([float(Fraction(n * p, q) - at) for n in range(len(y))])
    band = min(1.0, q / p)
    beta, transition = 0.1102 * (82 - 8.7), (82 - 8) / (2.285 * 96) / math.pi
    u = distance * band / 48
    window = np.where(np.abs(u) < 1, np.i0(beta * np.sqrt(np.maximum(1 - u * u, 0))) / np.i0(beta), 0)
    want = np.sinc(distance * band * (1 - transition / 2)) * window * band * (1 - transition / 2)
    # The weights of each output are scaled to sum to one, which they miss by the ripple at a constant.
    np.testing.assert_allclose(y, want, rtol=0, atol=WITHIN * np.abs(want).max())
    assert (y[np.abs(distance) >= 48 / band] == 0).all()
    # Right to a sample: the largest output is the one nearest to the impulse.
    assert abs(distance[y.argmax()]) == np.abs(distance).min()


@pytest.mark.parametrize("speed", [s for s in SPEEDS if s != 1.0])
@pytest.mark.parametrize("samples", [1, 2, 777])
def test_definition_is_scipy_with_the_same_filter(speed: float, samples: int) -> None:
    scipy_signal = pytest.importorskip("scipy.signal", reason="scipy is not installed")
    p, q = ratio(speed).as_integer_ratio()
    half = half_width(speed)
    # The prototype at q times the rate: tap j q of output phase r lies (j - half) q - r' from its middle.
    prototype = np.zeros(2 * (half + 1) * q + 1)
    for r, row in enumerate(filters(speed)):
        for j, weight in enumerate(row):
            prototype[(half + 1) * q - ((j - half) * q - r * p % q)] = weight
    x = white(1, samples).double()
    count = outputs_of(samples, speed)
    # scipy scales the filter by q.
    want = scipy_signal.resample_poly(x[0].numpy(), q, p, window=prototype / q)[:count]
    got = one(x, speed, count, backend="reference")[0].numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-14)


@pytest.mark.parametrize("quality", ["HQ", "VHQ"])
@pytest.mark.parametrize("speed", [s for s in SPEEDS if s != 1.0])
def test_band_limited_signals_come_out_as_from_soxr(speed: float, quality: str) -> None:
    soxr = pytest.importorskip("soxr", reason="soxr is not installed")
    p, q = ratio(speed).as_integer_ratio()
    # In the pass band of both; soxr's reaches 0.91 of half the lower rate.
    x, _ = sines(speed, 6000, 0.85)
    signal = x.mean(dim=0).numpy()
    want = soxr.resample(signal, p, q, quality=quality)
    count = outputs_of(6000, speed)
    got = one(torch.from_numpy(signal)[None], speed, count, backend="reference")[0].numpy()
    middle = slice(count // 3, 2 * count // 3)  # both filters end before
    # Each errs by its own: ours by WITHIN, soxr by its 20 bits.
    assert np.abs(got[middle] - want[middle]).max() <= WITHIN + 2**-20


# Rows, lengths, context


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("length", [1, 2, 3, 97, 400])
def test_short_rows_repeat(speed: float, length: int, backend: Backend) -> None:
    x, wanted = white(2, 400), 1000
    available = outputs_of(length, speed)
    lengths = torch.tensor([length, length])
    y = one(x, speed, wanted, lengths=lengths, backend=backend)
    alone = one(x[:, :length], speed, available, backend=backend)
    n = np.arange(wanted)
    torch.testing.assert_close(y, alone[:, n % available], rtol=0, atol=1e-6 if backend == "reference" else 0)
    # What follows the length counts as zero.
    x[:, length:] = math.nan
    assert torch.equal(one(x, speed, wanted, lengths=lengths, backend=backend), y)


@pytest.mark.parametrize("speed", SPEEDS)
def test_source_samples_are_what_the_outputs_stand_for(speed: float) -> None:
    for wanted in (1, 2, 3, 99, 1000, 48000):
        samples = source_samples(wanted, speed)
        assert outputs_of(samples, speed) >= wanted
        assert outputs_of(samples, speed) - wanted < 1 / speed
        assert samples == 1 or outputs_of(samples - 1, speed) < wanted


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
@pytest.mark.parametrize("speed", SPEEDS)
def test_a_crop_with_its_neighbours_is_a_part_of_the_whole(speed: float, backend: Backend) -> None:
    p, _ = ratio(speed).as_integer_ratio()
    half, count = half_width(speed), 300
    samples = source_samples(count, speed)
    begin = -(-(half + 1) // p) * p  # where an output stands exactly
    first = int(begin / ratio(speed))
    x = white(1, begin + samples + half + 50)
    whole = one(x, speed, first + count, backend=backend)
    crop = x[:, begin - half : begin + samples + half]
    got = one(crop.contiguous(), speed, count, context=half, backend=backend)
    torch.testing.assert_close(got, whole[:, first:], rtol=0, atol=0 if backend == "native" else 1e-6)
    # Without them it is another at its ends alone.
    cut = one(crop[:, half : half + samples].contiguous(), speed, count, backend=backend)
    ends = math.ceil(half / speed)
    if half:
        assert not torch.equal(cut, got)
    inside = slice(ends, max(count - ends, ends))
    torch.testing.assert_close(cut[:, inside], got[:, inside], rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
def test_each_row_has_its_own_speed(backend: Backend) -> None:
    x, which = white(6, 500), torch.tensor([0, 1, 2, 2, 1, 0])
    y = ops.change_speed(x, which, speeds=[0.9, 1.0, 1.1], num_samples=450, backend=backend)
    for row, k in enumerate(which.tolist()):
        alone = one(x[row : row + 1], [0.9, 1.0, 1.1][k], 450, backend=backend)
        torch.testing.assert_close(y[row : row + 1], alone, rtol=0, atol=1e-6 if backend == "reference" else 0)
    assert torch.equal(y[1], x[1, :450])


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
@pytest.mark.parametrize("speed", SPEEDS)
def test_int16_is_divided_by_32768(speed: float, backend: Backend) -> None:
    samples = (white(2, 500, scale=0.3) * 32768).clamp(-32768, 32767).to(torch.int16)
    samples[0, 3], samples[0, 4] = -32768, 32767
    options: dict[str, Any] = {"context": 7, "lengths": torch.tensor([493, 200]), "backend": backend}
    assert torch.equal(one(samples, speed, 600, **options), one(samples.float() / 32768, speed, 600, **options))


# Kernels


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("speed", [*SPEEDS, 0.1, 10.0, 1.0 + 1 / 999, 1 / 3])
def test_every_cpu_level_matches_the_definition(monkeypatch: pytest.MonkeyPatch, level: str, speed: float) -> None:
    monkeypatch.setenv("SPKFAST_CPU_LEVEL", level)
    which, lengths = torch.tensor([0, 0, 1, 0, 0, 0]), torch.tensor([900, 333, 900, 100, 1, 0])
    for dtype in (torch.float32, torch.int16):
        x = white(6, 1000) if dtype == torch.float32 else (white(6, 1000) * 32768).to(dtype)
        y = assert_near_definition(
            ops.change_speed, x, which, speeds=[speed, 0.9], num_samples=1003, context=100, lengths=lengths
        )
        assert (y[5] == 0).all() and (y[0] != 0).any()


@pytest.mark.parametrize("num_samples", [1, 3, 4, 7, 8, 9, 15, 16, 17, 79, 80, 81, 161])
def test_numbers_of_outputs_around_vectors_and_periods(num_samples: int) -> None:
    assert_near_definition(
        ops.change_speed, white(3, 200), torch.tensor([0, 1, 2]), speeds=[0.9, 1.1, 0.95], num_samples=num_samples
    )


@pytest.mark.parametrize("level", LEVELS)
def test_a_row_is_the_same_in_every_batch_and_with_any_threads(monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    monkeypatch.setenv("SPKFAST_CPU_LEVEL", level)
    x, which = white(7, 3000), torch.arange(7) % 3
    speeds, threads = [0.9, 1.0, 1.1], torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(ops.change_speed(x, which, speeds=speeds, num_samples=2500, backend="native"))
        assert torch.equal(*found)
        for row in range(7):
            alone = ops.change_speed(x[row : row + 1], which[row : row + 1], speeds=speeds, num_samples=2500)
            assert torch.equal(alone[0], found[0][row])
    finally:
        torch.set_num_threads(threads)


def test_inputs_that_are_not_contiguous() -> None:
    x, which, lengths = white(4, 300), torch.tensor([0, 1, 1, 0]), torch.tensor([300, 200, 100, 50])
    options: dict[str, Any] = {"speeds": [0.9, 1.1], "num_samples": 280, "backend": "native"}
    want = ops.change_speed(x, which, lengths=lengths, **options)
    got = ops.change_speed(
        x.T.contiguous().T, which.repeat_interleave(2)[::2], lengths=lengths.repeat_interleave(3)[::3], **options
    )
    assert torch.equal(got, want)


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(0, 50), (2, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("num_samples", [0, 7])
def test_nothing_in_and_nothing_out(shape: tuple[int, int], num_samples: int, backend: Backend) -> None:
    y = one(torch.zeros(shape), 1.1, num_samples, backend=backend)
    assert y.shape == (shape[0], num_samples) and (y == 0).all()
    assert one(torch.ones(2, 50), 1.1, num_samples, context=50, backend=backend).abs().sum() == 0


def test_the_definition_runs_on_every_device(device: torch.device) -> None:
    x, which = white(3, 3000), torch.tensor([0, 1, 2])
    options: dict[str, Any] = {"speeds": [0.9, 1.1, 0.937], "num_samples": 2500, "context": 100}
    got = ops.change_speed(x.to(device), which.to(device), **options)
    want = ops.change_speed(x.double(), which, **options)
    # A tenth of what the bands leave: products of TF32 would not.
    assert got.device == x.to(device).device and (got.cpu() - want).abs().max() <= 0.1 * WITHIN * x.abs().max()


# Registration, gradients, modes


def arguments(x: Tensor) -> tuple[Any, ...]:
    """Arguments of the native op."""
    tables, ratios = _tables((0.9, 1.0, 1.1))
    return x, torch.tensor([60, 40]), torch.tensor([2, 0]), tables, ratios, 3, 50


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    x = (white(2, 63) * 1000).to(dtype)
    torch.library.opcheck(torch.ops.spkfast.change_speed, arguments(x))
    torch.library.opcheck(torch.ops.spkfast.change_speed, arguments(x.T.contiguous().T))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_compiles_whole(backend: Backend) -> None:
    torch._dynamo.reset()
    x, which = white(2, 500), torch.tensor([0, 1])

    def call(x: Tensor) -> Tensor:
        return 2 * ops.change_speed(x, which, speeds=[0.9, 1.1], num_samples=450, context=10, backend=backend)

    with torch.no_grad():
        torch.testing.assert_close(torch.compile(call, fullgraph=True)(x), call(x), rtol=0, atol=1e-6)


def test_on_the_meta_device() -> None:
    y = one(torch.zeros(3, 500, device="meta", dtype=torch.int16), 1.1, 450)
    assert y.shape == (3, 450) and y.dtype == torch.float32 and y.device.type == "meta"


def test_gradient_of_the_definition() -> None:
    x = white(3, 12).double().requires_grad_()
    which, lengths = torch.tensor([0, 1, 1]), torch.tensor([10, 7, 0])

    def call(x: Tensor) -> Tensor:
        return ops.change_speed(x, which, speeds=[0.9, 1.25], num_samples=14, context=2, lengths=lengths)

    assert torch.autograd.gradcheck(call, (x,))


def test_gradients_come_from_the_definition() -> None:
    x = white(2, 300).requires_grad_()
    y = one(x, 0.9, 280)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    (want,) = torch.autograd.grad(one(x, 0.9, 280, backend="reference").square().sum(), x)
    assert torch.equal(gradient, want) and (want != 0).any()
    with pytest.raises(
        InputError, match="backend='native' cannot run change_speed on cpu: the kernels of change_speed "
    ):
        one(x, 0.9, 280, backend="native")
    with torch.no_grad():
        torch.testing.assert_close(one(x, 0.9, 280, backend="native"), y.detach(), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="change_speed is an inference form without a gradient"):
        torch.ops.spkfast.change_speed(*arguments(white(2, 63).requires_grad_())).sum().backward()


def test_inference_mode_and_autocast_change_nothing() -> None:
    x = white(2, 300)
    # Tables that are first made in inference mode serve later calls with a gradient.
    reference.change_speed.__globals__["_cached_windows"].cache_clear()
    for backend in IMPLEMENTATIONS:
        with torch.inference_mode():
            made = one(x, 0.93, 200, backend=backend)
        want = one(x, 0.93, 200, backend=backend)
        assert torch.equal(made, want)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(one(x, 0.93, 200, backend=backend), want)
    (gradient,) = torch.autograd.grad(one(x.requires_grad_(), 0.93, 200).sum(), x)
    assert (gradient != 0).any()


def test_float64_is_computed_in_float64() -> None:
    x = white(1, 300).double()
    assert one(x, 0.9, 200).dtype == torch.float64
    with pytest.raises(InputError, match="it computes in float32, and a tensor is float64"):
        one(x, 0.9, 200, backend="native")


# Messages

_X, _W = torch.zeros(2, 50), torch.tensor([0, 0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"waveforms": torch.zeros(50)}, r"waveforms must be float32, float64 or int16 of shape \(B, S\), got float32"),
        ({"waveforms": _X.half()}, r"waveforms must be float32, float64 or int16 .*got float16 of shape \(2, 50\)"),
        ({"waveforms": [0.0]}, "waveforms must be .* got list"),
        ({"which": _W.int()}, r"which must be int64 of shape \(2,\), got int32 of shape \(2,\)"),
        ({"which": _W[:1]}, r"which must be int64 of shape \(2,\), got int64 of shape \(1,\)"),
        ({"which": torch.tensor([0, 2])}, r"which must lie in 0\.\.1, row 1 has 2"),
        ({"which": torch.tensor([-1, 0])}, r"which must lie in 0\.\.1, row 0 has -1"),
        ({"which": _W.to("meta")}, "which must be on cpu, where waveforms are, got meta"),
        ({"speeds": []}, r"speeds must be factors from 0.1 to 10, got \[\]"),
        ({"speeds": [1.0, 0.05]}, r"speeds must be factors from 0.1 to 10, got \[1.0, 0.05\]"),
        ({"speeds": [1.0, math.nan]}, "speeds must be factors from 0.1 to 10"),
        ({"context": 51}, r"context must lie in 0\.\.50, got 51"),
        ({"context": -1}, r"context must lie in 0\.\.50, got -1"),
        ({"num_samples": -1}, "num_samples must not be negative, got -1"),
        ({"lengths": torch.tensor([50, 47]), "context": 4}, r"lengths must lie in 0\.\.46, row 0 has 50"),
        ({"lengths": torch.tensor([50, -1])}, r"lengths must lie in 0\.\.50, row 1 has -1"),
        ({"lengths": torch.tensor([[50, 1]])}, r"lengths must be int64 of shape \(2,\), got int64 of shape \(1, 2\)"),
        ({"backend": "triton"}, "backend='triton' cannot run change_speed on cpu"),
    ],
)  # fmt: skip
def test_messages(changes: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {"waveforms": _X, "which": _W, "speeds": [1.0, 1.1], "num_samples": 20, **changes}
    with pytest.raises(InputError, match=message):
        ops.change_speed(call.pop("waveforms"), call.pop("which"), **call)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(3), r"waveforms must have shape \(any, any\), got \(3\)"),
        (0, torch.zeros(2, 63, dtype=torch.float64), "waveforms must be float32 or int16, got Double"),
        (1, torch.tensor([1]), r"lengths must have shape \(2\), got \(1\)"),
        (2, torch.tensor([0, 3]), r"which must lie in 0\.\.2, row 1 has 3"),
        (4, [1, 1], "ratios must hold 6 numbers, got 2"),
        (4, [9, 10, 1, 1, 0, 10], "speeds must be positive, got 0/10"),
        (3, [torch.zeros(10, 97), torch.zeros(1, 1), torch.zeros(10, 2)], "filters must have an odd number of weights"),
        (3, [torch.zeros(9, 97)] * 3, r"filters must have shape \(10, any\), got \(9, 97\)"),
        (5, 64, r"context must lie in 0\.\.63, got 64"),
        (6, -1, "num_samples must not be negative, got -1"),
    ],
)  # fmt: skip
def test_messages_of_the_kernel(position: int, value: Any, message: str) -> None:
    call = list(arguments(white(2, 63)))
    call[position] = value
    with pytest.raises(ValueError, match=message):
        torch.ops.spkfast.change_speed(*call)
