"""Every Triton kernel compiles ahead of time for each GPU generation, without spilling registers."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import require

ROOT = Path(__file__).resolve().parents[2]
TARGETS = (80, 90, 100)

# By op: types of its kernels' arguments (integers where not named), and by kernel the name of its tile.
_OPS: dict[str, dict[str, Any]] = {
    "log_mel_fbank": {
        "types": {
            **dict.fromkeys(("waveforms", "window", "cosine", "sine", "power", "mel", "features"), "*fp32"),
            **dict.fromkeys(("lengths", "frame_lengths"), "*i64"),
            **dict.fromkeys(("sample_scale", "preemphasis", "log_floor"), "fp32"),
        },
        "kernels": {"_power_kernel": "_POWER_TILE", "_mel_kernel": "_MEL_TILE", "_mean_kernel": "_MEAN_TILE"},
        "constants": {"REMOVE_DC": True},
    }
}

# Runs apart from pytest: kernels that were interpreted in a process cannot be compiled in it.
_COMPILE = r"""
import importlib.util, json, re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
path, op, targets = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
spec = importlib.util.spec_from_file_location("kernels", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
out = {"kernels": sorted(name for name in vars(module) if name.endswith("_kernel")), "usage": []}
for name, tile in op["kernels"].items():
    kernel = getattr(module, name)
    constants = {k: v for k, v in (op["constants"] | getattr(module, tile)).items() if k in kernel.arg_names}
    signature = {k: "constexpr" if k in constants else op["types"].get(k, "i32") for k in kernel.arg_names}
    values = {(kernel.arg_names.index(k),): v for k, v in constants.items()}
    for target in targets:
        source = ASTSource(fn=kernel, signature=signature, constexprs=values)
        compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=module._OPTIONS)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            dump = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True)
        usage = {k.lower(): int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", dump.stdout + dump.stderr)}
        out["usage"].append({"kernel": name, "target": target, "shared": compiled.metadata.shared, **usage})
print(json.dumps(out))
"""


@pytest.mark.parametrize("path", sorted((ROOT / "kernels/triton").glob("[!_]*.py")), ids=lambda path: path.stem)
def test_compiles_without_spills(path: Path) -> None:
    require("triton", importlib.util.find_spec("triton") is not None, "the package triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", _COMPILE, str(path), json.dumps(_OPS[path.stem]), json.dumps(TARGETS)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["kernels"] == sorted(_OPS[path.stem]["kernels"]), "a kernel is missing from the list above"
    assert len(found["usage"]) == len(TARGETS) * len(found["kernels"])
    for usage in found["usage"]:
        assert usage["reg"] > 0
        assert usage["stack"] == usage["local"] == 0, f"registers are spilled: {usage}"
        assert usage["shared"] <= 99 * 1024, f"more shared memory than every target has: {usage}"
