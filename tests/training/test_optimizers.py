"""Optimisers: which parameters decay, and steps against the formulas written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spkfast.errors import InputError
from spkfast.training import optimizers
from spkfast.training.config import OptimizerConfig


def a_task(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(3, 4, 2), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(8, 2)).to(dtype)


def test_what_has_two_axes_decays() -> None:
    task = a_task()
    optimizer = optimizers.create(task, OptimizerConfig(weight_decay=0.3))
    names = {parameter: name for name, parameter in task.named_parameters()}
    groups = {group["weight_decay"]: [names[value] for value in group["params"]] for group in optimizer.param_groups}
    assert groups == {0.3: ["0.weight", "3.weight"], 0.0: ["0.bias", "1.weight", "1.bias", "3.bias"]}


def test_everything_decays_where_asked_for() -> None:
    task = a_task()
    (group,) = optimizers.create(task, OptimizerConfig(weight_decay=0.3, decay_all=True)).param_groups
    assert group["weight_decay"] == 0.3
    assert [id(value) for value in group["params"]] == [id(value) for value in task.parameters()]


def by_hand(config: OptimizerConfig, value: Tensor, gradients: list[Tensor], decay: float) -> Tensor:
    """The value after a step with each gradient."""
    first, second = torch.zeros_like(value), torch.zeros_like(value)
    for count, gradient in enumerate(gradients, 1):
        if config.name == "adamw":
            value = value - config.lr * decay * value
        else:
            gradient = gradient + decay * value
        if config.name == "sgd":
            first = config.momentum * first + gradient
            value = value - config.lr * (gradient + config.momentum * first)
        else:
            low, high = config.betas
            first = low * first + (1 - low) * gradient
            second = high * second + (1 - high) * gradient**2
            scale = (second / (1 - high**count)).sqrt() + 1e-8
            value = value - config.lr * first / (1 - low**count) / scale
    return value


@pytest.mark.parametrize("decay_all", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"name": "sgd", "momentum": 0.9},
        {"name": "sgd", "momentum": 0.0},
        {"name": "adam", "betas": (0.8, 0.95)},
        {"name": "adam", "betas": [0.9, 0.999]},
        {"name": "adamw", "betas": (0.8, 0.95)},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_steps_follow_the_formula(options: dict[str, Any], decay_all: bool, device: torch.device) -> None:
    config = OptimizerConfig(lr=0.05, weight_decay=0.2, decay_all=decay_all, **options)
    task = a_task().to(device)
    optimizer = optimizers.create(task, config)
    gradients = {
        name: [torch.randn(value.shape, dtype=torch.float64) for _ in range(3)]
        for name, value in task.named_parameters()
    }
    expected = {
        name: by_hand(config, value.detach().cpu(), gradients[name], 0.2 if decay_all or value.ndim > 1 else 0.0)
        for name, value in task.named_parameters()
    }
    for step in range(3):
        for name, value in task.named_parameters():
            value.grad = gradients[name][step].to(device)
        optimizer.step()
    # Three steps of some ten operations, each of which rounds values of up to 5 by half a unit in the last place.
    for name, value in task.named_parameters():
        torch.testing.assert_close(value.detach().cpu(), expected[name], rtol=0, atol=3 * 10 * 5 * 2**-53)


def test_learning_rate_of_each_step_is_that_of_the_groups() -> None:
    task = a_task(torch.float32)
    optimizer = optimizers.create(task, OptimizerConfig(weight_decay=0.5))
    before = [value.detach().clone() for value in task.parameters()]
    for value in task.parameters():
        value.grad = torch.ones_like(value)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    assert all(torch.equal(value, old) for value, old in zip(task.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "adm"}, r"^unknown optimizer\.name 'adm' \(did you mean 'adam'\?\)"),
        ({"name": "adam", "betas": (0.9, 1.0)}, r"^optimizer\.betas must be at least 0 and below 1, got 1\.0"),
        ({"momentum": -0.1}, r"^optimizer\.momentum must be at least 0 and below 1, got -0\.1"),
        ({"weight_decay": -1e-4}, r"^optimizer\.weight_decay must be at least 0 and below inf, got -0\.0001"),
    ],
)
def test_bad_settings_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        optimizers.create(a_task(), OptimizerConfig(**options))


def test_rates_follow_the_batch() -> None:
    config = OptimizerConfig(lr_batch_size=64)
    assert optimizers.scaled(config, 0.1, 512) == pytest.approx(0.8)
    assert optimizers.scaled(config, 5e-5, 16) == pytest.approx(1.25e-5)
    assert optimizers.scaled(OptimizerConfig(), 0.1, 512) == 0.1
    with pytest.raises(InputError, match=r"^optimizer\.lr_batch_size must be at least 1, got 0"):
        optimizers.scaled(OptimizerConfig(lr_batch_size=0), 0.1, 512)


def test_a_first_step_that_overflows_leaves_no_trace(device: torch.device) -> None:
    """A GradScaler skips it: the steps after it are those of a run without it."""
    torch.use_deterministic_algorithms(True)  # what is allocated and not written is NaN then
    tasks = [a_task(torch.float32).to(device) for _ in range(2)]
    for task, skipped in zip(tasks, (False, True), strict=True):
        optimizer = optimizers.create(task, OptimizerConfig(lr=0.1))
        scaler = torch.amp.GradScaler(device.type, init_scale=4.0)
        for overflows in [True] * skipped + [False, False]:
            scaler.scale(sum(value.square().sum() for value in task.parameters())).backward()
            if overflows:
                next(task.parameters()).grad.fill_(torch.inf)
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    for one, other in zip(*(task.parameters() for task in tasks), strict=True):
        torch.testing.assert_close(one, other)
