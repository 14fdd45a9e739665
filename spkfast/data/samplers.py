"""Samplers: which utterances make up each batch of an epoch, as a function of seed and epoch alone."""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from torch.utils.data import Sampler as TorchSampler

from spkfast.data.corpus import Corpus
from spkfast.errors import InputError, check_name, check_options


@dataclasses.dataclass(frozen=True, slots=True)
class Draw:
    """One row of a batch: an utterance, and the epoch that it is drawn for."""

    index: int
    epoch: int


class Sampler(ABC):
    """Turns an epoch into batches of utterances; none comes twice in an epoch.

    What does not fill a batch at the end of an epoch is dropped rather than carried over: an epoch then follows from
    seed and number alone, and what is dropped differs from one to the next. Every epoch has at least one batch.

    Args:
        corpus: The utterances.
        batch_size: Rows of a batch, over all processes.
        seed: Seed of the order.

    Attributes:
        rows_together: Rows in a row that belong together, and that no division among processes may part.
        row_multiple: What the rows of every batch are a multiple of.

    Raises:
        InputError: If the corpus cannot fill one batch.
    """

    rows_together = 1

    def __init__(self, corpus: Corpus, batch_size: int, seed: int = 0) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        if seed < 0:
            raise InputError(f"seed must be at least 0, got {seed}")
        self._batch_size = self.row_multiple = batch_size
        self._seed = seed
        self._refuse_empty_epoch(corpus.name, len(corpus.labels))

    @abstractmethod
    def batches(self, epoch: int) -> np.ndarray | list[np.ndarray]:
        """Places in the corpus, int64, shape (num_batches, batch_size); a list where batches differ in rows."""

    def num_batches(self, epoch: int) -> int:
        """Batches of an epoch."""
        return len(self.batches(epoch))

    def _rng(self, epoch: int) -> np.random.Generator:
        return np.random.default_rng((self._seed, epoch))

    def _full_batches(self, rows: np.ndarray) -> np.ndarray:
        count = len(rows) // self._batch_size
        return rows[: count * self._batch_size].reshape(count, self._batch_size)

    def _refuse_empty_epoch(self, name: str, available: int) -> None:
        if available < self._batch_size:
            raise InputError(
                f"batch_size={self._batch_size} is more than the {available} utterances that {name} has for it"
            )


class RandomSampler(Sampler):
    """All utterances in random order."""

    def __init__(self, corpus: Corpus, batch_size: int, seed: int = 0) -> None:
        super().__init__(corpus, batch_size, seed)
        self._size = len(corpus.labels)

    def batches(self, epoch: int) -> np.ndarray:
        return self._full_batches(self._rng(epoch).permutation(self._size))

    def num_batches(self, epoch: int) -> int:
        return self._size // self._batch_size


class BalancedSampler(Sampler):
    """Every speaker once an epoch, by one utterance drawn, so that speakers with many do not dominate.

    Where there are fewer speakers than rows, each comes as often as it takes to fill one batch, or as often as it has
    utterances.
    """

    def __init__(self, corpus: Corpus, batch_size: int, seed: int = 0) -> None:
        super().__init__(corpus, batch_size, seed)
        self._by_speaker = np.argsort(corpus.labels, kind="stable")
        self._counts = np.bincount(corpus.labels)
        self._first = np.cumsum(self._counts) - self._counts
        self._most = _most_of_one(self._counts, batch_size)

    def batches(self, epoch: int) -> np.ndarray:
        rng = self._rng(epoch)
        times = np.arange(self._most)
        # Neighbours from a place drawn: different ones, in time that does not grow with the corpus.
        chosen = (rng.integers(self._counts)[:, None] + times) % self._counts[:, None]
        places = (self._first[:, None] + chosen)[times < self._counts[:, None]]
        return self._full_batches(self._by_speaker[rng.permutation(places)])

    def num_batches(self, epoch: int) -> int:
        return int(np.minimum(self._counts, self._most).sum()) // self._batch_size


class GroupSampler(Sampler):
    """Groups of utterances of one speaker, and every speaker at most once in a batch.

    An epoch cuts the utterances of each speaker, in random order, into groups, and walks through all groups in random
    order. A group whose speaker is already in the batch being filled is dropped for the epoch. Where there are fewer
    speakers than groups in a batch, a speaker enters it as often as it takes to fill it.

    Groups of one utterance are the category-balanced sampler of ESPnet; larger ones are for losses that compare the
    utterances of a speaker, as in voxceleb_trainer of Clova.

    Args:
        corpus: The utterances.
        batch_size: Rows of a batch, over all processes: a multiple of ``utterances_per_speaker``.
        seed: Seed of the order.
        utterances_per_speaker: Utterances of a group, which are neighbours in the batch.
        max_per_speaker: Most utterances of a speaker in an epoch; None sets no limit.

    Raises:
        InputError: If the corpus cannot fill one batch.
    """

    def __init__(
        self,
        corpus: Corpus,
        batch_size: int,
        seed: int = 0,
        *,
        utterances_per_speaker: int = 2,
        max_per_speaker: int | None = None,
    ) -> None:
        super().__init__(corpus, batch_size, seed)
        self.rows_together = size = utterances_per_speaker
        if size < 1 or batch_size % size:
            raise InputError(f"utterances_per_speaker={size} does not divide batch_size={batch_size}")
        if max_per_speaker is not None and max_per_speaker < size:
            raise InputError(f"max_per_speaker={max_per_speaker} is less than utterances_per_speaker={size}")
        self._labels = corpus.labels
        counts = np.bincount(corpus.labels)
        self._first = np.cumsum(counts) - counts
        kept = counts if max_per_speaker is None else np.minimum(counts, max_per_speaker)
        self._kept = kept // size * size
        self._refuse_empty_epoch(f"{corpus.name} (groups of {size})", int(self._kept.sum()))
        self._most = _most_of_one(self._kept // size, batch_size // size)

    def batches(self, epoch: int) -> np.ndarray:
        rng = self._rng(epoch)
        order = rng.permutation(len(self._labels))
        order = order[np.argsort(self._labels[order], kind="stable")]
        speakers = self._labels[order]
        order = order[np.arange(len(order)) - self._first[speakers] < self._kept[speakers]]
        groups = rng.permutation(order.reshape(-1, self.rows_together))
        in_batch = self._batch_size // self.rows_together
        chosen = _walk(self._labels[groups[:, 0]].tolist(), in_batch, self._most)
        return self._full_batches(groups[chosen].reshape(-1))


class LengthSampler(Sampler):
    """Utterances of similar length together: little padding where whole utterances or long crops are read.

    Utterances stand in random order within buckets of similar length; batches follow one another in random order.

    Args:
        corpus: The utterances, with their seconds.
        batch_size: Most rows of a batch, over all processes.
        seed: Seed of the order.
        batch_seconds: Most seconds of a batch, rows times the longest; None makes every batch of ``batch_size`` rows.
        row_multiple: What the rows of a batch by seconds are a multiple of, so that they can be shared out among
            processes, and among the parts of a step.
        num_buckets: Buckets, with as many utterances each.

    Raises:
        InputError: If lengths are not known, or the longest utterances do not fit ``batch_seconds``.
    """

    def __init__(
        self,
        corpus: Corpus,
        batch_size: int,
        seed: int = 0,
        *,
        batch_seconds: float | None = None,
        row_multiple: int = 1,
        num_buckets: int = 100,
    ) -> None:
        super().__init__(corpus, batch_size, seed)
        seconds = self._seconds = corpus.seconds
        unknown = int(np.isnan(seconds).sum())
        if unknown:
            raise InputError(
                f"{corpus.name}: does not say how long {unknown} utterances are, which length buckets need: "
                "add utt2dur or a column 'seconds', or make shards of it"
            )
        if batch_seconds is not None and not 0 < batch_seconds < np.inf:
            raise InputError(f"batch_seconds must be positive, got {batch_seconds}")
        if num_buckets < 1:
            raise InputError(f"num_buckets must be at least 1, got {num_buckets}")
        if batch_seconds is None:
            row_multiple = batch_size
        if not 1 <= row_multiple <= batch_size:
            raise InputError(f"row_multiple must be 1 to batch_size={batch_size}, got {row_multiple}")
        self._limit = np.inf if batch_seconds is None else batch_seconds
        if row_multiple * seconds.max() > self._limit:
            raise InputError(
                f"batch_seconds={batch_seconds} does not hold {row_multiple} utterances of {seconds.max():g} s, "
                f"the longest of {corpus.name}"
            )
        self.row_multiple = row_multiple
        edges = np.quantile(seconds, np.arange(1, num_buckets) / num_buckets)
        self._bucket = np.searchsorted(edges, seconds)

    def batches(self, epoch: int) -> list[np.ndarray]:
        rng, together = self._rng(epoch), self.row_multiple
        order = rng.permutation(len(self._seconds))
        order = order[: len(order) // together * together]  # what is dropped is of any length
        order = order[np.argsort(self._bucket[order], kind="stable")].reshape(-1, together)
        ends, rows, longest = [], 0, 0.0
        for end, seconds in enumerate(self._seconds[order].max(axis=1).tolist()):
            longest = max(longest, seconds)
            if rows + together > self._batch_size or (rows + together) * longest > self._limit:
                ends.append(end)
                rows, longest = 0, seconds
            rows += together
        batches = [part.reshape(-1) for part in np.split(order, ends)]
        return [batches[k] for k in rng.permutation(len(batches))]


class StepSampler(TorchSampler[list[Draw]]):
    """The batches of a run, step by step through endless epochs; what a loader takes as ``batch_sampler``.

    Each process has its slice of every batch, so that together they see what one process alone would.

    Args:
        sampler: Makes the batches of an epoch.
        steps: Step to end before; None goes on without end.
        rank: This process.
        world_size: Processes.

    Raises:
        InputError: If a batch cannot be shared out evenly.
    """

    def __init__(self, sampler: Sampler, steps: int | None = None, *, rank: int = 0, world_size: int = 1) -> None:
        share = world_size * sampler.rows_together
        if sampler.row_multiple % share:
            raise InputError(
                f"batches of {sampler.row_multiple} rows cannot be shared out among {world_size} processes "
                f"in parts of {sampler.rows_together} rows; make them a multiple of {share}"
            )
        self._sampler = sampler
        self._steps = steps
        self._rank, self._world_size = rank, world_size
        self.load_state_dict({"step": 0})

    def __len__(self) -> int:
        """Steps still to come."""
        if self._steps is None:
            raise TypeError("a sampler without end has no length")
        return max(0, self._steps - self._step)

    def __iter__(self) -> Iterator[list[Draw]]:
        while self._steps is None or self._step < self._steps:
            epoch = self.state_dict()["epoch"]
            batches = self._sampler.batches(epoch)
            self._first_step[epoch + 1] = self._first_step[epoch] + len(batches)
            for batch in batches[self._step - self._first_step[epoch] :]:
                if self._step == self._steps:
                    return
                share = len(batch) // self._world_size
                self._step += 1
                yield [Draw(k, epoch) for k in batch[self._rank * share : (self._rank + 1) * share].tolist()]

    def state_dict(self, step: int | None = None) -> dict[str, int]:
        """Where the batch of a step stands: ``step``, ``epoch`` and ``batch`` in the epoch.

        Args:
            step: Steps done. None: those handed out, which are more where a loader reads ahead.
        """
        step = self._step if step is None else step
        begun = [epoch for epoch, first in self._first_step.items() if first <= step]
        if not begun or step > self._step:
            raise InputError(f"step {step} has not been handed out since the start or the last load_state_dict")
        epoch = max(begun)
        return {"step": step, "epoch": epoch, "batch": step - self._first_step[epoch]}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go to the batch of a state, or, from its ``step`` alone, to where a run through would be.

        Raises:
            InputError: If there is no such batch.
        """
        step = state["step"]
        if "epoch" in state:
            self._first_step = {state["epoch"]: step - state["batch"]}
            known = self._sampler.num_batches(state["epoch"])
            if not 0 <= state["batch"] <= known:
                raise InputError(
                    f"epoch {state['epoch']} has {known} batches; batch {state['batch']} is of another corpus"
                )
        else:
            epoch = first = 0
            while (after := first + self._sampler.num_batches(epoch)) <= step:
                epoch, first = epoch + 1, after
            self._first_step = {epoch: first}
        self._step = step


# What a configuration calls each sampler, and the options that it takes.
_SAMPLERS: dict[str, tuple[Callable[..., Sampler], list[str]]] = {
    "random": (RandomSampler, []),
    "balanced": (BalancedSampler, []),
    "category_balanced": (functools.partial(GroupSampler, utterances_per_speaker=1), []),
    "n_per_speaker": (GroupSampler, ["utterances_per_speaker", "max_per_speaker"]),
    "length_buckets": (LengthSampler, ["batch_seconds", "row_multiple", "num_buckets"]),
}


def names() -> list[str]:
    """What :func:`create` knows."""
    return list(_SAMPLERS)


def create(name: str, corpus: Corpus, *, batch_size: int, seed: int = 0, **options: Any) -> Sampler:
    """A sampler by name: random, balanced, category_balanced, n_per_speaker or length_buckets.

    Args:
        name: Which one.
        corpus: The utterances.
        batch_size: Rows of a batch, over all processes.
        seed: Seed of the order.
        options: Further arguments of the sampler.

    Raises:
        InputError: If the name or an option is not known, or the sampler refuses the corpus.
    """
    check_name("sampler", name, names())
    make, known = _SAMPLERS[name]
    check_options("sampler", name, options, known)
    return make(corpus, batch_size, seed, **options)


def _most_of_one(counts: np.ndarray, rows: int) -> int:
    """How often one speaker may enter a batch: once, or as often as it takes to fill it where speakers are few."""
    most = 1
    while np.minimum(counts, most).sum() < rows:
        most += 1
    return most


def _walk(speakers: list[int], in_batch: int, most: int) -> list[int]:
    """Places that enter the batches, in order; of a speaker ``most`` times in the batch, what comes is passed over."""
    chosen: list[int] = []
    times: dict[int, int] = {}
    for place, speaker in enumerate(speakers):
        so_far = times.get(speaker, 0)
        if so_far < most:
            times[speaker] = so_far + 1
            chosen.append(place)
            if len(chosen) % in_batch == 0:
                times = {}
    return chosen
