"""Exported graphs of ECAPA-TDNN from one waveform to its embedding, in onnxruntime and OpenVINO.

    python -m benchmarks.models.bench_export [--out FILE] [--repeats N] [--channels C ...] [--seconds S ...]

Speech is that of the folder SPKFAST_SPEECH, or of the synthetic corpus. OpenVINO is a contender where it is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

import spkfast
from benchmarks import comparison, timing
from benchmarks.accuracy import precisions
from benchmarks.machine import describe_machine
from benchmarks.peers import ecapa, exported
from benchmarks.peers.worker import Worker
from benchmarks.timing import Figure, Timing
from spkfast import FrontendSpec, SpeakerEncoder, functional, models
from spkfast.data.audio import read_audio
from spkfast.data.lists import read_train_list
from spkfast.data.synthetic import make_corpus
from spkfast.export.fbank import FbankGraph
from spkfast.export.onnx import to_onnx
from spkfast.export.parity import BOUNDS

_THREADS, _CALIBRATION, _CALIBRATION_SECONDS = 1, 64, 3
_RUNTIMES = ("onnxruntime", "openvino")
_LAYOUTS = ("padded", "equal")
_MOST = 1.3  # times the bare products of the front-end
_TURN_SECONDS = 10  # of audio
_PAIRS = 5  # rounds of graphs whose difference counts, for each round of all

_REMARK = (
    "One utterance through random weights, in a process of its own for each contender; a turn is one call that does "
    "not count and then as many as make ten seconds of audio. *spkfast* is `SpeakerEncoder.embed`; *padded* graphs "
    "take the lengths of rows, *equal* ones take none. What a graph of waveforms takes longer than that of features of "
    f"the same layout is the median over {_PAIRS} times as many rounds of single calls, of the difference within each, "
    "with its 95 % interval; *bare products* are those of its front-end alone, a strided convolution and a matrix "
    "product, of as many frames in the same runtime. Errors are against PyTorch's float32, relative to its norm; what "
    "leaves the bounds of its precision counts in no figure. OpenVINO has the fp32 hint for every graph."
)


@dataclasses.dataclass(frozen=True)
class _Entry:
    """How a contender is made, and what its output is to be: ``embedding``, ``feats``, or nothing that is known."""

    precision: str
    builder: str
    options: Mapping[str, Any]
    wanted: str = "embedding"


class _Features(nn.Module):
    """In place of a network: a graph of it is the front-end alone."""

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        return x


def main() -> None:
    """Prints times and goals; with ``--out`` writes JSON too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30, help="rounds, each contender once a round")
    parser.add_argument("--channels", type=int, nargs="+", default=[512])
    parser.add_argument("--seconds", type=int, nargs="+", default=[1, 3, 10], help="of the utterance")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()

    torch.set_num_threads(_THREADS)
    machine = describe_machine()
    spec = spkfast.frontend("wespeaker")
    speech = torch.from_numpy(read_speech(spec, args.seconds))
    results = []
    for channels in args.channels:
        with tempfile.TemporaryDirectory() as folder:
            encoder = prepare(Path(folder), channels, spec, speech)
            waveforms = (speech.flatten()[: seconds * spec.sample_rate] for seconds in args.seconds)
            results += [row(Path(folder), encoder, waveform, args.repeats) for waveform in waveforms]
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        record = {"op": "export", "machine": machine, "threads": _THREADS, "remark": _REMARK}
        args.out.write_text(json.dumps(record | {"results": results}, indent=1) + "\n")


def read_speech(spec: FrontendSpec, seconds: Sequence[int]) -> NDArray[np.float32]:
    """Speech one utterance after the other, float32 (N, S): ``N S`` samples are enough for calibration and timing."""
    samples = _CALIBRATION_SECONDS * spec.sample_rate
    rows = _CALIBRATION + math.ceil(max(seconds) / _CALIBRATION_SECONDS)
    pieces: list[NDArray[np.float32]] = []
    with contextlib.ExitStack() as stack:
        folder = Path(os.environ.get("SPKFAST_SPEECH", ""))
        if not (folder / "train_list.txt").is_file():
            folder = make_corpus(
                stack.enter_context(tempfile.TemporaryDirectory()) + "/corpus",
                num_speakers=40, test_speakers=4, utterances_per_speaker=4,
            )  # fmt: skip
        utterances = read_train_list(folder / "train_list.txt")
        random.Random(0).shuffle(utterances)  # a list is in the order of its corpora
        for utterance in itertools.cycle(utterances):
            waveform, rate = read_audio(folder / utterance.path)
            if rate != spec.sample_rate:
                raise SystemExit(f"{utterance.path} has {rate} Hz, {spec.sample_rate} are needed")
            pieces.append(waveform)
            if sum(map(len, pieces)) >= rows * samples:
                return np.concatenate(pieces)[: rows * samples].reshape(rows, samples)
    raise AssertionError


def prepare(folder: Path, channels: int, spec: FrontendSpec, speech: Tensor) -> SpeakerEncoder:
    """Writes the model and its graphs."""
    calibration = speech[-_CALIBRATION:]
    features, _ = functional.log_mel_fbank(calibration, spec=spec)
    net = models.create("ecapa_tdnn", channels=channels, feature_dim=spec.output_size)
    net.load_state_dict(ecapa.random_weights(channels, features))
    encoder = SpeakerEncoder(net, spec, device="cpu")
    encoder.calibrate(list(calibration.numpy()))
    encoder.save(folder / exported.MODEL)
    for layout in _LAYOUTS:
        for inputs in ("waveform", "features"):
            to_onnx(encoder, folder / f"{inputs}-fp32-{layout}.onnx", inputs=inputs, layout=layout, validate=False)
        front = SpeakerEncoder(_Features(), spec, device="cpu")
        to_onnx(front, folder / f"front-end-{layout}.onnx", layout=layout, validate=False)
    to_onnx(encoder, folder / "waveform-fp16-padded.onnx", precision="fp16", validate=False)
    # From audio, since runtimes on a CPU are faster where the ranges of outputs are known, too.
    audio = list(calibration.numpy())
    to_onnx(encoder, folder / "waveform-int8-padded.onnx", precision="int8", calibration=audio, validate=False)
    write_products(spec, folder / "products.onnx")
    return encoder


def write_products(spec: FrontendSpec, path: Path) -> None:
    """The two products of the front-end as a graph without anything else, for ``samples`` and ``power`` of any size."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    constants = dict(FbankGraph(spec).named_buffers())
    kernel, mel = constants["_dft"][:, None].numpy(), constants["_mel"].numpy()
    shapes = {
        "samples": (1, 1, "S"),
        "power": (1, mel.shape[1], "T"),
        "spectrum": (1, len(kernel), "frames"),
        "energies": (1, len(mel), "T"),
    }
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    nodes = [
        helper.make_node("Conv", ["samples", "kernel"], ["spectrum"], strides=[spec.frame_shift]),
        helper.make_node("MatMul", ["mel", "power"], ["energies"]),
    ]
    weights = [numpy_helper.from_array(kernel, "kernel"), numpy_helper.from_array(mel, "mel")]
    graph = helper.make_graph(nodes, "products", values[:2], values[2:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())


def row(folder: Path, encoder: SpeakerEncoder, waveform: Tensor, repeats: int) -> dict[str, Any]:
    """Times all contenders on one utterance, for the record."""
    wanted = write_inputs(folder, encoder, waveform)
    seconds = len(waveform) // encoder.frontend.sample_rate
    with contextlib.ExitStack() as stack:
        workers: dict[str, Worker] = {}
        absent: dict[str, str] = {}
        entries = dict(_entries())
        for contender, entry in entries.items():
            worker = stack.enter_context(start(folder, entry))
            if worker.absent:
                absent[contender] = worker.absent
            else:
                workers[contender] = worker
        calls = max(1, _TURN_SECONDS // seconds)
        clocks = {name: functools.partial(worker.seconds, calls) for name, worker in workers.items()}
        timings, spread = timing.in_turns(clocks, repeats=repeats)
        together = (name for names in _pairs().values() for name in names)
        once = {name: workers[name].seconds for name in together if name in workers}
        paired = timing.in_turns(once, repeats=_PAIRS * repeats)[0] if once else {}
        rows = {
            name: timings[name].to_dict()
            | assess(worker.output, wanted.get(entries[name].wanted), entries[name].precision, worker.note)
            for name, worker in workers.items()
        }
    channels = encoder.model.config["channels"]
    result = {
        "case": f"{channels} channels",
        "workload": f"1 x {seconds} s",
        "aa_spread": spread,
        "contenders": rows,
        "absent": absent,
    }
    return comparison.finish(result, figures_of(timings, paired, rows, channels))


def start(folder: Path, entry: _Entry) -> Worker:
    """A contender in a process of its own."""
    options = {"folder": folder, "threads": _THREADS, **entry.options}
    return Worker(f"benchmarks.peers.exported:{entry.builder}", options, threads=_THREADS)


def write_inputs(folder: Path, encoder: SpeakerEncoder, waveform: Tensor) -> dict[str, NDArray[np.float32]]:
    """Writes what graphs are called with; gives what they are to compute, ``embedding`` (1, E), ``feats`` (1, T, M)."""
    rows = waveform[None].contiguous()
    features, frames = functional.log_mel_fbank(rows, spec=encoder.frontend, backend="reference")
    with _modules(encoder), torch.inference_mode():
        embedding = encoder.model(features)
    mel = FbankGraph(encoder.frontend).get_buffer("_mel")
    power = torch.rand(1, mel.shape[1], features.shape[1], generator=torch.Generator().manual_seed(0))
    samples = torch.tensor([len(waveform)])
    np.savez(folder / "waveform.npz", waveform=rows, lengths=samples)
    np.savez(folder / "features.npz", feats=features, lengths=frames)
    np.savez(folder / "products.npz", samples=rows[:, None], power=power)
    return {"embedding": embedding.numpy(), "feats": features.numpy()}


def assess(
    got: NDArray[np.float32] | None, want: NDArray[np.float32] | None, precision: str, note: str
) -> dict[str, Any]:
    """Errors of an output beside PyTorch's, whether they keep the precision's bounds, and the note that says so."""
    if got is None or want is None:
        return {"note": note} if note else {}
    have, exact = (value.astype(np.float64).ravel() for value in (got, want))
    norm = np.linalg.norm(exact)
    error = float(np.linalg.norm(have - exact) / norm)
    cosine = float(have @ exact / (np.linalg.norm(have) * norm))
    kind, bound = BOUNDS[precision]
    # So written that NaN is out of bounds.
    counts = error <= bound if kind == "max_error" else cosine >= bound
    notes = [*([note] if note else []), *([] if counts else ["error out of bounds"])]
    return {"relative_error": error, "cosine": cosine, "counts": counts, "note": "; ".join(notes)}


def figures_of(
    timings: Mapping[str, Timing], paired: Mapping[str, Timing], rows: dict[str, dict[str, Any]], channels: int
) -> list[Figure]:
    """Front-ends beside their products, and ours beside the best graph; contenders out of bounds count in none.

    Args:
        timings: Of all contenders.
        paired: Of the rounds in which only graphs whose difference counts ran, and bare products.
        rows: Contenders for the record; the interval of a difference is added to the note of the graph of waveforms.
        channels: Of the network.
    """
    times = {name: timings[name].median for name, row in rows.items() if row.get("counts", True)}
    figures = []
    for (runtime, layout), (whole, inner, bare) in _pairs().items():
        front = f"{runtime} front-end, {layout}"
        if {whole, inner, bare} <= times.keys():
            low, middle, high = median_interval(np.subtract(paired[whole].seconds, paired[inner].seconds))
            said = f"{1e3 * middle:.2f} ms ({1e3 * low:.2f} to {1e3 * high:.2f}) more than the graph of features"
            rows[whole]["note"] = "; ".join(filter(None, (rows[whole].get("note"), said)))
            name = f"{runtime}, {layout}: graph of waveforms - features, over bare products"
            figures.append(Figure(name, middle / paired[bare].median, at_most=_MOST))
        if {front, bare} <= times.keys():
            name = f"{runtime}, {layout}: graph of the front-end alone, over bare products"
            figures.append(Figure(name, times[front] / times[bare]))
    goals = {"fp32": ("fp32", 1.1 if channels == 512 else 1.0), "bf16": ("fp16", None), "int8": ("int8", 1.3)}
    for precision, (theirs, at_least) in goals.items():
        peers = [
            times[name]
            for r, layout in itertools.product(_RUNTIMES, _LAYOUTS)
            if (name := f"{r} {theirs}, {layout}") in times
        ]
        if peers:
            # A contender of this project that is out of bounds misses its goals.
            ratio = min(peers) / times.get(f"spkfast {precision}", math.inf)
            figures.append(Figure(f"best {theirs} graph / spkfast {precision}", ratio, at_least))
    return figures


def median_interval(values: NDArray[np.float64]) -> tuple[float, float, float]:
    """The median between the ends of its 95 % interval, NaN where there are too few values for one."""
    interval = stats.quantile_test(values, q=0, p=0.5).confidence_interval(0.95)
    return float(interval.low), float(np.median(values)), float(interval.high)


@contextlib.contextmanager
def _modules(encoder: SpeakerEncoder) -> Iterator[None]:
    """While it lasts the network runs its modules in place of its kernels."""
    handle = precisions.ways()["modules"](encoder)
    try:
        yield
    finally:
        handle.remove()


def _pairs() -> dict[tuple[str, str], tuple[str, str, str]]:
    """Graph of waveforms, graph of features and bare products, by runtime and layout."""
    return {
        (runtime, layout): (
            f"{runtime} fp32, {layout}", f"{runtime} fp32, {layout}, features", f"{runtime} bare products"
        )
        for runtime, layout in itertools.product(_RUNTIMES, _LAYOUTS)
    }  # fmt: skip


def _entries() -> Iterator[tuple[str, _Entry]]:
    for precision in ("fp32", "bf16", "int8"):
        yield f"spkfast {precision}", _Entry(precision, "native", {"precision": precision})
    for runtime in _RUNTIMES:
        for layout in _LAYOUTS:
            for inputs in ("waveform", "features"):
                name = f"{runtime} fp32, {layout}" + (", features" if inputs == "features" else "")
                yield name, _Entry("fp32", runtime, {"graph": f"{inputs}-fp32-{layout}.onnx", "inputs": inputs})
            front = {"graph": f"front-end-{layout}.onnx", "inputs": "waveform"}
            yield f"{runtime} front-end, {layout}", _Entry("fp32", runtime, front, "feats")
        for precision in ("fp16", "int8"):
            graph = {"graph": f"waveform-{precision}-padded.onnx", "inputs": "waveform"}
            yield f"{runtime} {precision}, padded", _Entry(precision, runtime, graph)
        bare = {"graph": "products.onnx", "inputs": "products"}
        yield f"{runtime} bare products", _Entry("fp32", runtime, bare, "")


if __name__ == "__main__":
    main()
