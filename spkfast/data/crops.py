"""Training crops: which utterances make up each step, and how a crop of one is read."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset, Sampler

from spkfast.data.audio import read_random_part, resample
from spkfast.data.augment import Augment, change_speed
from spkfast.data.lists import Utterance
from spkfast.errors import InputError

_MOST_ATTEMPTS = 16


@dataclasses.dataclass(frozen=True)
class Draw:
    """One row of a training step: an utterance, and the seed of everything random about its crop."""

    index: int
    seed: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Crop:
    """A training example, the seed of its dither, and the errors of files that had to be passed over to get it."""

    samples: np.ndarray
    label: int
    seed: int = 0
    errors: tuple[str, ...] = ()


class CropDataset(Dataset[Crop]):
    """Random crops of one length, read by partial decode; everything random about a crop follows from its seed.

    Speed change makes new speakers: the label of speaker ``k`` at speed ``i`` is ``k + i * num_speakers``.

    Args:
        utterances: The training list.
        root: Folder that its paths start from.
        sample_rate: Rate of the crops in Hz.
        crop_seconds: Length of a crop. A shorter utterance repeats.
        speeds: Speed factors, drawn uniformly; the first is usually 1.
        augment: Applied last, or None.
    """

    def __init__(
        self,
        utterances: Sequence[Utterance],
        root: str | os.PathLike[str],
        *,
        sample_rate: int = 16000,
        crop_seconds: float = 2.0,
        speeds: Sequence[float] = (1.0,),
        augment: Augment | None = None,
    ) -> None:
        self._utterances = utterances
        self._root = Path(root)
        self._rate = sample_rate
        self._samples = round(crop_seconds * sample_rate)
        self._speeds = tuple(speeds)
        self._augment = augment
        self.speakers = sorted({utterance.speaker for utterance in utterances})
        self._label = {speaker: k for k, speaker in enumerate(self.speakers)}

    @property
    def num_classes(self) -> int:
        """Speakers times speeds."""
        return len(self.speakers) * len(self._speeds)

    @property
    def labels(self) -> list[int]:
        """Speaker index of each utterance, speeds aside."""
        return [self._label[utterance.speaker] for utterance in self._utterances]

    @property
    def fingerprint(self) -> str:
        """Hex digest of the list and of the names of noises and room responses: what a resumed run must find again."""
        rows = [(utterance.speaker, utterance.path) for utterance in self._utterances]
        names = self._augment.names if self._augment else []
        return hashlib.sha256(json.dumps([rows, names]).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._utterances)

    def __getitem__(self, draw: Draw) -> Crop:
        """The crop that a draw stands for; where a file cannot be read, another one is drawn.

        Where many in a row cannot be read, the crop is empty and its label -1: an exception would reach the training
        process as the traceback of a worker.
        """
        errors: list[str] = []
        for attempt in range(_MOST_ATTEMPTS):
            # A fresh stream for each attempt: the same one would meet the same bad noise file again. StepSampler has 1.
            rng = np.random.default_rng((*draw.seed, 1 + attempt) if attempt else draw.seed)
            index = int(rng.integers(len(self))) if attempt else draw.index
            try:
                samples, label = self._crop(self._utterances[index], rng)
                return Crop(samples, label, int(rng.integers(2**63)), tuple(errors))
            except InputError as error:
                errors.append(str(error))
        message = f"{len(errors)} files in a row could not be read, the first: {errors[0]}"
        return Crop(np.zeros(self._samples, dtype=np.float32), -1, errors=(message,))

    def _crop(self, utterance: Utterance, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        which = int(rng.integers(len(self._speeds)))
        speed = self._speeds[which]

        def num_samples(rate: int) -> int:
            # One more than needed, so that rounding in the resamplers never leaves a crop short.
            return int(np.ceil(self._samples * speed * rate / self._rate)) + 1

        samples, rate = read_random_part(self._root / utterance.path, num_samples, rng)
        samples = resample(samples, rate, self._rate)
        if speed != 1:
            samples = change_speed(samples, speed)
        samples = np.resize(samples, self._samples)  # a short utterance repeats
        if self._augment is not None:
            samples = self._augment(samples, rng)
        return samples, self._label[utterance.speaker] + which * len(self.speakers)


class StepSampler(Sampler[list[Draw]]):
    """The draws of each training step, a function of seed, step and rank alone, so that a resumed run repeats none.

    Args:
        labels: Speaker index of each utterance.
        batch_size: Rows per step and process.
        first_step: Step to start from.
        last_step: Step to end before.
        seed: Seed of the run.
        rank: This process.
        world_size: Processes.
        balanced: Draw speakers uniformly rather than utterances, so that speakers with many do not dominate.
    """

    def __init__(
        self,
        labels: Sequence[int],
        batch_size: int,
        first_step: int,
        last_step: int,
        seed: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        balanced: bool = False,
    ) -> None:
        self._batch_size = batch_size
        self._steps = range(first_step, last_step)
        self._seed = seed
        self._rank, self._world_size = rank, world_size
        order = np.argsort(np.asarray(labels), kind="stable")
        self._groups = np.split(order, np.cumsum(np.bincount(labels))[:-1]) if balanced else []
        self._size = len(self._groups) if balanced else len(labels)
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[list[Draw]]:
        for step in self._steps:
            first = (step * self._world_size + self._rank) * self._batch_size
            yield [self._draw(first + row) for row in range(self._batch_size)]

    def _draw(self, position: int) -> Draw:
        epoch, offset = divmod(position, self._size)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, np.random.default_rng((self._seed, epoch)).permutation(self._size))
        index = int(self._epoch[1][offset])
        seed = (self._seed, position)
        if self._groups:
            group = self._groups[index]
            index = int(group[np.random.default_rng((*seed, 1)).integers(len(group))])
        return Draw(index, seed)
