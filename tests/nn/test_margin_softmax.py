"""Additive angular margin softmax against the original wespeaker code, finite differences and extreme cosines."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from spkfast.nn import MarginSoftmaxLoss
from spkfast.reference import margin_softmax_loss
from tests.models.golden import golden_weight


@pytest.mark.parametrize("name", ["wespeaker_arcmargin_hard", "wespeaker_arcmargin_easy", "taoruijie_aamsoftmax"])
def test_matches_toolkits(golden, name):
    """Loss and gradients in float64, also for cosines within 1e-6 of 1 and on both sides of the fallback threshold."""
    entry = json.loads((golden / "losses" / f"{name}.json").read_text())
    arrays = np.load(golden / "losses" / f"{name}.npz")
    config = entry["config"]
    ((key, shape, rule),) = entry["state"]
    checked = 0
    for case in entry["cases"]:
        if not case["case"].endswith("f64") or case["nan_or_inf_in_grad"]:
            continue
        x = torch.from_numpy(arrays[case["x"]]).double()
        head = MarginSoftmaxLoss(
            shape[1],
            shape[0],
            margin=config.get("margin", config.get("m")),
            scale=config.get("scale", config.get("s")),
            easy_margin=config.get("easy_margin", False),
            fallback="continuous" if "wespeaker" in name else "linear",
        ).double()
        head.weight.data = torch.from_numpy(golden_weight(key, shape, rule)).double()
        x.requires_grad_()
        loss = head(x, torch.tensor(case["labels"]))
        loss.backward()
        prefix = case["case"]
        assert loss.item() == pytest.approx(case["loss"], rel=1e-7)
        for got, want in ((x.grad, f"{prefix}__grad_x"), (head.weight.grad, f"{prefix}__grad__{key}")):
            assert np.abs(got.numpy() - arrays[want]).max() <= 1e-6 * np.abs(arrays[want]).max()
        checked += 1
    assert checked >= 2


@pytest.mark.parametrize("fallback", ["linear", "continuous"])
@pytest.mark.parametrize("easy_margin", [False, True])
def test_gradient_formula(fallback, easy_margin):
    torch.manual_seed(0)
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 6, 3, 3, 1])
    x.data[1] = -weight.data[6] + 0.05 * torch.randn(6, dtype=torch.float64)  # past pi - margin

    def loss(x, weight):
        return margin_softmax_loss(x, weight, target, 0.5, 10.0, easy_margin, fallback)[0]

    assert torch.autograd.gradcheck(loss, (x, weight))


def test_parallel_and_zero_embeddings_stay_finite():
    head = MarginSoftmaxLoss(4, 3)
    x = torch.cat([head.weight.detach()[:2], -head.weight.detach()[2:], torch.zeros(1, 4)]).requires_grad_()
    loss, stats = head(x, torch.tensor([0, 1, 2, 0]), return_stats=True)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(x.grad).all() and torch.isfinite(head.weight.grad).all()
    assert 0.5 <= stats.accuracy <= 1


def test_margin_zero_is_plain_softmax_and_half_precision_is_promoted():
    torch.manual_seed(0)
    head = MarginSoftmaxLoss(8, 5, margin=0.0, scale=30.0)
    x, target = torch.randn(6, 8), torch.tensor([0, 1, 2, 3, 4, 0])
    cosine = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(head.weight).T
    torch.testing.assert_close(head(x, target), torch.nn.functional.cross_entropy(30 * cosine, target))
    with torch.autocast("cpu", torch.bfloat16):
        assert head(x.bfloat16(), target).dtype == torch.float32
    with pytest.raises(ValueError, match="fallback must be"):
        MarginSoftmaxLoss(8, 5, fallback="none")
