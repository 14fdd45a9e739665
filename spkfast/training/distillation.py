"""Distillation: a network learns the scores that trained ones give, several of them on average.

As in W. Park et al., "Relational knowledge distillation", CVPR 2019, what is matched are relations within a batch, here
the cosines that verification uses, so that networks of any embedding size can teach. Teachers and student get the same
augmented features. The mean score of several networks makes fewer errors than that of each; one network learns it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from spkfast.errors import InputError
from spkfast.frontends import FrontendSpec
from spkfast.inference import SpeakerEncoder


class Teachers:
    """Trained networks that stay as they are.

    Args:
        sources: What ``SpeakerEncoder.load`` takes.
        spec: The front-end, which must be that of each network.
        device: Where they run.

    Attributes:
        fingerprints: That of each model.

    Raises:
        InputError: If one cannot be used.
    """

    def __init__(self, sources: Sequence[str], spec: FrontendSpec, device: torch.device) -> None:
        try:
            encoders = [SpeakerEncoder.load(source, frontend=spec, device=str(device)) for source in sources]
        except InputError as error:
            raise InputError(f"distillation.teachers: {error}") from error
        self.fingerprints = [encoder.fingerprint for encoder in encoders]
        self._nets = [encoder.model.eval().requires_grad_(False) for encoder in encoders]

    @torch.no_grad()
    def scores(self, features: Tensor) -> Tensor:
        """Features (B, T, M) to the cosines (B, B) of all pairs, the mean over the teachers, in float32."""
        return torch.stack([cosines(net(features)) for net in self._nets]).mean(0)


def cosines(embeddings: Tensor) -> Tensor:
    """Embeddings (B, E) to the cosines (B, B) of all pairs, in float32."""
    unit = F.normalize(embeddings.float())
    with torch.autocast(unit.device.type, enabled=False):
        return unit @ unit.T


def score_loss(embeddings: Tensor, scores: Tensor) -> Tensor:
    """Mean squared difference between the cosines of all pairs of different crops and those wanted.

    Args:
        embeddings: (B, E).
        scores: (B, B), as :meth:`Teachers.scores` gives them.

    Returns:
        A scalar, 0 where there is no pair.
    """
    size = len(embeddings)
    # A crop's cosine with itself is 1 in both.
    return (cosines(embeddings) - scores).square().sum() / max(1, size * (size - 1))
