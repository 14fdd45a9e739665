"""Reading audio: what comes back, and what is said of files that cannot be read."""

import io
import os
import shutil

import numpy as np
import pytest
import soundfile

from spkfast.data.audio import audio_files, audio_info, read_audio, resample
from spkfast.errors import InputError

RATE = 16000


def noise(num_samples=RATE, channels=None, seed=0):
    shape = num_samples if channels is None else (num_samples, channels)
    return 0.1 * np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("suffix", ["flac", "wav", "aiff"])
def test_reads_whole_files_and_crops(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, noise(), RATE)
    samples, rate = read_audio(path)
    assert rate == RATE and samples.dtype == np.float32 and samples.flags.c_contiguous
    np.testing.assert_allclose(samples, noise(), atol=1 / 32768)
    for start, count in ((0, 100), (777, 5000), (RATE - 10, 10)):
        np.testing.assert_array_equal(read_audio(path, start, count)[0], samples[start : start + count])
    assert len(read_audio(path, RATE - 10, 100)[0]) == 10
    assert len(read_audio(path, 2 * RATE, 100)[0]) == 0
    assert audio_info(path) == (RATE, RATE)


def test_averages_channels_and_takes_streams(tmp_path):
    path = tmp_path / "stereo.wav"
    soundfile.write(path, noise(channels=2), 8000, subtype="FLOAT")
    mono, rate = read_audio(path)
    assert rate == 8000 and mono.flags.c_contiguous
    np.testing.assert_allclose(mono, noise(channels=2).mean(axis=1), atol=1e-7)
    with open(path, "rb") as file:
        np.testing.assert_array_equal(read_audio(file)[0], mono)
    np.testing.assert_array_equal(read_audio(io.BytesIO(path.read_bytes()))[0], mono)


def test_resamples():
    time = np.arange(8000) / 8000
    got = resample(np.sin(2 * np.pi * 440 * time).astype(np.float32), 8000, 16000)
    want = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert got.dtype == np.float32 and len(got) == 16000
    np.testing.assert_allclose(got[500:-500], want[500:-500], atol=1e-3)  # the ends ring
    same = noise().astype(np.float32)
    assert resample(same, RATE, RATE) is same


def check(source, message):
    for read in (read_audio, audio_info) if not hasattr(source, "read") else (read_audio,):
        with pytest.raises(InputError, match=message) as caught:
            read(source)
        assert "\n" not in str(caught.value)


def test_unreadable_files(tmp_path):
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "text.wav").write_text("not audio\n" * 100)
    soundfile.write(tmp_path / "none.wav", np.zeros(0), RATE)
    check(tmp_path / "missing.wav", r"missing\.wav: no such file")
    check(tmp_path, "is a folder, not an audio file")
    check(tmp_path / "empty.wav", r"empty\.wav: the file is empty \(0 bytes\)")
    check(tmp_path / "text.wav", r"text\.wav: not an audio file, or a damaged one")
    check(tmp_path / "none.wav", r"none\.wav: the file holds no samples")
    check(io.BytesIO(b"not audio at all"), "audio stream: not an audio file")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_no_numbers(tmp_path, value):
    path = tmp_path / "nan.wav"
    samples = noise()
    samples[9000] = value
    soundfile.write(path, samples, RATE, subtype="FLOAT")
    with pytest.raises(InputError, match=r"nan\.wav: the file holds NaN or infinite samples"):
        read_audio(path)
    assert len(read_audio(path, 0, 9000)[0]) == 9000


@pytest.mark.parametrize("suffix", ["wav", "aiff", "au"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
def test_cut_files_with_a_size_in_the_header(tmp_path, suffix, share):
    path = tmp_path / f"cut.{suffix}"
    soundfile.write(path, noise(), RATE, subtype="PCM_16")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    check(path, rf"cut\.{suffix}: the file is cut off: \d+ of \d+ bytes of sound are there")


@pytest.mark.parametrize("share", [0.001, 0.01, 0.5, 0.97])
def test_cut_flac(tmp_path, share):
    path = tmp_path / "cut.flac"
    soundfile.write(path, noise(), RATE)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(InputError, match=r"cut\.flac: .*cut off"):
        read_audio(path)


def test_sizes_unknown_to_the_writer(tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, noise(), RATE)
    whole, _ = read_audio(path)
    header = bytearray(path.read_bytes())
    data = header.index(b"data") + 4
    header[4:8] = header[data : data + 4] = b"\xff\xff\xff\xff"  # a WAV written to a pipe
    path.write_bytes(header)
    np.testing.assert_array_equal(read_audio(path)[0], whole)

    path = tmp_path / "a.flac"
    soundfile.write(path, noise(), RATE)
    header = bytearray(path.read_bytes())
    header[21] &= 0xF0
    header[22:26] = bytes(4)  # the 36 bits of STREAMINFO that count the samples
    path.write_bytes(header)
    check(path, r"a\.flac: the header does not say how long the file is")


def test_real_speech(speech, tmp_path):
    path = speech / (speech / "trials.txt").read_text().split()[1]
    samples, rate = read_audio(path)
    assert rate == 16000 and audio_info(path) == (len(samples), 16000)
    assert 0.01 < np.abs(samples).max() <= 1
    copy = shutil.copy(path, tmp_path / "copy.flac")
    copy.write_bytes(copy.read_bytes()[:-2000])
    with pytest.raises(InputError, match=r"copy\.flac"):
        read_audio(copy)


def test_audio_files_follows_links_and_takes_any_name(tmp_path):
    real = tmp_path / "real"
    (real / "a").mkdir(parents=True)
    soundfile.write(tmp_path / "x.wav", np.zeros(800), 16000)
    odd = real / "a" / os.fsdecode(b"l\xe9.wav")
    (tmp_path / "x.wav").rename(odd)
    (real / "a" / "loop").symlink_to(real)
    (real / "a" / "text.txt").touch()
    linked = tmp_path / "corpus"
    linked.mkdir()
    (linked / "s").symlink_to(real)
    assert audio_files(linked) == [linked / "s" / "a" / odd.name]
    assert read_audio(odd)[0].shape == (800,)
