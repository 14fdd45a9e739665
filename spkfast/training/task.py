"""What is trained: a network and the head that it is trained with, made anew or taken from another run."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from spkfast import models
from spkfast.errors import InputError
from spkfast.frontends import FrontendSpec
from spkfast.inference import SpeakerEncoder, find_model, is_own, model_folder
from spkfast.models.base import SpeakerModel
from spkfast.nn.margin_softmax import MarginSoftmaxLoss
from spkfast.ops.margin_softmax_loss import MarginStats, check_form
from spkfast.reference import MarginForm
from spkfast.reference.change_speed import ratio
from spkfast.training.config import LossConfig, ModelConfig, TrainConfig
from spkfast.training.distillation import score_loss

# Folder of the model of a finished run, and beside it: weights of its classes, and whose they are.
MODEL = "model"
HEAD = "head.safetensors"
_METADATA = "spkfast"


class Classes(NamedTuple):
    """What a head tells apart: class ``k + i * len(speakers)`` is speaker ``k`` at speed ``i``."""

    speakers: Sequence[str]
    speeds: Sequence[float]

    @property
    def names(self) -> list[tuple[str, Fraction]]:
        """Speaker and speed of each class."""
        return [(speaker, ratio(speed)) for speed in self.speeds for speaker in self.speakers]


class SpeakerTask(nn.Module):
    """Network and head as one module, so that mixed precision and data parallelism wrap both.

    Args:
        net: The network.
        head: The head.
        distillation_weight: Factor on what distillation adds to the loss.
    """

    net: SpeakerModel
    head: MarginSoftmaxLoss

    def __init__(self, net: SpeakerModel, head: MarginSoftmaxLoss, distillation_weight: float = 0.0) -> None:
        super().__init__()
        self.net, self.head = net, head
        self._distillation_weight = distillation_weight

    def forward(self, features: Tensor, target: Tensor, scores: Tensor | None = None) -> tuple[Tensor, MarginStats]:
        """Features (B, T, M), labels (B,) and scores (B, B) of teachers, if any, to loss and statistics of the head."""
        embeddings = self.net(features)
        loss, stats = self.head(embeddings, target, return_stats=True, validate=False)
        if scores is not None:
            loss = loss + self._distillation_weight * score_loss(embeddings, scores)
        return loss, stats


def build(
    model: ModelConfig, loss: LossConfig, spec: FrontendSpec, classes: Classes, distillation_weight: float = 0.0
) -> SpeakerTask:
    """A network and a head with random weights.

    Raises:
        InputError: If a setting of either makes no sense.
    """
    try:
        net = models.create(model.name, **{"feature_dim": spec.output_size, **model.options})
    except InputError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"model.options: {error}") from error
    head = _head(loss, net.embedding_dim, len(classes.speakers) * len(classes.speeds))
    return SpeakerTask(net, head, distillation_weight)


def start_from(task: SpeakerTask, source: str, loss: LossConfig, spec: FrontendSpec, classes: Classes) -> str:
    """Takes the network of a finished run, or any that ``SpeakerEncoder.load`` takes, and the classes that it has.

    Args:
        task: Is given the weights. Classes that the other run did not have stay random, as long as its in the mean.
        source: Folder of the run, or of a model.
        loss: Settings of the head.
        spec: The front-end, which must be that of the network.
        classes: Those of ``task``.

    Returns:
        What was taken, in words.

    Raises:
        InputError: If the network has other settings, or the classes another form.
    """
    net = cast(SpeakerModel, SpeakerEncoder.load(source, frontend=spec, device="cpu").model)
    theirs, ours = ({"name": one.name} | _plain(one.config) for one in (net, task.net))
    differing = [name for name in sorted({*theirs, *ours}) if theirs.get(name) != ours.get(name)]
    if differing:
        told = ", ".join(f"{name}={theirs.get(name)!r}, the config {ours.get(name)!r}" for name in differing)
        raise InputError(f"init_from: the network of {source} has {told}")
    task.net.load_state_dict(net.state_dict())
    path = _head_of(source)
    if path is None:
        return f"the network of {source}; its speakers are not known, the head starts anew"
    tensors, had = read_head(path)
    place = {name: k for k, name in enumerate(had.names)}
    names = classes.names
    new = [name for name in names if name not in place]
    old = _head(loss, task.net.embedding_dim, len(place))
    try:
        old.load_state_dict(tensors)
    except RuntimeError as error:
        raise InputError(
            f"{path}: its classes do not fit the loss of this config: were loss.kind and loss.num_subcenters others? "
            f"({_one_line(error)})"
        ) from error
    place |= {name: len(place) + k for k, name in enumerate(new)}
    if new:
        old.add_speakers(len(new))
    old.keep_speakers([place[name] for name in names])
    task.head.load_state_dict(old.state_dict())
    return f"the network of {source} and {len(names) - len(new)} of its {len(had.names)} classes; {len(new)} are new"


def trained_on(source: str) -> Sequence[str]:
    """Speakers that a network was trained on, as far as they are known; takes what :func:`start_from` does."""
    path = _head_of(source)
    return () if path is None else read_head(path)[1].speakers


def _head_of(source: str) -> Path | None:
    found = find_model(source)
    folder = model_folder(found) if is_own(found) else found
    return next((path for path in (folder / HEAD, folder.parent / HEAD) if path.is_file()), None)


def check_continues(first: TrainConfig, second: TrainConfig) -> None:
    """Refuses a second run that could not start from the first one's network and classes.

    Raises:
        InputError: Then.
    """
    for name in ("model", "frontend"):
        if getattr(first, name) != getattr(second, name):
            raise InputError(f"{name} must be that of the run that it starts from, whose weights it takes")
    forms = [
        {name: value.shape for name, value in _head(one.loss, 4, 2).state_dict().items()} for one in (first, second)
    ]
    if forms[0] != forms[1]:
        raise InputError("loss.kind and loss.num_subcenters must be such that it can take the classes of the first run")


def save_head(folder: Path, state: Mapping[str, Tensor], classes: Classes) -> None:
    """Writes the state of a head and its classes into the folder of a run, whole or not at all."""
    from safetensors.torch import save_file

    facts = {"speakers": list(classes.speakers), "speeds": list(classes.speeds)}
    partial = folder / f".{HEAD}.partial"
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    try:
        save_file(tensors, partial, metadata={_METADATA: json.dumps(facts)})
        os.replace(partial, folder / HEAD)
    finally:
        partial.unlink(missing_ok=True)


def read_head(path: Path) -> tuple[dict[str, Tensor], Classes]:
    """What :func:`save_head` wrote.

    Raises:
        InputError: If it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})[_METADATA])
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, Classes(facts["speakers"], facts["speeds"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: cannot be read ({_one_line(error)})") from error


def form(config: LossConfig) -> MarginForm:
    """The settings of the head at the full margin.

    Raises:
        InputError: If one makes no sense.
    """
    names = {field.name for field in dataclasses.fields(config)} & {*MarginForm._fields}
    made = MarginForm(**{name: getattr(config, name) for name in names})
    try:
        check_form(made)
    except InputError as error:
        raise InputError(f"loss.{error}") from error
    return made


def _head(loss: LossConfig, embedding_dim: int, classes: int) -> MarginSoftmaxLoss:
    return MarginSoftmaxLoss(embedding_dim, classes, **form(loss)._asdict())


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """As JSON, in which a list and a tuple are the same."""
    return dict(json.loads(json.dumps(config)))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
