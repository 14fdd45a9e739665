"""The example runs on a tiny model."""

from __future__ import annotations

import logging
import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples/accelerate_live_model.py"


def test_before_and_after(capsys, caplog):
    logger = logging.getLogger("spkfast.accelerate")
    level = logger.level
    try:
        runpy.run_path(str(EXAMPLE))["main"](channels=16, batch=2, frames=20, repeats=1)
    finally:
        logger.setLevel(level)
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [name for name, _ in rows] == ["before", "after", "difference"]
    assert float(rows[2][1]) < 2e-5
    assert sum("swapped for" in line for line in caplog.messages) == 4


@pytest.fixture(autouse=True)
def _handlers():
    root = logging.getLogger()
    handlers = list(root.handlers)
    yield
    root.handlers[:] = handlers
