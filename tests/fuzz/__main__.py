"""Random cases of each op, its kernel against its definition: ``python -m tests.fuzz OP... --cases N --seed S``.

An op takes part with a file ``fuzz_<op>.py`` that holds ``draw``, from a random generator to a case whose text says all
of it, and ``check``, which raises AssertionError where the kernel is wrong and else counts what it compared.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib
import multiprocessing
import sys
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent
OPS = sorted(path.stem.removeprefix("fuzz_") for path in FOLDER.glob("fuzz_*.py"))
_MOST_FAILURES = 5  # of each process, which then stops


def run_case(op: str, seed: int, number: int) -> collections.Counter[str]:
    """Draws case ``number`` of ``op`` and checks it; returns what was compared.

    Raises:
        AssertionError: With the case and the command that repeats it.
    """
    module = importlib.import_module(f"tests.fuzz.fuzz_{op}")
    case = module.draw(np.random.default_rng([seed, number]))
    try:
        counted: collections.Counter[str] = module.check(case)
    except Exception as error:
        where = "" if isinstance(error, AssertionError) else traceback.format_exc()
        raise AssertionError(
            f"{op}: {type(error).__name__}: {error}\n{where}  {case}\n"
            f"  repeat: python -m tests.fuzz {op} --seed {seed} --case {number}"
        ) from error
    return counted


def _work(op: str, seed: int, numbers: Sequence[int], current: Any, pipe: Connection) -> None:
    counted: collections.Counter[str] = collections.Counter()
    failures = 0
    for number in numbers:
        current.value = number
        try:
            counted += run_case(op, seed, number)
        except AssertionError as error:
            print(error, flush=True)
            failures += 1
            if failures == _MOST_FAILURES:
                break
    pipe.send((failures, counted))


def run(op: str, seed: int, numbers: Sequence[int], jobs: int) -> bool:
    """Runs these cases in ``jobs`` processes, prints failures and totals; False where any failed."""
    # Forked before torch is loaded: a sanitizer ends the process it finds something in, and the parent says where.
    context = multiprocessing.get_context("fork")
    started, processes = time.monotonic(), []
    for job in range(jobs):
        receive, send = context.Pipe(duplex=False)
        current = context.Value("q", -1, lock=False)
        process = context.Process(target=_work, args=(op, seed, numbers[job::jobs], current, send))
        process.start()
        send.close()  # the worker's end alone is left, so that its death ends the wait below
        processes.append((process, current, receive))
    failures, counted = 0, collections.Counter[str]()
    for process, current, receive in processes:
        with contextlib.suppress(EOFError):
            failed, counts = receive.recv()
            failures += failed
            counted += counts
        process.join()
        if process.exitcode:
            failures += 1
            print(
                f"{op}: the process ended with exit code {process.exitcode} in case {current.value}\n"
                f"  repeat: python -m tests.fuzz {op} --seed {seed} --case {current.value}"
            )
    seconds = time.monotonic() - started
    totals = ", ".join(f"{name} {count}" for name, count in sorted(counted.items()))
    print(f"{op}: {len(numbers)} cases, seed {seed}, {seconds:.0f} s, {failures} failed; {totals}", flush=True)
    return failures == 0


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(OPS)}; all of them if none is named")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="run this one alone")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--sanitized", action="store_true", help="refuse libraries without AddressSanitizer")
    options = parser.parse_args()
    ops = [op for op in options.ops if op != "all"] or OPS
    for op in ops:
        if op not in OPS:
            parser.error(f"there is no {FOLDER.name}/fuzz_{op}.py; known: {', '.join(OPS)}")
    if options.sanitized:
        module = importlib.import_module("spkfast._C")
        if "-fsanitize=address" not in module.build_info()["flags"]:
            parser.error(f"{module.__file__} was built without AddressSanitizer")
    numbers = range(options.cases) if options.case is None else [options.case]
    good = [run(op, options.seed, numbers, min(options.jobs, len(numbers))) for op in ops]
    sys.exit(not all(good))


if __name__ == "__main__":
    main()
