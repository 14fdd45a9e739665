"""Noise recordings and room impulse responses in memory: one array of int16, read by place."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from spkfast.data.audio import audio_files, open_audio, resample, to_int16
from spkfast.data.threads import default_workers, in_order
from spkfast.errors import InputError

# Folders of the MUSAN corpus. Its speech is what babble is made of.
CATEGORIES = ("music", "noise", "speech")
_VERSION = 2
_INDEX, _SAMPLES = "bank.json", "samples.npy"
_PARTIAL = ".partial"


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
        fingerprint: Hex digest of the rate, names, sizes, categories and samples.
    """

    def __init__(
        self, samples: Tensor, sizes: Sequence[int], names: Sequence[str], categories: Sequence[str], sample_rate: int
    ) -> None:
        if samples.dtype != torch.int16:
            raise InputError(f"samples must be int16, got {str(samples.dtype).removeprefix('torch.')}")
        self.samples, self.sample_rate = samples, sample_rate
        self.sizes = torch.tensor(list(sizes), dtype=torch.int64)
        self.names, self.categories = list(names), list(categories)
        self.begins = self.sizes.cumsum(0) - self.sizes
        if not len(self.sizes) == len(self.names) == len(self.categories) > 0 or int(self.sizes.sum()) != len(samples):
            raise InputError(f"sizes, names and categories do not fit {len(samples)} samples")
        self._gains: Tensor | None = None
        self._samples_digest: str | None = None

    @classmethod
    def from_folder(
        cls,
        folder: str | os.PathLike[str],
        sample_rate: int = 16000,
        warn: Callable[[str], None] = lambda message: None,
        *,
        rir: bool = False,
        out: str | os.PathLike[str] | None = None,
        progress: Callable[[int, int | None], None] = lambda done, total: None,
    ) -> Bank:
        """All audio below a folder, or a bank that was saved there.

        Files below a folder called ``music``, ``noise`` or ``speech`` are of that category. Where there is none, the
        name of the folder itself decides, and without that they are ``noise``. Where a file has 16 bits at this rate
        its very numbers are taken; others are resampled and rounded, and impulse responses scaled to full range before
        that. Channels are averaged; of impulse responses the first is taken.

        Args:
            folder: The folder.
            sample_rate: Rate to bring everything to, in Hz.
            warn: Called with a line for each file that is left out, being silent or no audio, and for those of
                another rate.
            rir: Whether these are impulse responses.
            out: Folder to save the bank in as :meth:`save` does, while it is read: it need not fit in memory.
            progress: Called with the number of files done and their total.

        Raises:
            InputError: If there is no audio, or none that can be used, or the folder holds a bank of another rate, or
                one of noise where impulse responses are needed or the other way round.
        """
        if (Path(folder) / _INDEX).is_file():
            bank = cls.load(folder)
            if bank.sample_rate != sample_rate:
                raise InputError(f"{folder}: holds a bank of {bank.sample_rate} Hz, {sample_rate} Hz are needed")
            bank._check_kind(folder, rir)
            if out is not None:
                bank.save(out)
            return bank
        recordings = _recordings(folder, sample_rate, warn, progress, rir)
        if out is not None:
            _save(out, sample_rate, recordings)
            return cls.load(out)
        # Grows without a copy where the system can move pages; parts and all of them joined would take twice as much.
        file = io.BytesIO()
        written = _write(file, recordings)
        bank = cls(
            torch.frombuffer(file.getbuffer(), dtype=torch.int16),
            written.sizes,
            written.names,
            written.categories,
            sample_rate,
        )
        bank._samples_digest = written.digest
        return bank

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Bank:
        """A bank that was saved, mapped into memory: processes share it, and what is not used is not read.

        Raises:
            InputError: If it is missing, damaged or cut off.
        """
        path = Path(folder)
        try:
            index = json.loads((path / _INDEX).read_text(encoding="utf-8"))
            # Copied on writing: torch wants memory that it may write to.
            samples = np.load(path / _SAMPLES, mmap_mode="c", allow_pickle=False)
            version, sizes = index["version"], [int(size) for size in index["sizes"]]
            if version != _VERSION:
                raise InputError(f"{path}: was written in version {version}, this is {_VERSION}; prepare it again")
            if samples.dtype != np.int16 or samples.shape != (sum(sizes),):
                raise InputError(f"{path}: {_SAMPLES} is not what {_INDEX} says; prepare it again")
            rate = int(index["sample_rate"])
            bank = cls(torch.from_numpy(samples), sizes, index["names"], index["categories"], rate)
            bank._samples_digest = str(index["samples_sha256"])
            return bank
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: not a bank, or a damaged one ({' '.join(str(error).split())})") from error

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes ``samples.npy`` and ``bank.json`` into a folder, in place of a bank that is there.

        Both are written under other names and renamed at the end: this bank may itself be mapped from there, and a run
        that is killed leaves nothing that looks whole.
        """
        parts = self.samples.cpu().contiguous().split(self.sizes.tolist())
        _save(folder, self.sample_rate, zip(self.names, self.categories, (part.numpy() for part in parts), strict=True))

    def __len__(self) -> int:
        return len(self.names)

    @property
    def seconds(self) -> float:
        """Length of everything."""
        return len(self.samples) / self.sample_rate

    @property
    def fingerprint(self) -> str:
        """Hex digest of the rate, names, sizes, categories and samples; those of a saved bank are not read again."""
        if self._samples_digest is None:
            samples = self.samples.cpu().contiguous().numpy()
            self._samples_digest = hashlib.sha256(samples.data).hexdigest()
        described = [self.sample_rate, self.names, self.sizes.tolist(), self.categories, self._samples_digest]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]

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

    def to(self, device: torch.device | str, warn: Callable[[str], None] = lambda message: None) -> Bank:
        """Moves the samples to a device; to a GPU only if they take less than half of the memory that is free there.

        Args:
            device: The device.
            warn: Called with a line if they stay where they are because memory is short.

        Returns:
            This bank.
        """
        target = torch.device(device)
        if target.type == self.samples.device.type and target.index in (None, self.samples.device.index):
            return self
        if target.type == "cuda":
            free, _ = torch.cuda.mem_get_info(target)
            needed = self.samples.nbytes
            if needed >= free // 2:
                warn(
                    f"a bank of {needed / 1e9:.3g} GB stays on {self.samples.device}: it would take more than half of "
                    f"the {free / 1e9:.3g} GB that are free on {target}"
                )
                return self
        self.samples = self.samples.to(target)
        return self

    def _check_kind(self, folder: str | os.PathLike[str], rir: bool) -> None:
        if {category == "rir" for category in self.categories} == {rir}:
            return
        noise, responses = "noise", "room impulse responses"
        wanted, found, option = (responses, noise, "with") if rir else (noise, responses, "without")
        raise InputError(
            f"{folder}: holds a bank of {found}, one of {wanted} is needed; give another, made by 'spkfast prepare "
            f"noise' {option} --rir"
        )


class _Written(NamedTuple):
    """What :func:`_write` has written: sizes, names and categories of the recordings, and SHA-256 of all samples."""

    sizes: list[int]
    names: list[str]
    categories: list[str]
    digest: str


def is_unfinished(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds what a killed :meth:`Bank.save` has left, and nothing else."""
    path = Path(folder)
    found = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    partial = {_SAMPLES + _PARTIAL, _INDEX + _PARTIAL}
    return bool(found & partial) and found <= partial | {_SAMPLES}


def _save(folder: str | os.PathLike[str], sample_rate: int, recordings: Iterable[tuple[str, str, np.ndarray]]) -> None:
    path = Path(folder)
    is_new = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    samples, index = path / _SAMPLES, path / _INDEX
    partial_samples, partial_index = path / (_SAMPLES + _PARTIAL), path / (_INDEX + _PARTIAL)
    try:
        with open(partial_samples, "wb") as file:
            _write_header(file, 0)
            written = _write(file, recordings)
            file.seek(0)
            _write_header(file, sum(written.sizes))
        description = {
            "version": _VERSION,
            "sample_rate": sample_rate,
            "sizes": written.sizes,
            "names": written.names,
            "categories": written.categories,
            "samples_sha256": written.digest,
        }
        partial_index.write_text(json.dumps(description) + "\n", encoding="utf-8")
        # Without its index the folder is no bank: it goes first and comes last.
        index.unlink(missing_ok=True)
        os.replace(partial_samples, samples)
        os.replace(partial_index, index)
    except BaseException:
        partial_samples.unlink(missing_ok=True)
        partial_index.unlink(missing_ok=True)
        if is_new:
            with contextlib.suppress(OSError):  # something else has come into it
                path.rmdir()
        raise


def _write_header(file: BinaryIO, samples: int) -> None:
    """Header of an array; NumPy fills it up to 128 bytes, however many digits the number of samples has."""
    np.lib.format.write_array_header_1_0(file, {"descr": "<i2", "fortran_order": False, "shape": (samples,)})


def _write(file: BinaryIO, recordings: Iterable[tuple[str, str, np.ndarray]]) -> _Written:
    """Appends the samples of recordings, each with its name and category, as they come."""
    sizes, names, categories = [], [], []
    digest = hashlib.sha256()
    for name, category, samples in recordings:
        file.write(samples.data)
        digest.update(samples.data)
        sizes.append(len(samples))
        names.append(name)
        categories.append(category)
    return _Written(sizes, names, categories, digest.hexdigest())


def _recordings(
    folder: str | os.PathLike[str],
    sample_rate: int,
    warn: Callable[[str], None],
    progress: Callable[[int, int | None], None],
    rir: bool,
) -> Iterator[tuple[str, str, np.ndarray]]:
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder")
    paths = audio_files(root)
    own_name = os.path.basename(os.path.abspath(root))

    def read(path: Path) -> tuple[np.ndarray, int] | InputError:
        try:
            with open_audio(path) as audio:
                # The average of responses at several places would be the response at none.
                samples, rate = audio.read(0, audio.frames, channel=0 if rir else None), audio.sample_rate
        except InputError as error:
            return error
        samples = resample(samples, rate, sample_rate)
        return to_int16(_full_range(samples) if rir else samples), rate

    others = used = 0
    workers = default_workers()
    with ThreadPoolExecutor(workers) as pool:
        # No more ahead than there are workers: a file may last for minutes.
        found = in_order(pool, read, paths, ahead=workers)
        for done, (path, result) in enumerate(zip(paths, found, strict=True), start=1):
            progress(done, len(paths))
            if isinstance(result, InputError):
                warn(f"left out: {result}")
                continue
            samples, rate = result
            others += rate != sample_rate
            if not samples.any():
                warn(f"{path}: left out, it is silent")
                continue
            used += 1
            name = path.relative_to(root)
            inside = next(part for part in (*name.parts[:-1], own_name, "noise") if part in CATEGORIES)
            yield name.as_posix(), "rir" if rir else inside, samples
    if not used:
        raise InputError(f"{root}: no file in this folder can be used")
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
