"""Random cases of tdnn_layer on the CPU: shapes, layouts, ragged batches, every precision and instruction set."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np
import torch
from torch import Tensor

import spkfast
from spkfast import functional
from spkfast.ops.tdnn_layer import pack_tdnn_layer
from spkfast.reference import Precision, TdnnParams
from tests.fuzz.bounds_products import Known, Range, assert_within, layer
from tests.fuzz.fuzz_attentive_stats_pool import described, laid_out, same
from tests.fuzz.surroundings import surroundings

_ALL_LEVELS = ("scalar", "avx2", "avx512", "avx512bf16")
_LEVELS = _ALL_LEVELS[: _ALL_LEVELS.index(spkfast.info()["cpu"]["level"]) + 1]
_LAYOUTS = (
    "contiguous", "contiguous", "channels last", "channels last", "channels last", "slice", "slice of channels last",
    "every second frame", "every second channel", "rows last", "same rows", "same channels", "same frames",
)  # fmt: skip
_CHANNELS = (1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 31, 33, 64, 65, 100, 130)
_MOST_WORK = 400_000


@dataclasses.dataclass
class Case:
    """One call of the op; ``threads`` are those of a second call, which must give the same."""

    x: list[Tensor]
    params: TdnnParams
    offset: Tensor | None
    lengths: Tensor | None
    dilation: int
    reflect: bool
    relu: bool
    tanh: bool
    precision: Precision
    input_range: Range
    level: str
    threads: int
    kinds: list[str]

    def __str__(self) -> str:
        lengths = None if self.lengths is None else self.lengths.tolist()
        return (
            f"x {', '.join(described(part) for part in self.x)}, weight {tuple(self.params.weight.shape)}, lengths "
            f"{lengths}, dilation {self.dilation}, reflect {self.reflect}, relu {self.relu}, tanh {self.tanh}, "
            f"{self.precision} {self.input_range}, level {self.level}, threads {self.threads}, {', '.join(self.kinds)}"
        )


def draw(rng: np.random.Generator) -> Case:
    """A case."""
    precision: Precision = ("fp32", "bf16", "int8")[int(rng.integers(3))]
    batch = int(rng.choice([0, 1, 2, 3, 5, 8], p=[0.02, 0.3, 0.28, 0.2, 0.1, 0.1]))
    parts = [int(rng.choice(_CHANNELS)) for _ in range(rng.choice([1, 2, 3], p=[0.7, 0.15, 0.15]))]
    outputs, taps = int(rng.choice(_CHANNELS)), int(rng.choice([1, 3, 5, 7], p=[0.4, 0.4, 0.1, 0.1]))
    frames = draw_frame_count(rng, batch * sum(parts) * outputs * taps)
    lengths = draw_lengths(rng, batch, frames)
    dtype = torch.bfloat16 if rng.random() < 0.3 else torch.float32
    size = float(rng.choice([1, 1, 1, 1e-3, 1e6, 1e-25]))
    drawn = [draw_part(rng, (batch, part, frames), size, dtype, lengths, precision != "int8") for part in parts]
    params = draw_params(rng, outputs, sum(parts), taps, size)
    offset = None
    if rng.random() < 0.3:
        offset = laid_out(_normal(rng, (batch, outputs, 1)) * size, str(rng.choice(["contiguous", "rows last"])))[
            ..., 0
        ]
    low, high = np.sort(rng.normal(0, 2, 2)) * size if rng.random() < 0.3 else (-2 * size, 3 * size)
    return Case(
        [x for x, _ in drawn], params, offset, lengths, int(rng.choice([1, 1, 2, 3, 4, 60])), bool(rng.random() < 0.4),
        bool(rng.random() < 0.8), bool(rng.random() < 0.2), precision, (float(low), float(high)),
        *draw_level_and_threads(rng), [kind for _, kind in drawn],
    )  # fmt: skip


def draw_frame_count(rng: np.random.Generator, work: int) -> int:
    """Frames, mostly few; ``work`` is that of a frame."""
    near_tiles = [0, 1, 2, 5, 6, 7, 12, 13]
    frames = int(rng.choice(near_tiles)) if rng.random() < 0.4 else int(2 ** rng.uniform(0, 9))
    return min(frames, max(1, _MOST_WORK // max(1, work)))


def draw_lengths(rng: np.random.Generator, batch: int, frames: int) -> Tensor | None:
    """Lengths, often at the edges; or None."""
    if rng.random() < 0.3:
        return None
    lengths = rng.integers(0, frames + 1, batch)
    edge = rng.random(batch) < 0.4
    lengths[edge] = np.clip(rng.choice([0, 1, frames - 1, frames], int(edge.sum())), 0, frames)
    drawn = torch.from_numpy(lengths)
    return drawn.repeat_interleave(2)[::2] if rng.random() < 0.2 else drawn


def draw_part(
    rng: np.random.Generator,
    shape: tuple[int, int, int],
    size: float,
    dtype: torch.dtype,
    lengths: Tensor | None,
    with_nan: bool,
) -> tuple[Tensor, str]:
    """An input in a layout, with anything in padding and rarely NaN in a real frame; and what it is."""
    layout = str(rng.choice(_LAYOUTS))
    x = laid_out((_normal(rng, shape) * size).to(dtype), layout)
    kind = layout
    if not layout.startswith("same"):
        if lengths is not None:
            padding = torch.arange(shape[2]) >= lengths[:, None, None]
            x.masked_fill_(padding.expand(shape), float(rng.choice([0.0, np.nan, np.inf, -np.inf, 1e4])))
        if with_nan and x.numel() and rng.random() < 0.05:
            x[tuple(int(rng.integers(count)) for count in shape)] = torch.nan
            kind += " NaN"
    return x, kind


def draw_params(
    rng: np.random.Generator, outputs: int, inputs: int, taps: int, size: float = 1.0, affine: float = 0.7
) -> TdnnParams:
    """Weights in any layout; bias and batch norm now and then missing."""
    weight = _normal(rng, (outputs, inputs, taps)) / (inputs * taps) ** 0.5
    weight[rng.random(outputs) < 0.05] = 0  # a channel that is off
    bias, scale, shift = (_normal(rng, (outputs,)) * factor for factor in (size, 1, size))
    if rng.random() < 0.2:
        weight = weight.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    has_affine = rng.random() < affine
    return TdnnParams(
        weight, bias if rng.random() < 0.8 else None, scale if has_affine else None, shift if has_affine else None
    )


def draw_level_and_threads(rng: np.random.Generator) -> tuple[str, int]:
    """Instruction set, and threads of a second call."""
    return _LEVELS[int(rng.integers(len(_LEVELS)))], int(rng.choice([1, 2, 3], p=[0.9, 0.05, 0.05]))


def check(case: Case) -> collections.Counter[str]:
    """Checks one case against the definition in float64, and against itself.

    Raises:
        AssertionError: If the kernel is wrong.
    """
    with surroundings(case.level):
        got = _run(case, case.x, case.offset, case.lengths)
        if case.threads > 1:
            torch.set_num_threads(case.threads)
            again = _run(case, case.x, case.offset, case.lengths, packed=True)
            torch.set_num_threads(1)
            assert same(again, got), "packed before, or with more threads, it is another"
        check_rows_alone(
            got,
            case.lengths,
            lambda row, count: _run(
                case,
                [part[row : row + 1, :, :count] for part in case.x],
                None if case.offset is None else case.offset[row : row + 1],
                None,
            ),
        )
        joined = torch.cat([part.double() for part in case.x], dim=1)
        known = layer(
            Known(joined, torch.zeros_like(joined)), case.params, case.lengths, case.precision, case.input_range,
            dilation=case.dilation, reflect=case.reflect, relu=case.relu, tanh=case.tanh, offset=case.offset,
        )  # fmt: skip
        return collections.Counter(compared=assert_within(got, known))


def check_rows_alone(got: Tensor, lengths: Tensor | None, alone: object) -> None:
    """Checks that the first rows alone give the same; ``alone(row, count)`` computes one of so many frames."""
    assert callable(alone)
    for row in range(min(len(got), 2)):
        count = got.shape[2] if lengths is None else int(lengths[row])
        assert same(alone(row, count)[0], got[row, :, :count]), f"row {row} alone is another"


def _run(case: Case, x: list[Tensor], offset: Tensor | None, lengths: Tensor | None, packed: bool = False) -> Tensor:
    given = None
    if packed:
        parts = [part.shape[1] for part in x]
        given = pack_tdnn_layer(case.params, parts, precision=case.precision, input_range=case.input_range)
    return functional.tdnn_layer(
        x, case.params, lengths, offset=offset, dilation=case.dilation,
        padding_mode="reflect" if case.reflect else "zeros", relu=case.relu, tanh=case.tanh, precision=case.precision,
        input_range=case.input_range, packed=given, backend="native",
    )  # fmt: skip


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape)).float()
