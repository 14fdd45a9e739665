"""Reading audio: whole files or crops by partial decode, with errors that name the file."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from spkfast.errors import InputError

AUDIO_SUFFIXES = (".flac", ".wav", ".ogg", ".mp3", ".aiff", ".opus")

# libsndfile shortens a WAV, AIFF or AU file to what is there and says so in its log alone.
_SHORTENED = re.compile(r"^\s*(?:data|SSND|Data Size)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)
# Programs that write to a pipe do not know the size, and put a value from here upwards in its place.
_UNKNOWN_SIZE = 0x7FFFF000


def read_audio(
    source: str | os.PathLike[str] | IO[bytes], start: int = 0, num_samples: int | None = None
) -> tuple[np.ndarray, int]:
    """Samples ``[start, start + num_samples)`` of a file, decoded alone.

    Args:
        source: Path or binary file object of any format libsndfile reads.
        start: First sample.
        num_samples: Samples to read; None reads to the end. Fewer come back where the file ends earlier.

    Returns:
        Mono float32 samples in [-1, 1], shape (S,) (channels are averaged), and the sampling rate in Hz.

    Raises:
        InputError: If the file is missing, empty, not audio, holds NaN or infinite samples, or is cut off. Ogg and MP3
            do not say how long they should be: a cut file is read as far as it goes.
    """
    with _opened(source) as (name, file):
        return _read(name, file, start, file.frames if num_samples is None else num_samples)


def read_random_part(
    path: str | os.PathLike[str], num_samples: Callable[[int], int], rng: np.random.Generator
) -> tuple[np.ndarray, int]:
    """A part of a file, its start drawn uniformly, decoded alone; the whole file where it is shorter.

    Args:
        path: As :func:`read_audio`.
        num_samples: Samples to read, of the file's rate in Hz.
        rng: Draws the start.

    Returns:
        As :func:`read_audio`.

    Raises:
        InputError: As :func:`read_audio`.
    """
    with _opened(path) as (name, file):
        wanted = num_samples(int(file.samplerate))
        start = int(rng.integers(max(1, file.frames - wanted + 1)))
        return _read(name, file, start, wanted)


def audio_files(folder: str | os.PathLike[str]) -> list[Path]:
    """Audio files anywhere below a folder, linked folders included, sorted.

    Raises:
        InputError: If there are none.
    """
    files: list[Path] = []
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(place) in seen:  # a link that leads back up
            folders.clear()
            continue
        seen.add(os.path.realpath(place))
        files += [Path(place, name) for name in names if Path(name).suffix.lower() in AUDIO_SUFFIXES]
    files = sorted(path for path in files if path.is_file())
    if not files:
        raise InputError(f"{folder}: no audio files in this folder")
    return files


def audio_info(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Samples and sampling rate in Hz, from the header alone.

    Raises:
        InputError: If the file is missing, empty, not audio or, as far as the header tells, cut off.
    """
    with _opened(path) as (_, file):
        return int(file.frames), int(file.samplerate)


def resample(samples: np.ndarray, rate_in: int, rate_out: int) -> np.ndarray:
    """Samples at another rate, by soxr at its high quality; unchanged where the rates agree."""
    if rate_in == rate_out:
        return samples
    import soxr

    return np.asarray(soxr.resample(samples, rate_in, rate_out), dtype=np.float32)


def _read(name: str, file: Any, start: int, num_samples: int) -> tuple[np.ndarray, int]:
    wanted = max(0, min(num_samples, file.frames - start))
    file.seek(min(start, file.frames))
    samples = file.read(wanted, dtype="float32", always_2d=True)
    if len(samples) < wanted:
        raise InputError(f"{name}: the file is cut off: {len(samples)} of {wanted} samples could be read")
    mono = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)
    if not np.isfinite(mono).all():
        raise InputError(f"{name}: the file holds NaN or infinite samples")
    return np.ascontiguousarray(mono), int(file.samplerate)


@contextmanager
def _opened(source: Any) -> Iterator[tuple[str, Any]]:
    import soundfile

    name = _check_file(source)
    try:
        # As bytes: a name need not be valid in any encoding.
        named = isinstance(source, str | os.PathLike)
        with soundfile.SoundFile(os.fsencode(source) if named else source) as file:
            if file.frames == 0:
                raise InputError(f"{name}: the file holds no samples")
            if file.frames > 1 << 48:
                raise InputError(f"{name}: the header does not say how long the file is; write the file anew")
            for declared, present in _SHORTENED.findall(file.extra_info):
                if int(present) < int(declared) < _UNKNOWN_SIZE:
                    raise InputError(f"{name}: the file is cut off: {present} of {declared} bytes of sound are there")
            yield name, file
    except (soundfile.SoundFileError, RuntimeError, TypeError) as error:
        raise InputError(f"{name}: not an audio file, or a damaged one ({_reason(error)})") from error


def _check_file(source: Any) -> str:
    if not isinstance(source, str | os.PathLike):
        return str(getattr(source, "name", "audio stream"))
    path = Path(source)
    if not path.exists():
        raise InputError(f"{path}: no such file")
    if path.is_dir():
        raise InputError(f"{path}: is a folder, not an audio file")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty (0 bytes)")
    return str(path)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text.rsplit(": ", 1)[-1].rstrip(".") if ": " in text else text
