"""Networks replayed from CUDA graphs, one for each size that batches are padded to."""

from __future__ import annotations

import contextlib
import operator
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from spkfast.errors import InputError
from spkfast.nn.inference import KernelModule, _can_run_kernels, _Inside, inference_layers

_WARM_UP = 3
_version = operator.attrgetter("_version")


class CudaGraphs:
    """Calls a network by replaying CUDA graphs, which saves the launches: most of the time of a small batch.

    A batch is padded to the next power of two of rows and the next multiple of ``frames_step`` of frames, and the graph
    of that size replayed; the first batch of a size captures its graph. Padding changes no result, as each row of these
    networks is computed as if it were alone. The network itself runs where graphs do not apply: beyond the limits,
    elsewhere than on a GPU, in training mode, where a gradient is wanted, with hooks, parametrizations or modules with
    a ``forward`` of their own, and while torch.compile or a capture of the caller's look.

    Graphs are dropped once weights were changed, replaced or moved, or the precision was set; changes that torch does
    not count are seen as :class:`spkfast.nn.inference.InferenceLayer` sees them, after ``train`` or ``eval``. Settings
    that choose kernels of torch itself, as tf32, stay those of the capture until :meth:`clear`. Several threads and
    streams may call; calls follow one another. Copies and pickles have no graphs yet.

    Args:
        net: Network (B, T, M), lengths to (B, E) of :mod:`spkfast.models`, made with ``padding='exact'``.
        max_batch: Most rows of a graph.
        max_frames: Most frames of a graph.
        frames_step: What frames are padded to a multiple of, up to ``max_frames``.
        max_graphs: Most graphs; the least recently used one goes first. They share the memory of what lies between
            input and output.

    Attributes:
        net: The network.

    Raises:
        InputError: If a limit is no positive integer, or rows of the network depend on their padding.
    """

    def __init__(
        self,
        net: nn.Module,
        max_batch: int = 64,
        max_frames: int = 2000,
        frames_step: int = 50,
        max_graphs: int = 32,
    ) -> None:
        self._limits = {"max_batch": max_batch, "max_frames": max_frames, "frames_step": frames_step}
        self._limits["max_graphs"] = max_graphs
        for name, value in self._limits.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{name} must be a positive integer, got {value!r}")
        if getattr(getattr(net, "encoder", None), "exact", False) is not True:
            raise InputError(
                "net must be a network of spkfast.models with padding='exact', whose rows do not depend on their "
                f"padding, got {type(net).__name__}"
            )
        self.net = net
        # Inside another module, so that the network itself is looked at like the modules in it.
        self._around = nn.ModuleList([net])
        self._inside = _Inside(self._around)
        self._layers = list(inference_layers(net).values())
        self._state: list[Any] = []
        self._held: list[Tensor] = []
        self._graphs: dict[_Bucket, _Graph] = {}
        self._lock = threading.Lock()
        self._gpu = _Gpu()

    def __call__(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Embeddings (B, E), as the network gives them.

        Args:
            features: Shape (B, T, M).
            lengths: Frames per row, int64, 0 to T, shape (B,); None where all T are real.

        Raises:
            InputError: As the network.
        """
        bucket = self._bucket(features, lengths)
        if bucket is not None:
            with self._lock:
                if self._can_replay(features):
                    return self._replay(bucket, features, lengths)
        return cast(Tensor, self.net(features, lengths))

    def __len__(self) -> int:
        """How many graphs there are."""
        return len(self._graphs)

    def clear(self) -> None:
        """Drops all graphs."""
        with self._lock:
            self._drop()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.net, *self._limits.values())

    def _bucket(self, features: Tensor, lengths: Tensor | None) -> _Bucket | None:
        """The graph for such inputs; None where there can be none, be it because the network will refuse them."""
        if torch.compiler.is_compiling() or not isinstance(features, Tensor) or features.ndim != 3:
            return None
        batch, frames, size = features.shape
        device, limits = features.device, self._limits
        if (
            not 0 < batch <= limits["max_batch"]
            or not 0 < frames <= limits["max_frames"]
            or size != cast(Any, self.net.encoder).feature_dim
            or not _can_run_kernels(features)
            or not self._gpu.captures_on(device)
        ):
            return None
        if lengths is not None and (
            type(lengths) is not Tensor
            or (lengths.dtype, lengths.shape, lengths.device) != (torch.int64, features.shape[:1], device)
        ):
            return None
        rows = min(1 << (batch - 1).bit_length(), limits["max_batch"])
        padded = min(-(-frames // limits["frames_step"]) * limits["frames_step"], limits["max_frames"])
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        ragged = lengths is not None or padded != frames
        return _Bucket((rows, padded, size), ragged, features.dtype, device, autocast)

    def _can_replay(self, features: Tensor) -> bool:
        """Whether graphs can stand for the network as it is now; drops those that were of another one."""
        if self._inside.changed():
            self._inside = _Inside(self._around)
            self._layers = list(inference_layers(self.net).values())
        inside = self._inside
        if inside.unknown is not None or inside.is_watched(evaluating=True):
            return False
        if inside.tensors[0].device != features.device:
            return False
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (features, *inside.tensors)):
            return False
        if self._state != self._state_now():
            self._drop()
        return True

    def _state_now(self) -> list[Any]:
        """What the network computes with."""
        tensors = self._inside.tensors
        of_layers = [(layer.precision, layer.input_ranges, layer.kept) for layer in self._layers]
        return [self._inside, *map(_version, tensors), *map(Tensor.data_ptr, tensors), *of_layers]

    def _drop(self) -> None:
        self._gpu.finish()
        self._graphs, self._held, self._state = {}, [], []

    def _replay(self, bucket: _Bucket, features: Tensor, lengths: Tensor | None) -> Tensor:
        graph = self._graphs.pop(bucket, None)
        if graph is None:
            if len(self._graphs) == self._limits["max_graphs"]:
                self._gpu.finish()
                del self._graphs[next(iter(self._graphs))]
            graph = self._capture(bucket)
        self._graphs[bucket] = graph  # the last one used
        batch, frames, _ = features.shape
        with self._gpu.in_order(bucket.device):
            # Spare rows and frames keep what was there: no row sees another one, and none what lies beyond its length.
            graph.features[:batch, :frames].copy_(features)
            if graph.lengths is not None:
                graph.lengths[batch:].fill_(1)
                if lengths is None:
                    graph.lengths[:batch].fill_(frames)
                else:  # a length above T would reach into spare frames
                    torch.clamp(lengths, 0, frames, out=graph.lengths[:batch])
            graph.captured.replay()
            return graph.output[:batch].clone()

    def _capture(self, bucket: _Bucket) -> _Graph:
        beside = next((graph.captured for graph in self._graphs.values()), None)
        with (
            # What inference mode makes cannot be written outside of it.
            torch.inference_mode(False),
            torch.no_grad(),
            # Weights that autocast converts and keeps would be freed where autocast ends.
            torch.autocast(
                bucket.device.type, bucket.autocast, enabled=bucket.autocast is not None, cache_enabled=False
            ),
        ):
            features = torch.zeros(bucket.shape, dtype=bucket.dtype, device=bucket.device)
            rows = bucket.shape[0]
            lengths = torch.ones(rows, dtype=torch.int64, device=bucket.device) if bucket.ragged else None
            captured, output = self._gpu.capture(self.net, (features, lengths), beside)
        # While graphs hold what they read, nothing new can lie in the same places.
        self._held = [value for tensor in self._inside.tensors for value in (tensor, tensor.detach())]
        self._state = self._state_now()
        return _Graph(features, lengths, output, captured, self._packed())

    def _packed(self) -> list[Any]:
        """What the kernels read beside the tensors of the network."""
        network = [self.net] if isinstance(self.net, KernelModule) else []
        return [part.kept._last for part in (*network, *self._layers)]


class _Bucket(NamedTuple):
    """What calls must have in common to share a graph: shape (B, T, M), and whether there are lengths."""

    shape: tuple[int, int, int]
    ragged: bool
    dtype: torch.dtype
    device: torch.device
    autocast: torch.dtype | None


class _Graph(NamedTuple):
    """A graph with the tensors that it reads and writes, and the packed weights that it reads."""

    features: Tensor
    lengths: Tensor | None
    output: Tensor
    captured: Any
    packed: list[Any]


class _Gpu:
    """What needs a GPU: to capture, and to replay in order on whatever streams, as graphs share their memory."""

    def __init__(self) -> None:
        self._last: torch.cuda.Event | None = None

    def captures_on(self, device: torch.device) -> bool:
        """Whether there are graphs on a device, and none is being captured around the call."""
        return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()

    def capture(self, net: nn.Module, inputs: tuple[Tensor, Tensor | None], beside: Any) -> tuple[Any, Tensor]:
        """A graph of a call, in the memory of another graph where there is one, and where it writes its result."""
        with torch.cuda.device(inputs[0].device):
            net(*inputs)  # packs weights on the stream that will go on using them
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    net(*inputs)
            graph = torch.cuda.CUDAGraph()
            pool = None if beside is None else beside.pool()
            # What other threads do meanwhile is not part of it.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                output = net(*inputs)
        return graph, output

    @contextlib.contextmanager
    def in_order(self, device: torch.device) -> Iterator[None]:
        """What is launched inside follows all that was launched inside before."""
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream()
            if self._last is not None:
                stream.wait_event(self._last)
            try:
                yield
            finally:
                self._last = stream.record_event()

    def finish(self) -> None:
        """Waits for replays, after which graphs can go."""
        if self._last is not None:
            self._last.synchronize()
