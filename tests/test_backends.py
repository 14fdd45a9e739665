"""Which backend runs: the choice, its reasons in words, and a package without any compiled library."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import spkfast
from spkfast import backends, ops  # noqa: F401  ops loads the libraries

CPU = torch.device("cpu")


def test_auto_takes_the_first_that_can():
    assert backends.resolve(CPU, "auto", "log_mel_fbank") == "native"
    assert backends.resolve(CPU, "auto", "log_mel_fbank", {"native": "of the FFT size"}) == "reference"
    assert backends.resolve(torch.device("meta"), "auto", "log_mel_fbank") == "reference"
    assert backends.resolve(CPU, "reference", "log_mel_fbank") == "reference"


def test_missing_backends_say_why():
    with pytest.raises(spkfast.InputError, match="backend must be one of auto, reference, native, triton, got 'cuda'"):
        backends.resolve(CPU, "cuda", "log_mel_fbank")
    with pytest.raises(spkfast.InputError, match="backend='native' cannot run log_mel_fbank on cpu: of the FFT size"):
        backends.resolve(CPU, "native", "log_mel_fbank", {"native": "of the FFT size"})
    with pytest.raises(spkfast.InputError, match="on meta: only the reference runs on meta"):
        backends.resolve(torch.device("meta"), "native", "log_mel_fbank")


def test_info():
    info = spkfast.info()
    assert json.loads(json.dumps(info)) == info
    assert info["versions"]["spkfast"] == spkfast.__version__ and info["versions"]["torch"] == torch.__version__
    assert info["cpu"]["level"] in ("scalar", "avx2", "avx512", "avx512bf16")
    assert info["build"]["torch_target"] == "0x020b000000000000"
    assert "soundfile" in info["extras"]["audio"] and "accelerate" in info["extras"]["train"]
    op = info["ops"]["log_mel_fbank"]
    assert op["chosen"]["cpu"] == "native" and {"reference", "native"} <= set(op["available"]["cpu"])
    for device in ("cpu", "cuda"):
        assert set(op["available"][device]) | set(op["missing"][device]) == {"reference", "native", "triton"}
        assert not set(op["available"][device]) & set(op["missing"][device])
        assert all(op["missing"][device].values())


def test_every_op_has_a_definition():
    assert set(spkfast.info()["ops"]) <= set(spkfast.reference.__all__)


def test_works_without_any_compiled_library(tmp_path):
    shutil.copytree(
        Path(spkfast.__file__).parent, tmp_path / "spkfast", ignore=shutil.ignore_patterns("*.so", "__pyc*")
    )
    script = """
import json, sys
sys.modules["spkfast._C"] = None  # the finder of an editable install would find it all the same
import torch, spkfast
from spkfast import functional
features, _ = functional.log_mel_fbank(torch.ones(1, 800), spec=spkfast.frontend("wespeaker"))
try:
    functional.log_mel_fbank(torch.ones(1, 800), spec=spkfast.frontend("wespeaker"), backend="native")
except spkfast.InputError as error:
    print(json.dumps([spkfast.__file__, list(features.shape), str(error), spkfast.info()]))
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    where, shape, error, info = json.loads(run.stdout)
    assert where.startswith(str(tmp_path)) and shape == [1, 3, 80]
    assert "cannot run log_mel_fbank on cpu: the library _ops_cpu.so was not built (build it with: pip install" in error
    assert info["ops"]["log_mel_fbank"]["chosen"]["cpu"] == "reference"
    assert "spkfast._C cannot be imported" in info["build"]["missing"]


def test_import_of_the_package_needs_no_torch_import():
    # The command line prints its help before it imports torch, which takes seconds.
    script = "import sys, spkfast.backends, spkfast.frontends; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
