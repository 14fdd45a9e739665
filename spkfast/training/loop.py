"""The training loop."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from spkfast import functional, models
from spkfast.data.augment import Augment
from spkfast.data.crops import Crop, CropDataset, StepSampler
from spkfast.data.lists import read_train_list
from spkfast.errors import InputError
from spkfast.frontends import FrontendSpec, frontend
from spkfast.inference import SpeakerEncoder
from spkfast.nn.margin_softmax import MarginSoftmaxLoss
from spkfast.ops.margin_softmax_loss import MarginStats, check_form
from spkfast.reference import MarginForm
from spkfast.training import checkpoint, schedule
from spkfast.training.config import FREE_ON_RESUME, LossConfig, OptimizerConfig, TrainConfig, flatten

# Smallest sensible values. Batch norm needs two rows to have a variance.
_LEAST = {
    "steps": 1, "batch_size": 2, "log_steps": 1, "seed": 0, "keep_checkpoints": 1, "checkpoint_minutes": 0,
    "data.workers": 0, "data.augment_probability": 0, "optimizer.lr": 0, "optimizer.final_lr": 0,
    "optimizer.warmup_steps": 0, "optimizer.momentum": 0, "optimizer.weight_decay": 0, "optimizer.clip_grad_norm": 0,
    "loss.margin": 0, "loss.margin_start": 0,
}  # fmt: skip
_MOST = {"seed": 2**32 - 1, "data.augment_probability": 1, "data.crop_seconds": 600, "loss.margin": 1.5}


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
        warn: Called with one line for each file that could not be read.

    Attributes:
        encoder: The network that is trained, with its front-end.
        first_step: Steps that were already done.
        bad_files: What was wrong with each file passed over.

    Raises:
        InputError: If the config, a list or a checkpoint cannot be used.
    """

    def __init__(self, config: TrainConfig, warn: Callable[[str], None] = lambda message: None) -> None:
        from accelerate import Accelerator
        from accelerate.utils import set_seed

        _check(config)
        self.config, self._warn = config, warn
        self.folder = Path(config.out)
        found = checkpoint.checkpoints(self.folder / "checkpoints")
        if found and not config.resume:
            raise InputError(
                f"{self.folder}: holds checkpoints of an earlier run; resume it with --resume or choose another --out"
            )
        self._spec = frontend(config.frontend.preset, **config.frontend.options)
        if config.data.crop_seconds * self._spec.sample_rate < self._spec.frame_length:
            raise InputError(f"data.crop_seconds={config.data.crop_seconds} is shorter than one frame")
        self.dataset = _dataset(config, self._spec)
        if len(self.dataset.speakers) < 2:
            raise InputError(
                f"{config.data.train_list}: one speaker alone cannot be told from others; at least 2 needed"
            )
        self._accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),  # else several processes without a GPU would not find one another
            log_with="tensorboard",
            project_dir=str(self.folder),
        )
        set_seed(config.seed)
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
            **flatten(config),
            "contents of the data": self.dataset.fingerprint,
            "number of processes": self._accelerator.num_processes,
        }
        self.first_step = checkpoint.load(found[-1], self._settings, FREE_ON_RESUME, self._accelerator) if found else 0
        self.bad_files: list[str] = []
        self.encoder = SpeakerEncoder(net, self._spec)

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
        for step, (waveforms, seeds, target, errors) in enumerate(self._loader(), start=self.first_step):
            self._tell(errors)
            entry = self._step(step, waveforms, seeds, target)
            done = step + 1
            for name in ("loss", "grad_norm"):
                if not math.isfinite(entry[name]):
                    raise InputError(
                        f"{self.folder}: the {name} became {entry[name]} at step {done}; "
                        "lower optimizer.lr or optimizer.clip_grad_norm"
                    )
            crops = (done - self.first_step) * config.batch_size * accelerator.num_processes
            entry["crops_per_second"] = crops / (time.monotonic() - started)
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

    def _step(self, step: int, waveforms: Tensor, seeds: Tensor, target: Tensor) -> dict[str, float]:
        config, accelerator = self.config, self._accelerator
        rate = schedule.learning_rate(step, config.steps, config.optimizer)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._task.head.margin = schedule.margin(step, config.steps, config.loss)
        with torch.no_grad():
            features, _ = functional.log_mel_fbank(
                waveforms.to(accelerator.device), spec=self._spec, seeds=seeds.to(accelerator.device), validate=False
            )
        # Not the accelerator's own setting: that is fixed for the life of the process by its first run.
        with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            loss, stats = self._wrapped(features, target.to(accelerator.device))
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

    def _loader(self) -> DataLoader[Crop]:
        config, accelerator, dataset = self.config, self._accelerator, self.dataset
        sampler = StepSampler(
            dataset.labels, config.batch_size, self.first_step, config.steps, config.seed,
            rank=accelerator.process_index, world_size=accelerator.num_processes, balanced=config.data.balanced,
        )  # fmt: skip
        return DataLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=config.data.workers,
            collate_fn=_collate,
            worker_init_fn=_single_thread,
            prefetch_factor=4 if config.data.workers else None,
        )

    def _tell(self, errors: list[tuple[str, bool]]) -> None:
        for error, fatal in errors:
            if fatal or self.config.data.strict:
                raise InputError(error)
            if error not in self.bad_files:
                self.bad_files.append(error)
                self._warn(error)

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
    speeds = config.data.speeds
    if not speeds or min(speeds) <= 0 or len(set(speeds)) < len(speeds):
        raise InputError(f"data.speeds must be positive factors, each one once, got {speeds}")
    if not config.out:
        raise InputError("out must name a folder")
    try:
        check_form(_form(config.loss))
    except InputError as error:
        raise InputError(f"loss.{error}") from error
    for low, high in (("loss.margin_start", "loss.margin_end"), ("optimizer.final_lr", "optimizer.lr")):
        if values[low] > values[high]:
            raise InputError(f"{low}={values[low]} must not exceed {high}={values[high]}")
    if config.data.noise_snr_db[0] > config.data.noise_snr_db[1]:
        raise InputError(f"data.noise_snr_db must be lowest and highest, got {list(config.data.noise_snr_db)}")


def _dataset(config: TrainConfig, spec: FrontendSpec) -> CropDataset:
    data = config.data
    augment = Augment(data.noise, data.rir, data.augment_probability, data.noise_snr_db, spec.sample_rate)
    return CropDataset(
        read_train_list(data.train_list),
        data.root or Path(data.train_list).parent,
        sample_rate=spec.sample_rate,
        crop_seconds=data.crop_seconds,
        speeds=data.speeds,
        augment=augment,
    )


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


def _collate(crops: list[Crop]) -> tuple[Tensor, Tensor, Tensor, list[tuple[str, bool]]]:
    """Waveforms (B, S), seeds of their dither (B,), labels (B,), and each error with whether no crop could be had."""
    waveforms = torch.from_numpy(np.stack([crop.samples for crop in crops]))
    seeds = torch.tensor([crop.seed for crop in crops])
    labels = torch.tensor([crop.label for crop in crops])
    return waveforms, seeds, labels, [(error, crop.label < 0) for crop in crops for error in crop.errors]


def _single_thread(worker: int) -> None:
    torch.set_num_threads(1)
