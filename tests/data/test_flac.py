"""The FLAC decoder: equal to libsndfile to the last bit, right about all that the format knows, safe with all else."""

from __future__ import annotations

import io
import itertools
import mmap
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from spkfast.data.flac import FlacFile, OtherDecoder, open_flac
from spkfast.errors import InputError
from tests import flac_writer as writer

soundfile = pytest.importorskip("soundfile")

EVERYTHING = 1 << 40
LENGTHS = (1, 15, 16, 17, 4095, 4096, 4097, 100000)


def written(samples: np.ndarray, level: int = 5, **options: object) -> bytes:
    """A FLAC file of libsndfile."""
    file = io.BytesIO()
    soundfile.write(file, samples, 16000, format="FLAC", subtype="PCM_16", compression_level=level / 8, **options)
    return file.getvalue()


def signals(length: int) -> dict[str, np.ndarray]:
    time = np.arange(length)
    rng = np.random.default_rng(length)
    floats = {
        "noise": rng.uniform(-32768, 32767, length),
        "quiet noise": rng.normal(0, 40, length),
        "silence": np.zeros(length),
        "sine": 20000 * np.sin(time * 0.05),
        "square": np.where(time // 50 % 2, 32767, -32768),
        "steps of 64": 64 * np.rint(100 * np.sin(time * 0.01)),
        "sines": 9000 * (np.sin(time * 0.031) + np.sin(time * 0.17) + np.sin(time * 1.3)) + rng.normal(0, 3, length),
    }
    return {name: values.astype(np.int16) for name, values in floats.items()}


def whole(data: bytes) -> np.ndarray:
    return FlacFile(data).read_int16(0, EVERYTHING)


def exact_or_told(data: bytes, samples: np.ndarray) -> bool:
    """Whether a damaged file is told; asserts that else it gives the samples."""
    try:
        found = whole(data)
    except (InputError, OtherDecoder):
        return True
    np.testing.assert_array_equal(found, samples)
    return False


@pytest.mark.parametrize("level", range(9))
@pytest.mark.parametrize("length", LENGTHS)
def test_equals_what_libsndfile_wrote(level: int, length: int) -> None:
    for name, samples in signals(length).items():
        flac = FlacFile(written(samples, level))
        assert (flac.frames, flac.sample_rate) == (length, 16000)
        found = flac.read_int16(0, length)
        assert found.dtype == np.int16
        np.testing.assert_array_equal(found, samples, err_msg=name)
        start = length * 2 // 3
        np.testing.assert_array_equal(flac.read_int16(start, 5000), samples[start : start + 5000], err_msg=name)


def test_equals_libsndfile_on_speech(speech: Path) -> None:
    rng = np.random.default_rng(0)
    paths = sorted(speech.rglob("*.flac"))
    assert len(paths) > 100
    for path in paths:
        samples, rate = soundfile.read(path, dtype="int16")
        with open_flac(path) as flac:
            assert (flac.frames, flac.sample_rate) == (len(samples), rate)
            for start, count in [(0, EVERYTHING), *rng.integers(0, [len(samples), 40000], (3, 2)).tolist()]:
                np.testing.assert_array_equal(
                    flac.read_int16(start, count), samples[start : start + count], err_msg=f"{path} {start} {count}"
                )


@pytest.fixture(scope="module")
def ramp() -> list[int]:
    return [(n * 977) % 65536 - 32768 for n in range(70)]


@pytest.fixture(params=["fixed", "variable", "libsndfile"])
def small(request: pytest.FixtureRequest, ramp: list[int]) -> tuple[bytes, np.ndarray]:
    """A small file of several frames, and its samples."""
    samples = np.array(ramp, dtype=np.int16)
    if request.param == "variable":
        return writer.stream(writer.in_blocks(ramp, [16, 1, 30, 2, 16, 5]), 70, blocks=(16, 30)), samples
    if request.param == "libsndfile":
        samples = signals(4096 + 20)["silence"]
        samples[::401] = 5
        return written(samples), samples
    blocks = [ramp[n : n + 16] for n in range(0, 70, 16)]
    frames = [writer.frame(len(block), k, writer.verbatim(block), rate_code=5) for k, block in enumerate(blocks)]
    return writer.stream(frames, 70), samples


@pytest.mark.parametrize("small", ["fixed", "variable"], indirect=True)
def test_every_part(small: tuple[bytes, np.ndarray], tmp_path: Path) -> None:
    data, samples = small
    (tmp_path / "small.flac").write_bytes(data)
    with open_flac(tmp_path / "small.flac") as on_disk:
        for flac in (FlacFile(data), on_disk):
            for start, count in itertools.product(range(73), range(73)):
                np.testing.assert_array_equal(flac.read_int16(start, count), samples[start : start + count])


def test_parts_outside_the_file(small: tuple[bytes, np.ndarray]) -> None:
    flac = FlacFile(small[0], "small.flac")
    assert flac.read_int16(1 << 62, 1 << 62).shape == (0,)
    assert flac.read_int16(3, -1).shape == (0,)
    with pytest.raises(InputError, match=re.escape("small.flac: start must be at least 0, got -1")):
        flac.read_int16(-1, 5)


def test_the_writer_of_these_tests_is_right(small: tuple[bytes, np.ndarray]) -> None:
    np.testing.assert_array_equal(soundfile.read(io.BytesIO(small[0]), dtype="int16")[0], small[1])


SPEECHLIKE = [int(v) for v in 3000 * np.sin(np.arange(192) * 0.11) + np.random.default_rng(3).normal(0, 90, 192)]
EVEN = [sample * 32 for sample in range(-96, 96)]
LOUD = [32767 if n // 3 % 2 else -32768 for n in range(192)]
LOW = [-32768] * 192
SUBFRAMES = {
    "constant": ([-32768] * 192, writer.constant(-32768)),
    "verbatim": (LOUD, writer.verbatim(LOUD)),
    **{f"fixed {order}": (SPEECHLIKE, writer.fixed(SPEECHLIKE, order)) for order in range(5)},
    **{f"fixed {order} loud": (LOUD, writer.fixed(LOUD, order, parameters=[17], method=1)) for order in range(5)},
    **{
        f"linear {order}": (SPEECHLIKE, writer.linear(SPEECHLIKE, [900 - 61 * k for k in range(order)], 9))
        for order in range(1, 33)
    },
    # 32 bits do not hold these sums.
    "wide": (LOUD, writer.linear(LOUD, [(-1) ** k * 16383 for k in range(32)], 14, parameters=[None])),
    "barely wide": (LOW, writer.linear(LOW, [*[-16384] * 4, -1], 15, parameters=[17], method=1)),
    "barely not wide": (LOW, writer.linear(LOW, [*[-16384] * 3, -16383], 15, parameters=[17], method=1)),
    "no shift": (LOUD, writer.linear(LOUD, [1, -1, 1], 0, precision=2, parameters=[13])),
    "escape": (SPEECHLIKE, writer.fixed(SPEECHLIKE, 1, parameters=[None])),
    "escape of no bits": ([7] * 192, writer.fixed([7] * 192, 1, parameters=[None] * 4)),
    "mixed": (SPEECHLIKE, writer.fixed(SPEECHLIKE, 2, parameters=[5, None, 7, 0], method=1)),
    "five bits": (SPEECHLIKE, writer.fixed(SPEECHLIKE, 2, parameters=[20, 30], method=1)),
    "parameter 0": (SPEECHLIKE, writer.fixed(SPEECHLIKE, 0, parameters=[0])),
    "partitions of 3": (SPEECHLIKE, writer.fixed(SPEECHLIKE, 3, parameters=[6] * 64)),
    "wasted": (EVEN, writer.fixed(EVEN, 2, wasted=5)),
    "all but one wasted": ([0, -32768] * 96, writer.fixed([0, -32768] * 96, 0, wasted=15)),
    "wasted linear": (EVEN, writer.linear(EVEN, [511, -3], 8, precision=10, wasted=5, parameters=[3, 12])),
}


@pytest.mark.parametrize("name", SUBFRAMES)
def test_subframes(name: str) -> None:
    samples, subframe = SUBFRAMES[name]
    # Twice: the second frame starts from what the first left behind.
    data = writer.stream([writer.frame(192, k, subframe) for k in range(2)], 384, blocks=(192, 192))
    np.testing.assert_array_equal(whole(data), samples * 2)
    np.testing.assert_array_equal(FlacFile(data).read_int16(200, 100), (samples * 2)[200:300])
    np.testing.assert_array_equal(soundfile.read(io.BytesIO(data), dtype="int16")[0], samples * 2)


CODES = {1: 192, **{n: 144 << n for n in range(2, 6)}, 6: 200, 7: 65535, **{n: 1 << n for n in range(8, 16)}}


@pytest.mark.parametrize("code", CODES)
def test_block_sizes(code: int) -> None:
    size = CODES[code]
    frames = [writer.frame(size, k, writer.constant(k), block_code=code) for k in range(3)]
    frames.append(writer.frame(1, 3, writer.constant(3)))
    flac = FlacFile(writer.stream(frames, 3 * size + 1, blocks=(size, size)))
    np.testing.assert_array_equal(flac.read_int16(0, EVERYTHING), np.repeat(range(4), [size, size, size, 1]))
    np.testing.assert_array_equal(flac.read_int16(2 * size - 1, 2), [1, 2])


def test_blocks_of_one_sample_and_long_numbers(ramp: list[int]) -> None:
    frames = [writer.frame(1, k, writer.verbatim([ramp[k % 70]])) for k in range(3000)]
    flac = FlacFile(writer.stream(frames, 3000, blocks=(1, 1)))
    for start in (0, 1, 127, 128, 2047, 2048, 2998):
        np.testing.assert_array_equal(flac.read_int16(start, 2), [ramp[start % 70], ramp[(start + 1) % 70]])
    # Sample numbers of up to 36 bits: silence, in many frames that the file does not hold, and these two.
    near_end = [writer.frame(65535, 65535 * k, writer.constant(k % 5), variable=True) for k in range(600)]
    flac = FlacFile(writer.stream(near_end, 65535 * 600, blocks=(16, 65535)))
    np.testing.assert_array_equal(flac.read_int16(65535 * 599 - 1, 2), [598 % 5, 599 % 5])


RATES = [88200, 176400, 192000, 8000, 16000, 22050, 24000, 32000, 44100, 48000, 96000]


@pytest.mark.parametrize(
    ("code", "rate", "extra"),
    [
        *((code, rate, b"") for code, rate in enumerate(RATES, start=1)),
        (12, 16000, b"\x10"),
        (13, 11025, b"\x2b\x11"),
        (14, 16000, b"\x06\x40"),
    ],
)
def test_sampling_rates(code: int, rate: int, extra: bytes) -> None:
    frame = writer.frame(16, 0, writer.constant(9), rate_code=code, rate=extra)
    assert FlacFile(writer.stream([frame], 16, rate=rate)).sample_rate == rate
    with pytest.raises(InputError, match="damaged frame at sample 0"):
        FlacFile(writer.stream([frame], 16, rate=rate + 1))


def test_other_metadata_is_passed_over(ramp: list[int]) -> None:
    frames = writer.in_blocks(ramp, [70])
    metadata = [(3, b"\xff" * 18), (1, bytes(9000)), (6, frames[0] * 2), (4, b"")]
    data = writer.stream(frames, 70, blocks=(16, 70), metadata=metadata)
    np.testing.assert_array_equal(whole(data), ramp)
    np.testing.assert_array_equal(FlacFile(data).read_int16(50, 9), ramp[50:59])


FRAME = writer.frame(16, 0, writer.constant(1))
OTHERS = {
    "it does not begin as a FLAC file": (b"RIFF" + bytes(100), b"", b"fLa", written(np.zeros(0, dtype=np.int16))),
    "2 channels of 16 bits": (writer.stream([FRAME], 16, channels=2),),
    "1 channels of 24 bits": (writer.stream([FRAME], 16, width=24),),
    "1 channels of 8 bits": (writer.stream([FRAME], 16, width=8),),
    "it does not say how long it is": (writer.stream([FRAME], 0),),
    "its blocks should be of one size, and are of several": (writer.stream([FRAME], 16, blocks=(16, 32)),),
}


@pytest.mark.parametrize("reason", OTHERS)
def test_files_for_another_decoder(reason: str) -> None:
    for data in OTHERS[reason]:
        with pytest.raises(OtherDecoder, match=re.escape(f"some.flac: {reason}")):
            FlacFile(data, "some.flac")


def test_ogg_is_for_another_decoder() -> None:
    file = io.BytesIO()
    soundfile.write(file, np.zeros(100), 16000, format="OGG")
    with pytest.raises(OtherDecoder):
        FlacFile(file.getvalue())


def test_every_cut_is_told_or_harmless(small: tuple[bytes, np.ndarray]) -> None:
    data, samples = small
    for end in range(len(data)):
        assert exact_or_told(data[:end], samples), end


def test_every_flipped_bit_is_told_or_harmless(small: tuple[bytes, np.ndarray]) -> None:
    data, samples = small
    told = 0
    for place, bit in itertools.product(range(len(data)), range(8)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << bit
        told += exact_or_told(bytes(damaged), samples)
    assert told > 8 * (len(data) - data.index(b"\xff")) * 0.99


def test_garbage() -> None:
    rng = np.random.default_rng(0)
    good = written(signals(9000)["sines"])
    for _ in range(300):
        with pytest.raises((InputError, OtherDecoder)):
            FlacFile(good[:46] + rng.bytes(int(rng.integers(2000)))).read_int16(0, 9000)
        damaged = np.frombuffer(good, dtype=np.uint8).copy()
        damaged[rng.integers(len(good), size=20)] = rng.integers(256, size=20)
        exact_or_told(damaged.tobytes(), signals(9000)["sines"])


def test_what_was_damaged_is_named_and_the_rest_is_read() -> None:
    samples = signals(100000)["noise"]
    data = bytearray(written(samples))
    data[len(data) // 2] ^= 4
    flac = FlacFile(bytes(data), "some.flac")
    with pytest.raises(InputError, match=r"^some.flac: damaged frame at sample (\d+)$") as caught:
        flac.read_int16(0, EVERYTHING)
    place = int(re.search(r"\d+$", str(caught.value))[0])
    assert place % 4096 == 0 and 40000 < place < 60000
    for start in (place, place + 4000, place - 10):
        with pytest.raises(InputError, match=f"damaged frame at sample {place}$"):
            flac.read_int16(start, 20)
    for start, count in ((0, place), (place + 4096, 30000)):
        np.testing.assert_array_equal(flac.read_int16(start, count), samples[start : start + count])


def test_a_cut_file_is_told_and_read_as_far_as_it_goes() -> None:
    samples = signals(100000)["noise"]
    data = written(samples)
    flac = FlacFile(data[: len(data) // 2], "some.flac")
    np.testing.assert_array_equal(flac.read_int16(20000, 9000), samples[20000:29000])
    with pytest.raises(InputError, match=r"^some.flac: cut off, or damaged, in the frame at sample 49152$"):
        flac.read_int16(30000, EVERYTHING)
    with pytest.raises(InputError, match="cut off"):
        flac.read_int16(90000, 10)
    with pytest.raises(InputError, match=r"some.flac: cut off in its header"):
        FlacFile(data[:30], "some.flac")


def test_a_header_that_says_less_or_far_more_than_there_is(ramp: list[int]) -> None:
    frames = writer.in_blocks(ramp, [16, 16, 16, 22])
    flac = FlacFile(writer.stream(frames, 48, blocks=(16, 22)))
    np.testing.assert_array_equal(flac.read_int16(3, 20), ramp[3:23])
    with pytest.raises(InputError, match="holds more samples than its header says"):
        flac.read_int16(3, 45)
    with pytest.raises(InputError, match="cut off, or its header is damaged"):
        FlacFile(writer.stream(frames, 1 << 35, blocks=(16, 22)))
    with pytest.raises(InputError, match="cut off"):
        FlacFile(writer.stream(frames, 71, blocks=(16, 22))).read_int16(60, EVERYTHING)


BAD = {
    "a bit that must be zero": "1" + writer.constant(1)[1:],
    **{f"kind {kind}": writer.head(kind) + "0" * 300 for kind in (*range(2, 8), *range(13, 32))},
    # But for what is named, all is right.
    "weights of 16 bits": writer.head(32) + "0" * 16 + "1111" + "00000" + "0" * 16 + "0" * 10 + "1" * 15,
    "a negative shift": writer.head(32) + "0" * 16 + "0110" + "10000" + "0" * 7 + "0" * 10 + "1" * 15,
    "method 2": writer.head(8) + "10" + "0000" + "00000" + "1" * 16,
    "method 3": writer.head(8) + "11" + "0000" + "00000" + "1" * 16,
    "partitions of half a sample": writer.head(8) + "00" + "0101" + "1" * 400,
    "partitions shorter than the order": writer.head(12) + "0" * 64 + "00" + "0011" + "1" * 400,
    "an order above the block": writer.head(63) + "0" * 2000,
    "no bits left": writer.head(0, wasted=16) + "0" * 32,
    "a sample of 17 bits": writer.fixed([32768] + [0] * 15, 0, parameters=[14]),
    "a wasted sample of 17 bits": writer.fixed([65536] + [0] * 15, 0, parameters=[14], wasted=1),
    "a residual of 33 bits": writer.head(8) + "01" + "0000" + "11110" + "0000" + "1" * 600,
    "ones that never end": writer.head(8) + "00" + "0000" + "0000" + "0" * 3000,
}


@pytest.mark.parametrize("name", BAD)
def test_what_the_format_forbids(name: str) -> None:
    frame = writer.frame(16, 1, BAD[name])
    following = writer.frame(16, 2, writer.constant(5))
    flac = FlacFile(writer.stream([FRAME, frame, following], 48))
    np.testing.assert_array_equal(flac.read_int16(0, 16), [1] * 16)
    np.testing.assert_array_equal(flac.read_int16(32, 16), [5] * 16)
    with pytest.raises(InputError, match=r"(damaged frame|cut off, or damaged, in the frame) at sample 16$"):
        flac.read_int16(16, 16)


@pytest.mark.parametrize(
    "options", [{"block_code": 0}, {"rate_code": 15}, {"channels": 8}, {"width_code": 3}, {"header_sum": 1}], ids=str
)
def test_what_the_format_forbids_in_headers(options: dict[str, int]) -> None:
    with pytest.raises(InputError, match="damaged frame at sample 0"):
        FlacFile(writer.stream([writer.frame(16, 0, writer.constant(1), **options)], 16))


@pytest.mark.parametrize("variable", [False, True])
@pytest.mark.parametrize("cut", [0, 2, 20])
def test_samples_that_look_like_frames(variable: bool, cut: int) -> None:
    """Verbatim samples that hold other frames of this file, whole or without their ends."""
    rng = np.random.default_rng(0)
    blocks = []
    for _ in range(40):
        inner = int(rng.integers(40))
        place = inner * 256 if variable else inner
        false = writer.frame(256, place, writer.constant(int(rng.integers(-9, 9))), variable=variable, block_code=8)
        hidden = (false[: len(false) - min(cut, len(false) - 1)] * 60)[:512].ljust(512, b"\1")
        blocks.append(np.frombuffer(hidden, dtype=">i2").tolist())
    frames = [
        writer.frame(256, k * 256 if variable else k, writer.verbatim(block), variable=variable, block_code=8)
        for k, block in enumerate(blocks)
    ]
    samples = np.concatenate(blocks)
    flac = FlacFile(writer.stream(frames, len(samples), blocks=(16, 256) if variable else (256, 256)))
    np.testing.assert_array_equal(flac.read_int16(0, EVERYTHING), samples)
    for start in range(0, len(samples), 97):
        np.testing.assert_array_equal(flac.read_int16(start, 30), samples[start : start + 30])


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="the system does not count what is read")
def test_a_crop_of_a_long_file_reads_a_small_part_of_it(tmp_path: Path) -> None:
    samples = signals(3_000_000)["noise"]
    path = tmp_path / "long.flac"
    path.write_bytes(written(samples))

    def bytes_read() -> int:
        return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])

    for start in (0, 1_234_567, 2_950_000):
        before = bytes_read()
        with open_flac(path) as flac:
            found = flac.read_int16(start, 32000)
        assert bytes_read() - before < 400_000 < path.stat().st_size / 10
        np.testing.assert_array_equal(found, samples[start : start + 32000])


def test_a_frame_larger_than_what_is_read_at_a_time(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).integers(-32768, 32767, 65535).tolist()
    frames = [writer.frame(65535, k, writer.verbatim(samples)) for k in range(3)]
    path = tmp_path / "large.flac"
    path.write_bytes(writer.stream(frames, 3 * 65535, blocks=(65535, 65535)))
    with open_flac(path) as flac:
        np.testing.assert_array_equal(flac.read_int16(65535 + 65000, 1000), samples[65000:] + samples[:465])


def test_a_part_of_a_file(small: tuple[bytes, np.ndarray], tmp_path: Path) -> None:
    data, samples = small
    path = tmp_path / "shard.tar"
    path.write_bytes(b"\xff\xf8" * 100 + data + data)
    with open_flac(path, 200, len(data)) as flac:
        np.testing.assert_array_equal(flac.read_int16(0, EVERYTHING), samples)
    np.testing.assert_array_equal(FlacFile(path.read_bytes(), "", 200).read_int16(5, 20), samples[5:25])
    with open_flac(path, 200, len(data) - 3) as flac, pytest.raises(InputError, match=r"shard.tar: cut off"):
        flac.read_int16(0, EVERYTHING)
    for offset, size in ((200, 1 << 40), (-1, 5), (5, -1), (1 << 40, None)):
        with pytest.raises(InputError, match=r"bytes -?\d+ to -?\d+ were asked for, and there are"):
            open_flac(path, offset, size)


def test_kinds_of_memory(small: tuple[bytes, np.ndarray], tmp_path: Path) -> None:
    data, samples = small
    (tmp_path / "a.flac").write_bytes(data)
    with open(tmp_path / "a.flac", "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    array = bytearray(data)
    for source in (data, array, memoryview(data), np.frombuffer(data, dtype=np.uint8), mapped):
        flac = FlacFile(source)
        np.testing.assert_array_equal(flac.read_int16(0, EVERYTHING), samples)
    flac = FlacFile(array)
    with pytest.raises(BufferError):
        array.clear()
    assert len(flac.read_int16(0, EVERYTHING)) == len(samples)
    with pytest.raises(TypeError):
        FlacFile("a.flac")  # type: ignore[arg-type]


def test_files_that_cannot_be_read(small: tuple[bytes, np.ndarray], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none.flac: cannot be opened \(No such file or directory\)"):
        open_flac(tmp_path / "none.flac")
    with pytest.raises(InputError, match="cannot be read"):
        open_flac(tmp_path)
    with pytest.raises(InputError, match="cannot be opened"):
        open_flac("a\0b")
    path = tmp_path / "a.flac"
    path.write_bytes(written(signals(100000)["noise"]))
    with open_flac(path) as flac:
        os.truncate(path, 50000)
        with pytest.raises(InputError, match=r"a.flac: cut off while it was read"):
            flac.read_int16(90000, 10)
    with pytest.raises(InputError, match=r"a.flac: the file is closed"):
        flac.read_int16(90000, 10)


def test_threads_may_share_a_file(tmp_path: Path) -> None:
    samples = signals(100000)["sines"]
    (tmp_path / "a.flac").write_bytes(written(samples))
    with open_flac(tmp_path / "a.flac") as flac, ThreadPoolExecutor(4) as pool:
        starts = np.random.default_rng(0).integers(0, 90000, 200).tolist()
        for start, found in zip(starts, pool.map(lambda start: flac.read_int16(start, 9000), starts), strict=True):
            np.testing.assert_array_equal(found, samples[start : start + 9000])
