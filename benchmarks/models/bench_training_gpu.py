"""Training of ECAPA-TDNN on a GPU from files to changed weights: the loop of this project beside the usual pipeline.

    python -m benchmarks.models.bench_training_gpu [--out FILE] [--rounds N] [--device cpu]

``make gpu-check`` runs it too. It needs torch, triton, numpy, scipy, soundfile and accelerate, from a checkout. Speech,
noise and responses are random. ``--device cpu`` tries the plumbing at a tiny size.

The usual pipeline has a loader process on every core but one, which reads FLAC and augments crop by crop with scipy,
noises and responses being in memory; features of a batch by plain torch, plain eager modules under autocast to bf16 and
a fused SGD on the GPU; its numbers are read at every twentieth step. Both run one after the other, and times are of the
steps after the first ones: loader processes start, and kernels are tuned, in these.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler

from benchmarks import checkout, comparison
from benchmarks.models.bench_ecapa_gpu import figures_of
from benchmarks.timing import Timing

PARTS = {"training, from files": 512}
_RATE, _EMBEDDING = 16000, 192
_OURS, _USUAL = "spkfast", "usual way"


@dataclasses.dataclass(frozen=True)
class Size:
    """What is trained, and for how long.

    Attributes:
        batch: Crops of a step.
        seconds: Length of a crop.
        speakers: Each of which is a class at each of three speeds.
        channels: Of stem and blocks.
        window: Steps of which a time is taken.
        windows: How many, the first one aside.
    """

    batch: int
    seconds: float = 2.0
    speakers: int = 6000
    channels: int = 512
    window: int = 20
    windows: int = 3

    @property
    def steps(self) -> int:
        """Steps of a run."""
        return self.window * (1 + self.windows)


_TINY = Size(4, 0.5, 12, 16, 2, 1)


def main() -> None:
    """Prints times and goals; with ``--out`` writes JSON too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="runs of each contender")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("nothing measured: torch finds no CUDA device")
        return
    results = [measure(name, args.device, args.rounds) for name in PARTS]
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"device": args.device, "models": results}, indent=1) + "\n")


def measure(name: str, device_name: str, rounds: int = 2) -> dict[str, Any]:
    """Times both ways in turn, for the record; on a CPU at a tiny size."""
    checkout.map_kernels()
    size = Size(PARTS[name]) if device_name == "cuda" else _TINY
    seconds: dict[str, list[float]] = {_OURS: [], _USUAL: []}
    waits: list[float] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_corpus(folder, size)
        for number in range(rounds):
            entries = spkfast_run(folder, size, folder / f"run{number}")
            seconds[_OURS] += [size.batch / entry["crops_per_second"] for entry in entries]
            waits += [entry["loader_wait"] for entry in entries]
            seconds[_USUAL] += usual_run(folder, size, torch.device(device_name))
    rows = {key: Timing(tuple(values)).to_dict() for key, values in seconds.items()}
    for row in rows.values():
        row["utterances_per_s"] = 1e3 * size.batch / row["median_ms"]
    rows[_OURS]["loader_wait_percent"] = 100 * statistics.median(waits)
    runs = np.reshape(seconds[_OURS], (rounds, -1)).mean(1)
    result = {
        "case": name,
        "workload": f"{size.batch} crops of {size.seconds:g} s, {3 * size.speakers} classes, {size.channels} channels",
        "aa_spread": float(runs.max() / runs.min() - 1),
        "contenders": rows,
        "absent": {},
    }
    return comparison.finish(result, figures_of(name, rows))


def make_corpus(folder: Path, size: Size) -> None:
    """Writes a train list of one utterance a speaker, noises and responses, all FLAC."""
    import soundfile

    random = np.random.default_rng(0)

    def write(path: Path, seconds: float, envelope: float = 0.0) -> None:
        samples = random.standard_normal(round(seconds * _RATE)) * np.exp(-envelope * np.arange(round(seconds * _RATE)))
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, 0.1 * samples, _RATE, subtype="PCM_16")

    lines = []
    for speaker in range(size.speakers):
        path = folder / "speech" / f"{speaker // 1000}" / f"{speaker}.flac"
        write(path, 1.25 * size.seconds)
        lines.append(f"s{speaker} {path}\n")
    (folder / "train_list.txt").write_text("".join(lines))
    for number in range(30):
        write(folder / "noise" / f"{number}.flac", 4 * size.seconds)
        write(folder / "rir" / f"{number}.flac", 0.5, envelope=1e-3)


def spkfast_run(folder: Path, size: Size, out: Path) -> list[dict[str, Any]]:
    """Entries of the log of a training run of this project, the first one aside."""
    from spkfast.training.config import AugmentConfig, TrainConfig
    from spkfast.training.log import read_log
    from spkfast.training.loop import Trainer

    config = TrainConfig(out=str(out), steps=size.steps, batch_size=size.batch, log_steps=size.window, precision="bf16")
    config.model.options = {"channels": size.channels, "embedding_dim": _EMBEDDING}
    config.data = dataclasses.replace(
        config.data, train_list=str(folder / "train_list.txt"), crop_seconds=size.seconds, workers=_cores() // 2,
        noise=str(folder / "noise"), rir=str(folder / "rir"),
        augment=AugmentConfig("room_or_noise", {"speeds": [1.0, 0.9, 1.1]}),
    )  # fmt: skip
    for _ in Trainer(config).run():
        pass
    return read_log(out)[1:]


def usual_run(folder: Path, size: Size, device: torch.device) -> list[float]:
    """Seconds of a step in each window of the usual pipeline, the first one aside."""
    from benchmarks.peers import ecapa, heads

    torch.manual_seed(0)
    net = ecapa.Ecapa(size.channels).to(device).train()
    weight = torch.nn.Parameter(
        torch.nn.init.xavier_uniform_(torch.empty(3 * size.speakers, _EMBEDDING, device=device))
    )
    head = heads.Head(subcenters=1, topk=0, margin=0.2, scale=32.0)
    parameters = [*net.parameters(), weight]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4, fused=True)
    crops = _Crops(folder, size)
    # As of a large corpus: at the end of an epoch nothing is read ahead.
    sampler = RandomSampler(crops, replacement=True, num_samples=size.steps * size.batch)
    loader = DataLoader(
        crops, batch_size=size.batch, sampler=sampler, num_workers=max(1, _cores() - 1),
        pin_memory=device.type == "cuda",
    )  # fmt: skip
    seconds: list[float] = []
    since = 0.0
    for step, (waveforms, labels) in enumerate(loader, start=1):
        features = _features(waveforms.to(device, non_blocking=True))
        with torch.autocast(device.type, torch.bfloat16):
            embeddings = net(features)
        loss = heads.on_targets(embeddings.float(), weight, labels.to(device, non_blocking=True), head)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % size.window == 0:
            if not math.isfinite(float(loss.detach() + norm)):
                raise ValueError(f"the usual pipeline diverges at step {step}")
            now = time.perf_counter()
            if since:
                seconds.append((now - since) / size.window)
            since = now
    return seconds


def _features(waveforms: torch.Tensor) -> torch.Tensor:
    from spkfast import functional
    from spkfast.frontends import frontend

    with torch.no_grad():
        return functional.log_mel_fbank(waveforms, spec=frontend("wespeaker"), backend="reference")[0]


def _cores() -> int:
    return len(os.sched_getaffinity(0))


class _Crops(Dataset[tuple[np.ndarray, int]]):
    """Random crops, augmented one by one."""

    def __init__(self, folder: Path, size: Size) -> None:
        import soundfile

        from benchmarks.peers import augmentation as usual

        lines = [line.split() for line in (folder / "train_list.txt").read_text().splitlines()]
        self._paths = [Path(path) for _, path in lines]
        self._size = size
        self._noises = sorted((folder / "noise").glob("*.flac"))
        self._rooms = sorted((folder / "rir").glob("*.flac"))
        self._memory = {path: usual.read_room(path) for path in self._rooms}
        self._memory |= {path: soundfile.read(path, dtype="float32")[0] for path in self._noises}

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        from benchmarks.peers import augmentation as usual

        # The generator of torch is seeded anew in each loader process.
        random = np.random.default_rng(int(torch.randint(2**62, ())))
        samples = round(self._size.seconds * _RATE)
        which = int(random.integers(3))
        speed = (1.0, 0.9, 1.1)[which]
        count = math.ceil(samples * speed)
        start = int(random.integers(round(1.25 * samples) - count + 1))
        room, noises = None, []
        if random.random() < 0.6:
            if random.random() < 0.5:
                room = self._rooms[random.integers(len(self._rooms))]
            else:
                path = self._noises[random.integers(len(self._noises))]
                noises = [[usual.Added(path, int(random.integers(3 * samples)), float(random.uniform(0, 15)))]]
        item = usual.Item(self._paths[index], start, count, speed, room, noises, peak=False)
        made = usual.augment(usual.read(item), item, samples, 1e-4, self._memory)
        return made.astype(np.float32), index + which * len(self._paths)


if __name__ == "__main__":
    main()
