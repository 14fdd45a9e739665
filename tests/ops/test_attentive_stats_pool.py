"""attentive_stats_pool: an oracle, parity of each backend, gradients, registration, awkward input, messages."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import spkfast
from spkfast import backends, functional, reference
from spkfast.ops.attentive_stats_pool import empty_gradient
from tests.memory import peak_bytes
from tests.ops.pooling import LAYOUTS, assert_within_bounds, channels_last, frames_like, logits_like, oracle
from tests.parity import FACTOR, assert_parity

# Triton interpreted divides by zero where a mask leaves the result out.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

Backend = backends.Backend

# Logits of each channel, of all channels alike, and none.
KINDS = ("full", "shared", "equal")
SHORT = [(1, 1, 1), (2, 3, 63), (1, 65, 17), (1, 5, 150)]  # for Triton interpreted
SHAPES = [*SHORT, (4, 1536, 200), (2, 512, 1001), (3, 17, 15), (2, 100, 16), (5, 1, 300)]
ROWS = [37, 1, 0, 2, 36, 16]


def drawn(shape: tuple[int, int, int], kind: str = "full", device: torch.device | None = None) -> tuple[Tensor, Any]:
    """Frames, and logits or None."""
    return frames_like(shape, device), logits_like(kind, shape, device)


def counted(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor(lengths, device=device)


@pytest.fixture
def interpreted(backend: Backend, device: torch.device) -> bool:
    """Whether this is Triton without a GPU, which takes a while for each block: few and small cases, then."""
    return backend == "triton" and device.type == "cpu"


def outcome(backend: Backend, x: Tensor, logits: Tensor | None, lengths: Tensor | None = None) -> list[Tensor]:
    """Mean, standard deviation and the gradients of a sum of both under uneven weights."""
    leaves = [None if value is None else value.detach().requires_grad_() for value in (x, logits)]
    mean, var = functional.weighted_moments(*leaves, lengths, backend=backend)  # type: ignore[arg-type]
    std = var.clamp_min(1e-7).sqrt()
    weights = torch.linspace(0.5, 2, x.shape[1], device=x.device)
    loss = (mean * weights).sum() + (std * weights.flip(0)).sum()
    gradients = torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None])
    return [mean.detach(), std.detach(), *gradients]


# Values


def test_values_by_hand(backend: Backend, device: torch.device) -> None:
    x = torch.tensor([[[1.0, 2.0, 4.0, 99.0]]], device=device)
    logits = torch.tensor([[[1.0, 1.0, 2.0, 5.0]]], device=device).log()
    names: tuple[Backend, ...] = (backend, "reference")
    for name in names:
        # Weights 1/4, 1/4, 1/2.
        mean, var = functional.weighted_moments(x, logits, counted([3], device), backend=name)
        assert mean.item() == pytest.approx(2.75, rel=1e-6) and var.item() == pytest.approx(1.6875, rel=1e-6)
        mean, var = functional.weighted_moments(x, None, counted([3], device), backend=name)
        assert mean.item() == pytest.approx(7 / 3, rel=1e-6) and var.item() == pytest.approx(14 / 9, rel=1e-6)
        mean, std = functional.attentive_stats_pool(x, logits, counted([2], device), backend=name)
        assert mean.item() == pytest.approx(1.5, rel=1e-6) and std.item() == pytest.approx(0.5, rel=1e-6)
        mean, std = functional.attentive_stats_pool(x, logits, counted([1], device), backend=name)
        assert mean.item() == 1 and std.item() == pytest.approx(math.sqrt(1e-7), rel=1e-6)
        mean, std = functional.attentive_stats_pool(x, logits, counted([0], device), eps=0.25, backend=name)
        assert mean.item() == 0 and std.item() == 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_definition_matches_an_oracle(kind: str) -> None:
    x, logits = drawn((len(ROWS), 5, 37), kind)
    x, logits = x.double(), None if logits is None else 3 * logits.double()
    for lengths in (ROWS, [37] * len(ROWS)):
        want = oracle(x, logits, lengths)
        given = torch.tensor(lengths) if lengths is ROWS else None
        got = functional.weighted_moments(x, logits, given, backend="reference")
        for have, expected in zip(got, want, strict=True):
            assert have.dtype == torch.float64
            np.testing.assert_allclose(have.numpy(), expected, rtol=1e-13, atol=1e-13)


# Parity


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(
    backend: Backend, device: torch.device, interpreted: bool, shape: tuple[int, int, int], kind: str
) -> None:
    if interpreted and shape not in SHORT:
        pytest.skip("small shapes are enough for Triton interpreted")
    if shape[0] * shape[1] * shape[2] > 1_000_000 and kind != "full":
        pytest.skip("one kind of the large shapes is enough")
    x, logits = drawn(shape, kind, device)
    # Whole rows through the standard deviation, ragged ones through the variance.
    if logits is not None:
        assert_parity(functional.attentive_stats_pool, (x, logits), backend=backend)
    frames = shape[2]
    lengths = counted([(frames, 3 * frames // 4, 1, 0, frames // 2)[row] for row in range(shape[0])], device)
    assert_parity(functional.weighted_moments, (x, logits, lengths), backend=backend)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_matches_reference_at_every_length(
    backend: Backend, device: torch.device, interpreted: bool, layout: str, kind: str
) -> None:
    # One frame more each time: the ends of vectors and blocks come at all places.
    lengths = [0, 1, 15, 16, 17, 31, 33] if interpreted else list(range(70))
    x, logits = drawn((len(lengths), 2 if interpreted else 3, lengths[-1]), kind, device)
    x = LAYOUTS[layout](x)
    inputs = (x, logits, counted(lengths, device))
    assert_parity(functional.weighted_moments, inputs, backend=backend, by_row=True)


@pytest.mark.parametrize("channels", [1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 129])
@pytest.mark.parametrize("kind", KINDS)
def test_matches_reference_at_every_width(
    backend: Backend, device: torch.device, interpreted: bool, kind: str, channels: int
) -> None:
    if interpreted and channels not in (7, 33):
        pytest.skip("a few widths are enough for Triton interpreted")
    x, logits = drawn((2, channels, 21), kind, device)
    x = channels_last(x)
    logits = channels_last(logits) if logits is not None and kind == "full" else logits
    assert_parity(functional.weighted_moments, (x, logits, counted([21, 13], device)), backend=backend)


def use_level(monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    """Makes CPU kernels use an instruction set, or skips where this CPU lacks it."""
    has = spkfast.info()["cpu"]["level"]
    levels = ["scalar", "avx2", "avx512", "avx512bf16"]
    if levels.index(level) > levels.index(has):
        pytest.skip(f"this CPU has {has}")
    monkeypatch.setenv("SPKFAST_CPU_LEVEL", level)


@pytest.mark.parametrize("level", ["scalar", "avx2", "avx512"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_level_matches_reference(monkeypatch: pytest.MonkeyPatch, level: str, kind: str) -> None:
    use_level(monkeypatch, level)
    x, logits = drawn((3, 19, 333), kind)
    lengths = torch.tensor([333, 201, 7])
    for layout in (torch.Tensor.contiguous, channels_last):
        scores = layout(logits) if logits is not None else None
        assert_parity(functional.weighted_moments, (layout(x), scores, lengths), backend="native")
        for dtype in (torch.float16, torch.bfloat16):
            inputs = [None if value is None else value.to(dtype) for value in (layout(x), scores)]
            assert_parity(functional.weighted_moments, (*inputs, lengths), backend="native", dtype=dtype)


@pytest.mark.parametrize("of_x", LAYOUTS)
@pytest.mark.parametrize("of_logits", LAYOUTS)
def test_any_layout(backend: Backend, device: torch.device, interpreted: bool, of_x: str, of_logits: str) -> None:
    few = ("contiguous", "channels last", "every second frame")
    if interpreted and not (of_x in few and of_logits in few):
        pytest.skip("a few layouts are enough for Triton interpreted")
    shape = (2, 5, 21) if interpreted else (3, 21, 37)
    x, logits = drawn(shape, device=device)
    lengths = counted([shape[2], 11, 1][: shape[0]], device)
    x, logits = LAYOUTS[of_x](x), LAYOUTS[of_logits](logits)
    assert_parity(functional.weighted_moments, (x, logits, lengths), backend=backend)
    _, _, grad_x, grad_logits = outcome(backend, x, logits, lengths)
    assert grad_x.stride() == grad_logits.stride() == empty_gradient(x).stride()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_shared_logits(backend: Backend, device: torch.device, interpreted: bool, layout: str) -> None:
    if interpreted and layout not in ("contiguous", "channels last", "slice"):
        pytest.skip("a few layouts are enough for Triton interpreted")
    x, logits = drawn((2, 5, 21), "shared", device)
    lengths = counted([21, 13], device)
    for inputs in ((LAYOUTS[layout](x), logits), (x, LAYOUTS[layout](logits)), (LAYOUTS[layout](x), None)):
        assert_parity(functional.weighted_moments, (*inputs, lengths), backend=backend)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_expanded_input(backend: Backend, device: torch.device, dim: int) -> None:
    x, logits = drawn((3, 5, 21), device=device)
    lengths = counted([21, 7, 1], device)
    shape, index = (3, 5, 21), [slice(None)] * 3
    index[dim] = slice(1)
    for inputs in ((x[tuple(index)].expand(shape), logits), (x, logits[tuple(index)].expand(shape))):
        assert_parity(functional.weighted_moments, (*inputs, lengths), backend=backend)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_summed_in_float32(
    backend: Backend, device: torch.device, interpreted: bool, dtype: torch.dtype, kind: str
) -> None:
    shape, lengths = ((2, 3, 40), [40, 23]) if interpreted else ((3, 33, 300), [300, 171, 1])
    x, logits = drawn(shape, kind, device)
    for layout in (torch.Tensor.contiguous, channels_last):
        inputs = [layout(x).to(dtype), None if logits is None else layout(logits).to(dtype), counted(lengths, device)]
        assert_parity(functional.weighted_moments, inputs, backend=backend, dtype=dtype)
        mean, std, *gradients = outcome(backend, *inputs)
        assert mean.dtype == std.dtype == torch.float32 and all(value.dtype == dtype for value in gradients)


def test_mixed_types_meet_in_the_wider(backend: Backend, device: torch.device) -> None:
    x, logits = drawn((2, 3, 21), device=device)
    got = outcome(backend, x.bfloat16(), logits)
    want = outcome(backend, x.bfloat16().float(), logits)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]) and torch.equal(got[3], want[3])
    assert got[2].dtype == torch.bfloat16 and torch.equal(got[2], want[2].bfloat16())


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_for_the_gradient(backend: Backend, device: torch.device, kind: str) -> None:
    x, logits = drawn((4, 3, 21), kind, device)
    op = (
        torch.ops.spkfast.attentive_stats_pool if backend == "native" else torch.ops.spkfast.attentive_stats_pool_triton
    )
    for lengths in ([21, 7, 1, 0], None):
        given = None if lengths is None else counted(lengths, device)
        mean, var, highest, total = op(x, logits, given)
        assert {value.dtype for value in (mean, var, highest, total)} == {torch.float32}
        assert highest.shape == total.shape == (4, 3 if kind == "full" else 1)
        for row, count in enumerate(lengths or [21] * 4):
            if logits is None or count == 0:
                assert (highest[row] == 0).all() and (total[row] == count).all()
            else:
                real = logits[row, :, :count]
                assert torch.equal(highest[row], real.amax(dim=-1))
                want = (real - highest[row, :, None]).double().exp().sum(dim=-1).float()
                torch.testing.assert_close(total[row], want)
            if count == 0:
                assert (mean[row] == 0).all() and (var[row] == 0).all()


# Awkward values


@pytest.mark.parametrize("kind", ["full", "shared"])
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_an_offset_of_the_logits_changes_nothing(
    backend: Backend, device: torch.device, kind: str, offset: float
) -> None:
    x, logits = drawn((2, 3, 60), kind, device)
    logits = (logits * 64).round() / 64  # so that the sum with the offset is exact, and the difference of two of them
    for layout in (torch.Tensor.contiguous, channels_last):
        for lengths in (None, counted([60, 41], device)):
            want = outcome(backend, layout(x), layout(logits), lengths)
            got = outcome(backend, layout(x), layout(logits + offset), lengths)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("kind", ["full", "shared"])
@pytest.mark.parametrize("order", ["random", "rising", "falling", "one peak"])
def test_logits_spread_over_two_hundred(
    backend: Backend, device: torch.device, interpreted: bool, kind: str, order: str
) -> None:
    frames = 70 if interpreted else 600
    x, logits = drawn((2, 3, frames), kind, device)
    ramp = torch.linspace(-100, 100, frames, device=device)
    if order == "random":
        logits = 50 * logits
    elif order == "one peak":
        logits[..., frames // 2] = 200.0
    else:
        logits = logits + (ramp if order == "rising" else -ramp)
    for layout in (torch.Tensor.contiguous, channels_last):
        assert_within_bounds(backend, layout(x), layout(logits), counted([frames, frames - 5], device))


@pytest.mark.parametrize("kind", ["full", "shared"])
def test_logits_of_minus_infinity_are_weights_of_zero(
    backend: Backend, device: torch.device, interpreted: bool, kind: str
) -> None:
    frames = 300
    x, logits = drawn((5, 1 if interpreted else 3, frames), kind, device)
    logits[0, :, : frames - 1] = -math.inf  # whole blocks, and then one frame
    logits[1, :, 1:] = -math.inf
    logits[2, :, ::2] = -math.inf
    logits[3, :, 10:280] = -math.inf
    logits[4, 0, :40] = -math.inf
    lengths = counted([frames, frames, frames, frames - 3, 50], device)
    for layout in (torch.Tensor.contiguous, channels_last):
        inputs = (layout(x), layout(logits), lengths)
        assert_parity(functional.weighted_moments, inputs, backend=backend, by_row=True)
        _, _, grad_x, grad_logits = outcome(backend, *inputs)
        unused = logits.isneginf()
        assert (grad_x[unused.expand_as(x)] == 0).all() and (grad_logits[unused] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_constant_channels_have_finite_gradients(backend: Backend, device: torch.device, kind: str) -> None:
    x, logits = drawn((2, 4, 50), kind, device)
    x[:, 0], x[:, 1], x[:, 2] = 0.0, 1.0, -0.1
    mean, std, grad_x, *rest = outcome(backend, x, logits)
    torch.testing.assert_close(mean[:, :3].cpu(), torch.tensor([0.0, 1.0, -0.1]).expand(2, -1))
    assert (std[:, :3] == math.sqrt(torch.tensor(1e-7).item())).all()
    assert grad_x.isfinite().all() and all(gradient.isfinite().all() for gradient in rest)
    # Nothing comes through the standard deviation: the gradient of the mean alone is left.
    assert grad_x[:, :3].sum(dim=-1).cpu().numpy() == pytest.approx(
        np.linspace(0.5, 2, 4)[None, :3].repeat(2, axis=0), rel=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_a_large_mean_leaves_the_variance_accurate(
    backend: Backend, device: torch.device, interpreted: bool, layout: str, kind: str
) -> None:
    frames = 70 if interpreted else 1001
    noise = 2 * torch.rand(2, 3, frames, generator=torch.Generator().manual_seed(3)) - 1
    x, logits = LAYOUTS[layout]((1e4 + noise).to(device)), logits_like(kind, (2, 3, frames), device)
    lengths = counted([frames, frames // 2], device)
    doubles = None if logits is None else logits.double()
    exact = functional.weighted_moments(x.double(), doubles, lengths, backend="reference")
    plain = functional.weighted_moments(x, logits, lengths, backend="reference")
    got = functional.weighted_moments(x, logits, lengths, backend=backend)
    # A mean, of all frames or of a block, that errs by d moves the variance by at most 2 d sqrt(var) + d**2: below 2 %,
    # where the mean of the squares less the square of the mean would err by more than all of it.
    d = FACTOR * max(1e4 * torch.finfo(torch.float32).eps, float((plain.mean - exact.mean).abs().max()))
    assert ((got.mean - exact.mean).abs() <= d).all()
    assert ((got.var - exact.var).abs() <= 2 * d * exact.var.sqrt() + d * d).all()
    assert_parity(functional.weighted_moments, (x, logits, lengths), backend=backend)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "slice", "every second frame"])
def test_padding_is_never_read(backend: Backend, device: torch.device, layout: str, kind: str) -> None:
    lengths = [21, 9, 0, 1]
    x, logits = drawn((len(lengths), 3, 21), kind, device)
    found = []
    for dirt in (0.0, math.nan, math.inf):
        values = [value.clone() for value in (x, logits) if value is not None]
        for row, count in enumerate(lengths):
            for value in values:
                value[row, :, count:] = dirt
        arguments = [LAYOUTS[layout](value) for value in values] + [None] * (2 - len(values))
        found.append(outcome(backend, arguments[0], arguments[1], counted(lengths, device)))
    for got in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(got, found[0], strict=True))
    for gradient in found[0][2:]:
        for row, count in enumerate(lengths):
            assert (gradient[row, :, count:] == 0).all() and gradient[row, :, :count].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_nan_of_a_real_frame_spoils_its_channel_alone(
    backend: Backend, device: torch.device, interpreted: bool, layout: str, kind: str
) -> None:
    frames = 40
    x, logits = drawn((3, 5, frames), kind, device)
    lengths = counted([frames, frames - 3, frames], device)
    clean = outcome(backend, LAYOUTS[layout](x), logits, lengths)
    for frame in (0, frames - 4) if interpreted else range(frames - 3):
        dirty = x.clone()
        dirty[1, 2, frame] = math.nan
        got = outcome(backend, LAYOUTS[layout](dirty), logits, lengths)
        spoilt = torch.zeros(3, 5, dtype=torch.bool, device=device)
        spoilt[1, 2] = True
        for have, want in zip(got[:3], clean[:3], strict=True):
            assert torch.equal(have[~spoilt], want[~spoilt])
        assert got[0][1, 2].isnan() and got[1][1, 2].isnan() and got[2][1, 2, : frames - 3].isnan().all()
        assert all((gradient[1, :, frames - 3 :] == 0).all() for gradient in got[2:])
        if logits is None:
            continue
        scores = logits.clone()
        scores[1, 2 if kind == "full" else 0, frame] = math.nan
        got = outcome(backend, LAYOUTS[layout](x), scores, lengths)
        spoilt[1] |= kind == "shared"
        for have, want in zip(got[:2], clean[:2], strict=True):
            assert torch.equal(have[~spoilt], want[~spoilt]) and have[spoilt].isnan().all()
        assert all((gradient[1, :, frames - 3 :] == 0).all() for gradient in got[2:])


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, 0x7F800001, -1, -0x400000], ids=hex)
@pytest.mark.parametrize("level", ["scalar", "avx2", "avx512"])
@pytest.mark.parametrize("kind", ["full", "shared"])
def test_every_nan_of_a_logit_spreads(monkeypatch: pytest.MonkeyPatch, level: str, kind: str, bits: int) -> None:
    """Also those whose lower bits say something, as memory of another type may."""
    use_level(monkeypatch, level)
    x, logits = drawn((2, 3, 40), kind, torch.device("cpu"))
    logits.view(torch.int32)[1, 0, 7] = bits
    got = outcome("native", x, logits, None)
    spoilt = torch.zeros(2, 3, dtype=torch.bool)
    spoilt[1, slice(None) if kind == "shared" else 0] = True
    assert all(torch.equal(value.isnan(), spoilt) for value in got[:2])
    assert got[2][spoilt].isnan().all() and got[2][~spoilt].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("last", [False, True], ids=["frames", "channels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_gradients_are_those_of_its_rows(last: bool, kind: str, dtype: torch.dtype) -> None:
    """From 32 MiB on they are written past the caches."""
    batch, channels, frames = 12, 1537, 521 if dtype == torch.float32 else 1041
    x, logits = (
        None if v is None else v.to(dtype) for v in drawn((batch, channels, frames), kind, torch.device("cpu"))
    )
    if last:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert x.nbytes >= 36 << 20
    lengths = torch.tensor([frames, 1, 0, 513, 512, 300, frames, frames - 1, 64, 17, 400, frames])
    moments = torch.ops.spkfast.attentive_stats_pool(x, logits, lengths)
    grads = [torch.randn(batch, channels) for _ in range(2)]
    whole = torch.ops.spkfast.attentive_stats_pool_backward(*grads, x, logits, lengths, *moments)
    for rows in torch.arange(batch).split(2):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        own = torch.ops.spkfast.attentive_stats_pool_backward(
            *(grad[part] for grad in grads), x[part], None if logits is None else logits[part], lengths[part],
            *(value[part] for value in moments),
        )  # fmt: skip
        assert torch.equal(whole[0][part], own[0])
        assert logits is None or torch.equal(whole[1][part], own[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2, 3, 1), (2, 3, 0), (0, 3, 5), (2, 0, 5), (0, 0, 0), (1, 1, 0)], ids=str)
def test_small_and_empty(backend: Backend, device: torch.device, shape: tuple[int, int, int], kind: str) -> None:
    batch, channels, frames = shape
    x, logits = drawn(shape, kind, device)
    for lengths in (None, torch.zeros(batch, dtype=torch.int64, device=device)):
        mean, std, *gradients = outcome(backend, x, logits, lengths)
        assert mean.shape == std.shape == (batch, channels)
        assert [gradient.shape for gradient in gradients] == [value.shape for value in (x, logits) if value is not None]
        if frames == 1 and lengths is None:
            assert torch.equal(mean, x[..., 0])
            weights = torch.linspace(0.5, 2, channels, device=device)[:, None].expand(shape)
            assert torch.equal(gradients[0], weights)
        else:
            assert (mean == 0).all() and all((gradient == 0).all() for gradient in gradients[:1])
        assert (std == math.sqrt(torch.tensor(1e-7).item())).all()
        assert all((gradient == 0).all() for gradient in gradients[1:])


# Batches


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_row_alone_equals_row_in_batch(
    backend: Backend, device: torch.device, interpreted: bool, layout: str, kind: str
) -> None:
    shape, lengths = ((3, 3, 37), ROWS[:3]) if interpreted else ((6, 67, 37), ROWS)
    x, logits = drawn(shape, kind, device)
    x = LAYOUTS[layout](x)
    together = outcome(backend, x, logits, counted(lengths, device))
    for row in range(shape[0]):
        part = slice(row, row + 1)
        score = None if logits is None else logits[part]
        alone = outcome(backend, x[part], score, counted(lengths[part], device))
        assert all(torch.equal(one[0], all_[row]) for one, all_ in zip(alone, together, strict=True))
        if lengths[row] == shape[2]:
            alone = outcome(backend, x[part], score)
            assert all(torch.equal(one[0], all_[row]) for one, all_ in zip(alone, together, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("frames", [37, 700])
def test_padding_changes_no_bit(layout: str, kind: str, frames: int) -> None:
    x, logits = drawn((5, 19, frames), kind)
    lengths = [frames, frames - 1, frames // 2, 17, 1]
    padded = outcome("native", LAYOUTS[layout](x), logits, torch.tensor(lengths))
    for row, count in enumerate(lengths):
        part = (slice(row, row + 1), slice(None), slice(count))
        alone = outcome("native", LAYOUTS[layout](x[part]), None if logits is None else logits[part])
        for one, all_ in zip(alone, padded, strict=True):
            assert torch.equal(one[0], all_[row, :, :count] if all_.ndim == 3 else all_[row])


@pytest.mark.parametrize("kind", KINDS)
def test_threads_change_nothing(kind: str) -> None:
    threads = torch.get_num_threads()
    x, logits = drawn((3, 200, 123), kind)
    lengths = torch.tensor([123, 77, 5])
    try:
        for layout in (torch.Tensor.contiguous, channels_last):
            found = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                found.append(outcome("native", layout(x), logits, lengths))
            for other in found[1:]:
                assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", ["full", "shared"])
def test_the_same_twice(backend: Backend, device: torch.device, kind: str) -> None:
    x, logits = drawn((2, 65, 70), kind, device)
    found = [outcome(backend, x, logits) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# Gradients


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_the_definition(kind: str) -> None:
    x, logits = drawn((4, 3, 6), kind)
    leaves = [value.double().requires_grad_() for value in (x, logits) if value is not None]
    for lengths in (None, torch.tensor([6, 4, 1, 0])):

        def moments(x: Tensor, logits: Tensor | None = None, lengths: Tensor | None = lengths) -> tuple[Tensor, Tensor]:
            return functional.weighted_moments(x, logits, lengths, backend="reference")

        assert torch.autograd.gradcheck(moments, leaves)
        if kind != "equal":
            assert torch.autograd.gradcheck(
                lambda x, logits, lengths=lengths: functional.attentive_stats_pool(
                    x, logits, lengths, backend="reference"
                ),
                leaves,
            )


def test_gradients_that_nobody_asks_for(backend: Backend, device: torch.device) -> None:
    x, logits = drawn((2, 3, 21), device=device)
    lengths = counted([21, 13], device)
    for output in (0, 1):
        leaves = x.clone().requires_grad_(), logits.clone().requires_grad_()
        for names in ((True, True), (True, False), (False, True)):
            given = [leaf if name else leaf.detach() for leaf, name in zip(leaves, names, strict=True)]
            asked = [leaf for leaf, name in zip(leaves, names, strict=True) if name]
            found = [
                torch.autograd.grad(functional.weighted_moments(*given, lengths, backend=which)[output].sum(), asked)
                for which in (backend, "reference")
            ]
            for have, want in zip(*found, strict=True):
                torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-6)
    mean, _ = functional.weighted_moments(x, logits, lengths, backend=backend)
    assert not mean.requires_grad


def test_bounds_of_the_variance(backend: Backend, device: torch.device) -> None:
    x = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.1, 1.0, 10.0])[:, None]
    x = x.to(device).requires_grad_()
    logits = torch.zeros(2, 3, 50, device=device, requires_grad=True)
    names: tuple[Backend, ...] = (backend, "reference")
    for name in names:
        stats = functional.attentive_stats_pool(x, logits, eps=0.25, max_var=4.0, backend=name)
        assert (stats.std[:, 0] == 0.5).all() and (stats.std[:, 2] == 2).all()
        assert ((stats.std[:, 1] > 0.7) & (stats.std[:, 1] < 1.4)).all()
        for gradient in torch.autograd.grad(stats.std.sum(), (x, logits)):
            assert (gradient[:, ::2] == 0).all() and (gradient[:, 1] != 0).all()
        plain = functional.attentive_stats_pool(x, logits, backend=name).std
        torch.testing.assert_close(plain, x.detach().std(dim=-1, correction=0), rtol=1e-5, atol=0)


def test_second_derivative_is_refused(backend: Backend, device: torch.device) -> None:
    for kind in KINDS:
        x, logits = drawn((1, 2, 5), kind, device)
        assert x is not None
        leaves = [value.requires_grad_() for value in (x, logits) if value is not None]
        stats = functional.weighted_moments(*leaves, backend=backend)
        (gradient, *_) = torch.autograd.grad(stats.var.sum(), leaves, create_graph=True)
        with pytest.raises(ValueError, match="no second derivative here: use backend='reference'"):
            gradient.sum().backward()
        stats = functional.weighted_moments(*leaves, backend="reference")
        (gradient, *_) = torch.autograd.grad(stats.var.sum(), leaves, create_graph=True)
        gradient.square().sum().backward()


def test_memory(backend: Backend, device: torch.device, interpreted: bool) -> None:
    if interpreted:
        pytest.skip("Triton interpreted allocates on its own")
    x, logits = drawn((8, 256, 200), device=device)
    x.requires_grad_(), logits.requires_grad_()
    lengths = counted([200, 150] * 4, device)

    def used(name: Backend) -> int:
        def step() -> tuple[Tensor, ...]:
            stats = functional.attentive_stats_pool(x, logits, lengths, backend=name)
            return torch.autograd.grad(stats.mean.sum() + stats.std.sum(), (x, logits))

        return peak_bytes(step, device) - x.nbytes - logits.nbytes

    assert used(backend) < used("reference") / 3


# Registration


def registered(backend: Backend) -> tuple[Any, Any]:
    suffix = "" if backend == "native" else "_triton"
    return (
        getattr(torch.ops.spkfast, f"attentive_stats_pool{suffix}"),
        getattr(torch.ops.spkfast, f"attentive_stats_pool{suffix}_backward"),
    )


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(
    backend: Backend, device: torch.device, interpreted: bool, kind: str, transposed: bool, ragged: bool
) -> None:
    if (interpreted or kind != "full") and transposed != ragged:
        pytest.skip("layouts and lengths together are enough for other logits, and for Triton interpreted")
    op, backward = registered(backend)
    x, logits = drawn((2, 3, 9), kind, device)
    x = channels_last(x) if transposed else x
    lengths = counted([9, 4], device) if ragged else None
    outputs = op(x, logits, lengths)
    torch.library.opcheck(op, (x, logits, lengths))
    leaves = [None if value is None else value.detach().requires_grad_() for value in (x, logits)]
    torch.library.opcheck(op, (*leaves, lengths))
    grads = [torch.randn_like(output) for output in outputs[:2]]
    torch.library.opcheck(backward, (*grads, x, logits, lengths, *outputs))


def test_schemas_agree() -> None:
    def signature(name: str) -> str:
        schema = str(torch._C._get_schema(f"spkfast::{name}", ""))
        return schema[schema.index("(") :]

    for name in ("attentive_stats_pool", "attentive_stats_pool_from_hidden"):
        definition = getattr(reference, name)
        inferred = torch.library.infer_schema(definition, mutates_args=())
        assert signature(name).split(" -> ")[0] == inferred.split(" -> ")[0]
        assert signature(name) == signature(f"{name}_triton")
        assert signature(f"{name}_backward") == signature(f"{name}_triton_backward")


class Pool(nn.Module):
    """The op as a part of a model."""

    def __init__(self, backend: Backend = "auto") -> None:
        super().__init__()
        self.backend: Backend = backend

    def forward(self, x: Tensor, logits: Tensor, lengths: Tensor) -> Tensor:
        context = functional.weighted_moments(x, None, lengths, backend=self.backend)
        stats = functional.attentive_stats_pool(x, logits + context.mean[..., None], lengths, backend=self.backend)
        return torch.cat([*stats, context.var], dim=1)


def pool_step(function: Callable[..., Tensor], batch: int, frames: int, transposed: bool) -> list[Tensor]:
    x, logits = drawn((batch, 6, frames))
    x = channels_last(x) if transposed else x
    leaves = (x.requires_grad_(), logits.requires_grad_())
    output = function(*leaves, torch.arange(frames, frames - batch, -1))
    return [output.detach(), *torch.autograd.grad(output.square().sum(), leaves)]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_whole_and_once_for_all_lengths(compiler: str, transposed: bool) -> None:
    if compiler == "inductor" and not transposed:
        pytest.skip("inductor takes long, and checks strides, of which these are the less usual")
    torch.compiler.reset()
    pool = Pool("native")
    compiled = torch.compile(pool, fullgraph=True, backend=compiler, dynamic=True if compiler == "inductor" else None)
    for number, (batch, frames) in enumerate([(2, 40), (3, 57), (4, 33), (5, 64), (2, 101), (6, 12)]):
        if compiler == "inductor" and number == 3:
            break
        with torch._dynamo.config.patch(error_on_recompile=number >= (1 if compiler == "inductor" else 3)):
            got = pool_step(compiled, batch, frames, transposed)
        for have, want in zip(got, pool_step(pool, batch, frames, transposed), strict=True):
            torch.testing.assert_close(have, want)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_exports_whole(backend: Backend) -> None:
    batch, frames = torch.export.Dim("batch"), torch.export.Dim("frames", min=2)
    x, logits = drawn((2, 6, 40))
    pool = Pool(backend)
    shapes = {0: batch, 2: frames}
    program = torch.export.export(
        pool, (x, logits, torch.tensor([40, 21])), dynamic_shapes=(shapes, shapes, {0: batch})
    )
    for rows, count in ((3, 57), (1, 2), (5, 300)):
        x, logits = drawn((rows, 6, count))
        lengths = torch.arange(count, count - rows, -1).clamp_min(0)
        assert torch.equal(program.module()(x, logits, lengths), pool(x, logits, lengths))


def test_autocast_changes_nothing(backend: Backend, device: torch.device) -> None:
    x, logits = drawn((2, 3, 21), device=device)
    names: tuple[Backend, ...] = (backend, "reference")
    for name in names:
        found = []
        for enabled in (False, True):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled):
                found.append(outcome(name, x, logits, counted([21, 13], device)))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# Messages


def bad(x: Any, logits: Any = None, lengths: Any = None, match: str = "", **options: Any) -> None:
    lengths = torch.tensor(lengths) if isinstance(lengths, list) else lengths
    with pytest.raises(spkfast.InputError, match=match):
        functional.weighted_moments(x, logits, lengths, **options)
    with pytest.raises(spkfast.InputError, match=match):
        functional.attentive_stats_pool(x, logits, lengths, **options)


def test_error_messages() -> None:
    x = torch.zeros(2, 3, 5)
    bad(x.numpy(), match="x must be a torch tensor, got ndarray")
    bad(x[0], match=r"x must have three dimensions, \(B, C, T\) or .*, got \(3, 5\)")
    bad(x.long(), match="x must be float16, bfloat16, float32 or float64, got torch.int64")
    bad(x, x.numpy(), match="logits must be a torch tensor, got ndarray")
    bad(x, x[0], match=r"logits must have three dimensions, .* got \(3, 5\)")
    bad(x, x.int(), match="logits must be float16, bfloat16, float32 or float64, got torch.int32")
    for shape in ((2, 2, 5), (1, 3, 5), (2, 3, 4), (2, 1, 1)):
        message = rf"logits must have shape \(B, C, T\) = \(2, 3, 5\) or \(B, 1, T\), got \({shape[0]}, {shape[1]}, "
        bad(x, torch.zeros(shape), match=message)
    bad(x, torch.zeros(2, 3, 5, device="meta"), match="logits must be on cpu, where x is, got meta")
    bad(x, x, (5, 5), match="lengths must be an int64 tensor of frames, got tuple")
    bad(x, x, torch.ones(2), match="lengths must be an int64 tensor of frames, got torch.float32")
    bad(x, x, [5], match=r"lengths must have shape \(B,\) = \(2,\), got \(1,\)")
    bad(x, x, torch.tensor([[5, 5]]), match=r"lengths must have shape \(B,\) = \(2,\), got \(1, 2\)")
    bad(x, x, [5, 6], match=r"lengths must lie in 0\.\.5, row 1 has 6")
    bad(x, x, [-1, 5], match=r"lengths must lie in 0\.\.5, row 0 has -1")
    meta = torch.ones(2, dtype=torch.int64, device="meta")
    bad(x, x, meta, match="lengths must be on cpu, where x is, got meta")
    bad(x, x, backend="fast", match="backend must be one of auto, reference, native, triton, got 'fast'")
    bad(x.double(), x, backend="native", match="cannot run attentive_stats_pool on cpu: it computes in float32")
    for eps in (0.0, -1.0, math.nan):
        with pytest.raises(spkfast.InputError, match=f"eps must be a positive number, got {eps}"):
            functional.attentive_stats_pool(x, x, eps=eps)
    for max_var in (0.0, 0.4, math.nan):
        with pytest.raises(spkfast.InputError, match=f"max_var must be at least eps = 0.5, or None, got {max_var}"):
            functional.attentive_stats_pool(x, x, eps=0.5, max_var=max_var)


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_out_of_range_are_clamped_where_nobody_asks(backend: Backend, device: torch.device, kind: str) -> None:
    op, backward = registered(backend)
    x, logits = drawn((4, 3, 9), kind, device)
    wild = counted([-1, 10, 2**62, -(2**63)], device)
    found = []
    for lengths in (wild, wild.clamp(0, 9)):
        outputs = op(x, logits, lengths)
        grads = [torch.ones_like(output) for output in outputs[:2]]
        found.append([*outputs, *backward(*grads, x, logits, lengths, *outputs)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_kernel_checks_its_arguments() -> None:
    forward, backward = torch.ops.spkfast.attentive_stats_pool, torch.ops.spkfast.attentive_stats_pool_backward
    x, logits, lengths = torch.zeros(2, 3, 5), torch.zeros(2, 3, 5), torch.tensor([5, 4])
    inputs = (x, logits, lengths)
    outputs = forward(*inputs)
    wrong: list[tuple[int, Any, str]] = [
        (0, x.double(), "x must be Float, BFloat16 or Half, got Double"),
        (0, x[0], r"x must have shape \(any, any, any\), got \(3, 5\)"),
        (1, logits.half(), "logits must be Float, got Half"),
        (1, logits[0], r"logits must have shape \(2, any, 5\), got \(3, 5\)"),
        (1, logits[..., :4], r"logits must have shape \(2, any, 5\), got \(2, 3, 4\)"),
        (1, logits[:, :2], "logits must have 1 or 3 channels, got 2"),
        (2, lengths.int(), "lengths must be Long, got Int"),
        (2, lengths[:1], r"lengths must have shape \(2\), got \(1\)"),
    ]
    for position, value, message in wrong:
        arguments = [*inputs[:position], value, *inputs[position + 1 :]]
        with pytest.raises(ValueError, match=message):
            forward(*arguments)
        with pytest.raises(ValueError, match=message):
            backward(*outputs[:2], *arguments, *outputs)
    arguments = [*outputs[:2], *inputs, *outputs]
    for position, name in ((0, "grad_mean"), (1, "grad_var"), (5, "mean"), (6, "var"), (7, "highest"), (8, "total")):
        for value, message in (
            (arguments[position].double(), "must be Float, got Double"),
            (arguments[position][:, :2], r"must have shape \(2, 3\), got \(2, 2\)"),
        ):
            with pytest.raises(ValueError, match=f"{name} {message}"):
                backward(*arguments[:position], value, *arguments[position + 1 :])
