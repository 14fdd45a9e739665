"""Layers on the kernels of inference: nearness at each precision, when they apply, packed weights, calibration."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import spkfast.nn.se_res2net as layers
from spkfast import models
from spkfast.errors import InputError
from spkfast.models.ecapa_tdnn import DIALECTS
from spkfast.nn import SERes2NetBlock, calibrate, input_ranges, poolings, set_input_ranges, set_precision
from spkfast.nn.inference import Kept, inference_layers
from tests.models.test_ecapa_tdnn import randomized

_DIALECTS = [name for name in DIALECTS if name != "3dspeaker"]  # speechbrain by another name


class Runs(list[None]):
    """One entry for each block that ran on its kernels."""

    def of(self, function: Callable[[], Any]) -> tuple[Any, int]:
        before = len(self)
        return function(), len(self) - before


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    found, run = Runs(), layers.run_packed_block

    def counted(*args: Any, **options: Any) -> Tensor:
        found.append(None)
        return run(*args, **options)

    monkeypatch.setattr(layers, "run_packed_block", counted)
    return found


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    found, pack = Runs(), layers.pack_block

    def counted(*args: Any, **options: Any) -> Any:
        found.append(None)
        return pack(*args, **options)

    monkeypatch.setattr(layers, "pack_block", counted)
    return found


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of unlike length, whose padding holds NaN."""
    lengths = torch.tensor([40, 31, 9, 1])
    features = torch.randn(4, 40, 20, generator=torch.Generator().manual_seed(seed))
    return features.masked_fill(torch.arange(40)[:, None] >= lengths[:, None, None], torch.nan), lengths


def plain(model: nn.Module, *inputs: Any) -> Tensor:
    """What the modules themselves give: with a gradient, the kernels never run."""
    with torch.enable_grad():
        return model(*inputs).detach()


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("dialect", _DIALECTS)
def test_precisions_are_near(dialect: str, runs: Runs) -> None:
    model = randomized(dialect)
    features, lengths = batch()
    want = plain(copy.deepcopy(model).double(), features.double(), lengths)
    calibrate(model, [batch(seed) for seed in range(1, 4)])
    assert not runs  # the modules are watched
    with torch.no_grad():
        got, count = runs.of(lambda: model(features, lengths))
        assert count == 3 and relative_error(got, want) < 2e-5
        for precision, bound in (("bf16", 0.9995), ("int8", 0.995)):
            set_precision(model, precision)
            got, count = runs.of(lambda: model(features, lengths))
            cosine = F.cosine_similarity(got.double(), want)
            assert got.dtype == torch.float32 and count == 3 and bound < cosine.min() and cosine.max() < 1 - 1e-9
        set_precision(model, "fp32")
        assert relative_error(model(features, lengths), want) < 2e-5


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("dialect", _DIALECTS)
def test_row_in_batch_equals_row_alone(dialect: str, precision: str) -> None:
    model = randomized(dialect)
    features, lengths = batch()
    calibrate(model, [batch(1)])
    set_precision(model, precision)
    with torch.no_grad():
        together = model(features, lengths)
        for row, length in zip(range(4), lengths.tolist(), strict=True):
            alone = model(features[row : row + 1, :length])
            assert relative_error(together[row : row + 1], alone) < 1e-5


def step(make: Callable[[Any], torch.optim.Optimizer]) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        optimizer = make(model.parameters())
        with torch.enable_grad():
            model(*batch()).square().mean().backward()
        optimizer.step()

    return change


def load(assign: bool) -> Callable[[nn.Module], object]:
    return lambda model: model.load_state_dict(randomized("wespeaker", seed=7).state_dict(), assign=assign)


def set_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.1


def change_data_in_place(model: nn.Module) -> None:
    """Which torch does not count."""
    for parameter in model.parameters():
        parameter.data.mul_(1.1)
    model.eval()


def change_dilation(conv: Any, dilation: int) -> None:
    conv.dilation = conv.padding = (dilation,)


def replace(name: str) -> Callable[[nn.Module], None]:
    # Another one at each call: what was packed for a network would be kept for the next one.
    return lambda model: model.set_submodule(name, randomized("wespeaker", seed=7).get_submodule(name))


def to_and_back(model: nn.Module) -> None:
    model.to(torch.bfloat16).to(torch.float32)


def fused_without_gradients(model: nn.Module) -> None:
    """As a step that empties them at its end does."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=True)
    with torch.enable_grad():
        model(*batch()).square().mean().backward()
    optimizer.register_step_post_hook(lambda *_: optimizer.zero_grad(set_to_none=True))
    optimizer.step()


CHANGES: dict[str, Callable[[Any], Any]] = {
    "sgd": step(lambda parameters: torch.optim.SGD(parameters, lr=0.01)),
    "foreach": step(lambda parameters: torch.optim.Adam(parameters, lr=0.01, foreach=True)),
    "fused": step(lambda parameters: torch.optim.Adam(parameters, lr=0.01, fused=True)),
    "load_state_dict": load(assign=False),
    "load_state_dict, assign": load(assign=True),
    "p.data =": set_data,
    "p.data in place": change_data_in_place,
    "p in place": lambda model: model.encoder.blk2.out.conv.weight.mul_(1.5),
    "buffer in place": lambda model: model.encoder.blk2.res[1].bn.running_mean.add_(1),
    "squeeze-and-excitation": lambda model: model.encoder.blk2.se.fc2.bias.add_(1),
    "eps": lambda model: setattr(model.encoder.blk2.out.bn, "eps", 0.5),
    "all dilations": lambda model: [change_dilation(layer.conv, 5) for layer in model.encoder.blk2.res],
    "fused, without gradients": fused_without_gradients,
    "stem": lambda model: model.encoder.stem.conv.bias.add_(1),
    "pooling": lambda model: model.pooling.fc1.weight.mul_(3),
    "to": to_and_back,
    **{
        f"replaced {name}": replace(name)
        for name in ("encoder.blk1", "encoder.blk1.out", "encoder.blk2.res.1.conv", "encoder.blk3.out.bn", "pooling")
    },
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_packed_again(change: str, runs: Runs) -> None:
    model, inputs = randomized("wespeaker"), batch()
    with torch.no_grad():
        before = model(*inputs)
        CHANGES[change](model)
        got, count = runs.of(lambda: model(*inputs))
    assert count == 3
    assert relative_error(got, plain(model, *inputs)) < 1e-5 < relative_error(got, before)


def test_weights_are_packed_once(packs: Runs) -> None:
    model = randomized("wespeaker")
    with torch.no_grad():
        _, count = packs.of(lambda: [model(*batch(seed)) for seed in range(3)])
        assert count == 3
        set_precision(model, "bf16")
        assert packs.of(lambda: model(*batch()))[1] == 3
        assert packs.of(lambda: model(*batch()))[1] == 0
        model.eval()
        assert packs.of(lambda: model(*batch()))[1] == 3


def register(name: str, kind: str) -> Callable[[nn.Module, Callable[..., None]], Any]:
    return lambda model, hook: getattr(model.get_submodule(name), kind)(hook)


def register_global(model: nn.Module, hook: Callable[..., None]) -> Any:
    return nn.modules.module.register_module_forward_hook(hook)


@pytest.mark.parametrize(
    ("register", "on_kernels"),
    [
        (register("encoder.blk2.out.conv", "register_forward_hook"), 2),
        (register("encoder.blk2.res.0", "register_forward_pre_hook"), 2),
        (register("encoder.blk2.res", "register_forward_hook"), 2),
        (register("encoder.blk2.se", "register_forward_hook"), 2),
        (register("encoder.blk2.se.fc1", "register_forward_hook"), 2),
        (register("encoder.blk2", "register_forward_hook"), 3),  # outside: it sees what it would see
        (register("encoder.stem.bn", "register_forward_hook"), 3),
        (register_global, 0),
    ],
    ids=["conv", "res.0 before", "res", "se", "se.fc1", "block", "stem", "global"],
)
def test_hooks_are_called(register: Callable[..., Any], on_kernels: int, runs: Runs) -> None:
    model, inputs, calls = randomized("wespeaker"), batch(), Runs()
    with torch.no_grad():
        want = model(*inputs)
        handle = register(model, lambda *_: calls.append(None))
        got, count = runs.of(lambda: model(*inputs))
        handle.remove()
        assert calls and count == on_kernels and relative_error(got, want) < 1e-5
        assert runs.of(lambda: model(*inputs))[1] == 3


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("dialect", ["wespeaker", "taoruijie"])  # the latter adds what blocks give
def test_hook_in_one_block_at_a_precision(dialect: str, precision: str) -> None:
    """That block is computed in the type of its weights, the others are not, and all fit together."""
    model, inputs = randomized(dialect), batch()
    want = plain(model, *inputs)
    calibrate(model, [batch(1)])
    set_precision(model, precision)
    for name in ("encoder.stem.conv", "encoder.blk1.in_", "encoder.blk2.in_", "encoder.mfa.conv"):
        handle = model.get_submodule(name).register_forward_hook(lambda *_: None)
        with torch.no_grad():
            assert F.cosine_similarity(model(*inputs), want).min() > 0.995, name
        handle.remove()


def test_gradients_come_from_the_modules(runs: Runs) -> None:
    model, inputs = randomized("wespeaker"), batch()
    untouched = copy.deepcopy(model)
    with torch.no_grad():
        model(*inputs)
    runs.clear()
    for training in (False, True):
        for net in (model, untouched):
            net.train(training)
            net(*inputs).square().sum().backward()
    assert not runs
    for got, want in zip(model.parameters(), untouched.parameters(), strict=True):
        assert got.grad is not None and want.grad is not None and torch.equal(got.grad, want.grad)
    assert model.encoder.stem.conv.weight.grad.abs().max() > 0


def test_gradient_of_the_input_of_a_frozen_network(runs: Runs) -> None:
    model = randomized("wespeaker").requires_grad_(False)
    features, lengths = batch()
    leaf = features.clone().requires_grad_()
    model(leaf, lengths).square().sum().backward()
    assert leaf.grad is not None and leaf.grad[0].abs().max() > 0 and not runs
    assert runs.of(lambda: model(features, lengths))[1] == 3


@pytest.mark.parametrize(
    "part", ["encoder.stem", "encoder.blk2", "encoder.blk3", "encoder.mfa", "pooling", "projector"]
)
def test_gradient_of_one_part_of_a_frozen_network(part: str) -> None:
    model, inputs = randomized("wespeaker"), batch()
    model(*inputs).square().sum().backward()
    want = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    model.requires_grad_(False).get_submodule(part).requires_grad_(True)
    model(*inputs).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith(part + ".")
        if parameter.grad is not None:
            bound = 1e-4 * want[name].abs().max() + 1e-5
            assert (parameter.grad - want[name]).abs().max() < bound, name


def test_forward_mode_differentiation() -> None:
    block = randomized("wespeaker").encoder.blk1
    x = torch.randn(2, 32, 30)
    tangents = []
    for wanted in (True, False):
        block.requires_grad_(wanted)
        with forward_ad.dual_level():
            tangents.append(forward_ad.unpack_dual(block(forward_ad.make_dual(x, torch.ones_like(x)))).tangent)
    assert tangents[0] is not None and tangents[0].abs().max() > 0
    assert tangents[1] is not None and torch.equal(*tangents)


def test_copies_and_state_dict() -> None:
    model, inputs = randomized("wespeaker"), batch()
    keys = list(model.state_dict())
    calibrate(model, [inputs])
    set_precision(model, "int8")
    size = len(pickle.dumps(model))
    with torch.no_grad():
        want = model(*inputs)
        assert list(model.state_dict()) == keys
        assert len(pickle.dumps(model)) < 1.01 * size  # packed weights stay out
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(*inputs), want)
            other.encoder.blk1.out.conv.weight.zero_()
            other.encoder.blk1.input_ranges = {}
            assert not torch.equal(set_precision(other, "bf16")(*inputs), want)
            assert torch.equal(model(*inputs), want)


def test_compiles_and_exports(runs: Runs) -> None:
    model, inputs = set_precision(randomized("wespeaker"), "bf16"), batch()
    want = plain(model, *inputs)
    with torch.no_grad():
        model(*inputs)
        runs.clear()
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        program = torch.export.export(model, inputs).module()
        for run in (compiled, program):
            assert relative_error(run(*inputs), want) < 1e-5
    assert not runs


def halved(convolution: nn.Conv1d) -> nn.Module:
    class Halved(nn.Conv1d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / 2

    other = Halved(convolution.in_channels, convolution.out_channels, 1)
    other.load_state_dict(convolution.state_dict())
    return other


def halved_inside(convolution: nn.Conv1d) -> nn.Module:
    class HalvedInside(nn.Conv1d):
        def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(x, weight, bias) / 2

    other = HalvedInside(convolution.in_channels, convolution.out_channels, 1)
    other.load_state_dict(convolution.state_dict())
    return other


class Adapted(nn.Module):
    """A layer with an addition, as adapters of other packages wrap it."""

    def __init__(self, base: nn.Conv1d) -> None:
        super().__init__()
        self.base, self.added = base, nn.Conv1d(base.in_channels, base.out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.added(x)


def patch(convolution: nn.Conv1d) -> nn.Module:
    forward = convolution.forward
    convolution.forward = lambda x: forward(x) / 2  # type: ignore[method-assign]
    return convolution


def old_weight_norm(convolution: nn.Conv1d) -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(convolution)


@pytest.mark.parametrize(
    "other",
    [
        halved,
        halved_inside,
        Adapted,
        patch,
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        old_weight_norm,
    ],
    ids=lambda other: other.__name__,
)
def test_modules_that_do_more_run_themselves(other: Callable[[nn.Conv1d], nn.Module], runs: Runs) -> None:
    model, inputs = randomized("wespeaker"), batch()
    with torch.no_grad():
        model(*inputs)
        out = model.encoder.blk1.out
        out.conv = other(out.conv)
        model.eval()
        got, count = runs.of(lambda: model(*inputs))
        assert count == 2 and relative_error(got, plain(model, *inputs)) < 1e-5
        for parameter in out.parameters():
            parameter.mul_(1.5)
        got = model(*inputs)
    assert relative_error(got, plain(model, *inputs)) < 1e-5


class Doubled(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("called", [True, False], ids=["after a call", "at once"])
@pytest.mark.parametrize(
    "change",
    [
        {"stride": (2,)},
        {"padding": (0,)},
        {"padding": (1,), "padding_mode": "circular"},
        {"dilation": (1,)},
        {"__class__": Doubled},
    ],
    ids=str,
)
@pytest.mark.parametrize("reflect", [False, True])
def test_changed_convolutions_run_themselves(reflect: bool, change: dict[str, Any], called: bool) -> None:
    net = layers.TdnnLayer(6, 5, 3, 2, padding_mode="reflect" if reflect else "zeros").eval()
    x = torch.randn(3, 6, 17)
    with torch.no_grad():
        if called:
            net(x)
        for name, value in change.items():
            setattr(net.conv, name, value)
        net.conv._reversed_padding_repeated_twice = [1, 1]
        assert (net.obstacle() is None) == (reflect and change == {"padding": (0,)})  # as it was made
        got, want = net(x), plain(copy.deepcopy(net), x)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("change", ["dilation", "reflect", "taps of in_", "stride of the shortcut"])
def test_changed_blocks_run_themselves(change: str) -> None:
    net = SERes2NetBlock(16, scale=4, se_channels=4, in_channels=8).eval()
    x = torch.randn(2, 8, 13)
    with torch.no_grad():
        net(x)
        if change == "dilation":
            change_dilation(net.res[1].conv, 2)
            words = "Res2 convolutions of different dilations, taps or padding"
        elif change == "reflect":
            net.res[2] = layers.TdnnLayer(4, 4, 3, padding_mode="reflect").eval()
            words = "Res2 convolutions of different dilations, taps or padding"
        elif change == "taps of in_":
            net.in_ = layers.TdnnLayer(8, 16, 3).eval()
            words = "more than one tap outside of the Res2 convolutions"
        else:
            net.shortcut.padding, net.shortcut.padding_mode = (1,), "circular"
            net.shortcut._reversed_padding_repeated_twice = [0, 0]
            words = "a convolution of another stride or padding"
        got = net(x)
        assert net.obstacle() == words
        torch.testing.assert_close(got, plain(copy.deepcopy(net), x))


def test_same_padding_is_that_of_the_kernels() -> None:
    net, x = layers.TdnnLayer(6, 5, 3, 2).eval(), torch.randn(3, 6, 17)
    with torch.no_grad():
        want = net(x)
        net.conv.padding = "same"
        assert net.obstacle() is None and torch.equal(net(x), want)


def test_the_first_reason_is_told() -> None:
    layer = layers.TdnnLayer(8, 8)
    layer.conv = halved_inside(layer.conv)
    assert layer.double().obstacle() == "a HalvedInside of another class than torch's"


def test_added_batch_norm_counts() -> None:
    layer = layers.TdnnLayer(8, 8, batch_norm=False).eval()
    x = torch.randn(1, 8, 10)
    with torch.no_grad():
        before = layer(x)
        layer.bn = nn.BatchNorm1d(8).eval()
        layer.bn.running_mean.fill_(1)
        torch.testing.assert_close(layer(x), (before - 1) / (1 + 1e-5) ** 0.5)


def test_batch_norm_in_training_mode_alone(runs: Runs) -> None:
    model = randomized("wespeaker")
    model.encoder.blk1.out.bn.train()
    with torch.no_grad():
        assert runs.of(lambda: model(torch.randn(2, 30, 20)))[1] == 2
    assert model.encoder.blk1.out.bn.num_batches_tracked == 1


def test_synchronised_batch_norm_runs_on_kernels(runs: Runs) -> None:
    model, inputs = randomized("wespeaker"), batch()
    with torch.no_grad():
        want = model(*inputs)
        other = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)).eval()
        assert isinstance(other.encoder.blk1.out.bn, nn.SyncBatchNorm)
        got, count = runs.of(lambda: other(*inputs))
    assert count == 3 and torch.equal(got, want)
    assert all(layer.obstacle() is None for layer in inference_layers(other).values())


def test_what_kernels_cannot_compute_is_told() -> None:
    for layer, words in (
        (layers.TdnnLayer(8, 8, groups=2), "2 groups of channels"),
        (SERes2NetBlock(32, groups=2), "2 groups of channels"),
        (layers.TdnnLayer(8, 8).double(), "float64 weights"),
        (poolings.create("astp", 8, shared_weights=True), "one weight per frame for all channels"),
    ):
        assert layer.obstacle() == words
    for norm in (lambda block: block.out, lambda block: block.se):
        block = SERes2NetBlock(32, se_bn=True)
        assert block.obstacle() is None
        norm(block).bn = nn.BatchNorm1d(norm(block).bn.num_features, track_running_stats=False)
        assert block.obstacle() == "batch norm without running statistics"
    layer = layers.TdnnLayer(8, 8)
    layer.conv = halved_inside(layer.conv)
    assert layer.obstacle() == "a HalvedInside of another class than torch's"


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("name", poolings.list())
def test_every_pooling_at_a_precision(name: str, precision: str) -> None:
    torch.manual_seed(0)
    model = models.create(
        "ecapa_tdnn", feature_dim=20, channels=32, mfa_channels=48, embedding_dim=24, se_channels=8, scale=4,
        pooling=name,
    ).eval()  # fmt: skip
    inputs = batch()
    want = plain(model, *inputs)
    calibrate(model, [(inputs[0][:1], inputs[1][:1])])
    set_precision(model, precision)
    with torch.no_grad():
        frames, lengths = model.encoder(*inputs)
        pooled, got = model.pooling(frames, lengths), model(*inputs)
        model.pooling.precision = "fp32"  # it then gives the type of what the encoder gives
        mixed = model(*inputs)
    assert pooled.dtype == torch.float32
    for found in (got, mixed):
        assert found.dtype == torch.float32 and not torch.equal(found, want)
        assert F.cosine_similarity(found, want)[:3].min() > 0.99


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("channels", [7, 9, 16])
def test_wrong_number_of_channels(channels: int, precision: str) -> None:
    x = torch.randn(2, 8, 20)
    for layer in (layers.TdnnLayer(8, 8), SERes2NetBlock(8, scale=4, se_channels=4)):
        calibrate(layer, [x])
        set_precision(layer.eval(), precision)
        for _ in range(2):  # before and after the weights are packed
            with torch.no_grad(), pytest.raises((InputError, RuntimeError), match=r"channels|size"):
                layer(torch.randn(2, channels, 20))
            with torch.no_grad():
                layer(x)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_wrong_inputs_are_named(training: bool) -> None:
    for layer in (layers.TdnnLayer(8, 8, 3), SERes2NetBlock(8, scale=4, se_channels=4)):
        layer.train(training)
        with torch.set_grad_enabled(training):
            with pytest.raises(ValueError, match=r"^x must have 8 channels, got 7"):
                layer(torch.randn(2, 7, 20))
            for shape in ((8,), (8, 8), (2, 8, 20, 1)):
                with pytest.raises(InputError, match=r"^x must have shape \(B, C, T\), got \(" + str(shape)[1:-1]):
                    layer(torch.randn(shape))


def test_meta_tensors_have_shapes() -> None:
    for training in (False, True):
        layer = SERes2NetBlock(8, scale=4, se_channels=4).train(training).to("meta")
        pool = poolings.create("astp", 8).train(training).to("meta")
        out = pool(layer(torch.randn(2, 8, 20, device="meta")))
        assert out.is_meta and out.shape == (2, 16)


def test_replicas_pack_for_themselves() -> None:
    layer = layers.TdnnLayer(8, 8).eval()
    with torch.no_grad():
        layer(torch.randn(1, 8, 10))
    replica = layer._replicate_for_data_parallel()
    assert {"_kept", "_inside"} <= layer.__dict__.keys() and not {"_kept", "_inside"} & replica.__dict__.keys()


def test_inference_mode(runs: Runs) -> None:
    model, inputs = randomized("wespeaker"), batch()
    want = plain(model, *inputs)
    with torch.inference_mode():
        assert relative_error(model(*inputs), want) < 1e-5
    # What was packed there serves outside of it.
    with torch.no_grad():
        assert relative_error(model(*inputs), want) < 1e-5
    assert len(runs) == 6
    model.requires_grad_(False)
    assert relative_error(model(*inputs), want) < 1e-5
    with torch.inference_mode():
        made_there = randomized("wespeaker")
        runs.clear()
        assert relative_error(made_there(*inputs), want) < 1e-5
        made_there.encoder.blk1.out.conv.weight.mul_(2)  # not counted by torch, so nothing is packed
        assert relative_error(made_there(*inputs), want) > 1e-3 and not runs


def test_autocast_and_half_weights(runs: Runs) -> None:
    model, inputs = randomized("wespeaker"), batch()
    want = plain(model, *inputs)
    with torch.no_grad():
        for dtype, on_kernels in ((torch.bfloat16, 3), (torch.float16, 0)):  # a CPU has no float16 products
            with torch.autocast("cpu", dtype):
                got, count = runs.of(lambda: model(*inputs))
            cosine = F.cosine_similarity(got.double(), want.double())
            assert got.dtype == dtype and count == on_kernels and cosine.min() > 0.9995 and cosine.max() < 1 - 1e-9
        assert relative_error(model(*inputs), want) < 1e-5
        model.bfloat16()
        got, count = runs.of(lambda: model(inputs[0].bfloat16(), inputs[1]))
        assert got.dtype == torch.bfloat16 and count == 3 and F.cosine_similarity(got.float(), want).min() > 0.9995


def test_functional_call_and_vmap(runs: Runs) -> None:
    model, inputs = randomized("wespeaker").requires_grad_(False), batch()
    want = model(*inputs)
    other = randomized("wespeaker", seed=7)
    weights = {name: value.detach() for name, value in other.state_dict().items()}
    got = torch.func.functional_call(model, weights, inputs)
    assert relative_error(got, plain(other, *inputs)) < 1e-5
    assert torch.equal(model(*inputs), want)
    stacked = torch.randn(3, 2, 30, 20)
    runs.clear()
    found = torch.vmap(model)(stacked)
    assert not runs
    assert relative_error(found, torch.stack([model(x) for x in stacked])) < 1e-5


def test_two_threads_at_once() -> None:
    """One asks for other products than the other, by turns: neither gets what was packed for the other one."""
    model, inputs = randomized("wespeaker").requires_grad_(False), batch()
    exact = model(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        coarse = model(*inputs)
    assert not torch.equal(exact, coarse)
    wrong: list[Any] = []
    barrier = threading.Barrier(2)

    def call(enabled: bool, want: Tensor) -> None:
        try:
            barrier.wait()
            for _ in range(100):
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                    wrong.extend([] if torch.equal(model(*inputs), want) else [enabled])
        except Exception as error:
            wrong.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=call, args=pair) for pair in ((True, coarse), (False, exact))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


def test_what_was_made_during_a_change_is_not_kept() -> None:
    kept, tensors, made = Kept[int](), [torch.ones(1)], []

    def make() -> int:
        made.append(None)
        if len(made) == 1:  # as another thread does that sees a change
            kept.forget()
        return len(made)

    assert [kept.of(tensors, None, make) for _ in range(3)] == [1, 2, 2]


def test_weights_on_another_device_are_refused() -> None:
    model = randomized("wespeaker")
    with torch.no_grad():
        model(*batch())
        with pytest.raises(RuntimeError, match="meta"):
            model.to("meta")(*batch())


def test_calibration_finds_the_ranges() -> None:
    model, seen = randomized("wespeaker"), {}
    parts = {
        ("encoder.stem", "in"): "encoder.stem",
        ("encoder.blk1", "in"): "encoder.blk1.in_",
        ("encoder.blk1", "res.1"): "encoder.blk1.res.1",
        ("encoder.blk1", "out"): "encoder.blk1.out",
    }

    def watcher(key: tuple[str, str]) -> Callable[..., None]:
        def watch(_: nn.Module, args: tuple[Any, ...]) -> None:
            low, high = seen.get(key, (torch.inf, -torch.inf))
            seen[key] = min(low, float(args[0].min())), max(high, float(args[0].max()))

        return watch

    handles = [model.get_submodule(name).register_forward_pre_hook(watcher(key)) for key, name in parts.items()]
    batches = [batch(seed) for seed in range(3)]
    found = calibrate(model, batches, coverage=1.0)
    for handle in handles:
        handle.remove()
    assert set(found) == {f"encoder.{name}" for name in ("stem", "blk1", "blk2", "blk3", "mfa")}
    assert set(found["encoder.blk1"]) == {"in", "out", "res.0", "res.1", "res.2"}
    assert {(layer, key): found[layer][key] for layer, key in parts} == seen
    assert found == input_ranges(model)
    narrow = calibrate(model, batches, coverage=0.5)["encoder.blk1"]["in"]
    low, high = found["encoder.blk1"]["in"]
    assert low < narrow[0] < narrow[1] < high
    alone = calibrate(model, [torch.randn(2, 30, 20)])  # a tensor is the one argument
    other = randomized("wespeaker", seed=7)
    set_input_ranges(other, alone)
    assert input_ranges(other) == alone


def test_coverage_is_a_share_of_the_values() -> None:
    layer = layers.TdnnLayer(1, 1)
    x = torch.arange(1000.0).reshape(1, 1, 1000)
    assert calibrate(layer, [x], coverage=0.99)[""]["in"] == (5.0, 994.0)
    assert calibrate(layer, [x, x + 10], coverage=0.99)[""]["in"] == (5.0, 1004.0)
    with pytest.raises(InputError, match="must be finite, got an input with NaN or infinity"):  # not cut
        calibrate(layer, [x.masked_fill(x == 7, torch.inf)], coverage=0.99)


def test_calibration_leaves_everything_else() -> None:
    model = set_precision(randomized("wespeaker"), "bf16").train()
    model.encoder.blk2.out.bn.eval()  # frozen statistics
    calls = Runs()
    model.encoder.blk1.in_.register_forward_pre_hook(lambda *_: calls.append(None))

    def state() -> tuple[Any, ...]:
        parts = list(model.modules())
        return (
            [part.training for part in parts],
            [len(part._forward_pre_hooks) for part in parts],
            [getattr(part, "precision", None) for part in parts],
            {name: value.clone() for name, value in model.state_dict().items()},
        )

    *before, weights = state()
    calibrate(model, [batch()])
    *after, same = state()
    assert before == after and len(calls) == 1
    assert all(torch.equal(weights[name], value) for name, value in same.items())
    found = input_ranges(model)
    with pytest.raises(RuntimeError, match="disk full"):
        calibrate(model, iter(Failing()))
    assert [*state()[:3]] == before and input_ranges(model) == found


class FirstOfTwo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = layers.TdnnLayer(8, 8), layers.TdnnLayer(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x=x)


def test_calibration_sees_inputs_that_are_named() -> None:
    model = FirstOfTwo()
    del model.second
    x = torch.randn(1, 8, 9)
    assert calibrate(model, [x])["first"]["in"] == (float(x.min()), float(x.max()))


class Failing:
    def __iter__(self) -> Any:
        yield batch()
        raise RuntimeError("disk full")


def test_bytes_of_values_beyond_the_range_are_cut() -> None:
    model, inputs = randomized("wespeaker"), batch()
    ranges = calibrate(model, [inputs])
    ranges["encoder.stem"]["in"] = (-0.1, 0.1)
    set_input_ranges(model, ranges)
    with torch.no_grad():
        cut = set_precision(model, "int8")(*inputs)
        want = set_precision(model, "fp32")(inputs[0].clamp(-0.1, 0.1), inputs[1])
    assert F.cosine_similarity(cut, want).min() > 0.995


def test_precision_that_the_device_lacks_leaves_the_weights_type(runs: Runs) -> None:
    model, inputs = set_precision(randomized("wespeaker"), "fp16"), batch()
    with torch.no_grad():
        got, count = runs.of(lambda: model(*inputs))
    assert count == 0 and relative_error(got, plain(model, *inputs)) < 1e-6


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model: set_precision(model, "int4"), "unknown precision 'int4' .did you mean 'int8'"),
        (lambda model: set_precision(nn.Linear(2, 2), "bf16"), "Linear has no layer with an inference form"),
        (
            lambda model: set_precision(model, "int8"),
            "needs calibration: encoder.stem has no range of 'in'; 'spkfast calibrate'",
        ),
        (
            lambda model: set_precision(SERes2NetBlock(32), "int8"),
            "needs calibration: the module has no range of 'in'",
        ),
        (
            lambda model: set_precision(model.bfloat16(), "bf16"),
            r"needs float32 weights, encoder\.stem has torch\.bfloat16",
        ),
        (lambda model: calibrate(nn.Linear(2, 2), []), "Linear has no layer with an inference form"),
        *(
            (
                lambda model, coverage=coverage: calibrate(model, [batch()], coverage=coverage),
                f"coverage must be above 0 and at most 1, got {coverage}",
            )
            for coverage in (0, -1, 1.5, float("nan"))
        ),
        (
            lambda model: calibrate(layers.TdnnLayer(20, 8), [torch.randn(0, 20, 9)]),
            "the range of 'in' of the module needs values, got an empty input",
        ),
        (
            lambda model: calibrate(FirstOfTwo(), [torch.randn(1, 8, 9)]),
            "no batch reached 'in' of second, which needs a range",
        ),
        (lambda model: calibrate(model, []), "calibration needs at least one batch"),
        (
            lambda model: calibrate(model, [torch.full((1, 9, 20), torch.nan)]),
            r"the range of 'in' of encoder\.stem must be finite",
        ),
        (lambda model: set_input_ranges(model, {"stem": {}}), "the ranges name 'stem', which is no layer"),
        (
            lambda model: set_input_ranges(model, {"encoder.stem": {"out": (0, 1)}}),
            "the ranges of encoder.stem name 'out', which it does not have",
        ),
        (
            lambda model: set_input_ranges(model, {"encoder.stem": [0, 1]}),
            r"the ranges of encoder.stem must be a mapping, got \[0, 1\]",
        ),
        (
            lambda model: set_input_ranges(model, {"encoder.stem": {"in": 3.0}}),
            "the range of 'in' of encoder.stem must be two numbers, got 3.0",
        ),
        (
            lambda model: set_input_ranges(model, {"encoder.stem": {"in": ("a", "b")}}),
            "the range of 'in' of encoder.stem must be two numbers",
        ),
        (
            lambda model: set_input_ranges(model, {"encoder.stem": {"in": (1, -1)}}),
            "the range of 'in' of encoder.stem must be finite, the smaller value first",
        ),
    ],
)
def test_bad_settings(call: Callable[[nn.Module], Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        call(randomized("wespeaker"))


def test_refused_settings_change_nothing() -> None:
    model = set_precision(randomized("wespeaker"), "bf16")
    ranges = calibrate(model, [batch()])
    with pytest.raises(InputError):
        set_input_ranges(model, {"encoder.stem": {"in": (0, 1)}, "none": {}})
    assert input_ranges(model) == ranges
    model.encoder.mfa.input_ranges = {}
    with pytest.raises(InputError, match=r"encoder\.mfa has no range"):
        set_precision(model, "int8")
    assert {layer.precision for layer in model.modules() if hasattr(layer, "input_ranges")} >= {"bf16"}
    assert model.encoder.stem.precision == "bf16"


def test_every_model_has_an_inference_form() -> None:
    for name in models.list():
        set_precision(models.create(name), "bf16")
