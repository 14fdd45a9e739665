"""A whole training step, from crops of int16 to changed weights: of this project, and as training scripts have it.

Each contender runs in a worker, and reads what :func:`prepare` has written to ``folder``.
"""

from __future__ import annotations

import atexit
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import soundfile
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from benchmarks import baselines, timing
from benchmarks.peers import augmentation as usual
from benchmarks.peers import contenders, ecapa, heads
from benchmarks.peers.worker import Contender
from spkfast import functional, models
from spkfast.data import samplers
from spkfast.data.augmentation import Augment, AugmentedFbank, Convolved, Mixed
from spkfast.data.banks import Bank
from spkfast.data.manifests import read_corpus
from spkfast.data.reading import Batch, CropDataset, Loader, collate
from spkfast.data.recipes import recipe
from spkfast.data.samplers import Draw, StepSampler
from spkfast.frontends import frontend
from spkfast.nn import Fbank, MarginSoftmaxLoss
from spkfast.ops.margin_softmax_loss import MarginStats

RATE, EMBEDDING, CLIP = 16000, 192, 5.0
PREFETCH = 2  # batches that a loader process reads ahead, torch's own number
SPEC = frontend("wespeaker")
# With the toolkits' floor under powers: without it the usual way makes NaN of a noise that is silent for a while.
RECIPE = recipe("room_or_noise", speeds=[1.0, 0.9, 1.1], power_floor=1e-4)
HEAD = heads.Head(subcenters=1, topk=0, margin=0.2, scale=32.0)
# So small a rate leaves weights and gradients, however often a step is timed, what they were.
_RATE, _MOMENTUM, _WEIGHT_DECAY = 1e-6, 0.9, 1e-4
_BATCHES = 4  # that are read over and over
_PATIENCE_SECONDS = 1.0
_FEATURES_ERROR = 1e-4  # on average, of their standard deviation: one wrong frame in a thousand is more

# What crops are read from: int16 in memory, or files.
Source = Literal["decoded", "FLAC"]
# What makes features, and of what: of a batch in the training process, or of a crop where it is augmented.
Features = Literal["torch, of a batch", "torch, of a crop", "kaldi-native-fbank, of a crop"]
Mark = Callable[[str], None]


class Size(NamedTuple):
    """A network and its batches.

    Attributes:
        channels: Of stem and blocks.
        mfa_channels: Of the aggregation layer.
        attention_channels: Bottleneck of the attention.
        se_channels: Bottleneck of the squeeze-and-excitation.
        batch: Crops of a step.
        seconds: Length of a crop.
        speakers: Each of which is a class at each speed.
    """

    channels: int
    mfa_channels: int
    attention_channels: int
    se_channels: int
    batch: int
    seconds: float
    speakers: int

    @property
    def samples(self) -> int:
        """Length of a crop after its change of speed."""
        return round(self.seconds * RATE)

    @property
    def classes(self) -> int:
        """Classes of the head."""
        return self.speakers * len(RECIPE.speeds)


class Crops(NamedTuple):
    """Batches that both ways train on.

    Attributes:
        draws: Utterances of each batch.
        batches: Their crops as this project has them.
        items: What the usual way does to each crop of all batches.
        samples: To what, int16.
    """

    draws: list[list[Draw]]
    batches: list[Batch]
    items: list[usual.Item]
    samples: list[np.ndarray]


class Task(nn.Module):
    """Network and head as one module.

    Args:
        net: Features (B, T, M) to embeddings (B, E).
        head: Has the class weights, and makes loss and statistics of embeddings and labels.
    """

    def __init__(self, net: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.net, self.head = net, head

    def forward(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """Loss and statistics."""
        found: tuple[Tensor, Sequence[Tensor]] = self.head(self.net(features), labels)
        return found


class PlainHead(nn.Module):
    """AAM-softmax by the best that plain torch can do; it has no statistics."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(classes, EMBEDDING)))

    def forward(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """Mean loss, and nothing."""
        return heads.on_targets(embeddings, self.weight, labels, HEAD), ()


class OwnHead(MarginSoftmaxLoss):
    """That of this project, with the statistics that its training loop logs."""

    def forward(self, embeddings: Tensor, target: Tensor, **_: Any) -> tuple[Tensor, MarginStats]:
        """Mean loss, and statistics."""
        return cast(tuple[Tensor, MarginStats], super().forward(embeddings, target, return_stats=True))


class Update:
    """What both ways do from features on: forward and backward pass, clipping, and a step of SGD.

    Args:
        task: Network and head.
        precision: ``fp32``, or ``bf16`` for autocast.
        optimizer: Implementation of the optimiser; empty for the fastest that torch has.
    """

    def __init__(self, task: Task, precision: str, optimizer: str = "") -> None:
        self.task, self._autocast = task.train(), precision == "bf16"
        self.implementation = optimizer or _fastest_optimizer(task)
        self._optimizer = _optimizer(task, self.implementation)

    def __call__(self, features: Tensor, labels: Tensor, mark: Mark) -> None:
        """Changes the weights, and tells ``mark`` the name of each part that has ended."""
        loss, statistics = self._loss(features, labels)
        mark("head, forward")
        loss.backward()
        mark("backward")
        norm = nn.utils.clip_grad_norm_(self.task.parameters(), CLIP)
        mark("clipping")
        self._optimizer.step()
        self._optimizer.zero_grad()
        mark("optimiser")
        for value in (loss.detach(), *statistics, norm):  # which a log is told
            float(value)

    def first(self, features: Tensor, labels: Tensor) -> np.ndarray:
        """See :func:`benchmarks.peers.contenders.loss_and_gradients`; leaves no trace."""
        before = {name: value.clone() for name, value in self.task.state_dict().items()}
        output = contenders.loss_and_gradients(self.task, self._loss(features, labels)[0]).numpy()
        self.task.zero_grad()
        self.task.load_state_dict(before)
        return output

    def _loss(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        with torch.autocast("cpu", torch.bfloat16, enabled=self._autocast):
            found: tuple[Tensor, Sequence[Tensor]] = self.task(features, labels)
        return found


class Step:
    """A step over one of the batches that come round and round.

    Args:
        batches: What features are made of, and labels.
        features: Makes them, of a whole batch.
        update: What is done with them.
        gate: Of the loader processes.
    """

    def __init__(
        self,
        batches: Iterator[tuple[Any, Tensor]],
        features: Callable[[Any], Tensor],
        update: Update,
        gate: Gate,
    ) -> None:
        self._batches, self._features, self._update, self._gate = batches, features, update, gate

    def __call__(self, mark: Mark = lambda part: None) -> None:
        """Tells ``mark`` the name of each part that has ended."""
        with self._gate:
            batch, labels = next(self._batches)
            mark("reading")
            with torch.no_grad():
                features = self._features(batch)
            mark("front-end")
            self._update(features, labels, mark)
            mark("rest")

    def from_features(self) -> Step:
        """A step over features that are there."""
        with self._gate, torch.no_grad():
            made = [(self._features(batch), labels) for batch, labels in itertools.islice(self._batches, _BATCHES)]
        return Step(itertools.cycle(made), lambda features: features, self._update, self._gate)


class Gate:
    """Lets loader processes work while a contender has its turn, and only then.

    Else they would read ahead for it while others have theirs.
    """

    def __init__(self) -> None:
        self._open, self._owner = multiprocessing.Event(), os.getpid()
        atexit.register(self.open)

    def open(self) -> None:
        """Opens it for good: loader processes that wait could not end."""
        self._open.set()

    def __enter__(self) -> None:
        self._open.set()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._open.clear()

    def wait(self) -> None:
        """Returns while it is open; ends a loader process that was left alone."""
        while not self._open.wait(_PATIENCE_SECONDS):
            if self._owner not in (os.getpid(), os.getppid()):
                raise SystemExit


class Gated(Dataset[Any]):
    """A dataset behind a gate."""

    def __init__(self, dataset: Dataset[Any], gate: Gate) -> None:
        self._dataset, self._gate = dataset, gate

    def __len__(self) -> int:
        return len(cast(Any, self._dataset))

    def __getitem__(self, index: Any) -> Any:
        self._gate.wait()
        return self._dataset[index]


class Items(Dataset[tuple[np.ndarray, int]]):
    """Crops one by one: read, augmented, and made features of where there is something that makes them.

    Args:
        folder: See :mod:`benchmarks.peers.pipeline`.
        size: Length of the crops.
        features: Waveforms (B, S) to features (B, T, M), or None.
        source: What crops are read from; noises and responses are in memory.
    """

    def __init__(self, folder: Path, size: Size, features: Callable[[Tensor], Tensor] | None, source: Source) -> None:
        crops = load_crops(folder)
        self.items, self._samples = crops.items, crops.samples
        self._labels = torch.cat([batch.labels for batch in crops.batches]).tolist()
        self._num_samples, self._features, self._source = size.samples, features, source
        noises = {added.path for item in self.items for group in item.noises for added in group}
        self._memory = {path: soundfile.read(path, dtype="float32")[0] for path in noises}
        self._memory |= {item.room: usual.read_room(item.room) for item in self.items if item.room}

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        made = self.waveform(index)
        if self._features is not None:
            made = self._features(torch.from_numpy(made[None]))[0].numpy()
        return made, self._labels[index]

    def waveform(self, index: int) -> np.ndarray:
        """An augmented crop, float32 (S,)."""
        item = self.items[index]
        if self._source == "FLAC":
            samples = usual.read(item)
        else:
            samples = self._samples[index].astype(np.float32) / np.float32(32768)
        made = usual.augment(samples, item, self._num_samples, RECIPE.power_floor, self._memory)
        return made.astype(np.float32)


class Endless(Sampler[Any]):
    """The same batches round and round."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        return itertools.cycle(self._batches)


def prepare(folder: Path, size: Size) -> None:
    """Writes what contenders read, to a folder that :func:`benchmarks.data.bench_augmentation.prepare` has filled.

    Weights are random, as at the start of a run, and so are labels, as the corpus has fewer speakers.
    """
    torch.manual_seed(0)
    torch.save(_plain_task(size).state_dict(), folder / "weights.pt")
    corpus, dataset, augment = read_corpus(folder / "train_list.txt"), _dataset(folder, size), augment_of(folder, size)
    sampler = StepSampler(samplers.create("random", corpus, batch_size=size.batch))
    crops = Crops(list(itertools.islice(sampler, _BATCHES)), [], [], [])
    for draws in crops.draws:
        batch = collate([dataset[draw] for draw in draws])
        crops.batches.append(batch._replace(labels=torch.randint(size.classes, (size.batch,))))
        paths = [Path(corpus[draw.index].path) for draw in draws]
        for item, samples in items_of(augment, batch, paths, folder):
            crops.items.append(item)
            crops.samples.append(samples)
    torch.save(crops, folder / "crops.pt")


def items_of(
    augment: Augment, batch: Batch, paths: Sequence[Path], folder: Path
) -> Iterator[tuple[usual.Item, np.ndarray]]:
    """What the usual way does to each crop of a batch, with the draws of this project, and to which samples, int16.

    Args:
        augment: Of a recipe of rooms and noises.
        batch: The batch.
        paths: File of each crop.
        folder: Holds the recordings of both banks, in ``noises`` and ``rooms``.
    """
    assert augment.noise is not None and augment.rir is not None
    noises, rooms = (
        {begin: folder / kind / name for begin, name in zip(bank.begins.tolist(), bank.names, strict=True)}
        for kind, bank in (("noises", augment.noise), ("rooms", augment.rir))
    )
    plan = augment.draw(batch.keys)
    for row, path in enumerate(paths):
        speed = augment.recipe.speeds[int(batch.speeds[row])]
        count = min(int(batch.lengths[row]), int(np.ceil(augment.num_samples * speed)))
        samples = batch.crops[row, augment.context : augment.context + count].numpy()
        whole, _ = soundfile.read(path, dtype="int16")
        start = whole.tobytes().find(samples.tobytes()) // samples.itemsize
        room, groups = None, []
        for step in plan:
            if isinstance(step, Convolved) and int(step.sizes[row]):
                room = rooms[int(step.begins[row])]
            elif isinstance(step, Mixed):
                drawn = zip(*(value[row].tolist() for value in step), strict=True)
                groups.append([usual.Added(noises[begin], offset, snr) for begin, n, offset, snr in drawn if n])
        yield usual.Item(path, start, count, speed, room, groups, peak=False), samples


def plain_network(size: Size) -> ecapa.Ecapa:
    """The plain network; its weights have the names of this project's."""
    net = ecapa.Ecapa(size.channels)
    for name in ("blk1", "blk2", "blk3"):
        squeeze = net.get_submodule(f"encoder.{name}.se")
        squeeze.fc1 = nn.Linear(size.channels, size.se_channels)
        squeeze.fc2 = nn.Linear(size.se_channels, size.channels)
    net.encoder.mfa.conv = nn.Conv1d(3 * size.channels, size.mfa_channels, 1)
    net.pooling.fc1 = nn.Conv1d(3 * size.mfa_channels, size.attention_channels, 1)
    net.pooling.fc2 = nn.Conv1d(size.attention_channels, size.mfa_channels, 1)
    net.projector.bn = nn.BatchNorm1d(2 * size.mfa_channels)
    net.projector.fc = nn.Linear(2 * size.mfa_channels, EMBEDDING)
    return net


def prepare_check(folder: Path, size: Size, waveforms: Tensor, labels: Tensor) -> np.ndarray:
    """Writes what the first step of all contenders is checked on: waveforms (B, S), their features, and labels (B,).

    Returns:
        Loss and gradients in float64, see :func:`benchmarks.peers.contenders.loss_and_gradients`.
    """
    features, _ = functional.log_mel_fbank(waveforms.double(), spec=SPEC, backend="reference")
    torch.save((waveforms, features.float(), labels), folder / "check.pt")
    task = _plain_task(size)
    task.load_state_dict(torch.load(folder / "weights.pt"))
    return contenders.loss_and_gradients(task, task.double().train()(features.float().double(), labels)[0]).numpy()


def spkfast_step(
    folder: Path, size: Size, precision: str, source: Source = "decoded"
) -> tuple[Step, Update, AugmentedFbank]:
    """A step of this project, and the parts of it that hold modules."""
    net = models.create(
        "ecapa_tdnn", channels=size.channels, mfa_channels=size.mfa_channels, se_channels=size.se_channels,
        attention_channels=size.attention_channels, embedding_dim=EMBEDDING,
    )  # fmt: skip
    task = Task(net, OwnHead(EMBEDDING, size.classes, margin=HEAD.margin, scale=HEAD.scale))
    task.load_state_dict(torch.load(folder / "weights.pt"))
    features = AugmentedFbank(augment_of(folder, size), Fbank(SPEC, validate=False))
    update, gate, crops = Update(task, precision, "fused"), Gate(), load_crops(folder)
    batches: Iterator[Batch] = itertools.cycle(crops.batches)
    if source == "FLAC":
        dataset = cast(CropDataset, Gated(_dataset(folder, size), gate))
        batches = iter(Loader(dataset, cast(StepSampler, Endless(crops.draws)), 1, prefetch=PREFETCH))
    labels = itertools.cycle([batch.labels for batch in crops.batches])
    step = Step(zip(batches, labels, strict=True), lambda batch: features(*batch[:3], batch.keys), update, gate)
    return step, update, features


def spkfast(
    folder: Path, size: Size, precision: str, threads: int, *, source: Source = "decoded", given: bool = False
) -> Contender:
    """A step of this project: augmentation and features of whole batches in the training process.

    Args:
        folder: See :mod:`benchmarks.peers.pipeline`.
        size: The network and its batches.
        precision: ``fp32`` or ``bf16``.
        threads: Threads of the training process.
        source: What crops are read from; FLAC is decoded by one loader process.
        given: Leave out what comes before the network: features are there.
    """
    torch.set_num_threads(threads)
    step, update, features = spkfast_step(folder, size, precision, source)
    output, note = _checked(folder, lambda waveforms: features.fbank(waveforms)[0], update)
    return Contender(step.from_features() if given else step, output, note)


def usual_way(
    folder: Path,
    size: Size,
    precision: str,
    threads: int,
    *,
    features: Features = "torch, of a batch",
    workers: int = 0,
    source: Source = "decoded",
    given: bool = False,
) -> Contender:
    """A step of plain torch, of crops that were augmented one by one.

    Args:
        folder: See :mod:`benchmarks.peers.pipeline`.
        size: The network and its batches.
        precision: ``fp32`` or ``bf16``.
        threads: Threads of the training process.
        features: What makes them, and where.
        workers: Loader processes, of one thread each; 0 augments in the training process.
        source: What crops are read from.
        given: Leave out what comes before the network: features are there.
    """
    torch.set_num_threads(threads)
    make, batched = _features(features, size), features == "torch, of a batch"
    task = _plain_task(size)
    task.load_state_dict(torch.load(folder / "weights.pt"))
    update, gate = Update(task, precision), Gate()
    output, note = _checked(folder, make, update)
    items = Items(folder, size, None if batched else make, source)
    loader = DataLoader(
        Gated(items, gate),
        batch_sampler=Endless(np.arange(len(items)).reshape(-1, size.batch).tolist()),
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
    )
    step = Step(iter(loader), make if batched else lambda made: made, update, gate)
    note = f"SGD {update.implementation}, {note}"
    return Contender(step.from_features() if given else step, output, note)


def augment_of(folder: Path, size: Size) -> Augment:
    """The augmentation of this project."""
    noise, rir = Bank.from_folder(folder / "noises", RATE), Bank.from_folder(folder / "rooms", RATE, rir=True)
    return Augment(RECIPE, noise, rir, num_samples=size.samples)


def load_crops(folder: Path) -> Crops:
    """What :func:`prepare` has written."""
    crops: Crops = torch.load(folder / "crops.pt", weights_only=False)
    return crops


def _dataset(folder: Path, size: Size) -> CropDataset:
    corpus = read_corpus(folder / "train_list.txt")
    return CropDataset(corpus, num_samples=size.samples, sample_rate=RATE, speeds=RECIPE.speeds)


def _checked(folder: Path, features: Callable[[Tensor], Tensor], update: Update) -> tuple[np.ndarray, str]:
    """The first step from given features, and how far those that are made are from them.

    Raises:
        ValueError: If that is more than rounding.
    """
    waveforms, wanted, labels = torch.load(folder / "check.pt")
    with torch.no_grad():
        errors = (features(waveforms) - wanted).abs()
    if not float(errors.mean()) <= _FEATURES_ERROR * float(wanted.std()):
        raise ValueError(f"features err by {float(errors.mean()):.1e} on average")
    return update.first(wanted, labels), f"largest error of features {float(errors.max()):.1e}"


def _plain_task(size: Size) -> Task:
    return Task(plain_network(size), PlainHead(size.classes))


def _features(name: Features, size: Size) -> Callable[[Tensor], Tensor]:
    """Waveforms (B, S) to features (B, T, M)."""
    if name == "kaldi-native-fbank, of a crop":
        return _by_kaldi
    fbank = baselines.BatchedTorchFbank(SPEC, torch.zeros(1, size.samples))

    def make(waveforms: Tensor) -> Tensor:
        fbank.waveforms = waveforms
        return torch.from_numpy(fbank().numpy())  # autograd refuses what inference mode made

    return make


def _by_kaldi(waveforms: Tensor) -> Tensor:
    make = baselines.kaldi_native_fbank(SPEC, waveforms, "list")
    if make is None:
        raise ImportError("kaldi-native-fbank is not installed")
    return torch.from_numpy(np.stack(make()))


def _optimizer(task: Task, implementation: str, rate: float = _RATE) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [
        {"params": [p for p in task.parameters() if p.ndim > 1], "weight_decay": _WEIGHT_DECAY},
        {"params": [p for p in task.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    options = {"foreach": implementation == "foreach", "fused": implementation == "fused"}
    return torch.optim.SGD(groups, lr=rate, momentum=_MOMENTUM, nesterov=True, **options)


def _fastest_optimizer(task: Task) -> str:
    for value in task.parameters():
        value.grad = torch.zeros_like(value)
    steps = {name: _optimizer(task, name, rate=0.0).step for name in ("fused", "foreach", "loop")}
    timings, _ = timing.interleaved(steps, repeats=5)
    task.zero_grad()
    return min(timings, key=lambda name: timings[name].median)
