"""Public function ``margin_softmax_loss``: checks, the choice of the implementation, and what follows its sums."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from spkfast import backends
from spkfast.backends import Backend
from spkfast.errors import InputError, check_name
from spkfast.ops._packing import code_of
from spkfast.ops._registration import no_autocast, register_with_backward
from spkfast.ops.attentive_stats_pool import check_floating
from spkfast.reference.margin_softmax_loss import (
    BINARY_A,
    BINARY_C,
    LOG_SUM,
    Fallback,
    MarginForm,
    MarginKind,
    MarginType,
    binary_logits,
    margin_softmax_sums,
    raised_cosine,
    target_cosine,
    unit,
)

Reduction = Literal["mean", "sum", "none"]
HeadPrecision = Literal["fp32", "bf16"]
# Those of a class share a tile of the Triton kernels.
_MOST_CENTERS = 32


class MarginStats(NamedTuple):
    """What a margin softmax reports beside its loss, without gradients; cosines are logits where there are none.

    Attributes:
        accuracy: Share of the rows of which no other class has a larger cosine than the target, margins left aside.
        target_cosine: Mean cosine of the target, without the margin.
    """

    accuracy: Tensor
    target_cosine: Tensor


class ClassSums(NamedTuple):
    """What a margin softmax needs to know of the classes, per row of a batch.

    Attributes:
        sums: Of the ordinary classes, shape (B,); see :func:`spkfast.reference.margin_softmax_sums`.
        total: The sum of their cosines, shape (B,).
        cosines: Of the target, then of the hardest others, shape (B, 1 + topk), float64; 0 where there is none.
        present: Which of these there are.
        best: Largest cosine but for the target's, shape (B,), without a gradient.
        own: That of the target, as computed beside ``best``.
    """

    sums: Tensor
    total: Tensor
    cosines: Tensor
    present: Tensor
    best: Tensor
    own: Tensor


def margin_softmax_loss(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    kind: MarginKind = "aam",
    margin: float = 0.2,
    scale: float = 32.0,
    num_subcenters: int = 1,
    topk: int = 0,
    topk_margin: float = 0.0,
    easy_margin: bool = False,
    fallback: Fallback = "continuous",
    label_smoothing: float = 0.0,
    row_weights: Tensor | None = None,
    balance: float = 0.7,
    power: int = 3,
    margin_type: MarginType = "C",
    reduction: Reduction = "mean",
    return_stats: bool = False,
    validate: bool = True,
    precision: HeadPrecision = "fp32",
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, MarginStats]:
    """Cross entropy of speakers from cosines with a margin, for any number of speakers.

    The kernels keep nothing that grows with B * N: no cosines, no logits, no normalised weights. Sums are float32, the
    cosines of the target and of the hardest other classes float64. Differentiable in ``embeddings``, ``weight`` and
    ``bias``, once. A row of ``embeddings`` or ``weight`` shorter than 1e-12 has cosines 0 and no gradient.

    Args:
        embeddings: Shape (B, E), any floating type and scale.
        weight: Class weights, shape (N * K, E); rows n * K to n * K + K - 1 are the sub-centers of class n.
        target: Class of each row, int64, shape (B,).
        bias: Of ``softmax``, shape (N,); of ``sphereface2``, one value.
        kind: ``aam``: margin on the angle of the target (ArcFace); ``am``: on its cosine (CosFace); ``softmax``: plain
            cross entropy of ``embeddings @ weight.T + bias``, without margin and scale; ``sphereface2``: one binary
            classifier a class.
        margin: In radians, or for ``am`` and type C of ``sphereface2`` a cosine.
        scale: Multiplier of the cosines.
        num_subcenters: K; of a class the sub-center with the largest cosine counts.
        topk: How many of the classes with the largest cosines beside the target have their angle narrowed, at most
            N - 1 (inter-top-k).
        topk_margin: By how much, in radians.
        easy_margin: Of ``aam``: only where the cosine of the target is positive.
        fallback: Of ``aam``: penalty of an angle past ``pi - margin``, ``margin * sin(margin)`` (``linear``: clova,
            TaoRuijie, speechbrain, ESPnet) or ``1 - cos(margin)`` (``continuous``: wespeaker, 3D-Speaker, ESPnet with
            sub-centers).
        label_smoothing: Share of the loss that goes to all classes alike.
        row_weights: Shape (B,), floating; the mean is then weighted too. A row of weight 0 may hold anything. The
            statistics are those of all rows alike, in which such a row has cosines 0.
        balance: Of ``sphereface2``: weight of the target's classifier, from 0 to 1; the others share the rest.
        power: Of ``sphereface2``: exponent of its curve of cosines.
        margin_type: Of ``sphereface2``: ``C``, on the curve, or ``A``, on the angle.
        reduction: ``mean``, ``sum`` or ``none``.
        return_stats: Give :class:`MarginStats` too.
        validate: Check ``target`` on a GPU as well, which waits for it. What is out of range gives NaN otherwise.
        precision: What the products multiply: ``fp32`` or ``bf16``.
        backend: ``reference`` (plain torch), ``native`` (C++), ``triton``, or ``auto``, which takes the fastest one
            that exists here for this device and type.

    Returns:
        The loss, float32 (float64 for float64 ``embeddings``): a scalar, or shape (B,) without reduction; with
        ``return_stats`` and the statistics.

    Raises:
        InputError: If an argument has a wrong shape, type, device or value, or the backend cannot run here.

    References: Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", CVPR 2019; Wang et al.,
    "CosFace: Large Margin Cosine Loss for Deep Face Recognition", CVPR 2018; Deng et al., "Sub-center ArcFace", ECCV
    2020; Zhao et al., "The SpeakIn System for VoxCeleb Speaker Recognition Challenge 2021" (inter-top-k); Wen et al.,
    "SphereFace2: Binary Classification is All You Need for Deep Face Recognition", ICLR 2022.
    """
    form = MarginForm(
        kind, margin, scale, num_subcenters, topk, topk_margin, easy_margin, fallback, label_smoothing, balance, power,
        margin_type,
    )  # fmt: skip
    check_form(form)
    check_name("reduction", reduction, list(get_args(Reduction)))
    check_name("precision", precision, list(get_args(HeadPrecision)))
    check_tensors(embeddings, weight, bias, form)
    classes = weight.shape[0] // num_subcenters
    check_target(target, embeddings, classes, validate)
    check_row_weights(row_weights, embeddings)
    embeddings = counted(embeddings, row_weights)
    with no_autocast(embeddings.device.type):
        found = class_sums(embeddings, weight, bias, target, form, precision=precision, backend=backend)
        losses = losses_of(found, bias, target, classes, form)
        loss = reduced(losses, row_weights, reduction).to(found.sums.dtype)
    return (loss, stats_of(found)) if return_stats else loss


def class_sums(
    embeddings: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    form: MarginForm,
    *,
    precision: HeadPrecision = "fp32",
    backend: Backend = "auto",
) -> ClassSums:
    """The sums of a loss; the arguments are those of :func:`margin_softmax_loss`, checked, and without autocast.

    Args:
        target: May be -1, or any number that is no class: the target of that row is then missing.
    """
    dtype = torch.promote_types(torch.promote_types(embeddings.dtype, weight.dtype), torch.float32)
    limits = {}
    if form.num_subcenters > _MOST_CENTERS:
        limits["triton"] = f"it takes up to {_MOST_CENTERS} sub-centers, not {form.num_subcenters}"
    if dtype == torch.float64:
        limits = dict.fromkeys(("native", "triton"), "it computes in float32, not float64")
    chosen = backends.resolve(embeddings.device, backend, "margin_softmax_loss", limits)
    is_cosine = form.kind != "softmax"
    wide = embeddings.double()
    wide = unit(wide) if is_cosine else wide
    classes = weight.shape[0] // form.num_subcenters
    summed = LOG_SUM if form.kind != "sphereface2" else BINARY_C if form.margin_type == "C" else BINARY_A
    integers = [int(is_cosine), form.num_subcenters, min(form.topk, classes), code_of(precision), summed, form.power]
    sums, total, rows_of_weight, best, own, rows = _IMPLEMENTATIONS[chosen](
        wide.to(dtype),
        weight.to(dtype),
        None if bias is None else bias.to(dtype).reshape(-1),
        torch.where(_is_class(target, classes), target, -1),
        integers,
        # Without a margin that it ignores, which compiled graphs would guard on.
        [form.scale if is_cosine else 1.0, form.margin if form.kind == "sphereface2" else 0.0],
    )
    rows_of_weight = rows_of_weight.double()
    cosines = (wide[:, None] * (unit(rows_of_weight) if is_cosine else rows_of_weight)).sum(dim=2)
    present = rows >= 0
    if bias is not None and not is_cosine:
        cosines = cosines + torch.where(present, bias.double()[rows.clamp_min(0)], 0)
    return ClassSums(sums, total, cosines, present, best.detach(), own.detach())


def losses_of(found: ClassSums, bias: Tensor | None, target: Tensor, classes: int, form: MarginForm) -> Tensor:
    """The loss of each row, shape (B,), float64; NaN of a target that is no class.

    Args:
        found: The sums, of all classes.
        bias: As of :func:`margin_softmax_loss`.
        target: As of :func:`margin_softmax_loss`.
        classes: N.
        form: The rest.
    """
    sums, plain = found.sums.double(), found.cosines[:, 0]
    if form.kind == "sphereface2":
        positive, _ = binary_logits(plain, plain, None if bias is None else bias.double(), form)
        losses = form.balance * F.softplus(-positive) + (1 - form.balance) * sums
        return torch.where(_is_class(target, classes), losses, torch.nan)
    scale = form.scale if form.kind != "softmax" else 1.0
    logits = scale * torch.cat([target_cosine(plain, form)[:, None], raised_cosine(found.cosines[:, 1:], form)], dim=1)
    all_sums = torch.cat([sums[:, None], logits.masked_fill(~found.present, -torch.inf)], dim=1).logsumexp(dim=1)
    losses = all_sums - logits[:, 0]
    if form.label_smoothing:
        mean = (scale * found.total.double() + logits.masked_fill(~found.present, 0).sum(dim=1)) / classes
        losses = (1 - form.label_smoothing) * losses + form.label_smoothing * (all_sums - mean)
    return torch.where(_is_class(target, classes), losses, torch.nan)


def _is_class(target: Tensor, classes: int) -> Tensor:
    return (target >= 0) & (target < classes)


def stats_of(found: ClassSums) -> MarginStats:
    """The statistics of a batch."""
    dtype = found.sums.dtype
    accuracy = (found.own >= found.best).to(dtype).mean()
    return MarginStats(accuracy, found.cosines[:, 0].detach().mean().to(dtype))


def counted(embeddings: Tensor, row_weights: Tensor | None) -> Tensor:
    """Rows, with 0 in place of those that do not count, which may hold anything: NaN times no gradient is NaN."""
    return embeddings if row_weights is None else torch.where((row_weights == 0)[:, None], 0, embeddings)


def reduced(losses: Tensor, row_weights: Tensor | None, reduction: str) -> Tensor:
    """The losses of rows as one, or as they are."""
    if row_weights is not None:
        losses = torch.where(row_weights == 0, 0, losses * row_weights)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.mean() if row_weights is None else losses.sum() / row_weights.sum()


def check_form(form: MarginForm) -> None:
    """Refuses settings that mean nothing.

    Raises:
        InputError: If it is so.
    """
    check_name("kind", form.kind, list(get_args(MarginKind)))
    check_name("fallback", form.fallback, list(get_args(Fallback)))
    check_name("margin_type", form.margin_type, list(get_args(MarginType)))
    numbers = {"margin": form.margin, "topk_margin": form.topk_margin, "scale": form.scale}
    for name, value in numbers.items():
        if not isinstance(value, int | float) or not (torch.compiler.is_compiling() or math.isfinite(value)):
            raise InputError(f"{name} must be a finite number, got {value!r}")
    if not form.scale > 0:
        raise InputError(f"scale must be positive, got {form.scale}")
    for name, value in (("label_smoothing", form.label_smoothing), ("balance", form.balance)):
        if not isinstance(value, int | float) or not 0 <= value <= 1:
            raise InputError(f"{name} must lie in 0..1, got {value!r}")
    for name, count, least in (
        ("num_subcenters", form.num_subcenters, 1),
        ("topk", form.topk, 0),
        ("power", form.power, 1),
    ):
        if not isinstance(count, int) or isinstance(count, bool) or count < least:
            raise InputError(f"{name} must be an integer of at least {least}, got {count!r}")
    unused = {
        "softmax": {"num_subcenters": form.num_subcenters != 1, "topk": form.topk != 0},
        "sphereface2": {"topk": form.topk != 0, "label_smoothing": form.label_smoothing != 0},
    }
    for name, given in unused.get(form.kind, {}).items():
        if given:
            raise InputError(f"kind={form.kind!r} has no {name}, got {getattr(form, name)}")


def check_tensors(embeddings: Tensor, weight: Tensor, bias: Tensor | None, form: MarginForm) -> None:
    """Refuses tensors of a wrong type, shape or place.

    Raises:
        InputError: If one is so.
    """
    given = {"embeddings": embeddings, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, value in given.items():
        check_floating(name, value)
        if value.device != embeddings.device:
            raise InputError(f"{name} must be on {embeddings.device}, where embeddings is, got {value.device}")
    if embeddings.ndim != 2:
        raise InputError(f"embeddings must have shape (B, E), got {tuple(embeddings.shape)}")
    if weight.ndim != 2 or weight.shape[1] != embeddings.shape[1] or not weight.shape[0]:
        raise InputError(f"weight must have shape (N * K, E) with E = {embeddings.shape[1]}, got {tuple(weight.shape)}")
    if weight.shape[0] % form.num_subcenters:
        raise InputError(f"weight must have num_subcenters = {form.num_subcenters} rows a class, got {weight.shape[0]}")
    if bias is None:
        return
    if form.kind not in ("softmax", "sphereface2"):
        raise InputError(f"kind={form.kind!r} has no bias, got one of shape {tuple(bias.shape)}")
    size = weight.shape[0] if form.kind == "softmax" else 1
    if bias.numel() != size or (size > 1 and bias.ndim != 1):
        raise InputError(f"bias of kind={form.kind!r} must have {size} values, got shape {tuple(bias.shape)}")


def check_target(target: Tensor, embeddings: Tensor, classes: int, validate: bool) -> None:
    """Refuses labels of a wrong type, shape or place; and outside 0..N - 1, where that costs no wait or is wanted.

    Raises:
        InputError: If one is so; the message names the row.
    """
    if not isinstance(target, Tensor) or target.dtype != torch.int64:
        kind = target.dtype if isinstance(target, Tensor) else type(target).__name__
        raise InputError(f"target must be an int64 tensor of classes, got {kind}")
    if target.shape != embeddings.shape[:1]:
        raise InputError(f"target must have shape (B,) = ({embeddings.shape[0]},), got {tuple(target.shape)}")
    if target.device != embeddings.device:
        raise InputError(f"target must be on {embeddings.device}, where embeddings is, got {target.device}")
    if torch.compiler.is_compiling() or target.device.type == "meta" or not target.numel():
        return
    if validate or target.device.type == "cpu":
        low, high = target.aminmax()
        if low < 0 or high >= classes:
            row = int(((target < 0) | (target >= classes)).nonzero()[0])
            raise InputError(f"target must lie in 0..{classes - 1}, row {row} has {int(target[row])}")


def check_row_weights(row_weights: Tensor | None, embeddings: Tensor) -> None:
    """Refuses weights of a wrong type, shape or place.

    Raises:
        InputError: If they are so.
    """
    if row_weights is None:
        return
    check_floating("row_weights", row_weights)
    if row_weights.shape != embeddings.shape[:1] or row_weights.device != embeddings.device:
        raise InputError(
            f"row_weights must have shape (B,) = ({embeddings.shape[0]},) on {embeddings.device}, got "
            f"{tuple(row_weights.shape)} on {row_weights.device}"
        )


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, integers: Sequence[int], floats: Sequence[float]
) -> tuple[Tensor, ...]:
    chosen = 1 + integers[2]
    sums, total, best, own = (torch.empty_like(x[:, 0]) for _ in range(4))
    return sums, total, x.new_empty(x.shape[0], chosen, x.shape[1]), best, own, target.new_empty(x.shape[0], chosen)


def _backward_fake(
    grad_sums: Tensor, grad_total: Tensor, grad_chosen: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), x.new_empty(0 if bias is None else bias.shape[0])


_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = register_with_backward(
    "margin_softmax_loss",
    margin_softmax_sums,
    fake=_fake,
    backward_fake=_backward_fake,
    num_outputs=3,
    differentiable=(0, 1, 2),
)
