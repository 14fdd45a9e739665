"""The committed model still gives the numbers that it gave when it was made."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.accuracy.real_speech import probe
from spkfast import SpeakerEncoder
from spkfast.cli.main import main

MODEL = Path(__file__).parent / "fixtures" / "real_speech"
EXPECTED = json.loads((MODEL / "expected.json").read_text())


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_embedding(backend):
    want = torch.tensor(EXPECTED["probe_embedding"])
    got = SpeakerEncoder.load(MODEL, device="cpu").embed(probe(), backend=backend)
    assert (got - want).abs().max() / want.abs().max() < 1e-4


def test_size():
    assert (MODEL / "model.safetensors").stat().st_size <= 4_000_000


@pytest.mark.full
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_error_rate_on_real_speech(speech, backend, capsys):
    trials = str(speech / "trials.txt")
    assert (
        main(
            [
                "evaluate",
                "--model",
                str(MODEL),
                "--data",
                str(speech),
                "--trials",
                trials,
                "--backend",
                backend,
                "--json",
            ]
        )
        == 0
    )
    (row,) = json.loads(capsys.readouterr().out)["lists"]
    assert row["eer_percent"] < 10
    # One trial in 1,350 is 0.07 %: rounding may tip a few over the threshold, no more.
    np.testing.assert_allclose(row["eer_percent"], EXPECTED["eer_percent"]["trials.txt"], atol=0.15)
