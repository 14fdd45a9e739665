"""The bundled model still gives the numbers that it gave when it was made."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import report
from benchmarks.accuracy.bundle import probe
from spkfast import SpeakerEncoder
from spkfast.cli.main import main
from spkfast.models import bundled

NAME = "ecapa-mini"
LIST = "trials.txt"


@pytest.fixture
def expected():
    return json.loads((Path(__file__).parent / "fixtures" / NAME / "expected.json").read_text())


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_embedding(backend, expected):
    want = torch.tensor(expected["probe_embedding"])
    got = SpeakerEncoder.load(NAME, device="cpu").embed(probe(), backend=backend)
    assert (got - want).abs().max() / want.abs().max() < 1e-4


def test_size():
    assert (bundled.folder(NAME) / "model.safetensors").stat().st_size <= 4_000_000


def test_record_is_that_of_this_model(expected):
    (record,) = (json.loads(path.read_text()) for path in report.RESULTS.glob(f"*/{NAME}.json"))
    weights = (bundled.folder(NAME) / "model.safetensors").read_bytes()
    assert record["model"]["sha256"] == hashlib.sha256(weights).hexdigest()
    encoder = SpeakerEncoder.load(NAME, device="cpu")
    assert record["threshold"] == encoder.threshold.value and record["frontend"]["hash"] == encoder.frontend.hash
    assert {name: row["eer_percent"] for name, row in record["lists"].items()} == expected["eer_percent"]


@pytest.mark.full
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_error_rate_on_real_speech(speech, backend, capsys, expected):
    options = ["--model", NAME, "--data", str(speech), "--trials", str(speech / LIST), "--backend", backend, "--json"]
    assert main(["evaluate", *options]) == 0
    (row,) = json.loads(capsys.readouterr().out)["lists"]
    assert row["eer_percent"] < 10
    # One trial in 1,350 is 0.07 %: rounding may tip a few over the threshold, no more.
    np.testing.assert_allclose(row["eer_percent"], expected["eer_percent"][LIST], atol=0.15)
