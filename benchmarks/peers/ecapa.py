"""ECAPA-TDNN as toolkits write it, in plain torch: what runtimes are given of the network that spkfast runs."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import baselines

_SCALE, _BINS, _MFA, _ATTENTION, _SE, _EMBEDDING = 8, 80, 1536, 128, 128, 192
_DILATIONS = (2, 3, 4)


class _Layer(nn.Module):
    """Convolution, ReLU, batch norm where there is one."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, dilation: int = 1, bn: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, kernel, dilation=dilation, padding=(kernel - 1) // 2 * dilation)
        self.bn = nn.BatchNorm1d(outputs) if bn else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(F.relu(self.conv(x)))


class _Squeeze(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, _SE), nn.Linear(_SE, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean(dim=2)))))[:, :, None]


class _Block(nn.Module):
    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.width = channels // _SCALE
        self.in_, self.out = _Layer(channels, channels), _Layer(channels, channels)
        self.res = nn.ModuleList(_Layer(self.width, self.width, 3, dilation) for _ in range(_SCALE - 1))
        self.se = _Squeeze(channels)

    def forward(self, x: Tensor) -> Tensor:
        *groups, last = self.in_(x).split(self.width, dim=1)
        outputs: list[Tensor] = []
        for layer, group in zip(self.res, groups, strict=True):
            outputs.append(layer(group + outputs[-1] if outputs else group))
        return x + self.se(self.out(torch.cat([*outputs, last], dim=1)))


class _Encoder(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = _Layer(_BINS, channels, 5)
        self.blk1, self.blk2, self.blk3 = (_Block(channels, dilation) for dilation in _DILATIONS)
        self.mfa = _Layer(3 * channels, _MFA, bn=False)

    def forward(self, x: Tensor) -> Tensor:
        first = self.blk1(self.stem(x))
        second = self.blk2(first)
        return self.mfa(torch.cat([first, second, self.blk3(second)], dim=1))


class _Attention(nn.Module):
    def __init__(self, context_once: bool) -> None:
        super().__init__()
        self.context_once = context_once
        self.fc1, self.fc2 = nn.Conv1d(3 * _MFA, _ATTENTION, 1), nn.Conv1d(_ATTENTION, _MFA, 1)

    def forward(self, x: Tensor) -> Tensor:
        if not self.context_once:
            first, second = ((conv.weight, conv.bias) for conv in (self.fc1, self.fc2))
            return baselines.attentive_pooling(x, first, second)
        context = torch.cat([x.mean(dim=2), (x.var(dim=2) + 1e-7).sqrt()], dim=1)
        of_frames, of_context = self.fc1.weight.split([_MFA, 2 * _MFA], dim=1)
        share = F.linear(context, of_context[:, :, 0], self.fc1.bias)
        hidden = torch.tanh(F.conv1d(x, of_frames) + share[:, :, None])
        return torch.cat(baselines.attentive_stats(x, self.fc2(hidden), one_pass=True), dim=1)


class _Projector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn, self.fc = nn.BatchNorm1d(2 * _MFA), nn.Linear(2 * _MFA, _EMBEDDING)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn(x))


class Ecapa(nn.Module):
    """wespeaker's ECAPA-TDNN with global context: features (B, T, 80) to embeddings (B, 192).

    Weights have the names of ``spkfast.models.create("ecapa_tdnn")``.

    Args:
        channels: Channels of stem and blocks.
        context_once: Multiply the mean and deviation that the attention sees once per utterance, as spkfast does; no
            toolkit writes it so, each repeats them for every frame.
    """

    def __init__(self, channels: int, *, context_once: bool = False) -> None:
        super().__init__()
        self.encoder, self.pooling, self.projector = _Encoder(channels), _Attention(context_once), _Projector()

    def forward(self, features: Tensor) -> Tensor:
        return self.projector(self.pooling(self.encoder(features.transpose(1, 2))))


def random_weights(channels: int, features: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Weights as a trained network has them: batch norm knows the statistics of what it sees, and then scales it.

    Args:
        channels: Channels of stem and blocks.
        features: What the statistics are taken over, (B, T, 80).
        seed: For the weights.
    """
    generator = torch.Generator().manual_seed(seed)
    net = Ecapa(channels)
    with torch.no_grad():
        for name, value in net.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if ".bn." in name:
                value.copy_(0.1 * noise + name.endswith("weight"))
            else:
                value.copy_(0.1 * noise if value.ndim == 1 else noise * math.sqrt(2 / value[0].numel()))
        for module in net.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.momentum = None  # an average over all that is seen
        net.train()(features)
    return net.state_dict()


def products(batch: int, frames: int, channels: int) -> Iterator[tuple[int, int, int]]:
    """(M, K, N) of every matrix product of the network, one after the other.

    A convolution is the product of its unfolded input. The attention's share of mean and deviation is taken once per
    utterance, as it does not depend on the frame.
    """
    rows, width = batch * frames, channels // _SCALE
    yield rows, 5 * _BINS, channels
    for _ in _DILATIONS:
        yield rows, channels, channels
        for _ in range(_SCALE - 1):
            yield rows, 3 * width, width
        yield rows, channels, channels
        yield batch, channels, _SE
        yield batch, _SE, channels
    yield rows, 3 * channels, _MFA
    yield batch, 2 * _MFA, _ATTENTION
    yield rows, _MFA, _ATTENTION
    yield rows, _ATTENTION, _MFA
    yield batch, 2 * _MFA, _EMBEDDING
