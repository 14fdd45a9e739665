"""Shards: a corpus as a few large tar files with an index, for random access and for readers in sequence alike."""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import json
import math
import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from spkfast.data.audio import open_audio, resample, to_int16
from spkfast.data.corpus import Corpus, Entry
from spkfast.data.threads import default_workers, in_order
from spkfast.errors import InputError, check_name

FORMATS = ("flac", "opus", "copy")
OPUS_KBITS = 32
INDEX, DESCRIPTION = "index.csv", "index.json"

_VERSION = 1
_COLUMNS = ["id", "speaker", "shard", "member", "offset", "bytes", "samples", "rate", "crc32"]
_BLOCK = 512
_NAME_BYTES = 100  # of a tar header; a longer name stands in a record of its own before it
_OPUS_RATES = (8000, 12000, 16000, 24000, 48000)
# libsndfile's scale of compression: 0 is 256 kbit/s, 1 is 6 kbit/s.
_OPUS_COMPRESSION = (256 - OPUS_KBITS) / (256 - 6)
_OPEN_SHARDS = 256
_MANIFEST_ROUNDING_SECONDS = 0.01
_AGAIN = "run 'spkfast prepare shards' again"


class Written(NamedTuple):
    """What :func:`write_shards` made.

    Attributes:
        folder: Where shards and index are.
        utterances: How many are in them.
        shards: Number of files.
        bytes: Their size together.
        seconds: Length of all utterances together.
        left_out: Why each unreadable utterance is not there, by id.
    """

    folder: Path
    utterances: int
    shards: int
    bytes: int
    seconds: float
    left_out: dict[str, str]


def write_shards(
    corpus: Corpus,
    folder: str | os.PathLike[str],
    *,
    format: str = "flac",
    shard_megabytes: float = 256,
    sample_rate: int = 16000,
    seed: int = 0,
    workers: int | None = None,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
    warn: Callable[[str], None] = lambda message: None,
) -> Written:
    """Writes plain tar files with ``<key>.flac`` and ``<key>.spk`` beside each other, as webdataset and wespeaker read
    them, and an index of every utterance.

    Utterances are shuffled once, so that a reader in sequence sees mixed speakers. The same corpus, settings and seed
    give the same bytes. Everything is written into ``<folder>.partial``, which is renamed at the end: a run that is
    killed leaves nothing that looks whole, and its rest goes when the next one begins.

    Args:
        corpus: The utterances. Segments are cut.
        folder: Where the shards go; must not exist, or be empty.
        format: ``flac`` (exact for 16-bit audio), ``opus`` (OGG, 32 kbit/s), both mono with 16 bits at ``sample_rate``;
            or ``copy``: the file's own bytes where an utterance is a whole file, and FLAC where it is a part of one.
        shard_megabytes: Size in 10^6 bytes past which the next shard begins.
        sample_rate: Rate in Hz that FLAC and Opus are resampled to.
        seed: Seed of the order.
        workers: Threads that read and encode; None takes one per core, 8 at most.
        progress: Called with the number of utterances done and their total.
        warn: Called with a line about each utterance that cannot be read; these are left out.

    Returns:
        What was written.

    Raises:
        InputError: If ``folder`` holds something, an argument is out of range, none of the utterances can be read, or
            more than 1 % (and more than 10) cannot.
    """
    check_name("format", format, list(FORMATS))
    if not shard_megabytes > 0:
        raise InputError(f"shard_megabytes must be positive, got {shard_megabytes}")
    if sample_rate < 1 or (format == "opus" and sample_rate not in _OPUS_RATES):
        known = f"one of {', '.join(map(str, _OPUS_RATES))} for opus" if format == "opus" else "positive"
        raise InputError(f"sample_rate must be {known}, got {sample_rate}")
    if seed < 0:
        raise InputError(f"seed must be at least 0, got {seed}")
    workers = default_workers() if workers is None else workers
    if workers < 1:
        raise InputError(f"workers must be at least 1, got {workers}")
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target}: is there already; name another folder for the shards")
    partial = target.with_name(f"{target.name}.partial")
    _remove_partial(partial)
    partial.mkdir(parents=True)
    total = len(corpus)
    left_out: dict[str, str] = {}
    try:
        encode = functools.partial(_encode, format=format, sample_rate=sample_rate)
        entries = (corpus[int(place)] for place in np.random.default_rng(seed).permutation(total))
        with (
            open(partial / INDEX, "x", encoding="utf-8", errors="surrogateescape", newline="") as index,
            contextlib.closing(_Writer(partial, index, round(shard_megabytes * 1e6))) as writer,
            ThreadPoolExecutor(workers) as pool,
        ):
            for done, one in enumerate(in_order(pool, encode, entries, ahead=4 * workers), start=1):
                progress(done, total)
                if not one.error:
                    writer.add(one)
                    continue
                left_out[one.entry.id] = one.error
                warn(f"left out: {one.error}")
                if len(left_out) > max(10, total // 100) or len(left_out) == total:
                    first = next(iter(left_out.values()))
                    raise InputError(f"{len(left_out)} of {done} utterances could not be read, the first: {first}")
        description = {
            "version": _VERSION,
            "format": format,
            "sample_rate": sample_rate,
            "seed": seed,
            "utterances": writer.utterances,
            "shards": writer.sizes,
            "left_out": left_out,
        }
        (partial / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, target)
    except BaseException:
        _remove_partial(partial)
        raise
    sizes = writer.sizes.values()
    return Written(target, writer.utterances, len(sizes), sum(sizes), writer.seconds, left_out)


def read_index(path: str | os.PathLike[str]) -> Corpus:
    """The utterances of a folder of shards; sizes of all shards are compared with the index.

    Args:
        path: The folder, or its ``index.csv``.

    Raises:
        InputError: If the index is missing, damaged or of another version, or a shard is missing, truncated or grown.
    """
    index = _index(path)
    return Corpus((entry for entry, _ in _rows(index)), str(index.file))


def open_member(path: str | os.PathLike[str], offset: int, size: int, name: str) -> io.BytesIO:
    """The audio of one utterance in a shard, for :func:`spkfast.data.audio.read_audio`.

    Shards stay open, 256 at most in each process; positions are never shared, so a forked process may go on reading.

    Args:
        path: The shard.
        offset: First byte of the audio.
        size: Bytes of the audio.
        name: Id of the utterance.

    Raises:
        InputError: If the shard is missing or truncated, or holds something else there than its index says.
    """
    try:
        shard = _opened(os.fspath(path))
        header = os.pread(shard.descriptor, _BLOCK, offset - _BLOCK) if offset >= _BLOCK else b""
        data = os.pread(shard.descriptor, size, offset)
    except FileNotFoundError:
        raise InputError(f"{path}: no such shard") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if len(header) < _BLOCK or len(data) < size:
        raise InputError(f"{path}: the shard is truncated: {name!r} ends at byte {offset + size}; {_AGAIN}")
    if not header.startswith(f"{_key(name)}.".encode(errors="surrogateescape")[:_NAME_BYTES]) or (
        header[124:136] != b"%011o\0" % size
    ):
        raise InputError(f"{path}: was changed after its index was written ({name!r} is not at {offset}); {_AGAIN}")
    return _Audio(data, f"{path}: {name}")


def source_of(entry: Entry) -> str | io.BytesIO:
    """The audio of an utterance, for :func:`spkfast.data.audio.open_audio`.

    Raises:
        InputError: As :func:`open_member`.
    """
    return open_member(entry.path, entry.offset, entry.size, entry.id) if entry.offset >= 0 else entry.path


def verify_shards(
    path: str | os.PathLike[str], *, progress: Callable[[int, int | None], None] = lambda done, total: None
) -> tuple[int, list[str]]:
    """Reads every utterance of a folder of shards and compares its checksum with the index.

    Args:
        path: The folder, or its ``index.csv``.
        progress: Called with the number of utterances done.

    Returns:
        Number of utterances, and a line for each that is damaged.

    Raises:
        InputError: As :func:`read_index`.
    """
    index = _index(path)
    damaged = []
    for done, (entry, crc) in enumerate(_rows(index), start=1):
        try:
            data = open_member(entry.path, entry.offset, entry.size, entry.id)
            if zlib.crc32(data.getbuffer()) != crc:
                damaged.append(f"{entry.path}: the bytes of {entry.id!r} are damaged; {_AGAIN}")
        except InputError as error:
            damaged.append(str(error))
        progress(done, index.utterances)
    return index.utterances, damaged


class _Audio(io.BytesIO):
    """Bytes with a name for messages."""

    def __init__(self, data: bytes, name: str) -> None:
        super().__init__(data)
        self.name = name


class _Shard:
    """A descriptor that is closed with the last reference: eviction from the cache cannot close it under a reader."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


@functools.lru_cache(maxsize=_OPEN_SHARDS)
def _opened(path: str) -> _Shard:
    return _Shard(path)


class _Encoded(NamedTuple):
    """An utterance as it goes into a shard, or why it cannot."""

    entry: Entry
    data: bytes = b""
    suffix: str = ""
    samples: int = 0
    rate: int = 0
    error: str = ""


def _key(name: str) -> str:
    """An id as the name of a tar member without its suffix.

    Dots go, as readers split names at them and ``..`` leads out of a folder; so do slashes that separate nothing, and
    control characters. ``urllib.parse.unquote`` gives the id back.
    """
    return _ESCAPED.sub(lambda match: f"%{ord(match[0]):02X}", name)


_ESCAPED = re.compile(r"[%.\\\x00-\x1f\x7f]|^/|/(?=/|$)")


def _encode(entry: Entry, *, format: str, sample_rate: int) -> _Encoded:
    try:
        source = source_of(entry)
        with open_audio(source) as audio:
            begin, rate = round(entry.start * audio.sample_rate), audio.sample_rate
            end = audio.frames if math.isnan(entry.seconds) else begin + round(entry.seconds * rate)
            whole = begin == 0 and audio.frames - end <= _MANIFEST_ROUNDING_SECONDS * rate
            copy = whole and format == "copy"
            # What is copied is decoded too: a damaged file is found here rather than in training.
            samples = audio.read(begin, audio.frames if copy else end - begin)
        if copy:
            data = source.getvalue() if isinstance(source, io.BytesIO) else Path(source).read_bytes()
            return _Encoded(entry, data, _suffix(data), len(samples), rate)
        samples = to_int16(resample(samples, rate, sample_rate))
        if not len(samples):
            raise InputError(f"{entry.path}: {entry.id!r}, {entry.seconds} s from {entry.start} s, holds no samples")
        opus = format == "opus"
        data = _opus(samples, sample_rate) if opus else _flac(samples, sample_rate)
        return _Encoded(entry, data, ".opus" if opus else ".flac", len(samples), sample_rate)
    except (InputError, OSError) as error:
        return _Encoded(entry, error=str(error))


def _suffix(data: bytes) -> str:
    """What a file with these bytes is called: libsndfile's name of the format."""
    import soundfile

    with soundfile.SoundFile(io.BytesIO(data)) as file:
        return {"WAVEX": ".wav", "RF64": ".wav"}.get(file.format, f".{file.format.lower()}")


def _flac(samples: np.ndarray, rate: int) -> bytes:
    import soundfile

    data = io.BytesIO()
    soundfile.write(data, samples, rate, format="FLAC", subtype="PCM_16")
    return data.getvalue()


def _opus(samples: np.ndarray, rate: int) -> bytes:
    import soundfile

    data = io.BytesIO()
    soundfile.write(data, samples, rate, format="OGG", subtype="OPUS", compression_level=_OPUS_COMPRESSION)
    return _with_serial_zero(data.getvalue())


# zlib's checksum reads the bits of a byte from the other end than Ogg's of the same polynomial.
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _with_serial_zero(data: bytes) -> bytes:
    """An Ogg file with the serial number, which the encoder draws at random, set to 0 in every page."""
    pages = bytearray(data)
    begin = 0
    while begin < len(pages):
        segments = pages[begin + 26]
        end = begin + 27 + segments + sum(pages[begin + 27 : begin + 27 + segments])
        pages[begin + 14 : begin + 18] = bytes(4)
        pages[begin + 22 : begin + 26] = bytes(4)
        # The value that makes zlib begin and end with no bits inverted, as Ogg does.
        checksum = zlib.crc32(pages[begin:end].translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
        pages[begin + 22 : begin + 26] = checksum.to_bytes(4, "big").translate(_REVERSED)
        begin = end
    return bytes(pages)


class _Writer:
    """Shards of a folder, one after the other, and their index.

    Files must not be there yet: of two runs into one folder one ends.
    """

    def __init__(self, folder: Path, index: IO[str], shard_bytes: int) -> None:
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._shard: IO[bytes] | None = None
        self._table = csv.writer(index)
        self._table.writerow(_COLUMNS)
        self.sizes: dict[str, int] = {}
        self.utterances = 0
        self.seconds = 0.0

    def add(self, one: _Encoded) -> None:
        if self._shard is None:
            path = self._folder / f"shard-{len(self.sizes):06d}.tar"
            self._shard = open(path, "xb")  # noqa: SIM115  open from one utterance to the next
        key, shard = _key(one.entry.id), os.path.basename(self._shard.name)
        member = f"{key}{one.suffix}"
        offset = _append(self._shard, member, one.data)
        _append(self._shard, f"{key}.spk", one.entry.speaker.encode(errors="surrogateescape"))
        row = (one.entry.id, one.entry.speaker, shard, member, offset, len(one.data), one.samples, one.rate)
        self._table.writerow((*row, f"{zlib.crc32(one.data):08x}"))
        self.utterances += 1
        self.seconds += one.samples / one.rate
        if self._shard.tell() >= self._shard_bytes:
            self._end_shard()

    def close(self) -> None:
        if self._shard is not None:
            self._end_shard()

    def _end_shard(self) -> None:
        assert self._shard is not None
        with self._shard:
            self._shard.write(bytes(2 * _BLOCK))
            self.sizes[os.path.basename(self._shard.name)] = self._shard.tell()
        self._shard = None


def _append(shard: IO[bytes], name: str, data: bytes) -> int:
    """Adds a member and returns its first byte. The header holds no time and no owner."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    shard.write(info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))
    offset = shard.tell()
    shard.write(data)
    shard.write(bytes(-len(data) % _BLOCK))
    return offset


def _remove_partial(folder: Path) -> None:
    """Removes what a killed run left, and nothing else."""
    if not folder.exists():
        return
    ours = re.compile(rf"shard-\d+\.tar|{re.escape(INDEX)}|{re.escape(DESCRIPTION)}")
    if not folder.is_dir() or not all(ours.fullmatch(path.name) for path in folder.iterdir()):
        raise InputError(f"{folder}: is in the way and holds something else than shards; move it")
    shutil.rmtree(folder)


class _Index(NamedTuple):
    """Index of a folder of shards: its file, how many rows it has, and the path of each shard by its name."""

    file: Path
    utterances: int
    shards: dict[str, str]


def _index(path: str | os.PathLike[str]) -> _Index:
    """The index of a folder of shards, after comparing the sizes of these."""
    folder = Path(path).parent if Path(path).name == INDEX else Path(path)
    file = folder / DESCRIPTION
    if not file.is_file() or not (folder / INDEX).is_file():
        raise InputError(f"{folder}: not a folder of shards: holds no {INDEX} with {DESCRIPTION}")
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
        version, utterances = int(description["version"]), int(description["utterances"])
        sizes = {str(name): int(size) for name, size in description["shards"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: damaged; {_AGAIN}") from error
    if version != _VERSION:
        raise InputError(f"{file}: has version {version}, expected {_VERSION}; {_AGAIN}")
    for name, size in sizes.items():
        try:
            found = os.stat(folder / name).st_size
        except OSError:
            raise InputError(f"{folder / name}: no such shard, but the index names it; {_AGAIN}") from None
        if found != size:
            state = "truncated" if found < size else "longer than when it was written"
            raise InputError(f"{folder / name}: the shard is {state} ({found} of {size} bytes); {_AGAIN}")
    _opened.cache_clear()  # the shards may have been written anew since this process last read them
    return _Index(folder / INDEX, utterances, {name: str(folder / name) for name in sizes})


def _rows(index: _Index) -> Iterator[tuple[Entry, int]]:
    """Each utterance with its checksum."""
    count = 0
    with open(index.file, encoding="utf-8", errors="surrogateescape", newline="") as file:
        table = csv.reader(file, strict=True)
        if next(table, None) != _COLUMNS:
            raise InputError(f"{index.file}: expected a first line {','.join(_COLUMNS)}; {_AGAIN}")
        try:
            for name, speaker, shard, _, offset, size, samples, rate, crc in table:
                seconds = int(samples) / int(rate)
                entry = Entry(speaker, name, index.shards[shard], 0.0, seconds, int(offset), int(size))
                yield entry, int(crc, 16)
                count += 1
        except (csv.Error, KeyError, ValueError, ZeroDivisionError) as error:
            raise InputError(f"{index.file}: row {count + 1} is damaged; {_AGAIN}") from error
    if count != index.utterances:
        raise InputError(f"{index.file}: holds {count} utterances, {index.utterances} were written; {_AGAIN}")
