"""Manifests of other toolkits, folders and shards, each read as a corpus."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from spkfast.data.audio import AUDIO_SUFFIXES
from spkfast.data.corpus import Corpus, Entry
from spkfast.errors import InputError, nearest

# Each kind of column by every name that toolkits give it, in lower case.
_NAMES = {
    "path": ("path", "wav", "audio_filepath", "file"),
    "speaker": ("speaker", "spk", "spk_id", "label"),
    "id": ("id", "utt", "key"),
    "start": ("start", "offset", "start_seconds", "start_samples"),
    "stop": ("stop_seconds", "stop_samples"),
    "seconds": ("seconds", "duration", "dur"),
    "rate": ("sample_rate", "sampling_rate"),
}
_KNOWN = [name for names in _NAMES.values() for name in names]
# Units that no column name tells: seconds in one toolkit, samples in another.
_AMBIGUOUS = ("stop", "end")
# The VoxCeleb recipes of speechbrain (samples at 16 kHz) and 3D-Speaker (seconds). Both tell the length of the file.
_SPEECHBRAIN = frozenset(("id", "duration", "wav", "start", "stop", "spk_id"))
_SPEECHBRAIN_RATE = 16000
_3D_SPEAKER = frozenset(("id", "dur", "path", "start", "stop", "spk"))

# Manifests round times to as little as this.
_ROUNDING_SECONDS = 0.01
_LIST_NAME = "train_list.txt"
_KALDI_NAMES = ("wav.scp", "utt2spk", "spk2utt", "segments", "utt2dur")
_IN_ARCHIVE = re.compile(r"\.ark:\d+(\[.*\])?$")

Warn = Callable[[str], None]
# The line that an utterance stands in, and the utterance.
_Rows = Iterator[tuple[int, Entry]]


def read_corpus(
    source: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    speakers: str | os.PathLike[str] | None = None,
    warn: Warn = lambda message: None,
) -> Corpus:
    """The utterances that a manifest, a folder or shards tell of.

    What a file is follows from its suffix, and from its first line where that does not tell. Files may be compressed by
    gzip. Whether the audio is there is not looked at: a corpus may have millions of files.

    * List: lines ``speaker path``; the id is the path.
    * Table (CSV, TSV, semicolons) with a header, or JSON lines with the same names: ``path``, ``wav``,
      ``audio_filepath`` or ``file``; ``speaker``, ``spk``, ``spk_id`` or ``label``; where there is one, ``id``, ``utt``
      or ``key``; ``start`` or ``offset`` and ``seconds``, ``duration`` or ``dur``, all in seconds; ``stop_seconds``, or
      ``start_samples`` and ``stop_samples`` with ``sample_rate``. A length beside a stop may be that of the whole file.
      Without an id the path is the id, followed by ``@start+seconds`` where a row tells a start.
    * lhotse cuts (JSON lines): MonoCut of a recording in one file with one channel.
    * Kaldi directory: ``wav.scp`` with ``utt2spk`` or ``spk2utt``, and optional ``segments``, ``utt2dur``.
    * Folder: its ``train_list.txt``, else audio at ``<speaker>/<session>/<utterance>``.
    * Shards: a folder of them or their index.

    Args:
        source: File or folder.
        root: Folder that relative paths of a manifest start from; None is the folder that holds the manifest.
        speakers: File with lines ``utterance speaker``, the utterance by its id or its path; it goes before what the
            manifest says.
        warn: Called with each message about what is passed over or looks wrong.

    Raises:
        InputError: If the source is missing, empty or of no known form, or a line is wrong (file and line are named).
    """
    name = os.fspath(source)
    if "://" in name or name.startswith("pipe:"):
        raise InputError(
            f"{name}: an address is streamed (spkfast.data.streaming), which gives no corpus; copy the files here"
        )
    if not os.path.exists(name):
        raise InputError(f"{name}: no such file or folder")
    form = _form_of_folder(name) if os.path.isdir(name) else _form_of_file(name)
    if root is not None and form in (_read_shards, _scan):
        raise InputError(f"root: {name} is no manifest, its audio is found without a root; leave root away")
    given = read_speakers(speakers) if speakers is not None else None
    base = os.path.join(root if root is not None else name if os.path.isdir(name) else os.path.dirname(name), "")
    # Built once: the rows of an index need nothing more.
    if form is _read_shards and given is None:
        return _shards(name)
    file, rows = form(name, base, warn, given is not None)
    return _corpus(name, file, rows, base, given, os.fspath(speakers or "a file of speakers (--speakers)"), warn)


def _corpus(
    name: str,
    file: str,
    rows: Iterable[tuple[int, Entry]],
    base: str,
    given: dict[str, str] | None,
    speakers: str,
    warn: Warn,
) -> Corpus:
    """The corpus of rows, once each has a speaker and an id of its own."""
    lines: dict[str, int] = {}
    entries = []
    unnamed = 0
    for line, entry in rows:
        if given is not None:
            speaker = given.get(entry.id) or given.get(entry.path) or given.get(entry.path.removeprefix(base))
            unnamed += speaker is None
            entry = entry._replace(speaker=speaker or entry.speaker)
        if not entry.speaker:
            raise InputError(
                f"{file}:{line}: the utterance {entry.id!r} has no speaker; name it there or in {speakers}"
            )
        if lines.setdefault(entry.id, line) != line:
            raise InputError(
                f"{file}:{line}: the utterance {entry.id!r} is there twice, first in line {lines[entry.id]}"
            )
        entries.append(entry)
    if not entries:
        raise InputError(f"{file}: the manifest is empty")
    if unnamed == len(entries):
        raise InputError(
            f"{speakers}: names none of the utterances of {name}, the first of which is "
            f"{entries[0].id!r}; lines must be 'utterance speaker'"
        )
    if unnamed:
        warn(f"{speakers}: {unnamed} of {len(entries)} utterances are not in it and keep their speaker")
    # One look instead of millions: where paths start is what is most often wrong, and then all of them are.
    if not os.path.exists(entries[0].path):
        warn(
            f"{entries[0].path}: no such file; relative paths start from {base or 'the working folder'}, another "
            "folder is given as root (--data.root in 'spkfast train', else --root)"
        )
    return Corpus(entries, name)


def _form_of_folder(folder: str) -> Callable[..., tuple[str, _Rows]]:
    with os.scandir(folder) as found:
        folders = {entry.name: entry.is_dir() for entry in found}
    if "wav.scp" in folders:
        return _read_kaldi
    if _LIST_NAME in folders:
        return _read_list
    # An archive may lie beside what was unpacked from it.
    return _read_shards if any(name.endswith(".tar") for name in folders) and not any(folders.values()) else _scan


def _form_of_file(file: str) -> Callable[..., tuple[str, _Rows]]:
    name = os.path.basename(file).lower().removesuffix(".gz")
    suffix = os.path.splitext(name)[1]
    if suffix in AUDIO_SUFFIXES:
        raise InputError(f"{file}: is an audio file; expected a manifest, a folder or shards")
    if name in _KALDI_NAMES or suffix == ".scp":
        raise InputError(f"{file}: is one file of a Kaldi directory; give the directory")
    if suffix == ".tar":
        return _read_shards
    first = next((line for _, line in numbered_lines(file)), "")
    header = _header(first)
    if {"shard", "member"} <= set(header):
        return _read_shards
    if suffix in (".csv", ".tsv") or (len(header) > 1 and set(header) & set(_NAMES["path"])):
        return _read_table
    if suffix == ".jsonl" or first.lstrip().startswith("{"):
        return _read_json
    if first.lstrip().startswith("["):
        raise InputError(f"{file}: is one JSON array; expected JSON lines, one object a line")
    if first.rstrip().endswith(".tar") and len(first.split()) == 1:
        raise InputError(
            f"{file}: is a list of shards; give the folder or the index that 'spkfast prepare shards' writes"
        )
    return _read_list


def numbered_lines(file: str) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, each with its number and without its end."""
    try:
        with open(file, "rb") as beginning:
            compressed = beginning.read(2) == b"\x1f\x8b"
        with gzip.open(file) if compressed else open(file, "rb") as lines:
            for number, raw in enumerate(lines, start=1):
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise InputError(f"{file}:{number}: not UTF-8 text") from error
                if "\0" in line:
                    raise InputError(f"{file}:{number}: not a text file")
                if line and not line.isspace():
                    yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{file}: cannot be read ({error})") from error


class _Place:
    """Puts the file and the line that is worked on before the messages of errors within.

    Args:
        file: File.
    """

    def __init__(self, file: str) -> None:
        self._file = file
        self.line = 0

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, InputError):
            raise InputError(f"{self._file}:{self.line}: {error}") from None


def _read_list(name: str, base: str, warn: Warn, alone: bool) -> tuple[str, _Rows]:
    """Lines ``speaker path``; where a file of speakers is given, ``path`` ``alone`` will do."""
    file = os.path.join(name, _LIST_NAME) if os.path.isdir(name) else name

    def rows() -> _Rows:
        place = _Place(file)
        for place.line, line in numbered_lines(file):
            fields = line.split()
            with place:
                if len(fields) != 2 and not (alone and len(fields) == 1):
                    raise InputError(f"expected 2 columns 'speaker path', got {len(fields)}")
                speaker, path = fields if len(fields) == 2 else ("", fields[0])
                # In other toolkits' lists the speaker stands last.
                if _is_audio(speaker) and not _is_audio(path):
                    raise InputError("expected 'speaker path', got 'path speaker'; change the columns round")
                entry = Entry(speaker, path, _located(path, base))
            yield place.line, entry

    return file, rows()


def read_speakers(file: str | os.PathLike[str]) -> dict[str, str]:
    """Speaker of each utterance, from lines ``utterance speaker``.

    Raises:
        InputError: If the file is missing, a line has other columns, or an utterance has two speakers.
    """
    file = os.fspath(file)
    if not os.path.isfile(file):
        raise InputError(f"{file}: no such file of speakers")
    return {utterance: speaker for utterance, (_, speaker) in _pairs(file, "utterance speaker", repeats=True).items()}


def read_durations(file: str | os.PathLike[str]) -> dict[str, float]:
    """Seconds of each utterance, from lines ``utterance seconds``.

    Raises:
        InputError: If the file is missing, a line has other columns, or a duration is no positive number.
    """
    file = os.fspath(file)
    if not os.path.isfile(file):
        raise InputError(f"{file}: no such file of durations")
    found = {}
    for utterance, (number, text) in _pairs(file, "utterance seconds").items():
        try:
            seconds = float(text)
        except ValueError:
            seconds = math.nan
        if not 0 < seconds < math.inf:
            raise InputError(f"{file}:{number}: the duration of {utterance} must be a positive number, got {text!r}")
        found[utterance] = seconds
    return found


def _is_audio(path: str) -> bool:
    return path.lower().endswith(AUDIO_SUFFIXES)


def _located(path: str, base: str) -> str:
    """A path as written, from the folder where relative ones start.

    Raises:
        InputError: If it names something else than a file.
    """
    if path[-1:] == "|":
        raise InputError(f"{path!r} is a command; run it, and name the file that it writes")
    if "://" in path:
        raise InputError(f"{path!r} is an address; copy the file here, and name that")
    return path if path[:1] == "/" else base + path


@dataclasses.dataclass(frozen=True)
class _Columns:
    """The column of each kind, as the manifest spells it; None where it has none."""

    path: str
    speaker: str | None
    id: str | None
    start: str | None
    stop: str | None
    seconds: str | None
    rate: str | None
    in_samples: bool
    default_rate: int | None


def _columns(names: Iterable[str]) -> _Columns:
    """Finds the columns of each kind.

    Raises:
        InputError: If one is missing, told twice or of unknown unit.
    """
    names = list(names)
    spelt = {name.lower(): name for name in names}
    if len(spelt) < len(names):
        raise InputError(f"a column is there twice: {', '.join(names)}")
    found: dict[str, str | None] = {}
    for kind, known in _NAMES.items():
        those = [name for name in known if name in spelt]
        if len(those) > 1:
            raise InputError(
                f"{spelt[those[0]]!r} and {spelt[those[1]]!r} both name the {kind}; leave one away or rename it"
            )
        found[kind] = those[0] if those else None
    if found["path"] is None:
        likely = next(
            (nearest(name, list(_NAMES["path"])) for name in spelt if nearest(name, list(_NAMES["path"]))), ""
        )
        raise InputError(
            f"no column or key for the audio file{likely}; expected one of {', '.join(_NAMES['path'])}, "
            f"got {', '.join(spelt.values()) or 'none'}"
        )
    in_samples = {name.endswith("_samples") for name in (found["start"], found["stop"]) if name is not None}
    default_rate = None
    for name in _AMBIGUOUS:
        if name not in spelt:
            continue
        if frozenset(spelt) == _SPEECHBRAIN:
            found["stop"], in_samples, default_rate = name, {True}, _SPEECHBRAIN_RATE
        elif frozenset(spelt) == _3D_SPEAKER:
            found["stop"] = name
        else:
            raise InputError(
                f"{spelt[name]!r} may be seconds or samples; name it stop_seconds, or stop_samples beside "
                "start_samples and sample_rate"
            )
    if len(in_samples) > 1:
        raise InputError(
            f"{found['start']!r} and {found['stop']!r} have two units; expected seconds or samples in both"
        )
    if True in in_samples and found["rate"] is None and default_rate is None:
        raise InputError("positions in samples need a column sample_rate")
    kinds: dict[str, Any] = {kind: None if name is None else spelt[name] for kind, name in found.items()}
    return _Columns(in_samples=True in in_samples, default_rate=default_rate, **kinds)


def _entry(row: Mapping[str, Any], columns: _Columns, base: str) -> Entry:
    """The utterance of a row.

    Raises:
        InputError: If a value is missing or cannot be.
    """
    path = _text(row, columns.path)
    if not path:
        raise InputError(f"{columns.path!r} is empty; expected the path of an audio file")
    start, seconds = _segment(row, columns)
    name = _text(row, columns.id)
    if not name:
        told = columns.start is not None and row[columns.start] not in (None, "")
        name = f"{path}@{start!r}+{seconds!r}" if told else path
    return Entry(_text(row, columns.speaker), name, _located(path, base), start, seconds)


def _segment(row: Mapping[str, Any], columns: _Columns) -> tuple[float, float]:
    """Start and length in seconds; the length is NaN where only the audio tells."""
    start = _number(row, columns.start, columns.in_samples)
    stop = _number(row, columns.stop, columns.in_samples)
    seconds = _number(row, columns.seconds)
    begin = 0.0 if math.isnan(start) else start
    if seconds == 0:
        raise InputError(f"{columns.seconds!r} must be above 0")
    if columns.in_samples:
        rate = _number(row, columns.rate) if columns.rate else float(columns.default_rate or math.nan)
        if not rate > 0:
            raise InputError(f"{columns.rate!r} must be a rate in Hz above 0, got {row[columns.rate or '']!r}")
        begin, stop = begin / rate, stop / rate
    if math.isnan(stop):
        return begin, seconds
    if stop <= begin:
        raise InputError(f"the segment ends at {stop:g} s, not after its start at {begin:g} s")
    length = stop - begin
    # The wrong unit shows: seconds taken for samples are next to nothing, samples taken for seconds pass the end.
    if columns.in_samples and length < _ROUNDING_SECONDS:
        raise InputError(
            f"the segment has {round(length * rate)} samples; if these are seconds, name the columns start_seconds and "
            "stop_seconds"
        )
    # Beside a stop some toolkits tell the length of the segment, others that of the file.
    if stop > seconds + _ROUNDING_SECONDS and abs(length - seconds) > _ROUNDING_SECONDS:
        raise InputError(
            f"the segment ends at {stop:g} s, {columns.seconds!r} says {seconds:g} s; are the units right?"
        )
    return begin, length


def _text(row: Mapping[str, Any], key: str | None) -> str:
    value = row[key] if key is not None else None
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise InputError(f"{key!r} must be text, got {value!r}")
    if not value.isprintable():  # which costs less than to ask for each
        if "\0" in value:
            raise InputError(f"{key!r} holds a null character: {value!r}")
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            raise InputError(f"{key!r} holds half a character: {value!r}")
    return value.strip()


def _number(row: Mapping[str, Any], key: str | None, whole: bool = False) -> float:
    """A number at least 0; NaN where the manifest leaves it open."""
    value = row[key] if key is not None else None
    return math.nan if value is None or value == "" else _quantity(value, repr(key), whole)


def _quantity(value: Any, name: str, whole: bool = False) -> float:
    try:
        if isinstance(value, bool) or (isinstance(value, str) and "_" in value):  # 1_000 is Python, not a number
            raise ValueError
        number = float(value)
        if not 0 <= number < math.inf or (whole and not number.is_integer()):
            raise ValueError
    except (ValueError, TypeError, OverflowError):
        expected = "a whole number of samples" if whole else "a finite number"
        raise InputError(f"{name} must be {expected}, at least 0, got {value!r}") from None
    return number


def _positive(value: Any, name: str) -> float:
    number = _quantity(value, name)
    if number == 0:
        raise InputError(f"{name} must be above 0")
    return number


def _header(line: str) -> list[str]:
    return [field.strip().strip('"').lower() for field in line.split(_delimiter(line))]


def _delimiter(line: str) -> str:
    return max(",\t;", key=line.count)


def _read_table(name: str, base: str, warn: Warn, alone: bool) -> tuple[str, _Rows]:
    def rows() -> _Rows:
        lines = numbered_lines(name)
        first = next(lines, None)
        if first is None:
            return
        place = _Place(name)
        place.line, header = first
        delimiter = _delimiter(header)

        # The reader takes more than one line for a quoted field over several.
        def following() -> Iterator[str]:
            for place.line, line in lines:
                yield line

        with place:
            names = [field.strip() for field in next(csv.reader([header], delimiter=delimiter))]
            columns = _columns(names)
        try:
            for fields in csv.reader(following(), delimiter=delimiter, strict=True):
                with place:
                    if len(fields) != len(names):
                        raise InputError(f"expected {len(names)} columns as in the header, got {len(fields)}")
                    entry = _entry(dict(zip(names, fields, strict=True)), columns, base)
                yield place.line, entry
        except csv.Error as error:
            raise InputError(f"{name}:{place.line}: not a table ({error})") from error

    return name, rows()


def _read_json(name: str, base: str, warn: Warn, alone: bool) -> tuple[str, _Rows]:
    known: dict[tuple[str, ...], _Columns] = {}

    def entry(line: str) -> Entry:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"not a JSON object in one line ({error})") from None
        if not isinstance(row, dict):
            raise InputError(f"expected a JSON object, got {type(row).__name__}")
        if str(row.get("type", "")).endswith("Cut") or "recording" in row or "supervisions" in row or "tracks" in row:
            return _cut(row, base)
        if "sources" in row or "recording_id" in row:
            raise InputError("is a recording or a supervision of lhotse; give the cuts made of both")
        names = tuple(row)
        if names not in known:
            known[names] = _columns(names)
        return _entry(row, known[names], base)

    def rows() -> _Rows:
        place = _Place(name)
        for place.line, line in numbered_lines(name):
            with place:
                read = entry(line)
            yield place.line, read

    return name, rows()


def _cut(cut: dict[str, Any], base: str) -> Entry:
    """The utterance of a cut of lhotse.

    Raises:
        InputError: If it is not one speaker in one channel of one file as it is.
    """
    name = _text(cut, "id") if "id" in cut else ""
    kind = cut.get("type", "MonoCut")
    if kind != "MonoCut":
        raise InputError(
            f"the cut {name!r} is a {kind}; only MonoCut is read: write mixed or padded audio to files first"
        )
    recording = cut.get("recording")
    if not isinstance(recording, dict):
        raise InputError(f"the cut {name!r} has no recording, only features at most; cuts with audio are needed")
    sources = recording.get("sources")
    if not isinstance(sources, list) or len(sources) != 1 or not isinstance(sources[0], dict):
        raise InputError(f"the recording of the cut {name!r} must have one source, a file")
    if sources[0].get("type") != "file":
        raise InputError(f"the source of the cut {name!r} is of type {sources[0].get('type')!r}; only 'file' is read")
    channels = sources[0].get("channels")
    if not isinstance(channels, list) or len(channels) != 1:
        raise InputError(f"the audio of the cut {name!r} has channels {channels!r}; write the one wanted to a file")
    # Another rate changes no position in seconds; anything else changes the sound.
    changes = [
        change.get("name") if isinstance(change, dict) else change for change in recording.get("transforms") or []
    ]
    if set(changes) - {"Resample"}:
        raise InputError(
            f"the recording of the cut {name!r} is changed by {', '.join(map(str, changes))}; give the cuts before "
            "that, or write the changed audio to files"
        )
    supervisions = cut.get("supervisions") or []
    if not isinstance(supervisions, list) or not all(isinstance(one, dict) for one in supervisions):
        raise InputError(f"the supervisions of the cut {name!r} must be a list of objects")
    speakers = sorted({_text(one, "speaker") for one in supervisions if one.get("speaker") is not None})
    if len(speakers) > 1:
        raise InputError(f"the cut {name!r} has {len(speakers)} speakers: {', '.join(speakers)}; cut it at their turns")
    path = _text(sources[0], "source") if "source" in sources[0] else ""
    if not name or not path:
        raise InputError("the cut has no id or its source no path")
    start, seconds = _quantity(cut.get("start", 0), "'start'"), _positive(cut.get("duration"), "'duration'")
    return Entry(speakers[0] if speakers else "", name, _located(path, base), start, seconds)


def _pairs(file: str, form: str, repeats: bool = False) -> dict[str, tuple[int, str]]:
    """Lines ``key rest``: the rest and the number of the line, by key.

    Args:
        file: File.
        form: What the columns are, for messages.
        repeats: Whether a line may come again as it was.

    Raises:
        InputError: If a line has one column, or a key comes twice.
    """
    found: dict[str, tuple[int, str]] = {}
    for number, line in numbered_lines(file):
        fields = line.split(None, 1)
        if len(fields) != 2:
            raise InputError(f"{file}:{number}: expected 2 columns '{form}', got 1")
        key, rest = fields[0], fields[1].rstrip()
        first, before = found.setdefault(key, (number, rest))
        if first != number and not (repeats and before == rest):
            raise InputError(f"{file}:{number}: {key!r} is there twice, first in line {first}")
    if not found:
        raise InputError(f"{file}: the file is empty")
    return found


def _read_kaldi(folder: str, base: str, warn: Warn, alone: bool) -> tuple[str, _Rows]:
    scp, segments, durations = (os.path.join(folder, name) for name in ("wav.scp", "segments", "utt2dur"))
    audio = _pairs(scp, "recording path")
    speaker_of, told_in = _kaldi_speakers(folder)
    by_segment = os.path.isfile(segments)
    utterances = _pairs(segments, "utterance recording start end") if by_segment else audio
    for utterance, (line, _) in speaker_of.items():
        if utterance not in utterances:
            raise InputError(
                f"{told_in}:{line}: the utterance {utterance!r} has no audio; name it in "
                f"{segments if by_segment else scp}, or take it out here"
            )
    lengths = _pairs(durations, "utterance seconds") if os.path.isfile(durations) and not by_segment else {}

    in_segments, in_audio, in_durations = _Place(segments), _Place(scp), _Place(durations)

    def rows() -> _Rows:
        for utterance, (line, text) in utterances.items():
            recording, start, seconds = utterance, 0.0, math.nan
            if by_segment:
                in_segments.line = line
                with in_segments:
                    recording, start, seconds = _kaldi_segment(text)
                    if recording not in audio:
                        raise InputError(f"the recording {recording!r} is not in {scp}")
            elif utterance in lengths:
                in_durations.line, length = lengths[utterance]
                with in_durations:
                    seconds = _positive(length, "the length")
            in_audio.line, path = audio[recording]
            with in_audio:
                if _IN_ARCHIVE.search(path):
                    raise InputError(f"{path!r} is a place in an archive; write the audio to files (wav-copy)")
                path = _located(path, base)
            yield line, Entry(speaker_of.get(utterance, (0, ""))[1], utterance, path, start, seconds)

    return (segments if by_segment else scp), rows()


def _kaldi_segment(text: str) -> tuple[str, float, float]:
    """Recording, start and length in seconds of what follows the utterance in a line of ``segments``."""
    fields = text.split()
    if len(fields) != 3:
        raise InputError(f"expected 4 columns 'utterance recording start end', got {1 + len(fields)}")
    recording, first, last = fields
    start = _quantity(first, "the start")
    if last in ("-1", "-1.0"):  # Kaldi's word for the end of the recording
        return recording, start, math.nan
    end = _quantity(last, "the end")
    if end <= start:
        raise InputError(f"the segment ends at {end:g} s, not after its start at {start:g} s")
    return recording, start, end - start


def _kaldi_speakers(folder: str) -> tuple[dict[str, tuple[int, str]], str]:
    """Line and speaker of each utterance, and the file they come from: ``utt2spk``, else ``spk2utt``."""
    by_utterance, by_speaker = os.path.join(folder, "utt2spk"), os.path.join(folder, "spk2utt")
    told = _pairs(by_utterance, "utterance speaker") if os.path.isfile(by_utterance) else None
    for utterance, (line, speaker) in (told or {}).items():
        if len(speaker.split()) != 1:
            raise InputError(f"{by_utterance}:{line}: {utterance!r} has more than one speaker: {speaker!r}")
    if not os.path.isfile(by_speaker):
        return told or {}, by_utterance
    listed: dict[str, tuple[int, str]] = {}
    for line, text in numbered_lines(by_speaker):
        speaker, *utterances = text.split()
        if not utterances:
            raise InputError(f"{by_speaker}:{line}: empty speaker: {speaker!r} has no utterances; take the line out")
        for utterance in utterances:
            other = listed.setdefault(utterance, (line, speaker))[1]
            if told is not None:
                other = told.get(utterance, (0, "nobody"))[1]
            if other != speaker:
                raise InputError(
                    f"{by_speaker}:{line}: {utterance!r} is of {speaker!r} here, but of {other!r} in "
                    f"{by_speaker if told is None else by_utterance}"
                )
    return (listed, by_speaker) if told is None else (told, by_utterance)


def _scan(name: str, base: str, warn: Warn, alone: bool) -> tuple[str, _Rows]:
    from spkfast.data import folder

    found = folder.scan(name, warn)
    return name, (
        (number, Entry(utterance.speaker, utterance.path, base + utterance.path))
        for number, utterance in enumerate(found, start=1)
    )


def _read_shards(name: str, base: str, warn: Warn, alone: bool) -> tuple[str, _Rows]:
    return name, enumerate(_shards(name), start=1)


def _shards(name: str) -> Corpus:
    from spkfast.data.shards import read_index

    return read_index(Path(name))
