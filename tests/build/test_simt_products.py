"""The CUDA sources of the layer and the block, run on the host in both thread orders, against the definitions."""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from spkfast import reference
from spkfast.ops._packing import pack_layer
from spkfast.ops.se_res2net_block import pack_block
from spkfast.reference import SERes2NetParams, TdnnParams
from spkfast.reference.tdnn_layer import HALF
from tests.build.test_simt_attentive_stats_pool import Placed, address, ragged, sizes, spoil_padding, structure
from tests.parity import FACTOR, NEIGHBOURS, _largest, _last_place, _moved
from tests.simt.host import ORDERS, ROOT, HostLibrary, SimtError, build

_TYPES = (torch.float32, torch.float16, torch.bfloat16)  # FloatType
_MOST_INPUTS, _MOST_CONVOLUTIONS = 16, 32
_DEVICE = (132, 227)  # processors and KiB of shared memory of an H200


def flags(names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_bool) for name in names.split()]


def numbers(names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_int32) for name in names.split()]


# Those of the headers; a test of their sizes guards against drift.
Input = structure("values", *sizes("row_stride frame_stride channels"))
LayerParams = type(
    "Params",
    (ctypes.Structure,),
    {
        "_fields_": [
            ("inputs", Input * _MOST_INPUTS),
            *structure("weight vectors offset lengths out")._fields_,
            *sizes("batch channels frames taps dilation"),
            *numbers("num_inputs type multiplied out_type"),
            *flags("reflect relu affine tanh"),
        ]
    },
)
Weights = structure("weight vectors")
_WEIGHTS = ("in_", "out", "squeeze", "excite", "shortcut")
BlockParams = type(
    "Params",
    (ctypes.Structure,),
    {
        "_fields_": [
            *structure("x padded excited")._fields_,
            *((name, Weights) for name in _WEIGHTS),
            ("res", Weights * _MOST_CONVOLUTIONS),
            *structure("y workspace")._fields_,
            *sizes("batch inputs channels units frames row_stride frame_stride taps dilation"),
            *numbers("convolutions type multiplied"),
            *flags("reflect first_passes"),
        ]
    },
)

_ENTRIES = """
int layer(const spkfast::TdnnLayerParams* p) { return spkfast::launch_tdnn_layer(*p, nullptr); }
int block(const spkfast::SERes2NetBlockParams* p) { return spkfast::launch_se_res2net_block(*p, nullptr); }
int workspace(const spkfast::SERes2NetBlockParams* p, size_t* floats) {
  return spkfast::se_res2net_block_workspace(*p, *floats);
}
int pieces_of_a_row(const spkfast::SERes2NetBlockParams* p, int* pieces) {
  spkfast::ChainPlan plan;
  const int error = spkfast::plan_block(*p, plan);
  *pieces = plan.in_shared ? static_cast<int>(plan.tiles) : 0;
  return error;
}
size_t layer_tile_size() { return sizeof(spkfast::LayerTile); }
size_t layer_params_size() { return sizeof(spkfast::TdnnLayerParams); }
size_t block_params_size() { return sizeof(spkfast::SERes2NetBlockParams); }
void skip_barrier(int number) { skipped_barrier = number; }
"""


def source_with_removable_barriers() -> tuple[str, int]:
    """Both ops with barrier n skipped where ``skipped_barrier == n`` and entry points added; how many there are."""
    folder = ROOT / "kernels/cuda"
    shared = "common/product_tile.cuh"
    tile = (folder / shared).read_text().replace("#pragma once", "").replace('#include "', '#include "common/')
    layer, block = ((folder / f"{op}.cu").read_text() for op in ("tdnn_layer", "se_res2net_block"))
    block = block.replace(f'#include "{shared}"', "")
    text = layer.replace(f'#include "{shared}"', tile) + block
    pieces = re.split(r"(__sync(?:threads|warp)\(\);)", text)
    text = "".join(f"if (skipped_barrier != {n // 2}) {p}" if n % 2 else p for n, p in enumerate(pieces))
    return f'static int skipped_barrier = -1;\n{text}\nextern "C" {{{_ENTRIES}}}\n', len(pieces) // 2


_SOURCE, _NUM_BARRIERS = source_with_removable_barriers()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> HostLibrary:
    built = build(_SOURCE, tmp_path_factory.mktemp("simt"))
    for name in ("layer_tile_size", "layer_params_size", "block_params_size"):
        getattr(built.library, name).restype = ctypes.c_size_t
    return built


def assert_matches(found: Tensor, definition: Callable[..., Tensor], *inputs: Tensor | None) -> None:
    """Checks values, which have no gradient, by the rule of ``tests/parity.py``, row by row."""
    wide = [value if value is None else value.double() for value in inputs]
    exact = definition(*wide)
    plain = [definition(*_moved(list(inputs), seed)) for seed in (None, *range(NEIGHBOURS))]
    assert found.shape == exact.shape
    if not found.numel():
        return
    assert found.isfinite().all()
    rounding = torch.finfo(torch.float32).eps * _largest(exact, True)
    allowed = FACTOR * torch.stack([rounding, *(_largest(run - exact, True) for run in plain)]).amax(0)
    error = _largest(((found - exact).abs() - _last_place(found)).clamp_min(0), True)
    assert (error <= allowed).all(), f"error {error.tolist()} exceeds {allowed.tolist()}"


def generator_of(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash(numbers) % 2**31)


def random_layer(outputs: int, inputs: int, taps: int, generator: torch.Generator) -> TdnnParams:
    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weight = randn(outputs, inputs, taps) / math.sqrt(max(inputs * taps, 1))
    return TdnnParams(weight, randn(outputs), 1 + 0.3 * randn(outputs), 0.3 * randn(outputs))


# The layer ------------------------------------------------------------------------------------------------------------


def run_layer(
    library: HostLibrary,
    x: Sequence[Tensor],
    params: TdnnParams,
    lengths: Tensor | None = None,
    offset: Tensor | None = None,
    *,
    dilation: int = 1,
    reflect: bool = False,
    relu: bool = True,
    tanh: bool = False,
    precision: Any = "fp32",
    order: str = "ascending",
    gap: int = 0,
) -> Tensor:
    """Output of the host-built kernel; ``gap`` values lie between the frames of the inputs."""
    packed = pack_layer(params, [part.shape[1] for part in x], precision, backend="triton")
    placed = [Placed(*part.shape, last=True, gap=gap, dtype=part.dtype).holding(part).value for part in x]
    batch, _, frames = x[0].shape
    channels = params.weight.shape[0]
    multiplied = HALF.get(precision, torch.float32)
    out = Placed(batch, channels, frames, last=True, dtype=multiplied)
    fields = LayerParams(
        weight=address(packed.weight),
        vectors=address(packed.vectors),
        offset=address(offset),
        lengths=address(lengths),
        out=address(out.value),
        batch=batch,
        channels=channels,
        frames=frames,
        taps=packed.taps,
        dilation=dilation,
        num_inputs=len(x),
        type=_TYPES.index(x[0].dtype),
        multiplied=_TYPES.index(multiplied),
        out_type=_TYPES.index(multiplied),
        reflect=reflect,
        relu=relu,
        affine=packed.affine,
        tanh=tanh,
    )
    for i, part in enumerate(placed):
        fields.inputs[i] = Input(address(part), part.stride(0), part.stride(2), part.shape[1])
    library.call("layer", ctypes.byref(fields), order=order)
    return out.result()


def defined_layer(count: int, lengths: Tensor | None, **options: Any) -> Callable[..., Tensor]:
    """The definition as a function of ``count`` inputs, the weights and the offset."""
    settings = {"dilation": 1, "reflect": False, "relu": True, "tanh": False, "precision": "fp32", **options}

    def call(*values: Tensor) -> Tensor:
        params = TdnnParams(*values[count : count + 4])
        return reference.tdnn_layer(values[:count], params, values[count + 4], lengths, input_range=None, **settings)

    return call


def layer_example(
    batch: int, parts: Sequence[int], channels: int, taps: int, frames: int
) -> tuple[list[Tensor], TdnnParams]:
    generator = generator_of(batch, *parts, channels, taps, frames)
    x = [torch.randn(batch, part, frames, generator=generator) for part in parts]
    return x, random_layer(channels, sum(parts), taps, generator)


# Batch, inputs, output channels, taps, frames, dilation: one of each, a whole tile and its neighbours, taps that reach
# past a row, more inputs than are in shared memory at once.
_LAYERS = ((1, (1,), 1, 1, 1, 1), (4, (16,), 64, 1, 64, 1), (4, (17,), 65, 3, 65, 2), (4, (7, 20, 3), 33, 3, 9, 4),
           (2, (40,), 130, 5, 70, 1), (4, (5,), 6, 7, 4, 3))  # fmt: skip


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("reflect", [False, True], ids=["zeros", "reflect"])
@pytest.mark.parametrize("shape", _LAYERS, ids=str)
def test_layer_matches_the_definition(library: HostLibrary, shape: tuple[Any, ...], reflect: bool, order: str) -> None:
    *shape, dilation = shape
    x, params = layer_example(*shape)
    lengths = ragged(shape[0], shape[-1])
    options = {"dilation": dilation, "reflect": reflect}
    found = run_layer(library, x, params, lengths, order=order, **options)
    assert_matches(found, defined_layer(len(x), lengths, **options), *x, *params, None)
    spoilt = [spoil_padding(part, lengths) for part in x]
    for gap in (1, 4):
        assert torch.equal(found, run_layer(library, spoilt, params, lengths, order=order, gap=gap, **options))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize("kept", ["weight", "weight bias", "weight scale shift offset", "weight bias offset"])
def test_layer_what_follows_the_product(library: HostLibrary, kept: str, tanh: bool, relu: bool) -> None:
    x, params = layer_example(2, (9,), 21, 3, 11)
    params = TdnnParams(*(value if name in kept else None for name, value in params._asdict().items()))
    offset = torch.randn(2, 21, generator=generator_of(5)) if "offset" in kept else None
    options = {"relu": relu, "tanh": tanh}
    found = run_layer(library, x, params, None, offset, **options)
    assert_matches(found, defined_layer(1, None, **options), *x, *params, offset)


@pytest.mark.parametrize("dtype", _TYPES, ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_layer_precisions(library: HostLibrary, precision: Any, dtype: torch.dtype) -> None:
    x, params = layer_example(2, (20, 3), 33, 3, 9)
    half = HALF.get(precision, torch.float32)
    x = [part.to(dtype) for part in x]
    params = params._replace(weight=params.weight.to(half).float())
    found = run_layer(library, x, params, precision=precision)
    assert found.dtype == half
    # Operands that the products hold exactly: then the definition's own error is that of its sums alone.
    rounded = [part.to(half).float() for part in x]
    assert_matches(found, defined_layer(2, None, precision=precision), *rounded, *params, None)
    assert torch.equal(found, run_layer(library, rounded, params, precision=precision))


def test_layer_inputs_are_read_as_if_joined(library: HostLibrary) -> None:
    x, params = layer_example(2, (5, 1, 30, 17), 12, 1, 70)
    assert torch.equal(run_layer(library, x, params), run_layer(library, [torch.cat(x, dim=1)], params))


@pytest.mark.parametrize("reflect", [False, True], ids=["zeros", "reflect"])
def test_layer_a_row_alone_equals_the_row_in_a_batch(library: HostLibrary, reflect: bool) -> None:
    lengths = torch.tensor([130, 64, 65, 3, 1])
    x, params = layer_example(5, (6, 4), 9, 5, 130)
    options = {"dilation": 2, "reflect": reflect}
    together = run_layer(library, x, params, lengths, **options)
    for row, length in enumerate(lengths.tolist()):
        alone = run_layer(library, [part[row : row + 1, :, :length] for part in x], params, **options)
        assert torch.equal(together[row : row + 1, :, :length], alone)


def test_layer_lengths_outside_the_row_read_nothing_there(library: HostLibrary) -> None:
    x, params = layer_example(3, (4,), 5, 3, 20)
    far = run_layer(library, x, params, torch.tensor([-5, 10**12, 20]))
    assert torch.equal(far, run_layer(library, x, params, torch.tensor([0, 20, 20])))


def test_layer_nan_reaches_the_frames_that_read_it_alone(library: HostLibrary) -> None:
    x, params = layer_example(2, (4,), 5, 3, 80)
    x[0][1, 2, 65] = float("nan")
    expected = torch.zeros(2, 5, 80, dtype=torch.bool)
    expected[1, :, [63, 65, 67]] = True
    assert torch.equal(run_layer(library, x, params, dilation=2).isnan(), expected)


@pytest.mark.parametrize("shape", [(0, (3,), 4, 3, 5), (2, (3,), 0, 3, 5), (2, (3,), 4, 3, 0), (2, (0,), 4, 3, 5)])
def test_layer_nothing_to_do(library: HostLibrary, shape: Any) -> None:
    x, params = layer_example(*shape)
    assert_matches(run_layer(library, x, params), defined_layer(1, None), *x, *params, None)


# The block ------------------------------------------------------------------------------------------------------------


def block_example(inputs: int, channels: int, groups: int, taps: int, units: int, bias: bool = True) -> SERes2NetParams:
    generator = generator_of(inputs, channels, groups, taps, units)
    width = channels // groups
    plain = {"scale": None, "shift": None}
    squeeze = random_layer(units, channels, 1, generator)
    shortcut = random_layer(channels, inputs, 1, generator)._replace(**plain) if inputs != channels else None
    return SERes2NetParams(
        random_layer(channels, inputs, 1, generator),
        [random_layer(width, width, taps, generator) for _ in range(groups - 1)],
        random_layer(channels, channels, 1, generator),
        squeeze if bias else squeeze._replace(**plain),
        random_layer(channels, units, 1, generator)._replace(**plain),
        shortcut,
    )


def flat(params: SERes2NetParams) -> tuple[list[Tensor | None], Callable[[Sequence[Tensor]], SERes2NetParams]]:
    """The weights one after the other, and how to put such a list together again."""
    layers = [params.in_, params.out, params.squeeze, params.excite, params.shortcut or TdnnParams(None), *params.res]  # type: ignore[arg-type]

    def joined(values: Sequence[Any]) -> SERes2NetParams:
        made = [TdnnParams(*values[i : i + 4]) for i in range(0, len(values), 4)]
        in_, out, squeeze, excite, shortcut, *res = made
        return SERes2NetParams(in_, res, out, squeeze, excite, shortcut if params.shortcut else None)

    return [value for layer in layers for value in layer], joined


class Block:
    """The arguments of the host-built block, and what must be kept alive for them."""

    def __init__(
        self,
        x: Tensor,
        params: SERes2NetParams,
        padded: Tensor | None = None,
        excited: Tensor | None = None,
        *,
        dilation: int = 1,
        reflect: bool = False,
        first_passes: bool = False,
        precision: Any = "fp32",
        gap: int = 0,
    ) -> None:
        packed = pack_block(params, precision, backend="triton").tensors
        placed = Placed(*x.shape, last=True, gap=gap, dtype=x.dtype).holding(x).value
        batch, inputs, frames = x.shape
        channels = params.in_.weight.shape[0]
        self.kept = packed, placed, padded, excited
        self.out = Placed(batch, channels, frames, last=True, dtype=x.dtype)
        weights = [Weights(address(w), address(v)) for w, v in zip(packed[::2], packed[1::2], strict=True)]
        fixed = len(_WEIGHTS) - (params.shortcut is None)
        self.fields = BlockParams(
            x=address(placed),
            padded=address(padded),
            excited=address(excited),
            **dict(zip(_WEIGHTS, weights[:fixed], strict=False)),
            y=address(self.out.value),
            batch=batch,
            inputs=inputs,
            channels=channels,
            units=params.squeeze.weight.shape[0],
            frames=frames,
            row_stride=placed.stride(0),
            frame_stride=placed.stride(2),
            taps=params.res[0].weight.shape[2] if params.res else 1,
            dilation=dilation,
            convolutions=len(params.res),
            type=_TYPES.index(x.dtype),
            multiplied=_TYPES.index(HALF.get(precision, torch.float32)),
            reflect=reflect,
            first_passes=first_passes,
        )
        for j, convolution in enumerate(weights[fixed:]):
            self.fields.res[j] = convolution

    def run(
        self, library: HostLibrary, order: str = "ascending", device: tuple[int, int] = _DEVICE
    ) -> tuple[Tensor, int]:
        """The output, and into how many pieces the chain cut a row: 0 where its slices are not in shared memory."""
        library.library.simt_set_device(*device)
        floats, pieces = ctypes.c_size_t(), ctypes.c_int(-1)
        library.call("workspace", ctypes.byref(self.fields), ctypes.byref(floats))
        if floats.value:
            library.call("pieces_of_a_row", ctypes.byref(self.fields), ctypes.byref(pieces))
        workspace = Placed(1, floats.value)
        self.fields.workspace = address(workspace.value)
        library.call("block", ctypes.byref(self.fields), order=order)
        workspace.result()  # checks for writes beside it
        return self.out.result(), pieces.value


def run_block(library: HostLibrary, *args: Any, order: str = "ascending", **options: Any) -> Tensor:
    return Block(*args, **options).run(library, order)[0]


def assert_block(
    library: HostLibrary,
    x: Tensor,
    params: SERes2NetParams,
    padded: Tensor | None,
    excited: Tensor | None,
    order: str = "ascending",
    device: tuple[int, int] = _DEVICE,
    **options: Any,
) -> Tensor:
    """Checks a block against the definition."""
    settings = {"dilation": 1, "reflect": False, "first_passes": False, "precision": "fp32", **options}
    found = Block(x, params, padded, excited, **settings).run(library, order, device)[0]
    values, joined = flat(params)

    def definition(x: Tensor, *values: Tensor) -> Tensor:
        return reference.se_res2net_block(x, joined(values), padded, excited, input_ranges=None, **settings)

    assert_matches(found, definition, x, *values)
    return found


# Inputs, channels, groups, taps, units; batch, frames, dilation.
_BLOCKS = ((1, 1, 1, 1, 1, 1, 1, 1), (24, 24, 8, 3, 5, 4, 9, 2), (7, 12, 3, 5, 4, 4, 6, 3), (6, 6, 2, 1, 140, 2, 5, 1),
           (20, 140, 2, 3, 33, 1, 135, 2), (4, 10, 1, 3, 3, 4, 5, 1))  # fmt: skip
_FORMS = pytest.mark.parametrize("reflect", [False, True], ids=["last zeros", "first reflect"])


@pytest.mark.parametrize("order", ORDERS)
@_FORMS
@pytest.mark.parametrize("shape", _BLOCKS, ids=str)
def test_block_matches_the_definition(library: HostLibrary, shape: tuple[int, ...], reflect: bool, order: str) -> None:
    *weights, batch, frames, dilation = shape
    params = block_example(*weights)
    x = torch.randn(batch, weights[0], frames, generator=generator_of(*shape))
    lengths = ragged(batch, frames)
    options = {"dilation": dilation, "reflect": reflect, "first_passes": reflect, "order": order}
    found = assert_block(library, x, params, lengths, lengths, **options)
    spoilt = spoil_padding(x, lengths)
    assert torch.equal(found, run_block(library, spoilt, params, lengths, lengths, gap=1, **options))


@pytest.mark.parametrize("excited", [None, [9, 2, 0], [9, 9, 9]], ids=str)
@pytest.mark.parametrize("padded", [None, [9, 5, 3]], ids=str)
def test_block_lengths_of_both_kinds(library: HostLibrary, padded: list[int] | None, excited: list[int] | None) -> None:
    counts = [None if value is None else torch.tensor(value) for value in (padded, excited)]
    x = torch.randn(3, 8, 9, generator=generator_of(1))
    assert_block(library, x, block_example(8, 8, 4, 3, 3, bias=False), *counts)


@pytest.mark.parametrize("dtype", _TYPES, ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_block_precisions(library: HostLibrary, precision: Any, dtype: torch.dtype) -> None:
    params = block_example(6, 12, 3, 3, 4)
    x = torch.randn(2, 6, 20, generator=generator_of(2)).to(dtype)
    lengths = torch.tensor([20, 7])
    assert assert_block(library, x, params, lengths, lengths, precision=precision).dtype == dtype


# Processors and KiB of shared memory, and the pieces that follow for one row of 300 frames in 3 groups of 8 channels:
# all of it at once, pieces that keep processors busy, pieces that fit, and slices outside of shared memory.
_PLANS = {
    "fp32": {(1, 227): 1, (2, 227): 2, (1, 24): 2, (1, 16): 0},
    "bf16": {(1, 227): 1, (2, 227): 2, (1, 18): 2, (1, 14): 0},
}


@_FORMS
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_block_is_the_same_in_pieces(library: HostLibrary, precision: Any, reflect: bool) -> None:
    params = block_example(24, 24, 3, 3, 4)
    x = torch.randn(1, 24, 300, generator=generator_of(3))
    options = {"dilation": 4, "reflect": reflect, "first_passes": reflect, "precision": precision}
    for lengths in (None, torch.tensor([170])):
        whole = assert_block(library, x, params, lengths, lengths, device=(1, 227), **options)
        for device, pieces in _PLANS[precision].items():
            order = ORDERS[lengths is None]
            found = Block(x, params, lengths, lengths, **options).run(library, order, device)
            assert found[1] == pieces, device
            assert torch.equal(whole, found[0])


# Precision, channels, frames, and pieces of a row: as few as leave room for two blocks or, in the last, for one.
_ECAPA = (("fp32", 512, 200, 1), ("fp32", 512, 300, 3), ("bf16", 512, 300, 1), ("bf16", 1024, 200, 1),
          ("fp32", 1024, 300, 2))  # fmt: skip


@pytest.mark.parametrize("case", _ECAPA, ids=str)
def test_block_cuts_a_row_of_ecapa_into_few_pieces(library: HostLibrary, case: tuple[Any, ...]) -> None:
    precision, channels, frames, pieces = case
    multiplied = _TYPES.index(HALF.get(precision, torch.float32))
    fields = BlockParams(batch=256, inputs=channels, channels=channels, units=128, frames=frames, taps=3, dilation=4,
                         convolutions=7, multiplied=multiplied)  # fmt: skip
    found = ctypes.c_int()
    library.library.simt_set_device(*_DEVICE)
    library.call("pieces_of_a_row", ctypes.byref(fields), ctypes.byref(found))
    assert found.value == pieces


@_FORMS
def test_block_a_row_alone_equals_the_row_in_a_batch(library: HostLibrary, reflect: bool) -> None:
    lengths = torch.tensor([140, 64, 9, 1])
    params = block_example(5, 6, 3, 3, 4)
    x = torch.randn(4, 5, 140, generator=generator_of(4))
    options = {"dilation": 3, "reflect": reflect, "first_passes": reflect}
    together = run_block(library, x, params, lengths, lengths, **options)
    for row, length in enumerate(lengths.tolist()):
        alone = run_block(library, x[row : row + 1, :, :length], params, **options)
        assert torch.equal(together[row : row + 1, :, :length], alone)


def test_block_lengths_outside_the_row_read_nothing_there(library: HostLibrary) -> None:
    params = block_example(6, 6, 3, 3, 4)
    x = torch.randn(3, 6, 20, generator=generator_of(5))
    far, near = torch.tensor([-5, 10**12, 20]), torch.tensor([0, 20, 20])
    assert torch.equal(run_block(library, x, params, far, far), run_block(library, x, params, near, near))


def test_block_nan_in_a_real_frame_reaches_its_row_alone(library: HostLibrary) -> None:
    params = block_example(6, 6, 3, 3, 4)
    x = torch.randn(2, 6, 20, generator=generator_of(6))
    x[1, 2, 7] = float("nan")
    found = run_block(library, x, params)
    assert found[1].isnan().all()  # by way of the mean
    assert found[0].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)], ids=str)
def test_block_nothing_to_do(library: HostLibrary, shape: tuple[int, int]) -> None:
    batch, frames = shape
    found = run_block(library, torch.empty(batch, 6, frames), block_example(6, 6, 3, 3, 4))
    assert found.shape == (batch, 6, frames)


# Both -----------------------------------------------------------------------------------------------------------------


def test_sizes_that_are_too_large_are_refused(library: HostLibrary) -> None:
    layer = {"batch": 2**20, "channels": 2**20, "frames": 2**20, "taps": 1, "num_inputs": 1}
    block = {"batch": 2**20, "channels": 2**10, "units": 1, "frames": 2**20, "taps": 1}
    one = {"batch": 1, "channels": 4, "units": 1, "frames": 4, "taps": 1}
    many = {**layer, "batch": 1, "channels": 4, "frames": 4, "num_inputs": _MOST_INPUTS + 1}
    cases = [("layer", LayerParams(**layer)), ("layer", LayerParams(**many)), ("block", BlockParams(**block))]
    cases += [("block", BlockParams(**one, convolutions=n)) for n in (2, _MOST_CONVOLUTIONS + 1)]
    for name, params in cases:
        with pytest.raises(SimtError, match="cudaError_t 1"):
            library.call(name, ctypes.byref(params))


def test_six_blocks_of_the_layer_fit_a_processor(library: HostLibrary) -> None:
    assert 6 * (library.library.layer_tile_size() + 1024) <= 100 * 1024  # of the least GPU since sm_80


def test_params_have_the_layout_of_the_headers(library: HostLibrary) -> None:
    assert library.library.layer_params_size() == ctypes.sizeof(LayerParams)
    assert library.library.block_params_size() == ctypes.sizeof(BlockParams)


@pytest.mark.parametrize("barrier", range(_NUM_BARRIERS))
def test_each_barrier_is_needed(library: HostLibrary, barrier: int) -> None:
    def results(order: str) -> list[Tensor]:
        layer = layer_example(1, (40,), 70, 3, 70)
        block = torch.randn(1, 24, 20, generator=generator_of(7)), block_example(24, 24, 3, 3, 140)
        return [run_layer(library, *layer, order=order), run_block(library, *block, order=order)]

    right = results("ascending")
    assert all(torch.equal(a, b) for a, b in zip(right, results("descending"), strict=True))
    library.library.skip_barrier(barrier)
    try:
        same = [torch.equal(a, b) for order in ORDERS for a, b in zip(right, results(order), strict=True)]
    except SimtError:
        return  # found by the shim
    finally:
        library.library.skip_barrier(-1)
    assert not all(same)
