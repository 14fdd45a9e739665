"""Random cases of se_res2net_block on the CPU: widths and groups of every kind, ragged batches, every precision."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np
import torch
from torch import Tensor

from spkfast.ops.se_res2net_block import BlockForm, run_block
from spkfast.reference import Precision, SERes2NetParams
from tests.fuzz.bounds_products import Range, assert_within, block
from tests.fuzz.fuzz_attentive_stats_pool import described, same
from tests.fuzz.fuzz_tdnn_layer import (
    check_rows_alone,
    draw_frame_count,
    draw_lengths,
    draw_level_and_threads,
    draw_params,
    draw_part,
)
from tests.fuzz.surroundings import surroundings


@dataclasses.dataclass
class Case:
    """One call of the op; as the case of ``tdnn_layer``."""

    x: Tensor
    params: SERes2NetParams
    padded: Tensor | None
    excited: Tensor | None
    form: BlockForm
    dilation: int
    precision: Precision
    input_ranges: dict[str, Range]
    level: str
    threads: int
    kind: str

    def __str__(self) -> str:
        lengths = [None if value is None else value.tolist() for value in (self.padded, self.excited)]
        return (
            f"x {described(self.x)} {self.kind}, channels {len(self.params.in_.weight)}, {len(self.params.res)} "
            f"convolutions, padded and excited {lengths}, {self.form}, dilation {self.dilation}, {self.precision} "
            f"{self.input_ranges}, level {self.level}, threads {self.threads}"
        )


def draw(rng: np.random.Generator) -> Case:
    """A case."""
    precision: Precision = ("fp32", "bf16", "int8")[int(rng.integers(3))]
    batch = int(rng.choice([0, 1, 2, 3, 5], p=[0.02, 0.35, 0.28, 0.2, 0.15]))
    width, groups = int(rng.choice([1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33])), int(rng.choice([1, 2, 3, 4, 8]))
    channels, units = width * groups, int(rng.choice([1, 2, 7, 16, 33]))
    inputs = channels if rng.random() < 0.6 else int(rng.choice([1, 3, 8, 20]))
    taps = int(rng.choice([1, 3, 5], p=[0.2, 0.6, 0.2]))
    frames = draw_frame_count(rng, batch * channels * (channels + inputs + taps * width))
    padded = draw_lengths(rng, batch, frames)
    # Mostly one and the same: rows that are padded at their own ends are read no further.
    excited = padded if rng.random() < 0.7 else draw_lengths(rng, batch, frames)
    dtype = torch.bfloat16 if rng.random() < 0.3 else torch.float32
    x, kind = draw_part(rng, (batch, inputs, frames), 1.0, dtype, padded, precision != "int8")
    squeeze = draw_params(rng, units, channels, 1, affine=0.3)
    excite = draw_params(rng, channels, units, 1, affine=0)
    shortcut = None
    if inputs != channels or rng.random() < 0.1:
        shortcut = draw_params(rng, channels, inputs, 1, affine=0)
    res = [draw_params(rng, width, width, taps) for _ in range(groups - 1)]
    params = SERes2NetParams(
        draw_params(rng, channels, inputs, 1), res, draw_params(rng, channels, channels, 1), squeeze, excite, shortcut
    )
    ranges = {name: (-3.0, float(rng.uniform(1, 5))) for name in ("in", *(f"res.{j}" for j in range(groups)), "out")}
    form = BlockForm(str(rng.choice(["first", "last"])), str(rng.choice(["zeros", "reflect"])))
    return Case(
        x, params, padded, excited, form, int(rng.choice([1, 2, 3, 4, 50])), precision, ranges,
        *draw_level_and_threads(rng), kind,
    )  # fmt: skip


def check(case: Case) -> collections.Counter[str]:
    """Checks one case against the definition in float64, and against itself.

    Raises:
        AssertionError: If the kernel is wrong.
    """
    with surroundings(case.level):
        got = _run(case, case.x, case.padded, case.excited)
        if case.threads > 1:
            torch.set_num_threads(case.threads)
            again = _run(case, case.x, case.padded, case.excited)
            torch.set_num_threads(1)
            assert same(again, got), "it depends on the number of threads"
        if case.excited is case.padded:
            check_rows_alone(got, case.padded, lambda row, count: _run(case, case.x[row : row + 1, :, :count]))
        known = block(
            case.x, case.params, case.padded, case.excited, case.form, case.dilation, case.precision, case.input_ranges
        )
        return collections.Counter(compared=assert_within(got, known))


def _run(case: Case, x: Tensor, padded: Tensor | None = None, excited: Tensor | None = None) -> Tensor:
    return run_block(
        x, case.params, padded, excited, case.form, case.dilation, case.precision, case.input_ranges, backend="native"
    )
