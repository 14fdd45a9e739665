"""The examples run on tiny data."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from spkfast import SpeakerEncoder
from tests.training.corpus import make_tones

ROOT = Path(__file__).parents[1]


def test_nearest_voices(tmp_path, monkeypatch, capsys):
    make_tones(tmp_path, speakers=3, utterances=2)
    monkeypatch.setattr(sys, "argv", ["nearest_voices.py", str(tmp_path)])
    runpy.run_path(str(ROOT / "examples/nearest_voices.py"), run_name="__main__")
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 6
    encoder = SpeakerEncoder.load("ecapa-mini")
    for path, nearest, cosine in rows:
        scores = {other: encoder.verify(path, other).score for other, _, _ in rows if other != path}
        assert nearest == max(scores, key=lambda other: scores[other])
        assert abs(float(cosine) - scores[nearest]) < 1e-3
