"""TensorRT engines of exported graphs, built and compared with onnxruntime."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spkfast.errors import InputError
from spkfast.export.tensorrt_graph import (
    Gpu,
    TensorRTGraph,
    deserialized,
    ensure,
    load_tensorrt,
    log_of,
    machine_of,
    made,
    said,
    tensors_of,
)
from spkfast.export.tensorrt_plan import (
    LENGTHS,
    BuildPlan,
    HardwareCompatibility,
    OnnxInfo,
    ParityCase,
    Profile,
    Shapes,
    make_sidecar,
    parity_cases,
    parity_limit,
    plan_build,
    read_onnx,
    sidecar_path,
    signal_of,
    timing_cache_file,
    trtexec_arguments,
    version_of,
)

__all__ = ["Parity", "Profile", "TensorRTGraph", "TensorRTReport", "build_tensorrt", "trtexec_command"]


@dataclasses.dataclass(frozen=True)
class Parity:
    """An engine against onnxruntime on one batch: the worst row's relative error (Euclidean) and cosine."""

    lengths: tuple[int, ...]
    relative_error: float
    cosine: float


@dataclasses.dataclass(frozen=True)
class TensorRTReport:
    """What a build gave: ``facts`` is what lies beside the engine; ``parity`` is empty where none was asked for."""

    engine_path: Path
    facts: dict[str, Any]
    engine_bytes: int
    build_seconds: float
    timing_cache: Path | None
    parity: tuple[Parity, ...]


def build_tensorrt(
    onnx_path: str | os.PathLike[str],
    engine_path: str | os.PathLike[str],
    *,
    profiles: Sequence[Profile] | None = None,
    timing_cache: str | os.PathLike[str] | None = None,
    tf32: bool = False,
    exact: bool = False,
    workspace_bytes: int | None = None,
    optimization_level: int = 3,
    version_compatible: bool = False,
    hardware_compatibility: HardwareCompatibility = "none",
    validate: bool = True,
    reference: str | os.PathLike[str] | None = None,
    device: str | torch.device = "cuda",
) -> TensorRTReport:
    """Builds an engine, compares it with onnxruntime, and writes it with its facts beside it, or writes nothing.

    Types come from the ONNX file alone (strongly typed networks), for TensorRT 10.12 and later. What
    ``engine_path`` needs to be loaded lies in ``engine_path`` + ``.json``.

    Args:
        onnx_path: File written by ``to_onnx``.
        engine_path: Where the engine goes.
        profiles: Ranges of batches and lengths; None for one utterance at once, and 2 to 64, up to 20 s.
        timing_cache: Folder that keeps what was measured for later builds, in one file a GPU and version.
        tf32: Let float32 products have ten bits; of features graphs only, since it ruins a front-end.
        exact: Make sums and products of rows independent of their place in the batch.
        workspace_bytes: Most memory of a layer beside its inputs and outputs; None for all of the GPU.
        optimization_level: 0 to 5: the time spent on the search for kernels.
        version_compatible: Let newer versions of TensorRT load the engine, which costs speed.
        hardware_compatibility: GPUs that may load it: ``none`` for the very model alone, ``same_compute_capability``,
            or ``ampere_plus`` for all since Ampere; the latter two cost speed.
        validate: Compare embeddings with those of onnxruntime on a CPU, over several batches of each profile.
        reference: ONNX file of the same model for that comparison, where onnxruntime cannot run ``onnx_path``: bf16.
        device: GPU to build on.

    Raises:
        InputError: If a setting or the file is unfit; nothing can be written there; TensorRT or a GPU is missing; an
            operator is not supported; the build fails; or embeddings differ too much.
    """
    target = Path(engine_path)
    for file in (target, sidecar_path(target)):
        if file.is_dir():
            raise InputError(f"engine_path: a file is expected, {file} is a folder: name a file in it")
    if not target.parent.is_dir():
        raise InputError(f"engine_path: a file in an existing folder is expected, got {target}: make its folder first")
    if timing_cache is not None and Path(timing_cache).exists() and not Path(timing_cache).is_dir():
        raise InputError(f"timing_cache: a folder is expected, {timing_cache} is a file: name its folder")
    info, contents = read_onnx(onnx_path)
    plan = plan_build(
        info,
        profiles=profiles,
        tf32=tf32,
        exact=exact,
        workspace_bytes=workspace_bytes,
        optimization_level=optimization_level,
        version_compatible=version_compatible,
        hardware_compatibility=hardware_compatibility,
    )
    expected = _reference(info, reference) if validate else None
    trt = load_tensorrt()
    gpu = Gpu(device)
    machine = machine_of(trt, gpu)
    timing = None if timing_cache is None else timing_cache_file(timing_cache, machine)
    partial = _partial(target)
    with _written("engine_path", target):
        partial.touch()  # what cannot be written is told before the build, not after
    try:
        started = time.monotonic()
        with gpu.current():
            engine_bytes = _build(trt, info, contents, plan, timing)
        seconds = time.monotonic() - started
        with gpu.current():
            runtime, engine = deserialized(trt, engine_bytes, version_compatible)
            inputs, outputs = tensors_of(trt, engine)
            del engine, runtime  # in this order
        facts = make_sidecar(info, plan, machine, engine_bytes, inputs, outputs)
        with _written("engine_path", target):
            partial.write_bytes(engine_bytes)
            sidecar_path(partial).write_text(json.dumps(facts, indent=1), encoding="utf-8")
        parity = () if expected is None else _parity(partial, plan.profiles, expected, gpu.device)
        limit = parity_limit(info.metadata["precision"], tf32)
        worst = max(parity, key=lambda found: found.relative_error, default=None)
        if worst is not None and not worst.relative_error <= limit:
            raise InputError(
                f"{info.path}: the engine gives other embeddings than onnxruntime: relative error "
                f"{worst.relative_error:.2g}, at most {limit:.2g} is expected, for lengths {list(worst.lengths)}: try "
                "another TensorRT; validate=False builds it all the same"
            )
        with _written("engine_path", target):
            _put(partial, target)
    finally:
        partial.unlink(missing_ok=True)
        sidecar_path(partial).unlink(missing_ok=True)
    return TensorRTReport(target, facts, len(engine_bytes), seconds, timing, parity)


def trtexec_command(
    onnx_path: str | os.PathLike[str],
    engine_path: str | os.PathLike[str],
    profiles: Sequence[Profile] | None = None,
    *,
    timing_cache_path: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> list[str]:
    """Command line by which ``trtexec`` does the build of :func:`build_tensorrt`, for any machine.

    ``trtexec`` writes no facts and compares nothing: :class:`TensorRTGraph` does not load what it builds.

    Args:
        onnx_path: File written by ``to_onnx``.
        engine_path: Where the engine goes.
        profiles: As of :func:`build_tensorrt`.
        timing_cache_path: File that keeps what was measured; not to be shared by GPUs or versions.
        settings: ``tf32``, ``exact``, ``workspace_bytes``, ``optimization_level``, ``version_compatible`` and
            ``hardware_compatibility`` of :func:`build_tensorrt`.

    Raises:
        InputError: If a setting or the file is unfit.
    """
    plan = plan_build(read_onnx(onnx_path)[0], profiles=profiles, **settings)
    return trtexec_arguments(
        onnx_path, engine_path, plan, None if timing_cache_path is None else Path(timing_cache_path)
    )


def _partial(path: Path) -> Path:
    """Where a file grows; several processes may write the same one."""
    return path.with_name(f"{path.name}.{os.getpid()}.partial")


@contextlib.contextmanager
def _written(argument: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        told = error.strerror or error
        raise InputError(f"{argument}: {path} cannot be written ({told}): choose a place that can be") from error


def _put(partial: Path, target: Path) -> None:
    """Engine and facts to where they belong, both or neither."""
    facts = sidecar_path(target)
    before = facts.read_bytes() if facts.is_file() else None
    os.replace(sidecar_path(partial), facts)
    try:
        os.replace(partial, target)
    except OSError:
        if before is None:
            facts.unlink()
        else:
            facts.write_bytes(before)
        raise


def _build(trt: Any, info: OnnxInfo, contents: bytes, plan: BuildPlan, timing: Path | None) -> bytes:
    builder = made(trt.Builder, trt)
    # In 11.x all networks are strongly typed, and the flag is deprecated.
    typed = version_of(trt.__version__) >= (11,)
    flags = 0 if typed else 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, log_of(trt))
    if not parser.parse(contents):
        problems = [parser.get_error(i) for i in range(parser.num_errors)]
        told = "; ".join(f"{problem.node_operator()} {problem.node_name()!r}: {problem.desc()}" for problem in problems)
        complaints = said()  # the same in other words, but where there are no problems
        reason = " ".join(told.split()) or complaints
        raise InputError(f"{info.path}: TensorRT {trt.__version__} cannot read it: {reason}")
    config = builder.create_builder_config()
    for name in plan.set_flags:
        config.set_flag(getattr(trt.BuilderFlag, name))
    for name in plan.clear_flags:
        config.clear_flag(getattr(trt.BuilderFlag, name))
    if plan.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, plan.workspace_bytes)
    config.builder_optimization_level = plan.optimization_level
    level = getattr(trt.HardwareCompatibilityLevel, plan.hardware_compatibility.upper())
    config.hardware_compatibility_level = level
    for index, shapes in enumerate(plan.profiles):
        optimization = builder.create_optimization_profile()
        for name, (least, common, most) in shapes.items():
            try:
                optimization.set_shape(name, min=least, opt=common, max=most)
            except ValueError as error:
                raise InputError(f"{info.path}: profile {index}: {name}: {error}{said()}") from error
        ensure(bool(optimization), f"{info.path}: TensorRT refuses profile {index}")
        ensure(config.add_optimization_profile(optimization) == index, f"{info.path}: TensorRT refuses profile {index}")
    # Referred to until the end of the build, as TensorRT asks.
    cache = None
    if timing is not None:
        with _written("timing_cache", timing):
            timing.parent.mkdir(parents=True, exist_ok=True)
            known = timing.read_bytes() if timing.is_file() else b""
        cache = config.create_timing_cache(known)
        ensure(cache is not None, f"{timing}: no timing cache: delete it")
        ensure(
            config.set_timing_cache(cache, ignore_mismatch=False), f"{timing}: timings of another machine: delete it"
        )
    host = builder.build_serialized_network(network, config)
    if host is None:
        raise InputError(f"{info.path}: TensorRT {trt.__version__} builds no engine{said() or ', and says no reason'}")
    if timing is not None:
        partial = _partial(timing)
        cache = config.get_timing_cache()
        try:
            with _written("timing_cache", timing):
                partial.write_bytes(bytes(memoryview(cache.serialize())))
                os.replace(partial, timing)
        finally:
            partial.unlink(missing_ok=True)
    return bytes(memoryview(host))


def _reference(info: OnnxInfo, other: str | os.PathLike[str] | None) -> Any:
    """What computes embeddings in onnxruntime."""
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError("the comparison needs onnxruntime: pip install onnxruntime, or validate=False") from error
    path = info.path
    if other is not None:
        path = Path(other)
        given, wanted = (
            {"model_hash": facts.metadata["model_hash"], "inputs": ", ".join(tensor.name for tensor in facts.inputs)}
            for facts in (read_onnx(path)[0], info)
        )
        for key, value in given.items():
            if value != wanted[key]:
                raise InputError(f"reference {path}: {key} {value!r}, that of {info.path} is {wanted[key]!r}")
    try:
        return onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has no common type
        first = str(error).splitlines()[0]
        raise InputError(
            f"{path}: onnxruntime does not run it ({first}): give the fp32 export as reference, or validate=False"
        ) from error


def _parity(path: Path, profiles: Sequence[Shapes], reference: Any, device: torch.device) -> tuple[Parity, ...]:
    # A corner must not be padded away from it: the step is one sample or frame.
    graph = TensorRTGraph(path, device=device, step_seconds=1e-9)
    cases = dict.fromkeys(case for shapes in profiles for case in parity_cases(shapes))
    return tuple(_compare(graph, reference, case, profiles[0]) for case in cases)


def _compare(graph: TensorRTGraph, reference: Any, case: ParityCase, shapes: Shapes) -> Parity:
    signal = signal_of(shapes)
    shape = (len(case.lengths), max(case.lengths), *shapes[signal][0][2:])
    noise = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    feed = {signal: (0.1 * noise).clip(-1, 1) if signal == "waveform" else noise}
    if LENGTHS in shapes:
        feed[LENGTHS] = np.array(case.lengths, np.int64)
    expected = reference.run(None, feed)[0].astype(np.float64)
    tensors = {name: torch.from_numpy(array) for name, array in feed.items()}
    errors, cosines = [], []
    for _ in range(2):  # directly, and from a CUDA graph
        got = graph(tensors).double().cpu().numpy()
        norms = np.linalg.norm(got, axis=1), np.linalg.norm(expected, axis=1)
        errors.append(float((np.linalg.norm(got - expected, axis=1) / norms[1]).max()))
        cosines.append(float(((got * expected).sum(axis=1) / (norms[0] * norms[1])).min()))
    # What is not finite is no error of 0.
    finite = all(map(math.isfinite, errors))
    return Parity(case.lengths, max(errors) if finite else math.inf, min(cosines) if finite else -1.0)
