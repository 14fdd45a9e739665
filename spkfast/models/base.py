"""What every speaker network is made of: encoder, pooling and projector, each announcing its output size."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from spkfast.errors import InputError
from spkfast.nn.inference import autocast_type
from spkfast.ops.attentive_stats_pool import check_lengths


class SpeakerModel(nn.Module):
    """A network from features to embeddings: encoder, pooling over time, projector.

    A front-end (:class:`spkfast.nn.Fbank`) comes before it and, in training, a head
    (:class:`spkfast.nn.MarginSoftmaxLoss`) after it. Each of the five announces the size of what it gives as
    ``output_size``; that of a head is the number of its classes.

    Args:
        encoder: Module from features (B, T, M) and lengths to frames (B, C, T') and their lengths; its ``feature_dim``
            is M, its ``output_size`` C.
        pooling: Module from frames and lengths to vectors, as :func:`spkfast.nn.poolings.create` makes it.
        projector: Module from vectors to embeddings, as :func:`spkfast.nn.projectors.create` makes it.
        name: Its name in :func:`spkfast.models.create`.
        config: The keywords that make it again.

    Attributes:
        embedding_dim: Size E of the embedding.
    """

    def __init__(
        self, encoder: nn.Module, pooling: nn.Module, projector: nn.Module, *, name: str, config: dict[str, Any]
    ) -> None:
        super().__init__()
        self.name, self.config = name, config
        self.encoder, self.pooling, self.projector = encoder, pooling, projector
        self.embedding_dim = int(projector.output_size)  # type: ignore[arg-type]

    @property
    def output_size(self) -> int:
        """Size E of the embedding."""
        return self.embedding_dim

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Embeddings of a batch.

        In evaluation mode a row of a padded batch gives the embedding that it gives alone, whatever its padding holds.
        In training mode batch norm counts padded frames too, as in every toolkit: train on crops of one length.

        Args:
            features: Shape (B, T, M).
            lengths: Frames per row, int64, 0 to T, shape (B,); None where all T are real.

        Returns:
            Embeddings, shape (B, E), not normalised.

        Raises:
            InputError: If shapes or types are wrong, or (on a CPU) a length lies outside 0..T.
        """
        expected = self.encoder.feature_dim
        if not isinstance(features, Tensor):
            raise InputError(f"features must be a torch tensor, got {type(features).__name__}")
        own = next(self.encoder.parameters()).dtype
        if features.dtype != own and autocast_type(features.device.type) is None:
            raise InputError(f"features must be {own}, as the weights are, got {features.dtype}")
        if features.ndim != 3 or features.shape[2] != expected:
            raise InputError(f"features must have shape (B, T, M) with M = {expected}, got {tuple(features.shape)}")
        if features.shape[1] == 0:
            raise InputError("features must have at least one frame, got T = 0")
        if check_lengths(lengths, features.transpose(1, 2)):
            lengths = None  # which spares masks
        frames, lengths = self.encoder(features, lengths)
        pooled = self.pooling(frames, lengths)
        if autocast_type(pooled.device.type) is None:
            # At a precision of its own the network pools in float32.
            pooled = pooled.to(next((p.dtype for p in self.projector.parameters()), own))
        return self.projector(pooled)
