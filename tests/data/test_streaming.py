"""Crops from shards behind URLs, over the loopback and through pipes."""

import functools
import http.server
import io
import shlex
import shutil
import sys
import tarfile
import threading

import numpy as np
import pytest
import soundfile
from torch.utils.data import DataLoader

from spkfast.data.corpus import Corpus, Entry
from spkfast.data.shards import write_shards
from spkfast.data.streaming import stream
from spkfast.errors import InputError

pytest.importorskip("webdataset", reason="needs webdataset")

RATE = 16000
CROP = 400


class Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        pass


def sound(number):
    return np.random.default_rng(number).integers(-3000, 3000, 300 + 100 * (number % 5)).astype(np.int16)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """60 utterances of 6 speakers in several shards."""
    folder = tmp_path_factory.mktemp("stream")
    entries = []
    for number in range(60):
        soundfile.write(folder / f"{number}.wav", sound(number), RATE)
        entries.append(Entry(f"s{number % 6}", f"ü{number}/a.b", str(folder / f"{number}.wav")))
    write_shards(Corpus(entries), folder / "shards", shard_megabytes=0.02)
    return folder / "shards"


def pipes(shards):
    return [f"pipe:cat {shlex.quote(str(path))}" for path in sorted(shards.glob("*.tar"))]


@pytest.fixture
def server(shards):
    handler = functools.partial(Silent, directory=shards)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def number_of(name):
    return int(name[1:].split("/")[0])


def check_crop(samples, speaker, name):
    """The crop is a part of its utterance, or a short one repeated."""
    whole = sound(number_of(name))
    assert samples.dtype == np.int16 and samples.shape == (CROP,) and speaker == f"s{number_of(name) % 6}"
    if len(whole) < CROP:
        np.testing.assert_array_equal(samples, np.resize(whole, CROP))
    else:
        windows = np.lib.stride_tricks.sliding_window_view(whole, CROP)
        assert (windows == samples).all(axis=1).any()


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset reads URLs by curl")
def test_over_http(shards, server):
    last = len(list(shards.glob("*.tar"))) - 1
    assert last > 3
    url = f"{server}/shard-{{000000..{last:06d}}}.tar"
    found = list(stream(url, num_samples=CROP, passes=1))
    assert sorted(number_of(name) for _, _, name in found) == list(range(60))
    for sample in found:
        check_crop(*sample)
    with pytest.raises(InputError, match=r"none\.tar: the shard cannot be read to its end"):
        list(stream(f"{server}/none.tar", num_samples=CROP))


def test_crops_follow_from_seed_pass_and_id(shards):
    def crops(**options):
        found = stream(pipes(shards), num_samples=CROP, **{"passes": 1, **options})
        return [(name, samples.tobytes()) for samples, _, name in found]

    one = crops()
    assert crops() == one
    assert dict(crops(shuffle=7)) == dict(one) and crops(shuffle=7) != one
    assert sorted(crops(rank=0, world_size=2) + crops(rank=1, world_size=2)) == sorted(one)
    both = crops(passes=2, shuffle=1)
    assert both[:60] == crops(shuffle=1) and both[60:] == crops(shuffle=1, first_pass=1)
    assert dict(both[60:]) != dict(both[:60]) and dict(both[60:]).keys() == dict(both[:60]).keys()
    assert dict(crops(seed=1)) != dict(one)


def test_workers_and_ranks_share_the_shards(shards):
    found = []
    for rank in range(2):
        dataset = stream(pipes(shards), num_samples=CROP, passes=1, rank=rank, world_size=2)
        found.append([name for _, _, name in DataLoader(dataset, batch_size=None, num_workers=2)])
    assert min(map(len, found)) > 0 and sorted(map(number_of, found[0] + found[1])) == list(range(60))
    few = stream(pipes(shards)[:1], num_samples=CROP, passes=1)
    once = [name for _, _, name in DataLoader(few, batch_size=None, num_workers=2)]
    assert len(once) == len(set(once)) > 0  # workers without a shard add nothing


def test_batches_without_end(shards):
    loader = DataLoader(stream(pipes(shards), num_samples=CROP), batch_size=16)
    batches = [batch for batch, _ in zip(loader, range(9), strict=False)]  # two and a half passes
    assert all(samples.shape == (16, CROP) and len(names) == 16 for samples, _, names in batches)


def test_shuffle_buffer_mixes(shards):
    def order(shuffle):
        return [name for _, _, name in stream(pipes(shards)[:2], num_samples=CROP, passes=1, shuffle=shuffle)]

    assert order(1) != order(100) and sorted(order(1)) == sorted(order(100)) and len(order(1)) > 5


def tar(path, members):
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return f"pipe:cat {shlex.quote(str(path))}"


def wav(samples, rate=RATE):
    data = io.BytesIO()
    soundfile.write(data, samples, rate, format="WAV")
    return data.getvalue()


def test_shards_of_other_writers(tmp_path):
    """Keys with dots, as the wespeaker recipe has them, and another rate with two channels."""
    both = np.stack([sound(4), sound(9)], axis=1)
    url = tar(tmp_path / "x.tar", {"s/v/1.wav.wav": wav(both, 8000), "s/v/1.wav.spk": b"s\n"})
    ((samples, speaker, name),) = stream(url, num_samples=5000, passes=1)
    assert samples.shape == (5000,) and (speaker, name) == ("s", "s/v/1")


def test_bad_utterances_are_passed_over(tmp_path):
    members = {}
    for number in range(20):
        members[f"ü{number}.wav"] = wav(sound(number)) if number in (7, 19) else b"not audio"
        members[f"ü{number}.spk"] = b"s"
    told = []
    found = list(stream(tar(tmp_path / "x.tar", members), num_samples=CROP, passes=1, warn=told.append))
    assert [name for _, _, name in found] in (["ü7", "ü19"], ["ü19", "ü7"]) and len(told) == 18
    assert all("x.tar" in line and "not an audio file" in line for line in told)
    del members["ü7.wav"], members["ü7.spk"], members["ü19.wav"], members["ü19.spk"]
    with pytest.raises(InputError, match="16 utterances in a row could not be read"):
        list(stream(tar(tmp_path / "x.tar", members), num_samples=CROP, passes=1))


@pytest.mark.parametrize("keep", [0.5, "members", 0], ids=str)
def test_shards_that_end_early(tmp_path, keep):
    """Cut within a member, between two, and before the first."""
    members = {f"{k}.{suffix}": data for k in range(9) for suffix, data in (("wav", wav(sound(k))), ("spk", b"s"))}
    tar(tmp_path / "x.tar", members)
    path = tmp_path / "x.tar"
    size = path.stat().st_size
    if keep == "members":
        with tarfile.open(path) as file:
            size = file.getmembers()[8].offset  # the reader ends well, only the program that feeds it does not
    program = f"head -c {size if keep == 'members' else int(keep * size) - 100 * bool(keep)} {shlex.quote(str(path))}"
    with pytest.raises(InputError, match=r"x\.tar.*: the shard cannot be read to its end") as caught:
        # The end comes before the exit status, as over a network.
        list(stream(f"pipe:{program}; exec 1>&-; sleep 0.2; exit 18", num_samples=CROP, passes=1))
    assert "\n" not in str(caught.value)


def test_missing_parts(tmp_path):
    for members, has in (({"a.wav": wav(sound(0))}, ".wav"), ({"a.spk": b"s"}, ".spk")):
        with pytest.raises(InputError, match=f"a needs audio and .spk beside each other, has {has}"):
            list(stream(tar(tmp_path / "x.tar", members), num_samples=CROP, passes=1))
    with pytest.raises(InputError, match="no utterances in this shard"):
        list(stream(tar(tmp_path / "x.tar", {}), num_samples=CROP))


def test_wrong_arguments(shards, monkeypatch):
    for options, message in (
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"shuffle": 0}, "shuffle must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"passes": 0}, "passes must be at least 1, got 0"),
        ({"rank": 2, "world_size": 2}, "rank must be from 0 to 1, got 2"),
        ({"rank": 0, "world_size": 99}, "shards are too few for 99 processes"),
    ):
        with pytest.raises(InputError, match=message):
            stream(pipes(shards), **{"num_samples": CROP, **options})
    with pytest.raises(InputError, match=r"/x\.tar: expected http://, https://, pipe:; shards on a disk"):
        stream("/x.tar", num_samples=CROP)
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(InputError, match="streaming needs the package webdataset: pip install webdataset"):
        stream(pipes(shards), num_samples=CROP)
