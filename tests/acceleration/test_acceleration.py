"""Layers of other toolkits' models, swapped in place: what is kept, what is left alone."""

from __future__ import annotations

import copy
import gc
import inspect
import logging
import pickle
import weakref

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.parametrizations import weight_norm

import spkfast
from spkfast import backends, models
from spkfast.acceleration import Accelerated
from spkfast.nn.inference import inference_layers
from tests.acceleration import doubles

SWAPPED = {
    "Wespeaker": ["", "layer1", "layer2", "layer3", "layer4", "conv", "pool"],
    "TaoRuijie": ["", "conv1", "layer1", "layer2", "layer3", "layer4"],
    "Espnet": ["conv", "layer1", "layer2", "layer3", "layer4", "pooling"],
    "Speechbrain": ["", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "mfa", "asp"],
}
LENGTHS = torch.tensor([1.0, 0.52, 0.71])


class OtherBlock(doubles.WespeakerBlock):
    """Under another name, and doing no more than its parent."""

    def forward(self, x):
        return super().forward(x)


class ScaledBlock(doubles.WespeakerBlock):
    """Computes something else with the same layers."""

    def forward(self, x):
        return 0.5 * x + self.se_res2block(x)


class NoisyBlock(doubles.WespeakerBlock):
    """Computes something else in training mode alone."""

    def forward(self, x):
        return super().forward(F.dropout(x, 0.1, self.training))


class LooserPooling(doubles.WespeakerPooling):
    """Bounds the deviation elsewhere, which silence alone shows."""

    def forward(self, x):
        return super().forward(x).clamp(min=1e-3) if self.channels else x


def filled(net):
    """The network with weights and statistics that are all different."""
    generator = torch.Generator().manual_seed(0)
    for part in net.modules():
        if isinstance(part, nn.BatchNorm1d):
            for value, low, high in ((part.weight, 0.5, 1.5), (part.bias, -0.5, 0.5), (part.running_mean, -0.2, 0.4),
                                     (part.running_var, 0.5, 1.5)):  # fmt: skip
                with torch.no_grad():
                    value.uniform_(low, high, generator=generator)
    return net


def made(name, **options):
    torch.manual_seed(0)
    return filled(getattr(doubles, name)(**options))


def layers_alone(net):
    """The network with a weight more than its toolkit's, so that it is not known as a whole."""
    net.register_buffer("extra", torch.zeros(1))
    return net


def batch(net, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    shape = (3, 1000) if isinstance(net, doubles.TaoRuijie) else (3, 25, 20)
    return torch.randn(shape, generator=generator, dtype=dtype)


def arguments(net, dtype=torch.float32):
    x = batch(net, dtype)
    return (x, False) if isinstance(net, doubles.TaoRuijie) else (x,)


def swapped(net):
    return [name for name, part in net.named_modules() if isinstance(part, Accelerated)]


def step(net, *inputs):
    """Output, gradients and statistics of one training step or, in evaluation mode, of a forward and backward pass."""
    net.zero_grad()
    out = net(*inputs)
    outputs = out if isinstance(out, tuple) else (out,)
    generator = torch.Generator().manual_seed(2)
    sum((o * torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o)).sum() for o in outputs).backward()
    found = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    found |= {f"gradient of {name}": value.grad for name, value in net.named_parameters()}
    return found | {name: value.clone() for name, value in net.named_buffers()}


def assert_same(have, want, tolerance):
    """To the largest value of each kind: some gradients are zero but for rounding."""
    assert have.keys() == want.keys()
    scales = {}
    for name, value in want.items():
        kind = name.split()[0]
        scales[kind] = max(scales.get(kind, 0), value.abs().max().double().item())
    for name, value in want.items():
        error = (have[name] - value).abs().max().item()
        assert error <= tolerance * scales[name.split()[0]], f"{name}: {error:.3g}"


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "layers"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", SWAPPED)
def test_gives_the_same_embeddings_gradients_and_statistics(name, training, whole):
    original = made(name).double().train(training)
    original = original if whole else layers_alone(original)
    net = spkfast.accelerate(copy.deepcopy(original))
    assert swapped(net) == (SWAPPED[name] if whole else [part for part in SWAPPED[name] if part])
    assert net.training == training
    inputs = arguments(net, torch.float64)
    assert_same(step(net, *inputs), step(original, *inputs), 1e-10)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "layers"])
@pytest.mark.parametrize("name", SWAPPED)
def test_single_precision_is_no_further_from_the_truth_than_before(name, whole):
    original = made(name).eval()
    original = original if whole else layers_alone(original)
    net = spkfast.accelerate(copy.deepcopy(original))
    inputs = arguments(net)
    truth = step(copy.deepcopy(original).double(), inputs[0].double(), *inputs[1:])
    have, want = step(net, *inputs), step(original, *inputs)
    worst = 2**-23
    for key, value in truth.items():
        worst = max(worst, ((want[key] - value).abs().max() / value.abs().max().clamp_min(1e-3)).item())
    assert_same({key: value.double() for key, value in have.items()}, truth, 4 * worst)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "layers"])
@pytest.mark.parametrize("name", SWAPPED)
def test_inference_without_gradients(name, whole):
    original = made(name).eval()
    original = original if whole else layers_alone(original)
    net = spkfast.accelerate(copy.deepcopy(original))
    inputs = arguments(net)
    with torch.no_grad():
        for change in (None, 0.7):
            if change is not None:
                for model in (net, original):
                    for parameter in model.parameters():
                        parameter.mul_(change)
            have, want = net(*inputs), original(*inputs)
            have, want = (out[-1] if isinstance(out, tuple) else out for out in (have, want))
            assert (have - want).abs().max() <= 2e-5 * want.abs().max()


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "layers"])
@pytest.mark.parametrize("name", SWAPPED)
def test_inference_runs_on_the_kernels(name, whole, monkeypatch):
    if backends.resolve(torch.device("cpu"), "auto", "tdnn_layer") == "reference":
        pytest.skip("the kernels were not built")
    net = made(name).eval()
    net = spkfast.accelerate(net if whole else layers_alone(net))
    convolved, own = [], F.conv1d

    def conv1d(*args, **kwargs):
        convolved.append(1)
        return own(*args, **kwargs)

    monkeypatch.setattr(F, "conv1d", conv1d)
    with torch.no_grad():
        net(*arguments(net))
    own_products = {"TaoRuijie": 2, "Speechbrain": 1}  # attention, and the last layer as a convolution
    assert len(convolved) == (0 if whole else own_products.get(name, 0))


def test_augments_as_before():
    original = made("TaoRuijie").double()
    net = spkfast.accelerate(copy.deepcopy(original))
    results = []
    for model in (net, original):
        torch.manual_seed(3)
        results.append(step(model, batch(net, torch.float64), True))
    assert_same(*results, 1e-10)
    assert (results[0]["output 0"] - step(original, batch(net, torch.float64), False)["output 0"]).abs().max() > 1e-3
    out = net(batch(net, torch.float64), aug=False)
    assert out.shape == (3, 12)
    with pytest.raises(TypeError):
        net(batch(net, torch.float64))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "layers"])
def test_relative_lengths_are_kept(training, whole):
    original = made("Speechbrain").double().train(training)
    original = original if whole else layers_alone(original)
    net = spkfast.accelerate(copy.deepcopy(original))
    x = batch(net, torch.float64)
    assert_same(step(net, x, LENGTHS), step(original, x, LENGTHS), 1e-7)  # of lengths in float32
    assert_same(step(net, x, LENGTHS.double()), step(original, x, LENGTHS.double()), 1e-10)
    own = net.asp(x.transpose(1, 2)[:, :1].expand(-1, net.asp_bn.norm.num_features // 2, -1), lengths=LENGTHS)
    assert own.shape == (3, net.asp_bn.norm.num_features, 1)


@pytest.mark.parametrize("options", [{"groups": 2}, {"dropout": 0.3}, {"channels": (24, 16, 16, 8)}], ids=str)
def test_variants_of_speechbrain(options):
    original = made("Speechbrain", **options).double()
    net = spkfast.accelerate(copy.deepcopy(original))
    assert swapped(net) == SWAPPED["Speechbrain"]
    x = batch(net, torch.float64)
    for training in (True, False):
        results = []
        for model in (net.train(training), original.train(training)):
            torch.manual_seed(5)  # of the dropout
            results.append(step(model, x))
        assert_same(*results, 1e-10)


def test_pooling_without_context_and_of_maps():
    original = made("Wespeaker", global_context=False).double()
    net = spkfast.accelerate(copy.deepcopy(original))
    assert "pool" in swapped(net)
    maps = torch.randn(2, 6, 4, 11, dtype=torch.float64)
    assert torch.allclose(net.pool(maps), original.pool(maps), rtol=1e-10)
    assert net.pool.get_out_dim() == 48


@pytest.mark.parametrize("name", SWAPPED)
def test_state_dict_loads_both_ways(name):
    original = made(name)
    net = spkfast.accelerate(copy.deepcopy(original))
    assert list(net.state_dict()) == list(original.state_dict())
    assert [key for key, _ in net.named_parameters()] == [key for key, _ in original.named_parameters()]
    torch.manual_seed(7)
    other = getattr(doubles, name)()
    net.load_state_dict(other.state_dict())
    inputs = arguments(net)
    torch.testing.assert_close(net.eval()(*inputs), other.eval()(*inputs), rtol=2e-5, atol=2e-5)
    original.load_state_dict(net.state_dict())


def test_the_same_objects_stay(caplog):
    net = made("Wespeaker")
    parts, parameters = list(net.modules()), list(net.parameters())
    random = torch.random.get_rng_state()
    assert spkfast.accelerate(net) is net
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(a is b for a, b in zip(net.modules(), parts, strict=True))
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert isinstance(net.layer2, doubles.WespeakerBlock)
    assert inspect.signature(net.forward) == inspect.signature(made("Wespeaker").forward)
    caplog.clear()
    caplog.set_level(logging.INFO, "spkfast.accelerate")
    before = net.layer2.__class__, net.layer2.__dict__["_spkfast_plan"]
    spkfast.accelerate(net)
    assert (net.layer2.__class__, net.layer2.__dict__["_spkfast_plan"]) == before
    assert not [line for line in caplog.messages if "swapped" in line or "known to" in line]
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    before = net.eval()(batch(net))[1]
    net.train()(batch(net))[1].square().sum().backward()
    optimizer.step()
    assert not torch.allclose(net.eval()(batch(net))[1], before)


def test_what_goes_away_is_freed_at_once():
    net = spkfast.accelerate(made("Wespeaker"))
    net(batch(net))
    gone = weakref.ref(net.layer2)
    gc.disable()
    try:
        del net
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("cls", [OtherBlock, type("Renamed", (doubles.WespeakerBlock,), {})])
def test_subclasses_and_other_names_match(cls):
    assert isinstance(spkfast.accelerate(cls(16, 2)), Accelerated)


@pytest.mark.parametrize("cls", [ScaledBlock, NoisyBlock])
def test_changed_blocks_stay(cls, caplog):
    caplog.set_level(logging.INFO, "spkfast.accelerate")
    net = made("Wespeaker")
    net.layer3 = cls(16, 3)
    original = copy.deepcopy(net).eval()
    spkfast.accelerate(net).eval()
    assert type(net.layer3) is cls
    inside = ["layer3.se_res2block.0", "layer3.se_res2block.2"]
    assert swapped(net) == ["layer1", "layer2", *inside, "layer4", "conv", "pool"]
    assert any("layer3" in line and "computes something else" in line for line in caplog.messages)
    torch.testing.assert_close(net(batch(net)), original(batch(net)), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "change", ["bound", "pickle", "state", "forward", "leaf", "weights", "activation", "parametrized"]
)
def test_changed_layers_stay(change, monkeypatch):
    pool = doubles.WespeakerPooling(24)
    if change == "bound":
        pool = LooserPooling(24)
    elif change == "pickle":
        monkeypatch.setattr(doubles.WespeakerPooling, "__reduce__", lambda self: (doubles.WespeakerPooling, (24,)))
    elif change == "state":
        monkeypatch.setattr(doubles.WespeakerPooling, "__getstate__", lambda self: dict(self.__dict__, seen=0))
    elif change == "forward":
        pool.forward = lambda x: x
    elif change == "leaf":
        pool.linear1.forward = lambda x: x
    elif change == "weights":
        pool.scale = nn.Parameter(torch.ones(1))
    elif change == "activation":
        pool.act = nn.GELU()
    else:
        parametrizations.weight_norm(pool.linear1)
    before = type(pool)
    assert type(spkfast.accelerate(pool)) is before


def test_tells_bounds_of_variances_apart():
    """A channel that never changes has the bound as its deviation."""
    quiet = torch.randn(2, 24, 9, dtype=torch.float64)
    quiet[:, 3] = 0
    for name in ("astp", "astp_3dspeaker", "speechbrain", "taoruijie", "chn_attn_stat", "rawnet3"):
        own = spkfast.nn.poolings.create(name, 24, bottleneck=6)
        pool = Foreign(own).double()
        net = spkfast.accelerate(copy.deepcopy(pool))
        assert isinstance(net, Accelerated), name
        assert net.__dict__["_spkfast_plan"].options["name"] == name
        assert torch.allclose(net(quiet), pool(quiet), rtol=1e-10), name


class Foreign(nn.Module):
    """A pooling of ours under names of its own."""

    def __init__(self, own):
        super().__init__()
        self.first, self.second = own.fc1, own.fc2
        if own.bn is not None:
            self.norm = own.bn
        self.__dict__["form"], self.channels = own.form, own.channels

    def forward(self, x):
        form, frames = self.form, x.new_full((1, 1), x.shape[-1])
        std = form.context.of(x.var(2, unbiased=False), frames)
        seen = torch.cat([x, x.mean(2, keepdim=True).expand_as(x), std[..., None].expand_as(x)], dim=1)
        hidden = self.first(seen)
        hidden = F.relu(hidden) if form.relu else hidden
        hidden = self.norm(hidden) if form.bn else hidden
        weights = self.second(torch.tanh(hidden) if form.tanh else hidden).softmax(2)
        mean = (weights * x).sum(2)
        return torch.cat([mean, form.deviation.of((weights * x**2).sum(2) - mean**2)], dim=1)


def test_says_what_it_did(caplog):
    caplog.set_level(logging.INFO, "spkfast.accelerate")
    spkfast.accelerate(made("TaoRuijie"))
    lines = caplog.messages
    assert any(line.startswith("layer2 (TaoBlock) swapped for SE-Res2Net block") for line in lines)
    assert any(line.startswith("the model itself (TaoRuijie)") and "'padding': 'batch'" in line for line in lines)
    assert "torchfbank (Sequential) stays: 0 (Spectrum) is part of no known layer" in lines
    assert sum(line.startswith("attention (Sequential) stays: it gives attention weights alone") for line in lines) == 1
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


def test_warns_once_where_nothing_is_known(caplog):
    caplog.set_level(logging.WARNING, "spkfast.accelerate")
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Linear(4, 2))
    assert spkfast.accelerate(net) is net
    assert caplog.messages == ["no layer of Sequential is known to spkfast: it stays as it is"]


def test_models_without_values_stay(caplog):
    caplog.set_level(logging.WARNING, "spkfast.accelerate")
    with torch.device("meta"):
        net = spkfast.accelerate(doubles.Wespeaker())
    assert swapped(net) == [] and caplog.messages == ["no layer of Wespeaker is known to spkfast: it stays as it is"]


def test_own_models_are_known(caplog):
    caplog.set_level(logging.WARNING, "spkfast.accelerate")
    net = models.create("ecapa_tdnn", channels=16, feature_dim=20)
    assert swapped(spkfast.accelerate(net)) == []
    assert caplog.messages == []


def test_refuses_what_is_no_module():
    with pytest.raises(ValueError, match=r"model must be a torch\.nn\.Module, got dict"):
        spkfast.accelerate({})


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
@pytest.mark.parametrize("name", SWAPPED)
def test_copies(name, how, tmp_path):
    net = spkfast.accelerate(made(name).eval())
    inputs = arguments(net)
    want = net(*inputs)
    if how == "deepcopy":
        other = copy.deepcopy(net)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(net))
    else:
        torch.save(net, tmp_path / "net.pt")
        other = torch.load(tmp_path / "net.pt", weights_only=False)
    assert swapped(other) == SWAPPED[name]
    torch.testing.assert_close(other(*inputs), want, rtol=0, atol=0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    torch.testing.assert_close(other(*inputs), want, rtol=0, atol=0)


def count_own(monkeypatch, cls):
    """Counts the runs of a class's own forward."""
    runs, own = [], cls.forward

    def forward(self, *args, **kwargs):
        runs.append(self)
        return own(self, *args, **kwargs)

    monkeypatch.setattr(cls, "forward", forward)
    return runs


def test_own_code_runs_where_it_must(monkeypatch):
    class Block(doubles.WespeakerBlock):
        pass

    runs = count_own(monkeypatch, Block)
    block = filled(Block(16, 2)).double().eval()
    original = copy.deepcopy(block)
    original.__class__ = doubles.WespeakerBlock
    spkfast.accelerate(block)
    x = torch.randn(2, 16, 12, dtype=torch.float64)

    def own(call=None):
        runs.clear()
        torch.testing.assert_close((call or block)(x), original(x), rtol=1e-10, atol=1e-10)
        return bool(runs)

    assert not own()
    seen = []
    hook = block.se_res2block[1].convs[0].register_forward_hook(lambda *_: seen.append(1))
    assert own() and seen
    hook.remove()
    assert not own()
    seen.clear()
    block.register_forward_hook(lambda *_: seen.append(2))
    block.register_full_backward_hook(lambda *_: seen.append(3))
    assert not own() and seen == [2]
    block(x).sum().backward()
    assert seen == [2, 2, 3]
    block._forward_hooks.clear()
    block._backward_hooks.clear()

    class Changed(nn.Linear):
        def forward(self, x):
            return super().forward(x)

    gate = block.se_res2block[3]
    former, gate.linear1 = gate.linear1, Changed(16, 5).double()
    original.se_res2block[3].linear1.load_state_dict(gate.linear1.state_dict())
    assert own()
    gate.linear1 = former
    original.se_res2block[3].linear1.load_state_dict(former.state_dict())
    assert not own()
    gate.forward = lambda x: doubles.Gate.forward(gate, x)
    assert own()
    del gate.forward
    block.se_res2block[0].bn.train()
    original.se_res2block[0].bn.train()
    assert own()
    block.eval()
    original.eval()
    assert own(torch.jit.trace(block, x, check_trace=False)) is False
    weight_norm(gate.linear1)
    assert own()
    block.se_res2block = original.se_res2block
    assert not own()
    block.se_res2block = nn.Sequential(nn.Identity())
    original.se_res2block = nn.Sequential(nn.Identity())
    assert own()


class DoubledConv(nn.Conv1d):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "layers"])
@pytest.mark.parametrize(
    "change",
    [{"dilation": (1,), "padding": (1,)}, {"padding_mode": "circular"}, {"__class__": DoubledConv}],
    ids=str,
)
def test_own_code_runs_convolutions_that_were_changed(change, whole):
    original = made("Wespeaker").eval()
    net = spkfast.accelerate(copy.deepcopy(original) if whole else layers_alone(copy.deepcopy(original)))
    exact = embedding(net)
    convs = [model.layer2.se_res2block[1].convs[0] for model in (net, original)]
    before = {name: getattr(convs[0], name) for name in change}
    for conv in convs:
        for name, value in change.items():
            setattr(conv, name, value)
    changed = embedding(original)
    assert (embedding(net) - changed).abs().max() <= 2e-5 * changed.abs().max() < 0.1 * (exact - changed).abs().max()
    for name, value in before.items():
        setattr(convs[0], name, value)
    assert torch.equal(embedding(net), exact)


def test_settings_stay_while_a_layer_runs_its_own_code():
    net = spkfast.accelerate(filled(doubles.WespeakerBlock(16, 2)).eval())
    spkfast.nn.set_precision(net, "bf16")
    x = torch.randn(2, 16, 12)
    with torch.no_grad():
        halved = net(x)
        conv = net.se_res2block[1].convs[0]
        net.se_res2block[1].convs[0] = nn.Identity()
        net(x)
        net.se_res2block[1].convs[0] = conv
        assert torch.equal(net(x), halved)


@pytest.mark.parametrize("name", [name for name in SWAPPED if "" in SWAPPED[name]])
@pytest.mark.parametrize("hooked_first", [True, False])
def test_settings_of_a_whole_network_reach_its_layers(name, hooked_first):
    net = spkfast.accelerate(made(name).eval())
    block = net.get_submodule(SWAPPED[name][-1 if name == "TaoRuijie" else 2])

    def hooked():
        return block.register_forward_hook(lambda *_: None)

    first = hooked()
    exact = embedding(net)  # by the layers, each swapped for itself
    if not hooked_first:
        first.remove()
    spkfast.nn.calibrate(net, [arguments(net)])
    found = []
    for precision in ("bf16", "int8"):
        spkfast.nn.set_precision(net, precision)
        handle = hooked()
        found.append(embedding(net))
        handle.remove()
    assert not torch.equal(found[0], exact) and not torch.equal(found[1], found[0])
    assert lowest_cosine(found[0], exact) > 0.9995 and lowest_cosine(found[1], exact) > 0.995


def test_frozen_batch_norm_is_used_frozen():
    net, original = (made("Wespeaker").double().train() for _ in range(2))
    spkfast.accelerate(net)
    for model in (net, original):
        for part in model.modules():
            if isinstance(part, nn.BatchNorm1d):
                part.eval()
    x = batch(net, torch.float64)
    assert_same(step(net, x), step(original, x), 1e-10)


def test_arguments_that_are_not_known_reach_the_own_code():
    original = made("Espnet").double().eval()
    net = spkfast.accelerate(copy.deepcopy(original))
    x, mask = batch(net, torch.float64), torch.zeros(3, 25, dtype=torch.bool)
    mask[1, 12:] = True
    assert not torch.allclose(net(x, mask), net(x))
    assert torch.allclose(net(x, mask), original(x, mask), rtol=1e-10)
    with pytest.raises(ValueError, match="task_tokens"):
        net.pooling(torch.zeros(1, 24, 5).double(), torch.zeros(1))


def test_synchronised_batch_norm_takes_its_place():
    net = spkfast.accelerate(made("Wespeaker").eval())
    want = net(batch(net))
    net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert swapped(net) == SWAPPED["Wespeaker"]
    torch.testing.assert_close(net(batch(net)), want, rtol=2e-5, atol=2e-5)
    assert isinstance(net.__dict__["_spkfast_view"].layer.net.encoder.blk1.in_.bn, nn.SyncBatchNorm)
    other = spkfast.accelerate(nn.SyncBatchNorm.convert_sync_batchnorm(made("Wespeaker")))
    assert swapped(other) == SWAPPED["Wespeaker"]


def test_slices_and_shallow_copies_work():
    chain = nn.Sequential(nn.Conv1d(4, 6, 3, padding=1), nn.ReLU(), nn.BatchNorm1d(6)).eval()
    original = copy.deepcopy(chain)
    spkfast.accelerate(chain)
    x = torch.randn(2, 4, 9)
    torch.testing.assert_close(chain(x), original(x))
    torch.testing.assert_close(chain[:2](x), original[:2](x))
    other = copy.copy(chain)
    torch.testing.assert_close(other(x), original(x))
    assert other.__dict__["_spkfast_view"] is not chain.__dict__["_spkfast_view"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype):
    original = made("Wespeaker").eval()
    net = spkfast.accelerate(copy.deepcopy(original)).to(dtype)
    have = net(batch(net, dtype))[1]
    assert have.dtype == dtype
    want = original(batch(net))[1]
    assert F.cosine_similarity(have.float(), want, dim=1).min() > 0.9995
    with torch.autocast("cpu", dtype):
        net.float()(batch(net))


def test_distributed_data_parallel(tmp_path):
    original = made("Speechbrain").double().train()
    net = spkfast.accelerate(copy.deepcopy(original))
    x = batch(net, torch.float64)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(net)
        have, want = step(wrapped, x), step(original, x)
    finally:
        torch.distributed.destroy_process_group()
    assert_same({key.replace("module.", ""): value for key, value in have.items()}, want, 1e-10)
    assert swapped(spkfast.accelerate(nn.parallel.DataParallel(made("Wespeaker"))).module) == SWAPPED["Wespeaker"]


def test_compiles_without_breaks():
    net = spkfast.accelerate(made("Wespeaker").eval())
    x = batch(net)
    want = net(x)
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), want)
    net.train()(x)
    net.eval()
    compiled(x)
    assert counter.frame_count == 1
    torch.compiler.reset()


@pytest.mark.parametrize("name", SWAPPED)
def test_transforms_give_the_derivatives_of_its_own_code(name):
    """Per-sample gradients of the weights, and forward-mode derivatives."""
    original = made(name).eval()
    nets = [copy.deepcopy(original).double(), original, spkfast.accelerate(copy.deepcopy(original))]
    found = []
    for net in nets:
        values = {key: value.detach() for key, value in net.named_parameters()}
        x, *others = arguments(net, next(iter(values.values())).dtype)

        def loss(values, x, net=net, others=others):
            out = torch.func.functional_call(net, values, (x[None], *others))
            return (out[-1] if isinstance(out, tuple) else out).square().sum()

        gradients = torch.func.vmap(torch.func.grad(loss), (None, 0))(values, x)
        _, tangent = torch.func.jvp(lambda values, x=x, loss=loss: loss(values, x[0]), (values,), (values,))
        found.append({f"gradient of {key}": value for key, value in gradients.items()} | {"tangent": tangent})
    truth, want, have = found
    scale = max(value.abs().max().item() for value in truth.values())
    worst = max((want[key] - value).abs().max().item() for key, value in truth.items())
    for key, value in truth.items():
        assert (have[key] - value).abs().max() <= 4 * max(worst, 2**-23 * scale), key


@pytest.mark.parametrize("name", SWAPPED)
def test_meta_tensors_have_shapes(name):
    net = spkfast.accelerate(made(name).eval())
    x, *others = arguments(net)
    out = net.to("meta")(x.to("meta"), *others)
    assert (out[-1] if isinstance(out, tuple) else out).shape == embedding(made(name).eval()).shape


def test_exports_as_its_own_code_does():
    net = made("Wespeaker").eval()
    x = batch(net)
    plain = torch.export.export(net, (x,)).graph_module.code
    assert torch.export.export(spkfast.accelerate(net), (x,)).graph_module.code == plain


def test_loads_nothing_on_import():
    assert callable(spkfast.accelerate)
    assert spkfast.accelerate is spkfast.acceleration.accelerate


def embedding(net):
    with torch.no_grad():
        out = net(*arguments(net))
    return out[-1] if isinstance(out, tuple) else out


def lowest_cosine(have, want):
    return F.cosine_similarity(have.flatten(1).double(), want.flatten(1).double()).min()


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "layers"])
@pytest.mark.parametrize("name", SWAPPED)
def test_precision_reaches_the_swapped_layers(name, whole):
    original = made(name).eval()
    net = spkfast.accelerate(copy.deepcopy(original) if whole else layers_alone(copy.deepcopy(original)))
    want, exact = embedding(original), embedding(net)
    spkfast.nn.set_precision(net, "bf16")
    halved = embedding(net)
    assert not torch.equal(halved, exact)
    assert lowest_cosine(halved, want) > 0.9995
    with pytest.raises(spkfast.InputError, match="needs calibration"):
        spkfast.nn.set_precision(net, "int8")
    spkfast.nn.calibrate(net, [arguments(net)])
    spkfast.nn.set_precision(net, "int8")
    quantised = embedding(net)
    assert not torch.equal(quantised, halved)
    assert lowest_cosine(quantised, want) > 0.995
    for again in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(embedding(again), quantised)
        assert spkfast.nn.input_ranges(again) == spkfast.nn.input_ranges(net)
    spkfast.nn.set_precision(net, "fp32")
    assert torch.equal(embedding(net), exact)


@pytest.mark.parametrize("name", SWAPPED)
def test_code_around_swapped_layers_gets_the_type_it_gave(name):
    net = spkfast.accelerate(layers_alone(made(name).eval()))
    spkfast.nn.set_precision(net, "bf16")
    seen = {}
    for part_name, part in net.named_modules():
        if isinstance(part, Accelerated):
            part.register_forward_hook(lambda _, x, out, of=part_name: seen.update({of: (x[0].dtype, out.dtype)}))
    embedding(net)
    assert seen == {part_name: (torch.float32, torch.float32) for part_name in swapped(net)}
    with torch.autocast("cpu", torch.bfloat16):
        embedding(net)
    assert torch.bfloat16 in {out for _, out in seen.values()}


def single_convolution():
    """A swapped convolution, and a copy of the torch layer that it was."""
    net = layers_alone(made("Wespeaker").eval())
    original = copy.deepcopy(net.conv)
    return spkfast.accelerate(net).conv, original


@pytest.mark.parametrize("change", ["pruned", "old weight norm", "weight norm"])
def test_single_convolution_without_its_own_weight(change):
    conv, original = single_convolution()
    x = torch.randn(2, 48, 9)
    for part in (conv, original):
        if change == "pruned":
            prune.l1_unstructured(part, "weight", 0.5)
        else:
            (weight_norm if change == "old weight norm" else parametrizations.weight_norm)(part)
    with torch.no_grad():
        assert torch.equal(conv(x), original(x))
    if change == "pruned":
        prune.remove(conv, "weight")
        with torch.no_grad():
            torch.testing.assert_close(conv(x), original(x), rtol=2e-5, atol=2e-5)


def test_single_convolution_that_is_trained_behind_kernels():
    conv, original = single_convolution()
    spkfast.nn.set_precision(conv, "bf16")
    x = torch.randn(2, 48, 9).bfloat16()
    out = conv(x)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert torch.equal(out, original(x.float()).bfloat16())
    assert conv.weight.grad is not None


def test_single_convolution_names_a_wrong_number_of_channels():
    conv, _ = single_convolution()
    with torch.no_grad(), pytest.raises(RuntimeError, match="to have 48 channels, but got 47"):
        conv(torch.randn(2, 47, 9))


@pytest.mark.parametrize("change", ["added", "replaced"])
def test_modules_that_are_added_or_replaced_run(change):
    chain = nn.Sequential(nn.Conv1d(4, 6, 3, padding=1), nn.ReLU(), nn.BatchNorm1d(6)).eval()
    original = copy.deepcopy(chain)
    assert isinstance(spkfast.accelerate(chain), Accelerated)
    x = torch.randn(2, 4, 9)
    chain(x)
    for part in (chain, original):
        if change == "added":
            part.append(nn.Tanh())
        else:
            part[1] = nn.Tanh()
    torch.testing.assert_close(chain(x), original(x))


class OwnConv(nn.Module):
    """A convolution of somebody else, without the attributes of torch's."""

    def __init__(self, conv):
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, x):
        return F.conv1d(x, self.weight, self.bias, padding=self.weight.shape[2] // 2)


class Demanding(doubles.WespeakerBlock):
    """Its subclasses have to give their name."""

    def __init_subclass__(cls, title):
        cls.title = title


class DemandingConv(nn.Conv1d):
    def __init_subclass__(cls, title):
        cls.title = title


@pytest.mark.parametrize("change", ["conv", "state dict", "subclass", "subclass of a convolution"])
def test_what_raises_stays(change, caplog):
    caplog.set_level(logging.INFO, "spkfast.accelerate")
    net = made("Wespeaker").eval()
    reason = "looking at it fails"
    if change == "conv":
        net.layer1.conv = OwnConv(net.layer1.conv)
    elif change == "state dict":

        def refuse(*_):
            raise RuntimeError("not here")

        net.register_state_dict_pre_hook(refuse)
    elif change == "subclass":
        net.layer2, reason = Demanding(16, 2).eval(), "its class cannot be derived from"
    else:
        net.conv, reason = DemandingConv(48, 24, 1), "conv (DemandingConv) stays"
    original = copy.deepcopy(net)
    spkfast.accelerate(net)
    stays = {"conv": "layer1", "subclass": "layer2", "subclass of a convolution": "conv"}.get(change, "")
    assert not isinstance(net.get_submodule(stays), Accelerated)
    assert "layer3" in swapped(net)
    assert any(reason in line for line in caplog.messages)
    torch.testing.assert_close(net(batch(net)), original(batch(net)), rtol=2e-5, atol=2e-5)


def test_generators_of_gpus_are_left_alone(monkeypatch):
    net, seeded = made("TaoRuijie"), []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    spkfast.accelerate(net)
    assert swapped(net) == SWAPPED["TaoRuijie"]
    assert seeded == []


@pytest.mark.parametrize("why", ["dropout", "hook"])
def test_settings_reach_layers_whose_own_code_runs_now(why):
    net = spkfast.accelerate(layers_alone(made("Speechbrain", dropout=0.3)))
    x = batch(net)
    if why == "dropout":
        net.train()
    else:
        handles = [part.register_forward_hook(lambda *_: None) for part in net.modules() if isinstance(part, nn.Conv1d)]
    spkfast.nn.set_precision(net, "bf16")
    assert sorted(inference_layers(net)) == sorted(swapped(net))
    assert all(layer.precision == "bf16" for layer in inference_layers(net).values())
    if why == "hook":
        for handle in handles:
            handle.remove()
    halved = embedding(net.eval())
    spkfast.nn.set_precision(net, "fp32")
    assert not torch.equal(halved, net(x).detach())


def test_compiled_in_place_is_copied():
    net = spkfast.accelerate(made("Wespeaker").eval())
    want = net(batch(net))[1]
    net.compile(backend="eager")
    again = pickle.loads(pickle.dumps(net))
    torch.testing.assert_close(again(batch(net))[1], want, rtol=0, atol=0)
