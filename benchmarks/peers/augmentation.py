"""Reading and augmenting crops the usual way: item by item, with the libraries that training scripts use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.signal
import soundfile


class Added(NamedTuple):
    """A noise file, its first sample, and its ratio."""

    path: Path
    offset: int
    snr_db: float


class Item(NamedTuple):
    """What is done to one crop.

    Attributes:
        path: Its file.
        start: First sample read.
        count: Samples read.
        speed: Factor.
        room: Impulse response to convolve with, or None.
        noises: What is added, one group after the other.
        peak: Whether it is divided by its peak at the end.
    """

    path: Path
    start: int
    count: int
    speed: float
    room: Path | None
    noises: Sequence[Sequence[Added]]
    peak: bool


def read(item: Item) -> np.ndarray:
    """The crop alone is decoded."""
    with soundfile.SoundFile(item.path) as file:
        file.seek(item.start)
        return file.read(item.count, dtype="float32")


def read_room(path: Path) -> np.ndarray:
    """An impulse response of unit energy."""
    room, _ = soundfile.read(path, dtype="float32")
    return room / np.sqrt(np.sum(room**2))


def augment(
    samples: np.ndarray,
    item: Item,
    num_samples: int,
    power_floor: float,
    memory: Mapping[Path, np.ndarray] | None = None,
) -> np.ndarray:
    """Speed, room, noise and peak; noise is read as far as needed, at each use, where it is not in memory."""
    if item.speed != 1:
        ratio = Fraction(item.speed).limit_denominator(100)
        samples = scipy.signal.resample_poly(samples, ratio.denominator, ratio.numerator)
    if len(samples) != num_samples:
        samples = np.resize(samples, num_samples)
    if item.room is not None:
        room = read_room(item.room) if memory is None else memory[item.room]
        samples = scipy.signal.fftconvolve(samples, room)[:num_samples]
    for group in item.noises:
        if not group:
            continue
        clean_db = 10 * np.log10(np.mean(samples**2) + power_floor)
        total = np.zeros(num_samples, dtype=np.float32)
        for path, offset, snr_db in group:
            if memory is None:
                with soundfile.SoundFile(path) as file:
                    file.seek(offset)
                    noise = file.read(num_samples, dtype="float32")
            else:
                noise = memory[path][offset : offset + num_samples]
            if len(noise) < num_samples:
                noise = np.resize(noise, num_samples)
            noise_db = 10 * np.log10(np.mean(noise**2) + power_floor)
            total += np.float32(np.sqrt(10 ** ((clean_db - noise_db - snr_db) / 10))) * noise
        samples = samples + total
    if item.peak:
        samples = samples / (np.max(np.abs(samples)) + 1e-4)
    return samples
