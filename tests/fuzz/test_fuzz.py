"""A few random cases of each op every day, without a sanitizer; ``make sanitize`` runs many with one."""

from __future__ import annotations

import collections
import importlib
import os
import re
import time
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
        if op == "some_op" and number == 3:
            os._exit(code)
        return collections.Counter(compared=1)

    monkeypatch.setattr(fuzz, "load", lambda op: None)
    monkeypatch.setattr(fuzz, "run_case", run_case)
    assert fuzz.run(["some_op"], 5, range(3), jobs=2)
    assert "some_op: 3 cases, seed 5" in capsys.readouterr().out
    for code in (7, 0):
        assert not fuzz.run(["some_op", "next_op"], 5, range(6), jobs=2)
        said = capsys.readouterr().out
        assert f"exit code {code} in case 3" in said and "python -m tests.fuzz some_op --seed 5 --case 3" in said
        assert "some_op: 3 cases, seed 5" in said and "1 failed; compared 3" in said
        # Another process takes over what is left.
        assert "next_op: 6 cases, seed 5" in said and "0 failed; compared 6" in said


def test_failures_of_any_op_count(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run_case(op: str, seed: int, number: int) -> collections.Counter[str]:
        assert op != "wrong_op", f"wrong in case {number}"
        return collections.Counter(compared=1)

    monkeypatch.setattr(fuzz, "load", lambda op: None)
    monkeypatch.setattr(fuzz, "run_case", run_case)
    assert not fuzz.run(["wrong_op", "some_op"], 5, range(100), jobs=2)
    said = capsys.readouterr().out
    assert "wrong_op: 10 cases, seed 5" in said and "10 failed" in said
    assert "some_op: 100 cases, seed 5" in said and "0 failed; compared 100" in said


def test_an_op_ends_with_its_seconds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run_case(op: str, seed: int, number: int) -> collections.Counter[str]:
        until = time.process_time() + 0.02
        while time.process_time() < until:
            pass
        return collections.Counter(compared=1)

    monkeypatch.setattr(fuzz, "load", lambda op: None)
    monkeypatch.setattr(fuzz, "run_case", run_case)
    assert fuzz.run(["some_op", "next_op"], 5, range(200), jobs=2, seconds=0.2)
    # Five cases in each process, or fewer where the clock is coarse.
    counts = re.findall(r"_op: (\d+) cases, seed 5, 0 s, 0 failed; compared (\d+)", capsys.readouterr().out)
    assert len(counts) == 2 and all(2 <= int(cases) == int(compared) <= 12 for cases, compared in counts)
