"""Contenders in processes of their own are timed there, end with their worker, and say why they are absent."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest

from benchmarks.peers.worker import Contender, Worker


def sleeper(seconds: float) -> Contender:
    """Sleeps; the output holds how often it ran when it was made, its process and its threads."""
    print("what a library prints")
    state = np.array([0, os.getpid(), int(os.environ["OMP_NUM_THREADS"])], dtype=np.float32)
    return Contender(lambda: time.sleep(seconds), state, f"sleeps {seconds}")


def broken() -> Contender:
    raise ValueError("no such thing\nat all")


def dies() -> Contender:
    return Contender(lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_contender_is_timed_in_a_process_of_its_own():
    with Worker(f"{__name__}:sleeper", {"seconds": 0.02}, threads=3) as worker:
        assert (worker.absent, worker.note) == ("", "sleeps 0.02")
        assert worker.output[1] not in (0, os.getpid())
        assert worker.output[2] == 3
        started = time.perf_counter()
        seconds = worker.seconds(calls=2)
        # One call that does not count comes before the two.
        assert time.perf_counter() - started >= 0.06
        assert 0.02 <= seconds < time.perf_counter() - started
        process = worker._process
    assert process.returncode == 0


def test_reason_of_absence():
    with Worker(f"{__name__}:broken", {}, threads=1) as worker:
        assert worker.absent == "ValueError: no such thing"
    with Worker("benchmarks.peers.no_such_module:build", {}, threads=1) as worker:
        assert worker.absent == "ModuleNotFoundError: No module named 'benchmarks.peers.no_such_module'"


def test_worker_that_dies_is_an_error():
    with Worker(f"{__name__}:dies", {}, threads=1) as worker, pytest.raises(RuntimeError, match="status -9"):
        worker.seconds()
