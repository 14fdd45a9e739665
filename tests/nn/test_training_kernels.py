"""Layers that train on the kernels: nearness to plain modules in float64, when they apply, what modules remember.

Each test runs a layer on the kernels and as plain modules do it, and asks of the profiler which of both it was.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import math
import os
import pickle
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import spkfast
from spkfast.models.ecapa_tdnn import DIALECTS
from spkfast.nn import MarginSoftmaxLoss, SERes2NetBlock, inference, poolings
from spkfast.nn.se_res2net import TdnnLayer, real_frames
from tests import processes
from tests.acceleration import doubles
from tests.models.test_ecapa_tdnn import randomized

_DIALECTS = [name for name in DIALECTS if name != "3dspeaker"]  # speechbrain by another name
FORWARD = {"conv_relu", "conv_batch_norm"}
OF_WEIGHTS, OF_INPUTS = "conv_weight_gradient", "conv_input_gradient"
Found = dict[str, Tensor]
# The kernels may err this many times as much as plain modules do in float32, as in tests/parity.py.
FACTOR = 4.0
NEIGHBOURS = 3


@contextlib.contextmanager
def trains_on(backend: str | None) -> Iterator[None]:
    """Whose kernels train on a CPU; None for plain modules."""
    with mock.patch.object(inference, "_TRAINS", {} if backend is None else {"cpu": backend}):
        yield


def ran(function: Callable[[], Any]) -> tuple[Any, Counter[str]]:
    """What a function gives, and how often it called each of the ops that train."""
    with torch.autograd.profiler.profile() as profile:
        found = function()
    names = (event.name.removeprefix("spkfast::") for event in profile.function_events)
    names = (name.removesuffix("_triton") for name in names)
    return found, Counter(name for name in names if name.startswith(("conv_", "channel_affine")))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(net: Any, seed: int = 0) -> Any:
    """The module with parameters and statistics that are all different, in training mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in net.parameters():
            if value.ndim > 1:
                value.normal_(0, (1.5 / value[0].numel()) ** 0.5, generator=generator)
            else:
                value.normal_(0, 0.3, generator=generator)
        for part in net.modules():
            if isinstance(part, nn.BatchNorm1d):
                if part.weight is not None:
                    part.weight.uniform_(0.5, 1.5, generator=generator)
                if part.running_mean is not None and part.running_var is not None:
                    part.running_mean.uniform_(-0.2, 0.4, generator=generator)
                    part.running_var.uniform_(0.5, 1.5, generator=generator)
    return net.train()


def step(net: nn.Module, inputs: Sequence[Tensor], call: Callable[..., Any] | None = None) -> Found:
    """Outputs, gradients and statistics of a forward and a backward pass."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    out = (net if call is None else call)(*leaves)
    outputs = out if isinstance(out, tuple) else (out,)
    loss = sum((o * noise(*o.shape, seed=7 + k).to(o)).sum() for k, o in enumerate(outputs))
    assert isinstance(loss, Tensor)
    loss.backward()
    found = {f"output {k}": o for k, o in enumerate(outputs)}
    found |= {f"gradient of input {k}": leaf.grad for k, leaf in enumerate(leaves) if leaf.grad is not None}
    found |= {f"gradient of {name}": value.grad for name, value in net.named_parameters() if value.grad is not None}
    found |= {f"statistics {name}": value for name, value in net.named_buffers()}
    return {name: value.detach().clone() for name, value in found.items()}


def moved(inputs: Sequence[Tensor], seed: int | None) -> list[Tensor]:
    """Each value moved by at most one unit in the last place, as rounding would leave it, where there is a seed."""
    if seed is None:
        return list(inputs)
    generator, eps = torch.Generator().manual_seed(seed), torch.finfo(torch.float32).eps
    return [x * (1 + eps * torch.randint(-1, 2, x.shape, generator=generator)) for x in inputs]


def kind(name: str) -> str:
    return name.split()[0]


def largest(values: Found) -> dict[str, float]:
    """The largest value of each kind."""
    found: dict[str, float] = {}
    for name, value in values.items():
        found[kind(name)] = max(found.get(kind(name), 0.0), float(value.detach().double().abs().amax()))
    return found


def assert_same_kinds(have: Found, want: Found) -> None:
    assert have.keys() == want.keys()
    for name, value in want.items():
        assert have[name].shape == value.shape and have[name].isfinite().all(), name
        if not value.is_floating_point():
            assert torch.equal(have[name], value), name


def assert_as_near_as_plain(net: nn.Module, inputs: Sequence[Tensor], *, backend: str = "native") -> Counter[str]:
    """Holds a module against itself in float64; gives the ops that ran.

    The bound is what plain modules miss in float32, as in ``tests/parity.py``, and never less than a unit of rounding
    of the largest value of the kind: some gradients are zero but for rounding.
    """
    exact = step(copy.deepcopy(net).double(), [x.double() for x in inputs])
    with trains_on(None):
        plain = [step(copy.deepcopy(net), moved(inputs, seed)) for seed in (None, *range(NEIGHBOURS))]
    with trains_on(backend):
        got, ops = ran(lambda: step(copy.deepcopy(net), inputs))
    assert_same_kinds(got, exact)
    scales = largest(exact)
    for name, want in exact.items():
        assert got[name].dtype == plain[0][name].dtype, name
        if want.is_floating_point():
            errors = [float((run[name] - want).abs().amax()) for run in plain]
            allowed = FACTOR * max(torch.finfo(torch.float32).eps * scales[kind(name)], *errors)
            error = float((got[name] - want).abs().amax())
            assert error <= allowed, f"{name}: error {error:.3g} exceeds {allowed:.3g}"
    return ops


def assert_near_under_autocast(
    make: Callable[[], nn.Module], inputs: Callable[[int], Sequence[Tensor]], *, seeds: int = 3
) -> Counter[str]:
    """Holds modules under autocast against float64; gives the ops that ran in the last of several runs.

    Their errors may be half as large again as those of plain modules, in the geometric mean over all tensors of a kind
    and all runs: what rounding does to a ReLU near 0 makes those of one tensor many times larger, or smaller. Those
    of one tensor may be three times as large, but not in every run.

    Args:
        make: Makes the modules, which are filled anew for each run.
        inputs: Of the run.
        seeds: How many runs.
    """
    errors: dict[str, list[tuple[float, float]]] = {}
    ops: Counter[str] = Counter()
    for seed in range(seeds):
        net, x = filled_alike(make(), seed), inputs(seed)
        exact = step(copy.deepcopy(net).double(), [value.double() for value in x])
        runs = []
        for backend in (None, "native"):
            other = copy.deepcopy(net)
            with trains_on(backend):
                found, ops = ran(lambda other=other, x=x: step(other, x, under_autocast(other)))
            assert_same_kinds(found, exact)
            runs.append(found)
        scales = largest(exact)
        for name, want in exact.items():
            assert runs[0][name].dtype == runs[1][name].dtype or name == "output 0", name
            if want.is_floating_point():
                # Errors that float32 makes too are not those of autocast.
                least = 2.0**-20 * scales[kind(name)] * want.numel() ** 0.5
                plain, got = (least + float((run[name].double() - want).norm()) for run in runs)
                errors.setdefault(name, []).append((got, plain))
    for one in {kind(name) for name in errors}:
        pairs = [pair for name, values in errors.items() if kind(name) == one for pair in values]
        ratio = math.exp(statistics.fmean(math.log(got / plain) for got, plain in pairs))
        assert ratio <= 1.5, f"{one}: {ratio:.3g} times the error"
    for name, values in errors.items():
        ratio = min(got / plain for got, plain in values)
        assert ratio <= 3, f"{name}: {ratio:.3g} times the error"
    return ops


def under_autocast(net: Callable[..., Any], dtype: torch.dtype = torch.bfloat16) -> Callable[..., Any]:
    def call(*leaves: Tensor) -> Any:
        with torch.autocast("cpu", dtype):
            return net(*leaves)

    return call


def filled_alike(net: nn.Module, seed: int) -> nn.Module:
    """The module filled by another seed, its modes as they were."""
    modes = [part.training for part in net.modules()]
    filled(net, seed)
    for part, mode in zip(net.modules(), modes, strict=True):
        part.training = mode
    return net


def assert_plain(
    net: nn.Module, inputs: Sequence[Tensor], call: Callable[[Any], Callable[..., Any]] | None = None
) -> None:
    """That a module does what plain modules do, and on no kernel."""
    results = []
    for backend in ("native", None):
        with trains_on(backend):
            other = copy.deepcopy(net)
            found, ops = ran(lambda other=other: step(other, inputs, None if call is None else call(other)))
            assert not ops, f"on kernels: {dict(ops)}"
            results.append(found)
    assert_same_kinds(*results)
    for name, value in results[1].items():
        assert torch.equal(results[0][name], value), name


# Layers, poolings and networks


class Several(nn.Module):
    """A layer whose inputs come one after the other."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *x: Tensor) -> Tensor:
        return self.layer(x)


def channels_last(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "1x1": lambda: TdnnLayer(9, 17),
    "3 taps": lambda: TdnnLayer(9, 33, 3, dilation=2),
    "reflect": lambda: TdnnLayer(9, 16, 5, dilation=3, padding_mode="reflect"),
    "wider than the utterance": lambda: TdnnLayer(9, 16, 5, dilation=9, padding_mode="reflect"),
    "no batch norm": lambda: TdnnLayer(9, 17, 3, batch_norm=False),
}
BLOCKS: dict[str, dict[str, Any]] = {
    "last": {"dilation": 2, "scale": 4},
    "first": {"dilation": 2, "scale": 4, "identity": "first"},
    "reflect": {"dilation": 3, "scale": 4, "identity": "first", "padding_mode": "reflect"},
    "se_bn": {"scale": 2, "se_bn": True},
    "shortcut": {"scale": 4, "in_channels": 9},
    "shortcut, first, reflect": {"scale": 2, "in_channels": 9, "identity": "first", "padding_mode": "reflect"},
    "scale 1": {"scale": 1},
    "scale 1, first": {"scale": 1, "identity": "first", "in_channels": 9},
    "many groups": {"scale": 8, "kernel_size": 5},
}


def tdnn(name: str = "3 taps") -> Any:
    return filled(LAYERS[name]())


def block(name: str = "last") -> Any:
    return filled(SERes2NetBlock(16, se_channels=6, **BLOCKS[name]))


def frames_for(net: Any, batch: int = 5, frames: int = 19, seed: int = 0) -> Tensor:
    first = net.in_ if isinstance(net, SERes2NetBlock) else net
    return channels_last(noise(batch, first.conv.in_channels, frames, seed=seed))


def ecapa(dialect: str, **config: Any) -> Any:
    model = randomized(dialect, **config).train()
    return filled(model)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", LAYERS)
def test_layer(name: str, training: bool) -> None:
    net = tdnn(name).train(training)
    for x in (frames_for(net), frames_for(net).contiguous(), frames_for(net, 7, 1)):
        ops = assert_as_near_as_plain(net, [x])
        assert FORWARD & ops.keys() and ops[OF_WEIGHTS] and ops[OF_INPUTS]


def test_inputs_one_after_the_other() -> None:
    net = Several(filled(TdnnLayer(12, 17, 3)))
    wide = channels_last(noise(3, 20, 19))
    assert FORWARD & assert_as_near_as_plain(net, [wide[:, :5], wide[:, 8:14], noise(3, 1, 19)]).keys()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", BLOCKS)
def test_block(name: str, training: bool) -> None:
    net = block(name).train(training)
    ops = assert_as_near_as_plain(net, [frames_for(net)])
    assert sum(ops[op] for op in FORWARD) == BLOCKS[name]["scale"] + 1 == ops[OF_WEIGHTS]


@pytest.mark.parametrize("context", [True, False])
@pytest.mark.parametrize("dialect", _DIALECTS)
def test_pooling(dialect: str, context: bool) -> None:
    net = filled(poolings.create(DIALECTS[dialect].pooling, 20, bottleneck=6, global_context=context))
    for training in (True, False):
        ops = assert_as_near_as_plain(net.train(training), [channels_last(noise(5, 20, 19))])
        assert ops["conv_relu"] and ops[OF_WEIGHTS] and ops[OF_INPUTS]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dialect", _DIALECTS)
def test_network(dialect: str, training: bool) -> None:
    ops = assert_as_near_as_plain(ecapa(dialect).train(training), [noise(6, 25, 20)])
    # Blocks; stem, aggregation and attention.
    assert sum(ops[op] for op in FORWARD) == ops[OF_WEIGHTS] >= 3 * 5 + 3


@pytest.mark.parametrize("dialect", _DIALECTS)
def test_network_under_autocast(dialect: str) -> None:
    ops = assert_near_under_autocast(lambda: ecapa(dialect), lambda seed: [noise(16, 60, 20, seed=seed)])
    assert sum(ops[op] for op in FORWARD) >= 3 * 5 + 3


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", BLOCKS)
def test_block_under_autocast(name: str, training: bool) -> None:
    dtype = torch.float32 if training else torch.bfloat16
    ops = assert_near_under_autocast(
        lambda: block(name).train(training), lambda seed: [frames_for(block(name), 8, 40, seed).to(dtype)]
    )
    assert sum(ops[op] for op in FORWARD) == BLOCKS[name]["scale"] + 1


@pytest.mark.parametrize("name", LAYERS)
def test_layer_under_autocast(name: str) -> None:
    ops = assert_near_under_autocast(lambda: tdnn(name), lambda seed: [frames_for(tdnn(name), 8, 40, seed)])
    assert FORWARD & ops.keys()


def test_pooling_under_autocast() -> None:
    for dialect in _DIALECTS:
        ops = assert_near_under_autocast(
            lambda dialect=dialect: filled(poolings.create(DIALECTS[dialect].pooling, 20, bottleneck=6)),
            lambda seed: [channels_last(noise(8, 20, 40, seed=seed))],
        )
        assert ops["conv_relu"]


def test_inputs_of_two_types_under_autocast() -> None:
    def inputs(seed: int) -> list[Tensor]:
        wide = channels_last(noise(8, 12, 40, seed=seed))
        return [wide[:, :5].bfloat16(), wide[:, 5:]]

    assert FORWARD & assert_near_under_autocast(lambda: Several(filled(TdnnLayer(12, 17, 3))), inputs).keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_types_under_autocast_are_those_of_plain_modules(dtype: torch.dtype) -> None:
    for make in (tdnn, block, lambda: block("shortcut")):
        net = make()
        x = frames_for(net).to(dtype)
        types = []
        for backend in ("native", None):
            with trains_on(backend):
                types.append(under_autocast(net)(x).dtype)
        assert types[0] == types[1], make


@pytest.mark.parametrize("name", ["Wespeaker", "TaoRuijie", "Espnet", "Speechbrain"])
def test_accelerated_networks_of_other_toolkits(name: str) -> None:
    torch.manual_seed(0)
    net = spkfast.accelerate(filled(getattr(doubles, name)()))
    if name == "TaoRuijie":
        net.forward = functools.partial(net.forward, aug=False)
    ops = assert_as_near_as_plain(net, [noise(4, 800) if name == "TaoRuijie" else noise(4, 25, 20)])
    assert sum(ops[op] for op in FORWARD) >= 3 * 5


# Batch norm


def with_norms(net: Any, change: Callable[[Any], Any]) -> Any:
    for part in list(net.modules()):
        if isinstance(part, nn.BatchNorm1d):
            change(part)
    return net


def without_affine(net: Any) -> Any:
    for part in list(net.modules()):
        if isinstance(getattr(part, "bn", None), nn.BatchNorm1d):
            part.bn = nn.BatchNorm1d(part.bn.num_features, affine=False)
    return net


def without_statistics(net: Any) -> Any:
    for part in list(net.modules()):
        if isinstance(getattr(part, "bn", None), nn.BatchNorm1d):
            part.bn = nn.BatchNorm1d(part.bn.num_features, track_running_stats=False)
    return net


def with_bias_alone(net: Any) -> Any:
    return with_norms(net, lambda bn: setattr(bn, "weight", None))


NORMS: dict[str, Callable[[Any], Any]] = {
    "no momentum": lambda net: with_norms(net, lambda bn: setattr(bn, "momentum", None)),
    "momentum 0": lambda net: with_norms(net, lambda bn: setattr(bn, "momentum", 0.0)),
    "momentum 1": lambda net: with_norms(net, lambda bn: setattr(bn, "momentum", 1.0)),
    "eps": lambda net: with_norms(net, lambda bn: setattr(bn, "eps", 0.3)),
    "no affine map": without_affine,
    "no factor": with_bias_alone,
    "no running statistics": without_statistics,
    "half frozen": lambda net: (net[0].in_.bn.eval(), net[0].res[1].bn.eval(), net[1].bn.eval(), net)[-1],
    "all frozen": lambda net: with_norms(net, nn.Module.eval),
    "running statistics in training": lambda net: with_norms(net.eval(), lambda bn: bn.train()),
    "no bias": lambda net: (setattr(net[0].in_.conv, "bias", None), setattr(net[1].conv, "bias", None), net)[-1],
    "frozen weights of batch norm": lambda net: with_norms(net, lambda bn: bn.requires_grad_(False)),
}


@pytest.mark.parametrize("name", NORMS)
def test_batch_norm(name: str) -> None:
    net = filled(
        NORMS[name](nn.Sequential(SERes2NetBlock(16, scale=4, se_channels=6, se_bn=True), TdnnLayer(16, 9, 3)))
    )
    if "frozen" in name or "training" in name:  # modes, which filling resets
        NORMS[name](net)
    x = [channels_last(noise(5, 16, 19))]
    ops = assert_as_near_as_plain(net, x)
    assert sum(ops[op] for op in FORWARD) == 6
    assert_near_under_autocast(lambda: copy.deepcopy(net), lambda seed: [channels_last(noise(16, 16, 40, seed=seed))])


def test_statistics_of_several_steps() -> None:
    net = with_norms(
        nn.Sequential(block(), tdnn("1x1")).requires_grad_(False), lambda bn: setattr(bn, "momentum", None)
    )
    net[1].conv = nn.Conv1d(16, 17, 1)
    other = copy.deepcopy(net).double()
    for seed in range(3):
        x = noise(4, 16, 11, seed=seed)
        with torch.no_grad():  # the statistics follow without a gradient too
            _, ops = ran(lambda x=x: net(x))
            other(x.double())
        assert FORWARD & ops.keys()
    for (name, value), want in zip(net.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(value.double(), want.double(), rtol=2e-6, atol=2e-6, msg=name)
        if name.endswith("num_batches_tracked"):
            assert value == 3


def test_one_value_a_channel_is_refused_as_plain_modules_do() -> None:
    for net in (tdnn(), block()):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            net(frames_for(net, 1, 1))


# What plain modules must do


def hooked(register: str, path: str) -> Callable[[Any, list[None]], None]:
    def prepare(net: Any, calls: list[None]) -> None:
        getattr(net.get_submodule(path), register)(lambda *_: calls.append(None))

    return prepare


INNER = ["in_.conv", "in_", "res", "res.1", "res.1.bn", "out.bn", "se", "se.fc1"]
HOOKS = [
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
]


@pytest.mark.parametrize("path", INNER)
@pytest.mark.parametrize("register", HOOKS)
def test_hooks_inside_are_called(register: str, path: str) -> None:
    calls: list[None] = []
    net, x = block(), channels_last(noise(3, 16, 9))
    with trains_on(None):
        want = step(copy.deepcopy(net), [x])
    handle = getattr(net.get_submodule(path), register)(lambda *_: calls.append(None))
    got, ops = ran(lambda: step(net, [x]))
    assert len(calls) == 1
    # The layers inside that nobody watches run on kernels, each for itself.
    assert sum(ops[op] for op in FORWARD) == (4 if path.endswith(("conv", "bn")) else 5)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5)
    handle.remove()
    _, ops = ran(lambda: step(net, [x]))
    assert len(calls) == 1 and sum(ops[op] for op in FORWARD) == 5


def test_hooks_on_all_convolutions_switch_the_kernels_off() -> None:
    net = spkfast.models.create("ecapa_tdnn", feature_dim=6, channels=16, mfa_channels=8, se_channels=4, scale=4)
    handles = [part.register_forward_hook(lambda *_: None) for part in net.modules() if isinstance(part, nn.Conv1d)]
    assert not ran(lambda: net(noise(2, 15, 6)))[1]
    for handle in handles:
        handle.remove()
    assert FORWARD & ran(lambda: net(noise(2, 15, 6)))[1].keys()


@pytest.mark.parametrize("register", HOOKS)
def test_hooks_outside_leave_the_kernels(register: str) -> None:
    calls: list[None] = []
    net = block()
    getattr(net, register)(lambda *_: calls.append(None))
    _, ops = ran(lambda: step(net, [frames_for(net)]))
    assert len(calls) == 1 and sum(ops[op] for op in FORWARD) == 5


@pytest.mark.parametrize(
    "register",
    [
        nn_module.register_module_forward_hook,
        nn_module.register_module_forward_pre_hook,
        nn_module.register_module_full_backward_hook,
        nn_module.register_module_full_backward_pre_hook,
    ],
    ids=lambda register: register.__name__,
)
def test_hooks_of_all_modules_are_called(register: Callable[..., Any]) -> None:
    seen: list[nn.Module] = []
    net = block()
    handle = register(lambda part, *_: seen.append(part))
    try:
        net(frames_for(net).requires_grad_()).sum().backward()
    finally:
        handle.remove()
    assert {net.in_.conv, net.res[0].bn, net.se.fc1, net} <= set(seen)


class Halved(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class Tagged(Tensor):
    """A tensor of another class."""


def replaced_forward(net: Any) -> None:
    conv = net.in_.conv
    conv.forward = functools.partial(halved_forward, conv)


def halved_forward(conv: nn.Conv1d, x: Tensor) -> Tensor:
    return nn.Conv1d.forward(conv, x) / 2


def of_another_class(net: Any) -> None:
    net.in_.conv.__class__ = Halved


PREPARED: dict[str, Callable[[Any], Any]] = {
    "replaced forward": replaced_forward,
    "another class": of_another_class,
    "weight norm": lambda net: parametrizations.weight_norm(net.in_.conv),
    "orthogonal": lambda net: parametrizations.orthogonal(net.out.conv.eval()) and net,
    "float64 weights": lambda net: net.double(),
    "a layer in another's place": lambda net: setattr(net.in_, "bn", nn.LayerNorm(19)),
}


@pytest.mark.parametrize("name", PREPARED)
def test_other_modules_run_themselves(name: str) -> None:
    net = block()
    net(frames_for(net))
    PREPARED[name](net)
    results = []
    for backend in ("native", None):
        with trains_on(backend):
            other, x = copy.deepcopy(net), frames_for(net).to(next(net.parameters()).dtype)
            if name == "replaced forward":  # which copies take along, with the module that it was of
                replaced_forward(other)
            found, ops = ran(lambda other=other, x=x: step(other, [x]))
        results.append(found)
        if backend == "native":
            # Layers inside that know nothing of it may run on kernels.
            assert sum(ops[op] for op in FORWARD) < 5 and (name != "float64 weights" or not ops)
        else:
            assert not ops
    for key, value in results[1].items():
        torch.testing.assert_close(results[0][key], value, rtol=1e-4, atol=1e-5, msg=key)


def test_lengths_are_for_plain_modules() -> None:
    x, lengths = noise(3, 16, 19), torch.tensor([19, 4, 11])
    frames = real_frames(lengths, 19, torch.float32)
    layer = filled(TdnnLayer(16, 8, 3, padding_mode="reflect"))
    assert_plain(layer, [x], lambda other: lambda leaf: other(leaf, frames))
    pool = filled(poolings.create("astp", 16, bottleneck=6))
    assert_plain(pool, [x], lambda other: lambda leaf: other(leaf, lengths))


@pytest.mark.parametrize(("given", "count"), [("frames", 5), ("padding", 2)])
def test_lengths_of_a_block(given: str, count: int) -> None:
    # Layers inside that read one frame at a time, or are given no lengths, run on kernels.
    net, lengths = block("reflect"), torch.tensor([19, 4, 11])
    lengths_of = {given: real_frames(lengths, 19, torch.float32)}
    with trains_on(None):
        other = copy.deepcopy(net)
        want = step(other, [noise(3, 16, 19)], lambda x: other(x, **lengths_of))
    got, ops = ran(lambda: step(net, [noise(3, 16, 19)], lambda x: net(x, **lengths_of)))
    assert sum(ops[op] for op in FORWARD) == count
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["layer", "block"])
def test_groups_of_channels_are_for_plain_modules(kind: str) -> None:
    if kind == "layer":
        assert_plain(filled(TdnnLayer(16, 8, 3, groups=2)), [noise(3, 16, 19)])
        return
    net = filled(SERes2NetBlock(16, scale=4, se_channels=6, groups=2))
    ops = assert_as_near_as_plain(net, [noise(3, 16, 19)])
    assert sum(ops[op] for op in FORWARD) == 3  # the layers of Res2Net have one group each


def test_frames_of_one_utterance_alone() -> None:
    # Which a convolution takes, and batch norm does not.
    net, x = filled(TdnnLayer(16, 8, 3, batch_norm=False)), noise(16, 19)
    assert_plain(net, [x])
    with torch.no_grad():
        assert torch.equal(net.eval()(x), net.conv(x).relu())


def test_tensors_of_another_class() -> None:
    net = block()
    out, ops = ran(lambda: net(frames_for(net).as_subclass(Tagged)))
    assert not ops and isinstance(out, Tagged)


def test_other_types_of_autocast() -> None:
    assert_plain(tdnn(), [noise(3, 9, 19)], lambda net: under_autocast(net, torch.float16))


def test_other_types_of_weights() -> None:
    for dtype in (torch.bfloat16, torch.float64):
        assert_plain(tdnn().to(dtype), [noise(3, 9, 19).to(dtype)])


@pytest.mark.parametrize("make", [tdnn, block])
def test_functorch(make: Callable[[], Any]) -> None:
    net = make().eval()
    x, parameters = frames_for(net), dict(net.named_parameters())

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(net, values, x).square().sum()

    got, ops = ran(lambda: torch.func.grad(loss)(parameters, x))
    by_row, ops_by_row = ran(lambda: torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x[:, None]))
    assert not ops and not ops_by_row
    want = torch.autograd.grad(loss(parameters, x), list(parameters.values()))
    for name, value in zip(parameters, want, strict=True):
        tolerance = 1e-4 * float(value.abs().amax())
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=tolerance)
        torch.testing.assert_close(by_row[name].sum(0), value, rtol=1e-4, atol=tolerance)


def test_parameters_put_in_by_functional_call_get_gradients() -> None:
    net = block()
    values = {name: (value * 1.1).detach().requires_grad_() for name, value in net.named_parameters()}
    x = frames_for(net)
    out, ops = ran(lambda: torch.func.functional_call(net, values, x))
    assert FORWARD & ops.keys()
    got = torch.autograd.grad(out.square().sum(), list(values.values()))
    with trains_on(None):
        want = torch.autograd.grad(torch.func.functional_call(net, values, x).square().sum(), list(values.values()))
    for have, value in zip(got, want, strict=True):
        torch.testing.assert_close(have, value, rtol=1e-4, atol=1e-4 * float(value.abs().amax()))


def test_forward_mode_differentiation() -> None:
    for net in (tdnn().eval(), block().eval()):
        x = frames_for(net)
        v, h = noise(*x.shape, seed=5), 1e-6
        with forward_ad.dual_level():
            out, ops = ran(lambda net=net, x=x, v=v: net(forward_ad.make_dual(x, v)))
            tangent = forward_ad.unpack_dual(out).tangent
        assert not ops and tangent is not None
        exact = copy.deepcopy(net).double()
        with torch.no_grad():
            want = (exact(x.double() + h * v) - exact(x.double() - h * v)) / (2 * h)
        torch.testing.assert_close(tangent.double(), want, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced() -> None:
    for net in (tdnn().eval(), block().eval()):
        x = frames_for(net)
        traced = torch.jit.trace(net, x)
        assert "spkfast::" not in str(traced.inlined_graph)
        torch.testing.assert_close(traced(x), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_exported_programs_run_without_the_kernels(training: bool) -> None:
    for net in (tdnn().train(training), block().train(training)):
        x = frames_for(net)
        program = torch.export.export(copy.deepcopy(net), (x,))
        targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert not {name for name in targets if "spkfast" in name}
        torch.testing.assert_close(program.module()(x), net(x), rtol=1e-4, atol=1e-4)


def test_replicas_of_data_parallel() -> None:
    # As nn.parallel.replicate makes them: their parameters are tensors, and in no list of parameters.
    net, x = tdnn(), noise(3, 9, 19)
    want = net(x)
    replica = net._replicate_for_data_parallel()
    for name, child in net.named_children():
        inner = replica._modules[name] = child._replicate_for_data_parallel()
        for key, value in child._parameters.items():
            setattr(inner, key, None if value is None else value * 1)
    out = replica(x)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    out.square().sum().backward()
    assert net.conv.weight.grad.abs().amax() > 0


# Gradients that are wanted


def of_two_crops(rank: int, folder: Path) -> None:
    """What docs/training-kernels.md says of several processes on a CPU, to a file of the statistics of each."""
    torch.manual_seed(0)
    net = spkfast.models.create("ecapa_tdnn", feature_dim=6, channels=16, mfa_channels=8, se_channels=4, scale=4)
    with pytest.raises(ValueError, match="SyncBatchNorm layers only work with GPU modules"):
        DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(net)))
    ddp = DistributedDataParallel(spkfast.nn.SyncBatchNorm.convert(net))
    (_, ops) = ran(lambda: ddp(noise(4, 15, 6)[rank * 2 :][:2]).square().sum().backward())
    assert FORWARD & ops.keys()
    torch.save((net.state_dict(), [value.grad for value in net.parameters()]), folder / f"{rank}.pt")


@pytest.mark.skipif(not (distributed.is_available() and distributed.is_gloo_available()), reason="torch has no Gloo")
def test_synchronised_batch_norm_on_a_cpu(tmp_path: Path) -> None:
    processes.run(of_two_crops, 2, tmp_path)
    (one, gradients), (other, others) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(map(torch.equal, gradients, others))
    torch.manual_seed(0)
    net = spkfast.models.create("ecapa_tdnn", feature_dim=6, channels=16, mfa_channels=8, se_channels=4, scale=4)
    net(noise(4, 15, 6))
    names = [name for name in one if "running" in name]
    assert any(name.startswith("projector.") for name in names)
    for name in names:
        assert torch.equal(one[name], other[name])
        torch.testing.assert_close(one[name], net.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_frozen_inputs_and_weights_cost_no_gradients() -> None:
    net, x = tdnn(), noise(3, 9, 19)
    _, ops = ran(lambda: net(x).sum().backward())
    assert ops[OF_WEIGHTS] == 1 and not ops[OF_INPUTS]
    net.requires_grad_(False).zero_grad(set_to_none=True)
    leaf = x.clone().requires_grad_()
    _, ops = ran(lambda: net(leaf).sum().backward())
    assert ops[OF_INPUTS] == 1 and not ops[OF_WEIGHTS] and leaf.grad is not None
    assert all(value.grad is None for value in net.parameters())
    out, ops = ran(lambda: net(x))
    assert FORWARD & ops.keys() and not out.requires_grad


@pytest.mark.parametrize("part", ["in_", "res.1", "res.2.bn", "out.conv", "se", "shortcut"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradient_of_one_part(part: str, training: bool) -> None:
    net = filled(SERes2NetBlock(16, scale=4, se_channels=6, in_channels=9)).train(training)
    x = channels_last(noise(5, 9, 19))
    with trains_on(None):
        want = step(copy.deepcopy(net), [x])
    net.requires_grad_(False).get_submodule(part).requires_grad_(True)
    _, ops = ran(lambda: net(x).mul(noise(5, 16, 19, seed=7)).sum().backward())
    assert sum(ops[op] for op in FORWARD) == 5
    for name, value in net.named_parameters():
        assert (value.grad is not None) == name.startswith(part + ".")
        if value.grad is not None:
            exact = want[f"gradient of {name}"]
            torch.testing.assert_close(value.grad, exact, rtol=1e-4, atol=1e-4 * float(exact.abs().amax()))


def test_no_gradient_in_evaluation_trains_nothing() -> None:
    net = block().eval()
    with torch.no_grad():
        _, ops = ran(lambda: net(frames_for(net)))
    assert not ops
    net.requires_grad_(False)
    assert not ran(lambda: net(frames_for(net)))[1]


def test_gradients_add_up() -> None:
    net, (first, second) = block(), (frames_for(block()), channels_last(noise(2, 16, 7, seed=3)))
    for x in (first, second):
        (net(x) * noise(*x.shape, seed=9)).sum().backward()
    got = [value.grad for value in net.parameters()]
    wanted = [torch.zeros_like(value) for value in net.parameters()]
    other = block()
    for x in (first, second):
        grads = torch.autograd.grad((other(x) * noise(*x.shape, seed=9)).sum(), list(other.parameters()))
        wanted = [total + grad for total, grad in zip(wanted, grads, strict=True)]
    for have, want in zip(got, wanted, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-6, atol=1e-6)


def test_second_derivative() -> None:
    for net in (tdnn(), tdnn("no batch norm"), tdnn().eval(), block()):
        x = frames_for(net).requires_grad_()
        (grad,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        with pytest.raises(spkfast.InputError, match="the training kernels have no second derivative"):
            grad.square().sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool) -> None:
    net = nn.Sequential(block(), filled(TdnnLayer(16, 16, 3)))
    with torch.autocast("cpu", torch.bfloat16):
        other = copy.deepcopy(net)
        want = step(other, [noise(5, 16, 19)])
        found, ops = ran(lambda: step(net, [noise(5, 16, 19)], lambda x: checkpoint(net, x, use_reentrant=reentrant)))
    assert sum(ops[op] for op in FORWARD) == 12  # once more in the backward pass
    for name, value in want.items():
        if kind(name) != "statistics":  # which followed twice, as those of plain modules do
            assert torch.equal(found[name], value), name


def test_copies_and_pickles_after_a_step() -> None:
    for make in (tdnn, block, lambda: ecapa("espnet")):
        net = make()
        x = noise(4, 25, 20) if isinstance(net, spkfast.models.SpeakerModel) else frames_for(net)
        keys, size = list(net.state_dict()), len(pickle.dumps(net))
        step(net, [x])
        net.zero_grad(set_to_none=True)
        assert list(net.state_dict()) == keys and len(pickle.dumps(net)) < 1.01 * size + 200
        copies = [copy.deepcopy(net), pickle.loads(pickle.dumps(net))]
        want = step(net, [x])
        for other in copies:
            got, ops = ran(lambda other=other, x=x: step(other, [x]))
            assert FORWARD & ops.keys()
            for name, value in want.items():
                assert torch.equal(got[name], value), name


def test_modes_in_turn() -> None:
    # Packed weights of inference do not outlive a step.
    net, x = block(), frames_for(block())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        net.train()
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        net.eval()
        with torch.no_grad():
            got = net(x)
            torch.testing.assert_close(got.double(), copy.deepcopy(net).double()(x.double()), rtol=1e-4, atol=1e-4)


# torch.compile


class Watched:
    """A backend of torch.compile that notes which ops its graphs have."""

    def __init__(self) -> None:
        self.ops: Counter[str] = Counter()
        self.graphs = 0

    def __call__(self, module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        targets = [str(node.target) for node in module.graph.nodes if node.op == "call_function"]
        self.ops.update(target.split(".")[1] for target in targets if target.startswith("spkfast."))
        compiled: Callable[..., Any] = torch._dynamo.lookup_backend("aot_eager")(module, inputs)
        return compiled


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["layer", "no batch norm", "reflect", "block", "block, first", "frozen", "pooling"])
def test_compiled(name: str, autocast: bool) -> None:
    net: Any = {
        "layer": tdnn,
        "no batch norm": lambda: tdnn("no batch norm"),
        "reflect": lambda: tdnn("reflect"),
        "block": block,
        "block, first": lambda: block("shortcut, first, reflect"),
        "frozen": lambda: block("se_bn").eval(),
        "pooling": lambda: filled(poolings.create("astp", 16, bottleneck=6)),
    }[name]()
    x = noise(4, 16, 13) if name == "pooling" else frames_for(net, 4, 13)
    backend, other = Watched(), copy.deepcopy(net)

    def cast(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*leaves: Tensor) -> Any:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return call(*leaves)

        return run

    compiled = torch.compile(net, fullgraph=True, backend=backend)
    for _ in range(2):
        got, want = step(net, [x], cast(compiled)), step(other, [x], cast(other))
        assert_same_kinds(got, want)
        for key, value in want.items():
            error = float((got[key].double() - value.double()).abs().amax())
            assert error <= (1e-2 if autocast else 1e-5) * max(1.0, float(value.abs().amax())), f"{key}: {error:.3g}"
        net.zero_grad()
        other.zero_grad()
    assert backend.graphs == 1
    expected = {"pooling": 1 + autocast, "block": 5, "block, first": 3, "frozen": 3}.get(name, 1)
    assert sum(backend.ops[op] for op in FORWARD) == expected


@pytest.mark.full
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_by_inductor() -> None:
    net, x = block(), frames_for(block(), 4, 13)
    other = copy.deepcopy(net)
    compiled = torch.compile(net, fullgraph=True)
    for model, call in ((net, compiled), (other, other)):  # compiles, and is watched meanwhile
        step(model, [x], call)
        model.zero_grad()
    got, ops = ran(lambda: step(net, [x], compiled))
    assert sum(ops[op] for op in FORWARD) == 5
    for key, value in step(other, [x]).items():
        torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_for_any_number_of_frames() -> None:
    net = block("reflect")
    graphs = []
    for trains in ("native", None):
        torch._dynamo.reset()
        backend, ours, other = Watched(), copy.deepcopy(net), copy.deepcopy(net)
        with trains_on(trains):
            compiled = torch.compile(ours, fullgraph=True, backend=backend, dynamic=True)
            for batch, frames in ((4, 13), (3, 17), (5, 31), (6, 23)):
                x = frames_for(net, batch, frames)
                torch.testing.assert_close(compiled(x), other(x), rtol=1e-4, atol=1e-5)
        graphs.append(backend.graphs)
        assert sum(backend.ops[op] for op in FORWARD) == (5 * backend.graphs if trains else 0)
    assert graphs[0] <= graphs[1] <= 2


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("prepare", [replaced_forward, of_another_class, hooked("register_forward_hook", "in_.conv")])
def test_compiled_modules_that_do_more_run_themselves(prepare: Callable[..., Any]) -> None:
    calls: list[None] = []
    net = block()
    x = frames_for(net, 4, 13)
    prepare(net, calls) if prepare not in (replaced_forward, of_another_class) else prepare(net)
    with trains_on(None):
        want = copy.deepcopy(net)(x) if prepare is not replaced_forward else net(x)
    backend = Watched()
    calls.clear()
    got = torch.compile(net, backend=backend)(x)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert sum(backend.ops[op] for op in FORWARD) < 5


# Training


def classes(batch: int, frames: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features of speakers who differ by their mean and by how frames follow one another."""
    generator = torch.Generator().manual_seed(seed)
    speakers = torch.randint(0, 6, (batch,), generator=generator)
    own = noise(6, 20, seed=99)[speakers]
    speed = 0.3 + 0.2 * speakers[:, None]
    carrier = torch.sin(speed * torch.arange(frames) + 6 * torch.rand(batch, 1, generator=generator))
    x = torch.randn(batch, frames, 20, generator=generator) + own[:, None] * carrier[..., None] + 0.4 * own[:, None]
    return x, speakers


def losses(
    backend: str | None,
    steps: int,
    *,
    autocast: bool = False,
    dialect: str = "wespeaker",
    dtype: torch.dtype = torch.float32,
    bent: bool = True,
    moved: float = 0.0,
) -> list[float]:
    """Losses of a run; unless ``bent`` no ReLU meets negative values; ``moved`` changes the first weights a little."""
    torch.manual_seed(0)
    config: dict[str, Any] = {"channels": 32, "mfa_channels": 48, "feature_dim": 20, "embedding_dim": 16, "scale": 4,
                              "se_channels": 8, "attention_channels": 12, "dialect": dialect}  # fmt: skip
    net, head = spkfast.models.create("ecapa_tdnn", **config).to(dtype), MarginSoftmaxLoss(16, 6, scale=8.0).to(dtype)
    with torch.no_grad():
        for part in net.modules() if not bent else ():
            for layer in (getattr(part, "conv", None), getattr(part, "fc1", None)):
                if layer is not None:
                    layer.bias.fill_(20)
        for value in net.parameters() if moved else ():
            value *= 1 + moved
    optimizer = torch.optim.SGD([*net.parameters(), *head.parameters()], lr=0.003, weight_decay=1e-4)
    found = []
    with trains_on(backend):
        for seed in range(steps):
            x, speakers = classes(32, 30, seed)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = head(net(x.to(dtype)), speakers)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(float(loss.detach()))
    return found


@functools.cache
def plain_losses(dialect: str, bent: bool = True) -> list[float]:
    return losses(None, 50, dialect=dialect, dtype=torch.float64, bent=bent)


def furthest(got: list[float], want: list[float]) -> float:
    return max(abs(have - value) for have, value in zip(got, want, strict=True))


@pytest.mark.parametrize("dialect", ["wespeaker", "speechbrain"])
def test_losses_of_fifty_steps(dialect: str) -> None:
    """A value that falls on the other side of a ReLU's 0 changes what follows, in plain torch too: here none does."""
    want = plain_losses(dialect, bent=False)
    assert sum(want[-5:]) < 0.5 * sum(want[:5])  # it learns
    assert furthest(losses("native", 50, dialect=dialect, bent=False), want) <= 1e-3


@pytest.mark.parametrize("dialect", ["wespeaker", "speechbrain"])
def test_losses_of_fifty_steps_stay_as_close_as_those_of_torch(dialect: str) -> None:
    want = plain_losses(dialect)
    assert sum(want[-5:]) < 0.5 * sum(want[:5])
    plain = [losses(None, 50, dialect=dialect, moved=moved) for moved in (0.0, 2e-7, -2e-7, 5e-7)]
    own = max(furthest(each, want) for each in plain)
    assert furthest(losses("native", 50, dialect=dialect), want) <= max(1e-3, 4 * own)


@pytest.mark.parametrize("dialect", ["wespeaker", "speechbrain"])
def test_losses_of_fifty_steps_under_autocast(dialect: str) -> None:
    got, want = losses("native", 50, autocast=True, dialect=dialect), plain_losses(dialect)
    assert 1e-6 < furthest(got, want) <= 3e-2


def test_losses_of_triton_interpreted(require: Callable[[str, bool, str], None]) -> None:
    require("triton", importlib.util.find_spec("triton") is not None, "there is no Triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton is compiled here, and its kernels run on a GPU")
    got = losses("triton", 4)
    assert furthest(got, plain_losses("wespeaker")[:4]) <= 1e-3


# What surrounds a layer


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("make", [tdnn, block])
def test_outputs_can_be_changed_in_place(make: Callable[[], Any], mode: str) -> None:
    net = make().train(mode == "train")
    x = frames_for(net, 4, 13)
    plain, found = copy.deepcopy(net), []
    for backend, model in (("native", net), (None, plain)):
        with trains_on(backend):
            y = model(x.clone().requires_grad_())
            y += 1
            (2 * nn.functional.relu_(y)).square().sum().backward()
        found.append([value.grad for value in model.parameters()])
    for got, want in zip(*found, strict=True):
        assert float((got - want).norm()) <= 1e-4 * float(want.norm()) + 1e-3


@pytest.mark.parametrize(
    "change",
    [
        {"stride": (2,)},
        {"padding": (0,)},
        {"padding_mode": "circular"},
        {"dilation": (3,)},
    ],
    ids=str,
)
def test_changed_convolutions_run_themselves(change: dict[str, Any]) -> None:
    net = TdnnLayer(6, 5, 3)
    for name, value in change.items():
        setattr(net.conv, name, value)
    x = torch.randn(3, 6, 17)
    got, ops = ran(lambda: net(x))
    assert not FORWARD & ops.keys()
    torch.testing.assert_close(got, net.bn(net.conv(x).relu()))


def test_running_statistics_may_be_taken_away() -> None:
    net = TdnnLayer(6, 5, 3)
    net.bn.running_mean = net.bn.running_var = None
    got, ops = ran(lambda: net(torch.randn(3, 6, 17)))
    assert FORWARD & ops.keys() and got.isfinite().all()
