"""Which implementations of each op exist here, which one runs, and in words why any is missing."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import pkgutil
import platform
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from spkfast.errors import InputError

if TYPE_CHECKING:
    import torch

# torch is imported by the functions: the command line reads this package before it knows whether it needs torch.

Backend = Literal["auto", "reference", "native", "triton"]

_BACKENDS = ("reference", "native", "triton")
_ORDER = {"cpu": ("native", "reference"), "cuda": ("native", "triton", "reference")}  # what "auto" tries
# Their products run on tensor cores in Triton, and in C++ do not.
_OWN_ORDER = {
    (op, "cuda"): ("triton", "native", "reference")
    for op in ("attentive_stats_pool_from_hidden", "se_res2net_block", "tdnn_layer")
}
_TRANSFORMED = dict.fromkeys(
    ("native", "triton"), "under torch.func and in forward-mode differentiation only the reference has derivatives"
)
_PACKAGE = Path(__file__).parent
_REBUILD = 'build it with: pip install --no-build-isolation -e "."'

# Threads that ask for it, each as often as it does: a plain global, which torch.compile can follow.
_only_reference: tuple[int, ...] = ()
_ONLY_REFERENCE_LOCK = threading.Lock()

# device type -> op -> backend -> reason why it is missing, empty where it exists; filled once by load().
_MISSING: dict[str, dict[str, dict[str, str]]] = {}


def load() -> None:
    """Loads the op libraries and notes what exists; called by ``spkfast.ops`` before it registers anything."""
    if _MISSING:
        return
    libraries = {"cpu": _load_library("_ops_cpu"), "cuda": _load_library("_ops_cuda")}
    for device in _ORDER:
        _MISSING[device] = {op: _missing(op, device, libraries[device]) for op in _op_names()}


def resolve(device: torch.device, backend: str, op: str, limits: Mapping[str, str] | None = None) -> str:
    """Name of the implementation that runs: ``reference``, ``native`` or ``triton``.

    The choice depends on device and settings alone, never on the values of a tensor. Under transforms of ``torch.func``
    and in forward-mode differentiation it is the reference: torch takes a forward derivative that an op lacks for zero.

    Args:
        device: Where the tensors are.
        backend: One of these names, which must exist here, or ``auto`` for the fastest one that does.
        op: Name of the op.
        limits: Reason, by backend, why that backend cannot take this call.

    Raises:
        InputError: If the backend is unknown, or is asked for by name and cannot run; the message says why.
    """
    missing = {**_MISSING.get(device.type, {}).get(op, _other_device(device.type)), **(limits or {})}
    if is_transformed():
        missing |= _TRANSFORMED
    if backend == "auto":
        if _only_reference and threading.get_ident() in _only_reference:
            return "reference"
        for name in _OWN_ORDER.get((op, device.type), _ORDER.get(device.type, ())):
            if not missing.get(name):
                return name
        return "reference"
    if backend not in _BACKENDS:
        raise InputError(f"backend must be one of auto, {', '.join(_BACKENDS)}, got {backend!r}")
    if missing.get(backend):
        raise InputError(f"backend={backend!r} cannot run {op} on {device.type}: {missing[backend]}")
    return backend


@contextlib.contextmanager
def only_reference() -> Iterator[None]:
    """While it lasts ``auto`` takes the reference in this thread, as graphs for runtimes without our ops need it."""
    global _only_reference
    with _ONLY_REFERENCE_LOCK:
        _only_reference = (*_only_reference, threading.get_ident())
    try:
        yield
    finally:
        with _ONLY_REFERENCE_LOCK:
            others = list(_only_reference)
            others.remove(threading.get_ident())
            _only_reference = tuple(others)


def is_transformed() -> bool:
    """Whether forward-mode differentiation or transforms of ``torch.func`` see what is computed now.

    torch.compile cannot follow the question about the others; these do not take a kernel for a constant, but raise.
    """
    import torch

    if torch.autograd.forward_ad._current_level >= 0:
        return True
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def info() -> dict[str, Any]:
    """What runs here, and why anything is missing.

    Returns:
        A dictionary of plain values. ``versions`` holds versions by package, None where absent; ``extras`` the same for
        the packages of each extra, which some commands need; ``cpu`` the instruction ``level`` and the number of
        ``threads``; ``gpus`` the names of the GPUs; ``build`` facts about the compiled libraries. ``ops`` holds for
        each op, by device type, the ``available`` backends, the one ``chosen`` by ``auto``, and for each of the
        ``missing`` ones the reason.
    """
    import torch

    load()
    gpus = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    ops = {}
    for op in _op_names():
        missing = {device: dict(_MISSING[device][op]) for device in _ORDER}
        if not gpus:
            missing["cuda"]["reference"] = _no_gpu()
        available = {device: [name for name in _BACKENDS if not missing[device].get(name)] for device in _ORDER}
        ops[op] = {
            "available": available,
            "chosen": {
                device: resolve(torch.device(device), "auto", op) if available[device] else None for device in _ORDER
            },
            "missing": {device: {k: v for k, v in missing[device].items() if v} for device in _ORDER},
        }
    return {
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in ("spkfast", "torch", "numpy", "triton")},
        "extras": _extras(),
        "cpu": {"level": _cpu_level(), "threads": torch.get_num_threads()},
        "gpus": gpus,
        "build": _build_info(),
        "ops": ops,
    }


def _extras() -> dict[str, dict[str, str | None]]:
    """Versions of optional packages by extra, as the installed package names them."""
    extras: dict[str, dict[str, str | None]] = {
        name: {} for name in ("audio", "train", "eval", "kaldi", "parquet", "index", "export")
    }
    try:
        requirements = importlib.metadata.requires("spkfast") or []
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        requirements = []
    for requirement in requirements:
        match = re.match(r"([\w.-]+).*extra == ['\"](\w+)['\"]", requirement)
        if match and match[2] in extras and match[1] != "spkfast":
            extras[match[2]][match[1]] = _version(match[1])
    return extras


def _op_names() -> list[str]:
    # An op is one file stem everywhere: its module in ops/ is its entry in the list.
    modules = pkgutil.iter_modules([str(_PACKAGE / "ops")])
    return sorted(module.name for module in modules if not module.name.startswith("_"))


def _load_library(name: str) -> str:
    """Loads one op library; returns the reason where that fails, else an empty string."""
    import torch

    path = _PACKAGE / f"{name}.so"
    if not path.exists():
        state = _build_info().get("cuda", "") if name == "_ops_cuda" else ""
        return f"the library {path.name} was not built ({state or _REBUILD})"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        # torch's own text says only that it could not load the library; the symbol is in the cause.
        return f"the library {path.name} does not load: {error.__cause__ or error}"
    return ""


def _missing(op: str, device: str, library: str) -> dict[str, str]:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return {"native": library or _no_gpu(), "triton": _no_gpu()}
    native = library
    if not native:
        qualified = f"spkfast::{op}"
        known = bool(torch._C._dispatch_has_kernel(qualified))
        if not (known and torch._C._dispatch_has_kernel_for_dispatch_key(qualified, device.upper())):
            native = f"there is no C++ kernel of {op} for {device} yet"
    return {"native": native, "triton": _missing_triton(op, device)}


def _missing_triton(op: str, device: str) -> str:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    try:
        found = importlib.util.find_spec(f"spkfast.kernels.triton.{op}")
    except ModuleNotFoundError as error:
        return f"the kernels cannot be imported: {error}"
    if found is None:
        return f"there is no Triton kernel of {op} yet"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton kernels run on CUDA; on a CPU only interpreted, for tests, with TRITON_INTERPRET=1"
    return ""


def _other_device(device: str) -> dict[str, str]:
    reason = f"only the reference runs on {device}"
    return {"native": reason, "triton": reason}


def _no_gpu() -> str:
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    return "torch finds no CUDA device on this machine"


def _version(package: str) -> str | None:
    if package == "spkfast":
        # As imported: a checkout that is not installed has a version too.
        return str(sys.modules["spkfast"].__version__)
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def compiled_module() -> Any:
    """The pybind11 module, which holds what is not a tensor op.

    Raises:
        InputError: If it was not built.
    """
    try:
        return importlib.import_module("spkfast._C")
    except ImportError as error:
        raise InputError(f"the module spkfast._C cannot be imported: {error}; {_REBUILD}") from error


def _build_info() -> dict[str, str]:
    try:
        return dict(importlib.import_module("spkfast._C").build_info())
    except ImportError as error:
        return {"missing": f"the module spkfast._C cannot be imported: {error}; {_REBUILD}"}


def _cpu_level() -> str:
    try:
        return str(importlib.import_module("spkfast._C").cpu_level())
    except ImportError:
        return "unknown: the module spkfast._C is not built"
    except ValueError as error:
        raise InputError(str(error)) from None
