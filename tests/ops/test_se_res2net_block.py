"""se_res2net_block: the module as an oracle, each level and precision, batches, registration, messages."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import spkfast
from spkfast import backends, functional
from spkfast.nn import set_precision
from spkfast.nn.se_res2net import SERes2NetBlock, real_frames
from spkfast.ops.se_res2net_block import BLOCK_FORMS, BlockForm, pack_block, run_block, run_packed_block
from spkfast.reference import Precision, SERes2NetParams, TdnnParams
from tests.fuzz.bounds_products import assert_within, block
from tests.ops.pooling import LAYOUTS, channels_last
from tests.ops.products import (
    EXACT_RANGE,
    LEVELS,
    NOISE,
    PRECISIONS,
    assert_near_definition,
    at_level,
    block_ranges,
    exact_block,
    folded,
    mapped,
    noise,
    noisy_block,
    skip_interpreted,
    threads,
    trained,
    whole,
)

Backend = backends.Backend

# Inputs, width, groups, taps: shortcut or none, parts of vectors and of steps, no convolution at all.
SIZES = [(20, 5, 4, 3), (9, 4, 3, 5), (6, 6, 1, 1), (66, 33, 2, 3), (40, 5, 8, 3), (3, 1, 2, 3), (600, 300, 2, 3)]
FORMS = [BlockForm(), BlockForm("first", "reflect"), BlockForm("first"), BlockForm("last", "reflect")]


def run(x: Tensor, params: Any, lengths: Any = None, **options: Any) -> Tensor:
    """``se_res2net_block`` where there is a dialect, else the function below it, which takes any form."""
    lengths = torch.tensor(lengths) if isinstance(lengths, list) else lengths
    options = {"backend": "native", "input_ranges": block_ranges(8, NOISE)} | options
    with torch.no_grad():
        if "form" not in options:
            return functional.se_res2net_block(x, params, lengths, **options)
        values = {"padded": lengths, "excited": lengths, "dilation": 1, "precision": "fp32"} | options
        return run_block(x, params, **values)


def doubled(params: SERes2NetParams) -> Any:
    return mapped(params, torch.Tensor.double)


def params_of(module: Any) -> SERes2NetParams:
    return SERes2NetParams(
        folded(module.in_.conv, module.in_.bn),
        [folded(layer.conv, layer.bn) for layer in module.res],
        folded(module.out.conv, module.out.bn),
        folded(module.se.fc1, module.se.bn),
        folded(module.se.fc2, None),
        None if module.shortcut is None else folded(module.shortcut, None),
    )


def names_of(params: SERes2NetParams) -> dict[str, Tensor]:
    """The weights by their canonical names, matrices for the linear layers."""
    layers = {"in": params.in_, "out": params.out} | {f"res.{j}": layer for j, layer in enumerate(params.res)}
    found: dict[str, Tensor | None] = {}
    for name, layer in layers.items():
        found |= {f"{name}.conv.weight": layer.weight, f"{name}.conv.bias": layer.bias}
        found |= {f"{name}.bn.scale": layer.scale, f"{name}.bn.shift": layer.shift}
    found |= {"se.fc1.weight": params.squeeze.weight[..., 0], "se.fc1.bias": params.squeeze.bias}
    found |= {"se.fc2.weight": params.excite.weight[..., 0], "se.fc2.bias": params.excite.bias}
    found |= {"se.bn.scale": params.squeeze.scale, "se.bn.shift": params.squeeze.shift}
    if params.shortcut is not None:
        found |= {"shortcut.weight": params.shortcut.weight, "shortcut.bias": params.shortcut.bias}
    return {name: value for name, value in found.items() if value is not None}


# The definition


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("inputs", "se_bn"), [(24, False), (10, True)])
def test_definition_is_the_module(form: Any, inputs: int, se_bn: bool) -> None:
    torch.manual_seed(0)
    module = SERes2NetBlock(
        24, 3, 2, 4, 7, in_channels=inputs, identity=form.identity, padding_mode=form.padding_mode, se_bn=se_bn
    )
    trained(module)
    x, lengths = noise(3, inputs, 20).double(), torch.tensor([20, 13, 7])
    with torch.no_grad():
        params = params_of(module)
        for rows in (None, lengths):
            frames = real_frames(rows, 20, torch.float64)
            want = module(x, frames, padding=frames)
            if rows is not None:
                want = want.masked_fill(torch.arange(20) >= rows[:, None, None], 0)
            got = run(x, params, rows, form=form, dilation=2, backend="reference")
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        alone = module(x[1:2, :, :13])
        torch.testing.assert_close(got[1:2, :, :13], alone, rtol=1e-12, atol=1e-12)


def test_names_and_dialects() -> None:
    for se_bn, inputs in ((False, 20), (True, 9)):
        x, params = noise(2, inputs, 11), noisy_block(inputs, 5, 4, se_bn=se_bn)
        for dialect, form in BLOCK_FORMS.items():
            want = run(x, params, [11, 5], form=form)
            assert torch.equal(run(x, params, [11, 5], dialect=dialect), want)
            assert torch.equal(run(x, names_of(params), [11, 5], dialect=dialect), want)
    assert torch.equal(run(x, params, [11, 5]), run(x, params, [11, 5], dialect="wespeaker"))
    assert BLOCK_FORMS["speechbrain"] == ("first", "reflect") and BLOCK_FORMS["wespeaker"] == ("last", "zeros")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_bounds_are_about_the_definition(precision: Precision) -> None:
    x, params, lengths = whole(2, 20, 12) / 16, exact_block(precision, 20, 5, 4, 3), torch.tensor([12, 7])
    ranges = block_ranges(4, EXACT_RANGE)
    for form in FORMS:
        known = block(x, params, lengths, lengths, form, 2, precision, ranges)
        options: Any = {"form": form, "dilation": 2, "precision": precision, "input_ranges": ranges}
        want = run(x.double(), doubled(params), lengths, backend="reference", **options)
        torch.testing.assert_close(known.value, want, rtol=1e-14, atol=1e-14)


# Every level and precision


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("level", LEVELS)
def test_every_level_matches_the_definition(
    monkeypatch: pytest.MonkeyPatch, level: str, precision: Precision, size: tuple[int, int, int, int]
) -> None:
    at_level(monkeypatch, level)
    inputs, width, groups, taps = size
    lengths, ranges = torch.tensor([13, 12, 7, 1, 0]), block_ranges(groups, NOISE)
    for number, form in enumerate(FORMS):
        params = noisy_block(inputs, width, groups, taps, se_bn=number % 2 == 1)
        x = noise(len(lengths), inputs, 13).to(torch.float32 if number < 2 else torch.bfloat16)
        got = run(x, params, lengths, form=form, dilation=2, precision=precision, input_ranges=ranges)
        assert got.dtype == x.dtype
        assert_within(got, block(x, params, lengths, lengths, form, 2, precision, ranges))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("level", LEVELS)
def test_every_level_is_exact_where_only_operands_round(
    monkeypatch: pytest.MonkeyPatch, level: str, precision: Precision
) -> None:
    at_level(monkeypatch, level)
    for inputs, width, groups, taps in SIZES:
        params, ranges = exact_block(precision, inputs, width, groups, taps), block_ranges(groups, EXACT_RANGE)
        for dtype in (torch.float32, torch.bfloat16):
            if dtype == torch.bfloat16 and (precision == "int8" or groups > 3):
                continue  # what lies in memory between the layers would round too
            x = whole(3, inputs, 29).to(dtype)
            for form in FORMS:
                options: Any = {"form": form, "dilation": 3, "precision": precision, "input_ranges": ranges}
                got = run(x, params, [29, 13, 2], **options)
                want = run(x.double(), doubled(params), [29, 13, 2], backend="reference", **options)
                assert torch.equal(got, want.to(dtype))


def test_int8_rounds_what_is_between() -> None:
    # Else the test above would compare nothing that int8 does.
    x, params = whole(1, 20, 29), exact_block("int8", 20, 5, 4, 3)
    found = [run(x, params, precision=precision, input_ranges=block_ranges(4, EXACT_RANGE)) for precision in PRECISIONS]
    assert not torch.equal(found[2], found[0]) and not torch.equal(found[2], found[1])


@pytest.mark.parametrize("shape", [(1, 512, 64, 8, 40), (2, 80, 32, 8, 23)], ids=str)
@pytest.mark.parametrize("dialect", ["wespeaker", "speechbrain"])
def test_matches_reference(
    backend: Backend, device: torch.device, shape: tuple[int, int, int, int, int], dialect: str
) -> None:
    skip_interpreted(backend, device)
    batch, inputs, width, groups, frames = shape
    x, params = noise(batch, inputs, frames), noisy_block(inputs, width, groups, units=128, se_bn=True)
    lengths = torch.tensor([frames, frames // 2][:batch])

    def call(name: Backend, dtype: torch.dtype) -> Tensor:
        moved = mapped(params, lambda value: value.to(device, dtype))
        return run(x.to(device, dtype), moved, lengths.to(device), dialect=dialect, dilation=3, backend=name)

    assert_near_definition(call(backend, torch.float32), lambda dtype: call("reference", dtype))


@pytest.mark.parametrize("level", LEVELS)
def test_a_long_utterance_costs_no_digits(monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    at_level(monkeypatch, level)
    # Channels far from 0, of which a sum over a minute has no digits left for one more frame.
    x, params = noise(1, 16, 6000), noisy_block(16, 2, 8, units=8)
    squeeze, out = params.squeeze, params.out
    assert out.shift is not None
    params = params._replace(
        out=out._replace(shift=out.shift + 50), squeeze=squeeze._replace(weight=squeeze.weight / 100)
    )

    def call(dtype: torch.dtype, name: Backend = "reference") -> Tensor:
        return run(x.to(dtype), mapped(params, lambda value: value.to(dtype)), dialect="wespeaker", backend=name)

    assert_near_definition(call(torch.float32, "native"), call)


def test_more_squeezed_values_than_32_bits_count(device: torch.device) -> None:
    rows, units = 2**21 + 20, 2**10
    if device.type == "cpu" or torch.cuda.mem_get_info()[0] < 6 * rows * units:
        pytest.skip("takes 9 GB of a GPU")
    x, params = noise(20, 1, 1).to(device), mapped(noisy_block(1, 1, 1, units=units), lambda value: value.to(device))
    got = run(x.repeat(rows // 20 + 1, 1, 1)[-rows:], params, backend="triton")
    torch.testing.assert_close(got[-20:], run(x, params, backend="triton"))


def test_other_types_go_to_the_definition() -> None:
    x, params = noise(1, 20, 7), noisy_block(20, 5, 4)
    for dtype in (torch.float64, torch.float16):
        got = run(x.to(dtype), params, backend="auto")
        assert got.dtype == dtype and torch.equal(got, run(x.to(dtype), params, backend="reference"))
    got = run(x, params, backend="auto", precision="fp16")
    assert got.dtype == torch.float32 and torch.equal(got, run(x, params, backend="reference", precision="fp16"))


def test_a_layer_without_batch_norm() -> None:
    params = noisy_block(20, 5, 4)
    plain = [layer._replace(scale=None, shift=None) for layer in params.res]
    params = params._replace(res=plain, in_=params.in_._replace(scale=None, shift=None))
    x, lengths = noise(2, 20, 11), torch.tensor([11, 5])
    assert_within(run(x, params, lengths), block(x, params, lengths, lengths, BlockForm(), 1, "fp32", None))


# Layouts and batches


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout: str, precision: Precision) -> None:
    # A slice lies among NaN.
    x, params, lengths = noise(3, 20, 21), noisy_block(20, 5, 4), [21, 11, 1]
    for dtype in (torch.float32, torch.bfloat16):
        want = run(x.to(dtype), params, lengths, precision=precision)
        assert torch.equal(run(LAYOUTS[layout](x.to(dtype)), params, lengths, precision=precision), want)
        assert want.stride() == (21 * 20, 1, 20)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_expanded_input(dim: int) -> None:
    x, params = noise(3, 20, 9).narrow(dim, 0, 1).expand(3, 20, 9), noisy_block(20, 5, 4)
    assert torch.equal(run(x, params), run(x.contiguous(), params))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("level", LEVELS)
def test_rows_alone_and_threads_change_no_bit(
    monkeypatch: pytest.MonkeyPatch, level: str, precision: Precision
) -> None:
    at_level(monkeypatch, level)
    # More frames than one wave takes, and work for several threads.
    lengths = [300, 37, 0, 250, 1, 300, 6]
    x, params = noise(len(lengths), 13, 300), noisy_block(13, 17, 4, se_bn=True)
    options: Any = {"precision": precision, "dilation": 3, "form": BlockForm("first", "reflect")}
    found = [run(x, params, lengths, **options) for _ in threads(1, 2, 3)]
    assert torch.equal(found[1], found[0]) and torch.equal(found[2], found[0])
    for row, count in enumerate(lengths):
        alone = run(x[row : row + 1, :, :count], params, **options)
        assert torch.equal(alone[0], found[0][row, :, :count])
        assert (found[0][row, :, count:] == 0).all()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "slice"])
def test_padding_is_never_read(layout: str, precision: Precision) -> None:
    lengths, params = [21, 9, 0, 1], noisy_block(9, 5, 3)
    found = []
    for dirt in (0.0, math.nan, math.inf):
        x = noise(4, 9, 21)
        for row, count in enumerate(lengths):
            x[row, :, count:] = dirt
        found.append(run(LAYOUTS[layout](x), params, lengths, precision=precision, dilation=2))
    assert torch.equal(found[1], found[0]) and torch.equal(found[2], found[0])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("inputs", [20, 9])
def test_frames_of_convolutions_and_of_the_mean_are_apart(inputs: int, precision: Precision) -> None:
    x, params = noise(4, inputs, 13), noisy_block(inputs, 5, 4)
    some, others = torch.tensor([13, 9, 4, 0]), torch.tensor([13, 4, 9, 5])
    ranges = block_ranges(4, NOISE)
    found = []
    for padded, excited in ((some, None), (None, some), (some, others), (None, None), (some, some)):
        got = run(x, params, form=FORMS[1], padded=padded, excited=excited, precision=precision)
        assert_within(got, block(x, params, padded, excited, FORMS[1], 1, precision, ranges))
        found.append(got)
    assert not torch.equal(found[0], found[4]) and not torch.equal(found[2], found[4])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("level", LEVELS)
def test_nan_spoils_its_row_alone(monkeypatch: pytest.MonkeyPatch, level: str, precision: Precision) -> None:
    at_level(monkeypatch, level)
    x, params = noise(3, 20, 11), noisy_block(20, 5, 4)
    clean = run(x, params, precision=precision)
    x[1, 2, 6] = math.nan
    got = run(x, params, precision=precision)
    # Through the squeeze-and-excitation it reaches every frame.
    assert got[1].isnan().all() and torch.equal(got[::2], clean[::2])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("width", [5, 6])
def test_nothing_is_left_of_an_earlier_call(width: int, precision: Precision) -> None:
    # Odd channels: a last step of two bfloat16 numbers has room for one that does not exist.
    x, params = noise(2, 7, 40), noisy_block(7, width, 4)
    want = run(x, params, precision=precision)
    spoilt = noisy_block(9, 8, 4)
    spoilt = spoilt._replace(shortcut=mapped(spoilt.shortcut, lambda value: value * math.nan))
    run(torch.full((2, 9, 90), math.nan), spoilt, precision=precision)
    assert torch.equal(run(x, params, precision=precision), want)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", [(0, 20, 5), (2, 20, 0), (0, 20, 0), (2, 20, 1)], ids=str)
def test_small_and_empty(shape: tuple[int, int, int], precision: Precision) -> None:
    x, params, ranges = noise(*shape), noisy_block(20, 5, 4), block_ranges(4, NOISE)
    for form in FORMS:
        for lengths in (None, torch.zeros(shape[0], dtype=torch.int64)):
            got = run(x, params, lengths, form=form, precision=precision)
            assert got.shape == shape
            if lengths is not None:
                assert (got == 0).all()
            elif shape[2]:
                assert_within(got, block(x, params, None, None, form, 1, precision, ranges))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_packed_weights(precision: Precision) -> None:
    x, params = noise(2, 9, 13), noisy_block(9, 5, 4, se_bn=True)
    packed = pack_block(params, precision, block_ranges(4, NOISE))
    want = run(x, params, [13, 4], form=FORMS[1], precision=precision)
    changed = params._replace(in_=mapped(params.in_, lambda value: value + 1))  # is not read again
    for _ in range(2):
        got = run(x, changed, [13, 4], form=FORMS[1], precision=precision, packed=packed)
        assert torch.equal(got, want)


@pytest.mark.parametrize(("precision", "channels"), [("fp32", 19), ("bf16", 19), ("int8", 17)])
def test_packed_weights_of_other_channels(precision: Precision, channels: int) -> None:
    # The channels take up as many bytes, but are fewer than the block has.
    params, ranges = noisy_block(20, 5, 4), block_ranges(4, NOISE)
    packed, x = pack_block(params, precision, ranges), noise(1, channels, 9)
    with pytest.raises(spkfast.InputError, match=f"x must have 20 channels, as packed has, got {channels}"):
        run_packed_block(x, packed, None, None, BlockForm(), 3, 3, 1)
    with pytest.raises(spkfast.InputError, match=f"shortcut.weight is needed: x has {channels} channels"):
        run(x, params, form=BlockForm(), precision=precision, packed=packed)


def test_the_module_refuses_other_channels() -> None:
    module = set_precision(SERes2NetBlock(20, scale=4, se_channels=6).eval(), "bf16")
    with torch.no_grad(), pytest.raises(spkfast.InputError, match="x must have 20 channels, got 19"):
        module(noise(1, 19, 9))


def test_packed_weights_that_do_not_fit() -> None:
    x, params = noise(1, 20, 9), noisy_block(20, 5, 4)
    for other, message in (
        (noisy_block(20, 6, 4), "packed must have 20 channels, as params have, got 24"),
        (noisy_block(9, 5, 4), "x must have 9 channels, as packed has, got 20"),
        (noisy_block(20, 4, 5), "packed must have 3 Res2 convolutions of 3 taps, got 4 of 3"),
        (noisy_block(20, 5, 4, taps=5), "packed must have 3 Res2 convolutions of 3 taps, got 3 of 5"),
    ):
        bad(x, params, form=BlockForm(), packed=pack_block(other, "fp32"), match=message)
    packed = pack_block(params, "fp32")
    bad(
        x, params, form=BlockForm(), precision="bf16", packed=packed, match="packed must be of precision 'bf16', got 'f"
    )
    matrix = pack_block(params, "fp32", backend="triton")
    bad(x, params, form=BlockForm(), packed=matrix, match="form that backend 'native' reads on cpu, got a matrix")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bytes_of_weights_that_are_not_finite(value: float) -> None:
    for name in ("in.conv.weight", "out.conv.weight", "res.1.conv.weight", "shortcut.weight"):
        names = names_of(noisy_block(9, 5, 4))
        names[name][1, 2] = value
        bad(noise(1, 9, 5), names, precision="int8", match=f"{name} must be finite at precision='int8', got NaN or inf")


def test_convolutions_for_which_a_launch_has_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends._MISSING, "cuda", {"se_res2net_block": {"triton": "none here"}})
    params = noisy_block(34, 1, 34)
    packed = pack_block(params, "fp32", backend="triton")
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(1, 34, 9, device="cuda")
        weights = mapped(params, lambda value: torch.empty(value.shape, device="cuda"))
        assert functional.se_res2net_block(x, weights).shape == (1, 34, 9)  # by the definition
        message = "cannot run se_res2net_block on cuda: its C.. kernels take at most 32 Res2 convolutions, got 33"
        with pytest.raises(spkfast.InputError, match=message):
            functional.se_res2net_block(x, weights, backend="native")
        with pytest.raises(spkfast.InputError, match=message):
            run_packed_block(x, packed, None, None, BlockForm(), 33, 3, 1)


# Gradients


def test_gradient_goes_through_the_definition() -> None:
    x, params = noise(2, 3, 5).double(), doubled(noisy_block(3, 1, 2, units=2, se_bn=True))
    names, lengths = names_of(params), torch.tensor([5, 3])
    leaves = [value.detach().requires_grad_() for value in (x, *names.values())]

    def call(x: Tensor, *values: Tensor) -> Tensor:
        given = dict(zip(names, values, strict=True))
        return functional.se_res2net_block(x, given, lengths, dialect="speechbrain", dilation=2)

    assert torch.autograd.gradcheck(call, leaves)
    # In float32 the kernel exists, and would be chosen but for the gradient.
    single = noise(2, 20, 6).requires_grad_()
    out = functional.se_res2net_block(single, noisy_block(20, 5, 4), torch.tensor([6, 3]))
    (gradient,) = torch.autograd.grad(out.sum(), single)
    assert gradient.isfinite().all() and (gradient[1, :, 3:] == 0).all()


def test_kernels_without_gradient() -> None:
    x, params = noise(1, 20, 6), noisy_block(20, 5, 4)
    message = "se_res2net_block is an inference form, whose kernels have no gradient; call it under"
    with pytest.raises(spkfast.InputError, match=message):
        functional.se_res2net_block(x.clone().requires_grad_(), params, backend="native")
    for wanted, value in names_of(params).items():
        given = names_of(params) | {wanted: value.clone().requires_grad_()}
        with pytest.raises(spkfast.InputError, match=message):
            functional.se_res2net_block(x, given, backend="native")
        with torch.no_grad():
            assert not functional.se_res2net_block(x, given, backend="native").requires_grad
    out = torch.ops.spkfast.se_res2net_block(x.clone().requires_grad_(), *op_arguments("fp32", 20)[1:])
    with pytest.raises(ValueError, match="se_res2net_block is an inference form without a gradient: use backend='ref"):
        out.sum().backward()


# Registration


def op_arguments(
    precision: Precision, inputs: int, dtype: torch.dtype = torch.float32, lengths: Tensor | None = None
) -> tuple[Any, ...]:
    packed = pack_block(noisy_block(inputs, 5, 4), precision, block_ranges(4, NOISE))
    integers = [packed.code, 3, 3, 2, 3, int(inputs != 20)]
    x = channels_last(noise(2, inputs, 9)).to(dtype)
    return x, packed.tensors, lengths, lengths, integers, packed.floats


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("inputs", [20, 9])
def test_opcheck(precision: Precision, inputs: int) -> None:
    op = torch.ops.spkfast.se_res2net_block
    torch.library.opcheck(op, op_arguments(precision, inputs))
    torch.library.opcheck(op, op_arguments(precision, inputs, torch.bfloat16, torch.tensor([9, 4])))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_compiles_whole(precision: Precision) -> None:
    torch.compiler.reset()
    params, ranges = noisy_block(6, 5, 4), block_ranges(4, NOISE)
    packed = pack_block(params, precision, ranges)

    def model(x: Tensor, lengths: Tensor) -> Tensor:
        first = run(x, params, lengths, precision=precision, input_ranges=ranges)  # packs in the graph
        return first + run(x, params, lengths, form=FORMS[1], precision=precision, input_ranges=ranges, packed=packed)

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for number, (batch, frames) in enumerate([(2, 20), (3, 27), (4, 13), (5, 31)]):
        x, lengths = noise(batch, 6, frames), torch.arange(frames, frames - batch, -1)
        with torch._dynamo.config.patch(error_on_recompile=number >= 2):
            assert torch.equal(compiled(x, lengths), model(x, lengths))


class Block(torch.nn.Module):
    def __init__(self, precision: Precision) -> None:
        super().__init__()
        self.precision = precision
        for name, value in names_of(noisy_block(6, 5, 4)).items():
            self.register_buffer(name.replace(".", "_"), value)
        self.names = {name: name.replace(".", "_") for name in names_of(noisy_block(6, 5, 4))}

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        params = {name: getattr(self, buffer) for name, buffer in self.names.items()}
        return functional.se_res2net_block(
            x, params, lengths, precision=self.precision, input_ranges=block_ranges(4, NOISE)
        )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_exports_whole(precision: Precision) -> None:
    batch, frames = torch.export.Dim("batch"), torch.export.Dim("frames", min=2)
    model, inputs = Block(precision).eval(), (noise(2, 6, 40), torch.tensor([40, 21]))
    program = torch.export.export(model, inputs, dynamic_shapes=({0: batch, 2: frames}, {0: batch}))
    for rows, count in ((3, 57), (1, 2), (5, 300)):
        x, lengths = noise(rows, 6, count), torch.arange(count, count - rows, -1)
        assert torch.equal(program.module()(x, lengths), model(x, lengths))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_meta_tensors_have_shapes(precision: Precision) -> None:
    params = mapped(noisy_block(9, 5, 4), lambda value: value.to("meta"))
    got = run(noise(2, 9, 7).to("meta"), params, backend="auto", precision=precision)
    assert got.is_meta and got.shape == (2, 20, 7)
    with pytest.raises(spkfast.InputError, match="on meta: meta tensors have no values"):
        run(noise(2, 9, 7).to("meta"), params, backend="native")


def test_autocast_changes_nothing() -> None:
    x, params = noise(2, 20, 9), noisy_block(20, 5, 4)
    for backend in ("native", "reference"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = run(x, params, backend=backend)
        assert torch.equal(got, run(x, params, backend=backend))


# Messages


def bad(x: Any, params: Any, lengths: Any = None, match: str = "", **options: Any) -> None:
    with pytest.raises(spkfast.InputError, match=match):
        run(x, params, lengths, **({"backend": "auto"} | options))


def test_error_messages() -> None:
    x, params = noise(2, 20, 5), noisy_block(20, 5, 4)
    bad(x.numpy(), params, match="x must be a torch tensor, got ndarray")
    bad(x[0], params, match=r"x must have three dimensions, .*, got \(20, 5\)")
    bad(x.int(), params, match="x must be float16, bfloat16, float32 or float64, got torch.int32")
    bad(x[:, :9], params, match="shortcut.weight is needed: x has 9 channels and the block 20")
    bad(x, params, [5, 6], match=r"lengths must lie in 0\.\.5, row 1 has 6")
    bad(x, params, [5], match=r"lengths must have shape \(B,\) = \(2,\), got \(1,\)")
    bad(x, params, torch.ones(2), match="lengths must be an int64 tensor of frames, got torch.float32")
    bad(x, params, dilation=0, match="dilation must be at least 1, got 0")
    bad(
        x, params, dialect="kaldi", match="unknown dialect 'kaldi'; known: wespeaker, speechbrain, 3dspeaker, taoruijie"
    )
    bad(x, params, precision="int4", match=r"unknown precision 'int4' \(did you mean 'int8'\?\); known: fp32, bf16")
    ranges = block_ranges(4, NOISE)
    for name in ranges:
        given: Any = {key: value for key, value in ranges.items() if key != name}
        bad(x, params, precision="int8", input_ranges=given, match=rf"precision='int8' needs input_ranges\['{name}'\]")
        given[name] = (1.0, -1.0)
        bad(x, params, precision="int8", input_ranges=given, match=rf"input_ranges\['{name}'\] must be finite, the sm")
    bad(
        x,
        params,
        precision="int8",
        input_ranges=None,
        match=r"needs input_ranges\['in'\], the smallest and the largest",
    )
    bad(x, params, backend="fast", match="backend must be one of auto, reference, native, triton, got 'fast'")
    bad(
        x.double(),
        params,
        backend="native",
        match="cannot run se_res2net_block on cpu: its kernels take no torch.float6",
    )
    bad(x, params, backend="native", precision="fp16", match="cannot run se_res2net_block on cpu: fp16 products run on")
    bad(x, params, backend="triton", precision="int8", match="cannot run se_res2net_block on cpu: int8 products run on")


def test_error_messages_of_weights() -> None:
    x, params = noise(2, 20, 5), noisy_block(20, 5, 4, se_bn=True)
    names = names_of(params)
    for name in ("in.conv.weight", "out.conv.weight", "se.fc1.weight", "se.fc2.weight", "res.1.conv.weight"):
        bad(x, {key: value for key, value in names.items() if key != name}, match=f"params lack {name}")
    bad(x, names | {"res.0.conv.mean": x}, match="params hold res.0.conv.mean, which a block does not have")
    bad(x, names | {"se.bn.mean": x}, match="params hold se.bn.mean, which a block does not have")
    for name, value in names.items():
        bad(x, names | {name: value.int()}, match=f"^{name} must be float16, .*, got torch.int32")
        bad(x, names | {name: value.to("meta")}, match=f"^{name} must be on cpu, where x is, got meta")
        # Itself, or what goes with it.
        bad(x, names | {name: value[:2]}, match=rf"^{name.rsplit('.', 1)[0]}\.\S+ must have")
    for name in ("in.conv.weight", "res.1.conv.weight", "se.fc1.weight", "se.fc2.weight"):
        bad(x, names | {name: names[name][:, 0, ..., None, None]}, match=f"^{name} must have shape .N, C, K.* got")
        bad(x, names | {name: names[name].numpy()}, match=f"^{name} must be a torch tensor, got ndarray")
    for name in ("se.fc1.bn.scale", "se.fc2.bn.scale", "se.fc2.bn.shift", "shortcut.bn.scale"):
        bad(x, names | {name: noise(20)}, match=f"params hold {name}, which a block does not have")
    without = dict(names)
    del without["out.bn.shift"]
    bad(x, without, match="^out.bn.scale and out.bn.shift must be given together")
    wide = params._replace(out=TdnnParams(noise(21, 20, 1)))
    bad(x, wide, match="out.conv.weight must have 20 output channels, got 21")
    bad(
        x,
        params._replace(excite=TdnnParams(noise(19, 6, 1))),
        match="se.fc2.weight must have 20 output channels, got 19",
    )
    bad(
        x,
        params._replace(in_=TdnnParams(noise(21, 20, 1))),
        match="in.conv.weight must have a multiple of 4 channels, got",
    )
    bad(
        x,
        params._replace(in_=TdnnParams(noise(20, 20, 3))),
        match="in.conv.weight must have K = 1 taps, got 3",
    )
    res = [*params.res[:2], TdnnParams(noise(5, 5, 5))]
    bad(x, params._replace(res=res), match=r"res.2.conv.weight must have K = 3 taps, got 5")
    for part in (*params.res, params.in_, params.squeeze):  # of (N, C) alone
        flat = mapped(params, lambda value, part=part: value[..., 0] if value is part.weight else value)
        bad(x, flat, match=r"weight must have shape \(N, C, K\), got \(\d+, \d+\)")
    scaled = params.excite._replace(scale=noise(20), shift=noise(20))
    bad(x, params._replace(excite=scaled), match="se.fc2 has no batch norm: scale and shift must be None")
    wider = noisy_block(9, 5, 4)
    assert wider.shortcut is not None
    shortcut = wider.shortcut._replace(scale=noise(20), shift=noise(20))
    bad(x[:, :9], wider._replace(shortcut=shortcut), match="shortcut has no batch norm: scale and shift must be None")
    bad(x, params._replace(shortcut=TdnnParams(noise(20, 9, 1))), match=r"shortcut.weight must have shape .* C = 20")


def test_lengths_out_of_range_are_clamped_where_nobody_asks() -> None:
    op = torch.ops.spkfast.se_res2net_block
    for wild in ([-1, 10], [2**62, -(2**63)]):
        lengths = torch.tensor(wild)
        got = op(*op_arguments("fp32", 9, lengths=lengths))
        assert torch.equal(got, op(*op_arguments("fp32", 9, lengths=lengths.clamp(0, 9))))


def test_kernel_checks_its_arguments() -> None:
    good = op_arguments("fp32", 20, lengths=torch.tensor([9, 4]))
    x, tensors, integers, floats = good[0], good[1], good[4], good[5]
    wrong: list[tuple[int, Any, str]] = [
        (0, x.double(), "x must be Float or BFloat16, got Double"),
        (0, x[0], r"x must have shape \(any, any, any\), got \(20, 9\)"),
        (0, noise(2, 9, 9), "x must have 20 channels, got 9"),
        (1, tensors[:-1], "se_res2net_block takes 14 params and 10 floats, got 13 and 10"),
        (1, [tensors[0][1:], *tensors[1:]], r"params must have shape \(5120\), got \(5119\)"),
        (1, [tensors[0], tensors[1][:3], *tensors[2:]], r"params must have shape \(4, any\), got \(3, 20\)"),
        (2, torch.tensor([9, 4, 3]), r"padded must have shape \(2\), got \(3\)"),
        (3, torch.tensor([9.0, 4.0]), "excited must be Long, got Float"),
        (4, integers[1:], "se_res2net_block takes 6 integers, got 5"),
        (4, [3, *integers[1:]], "precision must be 0, 1 or 2, got 3"),
        (5, floats[1:], "se_res2net_block takes 14 params and 10 floats, got 14 and 9"),
    ]
    for position, value, message in wrong:
        with pytest.raises(ValueError, match=message):
            torch.ops.spkfast.se_res2net_block(*good[:position], value, *good[position + 1 :])


def test_the_forms_are_those_of_the_models() -> None:
    models = importlib.import_module("spkfast.models.ecapa_tdnn")
    assert set(BLOCK_FORMS) == set(models.DIALECTS)
    for name, form in BLOCK_FORMS.items():
        assert form == (models.DIALECTS[name].identity, models.DIALECTS[name].padding_mode)
