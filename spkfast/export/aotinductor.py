"""AOTInductor packages of speaker networks: compiled code that needs libtorch alone, a low-latency path on GPUs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import platform
import shutil
import sys
import threading
import time
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as fx_config

from spkfast.errors import BatchSizeError, InputError, check_name
from spkfast.export.graph import INPUTS, EmbeddingGraph, Inputs, plain_operators
from spkfast.export.onnx import metadata_of
from spkfast.export.parity import exact_encoder, voice, within_bounds
from spkfast.export.tensorrt_plan import units
from spkfast.frontends import FrontendSpec
from spkfast.inference import SpeakerEncoder, _device
from spkfast.nn.cuda_graphs import _Gpu
from spkfast.reference import Precision

Layout = Literal["padded", "equal"]
LAYOUTS = ("padded", "equal")
# Sets of instructions of x86, each with those before it, as torch names them.
_LEVELS = ("DEFAULT", "AVX2", "AVX512")
_OURS = ("spkfast_version", "inputs", "layout", "precision", "min_size", "max_size", "max_batch", "torch_version")
# The type of float32 products is one of the whole process.
_TURN = threading.Lock()


@dataclasses.dataclass(frozen=True)
class AotReport:
    """What :func:`to_aotinductor` wrote.

    Attributes:
        path: The package.
        device: What it runs on.
        inputs: Names of the inputs, in their order.
        metadata: What the package says of itself.
        compile_seconds: Time that export and compilation took.
        checked: Batches that the package ran beside the encoder: samples (frames) of each row.
        max_error: Largest ``|package - encoder| / |encoder|`` of an embedding, the encoder at float32 on the CPU; None
            where none was asked for.
        min_cosine: Smallest cosine of the two.
    """

    path: Path
    device: torch.device
    inputs: tuple[str, ...]
    metadata: dict[str, str]
    compile_seconds: float
    checked: tuple[tuple[int, ...], ...]
    max_error: float | None
    min_cosine: float | None

    @property
    def within_bounds(self) -> bool | None:
        """Whether the error is as small as the precision promises (``BOUNDS``); None where it is not known."""
        return within_bounds(self.metadata["precision"], self.max_error, self.min_cosine)


def to_aotinductor(
    encoder: SpeakerEncoder,
    path: str | os.PathLike[str],
    *,
    inputs: Inputs = "waveform",
    precision: Precision = "fp32",
    layout: Layout = "padded",
    device: str | torch.device | None = None,
    max_batch: int = 64,
    max_seconds: float = 20.0,
    settings: Mapping[str, Any] | None = None,
    validate: bool = True,
) -> AotReport:
    """Compiles network and front-end into a package for one kind of device, which Python and C++ load.

    The package takes ``waveform``, float32 (B, S) in [-1, 1], or ``feats`` (B, T, M), then ``lengths``, int64 (B,) in
    samples or frames, where the layout is ``padded``; and gives embeddings, float32 (B, E), not normalised. B and S are
    free up to the limits; S is at least one frame. A row of a padded batch gives what it gives alone. Inside are
    operators of torch alone: neither this library nor Python is needed to run it.

    Args:
        encoder: Network and front-end.
        path: File to write, ``.pt2``, whole or not at all.
        inputs: ``waveform`` or ``features``.
        precision: ``fp32``, ``fp16``, ``bf16``, see :class:`EmbeddingGraph`.
        layout: ``padded`` rows with their ``lengths``, or rows of ``equal`` length without that input.
        device: What to compile for; it must be there. None for that of the encoder.
        max_batch: Most rows.
        max_seconds: Longest row.
        settings: Of inductor, such as ``{"max_autotune": True}``.
        validate: Run the package beside the encoder on a few batches, for the report.

    Returns:
        The report.

    Raises:
        InputError: If an argument is another, the path cannot be written, or the device or a C++ compiler is missing.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    check_name("layout", layout, list(LAYOUTS))
    if hasattr(encoder.model, "takes_waveforms"):
        raise InputError("the encoder has no weights to export: it is an exported graph itself")
    file = Path(path)
    if file.suffix != ".pt2":
        raise InputError(f"{file}: a package is named .pt2, got {file.suffix or 'no suffix'!r}")
    if file.is_dir() or not file.parent.is_dir():
        raise InputError(f"{file}: is a folder, or in none that is there; name a file")
    if type(max_batch) is not int or max_batch < 1:
        raise InputError(f"max_batch must be a positive integer, got {max_batch!r}")
    place = _place(encoder.device if device is None else device)
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise InputError("the compilation needs a C++ compiler: install g++, or name one in CXX") from error
    # On GPUs no convolution, since cuDNN's would use TF32 in any program that does not forbid it.
    form: Literal["conv", "matmul"] = "matmul" if place.type == "cuda" else "conv"
    graph = EmbeddingGraph(encoder, inputs=inputs, precision=precision, form=form).to(place)
    spec = encoder.frontend
    step = 1 if graph.frontend is None else spec.frame_shift
    samples = int(max_seconds * spec.sample_rate) if math.isfinite(max_seconds) else 0
    if samples < max(spec.frame_length, graph.min_size):
        raise InputError(f"max_seconds must be at least that of a frame, and finite, got {max_seconds!r}")
    facts = metadata_of(encoder, graph, precision, layout, "", "unknown")
    most = units(facts, samples)
    metadata = facts | {
        "min_size": str(graph.min_size),
        "max_size": str(most),
        "max_batch": str(max_batch),
        "torch_version": torch.__version__,
    }
    fresh = file.with_name(f".{file.name}.new-{os.getpid()}")
    try:
        fresh.mkdir()
        started = time.monotonic()
        program = _exported(graph, place, layout, (max_batch, most), step, spec.output_size)
        with _float32_products():
            torch._inductor.aoti_compile_and_package(
                program,
                package_path=str(fresh / file.name),
                inductor_configs={**(settings or {}), "aot_inductor.metadata": dict(metadata)},
            )
        seconds = time.monotonic() - started
        os.replace(fresh / file.name, file)
    except OSError as error:
        raise InputError(f"{file}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    checked: tuple[tuple[int, ...], ...] = ()
    largest = cosine = None
    runner = AotGraph(file, device=place)
    if validate:
        checked, largest, cosine = _compared(encoder, runner, max_batch, samples)
    return AotReport(file, runner.device, runner.inputs, runner.metadata, seconds, checked, largest, cosine)


class AotGraph:
    """A package that is called with tensors.

    On a GPU a batch is padded to the next power of two of rows and, where the package takes lengths, the next multiple
    of ``step_seconds``, and the CUDA graph of that size replayed; the first batch of a size captures it. No result
    changes by that. On a CPU batches run as they are. Several threads and streams may call; calls of all packages of a
    process follow one another.

    A package is a program: to load it runs what its author compiled. What stands in its metadata is checked before.

    Args:
        path: File written by :func:`to_aotinductor`.
        device: Where to run, of the kind that it was compiled for; None for that kind, of GPUs the current one.
        max_graphs: Most CUDA graphs; the least recently used one goes first. They share the memory of what lies between
            input and output.
        step_seconds: What lengths are padded to a multiple of.
        cuda_graphs: Whether to capture; without it every batch runs as it is.

    Attributes:
        metadata: What the package says of itself.
        inputs: Names of the inputs, in their order.
        device: Where it runs.
        max_batch: Most rows of a batch.
        max_samples: Samples of the longest row; None where the package takes features.

    Raises:
        InputError: If the file is no such package or damaged, or was compiled for another device, machine or torch.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        max_graphs: int = 16,
        step_seconds: float = 0.5,
        cuda_graphs: bool = True,
    ) -> None:
        if type(max_graphs) is not int or max_graphs < 1:
            raise InputError(f"max_graphs must be a positive integer, got {max_graphs!r}")
        if not step_seconds > 0:
            raise InputError(f"step_seconds must be positive, got {step_seconds!r}")
        self._path = Path(path)
        self.metadata = facts = read_metadata(self._path)
        kind = facts["AOTI_DEVICE_KEY"]
        if kind not in ("cpu", "cuda"):
            raise InputError(f"{path}: was compiled for {kind!r}, not for cpu or cuda: export it again")
        place = _place(kind if device is None else device)
        if place.type != kind:
            raise InputError(f"{path}: was compiled for {kind}, not {place.type}: export it for that device")
        if kind == "cuda":
            place = torch.device(kind, torch.cuda.current_device() if place.index is None else place.index)
        try:
            problem = _difference(facts, place)
            rows, least, most = (int(facts[key]) for key in ("max_batch", "min_size", "max_size"))
            if rows < 1 or not 1 <= least <= most:
                raise InputError(f"it takes 1 to {rows} rows of {least} to {most}")
            check_name("inputs", facts["inputs"], list(INPUTS))
            check_name("layout", facts["layout"], list(LAYOUTS))
            spec = FrontendSpec.from_dict(json.loads(facts["frontend"]))
        except (TypeError, ValueError) as error:
            raise InputError(f"{path}: damaged: {error}: export it again") from error
        if problem:
            raise InputError(f"{path}: {problem}: export it again here")
        self.device = place
        waveforms = facts["inputs"] == "waveform"
        self.max_batch, self.max_samples = rows, most if waveforms else None
        self.inputs = ("waveform" if waveforms else "feats", *(("lengths",) if facts["layout"] == "padded" else ()))
        self._bands = () if waveforms else (spec.output_size,)
        self._step = max(1, round(step_seconds * spec.sample_rate / (1 if waveforms else spec.frame_shift)))
        self._limits = rows, least, most
        self._max_graphs, self._cuda_graphs = max_graphs, cuda_graphs
        # Without the events by which it keeps threads apart, which no capture allows.
        try:
            self._model = torch._inductor.aoti_load_package(
                str(self._path), run_single_threaded=True, device_index=-1 if place.index is None else place.index
            )
        except RuntimeError as error:
            raise InputError(
                f"{path}: torch cannot load it: {' '.join(str(error).split())}: export it again"
            ) from error
        self._graphs: dict[tuple[int, ...], _Graph] = {}
        self._gpu = _Gpu()

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Embeddings (B, E), float32, on the device; on a GPU in the order of the caller's stream.

        Args:
            inputs: By name: ``waveform`` (B, S) or ``feats`` (B, T, M), float32, and ``lengths`` (B,), int64, where the
                package takes them, on any device.

        Raises:
            InputError: If names, types or shapes are others, or beyond the limits of the package.
        """
        signal = self._check(inputs)
        lengths = inputs.get("lengths")
        with torch.no_grad(), _float32_products():
            if self._cuda_graphs and self._gpu.captures_on(self.device):
                return self._replay(signal, lengths)
            return self._run(signal.to(self.device), None if lengths is None else lengths.to(self.device))

    def __len__(self) -> int:
        """How many CUDA graphs there are."""
        return len(self._graphs)

    def clear(self) -> None:
        """Drops all CUDA graphs."""
        with _TURN:
            self._gpu.finish()
            self._graphs = {}

    def _check(self, inputs: Mapping[str, Tensor]) -> Tensor:
        if set(inputs) != set(self.inputs):
            raise InputError(f"inputs must be {', '.join(self.inputs)}, got {', '.join(inputs) or 'none'}")
        name = self.inputs[0]
        signal, lengths = inputs[name], inputs.get("lengths")
        if signal.dtype != torch.float32 or signal.ndim < 2 or tuple(signal.shape[2:]) != self._bands:
            shape = ", ".join(["B", "T" if self._bands else "S", *map(str, self._bands)])
            raise InputError(f"{name} must be float32 ({shape}), got {signal.dtype} {tuple(signal.shape)}")
        rows, least, most = self._limits
        if not (1 <= signal.shape[0] <= rows and least <= signal.shape[1] <= most):
            raise BatchSizeError(
                f"{name} must have 1 to {rows} rows of {least} to {most}, got {tuple(signal.shape[:2])}: split the "
                "batch, or export with other limits"
            )
        if lengths is not None and (lengths.dtype != torch.int64 or lengths.shape != signal.shape[:1]):
            raise InputError(
                f"lengths must be int64 of shape (B,) = ({signal.shape[0]},), got {lengths.dtype} of shape "
                f"{tuple(lengths.shape)}"
            )
        return signal

    def _run(self, signal: Tensor, lengths: Tensor | None) -> Tensor:
        tensors = [signal.contiguous()] if lengths is None else [signal.contiguous(), lengths.contiguous()]
        return self._model.loader.run(tensors)[0]

    def _replay(self, signal: Tensor, lengths: Tensor | None) -> Tensor:
        batch, size = signal.shape[:2]
        rows, _, most = self._limits
        padded = size if lengths is None else min(-(-size // self._step) * self._step, most)
        bucket = (min(1 << (batch - 1).bit_length(), rows), padded, *signal.shape[2:])
        graph = self._graphs.pop(bucket, None)
        if graph is None:
            if len(self._graphs) == self._max_graphs:
                self._gpu.finish()
                del self._graphs[next(iter(self._graphs))]
            graph = self._capture(bucket, lengths is not None)
        self._graphs[bucket] = graph  # the last one used
        with self._gpu.in_order(self.device):
            # Spare rows and samples keep what was there: no row sees another one, and none what lies beyond its length.
            graph.signal[:batch, :size].copy_(signal)
            if graph.lengths is not None and lengths is not None:
                # A length above S would reach into spare samples.
                graph.lengths[:batch].copy_(lengths.clamp(0, size))
            graph.captured.replay()
            return graph.output[:batch].clone()

    def _capture(self, bucket: tuple[int, ...], ragged: bool) -> _Graph:
        beside = next((graph.captured for graph in self._graphs.values()), None)
        # What inference mode makes cannot be written outside of it.
        with torch.inference_mode(False), torch.no_grad():
            signal = torch.zeros(bucket, device=self.device)
            lengths = None
            if ragged:
                lengths = torch.full(bucket[:1], self._limits[1], dtype=torch.int64, device=self.device)
            captured, output = self._gpu.capture(cast(nn.Module, self._run), (signal, lengths), beside)
        return _Graph(signal, lengths, output, captured)


class _Graph(NamedTuple):
    """A CUDA graph with the tensors that it reads and writes."""

    signal: Tensor
    lengths: Tensor | None
    output: Tensor
    captured: Any


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """What a package says of itself, read without running anything of it.

    Raises:
        InputError: If the file is no package of :func:`to_aotinductor`, or damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("_metadata.json"))
            facts = json.loads(archive.read(name))
            broken = archive.testzip()  # torch does not look at checksums
    except (OSError, zipfile.BadZipFile, StopIteration, ValueError) as error:
        raise InputError(f"{path}: is no AOTInductor package: {error or 'it has no metadata'}") from error
    if broken is not None:
        raise InputError(f"{path}: damaged: {broken} has another checksum: export it again")
    if not isinstance(facts, dict) or not all(isinstance(value, str) for value in facts.values()):
        raise InputError(f"{path}: damaged: its metadata are no texts by name: export it again")
    missing = [key for key in (*_OURS, "frontend", "AOTI_DEVICE_KEY") if key not in facts]
    if missing:
        raise InputError(f"{path}: is no package of to_aotinductor: it has no {missing[0]!r}")
    return facts


def _difference(facts: Mapping[str, str], place: torch.device) -> str:
    """Why a package cannot run here; empty where it can."""
    here = {"AOTI_PLATFORM": sys.platform, "AOTI_MACHINE": platform.machine()}
    for key, value in here.items():
        if facts.get(key, value) != value:
            return f"was compiled for {facts[key]}, this is {value}"
    if _version(facts["torch_version"]) > _version(torch.__version__):
        return f"was compiled by torch {facts['torch_version']}, this is the older {torch.__version__}"
    built = facts.get("AOTI_CPU_ISA", "").split()[:1]
    level = torch.backends.cpu.get_cpu_capability()
    if built and {built[0], level} <= set(_LEVELS) and _LEVELS.index(built[0]) > _LEVELS.index(level):
        return f"was compiled for {built[0]}, this CPU has {level}"
    if place.type == "cuda":
        major, minor = torch.cuda.get_device_capability(place)
        compiled = int(facts.get("AOTI_COMPUTE_CAPABILITY") or 10 * major + minor)
        # Code of a GPU runs on those of the same generation that are not older.
        if compiled // 10 != major or compiled % 10 > minor:
            return f"was compiled for compute capability {compiled / 10}, this GPU has {major}.{minor}"
    return ""


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


def _place(device: str | torch.device) -> torch.device:
    place = _device(device, nn.Module())
    if place.type not in ("cpu", "cuda"):
        raise InputError(f"device must be cpu or cuda, got {place.type!r}")
    return place


@contextlib.contextmanager
def _float32_products() -> Iterator[None]:
    """fp32 means fp32: TF32 would ruin a front-end. One after the other, or one would restore what another one set."""
    matmul = torch.backends.cuda.matmul
    with _TURN:
        before = matmul.fp32_precision
        matmul.fp32_precision = "ieee"
        try:
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                yield
        finally:
            matmul.fp32_precision = before


def _exported(
    graph: EmbeddingGraph, place: torch.device, layout: str, most: tuple[int, int], step: int, bands: int
) -> torch.export.ExportedProgram:
    """The graph with free sizes up to ``most`` rows and samples (frames)."""
    # No batch of one, and no two sizes alike: the exporter would take them for constants.
    size = graph.min_size + 97 * step + 6
    rows = torch.tensor([size, size // 2 + 1, size // 3 + 1], device=place)
    shape = (len(rows), size) if graph.frontend is not None else (len(rows), size, bands)
    example: tuple[Tensor, ...] = (torch.randn(shape, device=place), rows)
    # Limits let a GPU count in 32 bits. No names, since the exporter cannot prove what it asks of named sizes, such as
    # that no number of frames but one divides one.
    batch = torch.export.Dim.DYNAMIC(min=1, max=max(most[0], len(rows)))
    free = torch.export.Dim.DYNAMIC(min=graph.min_size, max=max(most[1], size))
    axes: list[dict[int, Any]] = [{0: batch, 1: free}, {0: batch}]
    count = 2 if layout == "padded" else 1
    # Sizes of one are sizes like others.
    with plain_operators(), cast(Any, fx_config).patch(backed_size_oblivious=True):
        return torch.export.export(graph, example[:count], dynamic_shapes=tuple(axes[:count]), strict=False)


def _compared(
    encoder: SpeakerEncoder, graph: AotGraph, rows: int, longest: int
) -> tuple[tuple[tuple[int, ...], ...], float, float]:
    """Batches that were run, largest relative error and smallest cosine of an embedding; NaN where there is one."""
    exact = exact_encoder(encoder)
    spec = encoder.frontend
    waveforms = graph.inputs[0] == "waveform"
    least = int(graph.metadata["min_size"]) if waveforms else spec.frame_length
    # On both sides of what inductor asks of sizes: 16 rows, some thousand samples.
    sizes = [[least], [least + 2 * spec.frame_shift + 1, least], [5 * least, 3 * least, 7 * least]]
    sizes += [[min(longest, 2 * spec.sample_rate)], [3 * least + k for k in range(min(rows, 20))], [longest]]
    errors, cosines, checked = [], [], []
    for lengths in sizes:
        lengths = [max(least, min(length, longest)) for length in lengths[:rows]]
        if "lengths" not in graph.inputs:
            lengths = [min(lengths)] * len(lengths)
        voices: list[np.ndarray] = [voice(k, length, spec.sample_rate) for k, length in enumerate(lengths)]
        with torch.inference_mode():
            want = exact._forward(voices, "auto").double()
            signal, counts = exact._padded(voices) if waveforms else exact._features(voices, "auto")
            signal = signal[:, : counts.max()]  # not the frames that fill up a multiple
        have = graph(dict(zip(graph.inputs, (signal, counts), strict=False))).double().cpu()
        errors.append((have - want).norm(dim=1) / want.norm(dim=1))
        cosines.append(torch.cosine_similarity(have, want, dim=1))
        checked.append(tuple(counts.tolist()))
    # torch's extremes keep NaN, Python's may drop it.
    return tuple(checked), float(torch.cat(errors).max()), float(torch.cat(cosines).min())
