"""Random cases of the op of attentive pooling in inference: to the last bit what the ops give that it is made of."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import spkfast
from spkfast.nn import pooling
from spkfast.nn.pooling import AttentionForm, AttentiveStatsPool, Deviation
from spkfast.ops import _attentive_pooling
from tests.fuzz.fuzz_attentive_stats_pool import (
    described,
    draw_frames,
    draw_lengths,
    draw_shape,
    draw_values,
    same,
)
from tests.fuzz.surroundings import surroundings

_ALL_LEVELS = ("scalar", "avx2", "avx512", "avx512bf16")
_LEVELS = _ALL_LEVELS[: _ALL_LEVELS.index(spkfast.info()["cpu"]["level"]) + 1]


@dataclasses.dataclass
class Case:
    """One call of a pooling layer.

    Attributes:
        layer: The pooling.
        x: Frames.
        lengths: Within 0..T.
        level: Instruction set.
        threads: Threads of a second call.
    """

    layer: AttentiveStatsPool
    x: Tensor
    lengths: Tensor | None
    level: str
    threads: int

    def __str__(self) -> str:
        lengths = None if self.lengths is None else self.lengths.tolist()
        return (
            f"x {described(self.x)}, lengths {lengths}, {self.layer}, {self.layer.form}, precision "
            f"{self.layer.precision}, level {self.level}, threads {self.threads}"
        )


def draw(rng: np.random.Generator) -> Case:
    """A case."""
    batch, channels, frames = draw_shape(rng)
    channels, frames = max(channels, 1), max(frames, 1)
    batch = int(rng.choice([batch, 9, 12]))  # so many that each is one thread's
    shape = batch, channels, min(frames, 4096 // max(batch, 1) + 1)
    lengths = draw_lengths(rng, shape)
    lengths = None if lengths is None else lengths.clamp(0, shape[2])
    dtype = torch.float32 if rng.random() < 0.7 else torch.bfloat16
    x, _ = draw_frames(rng, draw_values(rng, shape), dtype, lengths)
    form = AttentionForm(
        Deviation(low=1e-5),
        Deviation(bool(rng.random() < 0.5), *(float(value) for value in rng.choice([0, 1e-7, 1e-2], 2)), high=1e4),
        relu=bool(rng.random() < 0.5),
        bn=bool(rng.random() < 0.5),
        tanh=bool(rng.random() < 0.5),
    )
    layer = AttentiveStatsPool(channels, int(rng.choice([1, 2, 7, 64, 130])), bool(rng.random() < 0.8), form=form)
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    for value in (*layer.parameters(), *layer.buffers()):
        if value.is_floating_point():
            with torch.no_grad():
                value.normal_(generator=generator).abs_()
    layer.precision = "bf16" if dtype == torch.bfloat16 or rng.random() < 0.2 else "fp32"
    return Case(layer.eval(), x, lengths, str(rng.choice(_LEVELS)), int(rng.choice([1, 2, 3], p=[0.7, 0.2, 0.1])))


def check(case: Case) -> collections.Counter[str]:
    """Checks one case against the ops that the fused one is made of, and against itself with more threads.

    Raises:
        AssertionError: If the kernel is wrong.
    """
    with surroundings(case.level):
        found, fused = _pooled(case, case.x)
        # Its products read channels side by side. What does not fit the fused op went to the others at once.
        side_by_side = case.x.transpose(1, 2).contiguous().transpose(1, 2)
        if fused and case.x.shape[1] > 1:
            expected, _ = _pooled(case, side_by_side, apart=True)
            # The instruction that makes bfloat16 numbers makes none below the normal ones.
            equal = torch.allclose(found, expected, rtol=0, atol=torch.finfo(torch.float32).tiny, equal_nan=True)
            assert equal, f"differs from the ops that it is made of by {(found - expected).abs().max()}"
        torch.set_num_threads(case.threads)
        assert same(found, _pooled(case, case.x)[0]), f"differs with {case.threads} threads"
    return collections.Counter(compared=found.numel() if fused else 0)


def _pooled(case: Case, x: Tensor, apart: bool = False) -> tuple[Tensor, bool]:
    """What the layer gives, and whether the fused op gave it; ``apart`` asks for the ops that this is made of."""
    answers = []

    def fits(*args: Any) -> bool:
        answers.append(_attentive_pooling.fits(*args) and not apart)
        return answers[-1]

    with mock.patch.object(pooling, "fits", fits), mock.patch.object(Deviation, "of", _deviation), torch.no_grad():
        return case.layer(x, case.lengths), answers == [True]


def _deviation(form: Deviation, var: Tensor, frames: Tensor | None = None) -> Tensor:
    """As the layer's, with every step rounded as IEEE 754 has it; torch's square root is a unit off at times."""
    value = var.numpy()
    if form.unbiased and frames is not None:
        count = frames.numpy()
        value = value * (count / np.maximum(count - 1, 1))
    low, high = (np.float32(limit) for limit in form.limits(torch.float32))
    value = np.sqrt(np.minimum(np.maximum(value + np.float32(form.add), low), high)) + np.float32(form.offset)
    return torch.from_numpy(value)
