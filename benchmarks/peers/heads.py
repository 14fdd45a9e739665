"""Margin softmax heads as they are written in plain torch, and plain softmax of the same sizes."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Head(NamedTuple):
    """AAM-softmax with sub-centers and a penalty on the hardest other classes."""

    subcenters: int
    topk: int
    margin: float = 0.2
    topk_margin: float = 0.06
    scale: float = 32.0


def over_all_classes(x: Tensor, weight: Tensor, target: Tensor, head: Head) -> Tensor:
    """As toolkits write it: sine and margin of every cosine, of which a mask then picks."""
    cosine = _cosine(x, weight, head)
    sine = (1 - cosine.square()).clamp_min(0).sqrt()
    phi = cosine * math.cos(head.margin) - sine * math.sin(head.margin)
    phi = torch.where(cosine > -math.cos(head.margin), phi, cosine - (1 - math.cos(head.margin)))
    one_hot = torch.zeros_like(cosine).scatter_(1, target[:, None], 1)
    if head.topk:
        raised = cosine * math.cos(head.topk_margin) + sine * math.sin(head.topk_margin)
        hardest = torch.topk(cosine - 2 * one_hot, head.topk, dim=1).indices
        top = torch.zeros_like(cosine).scatter_(1, hardest, 1)
        logits = one_hot * phi + top * raised + (1 - one_hot - top) * cosine
    else:
        logits = one_hot * phi + (1 - one_hot) * cosine
    return F.cross_entropy(head.scale * logits, target)


def on_targets(x: Tensor, weight: Tensor, target: Tensor, head: Head) -> Tensor:
    """The best of plain torch: sine and margin of the cosines that have one."""
    cosine = _cosine(x, weight, head)
    plain = cosine.gather(1, target[:, None])
    phi = plain * math.cos(head.margin) - _sine(plain) * math.sin(head.margin)
    phi = torch.where(plain > -math.cos(head.margin), phi, plain - (1 - math.cos(head.margin)))
    logits = cosine
    if head.topk:
        found = cosine.detach().scatter(1, target[:, None], -torch.inf).topk(head.topk, dim=1)
        hard = cosine.gather(1, found.indices)
        raised = hard * math.cos(head.topk_margin) + _sine(hard) * math.sin(head.topk_margin)
        logits = logits.scatter(1, found.indices, raised)
    return F.cross_entropy(head.scale * logits.scatter(1, target[:, None], phi), target)


def plain_softmax(x: Tensor, weight: Tensor, target: Tensor, head: Head) -> Tensor:
    """torch's own fused loss, of cosines without margin, sub-centers and penalty."""
    return F.linear_cross_entropy(F.normalize(x) * head.scale, F.normalize(weight), target)


def _cosine(x: Tensor, weight: Tensor, head: Head) -> Tensor:
    cosine = F.linear(F.normalize(x), F.normalize(weight))
    return cosine if head.subcenters == 1 else cosine.view(len(x), -1, head.subcenters).amax(dim=2)


def _sine(cosine: Tensor) -> Tensor:
    return (1 - cosine.square()).clamp_min(0).sqrt()
