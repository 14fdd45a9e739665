"""Optimisers, and learning rates for another batch size than they were chosen at."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from spkfast.training.config import OptimizerConfig, check_values


def create(task: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimiser of all parameters of a module, in one fused step.

    What has two or more axes decays: kernels and matrices, not biases and the scales of normalisations. ``decay_all``
    makes everything decay. Packed weights of layers that run on kernels follow the step.

    Args:
        task: What is trained, on the device where it is.
        config: Its ``name``, ``lr``, ``momentum``, ``betas``, ``weight_decay`` and ``decay_all``.

    Raises:
        InputError: If the name is unknown or a number is out of range.
    """
    check_values(config, "optimizer.")
    decayed = [value for value in task.parameters() if config.decay_all or value.ndim > 1]
    others = [value for value in task.parameters() if not (config.decay_all or value.ndim > 1)]
    groups: list[dict[str, Any]] = [
        {"params": params, "weight_decay": weight_decay}
        for params, weight_decay in ((decayed, config.weight_decay), (others, 0.0))
        if params
    ]
    if config.name == "sgd":
        nesterov = config.momentum > 0
        made = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov, fused=True)
        if nesterov:
            # torch's fused step makes the momentum of memory as it finds it where a GradScaler skips the first one.
            for value in task.parameters():
                made.state[value]["momentum_buffer"] = torch.zeros_like(value)
        return made
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.name]
    return kind(groups, lr=config.lr, betas=tuple(config.betas), fused=True)


def scaled(config: OptimizerConfig, value: float, crops_per_step: int) -> float:
    """A learning rate that was chosen for ``lr_batch_size`` crops a step, in proportion to what a step has here.

    Args:
        config: Its ``lr_batch_size``; with None the learning rate is taken as it is.
        value: The learning rate.
        crops_per_step: Crops of a step, over all processes and accumulated batches.

    Raises:
        InputError: If ``lr_batch_size`` or another number of the optimiser is out of range.

    Reference: Goyal et al., "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour", 2017.
    """
    check_values(config, "optimizer.")
    if config.lr_batch_size is None:
        return value
    return value * crops_per_step / config.lr_batch_size
