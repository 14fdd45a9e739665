"""Masks of SpecAugment: known words of the generator, shapes, bounds, distribution, and no dependence on the batch."""

import dataclasses

import pytest
import torch

import spkfast
from spkfast.nn import SpecAugment
from spkfast.reference.log_mel_fbank import gaussian_noise
from spkfast.reference.random import philox

MANY = torch.arange(20000) * 7919 - 10**15


@pytest.mark.parametrize(
    ("counter", "seed", "words"),
    [
        (0x00000000, 0x0000000000000000, (0xFF1DAE59, 0x6CD10DF2)),
        (0xFFFFFFFF, -1, (0x2C3F628B, 0xAB4FD7AD)),
        (0x243F6A88, 0x85A308D313198A2E - 2**64, (0xDD7CE038, 0xF62A4C12)),
    ],
)
def test_words_are_those_of_random123(counter, seed, words):
    assert tuple(int(word) for word in philox(torch.tensor(counter), torch.tensor(seed))) == words


def test_rectangles_lie_within_the_utterance():
    augment = SpecAugment(num_time_masks=2, max_frames=30, num_bin_masks=3, max_bins=8)
    frame_lengths = MANY % 50
    masks = augment.masks(frame_lengths, 80, MANY)
    assert masks.shape == (20000, 5, 4) and masks.dtype == torch.int64
    begin, end, low, high = masks.unbind(-1)
    assert (begin >= 0).all() and (end <= frame_lengths[:, None]).all() and (low >= 0).all() and (high <= 80).all()
    widths, heights = end - begin, high - low
    assert (widths[:, 2:] == frame_lengths[:, None]).all() and (heights[:, :2] == 80).all()
    assert widths[:, :2].min() == 0 and widths[:, :2].max() == 30
    assert heights[:, 2:].min() == 0 and heights[:, 2:].max() == 8


def test_widths_and_positions_are_uniform():
    augment = SpecAugment(num_time_masks=2, max_frames=4, num_bin_masks=1, max_bins=3)
    masks = augment.masks(torch.full_like(MANY, 10), 6, MANY)
    for rectangle, first, widest, size in ((0, 0, 4, 10), (1, 0, 4, 10), (2, 2, 3, 6)):
        begin, end = masks[:, rectangle, first : first + 2].T
        for width in range(widest + 1):
            counts = torch.bincount(begin[end - begin == width], minlength=size - width + 1)
            expected = len(MANY) / (widest + 1) / (size - width + 1)
            assert len(counts) == size - width + 1
            assert ((counts - expected).abs() < 5 * expected**0.5).all()


def test_masks_are_independent_of_each_other_and_of_the_noise():
    augment = SpecAugment(max_frames=50, max_bins=50, probability=0.5)
    masks = augment.masks(torch.full_like(MANY, 400), 400, MANY)
    masked = masks.flatten(1).any(dim=1)  # a draw as well
    time, band = masks[masked][:, :2, :2], masks[masked][:, 2:, 2:]
    starts, ends = torch.cat([time, band], dim=1).double().unbind(-1)
    widths = ends - starts
    # The room for a mask depends on its width; in units of that room its start does not.
    values = torch.cat([starts / (400 - widths), widths], dim=1)
    noise = gaussian_noise(MANY[masked], 6, torch.float64).abs()  # of the same seeds
    correlation = torch.corrcoef(torch.cat([values, noise], dim=1).T)
    assert (correlation - torch.eye(14)).abs().max() < 5 * len(values) ** -0.5


def test_probability_and_largest_fraction():
    frame_lengths = MANY % 300
    masks = SpecAugment(probability=0.3, max_time_fraction=0.2).masks(frame_lengths, 80, MANY)
    masked = masks.flatten(1).any(dim=1)
    assert abs(masked.double().mean() - 0.3) < 0.02
    assert (masks[~masked] == 0).all()
    widths = (masks[..., 1] - masks[..., 0])[:, :2]
    assert (5 * widths <= frame_lengths[:, None]).all() and (5 * widths == frame_lengths[:, None]).any()
    assert not SpecAugment(probability=0.0).masks(frame_lengths, 80, MANY).any()


def test_no_frames_and_no_masks():
    none = SpecAugment(num_time_masks=0, num_bin_masks=0).masks(torch.tensor([5, 0]), 80, torch.tensor([1, 2]))
    assert none.shape == (2, 0, 4)
    masks = SpecAugment().masks(torch.tensor([0]), 80, torch.tensor([3]))
    assert (masks[..., 0] == masks[..., 1]).all()
    assert SpecAugment().masks(MANY[:0], 80, MANY[:0]).shape == (0, 4, 4)


def test_an_utterance_has_the_same_masks_in_every_batch():
    augment, lengths = SpecAugment(), torch.tensor([200, 300, 17])
    seeds = torch.tensor([11, -12, 2**62])
    together = augment.masks(lengths, 80, seeds)
    for row in range(3):
        assert torch.equal(augment.masks(lengths[row : row + 1], 80, seeds[row : row + 1])[0], together[row])
    assert not torch.equal(augment.masks(lengths, 80, seeds + 1), together)
    compiled = torch.compile(augment.masks, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(lengths, 80, seeds), together)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_frames": -1}, "max_frames must be a count, got -1"),
        ({"num_bin_masks": 1.5}, r"num_bin_masks must be a count, got 1\.5"),
        ({"probability": 1.1}, r"probability must lie in 0\.\.1, got 1\.1"),
        ({"max_time_fraction": float("nan")}, r"max_time_fraction must lie in 0\.\.1, got nan"),
    ],
)
def test_refuses_sizes(fields, message):
    with pytest.raises(spkfast.InputError, match=message):
        dataclasses.replace(SpecAugment(), **fields)


def test_refuses_inputs():
    for lengths, seeds, name in (
        (torch.tensor([5, 6]), torch.tensor([1]), "frame_lengths"),
        (torch.tensor([5.0]), torch.tensor([1]), "frame_lengths"),
        (torch.tensor([5]), torch.tensor([1], dtype=torch.int32), "seeds"),
    ):
        with pytest.raises(spkfast.InputError, match=rf"{name} must be int64 of shape \(B,\)"):
            SpecAugment().masks(lengths, 80, seeds)
