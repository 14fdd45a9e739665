"""Reading audio: whole files or crops by partial decode, with errors that name the file."""

from __future__ import annotations

import io
import os
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Self

import numpy as np

from spkfast.data.flac import FlacFile, OtherDecoder, open_flac
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
    with open_audio(source) as audio:
        return audio.read(start, audio.frames if num_samples is None else num_samples), audio.sample_rate


class AudioFile(ABC):
    """An open audio file, of which any part can be decoded alone; for a ``with`` statement, which closes it.

    Attributes:
        name: Its path, for messages.
        frames: Samples of each channel.
        sample_rate: In Hz.
    """

    def __init__(self, name: str, frames: int, sample_rate: int) -> None:
        self.name, self.frames, self.sample_rate = name, frames, sample_rate

    def read(self, start: int, num_samples: int, channel: int | None = None) -> np.ndarray:
        """Samples ``[start, start + num_samples)``, averaged over channels, float32 in [-1, 1], shape (S,).

        Fewer come back where the file ends earlier. With ``channel`` that one alone is taken.

        Raises:
            InputError: If the file is cut off, or holds NaN or infinite samples there.
        """
        samples = self._floats(start, num_samples)
        if channel is None:
            channel = 0 if samples.shape[1] == 1 else None
        mono = samples.mean(axis=1) if channel is None else samples[:, channel]
        if not np.isfinite(mono).all():
            raise InputError(f"{self.name}: the file holds NaN or infinite samples")
        return np.ascontiguousarray(mono)

    def read_int16(self, start: int, num_samples: int) -> np.ndarray:
        """As :meth:`read`, int16: a 16-bit file of one channel gives exactly its numbers, others are rounded."""
        return to_int16(self.read(start, num_samples))

    @abstractmethod
    def _floats(self, start: int, num_samples: int) -> np.ndarray:
        """Samples of all channels, shape (S, C)."""

    @abstractmethod
    def close(self) -> None:
        """Closes the file."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Flac(AudioFile):
    """FLAC of one channel and 16 bits, by a decoder of ours."""

    def __init__(self, file: FlacFile) -> None:
        super().__init__(file.name, file.frames, file.sample_rate)
        self._file = file

    def read_int16(self, start: int, num_samples: int) -> np.ndarray:
        return self._file.read_int16(start, num_samples)

    def _floats(self, start: int, num_samples: int) -> np.ndarray:
        return self._file.read_int16(start, num_samples)[:, None] * np.float32(2**-15)

    def close(self) -> None:
        self._file.close()


class _Sndfile(AudioFile):
    """Everything else, by libsndfile."""

    def __init__(self, name: str, file: Any) -> None:
        super().__init__(name, int(file.frames), int(file.samplerate))
        self._file = file

    def read_int16(self, start: int, num_samples: int) -> np.ndarray:
        # libsndfile would cut what is finer than 16 bits short, and floats to -1, 0 and 1.
        if self._file.channels == 1 and self._file.subtype == "PCM_16":
            return np.asarray(self._decode(start, num_samples, "int16")[:, 0])
        return super().read_int16(start, num_samples)

    def _floats(self, start: int, num_samples: int) -> np.ndarray:
        return self._decode(start, num_samples, "float32")

    def close(self) -> None:
        self._file.close()

    def _decode(self, start: int, num_samples: int, dtype: str) -> np.ndarray:
        wanted = max(0, min(num_samples, self.frames - start))
        with _errors_name(self.name):
            self._file.seek(min(start, self.frames))
            samples = self._file.read(wanted, dtype=dtype, always_2d=True)
        if len(samples) < wanted:
            raise InputError(f"{self.name}: the file is cut off: {len(samples)} of {wanted} samples could be read")
        return np.asarray(samples)


def to_int16(samples: np.ndarray) -> np.ndarray:
    """Samples in [-1, 1] as 16-bit numbers, rounded to the nearest; louder ones are clipped."""
    return np.rint(samples * 32768).clip(-32768, 32767).astype(np.int16)


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
    with open_audio(path) as audio:
        return audio.frames, audio.sample_rate


def resample(samples: np.ndarray, rate_in: int, rate_out: int) -> np.ndarray:
    """Samples at another rate, by soxr at its high quality; unchanged where the rates agree."""
    if rate_in == rate_out:
        return samples
    import soxr

    return np.asarray(soxr.resample(samples, rate_in, rate_out), dtype=np.float32)


def open_audio(source: str | os.PathLike[str] | IO[bytes]) -> AudioFile:
    """A file of any format libsndfile reads, to decode parts of.

    Args:
        source: As :func:`read_audio`.

    Raises:
        InputError: If the file is missing, empty, not audio or, as far as the header tells, cut off.
    """
    name = _check_file(source)
    file = _opened_flac(source, name) or _opened_sndfile(source, name)
    if file.frames == 0:
        file.close()
        raise InputError(f"{name}: the file holds no samples")
    return file


def _opened_flac(source: Any, name: str) -> AudioFile | None:
    """FLAC that is for our decoder; named so, or in memory."""
    try:
        if isinstance(source, str | os.PathLike):
            return _Flac(open_flac(source)) if name.endswith(".flac") else None
        if isinstance(source, io.BytesIO) and source.getbuffer()[:4] == b"fLaC":
            return _Flac(FlacFile(source.getbuffer(), name))
    except OtherDecoder:
        pass
    return None


def _opened_sndfile(source: Any, name: str) -> AudioFile:
    import soundfile

    with _errors_name(name):
        # As bytes: a name need not be valid in any encoding.
        file = soundfile.SoundFile(os.fsencode(source) if isinstance(source, str | os.PathLike) else source)
    try:
        if file.frames > 1 << 48:
            raise InputError(f"{name}: the header does not say how long the file is; write the file anew")
        for declared, present in _SHORTENED.findall(file.extra_info):
            if int(present) < int(declared) < _UNKNOWN_SIZE:
                raise InputError(f"{name}: the file is cut off: {present} of {declared} bytes of sound are there")
    except BaseException:
        file.close()
        raise
    return _Sndfile(name, file)


@contextmanager
def _errors_name(name: str) -> Iterator[None]:
    import soundfile

    try:
        yield
    except (soundfile.SoundFileError, RuntimeError, TypeError) as error:
        raise InputError(f"{name}: not an audio file, or a damaged one ({_reason(error)})") from error


def _check_file(source: Any) -> str:
    if not isinstance(source, str | os.PathLike):
        return str(getattr(source, "name", "audio stream"))
    try:
        status = os.stat(source)
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: no name that a file can have
        raise InputError(f"{source}: no such file") from error
    except OSError as error:
        raise InputError(f"{source}: cannot be opened ({error.strerror})") from error
    if stat.S_ISDIR(status.st_mode):
        raise InputError(f"{source}: is a folder, not an audio file")
    if status.st_size == 0:
        raise InputError(f"{source}: the file is empty (0 bytes)")
    return str(source)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text.rsplit(": ", 1)[-1].rstrip(".") if ": " in text else text
