"""ECAPA-TDNN against numbers of the original wespeaker code, parameter counts, and padded batches."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from spkfast import models
from spkfast.errors import InputError
from spkfast.nn.pooling import AttentiveStatsPool
from tests.models.golden import golden_weight

_RENAMES = (
    ("layer1.", "stem."), ("layer2.se_res2block.", "blk1."), ("layer3.se_res2block.", "blk2."),
    ("layer4.se_res2block.", "blk3."), ("conv.", "mfa.conv."), ("pool.linear1.", "asp.fc1."),
    ("pool.linear2.", "asp.fc2."), ("bn.", "post.bn."), ("linear.", "emb.fc."), ("bn2.", "emb.bn."),
)  # fmt: skip
_BLOCK_RENAMES = (("0.", "in."), ("2.", "out."), ("3.linear1.", "se.fc1."), ("3.linear2.", "se.fc2."))


def canonical(key: str) -> str:
    """A wespeaker key under its canonical name."""
    old, new = next((old, new) for old, new in _RENAMES if key.startswith(old))
    rest = key[len(old) :]
    if new.startswith("blk"):
        if rest.startswith("1."):
            _, kind, index, tail = rest.split(".")
            return f"{new}res.{index}.{'conv' if kind == 'convs' else 'bn'}.{tail}"
        old_part, new_part = next(pair for pair in _BLOCK_RENAMES if rest.startswith(pair[0]))
        rest = new_part + rest[len(old_part) :]
    return new + rest


def load_golden(folder, name):
    """Model with the golden's weights in float64, its description and its arrays."""
    entry = json.loads((folder / f"{name}.json").read_text())
    config = entry["config"]
    published = config.get("function", "")  # the two published sizes are functions that fix the rest
    model = models.create(
        "ecapa_tdnn", feature_dim=config["feat_dim"], channels=config.get("channels", 512),
        embedding_dim=config["embed_dim"], emb_bn=config.get("emb_bn", False),
        global_context=config.get("global_context_att", "GLOB" in published),
    ).double()  # fmt: skip
    state = {canonical(key): torch.from_numpy(golden_weight(key, shape, rule)) for key, shape, rule in entry["state"]}
    model.load_state_dict(state, strict=True)
    return model, entry, np.load(folder / f"{name}.npz")


def golden_features(golden, case):
    item = case["inputs"][0]
    return torch.from_numpy(np.load(golden / item["file"])[item["key"]])


@pytest.mark.parametrize(
    "name", ["wespeaker_ecapa_small_glob", "wespeaker_ecapa_small_astp", "wespeaker_ecapa_small_embbn",
             "wespeaker_ecapa_tdnn_c512", "wespeaker_ecapa_tdnn_glob_c512"],
)  # fmt: skip
def test_matches_wespeaker(golden, name):
    model, entry, arrays = load_golden(golden / "models", name)
    for dtype in (torch.float64, torch.float32):
        model.eval().to(dtype)
        for case in entry["cases"]:
            with torch.inference_mode():
                got = model(golden_features(golden, case).to(dtype)).numpy()
            want = arrays[f"{case['case']}__embedding"]
            floor = case["outputs"]["embedding"]["peer_float32_rel_err"]
            assert np.abs(got - want).max() / np.abs(want).max() < max(2e-5, 10 * floor)


def test_training_step_matches_wespeaker(golden):
    """Output, gradients and batch-norm statistics of one forward and backward in training mode."""
    model, entry, arrays = load_golden(golden / "models_train", "wespeaker_ecapa_small_glob")
    features = golden_features(golden, entry).double().requires_grad_()
    output = model.train()(features)
    scalar = output * torch.from_numpy(np.random.default_rng(12345).standard_normal(tuple(output.shape)))
    scalar.sum().backward()
    parameters = dict(model.named_parameters())
    buffers = dict(model.named_buffers())
    largest = 0.0
    for key in arrays:
        kind, _, name = key.partition("__")
        got = (
            {
                "output": lambda name: output,
                "grad_input": lambda name: features.grad,
                "grad": lambda name: parameters[canonical(name)].grad,
                "after": lambda name: buffers[canonical(name)],
            }[kind](name)
            .detach()
            .numpy()
        )
        stride = entry["thinned"][key]["stride"] if key in entry["thinned"] else 1
        error = np.abs(got.reshape(-1)[::stride] - arrays[key].reshape(-1)).max()
        # A bias in front of batch norm has a gradient of rounding noise, so the bound has an absolute part.
        assert error < 2e-6 * np.abs(arrays[key]).max() + 1e-6, key
        largest = max(largest, float(error))
    assert largest > 0


def test_parameter_counts():
    def count(**config):
        return sum(p.numel() for p in models.create("ecapa_tdnn", **config).parameters())

    assert count(channels=512) == 6_190_720
    assert count(channels=1024) == 14_657_088
    assert count(channels=512, global_context=False) == 5_797_504
    assert count(channels=1024, global_context=False) == 14_263_872


def test_row_of_padded_batch_equals_utterance_alone():
    torch.manual_seed(0)
    model = models.create("ecapa_tdnn", feature_dim=20, channels=32, embedding_dim=24, mfa_channels=48).eval()
    for module in model.modules():  # statistics that are not the trivial ones
        if isinstance(module, torch.nn.BatchNorm1d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    lengths = torch.tensor([61, 1, 2, 17, 40])
    features = torch.randn(5, 61, 20)
    with torch.inference_mode():
        batch = model(features, lengths)
        for row, length in enumerate(lengths.tolist()):
            alone = model(features[row : row + 1, :length])[0]
            assert torch.isfinite(alone).all()
            assert (batch[row] - alone).abs().max() / alone.abs().max() < 1e-5


def test_one_frame_and_constant_channels_have_finite_gradients():
    pool = AttentiveStatsPool(4, 3)
    for x in (torch.randn(2, 4, 1), torch.ones(2, 4, 9)):
        x = x.requires_grad_()
        pool(x).square().sum().backward()
        assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize(
    ("config", "words"),
    [({"chanels": 64}, "did you mean 'channels'"), ({"channels": 63}, "multiple of scale=8"),
     ({"dialect": "other"}, "dialect must be"), ({"dilations": (1, 2)}, "must name the stem and each block")],
)  # fmt: skip
def test_bad_config(config, words):
    with pytest.raises(InputError, match=words):
        models.create("ecapa_tdnn", **config)
    with pytest.raises(InputError, match="did you mean 'ecapa_tdnn'"):
        models.create("ecapa_tdn")
