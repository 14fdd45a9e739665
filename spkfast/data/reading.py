"""Training crops as worker processes read them: 16-bit samples, and whatever the device needs to do the rest."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import struct
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from spkfast.data.audio import open_audio, resample, to_int16
from spkfast.data.corpus import Corpus, Entry
from spkfast.data.recipes import check_speeds
from spkfast.data.samplers import Draw, StepSampler
from spkfast.data.shards import source_of
from spkfast.errors import InputError
from spkfast.reference.change_speed import half_width, source_samples

_MOST_ATTEMPTS = 16
# As many of them look for another utterance of the same speaker, which keeps the batch's balance of speakers.
_ATTEMPTS_OF_SPEAKER = 4
# Samples, of the lower rate, that the resampler looks to each side: with 160 more ones change nothing but rounding.
_RESAMPLER_REACH = 256
# Manifests round: a segment may end this much after its audio and is then shorter, as Kaldi has it.
_OVERSHOOT_SECONDS = 0.5


@dataclasses.dataclass(frozen=True, slots=True)
class Unreadable:
    """An utterance that could not be read, by its place in the corpus, and why."""

    index: int
    message: str


class Crop(NamedTuple):
    """A training example before augmentation.

    Attributes:
        samples: int16, shape (W,): context, the crop, context; zeros where the utterance has nothing.
        length: Samples of the utterance from the end of the first context on.
        speed: Place in the speeds.
        label: Speaker and speed; -1 where no utterance could be read.
        key: Seed of everything random about the crop that is still to come.
        errors: Utterances that had to be passed over to get it.
        note: What the training process should know of its file, or an empty string.
    """

    samples: np.ndarray
    length: int
    speed: int
    label: int
    key: int
    errors: tuple[Unreadable, ...] = ()
    note: str = ""


class Batch(NamedTuple):
    """Crops of a step, as :class:`Crop` has them: samples int16 (B, W), four int64 (B,), and what went wrong."""

    crops: Tensor
    lengths: Tensor
    speeds: Tensor
    labels: Tensor
    keys: Tensor
    errors: list[Unreadable]
    notes: list[str]


class CropDataset(Dataset[Crop]):
    """Random crops of one length, decoded alone, with the neighbours that a change of speed looks at.

    Everything random about a crop follows from the seed, the epoch and the id of its utterance: it is the same in every
    worker, process and batch. Speed change makes new speakers: the label of speaker ``k`` at speed ``i`` is
    ``k + i * num_speakers``. Output ``n`` of speed ``s`` stands at sample ``context + n s`` of the crop.

    An utterance that cannot be read is replaced by another one, of the same speaker where one can be.

    Args:
        corpus: The utterances.
        num_samples: Samples of a crop after the change of speed.
        sample_rate: Rate of the crops in Hz; audio of other rates is resampled.
        speeds: Speed factors, drawn uniformly.
        seed: Seed of the run.

    Attributes:
        context: Samples in front of the crop and behind it.
        width: Samples of every crop, context included.

    Raises:
        InputError: If the settings make no sense.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        num_samples: int,
        sample_rate: int = 16000,
        speeds: Sequence[float] = (1.0,),
        seed: int = 0,
    ) -> None:
        if not isinstance(num_samples, int) or num_samples < 1:
            raise InputError(f"num_samples must be at least 1, got {num_samples}")
        if sample_rate < 1:
            raise InputError(f"sample_rate must be at least 1 Hz, got {sample_rate}")
        check_speeds(speeds)
        self._corpus = corpus
        self._rate = sample_rate
        self._seed = seed
        self._halves = [half_width(speed) for speed in speeds]
        self._needed = [source_samples(num_samples, speed) for speed in speeds]
        self.context = max(self._halves)
        self.width = self.context + max(self._needed) + self.context
        self._by_speaker = np.argsort(corpus.labels, kind="stable")
        self._ends = np.cumsum(np.bincount(corpus.labels))

    @property
    def num_classes(self) -> int:
        """Speakers times speeds."""
        return len(self._ends) * len(self._halves)

    def __len__(self) -> int:
        return len(self._corpus)

    def __getitem__(self, draw: Draw) -> Crop:
        """The crop that a draw stands for.

        Where many utterances in a row cannot be read, its label is -1: an exception would reach the training process as
        the traceback of a worker.
        """
        if not isinstance(draw, Draw):
            raise InputError(f"crops are drawn by epoch and utterance: read them by reading.Loader, got {draw!r}")
        key = crop_key(self._seed, draw.epoch, self._corpus.ids[draw.index])
        index = draw.index
        errors: list[Unreadable] = []
        for attempt in range(_MOST_ATTEMPTS):
            # Of 64 random bits, the share below one is as good as uniform: numpy's generators take longer to set up
            # than all else here.
            instead, speed, cut = struct.unpack("<3Q", _digest(struct.pack("<qq", key, attempt), 24))
            if attempt:
                index = self._another(draw.index, attempt, instead)
            try:
                samples, length, note = self._read(self._corpus[index], which := speed * len(self._halves) >> 64, cut)
            except InputError as error:
                errors.append(Unreadable(index, str(error)))
                continue
            label = int(self._corpus.labels[index]) + which * len(self._ends)
            return Crop(samples, length, which, label, key, tuple(errors), note)
        return Crop(np.zeros(self.width, dtype=np.int16), 0, 0, -1, key, tuple(errors))

    def _another(self, index: int, attempt: int, bits: int) -> int:
        first, end = 0, len(self._corpus)
        if attempt <= _ATTEMPTS_OF_SPEAKER:
            speaker = self._corpus.labels[index]
            first, end = int(self._ends[speaker - 1]) if speaker else 0, int(self._ends[speaker])
        return int(self._by_speaker[first + (bits * (end - first) >> 64)])

    def _read(self, entry: Entry, which: int, cut: int) -> tuple[np.ndarray, int, str]:
        """Samples (W,), how many of the utterance there are from the first context on, and a note."""
        needed, half = self._needed[which], self._halves[which]
        with open_audio(source_of(entry)) as audio:
            begin, count = segment(entry, audio.frames, audio.sample_rate)
            total = count * self._rate // audio.sample_rate
            if total < 1:
                raise InputError(f"{entry.path}: utterance {entry.id!r} holds no samples")
            first = cut * max(1, total - needed + 1) >> 64
            low, high = max(0, first - half), min(total, first + needed + half)
            note = ""
            if audio.sample_rate == self._rate:
                part = audio.read_int16(begin + low, high - low)
            else:
                # Of the file, whole periods of the two rates from the utterance's begin on, so that the samples are
                # those of the resampled utterance.
                divisor = math.gcd(audio.sample_rate, self._rate)
                period_in, period_out = audio.sample_rate // divisor, self._rate // divisor
                reach = _RESAMPLER_REACH * max(1, -(-audio.sample_rate // self._rate))
                periods = max(0, low * period_in // period_out - reach) // period_in
                start, end = periods * period_in, min(count, high * period_in // period_out + 1 + reach)
                wide = to_int16(resample(audio.read(begin + start, end - start), audio.sample_rate, self._rate))
                part = wide[low - periods * period_out : high - periods * period_out]
                note = f"{entry.path}: {audio.sample_rate} Hz, resampled to {self._rate} Hz for every crop of it"
        samples = np.zeros(self.width, dtype=np.int16)
        offset = self.context - (first - low)
        samples[offset : offset + len(part)] = part
        return samples, high - first, note


class BadUtterances:
    """A training process's account of what its workers could not read.

    Args:
        num_utterances: Utterances of the corpus.
        share: Share of them that may be unreadable, in each process.
        least: As many may be in any case.
        warn: Takes a line for each, and one where audio is resampled.

    Attributes:
        messages: Why each of them could not be read, by its place in the corpus.
    """

    def __init__(
        self,
        num_utterances: int,
        *,
        share: float = 0.01,
        least: int = 10,
        warn: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.messages: dict[int, str] = {}
        self._most = max(least, int(share * num_utterances))
        self._num_utterances = num_utterances
        self._warn = warn
        self._noted = False

    def add(self, batch: Batch) -> None:
        """Take what came with a batch.

        Raises:
            InputError: If too many different utterances could not be read, or all tried in place of one.
        """
        if batch.notes and not self._noted:
            self._noted = True
            self._warn(batch.notes[0])
        new = {error.index: error.message for error in batch.errors if error.index not in self.messages}
        self.messages |= new
        none_left = bool((batch.labels < 0).any())
        if none_left or len(self.messages) > self._most:
            reason = f"{_MOST_ATTEMPTS} in a row" if none_left else f"more than {self._most}"
            raise InputError(
                f"{len(self.messages)} of {self._num_utterances} utterances could not be read, {reason}; the first: "
                + "; ".join(list(self.messages.values())[:3])
            )
        for message in new.values():
            self._warn(f"skipped: {message}")


def crop_key(seed: int, epoch: int, utterance: str) -> int:
    """Seed of everything random about an utterance in an epoch, int64: 64 bits of BLAKE2b."""
    name = f"{seed} {epoch} {utterance}".encode(errors="surrogateescape")
    return int.from_bytes(_digest(name, 8), "little", signed=True)


def collate(crops: Sequence[Crop]) -> Batch:
    """The batch of some crops; a worker writes it to shared memory without a further copy."""
    return Batch(
        default_collate([torch.from_numpy(crop.samples) for crop in crops]),
        torch.tensor([crop.length for crop in crops]),
        torch.tensor([crop.speed for crop in crops]),
        torch.tensor([crop.label for crop in crops]),
        torch.tensor([crop.key for crop in crops]),
        [error for crop in crops for error in crop.errors],
        [crop.note for crop in crops if crop.note],
    )


class Loader(Iterable[Batch]):
    """Batches of a sampler's steps, in page-locked memory where there is a GPU.

    Args:
        dataset: Reads the crops.
        sampler: Says which.
        workers: Processes that read; 0 reads in this one.
        prefetch: Batches that each reads ahead.
        account: Takes what cannot be read, and ends the run where it is too much; None warns and has its own limits.
    """

    def __init__(
        self,
        dataset: CropDataset,
        sampler: StepSampler,
        workers: int,
        *,
        prefetch: int = 4,
        account: BadUtterances | None = None,
    ) -> None:
        self.account = account or BadUtterances(len(dataset), warn=_warn)
        self._loader: DataLoader[Crop] = DataLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=workers,
            collate_fn=collate,
            worker_init_fn=_single_thread,
            prefetch_factor=prefetch if workers else None,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # not the one of the network, which a resumed run must find as it was
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        """The batches.

        Raises:
            InputError: If too many utterances cannot be read.
        """
        for batch in self._loader:
            self.account.add(batch)
            yield batch


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def segment(entry: Entry, frames: int, sample_rate: int) -> tuple[int, int]:
    """First sample of an utterance in its audio, and how many it has."""
    seconds, end = frames / sample_rate, entry.start + entry.seconds
    if not 0 <= entry.start < seconds:
        raise InputError(f"{entry.path}: utterance {entry.id!r} begins at {entry.start:g} s of {seconds:g} s of audio")
    if end > seconds + _OVERSHOOT_SECONDS:
        raise InputError(f"{entry.path}: utterance {entry.id!r} ends at {end:g} s of {seconds:g} s of audio")
    begin = round(entry.start * sample_rate)
    return begin, (frames if math.isnan(end) else min(frames, round(end * sample_rate))) - begin


def _digest(message: bytes, size: int) -> bytes:
    return hashlib.blake2b(message, digest_size=size).digest()


def _single_thread(worker: int) -> None:
    torch.set_num_threads(1)
