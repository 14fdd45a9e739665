"""The same seed gives the same batches, to the last bit, whatever reads them and however many processes share them."""

import numpy as np
import pytest
import soundfile
import torch

from spkfast.data import samplers
from spkfast.data.augmentation import Augment, AugmentedFbank
from spkfast.data.banks import Bank
from spkfast.data.manifests import read_corpus
from spkfast.data.reading import CropDataset, Loader
from spkfast.data.recipes import recipe
from spkfast.frontends import frontend
from spkfast.nn import Fbank, SpecAugment

SAMPLES, BATCH, STEPS = 8000, 8, 5
MADE = recipe("espnet")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    lines = []
    for number in range(20):
        path = root / f"{number}.flac"
        soundfile.write(path, rng.normal(0, 0.1, 3000 + 1200 * number), 16000)
        lines.append(f"speaker{number % 6} {path.name}\n")
    (root / "list.txt").write_text("".join(lines))
    for kind in ("music", "noise", "speech", "rooms"):
        for number in range(3):
            (root / "banks" / kind).mkdir(parents=True, exist_ok=True)
            soundfile.write(root / "banks" / kind / f"{number}.wav", rng.normal(0, 0.1, 5000 + 900 * number), 16000)
    return root


def _features(folder, *, workers=0, rank=0, world_size=1, threads=1, first=0):
    """Features and labels of each step, as a process of a run has them."""
    corpus = read_corpus(folder / "list.txt")
    dataset = CropDataset(corpus, num_samples=SAMPLES, speeds=MADE.speeds, seed=7)
    noise = Bank.from_folder(folder / "banks", 16000)
    rir = Bank.from_folder(folder / "banks" / "rooms", 16000, rir=True)
    augment = Augment(MADE, noise, rir, num_samples=SAMPLES, context=dataset.context)
    module = AugmentedFbank(augment, Fbank(frontend("wespeaker", dither=1.0), spec_augment=SpecAugment(max_frames=9)))
    sampler = samplers.create("category_balanced", corpus, batch_size=BATCH, seed=7)
    steps = samplers.StepSampler(sampler, STEPS, rank=rank, world_size=world_size)
    steps.load_state_dict({"step": first})
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return [
            (module(batch.crops, batch.lengths, batch.speeds, batch.keys), batch.labels, batch.keys)
            for batch in Loader(dataset, steps, workers)
        ]
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def expected(folder):
    return _features(folder)


def _assert_equal(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("workers", [1, 4])
def test_workers(folder, expected, workers):
    _assert_equal(_features(folder, workers=workers), expected)


def test_two_processes_together_have_the_batches_of_one(folder, expected):
    ranks = [_features(folder, rank=rank, world_size=2, workers=1) for rank in range(2)]
    _assert_equal([tuple(map(torch.cat, zip(*parts, strict=True))) for parts in zip(*ranks, strict=True)], expected)


def test_threads(folder, expected):
    _assert_equal(_features(folder, threads=2), expected)


def test_restart(folder, expected):
    _assert_equal(_features(folder, first=3), expected[3:])


def test_batches_differ_and_are_augmented(expected):
    keys = torch.cat([keys for _, _, keys in expected])
    assert len(keys.unique()) == len(keys)
    assert all(features.isfinite().all() for features, _, _ in expected)
    assert {int(label) // 6 for _, labels, _ in expected for label in labels} == {0, 1, 2}
