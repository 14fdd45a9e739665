"""The utterances of a corpus as arrays: small in memory, and shared by worker processes without a copy."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from spkfast.errors import InputError


class Entry(NamedTuple):
    """One utterance as a manifest tells it.

    Attributes:
        speaker: Who speaks.
        id: Name of the utterance, unique in its corpus; everything random about it follows from this name.
        path: Audio file, or archive that holds it.
        start: Where the utterance begins in the audio, in seconds.
        seconds: How long it is; NaN where only the audio tells (to its end).
        offset: First byte of the audio in the archive; -1 where ``path`` is the audio file itself.
        size: Bytes of the audio in the archive.
    """

    speaker: str
    id: str
    path: str
    start: float = 0.0
    seconds: float = float("nan")
    offset: int = -1
    size: int = 0


class Strings(Sequence[str]):
    """Many strings in two arrays: a list of a million would be copied, page by page, into every worker that counts
    references to its items.
    """

    def __init__(self, values: Iterable[str]) -> None:
        encoded = [os.fsencode(value) for value in values]
        self._ends = np.cumsum([len(value) for value in encoded], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        begin = int(self._ends[index - 1]) if index else 0
        return os.fsdecode(self._bytes[begin : int(self._ends[index])].tobytes())

    def select(self, chosen: np.ndarray) -> Strings:
        """Those where a mask, bool (len(self),), is true."""
        lengths = np.diff(self._ends, prepend=0)
        part = copy.copy(self)
        part._ends = np.cumsum(lengths[chosen], dtype=np.int64)
        part._bytes = self._bytes[np.repeat(chosen, lengths)]
        return part


class Corpus:
    """Utterances of known speakers, in the order of their manifest.

    Attributes:
        speakers: Names, sorted; a label is a place in this list.
        labels: Speaker of each utterance, int64, shape (U,).
        ids: Name of each utterance.
        files: Each audio file or archive once.
        file_of: Place in ``files`` of each utterance, int64, shape (U,).
        starts: Where each begins in its audio in seconds, float64, shape (U,).
        seconds: How long each is, NaN where only the audio tells, float64, shape (U,).
        offsets: First byte in the archive, -1 where the file is the audio itself, int64, shape (U,).
        sizes: Bytes in the archive, int64, shape (U,).

    Args:
        entries: The utterances.
        name: Where they come from, for messages.

    Raises:
        InputError: If there are none, or an id comes twice, or a speaker or id is empty.
    """

    def __init__(self, entries: Iterable[Entry], name: str = "the corpus") -> None:
        entries = list(entries)
        if not entries:
            raise InputError(f"{name}: holds no utterances")
        self.name = name
        seen: set[str] = set()
        for number, entry in enumerate(entries, start=1):
            if not entry.speaker or not entry.id or not entry.path:
                raise InputError(f"{name}: utterance {number} ({entry.id or entry.path!r}) has no speaker, id or path")
            if entry.id in seen:
                raise InputError(f"{name}: the utterance {entry.id!r} is there twice")
            seen.add(entry.id)
        self.speakers = sorted({entry.speaker for entry in entries})
        label = {speaker: k for k, speaker in enumerate(self.speakers)}
        place: dict[str, int] = {}
        self.labels = np.array([label[entry.speaker] for entry in entries], dtype=np.int64)
        self.ids = Strings(entry.id for entry in entries)
        self.file_of = np.array([place.setdefault(entry.path, len(place)) for entry in entries], dtype=np.int64)
        self.files = Strings(place)
        self.starts = np.array([entry.start for entry in entries], dtype=np.float64)
        self.seconds = np.array([entry.seconds for entry in entries], dtype=np.float64)
        self.offsets = np.array([entry.offset for entry in entries], dtype=np.int64)
        self.sizes = np.array([entry.size for entry in entries], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[Entry]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Entry:
        """Utterance ``index``."""
        return Entry(
            self.speakers[self.labels[index]],
            self.ids[index],
            self.files[int(self.file_of[index])],
            float(self.starts[index]),
            float(self.seconds[index]),
            int(self.offsets[index]),
            int(self.sizes[index]),
        )

    def select(self, chosen: np.ndarray) -> Corpus:
        """Some of the utterances, in their order, with the speakers and files of these alone.

        Args:
            chosen: Which, bool, shape (U,).

        Raises:
            InputError: If none is chosen.
        """
        if not chosen.any():
            raise InputError(f"{self.name}: none of its utterances is chosen")
        part = copy.copy(self)
        for name in ("starts", "seconds", "offsets", "sizes"):
            setattr(part, name, getattr(self, name)[chosen])
        part.ids = self.ids.select(chosen)
        there, part.labels = _renumbered(self.labels[chosen], len(self.speakers))
        part.speakers = [speaker for speaker, is_there in zip(self.speakers, there, strict=True) if is_there]
        there, part.file_of = _renumbered(self.file_of[chosen], len(self.files))
        part.files = self.files.select(there)
        return part

    @property
    def fingerprint(self) -> str:
        """Hex digest of speakers, ids and segments, wherever the audio lies: what a resumed run must find again."""
        digest = hashlib.sha256()
        for entry in self:
            digest.update(
                f"{entry.speaker}\0{entry.id}\0{entry.start!r}\0{entry.seconds!r}\n".encode(errors="surrogateescape")
            )
        return digest.hexdigest()[:16]


def _renumbered(places: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of ``size`` places occur, and the place of each among those; in linear time, unlike by sorting."""
    there = np.zeros(size, dtype=bool)
    there[places] = True
    return there, (np.cumsum(there) - 1)[places]
