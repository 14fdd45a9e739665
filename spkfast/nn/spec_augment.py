"""Masks of SpecAugment, drawn by counting so that a seed alone decides them."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from spkfast.errors import InputError
from spkfast.reference.random import philox


@dataclasses.dataclass(frozen=True)
class SpecAugment:
    """Sizes of the random rectangles that SpecAugment sets to zero; the defaults are LibriSpeech's policy LD.

    Time is not warped. Zero is the mean of an utterance only where its front-end subtracts that.

    Attributes:
        num_time_masks: Masks over consecutive frames, each across all bins.
        max_frames: Largest width of such a mask in frames.
        num_bin_masks: Masks over consecutive bins, each across all frames.
        max_bins: Largest width of such a mask in bins.
        max_time_fraction: No time mask is wider than this part of its utterance.
        probability: Chance that an utterance is masked at all.

    Reference: Park et al., "SpecAugment: A Simple Data Augmentation Method for Automatic Speech Recognition",
    Interspeech 2019.
    """

    num_time_masks: int = 2
    max_frames: int = 100
    num_bin_masks: int = 2
    max_bins: int = 27
    max_time_fraction: float = 1.0
    probability: float = 1.0

    def __post_init__(self) -> None:
        for name in ("num_time_masks", "max_frames", "num_bin_masks", "max_bins"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
                raise InputError(f"{name} must be a count, got {value!r}")
        for name in ("max_time_fraction", "probability"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
                raise InputError(f"{name} must lie in 0..1, got {value!r}")

    def masks(self, frame_lengths: Tensor, num_bins: int, seeds: Tensor) -> Tensor:
        """Rectangles for ``functional.log_mel_fbank``: an utterance has the same ones in every batch, on every device.

        A width is uniform in 0 to the largest, which no utterance exceeds, and the position is uniform over where a
        mask of that width fits.

        Args:
            frame_lengths: Frames per utterance, int64, shape (B,).
            num_bins: Values per frame.
            seeds: One seed per utterance, int64, shape (B,).

        Returns:
            First frame, one past the last frame, first bin and one past the last bin of N = ``num_time_masks +
            num_bin_masks`` rectangles, int64, shape (B, N, 4).

        Raises:
            InputError: If shapes or dtypes are wrong.
        """
        for name, value in (("frame_lengths", frame_lengths), ("seeds", seeds)):
            if value.dtype != torch.int64 or value.shape != seeds.shape or value.ndim != 1:
                raise InputError(
                    f"{name} must be int64 of shape (B,), one for each of the seeds {tuple(seeds.shape)}, got "
                    f"{value.dtype} of shape {tuple(value.shape)}"
                )
        number = torch.arange(1 + self.num_time_masks + self.num_bin_masks, device=seeds.device)
        # Counted from the top: the noise of the same seed counts samples from the bottom.
        first, second = philox(0xFFFFFFFF - number, seeds[:, None])  # [B, 1 + N]
        masked = first[:, :1] < round(self.probability * 2**32)
        frames, bins = frame_lengths[:, None], torch.full_like(frame_lengths, num_bins)[:, None]
        most_frames = (frames.double() * self.max_time_fraction).long()
        time, band = slice(1, 1 + self.num_time_masks), slice(1 + self.num_time_masks, None)
        begin, end = _interval(first[:, time], second[:, time], most_frames.clamp(0, self.max_frames), frames)
        low, high = _interval(first[:, band], second[:, band], bins.clamp_max(self.max_bins), bins)
        rectangles = [
            torch.stack([begin, end, torch.zeros_like(begin), bins.expand_as(begin)], dim=-1),
            torch.stack([torch.zeros_like(low), frames.expand_as(low), low, high], dim=-1),
        ]
        return torch.cat(rectangles, dim=1) * masked[..., None]


def _interval(first: Tensor, second: Tensor, widest: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Random intervals of width 0..widest within 0..size, from words of 32 bits."""
    width = first * (widest + 1) >> 32
    begin = second * (size - width + 1) >> 32
    return begin, begin + width
