"""ECAPA-TDNN on a GPU beside plain torch: embeddings of large batches, the latency of one utterance, a training step.

    python -m benchmarks.models.bench_ecapa_gpu [--out FILE] [--repeats N] [--part NAME ...] [--device cpu]

``make gpu-check`` runs it too, each part in a process of its own. It needs torch, triton and numpy, from a checkout.
Features are random. ``--device cpu`` tries the plumbing at a tiny size.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import checkout, comparison, timing
from benchmarks.gpu_status import FIGURES
from benchmarks.models import bench_ecapa_inference, bench_ecapa_training
from benchmarks.peers import contenders, ecapa
from benchmarks.timing import Figure

_RATE, _CLASSES, _EMBEDDING = 1e-6, 64, 192
_ROWS = 64  # of a batch that are computed in float64, or that batch norm takes its statistics from, at a time

Call = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Part:
    """What is measured in one process.

    Attributes:
        kind: ``embeddings``, ``latency`` or ``training``.
        channels: Channels of stem and blocks.
        batch: Utterances.
        frames: Frames of each.
    """

    kind: str
    channels: int
    batch: int
    frames: int = 200


PARTS = {
    "embeddings, 512 channels": Part("embeddings", 512, 256),
    "embeddings, 1024 channels": Part("embeddings", 1024, 256),
    "latency, 512 channels": Part("latency", 512, 1),
    "training, 512 channels": Part("training", 512, 512),
}


@dataclasses.dataclass
class _Contenders:
    """Calls to time; what each that computes something errs by; why there is no call of others."""

    calls: dict[str, Call] = dataclasses.field(default_factory=dict)
    errors: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    absent: dict[str, str] = dataclasses.field(default_factory=dict)

    @contextlib.contextmanager
    def added(self, name: str) -> Iterator[None]:
        """Notes why a contender cannot be made."""
        try:
            yield
        except Exception as error:  # compilers and drivers raise what they like
            self.calls.pop(name, None)
            self.absent[name] = f"{type(error).__name__}: {error}".splitlines()[0]


def main() -> None:
    """Prints times and goals; with ``--out`` writes JSON too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20, help="rounds, each contender once a round")
    parser.add_argument("--part", choices=list(PARTS), nargs="+", default=list(PARTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("nothing measured: torch finds no CUDA device")
        return
    results = [measure(name, args.device, args.repeats) for name in args.part]
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"device": args.device, "models": results}, indent=1) + "\n")


def measure(name: str, device_name: str, repeats: int = 20) -> dict[str, Any]:
    """Checks and times the contenders of a part, for the record; on a CPU at a tiny size."""
    checkout.map_kernels()
    device, part = torch.device(device_name), PARTS[name]
    if device.type == "cpu":
        part, repeats = Part(part.kind, 16, min(part.batch, 4), 12), 1
    found = {"embeddings": _embeddings, "latency": _latency, "training": _training}[part.kind](part, device)
    clocks = {key: functools.partial(turn, call, device) for key, call in found.calls.items()}
    timings, spread = timing.in_turns(clocks, repeats=repeats)
    rows = {
        key: time.to_dict() | {"utterances_per_s": part.batch / time.median} | found.errors.get(key, {})
        for key, time in timings.items()
    }
    result = {
        "case": name,
        "workload": f"{part.batch} x {part.frames} frames, {part.channels} channels",
        "aa_spread": spread,
        "contenders": rows,
        "absent": found.absent,
    }
    return comparison.finish(result, figures_of(name, rows))


def figures_of(name: str, rows: Mapping[str, Mapping[str, Any]]) -> list[Figure]:
    """The figures of a part, of contenders whose errors are in bounds; one that lacks a peer is left out.

    A figure is the name of a ratio, ``peer / ours``, or ``what of whom``.
    """
    counted = {key: row for key, row in rows.items() if row.get("counts", True)}
    figures = []
    for figure, goal in FIGURES[name].items():
        peer, _, ours = figure.partition(" / ")
        if ours:
            if peer in counted:
                # A contender of this project that is absent or out of bounds misses its goals.
                time = counted[ours]["median_ms"] if ours in counted else float("inf")
                figures.append(Figure(figure, counted[peer]["median_ms"] / time, **goal))
            continue
        what, _, whom = figure.partition(" of ")
        if whom in counted:
            row = counted[whom]
            factors = {"milliseconds": 1.0, "microseconds": 1e3}
            kinds = {"utterances/s": "utterances_per_s", "percent loader wait": "loader_wait_percent"}
            value = factors[what] * row["median_ms"] if what in factors else row[kinds[what]]
            figures.append(Figure(figure, value, **goal))
    return figures


def turn(call: Call, device: torch.device) -> float:
    """Seconds of a call on a GPU by its own clock, from an idle GPU; after one that does not count."""
    if device.type == "cpu":
        return timing.seconds_per_call(call, 1)
    call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return 1e-3 * begin.elapsed_time(end)


def _embeddings(part: Part, device: torch.device) -> _Contenders:
    from spkfast import nn as layers

    features, weights, found = _prepare(part, device)
    exact = _exact(part, weights, features)
    for precision in ("bf16", "fp16", "fp32"):
        with found.added(f"spkfast {precision}"):
            net = layers.set_precision(_ours(part, weights, device).eval(), precision)
            _add_embedding(found, f"spkfast {precision}", precision, functools.partial(net, features), exact)
    _add_peers(found, part, weights, features, exact)
    return found


def _latency(part: Part, device: torch.device) -> _Contenders:
    from spkfast import nn as layers

    features, weights, found = _prepare(part, device)
    exact = _exact(part, weights, features)
    with found.added("spkfast bf16 in a graph"):
        net = layers.set_precision(_ours(part, weights, device).eval(), "bf16")
        graphed = layers.CudaGraphs(net)
        _add_embedding(found, "spkfast bf16 in a graph", "bf16", functools.partial(graphed, features), exact)
        _add_embedding(found, "spkfast bf16", "bf16", functools.partial(net, features), exact)
        for graph in graphed._graphs.values():  # what is left of a call without checks and copies
            found.calls["replay of the graph"] = graph.captured.replay
    _add_peers(found, part, weights, features, exact)
    return found


def _training(part: Part, device: torch.device) -> _Contenders:
    features, weights, found = _prepare(part, device)
    generator = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(_CLASSES, _EMBEDDING, generator=generator)).to(device)
    labels = torch.randint(_CLASSES, (part.batch,), generator=generator).to(device)
    exact_net = _plain(part, weights, device).double().train()
    loss = contenders.training_loss(exact_net(features.double()), directions, labels)
    exact = contenders.loss_and_gradients(exact_net, loss).cpu().numpy()
    del exact_net, loss

    def add(name: str, net: nn.Module, embed: Callable[[Tensor], Tensor]) -> None:
        net.train()

        def loss() -> Tensor:
            with torch.autocast(device.type, torch.bfloat16):
                embeddings = embed(features)
            return contenders.training_loss(embeddings, directions, labels)

        output = contenders.loss_and_gradients(net, loss()).cpu().numpy()
        found.errors[name] = bench_ecapa_training.assess(output, exact, "bf16", "")
        # Steps start from where the check did, which has moved the running statistics.
        net.zero_grad()
        net.load_state_dict(weights)
        optimizer = torch.optim.SGD(net.parameters(), lr=_RATE, momentum=0.9, fused=True)

        def step() -> None:
            loss().backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        found.calls[name] = step

    with found.added("spkfast bf16"):
        net = _ours(part, weights, device)
        add("spkfast bf16", net, net)
    with found.added("torch eager bf16"):
        net = _plain(part, weights, device)
        add("torch eager bf16", net, net)
    with found.added("torch.compile bf16"):
        net = _plain(part, weights, device)
        add("torch.compile bf16", net, _compiled(net, device))
    return found


def _prepare(part: Part, device: torch.device) -> tuple[Tensor, dict[str, Tensor], _Contenders]:
    """Features (B, T, 80) on the device, of utterances that differ, and weights that fit them."""
    generator = torch.Generator().manual_seed(1)
    rows = max(part.batch, 8)  # one utterance has no statistics
    features = torch.randn(rows, part.frames, 80, generator=generator) + 2 * torch.randn(
        rows, 1, 80, generator=generator
    )
    weights = ecapa.random_weights(part.channels, features[:_ROWS])
    return features[: part.batch].to(device), weights, _Contenders()


def _ours(part: Part, weights: Mapping[str, Tensor], device: torch.device) -> nn.Module:
    from spkfast import models

    net = models.create("ecapa_tdnn", channels=part.channels)
    net.load_state_dict(weights)
    return net.to(device)


def _plain(part: Part, weights: Mapping[str, Tensor], device: torch.device) -> nn.Module:
    net = ecapa.Ecapa(part.channels)
    net.load_state_dict(weights)
    return net.to(device)


def _compiled(net: nn.Module, device: torch.device) -> Callable[[Tensor], Tensor]:
    if device.type == "cpu":
        return torch.compile(net, backend="eager")  # what inductor makes of it is measured elsewhere
    return torch.compile(net, mode="max-autotune")


def _exact(part: Part, weights: Mapping[str, Tensor], features: Tensor) -> NDArray[np.float64]:
    """Embeddings of the plain network in float64."""
    net = _plain(part, weights, features.device).double().eval()
    with torch.no_grad():
        return torch.cat([net(rows.double()) for rows in features.split(_ROWS)]).cpu().numpy()


def _add_peers(
    found: _Contenders, part: Part, weights: Mapping[str, Tensor], features: Tensor, exact: NDArray[np.float64]
) -> None:
    """The plain network as its users run it."""
    for name, prepare in (("torch eager bf16", lambda net, _: net), ("torch.compile bf16", _compiled)):
        with found.added(name):
            embed = prepare(_plain(part, weights, features.device).eval(), features.device)
            _add_embedding(found, name, "bf16", functools.partial(_under_autocast, embed, features), exact)


def _under_autocast(embed: Callable[[Tensor], Tensor], features: Tensor) -> Tensor:
    with torch.autocast(features.device.type, torch.bfloat16):
        return embed(features)


def _add_embedding(
    found: _Contenders, name: str, precision: str, embed: Callable[[], Tensor], exact: NDArray[np.float64]
) -> None:
    call = torch.no_grad()(embed)
    got = call().float().cpu().numpy()
    # The bound of fp16 is that of the other half precision.
    bound = "bf16" if precision == "fp16" else precision
    found.errors[name] = bench_ecapa_inference.assess(got, exact, bound, "")
    found.calls[name] = call


if __name__ == "__main__":
    main()
