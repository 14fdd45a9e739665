"""Blocks of ECAPA-TDNN: convolution layer, Res2 convolution, squeeze-and-excitation and their residual sum."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spkfast.errors import InputError
from spkfast.functional import weighted_moments
from spkfast.nn.inference import InferenceLayer, has_inference_form, inference_params
from spkfast.nn.training import Kernels, activate, normalise
from spkfast.ops._packing import PackedLayer
from spkfast.ops._tdnn_training import channel_affine
from spkfast.ops.se_res2net_block import BlockForm, pack_block, run_packed_block
from spkfast.ops.tdnn_layer import pack_tdnn_layer, run_packed_layer
from spkfast.reference import Precision, SERes2NetParams

PaddingMode = Literal["zeros", "reflect"]
Identity = Literal["first", "last"]
_CHANGED = "a convolution of another stride or padding"
_NO_STATISTICS = "batch norm without running statistics"


class Frames(NamedTuple):
    """Which frames of a padded batch are real.

    Attributes:
        lengths: Real frames per row, int64, shape (B,).
        mask: 1 on real frames, 0 on padding, shape (B, 1, T).
    """

    lengths: Tensor
    mask: Tensor


def real_frames(lengths: Tensor | None, frames: int, dtype: torch.dtype) -> Frames | None:
    """The real frames of rows of ``frames`` each; None where all are."""
    if lengths is None:
        return None
    lengths = lengths.clamp(0, frames)  # what a GPU was not asked to check must not lead out of the tensors
    mask = torch.arange(frames, device=lengths.device) < lengths[:, None]
    return Frames(lengths, mask[:, None].to(dtype))


class TdnnLayer(InferenceLayer):
    """1-d convolution, ReLU, batch norm; the number of frames stays.

    Every row of a padded batch is padded at its own end, as if it were alone.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Taps of the convolution; odd.
        dilation: Spacing of the taps in frames.
        groups: Channel groups of the convolution.
        padding_mode: What the convolution reads beyond the ends: ``zeros``, or ``reflect``, the frames mirrored at the
            first and the last one.
        batch_norm: Whether there is one.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        dilation: int = 1,
        groups: int = 1,
        padding_mode: PaddingMode = "zeros",
        batch_norm: bool = True,
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise InputError(f"kernel_size must be odd, got {kernel_size}")
        if padding_mode not in ("zeros", "reflect"):
            raise InputError(f"padding_mode must be 'zeros' or 'reflect', got {padding_mode!r}")
        if in_channels % groups or out_channels % groups:
            raise InputError(f"groups must divide {in_channels} and {out_channels} channels, got {groups}")
        self.padding = (kernel_size - 1) // 2 * dilation
        self.reflect = padding_mode == "reflect" and self.padding > 0
        self.conv = nn.Conv1d(
            in_channels,
            out_channels,
            kernel_size,
            padding=0 if self.reflect else self.padding,
            dilation=dilation,
            groups=groups,
        )
        self.bn = nn.BatchNorm1d(out_channels) if batch_norm else None

    def quantised(self) -> dict[str, nn.Module]:
        """Where the inputs of its product are seen."""
        return {"in": self}

    def misfit(self) -> str | None:
        """What its convolution or batch norm compute otherwise than the kernels of inference."""
        return _misfit(self.conv, self.bn, self.has_kernels())

    def forward(self, x: Tensor | Sequence[Tensor], frames: Frames | None = None) -> Tensor:
        """(B, C_in, T), or several inputs that have C_in channels together, to (B, C_out, T).

        Raises:
            InputError: If an input has another number of dimensions. Of channels that are wrong the message is that of
                what runs: a ValueError or, of modules of torch, a RuntimeError.
        """
        inputs = [x] if isinstance(x, Tensor) else list(x)
        for part in inputs:
            # The convolution alone takes one utterance, (C, T), too.
            if part.ndim != 3 and not (part.ndim == 2 and self.bn is None and not self.reflect):
                raise _wrong_dimensions(part)
        tensors = self.weights_for_kernels(*inputs)
        if tensors is not None:
            packed = self._packed(tensors, self.products_at(inputs[0]), [part.shape[1] for part in inputs])
            return self._run(inputs, packed, None if frames is None else frames.lengths)
        kernels = self.kernels_for_training(*inputs) if frames is None else None
        if kernels is not None and self.has_kernels():
            return self.train_on(inputs, kernels)[0]
        x = inputs[0] if len(inputs) == 1 else torch.cat(inputs, dim=1)
        if self.precision != "fp32":  # a layer before it ran on its kernels
            x = x.to(self.conv.weight.dtype)
        if self.reflect:
            x = pad_by_reflection(x, self.padding, None if frames is None else frames.lengths)
        elif frames is not None and self.padding:
            x = x * frames.mask
        x = F.relu(self.conv(x))
        return x if self.bn is None else self.bn(x)

    def bound(self, parts: list[int]) -> Callable[[Sequence[Tensor]], Tensor]:
        """The layer on its kernels, which apply, at the precision that was set: of inputs of so many channels, all of
        whose frames are real."""
        return functools.partial(self._run, packed=self._packed(self.tensors_inside(), self.precision, parts))

    def _packed(self, tensors: list[Tensor], precision: Precision, parts: list[int]) -> PackedLayer:
        def pack() -> PackedLayer:
            params, input_range = inference_params(self.conv, self.bn), self.input_ranges.get("in")
            _check_channels(sum(parts), params.weight)
            return pack_tdnn_layer(params, parts, precision=precision, input_range=input_range)

        return self.kept.of(tensors, (precision, parts, self.input_ranges.get("in")), pack)

    def _run(self, inputs: Sequence[Tensor], packed: PackedLayer, lengths: Tensor | None = None) -> Tensor:
        return run_packed_layer(inputs, packed, lengths, dilation=self.conv.dilation[0], reflect=self.reflect)

    def has_kernels(self) -> bool:
        """Whether kernels compute what the convolution does, which may have been changed or replaced."""
        return _keeps_frames(self.conv, self.padding, self.reflect)

    def train_on(
        self, inputs: Sequence[Tensor], kernels: Kernels, added: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The layer, and the sum of its output and another tensor, to train on."""
        return normalise(self.conv, self.bn, inputs, kernels, reflect=self.reflect, added=added)


class Res2Conv(nn.ModuleList):
    """Res2 convolution: channel groups convolved in a chain, each added to the next; one group passes through.

    Args:
        channels: Channels C; a multiple of ``scale``.
        kernel_size: Taps of the convolutions.
        dilation: Their dilation in frames.
        scale: Channel groups.
        identity: Which group passes: the ``last`` one, or the ``first``.
        padding_mode: See :class:`TdnnLayer`.

    Reference: Gao et al., "Res2Net: A New Multi-scale Backbone Architecture", TPAMI 2021.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        dilation: int,
        scale: int,
        identity: Identity = "last",
        padding_mode: PaddingMode = "zeros",
    ) -> None:
        if channels % scale:
            raise InputError(f"channels must be a multiple of scale={scale}, got {channels}")
        if identity not in ("first", "last"):
            raise InputError(f"identity must be 'first' or 'last', got {identity!r}")
        width = channels // scale
        super().__init__(
            TdnnLayer(width, width, kernel_size, dilation, padding_mode=padding_mode) for _ in range(scale - 1)
        )
        self.width = width
        self.first_passes = identity == "first"

    def forward(self, x: Tensor, frames: Frames | None = None) -> Tensor:
        """(B, C, T) to (B, C, T)."""
        groups = x.split(self.width, dim=1)
        convolved = groups[1:] if self.first_passes else groups[:-1]
        outputs: list[Tensor] = []
        for layer, group in zip(self, convolved, strict=True):
            outputs.append(layer(group + outputs[-1] if outputs else group, frames))
        return torch.cat([groups[0], *outputs] if self.first_passes else [*outputs, groups[-1]], dim=1)


class SqueezeExcitation(nn.Module):
    """Channel gates from the mean over the frames of the utterance.

    Args:
        channels: Channels C.
        bottleneck: Units of the hidden layer.
        batch_norm: Batch norm after the hidden layer's ReLU.

    Reference: Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018.
    """

    def __init__(self, channels: int, bottleneck: int, batch_norm: bool = False) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, bottleneck)
        self.bn = nn.BatchNorm1d(bottleneck) if batch_norm else None
        self.fc2 = nn.Linear(bottleneck, channels)

    def forward(self, x: Tensor, frames: Frames | None = None) -> Tensor:
        """(B, C, T) to (B, C, T)."""
        return x * self.gates(masked_mean(x, frames))[..., None]

    def gates(self, means: Tensor) -> Tensor:
        """Of the means of channels: (B, C) to (B, C)."""
        hidden = F.relu(_linear(self.fc1, means))
        if self.bn is not None:
            hidden = self.bn(hidden)
        return torch.sigmoid(_linear(self.fc2, hidden))


class SERes2NetBlock(InferenceLayer):
    """SE-Res2Net block of ECAPA-TDNN: 1x1 layer, Res2 convolution, 1x1 layer, squeeze-and-excitation, residual sum.

    Args:
        channels: Channels C of the output.
        kernel_size: Taps of the Res2 convolutions.
        dilation: Their dilation in frames.
        scale: Channel groups of the Res2 convolution.
        se_channels: Bottleneck of the squeeze-and-excitation.
        in_channels: Channels of the input; where they are not C, a 1x1 convolution takes the input to the sum.
        groups: Channel groups of the two 1x1 layers.
        identity: Which group the Res2 convolution passes: the ``last`` one, or the ``first`` (speechbrain).
        padding_mode: See :class:`TdnnLayer`; speechbrain's is ``reflect``.
        se_bn: Batch norm inside the squeeze-and-excitation (ESPnet).

    Reference: Desplanques et al., "ECAPA-TDNN: Emphasized Channel Attention, Propagation and Aggregation in TDNN Based
    Speaker Verification", Interspeech 2020.
    """

    op = "se_res2net_block"

    def __init__(
        self,
        channels: int,
        kernel_size: int = 3,
        dilation: int = 1,
        scale: int = 8,
        se_channels: int = 128,
        *,
        in_channels: int | None = None,
        groups: int = 1,
        identity: Identity = "last",
        padding_mode: PaddingMode = "zeros",
        se_bn: bool = False,
    ) -> None:
        super().__init__()
        in_channels = channels if in_channels is None else in_channels
        self.in_ = TdnnLayer(in_channels, channels, groups=groups)
        self.res = Res2Conv(channels, kernel_size, dilation, scale, identity, padding_mode)
        self.out = TdnnLayer(channels, channels, groups=groups)
        self.se = SqueezeExcitation(channels, se_channels, se_bn)
        self.shortcut = None if in_channels == channels else nn.Conv1d(in_channels, channels, 1)

    def quantised(self) -> dict[str, nn.Module]:
        """Where the inputs of its products are seen."""
        return {"in": self.in_, "out": self.out} | {f"res.{j}": layer for j, layer in enumerate(self.res)}

    def misfit(self) -> str | None:
        """What its convolutions or batch norms compute otherwise than the kernels of inference."""
        layers = cast("list[TdnnLayer]", [self.in_, *self.res, self.out])
        found = next(filter(None, (layer.misfit() for layer in layers)), None)
        if found is not None:
            return found
        if len({(layer.conv.kernel_size, layer.conv.dilation, layer.reflect) for layer in layers[1:-1]}) > 1:
            return "Res2 convolutions of different dilations, taps or padding"
        if not self.in_.conv.kernel_size == self.out.conv.kernel_size == (1,):
            return "more than one tap outside of the Res2 convolutions"
        if self.shortcut is not None and not _keeps_frames(self.shortcut):
            return _CHANGED
        return None if has_inference_form(self.se.bn) else _NO_STATISTICS

    def forward(self, x: Tensor, frames: Frames | None = None, *, padding: Frames | None = None) -> Tensor:
        """(B, C_in, T) to (B, C, T).

        In evaluation mode, where no gradient is wanted, one op; see :class:`spkfast.nn.inference.InferenceLayer`.

        Args:
            x: The input.
            frames: Real frames, over which the squeeze-and-excitation takes its mean.
            padding: Real frames at whose ends the convolutions pad; None for the ends of the batch.

        Raises:
            InputError: As :class:`TdnnLayer`.
        """
        if x.ndim != 3:
            raise _wrong_dimensions(x)
        tensors = self.weights_for_kernels(x)
        if tensors is not None:
            call = self._packed(tensors, self.products_at(x), x.shape[1])
            return call(
                x,
                padded=None if padding is None else padding.lengths,
                excited=None if frames is None else frames.lengths,
            )
        layers = [self.in_, *self.res, self.out]
        kernels = self.kernels_for_training(x) if frames is None and padding is None else None
        if kernels is not None and all(layer.bn is not None and layer.has_kernels() for layer in layers):
            return self.train_on(x, kernels)
        if self.precision != "fp32":
            x = x.to(self.in_.conv.weight.dtype)
        y = self.out(self.res(self.in_(x), padding))
        return self.se(y, frames) + (x if self.shortcut is None else self.shortcut(x))

    def bound(self, channels: int) -> Callable[[Tensor], Tensor]:
        """The block on its kernels, which apply, at the precision that was set: of inputs of so many channels, all of
        whose frames are real."""
        return functools.partial(
            self._packed(self.tensors_inside(), self.precision, channels), padded=None, excited=None
        )

    def _packed(self, tensors: list[Tensor], precision: Precision, channels: int) -> Callable[..., Tensor]:
        """The op with all but its tensors, whose packing lasts as long as everything else that it depends on."""
        return self.kept.of(
            tensors,
            (precision, channels, tuple(self.input_ranges.items())),
            lambda: self._pack(precision, channels),
        )

    def _pack(self, precision: Precision, channels: int) -> Callable[..., Tensor]:
        convolutions = cast("list[TdnnLayer]", [*self.res])
        first = convolutions[0] if convolutions else self.in_
        params = SERes2NetParams(
            inference_params(self.in_.conv, self.in_.bn),
            [inference_params(layer.conv, layer.bn) for layer in convolutions],
            inference_params(self.out.conv, self.out.bn),
            inference_params(self.se.fc1, self.se.bn),
            inference_params(self.se.fc2),
            None if self.shortcut is None else inference_params(self.shortcut),
        )
        _check_channels(channels, params.in_.weight)
        return functools.partial(
            run_packed_block,
            packed=pack_block(params, precision, self.input_ranges),
            form=BlockForm("first" if self.res.first_passes else "last", "reflect" if first.reflect else "zeros"),
            convolutions=len(convolutions),
            taps=first.conv.kernel_size[0],
            dilation=first.conv.dilation[0],
        )

    def train_on(self, x: Tensor, kernels: Kernels) -> Tensor:
        """The block of rows all of whose frames are real, in as few passes over them as batch norm allows."""
        inner = self.in_.train_on([x], kernels)[0].transpose(1, 2)
        # So split, the gradients of the groups come together with channels side by side.
        groups = [group.transpose(1, 2) for group in inner.split(self.res.width, dim=2)]
        passed = groups.pop(0 if self.res.first_passes else -1)
        outputs: list[Tensor] = []
        total = groups[0] if groups else passed
        for j, layer in enumerate(self.res, start=1):
            following = groups[j] if j < len(groups) else None
            output, total = cast(TdnnLayer, layer).train_on([total], kernels, following)
            outputs.append(output)
        outputs.insert(0 if self.res.first_passes else len(outputs), passed)
        out = activate(self.out.conv, self.out.bn, outputs, kernels, reflect=self.out.reflect, moments=True)
        assert out.moments is not None and out.scale is not None and out.shift is not None
        gates = self.se.gates(out.moments.mean * out.scale + out.shift).float()
        rest = x if self.shortcut is None else self.shortcut(x)
        scale, shift, same = out.scale * gates, out.shift * gates, rest.dtype == out.y.dtype
        gated, total = channel_affine(
            out.y, scale, shift, rest if same else None, plain=not same, backend=kernels.backend
        )
        return total if same else gated + rest  # in the wider type, as of the modules under autocast


def _keeps_frames(conv: nn.Conv1d, padding: int = 0, reflect: bool = False) -> bool:
    """Whether kernels compute what a convolution does: one group, steps of one frame, as many frames as before.

    Args:
        conv: The convolution.
        padding: Frames that its layer adds on either side.
        reflect: Whether these are mirrored ones, in place of zeros.
    """
    reach = (conv.kernel_size[0] - 1) // 2 * conv.dilation[0]
    if conv.kernel_size[0] % 2 == 0 or (conv.groups, conv.stride, conv.padding_mode) != (1, (1,), "zeros"):
        return False
    if reflect:
        return reach == padding and conv.padding in ((0,), "valid")
    if not padding:
        return reach == 0 and conv.padding in ((0,), "same", "valid")
    return reach > 0 and conv.padding in ((reach,), "same")


def _misfit(conv: nn.Conv1d, bn: nn.Module | None, has_kernels: bool) -> str | None:
    if conv.groups != 1:
        return f"{conv.groups} groups of channels"
    if not has_kernels:
        return _CHANGED
    return None if has_inference_form(bn) else _NO_STATISTICS


def _wrong_dimensions(x: Tensor) -> InputError:
    return InputError(f"x must have shape (B, C, T), got {tuple(x.shape)}")


def _check_channels(channels: int, weight: Tensor) -> None:
    if channels != weight.shape[1]:
        raise InputError(f"x must have {weight.shape[1]} channels, got {channels}")


def _linear(layer: nn.Module, x: Tensor) -> Tensor:
    """A linear layer, which other toolkits write as a convolution of one tap, on (B, C)."""
    out: Tensor = layer(x[..., None])[..., 0] if isinstance(layer, nn.Conv1d) else layer(x)
    return out


def masked_mean(x: Tensor, frames: Frames | None) -> Tensor:
    """Mean over the real frames of (B, C, T), shape (B, C), summed in float32; 0 for a row without any."""
    if frames is None:
        # Cast before, since torch.onnx drops the type of a mean.
        return x.to(torch.promote_types(x.dtype, torch.float32)).mean(dim=-1).to(x.dtype)
    return weighted_moments(x, None, frames.lengths).mean.to(x.dtype)


def pad_by_reflection(x: Tensor, amount: int, lengths: Tensor | None = None) -> Tensor:
    """Adds ``amount`` frames before and after, mirrored at the first and last real frame of each row.

    A row too short to be mirrored once is mirrored again, so that every length has a meaning; what follows the added
    frames of a row is unspecified.

    Args:
        x: Shape (B, C, T).
        amount: Frames to add on either side.
        lengths: Real frames per row, int64, shape (B,); None where all T are.

    Returns:
        Shape (B, C, T + 2 * amount).
    """
    batch, channels, frames = x.shape
    if lengths is None:
        lengths = torch.full((batch,), frames, device=x.device)
    step = torch.arange(amount, device=x.device)
    added = torch.cat([(step - amount).expand(batch, -1), lengths[:, None] + step], dim=1)  # [B, 2 * amount]
    period = (2 * lengths[:, None] - 2).clamp_min(1)
    source = added.remainder(period)
    source = torch.minimum(source, period - source)
    # Only the added frames are moved one by one: their number does not grow with the utterance.
    mirrored = x.gather(2, source[:, None].expand(-1, channels, -1))
    return F.pad(x, (amount, amount)).scatter_(2, (added + amount)[:, None].expand(-1, channels, -1), mirrored)
