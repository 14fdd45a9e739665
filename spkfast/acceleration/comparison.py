"""Whether a layer computes what would take its place: both on small random inputs and weights, in float64."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from spkfast.acceleration.layer import DROPOUTS, Plan, Unknown, look
from spkfast.nn.inference import NORMS
from spkfast.nn.sync_batch_norm import SyncBatchNorm

# Frames of the inputs. A power of two, since speechbrain's pooling divides by it in float32 whatever its input is.
_FRAMES = 16
# Float64 leaves some 1e-13 of the sums of a layer; other arithmetic differs in the first digits, other bounds of a
# variance in the eighth at least.
_TOLERANCE = 1e-10


def compared(module: nn.Module, plans: list[Plan]) -> Plan | None:
    """The plan that computes what the module does, whatever the caller's surroundings are."""
    with (
        torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"),
        torch.random.fork_rng(devices=[]),
    ):  # fmt: skip
        twin = _Twin(module, plans[0])
        return next((fitted for plan in plans if (fitted := twin.fitted(plan))), None)


class _Probe(NamedTuple):
    """Arguments on which a layer is compared with what would take its place."""

    args: tuple[Any, ...]
    training: bool = False


class _Results(NamedTuple):
    """What a layer gives: shapes of the outputs; outputs, gradients and statistics."""

    shapes: list[torch.Size]
    values: list[Tensor]


class _Twin:
    """A copy of a module with random weights in float64, to compare with what would take its place.

    Random weights tell more than those of the module, which may be zero or one where it matters.
    """

    def __init__(self, module: nn.Module, plan: Plan) -> None:
        # Hooks may hold on to anything, and are not to be copied.
        hooks = ("_hooks", "_hooks_with_kwargs", "_hooks_always_called")
        memo = {id(value): type(value)() for part in module.modules() for name, value in part.__dict__.items()
                if name.endswith(hooks)}  # fmt: skip
        self._module = copy.deepcopy(module, memo).to("cpu", torch.float64).requires_grad_()
        for part in self._module.modules():
            for name, child in part.named_children():
                if isinstance(child, nn.SyncBatchNorm | SyncBatchNorm):  # would wait for its peers
                    part._modules[name] = nn.BatchNorm1d(child.num_features, child.eps, child.momentum)
        self._module.double()
        self._generator = torch.Generator().manual_seed(0)
        for part in self._module.modules():
            if isinstance(part, DROPOUTS):
                part.p = 0.0
        for name in plan.leaves.values():
            if look(leaf := self._module.get_submodule(name)):
                self._fill(leaf)
        self._prepare(plan)
        self._first = self._of_module(self._probes[0])

    def _prepare(self, plan: Plan) -> None:
        """Makes the inputs: those that the module has to take, with lengths, and maps."""
        options, with_lengths, with_maps = plan.options, [], []
        reach = (options.get("kernel_size", 1) - 1) // 2 * options.get("dilation", 1)
        frames, few = max(_FRAMES, 2 * reach + 2), max(2, reach + 1)
        if options.get("family") == "taoruijie":
            waves = self._random(3, 8000)
            probes = [_Probe((waves, False)), _Probe((waves, True)), _Probe((waves, True), training=True)]
        elif plan.kind == "network":
            size = options["config"]["feature_dim"]
            usual = self._random(3, frames, size)
            probes = [_Probe((usual,)), _Probe((usual,), training=True)]
        else:
            channels = int(options["channels" if plan.kind == "pool" else "in_channels"])
            usual = self._random(3, channels, frames)
            if plan.kind == "pool":
                # Variances of all sizes show their bounds; attention to all alike stays far from one frame alone.
                usual[:, 0], usual[:, -1] = 0, 300 * usual[:, -1]
                fc1 = cast(nn.Conv1d, self._module.get_submodule(plan.leaves["fc1"]))
                with torch.no_grad():
                    fc1.weight[:, channels - 1 :: channels] /= 300
                if channels % 2 == 0:
                    with_maps = [_Probe((usual.reshape(3, channels // 2, 2, -1),))]
            probes = [_Probe((usual,)), _Probe((self._random(3, channels, few),)), _Probe((usual,), training=True)]
        parameters = list(inspect.signature(type(self._module).forward).parameters)
        if plan.kind != "layer" and parameters[2:3] == ["lengths"]:
            lengths = torch.tensor([1.0, 0.53, 0.8], dtype=torch.float64)
            with_lengths = [_Probe((usual, lengths)), _Probe((usual, lengths), training=True)]
        self._probes, self._with_lengths, self._with_maps = probes, with_lengths, with_maps

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64)

    @torch.no_grad()
    def _fill(self, part: nn.Module) -> None:
        for name, value in (*part._parameters.items(), *part._buffers.items()):
            if value is not None and value.is_floating_point():
                bound = (3 / value[0].numel()) ** 0.5 if value.ndim > 1 else 0.5
                value.uniform_(-bound, bound, generator=self._generator)
                if isinstance(part, NORMS) and name in ("weight", "running_var"):
                    value += 1

    def fitted(self, plan: Plan) -> Plan | None:
        """The plan with what else it is found to do; None where the module computes something else."""
        column = plan.kind in ("network", "pool") and len(self._first.shapes[-1]) == 3
        plan = dataclasses.replace(plan, column=column)
        layer = plan.build(self._module)
        if not all(self._agrees(plan, layer, probe) for probe in self._probes):
            return None
        lengths = self._may_agree(plan, layer, self._with_lengths)
        maps = self._may_agree(plan, layer, self._with_maps)
        return dataclasses.replace(plan, lengths=lengths, maps=maps)

    def _may_agree(self, plan: Plan, layer: nn.Module, probes: list[_Probe]) -> bool:
        try:
            return bool(probes) and all(self._agrees(plan, layer, probe) for probe in probes)
        except Exception:  # inputs that the module need not take
            return False

    def _agrees(self, plan: Plan, layer: nn.Module, probe: _Probe) -> bool:
        want = self._first if probe is self._probes[0] else self._of_module(probe)
        for part in layer.modules():
            part.training = probe.training
        have = self._run(lambda *args: plan.run(layer, *args), probe)
        return have.shapes == want.shapes and all(map(_close, have.values, want.values))

    def _of_module(self, probe: _Probe) -> _Results:
        return self._run(self._module.train(probe.training), probe)

    def _run(self, call: Callable[..., Any], probe: _Probe) -> _Results:
        """Output, gradients and statistics."""
        buffers = list(self._module.buffers())
        before = [buffer.clone() for buffer in buffers]
        x = probe.args[0].clone().requires_grad_()
        torch.default_generator.manual_seed(0)  # of augmentation; torch.manual_seed would reset those of all GPUs
        out = call(x, *probe.args[1:])
        outputs = out if isinstance(out, tuple) else (out,)
        if not all(isinstance(output, Tensor) for output in outputs):
            raise Unknown("it returns more than tensors", similar=True)
        joined = _joined(outputs)
        weights = torch.randn(joined.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        inputs = [x, *self._module.parameters()]
        gradients = torch.autograd.grad((joined * weights).sum(), inputs, allow_unused=True, materialize_grads=True)
        after = [buffer.clone() for buffer in buffers]
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
        return _Results([output.shape for output in outputs], [joined.detach(), _joined(gradients), _joined(after)])


def _joined(values: Iterable[Tensor]) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.float64), *(value.flatten().double() for value in values)])


def _close(have: Tensor, want: Tensor) -> bool:
    # To the largest of all: some gradients are zero but for rounding.
    return bool((have - want).abs().max() <= _TOLERANCE * want.abs().max())
