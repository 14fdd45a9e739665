"""What random cases of every op run under."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def surroundings(level: str) -> Iterator[None]:
    """This instruction set, one thread, and memory that starts as NaN, so that unwritten output shows."""
    before, threads = os.environ.get("SPKFAST_CPU_LEVEL"), torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    os.environ["SPKFAST_CPU_LEVEL"] = level
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.set_num_threads(threads)
        del os.environ["SPKFAST_CPU_LEVEL"]
        if before is not None:
            os.environ["SPKFAST_CPU_LEVEL"] = before
