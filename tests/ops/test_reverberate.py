"""reverberate: direct and scipy's convolution, delays and energy, every kernel, registration, messages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spkfast import InputError, ops
from spkfast.backends import Backend
from spkfast.reference.reverberate import fft_size
from tests.ops.augmentation import LEVELS, assert_near_definition, white

IMPLEMENTATIONS: tuple[Backend, ...] = ("reference", "native")


def bank_of(*sizes: int, seed: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Decaying noise of these sizes one after the other, where each begins, and the sizes."""
    parts = [white(size, seed=seed + k) * torch.exp(-torch.arange(size) * 3 / size) for k, size in enumerate(sizes)]
    ends = torch.tensor(sizes).cumsum(0)
    return torch.cat(parts), ends - torch.tensor(sizes), torch.tensor(sizes)


# Other convolutions


@pytest.mark.parametrize("samples", [1, 2, 3, 97, 400, 2049])
def test_definition_is_the_convolution_of_scipy(samples: int) -> None:
    fftconvolve = pytest.importorskip("scipy.signal", reason="scipy is not installed").fftconvolve
    bank, begins, sizes = bank_of(1, 2, 3, 96, 400, 1001, 3000)
    gains, x = white(7, scale=1.0), white(7, samples).double()
    y = ops.reverberate(x, bank.double(), begins, sizes, gains)
    for row in range(7):
        h = bank[begins[row] : begins[row] + sizes[row]].double().numpy()
        want = gains[row].item() * fftconvolve(x[row].numpy(), h)[:samples]
        # Both err by some units of 2^-53 of what is multiplied.
        scale = abs(gains[row].item()) * np.linalg.norm(x[row]) * np.linalg.norm(h)
        np.testing.assert_allclose(y[row].numpy(), want, rtol=0, atol=40 * 2**-53 * scale)


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
@pytest.mark.parametrize("delay", [0, 1, 15, 255, 256, 300, 599, 600])
def test_a_delta_delays_exactly(delay: int, backend: Backend) -> None:
    x, bank = white(1, 600), torch.zeros(700)
    bank[delay] = 0.5
    y = ops.reverberate(x, bank, torch.tensor([0]), torch.tensor([700]), torch.tensor([2.0]), backend=backend)
    want = torch.nn.functional.pad(x, (delay, 0))[:, :600]
    torch.testing.assert_close(y, want, rtol=0, atol=2e-6 * float(x.abs().max()))
    if delay < 600:
        assert y[0].abs().argmax() == delay + x[0, : 600 - delay].abs().argmax()


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
def test_unit_energy_keeps_the_energy_of_white_noise(backend: Backend) -> None:
    bank, begins, sizes = bank_of(1, 500, 4000)
    gains = torch.stack([bank[b : b + s].square().sum().rsqrt() for b, s in zip(begins, sizes, strict=True)])
    samples = 48000
    y = ops.reverberate(white(3, samples), bank, begins, sizes, gains, backend=backend)
    settled = y[:, 4000:]
    # The mean square of n samples whose spectrum is |H|^2 deviates by sqrt(2 mean |H|^4 / n).
    for row in range(3):
        h = (gains[row] * bank[begins[row] : begins[row] + sizes[row]]).double()
        fourth = torch.fft.fft(h, 16384).abs().pow(4).mean().item()
        deviation = (2 * fourth / settled.shape[1]) ** 0.5
        assert abs(settled[row].square().mean().item() / 0.01 - 1) < 4 * deviation


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
def test_nothing_comes_before_its_cause_or_round_again(backend: Backend) -> None:
    bank, begins, sizes = bank_of(1000)
    for at in (0, 1, 511, 999):
        x = torch.zeros(1, 1000)
        x[0, at] = 1
        y = ops.reverberate(x, bank, begins, sizes, backend=backend)
        assert y[0, :at].abs().sum() <= 1e-6 * at * bank.abs().max()
        torch.testing.assert_close(y[0, at:], bank[: 1000 - at], rtol=0, atol=1e-6 * float(bank.abs().max()))


def test_transforms_are_of_twos_threes_and_fives() -> None:
    smooth = sorted({2**a * 3**b * 5**c for a in range(13) for b in range(9) for c in range(6)})
    for least in range(1, 3000):
        assert fft_size(least) == next(size for size in smooth if size >= least)


# Banks


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
def test_int16_banks_are_divided_by_32768(backend: Backend) -> None:
    bank, begins, sizes = bank_of(3, 500, 77)
    shorts = (bank * 32768).to(torch.int16)
    shorts[0], shorts[1] = -32768, 32767
    x = white(3, 800)
    got, want = (ops.reverberate(x, b, begins, sizes, backend=backend) for b in (shorts, shorts.float() / 32768))
    assert torch.equal(got, want) if backend == "native" else torch.allclose(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
def test_size_0_leaves_the_row_as_it_is(backend: Backend) -> None:
    bank, begins, sizes = bank_of(5, 6, 7)
    x = white(3, 300)
    sizes[1] = 0
    y = ops.reverberate(x, bank, begins, sizes, torch.tensor([1.0, 3.0, 1.0]), backend=backend)
    assert torch.equal(y[1], x[1]) and not torch.equal(y[0], x[0])
    none = torch.zeros(3, dtype=torch.int64)
    alone = ops.reverberate(x, torch.zeros(0), none, none, backend=backend)
    assert torch.equal(alone, x) and alone.data_ptr() != x.data_ptr()
    # A begin of no response may lie anywhere.
    assert torch.equal(ops.reverberate(x, bank, none - 5, none, backend=backend), x)


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
def test_samples_past_longest_are_dropped(backend: Backend) -> None:
    bank, begins, sizes = bank_of(200, 10)
    x = white(2, 300)
    got = ops.reverberate(x, bank, begins, sizes, longest=50, backend=backend)
    want = ops.reverberate(x, bank, begins, sizes.clamp_max(50), longest=50, backend=backend)
    assert torch.equal(got, want)
    assert not torch.allclose(got[0], ops.reverberate(x, bank, begins, sizes, backend=backend)[0], atol=1e-3)


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
def test_responses_do_not_reach_into_their_neighbours(backend: Backend) -> None:
    bank, begins, sizes = bank_of(40, 50, 60)
    x = white(1, 200)
    want = ops.reverberate(x, bank[40:90].clone(), begins[:1], sizes[1:2], backend=backend)
    bank[:40] = bank[90:] = float("nan")
    assert torch.equal(ops.reverberate(x, bank, begins[1:2], sizes[1:2], backend=backend), want)


# Kernels


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("samples", [1, 2, 5, 16, 255, 256, 257, 700, 1537, 2100, 4097, 8000])
def test_every_cpu_level_matches_the_definition(monkeypatch: pytest.MonkeyPatch, level: str, samples: int) -> None:
    monkeypatch.setenv("SPKFAST_CPU_LEVEL", level)
    bank, begins, sizes = bank_of(1, 2, 100, samples, samples + 3)
    gains = torch.tensor([1.0, -2.0, 0.5, 1.0, 1e-3])
    x = white(5, samples)
    assert_near_definition(ops.reverberate, x, bank, begins, sizes, gains)
    assert_near_definition(ops.reverberate, x, (bank * 3000).to(torch.int16), begins, sizes, gains, longest=samples)


@pytest.mark.parametrize("level", LEVELS)
def test_every_size_of_transform(monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    # Of 256 points times twos, threes and fives in every combination that there is up to 40.
    monkeypatch.setenv("SPKFAST_CPU_LEVEL", level)
    bank, begins, sizes = bank_of(30, 200)
    for times in range(1, 41):
        assert_near_definition(ops.reverberate, white(2, 512 * times - 199), bank, begins, sizes, longest=200)


def test_matches_the_definition_on_a_crop_of_training() -> None:
    bank, begins, sizes = bank_of(16000, 8000, 24000, 1)
    assert_near_definition(ops.reverberate, white(4, 48000), bank, begins, sizes, longest=24000)


@pytest.mark.parametrize("level", LEVELS)
def test_a_row_is_the_same_in_every_batch_and_with_any_threads(monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    monkeypatch.setenv("SPKFAST_CPU_LEVEL", level)
    bank, begins, sizes = bank_of(700, 3, 1, 0, 400, 1500, 40)
    x, gains, threads = white(7, 1600), white(7, seed=3, scale=1.0), torch.get_num_threads()
    for longest in (None, 1500):
        try:
            found = []
            for count in (1, 2):
                torch.set_num_threads(count)
                found.append(ops.reverberate(x, bank, begins, sizes, gains, longest=longest, backend="native"))
            assert torch.equal(*found)
        finally:
            torch.set_num_threads(threads)
        for row in range(7):
            one = slice(row, row + 1)
            alone = ops.reverberate(x[one], bank, begins[one], sizes[one], gains[one], longest=longest)
            assert torch.equal(alone[0], found[0][row])


def test_sizes_of_transforms_that_take_turns() -> None:
    # More than are kept.
    bank, begins, sizes = bank_of(50)
    rows = [white(1, 512 * times) for times in range(1, 13)]
    first, second = ([ops.reverberate(x, bank, begins, sizes) for x in rows] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_inputs_that_are_not_contiguous() -> None:
    bank, begins, sizes = bank_of(30, 5, 200)
    x, gains = white(3, 300), torch.tensor([1.0, 2.0, 3.0])
    want = ops.reverberate(x, bank, begins, sizes, gains, backend="native")
    got = ops.reverberate(
        x.T.contiguous().T,
        bank.repeat_interleave(2)[::2],
        begins.repeat_interleave(3)[::3],
        sizes.repeat_interleave(2)[::2],
        gains.repeat_interleave(2)[::2],
        backend="native",
    )
    assert torch.equal(got, want)


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(0, 50), (2, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_nothing_in_and_nothing_out(shape: tuple[int, int], inplace: bool, backend: Backend) -> None:
    places = torch.zeros(shape[0], dtype=torch.int64)
    assert (
        ops.reverberate(torch.zeros(shape), torch.ones(3), places, places + 3, inplace=inplace, backend=backend).shape
        == shape
    )


@pytest.mark.parametrize(
    ("backend", "dtype"), [("native", torch.float32), ("reference", torch.float32), ("reference", torch.float64)]
)
def test_in_place_gives_the_same(backend: Backend, dtype: torch.dtype) -> None:
    bank, begins, sizes = bank_of(30, 5, 200)
    sizes[1] = 0
    x = white(3, 300).to(dtype)
    want = ops.reverberate(x, bank, begins, sizes, backend=backend)
    assert not torch.equal(want, x)
    changed = x.clone()
    assert ops.reverberate(changed, bank, begins, sizes, inplace=True, backend=backend) is changed
    assert torch.equal(changed, want)


def test_autograd_hears_of_a_change_in_place() -> None:
    x = white(2, 63)
    weight = torch.ones(2, 63, requires_grad=True)
    for backend in IMPLEMENTATIONS:
        y = (weight * x).sum()
        ops.reverberate(x, *arguments(x)[1:-1], inplace=True, backend=backend)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


def test_the_definition_runs_on_every_device(device: torch.device) -> None:
    inputs = arguments(white(2, 63))[:-1]
    got = ops.reverberate(*(value.to(device) for value in inputs))
    want = ops.reverberate(inputs[0].double(), *inputs[1:])
    assert got.device == inputs[0].to(device).device
    torch.testing.assert_close(got.cpu().double(), want, rtol=0, atol=1e-6 * float(want.abs().max()))


# Registration, gradients, modes


def arguments(x: Tensor) -> tuple[Any, ...]:
    """Arguments of the native op."""
    bank, begins, sizes = bank_of(30, 5)
    return x, bank, begins, sizes, torch.tensor([1.0, 2.0]), 20


def test_opcheck() -> None:
    x = white(2, 63)
    for op in (torch.ops.spkfast.reverberate, torch.ops.spkfast.reverberate_):
        torch.library.opcheck(op, arguments(x.clone()))
    torch.library.opcheck(torch.ops.spkfast.reverberate, arguments(x.T.contiguous().T))
    short = arguments(x)
    torch.library.opcheck(torch.ops.spkfast.reverberate, (x, (short[1] * 3000).to(torch.int16), *short[2:]))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_compiles_whole(backend: Backend, inplace: bool) -> None:
    torch._dynamo.reset()
    bank, begins, sizes = bank_of(30, 5)

    def call(x: Tensor) -> Tensor:
        return 2 * ops.reverberate(2 * x, bank, begins, sizes, inplace=inplace, backend=backend)

    x = white(2, 500)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(call, fullgraph=True)(x), call(x), rtol=0, atol=1e-6)


def test_on_the_meta_device() -> None:
    x, places = torch.zeros(3, 500, device="meta"), torch.zeros(3, dtype=torch.int64, device="meta")
    y = ops.reverberate(x, torch.zeros(9, device="meta"), places, places)
    assert y.shape == x.shape and y.dtype == torch.float32 and y.device.type == "meta"


def test_gradient_of_the_definition() -> None:
    bank, begins, sizes = bank_of(3, 5, 0)
    x, bank = white(3, 7).double().requires_grad_(), bank.double().requires_grad_()

    def call(x: Tensor, bank: Tensor) -> Tensor:
        return ops.reverberate(x, bank, begins, sizes, torch.tensor([1.0, 2.0, 3.0]))

    assert torch.autograd.gradcheck(call, (x, bank))


def test_gradients_come_from_the_definition() -> None:
    bank, begins, sizes = bank_of(30, 5)
    x = white(2, 300).requires_grad_()
    (gradient,) = torch.autograd.grad(ops.reverberate(x, bank, begins, sizes).square().sum(), x)
    want = ops.reverberate(x, bank, begins, sizes, backend="reference")
    assert torch.equal(gradient, *torch.autograd.grad(want.square().sum(), x)) and (gradient != 0).any()
    for waveforms, responses in ((x, bank), (x.detach(), bank.clone().requires_grad_())):
        with pytest.raises(
            InputError, match="'native' cannot run reverberate on cpu: the kernels of reverberate have no"
        ):
            ops.reverberate(waveforms, responses, begins, sizes, backend="native")
    with pytest.raises(ValueError, match="reverberate is an inference form without a gradient"):
        torch.ops.spkfast.reverberate(*arguments(white(2, 63).requires_grad_())).sum().backward()


def test_inference_mode_and_autocast_change_nothing() -> None:
    bank, begins, sizes = bank_of(30, 5)
    x = white(2, 300)
    for backend in IMPLEMENTATIONS:
        want = ops.reverberate(x, bank, begins, sizes, backend=backend)
        with torch.inference_mode():
            assert torch.equal(ops.reverberate(x, bank, begins, sizes, backend=backend), want)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(ops.reverberate(x, bank, begins, sizes, backend=backend), want)


def test_float64_is_computed_in_float64() -> None:
    bank, begins, sizes = bank_of(30)
    x = white(1, 300)
    assert ops.reverberate(x.double(), bank, begins, sizes).dtype == torch.float64
    assert ops.reverberate(x, bank.double(), begins, sizes).dtype == torch.float32
    for waveforms, responses in ((x.double(), bank), (x, bank.double())):
        with pytest.raises(InputError, match="it computes in float32, and a tensor is float64"):
            ops.reverberate(waveforms, responses, begins, sizes, backend="native")


# Messages

_X, _BANK, _PLACES = torch.zeros(2, 50), torch.zeros(9), torch.tensor([0, 4])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"waveforms": torch.zeros(50)}, r"waveforms must be float32 or float64 of shape \(B, S\), got float32"),
        ({"waveforms": _X.short()}, r"waveforms must be float32 or float64 .*got int16 of shape \(2, 50\)"),
        ({"responses": _BANK[None]}, r"responses must be int16, float32 or float64 of shape \(N,\), got float32"),
        ({"responses": _BANK.half()}, "responses must be int16, float32 or float64 .* got float16"),
        ({"responses": _BANK.to("meta")}, "responses must be on cpu, where waveforms are, got meta"),
        ({"begins": _PLACES[:1]}, r"begins must be int64 of shape \(2,\), got int64 of shape \(1,\)"),
        ({"begins": torch.tensor([0, -1])}, "inside the 9 samples of responses, row 1 has begin -1 and size 4"),
        ({"begins": torch.tensor([9, 0])}, "inside the 9 samples of responses, row 0 has begin 9 and size 3"),
        ({"sizes": torch.tensor([3, 6])}, "inside the 9 samples of responses, row 1 has begin 4 and size 6"),
        ({"sizes": _PLACES.float()}, r"sizes must be int64 of shape \(2,\), got float32 of shape \(2,\)"),
        ({"gains": torch.ones(3)}, r"gains must be float32 of shape \(2,\), got float32 of shape \(3,\)"),
        ({"gains": torch.ones(2).double()}, r"gains must be float32 of shape \(2,\), got float64 of shape \(2,\)"),
        ({"longest": 0}, "longest must be at least 1, got 0"),
        ({"waveforms": torch.zeros(50, 2).T, "inplace": True}, "waveforms must be contiguous to be changed in place"),
        ({"backend": "triton"}, "backend='triton' cannot run reverberate on cpu"),
    ],
)  # fmt: skip
def test_messages(changes: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {"responses": _BANK, "begins": _PLACES, "sizes": torch.tensor([3, 4]), **changes}
    with pytest.raises(InputError, match=message):
        ops.reverberate(call.pop("waveforms", _X), **call)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(3), r"waveforms must have shape \(any, any\), got \(3\)"),
        (0, torch.zeros(2, 63, dtype=torch.float64), "waveforms must be Float, got Double"),
        (1, torch.zeros(35, dtype=torch.float64), "responses must be float32 or int16, got Double"),
        (1, torch.zeros(34), "inside the 34 samples of responses, got 30 and 5"),
        (2, torch.tensor([2**62, 0]), "inside the 35 samples of responses, got 4611686018427387904 and 30"),
        (3, torch.tensor([2**63 - 1, 0]), "inside the 35 samples of responses, got 0 and 9223372036854775807"),
        (3, torch.tensor([1]), r"sizes must have shape \(2\), got \(1\)"),
        (4, torch.ones(2, 1), r"gains must have shape \(2\), got \(2, 1\)"),
        (5, 0, "longest must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_messages_of_the_kernel(position: int, value: Any, message: str) -> None:
    call = list(arguments(white(2, 63)))
    call[position] = value
    for op in (torch.ops.spkfast.reverberate, torch.ops.spkfast.reverberate_):
        with pytest.raises(ValueError, match=message):
            op(*call)
    with pytest.raises(ValueError, match="waveforms must be contiguous to be changed in place"):
        torch.ops.spkfast.reverberate_(torch.zeros(63, 2).T, *arguments(_X)[1:])
