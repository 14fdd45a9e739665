"""Random cases of change_speed on the CPU: speeds of any denominator, crops with and without neighbours."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spkfast import ops
from spkfast.reference.change_speed import filters, half_width, ratio
from tests.fuzz.banks import assert_close, assert_same_elsewhere, draw_count, draw_rows, draw_type, exactly, laid_out
from tests.fuzz.bounds_products import TINY, UNIT
from tests.fuzz.fuzz_attentive_stats_pool import described, same
from tests.fuzz.fuzz_tdnn_layer import draw_level_and_threads
from tests.fuzz.surroundings import surroundings

_USUAL = (0.9, 1.0, 1.1, 0.95, 1.05, 0.5, 2.0)
_MOST = 3000
_MOST_PRODUCTS = 200_000


@dataclasses.dataclass
class Case:
    """One call of the op, and threads of a second one."""

    x: Tensor
    which: Tensor
    speeds: list[float]
    lengths: Tensor | None
    context: int
    num_samples: int
    level: str
    threads: int

    def __str__(self) -> str:
        lengths = None if self.lengths is None else self.lengths.tolist()
        return (
            f"x {described(self.x)}, which {self.which.tolist()}, speeds {self.speeds}, lengths {lengths}, context "
            f"{self.context}, num_samples {self.num_samples}, level {self.level}, threads {self.threads}"
        )

    def run(self, **changes: Any) -> Tensor:
        """What the kernel gives, with some of it replaced."""
        case = dataclasses.replace(self, **changes)
        return ops.change_speed(
            case.x, case.which, speeds=case.speeds, num_samples=case.num_samples, lengths=case.lengths,
            context=case.context, backend="native",
        )  # fmt: skip


def draw(rng: np.random.Generator) -> Case:
    """A case."""
    batch, speeds = int(rng.choice([0, 1, 2, 3, 5])), [_draw_speed(rng) for _ in range(int(rng.integers(1, 4)))]
    samples = 0 if rng.random() < 0.03 else draw_count(rng, _MOST)
    context = int(rng.choice([0, samples, rng.integers(0, min(samples, 500) + 1)], p=[0.3, 0.05, 0.65]))
    most = min(_MOST, _MOST_PRODUCTS // max(2 * half_width(speed) + 1 for speed in speeds))
    num_samples = 0 if rng.random() < 0.03 else draw_count(rng, most)
    which = torch.from_numpy(rng.integers(0, len(speeds), batch))
    lengths = None
    if rng.random() < 0.8:
        most = samples - context
        ends = np.stack(
            [np.zeros(batch), np.full(batch, min(1, most)), np.full(batch, most), rng.integers(0, most + 1, batch)]
        )
        chosen = rng.choice(4, batch, p=[0.05, 0.1, 0.35, 0.5])
        lengths = laid_out(rng, torch.from_numpy(ends[chosen, np.arange(batch)].astype(np.int64)))
    x = draw_rows(rng, batch, samples, draw_type(rng))
    return Case(x, laid_out(rng, which), speeds, lengths, context, num_samples, *draw_level_and_threads(rng))


def _draw_speed(rng: np.random.Generator) -> float:
    kind = rng.choice(["usual", "small", "fraction", "any"], p=[0.5, 0.4, 0.05, 0.05])
    if kind == "usual":
        return float(rng.choice(_USUAL))
    if kind == "any":
        return float(10 ** rng.uniform(-1, 1))
    # Tables of a thousand filters take most of a case's time.
    most = 1001 if kind == "fraction" else 41
    return float(np.clip(rng.integers(1, most) / rng.integers(1, most), 0.1, 10))


def check(case: Case) -> collections.Counter[str]:
    """Checks one case against sums at the positions that the docstring names, and against itself.

    Raises:
        AssertionError: If the kernel is wrong.
    """
    with surroundings(case.level):
        got = case.run()
        assert_same_elsewhere(case, got, inplace=False)
        compared = 0
        lengths = torch.full_like(case.which, case.x.shape[1] - case.context) if case.lengths is None else case.lengths
        for row, length in enumerate(lengths.tolist()):
            one = slice(row, row + 1)
            # In memory that ends with it: what is read past its end shows.
            x = case.x[one, : case.context + length].clone(memory_format=torch.contiguous_format)
            alone = case.run(x=x, which=case.which[one], lengths=lengths[one])
            assert same(alone, got[one]), f"row {row} alone is another"
            want, allowed = _known(exactly(x)[0], case.speeds[int(case.which[row])], case.context, case.num_samples)
            compared += assert_close(got[row], want, allowed, f"row {row}")
        return collections.Counter(compared=compared)


def _known(x: np.ndarray, speed: float, context: int, num_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Outputs of a row, and how far those of a sum in float32 may be from them."""
    length = len(x) - context
    if not length or not num_samples:
        return np.zeros(num_samples), np.zeros(num_samples)
    p, q = ratio(speed).as_integer_ratio()
    half, weights = half_width(speed), filters(speed)
    available = (length - 1) * q // p + 1
    n = np.arange(num_samples) % available
    first = context + n * p // q  # of the utterance, half a window further
    padded = np.concatenate([np.zeros(half), x, np.zeros(half + 1)])
    inputs = padded[first[:, None] + np.arange(2 * half + 1)]
    weights = weights[n % q]
    # Each product errs by the rounding of its weight, and by those of all sums that it enters.
    error = (weights.shape[1] + 2) * UNIT * 1.01
    return (weights * inputs).sum(1), error * (np.abs(weights) * np.abs(inputs)).sum(1) + TINY * weights.shape[1]
