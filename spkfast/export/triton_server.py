"""Model repositories for Triton Inference Server: a waveform in, its embedding out, requests batched by the server."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from spkfast.errors import InputError, check_name
from spkfast.export.onnx import LAYOUTS, PRECISIONS, Layout, to_onnx
from spkfast.export.parity import model_hash
from spkfast.export.tensorrt_plan import Shapes, read_sidecar, sidecar_path
from spkfast.inference import SpeakerEncoder
from spkfast.reference import Precision

ServerBackend = Literal["onnxruntime", "tensorrt"]
ServerDevice = Literal["gpu", "cpu"]
BACKENDS = ("onnxruntime", "tensorrt")
DEVICES = ("gpu", "cpu")
_MODEL_FILES = {"onnxruntime": "model.onnx", "tensorrt": "model.plan"}
_CONFIG = "config.pbtxt"
# One of the facts about the model that every configuration written here holds.
_MARK = 'key: "spkfast_version"'
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class _Word(str):
    """A name of an enumeration, written without quotes."""


Fields = Sequence[tuple[str, Any]]


@dataclasses.dataclass(frozen=True)
class TritonConfig:
    """What a ``config.pbtxt`` says.

    Attributes:
        name: Of the model, which is its folder's name too.
        embedding_dim: Size of an embedding.
        backend: ``onnxruntime`` or ``tensorrt``.
        device: ``gpu`` or ``cpu``.
        layout: Of the batches that the model takes, see :func:`triton_repository`.
        max_batch_size: Most utterances of a batch.
        preferred_batch_sizes: Sizes at which a batch leaves at once; those above ``max_batch_size`` do not count.
        max_queue_delay_us: Microseconds that a request may wait for others.
        instances: Copies of the model, on each GPU or on the CPU.
        gpus: Which GPUs; none names all.
        threads: Of one instance on a CPU; 0 takes one per core.
        warmup: Batches that run before the first request: utterances, and samples of each.
        profiles: Profiles of a TensorRT engine that are used.
        engines: File of the engine for each compute capability, where there are several.
        metadata: Facts about the model, which a client can ask for.

    Raises:
        InputError: If a value is another, or out of range.
    """

    name: str
    embedding_dim: int
    backend: ServerBackend = "onnxruntime"
    device: ServerDevice = "gpu"
    layout: Layout = "ragged"
    max_batch_size: int = 64
    preferred_batch_sizes: tuple[int, ...] = (8, 16, 32)
    max_queue_delay_us: int = 2000
    instances: int = 1
    gpus: tuple[int, ...] = ()
    threads: int = 0
    warmup: tuple[tuple[int, int], ...] = ()
    profiles: tuple[int, ...] = ()
    engines: Mapping[str, str] = dataclasses.field(default_factory=dict)
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name("backend", self.backend, list(BACKENDS))
        check_name("device", self.device, list(DEVICES))
        check_name("layout", self.layout, list(LAYOUTS))
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise InputError(f"name must be of letters, digits and _ . -, and not begin with . or -, got {self.name!r}")
        for field, least in (("embedding_dim", 1), ("max_batch_size", 1), ("instances", 1), ("threads", 0)):
            _check_number(field, getattr(self, field), least)
        _check_number("max_queue_delay_us", self.max_queue_delay_us, 0)
        for size in self.preferred_batch_sizes:
            _check_number("a preferred batch size", size, 1)
        for gpu in self.gpus:
            _check_number("a GPU", gpu, 0)
        if self.device == "cpu" and (self.backend == "tensorrt" or self.gpus):
            what = "TensorRT has no" if self.backend == "tensorrt" else f"gpus {self.gpus} are for no"
            raise InputError(f"device 'cpu': {what} instance on a CPU: take device 'gpu'")


@dataclasses.dataclass(frozen=True)
class TritonReport:
    """What :func:`triton_repository` wrote.

    Attributes:
        folder: Of the model; the folder above is the repository that a server is started with.
        version: Of the model within.
        config: What ``config.pbtxt`` says.
        files: All of this version, and ``config.pbtxt``.
        max_error: Largest relative error of an embedding, as :class:`spkfast.export.OnnxReport` has it, found before a
            ragged graph gets its ``lengths``; None for a TensorRT engine, or where onnxruntime is not installed.
        min_cosine: Smallest cosine, likewise.
    """

    folder: Path
    version: int
    config: TritonConfig
    files: tuple[Path, ...]
    max_error: float | None
    min_cosine: float | None


def triton_repository(
    encoder: SpeakerEncoder,
    folder: str | os.PathLike[str],
    *,
    name: str = "speaker_embedding",
    backend: ServerBackend = "onnxruntime",
    device: ServerDevice = "gpu",
    precision: Precision | None = None,
    layout: Layout | None = None,
    max_batch_size: int = 64,
    max_queue_delay_us: int = 2000,
    preferred_batch_sizes: Sequence[int] = (8, 16, 32),
    instances: int = 1,
    gpus: Sequence[int] = (),
    threads: int = 0,
    warmup_seconds: Sequence[float] = (3.0,),
    engine: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    calibration: Sequence[Any] | None = None,
    replace: bool = False,
) -> TritonReport:
    """Writes a model into a repository of Triton Inference Server: ``folder/name/config.pbtxt`` and its version.

    A request has the input ``waveform``, float32 (B, S) in [-1, 1], B usually 1, and gets ``embedding``, float32
    (B, E). The server makes batches of requests: with the layout ``ragged`` of any lengths, each padded to the longest
    inside the graph; with ``padded`` (the request has ``lengths``, int64 (B, 1), too) and ``equal`` of one length.

    A model that is there gets the next version, and the server takes the newest; nothing changes on a failure.

    Args:
        encoder: Network and front-end.
        folder: The repository; made where it is missing.
        name: Of the model.
        backend: ``onnxruntime``, which gets an ONNX file made here, or ``tensorrt``, which gets ``engine``.
        device: ``gpu``; or ``cpu`` for onnxruntime.
        precision: See :func:`spkfast.export.to_onnx`; None for ``fp32``. Engines have theirs.
        layout: ``ragged``, ``padded`` or ``equal``, None for ``ragged``. Engines have theirs.
        max_batch_size: Most utterances of a batch.
        max_queue_delay_us: Microseconds that a request may wait for others.
        preferred_batch_sizes: Sizes at which a batch leaves at once; those above ``max_batch_size`` do not count.
        instances: Copies of the model, on each GPU or on the CPU.
        gpus: Which GPUs; none names all.
        threads: Of one instance on a CPU; 0 takes one per core.
        warmup_seconds: Lengths of audio that run, in batches of one and of the preferred sizes, before the first
            request; none for no warm-up.
        engine: For ``tensorrt`` an engine that :func:`spkfast.export.tensorrt.build_tensorrt` wrote, or several for
            GPUs of different compute capability.
        calibration: For ``int8``, see :func:`spkfast.export.to_onnx`.
        replace: Take out the versions that are there.

    Returns:
        The report.

    Raises:
        InputError: If an argument is another or does not fit the engine, the engine was made of another model, the
            model's folder holds something else, or it cannot be written.
    """
    settings: dict[str, Any] = {
        "name": name,
        "backend": backend,
        "device": device,
        "max_batch_size": max_batch_size,
        "preferred_batch_sizes": tuple(preferred_batch_sizes),
        "max_queue_delay_us": max_queue_delay_us,
        "instances": instances,
        "gpus": tuple(gpus),
        "threads": threads,
    }
    # Checked before the export, which takes time.
    config = TritonConfig(embedding_dim=1, layout=layout or "ragged", **settings)
    batches = (1, *(size for size in config.preferred_batch_sizes if 1 < size <= max_batch_size))
    settings["warmup"] = tuple((batch, _samples(encoder, s)) for s in warmup_seconds for batch in batches)
    if precision is not None:
        check_name("precision", precision, list(PRECISIONS))
    target = Path(folder) / name
    _check_target(target, replace)
    if (engine is None) != (backend == "onnxruntime"):
        raise InputError(f"engine must be given for backend 'tensorrt' and no other, got {engine!r} for {backend!r}")
    if engine is not None:
        if calibration is not None:
            raise InputError("calibration is for graphs made here, and an engine is given: calibrate when it is built")
        paths = [engine] if isinstance(engine, str | os.PathLike) else list(engine)
        config, files = _of_engines(encoder, [Path(path) for path in paths], settings, layout, precision)
        return _written(target, config, files, replace, None, None)
    if precision == "bf16" and device == "cpu":
        raise InputError("precision 'bf16': onnxruntime has no such convolutions on a CPU: take fp32 or int8")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / _MODEL_FILES["onnxruntime"]
        report = to_onnx(encoder, path, precision=precision or "fp32", layout=config.layout, calibration=calibration)
        size = next(iter(report.outputs.values()))[1][-1]
        config = TritonConfig(embedding_dim=int(size), layout=config.layout, metadata=report.metadata, **settings)
        return _written(target, config, {path.name: path}, replace, report.max_error, report.min_cosine)


def config_text(config: TritonConfig) -> str:
    """The text of ``config.pbtxt``, a message ``inference.ModelConfig`` in protobuf's text format."""
    return "".join(f"{line}\n" for line in _lines(_fields(config)))


def perf_analyzer_command(
    config: TritonConfig, *, seconds: float = 3.0, url: str = "localhost:8001", concurrency: tuple[int, int] = (1, 64)
) -> str:
    """Command line that measures a served model: throughput and latency over the number of requests at once.

    Args:
        config: Of the model.
        seconds: Length of the audio of a request.
        url: gRPC address of the server.
        concurrency: Least and most requests under way at once.
    """
    shapes = {"waveform": round(seconds * int(config.metadata["sample_rate"]))}
    shapes |= {"lengths": 1} if config.layout == "padded" else {}
    command = ["perf_analyzer", "-m", config.name, "-i", "grpc", "-u", url]
    command += [part for key, size in shapes.items() for part in ("--shape", f"{key}:{size}")]
    # Zeros cost what speech costs, and random lengths would be none.
    command += ["--input-data", "zero", "--percentile=95"]
    command += ["--concurrency-range", ":".join(map(str, (*concurrency, max(1, concurrency[1] // 8))))]
    return shlex.join(command)


def _fields(config: TritonConfig) -> Fields:
    gpu = config.device == "gpu"
    waveform: list[tuple[str, Any]] = [("name", "waveform"), ("data_type", _Word("TYPE_FP32")), ("dims", -1)]
    inputs: list[Fields] = [waveform]
    batch_inputs: list[Fields] = []
    if config.layout == "ragged":
        waveform.append(("allow_ragged_batch", True))
        # One length per row, where offsets would have one per request: of a request with two rows they make one
        # utterance, and the rows of the answer move on to the wrong requests.
        batch_inputs = [
            _batch_input("BATCH_ITEM_SHAPE_FLATTEN", "lengths", "TYPE_INT32"),
            _batch_input("BATCH_MAX_ELEMENT_COUNT_AS_SHAPE", "longest", "TYPE_FP32"),
        ]
    elif config.layout == "padded":
        # Requests have a second axis that the graph does not: Triton knows no inputs of the batch's axis alone.
        inputs.append([("name", "lengths"), ("data_type", _Word("TYPE_INT64")), ("dims", 1), ("reshape", [])])
    group: list[tuple[str, Any]] = [("count", config.instances), ("kind", _Word("KIND_GPU" if gpu else "KIND_CPU"))]
    group += [("gpus", index) for index in config.gpus] + [("profile", str(index)) for index in config.profiles]
    preferred = [size for size in config.preferred_batch_sizes if size <= config.max_batch_size]
    parameters, optimization = dict(config.metadata), []
    if config.backend == "onnxruntime" and gpu:
        # TF32 is on by default and ruins the front-end, which is float32 at any precision.
        cuda = [("name", "cuda"), ("parameters", [("key", "use_tf32"), ("value", "0")])]
        optimization = [("execution_accelerators", [("gpu_execution_accelerator", cuda)])]
        # By default each new shape of a batch has every algorithm timed. 1 is HEURISTIC; the backend's older place for
        # this option, since where there are parameters it overrides the newer one.
        parameters["cudnn_conv_algo_search"] = "1"
    elif config.backend == "onnxruntime":
        parameters["intra_op_thread_count"] = str(config.threads)
    return [
        ("name", config.name),
        ("backend", config.backend),
        ("max_batch_size", config.max_batch_size),
        *(("input", fields) for fields in inputs),
        ("output", [("name", "embedding"), ("data_type", _Word("TYPE_FP32")), ("dims", config.embedding_dim)]),
        *(("batch_input", fields) for fields in batch_inputs),
        ("version_policy", [("latest", [("num_versions", 1)])]),
        (
            "dynamic_batching",
            [
                *(("preferred_batch_size", size) for size in preferred),
                ("max_queue_delay_microseconds", config.max_queue_delay_us),
            ],
        ),
        ("instance_group", group),
        *(("optimization", optimization) for _ in optimization),
        *(("cc_model_filenames", [("key", key), ("value", file)]) for key, file in config.engines.items()),
        *(("parameters", [("key", k), ("value", [("string_value", text)])]) for k, text in parameters.items()),
        *(("model_warmup", _warmup(config, batch, samples)) for batch, samples in config.warmup),
    ]


def _batch_input(kind: str, target: str, data_type: str) -> Fields:
    return [
        ("kind", _Word(kind)),
        ("target_name", target),
        ("data_type", _Word(data_type)),
        ("source_input", "waveform"),
    ]


def _warmup(config: TritonConfig, batch: int, samples: int) -> Fields:
    """Zeros: Triton's random data are random bits, with infinities and lengths of any size."""
    inputs = {"waveform": ("TYPE_FP32", samples)}
    inputs |= {"lengths": ("TYPE_INT64", 1)} if config.layout == "padded" else {}
    values = {
        name: [("data_type", _Word(kind)), ("dims", size), ("zero_data", True)] for name, (kind, size) in inputs.items()
    }
    return [
        ("name", f"{batch} of {samples} samples"),
        ("batch_size", batch),
        *(("inputs", [("key", name), ("value", value)]) for name, value in values.items()),
    ]


def _lines(fields: Fields, indent: str = "") -> Iterator[str]:
    """Protobuf's text format of a message; repeated fields come repeatedly, and maps as their entries."""
    for key, value in fields:
        if isinstance(value, bool):
            yield f"{indent}{key}: {str(value).lower()}"
        elif isinstance(value, _Word | int):
            yield f"{indent}{key}: {value}"
        elif isinstance(value, str):
            yield f'{indent}{key}: "{_escaped(value)}"'
        else:
            yield f"{indent}{key} {{"
            yield from _lines(value, indent + "  ")
            yield f"{indent}}}"


def _escaped(text: str) -> str:
    """Printable ASCII as it is, all other bytes, quotes and backslashes as three octal digits."""
    return "".join(chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\{byte:03o}" for byte in text.encode())


def _of_engines(
    encoder: SpeakerEncoder,
    paths: list[Path],
    settings: Mapping[str, Any],
    layout: Layout | None,
    precision: Precision | None,
) -> tuple[TritonConfig, dict[str, Path]]:
    """Configuration of TensorRT engines, and their files by their names in the repository."""
    if not paths:
        raise InputError("engine must be a file or some, got none")
    hashes = {"model_hash": model_hash(encoder), "spec_hash": encoder.frontend.hash}
    wanted: dict[str, Any] = hashes | ({} if precision is None else {"precision": precision})
    configs: list[TritonConfig] = []
    engines: dict[str, str] = {}
    files: dict[str, Path] = {}
    for path in paths:
        facts = read_sidecar(path)
        metadata = facts["metadata"]
        for key, value in wanted.items():
            if metadata[key] != value:
                raise InputError(f"{path}: {key} is {metadata[key]}, the model's is {value}: build another engine")
        if hashlib.sha256(path.read_bytes()).hexdigest() != facts["engine_sha256"]:
            raise InputError(f"{path}: not the engine that {sidecar_path(path).name} describes: build it anew")
        inputs = tuple(tensor.name for tensor in facts["inputs"])
        layouts: dict[tuple[str, ...], Layout] = {("waveform",): "equal", ("waveform", "lengths"): "padded"}
        if inputs not in layouts:
            raise InputError(f"{path}: takes {', '.join(inputs)}: build an engine of a padded or equal waveform graph")
        found = layouts[inputs]
        if layout not in (None, found):
            raise InputError(f"{path}: its layout is {found!r}, got layout={layout!r}: leave it out")
        profiles = _profiles(path, facts["profiles"], settings["max_batch_size"], settings["warmup"])
        size = facts["outputs"][0].shape[-1]
        configs.append(TritonConfig(embedding_dim=size, layout=found, profiles=profiles, metadata=metadata, **settings))
        capability = facts["machine"].capability
        if capability in engines:
            raise InputError(f"{path}: the second engine for compute capability {capability}: give one of each")
        engines[capability] = _MODEL_FILES["tensorrt"] if len(paths) == 1 else f"sm{capability}.plan"
        files |= {engines[capability]: path, f"{engines[capability]}.json": sidecar_path(path)}
        if configs[-1] != configs[0]:
            raise InputError(f"{path}: differs from {paths[0]} in more than the GPU: build both from one file, alike")
    return dataclasses.replace(configs[0], engines=engines if len(paths) > 1 else {}), files


def _profiles(
    path: Path, profiles: Sequence[Shapes], max_batch_size: int, warmup: Sequence[tuple[int, int]]
) -> tuple[int, ...]:
    """Profiles that Triton can use: it refuses to load one that ends below ``max_batch_size``."""
    shapes = {index: bounds["waveform"] for index, bounds in enumerate(profiles)}
    usable = {index: bounds for index, bounds in shapes.items() if bounds[2][0] >= max_batch_size}
    if not any(least[0] == 1 for least, _, _ in usable.values()):
        raise InputError(
            f"{path}: no profile holds all batches from 1 to max_batch_size={max_batch_size}: build it with "
            f"Profile((1, {max(1, max_batch_size // 2)}, {max_batch_size}), ...)"
        )
    for size in warmup:
        if not any(a <= n <= b for least, _, most in usable.values() for n, a, b in [(size[1], least[1], most[1])]):
            raise InputError(f"{path}: warm-up of {size[1]} samples lies in no profile: choose other warmup_seconds")
    return tuple(usable)


def _samples(encoder: SpeakerEncoder, seconds: float) -> int:
    spec = encoder.frontend
    samples = round(seconds * spec.sample_rate) if math.isfinite(seconds) else 0
    if samples < spec.frame_length:
        least = spec.frame_length / spec.sample_rate
        raise InputError(f"warmup_seconds must be at least {least}, one frame, and finite, got {seconds}")
    return samples


def _check_number(what: str, value: Any, least: int) -> None:
    if type(value) is not int or value < least:
        raise InputError(f"{what} must be an integer, {least} at least, got {value!r}")


def _check_target(target: Path, replace: bool) -> None:
    """Refuses what this module did not write, and to take out what it did not."""
    if not target.exists() and not target.is_symlink():
        return
    config = target / _CONFIG
    if target.is_symlink() or not config.is_file() or _MARK not in config.read_text("utf-8", "replace"):
        raise InputError(f"{target}: is there, and no model of triton_repository: choose another name or folder")
    others = [path.name for path in sorted(target.iterdir()) if path != config and not _is_version(path)]
    if replace and others:
        raise InputError(
            f"{target}: replace would take out {others[0]}, which is not of here: move it, or replace=False"
        )


def _is_version(path: Path) -> bool:
    return path.is_dir() and path.name.isdecimal()


def _written(
    target: Path,
    config: TritonConfig,
    files: Mapping[str, Path],
    replace: bool,
    max_error: float | None,
    min_cosine: float | None,
) -> TritonReport:
    """Makes the folder aside, then puts it in the place of the one that is there."""
    fresh, old = (target.with_name(f".{target.name}.{kind}-{os.getpid()}") for kind in ("new", "old"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            if target.exists() and not replace:
                shutil.copytree(target, fresh)
            versions = [int(path.name) for path in fresh.iterdir() if _is_version(path)] if fresh.exists() else []
            version = max(versions, default=0) + 1
            (fresh / str(version)).mkdir(parents=True)
            for file, source in files.items():
                shutil.copyfile(source, fresh / str(version) / file)
            (fresh / _CONFIG).write_text(config_text(config), "utf-8")
            if target.exists():
                target.rename(old)
            try:
                fresh.rename(target)
            except OSError:
                if old.exists():
                    old.rename(target)
                raise
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise InputError(f"{target}: cannot be written: {error}") from error
    paths = (target / _CONFIG, *(target / str(version) / file for file in files))
    return TritonReport(target, version, config, paths, max_error, min_cosine)
