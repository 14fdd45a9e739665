"""add_noise: measured ratios, the toolkits' formula, wrapping, every kernel, registration, messages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spkfast import InputError, ops
from spkfast.backends import Backend
from tests.ops.augmentation import LEVELS, assert_near_definition, white

IMPLEMENTATIONS: tuple[Backend, ...] = ("reference", "native")


def recordings(*sizes: int, rows: int = 1, seed: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Coloured noise of these sizes, each louder than the one before; begins and sizes, which all rows share."""
    noise = white(sum(sizes), seed=seed)
    ends = torch.tensor(sizes).cumsum(0)
    begins = ends - torch.tensor(sizes)
    for k, begin in enumerate(begins.tolist()):
        noise[begin:] *= 1.3 + 0.1 * k
    noise[1:] += 0.7 * noise[:-1]
    return noise.clamp(-1, 1), begins.expand(rows, -1), torch.tensor(sizes).expand(rows, -1)


def added_part(noises: Tensor, begin: int, size: int, offset: int, samples: int) -> np.ndarray:
    """What is read of a recording, float64."""
    recording = noises[begin : begin + size].double().numpy() / (32768 if noises.dtype == torch.int16 else 1)
    return np.resize(np.roll(recording, -offset), samples)


def decibels(x: np.ndarray) -> float:
    return 10 * np.log10(np.mean(np.square(x)))


# What is added


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int16], ids=str)
@pytest.mark.parametrize("samples", [1, 17, 2000, 20000])
def test_every_recording_has_its_own_ratio(samples: int, dtype: torch.dtype, backend: Backend) -> None:
    # Longer, shorter and as long as the row; some with offsets.
    sizes = (samples + 500, max(samples // 3, 1), samples, 2 * samples)
    noises, begins, sizes_of = recordings(*sizes)
    noises = noises if dtype == torch.float32 else (noises * 32767).to(dtype)
    offsets = torch.tensor([[0, sizes[1] - 1, samples // 2, samples // 3]])
    snr = torch.tensor([[0.0, 20.0, -5.0, 13.3]])
    x = white(1, samples).abs()  # one sample of it is not silent either
    for k in range(4):
        one = slice(k, k + 1)
        y = ops.add_noise(x, noises, begins[:, one], sizes_of[:, one], offsets[:, one], snr[:, one], backend=backend)
        realised = decibels(x.double().numpy()) - decibels((y.double() - x.double()).numpy())
        # The rest is what float32 keeps of a sum: at 20 dB some units of 2^-24 of samples ten times as large.
        assert abs(realised - snr[0, k].item()) <= 1e-3
    together = ops.add_noise(x, noises, begins, sizes_of, offsets, snr, backend=backend).double().numpy()
    want = x[0].double().numpy().copy()
    for k in range(4):
        part = added_part(noises, int(begins[0, k]), sizes[k], int(offsets[0, k]), samples)
        gain = 10 ** ((decibels(x.double().numpy()) - decibels(part) - snr[0, k].item()) / 20)
        want += gain * part
    np.testing.assert_allclose(together[0], want, rtol=0, atol=2e-6 * np.abs(want).max())


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
@pytest.mark.parametrize("size", [1, 2, 5, 16, 33, 299, 300, 301])
def test_recordings_repeat_from_their_offset_on(size: int, backend: Backend) -> None:
    noises, begins, sizes = recordings(7, size, 40)
    x = torch.full((1, 300), 0.5)
    for offset in sorted({0, 1 % size, size // 2, size - 1}):
        y = ops.add_noise(
            x, noises, begins[:, 1:2], sizes[:, 1:2], torch.tensor([[offset]]), torch.zeros(1, 1), backend=backend
        )
        part = added_part(noises, 7, size, offset, 300)
        want = 0.5 * part / np.sqrt(np.mean(np.square(part)))
        np.testing.assert_allclose(y[0].numpy() - 0.5, want, rtol=0, atol=1e-6 * (np.abs(want).max() + 0.5))


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
@pytest.mark.parametrize("loudness", [1.0, 1e-3, 0.0])
def test_a_floor_of_1e_minus_4_is_the_formula_of_the_toolkits(loudness: float, backend: Backend) -> None:
    noises, begins, sizes = recordings(700, 500, rows=2)
    noises[700:] *= 1e-3
    x = white(2, 600, scale=0.1 * loudness)
    offsets, snr = torch.tensor([[3, 4], [0, 499]]), torch.tensor([[5.0, 15.0], [0.0, 13.0]])
    y = ops.add_noise(x, noises, begins, sizes, offsets, snr, power_floor=1e-4, backend=backend)
    for row in range(2):
        want = x[row].double().numpy().copy()
        speech_db = 10 * np.log10(np.mean(x[row].double().numpy() ** 2) + 1e-4)
        for k in range(2):
            part = added_part(noises, int(begins[row, k]), int(sizes[row, k]), int(offsets[row, k]), 600)
            noise_db = 10 * np.log10(np.mean(part**2) + 1e-4)
            want += np.sqrt(10 ** ((speech_db - noise_db - snr[row, k].item()) / 10)) * part
        np.testing.assert_allclose(y[row].numpy(), want, rtol=0, atol=2e-6 * np.abs(want).max())
        assert np.abs(want - x[row].numpy()).max() > 0


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
@pytest.mark.parametrize("power_floor", [0.0, 1e-4])
def test_silence_stays_finite(power_floor: float, backend: Backend) -> None:
    noises, begins, sizes = recordings(400, 400, rows=3)
    noises = noises.clone()
    noises[:400] = 0
    x = white(3, 300)
    x[0] = 0
    zeros = torch.zeros(3, 2, dtype=torch.int64)
    y = ops.add_noise(x, noises, begins, sizes, zeros, torch.zeros(3, 2), power_floor=power_floor, backend=backend)
    assert y.isfinite().all() and not torch.equal(y[1], x[1])
    # Silent noise adds nothing; nor, without a floor, does noise to a silent row.
    silent = ops.add_noise(
        x,
        noises,
        begins[:, :1],
        sizes[:, :1],
        zeros[:, :1],
        torch.zeros(3, 1),
        power_floor=power_floor,
        backend=backend,
    )
    assert torch.equal(silent, x)
    assert torch.equal(y[0], x[0]) == (power_floor == 0)


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
def test_size_0_adds_nothing(backend: Backend) -> None:
    noises, begins, sizes = recordings(400, 300, rows=2)
    x, offsets, snr = white(2, 500), torch.tensor([[9, 8], [7, 6]]), torch.full((2, 2), 3.0)
    sizes = sizes.clone()
    sizes[0, 1] = sizes[1, 0] = sizes[1, 1] = 0
    # What belongs to no recording may be anything.
    begins, offsets = torch.where(sizes > 0, begins, -77), torch.where(sizes > 0, offsets, 10**6)
    y = ops.add_noise(x, noises, begins, sizes, offsets, snr, backend=backend)
    alone = ops.add_noise(x[:1], noises, begins[:1, :1], sizes[:1, :1], offsets[:1, :1], snr[:1, :1], backend=backend)
    assert torch.equal(y[0], alone[0]) and not torch.equal(y[0], x[0])
    assert torch.equal(y[1], x[1])
    none = torch.zeros(2, 3, dtype=torch.int64)
    for k in (0, 3):
        got = ops.add_noise(
            x, torch.zeros(0), none[:, :k], none[:, :k], none[:, :k], torch.zeros(2, k), backend=backend
        )
        assert torch.equal(got, x) and got.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
def test_recordings_do_not_reach_into_their_neighbours(backend: Backend) -> None:
    noises, begins, sizes = recordings(40, 50, 60)
    x, offset, snr = white(1, 200), torch.tensor([[49]]), torch.zeros(1, 1)
    want = ops.add_noise(x, noises[40:90].clone(), begins[:, :1], sizes[:, 1:2], offset, snr, backend=backend)
    noises[:40] = noises[90:] = float("nan")
    assert torch.equal(ops.add_noise(x, noises, begins[:, 1:2], sizes[:, 1:2], offset, snr, backend=backend), want)


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
def test_int16_banks_are_divided_by_32768(backend: Backend) -> None:
    noises, begins, sizes = recordings(300, 1000, rows=2)
    shorts = (noises * 32767).to(torch.int16)
    shorts[0], shorts[1] = -32768, 32767
    x, offsets, snr = white(2, 500), torch.tensor([[1, 2], [299, 999]]), torch.full((2, 2), 7.0)
    got, want = (
        ops.add_noise(x, bank, begins, sizes, offsets, snr, backend=backend)
        for bank in (shorts, shorts.float() / 32768)
    )
    assert torch.equal(got, want)


# Kernels


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("samples", [1, 2, 7, 8, 9, 15, 16, 17, 1023, 1024, 1025, 3001])
def test_every_cpu_level_matches_the_definition(monkeypatch: pytest.MonkeyPatch, level: str, samples: int) -> None:
    monkeypatch.setenv("SPKFAST_CPU_LEVEL", level)
    noises, begins, sizes = recordings(1, 3, 100, samples, samples + 9, rows=3)
    offsets = torch.stack([torch.zeros_like(sizes[0]), sizes[0] // 2, sizes[0] - 1])
    snr = white(3, 5, scale=10.0)
    x = white(3, samples)
    x[1] = 0
    for bank in (noises, (noises * 30000).to(torch.int16)):
        for floor in (0.0, 1e-4):
            assert_near_definition(ops.add_noise, x, bank, begins, sizes, offsets, snr, power_floor=floor)


@pytest.mark.parametrize("level", LEVELS)
def test_a_row_is_the_same_in_every_batch_and_with_any_threads(monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    monkeypatch.setenv("SPKFAST_CPU_LEVEL", level)
    noises, begins, sizes = recordings(70, 700, 3000, rows=7)
    x, offsets, snr = white(7, 1600), torch.arange(21).view(7, 3), white(7, 3, scale=10.0)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(ops.add_noise(x, noises, begins, sizes, offsets, snr, backend="native"))
        assert torch.equal(*found)
    finally:
        torch.set_num_threads(threads)
    for row in range(7):
        one = slice(row, row + 1)
        alone = ops.add_noise(x[one], noises, begins[one], sizes[one], offsets[one], snr[one])
        assert torch.equal(alone[0], found[0][row])


def test_inputs_that_are_not_contiguous() -> None:
    noises, begins, sizes = recordings(70, 700, rows=3)  # expanded: no stride between the rows
    x, offsets, snr = white(3, 300), torch.arange(6).view(3, 2), white(3, 2, scale=10.0)
    want = ops.add_noise(x, noises, begins.contiguous(), sizes.contiguous(), offsets, snr, backend="native")
    got = ops.add_noise(
        x.T.contiguous().T,
        noises.repeat_interleave(2)[::2],
        begins,
        sizes,
        offsets.T.contiguous().T,
        snr.T.contiguous().T,
        backend="native",
    )
    assert torch.equal(got, want)


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(0, 50), (2, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_nothing_in_and_nothing_out(shape: tuple[int, int], inplace: bool, backend: Backend) -> None:
    places, snr = torch.zeros(shape[0], 1, dtype=torch.int64), torch.zeros(shape[0], 1)
    x = torch.zeros(shape)
    y = ops.add_noise(x, torch.ones(3), places, places + 3, places, snr, inplace=inplace, backend=backend)
    assert y.shape == shape and (y is x) == inplace


@pytest.mark.parametrize(
    ("backend", "dtype"), [("native", torch.float32), ("reference", torch.float32), ("reference", torch.float64)]
)
def test_in_place_gives_the_same(backend: Backend, dtype: torch.dtype) -> None:
    noises, begins, sizes = recordings(70, 700, rows=3)
    sizes = sizes.clone()
    sizes[1] = 0
    x, offsets, snr = white(3, 300).to(dtype), torch.arange(6).view(3, 2), white(3, 2, scale=10.0)
    want = ops.add_noise(x, noises, begins, sizes, offsets, snr, backend=backend)
    assert not torch.equal(want, x)
    changed = x.clone()
    assert ops.add_noise(changed, noises, begins, sizes, offsets, snr, inplace=True, backend=backend) is changed
    assert torch.equal(changed, want)


def test_autograd_hears_of_a_change_in_place() -> None:
    x = white(2, 63)
    weight = torch.ones(2, 63, requires_grad=True)
    for backend in IMPLEMENTATIONS:
        y = (weight * x).sum()
        ops.add_noise(x, *arguments(x)[1:-1], inplace=True, backend=backend)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


def test_the_definition_runs_on_every_device(device: torch.device) -> None:
    inputs = arguments(white(2, 63))[:-1]
    got = ops.add_noise(*(value.to(device) for value in inputs))
    want = ops.add_noise(inputs[0].double(), *inputs[1:])
    assert got.device == inputs[0].to(device).device
    torch.testing.assert_close(got.cpu().double(), want, rtol=0, atol=1e-6 * float(want.abs().max()))


# Registration, gradients, modes


def arguments(x: Tensor) -> tuple[Any, ...]:
    """Arguments of the native op."""
    noises, begins, sizes = recordings(30, 5, rows=2)
    return x, noises, begins, sizes, torch.tensor([[0, 1], [29, 4]]), torch.full((2, 2), 10.0), 1e-4


def test_opcheck() -> None:
    x = white(2, 63)
    for op in (torch.ops.spkfast.add_noise, torch.ops.spkfast.add_noise_):
        torch.library.opcheck(op, arguments(x.clone()))
    torch.library.opcheck(torch.ops.spkfast.add_noise, arguments(x.T.contiguous().T))
    _, noises, *rest = arguments(x)
    torch.library.opcheck(torch.ops.spkfast.add_noise, (x, (noises * 3000).to(torch.int16), *rest))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_compiles_whole(backend: Backend, inplace: bool) -> None:
    torch._dynamo.reset()
    _, *places, _ = arguments(white(2, 63))

    def call(x: Tensor) -> Tensor:
        return 2 * ops.add_noise(2 * x, *places, power_floor=1e-4, inplace=inplace, backend=backend)

    x = white(2, 500)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(call, fullgraph=True)(x), call(x), rtol=0, atol=1e-6)


def test_on_the_meta_device() -> None:
    x, *rest = (value.to("meta") for value in arguments(white(2, 63))[:-1])
    y = ops.add_noise(x, *rest)
    assert y.shape == x.shape and y.dtype == torch.float32 and y.device.type == "meta"


@pytest.mark.parametrize("power_floor", [0.0, 1e-2])
def test_gradient_of_the_definition(power_floor: float) -> None:
    noises, begins, sizes = recordings(3, 9, rows=2)
    x, noises = white(2, 7).double().requires_grad_(), noises.double().requires_grad_()
    offsets, snr = torch.tensor([[0, 8], [2, 1]]), torch.tensor([[0.0, 6.0], [3.0, -3.0]])

    def call(x: Tensor, noises: Tensor) -> Tensor:
        return ops.add_noise(x, noises, begins, sizes, offsets, snr, power_floor=power_floor)

    assert torch.autograd.gradcheck(call, (x, noises))


def test_gradients_of_silence_are_finite() -> None:
    noises, begins, sizes = recordings(30, 40, rows=3)
    noises[:30] = 0
    sizes = sizes.clone()
    sizes[2] = 0
    x = white(3, 50)
    x[0] = 0
    x.requires_grad_(), noises.requires_grad_()
    y = ops.add_noise(x, noises, begins, sizes, torch.zeros_like(sizes), torch.zeros(3, 2))
    of_x, of_noises = torch.autograd.grad(y.sum(), (x, noises))
    assert of_x.isfinite().all() and of_noises.isfinite().all()
    assert (of_x[0] == 1).all() and (of_x[2] == 1).all() and (of_x[1] != 1).any()


def test_gradients_come_from_the_definition() -> None:
    x, noises, *rest, _ = arguments(white(2, 63))
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(ops.add_noise(x, noises, *rest).square().sum(), x)
    want = ops.add_noise(x, noises, *rest, backend="reference")
    assert torch.equal(gradient, *torch.autograd.grad(want.square().sum(), x)) and (gradient != 0).any()
    for waveforms, bank in ((x, noises), (x.detach(), noises.clone().requires_grad_())):
        with pytest.raises(
            InputError, match="'native' cannot run add_noise on cpu: the kernels of add_noise have no gr"
        ):
            ops.add_noise(waveforms, bank, *rest, backend="native")
    with pytest.raises(ValueError, match="add_noise is an inference form without a gradient"):
        torch.ops.spkfast.add_noise(*arguments(white(2, 63).requires_grad_())).sum().backward()


def test_inference_mode_and_autocast_change_nothing() -> None:
    *inputs, _ = arguments(white(2, 63))
    for backend in IMPLEMENTATIONS:
        want = ops.add_noise(*inputs, backend=backend)
        with torch.inference_mode():
            assert torch.equal(ops.add_noise(*inputs, backend=backend), want)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(ops.add_noise(*inputs, backend=backend), want)


def test_float64_is_computed_in_float64() -> None:
    x, noises, *rest, _ = arguments(white(2, 63))
    assert ops.add_noise(x.double(), noises, *rest).dtype == torch.float64
    assert ops.add_noise(x, noises.double(), *rest).dtype == torch.float32
    for waveforms, bank in ((x.double(), noises), (x, noises.double())):
        with pytest.raises(InputError, match="it computes in float32, and a tensor is float64"):
            ops.add_noise(waveforms, bank, *rest, backend="native")


# Messages

_X, _BANK, _PLACES = torch.zeros(2, 50), torch.zeros(9), torch.tensor([[0], [4]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"waveforms": torch.zeros(50)}, r"waveforms must be float32 or float64 of shape \(B, S\), got float32"),
        ({"waveforms": _X.short()}, r"waveforms must be float32 or float64 .*got int16 of shape \(2, 50\)"),
        ({"noises": _BANK[None]}, r"noises must be int16, float32 or float64 of shape \(N,\), got float32 of shape"),
        ({"noises": _BANK.int()}, "noises must be int16, float32 or float64 .* got int32"),
        ({"begins": _PLACES[:, 0]}, r"begins must be int64 of shape \(B, K\), got int64 of shape \(2,\)"),
        ({"begins": 3}, r"begins must be int64 of shape \(B, K\), got int"),
        ({"begins": _PLACES.int()}, r"begins must be int64 of shape \(2, 1\), got int32 of shape \(2, 1\)"),
        ({"begins": _PLACES[:1]}, r"begins must be int64 of shape \(2, 1\), got int64 of shape \(1, 1\)"),
        ({"begins": _PLACES - 1}, "begins and sizes must lie inside the 9 samples of noises, row 0 has begin -1 and"),
        ({"sizes": _PLACES + 2}, "begins and sizes must lie inside the 9 samples of noises, row 1 has begin 4 and s"),
        ({"sizes": _PLACES[:, 0]}, r"sizes must be int64 of shape \(2, 1\), got int64 of shape \(2,\)"),
        ({"offsets": _PLACES}, r"offsets must lie in 0\.\.3, recording 0 of row 1 has 4"),
        ({"offsets": -_PLACES}, r"offsets must lie in 0\.\.3, recording 0 of row 1 has -4"),
        ({"offsets": _PLACES.to("meta")}, "offsets must be on cpu, where waveforms are, got meta"),
        ({"snr_db": torch.zeros(2, 1).double()}, r"snr_db must be float32 of shape \(2, 1\), got float64 of shape"),
        ({"power_floor": -1.0}, "power_floor must not be negative, got -1.0"),
        ({"power_floor": float("nan")}, "power_floor must not be negative, got nan"),
        ({"waveforms": torch.zeros(50, 2).T, "inplace": True}, "waveforms must be contiguous to be changed in place"),
        ({"backend": "triton"}, "backend='triton' cannot run add_noise on cpu"),
    ],
)  # fmt: skip
def test_messages(changes: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {
        "noises": _BANK, "begins": _PLACES, "sizes": torch.tensor([[3], [4]]), "offsets": 0 * _PLACES,
        "snr_db": torch.zeros(2, 1), **changes,
    }  # fmt: skip
    with pytest.raises(InputError, match=message):
        ops.add_noise(call.pop("waveforms", _X), **call)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(3), r"waveforms must have shape \(any, any\), got \(3\)"),
        (0, torch.zeros(2, 63, dtype=torch.float64), "waveforms must be Float, got Double"),
        (1, torch.zeros(35, dtype=torch.float64), "noises must be float32 or int16, got Double"),
        (1, torch.zeros(34), "inside the 34 samples of noises, got 30 and 5"),
        (2, torch.zeros(2, dtype=torch.int64), r"begins must have shape \(2, any\), got \(2\)"),
        (2, torch.full((2, 2), 2**62), "inside the 35 samples of noises, got 4611686018427387904 and 30"),
        (3, torch.full((2, 2), 2**63 - 1), "inside the 35 samples of noises, got 0 and 9223372036854775807"),
        (4, torch.full((2, 2), 29), r"offsets must lie in 0\.\.4, got 29"),
        (5, torch.ones(2, 1), r"snr_db must have shape \(2, 2\), got \(2, 1\)"),
        (6, -1.0, "power_floor must not be negative, got -1"),
    ],
)  # fmt: skip
def test_messages_of_the_kernel(position: int, value: Any, message: str) -> None:
    call = list(arguments(white(2, 63)))
    call[position] = value
    for op in (torch.ops.spkfast.add_noise, torch.ops.spkfast.add_noise_):
        with pytest.raises(ValueError, match=message):
            op(*call)
    with pytest.raises(ValueError, match="waveforms must be contiguous to be changed in place"):
        torch.ops.spkfast.add_noise_(torch.zeros(63, 2).T, *arguments(_X)[1:])
