"""Error rates during training: on trial lists, and on speakers that are held out of the training data."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spkfast.data.audio import open_audio
from spkfast.data.corpus import Corpus, Entry
from spkfast.data.lists import Trial, read_trials, speaker_of, trial_paths
from spkfast.data.reading import segment
from spkfast.data.shards import source_of
from spkfast.data.threads import default_workers, in_order
from spkfast.data.trials import draw_trials
from spkfast.errors import InputError
from spkfast.evaluation import evaluate_trials
from spkfast.inference import SpeakerEncoder
from spkfast.training.config import ValidationConfig

# Name of the list of trials among speakers held out.
HELD_OUT = "held_out"
# What a thread reads at once. Utterances of a window are of like length; several batches of them fill one.
_WINDOW_SECONDS = 240.0


class ListResult(NamedTuple):
    """Figures of a trial list.

    Attributes:
        eer_percent: Equal error rate.
        eer_low_percent: Lower end of its 95 % interval over speakers, None where the list does not tell enough of them.
        eer_high_percent: Upper end.
        min_dcf: Detection cost at a target prior of 0.01.
        threshold: Score at the equal error rate.
        num_trials: Trials of the list.
    """

    eer_percent: float
    eer_low_percent: float | None
    eer_high_percent: float | None
    min_dcf: float
    threshold: float
    num_trials: int


def mean_eer(results: Mapping[str, ListResult]) -> float:
    """Mean equal error rate in percent over at least one list, in whatever order they are."""
    return math.fsum(result.eer_percent for result in results.values()) / len(results)


class Validation:
    """Trial lists of a training run. That every utterance can be read is seen before training begins.

    Trials among speakers held out are drawn by :func:`spkfast.data.trials.draw_trials`.

    Args:
        config: Which lists, and where their audio is.
        held: Utterances of the speakers held out; None for none.
        sample_rate: Rate of the front-end in Hz.
        seed: Seed of the trials among speakers held out.
        rank: Number of this process; the first one alone warns, as all find the same.
        warn: Called with a line for what is doubtful.
        frame_length: Samples of a frame of the front-end; a shorter utterance is refused.

    Attributes:
        names: The lists: their files without folder and suffix, and ``held_out``.
        fingerprint: Hex digest of the trials, and of names and lengths of the audio, wherever it lies.

    Raises:
        InputError: If a list or an utterance cannot be read, two lists have one name, or a list lacks targets or
            non-targets.
    """

    def __init__(
        self,
        config: ValidationConfig,
        held: Corpus | None,
        *,
        sample_rate: int,
        seed: int,
        rank: int = 0,
        warn: Callable[[str], None] = lambda message: None,
        frame_length: int = 1,
    ) -> None:
        self._warn = warn if rank == 0 else lambda message: None
        self._sample_rate, self._frame_length = sample_rate, frame_length
        self._lists: dict[str, _List] = {}
        self._place: dict[tuple[Any, ...], int] = {}
        self._utterances: list[Entry] = []
        self._sizes: list[_Size] = []
        digests = []
        for file in config.trials:
            trials = read_trials(file)
            folder = os.path.dirname(file) if config.root is None else config.root
            entries = {key: Entry(speaker_of(key), key, os.path.join(folder, key)) for key in trial_paths(trials)}
            digests.append(self._add(Path(file).stem, file, trials, entries))
        if held is not None:
            drawn, entries = _trials_among(held, seed)
            digests.append(self._add(HELD_OUT, held.name, drawn, entries))
        self.fingerprint = hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()[:16]
        self.names = list(self._lists)
        self._tell_of_rates()
        # Alike ones together, so that little of a batch is padding.
        self._order = np.argsort([size.seconds for size in self._sizes], kind="stable")

    def check_disjoint(self, speakers: Iterable[str], told: str = "are trained on") -> None:
        """Warns where speakers of a list are trained on, as those of VoxCeleb1-E and -H may be by design.

        Args:
            speakers: Those of the training data, or of what the network was trained on before.
            told: What happens or happened to them.
        """
        known = set(speakers)
        for name, one in self._lists.items():
            both = sorted(one.speakers & known)
            if both:
                self._warn(
                    f"{name}: {len(both)} of the {len(one.speakers)} speakers of its trials {told}, the first is "
                    f"{both[0]!r}; error rates of known speakers are lower than those of others"
                )

    def run(
        self,
        encoder: SpeakerEncoder,
        *,
        rank: int = 0,
        world_size: int = 1,
        gather: Callable[[list[Any]], list[list[Any]]] | None = None,
    ) -> dict[str, ListResult]:
        """Error rates of a network; what goes for :meth:`SpeakerEncoder.embed_batch` goes for its mode and gradients.

        Each utterance is embedded once, as a whole, whatever number of trials and lists name it. Another number of
        processes makes other batches, and so changes embeddings by rounding.

        Args:
            encoder: The network.
            rank: Number of this process.
            world_size: How many processes take part; all of them call this.
            gather: Gives the lists of all processes, in order of rank, for that of this one; needed where there are
                several.

        Returns:
            Figures by name of the list; the same in all processes.

        Raises:
            InputError: If an utterance cannot be read any more, or has no finite embedding: in all processes.
        """
        mine: list[Any]
        try:
            mine = self._embed(encoder, self._order[rank::world_size])
        except InputError as error:  # told to all, which would wait for this one otherwise
            mine = [error]
        parts = [mine] if gather is None else gather(mine)
        rows = [row for part in parts for row in part]
        for row in rows:
            if isinstance(row, InputError):
                raise row
        embeddings = np.empty((len(rows), len(rows[0])), dtype=np.float32) if rows else np.empty((0, 0))
        embeddings[np.concatenate([self._order[part::world_size] for part in range(world_size)])] = rows
        return {name: _figures(one, embeddings) for name, one in self._lists.items()}

    def _add(self, name: str, source: str, trials: Sequence[Trial], entries: Mapping[str, Entry]) -> str:
        """Takes a list whose audio the entries tell, by path of the trials; gives a digest of both."""
        if name in self._lists:
            raise InputError(f"validation.trials: {source}: another list is called {name!r} too; rename the file")
        targets = sum(trial.target for trial in trials)
        if targets in (0, len(trials)):
            raise InputError(f"{source}: {targets} of {len(trials)} trials are targets; an error rate needs both kinds")
        keys = trial_paths(trials)
        new = {}
        for key in keys:
            identity = _identity(entries[key])
            if identity not in self._place:
                self._place[identity] = len(self._place)
                new[identity] = entries[key]
        self._utterances += new.values()
        try:
            self._sizes += self._measured(new.values())
        except InputError as error:
            raise InputError(f"{source}: names an utterance that cannot be used: {error}") from error
        rows = np.array([self._place[_identity(entries[key])] for key in keys])
        self._lists[name] = _List(trials, keys, rows, {entries[key].speaker for key in keys})
        digest = hashlib.sha256(name.encode())
        for trial in trials:
            digest.update(f"{trial.target}\0{trial.enrol}\0{trial.test}\n".encode(errors="surrogateescape"))
        for key, row in zip(keys, rows, strict=True):
            entry, size = entries[key], self._sizes[row]
            digest.update(f"{entry.speaker}\0{entry.id}\0{entry.start!r}\0{size}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def _measured(self, entries: Iterable[Entry]) -> list[_Size]:
        workers = default_workers()
        with ThreadPoolExecutor(workers) as pool:
            sizes = list(in_order(pool, _size, entries, ahead=4 * workers))
        for entry, size in zip(entries, sizes, strict=True):
            if size.samples * self._sample_rate < self._frame_length * size.rate:
                raise InputError(f"{_name(entry)}: too short: {size.samples} samples at {size.rate} Hz")
        return sizes

    def _tell_of_rates(self) -> None:
        others = [k for k, size in enumerate(self._sizes) if size.rate != self._sample_rate]
        if others:
            self._warn(
                f"{len(others)} of {len(self._sizes)} utterances of the trials, the first is "
                f"{_name(self._utterances[others[0]])} with {self._sizes[others[0]].rate} Hz, are resampled to "
                f"{self._sample_rate} Hz in every validation"
            )

    def _embed(self, encoder: SpeakerEncoder, share: np.ndarray) -> list[np.ndarray]:
        """Embedding (E,) of each utterance of a share, in its order."""

        def read(window: np.ndarray) -> list[np.ndarray]:
            return [_samples(self._utterances[place], encoder) for place in window]

        seconds = np.cumsum([self._sizes[place].seconds for place in share])
        windows = np.split(share, np.flatnonzero(np.diff(seconds // _WINDOW_SECONDS)) + 1)
        workers = min(default_workers(), len(windows))
        rows: list[np.ndarray] = []
        with ThreadPoolExecutor(workers) as pool:
            for window, waveforms in zip(windows, in_order(pool, read, windows, ahead=workers), strict=True):
                rows += _embeddings(encoder, [self._utterances[place] for place in window], waveforms)
        return rows


class _Size(NamedTuple):
    """Length of an utterance in its audio."""

    samples: int
    rate: int

    @property
    def seconds(self) -> float:
        return self.samples / self.rate


class _List(NamedTuple):
    """A trial list: its trials, their paths, where the utterance of each path stands among all, and the speakers."""

    trials: Sequence[Trial]
    keys: list[str]
    rows: np.ndarray
    speakers: set[str]


def _trials_among(held: Corpus, seed: int) -> tuple[list[Trial], dict[str, Entry]]:
    """Trials among the speakers of a corpus, and the utterances of their paths, ``label/id``.

    By its label a speaker is one component of a path, whatever its name.
    """
    of: dict[str, dict[str, str]] = {speaker: {} for speaker in held.speakers}
    entries = {}
    for label, entry in zip(held.labels.tolist(), held, strict=True):
        key = f"{label}/{entry.id}"
        entries[key] = entry
        # Of an archive, the id is what tells the recording.
        of[entry.speaker][key] = entry.path if entry.offset < 0 else entry.id
    try:
        return draw_trials(of, np.random.default_rng(seed)), entries
    except InputError as error:
        raise InputError(f"validation.held_out: {held.name}: {error}") from error


def _figures(one: _List, embeddings: np.ndarray) -> ListResult:
    result = evaluate_trials(one.trials, one.keys, embeddings[one.rows])
    value, threshold, low, high = result.eer
    return ListResult(
        100 * value,
        None if low is None else 100 * low,
        None if high is None else 100 * high,
        result.min_dcf,
        threshold,
        len(one.trials),
    )


def _identity(entry: Entry) -> tuple[Any, ...]:
    """What audio it is; as text, in which no length equals no length."""
    return entry.path, entry.start, str(entry.seconds), entry.offset


def _name(entry: Entry) -> str:
    whole_file = entry.offset < 0 and entry.start == 0 and math.isnan(entry.seconds)
    return entry.path if whole_file else f"{entry.path}: {entry.id}"


def _size(entry: Entry) -> _Size:
    """Length of an utterance, by the header of its audio."""
    with _told(entry), open_audio(source_of(entry)) as audio:
        return _Size(segment(entry, audio.frames, audio.sample_rate)[1], audio.sample_rate)


@contextlib.contextmanager
def _told(entry: Entry) -> Iterator[None]:
    """Errors of a disk in one line, with the utterance."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{_name(entry)}: cannot be read ({error.strerror})") from error


def _samples(entry: Entry, encoder: SpeakerEncoder) -> np.ndarray:
    """Samples (S,) of an utterance at the rate of the front-end."""
    with _told(entry), open_audio(source_of(entry)) as audio:
        samples = audio.read(*segment(entry, audio.frames, audio.sample_rate))
        return encoder.load_audio(samples, audio.sample_rate, name=_name(entry))


def _embeddings(encoder: SpeakerEncoder, entries: list[Entry], waveforms: list[np.ndarray]) -> list[np.ndarray]:
    try:
        return list(encoder.embed_batch(waveforms).numpy())
    except InputError:
        # It tells a place among these; by itself, the utterance has its name.
        for entry, waveform in zip(entries, waveforms, strict=True):
            try:
                encoder.embed(waveform)
            except InputError as error:
                raise InputError(f"{_name(entry)}: {str(error).removeprefix('audio 0: ')}") from error
        raise
