"""The lock on a folder: who is refused, and that it ends with the process that has it, however that ends."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys

import pytest

from spkfast.errors import InputError
from spkfast.training.lock import locked


def test_one_at_a_time_in_a_folder(tmp_path):
    with locked(tmp_path / "a"), locked(tmp_path / "b"):
        with (
            pytest.raises(InputError, match=rf"a: another run is writing there \(process {os.getpid()} of .+\)"),
            locked(tmp_path / "a"),
        ):
            raise AssertionError
        with pytest.raises(InputError), locked(tmp_path / "a"):  # the one refused has not unlocked it
            raise AssertionError
    with locked(tmp_path / "a"):
        pass


def test_a_process_that_is_killed_has_it_no_more_though_its_readers_live(tmp_path):
    program = (
        "import os, pathlib, sys, time\n"
        "from spkfast.training.lock import locked\n"
        f"with locked(pathlib.Path({str(tmp_path)!r})):\n"
        "    reader = os.fork()\n"
        "    if not reader: print(os.getpid(), flush=True)\n"  # when what runs after a fork has run
        "    time.sleep(600)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    reader = int(run.stdout.readline())
    try:
        with pytest.raises(InputError, match=f"process {run.pid} of"), locked(tmp_path):
            raise AssertionError
        run.kill()
        run.wait()
        os.kill(reader, 0)  # is there
        with locked(tmp_path):
            pass
    finally:
        os.kill(reader, signal.SIGKILL)
        run.kill()
        run.communicate()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_without_locks_a_run_goes_on(tmp_path, monkeypatch, number):
    def refuse(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    entered = False
    with locked(tmp_path):
        entered = True
    assert entered


def test_another_error_of_the_disk_is_told(tmp_path, monkeypatch):
    def fail(file, how):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match="Input/output error"), locked(tmp_path):
        raise AssertionError
