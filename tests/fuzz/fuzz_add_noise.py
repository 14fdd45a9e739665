"""Random cases of add_noise on the CPU: recordings of every size and offset up to the very end of a bank."""

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
_ADDED = 1024 // 4 + 4  # squares that are summed in float32 one after the other, where a vector has four lanes


@dataclasses.dataclass
class Case:
    """One call of the op, and threads of a second one."""

    x: Tensor
    bank: Tensor
    begins: Tensor
    sizes: Tensor
    offsets: Tensor
    snr_db: Tensor
    power_floor: float
    level: str
    threads: int

    def __str__(self) -> str:
        return (
            f"x {described(self.x)}, bank {described(self.bank)}, begins {self.begins.tolist()}, sizes "
            f"{self.sizes.tolist()}, offsets {self.offsets.tolist()}, snr_db {self.snr_db.tolist()}, power_floor "
            f"{self.power_floor}, level {self.level}, threads {self.threads}"
        )

    def run(self, inplace: bool = False, **changes: Any) -> Tensor:
        """What the kernel gives, with some of it replaced."""
        case = dataclasses.replace(self, **changes)
        return ops.add_noise(
            case.x, case.bank, case.begins, case.sizes, case.offsets, case.snr_db, power_floor=case.power_floor,
            inplace=inplace, backend="native",
        )  # fmt: skip


def draw(rng: np.random.Generator) -> Case:
    """A case."""
    batch, each, count = int(rng.choice([0, 1, 2, 3, 5])), int(rng.integers(0, 4)), int(rng.integers(0, 5))
    samples = 0 if rng.random() < 0.02 else draw_count(rng, _MOST)
    all_sizes = [draw_count(rng, _MOST) for _ in range(count)]
    bank, firsts = draw_bank(rng, all_sizes)
    begins, sizes, offsets = torch.zeros(3, batch, each, dtype=torch.int64)
    for at in np.ndindex(batch, each):
        if not count or rng.random() < 0.1:
            begins[at], offsets[at] = rng.integers(-10, 10, 2).tolist()  # of no recording, and so anything
            continue
        k = int(rng.integers(count))
        skipped = int(rng.integers(all_sizes[k])) if rng.random() < 0.2 else 0
        begins[at], sizes[at] = int(firsts[k]) + skipped, all_sizes[k] - skipped
        last = all_sizes[k] - skipped - 1
        offsets[at] = int(rng.choice([0, last, rng.integers(0, last + 1)]))
    snr_db = torch.from_numpy(rng.uniform(-20, 40, (batch, each))).float()
    return Case(
        draw_rows(rng, batch, samples, torch.float32), laid_out(rng, bank), laid_out(rng, begins), laid_out(rng, sizes),
        laid_out(rng, offsets), laid_out(rng, snr_db), float(rng.choice([0.0, 1e-4])), *draw_level_and_threads(rng),
    )  # fmt: skip


def check(case: Case) -> collections.Counter[str]:
    """Checks one case against the formula in float64, and against itself.

    Raises:
        AssertionError: If the kernel is wrong.
    """
    with surroundings(case.level):
        got = case.run()
        assert_same_elsewhere(case, got)
        compared = 0
        for row in range(len(case.x)):
            one = slice(row, row + 1)
            alone = case.run(
                x=case.x[one], begins=case.begins[one], sizes=case.sizes[one], offsets=case.offsets[one],
                snr_db=case.snr_db[one],
            )  # fmt: skip
            assert same(alone, got[one]), f"row {row} alone is another"
            compared += assert_close(got[row], *_known(case, row), f"row {row}")
        return collections.Counter(compared=compared)


def _known(case: Case, row: int) -> tuple[np.ndarray, np.ndarray]:
    """A row with its noises, and how far sums in float32 may be from it."""
    x, bank = exactly(case.x[row]), exactly(case.bank)
    want, allowed = x.copy(), np.zeros(len(x))
    if not len(x):
        return want, allowed
    power = np.mean(x * x)
    for k in range(case.begins.shape[1]):
        begin, size, offset = (int(value[row, k]) for value in (case.begins, case.sizes, case.offsets))
        if not size:
            continue
        part = np.resize(np.roll(bank[begin : begin + size], -offset), len(x))
        of_noise = np.mean(part * part)
        if not of_noise:
            continue
        gain = np.sqrt((power + case.power_floor) / (of_noise + case.power_floor)) * 10 ** (
            case.snr_db[row, k].item() / -20
        )
        want = want + gain * part
        # Half the error of either mean square, and the rounding of gain, ratio and product; then that of the sum.
        allowed = allowed + (_ADDED + 8) * UNIT * gain * np.abs(part)
        allowed = allowed * (1 + UNIT) + UNIT * np.abs(want) + TINY
    return want, allowed
