"""Speed of log_mel_fbank on the CPU beside its peers: ``python -m benchmarks.ops.bench_log_mel_fbank --out FILE``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import spkfast
from benchmarks import baselines, shapes, timing
from benchmarks.machine import describe_machine
from benchmarks.timing import Figure
from spkfast import FrontendSpec, functional
from spkfast.memory import keep_freed_memory

# Both on average: the largest error is that of one bin in which the signal cancels, whoever computes it.
_OURS = 4.0  # times the error of the float32 definition
_PEERS = 1e-4  # of the standard deviation of the features: one wrong frame in a thousand is more
_CHECKED_ROWS = 4
_SHORT_CALLS, _STREAM_CALLS = 10, 50  # in a row, for what takes less than milliseconds

Call = Callable[[], Any]


def main() -> None:
    """Prints times and goals; with ``--out`` writes JSON too."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=10, help="rounds, each contender once a round")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()

    keep_freed_memory()
    torch.set_num_threads(1)
    machine = describe_machine()
    results = []
    for preset in shapes.PRESETS:
        results.append(_print(_offline(preset, shapes.BULK, args.repeats)))
    results.append(_print(_offline("wespeaker", shapes.UTTERANCE, args.repeats)))
    results.append(_print(_streaming(args.repeats)))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        record = {"op": "log_mel_fbank", "machine": machine, "threads": 1, "results": results}
        args.out.write_text(json.dumps(record, indent=1) + "\n")


def _offline(preset: str, workload: shapes.Waveforms, repeats: int) -> dict[str, Any]:
    spec = spkfast.frontend(preset)
    waveforms, _ = workload.inputs()
    rows = waveforms[:_CHECKED_ROWS]
    full, bulk = preset == "wespeaker", workload == shapes.BULK
    threads = 2 if full and bulk and len(os.sched_getaffinity(0)) > 1 else 1
    errors = _errors(spec, rows, _contenders(spec, rows, full=full, threads=threads))
    contenders = _contenders(spec, waveforms, full=full, threads=threads)
    timings, spread = timing.interleaved(contenders, repeats=repeats, calls=1 if bulk else _SHORT_CALLS)

    seconds = {name: value.median for name, value in timings.items()}
    torch_peer = min(value for name, value in seconds.items() if name.startswith("batched torch"))
    figures = [Figure("batched torch / native", torch_peer / seconds["native"], (4 if full else 3) if bulk else None)]
    if "kaldi-native-fbank, list" in seconds:
        peer = min(seconds["kaldi-native-fbank, list"], seconds["kaldi-native-fbank, numpy"])
        figures.append(Figure("kaldi-native-fbank / native", peer / seconds["native"], 15 if bulk else None))
    if "native, 2 threads" in seconds:
        gain = seconds["native"] / seconds["native, 2 threads"]
        figures.append(Figure("native, 1 thread / 2 threads", gain, 1.8))
    frames = workload.batch * int(functional.log_mel_fbank(waveforms[:1], spec=spec)[1])
    if full and bulk:
        figures.append(Figure("native, us per frame", 1e6 * seconds["native"] / frames, at_most=0.3))
    return _result(preset, workload, spread, timings, errors, figures, frames)


def _contenders(spec: FrontendSpec, waveforms: Tensor, *, full: bool, threads: int) -> dict[str, Call]:
    contenders: dict[str, Call] = {
        "native": lambda: _ours(spec, waveforms, "native"),
        "batched torch": baselines.BatchedTorchFbank(spec, waveforms),
    }
    if not full:
        return contenders
    if threads == 2:
        contenders["native, 2 threads"] = lambda: _on_two_threads(lambda: _ours(spec, waveforms, "native"))
    contenders["batched torch, whole mel matrix"] = baselines.BatchedTorchFbank(spec, waveforms, banded=False)
    contenders["reference"] = lambda: _ours(spec, waveforms, "reference")
    listed = baselines.kaldi_native_fbank(spec, waveforms, "list")
    array = baselines.kaldi_native_fbank(spec, waveforms, "numpy")
    if listed and array:
        contenders |= {"kaldi-native-fbank, list": listed, "kaldi-native-fbank, numpy": array}
    return contenders


def _streaming(repeats: int) -> dict[str, Any]:
    spec = spkfast.frontend("wespeaker", mean_norm=False)
    waveforms, _ = shapes.SECOND.inputs()
    samples = waveforms[0].numpy()
    step = spec.sample_rate // 100

    def pushes(pieces: list[NDArray[np.float32]]) -> Call:
        stream = spkfast.StreamingFbank(spec)
        return lambda: [stream.push(piece) for piece in pieces]

    pieces = [samples[k : k + step].copy() for k in range(0, len(samples), step)]

    def contenders() -> dict[str, Call]:
        out: dict[str, Call] = {
            "native, offline": lambda: _ours(spec, waveforms, "native"),
            "native, a push of 1 s": pushes([samples]),
            "native, 100 pushes of 10 ms": pushes(pieces),
        }
        scaled = (waveforms[0] * spec.sample_scale).tolist()
        second = baselines.kaldi_native_fbank_stream(spec, [scaled])
        parts = [scaled[k : k + step] for k in range(0, len(scaled), step)]
        hundredths = baselines.kaldi_native_fbank_stream(spec, parts)
        if second and hundredths:
            out |= {"kaldi-native-fbank, 1 s": second, "kaldi-native-fbank, 100 x 10 ms": hundredths}
        return out

    # A stream goes on from call to call: only its first call has the frames of the offline second.
    errors = _errors(spec, waveforms, contenders())
    timings, spread = timing.interleaved(contenders(), repeats=repeats, calls=_STREAM_CALLS)
    seconds = {name: value.median for name, value in timings.items()}
    offline, push = seconds["native, offline"], seconds["native, a push of 1 s"]
    figures = [Figure("100 pushes of 10 ms / offline", seconds["native, 100 pushes of 10 ms"] / offline, at_most=2)]
    if "kaldi-native-fbank, 1 s" in seconds:
        figures.append(Figure("kaldi-native-fbank / a push of 1 s", seconds["kaldi-native-fbank, 1 s"] / push, 8))
    frames = shapes.SECOND.batch * 100
    return _result("wespeaker, mean_norm off", shapes.SECOND, spread, timings, errors, figures, frames)


@torch.inference_mode()
def _ours(spec: FrontendSpec, waveforms: Tensor, backend: spkfast.backends.Backend) -> Tensor:
    return functional.log_mel_fbank(waveforms, spec=spec, backend=backend)[0]


def _on_two_threads(call: Call) -> Any:
    torch.set_num_threads(2)
    try:
        return call()
    finally:
        torch.set_num_threads(1)


def _errors(spec: FrontendSpec, waveforms: Tensor, contenders: Mapping[str, Call]) -> dict[str, float]:
    """The largest error of each against the float64 definition; ends the program where one is wrong."""
    exact = _ours(spec, waveforms.double(), "reference").numpy()
    definition = float(np.abs(_ours(spec, waveforms, "reference").numpy() - exact).mean())
    largest = {}
    for name, call in contenders.items():
        result = call()
        values = np.concatenate(result) if isinstance(result, list) else result.numpy()
        errors = np.abs(values.reshape(exact.shape) - exact)
        allowed = _OURS * definition if name.startswith("native") else _PEERS * float(exact.std())
        if not errors.mean() <= allowed:
            raise SystemExit(f"not timed: {name} errs by {errors.mean():.1e} on average, more than {allowed:.1e}")
        largest[name] = float(errors.max())
    return largest


def _result(
    preset: str,
    workload: shapes.Waveforms,
    spread: float,
    timings: Mapping[str, timing.Timing],
    errors: Mapping[str, float],
    figures: list[Figure],
    frames: int,
) -> dict[str, Any]:
    contenders = {
        name: {
            **time.to_dict(),
            "us_per_frame": 1e6 * time.median / frames,
            "x_real_time": workload.batch * workload.seconds / time.median,
            "max_error": errors[name],
        }
        for name, time in timings.items()
    }
    return {
        "frontend": preset,
        "workload": str(workload),
        "aa_spread": spread,
        "contenders": contenders,
        "figures": [dataclasses.asdict(figure) for figure in figures],
    }


def _print(result: dict[str, Any]) -> dict[str, Any]:
    noisy = "  NOISY: repeat on an idle machine" if result["aa_spread"] > timing.NOISY else ""
    print(f"{result['frontend']}, {result['workload']}, A/A spread {100 * result['aa_spread']:.1f} %{noisy}")
    for name, row in result["contenders"].items():
        print(
            f"  {name:32} {row['median_ms']:9.3f} ms ({row['min_ms']:.3f} to {row['max_ms']:.3f}), "
            f"{row['us_per_frame']:7.3f} us a frame, {row['x_real_time']:8.0f} x real time, "
            f"largest error {row['max_error']:.1e}"
        )
    for fields in result["figures"]:
        figure = Figure(**fields)
        print(f"  {figure.name}: {figure.value:.2f} {f'({figure.goal}: {figure.verdict})' if figure.goal else ''}")
    return result


if __name__ == "__main__":
    main()
