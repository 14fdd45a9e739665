"""Triton kernels of tdnn_layer and se_res2net_block, on a GPU or interpreted: bounds, tiles, spans, layouts."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from spkfast import functional
from spkfast.ops.se_res2net_block import BLOCK_FORMS, BlockForm, run_block
from spkfast.reference import Precision, SERes2NetParams, TdnnParams
from tests.fuzz.bounds_products import assert_within, block, exact, layer
from tests.ops.pooling import LAYOUTS
from tests.ops.products import exact_block, exact_layer, mapped, noise, noisy_block, noisy_layer, whole

pytest.importorskip("triton")
from spkfast.kernels.triton import se_res2net_block as block_module
from spkfast.kernels.triton import tdnn_layer as layer_module

# Padding may hold anything, and what is made of it is masked.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def counted(lengths: list[int] | None) -> Tensor | None:
    return None if lengths is None else torch.tensor(lengths)


def run_layer(
    x: Tensor | list[Tensor], params: TdnnParams, lengths: Tensor | None, device: torch.device, **options: Any
) -> Tensor:
    parts = [x] if isinstance(x, Tensor) else x
    if isinstance(options.get("offset"), Tensor):
        options["offset"] = options["offset"].to(device)
    with torch.no_grad():
        return functional.tdnn_layer(
            [part.to(device) for part in parts], mapped(params, lambda value: value.to(device)),
            None if lengths is None else lengths.to(device), backend="triton", **options,
        ).cpu()  # fmt: skip


def run_whole_block(
    x: Tensor, params: SERes2NetParams, padded: Tensor | None, excited: Tensor | None, form: BlockForm, dilation: int,
    precision: Precision, device: torch.device,
) -> Tensor:  # fmt: skip
    lengths = [None if value is None else value.to(device) for value in (padded, excited)]
    weights = mapped(params, lambda value: value.to(device))
    with torch.no_grad():
        return run_block(
            x.to(device), weights, lengths[0], lengths[1], form, dilation, precision, None, backend="triton"
        ).cpu()


# tdnn_layer


@pytest.mark.parametrize("size", [(1, 1, 1), (3, 2, 3), (17, 33, 5), (70, 40, 3), (136, 72, 1)], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_layer_matches_the_definition(precision: Precision, size: tuple[int, int, int], device: torch.device) -> None:
    params = noisy_layer(*size)
    for frames, lengths in ((1, None), (13, [13, 12, 1, 0])):
        rows = 2 if lengths is None else len(lengths)
        for dtype, reflect in ((torch.float32, False), (torch.bfloat16, True)):
            x, offset = noise(rows, size[1], frames).to(dtype), noise(rows, size[0], seed=8)
            known = {"dilation": 2, "reflect": reflect, "tanh": reflect, "offset": offset if reflect else None}
            mode = "reflect" if reflect else "zeros"
            options = {key: value for key, value in known.items() if key != "reflect"} | {"padding_mode": mode}
            got = run_layer(x, params, counted(lengths), device, precision=precision, **options)
            assert got.dtype == HALVES.get(precision, torch.float32) and got.stride(1) == 1
            assert_within(got, layer(exact(x), params, counted(lengths), precision, None, **known))  # type: ignore[arg-type]


@pytest.mark.parametrize("relu", [True, False])
def test_layer_without_batch_norm(relu: bool, device: torch.device) -> None:
    x, params = noise(2, 9, 20), TdnnParams(*noisy_layer(6, 9, 1)[:2])
    got = run_layer(x, params, None, device, relu=relu)
    assert_within(got, layer(exact(x), params, None, "fp32", None, relu=relu))
    assert (got < 0).any() != relu


@pytest.mark.parametrize("value", [1e-6, 1e-2, 0.2499, 0.2501, 1.0, 8.0, 40.0, float("nan")])
def test_tanh_keeps_small_and_large_values(value: float, device: torch.device) -> None:
    x = torch.tensor([[[value, -value]]])
    got = run_layer(x, TdnnParams(torch.ones(1, 1, 1)), None, device, relu=False, tanh=True)
    torch.testing.assert_close(got, x.double().tanh().float(), rtol=1e-6, atol=0, equal_nan=True)


def test_relu_keeps_nan(device: torch.device) -> None:
    x = torch.tensor([[[float("nan"), -1.0, 2.0]]])
    got = run_layer(x, TdnnParams(torch.ones(1, 1, 1)), None, device)
    assert got[0, 0, 0].isnan() and got[0, 0, 1:].tolist() == [0.0, 2.0]


@pytest.mark.parametrize("parts", [[5, 40], [8, 16, 24], [3, 1, 7, 2], [1, 2, 3, 4, 5]], ids=str)
@pytest.mark.parametrize("taps", [1, 3])
def test_inputs_are_read_one_after_the_other(taps: int, parts: list[int], device: torch.device) -> None:
    x, lengths = noise(2, sum(parts), 9), torch.tensor([9, 4])
    params = noisy_layer(11, sum(parts), taps)
    got = run_layer(list(x.split(parts, dim=1)), params, lengths, device)
    assert_within(got, layer(exact(x), params, lengths, "fp32", None))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_layer_is_exact_where_nothing_rounds(precision: Precision, device: torch.device) -> None:
    for outputs, inputs, taps in ((17, 8, 3), (64, 24, 1)):
        x, params = whole(3, inputs, 29, most=100) / 16, exact_layer(precision, outputs, inputs, taps)
        lengths = torch.tensor([29, 13, 5])
        got = run_layer(x, params, lengths, device, precision=precision, padding_mode="reflect")
        with torch.no_grad():
            want = functional.tdnn_layer(
                x.double(), mapped(params, torch.Tensor.double), lengths,
                padding_mode="reflect", precision=precision, backend="reference",
            )  # fmt: skip
        assert torch.equal(got.double(), want.double())


@pytest.mark.parametrize("tile", ["_TILE", "_SMALL_TILE", "_MIXED_TILE", "FP32_TILE", "UNALIGNED_TILE"])
def test_every_tile_gives_the_definition(tile: str, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    # Over 128 frames and channels: more than one tile of each.
    monkeypatch.setattr(layer_module, "tile_of", lambda *args: getattr(layer_module, tile))
    precision: Precision = "fp32" if tile == "FP32_TILE" else "bf16"
    x, lengths = noise(3, 72, 50).bfloat16(), torch.tensor([50, 9, 50])
    params = noisy_layer(136, 72, 3)
    got = run_layer(x, params, lengths, device, precision=precision, dilation=3)
    assert_within(got, layer(exact(x), params, lengths, precision, None, dilation=3))


def test_tile_fits_type_alignment_and_size() -> None:
    x, weight = torch.empty(1, 8, 64).transpose(1, 2), torch.empty(64, 512)
    half = weight.bfloat16()
    assert layer_module.tile_of([x], weight, 2**20) is layer_module.FP32_TILE
    assert layer_module.tile_of([x.bfloat16()], half, 2**20) is layer_module._TILE
    assert layer_module.tile_of([x], half, 2**20) is layer_module._MIXED_TILE
    assert layer_module.tile_of([x.bfloat16()], half, 200) is layer_module._SMALL_TILE
    assert layer_module.tile_of([x.bfloat16()[:, 4:]], half, 2**20) is layer_module.UNALIGNED_TILE
    assert layer_module.tile_of([x.bfloat16()], half[:, :511].contiguous(), 2**20) is layer_module.UNALIGNED_TILE


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_changes_no_bit(name: str, device: torch.device) -> None:
    x, lengths, params = noise(2, 5, 9), torch.tensor([9, 4]), noisy_layer(7, 5, 3)
    given, block_params = LAYOUTS[name](x), noisy_block(5, 4, 2)
    assert torch.equal(given, x)
    assert torch.equal(run_layer(given, params, lengths, device), run_layer(x, params, lengths, device))
    options = (block_params, lengths, lengths, BlockForm(), 1, "fp32", device)
    assert torch.equal(run_whole_block(given, *options), run_whole_block(x, *options))


def test_rows_do_not_depend_on_batch_padding_and_what_lies_there(device: torch.device) -> None:
    x, lengths = noise(3, 10, 66), torch.tensor([66, 33, 0])
    x.masked_fill_(torch.arange(66) >= lengths[:, None, None], float("nan"))
    params, block_params = noisy_layer(6, 10, 3), noisy_block(10, 5, 2)
    for mode in ("zeros", "reflect"):
        form = BlockForm(padding_mode=mode)
        layers = run_layer(x, params, lengths, device, padding_mode=mode, dilation=2)
        blocks = run_whole_block(x, block_params, lengths, lengths, form, 2, "fp32", device)
        for row, count in enumerate(lengths.tolist()):
            assert (layers[row, :, count:] == 0).all() and (blocks[row, :, count:] == 0).all()
            if count:
                own = x[row : row + 1, :, :count]
                alone = run_layer(own, params, None, device, padding_mode=mode, dilation=2)
                assert torch.equal(alone[0], layers[row, :, :count])
                alone = run_whole_block(own, block_params, None, None, form, 2, "fp32", device)
                # Means add tile by tile, and a row alone may lie in other tiles.
                torch.testing.assert_close(alone[0], blocks[row, :, :count], rtol=1e-6, atol=1e-6)


def test_lengths_outside_the_frames_are_taken_as_the_nearest(device: torch.device) -> None:
    x, params = noise(3, 6, 9).to(device), noisy_layer(5, 6, 3)
    weight = params.weight.permute(2, 1, 0).flatten(0, 1).contiguous().to(device)
    vectors = torch.zeros(4, 5, device=device)
    found = [
        layer_module.forward(
            [x], weight, vectors, None, torch.tensor(lengths, device=device), [0, 3, 1, 0, 1, 0, 0], []
        )
        for lengths in ([-3, 12, 2**40], [0, 9, 9])
    ]
    assert torch.equal(*found) and found[0][1:].any() and not found[0][0].any()


# se_res2net_block


@dataclasses.dataclass(frozen=True)
class Block:
    """A block and its input."""

    inputs: int
    width: int
    groups: int
    frames: int
    lengths: list[int] | None = None
    taps: int = 3
    dilation: int = 2
    se_bn: bool = False

    def parts(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, SERes2NetParams, Tensor | None]:
        rows = 2 if self.lengths is None else len(self.lengths)
        params = noisy_block(self.inputs, self.width, self.groups, self.taps, se_bn=self.se_bn)
        return noise(rows, self.inputs, self.frames).to(dtype), params, counted(self.lengths)


FORMS: list[tuple[Precision, torch.dtype, str]] = [
    ("fp32", torch.float32, "speechbrain"),
    ("bf16", torch.bfloat16, "wespeaker"),
    ("bf16", torch.float32, "3dspeaker"),
]
BLOCKS = [
    Block(1, 1, 1, 1),
    Block(12, 12, 1, 9, [9, 4, 0]),
    Block(24, 6, 4, 21, [21, 1, 0, 12], se_bn=True),
    Block(10, 5, 3, 20, [20, 5], taps=5, dilation=3),
    Block(16, 4, 4, 70, [70, 66], taps=1),
    Block(48, 24, 2, 140, [140, 7], dilation=4),
    Block(16, 8, 2, 3, [3, 2, 1, 0, 3] * 4),  # many rows in a tile, and more than a program of the gates takes
]


@pytest.mark.parametrize("case", BLOCKS, ids=str)
@pytest.mark.parametrize("number", range(3))
def test_block_matches_the_definition(number: int, case: Block, device: torch.device) -> None:
    precision, dtype, name = FORMS[number]
    x, params, lengths = case.parts(dtype)
    form = BLOCK_FORMS[name]
    got = run_whole_block(x, params, lengths, lengths, form, case.dilation, precision, device)
    assert got.dtype == dtype and got.stride(1) == 1
    assert_within(got, block(x, params, lengths, lengths, form, case.dilation, precision, None))


@pytest.mark.parametrize("padded", [None, [21, 6, 0]])
@pytest.mark.parametrize("excited", [None, [17, 0, 3]])
def test_mean_has_lengths_of_its_own(padded: Any, excited: Any, device: torch.device) -> None:
    x, params = noise(3, 24, 21), noisy_block(24, 6, 4)
    lengths = counted(padded), counted(excited)
    got = run_whole_block(x, params, *lengths, BlockForm("first"), 1, "fp32", device)
    assert_within(got, block(x, params, *lengths, BlockForm("first"), 1, "fp32", None))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("identity", ["first", "last"])
def test_block_is_exact_where_nothing_rounds(precision: Precision, identity: str, device: torch.device) -> None:
    form, lengths = BlockForm(identity, "reflect"), torch.tensor([30, 17])
    x, params = whole(2, 12, 30, most=2), exact_block(precision, 12, 8, 3, 3)
    got = run_whole_block(x, params, lengths, lengths, form, 2, precision, device)
    with torch.no_grad():
        wide = mapped(params, torch.Tensor.double)
        want = run_block(x.double(), wide, lengths, lengths, form, 2, precision, None, backend="reference")
    assert torch.equal(got.double(), want)


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_spans_of_a_row_change_no_bit(mode: str, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    # Two convolutions of reach 2: the frames beyond a span's ends are made again by each program.
    x, lengths, params = noise(1, 12, 70), torch.tensor([69]), noisy_block(12, 4, 3)
    found = []
    for span in (70, 64, 23):
        monkeypatch.setattr(block_module, "_frames_of_program", lambda *args, span=span: span)
        form = BlockForm("first", mode)
        found.append(run_whole_block(x, params, lengths, lengths, form, 2, "fp32", device))
    assert all(torch.equal(other, found[0]) for other in found[1:])
    assert_within(found[0], block(x, params, lengths, lengths, form, 2, "fp32", None))


def test_spans_fill_a_gpu_and_no_more() -> None:
    assert block_module._frames_of_program(256, 200, 14, 128) == 200
    assert block_module._frames_of_program(256, 3000, 14, 128) == 3000
    assert block_module._frames_of_program(1, 200, 14, 128) == 128 - 2 * 14
    span = block_module._frames_of_program(8, 3000, 14, 64)
    assert (span + 2 * 14) % 64 == 0 and 8 * -(-3000 // span) <= block_module._PROGRAMS
    assert block_module._frames_of_program(1, 200, 100, 64) == 200  # spans would be all ends


@pytest.mark.parametrize("apart", [True, False])
def test_weights_of_the_convolutions_may_lie_anywhere(apart: bool) -> None:
    stacked = noise(3, 4, 5)
    tensors = list(stacked)
    if apart:
        # Views of one tensor, so that their distances are known to differ.
        together = torch.zeros(100)
        for part, start in zip(tensors, (0, 20, 50), strict=True):
            together[start : start + 20] = part.flatten()
        tensors = [together[start : start + 20].view(4, 5) for start in (0, 20, 50)]
    first, step = block_module._evenly_spaced(tensors)
    assert (first.data_ptr() == tensors[0].data_ptr()) != apart and step == 20
    for k, part in enumerate(stacked):
        assert torch.equal(first.as_strided((4, 5), (5, 1), first.storage_offset() + k * step), part)
    assert block_module._evenly_spaced(tensors[:1])[1] == 0
