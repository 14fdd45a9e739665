"""Learning rate and margin as functions of the step."""

from __future__ import annotations

import math

from spkfast.training.config import LossConfig, OptimizerConfig


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Linear warm-up from 0 to ``lr``, then cosine decay to ``final_lr`` at the last of ``steps``."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps)
    return config.final_lr + (config.lr - config.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def margin(step: int, steps: int, config: LossConfig) -> float:
    """0 until ``margin_start`` of the run, then linear up to ``margin`` at ``margin_end`` of it."""
    start, end = config.margin_start * steps, config.margin_end * steps
    if step >= end:
        return config.margin
    return config.margin * max(0.0, (step - start) / (end - start))
