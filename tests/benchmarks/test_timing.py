"""Contenders take turns, and goals are judged by their bounds."""

from __future__ import annotations

import pytest

from benchmarks import timing
from benchmarks.timing import Figure


def test_contenders_take_turns(monkeypatch):
    clock, ran = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def contender(name, seconds):
        def call():
            ran.append(name)
            clock[0] += seconds

        return call

    contenders = {"a": contender("a", 1.0), "b": contender("b", 3.0), "c": contender("c", 2.0)}
    timings, spread = timing.interleaved(contenders, repeats=4, calls=2)
    assert "".join(ran) == "aabbaacc" * 5  # one round of warm-up
    assert {name: value.seconds for name, value in timings.items()} == {
        "a": (1.0,) * 4,
        "b": (3.0,) * 4,
        "c": (2.0,) * 4,
    }
    assert spread == 0


def test_spread_is_the_difference_of_two_series_of_the_first(monkeypatch):
    clock, durations = [0.0], [1.0, 1.5]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def call():
        clock[0] += durations[0]
        durations.reverse()

    _, spread = timing.interleaved({"a": call}, repeats=3, warm_up=0)
    assert spread == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("figure", "goal", "verdict"),
    [
        (Figure("r", 15.0, at_least=15), "at least 15", "met"),
        (Figure("r", 14.9, at_least=15), "at least 15", "missed"),
        (Figure("r", 2.0, at_most=2), "at most 2", "met"),
        (Figure("r", 2.1, at_most=2), "at most 2", "missed"),
        (Figure("r", 2.1), "", ""),
    ],
)
def test_goals(figure, goal, verdict):
    assert (figure.goal, figure.verdict) == (goal, verdict)
