"""speechbrain's own ECAPA-TDNN, accelerated; skipped where the package is not installed."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
import types
from importlib.machinery import ModuleSpec

import pytest
import torch

import spkfast
from spkfast.acceleration import Accelerated
from tests.acceleration.test_acceleration import LENGTHS, assert_same, filled, step


@pytest.fixture(scope="module")
def ecapa():
    """The class, imported behind a stand-in for torchaudio, of which the network needs nothing."""
    if importlib.util.find_spec("speechbrain") is None:
        pytest.skip("the package speechbrain is not installed")
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("torchaudio") is None:
            stub = types.ModuleType("torchaudio")
            stub.__spec__, stub.__version__ = ModuleSpec("torchaudio", None), "2.11.0"
            stub.list_audio_backends = list
            patch.setitem(sys.modules, "torchaudio", stub)
        yield importlib.import_module("speechbrain.lobes.models.ECAPA_TDNN").ECAPA_TDNN


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "options",
    [{}, {"groups": [1, 2, 2, 2, 1]}, {"dropout": 0.2}, {"global_context": False}, {"res2net_scale": 4}],
    ids=str,
)
def test_gives_the_same_embeddings_and_gradients(ecapa, options, training):
    torch.manual_seed(0)
    sizes = {"channels": [32, 32, 32, 32, 96], "lin_neurons": 12, "attention_channels": 8, "se_channels": 8}
    original = filled(ecapa(20, **sizes, **options)).double().train(training)
    net = spkfast.accelerate(copy.deepcopy(original))
    assert list(net.state_dict()) == list(original.state_dict())
    kinds = [name for name, part in net.named_modules() if isinstance(part, Accelerated)]
    assert kinds == ["", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "mfa", "asp"]
    x = torch.randn(3, 32, 20, dtype=torch.float64)  # speechbrain divides by the frames in float32
    for inputs in ((x,), (x, LENGTHS.double())):
        results = []
        for model in (net, original):
            torch.manual_seed(1)  # of the dropout
            results.append(step(model, *inputs))
        assert_same(*results, 1e-10)


def test_single_precision(ecapa):
    torch.manual_seed(0)
    original = filled(ecapa(80, channels=[64, 64, 64, 64, 192], lin_neurons=24)).eval()
    net = spkfast.accelerate(copy.deepcopy(original))
    x = torch.randn(3, 100, 80)
    for lengths in (None, LENGTHS):
        with torch.no_grad():
            have, want = net(x, lengths), original(x, lengths)
        assert have.shape == want.shape == (3, 1, 24)
        assert (have - want).abs().max() <= 2e-5 * want.abs().max()
