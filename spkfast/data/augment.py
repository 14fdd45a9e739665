"""Augmentation of training crops: measured room responses, additive noise, speed change."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from spkfast.data.audio import audio_files, read_audio, read_random_part, resample


class Augment:
    """Convolves a crop with a room response or adds noise, one of the two, with a given probability.

    Args:
        noise: Folder of noise recordings, or None.
        rir: Folder of room impulse responses, or None.
        probability: Chance that a crop is changed at all.
        noise_snr_db: Lowest and highest signal-to-noise ratio in decibels.
        sample_rate: Rate of the crops in Hz; responses and noise are resampled to it.

    Raises:
        InputError: If a folder holds no audio.
    """

    def __init__(
        self,
        noise: str | os.PathLike[str] | None,
        rir: str | os.PathLike[str] | None,
        probability: float,
        noise_snr_db: tuple[float, float],
        sample_rate: int,
    ) -> None:
        self._noises = [] if noise is None else audio_files(noise)
        self._responses = [] if rir is None else audio_files(rir)
        self._probability = probability
        self._snr = noise_snr_db
        self._rate = sample_rate
        self._cache: dict[Path, np.ndarray] = {}

    @property
    def names(self) -> list[str]:
        """Names of the noise files and room responses, in the order in which draws number them."""
        return [path.name for path in (*self._noises, *self._responses)]

    def __call__(self, samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The crop (S,) float32, changed or not, as ``rng`` decides; the length stays."""
        kinds = [kind for kind, files in (("noise", self._noises), ("rir", self._responses)) if files]
        if not kinds or rng.random() >= self._probability:
            return samples
        if kinds[rng.integers(len(kinds))] == "noise":
            return self._add_noise(samples, rng)
        return reverberate(samples, self._load(self._responses[rng.integers(len(self._responses))]))

    def _add_noise(self, samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        path = self._noises[rng.integers(len(self._noises))]
        noise, rate = read_random_part(path, lambda rate: -(-len(samples) * rate // self._rate), rng)
        noise = np.resize(resample(noise, rate, self._rate), len(samples))  # a short noise repeats
        return mix(samples, noise, rng.uniform(*self._snr))

    def _load(self, path: Path) -> np.ndarray:
        if path not in self._cache:
            samples, rate = read_audio(path)
            self._cache[path] = resample(samples, rate, self._rate)
        return self._cache[path]


def mix(samples: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """Sum of signal and noise of one length, the noise scaled to the ratio of mean powers ``snr_db``."""

    def power_db(x: np.ndarray) -> float:
        return 10 * float(np.log10(np.mean(np.square(x, dtype=np.float64)) + 1e-4))

    gain = 10 ** ((power_db(samples) - power_db(noise) - snr_db) / 20)
    return samples + np.float32(gain) * noise


def reverberate(samples: np.ndarray, response: np.ndarray) -> np.ndarray:
    """Convolution with an impulse response scaled to unit energy, cut to the length of the signal."""
    response = response / np.float32(np.sqrt(np.sum(np.square(response, dtype=np.float64))) or 1)
    size = 1 << (len(samples) + len(response) - 2).bit_length()
    product = np.fft.rfft(samples, size) * np.fft.rfft(response, size)
    return np.fft.irfft(product, size)[: len(samples)].astype(np.float32)


def change_speed(samples: np.ndarray, speed: float) -> np.ndarray:
    """The signal played ``speed`` times as fast, pitch included: about ``1 / speed`` times as many samples."""
    return resample(samples, round(100 * speed), 100)
