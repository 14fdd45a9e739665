"""The CPU library, as built without CMake, loads into torch and needs the stable ABI alone."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import checkout
from tests.build.test_cuda_compile import undefined_symbols

_LOAD = """
import sys, torch
torch.ops.load_library(sys.argv[1])
for name in sys.argv[2:]:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("spkfast::" + name, "CPU"), name
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        # Nothing here runs the kernels. What an optimiser drops is left in, so that no symbol is missed.
        patch.setattr(checkout, "_CXX_FLAGS", [*checkout._CXX_FLAGS, "-O0"])
        return checkout.build("_ops_cpu", tmp_path_factory.mktemp("ops"))


def test_no_symbol_of_torch_beyond_the_stable_abi(library: Path) -> None:
    symbols = undefined_symbols(library)
    assert "aoti_torch_get_dtype" in symbols
    assert not [symbol for symbol in symbols if re.match(r"(vtable for )?(c10|at|torch|caffe2)::", symbol)]


def test_loads_and_registers_every_op(library: Path) -> None:
    ops = sorted(path.stem for path in (checkout.ROOT / "spkfast/ops").glob("[!_]*.py"))
    command = [sys.executable, "-c", _LOAD, str(library), *ops]
    result = subprocess.run(command, capture_output=True, text=True, cwd=library.parent)
    assert result.returncode == 0, result.stderr
