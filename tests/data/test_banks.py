"""Banks of noise and impulse responses."""

import json
import os
import signal
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import soundfile
import torch

from spkfast.data.banks import Bank, is_unfinished
from spkfast.errors import InputError

RATE = 16000


def _write(path, samples, rate=RATE, subtype="PCM_16"):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, subtype=subtype)


@pytest.fixture
def musan(tmp_path):
    rng = np.random.default_rng(0)
    root = tmp_path / "musan"
    for name, size in (("music/a/one.wav", 900), ("noise/free/two.flac", 700), ("speech/three.wav", 800)):
        _write(root / name, rng.integers(-32768, 32768, size).astype(np.int16))
    return root


def _samples(bank, name):
    place = bank.names.index(name)
    begin = int(bank.begins[place])
    return bank.samples[begin : begin + int(bank.sizes[place])].numpy()


def test_takes_the_very_numbers_and_the_categories_of_the_folders(musan):
    bank = Bank.from_folder(musan, RATE)
    assert dict(zip(bank.names, bank.categories, strict=True)) == {
        "music/a/one.wav": "music",
        "noise/free/two.flac": "noise",
        "speech/three.wav": "speech",
    }
    for name in bank.names:
        np.testing.assert_array_equal(_samples(bank, name), soundfile.read(musan / name, dtype="int16")[0])
    assert bank.samples.dtype == torch.int16 and len(bank) == 3
    assert bank.seconds == 2400 / RATE
    assert bank.places("speech").tolist() == [bank.names.index("speech/three.wav")]


def test_files_elsewhere_are_noise(tmp_path):
    _write(tmp_path / "street" / "car.wav", np.ones(50, dtype=np.int16))
    assert Bank.from_folder(tmp_path, RATE).categories == ["noise"]


def test_the_name_of_the_folder_decides_where_no_folder_in_it_does(musan, tmp_path, monkeypatch):
    assert Bank.from_folder(musan / "music", RATE).categories == ["music"]
    assert Bank.from_folder(f"{musan}/noise/../speech/", RATE).categories == ["speech"]
    monkeypatch.chdir(musan / "speech")
    assert Bank.from_folder(".", RATE).categories == ["speech"]
    musan.rename(tmp_path / "noise")
    assert Bank.from_folder(tmp_path / "noise", RATE).categories == ["music", "noise", "speech"]
    assert Bank.from_folder(tmp_path / "noise" / "music", RATE, rir=True).categories == ["rir"]


def test_silent_and_broken_files_are_left_out_by_name(musan):
    _write(musan / "noise" / "silent.wav", np.zeros(100, dtype=np.int16))
    (musan / "noise" / "broken.wav").write_bytes(b"RIFFnothing")
    said = []
    bank = Bank.from_folder(musan, RATE, said.append)
    assert len(bank) == 3
    assert [line for line in said if "silent.wav: left out, it is silent" in line]
    assert [line for line in said if "broken.wav" in line]


def test_only_silence_is_refused(tmp_path):
    _write(tmp_path / "noise" / "silent.wav", np.zeros(100, dtype=np.int16))
    with pytest.raises(InputError, match="no file in this folder can be used"):
        Bank.from_folder(tmp_path, RATE)


def test_other_rates_are_resampled_and_told_once(tmp_path):
    t = np.arange(8000) / 8000
    for name in "ab":
        _write(tmp_path / f"{name}.wav", 0.5 * np.sin(2 * np.pi * 440 * t), 8000)
    said = []
    bank = Bank.from_folder(tmp_path, RATE, said.append)
    assert bank.sizes.tolist() == [16000, 16000]
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    middle = slice(2000, 14000)
    np.testing.assert_allclose(_samples(bank, "a.wav")[middle] / 32768, expected[middle], atol=2e-4)
    assert len(said) == 1 and "2 of 2 files resampled to 16000 Hz" in said[0]


def test_responses_of_more_bits_use_the_full_range(tmp_path):
    response = np.zeros(300)
    response[[7, 40]] = 1e-4, -0.5e-4  # in 16 bits 3 and 2 units
    _write(tmp_path / "room.wav", response, subtype="FLOAT")
    bank = Bank.from_folder(tmp_path, RATE, rir=True)
    found = _samples(bank, "room.wav")
    assert found[7] == 32767 and found[40] == -16384 and bank.categories == ["rir"]
    energy = np.square(found / 32768).sum()
    assert float(bank.gains[0]) == pytest.approx(energy**-0.5, rel=1e-6)


def test_responses_of_16_bits_stay_as_they_are(tmp_path):
    samples = np.array([0, 5, -3, 1], dtype=np.int16)
    _write(tmp_path / "room.wav", samples)
    np.testing.assert_array_equal(_samples(Bank.from_folder(tmp_path, RATE, rir=True), "room.wav"), samples)


def test_of_many_channels_responses_take_the_first_and_noise_the_average(tmp_path):
    _write(tmp_path / "two.wav", np.array([[100, 300], [-50, 50], [7, 9]], dtype=np.int16))
    assert _samples(Bank.from_folder(tmp_path, RATE, rir=True), "two.wav").tolist() == [100, -50, 7]
    assert _samples(Bank.from_folder(tmp_path, RATE), "two.wav").tolist() == [200, 0, 8]


def test_saved_banks_are_read_back(musan, tmp_path):
    bank = Bank.from_folder(musan, RATE)
    bank.save(tmp_path / "saved")
    for again in (Bank.load(tmp_path / "saved"), Bank.from_folder(tmp_path / "saved", RATE)):
        assert torch.equal(again.samples, bank.samples)
        assert torch.equal(again.begins, bank.begins) and again.names == bank.names
        assert again.categories == bank.categories and again.sample_rate == RATE


def test_bank_of_another_rate_is_refused(musan, tmp_path):
    Bank.from_folder(musan, RATE).save(tmp_path / "saved")
    with pytest.raises(InputError, match="16000 Hz, 8000 Hz are needed"):
        Bank.from_folder(tmp_path / "saved", 8000)


def _cut(folder):
    path = folder / "samples.npy"
    path.write_bytes(path.read_bytes()[:-10])


def _index(change):
    def apply(folder):
        index = json.loads((folder / "bank.json").read_text())
        change(index)
        (folder / "bank.json").write_text(json.dumps(index))

    return apply


@pytest.mark.parametrize("rir", [False, True])
def test_saved_banks_of_the_other_kind_are_refused(musan, tmp_path, rir):
    Bank.from_folder(musan, RATE, rir=rir).save(tmp_path / "saved")
    assert len(Bank.from_folder(tmp_path / "saved", RATE, rir=rir)) == 3
    message = "one of noise is needed; .* without --rir" if rir else "one of room impulse responses .* with --rir"
    with pytest.raises(InputError, match=f"saved: holds a bank of .*{message}"):
        Bank.from_folder(tmp_path / "saved", RATE, rir=not rir)


def test_banks_saved_while_they_are_read_are_the_same(musan, tmp_path):
    bank = Bank.from_folder(musan, RATE)
    told = []
    saved = Bank.from_folder(musan, RATE, out=tmp_path / "saved", progress=lambda *done: told.append(done))
    bank.save(tmp_path / "later")
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert torch.equal(saved.samples, bank.samples) and saved.names == bank.names
    for name in ("samples.npy", "bank.json"):
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "later" / name).read_bytes()
    assert sorted(os.listdir(tmp_path / "saved")) == ["bank.json", "samples.npy"]
    np.testing.assert_array_equal(np.load(tmp_path / "saved" / "samples.npy"), bank.samples)
    again = Bank.from_folder(tmp_path / "saved", RATE, out=tmp_path / "again")
    assert torch.equal(again.samples, bank.samples) and (tmp_path / "again" / "bank.json").is_file()


def test_a_mapped_bank_can_be_saved_over_itself(musan, tmp_path):
    bank = Bank.from_folder(musan, RATE, out=tmp_path / "saved")
    kept = bank.samples.clone()
    bank.save(tmp_path / "saved")
    assert torch.equal(bank.samples, kept) and torch.equal(Bank.load(tmp_path / "saved").samples, kept)


def test_what_fails_leaves_the_bank_that_was_there(musan, tmp_path):
    Bank.from_folder(musan, RATE, out=tmp_path / "saved")
    before = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}

    def fail(done, total):
        if done == 2:
            raise KeyboardInterrupt

    for out in ("saved", "new"):
        with pytest.raises(KeyboardInterrupt):
            Bank.from_folder(musan, RATE, out=tmp_path / out, progress=fail)
    assert {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()} == before
    assert not (tmp_path / "new").exists()


def test_killed_runs_leave_no_bank_and_are_known(musan, tmp_path):
    program = (
        "import os, signal, sys; from spkfast.data.banks import Bank\n"
        "kill = lambda done, total: os.kill(os.getpid(), signal.SIGKILL) if done == 3 else None\n"
        "Bank.from_folder(sys.argv[1], out=sys.argv[2], progress=kill)\n"
    )
    run = subprocess.run([sys.executable, "-c", program, musan, tmp_path / "out"])
    assert run.returncode == -signal.SIGKILL
    assert os.listdir(tmp_path / "out") and is_unfinished(tmp_path / "out")
    with pytest.raises(InputError, match="out: not a bank"):
        Bank.load(tmp_path / "out")
    assert len(Bank.from_folder(musan, RATE, out=tmp_path / "out")) == 3
    assert sorted(os.listdir(tmp_path / "out")) == ["bank.json", "samples.npy"]
    assert not is_unfinished(tmp_path / "out") and not is_unfinished(tmp_path / "none")
    (tmp_path / "out" / "bank.json").rename(tmp_path / "out" / "bank.json.partial")
    assert is_unfinished(tmp_path / "out")
    (tmp_path / "out" / "letter").touch()
    assert not is_unfinished(tmp_path / "out")


def test_memory_while_reading(tmp_path):
    size, files = 10000, 500
    samples = np.random.default_rng(0).integers(-99, 99, size).astype(np.int16)
    for number in range(files):
        _write(tmp_path / "noise" / f"{number}.wav", samples)
    Bank.from_folder(tmp_path / "noise", RATE)  # what is imported or kept once

    def peak(**options):
        tracemalloc.start()
        try:
            bank = Bank.from_folder(tmp_path / "noise", RATE, **options)
            assert len(bank.samples) == size * files
            return tracemalloc.get_traced_memory()[1] / bank.samples.nbytes
        finally:
            tracemalloc.stop()

    assert peak() < 1.2
    # At most 8 threads hold a file as floats and its copies, and as many results wait.
    assert peak(out=tmp_path / "saved") < 0.1


def test_fingerprints_follow_all_that_a_bank_holds(musan, tmp_path):
    bank = Bank.from_folder(musan, RATE, out=tmp_path / "saved")
    told = {bank.fingerprint}
    assert len(bank.fingerprint) == 16 and int(bank.fingerprint, 16)

    def other(**changes):
        values = {name: getattr(bank, name) for name in ("samples", "names", "categories", "sample_rate")}
        return Bank(**{"sizes": bank.sizes.tolist()} | values | changes).fingerprint

    assert {other(), Bank.from_folder(musan, RATE).fingerprint, Bank.load(tmp_path / "saved").fingerprint} == told
    changed = bank.samples.clone()
    changed[-1] += 1
    told |= {other(samples=changed), other(sizes=[899, 701, 800]), other(names=["a", "b", "c"])}
    told |= {other(categories=["noise"] * 3), other(sample_rate=8000)}
    assert len(told) == 6


def test_the_fingerprint_of_a_saved_bank_reads_no_samples(musan, tmp_path):
    bank = Bank.from_folder(musan, RATE)
    bank.save(tmp_path / "saved")
    loaded = Bank.load(tmp_path / "saved")
    loaded.samples = None
    assert loaded.fingerprint == bank.fingerprint


def test_moves_to_any_device_given_by_name_too(musan):
    bank = Bank.from_folder(musan, RATE)
    samples = bank.samples
    assert bank.to("cpu").to(torch.device("cpu")) is bank and bank.samples is samples
    assert bank.to("meta").samples.device == torch.device("meta")


class _OnCpu(torch.Tensor):
    """Samples that stay where they are and tell where they were sent."""

    def to(self, device):
        return device


@pytest.mark.parametrize(("free", "moves"), [(9600, False), (9601, False), (9602, True)])
def test_moves_to_a_gpu_where_less_than_half_of_the_free_memory_is_needed(musan, monkeypatch, free, moves):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**9))
    bank = Bank.from_folder(musan, RATE)
    bank.samples = bank.samples.as_subclass(_OnCpu)
    assert bank.samples.nbytes == 4800
    samples, said = bank.samples, []
    assert bank.to("cuda:1", said.append) is bank
    if moves:
        assert bank.samples == torch.device("cuda:1") and not said
    else:
        assert bank.samples is samples
        (line,) = said
        assert "4.8e-06 GB stays on cpu" in line and "free on cuda:1" in line
        assert bank.to("cuda:1").samples is samples


class _OnGpu(torch.Tensor):
    """Samples that say that they are on a GPU."""

    device = torch.device("cuda:0")


def test_what_is_on_the_gpu_stays_there_without_a_word(musan, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 10**9))
    bank = Bank.from_folder(musan, RATE)
    bank.samples = bank.samples.as_subclass(_OnGpu)
    samples, said = bank.samples, []
    assert bank.to("cuda", said.append).to("cuda:0", said.append).samples is samples and not said
    bank.to("cuda:1", said.append)
    assert len(said) == 1 and "stays on cuda:0" in said[0]


def test_samples_that_are_not_int16_are_refused():
    with pytest.raises(InputError, match="samples must be int16, got float32"):
        Bank(torch.zeros(3), [3], ["a"], ["noise"], RATE)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, "damaged"),
        (lambda folder: (folder / "samples.npy").unlink(), "damaged"),
        (lambda folder: (folder / "bank.json").write_text("{"), "damaged"),
        (_index(lambda index: index["sizes"].pop()), "not what bank.json says"),
        (_index(lambda index: index["names"].pop()), "do not fit"),
        (_index(lambda index: index.update(version=0)), "written in version 0"),
        (_index(lambda index: index.pop("names")), "damaged"),
        (_index(lambda index: index.pop("samples_sha256")), "damaged"),
    ],
)
def test_damaged_banks_are_refused(musan, tmp_path, damage, message):
    folder = tmp_path / "saved"
    Bank.from_folder(musan, RATE).save(folder)
    damage(folder)
    with pytest.raises(InputError, match=message):
        Bank.load(folder)


def test_missing_folders_are_named(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such folder"):
        Bank.from_folder(tmp_path / "nowhere", RATE)
