"""Crops, the order of draws, and augmentation."""

from __future__ import annotations

import numpy as np
import pytest

from spkfast.data.augment import Augment, change_speed, mix, reverberate
from spkfast.data.crops import CropDataset, Draw, StepSampler
from spkfast.data.lists import read_train_list
from spkfast.errors import InputError
from tests.training.corpus import make_tones


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_tones(tmp_path_factory.mktemp("tones"))


def dataset(corpus, **options):
    return CropDataset(read_train_list(corpus / "train_list.txt"), corpus, **options)


def test_crop_follows_from_its_seed_and_has_its_length(corpus):
    crops = dataset(corpus, crop_seconds=0.7, speeds=(1.0, 0.9, 1.1))
    assert crops.num_classes == 12
    one, same, other = crops[Draw(1, (0, 5))], crops[Draw(1, (0, 5))], crops[Draw(1, (0, 6))]
    assert one.samples.dtype == np.float32 and one.samples.shape == (11200,)
    assert np.array_equal(one.samples, same.samples) and one.label == same.label
    assert not np.array_equal(one.samples, other.samples)
    assert {crops[Draw(4, (0, k))].label for k in range(30)} == {1, 5, 9}


def test_crop_is_a_piece_of_the_file(corpus):
    import soundfile

    whole, _ = soundfile.read(corpus / "spk0" / "s" / "0.wav", dtype="float32")
    crop = dataset(corpus, crop_seconds=0.25)[Draw(0, (0, 3))].samples
    windows = np.lib.stride_tricks.sliding_window_view(whole, len(crop))
    assert (np.abs(windows - crop).max(axis=1) == 0).sum() == 1


def test_short_utterance_repeats(corpus):
    crop = dataset(corpus, crop_seconds=4.0)[Draw(0, (0, 0))].samples
    assert crop.shape == (64000,)
    np.testing.assert_array_equal(crop[:16000], crop[24000:40000])


def test_bad_file_is_replaced_and_named(tmp_path):
    make_tones(tmp_path)
    (tmp_path / "spk0" / "s" / "1.wav").write_bytes(b"not audio at all")
    crops = dataset(tmp_path)
    crop, same = crops[Draw(1, (0, 1))], crops[Draw(1, (0, 1))]
    assert crop.label >= 0 and crop.errors and "1.wav" in crop.errors[0]
    assert np.array_equal(crop.samples, same.samples)
    for path in tmp_path.rglob("*.wav"):
        path.write_bytes(b"")
    assert crops[Draw(0, (0, 0))].label == -1


def test_bad_noise_costs_no_crop(corpus, tmp_path):
    make_tones(tmp_path, speakers=1, utterances=6)
    (tmp_path / "spk0" / "s" / "3.wav").write_bytes(b"")
    augment = Augment(tmp_path, None, 1.0, (0.0, 10.0), 16000)
    crops = [dataset(corpus, augment=augment)[Draw(0, (0, k))] for k in range(60)]
    assert all(crop.label >= 0 for crop in crops)
    assert any("3.wav" in error for crop in crops for error in crop.errors)


def test_sampler_covers_each_epoch_once_and_resumes():
    labels = [0] * 5 + [1] * 2 + [2] * 9
    whole = list(StepSampler(labels, 4, 0, 12, seed=3))
    indices = [draw.index for batch in whole for draw in batch]
    for epoch in range(3):
        assert sorted(indices[16 * epoch : 16 * (epoch + 1)]) == list(range(16))
    assert indices[:16] != indices[16:32]
    assert list(StepSampler(labels, 4, 7, 12, seed=3)) == whole[7:]
    assert len({draw.seed for batch in whole for draw in batch}) == 48
    ranks = [list(StepSampler(labels, 2, 0, 12, seed=3, rank=rank, world_size=2)) for rank in range(2)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == whole


def test_balanced_sampler_draws_speakers_alike():
    labels = [0] * 50 + [1] * 2 + [2] * 10
    draws = [labels[d.index] for batch in StepSampler(labels, 30, 0, 10, seed=0, balanced=True) for d in batch]
    assert np.bincount(draws).tolist() == [100, 100, 100]


def test_mix_reaches_the_ratio():
    rng = np.random.default_rng(0)
    signal, noise = rng.standard_normal((2, 16000)).astype(np.float32)
    for snr in (0.0, 10.0):
        added = mix(signal, 0.3 * noise, snr) - signal
        ratio = 10 * np.log10(np.square(signal).mean() / np.square(added).mean())
        assert abs(ratio - snr) < 0.02


def test_reverberate_is_a_convolution_of_unit_energy():
    rng = np.random.default_rng(0)
    signal, response = rng.standard_normal(1000).astype(np.float32), rng.standard_normal(77).astype(np.float32)
    want = np.convolve(signal, response / np.linalg.norm(response))[:1000]
    np.testing.assert_allclose(reverberate(signal, response), want, atol=1e-5)


def test_speed_scales_pitch():
    time = np.arange(16000) / 16000
    faster = change_speed(np.sin(2 * np.pi * 400 * time).astype(np.float32), 1.1)
    assert abs(len(faster) - 16000 / 1.1) <= 2
    peak = np.abs(np.fft.rfft(faster, 16000)).argmax()
    assert abs(peak - 440) <= 1


def test_augment_changes_crops_at_the_given_rate(corpus, tmp_path):
    augment = Augment(corpus / "spk0", corpus / "spk1", 0.5, (0.0, 10.0), 16000)
    samples = np.ones(8000, dtype=np.float32)
    changed = [not np.array_equal(augment(samples, np.random.default_rng(k)), samples) for k in range(200)]
    assert 70 < sum(changed) < 130
    with pytest.raises(InputError, match="no audio files"):
        Augment(tmp_path, None, 0.5, (0.0, 10.0), 16000)
