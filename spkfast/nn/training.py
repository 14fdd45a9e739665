"""How layers train on the kernels of the ops: what lies between a convolution with ReLU and the affine map after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

from spkfast.ops._tdnn_training import RowMoments, channel_affine, conv_batch_norm, conv_relu
from spkfast.reference import Precision


class Kernels(NamedTuple):
    """On what a layer trains.

    Attributes:
        precision: Of the products.
        backend: Whose kernels these are.
    """

    precision: Precision
    backend: str


class Activation(NamedTuple):
    """The ReLU of a convolution, and batch norm after it that is yet to be applied.

    Attributes:
        y: Shape (B, N, T).
        scale: Of batch norm, shape (1, N), float32; None where there is none.
        shift: With ``scale``.
        moments: Of ``y``, where they were wanted.
    """

    y: Tensor
    scale: Tensor | None
    shift: Tensor | None
    moments: RowMoments | None


def normalise(
    conv: nn.Conv1d,
    bn: nn.Module | None,
    inputs: Sequence[Tensor],
    kernels: Kernels,
    *,
    reflect: bool,
    added: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolution, ReLU and batch norm, and the sum of that and another tensor.

    Args:
        conv: The convolution.
        bn: Batch norm, or None, with which there is no sum.
        inputs: Shape (B, C_i, T), with the channels of the convolution together.
        kernels: What to train on.
        reflect: Pad with mirrored frames in place of zeros.
        added: Shape (B, N, T), or None.
    """
    if isinstance(bn, nn.BatchNorm1d) and uses_batch(bn) and kernels.backend == "native":
        found = conv_batch_norm(
            _of_one_type(inputs),
            conv.weight,
            conv.bias,
            bn.weight,
            bn.bias,
            added,
            eps=bn.eps,
            dilation=conv.dilation[0],
            reflect=reflect,
            precision=kernels.precision,
        )
        _follow(bn, found.mean, found.var, inputs[0].shape[0] * inputs[0].shape[2])
        return found.y, found.total
    step = activate(conv, bn, inputs, kernels, reflect=reflect)
    if step.scale is None or step.shift is None:
        return step.y, step.y
    return channel_affine(step.y, step.scale, step.shift, added, backend=kernels.backend)


def activate(
    conv: nn.Conv1d,
    bn: nn.Module | None,
    inputs: Sequence[Tensor],
    kernels: Kernels,
    *,
    reflect: bool,
    moments: bool = False,
) -> Activation:
    """Convolution and ReLU, and what batch norm makes of them.

    Args:
        conv: The convolution.
        bn: Batch norm, or None.
        inputs: Shape (B, C_i, T), with the channels of the convolution together.
        kernels: What to train on.
        reflect: Pad with mirrored frames in place of zeros.
        moments: Whether the moments of each row are wanted, beyond what batch norm wants.
    """
    of_batch = bn is not None and uses_batch(bn)
    y, found = conv_relu(
        _of_one_type(inputs),
        conv.weight,
        conv.bias,
        dilation=conv.dilation[0],
        reflect=reflect,
        precision=kernels.precision,
        moments=moments or of_batch,
        backend=kernels.backend,
    )
    if bn is None:
        return Activation(y, None, None, found)
    return Activation(y, *coefficients(bn, found if of_batch else None, y.shape[2]), found)


def _of_one_type(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """Inputs as they are, or of different ones, as autocast makes them, in the type of autocast."""
    if all(part.dtype == inputs[0].dtype for part in inputs):
        return inputs
    return [part.to(torch.get_autocast_dtype(part.device.type)) for part in inputs]


def uses_batch(bn: Any) -> bool:
    """Whether batch norm takes the statistics of the batch, not those it has kept."""
    return bool(bn.training or bn.running_mean is None)


def coefficients(bn: Any, moments: RowMoments | None, frames: int) -> tuple[Tensor, Tensor]:
    """Factor and offset of each channel, shape (1, N), float32; the running statistics follow as in torch.

    Args:
        bn: Batch norm; of one that has a process group the statistics are those of the batches of all its processes.
        moments: Of each row of the batch; None for the running statistics.
        frames: Frames of each row.
    """
    if moments is None:
        mean, var = bn.running_mean.float(), bn.running_var.float()
    else:
        mean = moments.mean.mean(dim=0)
        var = (moments.var + (moments.mean - mean).square()).mean(dim=0)
        values: Any = moments.mean.shape[0] * frames
        if hasattr(bn, "process_group") and bn.training and is_distributed():
            mean, var, values = _of_all_processes(mean, var, values, bn.process_group)
        _follow(bn, mean.detach(), var.detach(), values)
    scale = (var + bn.eps).rsqrt()
    if bn.weight is not None:
        scale = scale * bn.weight
    shift = -mean * scale
    if bn.bias is not None:
        shift = shift + bn.bias
    return scale[None], shift[None]


def _follow(bn: Any, mean: Tensor, var: Tensor, values: Any) -> None:
    """The running statistics, where there are any, take their share of those of a batch of so many values."""
    if not bn.training or not bn.track_running_stats or bn.running_mean is None:
        return
    with torch.no_grad():
        share = 0.0 if bn.momentum is None else bn.momentum
        if bn.num_batches_tracked is not None:
            bn.num_batches_tracked.add_(1)
            share = 1 / bn.num_batches_tracked if bn.momentum is None else share
        bn.running_mean.lerp_(mean.to(bn.running_mean.dtype), share)
        bn.running_var.lerp_((var * (values / (values - 1))).to(bn.running_var.dtype), share)


def is_distributed() -> bool:
    """Whether this is one of several processes, or of one that is set up as such."""
    return distributed.is_available() and distributed.is_initialized()


def _of_all_processes(mean: Tensor, var: Tensor, values: int, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Moments of the batches of all processes together, and how many values they have."""
    total = _Sum.apply(torch.cat([mean * values, mean.new_tensor([float(values)])]), group)
    count = total[-1].detach()
    mean_of_all = total[:-1] / count
    var_of_all = _Sum.apply((var + (mean - mean_of_all).square()) * values, group) / count
    return mean_of_all, var_of_all, count


class _Sum(torch.autograd.Function):
    """The sum over all processes, each of which has a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = x.clone()
        distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone()
        distributed.all_reduce(total, group=ctx.group)
        return total, None
