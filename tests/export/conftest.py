"""Encoders and waveforms that tests of exported graphs share."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import spkfast
from spkfast import SpeakerEncoder
from spkfast.models import create

DIALECTS = ("wespeaker", "speechbrain", "taoruijie", "espnet")


def voice(seed: int, samples: int) -> np.ndarray:
    """Harmonics of a gliding pitch with noise, float32, within [-1, 1]: one of eight voices, from some second on."""
    whole = _voice(seed % 8)
    start = 16000 * (seed // 8 % 30)
    return np.take(whole, np.arange(start, start + samples), mode="wrap")


@functools.cache
def _voice(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    t = np.arange(30 * 16000) / 16000
    phase = 2 * np.pi * (rng.uniform(90, 220) * t + 15 * np.sin(2 * np.pi * 0.7 * t))
    voiced = sum(np.sin(k * phase + k * k) / k for k in range(1, 20)) * (1 + np.sin(2 * np.pi * 3 * t))
    return (0.1 * voiced + 0.01 * rng.standard_normal(len(t))).clip(-1, 1).astype(np.float32)


@torch.no_grad()
def trained_like(dialect: str, channels: int) -> SpeakerEncoder:
    """An ECAPA-TDNN whose batch norms know the statistics of what they see, as a trained one's do."""
    generator = torch.Generator().manual_seed(0)
    spec = spkfast.frontend({"espnet": "taoruijie"}.get(dialect, dialect))
    options = {} if channels >= 512 else {"mfa_channels": 3 * channels, "attention_channels": 32, "se_channels": 32}
    net = create("ecapa_tdnn", channels=channels, dialect=dialect, feature_dim=spec.n_mels, **options)
    for name, value in net.named_parameters():
        noise = torch.randn(value.shape, generator=generator)
        # Before a ReLU the variance is kept; logits and embeddings begin as small as torch has them.
        gain = 1 / 3 if re.search(r"fc2|projector", name) else 2
        value.copy_(noise * math.sqrt(gain / value[0].numel()) if value.ndim > 1 else 0.1 * noise)
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm1d)]
    for norm in norms:
        norm.weight.add_(1)
        norm.momentum = None  # an average over all that is seen
    waveforms = torch.stack([torch.from_numpy(voice(seed, 48000)) for seed in range(100, 108)])
    net.train()(spkfast.functional.log_mel_fbank(waveforms, spec=spec)[0])
    return SpeakerEncoder(net.eval(), spec, device="cpu")


@pytest.fixture(scope="session")
def encoders() -> Callable[[str, int], SpeakerEncoder]:
    """:func:`trained_like`, each made once."""
    made: dict[tuple[str, int], SpeakerEncoder] = {}

    def get(dialect: str, channels: int = 32) -> SpeakerEncoder:
        return made.setdefault((dialect, channels), trained_like(dialect, channels))

    return get


@pytest.fixture(scope="session")
def mini() -> SpeakerEncoder:
    return SpeakerEncoder.load("ecapa-mini", device="cpu")


def relative_errors(have: Tensor, want: Tensor) -> Tensor:
    """Of each row, (B,)."""
    return (have.double() - want.double()).norm(dim=1) / want.double().norm(dim=1)
