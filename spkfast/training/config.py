"""Everything that a training run depends on, as typed dataclasses that a YAML file fills in."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal


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
        margin_start: Fraction of the run after which the margin starts to grow from 0.
        margin_end: Fraction of the run from which the final margin holds.
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
    margin_start: float = 0.0
    margin_end: float = 0.3


@dataclasses.dataclass
class OptimizerConfig:
    """Optimiser and learning-rate schedule: linear warm-up, then cosine decay.

    Args:
        name: ``sgd`` (Nesterov momentum) or ``adamw``.
        lr: Highest learning rate.
        final_lr: Learning rate at the end of the run.
        warmup_steps: Steps of linear warm-up from 0.
        momentum: Momentum of ``sgd``.
        weight_decay: Weight decay of all parameters with two or more axes.
        clip_grad_norm: Upper bound on the norm of the gradient; 0 switches clipping off.
    """

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.1
    final_lr: float = 1e-4
    warmup_steps: int = 100
    momentum: float = 0.9
    weight_decay: float = 1e-4
    clip_grad_norm: float = 5.0


@dataclasses.dataclass
class TrainConfig:
    """A training run.

    Args:
        out: Folder for checkpoints, logs and, at the end, ``model/``.
        model: The network.
        frontend: The front-end.
        data: Training data.
        loss: Training objective.
        optimizer: Optimiser and schedule.
        steps: Training steps.
        batch_size: Crops per step and process.
        precision: ``fp32``, or ``bf16`` for automatic mixed precision of the network.
        seed: Seed of everything random.
        checkpoint_minutes: Minutes between checkpoints; one is always written at the end.
        keep_checkpoints: Checkpoints kept, the newest ones.
        log_steps: Steps between entries of the log.
        resume: Go on from the newest checkpoint in ``out``; without it such a folder is refused.
    """

    out: str = "exp/run"
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    frontend: FrontendConfig = dataclasses.field(default_factory=FrontendConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    steps: int = 10000
    batch_size: int = 64
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0
    checkpoint_minutes: float = 10.0
    keep_checkpoints: int = 2
    log_steps: int = 20
    resume: bool = False


# Fields that may differ between a run and its resumption: no number depends on them, nor on the place of the data
# (what the data hold is compared by fingerprint).
FREE_ON_RESUME = frozenset(
    {"out", "checkpoint_minutes", "keep_checkpoints", "resume", "data.root", "data.train_list", "data.speakers",
     "data.noise", "data.rir", "data.workers", "data.max_unreadable", "data.strict"}
)  # fmt: skip


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
