"""The CUDA sources compile, without spills, and the glue links against the stable ABI alone: no GPU needed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import checkout
from tests.conftest import require

TARGETS = ("80", "90", "100")
# The most registers that a thread may take for as many blocks to run at once as the kernel is laid out for, by a part
# of the mangled name; the shared memory that goes with them is in the op's test under the SIMT shim.
_TYPES = ("f", "6__half", "13__nv_bfloat16")
REGISTERS = {
    "attentive_stats_pool": {
        f"attentive_stats_pool_{kernel}_kernelI{dtype}{rest}E": 65536 // (blocks * 256)
        for dtype in _TYPES
        for kernel, rest, blocks in (
            ("rows", "Li4E", 4),
            ("rows", "Li7E", 2),
            ("rows", "Li10E", 2),
            ("columns", "", 3),
            ("backward_rows", "", 4),
            ("backward_columns", "", 2),
            ("backward_sum", "", 8),
        )
    },
    "attentive_stats_pool_from_hidden": {
        f"from_hidden_kernelI{dtype}Lb{last}E": 65536 // (4 * 128) for dtype in _TYPES for last in (0, 1)
    },
    "log_mel_fbank": {
        "UnrolledILi16ELi16ELi400ELi256E": 65536 // (2 * 256),
        "UnrolledILi10ELi20ELi400ELi192E": 65536 // (2 * 192),
        "UnrolledILi8ELi16ELi200ELi256E": 65536 // (2 * 256),
        "7General": 65536 // (4 * 128),
        "log_mel_fbank_norm_kernel": 65536 // (2 * 512),
        "log_mel_fbank_waveform_kernel": 65536 // 1024,
    },
    "se_res2net_block": {
        **{f"se_res2net_block_chain_kernelI{dtype}E": 65536 // (2 * 256) for dtype in _TYPES},
        **{f"se_res2net_block_sum_kernelI{dtype}E": 65536 // (4 * 256) for dtype in _TYPES},
        "se_res2net_block_means_kernel": 65536 // (8 * 256),
        "se_res2net_block_gates_kernel": 65536 // 1024,
    },
    "tdnn_layer": {f"tdnn_layer_kernelI{dtype}E": 65536 // (6 * 128) for dtype in _TYPES},
}
_KERNEL = re.compile(
    r"Compiling entry function '(\S+)' for '(\S+)'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)


def nvcc() -> str:
    compiler = checkout.find_nvcc()
    require("nvcc", compiler is not None, "no nvcc on PATH or in CUDA_HOME")
    return str(compiler)


def undefined_symbols(library: Path) -> list[str]:
    output = subprocess.run(["nm", "-DuC", str(library)], capture_output=True, text=True, check=True).stdout
    return [line.split(maxsplit=1)[1] for line in output.splitlines()]


@pytest.mark.parametrize("path", sorted((checkout.ROOT / "kernels/cuda").glob("*.cu")), ids=lambda path: path.stem)
def test_compiles_without_spills(path: Path, tmp_path: Path) -> None:
    command = [
        nvcc(),
        "-std=c++17",
        "-O3",
        "-Xptxas",
        "-v",
        f"-I{checkout.ROOT / 'kernels/cuda'}",
        "-Werror=all-warnings",
    ]
    command += [f"-gencode=arch=compute_{target},code=sm_{target}" for target in TARGETS]
    command += ["-gencode=arch=compute_90,code=compute_90", "-c", str(path), "-o", str(tmp_path / "kernel.o")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = _KERNEL.findall(result.stdout + result.stderr)
    names = re.findall(r"__global__ void\s+(?:__launch_bounds__\([^()]*\)\s*)?(\w+)\(", path.read_text())
    budget = REGISTERS[path.stem]
    for target in TARGETS:
        compiled = [kernel for kernel, built_for, *_ in found if built_for == f"sm_{target}"]
        assert all(any(name in kernel for kernel in compiled) for name in names)
        assert [sum(part in kernel for kernel in compiled) for part in budget] == [1] * len(compiled)
    for kernel, target, stack, stores, loads, registers in found:
        assert (stack, stores, loads) == ("0", "0", "0"), f"{kernel} for {target} uses the stack or spills"
        assert 0 < int(registers) <= next(most for part, most in budget.items() if part in kernel)


@pytest.mark.parametrize("path", sorted((checkout.ROOT / "kernels/cuda").rglob("*.cu*")), ids=lambda path: path.name)
def test_device_code_knows_no_torch(path: Path) -> None:
    assert not re.search(r'#include\s*[<"](torch|ATen|c10)/', path.read_text())


def test_cuda_library_needs_the_stable_abi_alone(tmp_path: Path) -> None:
    nvcc()
    require("nvcc", shutil.which("nm") is not None, "no nm on PATH")
    library = checkout.build("_ops_cuda", tmp_path, ["80"])
    symbols = undefined_symbols(library)
    assert "aoti_torch_get_current_cuda_stream" in symbols
    assert not [symbol for symbol in symbols if re.match(r"(vtable for )?(c10|at|torch|caffe2)::", symbol)]
    dynamic = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    assert "[libtorch_cuda.so]" in dynamic
    assert list(tmp_path.iterdir()) == [library]
    # Of the symbols that are ours, none may be left undefined: each op links to its launcher.
    assert not [symbol for symbol in symbols if symbol.startswith("spkfast::")]
