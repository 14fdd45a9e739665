"""Everything that a training run depends on, as typed dataclasses that a YAML file fills in."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import operator
import os
import re
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from spkfast.errors import InputError, check_name

# A length or a point of a run, and the length of the run itself; with the words of errors for them. A float is one of
# steps too, since 1e5 is one.
Span = Annotated[int | float | str, "a number of steps, 'N epochs' or 'N %' of the run"]
RunLength = Annotated[int | float | str, "a number of steps or 'N epochs'"]

# Batch norm needs two rows to have a variance.
LEAST_ROWS = 2

# Numbers outside these make no sense whatever the other settings are. What depends on them is checked where it is used.
_LIMITS: dict[str, dict[str, float]] = {
    "batch_size": {"at least": LEAST_ROWS},
    "accumulate": {"at least": 1},
    "seed": {"at least": 0, "at most": 2**32 - 1},
    "checkpoint_minutes": {"at least": 0},
    "keep_checkpoints": {"at least": 1},
    "log_steps": {"at least": 1},
    "data.crop_seconds": {"above": 0, "at most": 600},
    "data.workers": {"at least": 0},
    "data.max_unreadable": {"at least": 0, "at most": 1},
    "loss.margin": {"at least": 0, "at most": 1.5},
    "distillation.weight": {"at least": 0, "below": math.inf},
    "optimizer.lr": {"at least": 0, "below": math.inf},
    "optimizer.lr_batch_size": {"at least": 1},
    "optimizer.momentum": {"at least": 0, "below": 1},
    "optimizer.betas": {"at least": 0, "below": 1},
    "optimizer.weight_decay": {"at least": 0, "below": math.inf},
    "optimizer.clip_grad_norm": {"at least": 0},
    "schedule.final_lr": {"at least": 0, "below": math.inf},
    "schedule.warmup_lr": {"at least": 0, "below": math.inf},
    "schedule.cycle_decay": {"above": 0, "at most": 1},
    "schedule.factor": {"above": 0, "at most": 1},
    "averaging.decay": {"at least": 0, "below": 1},
    "averaging.snapshots": {"at least": 1},
    "validation.keep": {"at least": 0},
}
# What a field holds, as errors tell it.
_KINDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list of texts",
    tuple: "two numbers",
    dict: "keys and values",
    NoneType: "null",
}
_HOLDS = {"at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt}
# What the first run settles for the second; by the seed the speakers held out are drawn.
_OF_THE_FIRST_RUN = ("out", "init_from", "resume", "seed", "fine_tuning")


@dataclasses.dataclass
class ModelConfig:
    """The network.

    Args:
        name: One of ``spkfast.models.list()``.
        options: Keywords of that network.
    """

    name: str = "ecapa_tdnn"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class FrontendConfig:
    """The front-end.

    Args:
        preset: Toolkit whose settings are taken.
        options: Fields of FrontendSpec that differ from the preset.
    """

    preset: str = "wespeaker"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class AugmentConfig:
    """What happens to crops, on the device that trains.

    Args:
        recipe: ``none``, ``room_or_noise``, ``espnet``, ``wespeaker``, ``taoruijie`` or ``clova``
            (:func:`spkfast.data.recipes.recipe`).
        options: Fields of :class:`spkfast.data.recipes.Recipe` that differ: ``stages``, ``speeds``, ``power_floor``.
        spec_augment: Keywords of :class:`spkfast.nn.SpecAugment`, whose masks the features then get.
    """

    recipe: str = "none"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    spec_augment: dict[str, Any] | None = None


@dataclasses.dataclass
class DataConfig:
    """Training data.

    Args:
        train_list: List, manifest, Kaldi directory, folder or shards (:func:`spkfast.data.manifests.read_corpus`).
        root: Folder that relative paths in it start from; its own folder where left out.
        speakers: File that says who speaks, where the corpus does not or says it otherwise.
        crop_seconds: Length of a training crop.
        sampler: What makes up a batch: ``random``, ``balanced`` (speakers in place of utterances),
            ``category_balanced``, ``n_per_speaker`` or ``length_buckets`` (:func:`spkfast.data.samplers.create`).
        sampler_options: Keywords of that sampler.
        noise: Folder of noise recordings, those below ``music``, ``noise`` and ``speech`` being such; or a bank of
            ``spkfast prepare noise``.
        rir: Folder of room impulse responses, or a bank of them.
        augment: What happens to crops.
        workers: Processes that read crops; 0 reads in the training process.
        max_unreadable: Share of the utterances that may be unreadable before the run ends; ten may in any case.
        strict: End the run at the first file that cannot be read, instead of passing over it.
    """

    train_list: str = ""
    root: str | None = None
    speakers: str | None = None
    crop_seconds: float = 2.0
    sampler: str = "random"
    sampler_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    noise: str | None = None
    rir: str | None = None
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    workers: int = 1
    max_unreadable: float = 0.01
    strict: bool = False


@dataclasses.dataclass
class LossConfig:
    """Margin softmax (:class:`spkfast.nn.MarginSoftmaxLoss`), its margin grown between two points of the run.

    Args:
        kind: ``aam`` (angle), ``am`` (cosine), ``softmax`` or ``sphereface2``.
        margin: Final margin in radians; of ``am`` and ``sphereface2`` a cosine.
        scale: Multiplier on the cosines.
        num_subcenters: Sub-centers of each speaker.
        topk: How many of the hardest other speakers are penalised.
        topk_margin: Their penalty in radians at the final margin; it grows with the margin.
        label_smoothing: Share of the loss that goes to all speakers alike.
        easy_margin: Apply the margin only where the target cosine is positive.
        fallback: Penalty past ``pi - margin``.
        margin_start: Point of the run from which the margin grows from 0 (a span: steps, ``N epochs`` or ``N %``).
        margin_end: Point of the run from which the final margin holds.
        margin_growth: ``linear``, or ``exponential``: wespeaker's, which is close to the final margin early.
    """

    kind: Literal["softmax", "am", "aam", "sphereface2"] = "aam"
    margin: float = 0.2
    scale: float = 32.0
    num_subcenters: int = 1
    topk: int = 0
    topk_margin: float = 0.0
    label_smoothing: float = 0.0
    easy_margin: bool = False
    fallback: Literal["linear", "continuous"] = "continuous"
    margin_start: Span = 0
    margin_end: Span = "30 %"
    margin_growth: Literal["linear", "exponential"] = "linear"


@dataclasses.dataclass
class DistillationConfig:
    """Trained networks whose scores the new one learns (:mod:`spkfast.training.distillation`).

    Args:
        teachers: Models that ``SpeakerEncoder.load`` takes, or one; their front-end must be that of the run.
        weight: Factor on the mean squared difference from their scores, which is added to the loss.
    """

    teachers: list[str] | str = dataclasses.field(default_factory=list)
    weight: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.teachers, str):
            self.teachers = [self.teachers]


@dataclasses.dataclass
class OptimizerConfig:
    """Optimiser.

    Args:
        name: ``sgd`` (Nesterov momentum), ``adam`` or ``adamw``.
        lr: Highest learning rate.
        lr_batch_size: Crops per step, over all processes, that ``lr`` and ``schedule.final_lr`` are meant for: with
            another number both are scaled in proportion. None takes them as they are.
        momentum: Momentum of ``sgd``.
        betas: Of ``adam`` and ``adamw``.
        weight_decay: Weight decay; of ``sgd`` and ``adam`` it is part of the gradient, of ``adamw`` not.
        decay_all: Decay biases and the scales of batch norm too, as most toolkits do, not only what has two axes or
            more.
        clip_grad_norm: Upper bound on the norm of the gradient; 0 switches clipping off.
    """

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = 0.1
    lr_batch_size: int | None = None
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-4
    decay_all: bool = False
    clip_grad_norm: float = 5.0


@dataclasses.dataclass
class ScheduleConfig:
    """Learning rate over the run. Spans are steps, ``N epochs`` or ``N %`` of the run.

    Args:
        name: ``cosine``, ``exponential``, ``cosine_restarts``, ``cyclic`` (a triangle in each cycle), ``step`` or
            ``constant``; docs/schedules.md has the formulas.
        final_lr: Lowest learning rate, at the end of the run or of a cycle; not of ``step`` and ``constant``.
        warmup: Span over which the learning rate grows, linearly, at the start and, of ``cosine_restarts``, of each
            cycle.
        warmup_lr: Where that begins.
        cycle: Span of a cycle of ``cosine_restarts`` and ``cyclic``.
        cycle_decay: Factor on the highest learning rate from one cycle to the next.
        every: Span after which ``step`` multiplies the learning rate.
        factor: By this.
    """

    name: Literal["cosine", "exponential", "cosine_restarts", "cyclic", "step", "constant"] = "cosine"
    final_lr: float = 1e-4
    warmup: Span = "5 %"
    warmup_lr: float = 0.0
    cycle: Span = "10 epochs"
    cycle_decay: float = 1.0
    every: Span = "1 epochs"
    factor: float = 0.97


@dataclasses.dataclass
class AveragingConfig:
    """Which weights are validated and saved in place of the last ones.

    Args:
        name: ``none``; ``ema``, an exponential moving average over the steps; ``last``, the mean of the last
            ``snapshots``, taken ``every`` span, up to the end of the run.
        decay: Share that the average keeps at each step of ``ema``; less at the start, ``(1 + step) / (10 + step)``.
        snapshots: How many of ``last``.
        every: Span between them.
    """

    name: Literal["none", "ema", "last"] = "none"
    decay: float = 0.999
    snapshots: int = 10
    every: Span = "1 epochs"


@dataclasses.dataclass
class ValidationConfig:
    """Error rate during the run, on trial lists, on speakers held out of the training data, or both.

    Args:
        trials: Trial lists, or one.
        root: Folder that their paths start from; each list's own where left out.
        held_out: File that lists speakers of the corpus, one a line, or how many are drawn (by ``seed``): these are
            not trained on, and trials among them are the list ``held_out``.
        every: Span between validations; one is always made at the end.
        keep: How many models are kept in ``best``, those of the lowest mean error rate over the lists.
        take: Which model becomes ``model``: the ``best`` one or the ``last``.
    """

    trials: list[str] | str = dataclasses.field(default_factory=list)
    root: str | None = None
    held_out: int | str = 0
    every: Span = "5 %"
    keep: int = 3
    take: Literal["best", "last"] = "last"

    def __post_init__(self) -> None:
        if isinstance(self.trials, str):
            self.trials = [self.trials]


@dataclasses.dataclass
class TrainConfig:
    """A training run.

    Args:
        out: Folder for checkpoints, logs, a report and, at the end, ``model/``.
        model: The network.
        frontend: The front-end.
        data: Training data.
        loss: Training objective.
        distillation: What trained networks add to it.
        optimizer: Optimiser.
        schedule: Learning rate over the run.
        averaging: Which weights are validated and saved.
        validation: Error rate during the run.
        steps: Length of the run: steps, or ``N epochs`` of the training data.
        batch_size: Crops of a process that go through the network together.
        accumulate: Batches whose gradients make up a step.
        precision: ``fp32``, or mixed precision of the network: ``bf16``, or ``fp16`` with scaled gradients.
        sync_batch_norm: Batch norm takes the statistics of all processes' batches, not of each by itself.
        seed: Seed of everything random.
        init_from: Run whose network and speakers training starts from, in place of random weights; of its copies of
            speakers at other speeds those that this run does not train on are dropped.
        fine_tuning: Keys of this config that differ in a second run, which starts from the first and is written to
            ``out/fine_tuning``; as large-margin fine-tuning has longer crops and a larger margin. None for no such run.
        checkpoint_minutes: Minutes between checkpoints; one is always written at the end.
        keep_checkpoints: Checkpoints kept, the newest ones.
        log_steps: Steps between entries of the log.
        wandb: Project of Weights & Biases to which the log goes too; None for none.
        resume: Go on from the newest checkpoint in ``out``; without it such a folder is refused.
    """

    out: str = "exp/run"
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    frontend: FrontendConfig = dataclasses.field(default_factory=FrontendConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    distillation: DistillationConfig = dataclasses.field(default_factory=DistillationConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    averaging: AveragingConfig = dataclasses.field(default_factory=AveragingConfig)
    validation: ValidationConfig = dataclasses.field(default_factory=ValidationConfig)
    steps: RunLength = 10000
    batch_size: int = 64
    accumulate: int = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    sync_batch_norm: bool = False
    seed: int = 0
    init_from: str | None = None
    fine_tuning: dict[str, Any] | None = None
    checkpoint_minutes: float = 10.0
    keep_checkpoints: int = 2
    log_steps: int = 20
    wandb: str | None = None
    resume: bool = False


# Fields that may differ between a run and its resumption: no number depends on them, nor on the place of the data
# (what the data hold is compared by fingerprint).
FREE_ON_RESUME = frozenset(
    {"out", "checkpoint_minutes", "keep_checkpoints", "resume", "data.root", "data.train_list", "data.speakers",
     "data.noise", "data.rir", "data.workers", "data.max_unreadable", "data.strict", "distillation.teachers",
     "validation.trials", "validation.root", "validation.held_out", "init_from", "fine_tuning", "wandb"}
)  # fmt: skip


def check(config: TrainConfig) -> None:
    """Refuses settings that no run can have, before anything is read or written.

    Raises:
        InputError: If one is missing, unknown, out of range or at odds with another; the message names it.
    """
    if not isinstance(config, TrainConfig):
        raise InputError(f"config must be a TrainConfig, got {_told(config)}")
    if not config.out:
        raise InputError("out must name a folder")
    if not config.data.train_list:
        raise InputError("data.train_list is not set: give --data.train_list FILE")
    check_values(config)
    validation = config.validation
    # A share of a short run may round to no step, which then stands for one; a span of 0 is an error.
    if not re.search("^[^-]*[1-9]", str(validation.every)):
        raise InputError(
            f"validation.every must be steps, 'N epochs' or 'N %' of the run, and above 0, got {validation.every!r}"
        )
    if validation.take == "best" and not validation.keep:
        raise InputError("validation.keep must be at least 1 with validation.take=best, got 0")
    distillation = config.distillation
    if bool(distillation.teachers) != bool(distillation.weight):
        raise InputError(
            "distillation.weight must be above 0 with distillation.teachers, and 0 without, got "
            f"{distillation.weight!r} and {distillation.teachers!r}"
        )
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise InputError("wandb names a project, but Weights & Biases is not installed: pip install wandb")


def check_values(config: Any, prefix: str = "") -> None:
    """Refuses values of another kind than their field's, and those that make no sense whatever the other settings are.

    Args:
        config: A config, or a section of one.
        prefix: Dotted name of the section, and a dot.

    Raises:
        InputError: Then.
    """
    for field, kind in get_type_hints(type(config), include_extras=True).items():
        name, value, is_section = prefix + field, getattr(config, field), dataclasses.is_dataclass(kind)
        if not is_section:
            check_value(name, kind, value)
        elif isinstance(value, kind):
            check_values(value, f"{name}.")
        else:
            raise InputError(f"{name} must be a {kind.__name__}, got {_told(value)}")


def check_value(name: str, kind: Any, value: Any) -> None:
    """Refuses a value that the field of this name cannot have.

    Args:
        name: Dotted name of the field.
        kind: Its type, as :func:`kinds` tells it.
        value: What it is to hold.

    Raises:
        InputError: Then; the message tells what was expected.
    """
    if get_origin(kind) is Literal:
        check_name(name, str(value), list(get_args(kind)))
    elif not fits(kind, value):
        raise InputError(f"{name} must be {_expected(kind)}, got {_told(value)}")
    parts = value if isinstance(value, list | tuple) else [value]
    # As a path, no text would be the working folder.
    if any(isinstance(part, str) and not part.strip() for part in parts):
        raise InputError(f"{name} must not be empty{', give null for none' if fits(kind, None) else ''}")
    limits = _LIMITS.get(name, {})
    for part in parts:
        if part is not None and not all(_HOLDS[word](part, limit) for word, limit in limits.items()):
            raise InputError(f"{name} must be {' and '.join(f'{w} {n}' for w, n in limits.items())}, got {part!r}")


def fits(kind: Any, value: Any) -> bool:
    """Whether a value is of the type of a field; a whole number is a number too, and a list will do as a tuple."""
    form, parts = get_origin(kind) or kind, get_args(kind)
    if form in (Union, UnionType):
        return any(fits(part, value) for part in parts)
    if form is Annotated:
        return fits(parts[0], value)
    if form is Literal:
        return value in parts
    if form in (int, float):
        return isinstance(value, int | form) and not isinstance(value, bool)
    if form is tuple:
        return isinstance(value, list | tuple) and len(value) == len(parts) and all(map(fits, parts, value))
    if form is list:
        return isinstance(value, list) and all(fits(parts[0], part) for part in value)
    return isinstance(value, form)


def kinds(config: Any = TrainConfig, prefix: str = "") -> dict[str, Any]:
    """Dotted names of all leaves of a nested dataclass and their types."""
    out: dict[str, Any] = {}
    for field, kind in get_type_hints(config, include_extras=True).items():
        out.update(kinds(kind, f"{prefix}{field}.") if dataclasses.is_dataclass(kind) else {prefix + field: kind})
    return out


def _expected(kind: Any) -> str:
    form, parts = get_origin(kind) or kind, get_args(kind)
    if form is Annotated:
        return str(parts[1])
    return " or ".join(map(_expected, parts)) if form in (Union, UnionType) else _KINDS[form]


def _told(value: Any) -> str:
    """A value, if YAML has such ones: else its type, as what is printed of a network has many lines."""
    return repr(value) if isinstance(value, tuple(_KINDS)) else f"an object of {type(value).__qualname__}"


def fine_tuned(config: TrainConfig) -> TrainConfig | None:
    """The second run of a config: with what differs in it, from the first one's model, in a folder within; or None.

    Raises:
        InputError: If ``fine_tuning`` has a key that the first run settles.
        TypeError: If it has one that the config has not.
    """
    if config.fine_tuning is None:
        return None
    for name in _OF_THE_FIRST_RUN:
        if name in config.fine_tuning:
            raise InputError(f"fine_tuning.{name} must be left out, as the first run settles it")
    second: TrainConfig = changed(config, config.fine_tuning)
    out = os.path.join(config.out, "fine_tuning")
    return dataclasses.replace(second, out=out, init_from=config.out, fine_tuning=None)


def changed(value: Any, changes: Any) -> Any:
    """A config, or a section of one, in which nested changes are made; dictionaries get what is named in them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(
            value, **{name: changed(getattr(value, name, None), new) for name, new in changes.items()}
        )
    if isinstance(value, dict) and isinstance(changes, dict):
        return value | {name: changed(value.get(name), new) for name, new in changes.items()}
    return changes


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted names of all leaves of a nested dataclass and their values."""
    out: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        name = prefix + field.name
        if dataclasses.is_dataclass(value):
            out.update(flatten(value, name + "."))
        else:
            out[name] = list(value) if isinstance(value, tuple) else value
    return out
