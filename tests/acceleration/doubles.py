"""Networks with structure, names and arithmetic of other toolkits' ECAPA-TDNN, written anew from their description."""

from __future__ import annotations

import itertools

import torch
from torch import nn
from torch.nn import functional as F

# wespeaker


class ConvReluNorm(nn.Module):
    def __init__(self, inputs, outputs, taps=1, dilation=1):
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, taps, padding=taps // 2 * dilation, dilation=dilation)
        self.bn = nn.BatchNorm1d(outputs)

    def forward(self, x):
        return self.bn(F.relu(self.conv(x)))


class Res2(nn.Module):
    def __init__(self, channels, dilation, scale):
        super().__init__()
        self.width = width = channels // scale
        self.convs = nn.ModuleList(
            nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation) for _ in range(scale - 1)
        )
        self.bns = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(scale - 1))

    def forward(self, x):
        groups = x.split(self.width, dim=1)
        done = []
        for conv, bn, group in zip(self.convs, self.bns, groups, strict=False):
            done.append(bn(F.relu(conv(group + done[-1] if done else group))))
        return torch.cat([*done, groups[-1]], dim=1)


class Gate(nn.Module):
    def __init__(self, channels, bottleneck):
        super().__init__()
        self.linear1 = nn.Linear(channels, bottleneck)
        self.linear2 = nn.Linear(bottleneck, channels)

    def forward(self, x):
        gate = torch.sigmoid(self.linear2(F.relu(self.linear1(x.mean(dim=2)))))
        return x * gate[..., None]


class WespeakerBlock(nn.Module):
    def __init__(self, channels, dilation, scale=4, bottleneck=5):
        super().__init__()
        self.se_res2block = nn.Sequential(
            ConvReluNorm(channels, channels),
            Res2(channels, dilation, scale),
            ConvReluNorm(channels, channels),
            Gate(channels, bottleneck),
        )

    def forward(self, x):
        return x + self.se_res2block(x)


class WespeakerPooling(nn.Module):
    def __init__(self, channels, bottleneck=6, global_context=True):
        super().__init__()
        self.channels, self.global_context = channels, global_context
        self.linear1 = nn.Conv1d(channels * (3 if global_context else 1), bottleneck, 1)
        self.linear2 = nn.Conv1d(bottleneck, channels, 1)

    def get_out_dim(self):
        return 2 * self.channels

    def forward(self, x):
        if x.ndim == 4:
            x = x.flatten(1, 2)
        seen = x
        if self.global_context:
            mean, std = x.mean(2, keepdim=True), (x.var(2, keepdim=True) + 1e-7).sqrt()
            seen = torch.cat([x, mean.expand_as(x), std.expand_as(x)], dim=1)
        weights = self.linear2(torch.tanh(self.linear1(seen))).softmax(dim=2)
        mean = (weights * x).sum(2)
        var = (weights * x**2).sum(2) - mean**2
        return torch.cat([mean, var.clamp(min=1e-7).sqrt()], dim=1)


class Wespeaker(nn.Module):
    """Features (B, T, M) to the last block's frames and embeddings."""

    def __init__(self, mels=20, channels=16, aggregated=24, embedding=12, global_context=True):
        super().__init__()
        self.layer1 = ConvReluNorm(mels, channels, taps=5)
        self.layer2 = WespeakerBlock(channels, 2)
        self.layer3 = WespeakerBlock(channels, 3)
        self.layer4 = WespeakerBlock(channels, 4)
        self.conv = nn.Conv1d(3 * channels, aggregated, 1)
        self.pool = WespeakerPooling(aggregated, global_context=global_context)
        self.bn = nn.BatchNorm1d(self.pool.get_out_dim())
        self.linear = nn.Linear(self.pool.get_out_dim(), embedding)
        self.bn2 = nn.Identity()

    def forward(self, x):
        out1 = self.layer1(x.transpose(1, 2))
        out2 = self.layer2(out1)
        out3 = self.layer3(out2)
        out4 = self.layer4(out3)
        frames = F.relu(self.conv(torch.cat([out2, out3, out4], dim=1)))
        return out4, self.linear(self.bn(self.pool(frames)))


# TaoRuijie and ESPnet


class SqueezeSequence(nn.Module):
    def __init__(self, channels, bottleneck, norm):
        super().__init__()
        norms = [nn.BatchNorm1d(bottleneck)] if norm else []
        self.se = nn.Sequential(
            nn.AdaptiveAvgPool1d(1),
            nn.Conv1d(channels, bottleneck, 1),
            nn.ReLU(),
            *norms,
            nn.Conv1d(bottleneck, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x):
        return x * self.se(x)


class TaoBlock(nn.Module):
    def __init__(self, channels, dilation, scale=4, bottleneck=5, se_norm=False):
        super().__init__()
        self.width = width = channels // scale
        self.conv1, self.bn1 = nn.Conv1d(channels, channels, 1), nn.BatchNorm1d(channels)
        self.convs = nn.ModuleList(
            nn.Conv1d(width, width, 3, dilation=dilation, padding=dilation) for _ in range(scale - 1)
        )
        self.bns = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(scale - 1))
        self.conv3, self.bn3 = nn.Conv1d(channels, channels, 1), nn.BatchNorm1d(channels)
        self.relu = nn.ReLU()
        self.se = SqueezeSequence(channels, bottleneck, se_norm)

    def forward(self, x):
        groups = self.bn1(self.relu(self.conv1(x))).split(self.width, dim=1)
        done, last = [], None
        for i, (conv, bn) in enumerate(zip(self.convs, self.bns, strict=True)):
            last = groups[i] if last is None else last + groups[i]
            last = bn(self.relu(conv(last)))
            done.append(last)
        out = self.bn3(self.relu(self.conv3(torch.cat([*done, groups[-1]], dim=1))))
        out = self.se(out)
        out += x
        return out


class Spectrum(nn.Module):
    """A front-end in the place of the toolkit's own: waveforms (B, S) to powers (B, M, T)."""

    def __init__(self, bins):
        super().__init__()
        self.register_buffer("window", torch.hamming_window(2 * bins))

    def forward(self, waves):
        bins = self.window.numel() // 2
        frames = waves.unfold(-1, 2 * bins, bins) * self.window
        return torch.fft.rfft(frames).abs().square()[..., :bins].transpose(1, 2)


class Masks(nn.Module):
    """Augmentation: hides some bands."""

    def forward(self, x):
        return x.masked_fill(torch.rand(x.shape[0], x.shape[1], 1) < 0.1, 0.0)


class TaoRuijie(nn.Module):
    """Waveforms (B, S) to embeddings; front-end, sums between blocks and pooling lie in its own forward."""

    def __init__(self, mels=20, channels=16, aggregated=24, embedding=12, bottleneck=6):
        super().__init__()
        self.torchfbank = nn.Sequential(Spectrum(mels))
        self.specaug = Masks()
        self.conv1 = nn.Conv1d(mels, channels, 5, padding=2)
        self.relu = nn.ReLU()
        self.bn1 = nn.BatchNorm1d(channels)
        self.layer1, self.layer2, self.layer3 = (TaoBlock(channels, dilation) for dilation in (2, 3, 4))
        self.layer4 = nn.Conv1d(3 * channels, aggregated, 1)
        self.attention = nn.Sequential(
            nn.Conv1d(3 * aggregated, bottleneck, 1),
            nn.ReLU(),
            nn.BatchNorm1d(bottleneck),
            nn.Tanh(),
            nn.Conv1d(bottleneck, aggregated, 1),
            nn.Softmax(dim=2),
        )
        self.bn5 = nn.BatchNorm1d(2 * aggregated)
        self.fc6 = nn.Linear(2 * aggregated, embedding)
        self.bn6 = nn.BatchNorm1d(embedding)

    def forward(self, x, aug):
        with torch.no_grad():
            x = (self.torchfbank(x) + 1e-6).log()
            x = x - x.mean(dim=-1, keepdim=True)
            if aug:
                x = self.specaug(x)
        x = self.bn1(self.relu(self.conv1(x)))
        x1 = self.layer1(x)
        x2 = self.layer2(x + x1)
        x3 = self.layer3(x + x1 + x2)
        x = self.relu(self.layer4(torch.cat([x1, x2, x3], dim=1)))
        frames = x.shape[-1]
        mean = x.mean(2, keepdim=True).repeat(1, 1, frames)
        std = x.var(2, keepdim=True).clamp(min=1e-4).sqrt().repeat(1, 1, frames)
        weights = self.attention(torch.cat([x, mean, std], dim=1))
        mu = (x * weights).sum(2)
        sigma = ((x**2 * weights).sum(2) - mu**2).clamp(min=1e-4).sqrt()
        return self.bn6(self.fc6(self.bn5(torch.cat([mu, sigma], dim=1))))


class EspnetPooling(nn.Module):
    def __init__(self, channels, bottleneck=6):
        super().__init__()
        self.attention = nn.Sequential(
            nn.Conv1d(3 * channels, bottleneck, 1),
            nn.ReLU(),
            nn.BatchNorm1d(bottleneck),
            nn.Conv1d(bottleneck, channels, 1),
        )
        self.softmax = nn.Softmax(dim=2)

    def forward(self, x, task_tokens=None, mask=None):
        if task_tokens is not None:
            raise ValueError("task_tokens are not known")
        mean, std = x.mean(2, keepdim=True), x.var(2, keepdim=True).clamp(1e-4, 1e4).sqrt()
        logits = self.attention(torch.cat([x, mean.expand_as(x), std.expand_as(x)], dim=1))
        if mask is not None:
            logits = logits.masked_fill(mask[:, None], -1e9)
        weights = self.softmax(logits)
        mu = (x * weights).sum(2)
        sigma = ((x**2 * weights).sum(2) - mu**2).clamp(1e-4, 1e4).sqrt()
        return torch.cat([mu, sigma], dim=1)


class Espnet(nn.Module):
    """Features (B, T, M) to embeddings."""

    def __init__(self, mels=20, channels=16, aggregated=24, embedding=12):
        super().__init__()
        self.conv, self.relu = nn.Conv1d(mels, channels, 5, padding=2), nn.ReLU()
        self.bn = nn.BatchNorm1d(channels)
        self.layer1, self.layer2, self.layer3 = (TaoBlock(channels, d, se_norm=True) for d in (2, 3, 4))
        self.layer4 = nn.Conv1d(3 * channels, aggregated, 1)
        self.pooling = EspnetPooling(aggregated)
        self.projector = nn.Sequential(nn.BatchNorm1d(2 * aggregated), nn.Linear(2 * aggregated, embedding))

    def forward(self, x, mask=None):
        x = self.bn(self.relu(self.conv(x.transpose(1, 2))))
        x1 = self.layer1(x)
        x2 = self.layer2(x + x1)
        x3 = self.layer3(x + x1 + x2)
        x = self.relu(self.layer4(torch.cat([x1, x2, x3], dim=1)))
        return self.projector(self.pooling(x, mask=mask))


# speechbrain and 3D-Speaker


def real_frames(lengths, frames):
    """1 on real frames, of lengths relative to that of the batch."""
    return (torch.arange(frames, dtype=lengths.dtype) < (lengths * frames)[:, None])[:, None].to(lengths.dtype)


class WrappedConv(nn.Module):
    """Frames mirrored at the ends, then a convolution."""

    def __init__(self, inputs, outputs, taps=1, dilation=1, groups=1):
        super().__init__()
        self.padding = (taps - 1) * dilation // 2
        self.conv = nn.Conv1d(inputs, outputs, taps, dilation=dilation, groups=groups)

    def forward(self, x):
        return self.conv(F.pad(x, (self.padding, self.padding), mode="reflect"))


class WrappedNorm(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.BatchNorm1d(channels)

    def forward(self, x):
        return self.norm(x)


class Tdnn(nn.Module):
    def __init__(self, inputs, outputs, taps=1, dilation=1, groups=1, dropout=0.0):
        super().__init__()
        self.conv = WrappedConv(inputs, outputs, taps, dilation, groups)
        self.activation = nn.ReLU()
        self.norm = WrappedNorm(outputs)
        self.dropout = nn.Dropout1d(dropout)

    def forward(self, x):
        return self.dropout(self.norm(self.activation(self.conv(x))))


class ChunkedRes2(nn.Module):
    def __init__(self, channels, taps, dilation, scale):
        super().__init__()
        width = channels // scale
        self.blocks = nn.ModuleList(Tdnn(width, width, taps, dilation) for _ in range(scale - 1))
        self.scale = scale

    def forward(self, x):
        first, *rest = x.chunk(self.scale, dim=1)
        done = [first]
        for i, (block, chunk) in enumerate(zip(self.blocks, rest, strict=True)):
            done.append(block(chunk + done[-1] if i else chunk))
        return torch.cat(done, dim=1)


class MaskedGate(nn.Module):
    def __init__(self, channels, bottleneck):
        super().__init__()
        self.conv1, self.relu = WrappedConv(channels, bottleneck), nn.ReLU(inplace=True)
        self.conv2, self.sigmoid = WrappedConv(bottleneck, channels), nn.Sigmoid()

    def forward(self, x, lengths=None):
        if lengths is None:
            mean = x.mean(2, keepdim=True)
        else:
            mask = real_frames(lengths, x.shape[-1])
            mean = (x * mask).sum(2, keepdim=True) / mask.sum(2, keepdim=True)
        return x * self.sigmoid(self.conv2(self.relu(self.conv1(mean))))


class SpeechbrainBlock(nn.Module):
    def __init__(self, inputs, channels, dilation, scale=4, bottleneck=5, groups=1, dropout=0.0):
        super().__init__()
        self.tdnn1 = Tdnn(inputs, channels, groups=groups, dropout=dropout)
        self.res2net_block = ChunkedRes2(channels, 3, dilation, scale)
        self.tdnn2 = Tdnn(channels, channels, groups=groups, dropout=dropout)
        self.se_block = MaskedGate(channels, bottleneck)
        self.shortcut = WrappedConv(inputs, channels) if inputs != channels else None

    def forward(self, x, lengths=None):
        residual = x if self.shortcut is None else self.shortcut(x)
        return residual + self.se_block(self.tdnn2(self.res2net_block(self.tdnn1(x))), lengths)


class SpeechbrainPooling(nn.Module):
    def __init__(self, channels, bottleneck=6, global_context=True):
        super().__init__()
        self.global_context = global_context
        self.tdnn = Tdnn(channels * (3 if global_context else 1), bottleneck)
        self.tanh = nn.Tanh()
        self.conv = WrappedConv(bottleneck, channels)

    def forward(self, x, lengths=None):
        frames = x.shape[-1]
        mask = real_frames(torch.ones(len(x)) if lengths is None else lengths, frames).to(x.dtype)
        seen = x
        if self.global_context:
            mean, std = self._statistics(x, mask / mask.sum(2, keepdim=True))
            seen = torch.cat([x, mean[..., None].repeat(1, 1, frames), std[..., None].repeat(1, 1, frames)], dim=1)
        logits = self.conv(self.tanh(self.tdnn(seen)))
        weights = logits.masked_fill(mask == 0, -torch.inf).softmax(dim=2)
        return torch.cat(self._statistics(x, weights), dim=1)[..., None]

    def _statistics(self, x, weights):
        mean = (weights * x).sum(2)
        return mean, (weights * (x - mean[..., None]) ** 2).sum(2).clamp(1e-12).sqrt()


class Speechbrain(nn.Module):
    """Features (B, T, M) and relative lengths to embeddings (B, 1, E)."""

    def __init__(self, mels=20, channels=(16, 16, 24, 16), embedding=12, groups=1, dropout=0.0):
        super().__init__()
        self.blocks = nn.ModuleList([Tdnn(mels, channels[0], 5, dropout=dropout)])
        for i, (before, after) in enumerate(itertools.pairwise(channels)):
            self.blocks.append(SpeechbrainBlock(before, after, i + 2, groups=groups, dropout=dropout))
        self.mfa = Tdnn(sum(channels[1:]), sum(channels[1:]), dropout=dropout)
        self.asp = SpeechbrainPooling(sum(channels[1:]))
        self.asp_bn = WrappedNorm(2 * sum(channels[1:]))
        self.fc = WrappedConv(2 * sum(channels[1:]), embedding)

    def forward(self, x, lengths=None):
        x, outputs = x.transpose(1, 2), []
        for layer in self.blocks:
            # Which layers know lengths is told by their class.
            x = layer(x) if isinstance(layer, Tdnn) else layer(x, lengths=lengths)
            outputs.append(x)
        x = self.mfa(torch.cat(outputs[1:], dim=1))
        return self.fc(self.asp_bn(self.asp(x, lengths=lengths))).transpose(1, 2)
