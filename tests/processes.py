"""Several processes of one group, on Gloo."""

from __future__ import annotations

import datetime
import socket
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import distributed, multiprocessing

Work = Callable[[int, Path], None]


def run(work: Work, ranks: int, folder: Path) -> None:
    """Calls ``work(rank, folder)`` in each of so many processes."""
    context = multiprocessing.spawn(_begin, (_free_port(), ranks, work, str(folder)), nprocs=ranks, join=False)
    deadline = time.monotonic() + 90
    try:
        while not context.join(timeout=5):
            assert time.monotonic() < deadline, "the processes wait for each other"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()


def _begin(rank: int, port: int, ranks: int, work: Work, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=30),
    )
    try:
        work(rank, Path(folder))
    finally:
        distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
