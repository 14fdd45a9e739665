"""Which backend runs: the choice, its reasons in words, and a package without any compiled library."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import spkfast
from spkfast import backends, functional, ops  # noqa: F401  ops loads the libraries
from spkfast.reference import SERes2NetParams, TdnnParams

CPU = torch.device("cpu")


def test_auto_takes_the_first_that_can():
    assert backends.resolve(CPU, "auto", "log_mel_fbank") == "native"
    assert backends.resolve(CPU, "auto", "log_mel_fbank", {"native": "of the FFT size"}) == "reference"
    assert backends.resolve(torch.device("meta"), "auto", "log_mel_fbank") == "reference"
    assert backends.resolve(CPU, "reference", "log_mel_fbank") == "reference"


def test_only_the_thread_that_asks_gets_the_reference():
    def chosen() -> str:
        return backends.resolve(CPU, "auto", "tdnn_layer")

    with ThreadPoolExecutor(1) as other:
        with backends.only_reference():
            with backends.only_reference():
                assert (chosen(), other.submit(chosen).result()) == ("reference", "native")
            assert chosen() == "reference"
        assert chosen() == "native"


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


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def tdnn(outputs, inputs):
    return TdnnParams(noise(outputs, inputs, 1), noise(outputs), noise(outputs), noise(outputs))


LENGTHS = torch.tensor([9, 7])
BLOCK = SERes2NetParams(tdnn(4, 4), [tdnn(2, 2)], tdnn(4, 4), tdnn(3, 4), TdnnParams(noise(4, 3, 1), noise(4)), None)
# Name of the op, and the op as a function of one tensor of this shape.
OPS = {
    "add_noise": (
        (2, 9),
        lambda x, backend: functional.add_noise(
            x, noise(5), *torch.tensor([[[0], [2]], [[5], [3]], [[4], [0]]]), noise(2, 1), backend=backend
        ),
    ),
    "attentive_stats_pool": (
        (2, 4, 9),
        lambda x, backend: functional.attentive_stats_pool(x, 2 * x, LENGTHS, backend=backend).std,
    ),
    "attentive_stats_pool_from_hidden": (
        (2, 4, 9),
        lambda x, backend: (
            functional.attentive_stats_pool_from_hidden(
                x, x[:, :3], noise(4, 3), noise(4), LENGTHS, backend=backend
            ).std
        ),
    ),
    "change_speed": (
        (2, 40),
        lambda x, backend: functional.change_speed(
            x, torch.tensor([0, 1]), speeds=[0.9, 1.1], num_samples=40, backend=backend
        ),
    ),
    "log_mel_fbank": (
        (2, 800),
        lambda x, backend: functional.log_mel_fbank(x, spec=spkfast.frontend("wespeaker"), backend=backend)[0],
    ),
    "margin_softmax_loss": (
        (2, 4),
        lambda x, backend: functional.margin_softmax_loss(x, noise(5, 4), torch.tensor([1, 3]), backend=backend),
    ),
    "paired_dot": (
        (3, 5),
        lambda x, backend: functional.paired_dot(x, 2 * x, *torch.tensor([[0, 2], [1, 2]]), backend=backend),
    ),
    "reverberate": (
        (2, 9),
        lambda x, backend: functional.reverberate(x, noise(5), *torch.tensor([[0, 2], [5, 3]]), backend=backend),
    ),
    "se_res2net_block": (
        (2, 4, 9),
        lambda x, backend: functional.se_res2net_block(x, BLOCK, backend=backend),
    ),
    "top_moments": ((2, 9), lambda x, backend: functional.top_moments(x, 4, backend=backend).std),
    "tdnn_layer": ((2, 4, 9), lambda x, backend: functional.tdnn_layer(x, tdnn(3, 4), backend=backend)),
}


def dual(function, x, tangent):
    with torch.autograd.forward_ad.dual_level():
        found = function(torch.autograd.forward_ad.make_dual(x, tangent))
        return torch.autograd.forward_ad.unpack_dual(found).tangent


def test_every_op_is_differentiated_below():
    assert OPS.keys() == spkfast.info()["ops"].keys()


@pytest.mark.parametrize("op", OPS)
def test_transforms_see_the_reference(op):
    shape, function = OPS[op]
    x, tangent = noise(*shape), noise(*shape).flip(-1)
    for derivative in (
        lambda call: torch.func.jvp(call, (x,), (tangent,))[1],
        lambda call: dual(call, x, tangent),
        lambda call: torch.func.grad(lambda x: call(x).square().sum())(x),
    ):
        found, want = (derivative(lambda x, name=name: function(x, name)) for name in ("auto", "reference"))
        assert torch.equal(found, want) and want.abs().max() > 0
        with pytest.raises(spkfast.InputError, match=f"'native' cannot run {op} on cpu: under torch.func and in forw"):
            derivative(lambda x: function(x, "native"))


def test_compiled_forward_derivatives():
    torch._dynamo.reset()
    x, tangent = noise(2, 4, 9), noise(2, 4, 9).flip(-1)
    call = functional.weighted_moments

    def derivative(x):
        return torch.func.jvp(lambda x: call(x).var, (x,), (tangent,))[1]

    compiled = torch.compile(derivative, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), derivative(x))


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
