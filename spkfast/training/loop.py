"""The training loop."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from spkfast.data.reading import Batch
from spkfast.errors import InputError
from spkfast.frontends import frontend
from spkfast.inference import SpeakerEncoder, Threshold
from spkfast.nn import SyncBatchNorm
from spkfast.training import averaging, checkpoint, optimizers, schedule, task
from spkfast.training.best import Best
from spkfast.training.config import FREE_ON_RESUME, TrainConfig, check, flatten
from spkfast.training.distillation import Teachers
from spkfast.training.inputs import Inputs
from spkfast.training.lock import locked
from spkfast.training.log import LOG, VALIDATION, RunLog, drop_events, read_log, trackers
from spkfast.training.meter import Meter, Rates
from spkfast.training.report import CONFIG, write_training_report
from spkfast.training.task import Classes, SpeakerTask
from spkfast.training.validation import HELD_OUT, ListResult, Validation, mean_eer

__all__ = ["Progress", "Trainer", "read_log"]

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Steps in a row that fp16 may skip: the factor on the gradients, halved each time, is far below 1 then.
_MOST_SKIPPED = 40
# All settings, as 'spkfast train' reads them.
_SETTINGS = "config.yaml"


class Progress(NamedTuple):
    """What the loop reports of each step, one step late.

    Attributes:
        step: Steps done.
        steps: Steps of the run.
        loss: Of the batch.
        accuracy: Share of its crops nearest to their own speaker.
        crops_per_second: Over all processes, since the last entry of the log but one, as what follows.
        loader_wait: Share of the time spent waiting for a batch.
        device_busy: Share of the time in which the device was at work.
        eer_percent: Of the last validation, mean over the lists; None before it.
    """

    step: int
    steps: int
    loss: float
    accuracy: float
    crops_per_second: float
    loader_wait: float
    device_busy: float
    eer_percent: float | None


class _Launched(NamedTuple):
    """A step whose numbers are yet to be read."""

    done: int
    batch: Batch
    numbers: Tensor  # loss, accuracy, target cosine, norm of the gradient; in the memory of the host
    arrived: torch.cuda.Event | None  # when they are there; None where they are already


class Trainer:
    """A training run; one that was cut off goes on, with ``resume``, to the same weights.

    Iterating over :meth:`run` trains, and saves the encoder in ``out/model`` at the end.

    Args:
        config: The run.
        warn: Called with a line for each utterance that cannot be read, and for what else there is to say of the data.

    Attributes:
        folder: Where everything is written.
        first_step: Steps that were already done.
        steps: Steps of the run.
        dataset: Crops of the training data.
        stopped: Whether the run has ended because :meth:`stop` was called, in whatever process.

    Raises:
        InputError: If the config, a list or a checkpoint cannot be used, or ``out`` holds an earlier run that is not to
            be resumed.
    """

    def __init__(self, config: TrainConfig, warn: Callable[[str], None] = lambda message: None) -> None:
        from accelerate import Accelerator
        from accelerate.utils import set_seed

        check(config)
        task.form(config.loss)
        self._config, self._warn = config, warn
        self.folder = Path(config.out)
        found = checkpoint.checkpoints(self.folder / "checkpoints")
        has_ended = (self.folder / task.MODEL).exists()
        held = "checkpoints" if found else "the model" if has_ended else _remains(self.folder)
        if held and not config.resume:
            raise InputError(
                f"{self.folder}: holds {held} of an earlier run; "
                f"{'' if has_ended and not found else 'resume it with --resume or '}choose another --out"
            )
        if has_ended and not found:
            raise InputError(
                f"{self.folder}: holds the model of a run that has ended, but none of its checkpoints: there is "
                "nothing to go on from"
            )
        self._spec = frontend(config.frontend.preset, **config.frontend.options)
        self._accelerator = accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),  # else several processes without a GPU would not find one another
            log_with=trackers(config) or None,
        )
        rank, processes = accelerator.process_index, accelerator.num_processes
        inputs = Inputs(config, self._spec, device=accelerator.device, rank=rank, world_size=processes, warn=warn)
        self._inputs, self.dataset, self.steps = inputs, inputs.dataset, inputs.length.steps
        validation = config.validation
        self._validation = self._best = None
        if validation.trials or inputs.held:
            self._validation = Validation(
                validation, inputs.held, sample_rate=self._spec.sample_rate, seed=config.seed, rank=rank, warn=warn,
                frame_length=self._spec.frame_length,
            )  # fmt: skip
            self._validation.check_disjoint(inputs.corpus.speakers)
            self._best = Best(self.folder / "best", validation.keep) if validation.keep else None
        elif validation.take == "best":
            raise InputError("validation.take=best needs validation.trials or validation.held_out")
        self._validate_every = max(1, inputs.length.span(validation.every, "validation.every"))
        lr, final_lr = (
            optimizers.scaled(config.optimizer, value, inputs.crops_per_step)
            for value in (config.optimizer.lr, config.schedule.final_lr)
        )
        self._lr = schedule.learning_rate(config.schedule, lr, final_lr, inputs.length)
        self._margin = schedule.margin(config.loss, inputs.length)

        set_seed(config.seed)
        self._classes = Classes(inputs.corpus.speakers, inputs.speeds)
        distillation = config.distillation
        self._task = task.build(config.model, config.loss, self._spec, self._classes, distillation.weight)
        if config.init_from is not None and not found:
            taken = task.start_from(self._task, config.init_from, config.loss, self._spec, self._classes)
            if self.is_main_process:
                warn(f"starts from {taken}")
        sources = distillation.teachers
        self._teachers = Teachers(sources, self._spec, accelerator.device) if sources else None
        if self._validation is not None:
            for source in dict.fromkeys([*([config.init_from] if config.init_from and not found else []), *sources]):
                before = set(task.trained_on(source)).difference(inputs.corpus.speakers)  # the others were told
                self._validation.check_disjoint(before, f"were trained on in {source}")
        if config.sync_batch_norm:
            SyncBatchNorm.convert(self._task.net)
        self._wrapped = accelerator.prepare(self._task)
        self._optimizer = optimizers.create(self._task, config.optimizer)
        self._scaler = torch.amp.GradScaler(accelerator.device.type, enabled=config.precision == "fp16")
        self._average = averaging.create(config.averaging, self._task, inputs.length)
        self._settings = {
            **json.loads(json.dumps(flatten(config))),  # as a checkpoint has them
            "contents of the data": inputs.fingerprint,
            "contents of the trials": self._validation.fingerprint if self._validation else "",
            "number of processes": processes,
            "teachers": self._teachers.fingerprints if self._teachers else [],
        }
        if config.resume and not found:
            _check_begun(self.folder / CONFIG, self._settings)
        self._results: dict[str, ListResult] = {}
        self._skipped = 0
        self._asked_to_stop = self.stopped = False
        torch.manual_seed(config.seed + rank)  # as for dropout, which is each process's own
        self.first_step = self._restore(found[-1]) if found else 0

    @property
    def bad_files(self) -> list[str]:
        """What was wrong with each utterance that was passed over."""
        return list(self._inputs.bad.messages.values())

    @property
    def is_main_process(self) -> bool:
        """Whether this is the one of several processes that writes files and speaks."""
        return bool(self._accelerator.is_main_process)

    @property
    def encoder(self) -> SpeakerEncoder:
        """The network as it is validated and saved, with its front-end; in evaluation mode."""
        return SpeakerEncoder(self._trained.net, self._spec)

    @property
    def _trained(self) -> SpeakerTask:
        """What comes of the run: the weights as they are, or their average."""
        return self._task if self._average is None else cast(SpeakerTask, self._average.net)

    def stop(self) -> None:
        """Lets :meth:`run` write a checkpoint and end, as a handler of a signal may ask at any time.

        It does so after the present step; where there are several processes, at the next entry of the log after one of
        them was asked. A validation that is under way is finished.
        """
        self._asked_to_stop = True

    def run(self) -> Iterator[Progress]:
        """Trains, one item for each step.

        Raises:
            InputError: If the loss is not finite, files cannot be read, or another run is writing into ``out``.
        """
        with self._alone():
            yield from self._run()

    def _run(self) -> Iterator[Progress]:
        config, accelerator, inputs = self._config, self._accelerator, self._inputs
        self._begin()
        log, validations = (
            RunLog(self.folder / name, self.first_step, self._warn) if self.is_main_process else None
            for name in (LOG, VALIDATION)
        )
        meter = Meter(accelerator.device)
        rates = Rates(0.0, 0.0, 0.0, 0.0)
        window = _Window()
        saved = time.monotonic()
        before: _Launched | None = None
        batches = iter(inputs.batches())
        for done in itertools.count(self.first_step + 1):
            # By the first of them the processes that read are begun.
            is_first = done == self.first_step + 1
            with meter.waiting(), _signals_for_this_process() if is_first else contextlib.nullcontext():
                batch = next(batches, None)
            if batch is None:
                break
            meter.begin()
            launched = self._launch(done, batch)
            if self._average is not None:
                self._average.update(done)
            meter.end(len(batch.labels) * accelerator.num_processes)
            # The numbers of the step before are read while the device is at this one.
            stops = self._asked_to_stop and accelerator.num_processes == 1
            due = done % config.log_steps == 0 or done == self.steps or stops
            validate = self._validation is not None and (done % self._validate_every == 0 or done == self.steps)
            for one in (before, launched if due or validate else None):
                if one is not None:
                    values = self._read(one)
                    window.add(values)
                    eer = mean_eer(self._results) if self._results else None
                    yield Progress(one.done, self.steps, values[0], values[1], *rates[:3], eer)
                    if not self._task.net.training:  # whoever has taken the encoder meanwhile
                        self._wrapped.train()
            before = None if due or validate else launched
            if due:
                rates = meter.read()
                entry = {
                    **window.read(accelerator), "lr": self._lr(done - 1), "margin": self._margin(done - 1),
                    **rates._asdict(),
                }  # fmt: skip
                if log is not None:
                    log.write(done, entry)
                self._track(entry, done)
            with meter.paused():
                if validate:
                    self._validate(done, validations)
                if due:
                    late = (time.monotonic() - saved) / 60 >= config.checkpoint_minutes
                    late, self.stopped = self._agreed(late, self._asked_to_stop)
                    if late or self.stopped or done == self.steps:
                        self._save(done, is_last=self.stopped or done == self.steps)
                        saved = time.monotonic()
            if self.stopped and done < self.steps:
                self._leave()
                return
        self._finish()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """While no other run writes into the folder; in all processes, or refused in all."""
        from accelerate.utils import gather_object

        with contextlib.ExitStack() as stack:
            error = ""
            if self.is_main_process:
                try:
                    stack.enter_context(locked(self.folder))
                except InputError as reason:
                    error = str(reason)
            error = next(filter(None, gather_object([error])), "")
            if error:
                raise InputError(error)
            yield

    def _begin(self) -> None:
        accelerator = self._accelerator
        if self.is_main_process and not self.first_step:
            drop_events(self.folder)
        accelerator.init_trackers("")  # each tracker knows its own
        if self.is_main_process:
            corpus = self._inputs.corpus
            found = {
                "steps": self.steps,
                "utterances": len(corpus),
                "speakers": len(corpus.speakers),
                "held_out_speakers": self._inputs.held.speakers if self._inputs.held else [],
                "classes": len(self._classes.names),
                "parameters": sum(value.numel() for value in self._task.net.parameters()),
                "crops_per_step": self._inputs.crops_per_step,
                "processes": accelerator.num_processes,
                "device": str(accelerator.device),
            }
            _write(self.folder / CONFIG, json.dumps({**self._settings, "run": found}, indent=1) + "\n")
            _write(self.folder / _SETTINGS, _yaml(self._config))
            if self._best is not None:  # of later steps, or of a run that was cut off before its first checkpoint
                self._best.drop_after(self.first_step)
        self._wrapped.train()

    def _launch(self, done: int, batch: Batch) -> _Launched:
        """A step of the optimiser, from crops to changed weights."""
        config, accelerator = self._config, self._accelerator
        rate = self._lr(done - 1)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._task.head.margin = self._margin(done - 1)
        device, parts = accelerator.device.type, self._inputs.parts(batch)
        total = torch.zeros(3, device=accelerator.device)
        for number, part in enumerate(parts, start=1):
            share = len(part.labels) / len(batch.labels)
            # Gradients are summed over the processes once a step.
            last = number == len(parts)
            with contextlib.nullcontext() if last else accelerator.no_sync(self._wrapped):
                features, target = self._inputs.features(part)
                # Not the accelerator's own setting: that is fixed for the life of the process by its first run.
                with torch.autocast(device, _AUTOCAST.get(config.precision), enabled=config.precision in _AUTOCAST):
                    scores = None if self._teachers is None else self._teachers.scores(features)
                    loss, stats = self._wrapped(features, target, scores)
                self._scaler.scale(loss * share).backward()
            total += share * torch.stack([loss.detach(), stats.accuracy, stats.target_cosine])
        self._scaler.unscale_(self._optimizer)
        limit = config.optimizer.clip_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self._task.parameters(), limit)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()
        return _Launched(done, batch, *_to_host(torch.cat([total, norm[None]])))

    def _read(self, launched: _Launched) -> list[float]:
        """The numbers of a step.

        Raises:
            InputError: If one is not finite; the batch is kept in a file then.
        """
        if launched.arrived is not None:
            launched.arrived.synchronize()
        values: list[float] = launched.numbers.tolist()
        skips = self._config.precision == "fp16"
        self._skipped = self._skipped + 1 if skips and not math.isfinite(values[3]) else 0
        wrong = {"loss": values[0]} | ({} if skips and self._skipped <= _MOST_SKIPPED else {"grad_norm": values[3]})
        for name, value in wrong.items():
            if not math.isfinite(value):
                path = self._keep(launched)
                raise InputError(
                    f"{self.folder}: the {name} became {value} at step {launched.done}; lower optimizer.lr or "
                    f"optimizer.clip_grad_norm, or look at the batch{path}"
                )
        return values

    def _keep(self, launched: _Launched) -> str:
        """Writes a batch for inspection; where, in words."""
        batch, step = launched.batch, launched.done
        rank = self._accelerator.process_index
        path = self.folder / f"nonfinite_step_{step:08d}_process_{rank}.pt"
        content = {
            **{name: getattr(batch, name) for name in ("crops", "lengths", "speeds", "labels", "keys")},
            "speakers": [self._inputs.speaker(label) for label in batch.labels.tolist()],
            "step": step,
        }
        try:
            torch.save(content, path)
        except (OSError, RuntimeError) as error:
            return f", which could not be written ({error})"
        return f" in {path} (torch.load; int16 crops, speakers, keys of the augmentation)"

    def _track(self, entry: dict[str, float], done: int) -> None:
        """To TensorBoard and others, which a full disk must not let end the run."""
        try:
            self._accelerator.log(entry, step=done)
        except OSError as error:
            self._warn(f"{self.folder}: trackers cannot be written any more ({error}); training goes on")
            self._accelerator.trackers.clear()

    def _validate(self, done: int, log: RunLog | None) -> None:
        from accelerate.utils import gather_object

        assert self._validation is not None
        started = time.monotonic()
        accelerator = self._accelerator
        if accelerator.num_processes > 1:  # the statistics of batch norm are each process's own between two steps
            from accelerate.utils import broadcast

            for value in self._trained.buffers():
                value.copy_(broadcast(value.clone()))
        encoder = self.encoder
        results = self._validation.run(
            encoder, rank=accelerator.process_index, world_size=accelerator.num_processes,
            gather=lambda rows: gather_object([rows]),
        )  # fmt: skip
        self._wrapped.train()
        self._results = results
        seconds = time.monotonic() - started
        lists = {name: result._asdict() for name, result in results.items()}
        self._track({f"eer_percent/{name}": result.eer_percent for name, result in results.items()}, done)
        if log is None:
            return
        mean = mean_eer(results)
        log.write(done, {"mean_eer_percent": mean, "seconds": seconds, "lists": lists})
        encoder.threshold = _threshold(results)
        if self._best is not None:

            def save(folder: Path) -> None:
                encoder.save(folder)
                task.save_head(folder, self._trained.head.state_dict(), self._classes)

            try:
                self._best.add(done, mean, save, {"lists": lists})
            except OSError as error:
                self._warn(f"{self.folder / 'best'}: the model of step {done} could not be written ({error})")

    def _save(self, done: int, *, is_last: bool) -> None:
        """A checkpoint; where it cannot be written, training goes on with the last one."""
        accelerator, average = self._accelerator, self._average
        state = {
            "task": self._task.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "average": average.state_dict() if average is not None else {},
            "sampler": self._inputs.state_dict(done),
            "results": {name: result._asdict() for name, result in self._results.items()},
        }
        own = {"random": torch.get_rng_state()}
        if accelerator.device.type == "cuda":
            own["random of the device"] = torch.cuda.get_rng_state(accelerator.device)
        folder, keep = self.folder / "checkpoints", self._config.keep_checkpoints
        error = checkpoint.save(folder, done, state, own, self._settings, keep, accelerator)
        if error:
            if is_last:
                raise InputError(f"{folder}: the last checkpoint could not be written ({error}); free space, --resume")
            if self.is_main_process:
                self._warn(
                    f"{folder}: no checkpoint could be written at step {done} ({error}); earlier ones are kept, and "
                    "training goes on"
                )
            return
        if self._best is not None and self.is_main_process:
            self._best.checkpointed(done)

    def _restore(self, path: Path) -> int:
        step, state, own = checkpoint.load(path, self._settings, FREE_ON_RESUME, self._accelerator)
        try:
            self._task.load_state_dict(state["task"])
            self._optimizer.load_state_dict(state["optimizer"])
            self._scaler.load_state_dict(state["scaler"])
            if self._average is not None:
                self._average.load_state_dict(state["average"])
            self._inputs.load_state_dict(state["sampler"])
            torch.set_rng_state(own["random"])
            if "random of the device" in own:
                torch.cuda.set_rng_state(own["random of the device"], self._accelerator.device)
            self._results = {name: ListResult(**result) for name, result in state["results"].items()}
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise InputError(f"{path}: cannot be restored ({' '.join(str(error).split())[:200]})") from error
        return step

    def _agreed(self, *decisions: bool) -> list[bool]:
        """Which of these any process has taken: clocks differ, and a process that saved alone would wait for ever."""
        taken = torch.tensor(decisions, device=self._accelerator.device, dtype=torch.int32)
        return [count > 0 for count in self._accelerator.reduce(taken, "sum").tolist()]

    def _finish(self) -> None:
        from safetensors import SafetensorError

        if self.is_main_process:
            encoder, head = self.encoder, self._trained.head.state_dict()
            best = self._best.best() if self._best is not None and self._config.validation.take == "best" else None
            if best is not None:
                encoder, head = SpeakerEncoder.load(best, device="cpu"), task.read_head(best / task.HEAD)[0]
            elif self._results:
                encoder.threshold = _threshold(self._results)
            try:
                task.save_head(self.folder, head, self._classes)
                encoder.save(self.folder / task.MODEL)  # last: it tells that the run has ended
            except (OSError, SafetensorError) as error:  # the writer of safetensors has an error of its own
                raise InputError(
                    f"{self.folder}: the model could not be written ({error}); the last checkpoint has it: free space, "
                    "--resume"
                ) from error
            try:
                write_training_report(self.folder)
            except OSError as error:  # the model is there
                self._warn(f"{self.folder}: no report could be written ({error})")
        self._leave()

    def _leave(self) -> None:
        self._accelerator.wait_for_everyone()
        # Not accelerator.end_training(): another run may follow, among the same processes.
        for tracker in self._accelerator.trackers:
            tracker.finish()


def _remains(folder: Path) -> str:
    """What a run that was cut off before its first checkpoint has left of its work, in words."""
    held = [name for name in (LOG, VALIDATION) if read_log(folder, name)]
    return ", ".join([*held, *(["best/"] if any((folder / "best").glob("step_*")) else [])])


def _check_begun(path: Path, settings: dict[str, Any]) -> None:
    """Refuses other settings than those of a run that was cut off before its first checkpoint, if there is one."""
    if not path.exists():
        return
    try:
        theirs = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); choose another --out") from error
    theirs.pop("run", None)  # what was found, not set
    checkpoint.check_settings(path, theirs, settings, FREE_ON_RESUME)


def _yaml(config: TrainConfig) -> str:
    import yaml

    settings = json.loads(json.dumps(dataclasses.asdict(config)))  # without tuples
    del settings["resume"]  # of the command, not of the run
    return str(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _signals_for_this_process() -> Iterator[None]:
    """Processes that are begun within are deaf to signals to end, which may go to all of a group at once.

    The training process ends them when it has done what it does on such a signal.
    """
    former = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def _to_host(numbers: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Numbers on their way to the host, ahead of what the device is given later, and the event of their arrival."""
    if not numbers.is_cuda:
        return numbers, None
    host = torch.empty_like(numbers, device="cpu", pin_memory=True)
    host.copy_(numbers, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(numbers.device))
    return host, arrived


class _Window:
    """Means of the numbers of steps between entries of the log."""

    def __init__(self) -> None:
        self._sums = [0.0] * 4
        self._count = 0

    def add(self, values: list[float]) -> None:
        self._sums = [total + value for total, value in zip(self._sums, values, strict=True)]
        self._count += 1

    def read(self, accelerator: Any) -> dict[str, float]:
        """Means over steps and processes; begins anew."""
        means = torch.tensor([total / self._count for total in self._sums], dtype=torch.float64)
        if accelerator.num_processes > 1:
            means = accelerator.reduce(means.to(accelerator.device), "mean")
        self.__init__()  # type: ignore[misc]
        return dict(zip(("loss", "accuracy", "target_cosine", "grad_norm"), means.tolist(), strict=True))


def _threshold(results: dict[str, ListResult]) -> Threshold:
    """Where as many trials are wrongly accepted as refused, on speakers held out or else on the first list."""
    name = HELD_OUT if HELD_OUT in results else next(iter(results))
    return Threshold(results[name].threshold, name)
