"""Averages of a network's weights over the steps of its training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spkfast.errors import InputError
from spkfast.training.config import AveragingConfig, check_values
from spkfast.training.spans import Length, told


class Average:
    """A second network, whose weights are an average of those that a network has had.

    All that the ``state_dict`` of the network holds is averaged, the statistics of batch norm too; integers are copied.
    The network must be in its final form and on its device: tensors that it gets later are not followed.

    Args:
        net: The network that is trained.
        is_taken: Whether the weights after a step, counted from 1, are taken.
        weight: What the n-th weights that are taken, counted from 1, count in the average; what was there before
            counts one minus that.

    Attributes:
        count: How many weights were taken.
    """

    def __init__(self, net: nn.Module, is_taken: Callable[[int], bool], weight: Callable[[int], float]) -> None:
        self.count = 0
        self._is_taken, self._weight = is_taken, weight
        self._live = net
        self._averaged = copy.deepcopy(net).eval().requires_grad_(False)
        pairs = list(zip(_tensors(self._averaged), _tensors(net), strict=True))
        self._floats = [pair for pair in pairs if pair[0].is_floating_point()]
        self._others = [pair for pair in pairs if not pair[0].is_floating_point()]

    @property
    def net(self) -> nn.Module:
        """The averaged network, in evaluation mode; the one that is trained, as it is, until weights were taken."""
        return self._averaged if self.count else self._live

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Call it after each step of the optimiser, counted from 1."""
        if not self._is_taken(step):
            return
        self.count += 1
        # Changes in place of this kind are counted by torch, so that packed weights follow.
        torch._foreach_lerp_(
            [average for average, _ in self._floats], [live for _, live in self._floats], self._weight(self.count)
        )
        for average, live in self._others:
            average.copy_(live)

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` goes on from, to the last bit."""
        return {"count": self.count, "net": self._averaged.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what :meth:`state_dict` gave of the average of such a network.

        Raises:
            RuntimeError: If it was another network.
        """
        self._averaged.load_state_dict(state["net"])
        self.count = state["count"]


def create(config: AveragingConfig, net: nn.Module, length: Length) -> Average | None:
    """The average that a run keeps; None for none.

    Args:
        config: ``ema`` is the exponential moving average over all steps; ``last`` the mean of weights at the end of the
            run and at spans before it.
        net: The network that is trained, in its final form and on its device.
        length: Of the run.

    Raises:
        InputError: If a number is out of range or a span malformed, or the run is too short for the snapshots.

    References:
        Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992; Izmailov et al., "Averaging
        Weights Leads to Wider Optima and Better Generalization", UAI 2018.
    """
    check_values(config, "averaging.")
    if config.name == "none":
        return None
    if config.name == "ema":
        return Average(net, lambda step: True, lambda n: 1 - min(config.decay, (1 + n) / (10 + n)))
    every, count = length.span(config.every, "averaging.every"), config.snapshots
    if every < 1:
        raise InputError(f"averaging.every must be at least 1, got {told(config.every, every)}")
    first = length.steps - (count - 1) * every
    if first < 1:
        raise InputError(
            f"averaging.snapshots={count} every {told(config.every, every)} need a run of more than "
            f"{(count - 1) * every} steps, this one has {length.steps}"
        )
    return Average(net, lambda step: step >= first and (step - first) % every == 0, lambda n: 1 / n)


def _tensors(net: nn.Module) -> list[Tensor]:
    """What a saved network holds; tensors that have several names once."""
    values = net.state_dict(keep_vars=True).values()
    return list({id(value): value for value in values if isinstance(value, Tensor)}.values())
