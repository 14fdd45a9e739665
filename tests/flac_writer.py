"""Writes FLAC streams bit by bit, with all that the format knows and encoders leave out; a bit is a character."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

FIXED = ((), (1,), (2, -1), (3, -3, 1), (4, -6, 4, -1))


def number(value: int, width: int) -> str:
    """Bits of a number, two's complement."""
    return format(value & ((1 << width) - 1), f"0{width}b") if width else ""


def rice(value: int, parameter: int) -> str:
    """Bits of a residual."""
    folded = value * 2 if value >= 0 else -value * 2 - 1
    return "0" * (folded >> parameter) + "1" + number(folded, parameter)


def residuals(samples: Sequence[int], weights: Sequence[int], shift: int = 0) -> list[int]:
    """What the prediction leaves of all but the first samples."""
    order = len(weights)
    return [
        samples[n] - (sum(weight * samples[n - 1 - k] for k, weight in enumerate(weights)) >> shift)
        for n in range(order, len(samples))
    ]


def partitions(values: Sequence[int], order: int, parameters: Sequence[int | None], method: int = 0) -> str:
    """Bits of residuals in one partition for each parameter; None is an escape, ``order`` that of the predictor."""
    bits = number(method, 2) + number(len(parameters).bit_length() - 1, 4)
    size = (len(values) + order) // len(parameters)
    ends = [size * (k + 1) - order for k in range(len(parameters))]
    for begin, end, parameter in zip([0, *ends], ends, parameters, strict=False):
        part = values[begin:end]
        if parameter is None:
            width = max((max(value, ~value).bit_length() + 1 for value in part if value), default=0)
            bits += number(-1, 4 + method) + number(width, 5) + "".join(number(value, width) for value in part)
        else:
            bits += number(parameter, 4 + method) + "".join(rice(value, parameter) for value in part)
    return bits


def head(kind: int, wasted: int = 0) -> str:
    """Bits before a subframe."""
    return "0" + number(kind, 6) + ("1" + "0" * (wasted - 1) + "1" if wasted else "0")


def constant(value: int, width: int = 16) -> str:
    """A subframe of equal samples."""
    return head(0) + number(value, width)


def verbatim(samples: Iterable[int], width: int = 16) -> str:
    """A subframe of samples as they are."""
    return head(1) + "".join(number(sample, width) for sample in samples)


def fixed(
    samples: Sequence[int], order: int, *, parameters: Sequence[int | None] = (8,), method: int = 0, wasted: int = 0
) -> str:
    """A subframe with a fixed predictor; ``wasted`` bits of each sample are zero."""
    samples = [sample >> wasted for sample in samples]
    first = "".join(number(sample, 16 - wasted) for sample in samples[:order])
    return head(8 + order, wasted) + first + partitions(residuals(samples, FIXED[order]), order, parameters, method)


def linear(
    samples: Sequence[int],
    weights: Sequence[int],
    shift: int,
    *,
    precision: int = 15,
    parameters: Sequence[int | None] = (8,),
    method: int = 0,
    wasted: int = 0,
) -> str:
    """A subframe with a predictor of its own."""
    samples, order = [sample >> wasted for sample in samples], len(weights)
    bits = head(31 + order, wasted) + "".join(number(sample, 16 - wasted) for sample in samples[:order])
    bits += number(precision - 1, 4) + number(shift, 5) + "".join(number(weight, precision) for weight in weights)
    return bits + partitions(residuals(samples, weights, shift), order, parameters, method)


def coded(value: int) -> bytes:
    """A number as frames begin with, in the manner of UTF-8."""
    if value < 0x80:
        return bytes([value])
    length = next(length for length in range(2, 8) if value < 1 << (5 * length + 1))
    rest = [0x80 | value >> 6 * k & 0x3F for k in reversed(range(length - 1))]
    return bytes([0xFF00 >> length & 0xFF | value >> 6 * (length - 1), *rest])


def crc(data: bytes, polynomial: int, width: int) -> int:
    """Check sum of bytes."""
    value = 0
    for byte in data:
        value ^= byte << (width - 8)
        for _ in range(8):
            value = value << 1 ^ (polynomial if value >> (width - 1) else 0)
    return value


def frame(
    count: int,
    place: int,
    subframe: str,
    *,
    variable: bool = False,
    block_code: int = 7,
    rate_code: int = 0,
    rate: bytes = b"",
    channels: int = 0,
    width_code: int = 4,
    header_sum: int = 0,
) -> bytes:
    """A frame of ``count`` samples; ``place`` is its number, or that of its first sample where blocks are variable.

    ``header_sum`` is what its header's check sum is wrong by.
    """
    sizes = {6: 1, 7: 2}.get(block_code, 0)
    size = (count - 1).to_bytes(sizes, "big") if sizes else b""
    header = bytes([0xFF, 0xF8 | variable, block_code << 4 | rate_code, channels << 4 | width_code << 1])
    header += coded(place) + size + rate
    bits = subframe + "0" * (-len(subframe) % 8)
    data = (
        header
        + bytes([crc(header, 0x07 | 0x100, 8) ^ header_sum])
        + int("1" + bits, 2).to_bytes(len(bits) // 8 + 1, "big")[1:]
    )
    return data + crc(data, 0x8005 | 0x10000, 16).to_bytes(2, "big")


def stream(
    frames: Iterable[bytes],
    total: int,
    *,
    blocks: tuple[int, int] = (16, 16),
    rate: int = 16000,
    channels: int = 1,
    width: int = 16,
    metadata: Sequence[tuple[int, bytes]] = (),
) -> bytes:
    """A file; ``blocks`` are the fewest and most samples of a frame, ``metadata`` kinds and contents."""
    info = number(blocks[0], 16) + number(blocks[1], 16) + number(0, 48)
    info += number(rate, 20) + number(channels - 1, 3) + number(width - 1, 5) + number(total, 36) + number(0, 128)
    parts = [(0, int(info, 2).to_bytes(34, "big")), *metadata]
    data = b"fLaC"
    for k, (kind, content) in enumerate(parts):
        data += bytes([kind | (0x80 if k == len(parts) - 1 else 0)]) + len(content).to_bytes(3, "big") + content
    return data + b"".join(frames)


def in_blocks(samples: Sequence[int], sizes: Iterable[int]) -> list[bytes]:
    """Verbatim frames of variable size."""
    ends = list(itertools.accumulate(sizes))
    return [
        frame(end - begin, begin, verbatim(samples[begin:end]), variable=True)
        for begin, end in zip([0, *ends], ends, strict=False)
    ]
