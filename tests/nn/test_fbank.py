"""The front-end module: the op with its spec, noise and masks in training alone, nothing in the state dict."""

import pytest
import torch
from torch import Tensor

import spkfast
from spkfast import functional
from spkfast.nn import Fbank, SpecAugment
from spkfast.reference.log_mel_fbank import gaussian_noise

AUGMENT = SpecAugment(num_time_masks=2, max_frames=4, num_bin_masks=2, max_bins=20)
DITHERED = spkfast.frontend("wespeaker", dither=1.0)


def voice(batch: int, samples: int) -> Tensor:
    return torch.randn(batch, samples, generator=torch.Generator().manual_seed(0)) / 10


def test_is_the_op():
    spec = spkfast.frontend("wespeaker")
    x, lengths = voice(2, 3000), torch.tensor([3000, 1234])
    layer = Fbank(spec)
    for have, want in zip(layer(x, lengths), functional.log_mel_fbank(x, lengths, spec=spec), strict=True):
        assert torch.equal(have, want)
    assert layer(x)[1].tolist() == [17, 17]
    assert Fbank(spec, dtype=torch.bfloat16)(x)[0].dtype == torch.bfloat16
    assert not layer.state_dict() and spec.hash in repr(layer)
    assert "num_time_masks=2" in repr(Fbank(spec, spec_augment=AUGMENT))


def test_validate_reaches_the_op():
    x = torch.full((1, 800), torch.nan)
    with pytest.raises(spkfast.InputError, match="row 0 holds a NaN"):
        Fbank(spkfast.frontend("kaldi"))(x)
    Fbank(spkfast.frontend("kaldi"), validate=False)(x)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_noise_and_masks_in_training_alone(backend):
    x, lengths, seeds = voice(3, 3000), torch.tensor([3000, 2000, 0]), torch.tensor([1, -2, 3])
    layer = Fbank(DITHERED, spec_augment=AUGMENT, backend=backend)
    plain, frame_lengths = functional.log_mel_fbank(x, lengths, spec=DITHERED, backend=backend)
    masks = AUGMENT.masks(frame_lengths, 80, seeds)
    want, _ = functional.log_mel_fbank(x, lengths, spec=DITHERED, seeds=seeds, masks=masks, backend=backend)
    assert torch.equal(layer(x, lengths, seeds)[0], want)
    assert torch.equal(layer.eval()(x, lengths, seeds)[0], plain) and not torch.equal(plain, want)


def test_each_alone():
    x, seeds = voice(2, 3000), torch.tensor([1, 2])
    spec = spkfast.frontend("wespeaker")
    plain, frame_lengths = functional.log_mel_fbank(x, spec=spec)
    assert torch.equal(Fbank(spec)(x, seeds=seeds)[0], plain)  # neither
    noisy, _ = functional.log_mel_fbank(x, spec=DITHERED, seeds=seeds)
    assert torch.equal(Fbank(DITHERED)(x, seeds=seeds)[0], noisy)
    masked, _ = Fbank(spec, spec_augment=AUGMENT)(x, seeds=seeds)
    inside = torch.zeros(plain.shape, dtype=torch.bool)
    for row, rectangles in enumerate(AUGMENT.masks(frame_lengths, 80, seeds).tolist()):
        for begin, end, low, high in rectangles:
            inside[row, begin:end, low:high] = True
    assert inside.any() and torch.equal(masked, plain.masked_fill(inside, 0))


def test_seeds_come_from_the_default_generator():
    x = voice(2, 3000)
    layer = Fbank(DITHERED, spec_augment=AUGMENT)
    found = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        found.append(layer(x)[0])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert not torch.equal(layer(x)[0], layer(x)[0])
    torch.manual_seed(7)
    seeds = torch.randint(2**63 - 1, (2,))
    assert torch.equal(layer(x, seeds=seeds)[0], found[0])
    # One that draws nothing leaves the generator alone.
    state = torch.get_rng_state()
    Fbank(spkfast.frontend("wespeaker"))(x)
    layer.eval()(x)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_utterance_is_augmented_alike_in_every_batch():
    x, lengths, seeds = voice(3, 4000), torch.tensor([4000, 2500, 900]), torch.tensor([5, 6, 7])
    layer = Fbank(DITHERED, spec_augment=AUGMENT)
    features, frame_lengths = layer(x, lengths, seeds)
    for row, length in enumerate(lengths.tolist()):
        alone, _ = layer(x[row : row + 1, :length], None, seeds[row : row + 1])
        assert torch.equal(alone[0], features[row, : frame_lengths[row]])


def test_compiles_in_both_modes():
    x, lengths, seeds = voice(2, 3000), torch.tensor([3000, 2000]), torch.tensor([1, 2])
    layer = Fbank(DITHERED, spec_augment=AUGMENT)
    for mode in (True, False):
        compiled = torch.compile(layer.train(mode), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, lengths, seeds), layer(x, lengths, seeds))
    drawn = torch.compile(layer.train(), backend="aot_eager", fullgraph=True)
    assert not torch.equal(drawn(x)[0], drawn(x)[0])


def test_exports_without_noise_and_masks():
    layer = Fbank(DITHERED, spec_augment=AUGMENT).eval()
    x, lengths = voice(2, 3000), torch.tensor([3000, 2000])
    program = torch.export.export(layer, (x, lengths))
    torch.testing.assert_close(program.module()(x, lengths), layer(x, lengths))


def test_refuses_wrong_seeds():
    layer = Fbank(DITHERED)
    with pytest.raises(spkfast.InputError, match=r"seeds must have shape \(B,\) = \(2,\), got \(3,\)"):
        layer(voice(2, 800), seeds=torch.arange(3))


def test_noise_is_standard_normal():
    noise = gaussian_noise(torch.tensor([0, 1, -1, 2**40]), 50000, torch.float64)
    spread = 50000**-0.5
    assert noise.mean(dim=1).abs().max() < 4 * spread
    assert (noise.var(dim=1) - 1).abs().max() < 4 * spread * 2**0.5
    # The share within 1, 2 and 3 standard deviations.
    for bound, share in ((1, 0.682689), (2, 0.954500), (3, 0.997300)):
        inside = (noise.abs() < bound).double().mean(dim=1)
        assert (inside - share).abs().max() < 4 * spread * (share * (1 - share)) ** 0.5


def test_noise_of_other_seeds_and_samples_is_independent():
    seeds = torch.tensor([0, 1, 2, 2**32, 2**33, -1])  # neighbours in either half
    noise = gaussian_noise(seeds, 50000, torch.float64)
    delayed = torch.cat([noise[:, :-1], noise[:, 1:]])
    correlation = torch.corrcoef(delayed) - torch.eye(12)
    assert correlation.abs().max() < 5 * 50000**-0.5


def test_noise_scales_with_the_spec_and_is_equal_on_native():
    # Silence leaves the noise alone: the raw energy of a frame of 400 samples, without its mean, is chi-squared.
    energies = {}
    for dither in (1.0, 8.0):
        spec = spkfast.frontend("kaldi", dither=dither, use_energy=True, n_mels=1)
        both = [
            Fbank(spec, backend=backend)(torch.zeros(4, 80000), seeds=torch.arange(4))[0]
            for backend in ("native", "reference")
        ]
        torch.testing.assert_close(both[0], both[1], rtol=0, atol=1e-4)
        energies[dither] = both[1][..., 0].exp().mean() / 399
    assert abs(energies[1.0] - 1) < 0.02
    torch.testing.assert_close(energies[8.0], 64 * energies[1.0], rtol=1e-4, atol=0)


def test_training_mode_checks_before_it_draws():
    layer = Fbank(spkfast.frontend("kaldi"), spec_augment=SpecAugment()).train()
    with pytest.raises(spkfast.InputError, match=r"lengths must be int64 counts of samples, got torch\.int32"):
        layer(voice(1, 800), torch.tensor([800], dtype=torch.int32))
    with pytest.raises(spkfast.InputError, match="spec_augment must be a SpecAugment or None, got True"):
        Fbank(spkfast.frontend("kaldi"), spec_augment=True)
