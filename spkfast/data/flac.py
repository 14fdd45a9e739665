"""Crops of FLAC files of one channel and 16 bits, decoded several times as fast as by libsndfile."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from spkfast import backends
from spkfast.errors import InputError

if TYPE_CHECKING:
    from typing_extensions import Buffer


class OtherDecoder(Exception):
    """A file that is not for this decoder, and why: :func:`spkfast.data.audio.open_audio` takes it, or says more."""


class FlacFile:
    """A FLAC file of one channel and 16 bits, of which any part can be decoded alone.

    Damage is told, never decoded: every frame that is read has the check sum that it should have. Threads may share a
    file.

    Args:
        source: The bytes of a file, or the descriptor of an open one, which stays the caller's. A descriptor is read
            where samples are wanted, 64 KiB at a time, whatever its position.
        name: What messages call it.
        offset: First byte of the FLAC file in ``source``, where it is a part of another file.
        size: Its bytes; None for all from ``offset`` on.

    Attributes:
        name: What messages call it.
        frames: Samples.
        sample_rate: In Hz.

    Raises:
        OtherDecoder: If it is no FLAC file, has more channels or other samples, or does not say how long it is; or the
            compiled module is missing.
        InputError: If it is damaged or cut off, as far as its header tells.

    Reference: van Beurden and Weaver, "Free Lossless Audio Codec (FLAC)", RFC 9639, 2024.
    """

    def __init__(self, source: Buffer | int, name: str = "FLAC data", offset: int = 0, size: int | None = None) -> None:
        self.name = name
        try:
            flac = backends.compiled_module().Flac
        except InputError as error:
            raise OtherDecoder(str(error)) from error
        if isinstance(source, int):
            there = os.fstat(source).st_size
        else:
            source = memoryview(source).cast("B")
            there = source.nbytes
        size = there - offset if size is None else size
        if not 0 <= offset <= offset + size <= there:
            raise InputError(f"{name}: bytes {offset} to {offset + size} were asked for, and there are {there}")
        try:
            part = (source, offset, size) if isinstance(source, int) else (source[offset : offset + size],)
            self._flac: Any = flac(*part)
        except RuntimeError as error:
            raise InputError(f"{name}: {error}") from None
        if self._flac.unsupported:
            raise OtherDecoder(f"{name}: {self._flac.unsupported}")
        self.frames, self.sample_rate = int(self._flac.samples), int(self._flac.sample_rate)
        self._descriptor = -1  # to close

    def __enter__(self) -> FlacFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes what :func:`open_flac` opened; nothing can be read any more."""
        # The number of a closed descriptor becomes that of another file.
        self._flac = None
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def read_int16(self, start: int, num_samples: int) -> np.ndarray:
        """Samples ``[start, start + num_samples)``, int16, shape (S,); fewer where the file ends earlier.

        Raises:
            InputError: If ``start`` is negative, or the file is closed, or damaged or cut off there.
        """
        if start < 0:
            raise InputError(f"{self.name}: start must be at least 0, got {start}")
        if self._flac is None:
            raise InputError(f"{self.name}: the file is closed")
        start = min(start, self.frames)
        try:
            return np.asarray(self._flac.read(start, max(0, min(num_samples, self.frames - start))))
        except RuntimeError as error:
            raise InputError(f"{self.name}: {error}") from None


def open_flac(path: str | os.PathLike[str], offset: int = 0, size: int | None = None) -> FlacFile:
    """A FLAC file, or a part of a file that is one, open to decode parts of; for a ``with`` statement, which closes it.

    Args:
        path: The file.
        offset: As :class:`FlacFile`.
        size: As :class:`FlacFile`.

    Raises:
        OtherDecoder: As :class:`FlacFile`.
        InputError: If it cannot be opened, and as :class:`FlacFile`.
    """
    name = os.fsdecode(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (OSError, ValueError) as error:  # ValueError: no name that a file can have
        raise InputError(f"{name}: cannot be opened ({getattr(error, 'strerror', error)})") from error
    try:
        flac = FlacFile(descriptor, name, offset, size)
    except BaseException:
        os.close(descriptor)
        raise
    flac._descriptor = descriptor
    return flac
