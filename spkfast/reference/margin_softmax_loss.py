"""The definitions of ``margin_softmax_loss`` and of the sums over classes that its kernels make."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

MarginKind = Literal["softmax", "am", "aam", "sphereface2"]
Fallback = Literal["linear", "continuous"]
MarginType = Literal["A", "C"]

# Names of `integers` and `floats` of margin_softmax_sums.
LOG_SUM, BINARY_C, BINARY_A = range(3)  # what is summed


class MarginForm(NamedTuple):
    """What a margin softmax makes of cosines; see :func:`spkfast.functional.margin_softmax_loss`."""

    kind: MarginKind = "aam"
    margin: float = 0.2
    scale: float = 32.0
    num_subcenters: int = 1
    topk: int = 0
    topk_margin: float = 0.0
    easy_margin: bool = False
    fallback: Fallback = "continuous"
    label_smoothing: float = 0.0
    balance: float = 0.7
    power: int = 3
    margin_type: MarginType = "C"


class MarginLosses(NamedTuple):
    """What a margin softmax gives for each row, shape (B,).

    Attributes:
        loss: The loss.
        correct: Whether no other class has a larger cosine (of ``softmax``: logit) than the target.
        target_cosine: Cosine (of ``softmax``: logit) of the target, without the margin.
    """

    loss: Tensor
    correct: Tensor
    target_cosine: Tensor


def margin_softmax_loss(
    embeddings: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, form: MarginForm
) -> MarginLosses:
    """Loss of each row, with all cosines in memory.

    Args:
        embeddings: Shape (B, E).
        weight: Shape (N * K, E); rows n * K to n * K + K - 1 are the sub-centers of class n.
        target: Class of each row, int64, shape (B,).
        bias: Of ``softmax`` shape (N,), of ``sphereface2`` one value; or None.
        form: The rest.
    """
    if form.kind == "softmax":
        cosine = F.linear(embeddings, weight, bias)
    else:
        cosine = unit(embeddings) @ unit(weight).T
        cosine = cosine.unflatten(1, (-1, form.num_subcenters)).amax(dim=2)
    is_target = F.one_hot(target, cosine.shape[1]).bool()
    plain = cosine.gather(1, target[:, None])[:, 0]
    correct = plain >= cosine.masked_fill(is_target, -torch.inf).amax(dim=1)
    if form.kind == "sphereface2":
        positive, negative = binary_logits(plain, cosine, bias, form)
        others = F.softplus(negative).masked_fill(is_target, 0).sum(dim=1)
        loss = form.balance * F.softplus(-positive) + (1 - form.balance) * others
        return MarginLosses(loss, correct, plain)
    modified = cosine
    if form.topk:
        hardest = cosine.masked_fill(is_target, -torch.inf).topk(min(form.topk, cosine.shape[1] - 1), dim=1).indices
        raised = raised_cosine(cosine.gather(1, hardest), form)
        modified = modified.scatter(1, hardest, raised)
    modified = modified.scatter(1, target[:, None], target_cosine(plain, form)[:, None])
    logits = modified if form.kind == "softmax" else form.scale * modified
    loss = F.cross_entropy(logits, target, reduction="none", label_smoothing=form.label_smoothing)
    return MarginLosses(loss, correct, plain)


def unit(x: Tensor) -> Tensor:
    """Rows scaled to length 1; a row shorter than 1e-12 becomes 0, and has no gradient."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    # Of a row that is 0 the gradient of the norm would not be finite.
    short = norm < 1e-12
    return torch.where(short, 0, x / torch.linalg.vector_norm(torch.where(short, 1, x), dim=-1, keepdim=True))


def _sine(cosine: Tensor) -> Tensor:
    # The gradient of the square root is finite even where rounding takes a cosine to 1.
    return (1 - cosine.square()).clamp_min(1e-12).sqrt()


def target_cosine(cosine: Tensor, form: MarginForm) -> Tensor:
    """The cosine of the target with the margin.

    ``aam`` widens the angle. Angles past ``pi - margin`` take a penalty that keeps the logit monotonic instead:
    ``cos - margin * sin(margin)`` (``linear``) or ``cos - (1 - cos(margin))`` (``continuous``).
    """
    if form.kind == "softmax":
        return cosine
    if form.kind == "am":
        return cosine - form.margin
    widened = cosine * math.cos(form.margin) - _sine(cosine) * math.sin(form.margin)
    if form.easy_margin:
        return torch.where(cosine > 0, widened, cosine)
    penalty = form.margin * math.sin(form.margin) if form.fallback == "linear" else 1 - math.cos(form.margin)
    return torch.where(cosine > -math.cos(form.margin), widened, cosine - penalty)


def raised_cosine(cosine: Tensor, form: MarginForm) -> Tensor:
    """The cosine of one of the hardest other classes, its angle narrowed."""
    return cosine * math.cos(form.topk_margin) + _sine(cosine) * math.sin(form.topk_margin)


def binary_logits(target: Tensor, others: Tensor, bias: Tensor | None, form: MarginForm) -> tuple[Tensor, Tensor]:
    """Logits of SphereFace2 of cosines of targets, and of other classes."""

    def curve(cosine: Tensor) -> Tensor:
        return 2 * ((cosine + 1) / 2) ** form.power - 1

    if form.margin_type == "A":
        widened = target_cosine(target, form._replace(kind="aam", easy_margin=False, fallback="continuous"))
        narrowed = others * math.cos(form.margin) + _sine(others) * math.sin(form.margin)
        positive, negative = form.scale * curve(widened), form.scale * curve(narrowed)
    else:
        positive, negative = form.scale * (curve(target) - form.margin), form.scale * (curve(others) + form.margin)
    return (positive, negative) if bias is None else (positive + bias.reshape(()), negative + bias.reshape(()))


def margin_softmax_sums(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    integers: Sequence[int],
    floats: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sums over the ordinary classes of each row, those that are neither its target nor among its hardest others.

    The rest of a margin softmax is a few cosines a row, of the rows of ``weight`` that are given back.

    Args:
        x: Shape (B, E); of length 1 where cosines are wanted.
        weight: Shape (N * K, E), sub-centers of a class side by side; of a class the largest cosine counts.
        bias: What is added to the products of each class, shape (N,); of binary sums to their logits, shape (1,).
        target: Class of each row, or -1 where it is none of these; int64, shape (B,).
        integers: Whether rows of ``weight`` are scaled to length 1; K; how many of the hardest others are left out; the
            code of the products' precision (see ``_packing``), which the definition ignores; what is summed
            (``LOG_SUM``, ``BINARY_C``, ``BINARY_A``); power of the binary sums.
        floats: Scale, and margin of the binary sums.

    Returns:
        ``sums``, shape (B,): the logarithm of the sum of exponentials of scaled cosines, minus infinity of none; or the
        sum of ``log(1 + exp(logit))``. ``total``, (B,): the sum of cosines, 0 for binary sums. ``chosen``,
        (B, 1 + topk, E): rows of ``weight`` of the target and of the hardest others, hardest first, 0 where there is
        none. Then, without gradients, ``best``, (B,): the largest cosine but for that of the target, which is ``own``,
        minus infinity of none; and ``rows``, (B, 1 + topk), int64: where those rows lie, -1 where there is none.
    """
    normalise, subcenters, topk, _, summed, power = integers
    scale, margin = floats
    cosine = x @ (unit(weight) if normalise else weight).T
    cosine, center = cosine.unflatten(1, (-1, subcenters)).max(dim=2)
    if bias is not None and summed == LOG_SUM:
        cosine = cosine + bias
    classes = cosine.shape[1]
    is_target = target[:, None] == torch.arange(classes, device=x.device)
    others = cosine.detach().masked_fill(is_target, -torch.inf)
    best = others.amax(dim=1) if classes else others.new_full((x.shape[0],), -torch.inf)
    values, hardest = others.topk(min(topk, classes), dim=1)
    found = torch.cat([target[:, None], hardest.masked_fill(values == -torch.inf, -1)], dim=1)
    found = F.pad(found, (0, 1 + topk - found.shape[1]), value=-1)
    missing = found < 0
    rows = (found * subcenters + center.gather(1, found.clamp_min(0))).masked_fill(missing, -1)
    own = cosine.detach().gather(1, found[:, :1].clamp_min(0))[:, 0].masked_fill(missing[:, 0], -torch.inf)
    chosen = weight[rows.clamp_min(0)].masked_fill(missing[..., None], 0)

    left_out = is_target.scatter(1, hardest, True) if topk else is_target
    total = cosine.masked_fill(left_out, 0).sum(dim=1)
    if summed == LOG_SUM:
        none = left_out.all(dim=1)
        # The gradient of the logarithm of no sum at all would not be finite.
        logits = (scale * cosine).masked_fill(left_out, -torch.inf).masked_fill(none[:, None], 0)
        return logits.logsumexp(dim=1).masked_fill(none, -torch.inf), total, chosen, best, own, rows
    form = MarginForm(margin=margin, scale=scale, power=power, margin_type="C" if summed == BINARY_C else "A")
    logits = binary_logits(x.new_zeros(()), cosine, bias, form)[1]
    sums = F.softplus(logits).masked_fill(left_out, 0).sum(dim=1)
    return sums, torch.zeros_like(sums), chosen, best, own, rows
