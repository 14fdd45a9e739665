"""Random cases of reverberate on the CPU: responses of every size up to the very end of a bank."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spkfast import ops
from tests.fuzz.banks import assert_close, assert_same_elsewhere, draw_bank, draw_count, draw_rows, exactly, laid_out
from tests.fuzz.bounds_products import TINY, UNIT
from tests.fuzz.fuzz_attentive_stats_pool import described, same
from tests.fuzz.fuzz_tdnn_layer import draw_level_and_threads
from tests.fuzz.surroundings import surroundings

_MOST = 4000


@dataclasses.dataclass
class Case:
    """One call of the op, and threads of a second one."""

    x: Tensor
    bank: Tensor
    begins: Tensor
    sizes: Tensor
    gains: Tensor
    longest: int | None
    level: str
    threads: int

    def __str__(self) -> str:
        return (
            f"x {described(self.x)}, bank {described(self.bank)}, begins {self.begins.tolist()}, sizes "
            f"{self.sizes.tolist()}, gains {self.gains.tolist()}, longest {self.longest}, level {self.level}, threads "
            f"{self.threads}"
        )

    def run(self, inplace: bool = False, **changes: Any) -> Tensor:
        """What the kernel gives, with some of it replaced."""
        case = dataclasses.replace(self, **changes)
        return ops.reverberate(
            case.x, case.bank, case.begins, case.sizes, case.gains, longest=case.longest, inplace=inplace,
            backend="native",
        )  # fmt: skip


def draw(rng: np.random.Generator) -> Case:
    """A case."""
    batch, count = int(rng.choice([0, 1, 2, 3, 5])), int(rng.integers(0, 5))
    samples = 0 if rng.random() < 0.02 else draw_count(rng, _MOST)
    all_sizes = [draw_count(rng, _MOST if rng.random() < 0.3 else max(samples, 1)) for _ in range(count)]
    bank, firsts = draw_bank(rng, all_sizes)
    begins, sizes = torch.zeros(2, batch, dtype=torch.int64)
    for row in range(batch):
        if not count or rng.random() < 0.1:
            begins[row] = int(rng.integers(-10, 10))  # of no response, and so anywhere
            continue
        k = int(rng.integers(count))
        skipped = int(rng.integers(all_sizes[k])) if rng.random() < 0.3 else 0  # from within a response to its end
        begins[row], sizes[row] = int(firsts[k]) + skipped, all_sizes[k] - skipped
    gains = torch.from_numpy(
        rng.choice([1.0, -1.0, 0.0, 10 ** rng.uniform(-3, 3)], batch, p=[0.4, 0.1, 0.1, 0.4])
    ).float()
    most = int(sizes.max()) if batch else 0
    longest = (None, max(most, 1), int(rng.integers(1, _MOST)))[int(rng.choice(3, p=[0.4, 0.4, 0.2]))]
    return Case(
        draw_rows(rng, batch, samples, torch.float32), laid_out(rng, bank), laid_out(rng, begins), laid_out(rng, sizes),
        laid_out(rng, gains), longest, *draw_level_and_threads(rng),
    )  # fmt: skip


def check(case: Case) -> collections.Counter[str]:
    """Checks one case against convolution by its definition in float64, and against itself.

    Raises:
        AssertionError: If the kernel is wrong.
    """
    with surroundings(case.level):
        got = case.run()
        assert_same_elsewhere(case, got)
        compared = 0
        for row in range(len(case.x)):
            one = slice(row, row + 1)
            begin, size = int(case.begins[row]), int(case.sizes[row])
            # In a bank that holds nothing else: what is read past its end shows.
            bank = (
                case.bank[begin : begin + size].clone(memory_format=torch.contiguous_format) if size else case.bank[:0]
            )
            alone = case.run(
                x=case.x[one], bank=bank, begins=torch.zeros(1, dtype=torch.int64), sizes=case.sizes[one],
                gains=case.gains[one],
            )  # fmt: skip
            assert same(alone, got[one]), f"row {row} alone is another"
            want, allowed = _known(exactly(case.x[row]), exactly(bank), float(case.gains[row]), case.longest)
            compared += assert_close(got[row], want, allowed, f"row {row}")
        return collections.Counter(compared=compared)


def _known(x: np.ndarray, response: np.ndarray, gain: float, longest: int | None) -> tuple[np.ndarray, np.ndarray]:
    """A row convolved, and how far a product of transforms in float32 may be from it.

    A transform of 2^k points errs, against its own size and spread over all points, by about a unit of rounding for
    each of its k passes, and no value lies further out than some of these (Gentleman and Sande, AFIPS 1966). There are
    three transforms. What they err by at one strong point, of a spectrum or of a row, is a part of that point.
    """
    if not len(response) or not len(x):
        return x, np.zeros(len(x))
    used = response[: len(x) if longest is None else longest][: len(x)]
    whole = gain * np.convolve(x, used)  # with what falls behind the end, which errs into the row all the same
    points = (len(x) + len(used)) / 2
    spread = abs(gain) * np.linalg.norm(x) * np.linalg.norm(used) / np.sqrt(points)
    passes = np.log2(points + 512)
    return whole[: len(x)], np.full(len(x), 3 * passes * UNIT * (spread + np.abs(whole).max()) + TINY)
