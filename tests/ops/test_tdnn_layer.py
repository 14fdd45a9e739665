"""tdnn_layer: oracles, each level and precision against the definition, batches, registration, messages."""

from __future__ import annotations

import importlib
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import spkfast
from spkfast import backends, functional, reference
from spkfast.ops._packing import pack_layer
from spkfast.ops.tdnn_layer import pack_tdnn_layer, run_packed_layer
from spkfast.reference import Precision, TdnnParams
from spkfast.reference.tdnn_layer import frames_at, quantised_weight, quantiser
from tests.fuzz.bounds_products import assert_within, exact, layer
from tests.ops.pooling import LAYOUTS, channels_last
from tests.ops.products import (
    EXACT_RANGE,
    LEVELS,
    NOISE,
    PRECISIONS,
    assert_near_definition,
    at_level,
    exact_layer,
    folded,
    mapped,
    noise,
    noisy_layer,
    skip_interpreted,
    threads,
    trained,
    whole,
)

Backend = backends.Backend

# N, C, K: channels on either side of a vector, a tile, a panel; operands that leave a part of a step.
SIZES = [(1, 1, 1), (3, 2, 3), (17, 5, 3), (33, 7, 5), (64, 64, 1), (65, 31, 1), (130, 66, 3)]


def run(x: Tensor | list[Tensor], params: TdnnParams, lengths: Any = None, **options: Any) -> Tensor:
    lengths = torch.tensor(lengths) if isinstance(lengths, list) else lengths
    options = {"backend": "native", "input_range": NOISE} | options
    with torch.no_grad():
        return functional.tdnn_layer(x, params, lengths, **options)


# The definition


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_values_by_hand(backend: Backend) -> None:
    x = torch.tensor([[[1.0, 2.0, 4.0, 99.0]]])
    params = TdnnParams(torch.tensor([[[1.0, 10.0, 100.0]]]), torch.tensor([-0.5]))
    assert run(x, params, [3], backend=backend).tolist() == [[[209.5, 420.5, 41.5, 0.0]]]
    assert run(x, params, [3], backend=backend, padding_mode="reflect").tolist() == [[[211.5, 420.5, 241.5, 0.0]]]
    assert run(x, params, [3], backend=backend, dilation=2).tolist() == [[[409.5, 19.5, 40.5, 0.0]]]
    affine = TdnnParams(-params.weight, torch.tensor([210.0]), torch.tensor([3.0]), torch.tensor([-1.0]))
    assert run(x, affine, [3], backend=backend).tolist() == [[[-1.0, -1.0, 503.0, 0.0]]]
    assert run(x, affine, [3], backend=backend, relu=False).tolist() == [[[-1.0, -634.0, 503.0, 0.0]]]
    small = TdnnParams(params.weight / 400)
    got = run(x, small, [3], backend=backend, offset=torch.tensor([[0.25]]), tanh=True)
    assert got[0, 0].tolist() == pytest.approx([*(math.tanh(value / 400 + 0.25) for value in (210, 421, 42)), 0])


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
@pytest.mark.parametrize(("taps", "dilation"), [(1, 1), (3, 1), (3, 4), (5, 2)])
def test_definition_is_that_of_torch_modules(taps: int, dilation: int, mode: Any) -> None:
    convolution = nn.Conv1d(5, 7, taps, dilation=dilation, padding=taps // 2 * dilation, padding_mode=mode)
    modules = trained(nn.Sequential(convolution, nn.ReLU(), nn.BatchNorm1d(7)))
    x, lengths = noise(3, 5, 20).double(), [20, 13, 9]
    got = run(x, folded(modules[0], modules[2]), lengths, backend="reference", dilation=dilation, padding_mode=mode)
    assert got.dtype == torch.float64
    for row, count in enumerate(lengths):
        want = modules(x[row : row + 1, :, :count])[0]
        torch.testing.assert_close(got[row, :, :count], want, rtol=1e-12, atol=1e-12)
        assert (got[row, :, count:] == 0).all()


@pytest.mark.parametrize("frames", [1, 2, 3, 7])
def test_short_rows_are_mirrored_again(frames: int) -> None:
    x = noise(1, 2, frames)
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (9, 9)), mode="reflect")
    for shift in (-9, -4, 0, 5, 9):
        got = frames_at(x, shift, None, True).numpy()
        np.testing.assert_array_equal(got, padded[:, :, 9 + shift : 9 + shift + frames])


def test_operands_by_hand() -> None:
    assert quantiser((-1.0, 1.55)) == (pytest.approx(0.01), 100)
    assert quantiser((1.0, 2.55)) == (pytest.approx(0.01), 0)  # widened to hold 0
    assert quantiser((-2.55, -1.0)) == (pytest.approx(0.01), 255)
    whole_weight, unit = quantised_weight(torch.tensor([[[1.0, -0.5, 0.25]], [[0.0, 0.0, 0.0]]]))
    assert whole_weight.tolist() == [[[127, -64, 32]], [[0, 0, 0]]] and float(unit[0]) == pytest.approx(1 / 127)
    x, one = torch.tensor([[[0.004, 0.996, 3.0, -3.0]]]), TdnnParams(torch.ones(1, 1, 1))
    for backend in ("native", "reference"):
        got = run(x, one, precision="int8", input_range=(-1.0, 1.55), relu=False, backend=backend)
        assert got.dtype == torch.bfloat16
        assert got[0, 0].tolist() == torch.tensor([0.0, 1.0, 1.55, -1.0]).bfloat16().tolist()
        # The second value is rounded to 1 + 2**-7.
        got = run(torch.tensor([[[1.0, 1.0 + 2.0**-8 + 2.0**-9]]]), one, precision="bf16", backend=backend)
        assert got.tolist() == [[[1.0, 1.0078125]]]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_bounds_are_about_the_definition(precision: Precision) -> None:
    x, params, lengths = noise(2, 9, 20), noisy_layer(6, 9, 3), torch.tensor([20, 11])
    known = layer(exact(x), params, lengths, precision, NOISE, dilation=2, tanh=True)
    wide = TdnnParams(*(value.double() for value in params if value is not None))
    want = run(x.double(), wide, lengths, backend="reference", precision=precision, dilation=2, tanh=True)
    # Of bytes the weights are those that float32 has.
    tolerance = {"fp32": 1e-14, "bf16": 2.0**-8, "int8": 2.0**-8}[precision]
    torch.testing.assert_close(known.value, want.double(), rtol=tolerance, atol=tolerance)
    assert float(known.error.amax()) < 1e-4


# Every level and precision


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("level", LEVELS)
def test_every_level_matches_the_definition(
    monkeypatch: pytest.MonkeyPatch, level: str, precision: Precision, size: tuple[int, int, int]
) -> None:
    at_level(monkeypatch, level)
    params, lengths = noisy_layer(*size), torch.tensor([13, 12, 7, 6, 1, 0])
    for dtype in (torch.float32, torch.bfloat16):
        x = noise(len(lengths), size[1], 13).to(dtype)
        for mode, tanh in (("zeros", False), ("reflect", True)):
            got = run(x, params, lengths, precision=precision, padding_mode=mode, dilation=2, tanh=tanh)
            assert got.dtype == (torch.float32 if precision == "fp32" else torch.bfloat16)
            options: Any = {"dilation": 2, "reflect": mode == "reflect", "tanh": tanh}
            assert_within(got, layer(exact(x), params, lengths, precision, NOISE, **options))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("level", LEVELS)
def test_products_in_chunks_match_the_definition(
    monkeypatch: pytest.MonkeyPatch, level: str, precision: Precision
) -> None:
    at_level(monkeypatch, level)
    # At each precision an input of several chunks beside one of less; frames of more than a block, rows that end in a
    # part of a tile; a panel and a part of one.
    parts, lengths = (2080, 50), torch.tensor([203, 200, 5])
    params = noisy_layer(67, sum(parts), 1)
    inputs = [channels_last(noise(3, part, 203, seed=part)) for part in parts]
    got = run(inputs, params, lengths, precision=precision)
    assert_within(got, layer(exact(torch.cat(inputs, dim=1)), params, lengths, precision, NOISE))
    for row, count in enumerate(lengths.tolist()):
        alone = run([part[row : row + 1, :, :count] for part in inputs], params, precision=precision)
        assert torch.equal(got[row : row + 1, :, :count], alone)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("level", LEVELS)
def test_every_level_is_exact_where_nothing_rounds(
    monkeypatch: pytest.MonkeyPatch, level: str, precision: Precision
) -> None:
    at_level(monkeypatch, level)
    for outputs, inputs, taps in SIZES:
        x, params = whole(3, inputs, 29, most=100) / 16, exact_layer(precision, outputs, inputs, taps)
        options: Any = {"precision": precision, "input_range": EXACT_RANGE, "padding_mode": "reflect"}
        got = run(x, params, [29, 13, 5], **options)
        wide = mapped(params, torch.Tensor.double)
        assert torch.equal(got, run(x.double(), wide, [29, 13, 5], backend="reference", **options).to(got.dtype))


@pytest.mark.parametrize("level", LEVELS)
def test_sums_of_the_largest_bytes(monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    at_level(monkeypatch, level)
    # An instruction that sums pairs in 16 bits would saturate.
    x, params = torch.full((1, 300, 8), 255.0), TdnnParams(torch.full((20, 300, 1), 127.0))
    params.weight[10:] *= -1
    got = run(x, params, precision="int8", input_range=(0.0, 255.0), relu=False)
    want = torch.full((1, 20, 8), 255.0 * 127 * 300)
    want[:, 10:] *= -1
    assert torch.equal(got, want.bfloat16())


@pytest.mark.parametrize("shape", [(1, 80, 512, 5, 40), (2, 512, 512, 1, 37), (1, 1536, 1536, 1, 9)], ids=str)
def test_matches_reference(backend: Backend, device: torch.device, shape: tuple[int, int, int, int, int]) -> None:
    skip_interpreted(backend, device)
    batch, inputs, outputs, taps, frames = shape
    x, params = noise(batch, inputs, frames), noisy_layer(outputs, inputs, taps)
    lengths = torch.tensor([frames, frames // 2][:batch])

    def call(name: Backend, dtype: torch.dtype) -> Tensor:
        moved = mapped(params, lambda value: value.to(device, dtype))
        return run(x.to(device, dtype), moved, lengths.to(device), backend=name)

    assert_near_definition(call(backend, torch.float32), lambda dtype: call("reference", dtype))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_several_inputs_are_one(precision: Precision) -> None:
    parts, params = [noise(2, channels, 11, seed=channels) for channels in (3, 8, 1, 6)], noisy_layer(9, 18, 3)
    got = run([channels_last(part) for part in parts], params, [11, 4], precision=precision)
    # The order of a sum is another: taps of one part follow those of the part before.
    assert_within(got, layer(exact(torch.cat(parts, dim=1)), params, torch.tensor([11, 4]), precision, NOISE))


@pytest.mark.parametrize("sizes", [(2, 3, 1, 4), (2, 0, 3, 0), (2, 3, 0, 4, 1), (1, 0, 0, 0)], ids=str)
def test_triton_joins_all_inputs_but_two(monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...]) -> None:
    pytest.importorskip("triton")
    module, calls = importlib.import_module("spkfast.kernels.triton.tdnn_layer"), []
    monkeypatch.setattr(module, "multiply", lambda *arguments, **_: calls.append(arguments))
    params, parts = noisy_layer(5, sum(sizes), 3), [noise(2, size, 7, seed=k) for k, size in enumerate(sizes)]
    packed = pack_layer(params, sizes, "fp32", backend="triton")
    module.forward(parts, packed.weight, packed.vectors, None, None, [0, 3, 1, 0, 1, 1, 0], [])
    ((inputs, weight, *_),) = calls
    assert torch.equal(torch.cat(inputs, dim=1), torch.cat(parts, dim=1)) and len(inputs) == 3
    assert torch.equal(weight, pack_layer(params, [x.shape[1] for x in inputs], "fp32", backend="triton").weight)


def test_wider_and_other_types_go_to_the_definition() -> None:
    x, params = noise(1, 3, 5), noisy_layer(4, 3, 1)
    for dtype, wide in ((torch.float64, torch.float64), (torch.float16, torch.float32)):
        got = run(x.to(dtype), params, backend="auto")
        assert got.dtype == wide and torch.equal(got, run(x.to(dtype), params, backend="reference"))
    got = run(x, params, backend="auto", precision="fp16")
    assert got.dtype == torch.float16 and torch.equal(got, run(x, params, backend="reference", precision="fp16"))
    for dtype in (torch.bfloat16, torch.float64):  # of the weights alone
        other = mapped(params, lambda value, dtype=dtype: value.to(dtype))
        same = mapped(other, torch.Tensor.float)
        assert torch.equal(run(x, other), run(x, same))


# Layouts and batches


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout: str, precision: Precision) -> None:
    # A slice lies among NaN.
    x, params, lengths = noise(3, 17, 21), noisy_layer(19, 17, 3), [21, 11, 1]
    for dtype in (torch.float32, torch.bfloat16):
        want = run(x.to(dtype), params, lengths, precision=precision)
        assert torch.equal(run(LAYOUTS[layout](x.to(dtype)), params, lengths, precision=precision), want)
        assert want.stride() == (21 * 19, 1, 19)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_expanded_input(dim: int) -> None:
    x = noise(3, 5, 9).narrow(dim, 0, 1).expand(3, 5, 9)
    params = noisy_layer(7, 5, 3)
    assert torch.equal(run(x, params), run(x.contiguous(), params))
    offset = noise(1, 7).expand(3, 7)
    assert torch.equal(run(x, params, offset=offset), run(x, params, offset=offset.contiguous()))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_of_any_layout(precision: Precision) -> None:
    x, params = noise(1, 6, 9), noisy_layer(5, 6, 3)
    other = TdnnParams(
        params.weight.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        *(value.repeat_interleave(2)[::2] for value in params[1:] if value is not None),
    )
    assert torch.equal(run(x, other, precision=precision), run(x, params, precision=precision))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("level", LEVELS)
def test_rows_alone_and_threads_change_no_bit(
    monkeypatch: pytest.MonkeyPatch, level: str, precision: Precision
) -> None:
    at_level(monkeypatch, level)
    # More frames than one wave takes, and work for several threads.
    lengths = [300, 37, 0, 250, 1, 300, 6]
    x, params, offset = noise(len(lengths), 13, 300), noisy_layer(70, 13, 3), noise(len(lengths), 70)
    options: Any = {"precision": precision, "offset": offset, "dilation": 3, "padding_mode": "reflect"}
    found = [run(x, params, lengths, **options) for _ in threads(1, 2, 3)]
    assert torch.equal(found[1], found[0]) and torch.equal(found[2], found[0])
    for row, count in enumerate(lengths):
        part = slice(row, row + 1)
        alone = run(x[part, :, :count], params, **(options | {"offset": offset[part]}))
        assert torch.equal(alone[0], found[0][row, :, :count])
        assert (found[0][row, :, count:] == 0).all()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "slice"])
def test_padding_is_never_read(layout: str, precision: Precision) -> None:
    lengths, params = [21, 9, 0, 1], noisy_layer(8, 5, 5)
    found = []
    for dirt in (0.0, math.nan, math.inf):
        x = noise(4, 5, 21)
        for row, count in enumerate(lengths):
            x[row, :, count:] = dirt
        found.append(run(LAYOUTS[layout](x), params, lengths, precision=precision, dilation=2))
    assert torch.equal(found[1], found[0]) and torch.equal(found[2], found[0])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("level", LEVELS)
def test_nan_stays_where_it_is_read(monkeypatch: pytest.MonkeyPatch, level: str, precision: Precision) -> None:
    at_level(monkeypatch, level)
    params = noisy_layer(20, 5, 3)
    for tanh in (False, True):
        x = noise(2, 5, 11)
        clean = run(x, params, precision=precision, tanh=tanh)
        x[1, 2, 6] = math.nan
        got = run(x, params, precision=precision, tanh=tanh)
        assert got[1, :, 5:8].isnan().all()
        got[1, :, 5:8] = clean[1, :, 5:8]
        assert torch.equal(got, clean)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nothing_is_left_of_an_earlier_call(precision: Precision) -> None:
    # Odd channels: a last step of two bfloat16 numbers has room for one that does not exist.
    x, params = noise(2, 5, 40), noisy_layer(7, 5, 3)
    want = run(x, params, precision=precision, offset=torch.zeros(2, 7))
    run(
        torch.full((2, 6, 90), math.nan), noisy_layer(9, 6, 3), precision=precision, offset=torch.full((2, 9), math.nan)
    )
    assert torch.equal(run(x, params, precision=precision, offset=torch.zeros(2, 7)), want)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 3, 0), (0, 3, 0), (2, 3, 1)], ids=str)
def test_small_and_empty(shape: tuple[int, int, int], precision: Precision) -> None:
    x, params = noise(*shape), noisy_layer(4, 3, 3)
    for lengths in (None, torch.zeros(shape[0], dtype=torch.int64)):
        got = run(x, params, lengths, precision=precision, padding_mode="reflect")
        assert got.shape == (shape[0], 4, shape[2])
        if lengths is not None:
            assert (got == 0).all()
        else:
            assert_within(got, layer(exact(x), params, None, precision, NOISE, reflect=True))


# Packed weights


@pytest.mark.parametrize("precision", PRECISIONS)
def test_packed_weights(precision: Precision) -> None:
    parts, params = [noise(2, 3, 9), noise(2, 6, 9)], noisy_layer(5, 9, 3)
    packed = pack_tdnn_layer(params, [3, 6], precision=precision, input_range=NOISE)
    want = run(parts, params, [9, 2], precision=precision)
    changed = params._replace(weight=params.weight + 1)  # is not read again
    for _ in range(2):
        assert torch.equal(run(parts, changed, [9, 2], precision=precision, packed=packed), want)
    single = pack_tdnn_layer(params, precision=precision, input_range=NOISE)
    joined = torch.cat(parts, dim=1)
    assert torch.equal(
        run(joined, params, precision=precision, packed=single), run(joined, params, precision=precision)
    )


def test_packed_weights_that_do_not_fit() -> None:
    x, params = noise(1, 6, 9), noisy_layer(5, 6, 1)
    packed = pack_tdnn_layer(params, precision="bf16")
    with pytest.raises(spkfast.InputError, match="packed must be of precision 'fp32', got 'bf16'"):
        run(x, params, packed=packed)
    for other, message in (
        (noisy_layer(7, 6, 1), "packed must have N = 5 and K = 1, as weight has, got 7 and 1"),
        (noisy_layer(5, 6, 3), "packed must have N = 5 and K = 1, as weight has, got 5 and 3"),
        (noisy_layer(5, 5, 1), r"x must have \(5,\) channels, as packed has, got \(6,\)"),  # 5 and 6 take as many bytes
    ):
        with pytest.raises(spkfast.InputError, match=message):
            run(x, params, packed=pack_tdnn_layer(other, precision="bf16"), precision="bf16")
    for parts in ([3, 3], [4, 2]):  # as many bytes again
        with pytest.raises(spkfast.InputError, match=r"x must have \(.*\) channels, as packed has, got \(2, 4\)"):
            run([x[:, :2], x[:, 2:]], params, packed=pack_tdnn_layer(params, parts))
    with pytest.raises(spkfast.InputError, match=r"x must have \(6,\) channels, as packed has, got \(5,\)"):
        run_packed_layer([x[:, :5]], packed, None)
    matrix = pack_layer(params, [6], "fp32", backend="triton")
    with pytest.raises(
        spkfast.InputError, match="form that backend 'native' reads on cpu, got a matrix for other kern"
    ):
        run(x, params, packed=matrix)
    elsewhere = packed._replace(weight=packed.weight.to("meta"))
    with pytest.raises(spkfast.InputError, match="packed must be on cpu, where x is, got meta"):
        run(x, params, packed=elsewhere, precision="bf16")
    for backend in ("native", "triton"):
        with pytest.raises(spkfast.InputError, match=r"parts must add up to the 6 channels of weight, got \[3, 4\]"):
            pack_layer(params, [3, 4], "fp32", backend=backend)
    with pytest.raises(spkfast.InputError, match="unknown precision 'bf61'"):
        pack_tdnn_layer(params, precision="bf61")  # type: ignore[arg-type]
    with pytest.raises(spkfast.InputError, match="unknown precision 'bf61'"):
        pack_layer(params, [6], "bf61")  # type: ignore[arg-type]
    with pytest.raises(spkfast.InputError, match="precision='int8' needs input_range"):
        pack_tdnn_layer(params, precision="int8")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_bytes_of_weights_that_are_not_finite(value: float) -> None:
    x, params = noise(1, 6, 9), noisy_layer(5, 6, 1)
    params.weight[2, 3] = value
    bad(x, params, precision="int8", match="weight must be finite at precision='int8', got NaN or infinity")
    assert run(x, params, precision="bf16")[:, 2].isnan().any() or abs(value) == math.inf


def test_sums_of_bytes_fit_32_bits() -> None:
    most = (2**31 - 1) // (255 * 127)
    # One tap more would wrap where all bytes are the largest; three taps, as the number of products counts.
    params, x = TdnnParams(torch.ones(1, most, 1)), torch.full((1, most, 1), 255.0)
    got = run(x, params, precision="int8", input_range=(0.0, 255.0))
    assert float(got) == float(torch.tensor(255.0 * most).bfloat16())
    for channels, taps in ((most + 1, 1), (most // 3 + 1, 3)):
        with pytest.raises(spkfast.InputError, match=f"at most {most} products .* got {channels * taps}"):
            pack_tdnn_layer(TdnnParams(torch.ones(1, channels, taps)), precision="int8", input_range=(0.0, 255.0))


def test_inputs_for_which_a_launch_has_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends._MISSING, "cuda", {"tdnn_layer": {"triton": "none here"}})
    packed = pack_layer(noisy_layer(5, 17, 1), 17 * [1], "fp32", backend="triton")
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, params = 17 * [torch.empty(1, 1, 9, device="cuda")], TdnnParams(torch.empty(5, 17, 1, device="cuda"))
        assert functional.tdnn_layer(x, params).shape == (1, 5, 9)  # by the definition
        message = "cannot run tdnn_layer on cuda: its C.. kernel takes at most 16 tensors as x, got 17"
        with pytest.raises(spkfast.InputError, match=message):
            functional.tdnn_layer(x, params, backend="native")
        with pytest.raises(spkfast.InputError, match=message):
            run_packed_layer(x, packed, None)


# Gradients


def test_gradient_goes_through_the_definition() -> None:
    x, params = noise(2, 3, 6).double().requires_grad_(), noisy_layer(4, 3, 3)
    leaves = [value.double().requires_grad_() for value in params if value is not None]
    lengths = torch.tensor([6, 3])

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return functional.tdnn_layer(x, TdnnParams(*values), lengths, dilation=2, padding_mode="reflect", tanh=True)

    assert torch.autograd.gradcheck(call, [x, *leaves])
    # In float32 the kernel exists, and would be chosen but for the gradient.
    single = x.detach().float().requires_grad_()
    (gradient,) = torch.autograd.grad(functional.tdnn_layer(single, params, lengths).sum(), single)
    assert gradient.isfinite().all() and (gradient[1, :, 3:] == 0).all()


def test_kernels_without_gradient() -> None:
    x, params = noise(1, 3, 6).requires_grad_(), noisy_layer(4, 3, 1)
    with pytest.raises(
        spkfast.InputError, match="tdnn_layer is an inference form, whose kernels have no gradient; call"
    ):
        functional.tdnn_layer(x, params, backend="native")
    for wanted in range(4):
        leaves = [value.clone().requires_grad_(k == wanted) for k, value in enumerate(params) if value is not None]
        with pytest.raises(spkfast.InputError, match="inference form"):
            functional.tdnn_layer(x.detach(), TdnnParams(*leaves), backend="native")
    with pytest.raises(spkfast.InputError, match="inference form"):
        functional.tdnn_layer(x.detach(), params, offset=noise(1, 4).requires_grad_(), backend="native")
    with torch.no_grad():
        assert not functional.tdnn_layer(x, params, backend="native").requires_grad
    packed = pack_tdnn_layer(params)
    out = torch.ops.spkfast.tdnn_layer(
        [x], packed.weight, packed.vectors, None, None, [0, 1, 1, 0, 1, 1, 0], [1.0, 0.0]
    )
    with pytest.raises(ValueError, match="tdnn_layer is an inference form without a gradient: use backend='reference'"):
        out.sum().backward()


# Registration


def op_arguments(
    precision: Precision, x: list[Tensor], offset: Tensor | None, lengths: Tensor | None
) -> tuple[Any, ...]:
    packed = pack_tdnn_layer(noisy_layer(4, 7, 3), [3, 4], precision=precision, input_range=NOISE)
    integers = [packed.code, 3, 2, 1, 1, 1, 0]
    return x, packed.weight, packed.vectors, offset, lengths, integers, list(packed.input_quantiser)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("ragged", [False, True])
def test_opcheck(precision: Precision, ragged: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = [channels_last(noise(2, 3, 9)).to(dtype), noise(2, 4, 9).to(dtype)]
        offset, lengths = (noise(2, 4), torch.tensor([9, 4])) if ragged else (None, None)
        torch.library.opcheck(torch.ops.spkfast.tdnn_layer, op_arguments(precision, x, offset, lengths))
    for parts in ([7], [3, 4], [1, 1, 5]):
        code = PRECISIONS.index(precision)
        torch.library.opcheck(torch.ops.spkfast.product_pack, (whole(70, 7, 3), parts, code))
    packed = torch.ops.spkfast.product_pack(whole(70, 7, 3).requires_grad_(), [7], code)
    assert packed.dtype == torch.uint8 and not packed.requires_grad


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_compiles_whole(precision: Precision) -> None:
    torch.compiler.reset()
    params = noisy_layer(4, 6, 3)
    packed = pack_tdnn_layer(params, precision=precision, input_range=NOISE)

    def model(x: Tensor, lengths: Tensor) -> Tensor:
        first = run(x, params, lengths, precision=precision)  # packs in the graph
        return first + run(x, params, lengths, precision=precision, packed=packed, backend="auto")

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for number, (batch, frames) in enumerate([(2, 20), (3, 27), (4, 13), (5, 31)]):
        x, lengths = noise(batch, 6, frames), torch.arange(frames, frames - batch, -1)
        with torch._dynamo.config.patch(error_on_recompile=number >= 2):
            assert torch.equal(compiled(x, lengths), model(x, lengths))


class Layer(nn.Module):
    def __init__(self, precision: Precision) -> None:
        super().__init__()
        self.convolution, self.precision = nn.Conv1d(6, 4, 3), precision

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        params = TdnnParams(self.convolution.weight, self.convolution.bias)
        return functional.tdnn_layer(x, params, lengths, precision=self.precision, input_range=NOISE)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_exports_whole(precision: Precision) -> None:
    batch, frames = torch.export.Dim("batch"), torch.export.Dim("frames", min=2)
    model = Layer(precision).eval().requires_grad_(False)
    inputs = (noise(2, 6, 40), torch.tensor([40, 21]))
    with torch.no_grad():
        program = torch.export.export(model, inputs, dynamic_shapes=({0: batch, 2: frames}, {0: batch}))
        for rows, count in ((3, 57), (1, 2), (5, 300)):
            x, lengths = noise(rows, 6, count), torch.arange(count, count - rows, -1)
            assert torch.equal(program.module()(x, lengths), model(x, lengths))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_meta_tensors_have_shapes(precision: Precision) -> None:
    params = mapped(noisy_layer(4, 3, 3), lambda value: value.to("meta"))
    got = run(noise(2, 3, 9).to("meta"), params, backend="auto", precision=precision)
    assert got.is_meta and got.shape == (2, 4, 9)
    with pytest.raises(spkfast.InputError, match="on meta: meta tensors have no values"):
        run(noise(2, 3, 9).to("meta"), params, backend="native")


def test_autocast_changes_nothing() -> None:
    x, params = noise(2, 3, 9), noisy_layer(4, 3, 3)
    for backend in ("native", "reference"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = run(x, params, backend=backend)
        assert torch.equal(got, run(x, params, backend=backend))


# Messages


def bad(x: Any, params: TdnnParams, lengths: Any = None, match: str = "", **options: Any) -> None:
    with pytest.raises(spkfast.InputError, match=match):
        run(x, params, lengths, **({"backend": "auto"} | options))


def test_error_messages() -> None:
    x, params = noise(2, 3, 5), noisy_layer(4, 3, 3)
    bad([], params, match="x must have at least one tensor")
    bad([x.numpy()], params, match="x must be a torch tensor, got ndarray")
    bad(x[0], params, match=r"x must have three dimensions, .*, got \(3, 5\)")
    bad(x.int(), params, match="x must be float16, bfloat16, float32 or float64, got torch.int32")
    bad(
        [x, x[:1]],
        params,
        match=r"x must agree in batch, frames and type, got \(2, 3, 5\) torch.float32 and \(1, 3,",
    )
    bad([x, x[..., 1:]], params, match=r"x must agree .* and \(2, 3, 4\) torch.float32")
    bad([x, x.bfloat16()], params, match=r"x must agree .* and \(2, 3, 5\) torch.bfloat16")
    bad([x, x.to("meta")], params, match="x must be on cpu, where x is, got meta")
    bad([x, x], params, match=r"weight must have shape \(N, C, K\) with C = 6 and odd K, got \(4, 3, 3\)")
    bad(x, params._replace(weight=params.weight[..., :2]), match=r"weight must have shape .* odd K, got \(4, 3, 2\)")
    bad(x, params._replace(weight=params.weight[..., 0]), match=r"weight must have shape .* odd K, got \(4, 3\)")
    bad(x, params._replace(weight=params.weight.int()), match="weight must be float16, .*, got torch.int32")
    bad(x[:, :0], TdnnParams(torch.zeros(4, 0, 1)), match=r"weight must not be empty, got \(4, 0, 1\)")
    bad(x, TdnnParams(torch.zeros(0, 3, 1)), match=r"weight must not be empty, got \(0, 3, 1\)")
    bad(x, params._replace(scale=None), match="scale and shift must be given together")
    bad(x, params._replace(shift=None), match="scale and shift must be given together")
    for name in ("bias", "scale", "shift"):
        value = getattr(params, name)
        bad(x, params._replace(**{name: value[:3]}), match=rf"{name} must have shape \(N,\) = \(4,\), got \(3,\)")
        bad(x, params._replace(**{name: value.to("meta")}), match=f"{name} must be on cpu, where x is, got meta")
        bad(x, params._replace(**{name: value.long()}), match=f"{name} must be float16, .*, got torch.int64")
    bad(x, params, offset=noise(2, 3), match=r"offset must have shape \(B, N\) = \(2, 4\), got \(2, 3\)")
    bad(x, params, offset=noise(2, 4).int(), match="offset must be float16, .*, got torch.int32")
    bad(x, params, offset=noise(2, 4).to("meta"), match="offset must be on cpu, where x is, got meta")
    bad(x, params, [5, 6], match=r"lengths must lie in 0\.\.5, row 1 has 6")
    bad(x, params, [5], match=r"lengths must have shape \(B,\) = \(2,\), got \(1,\)")
    bad(x, params, torch.ones(2), match="lengths must be an int64 tensor of frames, got torch.float32")
    bad(x, params, dilation=0, match="dilation must be at least 1, got 0")
    bad(x, params, padding_mode="mirror", match="unknown padding_mode 'mirror'; known: zeros, reflect")
    bad(x, params, precision="fp8", match="unknown precision 'fp8'; known: fp32, bf16, fp16, int8")
    bad(x, params, precision="int8", input_range=None, match="precision='int8' needs input_range, the smallest and the")
    for wrong in ((1.0, 0.0), (-math.inf, 0.0), (0.0, math.nan)):
        bad(x, params, precision="int8", input_range=wrong, match="input_range must be finite, the smaller value first")
    bad(x, params, backend="fast", match="backend must be one of auto, reference, native, triton, got 'fast'")
    bad(x.double(), params, backend="native", match="cannot run tdnn_layer on cpu: its kernels take no torch.float64")
    bad(x, params, backend="native", precision="fp16", match="cannot run tdnn_layer on cpu: fp16 products run on a GPU")
    bad(
        x,
        params,
        backend="triton",
        precision="int8",
        match="cannot run tdnn_layer on cpu: int8 products run on a CPU, in C",
    )


def test_lengths_out_of_range_are_clamped_where_nobody_asks() -> None:
    x, wild = [noise(4, 3, 9), noise(4, 4, 9)], torch.tensor([-1, 10, 2**62, -(2**63)])
    op = torch.ops.spkfast.tdnn_layer
    got, want = (op(*op_arguments("fp32", x, None, lengths)) for lengths in (wild, wild.clamp(0, 9)))
    assert torch.equal(got, want)


def test_kernel_checks_its_arguments() -> None:
    x = [noise(2, 3, 9), noise(2, 4, 9)]
    good = op_arguments("fp32", x, noise(2, 4), torch.tensor([9, 4]))
    integers, weight = good[5], good[1]
    wrong: list[tuple[int, Any, str]] = [
        (0, [], "x must have at least one tensor"),
        (0, [x[0].double()], "x must be Float or BFloat16, got Double"),
        (0, [x[0], x[1][..., :8]], r"x must have shape \(2, any, 9\), got \(2, 4, 8\)"),
        (0, [x[0], x[1].bfloat16()], "x must be Float, got BFloat16"),
        (0, x[:1], r"weight must have shape \(2304\), got \(5376\)"),
        (1, weight[1:], r"weight must have shape \(5376\), got \(5375\)"),
        (1, weight.to(torch.int8), "weight must be Byte, got Char"),
        (2, good[2].double(), "weight must be Float, got Double"),
        (2, good[2].T.contiguous().T, "weight must be contiguous"),
        (2, good[2][:3], r"must have shape \(4, 4\), got \(3, 4\)"),
        (3, noise(2, 3), r"offset must have shape \(2, 4\), got \(2, 3\)"),
        (3, noise(2, 4).double(), "offset must be Float, got Double"),
        (4, torch.tensor([9, 4, 3]), r"lengths must have shape \(2\), got \(3\)"),
        (4, torch.tensor([9.0, 4.0]), "lengths must be Long, got Float"),
        (5, integers[1:], "tdnn_layer takes 7 integers and 2 floats, got 6 and 2"),
        (5, [3, *integers[1:]], "precision must be 0, 1 or 2, got 3"),
        (6, [1.0], "tdnn_layer takes 7 integers and 2 floats, got 7 and 1"),
    ]
    for position, value, message in wrong:
        with pytest.raises(ValueError, match=message):
            torch.ops.spkfast.tdnn_layer(*good[:position], value, *good[position + 1 :])
    pack = torch.ops.spkfast.product_pack
    for arguments, message in (
        ((whole(4, 3), [3], 0), r"weight must have shape \(any, any, any\), got \(4, 3\)"),
        ((whole(4, 3, 1).double(), [3], 0), "weight must be Float, got Double"),
        ((whole(4, 3, 1), [1, 1], 0), "parts must add up to 3, got 2"),
        ((whole(4, 3, 1), [3], 3), "precision must be 0, 1 or 2, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            pack(*arguments)


def test_the_definition_is_the_public_function() -> None:
    x, params = noise(2, 3, 9), noisy_layer(4, 3, 3)
    want = reference.tdnn_layer(
        [x], params, None, None, dilation=1, reflect=False, relu=True, tanh=False, precision="fp32", input_range=None
    )
    assert torch.equal(run(x, params, backend="reference"), want)
