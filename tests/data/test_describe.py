"""The description of a corpus: every figure from audio whose properties are known."""

from __future__ import annotations

import json
import math
import threading

import numpy as np
import pytest
import soundfile

from spkfast.data import describe as module
from spkfast.data.corpus import Corpus, Entry
from spkfast.data.describe import describe
from spkfast.data.shards import write_shards
from spkfast.errors import InputError

RATE = 16000


def noise(seconds, seed=0, level=0.1, rate=RATE):
    return level * np.random.default_rng(seed).uniform(-1, 1, round(seconds * rate))


def noise16(*args):
    """The same as 16-bit numbers, which every lossless format holds exactly."""
    return np.round(noise(*args) * 32768).astype(np.int16)


@pytest.fixture
def make(tmp_path):
    """Writes utterances ``{id: samples or (samples, rate)}`` of speakers named by the ids' first letter."""

    def corpus(audio, suffix=".wav", subtype=None, **segments):
        entries = []
        for name, samples in audio.items():
            samples, rate = samples if isinstance(samples, tuple) else (samples, RATE)
            path = tmp_path / f"{name}{suffix}"
            if samples is not None:
                soundfile.write(path, samples, rate, subtype=subtype)
            entries.append(Entry(name[0], name, str(path), *segments.get(name, ())))
        return Corpus(entries, "these")

    return corpus


def test_amounts(make):
    audio = {"a1": noise(1, 1), "a2": noise(2, 2), "a3": noise(3, 3), "b1": (noise(2, 4, rate=8000), 8000)}
    found = describe(make(audio))
    assert (found.name, found.speakers, found.utterances, found.read) == ("these", 2, 4, 4)
    assert found.hours == found.estimated_hours == pytest.approx(8 / 3600, rel=1e-15)
    assert (found.seconds.min, found.seconds.median, found.seconds.max) == (1, 2, 3)
    assert sum(found.seconds.counts) == 4 and len(found.seconds.edges) == len(found.seconds.counts) + 1
    spread = found.utterances_per_speaker
    assert (spread.min, spread.median, spread.max) == (1, 2, 3)
    assert (spread.edges, spread.counts) == ([0.5, 1.5, 2.5, 3.5], [1, 0, 1])
    assert found.sample_rates == {8000: 1, 16000: 3}
    faults = found.clipped, found.silent, found.duplicates, found.duplicates_across_speakers, found.shorter
    assert not any(faults) and found.unreadable == {}
    assert json.loads(json.dumps(found.to_dict()))["seconds"]["max"] == 3


def test_many_utterances_a_speaker_fall_into_bins_of_one_width():
    spread = module._distribution(np.arange(101, 146))
    assert set(np.diff(spread.edges)) == {3} and set(spread.counts) == {3} and len(spread.counts) == 15


def test_segments_are_read_alone(make):
    samples = np.concatenate([np.zeros(RATE), noise(1, 1), np.zeros(RATE)])
    corpus = make(dict.fromkeys(("a1", "a2", "a3", "a4"), samples), a1=(0, 1), a2=(1, 1), a3=(1,), a4=(2.5, 0.505))
    found = describe(corpus)
    assert found.silent == ["a1", "a4"]
    assert (found.seconds.min, found.seconds.max) == (0.5, 2) and found.shorter == []
    corpus = make(dict.fromkeys(("a1", "a2", "a3"), samples), a1=(0, 3.02), a2=(3, 1), a3=(1, 1))
    found = describe(corpus)
    assert found.shorter == ["a1"] and found.read == 2
    assert "a2.wav: the segment of 16000 samples from 3 s has none" in found.unreadable["a2"]


def test_clipping_is_runs_at_full_scale(make):
    base = noise(1)  # 16000 samples: 0.01 % are 1.6
    audio = {name: base.copy() for name in ("a-peaks", "a-pair", "a-low", "a-both", "a-ends")}
    audio["a-peaks"][100:1000:2] = 1.0  # apart from each other
    audio["a-pair"][100:102] = 1.0
    audio["a-low"][100:102] = -1.0
    audio["a-both"][100], audio["a-both"][101] = 1.0, -1.0
    audio["a-ends"][-2:] = 1.0
    assert describe(make(audio, subtype="PCM_16")).clipped == ["a-pair", "a-low", "a-ends"]
    for sign in (1, -1):
        audio = {"a-loud": base.copy(), "a-below": base.copy()}
        audio["a-loud"][100:102], audio["a-below"][100:102] = sign * 32767 / 32768, sign * 32766 / 32768
        assert describe(make(audio, subtype="FLOAT")).clipped == ["a-loud"]
    long = {"a-few": noise(10), "a-enough": noise(10)}  # 16 of 160000
    long["a-few"][:15] = 1.0
    long["a-enough"][:16] = 1.0
    assert describe(make(long, subtype="PCM_16")).clipped == ["a-enough"]


def test_silence_is_no_frame_above_the_level(make):
    def tone(db, length):
        samples = np.zeros(RATE)
        samples[320 : 320 + length] = 10 ** (db / 20)
        return samples

    audio = {
        "a-zero": np.zeros(RATE),
        "a-under": tone(-60.1, 160),
        "a-over": tone(-59.9, 160),
        "a-half": tone(-59.9, 80),
        "a-tail": np.concatenate([np.zeros(RATE), np.full(159, 0.5)]),
        "a-short": np.full(40, 0.5),
    }
    found = describe(make(audio, subtype="FLOAT"))
    assert found.silent == ["a-zero", "a-under", "a-half", "a-tail"]
    assert found.loudest_db is not None
    # Relative to a mean square of 1: half of a frame at -59.9 dB is 3 dB below that.
    assert found.loudest_db.min == pytest.approx(-59.9 - 10 * math.log10(2), abs=1e-3)
    assert found.loudest_db.max == pytest.approx(20 * math.log10(0.5), abs=1e-3)
    assert describe(make(audio, subtype="FLOAT"), silence_db=-59).silent == [
        name for name in audio if name != "a-short"
    ]
    assert describe(make(audio, subtype="FLOAT"), silence_db=-math.inf).silent == []
    silence = describe(make({"a1": np.zeros(RATE)}))
    assert silence.silent == ["a1"] and silence.loudest_db is None and silence.plot() is not None


def test_duplicates_are_found_whatever_their_file(make):
    samples = noise16(1)
    almost = samples.copy()
    almost[-1] += 1
    corpus = make({"a1": samples, "a2": almost, "b1": noise16(1, 7), "a3": (samples, 8000)})
    flac = make({"a4": samples, "c1": noise16(1, 7)}, suffix=".flac")
    found = describe(Corpus([*corpus, *flac], "both"))
    assert found.duplicates == [["a1", "a4"], ["b1", "c1"]]
    assert found.duplicates_across_speakers == [["b1", "c1"]]


def test_unreadable_ones_are_listed(make, tmp_path):
    corpus = make({"a1": noise(1), "a2": None, "a3": noise(1, 3), "a4": noise(1, 4)})
    (tmp_path / "a3.wav").write_bytes(b"not audio at all")
    found = describe(corpus)
    assert found.read == 2 and list(found.unreadable) == ["a2", "a3"]
    assert "a2.wav: no such file" in found.unreadable["a2"] and "a3.wav: not an audio file" in found.unreadable["a3"]
    assert found.hours == pytest.approx(2 / 3600, rel=1e-15)
    with pytest.raises(
        InputError, match=r"these: none of 1 utterances can be read, the first: .*a9\.wav: no such file"
    ):
        describe(make({"a9": None}))


def test_sample_and_progress(make):
    corpus = make({f"a{k}": noise(0.5, k) for k in range(8)} | {"b0": noise(0.5, 9)})
    done = []
    found = describe(corpus, sample=3, progress=lambda *counts: done.append(counts))
    assert done == [(1, 3), (2, 3), (3, 3)]
    assert found.read == 3 and (found.speakers, found.utterances) == (2, 9)
    assert found.hours == pytest.approx(1.5 / 3600, rel=1e-15)
    assert found.estimated_hours == pytest.approx(4.5 / 3600, rel=1e-15)
    assert describe(corpus, sample=3) == found
    assert describe(corpus, sample=1).read == 1 and describe(corpus, sample=100).read == 9

    def read(**options):  # all of them are silent at this level
        return describe(corpus, sample=3, silence_db=0, **options).silent

    assert len({tuple(read(seed=seed)) for seed in range(5)}) > 1
    assert read() == sorted(read())


def test_threads_change_nothing_and_few_wait(make, monkeypatch):
    corpus = make({f"a{k:02}": noise(0.1, k % 5) for k in range(40)})
    assert describe(corpus, workers=4) == describe(corpus, workers=1)
    begun, ended, ahead = [], [], []
    lock = threading.Lock()
    measure = module._measure

    def counted(entry):
        with lock:
            begun.append(entry.id)
            ahead.append(len(begun) - len(ended))
        return measure(entry)

    monkeypatch.setattr(module, "_measure", counted)
    describe(corpus, workers=2, progress=lambda done, total: ended.append(done))
    assert len(begun) == 40 and max(ahead) <= 4 * 2 + 2


def test_shards(make, tmp_path):
    corpus = make({"a1": noise16(1), "b1": noise16(2, 2)})
    write_shards(corpus, tmp_path / "shards")
    from spkfast.data.manifests import read_corpus

    packed = read_corpus(tmp_path / "shards")
    assert describe(packed).seconds == describe(corpus).seconds
    both = describe(Corpus([*(entry._replace(id=f"{entry.id}-file") for entry in corpus), *packed], "both"))
    assert both.duplicates == [["a1-file", "a1"], ["b1-file", "b1"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"silence_db": math.nan}, "silence_db must be a level in dBFS, got nan"),
        ({"silence_db": math.inf}, "silence_db must be a level in dBFS, got inf"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"sample": 0}, "sample must be at least 1 utterance, got 0"),
    ],
)
def test_bad_arguments(make, options, message):
    with pytest.raises(InputError, match=message):
        describe(make({"a1": noise(0.1)}), **options)


def test_plot(make, tmp_path):
    figure = describe(make({"a1": noise(1), "b1": noise(2, 2)})).plot()
    assert [axes.get_xlabel() for axes in figure.axes] == [
        "utterances per speaker",
        "length (s)",
        "loudest 10 ms (dBFS)",
    ]
    assert sum(figure.axes[1].patches[0].get_data().values) == 2
    figure.savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0
