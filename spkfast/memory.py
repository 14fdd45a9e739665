"""What a process does with memory that it has freed."""

from __future__ import annotations

import contextlib
import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h of glibc


def keep_freed_memory() -> None:
    """Has glibc keep freed memory in this process, for good.

    As delivered it gives each large block back to the system, so that each step of a training on a CPU gets fresh
    pages, which the system fills with zeros one by one: that costs as much as a kernel that goes over them. Other C
    libraries are left as they are.
    """
    _set_option(_M_MMAP_MAX, 0)  # no blocks of their own
    _set_option(_M_TRIM_THRESHOLD, 2**31 - 1)


def _set_option(option: int, value: int) -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(option, value)
