"""Learning rate and margin as functions of the step alone, so that a resumed run needs no state for them."""

from __future__ import annotations

import math
from collections.abc import Callable

from spkfast.errors import InputError
from spkfast.training.config import LossConfig, ScheduleConfig, check_values
from spkfast.training.spans import Length, told

_WITH_FINAL_LR = ("cosine", "exponential", "cosine_restarts", "cyclic")
# A triangle that has a top takes two steps.
_SHORTEST_CYCLE = {"cosine_restarts": 1, "cyclic": 2}


def learning_rate(config: ScheduleConfig, lr: float, final_lr: float, length: Length) -> Callable[[int], float]:
    """Learning rate of each step of a run; docs/schedules.md has the formulas.

    Args:
        config: The schedule.
        lr: Highest learning rate.
        final_lr: Lowest learning rate, which stands for ``config.final_lr``; both as
            :func:`spkfast.training.optimizers.scaled` gives them.
        length: Of the run.

    Returns:
        A function of the step, counted from 0.

    Raises:
        InputError: See :func:`check`.

    References:
        ``cosine``, ``cosine_restarts``: Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts",
        ICLR 2017. ``cyclic``: Smith, "Cyclical Learning Rates for Training Neural Networks", WACV 2017.
    """
    check(config, lr, final_lr, length)
    warmup = length.span(config.warmup, "schedule.warmup")
    cycle = length.span(config.cycle, "schedule.cycle")
    every = length.span(config.every, "schedule.every")

    def from_warmup_lr(top: float, share: float) -> float:
        return config.warmup_lr + (top - config.warmup_lr) * share

    def after_warmup(curve: Callable[[int], float]) -> Callable[[int], float]:
        def rate(step: int) -> float:
            return curve(step - warmup) if step >= warmup else from_warmup_lr(curve(0), (step + 1) / warmup)

        return rate

    def cosine(step: int) -> float:
        return _half_cosine(lr, final_lr, step / max(1, length.steps - 1 - warmup))

    def exponential(step: int) -> float:
        rate = lr * math.exp(step / length.steps * math.log(final_lr / lr))
        return rate if step >= warmup else rate * from_warmup_lr(lr, step / warmup) / lr

    def cosine_restarts(step: int) -> float:
        number, place = divmod(step, cycle)
        top = max(final_lr, lr * config.cycle_decay**number)
        if place < warmup:
            return final_lr + (top - final_lr) * place / warmup
        return _half_cosine(top, final_lr, (place - warmup) / (cycle - warmup))

    def cyclic(step: int) -> float:
        number, place = divmod(step, cycle)
        height = (lr - final_lr) * config.cycle_decay**number
        return final_lr + height * (1 - abs(2 * place / cycle - 1))

    curves = {
        "cosine": after_warmup(cosine),
        "exponential": exponential,
        "cosine_restarts": cosine_restarts,
        "cyclic": after_warmup(cyclic),
        "step": after_warmup(lambda step: lr * config.factor ** (step // every)),
        "constant": after_warmup(lambda step: lr),
    }
    return curves[config.name]


def check(config: ScheduleConfig, lr: float, final_lr: float, length: Length) -> None:
    """Refuses a schedule that a run of this length cannot follow.

    Args:
        config: The schedule.
        lr: Highest learning rate.
        final_lr: Lowest learning rate.
        length: Of the run.

    Raises:
        InputError: If a span is malformed or does not fit, or a number is out of range; the message begins with the
            name of the setting.
    """
    check_values(config, "schedule.")
    name = config.name
    cycles = name in _SHORTEST_CYCLE
    warmup = length.span(config.warmup, "schedule.warmup")
    cycle = length.span(config.cycle, "schedule.cycle")
    every = length.span(config.every, "schedule.every")
    _check_range("optimizer.lr", lr, 0, math.inf)
    if name in _WITH_FINAL_LR:
        _check_range("schedule.final_lr", final_lr, 0, lr, "optimizer.lr, ")
    if name == "exponential" and not final_lr > 0:
        raise InputError(f"schedule.final_lr must be above 0 with schedule.name=exponential, got {final_lr}")
    if name == "cosine_restarts" and config.warmup_lr != 0:
        raise InputError(
            "schedule.warmup_lr must be 0 with schedule.name=cosine_restarts, which begins at schedule.final_lr, "
            f"got {config.warmup_lr}"
        )
    if name == "cyclic":
        _check_range("schedule.warmup_lr", config.warmup_lr, 0, final_lr, "schedule.final_lr, ")
    else:
        _check_range("schedule.warmup_lr", config.warmup_lr, 0, lr, "optimizer.lr, ")
    if cycles and cycle < _SHORTEST_CYCLE[name]:
        raise InputError(f"schedule.cycle must be at least {_SHORTEST_CYCLE[name]}, got {told(config.cycle, cycle)}")
    longest, of = (cycle, "cycle") if name == "cosine_restarts" else (length.steps, "run")
    if warmup >= longest:
        raise InputError(
            f"schedule.warmup must be shorter than the {of} of {longest} steps, got {told(config.warmup, warmup)}"
        )
    if name == "step" and every < 1:
        raise InputError(f"schedule.every must be at least 1, got {told(config.every, every)}")


def margin(config: LossConfig, length: Length) -> Callable[[int], float]:
    """Margin of each step of a run: 0 up to ``margin_start``, final from ``margin_end`` on.

    Args:
        config: The loss.
        length: Of the run.

    Returns:
        A function of the step, counted from 0.

    Raises:
        InputError: If a span is malformed, the two do not come one after the other within the run, or a name or number
            of the loss makes no sense.
    """
    check_values(config, "loss.")
    start = length.span(config.margin_start, "loss.margin_start")
    end = length.span(config.margin_end, "loss.margin_end")
    if start > end:
        raise InputError(
            f"loss.margin_start must not be after loss.margin_end, got {told(config.margin_start, start)} "
            f"and {told(config.margin_end, end)}"
        )
    if end > length.steps:
        raise InputError(
            f"loss.margin_end must lie within the run of {length.steps} steps, got {told(config.margin_end, end)}"
        )

    def value(step: int) -> float:
        if step >= end:
            return config.margin
        if step <= start:
            return 0.0
        share = (step - start) / (end - start)
        if config.margin_growth == "exponential":
            # As wespeaker has it: what is missing shrinks to a thousandth, and the rest comes at once.
            share = 1 - math.exp(share * math.log(1e-3 / (1 + 1e-6)))
        return config.margin * share

    return value


def _half_cosine(top: float, bottom: float, progress: float) -> float:
    return bottom + (top - bottom) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _check_range(name: str, value: float, least: float, most: float, limit: str = "") -> None:
    if not least <= value <= most or math.isinf(value):
        upper = f" and at most {limit}{most}" if math.isfinite(most) else ", and finite"
        raise InputError(f"{name} must be at least {least}{upper}, got {value}")
