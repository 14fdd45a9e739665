"""Learning-rate and margin schedules."""

from __future__ import annotations

import pytest

from spkfast.training.config import LossConfig, OptimizerConfig
from spkfast.training.schedule import learning_rate, margin


def test_learning_rate_warms_up_and_decays():
    config = OptimizerConfig(lr=0.2, final_lr=0.01, warmup_steps=10)
    rates = [learning_rate(step, 100, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.02) and rates[9] == pytest.approx(0.2)
    assert rates[-1] == pytest.approx(0.01)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[10 + 89 // 2] == pytest.approx(0.105, rel=0.03)


def test_margin_grows_between_two_points():
    config = LossConfig(margin=0.3, margin_start=0.2, margin_end=0.6)
    values = [margin(step, 100, config) for step in range(100)]
    assert values[:21] == [0.0] * 21 and values[60:] == [0.3] * 40
    assert values[40] == pytest.approx(0.15)
    assert [margin(step, 10, LossConfig(margin=0.2, margin_start=0, margin_end=0)) for step in (0, 9)] == [0.2, 0.2]
