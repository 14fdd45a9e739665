"""Poolings against numbers of other toolkits, ragged batches, short and constant inputs, and half precision."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from torch.autograd import gradcheck

from spkfast.errors import InputError
from spkfast.nn import poolings
from spkfast.nn.pooling import AttentiveStatsPool, Deviation
from tests.models.golden import golden_weight

# Per golden: pooling, its options, and the peer's name of each part of ours.
_SEQUENTIAL = {"attention.0.": "fc1.", "attention.2.": "bn.", "attention.3.": "fc2."}
_LINEARS = {"linear1.": "fc1.", "linear2.": "fc2."}
_SPEECHBRAIN = {"tdnn.conv.conv.": "fc1.", "tdnn.norm.norm.": "bn.", "conv.conv.": "fc2."}
GOLDENS = {
    "3dspeaker_statspool": ("tstp", {"eps": 0.0}, {}),
    "3dspeaker_tstp": ("tstp", {"eps": 1e-8}, {}),
    "espnet_chn_attn_stat": ("chn_attn_stat", {}, _SEQUENTIAL),
    "espnet_mean": ("mean", {}, {}),
    "espnet_stats": ("stats", {}, {}),
    "speechbrain_asp_glob": ("speechbrain", {"bottleneck": 16}, _SPEECHBRAIN),
    "speechbrain_asp_noglob": ("speechbrain", {"bottleneck": 16, "global_context": False}, _SPEECHBRAIN),
    "speechbrain_statistics": ("speechbrain_stats", {}, {}),
    "wespeaker_asp": ("asp_channel", {"bottleneck": 16}, _SEQUENTIAL),
    "wespeaker_astp": ("astp", {"bottleneck": 16, "global_context": False}, _LINEARS),
    "wespeaker_astp_glob": ("astp", {"bottleneck": 16}, _LINEARS),
    "wespeaker_astp_glob_4d": ("astp", {}, _LINEARS),
    "wespeaker_mhastp": ("mhastp", {}, {}),
    "wespeaker_mhastp_ds": ("mhastp", {"layers": 3, "heads": 4, "bottleneck": 8, "per_channel": True}, {}),
    "wespeaker_mhastp_l1": ("mhastp", {"layers": 1, "heads": 3}, {}),
    "wespeaker_mqmhastp": ("mqmhastp", {}, {}),
    "wespeaker_tap": ("tap", {}, {}),
    "wespeaker_tap_4d": ("tap", {}, {}),
    "wespeaker_tsdp": ("tsdp", {}, {}),
    "wespeaker_tsdp_4d": ("tsdp", {}, {}),
    "wespeaker_tstp": ("tstp", {}, {}),
    "wespeaker_tstp_4d": ("tstp", {}, {}),
    "wespeaker_xi": ("xi", {"bottleneck": 16}, {"lin1_relu_bn.0.": "fc1.", "lin1_relu_bn.2.": "bn.", "lin2.": "fc2."}),
}
# What the peer gives in NaN (an unbiased variance of one frame), we give as no deviation.
ONE_FRAME_STD = {
    "3dspeaker_statspool": 0.0,
    "3dspeaker_tstp": 1e-4,
    "speechbrain_statistics": 1e-5,
    "wespeaker_tsdp": math.sqrt(1e-7),
    "wespeaker_tsdp_4d": math.sqrt(1e-7),
    "wespeaker_tstp": math.sqrt(1e-7),
    "wespeaker_tstp_4d": math.sqrt(1e-7),
    "wespeaker_astp_glob": math.sqrt(1e-7),
    "wespeaker_astp_glob_4d": math.sqrt(1e-7),
}


def renamed(state, names):
    """Weights of a peer under our names; the convolutions of the heads become one grouped convolution."""
    heads, own = {}, {}
    for key, shape, rule in state:
        value = torch.from_numpy(golden_weight(key, shape, rule))
        prefix, found, rest = key.partition("heads_att_trans.")
        if found:
            layer, kind = rest.split(".att_")[1].split(".")
            query = prefix.replace("n_query.", "queries.")
            heads.setdefault(f"{query}att.{layer}.{kind}", []).append(value)
        else:
            part = next((part for part in names if key.startswith(part)), "")
            own[names.get(part, "") + key[len(part) :]] = value
    return own | {key: torch.cat(values) for key, values in heads.items()}


def golden_input(golden, name, case):
    """Frames (B, C, T), or a map where the peer took one, and lengths."""
    item, *rest = case["inputs"]
    x = torch.from_numpy(np.load(golden / item["file"])[item["key"]]).transpose(1, 2)
    if case["case"] == "constant":
        x = x.expand(-1, -1, 12)
    if name.endswith("_4d"):
        x = x.reshape(len(x), 6, 4, -1)
    if not rest:
        return x, None
    lengths = torch.tensor(rest[0]["lengths"], dtype=torch.float64)
    if name == "speechbrain_statistics":  # the only one of speechbrain that rounds
        lengths = (lengths * x.shape[-1]).round()
    elif name.startswith("speechbrain"):
        lengths = (torch.arange(x.shape[-1]) < (lengths * x.shape[-1])[:, None]).sum(dim=1)
    return x, lengths.long()


def test_no_golden_is_left_out(golden):
    assert {path.stem for path in (golden / "poolings").glob("*.json")} == set(GOLDENS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", GOLDENS)
def test_matches_toolkit(golden, name, dtype):
    entry = json.loads((golden / "poolings" / f"{name}.json").read_text())
    arrays = np.load(golden / "poolings" / f"{name}.npz")
    kind, options, names = GOLDENS[name]
    pool = poolings.create(kind, 24, **options)
    pool.load_state_dict(renamed(entry["state"], names), strict=True)
    pool = pool.to(dtype).eval()
    assert len(entry["cases"]) >= 4
    for case in entry["cases"]:
        x, lengths = golden_input(golden, name, case)
        with torch.inference_mode():
            got = pool(x.to(dtype), lengths)
        key, facts = f"{case['case']}__pooled", case["outputs"]["pooled"]
        want = arrays[key].reshape(len(x), -1)
        assert got.dtype == dtype and got.shape == want.shape == (2, pool.output_size)
        if not facts.get("finite", True):
            assert case["case"] == "T1" and np.isnan(want).any()
            mean, std = x.reshape(2, 24), torch.full((2, 24), ONE_FRAME_STD[name])
            want = (std if kind == "tsdp" else torch.cat([mean, std], dim=1)).numpy()
            bound = 1e-6
        else:
            bound = 1e-6 if dtype == torch.float64 else 2e-5
            if dtype == torch.float32 and name.startswith("espnet") and f"{key}_f32" in arrays:
                want = arrays[f"{key}_f32"]  # its clamp depends on the type
        assert np.abs(got.numpy() - want).max() <= bound * np.abs(want).max(), case["case"]


def relu(x):
    return np.maximum(x, 0)


def root(add=0.0, low=0.0, high=np.inf):
    return lambda var: np.sqrt(np.clip(var + add, low, high))


# By the formulas of the toolkits: what numpy subtracts from T in the variance of the context, its root, the root of the
# weighted variance, and the activations before and after batch norm.
FORMULAS = {
    "asp_channel": (None, None, root(low=1e-5), relu, None),
    "astp": (1, root(add=1e-7), root(low=1e-7), None, np.tanh),
    "astp_3dspeaker": (1, root(add=1e-10), root(low=1e-10), None, np.tanh),
    "chn_attn_stat": (0, root(low=np.finfo(np.float64).eps), root(low=1e-4, high=1e4), relu, None),
    "rawnet3": (1, root(low=1e-4, high=1e4), root(low=1e-4, high=1e4), relu, None),
    "speechbrain": (0, root(low=1e-12), root(low=1e-12), relu, np.tanh),
    "taoruijie": (1, root(low=1e-4), root(low=1e-4), relu, np.tanh),
}


def softmax(logits):
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def attentive_by_hand(name, pool, x):
    """One utterance (C, T) by the formula, with the tensor of 3C channels."""
    ddof, context, deviation, before, after = FORMULAS[name]
    weights = {key: value.numpy() for key, value in pool.state_dict().items()}
    seen = x
    if context is not None:
        statistics = (x.mean(1), context(x.var(1, ddof=ddof)))
        seen = np.concatenate([x, *(np.tile(value[:, None], x.shape[1]) for value in statistics)])
    hidden = weights["fc1.weight"][..., 0] @ seen + weights["fc1.bias"][:, None]
    if before is not None:
        hidden = before(hidden) - weights["bn.running_mean"][:, None]
        hidden *= (weights["bn.weight"] / np.sqrt(weights["bn.running_var"] + 1e-5))[:, None]
        hidden += weights["bn.bias"][:, None]
    if after is not None:
        hidden = after(hidden)
    alpha = softmax(weights["fc2.weight"][..., 0] @ hidden + weights["fc2.bias"][:, None])
    mean = (alpha * x).sum(1)
    return np.concatenate([mean, deviation((alpha * (x - mean[:, None]) ** 2).sum(1))])


def small(name, channels=8, **options):
    """A pooling of any name, small where it has a size, with batch-norm statistics and priors that do something."""
    known = poolings.options(name)
    sizes = {"bottleneck": 5, "heads": 2 if name == "mhastp" else 4}
    torch.manual_seed(0)
    pool = poolings.create(name, channels, **{k: v for k, v in sizes.items() if k in known}, **options)
    for key, value in (*pool.named_parameters(), *pool.named_buffers()):
        if key.endswith(("running_var", "bn.weight")):
            value.data.uniform_(0.5, 2)
        elif "prior" in key or key.endswith(("running_mean", "bn.bias")):
            value.data.normal_()
    return pool.eval()


@pytest.mark.parametrize("shared", [False, True], ids=["per_channel", "shared"])
@pytest.mark.parametrize("name", FORMULAS)
def test_attentive_formula(name, shared):
    """Every dialect, also those of which there is no golden; the second channel hits every lower bound."""
    options = {"shared_weights": shared} if "shared_weights" in poolings.options(name) else {}
    pool = small(name, **options).double()
    x = torch.randn(3, 8, 6, dtype=torch.float64)
    x[:, 1] = x[:, 1, :1]
    x[:, 2] *= 300  # beyond the upper bounds
    got = pool(x).detach().numpy()
    for row, utterance in zip(got, x.numpy(), strict=True):
        want = attentive_by_hand(name, pool, utterance)
        assert np.abs(row - want).max() < 1e-9 * np.abs(want).max()


@pytest.mark.parametrize("name", ["sap", "asp"])
def test_one_weight_per_frame_formula(name):
    pool = small(name).double()
    assert {key: tuple(value.shape) for key, value in pool.state_dict().items()} == {
        "attention": (8, 1), "sap_linear.weight": (8, 8), "sap_linear.bias": (8,),
    }  # fmt: skip
    x = torch.randn(8, 6, dtype=torch.float64)
    x[1] = x[1, 0]
    weights = {key: value.numpy() for key, value in pool.state_dict().items()}
    hidden = np.tanh(weights["sap_linear.weight"] @ x.numpy() + weights["sap_linear.bias"][:, None])
    alpha = softmax(weights["attention"].T @ hidden)
    want = (alpha * x.numpy()).sum(1)
    if name == "asp":
        var = (alpha * x.numpy() ** 2).sum(1) - want**2
        want = np.concatenate([want, np.sqrt(np.maximum(var, 1e-5))])
    assert np.abs(pool(x[None]).detach().numpy()[0] - want).max() < 1e-9


def test_max():
    x = torch.tensor([[[3.0, -2.0, 7.0], [-5.0, -4.0, 0.0]], [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]])
    pool = poolings.create("max", 2)
    assert pool(x).tolist() == [[7, 0], [3, 6]]
    assert pool(x, torch.tensor([2, 0])).tolist() == [[3, -4], [0, 0]]


@pytest.mark.parametrize("with_std", [False, True])
def test_xi_formula(with_std):
    """The posterior of a Gaussian, with the precisions summed as they are."""
    pool = small("xi", with_std=with_std).double()
    x = torch.randn(1, 8, 6, dtype=torch.float64)
    with torch.no_grad():
        hidden = pool.bn(torch.relu(pool.fc1(x)))
        precision = torch.nn.functional.softplus(pool.fc2(hidden))[0] ** 2
        prior = pool.prior_logprec[0].exp()
        total = precision.sum(1) + prior
        want = ((precision * x[0]).sum(1) + prior * pool.prior_mean[0]) / total
        if with_std:
            spread = (precision * (x[0] - want[:, None]) ** 2).sum(1) + prior * (pool.prior_mean[0] - want) ** 2
            want = torch.cat([want, (spread / total).sqrt()])
        assert (pool(x)[0] - want).abs().max() < 1e-12


# A logit of -600 has steps of 6e-5 in float32.
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-3)], ids=str)
def test_xi_where_softplus_vanishes(dtype, bound):
    """Precisions of exp(-600) still weigh against each other, and have a gradient."""
    pool = small("xi").to(dtype)
    pool.fc2.bias.data.fill_(-300)
    pool.prior_logprec.data.fill_(-600)
    x = torch.randn(2, 8, 5, dtype=dtype, requires_grad=True)
    out = pool(x)
    with torch.no_grad():
        logits = 2 * pool.fc2(pool.bn(torch.relu(pool.fc1(x))))
        weights = torch.cat([pool.prior_logprec.expand(2, 8)[..., None], logits], dim=-1).softmax(dim=-1)
        want = (weights * torch.cat([pool.prior_mean.expand(2, 8)[..., None], x], dim=-1)).sum(dim=-1)
    assert torch.allclose(out, want, atol=bound)
    out.sum().backward()
    for value in (x, *pool.parameters()):
        assert torch.isfinite(value.grad).all() and value.grad.abs().max() > 0


@pytest.mark.parametrize("name", poolings.list())
def test_row_of_padded_batch_equals_utterance_alone(name):
    """Also as (B, T, C) memory and as a map, with NaN in the padding; random lengths from one frame to all."""
    pool = small(name)
    generator = torch.Generator().manual_seed(1)
    for _ in range(8):
        batch, frames = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((1, 6), (1, 40)))
        x = torch.randn(batch, 8, frames, generator=generator) * 3 + 1
        lengths = torch.randint(1, frames + 1, (batch,), generator=generator)
        padded = x.masked_fill(torch.arange(frames) >= lengths[:, None, None], torch.nan)
        last = padded.transpose(1, 2).contiguous().transpose(1, 2)
        with torch.inference_mode():
            alone = torch.cat([pool(x[i : i + 1, :, :n]) for i, n in enumerate(lengths.tolist())])
            for got in (pool(padded, lengths), pool(last, lengths), pool(padded.reshape(batch, 2, 4, -1), lengths)):
                assert (got - alone).abs().max() <= 1e-5 * alone.abs().max()


def test_batch_norm_in_training_counts_padding():
    """As in every toolkit; only the statistics over time leave it out."""
    x, found = torch.randn(3, 8, 7), []
    for lengths in (None, torch.tensor([7, 1, 4])):
        pool = small("speechbrain", global_context=False).train()
        pool(x, lengths)
        found.append(pool.bn.running_mean)
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-7)  # with lengths the modules of torch run


@pytest.mark.parametrize("name", poolings.list())
def test_gradients_do_not_see_padding(name):
    pool = small(name)
    x, lengths = torch.randn(3, 8, 7), torch.tensor([7, 1, 4])
    padding = torch.arange(7) >= lengths[:, None, None]
    found = []
    for fill in (torch.nan, 0.0):
        pool.zero_grad()
        leaf = x.masked_fill(padding, fill).requires_grad_()
        pool(leaf, lengths).square().sum().backward()
        assert (leaf.grad.masked_fill(~padding, 0) == 0).all()
        found.append([leaf.grad, *(parameter.grad for parameter in pool.parameters())])
    for with_nan, without in zip(*found, strict=True):
        assert torch.equal(with_nan, without)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", poolings.list())
def test_gradcheck(name, training):
    pool = small(name, channels=4).double().train(training)
    x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([5, 3])
    parameters = [p.requires_grad_() for p in pool.parameters()]
    keys = [key for key, _ in pool.named_parameters()]

    def run(x, *values):
        state = {key: value.clone() for key, value in pool.named_buffers()}  # batch norm moves them
        return torch.func.functional_call(pool, state | dict(zip(keys, values, strict=True)), (x, lengths))

    assert gradcheck(run, (x, *parameters))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", poolings.list())
def test_one_frame_and_constant_input(name, training):
    """Neither the result nor any gradient is NaN or infinite, also in a row of one frame or of none."""
    pool = small(name).train(training)
    one, constant = torch.randn(2, 8, 1), torch.randn(3, 8, 1).expand(3, 8, 9)
    for x, lengths in ((one, None), (constant, None), (constant, torch.tensor([9, 1, 0])), (0 * constant, None)):
        pool.zero_grad()
        leaf = x.clone().requires_grad_()
        out = pool(leaf, lengths)
        out.square().sum().backward()
        assert torch.isfinite(out).all()
        assert all(torch.isfinite(value.grad).all() for value in (leaf, *pool.parameters()))


@pytest.mark.parametrize("name", sorted({*poolings.list()} - {"tsdp", "xi", "mhastp", "mqmhastp"}))
def test_one_frame_is_its_own_mean(name):
    x = torch.randn(2, 8, 1)
    assert torch.allclose(small(name)(x)[:, :8], x[..., 0])


@pytest.mark.parametrize("name", poolings.list())
def test_empty_batch_and_no_frames(name):
    pool = small(name)
    with torch.no_grad():
        assert pool(torch.zeros(0, 8, 5), torch.zeros(0, dtype=torch.int64)).shape == (0, pool.output_size)
        none = pool(torch.zeros(2, 8, 0))
        assert torch.isfinite(none).all()
        assert torch.equal(none, pool(torch.full((2, 8, 5), torch.nan), torch.tensor([0, 0])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", poolings.list())
def test_half_precision(name, dtype):
    """Near the float32 result though mean and square of the values are beyond the type's digits, as is their sum."""
    pool = small(name)
    x = (0.1 * torch.randn(2, 8, 300) + 20).to(dtype)
    x[:, 0] = 250  # 300 of them are beyond float16
    lengths = torch.tensor([300, 211])
    with torch.no_grad():
        exact = pool(x.float(), lengths)
        for got in (pool(x, lengths), pool.to(dtype)(x, lengths)):
            assert got.dtype == dtype
            # The second term is for logits in half precision: a fifth of the standard deviation of a frame.
            assert ((got.float() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 0.02).all()


@pytest.mark.parametrize("name", ["tstp", "speechbrain", "mqmhastp", "asp"])
def test_autocast_keeps_statistics_in_float32(name):
    pool = small(name)
    x = torch.randn(2, 8, 50) * 0.01 + 5  # a variance of 1e-4 beside a square of 25; a step of bfloat16 is 0.03
    exact = pool(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = pool(x)
    assert got.dtype == torch.float32
    assert (got - exact).abs().max() < 1e-3


@pytest.mark.parametrize("name", poolings.list())
def test_gradients_of_each_row_by_vmap(name):
    pool, x, lengths = small(name).float().eval(), torch.randn(3, 8, 9), torch.tensor([9, 4, 7])

    def loss(x, length):
        return pool(x[None], length[None]).sum()

    found = torch.func.vmap(torch.func.grad(loss))(x, lengths)
    for row, length, gradient in zip(x, lengths, found, strict=True):
        row = row.clone().requires_grad_()
        (want,) = torch.autograd.grad(loss(row, length), row)
        torch.testing.assert_close(gradient, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


def test_maps_are_flattened_channel_major():
    pool = poolings.create("tap", 6)
    x = torch.arange(6.0).reshape(1, 2, 3, 1).expand(1, 2, 3, 4)
    assert pool(x).tolist() == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("name", ["speechbrain", "xi", "mhastp"])
def test_compiles_and_exports(name):
    pool = small(name)
    x, lengths = torch.randn(3, 8, 20), torch.tensor([20, 7, 1])
    frames = torch.export.Dim("frames", min=2, max=4096)
    batch = torch.export.Dim("batch", min=2, max=512)
    with torch.no_grad():
        want = pool(x, lengths)
        program = torch.export.export(pool, (x, lengths), dynamic_shapes=({0: batch, 2: frames}, {0: batch})).module()
        compiled = torch.compile(pool, fullgraph=True, dynamic=True, backend="aot_eager")
        for run in (program, compiled):
            assert torch.allclose(run(x, lengths), want, atol=1e-6)
            longer = torch.randn(2, 8, 33)
            assert torch.allclose(run(longer, torch.tensor([30, 33])), pool(longer, torch.tensor([30, 33])), atol=1e-6)


@pytest.mark.full
def test_compiled_training_takes_any_length():
    """One compilation for the first shape, one for all others."""
    pool = small("speechbrain").train()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(pool, fullgraph=True, backend=counter)
    for batch, frames in ((3, 20), (4, 30), (18, 41), (2, 55)):
        lengths = torch.randint(1, frames + 1, (batch,))
        state = {key: value.clone() for key, value in pool.state_dict().items()}
        found = []
        x = torch.randn(batch, 8, frames)
        for run in (pool, compiled):
            pool.load_state_dict(state)
            pool.zero_grad()
            leaf = x.clone().requires_grad_()
            out = run(leaf, lengths)
            out.square().sum().backward()
            found.append([out, leaf.grad, pool.fc1.weight.grad, pool.fc2.weight.grad, pool.bn.running_var.clone()])
        for eager, fast in zip(*found, strict=True):
            assert torch.allclose(eager, fast, rtol=1e-4, atol=1e-5 * float(eager.detach().abs().max()))
    assert counter.frame_count == 2


def test_sizes_and_names():
    assert poolings.list() == sorted(poolings.list())
    factor = {"mean": 1, "tap": 1, "max": 1, "tsdp": 1, "sap": 1, "xi": 1, "mqmhastp": 4}
    for name in poolings.list():
        pool = small(name)
        assert pool.channels == 8
        assert pool.output_size == 8 * factor.get(name, 2)
        assert pool(torch.randn(2, 8, 3)).shape == (2, pool.output_size)
    assert poolings.create("taoruijie", 8).fc1.out_channels == 256
    assert poolings.create("asp_channel", 8, with_std=False).output_size == 8
    assert AttentiveStatsPool(8, 4).fc1.weight.shape == (4, 24, 1)
    assert AttentiveStatsPool(8, 4, global_context=False).fc1.weight.shape == (4, 8, 1)


def test_deviation_of_weighted_frames_has_no_correction():
    var = torch.tensor([[2.0]])
    assert Deviation(unbiased=True).of(var) == Deviation().of(var)
    assert Deviation(unbiased=True).of(var, torch.tensor([[2.0]])) == 2


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: poolings.create("aspt", 8), "unknown pooling 'aspt' .did you mean 'asp'"),
        (lambda: poolings.create("astp", 8, bottlenek=4), "unknown option 'bottlenek' of pooling astp .did you mean"),
        (lambda: poolings.create("tap", 8, eps=1), "unknown option 'eps' of pooling tap"),
        (lambda: poolings.create("mhastp", 9), "channels must be a multiple of heads=2, got 9"),
        (lambda: poolings.create("mhastp", 8, layers=0), "layers of pooling mhastp must be a positive integer"),
        (lambda: poolings.create("mqmhastp", 8, queries=0), "queries of pooling mqmhastp must be a positive integer"),
        (lambda: poolings.create("astp", 0), "channels must be a positive integer, got 0"),
        (lambda: poolings.create("tap", "a"), "channels must be a positive integer, got 'a'"),
        (lambda: AttentiveStatsPool(8, form="speechbrain"), "poolings.create takes names"),
        (lambda: poolings.create("tstp", 8, eps=-1), "eps of pooling tstp must be a number of at least 0"),
        (lambda: poolings.create("tap", 8)(torch.zeros(2, 7, 5)), r"of 8 channels, got \(2, 7, 5\)"),
        (lambda: poolings.create("tap", 8)(torch.zeros(2, 8)), r"of 8 channels, got \(2, 8\)"),
        (lambda: poolings.create("max", 8)(torch.zeros(2, 8, 5, dtype=torch.int64)), "x must be float16"),
        (lambda: poolings.create("max", 8)(torch.zeros(2, 8, 5), torch.tensor([5, 6])), "row 1 has 6"),
        (lambda: poolings.create("mhastp", 8)(torch.zeros(2, 8, 5), torch.tensor([5, 6])), "0..5, row 1 has 6"),
        (lambda: poolings.create("xi", 8)(torch.zeros(2, 8, 5), torch.tensor(5)), "lengths must have shape"),
        (lambda: poolings.create("tstp", 8)(torch.zeros(2, 8, 5), torch.ones(2)), "lengths must be an int64 tensor"),
        (lambda: poolings.create("astp", 8)(torch.zeros(2, 8, 5), torch.tensor([5])), "lengths must have shape"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(InputError, match=words):
        call()
