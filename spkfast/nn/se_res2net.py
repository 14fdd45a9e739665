"""Blocks of ECAPA-TDNN: convolution layer, Res2 convolution, squeeze-and-excitation and their residual sum."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TdnnLayer(nn.Module):
    """1-d convolution, ReLU, batch norm, with zero padding that keeps the number of frames.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Taps of the convolution; odd.
        dilation: Spacing of the taps in frames.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1, dilation: int = 1) -> None:
        super().__init__()
        padding = (kernel_size - 1) // 2 * dilation
        self.conv = nn.Conv1d(in_channels, out_channels, kernel_size, padding=padding, dilation=dilation)
        self.bn = nn.BatchNorm1d(out_channels)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, C_in, T) to (B, C_out, T); ``mask`` (B, 1, T) is 1 on real frames, so that padding reads as zeros."""
        if mask is not None and self.conv.kernel_size[0] > 1:
            x = x * mask
        return self.bn(F.relu(self.conv(x)))


class Res2Conv(nn.ModuleList):
    """Res2 convolution: channel groups convolved in a chain, each added to the next; the last group passes through.

    Reference: Gao et al., "Res2Net: A New Multi-scale Backbone Architecture", TPAMI 2021.
    """

    def __init__(self, channels: int, kernel_size: int, dilation: int, scale: int) -> None:
        width = channels // scale
        super().__init__(TdnnLayer(width, width, kernel_size, dilation) for _ in range(scale - 1))
        self.width = width

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, C, T) to (B, C, T)."""
        groups = x.split(self.width, dim=1)
        outputs: list[Tensor] = []
        for layer, group in zip(self, groups[:-1], strict=True):
            outputs.append(layer(group + outputs[-1] if outputs else group, mask))
        return torch.cat([*outputs, groups[-1]], dim=1)


class SqueezeExcitation(nn.Module):
    """Channel gates from the mean over the frames of the utterance.

    Reference: Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018.
    """

    def __init__(self, channels: int, bottleneck: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, bottleneck)
        self.fc2 = nn.Linear(bottleneck, channels)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, C, T) to (B, C, T)."""
        gate = torch.sigmoid(self.fc2(F.relu(self.fc1(masked_mean(x, mask)))))
        return x * gate[..., None]


class SERes2NetBlock(nn.Module):
    """SE-Res2Net block of ECAPA-TDNN: 1x1 layer, Res2 convolution, 1x1 layer, squeeze-and-excitation, residual sum.

    Args:
        channels: Channels C of input and output.
        kernel_size: Taps of the Res2 convolutions.
        dilation: Their dilation in frames.
        scale: Channel groups of the Res2 convolution.
        se_channels: Bottleneck of the squeeze-and-excitation.

    Reference: Desplanques et al., "ECAPA-TDNN", Interspeech 2020.
    """

    def __init__(self, channels: int, kernel_size: int, dilation: int, scale: int, se_channels: int) -> None:
        super().__init__()
        # The canonical parameter names "in" and "out" are reserved words or builtins, so they go in by name.
        self.add_module("in", TdnnLayer(channels, channels))
        self.res = Res2Conv(channels, kernel_size, dilation, scale)
        self.out = TdnnLayer(channels, channels)
        self.se = SqueezeExcitation(channels, se_channels)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, C, T) to (B, C, T)."""
        y = self.get_submodule("in")(x)
        return x + self.se(self.out(self.res(y, mask)), mask)


def masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the real frames of (B, C, T), shape (B, C)."""
    if mask is None:
        return x.mean(dim=-1)
    return (x * mask).sum(dim=-1) / mask.sum(dim=-1)


def frame_mask(lengths: Tensor | None, frames: int, dtype: torch.dtype) -> Tensor | None:
    """Mask (B, 1, T), 1 on the first ``lengths[b]`` frames; None where all frames are real."""
    if lengths is None:
        return None
    return (torch.arange(frames, device=lengths.device) < lengths[:, None])[:, None].to(dtype)
