"""Shards: what goes in comes out, any other reader of tar files agrees, and every fault is named."""

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from urllib.parse import unquote

import numpy as np
import pytest
import soundfile

from spkfast.data import shards
from spkfast.data.audio import read_audio
from spkfast.data.corpus import Corpus, Entry
from spkfast.data.shards import open_member, read_index, verify_shards, write_shards
from spkfast.errors import InputError

RATE = 16000
NAMES = (
    "plain",
    "a/b/c.wav",
    "../../up",
    "/root//twice/",
    "語り/ñ 1",
    "50%2E",
    'q"uo,ted\r\nx',
    "x" * 300,
    "cut\udcff",
)


def sound(seed, num_samples=4000, channels=None):
    shape = num_samples if channels is None else (num_samples, channels)
    return np.random.default_rng(seed).integers(-3000, 3000, shape).astype(np.int16)


@pytest.fixture
def source(tmp_path):
    """A corpus of one FLAC for each awkward name, three speakers, and the samples by id."""
    entries, samples = [], {}
    for number, name in enumerate(NAMES):
        samples[name] = sound(number, 3000 + 500 * number)
        path = tmp_path / "audio" / f"{number}.flac"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, samples[name], RATE)
        entries.append(Entry(f"spk.{number % 3}", name, str(path)))
    return Corpus(entries), samples


def decode(entry):
    samples, rate = read_audio(open_member(entry.path, entry.offset, entry.size, entry.id))
    assert rate == RATE
    return np.rint(samples * 32768).astype(np.int16)


@pytest.mark.parametrize("format", ["flac", "copy"])
def test_what_goes_in_comes_out(tmp_path, source, format):
    corpus, samples = source
    done = []
    written = write_shards(
        corpus, tmp_path / "out", format=format, shard_megabytes=0.02, progress=lambda *p: done.append(p)
    )
    found = read_index(tmp_path / "out")
    assert sorted(found.ids) == sorted(NAMES) and found.speakers == ["spk.0", "spk.1", "spk.2"]
    assert len(found.files) == written.shards > 2 and written.utterances == len(NAMES)
    assert written.bytes == sum(os.path.getsize(path) for path in found.files)
    assert written.seconds == pytest.approx(sum(map(len, samples.values())) / RATE)
    assert done == [(k + 1, len(NAMES)) for k in range(len(NAMES))]
    speaker = {entry.id: entry.speaker for entry in corpus}
    for entry in found:
        np.testing.assert_array_equal(decode(entry), samples[entry.id])
        assert entry.seconds * RATE == len(samples[entry.id]) and entry.speaker == speaker[entry.id]
    assert verify_shards(tmp_path / "out") == (len(NAMES), [])
    assert not (tmp_path / "out.partial").exists()


def test_other_readers_of_tar_files_agree(tmp_path, source):
    corpus, samples = source
    write_shards(corpus, tmp_path / "out")
    speaker = {entry.id: entry.speaker for entry in corpus}
    with open(tmp_path / "out/index.csv", encoding="utf-8", errors="surrogateescape", newline="") as index:
        rows = {row["member"]: row for row in csv.DictReader(index)}
    with tarfile.open(tmp_path / "out/shard-000000.tar") as tar:
        members = {member.name: member for member in tar.getmembers()}
        assert len(members) == 2 * len(NAMES)
        for name, member in members.items():
            key, suffix = name.rsplit(".", 1)
            assert "." not in key and not key.startswith("/") and "//" not in key and not key.endswith("/")
            assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")
            data = tar.extractfile(member).read()
            if suffix == "spk":
                assert data.decode() == speaker[unquote(key, errors="surrogateescape")]
            else:
                row = rows[name]
                assert suffix == "flac" and member.offset_data == int(row["offset"]) and len(data) == int(row["bytes"])
                assert int(row["samples"]) == len(samples[row["id"]]) and row["rate"] == "16000"


def test_webdataset_finds_the_ids(tmp_path, source):
    wds = pytest.importorskip("webdataset")
    corpus, _ = source
    write_shards(corpus, tmp_path / "out")
    found = list(wds.tarfile_samples([{"url": str(tmp_path / "out/shard-000000.tar")}]))
    assert sorted(unquote(sample["__key__"], errors="surrogateescape") for sample in found) == sorted(NAMES)
    assert all({"flac", "spk"} <= set(sample) for sample in found)


@pytest.mark.parametrize("format", shards.FORMATS)
def test_same_bytes_for_the_same_seed(tmp_path, source, format):
    corpus, _ = source

    def content(name, **options):
        write_shards(corpus, tmp_path / name, format=format, shard_megabytes=0.02, **options)
        return {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}

    one = content("one", workers=1, seed=3)
    assert content("two", workers=4, seed=3) == one
    assert content("three", seed=4) != one


def test_order_is_shuffled(tmp_path):
    soundfile.write(tmp_path / "a.wav", sound(0), RATE)
    entries = [Entry(f"s{k // 10}", f"s{k // 10}-{k}", str(tmp_path / "a.wav")) for k in range(60)]
    write_shards(Corpus(entries), tmp_path / "out")
    labels = read_index(tmp_path / "out").labels
    # 59 neighbours, of which a random order leaves 9 in 59 with one speaker; the given order has 54.
    assert np.count_nonzero(np.diff(labels) == 0) < 27


def test_segments_rates_and_channels(tmp_path):
    stereo = sound(1, 3 * RATE, channels=2)
    soundfile.write(tmp_path / "stereo.wav", stereo, RATE)
    tone = np.sin(2 * np.pi * 440 * np.arange(8000) / 8000) / 2
    soundfile.write(tmp_path / "low.wav", tone, 8000)
    corpus = Corpus(
        [
            Entry("s", "cut", str(tmp_path / "stereo.wav"), 0.5, 1.25),
            Entry("s", "rest", str(tmp_path / "stereo.wav"), 2.5),
            Entry("s", "over", str(tmp_path / "stereo.wav"), 2.75, 5.0),
            Entry("t", "low", str(tmp_path / "low.wav")),
        ]
    )
    for format in ("flac", "copy"):
        write_shards(corpus, tmp_path / format, format=format)
        found = {entry.id: entry for entry in read_index(tmp_path / format)}
        mean = np.rint(stereo.mean(axis=1)).astype(np.int16)  # halves to even, as the writer does
        np.testing.assert_array_equal(decode(found["cut"]), mean[8000:28000])
        np.testing.assert_array_equal(decode(found["rest"]), mean[40000:])
        np.testing.assert_array_equal(decode(found["over"]), mean[44000:])
        assert [found[name].seconds for name in ("cut", "rest", "over", "low")] == [1.25, 0.5, 0.25, 1.0]
    flac = {entry.id: entry for entry in read_index(tmp_path / "flac")}["low"]
    want = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000) / 2
    np.testing.assert_allclose(decode(flac)[500:-500] / 32768, want[500:-500], atol=1e-3)  # the ends ring
    copied = open_member(*copy_of(found["low"])).getvalue()
    assert copied == (tmp_path / "low.wav").read_bytes()


def copy_of(entry):
    return entry.path, entry.offset, entry.size, entry.id


@pytest.mark.parametrize("seconds", [math.nan, 0.25, 0.255, 0.242], ids=str)
def test_copy_keeps_the_bytes_of_whole_files(tmp_path, seconds):
    soundfile.write(tmp_path / "a.ogg", sound(0), RATE, format="OGG", subtype="VORBIS")
    write_shards(Corpus([Entry("s", "a", str(tmp_path / "a.ogg"), 0.0, seconds)]), tmp_path / "out", format="copy")
    (entry,) = read_index(tmp_path / "out")
    assert open_member(*copy_of(entry)).getvalue() == (tmp_path / "a.ogg").read_bytes()
    assert entry.seconds == 0.25
    assert "a.ogg" in (tmp_path / "out/index.csv").read_text()


def test_copy_cuts_the_beginning_of_a_file(tmp_path):
    soundfile.write(tmp_path / "a.wav", sound(0), RATE)
    write_shards(Corpus([Entry("s", "a", str(tmp_path / "a.wav"), 0.0, 0.2)]), tmp_path / "out", format="copy")
    (entry,) = read_index(tmp_path / "out")
    np.testing.assert_array_equal(decode(entry), sound(0)[:3200])
    assert "a.flac" in (tmp_path / "out/index.csv").read_text()


def test_full_scale_does_not_wrap(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.array([1.5, 1.0, -1.0, -1.5, 0.5] * 100), RATE, subtype="FLOAT")
    write_shards(Corpus([Entry("s", "a", str(tmp_path / "a.wav"))]), tmp_path / "out")
    (entry,) = read_index(tmp_path / "out")
    np.testing.assert_array_equal(decode(entry)[:5], [32767, 32767, -32768, -32768, 16384])


@pytest.mark.parametrize("num_samples", [1, 319, 320, 40000])
def test_opus(tmp_path, num_samples):
    time = np.arange(num_samples) / RATE
    soundfile.write(tmp_path / "a.wav", np.sin(2 * np.pi * 300 * time) / 2, RATE)
    write_shards(Corpus([Entry("s", "a", str(tmp_path / "a.wav"))]), tmp_path / "out", format="opus")
    (entry,) = read_index(tmp_path / "out")
    samples = decode(entry) / 32768
    assert len(samples) == num_samples == round(entry.seconds * RATE)
    data = open_member(*copy_of(entry))
    with soundfile.SoundFile(data) as file:
        assert (file.format, file.subtype) == ("OGG", "OPUS")
    if num_samples == 40000:
        # The rate varies with the sound; half or twice of it is another setting.
        assert 0.75 < entry.size * 8 / entry.seconds / (shards.OPUS_KBITS * 1000) < 1.25
        inner = slice(4000, -4000)
        error = samples[inner] - np.sin(2 * np.pi * 300 * time[inner]) / 2
        assert np.sqrt(np.mean(error**2)) < 0.05 * 0.5 / np.sqrt(2)  # a lossy codec, but in place and in phase


def test_opus_pages_have_right_checksums(tmp_path):
    """A bit-by-bit checksum of RFC 3533 (polynomial 0x04c11db7, no inversion) agrees with the one written."""
    soundfile.write(tmp_path / "a.wav", sound(0, 30000), RATE)
    write_shards(Corpus([Entry("s", "a", str(tmp_path / "a.wav"))]), tmp_path / "out", format="opus")
    (entry,) = read_index(tmp_path / "out")
    data = open_member(*copy_of(entry)).getvalue()
    pages = data.split(b"OggS")[1:]
    assert len(pages) > 2
    for page in (b"OggS" + page for page in pages):
        crc = 0
        for byte in page[:22] + bytes(4) + page[26:]:
            crc ^= byte << 24
            for _ in range(8):
                crc = (crc << 1) ^ (0x104C11DB7 if crc & 0x80000000 else 0)
        assert crc.to_bytes(4, "little") == page[22:26] and page[14:18] == bytes(4)


def test_shards_from_shards(tmp_path, source):
    corpus, samples = source
    write_shards(corpus, tmp_path / "one")
    for format in ("flac", "copy"):
        write_shards(read_index(tmp_path / "one"), tmp_path / format, format=format)
        for entry in read_index(tmp_path / format):
            np.testing.assert_array_equal(decode(entry), samples[entry.id])


def test_unreadable_utterances_are_left_out(tmp_path, source):
    corpus, _ = source
    (tmp_path / "text.wav").write_text("not audio" * 100)
    soundfile.write(tmp_path / "a.wav", sound(0), RATE)
    bad = [
        Entry("s", "gone", str(tmp_path / "gone.wav")),
        Entry("s", "text", str(tmp_path / "text.wav")),
        Entry("s", "past", str(tmp_path / "a.wav"), 9.0, 1.0),
    ]
    told = []
    written = write_shards(Corpus([*corpus, *bad]), tmp_path / "out", warn=told.append)
    assert set(written.left_out) == {"gone", "text", "past"} and written.utterances == len(corpus)
    assert len(told) == 3 and any("'past', 1.0 s from 9.0 s, holds no samples" in line for line in told)
    assert json.loads((tmp_path / "out/index.json").read_text())["left_out"] == written.left_out
    assert sorted(read_index(tmp_path / "out").ids) == sorted(NAMES)


def test_too_many_unreadable(tmp_path, source):
    corpus, _ = source
    bad = [Entry("s", f"gone{k}", str(tmp_path / "gone.wav")) for k in range(11)]
    with pytest.raises(InputError, match=r"11 of \d+ utterances could not be read, the first: .*gone\.wav: no such"):
        write_shards(Corpus([*corpus, *bad]), tmp_path / "out")
    with pytest.raises(InputError, match=r"1 of 1 utterances could not be read"):
        write_shards(Corpus(bad[:1]), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_wrong_arguments(tmp_path, source):
    corpus, _ = source
    for options, message in (
        ({"format": "flak"}, "unknown format 'flak'.*'flac'"),
        ({"shard_megabytes": 0}, "shard_megabytes must be positive, got 0"),
        ({"shard_megabytes": math.nan}, "shard_megabytes must be positive, got nan"),
        ({"sample_rate": 0}, "sample_rate must be positive, got 0"),
        ({"format": "opus", "sample_rate": 22050}, "sample_rate must be one of .*48000 for opus, got 22050"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ):
        with pytest.raises(InputError, match=message):
            write_shards(corpus, tmp_path / "out", **options)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/letter").touch()
    with pytest.raises(InputError, match="full: is there already"):
        write_shards(corpus, tmp_path / "full")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/letter").touch()
    with pytest.raises(InputError, match=r"out\.partial: is in the way"):
        write_shards(corpus, tmp_path / "out")
    assert (tmp_path / "full/letter").exists() and (tmp_path / "out.partial/letter").exists()


def test_killed_run_leaves_nothing_that_looks_whole(tmp_path, source):
    corpus, _ = source
    program = (
        "import os, signal, sys; from spkfast.data.corpus import Corpus, Entry; from spkfast.data.shards import *\n"
        "corpus = Corpus(Entry('s', str(k), sys.argv[1]) for k in range(50))\n"
        "kill = lambda done, total: os.kill(os.getpid(), signal.SIGKILL) if done == 40 else None\n"
        "write_shards(corpus, sys.argv[2], shard_megabytes=0.02, progress=kill)\n"
    )
    run = subprocess.run([sys.executable, "-c", program, corpus[0].path, tmp_path / "out"])
    assert run.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists() and list((tmp_path / "out.partial").glob("shard-*.tar"))
    with pytest.raises(InputError, match="not a folder of shards"):
        read_index(tmp_path / "out.partial")
    write_shards(corpus, tmp_path / "out")
    assert len(read_index(tmp_path / "out")) == len(NAMES) and not (tmp_path / "out.partial").exists()


def test_interrupted_run_cleans_up(tmp_path, source):
    corpus, _ = source

    def interrupt(done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(corpus, tmp_path / "out", progress=interrupt)
    assert not list(tmp_path.glob("out*"))


@pytest.fixture
def written(tmp_path, source):
    write_shards(source[0], tmp_path / "out", shard_megabytes=0.02)
    return tmp_path / "out"


def test_truncated_and_grown_shards_are_named(written):
    shard = written / "shard-000001.tar"
    whole = shard.read_bytes()
    corpus = read_index(written)
    inside = [entry for entry in corpus if entry.path == str(shard)]
    for data, state in ((whole[:-1000], "truncated"), (whole + b"x", "longer than when it was written")):
        shard.write_bytes(data)
        with pytest.raises(InputError, match=rf"shard-000001\.tar: the shard is {state} \({len(data)} of"):
            read_index(written)
    shard.write_bytes(whole[: inside[-1].offset + 10])
    with pytest.raises(InputError, match=r"shard-000001\.tar: the shard is truncated: .*ends at byte"):
        open_member(*copy_of(inside[-1]))
    shard.unlink()
    with pytest.raises(InputError, match=r"shard-000001\.tar: no such shard, but the index names it"):
        read_index(written / "index.csv")


def test_shard_that_goes_away(written):
    corpus = read_index(written)
    for path in written.glob("*.tar"):
        path.unlink()
    with pytest.raises(InputError, match=r"shard-\d+\.tar: no such shard"):
        open_member(*copy_of(corpus[0]))


def test_shard_changed_under_its_index(tmp_path, written, source):
    """Shards in another order, written under an index that somebody still holds."""
    corpus = read_index(written)
    entry = corpus[0]
    assert decode(entry) is not None
    write_shards(source[0], tmp_path / "other", shard_megabytes=0.02, seed=1)
    with open(entry.path, "r+b") as file:  # in place: the descriptor of a reader stays the same
        file.write((tmp_path / "other/shard-000000.tar").read_bytes())
    match = rf"{entry.path}: was changed after its index was written \(.*\); run 'spkfast prepare shards' again"
    with pytest.raises(InputError, match=match):
        open_member(*copy_of(entry))


def test_shards_written_anew_are_read_anew(tmp_path, source):
    """A process that read the shards of before must not go on with their open files."""
    corpus, samples = source
    for seed in (0, 1):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        write_shards(corpus, tmp_path / "out", seed=seed)
        for entry in read_index(tmp_path / "out"):
            np.testing.assert_array_equal(decode(entry), samples[entry.id])


def test_wrong_offsets_names_and_sizes(written):
    path, offset, size, name = copy_of(read_index(written)[0])
    open_member(path, offset, size, name)
    for wrong in ((path, offset + 512, size, name), (path, offset, size - 1, name), (path, offset, size, f"{name}x")):
        with pytest.raises(InputError, match="was changed after its index was written"):
            open_member(*wrong)
    with pytest.raises(InputError, match="truncated"):
        open_member(path, 0, size, name)


def test_damaged_bytes_are_found_by_verify(written):
    corpus = read_index(written)
    entry = corpus[len(corpus) // 2]
    with open(entry.path, "r+b") as file:
        file.seek(entry.offset + entry.size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    count, (line,) = verify_shards(written)
    assert count == len(NAMES) and repr(entry.id) in line and entry.path in line and "\n" not in line
    with open(entry.path, "r+b") as file:
        file.seek(entry.offset - 512)
        file.write(b"z")
    assert "was changed" in verify_shards(written)[1][0]


def test_damaged_indices(written):
    index, description = written / "index.csv", written / "index.json"
    rows = index.read_bytes().decode(errors="surrogateescape")
    told = description.read_text()
    head = rows.split("\r\n", 1)[0]
    first = f"{head}\r\nid,s,shard-000000.tar,m,512,9,8,16000,0a\r\n"

    def check(message, *, text=rows, json=told):
        index.write_text(text, errors="surrogateescape", newline="")
        description.write_text(json)
        with pytest.raises(InputError, match=message) as caught:
            read_index(written)
        assert "\n" not in str(caught.value)

    check(r"index\.csv: holds 1 utterances, 9 were written", text=first)
    for wrong in ("512,9,8", "x12,9,8", "512,9,8,0"):
        check(r"index\.csv: row 1 is damaged", text=first.replace("512,9,8,16000", wrong))
    check(r"index\.csv: row 1 is damaged", text=first.replace("000000", "999999"))
    check(r"index\.csv: expected a first line id,speaker", text=rows[3:])
    check(r"index\.json: damaged", json=told[:50])
    check(r"index\.json: damaged", json="[]")
    check(r"index\.json: has version 9, expected 1", json=told.replace('"version": 1', '"version": 9'))
    index.unlink()
    with pytest.raises(InputError, match="not a folder of shards"):
        read_index(written)
    with pytest.raises(InputError, match="not a folder of shards"):
        read_index(written.parent)


def test_processes_read_after_a_fork(written):
    """Parent and child share descriptors; a shared position would mix what they read."""
    corpus = read_index(written)
    want = [open_member(*copy_of(entry)).getvalue() for entry in corpus]  # opens the shards before the fork

    def right():
        return all(
            open_member(*copy_of(corpus[k])).getvalue() == want[k] for _ in range(50) for k in range(len(corpus))
        )

    child = os.fork()
    if child == 0:
        os._exit(0 if right() else 1)
    assert right()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_descriptors_are_bounded(tmp_path, source, monkeypatch):
    from functools import lru_cache

    monkeypatch.setattr(shards, "_opened", lru_cache(maxsize=2)(shards._opened.__wrapped__))
    write_shards(source[0], tmp_path / "out", shard_megabytes=0.001)
    corpus = read_index(tmp_path / "out")
    assert len(corpus.files) == len(NAMES)
    before = len(os.listdir("/proc/self/fd"))
    want = [open_member(*copy_of(entry)).getvalue() for entry in corpus]
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    wrong = []

    def read():  # eviction in one thread must not close what another one reads
        for _ in range(20):
            wrong.extend(k for k, entry in enumerate(corpus) if open_member(*copy_of(entry)).getvalue() != want[k])

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
