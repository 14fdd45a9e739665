"""attentive_stats_pool_from_hidden: an oracle, parity of each backend, gradients, registration, messages."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import spkfast
from spkfast import backends, functional
from spkfast.ops.attentive_stats_pool import empty_gradient
from tests.memory import peak_bytes
from tests.ops.pooling import LAYOUTS, channels_last, frames_like, oracle
from tests.parity import FACTOR, assert_parity

# Triton interpreted divides by zero where a mask leaves the result out.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

Backend = backends.Backend

# B, C, H, T.
SHORT = [(1, 1, 1, 1), (2, 3, 4, 63), (1, 33, 17, 70)]  # for Triton interpreted
SHAPES = [*SHORT, (2, 1536, 128, 200), (1, 512, 64, 1001), (3, 17, 33, 15), (2, 8, 7, 48), (5, 1, 128, 100)]
ROWS = [37, 1, 0, 2, 36, 16]


def drawn(batch: int, channels: int, units: int, frames: int, device: torch.device | None = None) -> list[Tensor]:
    """x, hidden, weight and bias of logits that spread over a few units, as in a trained network."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(batch, units, frames, generator=generator).tanh()
    weight = 2 * torch.randn(channels, units, generator=generator) / units**0.5
    bias = torch.randn(channels, generator=generator)
    return [value.to(device) for value in (frames_like((batch, channels, frames)), hidden, weight, bias)]


def counted(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor(lengths, device=device)


@pytest.fixture
def interpreted(backend: Backend, device: torch.device) -> bool:
    """Whether this is Triton without a GPU, which takes a while for each block: few and small cases, then."""
    return backend == "triton" and device.type == "cpu"


def outcome(backend: Backend, tensors: list[Tensor], lengths: Tensor | None = None, **options: Any) -> list[Tensor]:
    """Mean, standard deviation and the gradients of a sum of both under uneven weights."""
    leaves = [value.detach().requires_grad_() for value in tensors]
    stats = functional.attentive_stats_pool_from_hidden(*leaves, lengths, backend=backend, **options)
    weights = torch.linspace(0.5, 2, stats.mean.shape[1], device=stats.mean.device)
    loss = (stats.mean * weights).sum() + (stats.std * weights.flip(0)).sum()
    return [*(value.detach() for value in stats), *torch.autograd.grad(loss, leaves)]


# Values


def test_values_by_hand(backend: Backend, device: torch.device) -> None:
    x = torch.tensor([[[1.0, 2.0, 4.0, 99.0]] * 2], device=device)
    hidden = torch.tensor([[[1.0, 1.0, 2.0, 5.0], [1.0, 2.0, 1.0, 7.0]]], device=device).log()
    # The first channel has weights 1/4, 1/4, 1/2, the second 4/9, 1/9, 4/9; a bias changes nothing.
    weight, bias = torch.tensor([[1.0, 0.0], [0.0, -2.0]], device=device), torch.tensor([3.0, -0.5], device=device)
    names: tuple[Backend, ...] = (backend, "reference")
    for name in names:
        for matrix in (weight, weight[:, :, None]):
            mean, var = functional.weighted_moments_from_hidden(
                x, hidden, matrix, bias, counted([3], device), backend=name
            )
            assert mean.tolist()[0] == pytest.approx([2.75, 22 / 9], rel=1e-6)
            assert var.tolist()[0] == pytest.approx([1.6875, 8 - (22 / 9) ** 2], rel=1e-5)
        stats = functional.attentive_stats_pool_from_hidden(
            x, hidden, weight, bias, counted([3], device), eps=0.25, max_var=1.69, backend=name
        )
        assert stats.std.tolist()[0] == pytest.approx([1.6875**0.5, 1.3], rel=1e-6)


def test_definition_matches_an_oracle() -> None:
    x, hidden, weight, bias = (value.double() for value in drawn(len(ROWS), 5, 3, 37))
    logits = torch.zeros(len(ROWS), 5, 37, dtype=torch.float64)
    for b in range(len(ROWS)):
        for c in range(5):
            for t in range(37):
                products = (float(weight[c, h]) * float(hidden[b, h, t]) for h in range(3))
                logits[b, c, t] = math.fsum((float(bias[c]), *products))
    for lengths in (ROWS, [37] * len(ROWS)):
        given = torch.tensor(lengths) if lengths is ROWS else None
        got = functional.weighted_moments_from_hidden(x, hidden, weight, bias, given, backend="reference")
        for have, want in zip(got, oracle(x, logits, lengths), strict=True):
            assert have.dtype == torch.float64
            np.testing.assert_allclose(have.numpy(), want, rtol=1e-13, atol=1e-13)


# Parity


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(
    backend: Backend, device: torch.device, interpreted: bool, shape: tuple[int, int, int, int]
) -> None:
    if interpreted and shape not in SHORT:
        pytest.skip("small shapes are enough for Triton interpreted")
    inputs, frames = drawn(*shape, device), shape[3]
    lengths = counted([(frames, 3 * frames // 4, 1, 0, frames // 2)[row] for row in range(shape[0])], device)
    assert_parity(functional.weighted_moments_from_hidden, (*inputs, lengths), backend=backend)
    if shape[1] * frames < 10_000:
        assert_parity(functional.attentive_stats_pool_from_hidden, inputs, backend=backend)


@pytest.mark.parametrize("channels", [1, 7, 8, 9, 15, 16, 17, 33])
@pytest.mark.parametrize("units", [1, 3, 16, 100])
def test_matches_reference_at_every_size(
    backend: Backend, device: torch.device, interpreted: bool, units: int, channels: int
) -> None:
    if interpreted and (units, channels) not in ((3, 7), (100, 17)):
        pytest.skip("a few sizes are enough for Triton interpreted")
    # One frame more or less each time: the ends of vectors and blocks come at all places.
    lengths = [49, 16] if interpreted else [49, 48, 47, 33, 17, 16, 15, 7, 3, 1, 0]
    inputs = (*drawn(len(lengths), channels, units, 49, device), counted(lengths, device))
    assert_parity(functional.weighted_moments_from_hidden, inputs, backend=backend)


@pytest.mark.parametrize("level", ["scalar", "avx2", "avx512"])
def test_every_level_matches_reference(monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    has = spkfast.info()["cpu"]["level"]
    levels = ["scalar", "avx2", "avx512", "avx512bf16"]
    if levels.index(level) > levels.index(has):
        pytest.skip(f"this CPU has {has}")
    monkeypatch.setenv("SPKFAST_CPU_LEVEL", level)
    x, *rest = drawn(3, 19, 21, 333)
    lengths = torch.tensor([333, 201, 7])
    for layout in (torch.Tensor.contiguous, channels_last):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            inputs = [value.to(dtype) for value in (layout(x), *rest)]
            assert_parity(functional.weighted_moments_from_hidden, (*inputs, lengths), backend="native", dtype=dtype)


@pytest.mark.parametrize("of_x", LAYOUTS)
@pytest.mark.parametrize("of_hidden", LAYOUTS)
def test_any_layout(backend: Backend, device: torch.device, interpreted: bool, of_x: str, of_hidden: str) -> None:
    few = ("contiguous", "channels last")
    if interpreted and not (of_x in few and of_hidden in few):
        pytest.skip("a few layouts are enough for Triton interpreted")
    if of_x != of_hidden and "contiguous" not in (of_x, of_hidden):
        pytest.skip("either may be laid out alone: they are read apart")
    x, hidden, weight, bias = drawn(2, 17, 5, 21, device)
    lengths = counted([21, 11], device)
    inputs = [LAYOUTS[of_x](x), LAYOUTS[of_hidden](hidden), weight.T.contiguous().T, bias.repeat_interleave(2)[::2]]
    assert_parity(functional.weighted_moments_from_hidden, (*inputs, lengths), backend=backend)
    gradient = outcome(backend, inputs, lengths)[2]
    assert gradient.stride() == empty_gradient(inputs[0]).stride()


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_expanded_input(backend: Backend, device: torch.device, dim: int) -> None:
    x, hidden, weight, bias = drawn(3, 5, 4, 21, device)
    lengths = counted([21, 7, 1], device)
    same_x, same_hidden = (value.narrow(dim, 0, 1).expand(value.shape) for value in (x, hidden))
    for inputs in ((same_x, hidden), (x, same_hidden)):
        assert_parity(functional.weighted_moments_from_hidden, (*inputs, weight, bias, lengths), backend=backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_summed_in_float32(
    backend: Backend, device: torch.device, interpreted: bool, dtype: torch.dtype
) -> None:
    if interpreted and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16 as if they were whole numbers")
    shape, lengths = ((2, 3, 20, 40), [40, 23]) if interpreted else ((3, 33, 128, 200), [200, 171, 1])
    inputs = [value.to(dtype) for value in drawn(*shape, device)]
    assert_parity(
        functional.weighted_moments_from_hidden, (*inputs, counted(lengths, device)), backend=backend, dtype=dtype
    )
    mean, std, *gradients = outcome(backend, inputs, counted(lengths, device))
    assert mean.dtype == std.dtype == torch.float32 and all(value.dtype == dtype for value in gradients)


def test_mixed_types_meet_in_the_widest(backend: Backend, device: torch.device) -> None:
    x, hidden, weight, bias = drawn(2, 3, 4, 21, device)
    got = outcome(backend, [x.bfloat16(), hidden.bfloat16(), weight, bias])
    want = outcome(backend, [x.bfloat16().float(), hidden.bfloat16().float(), weight, bias])
    assert [value.dtype for value in got[2:]] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    assert all(torch.equal(have, expected.to(have.dtype)) for have, expected in zip(got, want, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_equals_the_op_that_takes_logits(backend: Backend, device: torch.device, layout: str) -> None:
    # Whole numbers, so that every product and sum is exact in any order.
    generator = torch.Generator().manual_seed(2)
    hidden, weight, bias = (
        torch.randint(-3, 4, size, generator=generator).float().to(device) for size in ((2, 6, 50), (5, 6), (5,))
    )
    x = LAYOUTS[layout](frames_like((2, 5, 50), device))
    lengths = counted([50, 23], device)
    got = functional.weighted_moments_from_hidden(x, hidden, weight, bias, lengths, backend=backend)
    logits = weight @ hidden + bias[:, None]
    want = functional.weighted_moments(x, logits, lengths, backend=backend)
    for have, expected in zip(got, want, strict=True):
        torch.testing.assert_close(have, expected, rtol=1e-6, atol=1e-6)
    op, of_logits = registered(backend)[0], "attentive_stats_pool" + ("" if backend == "native" else "_triton")
    statistics = op(x, hidden, weight, bias, lengths)[2:]
    expected = getattr(torch.ops.spkfast, of_logits)(x, logits, lengths)[2:]
    assert torch.equal(statistics[0], expected[0])  # the highest logit
    torch.testing.assert_close(statistics[1], expected[1], rtol=1e-6, atol=0)


# Awkward values


def test_an_offset_of_the_bias_changes_little(backend: Backend, device: torch.device) -> None:
    inputs = drawn(2, 3, 4, 60, device)
    for offset in (1e4, -1e4):
        assert_parity(functional.weighted_moments_from_hidden, (*inputs[:3], inputs[3] + offset, None), backend=backend)


def test_logits_spread_over_two_hundred(backend: Backend, device: torch.device, interpreted: bool) -> None:
    frames = 70 if interpreted else 600
    x, hidden, weight, bias = drawn(2, 3, 1, frames, device)
    for ramp in (torch.linspace(-1, 1, frames), torch.linspace(1, -1, frames)):
        hidden = ramp.to(device).expand(2, 1, frames)
        inputs = (x, hidden, 100 * torch.ones_like(weight), bias, counted([frames, frames - 5], device))
        assert_parity(functional.weighted_moments_from_hidden, inputs, backend=backend)


def test_constant_channels_have_finite_gradients(backend: Backend, device: torch.device) -> None:
    x, *rest = drawn(2, 4, 3, 50, device)
    x[:, 0], x[:, 1], x[:, 2] = 0.0, 1.0, -0.1
    mean, std, *gradients = outcome(backend, [x, *rest])
    torch.testing.assert_close(mean[:, :3].cpu(), torch.tensor([0.0, 1.0, -0.1]).expand(2, -1))
    assert (std[:, :3] == math.sqrt(torch.tensor(1e-7).item())).all()
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_a_large_mean_leaves_the_variance_accurate(
    backend: Backend, device: torch.device, interpreted: bool, layout: str
) -> None:
    frames = 70 if interpreted else 1001
    noise = 2 * torch.rand(2, 3, frames, generator=torch.Generator().manual_seed(3)) - 1
    inputs = [LAYOUTS[layout]((1e4 + noise).to(device)), *drawn(2, 3, 4, frames, device)[1:]]
    lengths = counted([frames, frames // 2], device)
    op = functional.weighted_moments_from_hidden
    exact = op(*(value.double() for value in inputs), lengths, backend="reference")
    plain = op(*inputs, lengths, backend="reference")
    got = op(*inputs, lengths, backend=backend)
    # As for the op that takes logits: a mean that errs by d moves the variance by at most 2 d sqrt(var) + d**2.
    d = FACTOR * max(1e4 * torch.finfo(torch.float32).eps, float((plain.mean - exact.mean).abs().max()))
    assert ((got.mean - exact.mean).abs() <= d).all()
    assert ((got.var - exact.var).abs() <= 2 * d * exact.var.sqrt() + d * d).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "slice", "every second frame"])
def test_padding_is_never_read(backend: Backend, device: torch.device, layout: str) -> None:
    lengths = [21, 9, 0, 1]
    x, hidden, weight, bias = drawn(len(lengths), 3, 4, 21, device)
    found = []
    for dirt in (0.0, math.nan, math.inf):
        x, hidden = x.clone(), hidden.clone()
        for row, count in enumerate(lengths):
            x[row, :, count:] = hidden[row, :, count:] = dirt
        found.append(outcome(backend, [LAYOUTS[layout](x), LAYOUTS[layout](hidden), weight, bias],
                             counted(lengths, device)))  # fmt: skip
    for got in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(got, found[0], strict=True))
    for gradient in found[0][2:4]:
        for row, count in enumerate(lengths):
            assert (gradient[row, :, count:] == 0).all() and gradient[row, :, :count].isfinite().all()


def test_nan_of_a_real_frame_spoils_its_row_alone(backend: Backend, device: torch.device, interpreted: bool) -> None:
    frames = 40
    x, hidden, weight, bias = drawn(3, 5, 4, frames, device)
    lengths = counted([frames, frames - 3, frames], device)
    clean = outcome(backend, [x, hidden, weight, bias], lengths)
    for frame in (0, frames - 4) if interpreted else range(frames - 3):
        dirty = x.clone()
        dirty[1, 2, frame] = math.nan
        mean, std, grad_x, *_ = outcome(backend, [dirty, hidden, weight, bias], lengths)
        spoilt = torch.zeros(3, 5, dtype=torch.bool, device=device)
        spoilt[1, 2] = True
        assert mean[spoilt].isnan().all() and std[spoilt].isnan().all()
        assert torch.equal(mean[~spoilt], clean[0][~spoilt]) and torch.equal(std[~spoilt], clean[1][~spoilt])
        assert grad_x[1, 2, : frames - 3].isnan().all() and (grad_x[1, :, frames - 3 :] == 0).all()
        dirty = hidden.clone()
        dirty[1, 2, frame] = math.nan
        mean, std, *_ = outcome(backend, [x, dirty, weight, bias], lengths)
        assert mean[1].isnan().all() and std[1].isnan().all()
        assert torch.equal(mean[::2], clean[0][::2]) and torch.equal(std[::2], clean[1][::2])


@pytest.mark.parametrize("shape", [(2, 3, 4, 1), (2, 3, 4, 0), (0, 3, 4, 5), (2, 0, 4, 5), (0, 0, 1, 0)], ids=str)
def test_small_and_empty(backend: Backend, device: torch.device, shape: tuple[int, int, int, int]) -> None:
    batch, channels, units, frames = shape
    inputs = drawn(batch, channels, units, frames, device)
    for lengths in (None, torch.zeros(batch, dtype=torch.int64, device=device)):
        mean, std, *gradients = outcome(backend, inputs, lengths)
        assert mean.shape == std.shape == (batch, channels)
        assert [gradient.shape for gradient in gradients] == [value.shape for value in inputs]
        if lengths is not None or frames == 0:
            assert (mean == 0).all() and (std == math.sqrt(torch.tensor(1e-7).item())).all()
            assert all((gradient == 0).all() for gradient in gradients)
        elif frames == 1:
            assert torch.equal(mean, inputs[0][..., 0]) and all((gradient == 0).all() for gradient in gradients[1:])
        elif units == 0 and channels:  # all frames weigh the same
            torch.testing.assert_close(mean, inputs[0].mean(dim=-1))


# Batches


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_row_alone_equals_row_in_batch(backend: Backend, device: torch.device, interpreted: bool, layout: str) -> None:
    shape, lengths = ((3, 3, 4, 37), ROWS[:3]) if interpreted else ((6, 67, 33, 37), ROWS)
    x, hidden, weight, bias = drawn(*shape, device)
    x = LAYOUTS[layout](x)
    op = functional.weighted_moments_from_hidden
    together = op(x, hidden, weight, bias, counted(lengths, device), backend=backend)
    for row in range(shape[0]):
        part = slice(row, row + 1)
        given = [counted(lengths[part], device)] + [None] * (lengths[row] == shape[3])
        for count in given:
            alone = op(x[part], hidden[part], weight, bias, count, backend=backend)
            assert torch.equal(alone.mean[0], together.mean[row]) and torch.equal(alone.var[0], together.var[row])


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("frames", [37, 700])
def test_padding_changes_no_bit(layout: str, frames: int) -> None:
    x, hidden, weight, bias = drawn(5, 19, 33, frames)
    lengths = [frames, frames - 1, frames // 2, 17, 1]
    op = functional.weighted_moments_from_hidden
    padded = op(LAYOUTS[layout](x), hidden, weight, bias, torch.tensor(lengths), backend="native")
    for row, count in enumerate(lengths):
        part = (slice(row, row + 1), slice(None), slice(count))
        alone = op(LAYOUTS[layout](x[part]), hidden[part], weight, bias, backend="native")
        assert torch.equal(alone.mean[0], padded.mean[row]) and torch.equal(alone.var[0], padded.var[row])


def test_threads_change_nothing() -> None:
    threads, inputs = torch.get_num_threads(), drawn(3, 200, 33, 123)
    lengths = torch.tensor([123, 77, 5])
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(functional.weighted_moments_from_hidden(*inputs, lengths, backend="native"))
        for other in found[1:]:
            assert torch.equal(other.mean, found[0].mean) and torch.equal(other.var, found[0].var)
    finally:
        torch.set_num_threads(threads)


# Gradients


def test_gradient_of_the_definition() -> None:
    leaves = [value.double().requires_grad_() for value in drawn(4, 3, 2, 6)]
    for lengths in (None, torch.tensor([6, 4, 1, 0])):
        for op in (functional.weighted_moments_from_hidden, functional.attentive_stats_pool_from_hidden):
            assert torch.autograd.gradcheck(lambda *args, op=op, n=lengths: op(*args, n, backend="reference"), leaves)


def test_gradient_is_the_same_in_parts(monkeypatch: pytest.MonkeyPatch, backend: Backend, device: torch.device) -> None:
    module = importlib.import_module("spkfast.ops.attentive_stats_pool_from_hidden")
    inputs = (*drawn(5, 3, 4, 21, device), counted([21, 13, 1, 0, 20], device))
    for rows in (1, 2, 5):
        monkeypatch.setitem(module._CHUNK_BYTES, device.type, rows * 2 * 4 * 3 * 21)
        assert_parity(functional.weighted_moments_from_hidden, inputs, backend=backend)


def test_gradients_that_nobody_asks_for(backend: Backend, device: torch.device) -> None:
    tensors, lengths = drawn(2, 3, 4, 21, device), counted([21, 13], device)
    for output in (0, 1):
        for wanted in range(4):
            found = []
            names: tuple[Backend, ...] = (backend, "reference")
            for name in names:
                leaves = [value.clone().requires_grad_(k == wanted) for k, value in enumerate(tensors)]
                moments = functional.weighted_moments_from_hidden(*leaves, lengths, backend=name)
                found += torch.autograd.grad(moments[output].sum(), leaves[wanted])
            torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    assert not functional.weighted_moments_from_hidden(*tensors, lengths, backend=backend).mean.requires_grad


def test_second_derivative_is_refused(backend: Backend, device: torch.device) -> None:
    leaves = [value.requires_grad_() for value in drawn(1, 2, 3, 5, device)]
    moments = functional.weighted_moments_from_hidden(*leaves, backend=backend)
    (gradient, *_) = torch.autograd.grad(moments.var.sum(), leaves, create_graph=True)
    with pytest.raises(ValueError, match="no second derivative here: use backend='reference'"):
        gradient.sum().backward()


def test_memory(backend: Backend, device: torch.device, interpreted: bool) -> None:
    if interpreted:
        pytest.skip("Triton interpreted allocates on its own")
    tensors = [value.requires_grad_() for value in drawn(32, 256, 32, 200, device)]
    lengths = counted([200, 150] * 16, device)

    def used(name: Backend) -> int:
        def step() -> tuple[Tensor, ...]:
            stats = functional.attentive_stats_pool_from_hidden(*tensors, lengths, backend=name)
            return torch.autograd.grad(stats.mean.sum() + stats.std.sum(), tensors)

        return peak_bytes(step, device) - sum(value.nbytes for value in tensors)

    def forward() -> Any:
        with torch.no_grad():
            return functional.attentive_stats_pool_from_hidden(*tensors, lengths, backend=backend)

    assert used(backend) < used("reference") / 3
    # The logits, of the size of x, are never there as a whole.
    assert peak_bytes(forward, device) < tensors[0].nbytes / 10


# Registration


def registered(backend: Backend) -> tuple[Any, Any]:
    suffix = "" if backend == "native" else "_triton"
    return (
        getattr(torch.ops.spkfast, f"attentive_stats_pool_from_hidden{suffix}"),
        getattr(torch.ops.spkfast, f"attentive_stats_pool_from_hidden{suffix}_backward"),
    )


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck(backend: Backend, device: torch.device, interpreted: bool, transposed: bool, ragged: bool) -> None:
    if interpreted and transposed != ragged:
        pytest.skip("half of them is enough for Triton interpreted")
    op, backward = registered(backend)
    x, *rest = drawn(2, 3, 4, 9, device)
    tensors = [channels_last(x) if transposed else x, *rest]
    lengths = counted([9, 4], device) if ragged else None
    outputs = op(*tensors, lengths)
    torch.library.opcheck(op, (*tensors, lengths))
    torch.library.opcheck(op, (*(value.detach().requires_grad_() for value in tensors), lengths))
    grads = [torch.randn_like(output) for output in outputs[:2]]
    torch.library.opcheck(backward, (*grads, *tensors, lengths, *outputs))


class Attention(nn.Module):
    """The op with its first product, as a model has them."""

    def __init__(self, backend: Backend = "auto") -> None:
        super().__init__()
        self.backend: Backend = backend
        self.first, self.last = nn.Conv1d(6, 4, 1), nn.Conv1d(4, 6, 1)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        assert self.last.bias is not None
        stats = functional.attentive_stats_pool_from_hidden(
            x, self.first(x).tanh(), self.last.weight, self.last.bias, lengths, backend=self.backend
        )
        return torch.cat(stats, dim=1)


def attention_step(model: Callable[..., Tensor], parameters: list[Tensor], batch: int, frames: int) -> list[Tensor]:
    x = channels_last(frames_like((batch, 6, frames))).requires_grad_()
    output = model(x, torch.arange(frames, frames - batch, -1))
    return [output.detach(), *torch.autograd.grad(output.square().sum(), [x, *parameters])]


def test_compiles_whole_and_once_for_all_lengths() -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    model = Attention("native")
    compiled, parameters = torch.compile(model, fullgraph=True, backend="aot_eager"), list(model.parameters())
    for number, (batch, frames) in enumerate([(2, 40), (3, 57), (4, 33), (5, 64), (2, 101), (6, 12)]):
        with torch._dynamo.config.patch(error_on_recompile=number >= 3):
            got = attention_step(compiled, parameters, batch, frames)
        for have, want in zip(got, attention_step(model, parameters, batch, frames), strict=True):
            torch.testing.assert_close(have, want)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_exports_whole(backend: Backend) -> None:
    batch, frames = torch.export.Dim("batch"), torch.export.Dim("frames", min=2)
    model = Attention(backend)
    inputs = (frames_like((2, 6, 40)), torch.tensor([40, 21]))
    program = torch.export.export(model, inputs, dynamic_shapes=({0: batch, 2: frames}, {0: batch}))
    for rows, count in ((3, 57), (1, 2), (5, 300)):
        x, lengths = frames_like((rows, 6, count)), torch.arange(count, count - rows, -1)
        torch.testing.assert_close(program.module()(x, lengths), model(x, lengths))


def test_autocast_changes_nothing(backend: Backend, device: torch.device) -> None:
    inputs, lengths = drawn(2, 3, 4, 21, device), counted([21, 13], device)
    names: tuple[Backend, ...] = (backend, "reference")
    for name in names:
        found = []
        for enabled in (False, True):
            leaves = [value.clone().requires_grad_() for value in inputs]
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled):
                moments = functional.weighted_moments_from_hidden(*leaves, lengths, backend=name)
            found.append([*moments, *torch.autograd.grad(moments.mean.sum() + moments.var.sum(), leaves)])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_autocast_does_not_reach_the_gradient(backend: Backend, device: torch.device) -> None:
    inputs, lengths = drawn(2, 3, 4, 21, device), counted([21, 13], device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = outcome(backend, inputs, lengths)
    assert all(torch.equal(a, b) for a, b in zip(got, outcome(backend, inputs, lengths), strict=True))


# Messages


def bad(tensors: list[Any], lengths: Any = None, match: str = "", **options: Any) -> None:
    lengths = torch.tensor(lengths) if isinstance(lengths, list) else lengths
    for op in (functional.weighted_moments_from_hidden, functional.attentive_stats_pool_from_hidden):
        with pytest.raises(spkfast.InputError, match=match):
            op(*tensors, lengths, **options)


def test_error_messages() -> None:
    x, hidden, weight, bias = drawn(2, 3, 4, 5)
    bad([x.numpy(), hidden, weight, bias], match="x must be a torch tensor, got ndarray")
    bad([x[0], hidden, weight, bias], match=r"x must have three dimensions, .*, got \(3, 5\)")
    bad([x.int(), hidden, weight, bias], match="x must be float16, bfloat16, float32 or float64, got torch.int32")
    bad([x, None, weight, bias], match="hidden must be a torch tensor, got NoneType")
    bad([x, hidden[0], weight, bias], match=r"hidden must have three dimensions, .*, got \(4, 5\)")
    bad([x, hidden[:, :0], weight[:, :0], bias], match="hidden must have at least one unit")
    bad([x, hidden, weight, None], match="bias must be a torch tensor, got NoneType")
    bad([x, hidden, weight.long(), bias], match="weight must be float16, .*, got torch.int64")
    bad([x, hidden.long(), weight, bias], match="hidden must be float16, .*, got torch.int64")
    bad([x, hidden[:1], weight, bias], match=r"hidden must have shape \(B, H, T\) = \(2, 4, 5\), got \(1, 4, 5\)")
    bad([x, hidden[..., :4], weight, bias], match=r"hidden must have shape .* = \(2, 4, 5\), got \(2, 4, 4\)")
    bad([x, hidden, weight.T, bias], match=r"weight must have shape \(C, H\) = \(3, 4\), got \(4, 3\)")
    bad([x, hidden, weight[:, :, None, None], bias], match=r"weight must have shape .*, got \(3, 4, 1, 1\)")
    bad([x, hidden, weight, bias[:2]], match=r"bias must have shape \(C,\) = \(3,\), got \(2,\)")
    meta = [value.to("meta") for value in (hidden, weight, bias)]
    for place, name in enumerate(("hidden", "weight", "bias"), 1):
        tensors = [x, hidden, weight, bias]
        tensors[place] = meta[place - 1]
        bad(tensors, match=f"{name} must be on cpu, where x is, got meta")
    good = [x, hidden, weight, bias]
    bad(good, [5, 6], match=r"lengths must lie in 0\.\.5, row 1 has 6")
    bad(good, [5], match=r"lengths must have shape \(B,\) = \(2,\), got \(1,\)")
    bad(good, torch.ones(2), match="lengths must be an int64 tensor of frames, got torch.float32")
    bad(good, backend="fast", match="backend must be one of auto, reference, native, triton, got 'fast'")
    bad([x.double(), *good[1:]], backend="native", match="cannot run attentive_stats_pool_from_hidden on cpu: it compu")
    with pytest.raises(spkfast.InputError, match="eps must be a positive number, got 0"):
        functional.attentive_stats_pool_from_hidden(*good, eps=0.0)


def test_lengths_out_of_range_are_clamped_where_nobody_asks(backend: Backend, device: torch.device) -> None:
    op, _ = registered(backend)
    inputs, wild = drawn(4, 3, 4, 9, device), counted([-1, 10, 2**62, -(2**63)], device)
    for one, other in zip(op(*inputs, wild), op(*inputs, wild.clamp(0, 9)), strict=True):
        assert torch.equal(one, other)


def test_kernel_checks_its_arguments() -> None:
    op = torch.ops.spkfast.attentive_stats_pool_from_hidden
    x, hidden, weight, bias = drawn(2, 3, 4, 5)
    inputs = (x, hidden, weight, bias, torch.tensor([5, 4]))
    wrong: list[tuple[int, Any, str]] = [
        (0, x.double(), "x must be Float, BFloat16 or Half, got Double"),
        (0, x[0], r"x must have shape \(any, any, any\), got \(3, 5\)"),
        (1, hidden[..., :4], r"hidden must have shape \(2, any, 5\), got \(2, 4, 4\)"),
        (1, hidden.half(), "hidden must be Float, got Half"),
        (2, weight.T, r"weight must have shape \(3, 4\), got \(4, 3\)"),
        (2, weight.bfloat16(), "weight must be Float, got BFloat16"),
        (3, bias[:2], r"bias must have shape \(3\), got \(2\)"),
        (3, bias.double(), "bias must be Float, got Double"),
        (4, torch.tensor([5, 4, 3]), r"lengths must have shape \(2\), got \(3\)"),
        (4, torch.tensor([5.0, 4.0]), "lengths must be Long, got Float"),
    ]
    for position, value, message in wrong:
        with pytest.raises(ValueError, match=message):
            op(*inputs[:position], value, *inputs[position + 1 :])
