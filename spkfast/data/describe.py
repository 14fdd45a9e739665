"""What is in a corpus: how much of whom, and what is wrong with its audio."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from spkfast.data.audio import open_audio
from spkfast.data.corpus import Corpus, Entry
from spkfast.data.shards import source_of
from spkfast.data.threads import default_workers, in_order
from spkfast.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The largest positive number of 16 bits.
_FULL_SCALE = np.float32(32767 / 32768)
_CLIPPED_SHARE = 1e-4
_FRAME_SECONDS = 0.01
# Manifests round times to as little as this.
_ROUNDING_SECONDS = 0.01
_BINS = 20
_COLOUR = "#2f6fde"


@dataclasses.dataclass(frozen=True)
class Distribution:
    """Spread of a number over a corpus.

    Attributes:
        min: Least.
        median: Median.
        max: Greatest.
        edges: Edges of the bins of a histogram.
        counts: How many lie in each bin, one fewer than edges.
    """

    min: float
    median: float
    max: float
    edges: list[float]
    counts: list[int]


@dataclasses.dataclass(frozen=True)
class Description:
    """What :func:`describe` finds. Utterances are named by their ids.

    Attributes:
        name: Where the corpus comes from.
        speakers: Speakers of the corpus.
        utterances: Utterances of the corpus.
        utterances_per_speaker: Spread over speakers.
        read: Utterances that were read; all of them, or those of the sample.
        hours: Hours of audio in those.
        estimated_hours: Hours of the whole corpus, if the rest is as those.
        seconds: Spread of lengths in seconds.
        loudest_db: Spread of the level of the loudest 10 ms frame of each utterance in dBFS, digital silence left out.
        sample_rates: Utterances at each sampling rate in Hz.
        clipped: Utterances of which at least 0.01 % of the samples lie at full scale beside another one there.
        silent: Utterances without a frame at ``silence_db`` or above.
        duplicates: Utterances with the same audio, sample by sample.
        duplicates_across_speakers: Those of the duplicates that have more than one speaker.
        shorter: Utterances whose audio ends before their manifest says.
        unreadable: Why an utterance cannot be read.
    """

    name: str
    speakers: int
    utterances: int
    utterances_per_speaker: Distribution
    read: int
    hours: float
    estimated_hours: float
    seconds: Distribution
    loudest_db: Distribution | None
    sample_rates: dict[int, int]
    clipped: list[str]
    silent: list[str]
    duplicates: list[list[str]]
    duplicates_across_speakers: list[list[str]]
    shorter: list[str]
    unreadable: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        return dataclasses.asdict(self)

    def plot(self) -> Figure:
        """Histograms of utterances per speaker, lengths and levels; needs matplotlib."""
        from matplotlib.figure import Figure

        panels = [
            (self.utterances_per_speaker, "utterances per speaker", "speakers"),
            (self.seconds, "length (s)", "utterances"),
            (self.loudest_db, "loudest 10 ms (dBFS)", "utterances"),
        ]
        figure = Figure(figsize=(11.0, 3.4), layout="constrained")
        figure.suptitle(f"{self.utterances:,} utterances of {self.speakers:,} speakers", fontsize=11)
        for axes, (spread, label, counted) in zip(figure.subplots(1, len(panels)), panels, strict=True):
            if spread is not None:
                axes.stairs(spread.counts, spread.edges, fill=True, color=_COLOUR)
                axes.axvline(spread.median, color="0.2", linestyle="--", linewidth=1.2, label="median")
                axes.legend(frameon=False, fontsize=9)
            axes.set(xlabel=label, ylabel=counted)
            axes.grid(color="0.85", linewidth=0.6)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        return figure


def describe(
    corpus: Corpus,
    *,
    silence_db: float = -60.0,
    workers: int | None = None,
    sample: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> Description:
    """Reads the utterances of a corpus and says what is in them.

    Channels are averaged, as everywhere. 0 dBFS is a mean square of 1.

    Args:
        corpus: The utterances.
        silence_db: Level in dBFS; an utterance whose loudest 10 ms frame is below it counts as silent.
        workers: Threads that read; None takes one per core, 8 at most.
        sample: Reads a random choice of as many utterances; None reads all.
        seed: Seed of that choice.
        progress: Called with the number of utterances done and their total.

    Raises:
        InputError: If an argument is out of range, or none of the utterances can be read.
    """
    if not silence_db < math.inf:  # NaN is not, either
        raise InputError(f"silence_db must be a level in dBFS, got {silence_db}")
    workers = default_workers() if workers is None else workers
    if workers < 1:
        raise InputError(f"workers must be at least 1, got {workers}")
    if sample is not None and sample < 1:
        raise InputError(f"sample must be at least 1 utterance, got {sample}")
    chosen = np.arange(len(corpus))
    if sample is not None and sample < len(corpus):
        chosen = np.sort(np.random.default_rng(seed).choice(len(corpus), sample, replace=False))

    measured: list[tuple[int, _Measured]] = []
    unreadable: dict[str, str] = {}
    with ThreadPoolExecutor(workers) as pool:
        results = in_order(pool, lambda index: _measure(corpus[index]), map(int, chosen), ahead=4 * workers)
        for done, (index, one) in enumerate(zip(chosen.tolist(), results, strict=True), start=1):
            progress(done, len(chosen))
            if isinstance(one, str):
                unreadable[corpus.ids[index]] = one
            else:
                measured.append((index, one))
    if not measured:
        raise InputError(
            f"{corpus.name}: none of {len(chosen)} utterances can be read, the first: {next(iter(unreadable.values()))}"
        )

    alike: dict[bytes, list[int]] = {}
    for index, one in measured:
        alike.setdefault(one.digest, []).append(index)
    groups = [indices for indices in alike.values() if len(indices) > 1]
    seconds = np.array([one.seconds for _, one in measured])
    levels = np.array([one.loudest_db for _, one in measured])
    hours = float(seconds.sum()) / 3600
    return Description(
        name=corpus.name,
        speakers=len(corpus.speakers),
        utterances=len(corpus),
        utterances_per_speaker=_distribution(np.bincount(corpus.labels, minlength=len(corpus.speakers))),
        read=len(measured),
        hours=hours,
        estimated_hours=hours * len(corpus) / len(chosen),
        seconds=_distribution(seconds),
        loudest_db=_distribution(levels[levels > -np.inf]) if (levels > -np.inf).any() else None,
        sample_rates=dict(sorted(Counter(one.sample_rate for _, one in measured).items())),
        clipped=[corpus.ids[index] for index, one in measured if one.clipped],
        silent=[corpus.ids[index] for index, one in measured if one.loudest_db < silence_db],
        duplicates=[[corpus.ids[index] for index in indices] for indices in groups],
        duplicates_across_speakers=[
            [corpus.ids[index] for index in indices] for indices in groups if len(set(corpus.labels[indices])) > 1
        ],
        shorter=[corpus.ids[index] for index, one in measured if one.shorter],
        unreadable=unreadable,
    )


class _Measured(NamedTuple):
    seconds: float
    sample_rate: int
    loudest_db: float
    clipped: bool
    shorter: bool
    digest: bytes


def _measure(entry: Entry) -> _Measured | str:
    """What is to be known of an utterance, or why it cannot be read."""
    try:
        samples, rate = _samples(entry)
    except (InputError, OSError) as error:
        return str(error)
    seconds = len(samples) / rate
    return _Measured(
        seconds,
        rate,
        _loudest_db(samples, rate),
        _clipped(samples),
        seconds < entry.seconds - _ROUNDING_SECONDS,
        hashlib.blake2b(samples.tobytes(), digest_size=16, salt=rate.to_bytes(8, "little")).digest(),
    )


def _samples(entry: Entry) -> tuple[np.ndarray, int]:
    """Samples (S,) of an utterance and their rate in Hz."""
    with open_audio(source_of(entry)) as audio:
        start = round(entry.start * audio.sample_rate)
        wanted = audio.frames if math.isnan(entry.seconds) else round(entry.seconds * audio.sample_rate)
        samples = audio.read(start, wanted)
        if not len(samples):
            raise InputError(
                f"{audio.name}: the segment of {wanted} samples from {entry.start:g} s has none, the audio ends at "
                f"{audio.frames / audio.sample_rate:g} s"
            )
        return samples, audio.sample_rate


def _loudest_db(samples: np.ndarray, rate: int) -> float:
    """Level of the loudest whole frame of 10 ms, or of all samples where there are fewer, in dBFS."""
    size = min(len(samples), max(1, round(_FRAME_SECONDS * rate)))
    frames = samples[: len(samples) // size * size].reshape(-1, size)
    # The sum of squares of the frames, without a copy of them.
    loudest = float(np.einsum("ts,ts->t", frames, frames).max()) / size
    return 10 * math.log10(loudest) if loudest > 0 else -math.inf


def _clipped(samples: np.ndarray) -> bool:
    """Whether 0.01 % of the samples lie at full scale in runs: a single one there is a peak."""
    flat = np.zeros(len(samples), dtype=bool)
    for full in (samples >= _FULL_SCALE, samples <= -_FULL_SCALE):
        pairs = full[1:] & full[:-1]
        flat[1:] |= pairs
        flat[:-1] |= pairs
    return int(flat.sum()) >= max(1, _CLIPPED_SHARE * len(samples))


def _distribution(values: np.ndarray) -> Distribution:
    bins: int | np.ndarray = _BINS
    if values.dtype.kind == "i":  # bins of as many whole numbers each, or some would get one more than others
        step = -(-(int(values.max()) - int(values.min()) + 1) // _BINS)
        bins = np.arange(values.min(), values.max() + step + 1, step) - 0.5
    counts, edges = np.histogram(values, bins=bins)
    return Distribution(
        float(values.min()), float(np.median(values)), float(values.max()), edges.tolist(), counts.tolist()
    )
