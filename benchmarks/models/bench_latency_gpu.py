"""The latency of one waveform on a GPU, by each way without TensorRT: kernels in a graph, AOTInductor, torch.compile.

    python -m benchmarks.models.bench_latency_gpu [--out FILE] [--repeats N] [--device cpu]

``make gpu-check`` runs it too. It needs torch, triton and numpy, and a C++ compiler, from a checkout. The waveform is
made up and lies on the GPU, as does the embedding. ``--device cpu`` tries the plumbing at a tiny size.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import checkout, comparison, timing
from benchmarks.models.bench_ecapa_gpu import figures_of, turn
from benchmarks.peers import ecapa

PARTS = {"latency of a waveform, 512 channels": 512}
# What the export promises of half precision.
_LEAST_COSINE = 0.9995


def main() -> None:
    """Prints times and goals; with ``--out`` writes JSON too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20, help="rounds, each contender once a round")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("nothing measured: torch finds no CUDA device")
        return
    results = [measure(name, args.device, args.repeats) for name in PARTS]
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"device": args.device, "models": results}, indent=1) + "\n")


def measure(name: str, device_name: str, repeats: int = 20) -> dict[str, Any]:
    """Checks and times the ways, for the record; on a CPU at a tiny size."""
    checkout.map_kernels()
    from spkfast import SpeakerEncoder, functional, models
    from spkfast.export.parity import voice

    device = torch.device(device_name)
    channels, samples = (PARTS[name], 32000) if device.type == "cuda" else (16, 4000)
    repeats = repeats if device.type == "cuda" else 1
    # Eight, since one utterance has no statistics that weights could be fitted to.
    waveforms = torch.stack([torch.from_numpy(voice(k, samples, 16000)) for k in range(8)])
    spec = SpeakerEncoder(models.create("ecapa_tdnn", channels=16), "wespeaker").frontend
    weights = ecapa.random_weights(channels, functional.log_mel_fbank(waveforms, spec=spec)[0])
    waveform = waveforms[:1]

    def encoder(place: torch.device) -> SpeakerEncoder:
        net = models.create("ecapa_tdnn", channels=channels)
        net.load_state_dict(weights)
        return SpeakerEncoder(net, spec, device=place)

    exact = encoder(torch.device("cpu"))._forward([waveform[0].numpy()], "auto")
    calls: dict[str, Callable[[], Tensor]] = {}
    rows: dict[str, dict[str, Any]] = {}
    absent: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for way, make in _WAYS.items():
            try:
                call = torch.no_grad()(make(encoder(device), waveform.to(device), Path(folder, "model.pt2")))
                cosine = float(torch.cosine_similarity(call().float().cpu(), exact).min())
            except Exception as error:  # compilers and drivers raise what they like
                absent[way] = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            calls[way] = call
            rows[way] = {"cosine": cosine, "counts": cosine >= _LEAST_COSINE}
        clocks = {way: functools.partial(turn, call, device) for way, call in calls.items()}
        timings, spread = timing.in_turns(clocks, repeats=repeats)
    for way, time in timings.items():
        rows[way] |= time.to_dict() | {"utterances_per_s": 1 / time.median}
    result = {
        "case": name,
        "workload": f"1 waveform of {samples / spec.sample_rate:g} s, {channels} channels",
        "aa_spread": spread,
        "contenders": rows,
        "absent": absent,
    }
    return comparison.finish(result, figures_of(name, rows))


def _kernels(encoder: Any, waveform: Tensor, path: Path) -> Callable[[], Tensor]:
    from spkfast import functional, nn

    encoder.precision = "bf16"
    graphed = nn.CudaGraphs(encoder.model)
    return lambda: graphed(functional.log_mel_fbank(waveform, spec=encoder.frontend)[0])


def _package(encoder: Any, waveform: Tensor, path: Path) -> Callable[[], Tensor]:
    from spkfast.export.aotinductor import AotGraph, to_aotinductor

    to_aotinductor(encoder, path, precision="bf16", max_batch=4, max_seconds=5.0, validate=False)
    graph = AotGraph(path, device=waveform.device)
    lengths = torch.tensor([waveform.shape[1]], device=waveform.device)
    return lambda: graph({"waveform": waveform, "lengths": lengths})


def _compiled(encoder: Any, waveform: Tensor, path: Path) -> Callable[[], Tensor]:
    from spkfast.export.graph import EmbeddingGraph, plain_operators

    graph = EmbeddingGraph(encoder, precision="bf16", form="matmul").to(waveform.device)
    # What inductor makes of it on a CPU is measured elsewhere.
    how = {"backend": "eager"} if waveform.device.type == "cpu" else {"mode": "reduce-overhead"}
    compiled = torch.compile(graph, dynamic=False, **how)

    def call() -> Tensor:
        with plain_operators():
            return compiled(waveform)

    return call


_WAYS: dict[str, Callable[[Any, Tensor, Path], Callable[[], Tensor]]] = {
    "kernels, network in a graph": _kernels,
    "AOTInductor in a graph": _package,
    "torch.compile": _compiled,
}


if __name__ == "__main__":
    main()
