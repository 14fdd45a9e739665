"""The training loop."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spkfast import models
from spkfast.data import samplers
from spkfast.data.augmentation import Augment, AugmentedFbank
from spkfast.data.banks import CATEGORIES, Bank
from spkfast.data.corpus import Corpus
from spkfast.data.manifests import read_corpus
from spkfast.data.reading import BadUtterances, Batch, CropDataset, Loader
from spkfast.data.recipes import Recipe, recipe
from spkfast.data.samplers import StepSampler
from spkfast.errors import InputError, check_options
from spkfast.frontends import frontend
from spkfast.inference import SpeakerEncoder
from spkfast.nn import Fbank, SpecAugment
from spkfast.nn.margin_softmax import MarginSoftmaxLoss
from spkfast.ops.margin_softmax_loss import MarginStats, check_form
from spkfast.reference import MarginForm
from spkfast.training import checkpoint, schedule
from spkfast.training.config import FREE_ON_RESUME, DataConfig, LossConfig, OptimizerConfig, TrainConfig, flatten

# Smallest sensible values. Batch norm needs two rows to have a variance.
_LEAST = {
    "steps": 1, "batch_size": 2, "log_steps": 1, "seed": 0, "keep_checkpoints": 1, "checkpoint_minutes": 0,
    "data.workers": 0, "data.max_unreadable": 0, "optimizer.lr": 0, "optimizer.final_lr": 0,
    "optimizer.warmup_steps": 0, "optimizer.momentum": 0, "optimizer.weight_decay": 0, "optimizer.clip_grad_norm": 0,
    "loss.margin": 0, "loss.margin_start": 0,
}  # fmt: skip
_MOST = {"seed": 2**32 - 1, "data.crop_seconds": 600, "loss.margin": 1.5}


class Progress(NamedTuple):
    """What the loop reports after each step."""

    step: int
    steps: int
    loss: float
    accuracy: float
    crops_per_second: float


class SpeakerTask(nn.Module):
    """Network and head as one module, so that mixed precision and data parallelism wrap both."""

    def __init__(self, net: nn.Module, head: MarginSoftmaxLoss) -> None:
        super().__init__()
        self.net = net
        self.head = head

    def forward(self, features: Tensor, target: Tensor) -> tuple[Tensor, MarginStats]:
        """Features (B, T, M) and labels (B,) to loss and statistics."""
        loss, stats = self.head(self.net(features), target, return_stats=True)
        return loss, stats


class Trainer:
    """A training run; one that was cut off goes on, with ``resume``, to the same weights.

    Iterating over :meth:`run` trains, and saves the encoder in ``out/model`` at the end.

    Args:
        config: The run.
        warn: Called with a line for each utterance that cannot be read, and for what else there is to say of the data.

    Attributes:
        encoder: The network that is trained, with its front-end.
        first_step: Steps that were already done.
        corpus: The utterances.
        dataset: Their crops.

    Raises:
        InputError: If the config, a list or a checkpoint cannot be used.
    """

    def __init__(self, config: TrainConfig, warn: Callable[[str], None] = lambda message: None) -> None:
        from accelerate import Accelerator
        from accelerate.utils import set_seed

        _check(config)
        self.config = config
        self.folder = Path(config.out)
        found = checkpoint.checkpoints(self.folder / "checkpoints")
        if found and not config.resume:
            raise InputError(
                f"{self.folder}: holds checkpoints of an earlier run; resume it with --resume or choose another --out"
            )
        self._spec = frontend(config.frontend.preset, **config.frontend.options)
        if config.data.crop_seconds * self._spec.sample_rate < self._spec.frame_length:
            raise InputError(f"data.crop_seconds={config.data.crop_seconds} is shorter than one frame")
        data = config.data
        self.corpus = read_corpus(data.train_list, root=data.root, speakers=data.speakers, warn=warn)
        if len(self.corpus.speakers) < 2:
            raise InputError(f"{data.train_list}: one speaker alone cannot be told from others; at least 2 needed")
        made = _recipe(data)
        noise, rir = (
            None if folder is None else Bank.from_folder(folder, self._spec.sample_rate, warn, rir=is_rir)
            for folder, is_rir in ((data.noise, False), (data.rir, True))
        )
        num_samples = round(data.crop_seconds * self._spec.sample_rate)
        self.dataset = CropDataset(
            self.corpus,
            num_samples=num_samples,
            sample_rate=self._spec.sample_rate,
            speeds=made.speeds,
            seed=config.seed,
        )
        self._accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),  # else several processes without a GPU would not find one another
            log_with="tensorboard",
            project_dir=str(self.folder),
        )
        set_seed(config.seed)
        device = self._accelerator.device
        augment = Augment(
            made,
            noise.to(device, warn) if noise else None,
            rir.to(device, warn) if rir else None,
            num_samples=num_samples,
            sample_rate=self._spec.sample_rate,
            context=self.dataset.context,
            warn=warn,
        )
        masks = None if data.augment.spec_augment is None else _spec_augment(data.augment.spec_augment)
        self._features = AugmentedFbank(augment, Fbank(self._spec, spec_augment=masks, validate=False)).to(device)
        processes = self._accelerator.num_processes
        options = data.sampler_options
        for name in ("batch_size", "seed"):
            if name in options:
                raise InputError(f"data.sampler_options: {name} is a setting of the run, give --{name}")
        if data.sampler == "length_buckets":  # batch norm needs two rows to have a variance
            options = {"row_multiple": _LEAST["batch_size"] * processes, **options}
        sampler = samplers.create(
            data.sampler, self.corpus, batch_size=config.batch_size * processes, seed=config.seed, **options
        )
        self._sampler = StepSampler(
            sampler,
            config.steps,
            rank=self._accelerator.process_index,
            world_size=processes,
        )
        try:
            net = models.create(config.model.name, **{"feature_dim": self._spec.output_size, **config.model.options})
        except InputError:
            raise
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"model.options: {error}") from error
        head = MarginSoftmaxLoss(net.embedding_dim, self.dataset.num_classes, **_form(config.loss)._asdict())
        self._task = SpeakerTask(net, head)
        self._wrapped, self._optimizer = self._accelerator.prepare(self._task, _optimizer(self._task, config.optimizer))
        self._settings = {
            **json.loads(json.dumps(flatten(config))),  # as a checkpoint has them
            "contents of the data": _fingerprint(self.corpus, noise, rir),
            "number of processes": processes,
        }
        self.first_step = checkpoint.load(found[-1], self._settings, FREE_ON_RESUME, self._accelerator) if found else 0
        self._bad = BadUtterances(
            len(self.corpus),
            share=0.0 if data.strict else data.max_unreadable,
            least=0 if data.strict else 10,
            warn=warn,
        )
        self.encoder = SpeakerEncoder(net, self._spec)

    @property
    def bad_files(self) -> list[str]:
        """What was wrong with each utterance that was passed over."""
        return list(self._bad.messages.values())

    @property
    def is_main_process(self) -> bool:
        """Whether this is the one of several processes that writes files and speaks."""
        return bool(self._accelerator.is_main_process)

    def run(self) -> Iterator[Progress]:
        """Trains, one item after each step.

        Raises:
            InputError: If the loss is not finite, or a file cannot be read under ``data.strict``.
        """
        config, accelerator = self.config, self._accelerator
        accelerator.init_trackers("tensorboard")
        log = _Log(self.folder / "log.jsonl", self.first_step) if self.is_main_process else None
        self._wrapped.train()
        started = saved = time.monotonic()
        self._sampler.load_state_dict({"step": self.first_step})
        batches = Loader(self.dataset, self._sampler, config.data.workers, account=self._bad)
        rows = 0
        for step, batch in enumerate(batches, start=self.first_step):
            rows += len(batch.labels)
            entry = self._step(step, batch)
            done = step + 1
            for name in ("loss", "grad_norm"):
                if not math.isfinite(entry[name]):
                    raise InputError(
                        f"{self.folder}: the {name} became {entry[name]} at step {done}; "
                        "lower optimizer.lr or optimizer.clip_grad_norm"
                    )
            entry["crops_per_second"] = rows * accelerator.num_processes / (time.monotonic() - started)
            if done % config.log_steps == 0 or done == config.steps:
                accelerator.log(entry, step=done)
                if log:
                    log.write(done, entry)
            if done == config.steps or self._agreed(time.monotonic() - saved > 60 * config.checkpoint_minutes):
                folder = self.folder / "checkpoints"
                checkpoint.save(folder, done, self._settings, config.keep_checkpoints, accelerator)
                saved = time.monotonic()
            yield Progress(done, config.steps, entry["loss"], entry["accuracy"], entry["crops_per_second"])
        self._finish()

    def _step(self, step: int, batch: Batch) -> dict[str, float]:
        config, accelerator = self.config, self._accelerator
        rate = schedule.learning_rate(step, config.steps, config.optimizer)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._task.head.margin = schedule.margin(step, config.steps, config.loss)
        with torch.no_grad():
            crops, lengths, speeds, target = (
                value.to(accelerator.device, non_blocking=True)
                for value in (batch.crops, batch.lengths, batch.speeds, batch.labels)
            )
            features = self._features(crops, lengths, speeds, batch.keys)
        # Not the accelerator's own setting: that is fixed for the life of the process by its first run.
        with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            loss, stats = self._wrapped(features, target)
        accelerator.backward(loss)
        limit = config.optimizer.clip_grad_norm or math.inf
        norm = accelerator.clip_grad_norm_(self._task.parameters(), limit)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return {
            "loss": float(loss.detach()), "accuracy": float(stats.accuracy),
            "target_cosine": float(stats.target_cosine), "grad_norm": float(norm), "lr": rate,
            "margin": self._task.head.margin,
        }  # fmt: skip

    def _agreed(self, decision: bool) -> bool:
        """The main process's decision: clocks differ, and a process that saved alone would wait for ever."""
        from accelerate.utils import broadcast

        return bool(broadcast(torch.tensor(decision, device=self._accelerator.device, dtype=torch.uint8)))

    def _finish(self) -> None:
        self._wrapped.eval()
        if self.is_main_process:
            self.encoder.save(self.folder / "model")
        self._accelerator.wait_for_everyone()
        self._accelerator.end_training()


class _Log:
    """Lines of JSON, one an entry; entries past the step that a run resumes from are dropped."""

    def __init__(self, path: Path, first: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        kept = [line for line in path.read_text().splitlines() if _step_of(line) <= first] if path.exists() else []
        path.write_text("".join(line + "\n" for line in kept))

    def write(self, step: int, entry: dict[str, float]) -> None:
        with open(self._path, "a") as file:
            file.write(json.dumps({"step": step, **entry}) + "\n")


def read_log(folder: str | Path) -> list[dict[str, float]]:
    """Entries of a run's log, oldest first."""
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError):  # a line that was being written when the run was killed
        return 2**62


def _check(config: TrainConfig) -> None:
    if not config.data.train_list:
        raise InputError("data.train_list is not set: give --data.train_list FILE")
    values = flatten(config)
    for name, least in _LEAST.items():
        if not values[name] >= least:
            raise InputError(f"{name} must be at least {least}, got {values[name]}")
    for name, most in _MOST.items():
        if values[name] > most:
            raise InputError(f"{name} must be at most {most}, got {values[name]}")
    if not config.out:
        raise InputError("out must name a folder")
    try:
        check_form(_form(config.loss))
    except InputError as error:
        raise InputError(f"loss.{error}") from error
    for low, high in (("loss.margin_start", "loss.margin_end"), ("optimizer.final_lr", "optimizer.lr")):
        if values[low] > values[high]:
            raise InputError(f"{low}={values[low]} must not exceed {high}={values[high]}")


def _recipe(data: DataConfig) -> Recipe:
    try:
        made = recipe(data.augment.recipe, **data.augment.options)
    except InputError as error:
        raise InputError(f"data.augment: {error}") from error
    for name in ("noise", "rir"):
        if getattr(data, name) is not None and not made.needs & ({"rir"} if name == "rir" else {*CATEGORIES}):
            raise InputError(f"data.{name} is given, but data.augment.recipe={data.augment.recipe} uses none")
    return made


def _spec_augment(options: dict[str, Any]) -> SpecAugment:
    known = [field.name for field in dataclasses.fields(SpecAugment)]
    check_options("data.augment", "spec_augment", options, known)
    try:
        return SpecAugment(**options)
    except InputError as error:
        raise InputError(f"data.augment.spec_augment: {error}") from error


def _fingerprint(corpus: Corpus, *banks: Bank | None) -> str:
    """Hex digest of what a resumed run must find again: the corpus and the banks."""
    parts = [corpus.fingerprint, *(bank.fingerprint if bank else "" for bank in banks)]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


def _form(config: LossConfig) -> MarginForm:
    names = {field.name for field in dataclasses.fields(config)} & {*MarginForm._fields}
    return MarginForm(**{name: getattr(config, name) for name in names})


def _optimizer(task: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [
        {"params": [p for p in task.parameters() if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in task.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0, fused=True)
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)
