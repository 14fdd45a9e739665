"""A contender in a process of its own, timed on command: thread pools of several runtimes in one process spin against
one another."""

from __future__ import annotations

import dataclasses
import importlib
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from benchmarks import timing
from spkfast.memory import keep_freed_memory

_ROOT = Path(__file__).parents[2]
_END_SECONDS = 30


@dataclasses.dataclass(frozen=True)
class Contender:
    """What a worker times.

    Attributes:
        call: Without arguments.
        output: What it computes, or None where that is nothing to compare.
        note: What is worth saying of how it runs.
    """

    call: Callable[[], object]
    output: NDArray[np.float32] | None = None
    note: str = ""


class Worker:
    """A process that makes one contender and then times it whenever it is told to.

    It ends when the worker is closed, or with the process that started it.

    Args:
        builder: ``module:function`` of what makes the :class:`Contender`.
        options: Its keywords.
        threads: Threads of the OpenMP runtimes.
        keep_memory: Whether the process keeps freed memory; see :func:`spkfast.memory.keep_freed_memory`.

    Attributes:
        absent: Why there is no contender; empty where there is one.
        output: See :class:`Contender`.
        note: See :class:`Contender`.
    """

    def __init__(self, builder: str, options: Mapping[str, Any], *, threads: int, keep_memory: bool = True) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        # Runtimes run as they are delivered.
        environment.pop("OMP_WAIT_POLICY", None)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.peers.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd=_ROOT,
        )  # fmt: skip
        self.absent, self.output, self.note = self._ask((builder, dict(options), keep_memory))

    def seconds(self, calls: int = 1) -> float:
        """Mean over ``calls`` calls, after one that does not count: it wakes the threads and fills the caches."""
        return self._ask(calls)

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _ask(self, message: object) -> Any:
        assert self._process.stdin and self._process.stdout
        try:
            pickle.dump(message, self._process.stdin)
            self._process.stdin.flush()
            return pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError):
            self.close()
            raise RuntimeError(f"the worker ended by itself, with exit status {self._process.returncode}") from None


def _main() -> None:
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def answer(message: object) -> None:
        pickle.dump(message, answers)
        answers.flush()

    builder, options, keep_memory = pickle.load(sys.stdin.buffer)
    if keep_memory:
        keep_freed_memory()
    module, function = builder.split(":")
    try:
        contender = getattr(importlib.import_module(module), function)(**options)
    except Exception as error:
        answer((f"{type(error).__name__}: {error}".splitlines()[0], None, ""))
        return
    answer(("", contender.output, contender.note))
    while True:
        try:
            calls = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        contender.call()
        answer(timing.seconds_per_call(contender.call, calls))


if __name__ == "__main__":
    _main()
