"""Random cases of top_moments on the CPU: values far from what the kernel guesses, with ties and without spread."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np
import torch
from torch import Tensor

from spkfast import ops
from spkfast.ops.top_moments import TopMoments
from tests.fuzz.banks import assert_close, draw_count, laid_out
from tests.fuzz.bounds_products import TINY, UNIT
from tests.fuzz.fuzz_attentive_stats_pool import described, same
from tests.fuzz.surroundings import surroundings


@dataclasses.dataclass
class Case:
    """One call of the op, and threads of a second one."""

    scores: Tensor
    n: int
    threads: int

    def __str__(self) -> str:
        return f"scores {described(self.scores)}, n {self.n}, threads {self.threads}"

    def run(self, part: slice = slice(None)) -> TopMoments:
        """What the kernel gives for some of the rows."""
        return ops.top_moments(self.scores[part], self.n, backend="native")


def draw(rng: np.random.Generator) -> Case:
    """A case."""
    rows, count = int(rng.choice([0, 1, 2, 40])), draw_count(rng, 500)
    values = rng.standard_normal((rows, count)) ** int(rng.choice([1, 3, 9]))
    if rng.random() < 0.3:
        values = np.round(values)
    if rng.random() < 0.1:
        values[:] = values[:, :1]
    values = values * 10.0 ** rng.integers(-20, 20) + float(rng.choice([0.0, 1e5]))
    scores = torch.from_numpy(values).float()
    for row in np.flatnonzero(rng.random(rows) < 0.1):
        scores[row, rng.integers(count)] = float(rng.choice([np.nan, np.inf, -np.inf]))
    n = int(rng.choice([1, count, rng.integers(1, count + 1)]))
    return Case(laid_out(rng, scores), n, int(rng.choice([1, 2, 3], p=[0.9, 0.05, 0.05])))


def check(case: Case) -> collections.Counter[str]:
    """Checks one case against sorting in float64, and against itself.

    Raises:
        AssertionError: If the kernel is wrong.
    """
    with surroundings("scalar"):
        got = case.run()
        if case.threads > 1:
            torch.set_num_threads(case.threads)
            assert all(map(same, case.run(), got)), "with more threads it is another"
            torch.set_num_threads(1)
        compared = 0
        for row, values in enumerate(case.scores.double().numpy()):
            alone = case.run(slice(row, row + 1))
            assert same(alone.mean[0], got.mean[row]) and same(alone.std[0], got.std[row]), f"row {row} alone"
            if not np.isfinite(values).all():
                assert got.mean[row].isnan() and got.std[row].isnan(), f"row {row} is not finite"
                continue
            top = np.sort(values)[::-1][: case.n]
            # Both in double, where sums in another order differ by far less than the last rounding.
            slack = 1e-13 * np.abs(top).max()
            for name, found, want in (("mean", got.mean, top.mean()), ("std", got.std, top.std())):
                allowed = np.array([UNIT * abs(want) + slack + TINY])
                compared += assert_close(found[row : row + 1], np.array([want]), allowed, f"{name} of row {row}")
        return collections.Counter(compared=compared)
