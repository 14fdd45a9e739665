"""What a training run reads: utterances, crops, batches, and the features of a batch."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from spkfast.data import samplers
from spkfast.data.augmentation import Augment, AugmentedFbank
from spkfast.data.banks import CATEGORIES, Bank
from spkfast.data.manifests import read_corpus
from spkfast.data.reading import BadUtterances, Batch, CropDataset, Loader
from spkfast.data.recipes import Recipe, recipe
from spkfast.data.samplers import StepSampler
from spkfast.data.trials import hold_out
from spkfast.errors import InputError, check_options
from spkfast.frontends import FrontendSpec
from spkfast.nn import Fbank, SpecAugment
from spkfast.training.config import LEAST_ROWS, DataConfig, TrainConfig
from spkfast.training.spans import Length


class Inputs:
    """The data of a run, for one of its processes.

    Args:
        config: The run.
        spec: Its front-end.
        device: Where features are computed.
        rank: Number of this process.
        world_size: How many there are.
        warn: Called with a line for each utterance that cannot be read, and for what else there is to say of the data.

    Attributes:
        corpus: Utterances that are trained on.
        held: Those of the speakers held out, or None.
        dataset: Crops of ``corpus``.
        speeds: Speed factors; each makes classes of its own.
        length: Of the run.
        bad: What could not be read.
        fingerprint: Hex digest of what a resumed run must find again: the corpus and the banks.

    Raises:
        InputError: If a list, a folder or a setting cannot be used.
    """

    def __init__(
        self,
        config: TrainConfig,
        spec: FrontendSpec,
        *,
        device: torch.device,
        rank: int,
        world_size: int,
        warn: Callable[[str], None],
    ) -> None:
        data, warn_of_reading = config.data, warn
        if rank:  # what all processes find alike is told once
            warn = _silent
        if data.crop_seconds * spec.sample_rate < spec.frame_length:
            raise InputError(f"data.crop_seconds={data.crop_seconds} is shorter than one frame")
        self.corpus, self.held = read_corpus(data.train_list, root=data.root, speakers=data.speakers, warn=warn), None
        if len(self.corpus.speakers) < 2:
            raise InputError(f"{data.train_list}: one speaker alone cannot be told from others; at least 2 needed")
        if config.validation.held_out not in (0, "0", ""):
            self.corpus, self.held = hold_out(self.corpus, config.validation.held_out, config.seed)
        made = _recipe(data)
        noise, rir = (
            None if folder is None else Bank.from_folder(folder, spec.sample_rate, warn, rir=is_rir)
            for folder, is_rir in ((data.noise, False), (data.rir, True))
        )
        num_samples = round(data.crop_seconds * spec.sample_rate)
        self.speeds = made.speeds
        self.dataset = CropDataset(
            self.corpus, num_samples=num_samples, sample_rate=spec.sample_rate, speeds=made.speeds, seed=config.seed
        )
        augment = Augment(
            made,
            noise.to(device, warn) if noise else None,
            rir.to(device, warn) if rir else None,
            num_samples=num_samples,
            sample_rate=spec.sample_rate,
            context=self.dataset.context,
            warn=warn,
        )
        masks = None if data.augment.spec_augment is None else _spec_augment(data.augment.spec_augment)
        self._device = device
        self._features = AugmentedFbank(augment, Fbank(spec, spec_augment=masks, validate=False)).to(device)
        options = data.sampler_options
        for name in ("batch_size", "seed"):
            if name in options:
                raise InputError(f"data.sampler_options: {name} is a setting of the run, give --{name}")
        least = LEAST_ROWS * config.accumulate * world_size
        if data.sampler == "length_buckets":
            options = {"row_multiple": least, **options}
        self.crops_per_step = config.batch_size * config.accumulate * world_size
        sampler = samplers.create(
            data.sampler, self.corpus, batch_size=self.crops_per_step, seed=config.seed, **options
        )
        if sampler.row_multiple < least:  # the smallest batch that it makes
            raise InputError(
                f"data.sampler_options: row_multiple must be at least {least}, so that each of accumulate="
                f"{config.accumulate} parts of a step has {LEAST_ROWS} rows in each of {world_size} processes, "
                f"got {sampler.row_multiple}"
            )
        self.length = Length.of_run(config.steps, sampler.num_batches(0))
        self._sampler = StepSampler(sampler, self.length.steps, rank=rank, world_size=world_size)
        self._workers, self._accumulate = data.workers, config.accumulate
        self.bad = BadUtterances(
            len(self.corpus),
            share=0.0 if data.strict else data.max_unreadable,
            least=0 if data.strict else 10,
            warn=warn_of_reading,
        )
        parts = [self.corpus.fingerprint, *(bank.fingerprint if bank else "" for bank in (noise, rir))]
        self.fingerprint = hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]

    def batches(self) -> Loader:
        """What this process reads in each step, from the start or the state that was loaded on."""
        return Loader(self.dataset, self._sampler, self._workers, account=self.bad)

    def parts(self, batch: Batch) -> list[Batch]:
        """The batches of a step that go through the network one after the other."""
        split = [value.tensor_split(self._accumulate) for value in batch[:5]]
        return [Batch._make([*tensors, [], []]) for tensors in zip(*split, strict=True)]

    @torch.no_grad()
    def features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Features (B, T, M) of augmented crops and labels (B,), on the device."""
        crops, lengths, speeds, labels = (
            value.to(self._device, non_blocking=True)
            for value in (batch.crops, batch.lengths, batch.speeds, batch.labels)
        )
        return self._features(crops, lengths, speeds, batch.keys), labels

    def speaker(self, label: int) -> str:
        """Name of the speaker of a class."""
        return self.corpus.speakers[label % len(self.corpus.speakers)]

    def state_dict(self, step: int) -> dict[str, int]:
        """Where the batch of a step stands."""
        return self._sampler.state_dict(step)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes on from there."""
        self._sampler.load_state_dict(state)


def _silent(message: str) -> None:
    pass


def _recipe(data: DataConfig) -> Recipe:
    try:
        made = recipe(data.augment.recipe, **data.augment.options)
    except InputError as error:
        raise InputError(f"data.augment: {error}") from error
    used = {"noise": made.needs & {*CATEGORIES}, "rir": made.needs & {"rir"}}
    idle = [name for name in used if getattr(data, name) is not None and not used[name]]
    if idle:
        raise InputError(
            f"data.{idle[0]} is given, but data.augment.recipe={data.augment.recipe} uses none; leave it out by "
            + " ".join(f"--data.{name} null" for name in idle)
        )
    return made


def _spec_augment(options: dict[str, Any]) -> SpecAugment:
    known = [field.name for field in dataclasses.fields(SpecAugment)]
    check_options("data.augment", "spec_augment", options, known)
    try:
        return SpecAugment(**options)
    except InputError as error:
        raise InputError(f"data.augment.spec_augment: {error}") from error
