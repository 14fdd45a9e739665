"""How much memory a call needs."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes(call: Callable[[], object]) -> int | None:
    """The most that the resident memory of the process grows by while ``call`` runs, its results included.

    Whoever allocates counts, torch or not. To be asked before ``keep_freed_memory``, after which the heap has holes
    that a call may or may not fit into. None where the kernel does not tell.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
    try:
        _CLEAR.write_text("5")  # the peak starts again from what is resident now
        before = _resident("VmRSS")
        result = call()
        peak = _resident("VmHWM")
    except OSError:
        return None
    del result
    return peak - before


def _resident(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise OSError(f"no {field} in {_STATUS}")
