"""Makes a bare checkout usable without an install: maps ``spkfast.kernels`` and builds the op libraries without CMake.

Importing this module (``pytest -p benchmarks.checkout`` does) maps ``spkfast.kernels`` to ``kernels/``.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The same rules as CMakeLists.txt, which globs these folders too: an op is in the build because its file is there.
SOURCES = {
    "_ops_cpu": ("csrc/library.cpp", "csrc/cpu/*.cpp"),
    "_ops_cuda": ("csrc/cuda/*.cpp", "kernels/cuda/*.cu"),
}
_HEADERS = ("csrc/**/*.h", "kernels/cuda/**/*.cuh")
_CXX_FLAGS = ["-std=c++20", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
_CXX_FLAGS += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]
_NVCC_FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-Xcompiler", "-fPIC,-fvisibility=hidden"]


class BuildError(RuntimeError):
    """A library could not be built; the message is the tool's."""


class _KernelsFinder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name != "spkfast.kernels":
            return None
        folder = ROOT / "kernels"
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


def map_kernels() -> None:
    """Lets ``spkfast.kernels`` be imported from ``kernels/`` where no install has mapped it."""
    if not any(isinstance(finder, _KernelsFinder) for finder in sys.meta_path):
        sys.meta_path.append(_KernelsFinder())  # At the end, so that an install goes first.


def sources(library: str) -> list[Path]:
    """Source files of ``_ops_cpu`` or ``_ops_cuda``."""
    return [path for pattern in SOURCES[library] for path in sorted(ROOT.glob(pattern))]


def find_nvcc() -> str | None:
    """The CUDA compiler, or None."""
    for folder in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), None, "/usr/local/cuda"):
        found = shutil.which("nvcc", path=None if folder is None else str(Path(folder, "bin")))
        if found:
            return found
    return None


def ensure_built(library: str, gpu_targets: Sequence[str] = ()) -> bool:
    """Builds a library beside the package unless it is newer than all of its sources.

    Returns:
        Whether anything was built.
    """
    path = ROOT / "spkfast" / f"{library}.so"
    inputs = [*sources(library), *(header for pattern in _HEADERS for header in ROOT.glob(pattern))]
    if path.exists() and path.stat().st_mtime >= max(file.stat().st_mtime for file in inputs):
        return False
    build(library, path.parent, gpu_targets)
    return True


def build(library: str, folder: Path, gpu_targets: Sequence[str] = ()) -> Path:
    """Compiles and links one op library with g++ and nvcc alone.

    Args:
        library: ``_ops_cpu`` or ``_ops_cuda``.
        folder: Receives the library.
        gpu_targets: Compute capabilities as ``90``, for ``_ops_cuda``; machine code for each.

    Raises:
        BuildError: If a compiler is missing or fails.
    """
    compiler, nvcc = shutil.which("g++") or shutil.which("c++"), find_nvcc()
    if compiler is None:
        raise BuildError("no C++ compiler on PATH: install g++")
    if library == "_ops_cuda" and nvcc is None:
        raise BuildError("no nvcc on PATH or in CUDA_HOME: install the CUDA compiler")
    torch_dir = _torch_folder()
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{library}-") as work:
        compile_flags = [*_CXX_FLAGS, f"-ffile-prefix-map={ROOT}/=", "-isystem", str(torch_dir / "include")]
        if library == "_ops_cpu":
            link = [compiler, "-shared", "-Wl,--no-undefined", f"-L{torch_dir / 'lib'}", "-ltorch_cpu"]
        else:
            assert nvcc is not None
            compile_flags += ["-DUSE_CUDA", f"-I{ROOT / 'kernels/cuda'}", "-isystem", str(_toolkit(nvcc) / "include")]
            link = [nvcc, "-shared", f"-L{torch_dir / 'lib'}", "-ltorch_cpu", *_torch_cuda(compiler, torch_dir, work)]
        device_flags = [*_NVCC_FLAGS, f"-I{ROOT / 'kernels/cuda'}"]
        device_flags += [f"-gencode=arch=compute_{target},code=sm_{target}" for target in gpu_targets]

        def compile_one(path: Path) -> str:
            out = str(Path(work, f"{path.name}.o"))
            tool = [str(nvcc), *device_flags] if path.suffix == ".cu" else [compiler, *compile_flags]
            _run([*tool, "-c", str(path), "-o", out])
            return out

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, sources(library)))
        # Linked aside and moved into place: a process that has the old library loaded keeps its file.
        fresh = Path(work, f"{library}.so")
        _run([*link[:2], *objects, *link[2:], "-o", str(fresh)])
        return fresh.replace(folder / fresh.name)


def _torch_cuda(compiler: str, torch_dir: Path, work: str) -> list[str]:
    """Linker flags that name libtorch_cuda.so, by a stand-in of that name beside a torch without CUDA.

    torch loads its libraries with local visibility: only a named dependency makes its CUDA symbols visible.
    """
    flags = ["-Xlinker", "--no-as-needed", "-ltorch_cuda"]
    if (torch_dir / "lib/libtorch_cuda.so").exists():
        return flags
    stub = str(Path(work, "libtorch_cuda.so"))
    _run([compiler, "-shared", "-Wl,-soname,libtorch_cuda.so", "-x", "c++", os.devnull, "-o", stub])
    return [f"-L{work}", *flags]


def _torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError(f"{sys.executable} finds no torch to build against")
    return Path(spec.origin).parent


def _toolkit(nvcc: str) -> Path:
    # nvcc on PATH may be a script that calls the real one: ask it.
    output = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True).stderr
    for line in output.splitlines():
        if line.startswith("#$ TOP="):
            return Path(line.removeprefix("#$ TOP=")).resolve()
    raise BuildError(f"cannot tell the toolkit folder of {nvcc}")


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise BuildError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")


map_kernels()
