"""Averages of weights: against means in float64, resumed to the last bit, and as a network that embeds."""

from __future__ import annotations

import copy
import io
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spkfast import models
from spkfast.errors import InputError
from spkfast.training import averaging, optimizers
from spkfast.training.averaging import Average
from spkfast.training.config import AveragingConfig, OptimizerConfig
from spkfast.training.spans import Length

LENGTH = Length(steps=20, steps_per_epoch=4)
KINDS = [
    AveragingConfig(name="ema", decay=0.4),
    AveragingConfig(name="last", snapshots=3, every="1 epochs"),
]


def a_net(device: torch.device | str = "cpu") -> nn.Module:
    torch.manual_seed(0)
    return models.create(
        "ecapa_tdnn", feature_dim=8, channels=16, mfa_channels=24, embedding_dim=12, attention_channels=8, se_channels=8
    ).to(device)


class Training:
    """A network that takes steps, each of which follows from its number alone."""

    def __init__(self, net: nn.Module, config: AveragingConfig, length: Length = LENGTH) -> None:
        self.net = net.train()
        self.optimizer = optimizers.create(net, OptimizerConfig(momentum=0.0))
        made = averaging.create(config, net, length)
        assert made is not None
        self.average: Average = made

    def step(self, step: int) -> None:
        device = next(self.net.parameters()).device
        features = torch.randn(4, 30, 8, generator=torch.Generator().manual_seed(step)).to(device)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.05
        self.net(features).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update(step)


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().double() for name, value in net.state_dict().items()}


def mean(config: AveragingConfig, start: dict[str, Tensor], after: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The average of the weights after each step, in float64."""
    if config.name == "last":
        taken = after[::-1][:: LENGTH.steps_per_epoch][: config.snapshots]
        return {name: torch.stack([values[name] for values in taken]).mean(0) for name in start}
    out = start
    for step, values in enumerate(after, 1):
        decay = min(config.decay, (1 + step) / (10 + step))
        out = {name: decay * out[name] + (1 - decay) * values[name] for name in out}
    return out


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.name)
def test_average_is_that_of_the_weights_after_the_steps(config: AveragingConfig, device: torch.device) -> None:
    training = Training(a_net(device), config)
    start, after = state(training.net), []
    for step in range(1, LENGTH.steps + 1):
        training.step(step)
        after.append(state(training.net))
    expected, found = mean(config, start, after), state(training.average.net)
    assert found.keys() == expected.keys()
    moved = False
    for name, value in found.items():
        if name.endswith("num_batches_tracked"):
            assert value == after[-1][name] == LENGTH.steps
            continue
        # An update subtracts, multiplies by a rounded weight and adds: less than 7 half units in the last place of the
        # largest value, and what earlier updates left shrinks.
        largest = max(float(values[name].abs().max()) for values in [start, *after])
        torch.testing.assert_close(value, expected[name], rtol=0, atol=7 * training.average.count * 2**-24 * largest)
        if "running_var" in name:
            moved = moved or not torch.allclose(value, after[-1][name], rtol=1e-3)
    assert moved


def test_last_takes_the_end_of_the_run_and_spans_before_it() -> None:
    training = Training(nn.Linear(2, 2, bias=False), KINDS[1])
    weight, taken = training.net.weight, []
    for step in range(1, LENGTH.steps + 1):
        with torch.no_grad():
            weight.fill_(float(step))
        before = training.average.count
        training.average.update(step)
        if training.average.count > before:
            taken.append(step)
            expected = sum(taken) / len(taken)
            assert training.average.net is not training.net
            torch.testing.assert_close(training.average.net.weight, torch.full((2, 2), expected))
        elif not taken:
            assert training.average.net is training.net
    assert taken == [12, 16, 20]


def test_decay_of_ema_is_smaller_at_the_start() -> None:
    net = nn.Linear(1, 1, bias=False)
    average = averaging.create(AveragingConfig(name="ema", decay=0.3), net, LENGTH)
    assert average is not None and average.net is net
    found, expected = [], []
    value = float(net.weight.detach())
    for step in range(1, 8):
        with torch.no_grad():
            net.weight.fill_(float(step))
        average.update(step)
        found.append(float(average.net.weight))
        decay = [2 / 11, 3 / 12, 0.3, 0.3, 0.3, 0.3, 0.3][step - 1]
        value = decay * value + (1 - decay) * step
        expected.append(value)
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.name)
@pytest.mark.parametrize("cut", [1, 5, 14, 20])
def test_resumed_average_is_the_same_to_the_last_bit(config: AveragingConfig, cut: int) -> None:
    whole = Training(a_net(), config)
    file = io.BytesIO()
    for step in range(1, LENGTH.steps + 1):
        whole.step(step)
        if step == cut:
            torch.save([whole.net.state_dict(), whole.average.state_dict()], file)
    resumed = Training(models.create("ecapa_tdnn", **whole.net.config), config)
    file.seek(0)
    net, average = torch.load(file, weights_only=True)
    resumed.net.load_state_dict(net)
    resumed.average.load_state_dict(average)
    for step in range(cut + 1, LENGTH.steps + 1):
        resumed.step(step)
    assert resumed.average.count == whole.average.count > 0
    assert_same(state(resumed.average.net), state(whole.average.net))


def test_state_of_another_network_is_refused() -> None:
    one, other = Training(nn.Linear(2, 2), KINDS[0]), Training(nn.Linear(2, 1), KINDS[0])
    with pytest.raises(RuntimeError, match="size mismatch"):
        one.average.load_state_dict(other.average.state_dict())


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.name)
def test_averaged_network_embeds_with_the_weights_of_the_moment(config: AveragingConfig, device: torch.device) -> None:
    features = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(9)).to(device)

    def embedding(net: nn.Module) -> Tensor:
        with torch.no_grad():
            return net(features)

    def fresh(net: nn.Module) -> Tensor:
        other = models.create("ecapa_tdnn", **net.config).to(device)
        other.load_state_dict(net.state_dict())
        return embedding(other.eval())

    live = a_net(device).eval()
    embedding(live)  # weights are packed when the copy is made
    training = Training(live, config)
    earlier: list[Tensor] = []
    for step in range(1, LENGTH.steps + 1):
        training.step(step)
        if training.average.count == 0:
            continue
        net = training.average.net
        assert net is not live and live.training and not any(part.training for part in net.modules())
        found = embedding(net)
        assert torch.equal(found, embedding(net)) and torch.equal(found, fresh(net))
        if training.average.count > len(earlier):
            assert all(not torch.equal(found, other) for other in earlier)
            earlier.append(found)
        else:
            assert torch.equal(found, earlier[-1])
    loaded = copy.deepcopy(training.average.state_dict())
    loaded["net"]["encoder.stem.conv.weight"] *= 2
    training.average.load_state_dict(loaded)
    found = embedding(training.average.net)
    assert torch.equal(found, fresh(training.average.net)) and not torch.equal(found, earlier[-1])
    assert torch.equal(embedding(live.eval()), fresh(live))


def test_average_shares_no_memory_and_wants_no_gradient() -> None:
    net = a_net()
    training = Training(net, KINDS[0])
    training.step(1)
    embedding = training.average.net(torch.randn(2, 30, 8))
    assert not embedding.requires_grad
    assert not any(value.requires_grad for value in training.average.net.parameters())
    assert all(value.requires_grad for value in net.parameters())
    shared = {value.data_ptr() for value in net.state_dict().values()}
    assert not shared & {value.data_ptr() for value in training.average.net.state_dict().values()}


def test_tensors_with_two_names_count_once() -> None:
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    net[1].weight = net[0].weight
    average = averaging.create(AveragingConfig(name="ema", decay=0.9), net, LENGTH)
    assert average is not None
    start = float(net[0].weight.detach())
    with torch.no_grad():
        net[0].weight.fill_(5.0)
    average.update(1)
    assert average.net[0].weight is average.net[1].weight
    assert float(average.net[1].weight) == pytest.approx(2 / 11 * start + 9 / 11 * 5, rel=1e-6)


def test_one_snapshot_is_the_last_weights_exactly() -> None:
    training = Training(a_net(), AveragingConfig(name="last", snapshots=1, every=50))
    for step in range(1, LENGTH.steps + 1):
        training.step(step)
    assert training.average.count == 1
    assert_same(state(training.average.net), state(training.net))


def test_no_average() -> None:
    assert averaging.create(AveragingConfig(), nn.Linear(1, 1), LENGTH) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "emma"}, "unknown averaging.name 'emma' (did you mean 'ema'?)"),
        ({"name": "ema", "decay": 1.0}, "averaging.decay must be at least 0 and below 1, got 1.0"),
        ({"name": "ema", "decay": math.nan}, "averaging.decay must be at least 0 and below 1, got nan"),
        ({"name": "last", "snapshots": 0}, "averaging.snapshots must be at least 1, got 0"),
        ({"name": "last", "every": "0 %"}, "averaging.every must be at least 1, got '0 %' (0 steps)"),
        ({"name": "last", "every": "often"}, "averaging.every must be a number of steps"),
        (
            {"name": "last", "snapshots": 6},
            "averaging.snapshots=6 every '1 epochs' (4 steps) need a run of more than 20 steps, this one has 20",
        ),
    ],
)
def test_bad_settings_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match="^" + re.escape(message)):
        averaging.create(AveragingConfig(**options), nn.Linear(1, 1), LENGTH)
