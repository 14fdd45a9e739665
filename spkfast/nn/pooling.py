"""Poolings: from the frames of an utterance to one vector."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spkfast.errors import InputError
from spkfast.functional import weighted_moments, weighted_moments_from_hidden
from spkfast.nn.inference import InferenceLayer, autocast_type, has_inference_form, inference_params
from spkfast.nn.training import Kernels
from spkfast.ops._attentive_pooling import PackedAttention, attentive_moments, fits
from spkfast.ops._tdnn_training import conv_relu
from spkfast.ops.attentive_stats_pool import Moments, check_frames, check_lengths
from spkfast.ops.tdnn_layer import pack_tdnn_layer, run_packed_layer
from spkfast.reference import Precision, TdnnParams
from spkfast.reference.tdnn_layer import HALF


@dataclasses.dataclass(frozen=True)
class Deviation:
    """How a toolkit makes a standard deviation of a variance: ``sqrt(clamp(var + add, low, high)) + offset``.

    One frame has no deviation: its variance is 0, also where ``unbiased`` would divide 0 by 0. Where the variance is
    clamped its gradient is 0, so that the gradient is finite everywhere.

    Args:
        unbiased: Divide by T - 1 in place of T.
        add: Added to the variance.
        low: Lower bound of the variance; None for the rounding of its type, that of float32 for half precision.
        high: Upper bound of the variance, or None.
        offset: Added to the standard deviation.
    """

    unbiased: bool = False
    add: float = 0.0
    low: float | None = 0.0
    high: float | None = None
    offset: float = 0.0

    def of(self, var: Tensor, frames: Tensor | None = None) -> Tensor:
        """Standard deviation of biased variances.

        Args:
            var: Shape (B, C).
            frames: Frames per row, shape (B, 1) or (1, 1), for ``unbiased``; None where the frames had weights.
        """
        if self.unbiased and frames is not None:
            var = var * (frames / (frames - 1).clamp_min(1))
        if self.add:
            var = var + self.add
        std = var.clamp(*self.limits(var.dtype)).sqrt()
        return std + self.offset if self.offset else std

    def limits(self, dtype: torch.dtype) -> tuple[float, float]:
        """Bounds of the variance in this type."""
        info = torch.finfo(dtype)
        low = info.eps if self.low is None else max(self.low, info.tiny)
        return low, torch.inf if self.high is None else self.high


@dataclasses.dataclass(frozen=True)
class AttentionForm:
    """What differs between the toolkits' attention over frames and channels.

    Args:
        deviation: Standard deviation of the result.
        context: Standard deviation that the attention sees.
        relu: Apply ReLU to the hidden layer.
        bn: Then batch norm.
        tanh: Then the hyperbolic tangent.
    """

    deviation: Deviation
    context: Deviation = Deviation()
    relu: bool = False
    bn: bool = False
    tanh: bool = False


ASTP = AttentionForm(Deviation(low=1e-7), Deviation(unbiased=True, add=1e-7), tanh=True)


class Pooling(InferenceLayer):
    """What all poolings share: shapes, the flattening of maps, and types.

    A row of a padded batch gives what the same utterance gives alone, and what its padding holds never counts, not even
    NaN. The exception is batch norm in training mode: as in every toolkit, its statistics count padding frames too.
    Sums are in float32 for any input type.

    Args:
        channels: Channels C of a frame; C * F for maps (B, C, F, T).
        output_size: Size of the pooled vector.
    """

    def __init__(self, channels: int, output_size: int) -> None:
        if not isinstance(channels, int) or isinstance(channels, bool) or channels < 1:
            raise InputError(f"channels must be a positive integer, got {channels!r}")
        super().__init__()
        self.channels = channels
        self.output_size = output_size

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """One vector per utterance.

        Args:
            x: Frames, shape (B, C, T), in any layout; or maps (B, C, F, T), read as (B, C * F, T) with F the fast one.
            lengths: Real frames per row, int64, 0 to T, shape (B,); None where all T are.

        Returns:
            Shape (B, ``output_size``), in the type of ``x``; under autocast and at a precision other than ``fp32`` in
            float32.

        Raises:
            InputError: If shapes or types are wrong, or (on a CPU) a length lies outside 0..T.
        """
        frames = x.flatten(1, 2) if x.ndim == 4 else x
        if frames.ndim != 3 or frames.shape[1] != self.channels:
            raise InputError(
                f"x must have shape (B, C, T), or (B, C, F, T) with C * F channels, of {self.channels} channels, got "
                f"{tuple(x.shape)}"
            )
        check_frames("x", frames)
        check_lengths(lengths, frames)
        pooled = self.pool(frames, lengths)
        # Under autocast what follows is computed in the type that it chooses; and what comes before at a precision of
        # its own is of no type that the rest has.
        if self.precision != "fp32" or autocast_type(x.device.type) is not None:
            return pooled.to(torch.promote_types(pooled.dtype, torch.float32))
        return pooled.to(x.dtype)

    def obstacle(self) -> str | None:
        """None where a pooling has no kernels of its own: it takes frames of any type."""
        return None

    def pool(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """(B, C, T) to (B, ``output_size``), in any type."""
        raise NotImplementedError


class MaxPool(Pooling):
    """Largest value of each channel; 0 for a row without frames."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels)

    def pool(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        if x.shape[-1] == 0:
            return x.sum(dim=-1)
        if lengths is None:
            return x.amax(dim=-1)
        return x.masked_fill(_padding(x, lengths), -torch.inf).amax(dim=-1).masked_fill(lengths[:, None] < 1, 0)


class StatsPool(Pooling):
    """Mean, standard deviation, or both one after the other.

    Args:
        channels: Channels C of a frame.
        deviation: The standard deviation; None for the mean alone.
        with_mean: Give the mean.

    Reference: Snyder et al., "X-vectors: Robust DNN Embeddings for Speaker Recognition", ICASSP 2018.
    """

    def __init__(self, channels: int, deviation: Deviation | None = None, with_mean: bool = True) -> None:
        super().__init__(channels, channels * (with_mean + (deviation is not None)))
        self.deviation, self.with_mean = deviation, with_mean

    def pool(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        mean, var = weighted_moments(x, None, lengths)
        if self.deviation is None:
            return mean
        std = self.deviation.of(var, _num_frames(var, x, lengths))
        return torch.cat([mean, std], dim=1) if self.with_mean else std


class AttentiveStatsPool(Pooling):
    """Attentive statistics pooling with weights per frame and channel.

    A hidden layer ``fc1`` reads each frame and, with a global context, mean and standard deviation of the utterance;
    after the activations of the form, ``fc2`` makes attention logits of it. Their softmax over the real frames weighs
    mean and standard deviation of the result. The context's share of ``fc1`` is one vector per utterance, and the
    logits of all channels never reach memory as a whole.

    Args:
        channels: Channels C of a frame.
        bottleneck: Channels of the hidden layer.
        global_context: Give the attention the utterance's mean and standard deviation beside each frame.
        form: Activations and standard deviations; those of wespeaker's ASTP unless given.
        shared_weights: One weight per frame for all channels.
        with_std: Give the standard deviation after the mean.

    Reference: Okabe et al., "Attentive Statistics Pooling for Deep Speaker Embedding", Interspeech 2018; Desplanques et
    al., "ECAPA-TDNN", Interspeech 2020.
    """

    def __init__(
        self,
        channels: int,
        bottleneck: int = 128,
        global_context: bool = True,
        *,
        form: AttentionForm = ASTP,
        shared_weights: bool = False,
        with_std: bool = True,
    ) -> None:
        super().__init__(channels, channels * (1 + with_std))
        if not isinstance(form, AttentionForm):
            raise InputError(f"form must be an AttentionForm, got {form!r}; spkfast.nn.poolings.create takes names")
        self.form, self.global_context, self.shared_weights, self.with_std = (
            form, global_context, shared_weights, with_std,
        )  # fmt: skip
        self.fc1 = nn.Conv1d(channels * (3 if global_context else 1), bottleneck, 1)
        self.bn = nn.BatchNorm1d(bottleneck) if form.bn else None
        self.fc2 = nn.Conv1d(bottleneck, 1 if shared_weights else channels, 1)

    def obstacle(self) -> str | None:
        """Why its kernels never run."""
        return InferenceLayer.obstacle(self)

    def misfit(self) -> str | None:
        """What it computes otherwise than its kernels of inference."""
        if self.shared_weights:
            return "one weight per frame for all channels"
        return None if has_inference_form(self.bn) else "batch norm without running statistics"

    def pool(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        tensors = self.weights_for_kernels(x)
        if tensors is not None:
            return self._pool_by_kernels(x, lengths, self._packed(tensors, self.products_at(x)))
        if self.precision != "fp32":
            x = x.to(self.fc1.weight.dtype)
        if self.bn is None or not self.training:
            x = _without_padding(x, lengths)
        weight, bias = self.fc1.weight, self.fc1.bias
        kernels = self.kernels_for_training(x) if lengths is None else None
        if self.global_context:
            mean, var = weighted_moments(x, None, lengths)
            std = self.form.context.of(var, _num_frames(var, x, lengths))
            _, of_mean, of_std = weight[..., 0].to(mean.dtype).split(self.channels, dim=1)
            share = F.linear(mean, of_mean, None if bias is None else bias.to(mean.dtype)) + F.linear(std, of_std)
            hidden = _trained_product(kernels, x, weight[:, : self.channels])
            hidden = hidden + share.to(hidden.dtype)[..., None]
        else:
            hidden = _trained_product(kernels, x, weight, bias)
        if self.form.relu:
            hidden = F.relu(hidden)
        if self.bn is not None:
            hidden = self.bn(hidden)
        if self.form.tanh:
            hidden = torch.tanh(hidden)
        # For its gradient the fused op multiplies in float32. On a CPU autocast's own type saves more time than logits
        # in memory cost; and other runtimes, for which a graph is exported, know no fused op.
        if self.shared_weights or kernels == ("bf16", "native") or torch.compiler.is_exporting():
            bias = self.fc2.bias
            if bias is not None:  # a softmax over time does not see it, and its gradient would be rounding alone
                bias = bias.detach() + 0 * bias
            logits = _trained_product(kernels, hidden, self.fc2.weight, bias)
            moments = weighted_moments(x, logits, lengths)
        else:
            assert self.fc2.bias is not None
            weight, bias = self.fc2.weight.to(hidden.dtype), self.fc2.bias.to(hidden.dtype)
            moments = weighted_moments_from_hidden(x, hidden, weight, bias, lengths)
        return _mean_and_std(moments, self.form.deviation if self.with_std else None)

    def bound(self) -> Callable[[Tensor], Tensor]:
        """The pooling on its kernels, which apply, at the precision that was set: of frames all of which are real."""
        attention = self._packed(self.tensors_inside(), self.precision)
        return lambda x: self._pool_by_kernels(x, None, attention)

    def _packed(self, tensors: list[Tensor], precision: Precision) -> PackedAttention:
        # The attention is small and its weights span a wide range: bytes are too coarse.
        precision = "bf16" if precision == "int8" else precision
        kind = HALF.get(precision, torch.float32)

        def pack() -> PackedAttention:
            params = inference_params(self.fc1, self.bn)
            own, rest = params.weight.split([self.channels, params.weight.shape[1] - self.channels], dim=1)
            context = None
            if self.global_context:
                context = pack_tdnn_layer(TdnnParams(rest, params.bias), [self.channels, self.channels])
                params = params._replace(bias=None)
            hidden = pack_tdnn_layer(params._replace(weight=own), precision=precision)
            assert self.fc2.bias is not None
            weight, bias = self.fc2.weight[..., 0].detach().to(kind), self.fc2.bias.detach().to(kind)
            return PackedAttention(hidden, context, weight.contiguous(), bias)

        return self.kept.of(tensors, precision, pack)

    def _pool_by_kernels(self, x: Tensor, lengths: Tensor | None, attention: PackedAttention) -> Tensor:
        x, form = x.to(attention.weight.dtype), self.form
        if x.device.type == "cpu" and fits(x, attention):
            low, high = form.context.limits(torch.float32)
            moments = Moments(
                *attentive_moments(
                    x, attention, lengths,
                    relu=form.relu, tanh=form.tanh, unbiased=form.context.unbiased, add=form.context.add,
                    low=low, high=high, offset=form.context.offset,
                )
            )  # fmt: skip
        else:
            offset = None
            if attention.context is not None:
                mean, var = weighted_moments(x, None, lengths)
                std = form.context.of(var, _num_frames(var, x, lengths))
                statistics = [mean[..., None], std[..., None]]
                offset = run_packed_layer(statistics, attention.context, None, relu=False)[..., 0]
            hidden = run_packed_layer([x], attention.hidden, lengths, offset=offset, relu=form.relu, tanh=form.tanh)
            moments = weighted_moments_from_hidden(x, hidden, attention.weight, attention.bias, lengths)
        return _mean_and_std(moments, form.deviation if self.with_std else None)


class FrameAttentivePool(Pooling):
    """Self-attentive pooling with one weight per frame: SAP, and with a standard deviation ASP of voxceleb_trainer.

    The logits are ``attention . tanh(sap_linear(x))``.

    Args:
        channels: Channels C of a frame.
        deviation: The weighted standard deviation that follows the mean; None for the mean alone.

    Reference: Cai et al., "Exploring the Encoding Layer and Loss Function in End-to-End Speaker and Language
    Recognition System", Odyssey 2018; Okabe et al., Interspeech 2018.
    """

    def __init__(self, channels: int, deviation: Deviation | None = None) -> None:
        super().__init__(channels, channels * (1 if deviation is None else 2))
        self.deviation = deviation
        self.sap_linear = nn.Linear(channels, channels)
        self.attention = nn.Parameter(nn.init.xavier_normal_(torch.empty(channels, 1)))

    def pool(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        x = _without_padding(x, lengths)
        hidden = torch.tanh(_product(x, self.sap_linear.weight[..., None], self.sap_linear.bias))
        logits = _product(hidden, self.attention.T[..., None])
        return _mean_and_std(weighted_moments(x, logits, lengths), self.deviation)


class MultiHeadAttentiveStatsPool(Pooling):
    """Attentive statistics pooling of groups of channels, each with an attention of its own (MHASTP of wespeaker).

    The products of all heads are grouped convolutions ``att``: head h has the h-th part of their output channels.

    Args:
        channels: Channels C of a frame, a multiple of ``heads``.
        heads: Groups of channels.
        layers: Products of each head, with the hyperbolic tangent between.
        bottleneck: Channels of a head between the products.
        per_channel: A weight per channel and frame in place of one per head and frame.

    Raises:
        InputError: If the heads do not divide the channels, or there is no product.

    Reference: India et al., "Self Multi-Head Attention for Speaker Recognition", Interspeech 2019.
    """

    def __init__(
        self, channels: int, heads: int = 2, layers: int = 2, bottleneck: int = 64, per_channel: bool = False
    ) -> None:
        if heads < 1 or channels % heads:
            raise InputError(f"channels must be a multiple of heads={heads}, got {channels}")
        if layers < 1:
            raise InputError(f"layers must be at least 1, got {layers}")
        super().__init__(channels, 2 * channels)
        self.heads, self.per_channel = heads, per_channel
        widths = [channels, *[heads * bottleneck] * (layers - 1), channels if per_channel else heads]
        self.att = nn.ModuleList(
            nn.Conv1d(width, following, 1, groups=heads) for width, following in itertools.pairwise(widths)
        )

    def pool(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        x = _without_padding(x, lengths)
        batch, channels, frames = x.shape
        logits = x
        for i, conv in enumerate(self.att):
            assert isinstance(conv, nn.Conv1d)
            logits = _product(logits if i == 0 else torch.tanh(logits), conv.weight, conv.bias, self.heads)
        if not self.per_channel:
            # Each head is a row of its own, whose channels share their weights.
            x = x.reshape(batch * self.heads, channels // self.heads, frames)
            logits = logits.reshape(batch * self.heads, 1, frames)
            lengths = None if lengths is None else lengths.repeat_interleave(self.heads)
        mean, var = weighted_moments(x, logits, lengths)
        std = Deviation(low=1e-7).of(var)
        # Mean and deviation of the first head, of the second, ...
        by_head = (batch, self.heads, channels // self.heads)
        return torch.stack([mean.reshape(by_head), std.reshape(by_head)], dim=2).flatten(1)


class MultiQueryAttentiveStatsPool(Pooling):
    """Several multi-head attentive statistics poolings side by side (MQMHASTP of wespeaker).

    Args:
        channels: Channels C of a frame, a multiple of ``heads``.
        queries: How many poolings.
        heads: Groups of channels.
        layers: Products of each head.
        bottleneck: Channels of a head between the products.
        per_channel: A weight per channel and frame in place of one per head and frame.

    Raises:
        InputError: As :class:`MultiHeadAttentiveStatsPool`, or if there is no query.

    Reference: Zhao et al., "Multi-query Multi-head Attention Pooling and Inter-topK Penalty for Speaker Verification",
    ICASSP 2022.
    """

    def __init__(
        self,
        channels: int,
        queries: int = 2,
        heads: int = 8,
        layers: int = 2,
        bottleneck: int = 64,
        per_channel: bool = True,
    ) -> None:
        if queries < 1:
            raise InputError(f"queries must be at least 1, got {queries}")
        super().__init__(channels, 2 * channels * queries)
        self.queries = nn.ModuleList(
            MultiHeadAttentiveStatsPool(channels, heads, layers, bottleneck, per_channel) for _ in range(queries)
        )

    def pool(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        return torch.cat([query(x, lengths) for query in self.queries], dim=1)


class XiPool(Pooling):
    """Posterior mean of a Gaussian whose frames come with a precision each (xi-vector).

    Each frame is an observation of the vector sought. Its precision, the square of ``softplus(fc2(bn(relu(fc1(x)))))``,
    is estimated per channel; with a learned prior, the posterior mean weighs frames and prior mean by their precisions.
    That is attentive pooling over one frame more, the prior, with the logarithms of the precisions as logits.

    Args:
        channels: Channels C of a frame.
        bottleneck: Channels of the hidden layer.
        with_std: Give the standard deviation of frames and prior mean under the same weights after the mean.

    Reference: Lee et al., "Xi-Vector Embedding for Speaker Recognition", IEEE Signal Processing Letters 28, 2021.
    """

    def __init__(self, channels: int, bottleneck: int = 256, with_std: bool = False) -> None:
        super().__init__(channels, channels * (1 + with_std))
        self.with_std = with_std
        self.prior_mean = nn.Parameter(torch.zeros(1, channels))
        self.prior_logprec = nn.Parameter(torch.zeros(1, channels))
        self.fc1 = nn.Conv1d(channels, bottleneck, 1)
        self.bn = nn.BatchNorm1d(bottleneck)
        self.fc2 = nn.Conv1d(bottleneck, channels, 1)

    def pool(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        if not self.training:
            x = _without_padding(x, lengths)
        hidden = self.bn(F.relu(_product(x, self.fc1.weight, self.fc1.bias)))
        root = _product(hidden, self.fc2.weight, self.fc2.bias)
        root = root.to(torch.promote_types(root.dtype, torch.float32))
        # Where softplus(r) would vanish, its logarithm is r to the last digit, and has a gradient.
        logits = 2 * torch.where(root < -30, root, F.softplus(root.clamp_min(-30)).log())
        # The prior comes first, where it is a real frame of every row.
        x = torch.cat([self.prior_mean.to(x.dtype).expand(x.shape[:2])[..., None], x], dim=-1)
        logits = torch.cat([self.prior_logprec.to(logits.dtype).expand(x.shape[:2])[..., None], logits], dim=-1)
        moments = weighted_moments(x, logits, None if lengths is None else lengths + 1)
        return _mean_and_std(moments, Deviation(low=1e-12) if self.with_std else None)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None, groups: int = 1) -> Tensor:
    """Convolution of one tap, in the type of ``x``.

    On a CPU oneDNN is up to twice as fast at it as MKL is at the batch of matrix products that it is elsewhere. These
    take (B, T, C) memory as it lies, and compile for any number of frames, where inductor makes the gradient of a 1-d
    convolution anew for each (torch 2.13).

    Args:
        x: Shape (B, C, T).
        weight: Shape (H, C / groups, 1), as a convolution has it.
        bias: Shape (H,), or None.
        groups: Groups of channels, each with its part of the weight.
    """
    batch, channels, frames = x.shape
    compiles = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    if x.device.type == "cpu" and frames and not compiles:
        return F.conv1d(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), groups=groups)
    # With one group every reshape is a view.
    parts = x.reshape(batch * groups, channels // groups, frames)
    outputs = weight.shape[0]
    weight = _of_each_part(weight[..., 0].to(x.dtype), batch, groups)
    if bias is None:
        out = torch.bmm(weight, parts)
    else:
        out = torch.baddbmm(_of_each_part(bias[:, None].to(x.dtype), batch, groups), weight, parts)
    return out.reshape(batch, outputs, frames)


def _trained_product(kernels: Kernels | None, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`_product`, on the kernels to train on where there are any."""
    if kernels is None:
        return _product(x, weight, bias)
    return conv_relu(
        [x], weight, bias, precision=kernels.precision, moments=False, relu=False, backend=kernels.backend
    )[0]


def _of_each_part(value: Tensor, batch: int, groups: int) -> Tensor:
    """(H, N) to (B * groups, H / groups, N)."""
    rows, columns = value.shape
    value = value.reshape(1, groups, rows // groups, columns).expand(batch, -1, -1, -1)
    return value.reshape(batch * groups, rows // groups, columns)


def _mean_and_std(moments: Moments, deviation: Deviation | None) -> Tensor:
    """Weighted mean and, where there is a deviation, standard deviation side by side."""
    if deviation is None:
        return moments.mean
    return torch.cat([moments.mean, deviation.of(moments.var)], dim=1)


def _num_frames(var: Tensor, x: Tensor, lengths: Tensor | None) -> Tensor:
    """Real frames per row, shape (B, 1) or (1, 1), in the type of the statistics."""
    return var.new_full((1, 1), x.shape[-1]) if lengths is None else lengths[:, None].to(var.dtype)


def _padding(x: Tensor, lengths: Tensor) -> Tensor:
    """True on padding frames, shape (B, 1, T)."""
    return torch.arange(x.shape[-1], device=x.device) >= lengths[:, None, None]


def _without_padding(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Zeros in padding frames where weights may get a gradient, which a NaN there would reach as 0 * NaN."""
    if lengths is None or not torch.is_grad_enabled():
        return x
    return x.masked_fill(_padding(x, lengths), 0)
