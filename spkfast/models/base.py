"""What every speaker network is made of: encoder, pooling and projector, each announcing its output size."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spkfast.errors import InputError
from spkfast.nn.inference import KernelModule, autocast_type, inference_layers
from spkfast.ops.attentive_stats_pool import check_lengths


class SpeakerModel(KernelModule):
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

        In evaluation mode, where no gradient is wanted, it runs on kernels, with weights of their own form. A change
        that torch does not count, as of ``weight.data`` in place, is seen once :meth:`train` or :meth:`eval` is called.

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
            lengths = None  # without them there are no masks, and kernels of training apply
            bound = self._bound(features)
            if bound is not None:
                return bound(features)
        frames, lengths = self.encoder(features, lengths)
        pooled = self.pooling(frames, lengths)
        if autocast_type(pooled.device.type) is None:
            # At a precision of its own the network pools in float32.
            pooled = pooled.to(next((p.dtype for p in self.projector.parameters()), own))
        return self.projector(pooled)

    def misfit(self) -> str | None:
        """Why :meth:`_bound` cannot stand for the network, whatever the device."""
        if not hasattr(self.encoder, "bound"):
            return "an encoder without an inference form"
        own = ("spkfast.", "torch.")
        other = next((part for part in self.modules() if not type(part).__module__.startswith(own)), None)
        if other is not None:
            return f"a {type(other).__name__} of another class"
        tensors = itertools.chain(self.parameters(), self.buffers())
        kinds = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
        if kinds != {torch.float32}:
            return "weights of another type than float32"
        return next(filter(None, (layer.misfit() for layer in inference_layers(self.encoder).values())), None)

    def _bound(self, features: Tensor) -> Callable[[Tensor], Tensor] | None:
        """The network of rows all of whose frames are real, by its kernels alone; None where they do not apply.

        What its layers would each look at, whether anything in them changed, is asked once.
        """
        if features.dtype != torch.float32 or autocast_type(features.device.type) is not None:
            return None
        tensors = self.weights_for_kernels(features)
        return None if tensors is None else self.kept.of(tensors, None, lambda: self._bind(features.device))

    def _bind(self, device: torch.device) -> Callable[[Tensor], Tensor] | None:
        layers = inference_layers(self).values()
        # Of several precisions one layer rounds what the next one reads.
        if len({layer.precision for layer in layers}) > 1:
            return None
        if not all(layer.runs_at(layer.precision, device) for layer in layers):
            return None
        encoder: Any = self.encoder
        parts: list[Any] = [self.pooling, self.projector]
        frames = encoder.bound()
        pool, project = (part.bound() if hasattr(part, "bound") and part.misfit() is None else part for part in parts)
        return lambda features: project(pool(frames(features)))
