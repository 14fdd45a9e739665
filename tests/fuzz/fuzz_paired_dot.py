"""Random cases of paired_dot on the CPU: rows of every size, the last ones of their matrices among them."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np
import torch
from torch import Tensor

from spkfast import ops
from tests.fuzz.banks import assert_close, draw_count, laid_out
from tests.fuzz.bounds_products import TINY, UNIT
from tests.fuzz.fuzz_attentive_stats_pool import described, same
from tests.fuzz.surroundings import surroundings


@dataclasses.dataclass
class Case:
    """One call of the op, and threads of a second one."""

    a: Tensor
    b: Tensor
    first: Tensor
    second: Tensor
    threads: int

    def __str__(self) -> str:
        return (
            f"a {described(self.a)}, b {described(self.b)}, first {self.first.tolist()}, second "
            f"{self.second.tolist()}, threads {self.threads}"
        )

    def run(self, part: slice = slice(None)) -> Tensor:
        """What the kernel gives for some of the pairs."""
        return ops.paired_dot(self.a, self.b, self.first[part], self.second[part], backend="native")


def draw(rng: np.random.Generator) -> Case:
    """A case."""
    size, pairs = draw_count(rng, 400), int(rng.choice([0, 1, 3, 5, 40]))
    sides = [
        torch.from_numpy(rng.standard_normal((int(rng.integers(1, 9)), size)) * 10.0 ** rng.integers(-18, 18)).float()
        for _ in range(2)
    ]
    index = [laid_out(rng, torch.from_numpy(rng.integers(0, len(side), pairs))) for side in sides]
    first, second = (laid_out(rng, side) for side in sides)
    return Case(first, second, index[0], index[1], int(rng.choice([1, 2, 3], p=[0.9, 0.05, 0.05])))


def check(case: Case) -> collections.Counter[str]:
    """Checks one case against sums in float64, and against itself.

    Raises:
        AssertionError: If the kernel is wrong.
    """
    with surroundings("scalar"):
        got = case.run()
        if case.threads > 1:
            torch.set_num_threads(case.threads)
            assert same(case.run(), got), "with more threads it is another"
            torch.set_num_threads(1)
        if len(got):
            last = slice(len(got) - 1, None)
            assert same(case.run(last), got[last]), "the last pair alone is another"
        a, b = (value.double().numpy()[index.numpy()] for value, index in ((case.a, case.first), (case.b, case.second)))
        # Sixteen running sums, then their sum: each product passes through that many roundings.
        roundings = case.a.shape[1] / 16 + 17 + 5
        allowed = roundings * UNIT * np.abs(a * b).sum(axis=1) + case.a.shape[1] * TINY
        return collections.Counter(compared=assert_close(got, (a * b).sum(axis=1), allowed, "pairs"))
