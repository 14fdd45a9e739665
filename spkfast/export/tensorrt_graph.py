"""The runner of TensorRT engines, replayed from CUDA graphs of a few sizes, and what else touches library and GPU."""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import importlib
import logging
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spkfast.errors import BatchSizeError, InputError
from spkfast.export.tensorrt_plan import (
    LENGTHS,
    OLDEST_TENSORRT,
    Bucket,
    Machine,
    Shapes,
    TensorInfo,
    choose_bucket,
    differences,
    read_sidecar,
    shortest,
    signal_of,
    step_in_units,
    version_of,
)

_logger = logging.getLogger("spkfast.tensorrt")
_INSTALL = "pip install 'tensorrt-cu13>=10.13' (CUDA 13) or 'tensorrt-cu12>=10.12' (CUDA 12)"
# trt.nptype knows no bfloat16.
_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT32": "int32", "INT64": "int64"}
_errors: collections.deque[str] = collections.deque(maxlen=5)


class TensorRTGraph:
    """An engine that is called with tensors: padded to a few sizes, each with memory and a CUDA graph of its own.

    A batch is padded to the next power of two of rows and, where the graph takes lengths, the next multiple of
    ``step_seconds``, within the profile that this fits closest; no result changes by that. The first batch of a size
    runs directly, the second one captures its CUDA graph, and all later ones replay it; a size that cannot be
    captured goes on running directly. Several threads and streams may call; calls follow one another.

    Args:
        engine_path: File written by :func:`build_tensorrt`, its facts beside it.
        device: GPU.
        onnx_path: File of which the engine must have been built; None does not ask.
        max_graphs: Most sizes that are kept; the least recently used one goes first. Those of a profile share the
            memory of what lies between input and output.
        step_seconds: What lengths are padded to a multiple of.
        cuda_graphs: Whether to capture; without it every batch runs directly.

    Attributes:
        metadata: What the ONNX file says of the model.
        inputs: Names of the inputs.
        max_batch: Most rows, over all profiles.
        max_samples: Samples of the longest row, over all profiles; None where the graph takes features.
        full_float32: Whether float32 products have all their digits, False where the engine was built with ``tf32``.
        device: The GPU.

    Raises:
        InputError: If TensorRT or the GPU is missing, the engine was built for another one or of another file, or it
            cannot be loaded.
    """

    def __init__(
        self,
        engine_path: str | os.PathLike[str],
        *,
        device: str | torch.device = "cuda",
        onnx_path: str | os.PathLike[str] | None = None,
        max_graphs: int = 16,
        step_seconds: float = 0.5,
        cuda_graphs: bool = True,
    ) -> None:
        if type(max_graphs) is not int or max_graphs < 1:
            raise InputError(f"max_graphs must be a positive integer, got {max_graphs!r}")
        if not step_seconds > 0:
            raise InputError(f"step_seconds must be positive, got {step_seconds!r}")
        self._path = Path(engine_path)
        facts = read_sidecar(engine_path)
        self._trt = trt = load_tensorrt()
        self._gpu = gpu = Gpu(device)
        contents = self._path.read_bytes()
        other = None if onnx_path is None else hashlib.sha256(Path(onnx_path).read_bytes()).hexdigest()
        problems = differences(facts, machine_of(trt, gpu), hashlib.sha256(contents).hexdigest(), other)
        if problems:
            raise InputError(f"{engine_path}: {'; '.join(problems)}: rebuild it")
        self.metadata: dict[str, str] = facts["metadata"]
        self.device = gpu.device
        self._profiles: list[Shapes] = facts["profiles"]
        self._max_graphs, self._cuda_graphs = max_graphs, cuda_graphs
        self._shortest = shortest(self.metadata)
        self._step = step_in_units(self.metadata, step_seconds)
        with gpu.current():
            self._runtime, self._engine = deserialized(trt, contents, facts["version_compatible"])
            inputs, outputs = tensors_of(trt, self._engine)
            if (inputs, outputs) != (facts["inputs"], facts["outputs"]):
                raise InputError(f"{engine_path}: has other inputs and outputs than its .json says: rebuild it")
        self._infos = {info.name: info for info in inputs}
        self._signal, self._output = signal_of(self._infos), outputs[0]
        self.inputs = tuple(self._infos)
        self.max_batch = max(shapes[self._signal][2][0] for shapes in self._profiles)
        longest = max(shapes[self._signal][2][1] for shapes in self._profiles)
        self.max_samples = longest if self._signal == "waveform" else None
        self.full_float32 = not facts["tf32"]
        self._slots: dict[Bucket, _Slot] = {}
        self._direct: set[Bucket] = set()  # those of which a capture failed
        self._memories: dict[int, Tensor] = {}
        self._lock = threading.Lock()

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Embeddings (B, E) on the GPU, in the order of the caller's stream.

        Args:
            inputs: By name: ``waveform`` (B, S) or ``feats`` (B, T, M), and ``lengths`` (B,) where the graph takes
                them, on any device; of the engine's types.

        Raises:
            InputError: If names, types or shapes are others, no profile holds such a batch, or TensorRT fails.
        """
        batch, length = self._check(inputs)
        bucket = choose_bucket(self._profiles, batch, length, self._step)
        if bucket is None:
            ranges = [(shapes[self._signal][0][:2], shapes[self._signal][2][:2]) for shapes in self._profiles]
            raise BatchSizeError(
                f"{self._signal} of {batch} x {length} lies in no profile of {self._path}, which hold "
                f"{', '.join(f'{a} x {b} to {c} x {d}' for (a, b), (c, d) in ranges)}: split the batch, or build with "
                "other profiles"
            )
        with self._lock, torch.no_grad(), self._gpu.turn(inputs.values()) as stream:
            slot = self._slots.get(bucket)
            graph = None if slot is None else slot.graph
            if slot is None:
                self._make_room()
                slot = self._slot(bucket, stream)
            self._fill(slot, inputs, batch, length)
            # A context that has run once, as a capture needs.
            if graph is None and bucket in self._slots and self._cuda_graphs and bucket not in self._direct:
                graph = self._captured(bucket, slot.context, stream)
            if graph is None:
                self._launch(slot.context, stream)
            else:
                graph.replay()
            self._slots.pop(bucket, None)
            self._slots[bucket] = slot._replace(graph=graph)  # the last one used
            output = slot.output[:batch].clone()
        return self._gpu.handed_over(output)

    def __len__(self) -> int:
        """How many sizes are kept."""
        return len(self._slots)

    def clear(self) -> None:
        """Drops all sizes with their graphs and memory."""
        with self._lock:
            self._gpu.finish()
            self._slots, self._memories = {}, {}
            self._direct = set()

    def _check(self, inputs: Mapping[str, Tensor]) -> tuple[int, int]:
        """Rows, and samples or frames."""
        if set(inputs) != set(self.inputs):
            raise InputError(f"inputs must be {', '.join(self.inputs)}, got {', '.join(inputs) or 'none'}")
        size = tuple(getattr(inputs[self._signal], "shape", ()))[:2]
        for name, info in self._infos.items():
            dtype, given = getattr(torch, info.dtype), inputs[name]
            shape = (*size, *info.shape[2:])[: len(info.shape)]
            good = isinstance(given, Tensor) and given.dtype == dtype and given.shape == shape and 0 not in shape
            if not good or len(shape) != len(info.shape):
                got = f"{given.dtype} {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
                dims = {0: "B", 1: "S" if self._signal == "waveform" else "T"}
                wanted = ", ".join(str(dims.get(i, known)) for i, known in enumerate(info.shape))
                raise InputError(f"{name} must be {dtype} ({wanted}), the batch that of {self._signal}, got {got}")
        batch, length = size
        if length < self._shortest:
            raise InputError(f"{self._signal} must have {self._shortest} at least along its second axis, got {length}")
        return batch, length

    def _make_room(self) -> None:
        if len(self._slots) == self._max_graphs:
            self._gpu.finish()
            del self._slots[next(iter(self._slots))]

    def _slot(self, bucket: Bucket, stream: int) -> _Slot:
        """Memory of a size, and a context: a captured graph holds as long as its context is left alone."""
        trt, where = self._trt, f"{self._path}: {bucket.batch} x {bucket.length}"
        context = self._engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise InputError(f"{where}: TensorRT makes no context{said()}: is the memory of the GPU full?")
        memory = self._memory(bucket.profile)
        context.set_device_memory(memory.data_ptr(), memory.numel())
        ensure(context.set_optimization_profile_async(bucket.profile, stream), f"{where}: no such profile")
        static = {}
        # What inference mode makes cannot be written outside of it.
        with torch.inference_mode(False):
            for name, info in self._infos.items():
                shape = (bucket.batch, bucket.length, *info.shape[2:])[: len(info.shape)]
                value = self._shortest if name == LENGTHS else 0  # what spare rows have
                static[name] = torch.full(shape, value, dtype=getattr(torch, info.dtype), device=self.device)
                ensure(context.set_input_shape(name, tuple(shape)), f"{where}: {name} does not take {shape}")
            try:
                missing = context.infer_shapes()
            except RuntimeError as error:
                raise InputError(f"{where}: {error}{said()}") from error
            ensure(not missing, f"{where}: shapes of {', '.join(missing)} remain unknown")
            shape = tuple(context.get_tensor_shape(self._output.name))
            output = torch.empty(shape, dtype=getattr(torch, self._output.dtype), device=self.device)
        for name, tensor in {**static, self._output.name: output}.items():
            ensure(context.set_tensor_address(name, tensor.data_ptr()), f"{where}: {name} has no place")
        return _Slot(context, static, output, None)

    def _memory(self, profile: int) -> Tensor:
        """What lies between input and output: one place for all sizes of a profile, none for a profile not in use."""
        if profile not in self._memories:
            size = self._engine.get_device_memory_size_for_profile_v2(profile)
            self._memories[profile] = torch.empty(max(1, size), dtype=torch.uint8, device=self.device)
        return self._memories[profile]

    def _fill(self, slot: _Slot, inputs: Mapping[str, Tensor], batch: int, length: int) -> None:
        # Spare rows and what lies beyond a length keep what was there: no row sees another one, and none its padding.
        slot.inputs[self._signal][:batch, :length].copy_(inputs[self._signal])
        if LENGTHS in slot.inputs:
            # A length above S would reach into the padding.
            slot.inputs[LENGTHS][:batch].copy_(inputs[LENGTHS]).clamp_(max=length)

    def _captured(self, bucket: Bucket, context: Any, stream: int) -> Any:
        """The graph of a size, or None where it has none, which is told once."""
        try:
            return self._gpu.capture(lambda: self._launch(context, stream))
        except (InputError, RuntimeError) as error:
            self._direct.add(bucket)
            size = f"{bucket.batch} x {bucket.length}"
            _logger.warning("%s: %s has no CUDA graph and runs directly: %s%s", self._path, size, error, said())
            return None

    def _launch(self, context: Any, stream: int) -> None:
        ensure(context.execute_async_v3(stream), f"{self._path}: TensorRT did not run it")


class _Slot(NamedTuple):
    """Context, static inputs and output of one size, and its CUDA graph once there is one."""

    context: Any
    inputs: dict[str, Tensor]
    output: Tensor
    graph: Any


class Gpu:
    """What needs a GPU: its facts, a stream of its own with the waits around it, and captures."""

    def __init__(self, device: str | torch.device) -> None:
        if not torch.cuda.is_available():
            raise InputError("TensorRT needs an NVIDIA GPU, torch finds none: check nvidia-smi and torch.version.cuda")
        found = torch.device(device)
        if found.type != "cuda" or (found.index or 0) >= torch.cuda.device_count():
            raise InputError(f"device must be one of {torch.cuda.device_count()} CUDA devices, got {device!r}")
        self.device = torch.device("cuda", torch.cuda.current_device() if found.index is None else found.index)
        self._stream = torch.cuda.Stream(self.device)

    def facts(self) -> dict[str, str]:
        """Those of :class:`Machine` but for TensorRT."""
        version = Path("/proc/driver/nvidia/version")
        driver = re.search(r"\b\d+(?:\.\d+)+\b", version.read_text()) if version.is_file() else None
        return {
            "gpu": torch.cuda.get_device_name(self.device),
            "capability": ".".join(map(str, torch.cuda.get_device_capability(self.device))),
            "cuda": str(torch.version.cuda),
            "driver": driver[0] if driver else "unknown",
        }

    def current(self) -> contextlib.AbstractContextManager[Any]:
        """Makes it the GPU on which TensorRT works."""
        return torch.cuda.device(self.device)

    @contextlib.contextmanager
    def turn(self, tensors: Iterable[Tensor]) -> Iterator[int]:
        """What is launched inside comes between what the caller's stream has now and what it gets later.

        It runs on a stream of its own, since TensorRT waits for the device on the default one; gives the handle of
        that stream. Tensors of the caller stay whole until they were read.
        """
        with torch.cuda.device(self.device):
            caller = torch.cuda.current_stream()
            if torch.cuda.is_current_stream_capturing():
                raise InputError("an engine has CUDA graphs of its own: call it outside of a capture")
            self._stream.wait_stream(caller)
            try:
                with torch.cuda.stream(self._stream):
                    yield self._stream.cuda_stream
            finally:
                caller.wait_stream(self._stream)
                for tensor in tensors:
                    if tensor.device == self.device:
                        tensor.record_stream(self._stream)

    def handed_over(self, output: Tensor) -> Tensor:
        """A tensor made inside :meth:`turn`, for the caller's stream."""
        output.record_stream(torch.cuda.current_stream(self.device))
        return output

    def capture(self, launch: Callable[[], None]) -> Any:
        """A graph of what is launched on the stream of :meth:`turn`."""
        graph = torch.cuda.CUDAGraph()
        # What other threads do meanwhile is not part of it.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            launch()
        return graph

    def finish(self) -> None:
        """Waits for all that was launched, after which graphs can go."""
        self._stream.synchronize()


def load_tensorrt() -> Any:
    """The module ``tensorrt``.

    Raises:
        InputError: If it is missing or too old.
    """
    try:
        trt = importlib.import_module("tensorrt")
    except ImportError as error:
        raise InputError(f"TensorRT is not installed ({error}): {_INSTALL}") from error
    if version_of(trt.__version__) < OLDEST_TENSORRT:
        raise InputError(f"TensorRT {trt.__version__} is too old, 10.12 at least is needed: {_INSTALL}")
    return trt


def machine_of(trt: Any, gpu: Gpu) -> Machine:
    """Where engines are built and run here."""
    return Machine(tensorrt=trt.__version__, **gpu.facts())


# TensorRT has one logger a process, whichever comes first; it must outlive all else.
@functools.cache
def log_of(trt: Any) -> Any:
    """Where TensorRT says what it does: logging, and :data:`_errors` too for what went wrong."""
    levels = {"INTERNAL_ERROR": logging.ERROR, "ERROR": logging.ERROR, "WARNING": logging.WARNING, "INFO": logging.INFO}

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            level = levels.get(severity.name, logging.DEBUG)
            _logger.log(level, msg)
            if level == logging.ERROR:
                _errors.append(" ".join(msg.split()))

    return Log()


def said() -> str:
    """What TensorRT has complained about since the last time, as the end of a sentence."""
    text = "; ".join(dict.fromkeys(_errors))
    _errors.clear()
    return f" ({text})" if text else ""


def ensure(good: bool, complaint: str) -> None:
    """Checks what TensorRT answers where other libraries raise.

    Raises:
        InputError: If it is not true, with what TensorRT said.
    """
    if good is not True:
        raise InputError(f"{complaint}{said()}")


def made(kind: Any, trt: Any) -> Any:
    """A builder or runtime.

    Raises:
        InputError: If there is no GPU or driver for it.
    """
    _errors.clear()
    try:
        return kind(log_of(trt))
    except TypeError as error:
        if "nullptr" not in str(error):
            raise
        raise InputError(
            f"TensorRT {trt.__version__} finds no GPU or driver that it can use{said()}: check nvidia-smi, and "
            "that the driver knows the CUDA version of the package"
        ) from error


def deserialized(trt: Any, contents: bytes, version_compatible: bool) -> tuple[Any, Any]:
    """Runtime, which must live as long, and engine.

    Raises:
        InputError: If TensorRT does not load it.
    """
    runtime = made(trt.Runtime, trt)
    if version_compatible:
        runtime.engine_host_code_allowed = True  # such an engine brings the runtime of its own version
    engine = runtime.deserialize_cuda_engine(contents)
    if engine is None:
        raise InputError(f"TensorRT {trt.__version__} does not load the engine{said()}: rebuild it")
    return runtime, engine


def tensors_of(trt: Any, engine: Any) -> tuple[list[TensorInfo], list[TensorInfo]]:
    """Inputs and outputs of an engine.

    Raises:
        InputError: If the runner cannot serve one.
    """
    inputs: list[TensorInfo] = []
    outputs: list[TensorInfo] = []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        kind = engine.get_tensor_dtype(name).name
        if kind not in _DTYPES:
            raise InputError(f"{name} of the engine is {kind}, one of {', '.join(_DTYPES)} is expected")
        # Its values would be wanted on the host, and in the profiles.
        if engine.is_shape_inference_io(name):
            raise InputError(f"{name} decides on shapes inside the graph, which engines of this package must not have")
        info = TensorInfo(name, _DTYPES[kind], tuple(engine.get_tensor_shape(name)))
        (inputs if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else outputs).append(info)
    return inputs, outputs
