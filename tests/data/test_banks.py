"""Banks of noise and impulse responses."""

import json

import numpy as np
import pytest
import soundfile
import torch

from spkfast.data.banks import Bank
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
