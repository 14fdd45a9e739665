"""The peak of a call is what it needed at once, not what it kept."""

from __future__ import annotations

import pytest
import torch

from benchmarks import memory

MIB = 2**20


def _fill(mib):
    return torch.ones(mib * MIB // 4)


def _two_in_turn():
    for _ in range(2):
        _fill(64)


def _two_at_once():
    _fill(64) + 1


@pytest.mark.parametrize(("call", "mib"), [(lambda: _fill(64), 64), (_two_in_turn, 64), (_two_at_once, 128)])
def test_peak(call, mib):
    if memory.peak_bytes(lambda: None) is None:
        pytest.skip("this kernel does not tell the peak of a process")
    call()
    # Pages of the allocator and of code that runs for the first time come on top.
    assert memory.peak_bytes(call) == pytest.approx(mib * MIB, abs=4 * MIB)


def test_none_where_the_kernel_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "missing" / "clear_refs")
    assert memory.peak_bytes(lambda: None) is None
