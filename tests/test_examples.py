"""The examples run on tiny data."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from tests.training.corpus import make_tones

ROOT = Path(__file__).parents[1]


def test_nearest_voices(tmp_path, monkeypatch, capsys):
    make_tones(tmp_path, speakers=3, utterances=2)
    monkeypatch.setattr(sys, "argv", ["nearest_voices.py", str(ROOT / "tests/fixtures/real_speech"), str(tmp_path)])
    runpy.run_path(str(ROOT / "examples/nearest_voices.py"), run_name="__main__")
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 6
    assert all(Path(path).parts[-3] == Path(nearest).parts[-3] for path, nearest, _ in rows)
