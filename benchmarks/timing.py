"""Timing of peers against one another: interleaved in one run, with the spread that the machine itself has."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping

NOISY = 0.10  # an A/A spread above this says that the machine was too busy to tell contenders apart


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds per call of one contender."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The figure to quote."""
        return statistics.median(self.seconds)

    def to_dict(self) -> dict[str, float | int]:
        """Median and range in milliseconds, for JSON."""
        return {
            "median_ms": 1e3 * self.median,
            "min_ms": 1e3 * min(self.seconds),
            "max_ms": 1e3 * max(self.seconds),
            "repeats": len(self.seconds),
        }


@dataclasses.dataclass(frozen=True)
class Figure:
    """A ratio or rate that was measured, and the bound that it is to keep, where there is one."""

    name: str
    value: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def goal(self) -> str:
        """The bound as text."""
        if self.at_least is not None:
            return f"at least {self.at_least:g}"
        return "" if self.at_most is None else f"at most {self.at_most:g}"

    @property
    def verdict(self) -> str:
        """``met`` or ``missed``; empty where there is no goal."""
        if not self.goal:
            return ""
        kept = (self.at_least is None or self.value >= self.at_least) and (
            self.at_most is None or self.value <= self.at_most
        )
        return "met" if kept else "missed"


def interleaved(
    contenders: Mapping[str, Callable[[], object]], *, repeats: int = 10, warm_up: int = 1, calls: int = 1
) -> tuple[dict[str, Timing], float]:
    """Times contenders in turn, A B C A B C ..., so that a slow spell of the machine hits all of them.

    Args:
        contenders: Calls without arguments, by name. The first one runs twice in each round.
        repeats: Rounds, after the warm-up.
        warm_up: Rounds that do not count.
        calls: Calls of a contender in its turn, the mean of which counts: more than one for what takes microseconds.

    Returns:
        Times by name, and the A/A spread: by what fraction the medians of the first contender's two series differ. A
        ratio between contenders means something only where it exceeds this.
    """
    clocks = {name: functools.partial(seconds_per_call, call, calls) for name, call in contenders.items()}
    return in_turns(clocks, repeats=repeats, warm_up=warm_up)


def in_turns(
    clocks: Mapping[str, Callable[[], float]], *, repeats: int = 10, warm_up: int = 1
) -> tuple[dict[str, Timing], float]:
    """As :func:`interleaved`, of contenders that time themselves: each call gives the seconds of its turn."""
    first = next(iter(clocks))
    order: list[tuple[str | None, Callable[[], float]]] = list(clocks.items())
    # In the middle: next to its first run it would find its own data in the caches.
    order.insert((len(order) + 1) // 2, (None, clocks[first]))
    seconds: dict[str | None, list[float]] = {name: [] for name, _ in order}
    for repeat in range(warm_up + repeats):
        for name, clock in order:
            elapsed = clock()
            if repeat >= warm_up:
                seconds[name].append(elapsed)
    timings = {name: Timing(tuple(values)) for name, values in seconds.items()}
    again, once = timings.pop(None).median, timings[first].median
    return {name: timings[name] for name in clocks}, abs(again - once) / once


def seconds_per_call(call: Callable[[], object], calls: int) -> float:
    """Mean over ``calls`` calls in a row."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls
