"""Named workloads shared by every benchmark."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Waveforms:
    """A padded batch of speech-like waveforms."""

    batch: int
    seconds: float
    sample_rate: int = 16000

    def __str__(self) -> str:
        return f"{self.batch} x {self.seconds:g} s"

    def inputs(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Harmonics with noise, float32 (B, S), and lengths (B,): all rows full."""
        generator = torch.Generator().manual_seed(seed)
        samples = int(self.seconds * self.sample_rate)
        t = torch.arange(samples) / self.sample_rate
        f0 = 90 + 120 * torch.rand(self.batch, 1, generator=generator)
        x = torch.zeros(self.batch, samples)
        for k in range(1, 12):
            x += torch.sin(2 * math.pi * f0 * k * t + k * k) / k
        x *= 0.1 * (1 + torch.sin(2 * math.pi * 3 * t))
        x += 0.01 * torch.randn(self.batch, samples, generator=generator)
        return x.clamp_(-1, 1), torch.full((self.batch,), samples)


@dataclasses.dataclass(frozen=True)
class Frames:
    """Frame-level activations with attention logits."""

    batch: int
    channels: int
    frames: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.channels} x {self.frames}"

    def inputs(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Activations, whose channels differ in mean, and logits; both float32 (B, C, T)."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.batch, self.channels, self.frames)
        x = torch.randn(shape, generator=generator) + torch.randn(self.channels, 1, generator=generator)
        return x, 2 * torch.randn(shape, generator=generator)

    def ragged(self) -> Tensor:
        """Lengths from half of the frames to all of them, int64 (B,)."""
        return torch.linspace(self.frames / 2, self.frames, self.batch).long()


BULK = Waveforms(64, 10.0)  # extraction
UTTERANCE = Waveforms(1, 10.0)
SECOND = Waveforms(1, 1.0)  # what a stream takes

POOLING = Frames(32, 1536, 200)  # a training crop of 2 s out of an ECAPA-TDNN
POOLING_ROW = Frames(1, 1536, 200)

# Every preset of spkfast.frontend once; espnet is another name of taoruijie.
PRESETS = (
    "wespeaker", "kaldi", "3dspeaker", "mfcc", "speechbrain", "taoruijie", "clova_l", "clova_v2", "vgg", "thin",
    "redimnet", "redimnet2", "titanet",
)  # fmt: skip
