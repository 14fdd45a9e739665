"""Builds device code for the host with the SIMT shim, and calls it through ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ORDERS = ("ascending", "descending")


class SimtError(RuntimeError):
    """A kernel misused the machine; the message names the line."""


class HostLibrary:
    """A host build of device code.

    Args:
        library: The loaded shared library; its functions take plain C arguments and return a ``cudaError_t``.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.library.simt_message.restype = ctypes.c_char_p

    def call(self, function: str, *args: Any, order: str = "ascending") -> None:
        """Runs ``function`` with the threads of each block in this order.

        Raises:
            SimtError: If it returns an error; ``args[0]`` of the exception is the shim's message, or the code.
        """
        self.library.simt_set_descending(ORDERS.index(order))
        code = getattr(self.library, function)(*args)
        if code:
            raise SimtError(self.library.simt_message().decode() or f"cudaError_t {code}")


def build(source: str, folder: Path, *flags: str) -> HostLibrary:
    """Compiles C++ text that includes device code (``#include "log_mel_fbank.cu"``) and loads it.

    Args:
        source: The text; entry points are ``extern "C"``.
        folder: Where the library is written; give a temporary one.
        *flags: Further compiler flags.

    Raises:
        RuntimeError: If it does not compile; the message is the compiler's.
    """
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise RuntimeError("no C++ compiler on PATH")
    stem = folder / f"simt_{hashlib.sha256(source.encode()).hexdigest()[:12]}"
    stem.with_suffix(".cpp").write_text(source)
    # -ffp-contract: each rounding as written, whatever the host can fuse.
    command = [compiler, "-std=c++17", "-O2", "-g", "-shared", "-fPIC", "-ffp-contract=off", "-DSPKFAST_SIMT"]
    command += ["-Wall", "-Wextra", "-Werror"]
    command += [f"-I{ROOT / 'tests/simt'}", f"-I{ROOT / 'kernels/cuda'}", *flags]
    command += ["-x", "c++", str(stem.with_suffix(".cpp")), "-o", str(stem.with_suffix(".so"))]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
    return HostLibrary(ctypes.CDLL(str(stem.with_suffix(".so"))))
