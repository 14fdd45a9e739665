"""The crop reader: exact samples, cuts that depend on nothing but their seed, and utterances that cannot be read."""

import hashlib
import shutil
import subprocess
import sys
import types
from collections import Counter

import numpy as np
import pytest
import soundfile
import soxr
import torch

from spkfast.data.corpus import Corpus, Entry
from spkfast.data.reading import BadUtterances, Batch, CropDataset, Loader, collate, crop_key
from spkfast.data.samplers import Draw, StepSampler, create
from spkfast.errors import InputError
from spkfast.reference.change_speed import change_speed, half_width, source_samples

RATE = 16000
SPEEDS = (1.0, 0.9, 1.1)
CONTEXT = half_width(1.1)
EPOCHS = 60


def integers(num_samples, seed=0):
    """Random 16-bit samples, none of them 0, so that padding shows."""
    return np.random.default_rng(seed).integers(1, 32768, num_samples).astype(np.int16)


def write(path, samples, rate=RATE, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, **options)
    return str(path)


def one(path, **fields):
    """A corpus of one utterance."""
    return Corpus([Entry("s", "u", str(path), **fields)])


def crops(corpus, num_samples=400, speeds=(1.0,), epochs=EPOCHS, index=0, **options):
    dataset = CropDataset(corpus, num_samples=num_samples, speeds=speeds, seed=5, **options)
    return [dataset[Draw(index, epoch)] for epoch in range(epochs)]


def place_of(crop, context, whole):
    """The only place in the utterance where the crop's samples stand."""
    windows = np.lib.stride_tricks.sliding_window_view(whole, 16)
    (place,) = np.flatnonzero((windows == crop.samples[context : context + 16]).all(axis=1))
    return int(place)


@pytest.mark.parametrize("suffix", ["wav", "flac", "aiff"])
def test_crops_are_the_integers_of_the_file(tmp_path, suffix):
    whole = integers(1000)
    path = write(tmp_path / f"a.{suffix}", whole, subtype="PCM_16")
    for crop in crops(one(path)):
        place = place_of(crop, 0, whole)
        assert crop.samples.dtype == np.int16
        np.testing.assert_array_equal(crop.samples, whole[place : place + 400])
        assert (crop.length, crop.speed, crop.label, crop.errors, crop.note) == (400, 0, 0, (), "")


@pytest.mark.parametrize("num_samples", [400, 1050])
def test_context_holds_the_neighbours_that_exist(tmp_path, num_samples):
    whole = integers(1000)
    path = write(tmp_path / "a.wav", whole)
    seen = set()
    for crop in crops(one(path), num_samples, SPEEDS, epochs=200):
        half, needed = half_width(SPEEDS[crop.speed]), source_samples(num_samples, SPEEDS[crop.speed])
        first = place_of(crop, CONTEXT, whole)
        low, high = max(0, first - half), min(1000, first + needed + half)
        want = np.zeros(CONTEXT + source_samples(num_samples, 1.1) + CONTEXT, dtype=np.int16)
        want[CONTEXT + low - first : CONTEXT + high - first] = whole[low:high]
        np.testing.assert_array_equal(crop.samples, want)
        assert crop.length == high - first >= min(needed, 1000)
        seen.add((crop.speed, low == 0, high == 1000))
    assert {speed for speed, _, _ in seen} == {0, 1, 2}
    for beginning, end in ((True, False), (False, True), (True, True) if num_samples == 1050 else (False, False)):
        assert (1, beginning, end) in seen


def test_cut_is_uniform_over_the_places_where_the_crop_fits(tmp_path):
    whole = integers(310)
    path = write(tmp_path / "a.wav", whole)
    epochs = 4000
    places = Counter(place_of(crop, 0, whole) for crop in crops(one(path), 300, epochs=epochs))
    assert sorted(places) == list(range(11))
    assert max(abs(count - epochs / 11) for count in places.values()) <= 5 * np.sqrt(epochs / 11 * 10 / 11)
    assert {place_of(crop, 0, whole) for crop in crops(one(path), 310, epochs=5)} == {0}


def test_speeds_are_drawn_alike_and_make_labels(tmp_path):
    entries = [Entry(f"s{k}", f"u{k}", write(tmp_path / f"{k}.wav", integers(500, k))) for k in range(3)]
    dataset = CropDataset(Corpus(entries), num_samples=100, speeds=SPEEDS)
    assert dataset.num_classes == 9 and len(dataset) == 3
    epochs = 1000
    for index in range(3):
        drawn = [dataset[Draw(index, epoch)] for epoch in range(epochs)]
        assert all(crop.label == index + 3 * crop.speed for crop in drawn)
        counts = np.bincount([crop.speed for crop in drawn], minlength=3)
        assert (np.abs(counts - epochs / 3) <= 5 * np.sqrt(epochs / 3 * 2 / 3)).all()
        first = [place_of(crop, CONTEXT, integers(500, index)) for crop in drawn]
        of_speed = [np.mean([f for f, crop in zip(first, drawn, strict=True) if crop.speed == k]) for k in range(3)]
        # Uniform over 400 places: the mean of 333 has a deviation of 400 / sqrt(12 * 333) = 6.3.
        assert max(abs(mean - 200) for mean in of_speed) < 32


def test_speed_of_a_crop_is_that_of_the_whole_utterance(tmp_path):
    whole = integers(3000)
    path = write(tmp_path / "a.wav", whole)
    batch = collate(crops(one(path), 900, SPEEDS))
    got = change_speed(batch.crops, batch.lengths, batch.speeds, list(SPEEDS), CONTEXT, 900)
    padded = torch.from_numpy(np.concatenate([np.zeros(CONTEXT, dtype=np.int16), whole]))[None]
    for row, which in zip(range(len(batch.crops)), batch.speeds, strict=True):
        first = place_of(types.SimpleNamespace(samples=batch.crops[row].numpy()), CONTEXT, whole)
        lengths = torch.tensor([3000 - first])
        want = change_speed(padded, lengths, which[None], list(SPEEDS), CONTEXT + first, 900)[0]
        inside = int(lengths[0] - 1) / SPEEDS[which] > 900
        # The same sums, of weights of absolute sum below 4 over samples below 1, in another order at most.
        assert (got[row] - want).abs()[: 900 if inside else 800].max() < 4 * 200 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("length", [1, 7, 399])
def test_a_shorter_utterance_is_there_once(tmp_path, length):
    whole = integers(length)
    path = write(tmp_path / "a.wav", whole)
    for crop in crops(one(path), 1000, SPEEDS, epochs=10):
        assert crop.length == length
        np.testing.assert_array_equal(crop.samples[CONTEXT : CONTEXT + length], whole)
        assert not crop.samples[:CONTEXT].any() and not crop.samples[CONTEXT + length :].any()


def test_other_formats_are_rounded_clipped_and_averaged(tmp_path):
    values = np.array([0.3, -0.3, 0.5, 0.49, -0.5, -0.51, 1.5, -1.5, 40000, -40000, 32767.4, -32768.4]) / 32768
    want = [0, 0, 0, 0, 0, -1, 2, -2, 32767, -32768, 32767, -32768]
    path = write(tmp_path / "float.wav", values, subtype="FLOAT")
    assert crops(one(path), 12, epochs=1)[0].samples.tolist() == want

    deep = np.array([100 * 256 + 127, 100 * 256 + 129, -100 * 256 - 129, 2**23 - 1], dtype=np.int32)
    path = write(tmp_path / "deep.flac", deep << 8, subtype="PCM_24")
    assert crops(one(path), 4, epochs=1)[0].samples.tolist() == [100, 101, -101, 32767]

    channels = np.array([[100, 103], [100, 101], [-7, 8], [32767, 32767]], dtype=np.int16)
    path = write(tmp_path / "stereo.wav", channels)
    assert crops(one(path), 4, epochs=1)[0].samples.tolist() == [102, 100, 0, 32767]  # halves to the even


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
@pytest.mark.parametrize("start", [0.0, 0.3])
def test_other_rates_are_those_of_the_resampled_utterance(tmp_path, rate, start):
    # Soft enough that what the filter adds to the peaks is not clipped.
    samples = 0.15 * np.random.default_rng(1).standard_normal(rate).clip(-3, 3).astype(np.float32)
    path = write(tmp_path / "a.wav", samples, rate, subtype="FLOAT")
    part = samples[round(start * rate) : round((start + 0.5) * rate)]
    whole = soxr.resample(part, rate, RATE) * 32768
    dataset = CropDataset(one(path, start=start, seconds=0.5), num_samples=1600, speeds=SPEEDS, seed=5)
    places = set()
    for epoch in range(40):
        crop = dataset[Draw(0, epoch)]
        half, needed = half_width(SPEEDS[crop.speed]), source_samples(1600, SPEEDS[crop.speed])
        rows = np.lib.stride_tricks.sliding_window_view(whole, needed)
        error = np.abs(rows - crop.samples[CONTEXT : CONTEXT + needed]).max(axis=1)
        first = int(error.argmin())
        # Half a step of rounding, and what 32-bit sums differ by: a step at full scale is 2**-15, theirs 2**-22.
        assert error[first] < 0.5 + 2**-5
        low, high = max(0, first - half), min(len(part) * RATE // rate, first + needed + half)
        assert crop.length == high - first
        got = crop.samples[CONTEXT + low - first : CONTEXT + high - first]
        assert np.abs(got - whole[low:high]).max() < 0.5 + 2**-5
        assert not crop.samples[: CONTEXT + low - first].any() and not crop.samples[CONTEXT + high - first :].any()
        assert crop.note == f"{path}: {rate} Hz, resampled to 16000 Hz for every crop of it"
        places.add(first)
    assert len(places) > 20


def test_resampling_is_told_once(tmp_path):
    paths = [write(tmp_path / f"{k}.wav", integers(4000, k), 8000 if k else RATE) for k in range(3)]
    dataset = CropDataset(Corpus(Entry("s", path, path) for path in paths), num_samples=500)
    told: list[str] = []
    account = BadUtterances(3, warn=told.append)
    for epoch in range(3):
        account.add(collate([dataset[Draw(k, epoch)] for k in range(3)]))
    assert told == [f"{paths[1]}: 8000 Hz, resampled to 16000 Hz for every crop of it"]


def test_segments_are_all_that_is_seen(tmp_path):
    whole = integers(8000)
    path = write(tmp_path / "a.wav", whole)
    inside = whole[1600:3200]
    for crop in crops(one(path, start=0.1, seconds=0.1), 1200, SPEEDS):
        first = place_of(crop, CONTEXT, inside)
        half, needed = half_width(SPEEDS[crop.speed]), source_samples(1200, SPEEDS[crop.speed])
        low, high = max(0, first - half), min(1600, first + needed + half)
        np.testing.assert_array_equal(crop.samples[CONTEXT - first + low : CONTEXT - first + high], inside[low:high])
        assert np.count_nonzero(crop.samples) == high - low
    assert {crop.length for crop in crops(one(path, start=0.1), 8000)} == {6400}
    assert {crop.length for crop in crops(one(path, start=0.25, seconds=0.7), 8000)} == {4000}  # ends 0.45 s late


def test_members_of_shards(tmp_path, monkeypatch):
    from spkfast.data import shards

    whole = integers(1000)
    path = write(tmp_path / "a.wav", whole)
    asked = []

    def open_member(*arguments):
        asked.append(arguments)
        return open(path, "rb")

    monkeypatch.setattr(shards, "open_member", open_member)
    corpus = Corpus([Entry("s", "u/1", "shard.tar", offset=1536, size=2044)])
    crop = CropDataset(corpus, num_samples=400)[Draw(0, 1)]
    assert asked == [("shard.tar", 1536, 2044, "u/1")]
    np.testing.assert_array_equal(crop.samples, whole[place_of(crop, 0, whole) :][:400])


def test_key_is_the_hash_of_seed_epoch_and_id():
    # As printed by "printf '7 3 s/é.wav' | b2sum -l 64", bytes in order of rising weight.
    assert crop_key(7, 3, "s/é.wav") == int.from_bytes(bytes.fromhex("05fab93935ca4b1c"), "little", signed=True)
    keys = {crop_key(seed, epoch, name) for seed in range(10) for epoch in range(10) for name in ("a", "b", "0 a")}
    assert len(keys) == 300 and min(keys) < 0 < max(keys)
    undecodable = [bytes([byte]).decode(errors="surrogateescape") for byte in (0xE8, 0xE9)]
    assert len({crop_key(0, 0, name) for name in [*undecodable, "?", "é"]}) == 4


@pytest.fixture(scope="module")
def speakers(tmp_path_factory):
    """Five speakers with eight utterances of 0.05 to 0.3 s; one is damaged, one at another rate."""
    folder = tmp_path_factory.mktemp("speakers")
    rng = np.random.default_rng(0)
    entries = []
    for k in range(40):
        path = folder / f"s{k % 5}" / f"{k}.flac"
        write(path, integers(int(rng.integers(800, 4800)), k), 8000 if k == 7 else RATE)
        entries.append(Entry(f"s{k % 5}", f"s{k % 5}/{k}", str(path)))
    (folder / "s3" / "13.flac").write_bytes(b"not audio at all")
    return entries


def batches(entries, steps=12, first=0, workers=0, **ranks):
    corpus = Corpus(entries)
    sampler = StepSampler(create("random", corpus, batch_size=8, seed=3), steps, **ranks)
    sampler.load_state_dict({"step": first})
    dataset = CropDataset(corpus, num_samples=1000, speeds=SPEEDS, seed=3)
    return list(Loader(dataset, sampler, workers))


def assert_equal(one: Batch, other: Batch):
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.fixture(scope="module")
def run(speakers):
    return batches(speakers)


def test_batches_have_one_shape_and_the_types_of_the_device_ops(run):
    for batch in run:
        assert batch.crops.dtype == torch.int16 and batch.crops.shape == (8, CONTEXT * 2 + source_samples(1000, 1.1))
        for values in batch[1:5]:
            assert values.dtype == torch.int64 and values.shape == (8,)
    assert sum(len(batch.errors) for batch in run) >= 2 and sum(len(batch.notes) for batch in run) >= 2
    assert len(torch.cat([batch.keys for batch in run]).unique()) == 96


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than processors
@pytest.mark.parametrize("workers", [1, 4])
def test_the_same_for_any_number_of_workers(speakers, run, workers):
    again = batches(speakers, workers=workers)
    assert len(again) == len(run) == 12
    for one, other in zip(run, again, strict=True):
        assert_equal(one, other)


def test_the_same_for_any_number_of_processes(speakers, run):
    ranks = [batches(speakers, rank=rank, world_size=2, workers=rank) for rank in range(2)]
    for whole, *parts in zip(run, *ranks, strict=True):
        joined = [torch.cat(p) if isinstance(p[0], torch.Tensor) else p[0] + p[1] for p in zip(*parts, strict=True)]
        assert_equal(whole, Batch(*joined))


@pytest.mark.parametrize("step", [1, 5, 11])
def test_the_same_from_any_step(speakers, run, step):
    for one, other in zip(run[step:], batches(speakers, first=step, workers=1), strict=True):
        assert_equal(one, other)


def test_another_python_process_reads_the_same(speakers, run):
    program = (
        "import pickle, sys; from tests.data.test_reading import batches; "
        "sys.stdout.buffer.write(batches(pickle.load(sys.stdin.buffer), steps=2)[1].crops.numpy().tobytes())"
    )
    import pickle

    done = subprocess.run(
        [sys.executable, "-c", program], input=pickle.dumps(speakers), capture_output=True, check=True
    )
    assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(run[1].crops.numpy().tobytes()).digest()


def test_a_crop_depends_on_no_other_utterance(speakers):
    good = [entry for entry in speakers if not entry.id.endswith("/13")]
    fewer = [entry for entry in good[::-1] if not entry.id.endswith(("/3", "/8"))]
    options = {"num_samples": 1000, "speeds": SPEEDS, "seed": 3}
    many, few = CropDataset(Corpus(good), **options), CropDataset(Corpus(fewer), **options)
    for place, entry in enumerate(fewer):
        one, other = few[Draw(place, 2)], many[Draw(good.index(entry), 2)]
        assert np.array_equal(one.samples, other.samples)
        assert one._replace(samples=None) == other._replace(samples=None)
    assert many[Draw(0, 2)].key != many[Draw(0, 3)].key
    other_seed = CropDataset(Corpus(good), num_samples=1000, speeds=SPEEDS, seed=4)
    assert other_seed[Draw(0, 2)].key != many[Draw(0, 2)].key


def spoil(path, how):
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "no audio":
        path.write_text("no audio\n" * 50)
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    elif how == "no samples":
        soundfile.write(path, np.zeros(0), RATE)
    elif how == "a folder":
        path.unlink()
        path.mkdir()
    elif how in ("nan", "inf"):
        soundfile.write(path, np.full(4000, float(how)), RATE, subtype="FLOAT")
    return {}


BAD = {
    "missing": "no such file",
    "empty": "the file is empty",
    "no audio": "not an audio file, or a damaged one",
    "truncated": "the file is cut off",
    "no samples": "the file holds no samples",
    "a folder": "is a folder",
    "nan": "holds NaN or infinite samples",
    "inf": "holds NaN or infinite samples",
}
SEGMENTS = {
    "begins at 0.25 s of 0.25 s of audio": {"start": 0.25},
    "begins at 9 s of 0.25 s of audio": {"start": 9.0, "seconds": 1.0},
    "begins at -1 s": {"start": -1.0},
    "begins at nan s": {"start": float("nan")},
    "ends at 0.8 s of 0.25 s of audio": {"start": 0.1, "seconds": 0.7},
    "ends at inf s": {"seconds": float("inf")},
    "'s1/1' holds no samples": {"start": 0.1, "seconds": 0.0},
    "holds no samples": {"start": 0.1, "seconds": -0.05},
}


def with_bad_one(folder, how=None, **fields):
    """Two speakers with four utterances each, of which number 1 is bad."""
    entries = []
    for k in range(8):
        path = folder / f"{k}.wav"
        write(path, integers(4000, k))
        entries.append(Entry(f"s{k % 2}", f"s{k % 2}/{k}", str(path), **(fields if k == 1 else {})))
    spoil(folder / "1.wav", how)
    return CropDataset(Corpus(entries), num_samples=500, speeds=SPEEDS)


@pytest.mark.parametrize("how", [*BAD, *SEGMENTS])
def test_a_bad_utterance_is_replaced_by_one_of_its_speaker_and_named(tmp_path, how):
    dataset = with_bad_one(tmp_path, how, **SEGMENTS.get(how, {}))
    told: list[str] = []
    account = BadUtterances(8, warn=told.append)
    good, bad = dataset[Draw(0, 0)], [dataset[Draw(1, epoch)] for epoch in range(20)]
    assert not good.errors
    for epoch, crop in enumerate(bad):
        assert crop.label % 2 == 1 and crop.length >= 450 and crop.key == crop_key(0, epoch, "s1/1")
        again = dataset[Draw(1, epoch)]
        assert np.array_equal(crop.samples, again.samples)
        assert crop._replace(samples=None) == again._replace(samples=None)
        assert {error.index for error in crop.errors} == {1}
        account.add(collate([good, crop]))
    assert len({crop.samples.tobytes() for crop in bad}) == 20
    assert len(told) == len(account.messages) == 1 and "\n" not in told[0]
    assert "1.wav: " in told[0] and BAD.get(how, how) in told[0]


def test_the_only_utterance_of_a_speaker_is_replaced_by_anyone(tmp_path):
    paths = [write(tmp_path / f"{k}.wav", integers(600, k)) for k in range(5)]
    paths[2] += "x"
    dataset = CropDataset(Corpus(Entry(f"s{k}", f"u{k}", path) for k, path in enumerate(paths)), num_samples=500)
    labels = Counter(dataset[Draw(2, epoch)].label for epoch in range(100))
    assert set(labels) == {0, 1, 3, 4}


def test_too_many_bad_utterances_end_the_run(tmp_path):
    paths = [write(tmp_path / f"{k}.wav", integers(600, k)) for k in range(30)]
    corpus = Corpus(Entry(f"s{k % 3}", f"u{k}", path) for k, path in enumerate(paths))
    for path in paths[:12]:
        shutil.move(path, path + ".away")
    dataset = CropDataset(corpus, num_samples=500)
    account, strict, lenient = BadUtterances(30), BadUtterances(30, share=0, least=0), BadUtterances(30, share=0.4)
    account.add(collate([dataset[Draw(k, 0)] for k in range(6)]))
    assert 6 <= len(account.messages) <= 10  # with those that were tried in place of these
    with pytest.raises(InputError) as caught:
        account.add(collate([dataset[Draw(k, 1)] for k in range(12)]))
    first = list(account.messages.values())[:3]
    assert str(caught.value) == "12 of 30 utterances could not be read, more than 10; the first: " + "; ".join(first)
    with pytest.raises(
        InputError, match=r"of 30 utterances could not be read, more than 0; the first: .*0\.wav: no such"
    ):
        strict.add(collate([dataset[Draw(0, 0)]]))
    lenient.add(collate([dataset[Draw(k, 1)] for k in range(12)]))


def test_no_readable_utterance_at_all(tmp_path):
    corpus = Corpus(Entry(f"s{k}", f"u{k}", str(tmp_path / f"{k}.wav")) for k in range(2000))
    crop = CropDataset(corpus, num_samples=500)[Draw(0, 0)]
    assert crop.label == -1 and not crop.samples.any() and crop.samples.shape == (500,)
    with pytest.raises(
        InputError, match=r"of 2000 utterances could not be read, 16 in a row; the first: .*0\.wav: no such"
    ):
        BadUtterances(2000).add(collate([crop]))


def test_pins_its_tensors(run, monkeypatch):
    from torch.utils.data._utils.pin_memory import pin_memory

    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: pinned.append(tensor) or tensor.clone())
    batch = pin_memory(run[0])
    assert len(pinned) == 5
    assert_equal(batch, run[0])


def test_refuses_settings_that_make_no_sense(tmp_path):
    corpus = one(tmp_path)
    for message, options in {
        "num_samples must be at least 1, got 0": {"num_samples": 0},
        "sample_rate must be at least 1 Hz, got 0": {"sample_rate": 0},
        r"speeds must be factors from 0.1 to 10, got \[\]": {"speeds": ()},
        r"speeds must be .* got \[1.0, 0.0\]": {"speeds": (1.0, 0.0)},
        r"speeds must be .* got \[0.9, 0.9\]": {"speeds": (0.9, 0.9)},
        r"speeds must be .* got \[nan\]": {"speeds": (float("nan"),)},
    }.items():
        with pytest.raises(InputError, match=message):
            CropDataset(corpus, **{"num_samples": 500, **options})


def test_real_speech(speech):
    path = speech / (speech / "trials.txt").read_text().split()[1]
    whole, _ = soundfile.read(path, dtype="int16")
    for crop in crops(one(path), 8000, SPEEDS, epochs=20):
        inside = crop.samples[CONTEXT : CONTEXT + source_samples(8000, SPEEDS[crop.speed])]
        assert whole.tobytes().find(inside.tobytes()) >= 0 and inside.any()


def test_a_loader_tells_of_what_it_cannot_read(tmp_path):
    corpus = Corpus([Entry("a", "1", str(tmp_path / "1.wav")), Entry("b", "2", str(tmp_path / "2.wav"))])
    steps = StepSampler(create("random", corpus, batch_size=2), 2)
    with pytest.raises(InputError, match="2 of 2 utterances could not be read, 16 in a row"):
        list(Loader(CropDataset(corpus, num_samples=100), steps, 0))


def test_places_are_no_draws(tmp_path):
    corpus = Corpus([Entry("a", "1", str(tmp_path / "1.wav")), Entry("b", "2", str(tmp_path / "2.wav"))])
    with pytest.raises(InputError, match=r"read them by reading\.Loader"):
        CropDataset(corpus, num_samples=100)[0]
