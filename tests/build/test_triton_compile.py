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

_ALL = {
    **dict.fromkeys(("INSTANCE", "NORM", "NOISE", "REMOVE_DC", "MAGNITUDE", "LOG", "TOP_DB", "MEAN", "STD"), True),
    **{"PADDING": 1, "PREEMPHASIS": 1, "CLASSES": 2, "ENERGY": 2},
}
_USUAL = _ALL | {
    "PADDING": 0,
    "NORM": False,
    "NOISE": False,
    "MAGNITUDE": False,
    "ENERGY": 0,
    "TOP_DB": False,
    "STD": False,
}
_FEW = _USUAL | {"CLASSES": 1, "PREEMPHASIS": 0, "REMOVE_DC": False}

# Pooling: full logits, frames side by side and loads of 16 bytes, unless a form says otherwise.
_POOL: dict[str, Any] = {"RAGGED": True, "LOGITS": 2, "LAST": False, "UNIT": 4, "WEIGHT_UNIT": 4}
_HALF: dict[str, Any] = dict.fromkeys(("x", "logits", "hidden", "weight", "bias", "grad_x", "grad_logits"), "*bf16")
_HALF |= {"UNIT": 8, "WEIGHT_UNIT": 8}
_LAST: dict[str, Any] = {"LAST": True, "TILE": "_CHANNELS_TILE"}
_NARROW: dict[str, Any] = {"UNIT": 1, "TILE": "_NARROW_TILE"}
_POOL_TYPES = {
    **dict.fromkeys(("x", "logits", "hidden", "weight", "bias", "grad_x", "grad_logits"), "*fp32"),
    **dict.fromkeys(("mean", "var", "highest", "total", "grad_mean", "grad_var"), "*fp32"),
    "lengths": "*i64",
}

# Products: bfloat16, a layer of one tap, unless a form says otherwise.
_PRODUCT_HALF: dict[str, Any] = dict.fromkeys(
    ("x_0", "x_1", "x_2", "weight", "out", "hidden", "weights", "chained", "scratch"), "*bf16"
)
_PRODUCT_HALF |= dict.fromkeys(("y", "rest"), "*bf16")
_PRODUCT_TYPES: dict[str, Any] = {
    **_PRODUCT_HALF,
    **dict.fromkeys(("vectors", "offset", "sums", "squeeze", "squeeze_vectors", "excite", "excite_vectors"), "*fp32"),
    **dict.fromkeys(("squeezed", "gates"), "*fp32"),
    **dict.fromkeys(("lengths", "counted"), "*i64"),
}
_PRODUCT: dict[str, Any] = {
    **dict.fromkeys(("REFLECT", "TANH", "OFFSET", "RAGGED", "SUMS", "COUNTED", "FIRST"), False),
    **{"PARTS": 1, "POINT": True, "RELU": True, "AFFINE": True, "UNIT": 8, "WEIGHT_UNIT": 8},
}
_EVERYTHING: dict[str, Any] = dict.fromkeys(("REFLECT", "TANH", "OFFSET", "RAGGED", "COUNTED", "FIRST"), True)
_EVERYTHING |= {"PARTS": 3, "POINT": False}
_FP32: dict[str, Any] = dict.fromkeys(_PRODUCT_HALF, "*fp32") | dict.fromkeys(("UNIT", "WEIGHT_UNIT"), 4)
_FP32 |= dict.fromkeys(("_product_kernel", "_chain_kernel"), "FP32_TILE")
_MIXED: dict[str, Any] = dict.fromkeys(("x_0", "x_1", "x_2", "hidden", "chained"), "*fp32") | {"UNIT": 4}
_UNALIGNED: dict[str, Any] = dict.fromkeys(("UNIT", "WEIGHT_UNIT"), 1)
_UNALIGNED |= dict.fromkeys(("_product_kernel", "_chain_kernel"), "UNALIGNED_TILE")
# Of training: batch norm is apart from it.
_CONVOLUTION: dict[str, Any] = {"PARTS": 3, "POINT": False, "REFLECT": True, "AFFINE": False}

# Training: bfloat16 with loads of 16 bytes, all that there can be, unless a form says otherwise.
_TRAIN: dict[str, Any] = dict.fromkeys(("GRAD", "MEAN", "VAR", "PLAIN", "ADDED", "REFLECT"), True)
_TRAIN |= {"GRADS": 2, "UNIT": 8}
_TRAIN_VALUES = ("x", "y", "grad", "other", "out", "other_out")
_TRAIN_TYPES: dict[str, Any] = {
    **dict.fromkeys(_TRAIN_VALUES, "*bf16"),
    **dict.fromkeys(("mean", "grad_mean", "grad_var", "scale", "shift", "sums", "other_sums"), "*fp32"),
}
_TRAIN_FP32: dict[str, Any] = dict.fromkeys(_TRAIN_VALUES, "*fp32") | {"UNIT": 4}

# A margin softmax: products of bfloat16 with rows of up to three parts, unless a form says otherwise.
_MARGIN: dict[str, Any] = {"NORMALISE": True, "CENTERS": 1, "PLACES": 1, "TOPK": 0, "SLOTS": 1, "SUMMED": 0, "POWER": 1}
_MARGIN |= {"BIAS": False, "PARTS": 3}
_HARDEST: dict[str, Any] = {"CENTERS": 3, "PLACES": 4, "TOPK": 5, "SLOTS": 8}
_BINARY: dict[str, Any] = _HARDEST | {"SUMMED": 2, "POWER": 3, "BIAS": True}
_MARGIN_KERNELS = {
    "_sums_kernel": "SUMS_TILE", "_weight_gradient_kernel": "WEIGHT_TILE", "_batch_gradient_kernel": "BATCH_TILE",
}  # fmt: skip
_MARGIN_LONG: dict[str, Any] = {"PARTS": 0} | {kernel: f"_LONG_{tile}" for kernel, tile in _MARGIN_KERNELS.items()}
_MARGIN_FP32: dict[str, Any] = {"PARTS": 0, "x": "*fp32"}
_MARGIN_FP32 |= {kernel: f"_FP32_{tile}" for kernel, tile in _MARGIN_KERNELS.items()}

# By op: types of its kernels' arguments (integers where not named), those that are multiples of 16 at every launch, by
# kernel the name of its tile, and the settings to compile each kernel with: constants, types that differ, another TILE
# for all kernels, or for one under its name. "wgmma": kernels whose products run on the tensor cores of sm_90.
_OPS: dict[str, dict[str, Any]] = {
    "attentive_stats_pool": {
        "types": _POOL_TYPES,
        "aligned": [],
        "kernels": {"_moments_kernel": "_FRAMES_TILE", "_gradient_kernel": "_FRAMES_TILE"},
        "settings": [
            _POOL | form
            for form in (
                {},
                _LAST,
                _NARROW,
                _HALF,
                _HALF | _LAST,
                _HALF | _NARROW,
                {"LOGITS": 1},
                _HALF | _LAST | {"LOGITS": 1},
                {"LOGITS": 0},
                _LAST | {"LOGITS": 0, "RAGGED": False},
                _HALF | _LAST | {"LOGITS": 0, "RAGGED": False},
            )
        ],
    },
    "attentive_stats_pool_from_hidden": {
        "types": _POOL_TYPES,
        "aligned": [],
        "kernels": {"_moments_kernel": "_TILE"},
        "settings": [
            _POOL | form
            for form in ({}, {"LAST": True}, {"UNIT": 1}, _HALF, _HALF | {"LAST": True}, _HALF | {"UNIT": 1})
        ],
    },
    "tdnn_layer": {
        "types": _PRODUCT_TYPES,
        "aligned": [],
        "kernels": {"_product_kernel": "_TILE"},
        "wgmma": ["_product_kernel"],
        "settings": [
            _PRODUCT | form
            for form in (
                {},
                {"_product_kernel": "_SMALL_TILE"},
                {"RAGGED": True, "SUMS": True, "COUNTED": True},
                {"PARTS": 3, "RAGGED": True},
                _EVERYTHING | _MIXED | {"_product_kernel": "_MIXED_TILE"},
                _EVERYTHING | _MIXED | {"_product_kernel": "_SMALL_TILE"},
                _EVERYTHING,
                _EVERYTHING | _FP32,
                _FP32 | {"RAGGED": True, "SUMS": True, "COUNTED": True},
                _EVERYTHING | _UNALIGNED,
                _EVERYTHING | _FP32 | _UNALIGNED,
                *(_CONVOLUTION | form for form in ({}, _FP32, _MIXED | {"_product_kernel": "_MIXED_TILE"}, _UNALIGNED)),
                *(_CONVOLUTION | {"RELU": False, "PARTS": 1} | form for form in ({}, _FP32)),
            )
        ],
    },
    "se_res2net_block": {
        "types": _PRODUCT_TYPES,
        "aligned": [],
        "kernels": {
            "_chain_kernel": "_CHAIN_TILE",
            "_gates_kernel": "_GATES_TILE",
            "_residual_kernel": "_RESIDUAL_TILE",
        },
        "wgmma": ["_chain_kernel"],
        "settings": [
            _PRODUCT | form
            for form in (
                {},
                _EVERYTHING,
                _EVERYTHING | {"_chain_kernel": "_CHAIN_64_TILE"},
                _MIXED,
                _MIXED | {"_chain_kernel": "_CHAIN_64_TILE"},
                _EVERYTHING | _FP32,
                _EVERYTHING | _UNALIGNED,
                _EVERYTHING | _FP32 | _UNALIGNED,
            )
        ],
    },
    "tdnn_training": {
        "types": _TRAIN_TYPES,
        "aligned": [],
        "kernels": dict.fromkeys(
            ("_relu_gradient_kernel", "_affine_kernel", "_affine_gradient_kernel", "_taps_kernel"), "_TILE"
        ),
        "settings": [
            _TRAIN | form
            for form in (
                {},
                {"MEAN": False, "VAR": False, "PLAIN": False, "GRADS": 1, "REFLECT": False},
                {"GRAD": False, "ADDED": False, "GRADS": 0, "x": "*fp32", "UNIT": 4},
                {"UNIT": 1},
                _TRAIN_FP32,
                _TRAIN_FP32 | {"UNIT": 1},
            )
        ],
    },
    "log_mel_fbank": {
        "types": {
            **dict.fromkeys(("waveforms", "signal", "window", "cosine", "sine", "mel", "power", "cosines"), "*fp32"),
            **dict.fromkeys(("statistics", "values", "highest", "features"), "*fp32"),
            **dict.fromkeys(("lengths", "seeds", "masks", "frame_lengths"), "*i64"),
            **dict.fromkeys(("unit", "sample_scale", "scale", "dither", "preemphasis", "energy_floor"), "fp32"),
            **dict.fromkeys(("spectrum_low", "spectrum_high", "log_floor", "log_offset", "log_scale"), "fp32"),
            **dict.fromkeys(("top_db", "var_eps", "std_eps"), "fp32"),
        },
        "aligned": ["cosine", "sine", "power", "table_rows", "table_width", "power_width", "class_width"],
        "kernels": {
            "_statistics_kernel": "_STATISTICS_TILE",
            "_signal_kernel": "_SIGNAL_TILE",
            "_power_kernel": "_POWER_TILE",
            "_mel_kernel": "_MEL_TILE",
            "_cepstra_kernel": "_CEPSTRA_TILE",
            "_highest_kernel": "_HIGHEST_TILE",
            "_normalize_kernel": "_NORMALIZE_TILE",
        },
        "settings": [_ALL, _USUAL, _FEW],
    },
    "margin_softmax_loss": {
        "types": {
            **dict.fromkeys(("weight", "bias", "found", "values", "sums", "grad_sums", "grad_total"), "*fp32"),
            **dict.fromkeys(("grad_weight", "grad_bias", "grad_x"), "*fp32"),
            **dict.fromkeys(("scale", "margin", "narrow_cosine", "narrow_sine"), "fp32"),
            **{"x": "*bf16", "target": "*i64", "found_rows": "*i32", "left_out": "*i32"},
        },
        "aligned": [],
        "kernels": {kernel: f"_{tile}" for kernel, tile in _MARGIN_KERNELS.items()},
        "wgmma": list(_MARGIN_KERNELS),
        "settings": [
            _MARGIN | form
            for form in (
                {},
                _HARDEST,
                _MARGIN_LONG | _BINARY,
                _MARGIN_LONG | {"NORMALISE": False, "BIAS": True},
                _MARGIN_FP32 | _HARDEST,
                _MARGIN_FP32 | _BINARY,
            )
        ],
    },
}

# Runs apart from pytest: kernels that were interpreted in a process cannot be compiled in it.
_COMPILE = r"""
import importlib, json, re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
path, op, targets = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
sys.path.insert(0, str(Path(path).parents[2]))
module = importlib.import_module(f"kernels.triton.{Path(path).stem}")
out = {"kernels": sorted(name for name in vars(module) if name.endswith("_kernel")), "usage": []}
for name, tile in op["kernels"].items():
    kernel = getattr(module, name)
    known = ("TILE", name, *kernel.arg_names)
    settings = [{k: v for k, v in chosen.items() if k in known} for chosen in op["settings"]]
    aligned = {(kernel.arg_names.index(k),): [["tt.divisibility", 16]] for k in op["aligned"] if k in kernel.arg_names}
    for number, target in [(n, t) for n, chosen in enumerate(settings) if chosen not in settings[:n] for t in targets]:
        chosen = {"TILE": tile} | settings[number]
        block = getattr(module, chosen.get(name, chosen["TILE"]))
        options = module._OPTIONS | {k: v for k, v in block.items() if k not in kernel.arg_names}
        constants = {k: v for k, v in (chosen | block).items() if k in kernel.arg_names and not isinstance(v, str)}
        types = op["types"] | chosen
        signature = {k: "constexpr" if k in constants else types.get(k, "i32") for k in kernel.arg_names}
        values = {(kernel.arg_names.index(k),): v for k, v in constants.items()}
        source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            dump = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True)
        usage = {k.lower(): int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", dump.stdout + dump.stderr)}
        usage |= {"kernel": name, "settings": number, "target": target, "shared": compiled.metadata.shared}
        usage["wgmma"] = "wgmma.mma_async" in compiled.asm["ptx"]
        out["usage"].append(usage)
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
    compiled = {(usage["kernel"], usage["target"]) for usage in found["usage"]}
    assert len(compiled) == len(TARGETS) * len(found["kernels"])
    for usage in found["usage"]:
        assert usage["reg"] > 0
        assert usage["stack"] == usage["local"] == 0, f"registers are spilled: {usage}"
        if usage["kernel"] in _OPS[path.stem].get("wgmma", []) and usage["target"] == 90:
            assert usage["wgmma"], f"a product without wgmma: {usage}"
        assert usage["shared"] <= 99 * 1024, f"more shared memory than every target has: {usage}"
