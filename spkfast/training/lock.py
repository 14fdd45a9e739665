"""A lock on the folder of a run: two that wrote into one would spoil both."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from spkfast.errors import InputError

_FILE = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
_held: set[int] = set()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a folder, which is made; the end of the process, however it comes, lets them in again.

    Does nothing on a file system without locks.

    Raises:
        InputError: If another run, of this process or another one, is in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder / _FILE, os.O_RDWR | os.O_CREAT, 0o666)
    _held.add(file)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(file, 200, 0).decode(errors="replace")
            raise InputError(
                f"{folder}: another run is writing there ({holder}); wait for its end or choose another --out"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        with contextlib.suppress(OSError):  # a disk that is full
            os.ftruncate(file, 0)
            os.pwrite(file, f"process {os.getpid()} of {socket.gethostname()}".encode(), 0)
        yield
    finally:
        _held.remove(file)
        os.close(file)


def _let_go() -> None:
    """In a process that reads crops: it may outlive a training process that was killed, the lock must not."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go)
