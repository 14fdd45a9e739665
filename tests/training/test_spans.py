"""Spans of a run in steps."""

from __future__ import annotations

from typing import Any

import pytest

from spkfast.errors import InputError
from spkfast.training.spans import Length, told

LENGTH = Length(steps=1000, steps_per_epoch=30)


@pytest.mark.parametrize(
    ("value", "steps"),
    [
        (0, 0), (7, 7), (20.0, 20), (5000, 5000),
        ("6 epochs", 180), ("1 epoch", 30), ("0.5 epochs", 15), ("2epochs", 60), (".1 epochs", 3), ("0 epochs", 0),
        ("30 %", 300), ("30%", 300), (" 2.5 % ", 25), ("100 %", 1000), ("0.06 %", 1),
        # To the nearest step, halves to the even one.
        ("0.05 %", 0), ("0.15 %", 2), ("0.25 %", 2), ("0.05 epochs", 2), ("0.04 epochs", 1),
    ],
)  # fmt: skip
def test_span_is_whole_steps(value: Any, steps: int) -> None:
    found = LENGTH.span(value, "schedule.warmup")
    assert found == steps and type(found) is int


def test_share_of_a_long_run_is_exact() -> None:
    steps = 10**17 + 100
    assert Length(steps, 1).span("29 %", "x") == 29 * (10**15 + 1)
    assert Length(steps, 1).span("0.1 %", "x") == round(10**14 + 0.1)


@pytest.mark.parametrize(
    "value",
    [-1, -0.5, 2.5, float("nan"), float("inf"), True, False, None, [3], "", "20", "epochs", "6 epoch s", "six epochs",
     "-6 epochs", "nan %", "inf epochs", "1e3 epochs", "1_0 %", "30 % of it", "5 steps", "1. %", "٣ %"],
)  # fmt: skip
def test_bad_span_names_the_setting(value: Any) -> None:
    with pytest.raises(InputError, match=r"^validation\.every must be a number of steps, 'N epochs' or 'N %'") as error:
        LENGTH.span(value, "validation.every")
    assert str(error.value).endswith(f"got {value!r}")


def test_length_of_a_run() -> None:
    assert Length.of_run(500, 30) == Length(500, 30)
    assert Length.of_run("40 epochs", 30) == Length(1200, 30)
    assert Length.of_run("0.1 epochs", 30) == Length(3, 30)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("50 %", "steps must be a number of steps or 'N epochs', got '50 %', a share of itself"),
        (0, "steps must be at least 1, got 0"),
        ("0.01 epochs", r"steps must be at least 1, got '0.01 epochs' \(0 steps\)"),
        (-3, "steps must be a number of steps or 'N epochs', and at least 0, got -3"),
        (True, "steps must be a number of steps"),
        ("long", "steps must be a number of steps or 'N epochs', and at least 0, got 'long'"),
    ],
)
def test_length_of_a_run_refuses(steps: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        Length.of_run(steps, 30)


def test_span_is_told_as_it_was_given() -> None:
    assert told("6 epochs", 180) == "'6 epochs' (180 steps)" and told(180, 180) == "180"
