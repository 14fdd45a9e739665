"""StreamingFbank and NumpyFbank: the op to the last bit, in whatever pieces; what they keep, what they refuse."""

from __future__ import annotations

import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

import spkfast
from spkfast import FrontendSpec
from spkfast.functional import log_mel_fbank

PRESETS = (
    "kaldi", "wespeaker", "3dspeaker", "speechbrain", "taoruijie", "clova_l", "clova_v2", "vgg", "thin", "redimnet",
    "redimnet2", "titanet", "mfcc",
)  # fmt: skip
LOCAL: dict[str, Any] = {"mean_norm": False, "std_norm": False, "top_db": None, "waveform_norm": "none"}
# Where frames lie: as in the preset, and in the other ways that there are.
PLACES: list[dict[str, Any]] = [
    {},
    {"snip_edges": False, "center": False},
    {"snip_edges": True, "center": False},
    {"center": True, "pad_mode": "reflect", "drop_last_frame": True},
    {"snip_edges": True, "center": False, "pad_samples": 1000, "pad_mode": "reflect"},
    {"snip_edges": True, "center": False, "frame_shift_ms": 40.0},
    {"snip_edges": False, "center": False, "frame_shift_ms": 40.0},
]
LENGTHS = (0, 1, 2, 79, 80, 150, 200, 201, 256, 257, 399, 400, 401, 1000, 1003, 5003)


def local(preset: str, **fields: Any) -> FrontendSpec:
    return FrontendSpec.from_dict({**spkfast.frontend(preset).to_dict(), **LOCAL, **fields})


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def offline(spec: FrontendSpec, samples: np.ndarray) -> np.ndarray:
    features, frames = log_mel_fbank(torch.from_numpy(samples)[None], spec=spec, backend="native")
    return features[0, : int(frames)].numpy()


def pieces(samples: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Cut anywhere, some of it in pieces of nothing and of one sample."""
    found, at = [], 0
    while at < len(samples):
        size = int(rng.choice([0, 1, 7, 160, 333, 1600]))
        found.append(samples[at : at + size])
        at += size
    return found


def streamed(stream: Any, parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([*(stream.push(part) for part in parts), stream.flush()])


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_is_the_op_to_the_last_bit(preset: str, place: dict[str, Any]) -> None:
    spec, rng = local(preset, **place), np.random.default_rng(0)
    stream = spkfast.StreamingFbank(spec)
    for seed, length in enumerate(LENGTHS):  # one utterance after another
        samples = noise(length, seed)
        got = streamed(stream, pieces(samples, rng))
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, offline(spec, samples), err_msg=f"{length} samples")


@pytest.mark.parametrize("level", ["scalar", "avx2", "avx512"])
def test_is_the_op_at_every_cpu_level(monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    levels = ["scalar", "avx2", "avx512", "avx512bf16"]
    has = spkfast.info()["cpu"]["level"]
    if levels.index(has) < levels.index(level):
        pytest.skip(f"this CPU has {has}")
    monkeypatch.setenv("SPKFAST_CPU_LEVEL", level)
    for preset in PRESETS:
        spec, samples = local(preset), noise(5003)
        got = streamed(spkfast.StreamingFbank(spec), pieces(samples, np.random.default_rng(1)))
        np.testing.assert_array_equal(got, offline(spec, samples))


@pytest.mark.parametrize("preset", ["kaldi", "speechbrain", "taoruijie"])
def test_sample_by_sample(preset: str) -> None:
    spec, samples = local(preset), noise(1203)
    got = streamed(spkfast.StreamingFbank(spec), list(samples[:, None]))
    np.testing.assert_array_equal(got, offline(spec, samples))


def test_frames_come_as_soon_as_their_last_sample() -> None:
    stream = spkfast.StreamingFbank(spkfast.frontend("kaldi"))
    sizes = [len(stream.push(noise(n))) for n in (399, 1, 159, 1, 320, 0)]
    assert sizes == [0, 1, 0, 1, 2, 0]
    assert stream.push(noise(0)).shape == (0, 80)
    assert stream.flush().shape == (0, 80)
    # The first frame is 200 samples of reflection, which end on sample 200; the second one begins 40 before the start.
    stream = spkfast.StreamingFbank(local("taoruijie"))
    sizes = [len(stream.push(noise(n))) for n in (200, 1, 158, 1)]
    assert sizes == [0, 1, 0, 1]
    assert len(stream.flush()) == 1


@pytest.mark.parametrize("preset", ["kaldi", "thin", "titanet"])
def test_int16_is_divided_by_32768(preset: str) -> None:
    spec = local(preset)
    samples = np.random.default_rng(0).integers(-32768, 32768, 3001).astype(np.int16)
    stream, rng = spkfast.StreamingFbank(spec), np.random.default_rng(2)
    got = streamed(stream, pieces(samples, rng))
    np.testing.assert_array_equal(got, streamed(stream, pieces(samples.astype(np.float32) / 32768, rng)))
    np.testing.assert_array_equal(got, offline(spec, samples))


def test_other_containers() -> None:
    spec, samples = spkfast.frontend("kaldi"), noise(2000)
    stream, want = spkfast.StreamingFbank(spec), offline(spec, noise(2000))
    strided = np.repeat(samples, 2)[::2]
    big_endian = samples.astype(">f4")
    for same in (samples.astype(np.float64), torch.from_numpy(samples), samples.tolist(), strided, big_endian):
        np.testing.assert_array_equal(np.concatenate([stream.push(same), stream.flush()]), want)
    shorts = (samples * 32767).astype(np.int16)
    got = np.concatenate([stream.push(np.repeat(shorts, 2)[::2]), stream.flush()])
    np.testing.assert_array_equal(got, offline(spec, shorts))


def test_what_was_given_out_stays() -> None:
    stream, samples = spkfast.StreamingFbank(spkfast.frontend("kaldi")), noise(1600)
    first = stream.push(samples)
    kept = first.copy()
    samples[:] = 0
    stream.push(samples)
    np.testing.assert_array_equal(first, kept)


def test_reset_forgets() -> None:
    spec = local("taoruijie")
    stream, samples = spkfast.StreamingFbank(spec), noise(3000)
    stream.push(noise(777, 5))
    stream.reset()
    np.testing.assert_array_equal(streamed(stream, [samples]), offline(spec, samples))
    stream.reset()
    assert len(stream.flush()) == 0


def test_dither_is_left_out() -> None:
    spec, samples = local("titanet", dither=1.0), noise(3000)
    got = streamed(spkfast.StreamingFbank(spec), [samples])
    np.testing.assert_array_equal(got, offline(local("titanet", dither=0.0), samples))


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"mean_norm": True}, "mean_norm"),
        ({"std_norm": True}, "std_norm"),
        ({"top_db": 80.0}, "top_db"),
        ({"waveform_norm": "mean_std"}, "waveform_norm"),
        (
            {"mean_norm": True, "std_norm": True, "top_db": 80.0, "waveform_norm": "instance"},
            "mean_norm, std_norm, top_db, waveform_norm",
        ),
    ],
)
def test_refuses_what_needs_the_whole_utterance(fields: dict[str, Any], names: str) -> None:
    with pytest.raises(spkfast.InputError, match=f"a stream cannot compute what needs the whole utterance: {names}$"):
        spkfast.StreamingFbank(spkfast.frontend("kaldi", **fields))


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.zeros((1, 400), np.float32), "samples must have one dimension, got 2"),
        (np.float32(0), "samples must have one dimension, got 0"),
        (np.zeros(400, np.int32), "samples must be an array of floats or of int16"),
        (np.zeros(400, np.uint16), "samples must be an array of floats or of int16"),
        (np.zeros(400, bool), "samples must be an array of floats or of int16"),
        (np.zeros(400, complex), "samples must be an array of floats or of int16"),
        ("audio", "samples must be an array of floats or of int16"),
        (None, "samples must be an array of floats or of int16"),
    ],
    ids=str,
)
def test_refuses_other_samples(samples: Any, message: str) -> None:
    spec = spkfast.frontend("kaldi")
    stream = spkfast.StreamingFbank(spec)
    stream.push(noise(300))
    with pytest.raises(spkfast.InputError, match=message):
        stream.push(samples)
    # Nothing of it has entered the stream.
    got = np.concatenate([stream.push(noise(900)), stream.flush()])
    np.testing.assert_array_equal(got, offline(spec, np.concatenate([noise(300), noise(900)])))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_bad_samples_start_the_stream_again(value: float) -> None:
    spec = local("taoruijie")
    stream, dirty = spkfast.StreamingFbank(spec), noise(1000)
    dirty[500] = value
    message = "samples hold a NaN or infinite value: mend or drop that audio; the stream starts again"
    with pytest.raises(spkfast.InputError, match=message):
        stream.push(dirty)
    np.testing.assert_array_equal(streamed(stream, [noise(2000)]), offline(spec, noise(2000)))
    # Also where the last frame alone holds it.
    dirty = noise(1001)
    dirty[1000] = value
    stream.push(dirty)
    with pytest.raises(spkfast.InputError, match=message):
        stream.flush()
    np.testing.assert_array_equal(streamed(stream, [noise(2000)]), offline(spec, noise(2000)))


def test_unknown_cpu_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPKFAST_CPU_LEVEL", "sse9")
    with pytest.raises(ValueError, match="SPKFAST_CPU_LEVEL must be scalar"):
        spkfast.StreamingFbank(spkfast.frontend("kaldi"))


def test_without_the_compiled_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spkfast._C", None)
    with pytest.raises(spkfast.InputError, match=r"the module spkfast\._C cannot be imported"):
        spkfast.StreamingFbank(spkfast.frontend("kaldi"))


@pytest.mark.parametrize("preset", PRESETS)
def test_whole_arrays_are_the_op_to_the_last_bit(preset: str) -> None:
    spec = spkfast.frontend(preset)
    fbank = spkfast.NumpyFbank(spec)
    for length in LENGTHS:
        samples = noise(length)
        shorts = (samples * 32767).astype(np.int16)
        for values in (samples, shorts):
            features, _ = log_mel_fbank(torch.from_numpy(values)[None], spec=spec, backend="native")
            # Of no samples the op's T counts a frame of padding where a longer row of the batch would have one.
            np.testing.assert_array_equal(fbank(values), features[0].numpy())


def test_whole_arrays_refuse_what_streams_refuse() -> None:
    fbank, dirty = spkfast.NumpyFbank(spkfast.frontend("wespeaker")), noise(1000)
    dirty[990] = np.nan  # in no frame
    with pytest.raises(spkfast.InputError, match="NaN or infinite value"):
        fbank(dirty)
    with pytest.raises(spkfast.InputError, match="samples must have one dimension, got 2"):
        fbank(dirty[None])
    with pytest.raises(spkfast.InputError, match="samples must be an array of floats or of int16"):
        fbank(np.zeros(1000, np.int32))


# In a process of its own, whose highest memory is that of this work alone.
_HOUR = """
import resource, sys
import numpy as np
import spkfast

second = np.zeros(16000, np.float32)
stream = spkfast.StreamingFbank(spkfast.frontend("kaldi", snip_edges=False))
frames = sum(len(stream.push(second)) for _ in range(60))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
frames += sum(len(stream.push(second)) for _ in range(3540)) + len(stream.flush())
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(frames, after - before, "torch" in sys.modules)
"""


def test_an_hour_takes_the_memory_of_a_minute_and_no_torch(tmp_path: Any) -> None:
    pytest.importorskip("resource")
    result = subprocess.run([sys.executable, "-c", _HOUR], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    frames, grown, torch_loaded = result.stdout.split()
    assert frames == "360000" and torch_loaded == "False"
    # An hour of samples is 225,000 kB.
    assert int(grown) < (10000 if sys.platform == "linux" else 10000 * 1024)


def test_copies_and_types() -> None:
    fbank, samples = spkfast.NumpyFbank(spkfast.frontend("kaldi")), noise(1000)
    again = pickle.loads(pickle.dumps(fbank))
    np.testing.assert_array_equal(again(samples), fbank(samples))
    assert fbank.spec.hash in repr(fbank)
    shorts = (samples * 32767).astype(np.int16)
    np.testing.assert_array_equal(fbank(shorts.astype(">i2")), fbank(shorts))
    with pytest.raises(spkfast.InputError, match="an array of floats or of int16, got int32"):
        fbank(shorts.astype(np.int32))
    with pytest.raises(spkfast.InputError, match="a stream cannot be copied or pickled"):
        pickle.dumps(spkfast.StreamingFbank(spkfast.frontend("kaldi")))


def test_frames_over_zeros_wait_for_no_reflection() -> None:
    stream = spkfast.StreamingFbank(spkfast.frontend("kaldi", pad_samples=1000, pad_mode="constant"))
    # Frames end at 400 + 160 t - 1000 of the signal: eight of them by sample 520.
    assert len(stream.push(noise(520))) == 8


def test_silence_is_exactly_its_own_mean() -> None:
    spec = spkfast.frontend("wespeaker")
    assert not spkfast.NumpyFbank(spec)(np.zeros(16000, np.float32)).any()
