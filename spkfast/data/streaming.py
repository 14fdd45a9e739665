"""Training crops from shards behind URLs, read in sequence: for data that cannot lie on a disk of this machine."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import PurePath
from typing import Any
from urllib.parse import unquote

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from spkfast.data.audio import AUDIO_SUFFIXES, open_audio, resample, to_int16
from spkfast.errors import InputError

_SCHEMES = ("http://", "https://", "pipe:")
_MOST_IN_A_ROW = 16

Sample = tuple[np.ndarray, str, str]


def stream(
    urls: str | Sequence[str],
    *,
    num_samples: int,
    sample_rate: int = 16000,
    shuffle: int = 1000,
    passes: int | None = None,
    first_pass: int = 0,
    seed: int = 0,
    rank: int | None = None,
    world_size: int | None = None,
    warn: Callable[[str], None] = lambda message: None,
) -> IterableDataset[Sample]:
    """Random crops of the utterances of shards as they come in, by the package ``webdataset``.

    Each pass visits the shards in another order, every shard in one worker of one process. A crop follows from seed,
    pass and id alone; the order also from rank and worker. Processes see different numbers of utterances, so training
    counts steps, not passes.

    Args:
        urls: ``http://``, ``https://`` or ``pipe:COMMAND`` (a shell command that writes the shard), one or many;
            ``{000000..000146}`` stands for a range. Shards are those of :func:`spkfast.data.shards.write_shards`, or
            others with ``<key>.<audio>`` and ``<key>.spk`` beside each other.
        num_samples: Samples of a crop. A shorter utterance repeats.
        sample_rate: Rate of the crops in Hz.
        shuffle: Crops that each worker holds to draw the next from.
        passes: Times through all shards; None never ends.
        first_pass: Pass to begin with.
        seed: Seed of everything random.
        rank: This process; None asks ``torch.distributed``.
        world_size: Processes; None asks ``torch.distributed``.
        warn: Called in the worker with a line about each utterance that cannot be read; it is passed over.

    Returns:
        A dataset of samples int16 of shape (num_samples,), speaker and id.

    Raises:
        InputError: If an argument is out of range, there are fewer shards than processes, or ``webdataset`` is not
            installed; while reading, if a shard cannot be read to its end, an utterance has no speaker, or 16 in a row
            cannot be read.
    """
    least = {"num_samples": (num_samples, 1), "shuffle": (shuffle, 1), "passes": (passes, 1), "seed": (seed, 0)}
    for name, (value, lowest) in least.items():
        if value is not None and value < lowest:
            raise InputError(f"{name} must be at least {lowest}, got {value}")
    if rank is None or world_size is None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank, world_size = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
    if not 0 <= rank < world_size:
        raise InputError(f"rank must be from 0 to {world_size - 1}, got {rank}")
    shards = _expand([urls] if isinstance(urls, str) else urls)
    for url in shards:
        if not url.startswith(_SCHEMES):
            raise InputError(f"{url}: expected {', '.join(_SCHEMES)}; shards on a disk are read by their index")
    if len(shards) < world_size:
        raise InputError(f"{len(shards)} shards are too few for {world_size} processes; write smaller ones")
    last_pass = None if passes is None else first_pass + passes
    return _Stream(shards, num_samples, sample_rate, shuffle, (first_pass, last_pass), seed, rank, world_size, warn)


class _Stream(IterableDataset[Sample]):
    def __init__(
        self,
        shards: list[str],
        num_samples: int,
        sample_rate: int,
        shuffle: int,
        passes: tuple[int, int | None],
        seed: int,
        rank: int,
        world_size: int,
        warn: Callable[[str], None],
    ) -> None:
        self._shards = shards
        self._num_samples, self._sample_rate = num_samples, sample_rate
        self._shuffle, self._passes, self._seed = shuffle, passes, seed
        self._rank, self._world_size = rank, world_size
        self._warn = warn

    def __iter__(self) -> Iterator[Sample]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        place, places = self._rank + worker * self._world_size, self._world_size * workers
        if place >= len(self._shards):  # more workers than shards: this one has nothing to do
            return
        rng = np.random.default_rng((self._seed, 1, place))
        yield from _shuffled(self._crops(place, places), self._shuffle, rng)

    def _crops(self, place: int, places: int) -> Iterator[Sample]:
        in_a_row = 0
        first, last = self._passes
        for number in itertools.count(first) if last is None else range(first, last):
            found = False
            order = np.random.default_rng((self._seed, 0, number)).permutation(len(self._shards))
            for sample in _samples([self._shards[k] for k in order[place::places]]):
                found = True
                name, speaker, data = _parts(sample)
                digest = blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest()
                rng = np.random.default_rng((self._seed, number, int.from_bytes(digest, "little")))
                try:
                    yield self._crop(data, rng), speaker, name
                    in_a_row = 0
                except InputError as error:
                    in_a_row += 1
                    message = f"{sample['__url__']}: {name}: {error}"
                    if in_a_row == _MOST_IN_A_ROW:
                        raise InputError(f"{in_a_row} utterances in a row could not be read: {message}") from error
                    self._warn(message)
            if not found:
                raise InputError(f"{self._shards[order[place]]}: no utterances in this shard")

    def _crop(self, data: bytes, rng: np.random.Generator) -> np.ndarray:
        with open_audio(io.BytesIO(data)) as audio:
            # One more than needed, so that rounding in the resampler never leaves a crop short.
            wanted = -(-self._num_samples * audio.sample_rate // self._sample_rate) + 1
            samples = audio.read(int(rng.integers(max(1, audio.frames - wanted + 1))), wanted)
        return np.resize(to_int16(resample(samples, audio.sample_rate, self._sample_rate)), self._num_samples)


def _expand(urls: Sequence[str]) -> list[str]:
    try:
        import webdataset  # noqa: F401  here rather than in a worker
        from braceexpand import braceexpand
    except ModuleNotFoundError as error:
        raise InputError(f"streaming needs the package {error.name}: pip install webdataset") from error
    return [url for pattern in urls for url in braceexpand(pattern)]


def _samples(urls: Iterable[str]) -> Iterator[dict[str, Any]]:
    from webdataset import gopen, tariterators

    for url in urls:
        try:
            source = gopen(url)
            yield from tariterators.group_by_keys(tariterators.tar_file_expander([{"url": url, "stream": source}]))
            # A shard that is cut between two members looks whole: only the program that reads it knows.
            while source.read(1 << 20):
                pass
            source.close()
        except Exception as error:
            raise InputError(f"{url}: the shard cannot be read to its end ({next(iter(error.args), error)})") from error


def _parts(sample: dict[str, Any]) -> tuple[str, str, bytes]:
    """Id, speaker and audio of a sample. Only the last suffix counts, as keys of other writers may hold dots."""
    name = unquote(sample["__key__"], errors="surrogateescape")
    by_suffix = {PurePath(f"x.{key}").suffix: value for key, value in sample.items() if not key.startswith("__")}
    audio = next((by_suffix[suffix] for suffix in AUDIO_SUFFIXES if suffix in by_suffix), None)
    if audio is None or ".spk" not in by_suffix:
        found = ", ".join(sorted(by_suffix)) or "nothing"
        raise InputError(f"{sample['__url__']}: {name} needs audio and .spk beside each other, has {found}")
    return name, by_suffix[".spk"].decode(errors="surrogateescape").strip(), audio


def _shuffled(items: Iterator[Sample], size: int, rng: np.random.Generator) -> Iterator[Sample]:
    """Items in another order, by a buffer of ``size`` of them."""
    held = list(itertools.islice(items, size))
    for item in items:
        place = int(rng.integers(size))
        held[place], item = item, held[place]
        yield item
    for place in rng.permutation(len(held)):
        yield held[place]
