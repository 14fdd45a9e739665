"""A corpus of a few hummed tones, small enough to train on within a test."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def make_tones(folder: Path, speakers: int = 4, utterances: int = 3, seconds: float = 1.5) -> Path:
    """Write ``<speaker>/s/<utterance>.wav`` and ``train_list.txt``; a speaker is a pitch."""
    import soundfile

    rng = np.random.default_rng(0)
    time = np.arange(round(16000 * seconds)) / 16000
    lines = []
    for s in range(speakers):
        for u in range(utterances):
            pitch = 110 * 1.3**s * (1 + 0.02 * rng.standard_normal())
            tone = sum(np.sin(2 * np.pi * k * pitch * time) / k for k in range(1, 8))
            path = folder / f"spk{s}" / "s" / f"{u}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, 0.1 * tone + 0.01 * rng.standard_normal(len(time)), 16000)
            lines.append(f"spk{s} spk{s}/s/{u}.wav\n")
    (folder / "train_list.txt").write_text("".join(lines))
    return folder


TINY = """
model: {options: {channels: 16, mfa_channels: 24, embedding_dim: 12, attention_channels: 8, se_channels: 8}}
data:
  crop_seconds: 0.5
  sampler: balanced
  workers: 1
  augment: {recipe: room_or_noise, options: {speeds: [1.0, 0.9]}, spec_augment: {max_frames: 5, max_bins: 5}}
optimizer: {lr: 0.05}
schedule: {warmup: 15 %}
steps: 30
batch_size: 8
log_steps: 5
"""
