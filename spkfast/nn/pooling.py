"""Poolings: from frame-level activations to one vector per utterance."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spkfast.nn.se_res2net import masked_mean


class AttentiveStatsPool(nn.Module):
    """Channel- and context-dependent attentive statistics pooling (ASTP of wespeaker).

    Attention logits are ``fc2(tanh(fc1([x, mean, std])))``; the softmax runs over the real frames, and weighted mean
    and standard deviation are concatenated.

    Args:
        channels: Channels C of the input.
        bottleneck: Channels of the hidden attention layer.
        global_context: Give the attention the utterance's mean and standard deviation beside each frame.

    Reference: Desplanques et al., "ECAPA-TDNN", Interspeech 2020; Okabe et al., "Attentive Statistics Pooling for Deep
    Speaker Embedding", Interspeech 2018.
    """

    context_eps = 1e-7
    eps = 1e-7

    def __init__(self, channels: int, bottleneck: int = 128, global_context: bool = True) -> None:
        super().__init__()
        self.channels = channels
        self.global_context = global_context
        self.fc1 = nn.Conv1d(channels * (3 if global_context else 1), bottleneck, 1)
        self.fc2 = nn.Conv1d(bottleneck, channels, 1)

    @property
    def output_size(self) -> int:
        """Size of the pooled vector."""
        return 2 * self.channels

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, C, T) and mask (B, 1, T) to (B, 2C)."""
        hidden = F.conv1d(x, self.fc1.weight[:, : self.channels], self.fc1.bias)
        if self.global_context:
            # The context is constant over time: its share of the product is one vector per utterance.
            context = torch.cat(self._context(x, mask), dim=1)
            hidden = hidden + F.linear(context, self.fc1.weight[:, self.channels :, 0])[..., None]
        logits = self.fc2(torch.tanh(hidden))
        x, logits = _at_least_float32(x), _at_least_float32(logits)
        if mask is not None:
            logits = logits.masked_fill(mask == 0, -torch.inf)
        weights = logits.softmax(dim=-1)
        mean = (weights * x).sum(dim=-1)
        var = (weights * (x - mean[..., None]).square()).sum(dim=-1)
        return torch.cat([mean, var.clamp_min(self.eps).sqrt()], dim=1)

    def _context(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        x = _at_least_float32(x)
        mean = masked_mean(x, mask)
        deviation = (x - mean[..., None]).square()
        if mask is None:
            total, frames = deviation.sum(dim=-1), torch.full_like(mean[:1, :1], x.shape[-1])
        else:
            total, frames = (deviation * mask).sum(dim=-1), mask.sum(dim=-1)
        var = total / (frames - 1).clamp_min(1)  # one frame has no variance
        return mean, (var + self.context_eps).sqrt()


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
