"""Random FLAC files, whole and damaged: each gives its samples to the last bit or says what is wrong."""

from __future__ import annotations

import collections
import dataclasses
import tempfile

import numpy as np

from spkfast.data.flac import FlacFile, OtherDecoder
from spkfast.errors import InputError
from tests import flac_writer as writer

_LIMITS = np.iinfo(np.int16)


@dataclasses.dataclass
class Case:
    """One file.

    Attributes:
        data: Its bytes.
        samples: What it holds.
        parts: First samples and counts to read.
        kinds: Subframes of it.
        damage: What was done to the bytes. Where the check sums were made to fit it, nothing tells what the samples
            should be.
    """

    data: bytes
    samples: list[int]
    parts: list[tuple[int, int]]
    kinds: list[str]
    damage: str

    def __str__(self) -> str:
        return f"{len(self.data)} bytes, {len(self.samples)} samples in {self.kinds}, damage: {self.damage}"


def draw(rng: np.random.Generator) -> Case:
    """A case."""
    variable, count = bool(rng.random() < 0.5), int(rng.integers(1, 9))
    most = int(rng.choice([16, 48, 64, 192, 576]))
    sizes = [int(rng.integers(1, most + 1)) for _ in range(count)] if variable else [most] * (count - 1)
    if not variable:
        sizes.append(int(rng.integers(1, most + 1)))
    forged = bool(rng.random() < 0.2)
    samples: list[int] = []
    frames, kinds = [], []
    for place, size in enumerate(sizes):
        block, kind, bits = _subframe(rng, size)
        if forged:
            bits = _flipped(rng, bits)
        frames.append(writer.frame(size, len(samples) if variable else place, bits, variable=variable))
        samples += block
        kinds.append(kind)
    metadata = [(int(rng.integers(1, 127)), rng.bytes(int(rng.integers(60)))) for _ in range(rng.integers(3))]
    # Not the last frame's size alone: a file of one frame says the size that the others would have.
    data = writer.stream(frames, len(samples), blocks=(16 if variable else most, most), metadata=metadata)
    damage = "the sums were made to fit" if forged else "none"
    if not forged and rng.random() < 0.6:
        data, damage = _damaged(rng, data)
    parts = [(0, len(samples)), *(tuple(part) for part in rng.integers(0, len(samples) + 2, (4, 2)).tolist())]
    return Case(data, samples, parts, kinds, damage)


def check(case: Case) -> collections.Counter[str]:
    """Reads the parts of a file from memory of exactly its size, and from a file.

    Raises:
        AssertionError: If other samples came than the file holds.
    """
    counted: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryFile() as file:
        file.write(b"\xff" * 7 + case.data + b"\xff" * 9)
        file.flush()
        in_memory = np.frombuffer(case.data, dtype=np.uint8).copy()
        for source, offset in ((in_memory, 0), (file.fileno(), 7)):
            try:
                flac = FlacFile(source, "case", offset, len(case.data))
            except (InputError, OtherDecoder):
                assert case.damage != "none"
                counted["told"] += 1
                continue
            for start, count in case.parts:
                try:
                    found = flac.read_int16(start, count)
                except InputError as error:
                    assert case.damage != "none", error
                    counted["told"] += 1
                    continue
                # Behind the end that the header names, nothing is looked for.
                expected = case.samples[start : start + count] if start < flac.frames else []
                if case.damage != "the sums were made to fit":
                    assert found.tolist() == expected, (start, count)
                counted["compared"] += 1
    return counted


def _subframe(rng: np.random.Generator, size: int) -> tuple[list[int], str, str]:
    """Samples, what they are in words, and their bits."""
    wasted = int(rng.choice([0, 0, 0, 1, 4, 15]))
    low, high = _LIMITS.min >> wasted, _LIMITS.max >> wasted
    loudness = float(rng.choice([0, 1, 30, 1000, 1e9]))
    walk = np.cumsum(rng.normal(0, loudness, size)) if rng.random() < 0.7 else rng.normal(0, loudness, size)
    samples = (np.clip(np.rint(walk), low, high).astype(int) << wasted).tolist()
    kind = str(rng.choice(["constant", "verbatim", "fixed", "linear"], p=[0.1, 0.1, 0.3, 0.5]))
    if kind == "constant":
        return [samples[0]] * size, kind, writer.constant(samples[0])
    if kind == "verbatim":
        return samples, kind, writer.verbatim(samples)
    order = min(size, int(rng.integers(5) if kind == "fixed" else rng.integers(1, 33)))
    most = 1  # partitions
    while rng.random() < 0.6 and size % (2 * most) == 0 and size // (2 * most) >= order:
        most *= 2
    precision, shift = int(rng.integers(1, 16)), int(rng.integers(16))
    half = 1 << (precision - 1)
    weights = rng.integers(-half, half, order).tolist() if kind == "linear" else list(writer.FIXED[order])
    scaled = [sample >> wasted for sample in samples]
    rest = writer.residuals(scaled, weights, shift if kind == "linear" else 0)
    width = max((abs(value).bit_length() for value in rest), default=0)
    if width > 30:  # more than the format holds
        return samples, "verbatim", writer.verbatim(samples)
    # A parameter far below would write a book of zeros.
    parameters: list[int | None] = [
        None if rng.random() < 0.1 else int(np.clip(width + rng.integers(-5, 3), 0, 30)) for _ in range(most)
    ]
    method = 1 if rng.random() < 0.3 or any(parameter is not None and parameter > 14 for parameter in parameters) else 0
    words = f"{kind} {order}, {parameters}, method {method}, wasted {wasted}"
    if kind == "fixed":
        return samples, words, writer.fixed(samples, order, parameters=parameters, method=method, wasted=wasted)
    bits = writer.linear(
        samples, weights, shift, precision=precision, parameters=parameters, method=method, wasted=wasted
    )
    return samples, f"{words}, precision {precision}, shift {shift}", bits


def _flipped(rng: np.random.Generator, bits: str) -> str:
    # Mostly near the front, where all that is not a residual stands.
    for place in (rng.random(int(rng.integers(1, 4))) ** 3 * len(bits)).astype(int).tolist():
        bits = bits[:place] + ("1" if bits[place] == "0" else "0") + bits[place + 1 :]
    return bits if rng.random() < 0.8 else bits[: int(rng.integers(1, len(bits) + 1))]


def _damaged(rng: np.random.Generator, data: bytes) -> tuple[bytes, str]:
    place = int(rng.integers(len(data)))
    kind = int(rng.integers(5))
    if kind == 0:
        return data[:place], f"cut at {place}"
    if kind == 1:
        bit = int(rng.integers(8))
        return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :], f"bit {bit} of {place}"
    if kind == 2:
        garbage = rng.bytes(int(rng.integers(1, 40)))
        return data[:place] + garbage + data[place + len(garbage) :], f"garbage from {place} on"
    end = min(len(data), place + int(rng.integers(1, 200)))
    if kind == 3:
        return data[:place] + data[end:], f"without {place} to {end}"
    return data[:end] + data[place:end] + data[end:], f"{place} to {end} twice"
