"""Learning rate and margin over a run: by hand, by the schedulers of torch, and by the toolkits' formulas."""

from __future__ import annotations

import itertools
import math
import random
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from spkfast.errors import InputError
from spkfast.training import schedule
from spkfast.training.config import LossConfig, ScheduleConfig
from spkfast.training.spans import Length

EPS = sys.float_info.epsilon


def rates(config: ScheduleConfig, lr: float, final_lr: float, length: Length) -> list[float]:
    rate = schedule.learning_rate(config, lr, final_lr, length)
    return [rate(step) for step in range(length.steps)]


def of_torch(make: Callable[[torch.optim.Optimizer], Any], lr: float, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler = make(optimizer)
    out = []
    for _ in range(steps):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return out


def assert_same(found: list[float], expected: list[float], top: float) -> None:
    # torch goes from each rate to the next by some eight operations, each of which rounds by half an EPS of the top.
    assert len(found) == len(expected)
    assert found == pytest.approx(expected, rel=0, abs=4 * EPS * top * len(found))


def test_cosine_by_hand() -> None:
    config = ScheduleConfig(name="cosine", warmup=4, warmup_lr=0.02)
    found = rates(config, 0.1, 0.01, Length(9, 1))
    half = 0.01 + 0.09 * (1 + math.sqrt(0.5)) / 2, 0.01 + 0.09 * (1 - math.sqrt(0.5)) / 2
    assert found == pytest.approx([0.04, 0.06, 0.08, 0.1, 0.1, half[0], 0.055, half[1], 0.01])


def test_warmup_in_words_is_that_in_steps() -> None:
    length = Length(600, 20)
    expected = rates(ScheduleConfig(warmup=60), 0.1, 1e-4, length)
    assert rates(ScheduleConfig(warmup="3 epochs"), 0.1, 1e-4, length) == expected
    assert rates(ScheduleConfig(warmup="10 %"), 0.1, 1e-4, length) == expected
    assert expected[59] == 0.1 and expected[-1] == 1e-4


def test_run_of_one_step() -> None:
    for name in ("cosine", "exponential", "step", "constant"):
        assert rates(ScheduleConfig(name=name, warmup=0), 0.1, 0.01, Length(1, 1)) == pytest.approx([0.1])


@pytest.mark.parametrize("steps", [2, 3, 50])
def test_cosine_is_that_of_torch(steps: int) -> None:
    expected = of_torch(lambda o: lr_scheduler.CosineAnnealingLR(o, steps - 1, eta_min=0.003), 0.2, steps)
    assert_same(rates(ScheduleConfig(name="cosine", warmup=0), 0.2, 0.003, Length(steps, 1)), expected, 0.2)


def test_cosine_after_warmup_is_that_of_torch() -> None:
    def make(optimizer: torch.optim.Optimizer) -> Any:
        warm = lr_scheduler.LinearLR(optimizer, start_factor=1 / 10, total_iters=9)
        cosine = lr_scheduler.CosineAnnealingLR(optimizer, 60 - 1 - 10, eta_min=0.003)
        return lr_scheduler.SequentialLR(optimizer, [warm, cosine], milestones=[10])

    expected = of_torch(make, 0.2, 60)
    assert_same(rates(ScheduleConfig(name="cosine", warmup=10), 0.2, 0.003, Length(60, 1)), expected, 0.2)


def test_step_is_that_of_torch() -> None:
    config = ScheduleConfig(name="step", warmup=0, every="1 epochs", factor=0.97)
    expected = of_torch(lambda o: lr_scheduler.StepLR(o, 7, 0.97), 1e-3, 100)
    assert_same(rates(config, 1e-3, 1.0, Length(100, 7)), expected, 1e-3)


def test_step_counts_from_the_end_of_the_warmup() -> None:
    config = ScheduleConfig(name="step", warmup=2, every=3, factor=0.5)
    assert rates(config, 0.8, 1.0, Length(9, 1)) == pytest.approx([0.4, 0.8, 0.8, 0.8, 0.8, 0.4, 0.4, 0.4, 0.2])


def test_constant_after_warmup() -> None:
    config = ScheduleConfig(name="constant", warmup=2, warmup_lr=0.1)
    assert rates(config, 0.3, 1.0, Length(5, 1)) == pytest.approx([0.2, 0.3, 0.3, 0.3, 0.3])


@pytest.mark.parametrize(("mode", "decay"), [("triangular", 1.0), ("triangular2", 0.5)])
@pytest.mark.parametrize("cycle", [2, 9, 20])
def test_cyclic_is_that_of_torch(mode: str, decay: float, cycle: int) -> None:
    def make(optimizer: torch.optim.Optimizer) -> Any:
        return lr_scheduler.CyclicLR(optimizer, 1e-4, 0.1, cycle / 2, mode=mode, cycle_momentum=False)

    config = ScheduleConfig(name="cyclic", warmup=0, cycle=cycle, cycle_decay=decay)
    assert_same(rates(config, 0.1, 1e-4, Length(75, 1)), of_torch(make, 0.1, 75), 0.1)


def test_cyclic_comes_after_a_warmup_to_the_lowest_rate() -> None:
    config = ScheduleConfig(name="cyclic", warmup=2, cycle=4, cycle_decay=0.5)
    assert rates(config, 0.5, 0.1, Length(9, 1)) == pytest.approx([0.05, 0.1, 0.1, 0.3, 0.5, 0.3, 0.1, 0.2, 0.3])


def test_exponential_by_hand() -> None:
    config = ScheduleConfig(name="exponential", warmup=2)
    assert rates(config, 0.16, 0.01, Length(4, 1)) == pytest.approx([0.0, 0.04, 0.04, 0.02])
    # Warmed up from the rate that was not scaled by the batch.
    config = ScheduleConfig(name="exponential", warmup=2, warmup_lr=0.04)
    assert rates(config, 0.16, 0.01, Length(4, 1)) == pytest.approx([0.04, 0.05, 0.04, 0.02])


def test_exponential_is_that_of_torch() -> None:
    steps, lr, final_lr = 150, 0.1, 5e-5
    expected = of_torch(lambda o: lr_scheduler.ExponentialLR(o, (final_lr / lr) ** (1 / steps)), lr, steps)
    expected = [rate * min(1, step / 6) for step, rate in enumerate(expected)]
    assert_same(rates(ScheduleConfig(name="exponential", warmup=6), lr, final_lr, Length(steps, 1)), expected, lr)


def test_cosine_restarts_by_hand() -> None:
    config = ScheduleConfig(name="cosine_restarts", warmup=2, cycle=6, cycle_decay=0.75)
    quarter = (1 + math.sqrt(0.5)) / 2
    shares = [0, 0.5, 1, quarter, 0.5, 1 - quarter]
    expected = [1 + 7 * share for share in shares] + [1 + 5 * share for share in shares]
    assert rates(config, 8.0, 1.0, Length(12, 1)) == pytest.approx(expected)


def test_cosine_restarts_are_those_of_torch() -> None:
    config = ScheduleConfig(name="cosine_restarts", warmup=0, cycle=20)
    expected = of_torch(lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 20, eta_min=5e-6), 1e-3, 90)
    assert_same(rates(config, 1e-3, 5e-6, Length(90, 1)), expected, 1e-3)


def restarts(top: float, low: float, cycle: int, warmup: int, gamma: float) -> Iterator[float]:
    """ESPnet's rates one after the other, with a state."""
    number = place = 0
    while True:
        highest = top * gamma**number
        if place < warmup:
            yield (highest - low) * place / warmup + low
        else:
            yield low + (highest - low) * (1 + math.cos(math.pi * (place - warmup) / (cycle - warmup))) / 2
        place += 1
        if place == cycle:
            number, place = number + 1, 0


def test_cosine_restarts_are_those_of_espnet() -> None:
    config = ScheduleConfig(name="cosine_restarts", warmup=10, cycle="10 epochs", cycle_decay=0.75)
    expected = restarts(1e-3, 5e-6, 70, 10, 0.75)
    assert_same(rates(config, 1e-3, 5e-6, Length(300, 7)), [next(expected) for _ in range(300)], 1e-3)


def test_late_cycles_do_not_fall_below_the_lowest_rate() -> None:
    config = ScheduleConfig(name="cosine_restarts", warmup=2, cycle=5, cycle_decay=0.5)
    found = rates(config, 1.0, 0.2, Length(40, 1))
    assert min(found) == 0.2 and found[20:] == [0.2] * 20


NAMES = ("cosine", "exponential", "cosine_restarts", "cyclic", "step", "constant")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(20))
def test_rates_stay_between_bounds_and_do_not_jump(name: str, seed: int) -> None:
    draw = random.Random(f"{name} {seed}")
    steps = draw.randint(5, 400)
    cycle = draw.randint(2, 120)
    warmup = draw.choice([0, draw.randint(1, (min(cycle, steps) - 1) if name == "cosine_restarts" else steps - 1)])
    lr = 10 ** draw.uniform(-4, 0)
    final_lr = lr * 10 ** draw.uniform(-4, 0)
    lowest = {"step": 0.0, "constant": lr}.get(name, final_lr)
    config = ScheduleConfig(
        name=name,  # type: ignore[arg-type]
        warmup=warmup,
        warmup_lr=0.0 if name == "cosine_restarts" else draw.choice([0.0, draw.uniform(0, lowest)]),
        cycle=cycle,
        cycle_decay=draw.choice([1.0, draw.uniform(0.1, 1)]),
        every=draw.randint(1, 100),
        factor=draw.uniform(0.5, 1),
    )
    rate = schedule.learning_rate(config, lr, final_lr, Length(steps, 10))
    found = [rate(step) for step in range(steps)]
    backwards = [rate(step) for step in reversed(range(steps))]
    assert backwards[::-1] == found
    bottom = min(lowest, config.warmup_lr) if warmup else lowest
    assert all(math.isfinite(value) for value in found)
    # The curves take some ten operations.
    assert min(found) >= bottom * (1 - 10 * EPS) and max(found) <= lr * (1 + 10 * EPS)
    if name in ("step", "constant"):
        assert found[warmup:] == sorted(found[warmup:], reverse=True)
        assert found[:warmup] == sorted(found[:warmup])
        return
    # Steepest slope of the straight line, the half cosine, the triangle and the exponential, of which the first may
    # come on top of the last.
    of_line = lr / warmup if warmup else 0.0
    slopes = {
        "cosine": math.pi / 2 * lr / max(1, steps - 1 - warmup),
        "exponential": of_line + lr * math.log(lr / final_lr) / steps,
        "cosine_restarts": math.pi / 2 * lr / (cycle - warmup),
        "cyclic": 2 * lr / cycle,
    }
    jumps = [
        abs(after - before)
        for step, (before, after) in enumerate(itertools.pairwise(found), 1)
        # Without a warm-up a cycle begins at its top.
        if not (name == "cosine_restarts" and warmup == 0 and step % cycle == 0)
    ]
    assert max(jumps) <= max(of_line, slopes[name]) * (1 + 1e-9)


BAD_RATES = {
    "optimizer.lr must be at least 0, and finite": [({}, -1.0, 0.01), ({}, math.nan, 0.01), ({}, math.inf, 0.01)],
    "schedule.final_lr must be at least 0 and at most optimizer.lr, 0.1": [
        ({}, 0.1, 0.2),
        ({}, 0.1, -0.2),
        ({}, 0.1, math.nan),
    ],
    "schedule.final_lr must be above 0 with schedule.name=exponential, got 0.0": [({"name": "exponential"}, 0.1, 0.0)],
}
BAD_SETTINGS = {
    "unknown schedule.name 'cosin' (did you mean 'cosine'?)": {"name": "cosin"},
    "schedule.warmup_lr must be at least 0 and at most optimizer.lr, 0.1, got 0.2": {"warmup_lr": 0.2},
    "schedule.warmup_lr must be at least 0 and at most schedule.final_lr, 0.01, got 0.05": {
        "name": "cyclic",
        "warmup_lr": 0.05,
    },
    "schedule.warmup_lr must be 0 with schedule.name=cosine_restarts, which begins at schedule.final_lr, got 0.001": {
        "name": "cosine_restarts",
        "warmup_lr": 0.001,
    },
    "schedule.warmup must be shorter than the run of 100 steps, got 100": {"warmup": 100},
    "schedule.warmup must be shorter than the run of 100 steps, got '11 epochs' (110 steps)": {"warmup": "11 epochs"},
    "schedule.warmup must be shorter than the cycle of 20 steps, got 20": {
        "name": "cosine_restarts",
        "warmup": 20,
        "cycle": 20,
    },
    "schedule.cycle must be at least 1, got 0": {"name": "cosine_restarts", "warmup": 0, "cycle": 0},
    "schedule.cycle must be at least 2, got '0.1 epochs' (1 steps)": {"name": "cyclic", "cycle": "0.1 epochs"},
    "schedule.cycle_decay must be above 0 and at most 1, got 1.1": {"name": "cyclic", "cycle_decay": 1.1},
    "schedule.factor must be above 0 and at most 1, got 0.0": {"name": "step", "factor": 0.0},
    "schedule.factor must be above 0 and at most 1, got nan": {"name": "step", "factor": math.nan},
    "schedule.every must be at least 1, got '0 %' (0 steps)": {"name": "step", "every": "0 %"},
    "schedule.warmup must be a number of steps": {"warmup": "soon"},
    "schedule.cycle must be a number of steps": {"cycle": "long"},
    "schedule.every must be a number of steps": {"every": -1},
}


@pytest.mark.parametrize("message", BAD_RATES)
def test_bad_rates_are_named(message: str) -> None:
    for changes, lr, final_lr in BAD_RATES[message]:
        with pytest.raises(InputError, match="^" + re.escape(message)):
            schedule.learning_rate(ScheduleConfig(warmup=5, **changes), lr, final_lr, Length(100, 10))


@pytest.mark.parametrize("message", BAD_SETTINGS)
def test_bad_settings_are_named(message: str) -> None:
    config = ScheduleConfig(**{"warmup": 5, **BAD_SETTINGS[message]})
    with pytest.raises(InputError, match="^" + re.escape(message)):
        schedule.learning_rate(config, 0.1, 0.01, Length(100, 10))


def test_spans_and_rates_that_a_schedule_does_not_have_may_be_anything() -> None:
    length = Length(10, 1)
    schedule.check(ScheduleConfig(name="constant", warmup=1, cycle=0, every=0), 1e-5, 1e-4, length)
    schedule.check(ScheduleConfig(name="cosine", warmup=1, cycle=0), 0.1, 0.0, length)


def margins(config: LossConfig, length: Length) -> list[float]:
    value = schedule.margin(config, length)
    return [value(step) for step in range(length.steps)]


def test_margin_grows_between_two_points() -> None:
    found = margins(LossConfig(margin=0.3, margin_start="20 %", margin_end=60), Length(100, 1))
    assert found[:21] == [0.0] * 21 and found[60:] == [0.3] * 40
    assert found[20:61] == pytest.approx([0.3 * k / 40 for k in range(41)])


@pytest.mark.parametrize("growth", ["linear", "exponential"])
def test_margin_without_growth(growth: Any) -> None:
    length = Length(10, 1)
    assert margins(LossConfig(margin=0.2, margin_start=0, margin_end=0, margin_growth=growth), length) == [0.2] * 10
    expected = [0.0] * 4 + [0.2] * 6
    assert margins(LossConfig(margin=0.2, margin_start=4, margin_end=4, margin_growth=growth), length) == expected


def test_exponential_margin_is_that_of_wespeaker() -> None:
    # Epochs 20 and 40 of 150, counted from 1.
    config = LossConfig(margin=0.2, margin_start="19 epochs", margin_end="39 epochs", margin_growth="exponential")
    found = margins(config, Length(1500, 10))
    expected = []
    for step in range(1500):
        if step < (20 - 1) * 10:
            expected.append(0.0)
        elif step < (40 - 1) * 10:
            ratio = 1.0 - math.exp((step - 190) / 200 * math.log(1e-3 / (1.0 + 1e-6)))
            expected.append(0.0 + (0.2 - 0.0) * ratio)
        else:
            expected.append(0.2)
    assert found == pytest.approx(expected, rel=0, abs=8 * EPS)
    assert found[389] == pytest.approx(0.1998, abs=1e-4) and found[210] > 0.099 and found == sorted(found)


BAD_MARGINS = {
    "loss.margin_start must not be after loss.margin_end, got 50 and '30 %' (30 steps)": {"margin_start": 50},
    "loss.margin_end must lie within the run of 100 steps, got '11 epochs' (110 steps)": {"margin_end": "11 epochs"},
    "loss.margin_start must be a number of steps": {"margin_start": -1},
    "loss.margin_end must be a number of steps, 'N epochs' or 'N %' of the run": {"margin_end": 0.3},
    "unknown loss.margin_growth 'liner' (did you mean 'linear'?)": {"margin_growth": "liner"},
}


@pytest.mark.parametrize("message", BAD_MARGINS)
def test_bad_margin_settings_are_named(message: str) -> None:
    with pytest.raises(InputError, match="^" + re.escape(message)):
        schedule.margin(LossConfig(**BAD_MARGINS[message]), Length(100, 10))
