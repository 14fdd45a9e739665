"""Batch norm with the statistics of the batches of all processes, on any device."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from spkfast.errors import InputError
from spkfast.nn.training import coefficients, is_distributed
from spkfast.ops._tdnn_training import RowMoments


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm whose statistics, in training, are those of the batches of all processes, forward and backward.

    As :class:`torch.nn.SyncBatchNorm`, which takes tensors of a GPU alone; this one also takes those of a CPU (Gloo),
    and ``DistributedDataParallel`` takes networks with it there. Parameters, buffers and their names are those of
    :class:`torch.nn.BatchNorm1d`. Layers that train on kernels do so with it too. Statistics are float32, whatever the
    type of the input.

    Args:
        num_features: Channels C.
        eps: Added to the variance.
        momentum: Share of the batch in the running statistics; None for a mean over all batches.
        affine: Whether there are a weight and a bias.
        track_running_stats: Whether there are running statistics.
        process_group: Processes that share their statistics; None for all.

    Raises:
        InputError: If the input is not of shape (B, C) or (B, C, T).
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        self.process_group = process_group

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim not in (2, 3):
            raise InputError(f"input must have shape (B, C) or (B, C, T), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """(B, C) or (B, C, T) to the same shape and type."""
        if not (self.training and is_distributed()):
            return super().forward(input)
        self._check_input_dim(input)
        x = input.float() if input.ndim == 3 else input.float()[:, :, None]
        moments = RowMoments(x.mean(dim=2), x.var(dim=2, correction=0))
        scale, shift = coefficients(self, moments, x.shape[2])
        return (x * scale[..., None] + shift[..., None]).reshape(input.shape).to(input.dtype)

    @classmethod
    def convert(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """Puts it in the place of every :class:`torch.nn.BatchNorm1d` of a module, with the same tensors.

        Args:
            module: Changed in place.
            process_group: As above.

        Returns:
            The module, or what takes its place where it is a batch norm itself.
        """
        if isinstance(module, nn.BatchNorm1d):
            made = cls(
                module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats,
                process_group,
            )  # fmt: skip
            made._parameters, made._buffers = module._parameters, module._buffers
            made.training = module.training
            return made
        for name, child in module.named_children():
            setattr(module, name, cls.convert(child, process_group))
        return module
