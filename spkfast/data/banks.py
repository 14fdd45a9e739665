"""Noise recordings and room impulse responses in memory: one array of int16, read by place."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spkfast.data.audio import audio_files, open_audio, resample, to_int16
from spkfast.errors import InputError

# Folders of the MUSAN corpus. Its speech is what babble is made of.
CATEGORIES = ("music", "noise", "speech")
_VERSION = 1


class Bank:
    """Recordings one after the other in one tensor of int16.

    Args:
        samples: The recordings, int16, shape (N,).
        sizes: Samples of each, shape (F,).
        names: Name of each.
        categories: Category of each: ``music``, ``noise`` or ``speech``, or ``rir`` for impulse responses.
        sample_rate: In Hz.

    Attributes:
        samples: As given, on the device where :meth:`to` has put them.
        begins: First sample of each recording, int64, shape (F,), on the CPU as all that follows.
        sizes: Samples of each, int64, shape (F,).
        gains: One over the root of the energy of each, float32, shape (F,).
        names: As given.
        categories: As given.
        sample_rate: As given.
    """

    def __init__(
        self, samples: Tensor, sizes: Sequence[int], names: Sequence[str], categories: Sequence[str], sample_rate: int
    ) -> None:
        self.samples, self.sample_rate = samples, sample_rate
        self.sizes = torch.tensor(list(sizes), dtype=torch.int64)
        self.names, self.categories = list(names), list(categories)
        self.begins = self.sizes.cumsum(0) - self.sizes
        if not len(self.sizes) == len(self.names) == len(self.categories) > 0 or int(self.sizes.sum()) != len(samples):
            raise InputError(f"sizes, names and categories do not fit {len(samples)} samples")
        self._gains: Tensor | None = None

    @classmethod
    def from_folder(
        cls,
        folder: str | os.PathLike[str],
        sample_rate: int = 16000,
        warn: Callable[[str], None] = lambda message: None,
        *,
        rir: bool = False,
    ) -> Bank:
        """All audio below a folder, or a bank that was saved there.

        Files below a folder called ``music``, ``noise`` or ``speech`` are of that category, others are ``noise``. Where
        a file has 16 bits at this rate its very numbers are taken; others are resampled and rounded, and impulse
        responses scaled to full range before that. Channels are averaged; of impulse responses the first is taken.

        Args:
            folder: The folder.
            sample_rate: Rate to bring everything to, in Hz.
            warn: Called with a line for each file that is left out, being silent or no audio, and for those of
                another rate.
            rir: Whether these are impulse responses.

        Raises:
            InputError: If there is no audio, or none that can be used.
        """
        if (Path(folder) / "bank.json").is_file():
            bank = cls.load(folder)
            if bank.sample_rate != sample_rate:
                raise InputError(f"{folder}: holds a bank of {bank.sample_rate} Hz, {sample_rate} Hz are needed")
            return bank
        parts, names, categories = [], [], []
        for name, category, samples in _recordings(folder, sample_rate, warn, rir):
            parts.append(samples)
            names.append(name)
            categories.append(category)
        if not parts:
            raise InputError(f"{folder}: no file in this folder can be used")
        return cls(
            torch.from_numpy(np.concatenate(parts)), [len(part) for part in parts], names, categories, sample_rate
        )

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Bank:
        """A bank that was saved, mapped into memory: processes share it, and what is not used is not read.

        Raises:
            InputError: If it is missing, damaged or cut off.
        """
        path = Path(folder)
        try:
            index = json.loads((path / "bank.json").read_text(encoding="utf-8"))
            # Copied on writing: torch wants memory that it may write to.
            samples = np.load(path / "samples.npy", mmap_mode="c", allow_pickle=False)
            version, sizes = index["version"], [int(size) for size in index["sizes"]]
            if version != _VERSION:
                raise InputError(f"{path}: was written in version {version}, this is {_VERSION}; prepare it again")
            if samples.dtype != np.int16 or samples.shape != (sum(sizes),):
                raise InputError(f"{path}: samples.npy is not what bank.json says; prepare it again")
            return cls(torch.from_numpy(samples), sizes, index["names"], index["categories"], int(index["sample_rate"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: not a bank, or a damaged one ({' '.join(str(error).split())})") from error

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes ``samples.npy`` and ``bank.json`` into a folder."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        np.save(path / "samples.npy", self.samples.cpu().numpy(), allow_pickle=False)
        index = {
            "version": _VERSION,
            "sample_rate": self.sample_rate,
            "sizes": self.sizes.tolist(),
            "names": self.names,
            "categories": self.categories,
        }
        # Last: without it the folder is no bank.
        (path / "bank.json").write_text(json.dumps(index) + "\n", encoding="utf-8")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def seconds(self) -> float:
        """Length of everything."""
        return len(self.samples) / self.sample_rate

    @property
    def gains(self) -> Tensor:
        """One over the root of the energy of each recording, float32, shape (F,)."""
        if self._gains is None:
            parts = self.samples.cpu().split(self.sizes.tolist())
            energies = [float((part.double() / 32768).square().sum()) for part in parts]
            self._gains = torch.tensor([energy**-0.5 if energy > 0 else 0.0 for energy in energies])
        return self._gains

    def places(self, category: str) -> Tensor:
        """Places of the recordings of a category, int64, shape (n,)."""
        return torch.tensor([k for k, found in enumerate(self.categories) if found == category], dtype=torch.int64)

    def to(self, device: torch.device) -> Bank:
        """Moves the samples to a device if they take less than half of the memory that is free there."""
        if device.type == "cuda" and self.samples.device != device:
            free, _ = torch.cuda.mem_get_info(device)
            if 2 * len(self.samples) < free // 2:
                self.samples = self.samples.to(device)
        return self


def _recordings(
    folder: str | os.PathLike[str], sample_rate: int, warn: Callable[[str], None], rir: bool
) -> Iterator[tuple[str, str, np.ndarray]]:
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder")
    paths = audio_files(root)

    def read(path: Path) -> Any:
        try:
            with open_audio(path) as audio:
                # The average of responses at several places would be the response at none.
                return audio.read(0, audio.frames, channel=0 if rir else None), audio.sample_rate
        except InputError as error:
            return error

    others = 0
    with ThreadPoolExecutor() as pool:
        # A few at a time: a corpus of noise does not fit in memory as float32.
        for begin in range(0, len(paths), 64):
            group = paths[begin : begin + 64]
            for path, found in zip(group, pool.map(read, group), strict=True):
                if isinstance(found, InputError):
                    warn(f"left out: {found}")
                    continue
                samples, rate = found
                others += rate != sample_rate
                samples = resample(samples, rate, sample_rate)
                samples = to_int16(_full_range(samples) if rir else samples)
                if not samples.any():
                    warn(f"{path}: left out, it is silent")
                    continue
                inside = [part for part in path.relative_to(root).parts[:-1] if part in CATEGORIES]
                yield path.relative_to(root).as_posix(), "rir" if rir else inside[0] if inside else "noise", samples
    if others:
        warn(f"{root}: {others} of {len(paths)} files resampled to {sample_rate} Hz")


def _full_range(samples: np.ndarray) -> np.ndarray:
    """Samples of a response whose scale does not matter: as large as they fit where 16 bits do not hold them anyway."""
    scaled = samples * 32768
    peak = np.abs(samples).max()
    if peak == 0 or np.array_equal(scaled, np.rint(scaled)):
        return samples
    full: np.ndarray = samples * (32767 / 32768 / peak)
    return full
