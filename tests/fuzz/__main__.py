"""Random cases of each op, its kernel against its definition: ``python -m tests.fuzz OP... --cases N --seed S``.

With ``--seconds`` an op gets that much processor time, of all its processes together, and may end before its cases do.
An op takes part with a file ``fuzz_<op>.py`` that holds ``draw``, from a random generator to a case whose text says all
of it, and ``check``, which raises AssertionError where the kernel is wrong and else counts what it compared.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import math
import multiprocessing
import multiprocessing.connection
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


def load(op: str) -> Any:
    """The module of an op."""
    return importlib.import_module(f"tests.fuzz.fuzz_{op}")


def run_case(op: str, seed: int, number: int) -> collections.Counter[str]:
    """Draws case ``number`` of ``op`` and checks it; returns what was compared.

    Raises:
        AssertionError: With the case and the command that repeats it.
    """
    module = load(op)
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


def _work(
    ops: Sequence[str], seed: int, numbers: Sequence[int], seconds: float, current: Any, pipe: Connection
) -> None:
    """Checks these cases of each op for this much processor time, and sends what came of each op."""
    for op in ops:
        load(op)  # loading torch, by the first one, takes seconds that are no case's
        counted: collections.Counter[str] = collections.Counter()
        checked = failures = 0
        started = time.process_time()
        for number in numbers:
            current.value = number
            checked += 1
            try:
                counted += run_case(op, seed, number)
            except AssertionError as error:
                print(error, flush=True)
                failures += 1
            if failures == _MOST_FAILURES or time.process_time() - started >= seconds:
                break
        pipe.send((checked, failures, time.process_time() - started, counted))


def run(ops: Sequence[str], seed: int, numbers: Sequence[int], jobs: int, seconds: float = math.inf) -> bool:
    """Checks these cases of each op, or as many as its seconds allow, in ``jobs`` processes that share them.

    Prints failures and, op by op, totals; False where any failed.
    """
    # Forked before torch is loaded: a sanitizer ends the process it finds something in, and the parent says where.
    context = multiprocessing.get_context("fork")
    workers: dict[Connection, tuple[int, int, Any, Any]] = {}  # job, its first op, its case, its process

    def begin(job: int, first: int) -> None:
        receive, send = context.Pipe(duplex=False)
        current = context.Value("q", -1, lock=False)
        process = context.Process(
            target=_work, args=(ops[first:], seed, numbers[job::jobs], seconds / jobs, current, send)
        )
        process.start()
        send.close()  # the worker's end alone is left, so that its death is the end of the pipe
        workers[receive] = job, first, current, process

    for job in range(jobs):
        begin(job, 0)
    found: list[list[tuple[int, int, float, collections.Counter[str]]]] = [[] for _ in ops]
    failed = False
    while workers:
        for receive in multiprocessing.connection.wait(list(workers)):
            assert isinstance(receive, Connection)
            job, op, current, process = workers.pop(receive)
            try:
                came = receive.recv()
                found[op].append(came)
                workers[receive] = job, op + 1, current, process
            except EOFError:
                process.join()
                if op == len(ops):
                    if process.exitcode:
                        print(f"a process ended with exit code {process.exitcode} after its last case")
                        failed = True
                    continue
                print(
                    f"{ops[op]}: the process ended with exit code {process.exitcode} in case {current.value}\n"
                    f"  repeat: python -m tests.fuzz {ops[op]} --seed {seed} --case {current.value}"
                )
                found[op].append((0, 1, 0.0, collections.Counter()))
                if op + 1 < len(ops):
                    begin(job, op + 1)
            if len(found[op]) == jobs:
                checked, failures, spent = (sum(column) for column in list(zip(*found[op], strict=True))[:3])
                counted = sum((counts for *_, counts in found[op]), collections.Counter[str]())
                totals = ", ".join(f"{name} {count}" for name, count in sorted(counted.items()))
                print(
                    f"{ops[op]}: {checked} cases, seed {seed}, {spent:.0f} s, {failures} failed; {totals}", flush=True
                )
                failed |= failures > 0
    return not failed


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(OPS)}; all of them if none is named")
    parser.add_argument("--cases", type=int, default=1000, help="of each op")
    parser.add_argument("--seconds", type=float, default=math.inf, help="of processor time for each op, at most")
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
    sys.exit(not run(ops, options.seed, numbers, min(options.jobs, len(numbers)), options.seconds))


if __name__ == "__main__":
    main()
