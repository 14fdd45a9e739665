"""What every speaker network offers beside its arithmetic."""

from __future__ import annotations

from typing import Any

from torch import nn


class SpeakerModel(nn.Module):
    """A network from features to embeddings.

    Attributes:
        name: Its name in :func:`spkfast.models.create`.
        config: The keywords that make it again.
        embedding_dim: Size E of the embedding.
    """

    name: str
    config: dict[str, Any]
    embedding_dim: int
