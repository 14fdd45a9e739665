"""What a TensorRT build decides, as plain functions of plain data: shapes, flags, file names, where engines run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from spkfast.errors import InputError, check_name
from spkfast.frontends import FrontendSpec

Shape = tuple[int, ...]
Shapes = dict[str, tuple[Shape, Shape, Shape]]
HardwareCompatibility = Literal["none", "same_compute_capability", "ampere_plus"]

LENGTHS = "lengths"
# The first release that has everything used here and marks weak typing as gone.
OLDEST_TENSORRT = (10, 12)
_FORMAT = 1
_SIGNALS = {"waveform": 2, "feats": 3}  # and their ranks
_METADATA = ("inputs", "precision", "frontend", "spec_hash", "sample_rate", "min_samples", "model_hash")
# Relative error of a row against onnxruntime above which an engine is wrong: two fp32 front-ends differ by 3e-4 in the
# logarithm; otherwise sqrt(2 (1 - cosine)) of the cosines 0.9995 and 0.995 that half precision and int8 must keep.
_LIMITS = {"fp32": 1e-3, "fp16": 0.0316, "bf16": 0.0316, "int8": 0.1}


@dataclasses.dataclass(frozen=True)
class Profile:
    """Range of inputs that an engine has kernels for: least, commonest (for which they are tuned) and most.

    A wide range rules fast kernels out: several narrow profiles serve better than one that covers all.

    Attributes:
        batch: Utterances.
        seconds: Length of the longest utterance of a batch; what is below the shortest input of the graph means that
            one, so 0 is right for a least length.

    Raises:
        InputError: If a range is no three numbers in rising order, or a batch is below 1.
    """

    batch: tuple[int, int, int]
    seconds: tuple[float, float, float]

    def __post_init__(self) -> None:
        for name, kinds, least in (("batch", int, 1), ("seconds", (int, float), 0)):
            values = getattr(self, name)
            good = isinstance(values, tuple) and len(values) == 3
            good = good and all(isinstance(v, kinds) and not isinstance(v, bool) and math.isfinite(v) for v in values)
            if not good or not least <= values[0] <= values[1] <= values[2] or not values[2]:
                raise InputError(f"{name} of a profile must be (min, opt, max) in rising order, got {values!r}")


# One utterance at once, and batches as they are extracted; up to the sizes of spkfast.nn.CudaGraphs.
DEFAULT_PROFILES = (Profile((1, 1, 1), (0, 3, 20)), Profile((2, 32, 64), (0, 3, 20)))


class TensorInfo(NamedTuple):
    """Name, type (as torch calls it) and shape of a tensor; -1 where it is dynamic."""

    name: str
    dtype: str
    shape: Shape


@dataclasses.dataclass(frozen=True)
class OnnxInfo:
    """What a build needs to know of an ONNX file."""

    path: Path
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    metadata: dict[str, str]
    sha256: str


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where an engine is built or run; ``capability`` as ``9.0``, ``cuda`` the version that torch runs on."""

    gpu: str
    capability: str
    tensorrt: str
    cuda: str
    driver: str


@dataclasses.dataclass(frozen=True)
class BuildPlan:
    """Settings of a build, by TensorRT's own names; shapes (min, opt, max) of each input for each profile."""

    profiles: tuple[Shapes, ...]
    set_flags: tuple[str, ...]
    clear_flags: tuple[str, ...]
    workspace_bytes: int | None
    optimization_level: int
    hardware_compatibility: str


class Bucket(NamedTuple):
    """What inputs are padded to: index of a profile, rows, and samples or frames."""

    profile: int
    batch: int
    length: int


class ParityCase(NamedTuple):
    """A batch on which an engine is compared: samples or frames per row."""

    lengths: tuple[int, ...]


def read_onnx(path: str | os.PathLike[str]) -> tuple[OnnxInfo, bytes]:
    """Facts and contents of an ONNX file that ``to_onnx`` wrote.

    Raises:
        InputError: If there is none, or TensorRT cannot build it: another format, static sizes, int8 for CPUs.
    """
    try:
        import onnx
    except ImportError as error:
        raise InputError("building needs the onnx package: pip install onnx") from error
    file = Path(path)
    try:
        contents = file.read_bytes()
        model = onnx.load_model_from_string(contents)
    except Exception as error:  # what protobuf raises differs between its implementations
        raise InputError(f"{file}: no readable ONNX file: {' '.join(str(error).split())}") from error

    def info(value: Any) -> TensorInfo:
        kind = value.type.tensor_type
        dims = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in kind.shape.dim)
        return TensorInfo(value.name, str(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)), dims)

    metadata = {entry.key: entry.value for entry in model.metadata_props}
    inputs, outputs = (tuple(map(info, values)) for values in (model.graph.input, model.graph.output))
    found = OnnxInfo(file, inputs, outputs, metadata, hashlib.sha256(contents).hexdigest())
    _check_graph(found)
    return found, contents


def _check_graph(info: OnnxInfo) -> None:
    for key in _METADATA:
        if key not in info.metadata:
            raise InputError(f"{info.path}: metadata has no {key!r}: export the model with spkfast.export.to_onnx")
    precision = info.metadata["precision"]
    check_name("precision", precision, list(_LIMITS))
    if precision == "int8" and info.metadata.get("target") != "tensorrt":
        raise InputError(
            f"{info.path}: int8 graph for {info.metadata.get('target', 'an unknown target')!r}, whose unsigned bytes "
            "TensorRT does not multiply: export it with target='tensorrt'"
        )
    shapes = {tensor.name: tensor.shape for tensor in info.inputs}
    signal = [name for name in shapes if name != LENGTHS]
    if len(signal) != 1 or signal[0] not in _SIGNALS or len(info.outputs) != 1:
        raise InputError(
            f"{info.path}: inputs must be 'waveform' or 'feats', and 'lengths' or not, with one output, got "
            f"{', '.join(shapes)} and {len(info.outputs)} outputs"
        )
    shape = shapes[signal[0]]
    # Such a file comes of an example with one row, and would run for one row alone.
    if (len(shape), shape[:2], shapes.get(LENGTHS, (-1,))) != (_SIGNALS[signal[0]], (-1, -1), (-1,)) or any(
        size < 1 for size in shape[2:]
    ):
        raise InputError(
            f"{info.path}: batch and length of {signal[0]!r}, and they alone, must be dynamic, got {shape}"
        )


def shortest(metadata: Mapping[str, str]) -> int:
    """Samples or frames of the shortest input of a graph."""
    return units(metadata, int(metadata["min_samples"]))


def in_units(metadata: Mapping[str, str], seconds: float) -> int:
    """Samples or frames, whichever a graph takes, of so much audio; at least those of the shortest input."""
    return units(metadata, max(round(seconds * int(metadata["sample_rate"])), int(metadata["min_samples"])))


def step_in_units(metadata: Mapping[str, str], seconds: float) -> int:
    """Samples or frames that so much more audio adds; at least one."""
    samples = round(seconds * int(metadata["sample_rate"]))
    return max(1, samples if metadata["inputs"] == "waveform" else samples // _spec(metadata).frame_shift)


def units(metadata: Mapping[str, str], samples: int) -> int:
    """Samples or frames, whichever a graph takes, of so many samples; at least one."""
    if metadata["inputs"] == "waveform":
        return samples
    from spkfast import frontend_tables
    from spkfast.reference.log_mel_fbank import padded_frames

    return max(1, int(padded_frames(samples, frontend_tables.settings(_spec(metadata)))))


def _spec(metadata: Mapping[str, str]) -> FrontendSpec:
    return FrontendSpec.from_dict(json.loads(metadata["frontend"]))


def plan_build(
    info: OnnxInfo,
    *,
    profiles: Sequence[Profile] | None = None,
    tf32: bool = False,
    exact: bool = False,
    workspace_bytes: int | None = None,
    optimization_level: int = 3,
    version_compatible: bool = False,
    hardware_compatibility: HardwareCompatibility = "none",
) -> BuildPlan:
    """Settings of a build; see :func:`spkfast.export.tensorrt.build_tensorrt`.

    Raises:
        InputError: If there is no profile, or a setting is out of range or unfit for the graph.
    """
    profiles = DEFAULT_PROFILES if profiles is None else tuple(profiles)
    if not profiles:
        raise InputError("profiles must hold one at least, got none")
    if tf32 and info.metadata["inputs"] != "features":
        raise InputError(f"{info.path}: tf32 ruins the front-end of a waveform graph: leave it off, or export features")
    if type(optimization_level) is not int or not 0 <= optimization_level <= 5:
        raise InputError(f"optimization_level must be 0 to 5, got {optimization_level!r}")
    if workspace_bytes is not None and (type(workspace_bytes) is not int or workspace_bytes < 1):
        raise InputError(f"workspace_bytes must be a positive integer or None, got {workspace_bytes!r}")
    check_name("hardware compatibility", hardware_compatibility, list(get_args(HardwareCompatibility)))
    wanted = {"TF32": tf32, "DISTRIBUTIVE_INDEPENDENCE": exact, "VERSION_COMPATIBLE": version_compatible}
    return BuildPlan(
        profiles=tuple(profile_shapes(info, profile) for profile in profiles),
        set_flags=tuple(name for name, asked in wanted.items() if asked),
        clear_flags=() if tf32 else ("TF32",),  # the one of them that is on by default
        workspace_bytes=workspace_bytes,
        optimization_level=optimization_level,
        hardware_compatibility=hardware_compatibility,
    )


def profile_shapes(info: OnnxInfo, profile: Profile) -> Shapes:
    """Least, commonest and largest shape of each input."""
    sizes = [(b, in_units(info.metadata, s)) for b, s in zip(profile.batch, profile.seconds, strict=True)]
    least, common, most = ({t.name: (*size, *t.shape[2:])[: len(t.shape)] for t in info.inputs} for size in sizes)
    return {name: (least[name], common[name], most[name]) for name in least}


def signal_of(shapes: Mapping[str, Any]) -> str:
    """Name of the input that is not the lengths."""
    return next(name for name in shapes if name != LENGTHS)


def choose_bucket(profiles: Sequence[Shapes], batch: int, length: int, step: int) -> Bucket | None:
    """The least that a batch can be padded to: a power of two of rows, a multiple of ``step``; None if nothing fits.

    Without lengths padding would change results: only rows are added then, and the length must lie in the range.
    """
    found = []
    for index, shapes in enumerate(profiles):
        least, _, most = shapes[signal_of(shapes)]
        padded = max(least[1], min(-(-length // step) * step, most[1])) if LENGTHS in shapes else length
        rows = max(least[0], min(1 << (batch - 1).bit_length(), most[0]))
        if batch <= rows and length <= padded and least[1] <= padded <= most[1]:
            found.append(Bucket(index, rows, padded))
    return min(found, key=lambda bucket: bucket.batch * bucket.length, default=None)


def parity_cases(shapes: Shapes, rows: int = 4) -> list[ParityCase]:
    """Batches of a profile: three corners, and ``rows`` of the commonest length.

    The largest batch is compared at the least length alone: the reference runs on a CPU.
    """
    least, common, most = shapes[signal_of(shapes)]
    rows = max(least[0], min(rows, most[0]))
    cases = [(least[0], least[1]), (least[0], most[1]), (most[0], least[1]), (rows, common[1])]
    found = [ParityCase((length,) * batch) for batch, length in dict.fromkeys(cases)]
    if LENGTHS in shapes and rows > 1:
        between = [least[1] + (common[1] - least[1]) * row // (rows - 1) for row in range(rows)]
        found.append(ParityCase(tuple(between)))
    return found


def parity_limit(precision: str, tf32: bool) -> float:
    """Largest relative error of an embedding against onnxruntime; that of TF32 is that of fp16, whose digits it has."""
    return max(_LIMITS[precision], _LIMITS["fp16"] if tf32 else 0)


def version_of(text: str) -> tuple[int, ...]:
    """Leading numbers of a version, as ``10.13.3.9.post1``."""
    return tuple(int(part) for part in re.match(r"\d*(?:\.\d+)*", text)[0].split(".") if part)  # type: ignore[index]


def timing_cache_file(folder: str | os.PathLike[str], machine: Machine) -> Path:
    """Where the timings of a machine lie: another GPU or version would measure other ones."""
    parts = (machine.gpu, f"sm{machine.capability}", f"trt{machine.tensorrt}", f"cuda{machine.cuda}")
    return Path(folder) / ("-".join(re.sub(r"[^A-Za-z0-9.]+", "_", part) for part in parts) + ".timing")


def trtexec_arguments(
    onnx_path: str | os.PathLike[str], engine_path: str | os.PathLike[str], plan: BuildPlan, timing: Path | None
) -> list[str]:
    """Command line of ``trtexec`` for a plan."""
    command = ["trtexec", f"--onnx={os.fspath(onnx_path)}", f"--saveEngine={os.fspath(engine_path)}", "--skipInference"]
    # Of no effect in 11.x, and needed before. The other is the builder's own default, of which trtexec has another.
    command += ["--stronglyTyped", "--avgTiming=1"]
    for index, shapes in enumerate(plan.profiles):
        command.append(f"--profile={index}")
        for i, bound in enumerate(("min", "opt", "max")):
            spec = ",".join(f"{name}:{'x'.join(map(str, bounds[i]))}" for name, bounds in shapes.items())
            command.append(f"--{bound}Shapes={spec}")
    command += ["--noTF32"] if "TF32" in plan.clear_flags else []
    options = {"DISTRIBUTIVE_INDEPENDENCE": "--distributiveIndependence", "VERSION_COMPATIBLE": "--versionCompatible"}
    command += [option for flag, option in options.items() if flag in plan.set_flags]
    if plan.workspace_bytes is not None:
        command.append(f"--memPoolSize=workspace:{plan.workspace_bytes}B")
    command.append(f"--builderOptimizationLevel={plan.optimization_level}")
    levels = {"none": "none", "same_compute_capability": "sameComputeCapability", "ampere_plus": "ampere+"}
    command.append(f"--hardwareCompatibilityLevel={levels[plan.hardware_compatibility]}")
    return command + ([f"--timingCacheFile={timing}"] if timing is not None else [])


def sidecar_path(engine_path: str | os.PathLike[str]) -> Path:
    """Where the facts about an engine lie."""
    return Path(f"{os.fspath(engine_path)}.json")


def make_sidecar(
    info: OnnxInfo,
    plan: BuildPlan,
    machine: Machine,
    engine: bytes,
    inputs: list[TensorInfo],
    outputs: list[TensorInfo],
) -> dict[str, Any]:
    """What is kept beside an engine: where it runs, what it was made of, and what it takes and gives."""
    from spkfast import __version__

    return {
        "format": _FORMAT,
        "spkfast_version": __version__,
        "engine_sha256": hashlib.sha256(engine).hexdigest(),
        "onnx_sha256": info.sha256,
        "spec_hash": info.metadata["spec_hash"],
        "model_hash": info.metadata["model_hash"],
        "precision": info.metadata["precision"],
        "tf32": "TF32" in plan.set_flags,
        "exact": "DISTRIBUTIVE_INDEPENDENCE" in plan.set_flags,
        "version_compatible": "VERSION_COMPATIBLE" in plan.set_flags,
        "hardware_compatibility": plan.hardware_compatibility,
        "optimization_level": plan.optimization_level,
        "machine": dataclasses.asdict(machine),
        "inputs": [tensor._asdict() for tensor in inputs],
        "outputs": [tensor._asdict() for tensor in outputs],
        "profiles": [{name: list(bounds) for name, bounds in shapes.items()} for shapes in plan.profiles],
        "metadata": info.metadata,
    }


def read_sidecar(engine_path: str | os.PathLike[str]) -> dict[str, Any]:
    """The facts about an engine, with tuples and :class:`TensorInfo` as :func:`make_sidecar` had them.

    Raises:
        InputError: If engine or facts are missing, damaged or of another version.
    """
    path = sidecar_path(engine_path)
    for file in (Path(engine_path), path):
        if not file.is_file():
            raise InputError(f"{file}: no such file; build_tensorrt writes an engine and {path.name} beside it")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts["format"] != _FORMAT:
            raise InputError(f"{path}: format {facts['format']!r}, this spkfast reads {_FORMAT}: rebuild the engine")
        for key in ("inputs", "outputs"):
            facts[key] = [TensorInfo(t["name"], t["dtype"], tuple(t["shape"])) for t in facts[key]]
        facts["profiles"] = [
            {name: tuple(tuple(shape) for shape in bounds) for name, bounds in shapes.items()}
            for shapes in facts["profiles"]
        ]
        facts["machine"] = Machine(**facts["machine"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: damaged ({type(error).__name__}: {error}): rebuild the engine") from error
    return facts


def differences(
    facts: Mapping[str, Any], machine: Machine, engine_sha256: str, onnx_sha256: str | None = None
) -> list[str]:
    """Why an engine must not run on a machine, one line each; ``facts`` as :func:`read_sidecar` gives them."""
    built: Machine = facts["machine"]
    lines = []
    if facts["engine_sha256"] != engine_sha256:
        lines.append("the file is not the one that its .json describes")
    if onnx_sha256 is not None and facts["onnx_sha256"] != onnx_sha256:
        lines.append("it was built from another ONNX file")
    versions = [version_of(m.tensorrt) for m in (built, machine)]
    compatible = facts["version_compatible"] and versions[0] <= versions[1]
    if built.tensorrt != machine.tensorrt and not compatible:
        newer = " or newer" if facts["version_compatible"] else ""
        lines.append(f"built for TensorRT {built.tensorrt}{newer}, here is {machine.tensorrt}")
    level = facts["hardware_compatibility"]
    if level == "ampere_plus" and version_of(machine.capability) < (8, 0):
        lines.append(f"built for compute capability 8.0 and above, here is {machine.capability}")
    if level != "ampere_plus" and built.capability != machine.capability:
        lines.append(f"built for compute capability {built.capability}, here is {machine.capability}")
    if level == "none" and built.gpu != machine.gpu:
        lines.append(f"built on {built.gpu}, here is {machine.gpu}")
    return lines
