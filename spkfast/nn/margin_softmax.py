"""Large-margin softmax heads: the classifier that a speaker network is trained with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from spkfast import reference
from spkfast.errors import InputError


class MarginStats(NamedTuple):
    """What a margin softmax reports beside its loss."""

    accuracy: Tensor
    target_cosine: Tensor


class MarginSoftmaxLoss(nn.Module):
    """Additive angular margin softmax (AAM-softmax, ArcFace) with its class weights.

    Args:
        embedding_dim: Size E of the embeddings.
        num_speakers: Classes N.
        margin: Angular margin in radians; may be changed during training.
        scale: Multiplier on the cosines.
        easy_margin: Apply the margin only where the target cosine is positive.
        fallback: Penalty past ``pi - margin``: ``linear`` or ``continuous``.

    Reference: Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", CVPR 2019.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_speakers: int,
        *,
        margin: float = 0.2,
        scale: float = 32.0,
        easy_margin: bool = False,
        fallback: str = "continuous",
    ) -> None:
        super().__init__()
        if fallback not in ("linear", "continuous"):
            raise InputError(f"fallback must be 'linear' or 'continuous', got {fallback!r}")
        self.margin, self.scale, self.easy_margin, self.fallback = margin, scale, easy_margin, fallback
        self.output_size = num_speakers
        self.weight = nn.Parameter(torch.empty(num_speakers, embedding_dim))
        nn.init.xavier_uniform_(self.weight)

    def forward(
        self, embeddings: Tensor, target: Tensor, *, return_stats: bool = False
    ) -> Tensor | tuple[Tensor, MarginStats]:
        """Mean loss over the batch.

        Args:
            embeddings: Shape (B, E), any scale.
            target: Speaker index per row, int64, shape (B,).
            return_stats: Give the accuracy on the plain cosines and the mean target cosine too.

        Returns:
            Scalar loss, float32 or wider; with ``return_stats`` the loss and :class:`MarginStats`.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            dtype = torch.promote_types(embeddings.dtype, torch.float32)
            loss, accuracy, target_cosine = reference.margin_softmax_loss(
                embeddings.to(dtype), self.weight.to(dtype), target,
                self.margin, self.scale, self.easy_margin, self.fallback,
            )  # fmt: skip
        return (loss, MarginStats(accuracy, target_cosine)) if return_stats else loss
