"""Augmentation of batches: what is drawn, what is done, and that neither depends on the batch."""

import math

import numpy as np
import pytest
import scipy.signal
import torch

from spkfast import functional
from spkfast.data import augmentation
from spkfast.data.augmentation import (
    Augment,
    AugmentedFbank,
    Companded,
    Convolved,
    Filtered,
    Mixed,
    _cut_out,
    _rooms_cut_out,
)
from spkfast.data.banks import Bank
from spkfast.data.corpus import Corpus, Entry
from spkfast.data.reading import CropDataset
from spkfast.data.recipes import (
    Choice,
    Companding,
    Gain,
    Noise,
    PeakNormalize,
    Recipe,
    Reverb,
    Stage,
    Telephone,
    recipe,
)
from spkfast.errors import InputError
from spkfast.frontends import frontend
from spkfast.nn import Fbank, SpecAugment

SAMPLES = 4000
RATE = 16000


def _bank(sizes, categories, seed=0):
    rng = np.random.default_rng(seed)
    samples = np.concatenate([rng.normal(0, 1000 * (k + 1), size) for k, size in enumerate(sizes)])
    samples = torch.from_numpy(samples.round().clip(-32768, 32767).astype(np.int16))
    return Bank(samples, sizes, [f"file {k}" for k in range(len(sizes))], categories, RATE)


NOISE = _bank(
    [9000, 700, 4000, 12000, 3999, 5000, 4001], ["music", "noise", "noise", "speech", "speech", "music", "noise"]
)


def _rooms():
    rng = np.random.default_rng(1)
    parts, sizes = [], []
    for delay, size in ((0, 50), (37, 900), (12, 6000)):
        room = rng.normal(0, 300, size) * np.exp(-np.arange(size) / 400)
        room[:delay] = 0
        room[delay] = 20000
        parts.append(room.round().astype(np.int16))
        sizes.append(size)
    return Bank(torch.from_numpy(np.concatenate(parts)), sizes, ["a", "b", "c"], ["rir"] * 3, RATE)


RIR = _rooms()


def _crops(batch, width=SAMPLES, seed=2):
    generator = torch.Generator().manual_seed(seed)
    levels = torch.logspace(1.5, 4, batch)[:, None]
    return (torch.randn(batch, width, generator=generator) * levels).round().clamp(-32768, 32767).to(torch.int16)


def _keys(batch, seed=3):
    return torch.randint(-(2**63), 2**63 - 1, (batch,), generator=torch.Generator().manual_seed(seed))


def _run(made, crops, keys, **options):
    augment = Augment(made, NOISE, RIR, num_samples=SAMPLES, **options)
    lengths = torch.full((len(crops),), crops.shape[1])
    speeds = torch.zeros(len(crops), dtype=torch.int64)
    return augment, augment(crops, lengths, speeds, keys)


def _one(*effects, **options):
    return Recipe((Stage((Choice(effects),)),), **options)


def _part(bank, begin, size):
    return bank.samples[begin : begin + size].double().numpy() / 32768


def test_nothing_to_do_gives_the_crops():
    crops = _crops(3)
    assert torch.equal(_run(recipe("none"), crops, _keys(3))[1], crops.float() / 32768)


def test_realised_ratios_are_those_drawn():
    crops, keys = _crops(60), _keys(60)
    augment, y = _run(_one(Noise("noise", (-5.0, 25.0))), crops, keys)
    (step,) = augment.draw(keys)
    x = crops.double() / 32768
    added = y.double() - x
    realised = 10 * np.log10((x.square().mean(1) / added.square().mean(1)).numpy())
    np.testing.assert_allclose(realised, step.snr_db[:, 0].numpy(), atol=0.01)
    assert step.snr_db.min() < 0 < 20 < step.snr_db.max()


def test_each_file_of_a_babble_has_its_own_ratio():
    crops, keys = _crops(20), _keys(20)
    augment, y = _run(_one(Noise("speech", (13.0, 20.0), (3, 6))), crops, keys)
    (step,) = augment.draw(keys)
    counts = (step.sizes > 0).sum(1)
    assert counts.min() == 3 and counts.max() == 6
    for row in range(20):
        x = crops[row].double().numpy() / 32768
        expected = x.copy()
        for k in range(int(counts[row])):
            whole = _part(NOISE, int(step.begins[row, k]), int(step.sizes[row, k]))
            noise = np.resize(np.roll(whole, -int(step.offsets[row, k])), SAMPLES)
            gain = np.sqrt(np.mean(x**2) / np.mean(noise**2) / 10 ** (float(step.snr_db[row, k]) / 10))
            assert 13 <= float(step.snr_db[row, k]) <= 20
            expected += gain * noise
        np.testing.assert_allclose(y[row].numpy(), expected, atol=2e-6 * np.abs(expected).max())


def test_the_floor_of_the_toolkits():
    crops, keys = _crops(12), _keys(12)
    augment, y = _run(_one(Noise("noise"), power_floor=1e-4), crops, keys)
    (step,) = augment.draw(keys)
    for row in range(12):
        x = crops[row].double().numpy() / 32768
        whole = _part(NOISE, int(step.begins[row, 0]), int(step.sizes[row, 0]))
        noise = np.resize(whole[int(step.offsets[row, 0]) :], SAMPLES) if len(whole) >= SAMPLES else np.resize(
            whole, SAMPLES
        )  # fmt: skip
        of_x, of_noise = (10 * np.log10(np.mean(value**2) + 1e-4) for value in (x, noise))
        expected = x + np.sqrt(10 ** ((of_x - of_noise - float(step.snr_db[row, 0])) / 10)) * noise
        np.testing.assert_allclose(y[row].numpy(), expected, atol=2e-6 * np.abs(expected).max())


def test_rooms_have_unit_energy_and_their_own_delay():
    crops, keys = _crops(30), _keys(30)
    for direct_first in (False, True):
        augment, y = _run(_one(Reverb(direct_first)), crops, keys)
        (step,) = augment.draw(keys)
        assert isinstance(step, Convolved)
        for row in range(30):
            place = int((RIR.begins <= step.begins[row]).sum()) - 1
            whole = _part(RIR, int(RIR.begins[place]), int(RIR.sizes[place]))
            delay = (0, 37, 12)[place]
            assert np.argmax(np.abs(whole)) == delay
            response = (whole[delay:] if direct_first else whole) / np.sqrt(np.sum(whole**2))
            expected = scipy.signal.fftconvolve(crops[row].double().numpy() / 32768, response)[:SAMPLES]
            np.testing.assert_allclose(y[row].numpy(), expected, atol=3e-6 * np.abs(expected).max())
            lag = np.argmax(np.abs(np.correlate(y[row].numpy(), crops[row].double().numpy(), "full"))) - SAMPLES + 1
            assert lag == (0 if direct_first else delay)
        assert len(set(step.begins.tolist())) == 3


def test_gain_and_peak():
    crops, keys = _crops(40), _keys(40)
    augment, y = _run(_one(Gain((-6.0, 3.0)), PeakNormalize(0.01)), crops, keys)
    factors = augment.draw(keys)[0].factors
    decibels = 20 * factors.log10()
    assert -6 <= decibels.min() < -4 and 1 < decibels.max() <= 3
    x = crops.float() / 32768 * factors[:, None]
    torch.testing.assert_close(y, x / (x.abs().amax(1, keepdim=True) + 0.01))


def test_telephone_band():
    augment, y = _run(_one(Telephone()), _crops(1), _keys(1))
    assert isinstance(augment.draw(_keys(1))[0], Filtered)
    impulse = torch.zeros(1, SAMPLES)
    impulse[0, 0] = 1.0
    response = augment(impulse, torch.tensor([SAMPLES]), torch.tensor([0]), _keys(1))[0].double().numpy()
    frequencies, gain = scipy.signal.freqz(response, worN=8192, fs=RATE)
    decibels = 20 * np.log10(np.abs(gain) + 1e-12)

    def at(hz):
        return decibels[np.argmin(np.abs(frequencies - hz))]

    assert abs(at(300) + 6) < 0.5 and abs(at(3400) + 6) < 0.5
    assert np.abs(decibels[(frequencies > 400) & (frequencies < 3300)]).max() < 0.1
    assert decibels[(frequencies > 3600) | (frequencies < 120)].max() < -55
    # Of minimum phase: the energy comes first.
    assert np.square(response[:64]).sum() > 0.95 * np.square(response).sum()
    assert y.isfinite().all()


@pytest.mark.parametrize("law", ["mu", "a"])
def test_companding_has_its_levels_and_noise(law):
    augment, _ = _run(_one(Companding(law)), _crops(1), _keys(1))
    assert isinstance(augment.draw(_keys(1))[0], Companded)
    x = torch.linspace(-1, 1, 40 * SAMPLES - 1)[None]
    whole = Augment(_one(Companding(law)), num_samples=x.shape[1])
    y = whole(x, torch.tensor([x.shape[1]]), torch.tensor([0]), _keys(1))[0].double().numpy()
    assert len(np.unique(y)) == 2 * 127 + 1
    np.testing.assert_allclose(y, -y[::-1], atol=1e-7)  # odd
    # A tone keeps about the ratio of G.711 over 30 dB of level.
    t = np.arange(8000) / RATE
    for level in (0.03, 0.3, 0.9):
        tone = torch.from_numpy(level * np.sin(2 * np.pi * 997 * t)).float()[None]
        made = Augment(_one(Companding(law)), num_samples=8000)
        z = made(tone, torch.tensor([8000]), torch.tensor([0]), _keys(1))
        ratio = 10 * math.log10(tone.square().mean() / (z - tone).square().mean())
        assert 34 < ratio < 42


def test_speeds_are_those_of_the_op():
    made = recipe("none", speeds=[1.0, 0.9, 1.1])
    crops, which = _crops(6, 5000), torch.tensor([0, 1, 2, 2, 1, 0])
    lengths = torch.tensor([4900, 4900, 4900, 1000, 300, 1])
    augment = Augment(made, num_samples=SAMPLES, context=100)
    expected = functional.change_speed(
        crops, which, speeds=made.speeds, num_samples=SAMPLES, lengths=lengths, context=100
    )
    assert torch.equal(augment(crops, lengths, which, _keys(6)), expected)


@pytest.mark.parametrize("name", ["espnet", "wespeaker", "taoruijie", "clova", "room_or_noise"])
def test_a_row_does_not_depend_on_its_batch(name):
    made = recipe(name)
    batch = 24
    crops, keys = _crops(batch, 4700), _keys(batch)
    which = torch.arange(batch) % len(made.speeds)
    lengths = torch.full((batch,), 4600)
    augment = Augment(made, NOISE, RIR, num_samples=SAMPLES, context=60)
    together = augment(crops, lengths, which, keys)
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(0))
    assert torch.equal(augment(crops[order], lengths[order], which[order], keys[order]), together[order])
    for row in range(batch):
        one = slice(row, row + 1)
        assert torch.equal(augment(crops[one], lengths[one], which[one], keys[one]), together[one])
    assert torch.equal(augment(crops, lengths, which, plan=augment.draw(keys)), together)
    assert not torch.equal(augment(crops, lengths, which, keys + 1), together)
    assert together.isfinite().all()


def _shares(made, count=20000):
    """Share of rows with each step, and the plan."""
    augment = Augment(made, NOISE, RIR, num_samples=SAMPLES)
    plan = augment.draw(_keys(count))
    return plan, count


def _near(share, expected, count):
    # Five deviations of a binomial.
    assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / count)


def test_shares_of_espnet():
    (room, noise), count = _shares(recipe("espnet"))
    with_room, with_noise = room.sizes > 0, (noise.sizes > 0).any(1)
    _near(with_room.double().mean().item(), 0.5, count)
    _near(with_noise.double().mean().item(), 0.5, count)
    _near((with_room & with_noise).double().mean().item(), 0.25, count)
    files = (noise.sizes > 0).sum(1)
    for number in (4, 5, 6, 7):
        _near((files == number).double().mean().item(), 0.5 / 3 / 4, count)
    of = torch.bucketize(noise.begins[:, 0].contiguous(), NOISE.begins, right=True) - 1
    music = (files == 1) & torch.isin(of, NOISE.places("music"))
    _near(music.double().mean().item(), 0.5 / 3, count)
    assert noise.snr_db[music][:, 0].min() >= 5
    # Files and ratios are uniform, and independent of the room.
    for place in NOISE.places("music"):
        _near((music & (of == place)).double().mean().item(), 0.5 / 3 / 2, count)
    ratios = noise.snr_db[music][:, 0].double()
    assert abs(ratios.mean() - 10) < 5 * (10 / math.sqrt(12)) / math.sqrt(len(ratios))
    assert abs(ratios.var() / (100 / 12) - 1) < 0.1


def test_shares_of_taoruijie():
    plan, count = _shares(recipe("taoruijie"))
    first = next(step for step in plan if isinstance(step, Mixed))
    room = next(step for step in plan if isinstance(step, Convolved))
    second = plan[-1]
    assert isinstance(second, Mixed) and second is not first
    _near((room.sizes > 0).double().mean().item(), 1 / 6, count)
    television = (second.sizes > 0).any(1)
    _near(television.double().mean().item(), 1 / 6, count)
    assert ((first.sizes > 0).sum(1)[television] >= 3).all()
    untouched = (room.sizes == 0) & (first.sizes == 0).all(1)
    _near(untouched.double().mean().item(), 1 / 6, count)


def test_shares_of_wespeaker():
    plan, count = _shares(recipe("wespeaker"))
    room = next(step for step in plan if isinstance(step, Convolved))
    noise = next(step for step in plan if isinstance(step, Mixed))
    peak = plan[-1]
    _near((room.sizes > 0).double().mean().item(), 0.3, count)
    _near((noise.sizes > 0).any(1).double().mean().item(), 0.3, count)
    assert torch.equal(peak.offsets > 0, (room.sizes > 0) | (noise.sizes > 0).any(1))


def test_offsets_reach_every_place_of_a_longer_file_and_only_the_beginning_of_a_shorter_one():
    augment = Augment(_one(Noise("noise")), NOISE, num_samples=SAMPLES)
    (step,) = augment.draw(_keys(20000))
    size, offset = step.sizes[:, 0], step.offsets[:, 0]
    assert (offset[size < SAMPLES] == 0).all()
    assert offset[size == 4001].unique().tolist() == [0, 1]
    assert (offset + SAMPLES <= size)[size >= SAMPLES].all()


def test_missing_recordings_are_told_and_left_out():
    said = []
    only_noise = _bank([5000], ["noise"])
    augment = Augment(recipe("espnet"), only_noise, RIR, num_samples=SAMPLES, warn=said.append)
    assert augment.recipe.needs == {"noise", "rir"}
    assert said[0] == "augmentation without music and speech: there are no such recordings"
    with pytest.raises(InputError, match="needs rir: give recordings"):
        Augment(_one(Reverb()), only_noise, num_samples=SAMPLES)


def test_long_responses_are_told():
    said = []
    Augment(_one(Reverb()), rir=RIR, num_samples=SAMPLES, warn=said.append)
    assert said == [
        "1 impulse responses are longer than the crop of 4000 samples and count as far as that, the first: c"
    ]
    said.clear()
    Augment(_one(Reverb()), rir=RIR, num_samples=6000, warn=said.append)
    assert said == []


def test_banks_of_another_rate_are_refused():
    with pytest.raises(InputError, match="noise has 16000 Hz, the crops 8000 Hz"):
        Augment(recipe("none"), NOISE, num_samples=SAMPLES, sample_rate=8000)


@pytest.mark.parametrize("keys", [torch.zeros(2), torch.zeros(2, 1, dtype=torch.int64)])
def test_wrong_keys_are_refused(keys):
    augment = Augment(_one(Gain()), num_samples=SAMPLES)
    with pytest.raises(InputError, match="keys must be int64"):
        augment.draw(keys)


def test_keys_or_a_plan():
    augment = Augment(_one(Gain()), num_samples=SAMPLES)
    arguments = (_crops(1), torch.tensor([SAMPLES]), torch.tensor([0]))
    with pytest.raises(InputError, match="either keys or a plan"):
        augment(*arguments)
    with pytest.raises(InputError, match="either keys or a plan"):
        augment(*arguments, _keys(1), augment.draw(_keys(1)))


def test_parts_cut_out_of_a_bank_give_the_same():
    crops, keys = _crops(16), _keys(16)
    plan = Augment(recipe("espnet"), NOISE, RIR, num_samples=SAMPLES).draw(keys)
    mixed = next(step for step in plan if isinstance(step, Mixed))
    cut, step = _cut_out(NOISE.samples, mixed, SAMPLES, pin_memory=False)
    assert step.begins.max() < len(cut) and (step.offsets == 0).all()
    x = crops.float() / 32768
    # Powers are summed by parts, of which a recording that begins anew has two.
    expected = functional.add_noise(x, NOISE.samples, *mixed)
    torch.testing.assert_close(functional.add_noise(x, cut, *step), expected, rtol=1e-6, atol=1e-7)


def test_rooms_cut_out_of_a_bank_give_the_same():
    crops, keys = _crops(16), _keys(16)
    room = Augment(recipe("espnet"), NOISE, RIR, num_samples=SAMPLES).draw(keys)[0]
    assert isinstance(room, Convolved) and 0 < int((room.sizes > 0).sum()) < 16 and int(room.sizes.max()) > SAMPLES
    cut, step = _rooms_cut_out(RIR.samples, room, SAMPLES, pin_memory=False)
    x = crops.float() / 32768
    expected = functional.reverberate(x, RIR.samples, *room, longest=SAMPLES)
    assert torch.equal(functional.reverberate(x, cut, *step, longest=SAMPLES), expected)
    assert len(cut) < len(RIR.samples) * 16


@pytest.mark.parametrize(("bank", "kind", "cut_out"), [(NOISE, Mixed, _cut_out), (RIR, Convolved, _rooms_cut_out)])
def test_parts_go_to_the_device_of_the_crops(bank, kind, cut_out):
    plan = Augment(recipe("espnet"), NOISE, RIR, num_samples=SAMPLES).draw(_keys(16))
    step = next(step for step in plan if isinstance(step, kind))
    expected, _ = cut_out(bank.samples, step, SAMPLES, pin_memory=False)
    samples, moved = augmentation._near(bank.samples, step, torch.empty(16, SAMPLES, device="meta"), SAMPLES, cut_out)
    assert samples.shape == expected.shape and isinstance(moved, kind)
    assert {value.device.type for value in (samples, *moved)} == {"meta"}
    same, kept = augmentation._near(bank.samples, step, torch.empty(16, SAMPLES), SAMPLES, cut_out)
    assert same is bank.samples and all(torch.equal(a, b) for a, b in zip(kept, step, strict=True))


def test_banks_of_the_wrong_kind_are_none():
    with pytest.raises(InputError, match="needs noise: give recordings"):
        Augment(_one(Noise()), RIR, num_samples=SAMPLES)
    with pytest.raises(InputError, match="needs rir: give recordings"):
        Augment(_one(Reverb()), NOISE, NOISE, num_samples=SAMPLES)


@pytest.mark.parametrize("name", ["espnet", "taoruijie", "clova", "wespeaker", "room_or_noise"])
def test_a_recipe_of_which_nothing_is_left_is_refused(name):
    with pytest.raises(InputError, match="give recordings of noise"):
        Augment(recipe(name), num_samples=SAMPLES)


def test_bands_above_the_crops_are_refused():
    with pytest.raises(InputError, match="lies above half of the 8000 Hz"):
        Augment(_one(Telephone((4000.0, 5000.0))), num_samples=SAMPLES, sample_rate=8000)


def test_context_is_that_of_the_crops():
    made = recipe("none", speeds=[1.0, 0.9, 1.25])
    corpus = Corpus([Entry("a", "1", "1.wav"), Entry("b", "2", "2.wav")])
    assert Augment(made, num_samples=900).context == CropDataset(corpus, num_samples=900, speeds=made.speeds).context


def test_settings_that_contradict_each_other_are_refused():
    augment = Augment(recipe("none"), num_samples=SAMPLES)
    with pytest.raises(InputError, match="the crops have 16000 Hz, the front-end 8000 Hz"):
        AugmentedFbank(augment, Fbank(frontend("wespeaker", sample_rate=8000)))
    arguments = torch.tensor([100]), torch.tensor([0]), _keys(1)
    with pytest.raises(InputError, match="crops of 3999 samples cannot give num_samples=4000"):
        augment(_crops(1, 3999), *arguments)
    with pytest.raises(InputError, match=r"speeds must lie in 0..0, as the recipe has 1, got 2"):
        augment(_crops(1), torch.tensor([100]), torch.tensor([2]), _keys(1))


def test_features_of_crops():
    spec = frontend("wespeaker", dither=1.0)
    augment = Augment(recipe("room_or_noise"), NOISE, RIR, num_samples=SAMPLES)
    module = AugmentedFbank(augment, Fbank(spec, spec_augment=SpecAugment(max_frames=5, max_bins=9)))
    crops, keys = _crops(8), _keys(8)
    lengths, speeds = torch.full((8,), SAMPLES), torch.zeros(8, dtype=torch.int64)
    features = module(crops, lengths, speeds, keys)
    masks = module.fbank.spec_augment.masks(torch.full((8,), features.shape[1]), 80, keys)
    waveforms = augment(crops, lengths, speeds, keys)
    expected, _ = functional.log_mel_fbank(waveforms, spec=spec, seeds=keys, masks=masks)
    assert torch.equal(features, expected)
    assert torch.equal(module(crops[2:5], lengths[2:5], speeds[2:5], keys[2:5]), features[2:5])
