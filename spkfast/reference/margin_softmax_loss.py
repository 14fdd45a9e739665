"""The definition of ``margin_softmax_loss``: softmax cross entropy on cosines with an additive angular margin."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def margin_softmax_loss(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    margin: float = 0.2,
    scale: float = 32.0,
    easy_margin: bool = False,
    fallback: str = "continuous",
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss, accuracy on the plain cosines, and mean target cosine.

    The target angle is widened by ``margin``. Angles past ``pi - margin`` take a penalty that keeps the logit
    monotonic instead: ``cos - margin * sin(margin)`` (``linear``) or ``cos - (1 - cos(margin))`` (``continuous``).
    """
    cosine = F.linear(F.normalize(embeddings, eps=1e-12), F.normalize(weight, eps=1e-12))  # (B, N)
    plain = cosine.gather(1, target[:, None])[:, 0]
    # The gradient of the square root is finite even where rounding takes a cosine to 1.
    sine = (1 - plain.square()).clamp_min(1e-12).sqrt()
    widened = plain * math.cos(margin) - sine * math.sin(margin)
    if easy_margin:
        modified = torch.where(plain > 0, widened, plain)
    else:
        penalty = margin * math.sin(margin) if fallback == "linear" else 1 - math.cos(margin)
        modified = torch.where(plain > -math.cos(margin), widened, plain - penalty)
    logits = scale * cosine.scatter(1, target[:, None], modified[:, None].to(cosine.dtype))
    accuracy = (cosine.argmax(dim=1) == target).to(cosine.dtype).mean()
    return F.cross_entropy(logits, target), accuracy.detach(), plain.mean().detach()
