"""Margin softmax heads against the original toolkits, their definition, finite differences and extreme cosines."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from spkfast import functional
from spkfast.errors import InputError
from spkfast.nn import MarginSoftmaxLoss, mean_embeddings
from spkfast.reference import MarginForm
from spkfast.reference import margin_softmax_loss as definition
from tests.models.golden import golden_weight

_CONTINUOUS = {"fallback": "continuous"}
_LINEAR = {"fallback": "linear"}
# Settings of our head by golden file, beside margin and scale.
HEADS: dict[str, dict[str, Any]] = {
    "3dspeaker_arcmargin_hard": _CONTINUOUS,
    "clovaai_aamsoftmax_easy": _LINEAR | {"easy_margin": True},
    "clovaai_aamsoftmax_hard": _LINEAR,
    "clovaai_amsoftmax_a": {"kind": "am"},
    "clovaai_amsoftmax_b": {"kind": "am"},
    "clovaai_softmax": {"kind": "softmax"},
    "espnet_aamsoftmax_easy": _LINEAR | {"easy_margin": True},
    "espnet_aamsoftmax_hard": _LINEAR,
    "espnet_intertopk_subcenter_a": _CONTINUOUS | {"num_subcenters": 3, "topk": 5, "topk_margin": 0.06 * 0.3 / 0.2},
    "espnet_intertopk_subcenter_noupdate": _CONTINUOUS | {"num_subcenters": 3, "topk": 5, "topk_margin": 0.0},
    "espnet_softmax": {"kind": "am", "margin": 0.0, "scale": 1.0},
    "speechbrain_aam_easy": _LINEAR | {"easy_margin": True},
    "speechbrain_aam_hard": _LINEAR,
    "taoruijie_aamsoftmax": _LINEAR,
    "wespeaker_addmargin_a": {"kind": "am"},
    "wespeaker_arcmargin_easy": {"easy_margin": True},
    "wespeaker_arcmargin_hard": _CONTINUOUS,
    "wespeaker_arcmargin_intertopk_subcenter_a": {"num_subcenters": 3, "topk": 5, "topk_margin": 0.06},
    "wespeaker_arcmargin_intertopk_subcenter_easy": {
        "num_subcenters": 2, "topk": 3, "topk_margin": 0.1, "easy_margin": True,
    },
    "wespeaker_arcmargin_intertopk_subcenter_lm": {"num_subcenters": 3},
    "wespeaker_arcmargin_intertopk_subcenter_noupdate": {"num_subcenters": 3, "topk": 5, "topk_margin": 0.0},
    "wespeaker_sphereface2_A": {"kind": "sphereface2", "margin_type": "A"},
    "wespeaker_sphereface2_C": {"kind": "sphereface2", "margin_type": "C"},
}  # fmt: skip
# What other issues bring: metric learning, a hyperbolic head, and one with batch norm before it.
NOT_HERE = ("angleproto", "ge2e", "proto", "triplet", "hyperbolic", "train_bn")


def test_every_golden_head_is_used(golden):
    names = {path.stem for path in (golden / "losses").glob("*.json")}
    assert {name for name in names if not any(word in name for word in NOT_HERE)} == set(HEADS)


class Case(NamedTuple):
    """A golden run: its name, what went in, and what came out."""

    name: str
    x: Tensor
    labels: Tensor
    head: MarginSoftmaxLoss
    loss: float
    gradients: dict[str, Tensor]

    def found(self, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and gradients of our head."""
        head, x = copy.deepcopy(self.head).to(dtype), self.x.to(dtype).requires_grad_()
        loss = head(x, self.labels)
        loss.backward()
        return loss.detach(), {"x": x.grad} | {name: value.grad for name, value in head.named_parameters()}


def cases_of(golden: Path, name: str) -> Iterator[Case]:
    """The cases of a file in which the peer has no NaN."""
    entry = json.loads((golden / "losses" / f"{name}.json").read_text())
    arrays = np.load(golden / "losses" / f"{name}.npz")
    config = entry["config"]
    given = {"margin": config.get("margin", config.get("m")), "scale": config.get("scale", config.get("s"))}
    settings: dict[str, Any] = {key: value for key, value in given.items() if value is not None} | HEADS[name]
    (key, shape, rule), *biases = entry["state"]
    weight = torch.from_numpy(golden_weight(key, shape, rule)).double()
    weight = weight.T if key == "W" else weight  # clova's AM-softmax keeps its weight transposed
    head = MarginSoftmaxLoss(weight.shape[1], weight.shape[0] // settings.get("num_subcenters", 1), **settings).double()
    head.weight.data = weight.contiguous()
    for bias_key, bias_shape, bias_rule in biases:
        bias = torch.from_numpy(golden_weight(bias_key, bias_shape, bias_rule)).double().flatten()
        assert head.bias is not None and head.bias.shape == bias.shape
        head.bias.data = bias
    for case in entry["cases"]:
        if case["nan_or_inf_in_grad"]:
            continue
        prefix = case["case"]
        wanted = {"x": arrays[f"{prefix}__grad_x"], "weight": arrays[f"{prefix}__grad__{key}"]}
        if biases:
            wanted["bias"] = arrays[f"{prefix}__grad__{biases[0][0]}"].reshape(-1)
        gradients = {name: torch.from_numpy(value).double() for name, value in wanted.items()}
        if key == "W":
            gradients["weight"] = gradients["weight"].T
        x = torch.from_numpy(arrays[case["x"]]).double()
        yield Case(prefix, x, torch.tensor(case["labels"]), head, case["loss"], gradients)


@pytest.mark.parametrize("name", HEADS)
def test_matches_toolkits(golden, name):
    """Loss and gradients in float64, also for cosines within 1e-6 of 1 and on both sides of the fallback threshold."""
    checked = []
    for case in cases_of(golden, name):
        # What the peer computed in float32, as speechbrain always does, is off by that, and wrong where it is extreme.
        single = case.name.endswith("f32") or "speechbrain" in name
        if single and case.name.startswith(("extreme", "exact")):
            continue
        loss, gradients = case.found(torch.float64)
        assert loss.item() == pytest.approx(case.loss, rel=1e-5 if single else 1e-7)
        assert gradients.keys() == case.gradients.keys()
        for part, want in case.gradients.items():
            error = float((gradients[part] - want).abs().amax())
            assert error <= (1e-4 if single else 1e-6) * float(want.abs().amax()), part
        checked.append(case.name)
    assert "normal_f64" in checked and len(checked) >= 2


@pytest.mark.parametrize("name", HEADS)
def test_float32_matches_toolkits(golden, name):
    """What runs by itself: loss within 1e-4, gradients 1e-3; those of extreme cosines point the same way."""
    checked = []
    for case in cases_of(golden, name):
        if not case.name.endswith("f64"):
            continue
        extreme = case.name.startswith(("extreme", "exact"))
        loss, gradients = case.found(torch.float32)
        assert loss.dtype == torch.float32 and loss.isfinite()
        if not (extreme and "speechbrain" in name):
            assert abs(loss.item() - case.loss) <= 1e-4 * max(1.0, case.loss)
        for part, want in case.gradients.items():
            got = gradients[part].double()
            assert got.isfinite().all()
            if extreme:
                # The peers have no finite or no right gradient at exactly 1.
                if case.name.startswith("extreme") and "speechbrain" not in name:
                    assert float((got * want).sum() / (got.norm() * want.norm())) > 0.99, part
            else:
                assert float((got - want).norm()) <= 1e-3 * float(want.norm()), part
        checked.append(case.name)
    assert {"normal_f64"} <= set(checked)


FORMS = [
    MarginForm("softmax"),
    MarginForm("softmax", label_smoothing=0.1),
    MarginForm("am", 0.3, 10.0),
    MarginForm("aam", 0.5, 10.0),
    MarginForm("aam", 0.5, 10.0, fallback="linear"),
    MarginForm("aam", 0.5, 10.0, easy_margin=True, label_smoothing=0.2),
    MarginForm("aam", 0.5, 10.0, num_subcenters=3, topk=2, topk_margin=0.1),
    MarginForm("am", 0.2, 10.0, num_subcenters=2, topk=20, topk_margin=0.1, label_smoothing=0.1),
    MarginForm("sphereface2", 0.2, 10.0),
    MarginForm("sphereface2", 0.15, 10.0, margin_type="A", num_subcenters=2, power=2, balance=0.6),
]
form_ids = [", ".join(map(str, form)) for form in FORMS]


def batch(
    form: MarginForm, rows: int = 5, classes: int = 7, size: int = 6
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Embeddings, weight, target, bias; one row lies past ``pi - margin``."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(count, size, generator=generator, dtype=torch.float64)
        for count in (rows, classes * form.num_subcenters)
    )
    target = torch.arange(rows) % classes
    if rows > 1 and classes > 1:
        own = weight[form.num_subcenters : 2 * form.num_subcenters]
        x[1] = -own.mean(dim=0) + 0.05 * torch.randn(size, generator=generator, dtype=torch.float64)
    size = {"softmax": classes, "sphereface2": 1}.get(form.kind, 0)
    return x, weight, target, torch.randn(size, generator=generator, dtype=torch.float64) if size else None


@pytest.mark.parametrize("form", FORMS, ids=form_ids)
def test_gradient_formula(form):
    x, weight, target, bias = batch(form)
    row_weights = torch.linspace(0, 2, len(x), dtype=torch.float64)
    leaves = [value.requires_grad_() for value in (x, weight, bias) if value is not None]

    def loss(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return functional.margin_softmax_loss(
            x, weight, target, bias=bias, row_weights=row_weights, reduction="sum", **form._asdict()
        )

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize(("rows", "classes"), [*itertools.product([1, 5, 8], [1, 2, 7])])
@pytest.mark.parametrize("form", FORMS, ids=form_ids)
def test_is_its_definition(form, rows, classes):
    """Loss, gradients and statistics of what is computed from sums are those of what has all cosines in memory."""
    x, weight, target, bias = batch(form, rows, classes)
    leaves = [value.requires_grad_() for value in (x, weight, bias) if value is not None]
    losses, stats = functional.margin_softmax_loss(
        x, weight, target, bias=bias, reduction="none", return_stats=True, **form._asdict()
    )
    want = definition(x, weight, target, bias, form)
    torch.testing.assert_close(losses, want.loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(stats.accuracy, want.correct.double().mean())
    torch.testing.assert_close(stats.target_cosine, want.target_cosine.mean())
    slope = torch.linspace(1, 2, rows, dtype=torch.float64)
    got, wanted = (torch.autograd.grad((value * slope).sum(), leaves) for value in (losses, want.loss))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_reductions_weights_and_label_smoothing_are_those_of_torch():
    x, weight, target, bias = batch(MarginForm("softmax"))
    logits = x @ weight.T + bias
    for reduction in ("none", "sum", "mean"):
        got = functional.margin_softmax_loss(
            x, weight, target, bias=bias, kind="softmax", label_smoothing=0.1, reduction=reduction
        )
        want = torch.nn.functional.cross_entropy(logits, target, label_smoothing=0.1, reduction=reduction)
        torch.testing.assert_close(got, want)
    row_weights = torch.tensor([0.0, 1.0, 2.0, 0.0, 1.0])
    each = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    broken = torch.where(row_weights[:, None] == 0, torch.nan, x)  # a row that does not count may hold anything
    got = functional.margin_softmax_loss(
        broken, weight, target, bias=bias, kind="softmax", row_weights=row_weights.double()
    )
    torch.testing.assert_close(got, (each[1] + 2 * each[2] + each[4]) / 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "settings", [{}, {"num_subcenters": 3, "topk": 2, "topk_margin": 0.1}, {"kind": "sphereface2"}]
)
def test_parallel_and_zero_embeddings_stay_finite(settings, dtype):
    head = MarginSoftmaxLoss(4, 3, **settings).to(dtype)
    rows = head.weight.detach()[:: settings.get("num_subcenters", 1)]
    x = torch.cat([rows[:2], -rows[2:], torch.zeros(1, 4, dtype=dtype)]).requires_grad_()
    loss, stats = head(x, torch.tensor([0, 1, 2, 0]), return_stats=True)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(x.grad).all() and torch.isfinite(head.weight.grad).all()
    assert not x.grad[3].any() and x.grad[2].any()
    assert 0.5 <= stats.accuracy <= 1
    head.weight.data[-1] = 0  # a row of weights without a direction
    head.zero_grad()
    head(x, torch.tensor([0, 1, 2, 0])).backward()
    assert torch.isfinite(head.weight.grad).all() and not head.weight.grad[-1].any()


def test_margin_zero_is_plain_softmax_and_half_precision_is_promoted():
    torch.manual_seed(0)
    head = MarginSoftmaxLoss(8, 5, margin=0.0, scale=30.0)
    x, target = torch.randn(6, 8), torch.tensor([0, 1, 2, 3, 4, 0])
    cosine = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(head.weight).T
    torch.testing.assert_close(head(x, target), torch.nn.functional.cross_entropy(30 * cosine, target))
    with torch.autocast("cpu", torch.bfloat16):
        half = head(x.bfloat16(), target)
    assert half.dtype == torch.float32
    assert torch.equal(half, head(x.bfloat16().float(), target))


def test_penalty_of_the_hardest_grows_with_the_margin():
    head = MarginSoftmaxLoss(8, 5, margin=0.2, topk=2, topk_margin=0.06)
    assert head.form.topk_margin == 0.06
    head.margin = 0.05
    assert head.form.topk_margin == pytest.approx(0.015) and head.form.margin == 0.05
    assert "topk=2" in repr(head) and "margin=0.05" in repr(head)


@pytest.mark.parametrize("kind", ["aam", "softmax"])
def test_speakers_are_kept_and_added(kind):
    torch.manual_seed(0)
    settings: dict[str, Any] = {"num_subcenters": 2} if kind == "aam" else {}
    head = MarginSoftmaxLoss(4, 6, kind=kind, **settings)
    centers = settings.get("num_subcenters", 1)
    before = head.weight.detach().clone().view(6, centers, 4)
    head.keep_speakers([4, 0])
    assert head.num_speakers == head.output_size == 2
    assert torch.equal(head.weight.detach().view(2, centers, 4), before[[4, 0]])
    means = torch.eye(4)[:3]
    head.add_speakers(3, means)
    assert head.num_speakers == 5 and (head.bias is None or head.bias.shape == (5,))
    cosine = torch.nn.functional.normalize(head.weight.detach()).view(5, centers, 4)[2:] @ means.T
    assert torch.equal(cosine[:, 0], torch.eye(3))
    assert (cosine[:, 1:].diagonal(dim1=0, dim2=2) > 0.99).all() and not (
        cosine[:, 1:].diagonal(dim1=0, dim2=2) == 1
    ).any()
    head(torch.randn(3, 4), torch.tensor([4, 0, 2])).backward()
    assert head.weight.grad is not None and head.weight.grad.shape == (5 * centers, 4)
    for wrong in ([], [0, 0], [5], [-1]):
        with pytest.raises(InputError, match="speakers must"):
            head.keep_speakers(wrong)
    with pytest.raises(InputError, match="means must have shape"):
        head.set_speakers([0], torch.zeros(2, 4))
    with pytest.raises(InputError, match="count must be"):
        head.add_speakers(0)
    with pytest.raises(InputError, match="means must have a direction, row 1 has none"):
        head.set_speakers([0, 1], torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]]))
    head.add_speakers(50)
    lengths = torch.linalg.vector_norm(head.weight.detach(), dim=1)
    torch.testing.assert_close(lengths[-50 * centers :], lengths[: -50 * centers].mean().expand(50 * centers))


def test_mean_embeddings():
    x = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, -3.0]])
    found = mean_embeddings(x, torch.tensor([2, 2, 0]), 3)
    torch.testing.assert_close(found, torch.tensor([[0.0, -1.0], [0.0, 0.0], [0.5**0.5, 0.5**0.5]]))
    many = mean_embeddings(torch.ones(70_000, 2, dtype=torch.float16), torch.zeros(70_000, dtype=torch.int64), 1)
    torch.testing.assert_close(many, torch.full((1, 2), 0.5**0.5, dtype=torch.float16))
    with pytest.raises(InputError, match=r"target must lie in 0..1, got 0 to 2"):
        mean_embeddings(x, torch.tensor([2, 2, 0]), 2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"target": torch.tensor([0, 3, 1])}, r"target must lie in 0..2, row 1 has 3"),
        ({"target": torch.tensor([0, 1, -1])}, r"target must lie in 0..2, row 2 has -1"),
        ({"target": torch.tensor([0.0, 1.0, 1.0])}, "target must be an int64 tensor"),
        ({"target": torch.tensor([0, 1])}, r"target must have shape \(B,\) = \(3,\), got \(2,\)"),
        ({"embeddings": torch.zeros(3, 4, dtype=torch.int64)}, "embeddings must be float16, bfloat16"),
        ({"embeddings": torch.zeros(3)}, r"embeddings must have shape \(B, E\)"),
        ({"weight": torch.zeros(3, 5)}, r"weight must have shape \(N \* K, E\) with E = 4"),
        ({"weight": torch.zeros(0, 4)}, r"weight must have shape"),
        ({"num_subcenters": 2}, "weight must have num_subcenters = 2 rows a class, got 3"),
        ({"num_subcenters": 0}, "num_subcenters must be an integer of at least 1"),
        ({"topk": -1}, "topk must be an integer of at least 0"),
        ({"topk": 1.5}, "topk must be an integer"),
        ({"kind": "arc"}, "unknown kind 'arc'"),
        ({"fallback": "none"}, "unknown fallback 'none'"),
        ({"margin_type": "B"}, "unknown margin_type 'B'"),
        ({"reduction": "max"}, "unknown reduction 'max'"),
        ({"margin": float("nan")}, "margin must be a finite number"),
        ({"scale": 0.0}, "scale must be positive"),
        ({"label_smoothing": 1.5}, r"label_smoothing must lie in 0..1"),
        ({"kind": "sphereface2", "balance": -1}, r"balance must lie in 0..1"),
        ({"kind": "sphereface2", "topk": 1}, "kind='sphereface2' has no topk"),
        ({"kind": "softmax", "num_subcenters": 3}, "kind='softmax' has no num_subcenters"),
        ({"bias": torch.zeros(3)}, "kind='aam' has no bias"),
        ({"kind": "softmax", "bias": torch.zeros(2)}, "bias of kind='softmax' must have 3 values"),
        ({"row_weights": torch.zeros(2)}, r"row_weights must have shape \(B,\) = \(3,\)"),
        ({"row_weights": torch.zeros(3, dtype=torch.int64)}, "row_weights must be float16"),
        ({"backend": "fast"}, "backend must be one of"),
        ({"precision": "fp8"}, "unknown precision 'fp8'"),
        ({"weight": torch.zeros(3, 4, device="meta")}, "weight must be on cpu"),
    ],
)
def test_wrong_input_is_named(given, message):
    good: dict[str, Any] = {
        "embeddings": torch.ones(3, 4),
        "weight": torch.ones(3, 4),
        "target": torch.tensor([0, 1, 2]),
    }
    with pytest.raises(InputError, match=message):
        functional.margin_softmax_loss(**(good | given))


def test_runs_on_meta_tensors():
    head = MarginSoftmaxLoss(8, 5, num_subcenters=2, topk=2).to("meta")
    loss, stats = head(
        torch.empty(3, 8, device="meta"), torch.empty(3, dtype=torch.int64, device="meta"), return_stats=True
    )
    assert loss.shape == stats.accuracy.shape == ()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "settings", [{}, {"num_subcenters": 3, "topk": 2}, {"kind": "softmax"}, {"kind": "sphereface2"}]
)
def test_a_batch_without_rows(settings, precision):
    head = MarginSoftmaxLoss(8, 5, precision=precision, **settings)
    losses = functional.margin_softmax_loss(
        torch.empty(0, 8),
        head.weight,
        torch.empty(0, dtype=torch.int64),
        bias=head.bias,
        precision=precision,
        reduction="sum",
        **head.form._asdict(),
    )
    losses.backward()
    assert losses == 0 and not head.weight.grad.any()


@pytest.mark.parametrize(
    "settings", [{}, {"num_subcenters": 3, "topk": 2, "topk_margin": 0.1}, {"kind": "sphereface2"}]
)
def test_rows_that_do_not_count_may_hold_anything(settings):
    torch.manual_seed(0)
    head = MarginSoftmaxLoss(8, 5, **settings)
    x, target = torch.randn(4, 8), torch.tensor([0, 1, 2, 3])
    x[1] = torch.nan
    found = []
    for rows in (slice(None), [0, 2, 3]):
        head.zero_grad()
        leaf = x.clone().requires_grad_()
        loss = head(leaf[rows], target[rows], row_weights=torch.tensor([1.0, 0.0, 2.0, 1.0])[rows])
        loss.backward()
        found.append((loss.detach(), head.weight.grad.clone(), leaf.grad))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("settings", [{}, {"num_subcenters": 2, "topk": 2, "topk_margin": 0.1}])
def test_compiled_for_every_margin(settings):
    torch._dynamo.reset()
    head = MarginSoftmaxLoss(8, 5, **settings)
    x, target = torch.randn(4, 8), torch.tensor([0, 1, 2, 3])
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(head, fullgraph=True, backend=backend)
    for margin in (0.2, 0.1, 0.05, 0.15, 0.3, 0.25, np.float32(0.12), 0.11, 0.13, 0.14):
        head.margin = margin
        torch.testing.assert_close(compiled(x, target), head(x, target))
    assert len(graphs) <= 3  # the first one counts on the margin, the second one does not, nor on its type
