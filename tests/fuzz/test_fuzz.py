"""A few random cases of each op every day, without a sanitizer; ``make sanitize`` runs many with one."""

from __future__ import annotations

import collections
import importlib
import os
from typing import Any

import pytest
from torch import Tensor

from tests.fuzz import __main__ as fuzz


@pytest.mark.parametrize("op", fuzz.OPS)
def test_random_cases(op: str) -> None:
    counted: collections.Counter[str] = collections.Counter()
    for number in range(300):
        counted += fuzz.run_case(op, 0, number)
    # Mostly something to compare, not out of the range of float32.
    assert counted["compared"] > 10 * counted["free"]


def test_a_kernel_that_is_slightly_wrong_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    implementations = importlib.import_module("spkfast.ops.log_mel_fbank")._IMPLEMENTATIONS
    right = implementations["native"]

    def wrong(*args: Any) -> tuple[Tensor, Tensor]:
        features, frame_lengths = right(*args)
        return features * 1.001, frame_lengths

    monkeypatch.setitem(implementations, "native", wrong)
    failures = 0
    for number in range(20):
        try:
            fuzz.run_case("log_mel_fbank", 0, number)
        except AssertionError as error:
            failures += 1
            assert f"--seed 0 --case {number}" in str(error)
    assert failures > 5


def test_a_process_that_dies_fails_in_its_case(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_case(op: str, seed: int, number: int) -> collections.Counter[str]:
        if number == 3:
            os._exit(7)
        return collections.Counter(compared=1)

    monkeypatch.setattr(fuzz, "run_case", run_case)
    assert fuzz.run("some_op", 5, range(3), jobs=2)
    assert not fuzz.run("some_op", 5, range(6), jobs=2)
    said = capsys.readouterr().out
    assert "exit code 7 in case 3" in said and "python -m tests.fuzz some_op --seed 5 --case 3" in said
    assert "3 cases, seed 5" in said and "1 failed; compared 3" in said
