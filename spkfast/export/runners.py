"""Exported graphs as networks: what :meth:`spkfast.SpeakerEncoder.load` makes of an ONNX file or an engine."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from spkfast.errors import InputError
from spkfast.frontends import FrontendSpec, require_spec
from spkfast.frontends import frontend as preset
from spkfast.models.checkpoint_files import fitting_preset


class Graph(Protocol):
    """An exported graph that can be called; with limits it has ``max_batch`` and ``max_samples``, too.

    Where its float32 products may have fewer digits, ``full_float32`` says whether they have all.

    Attributes:
        metadata: What the file says of itself.
        inputs: Names of its inputs.
        device: Where its inputs are taken and its output lies.
    """

    metadata: Mapping[str, str]
    inputs: tuple[str, ...]
    device: torch.device

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The output, of inputs by name."""


class GraphNetwork(nn.Module):
    """An exported graph in place of a network; it has no weights of its own.

    Args:
        graph: The graph.
        digest: Of the file, hexadecimal.

    Attributes:
        takes_waveforms: Whether it holds its front-end.
        embedding_dim: Size E of the embedding, 0 where the file does not tell.
        precision: What it multiplies.
        fingerprint: As :attr:`spkfast.SpeakerEncoder.fingerprint`: at ``fp32`` that of the model it was exported from,
            whose embeddings it gives.
        max_batch: Most rows of a batch, or None.
        max_samples: Most samples of a row, or None.
        device: Where it runs.
    """

    def __init__(self, graph: Graph, digest: str) -> None:
        super().__init__()
        facts = graph.metadata
        self.graph, self.device = graph, graph.device
        self.takes_waveforms = "waveform" in graph.inputs
        self.embedding_dim = int(facts.get("embedding_dim", 0))
        self.precision = facts.get("precision", "fp32")
        self.max_batch: int | None = getattr(graph, "max_batch", None)
        self.max_samples: int | None = getattr(graph, "max_samples", None)
        model, full = facts.get("model_hash", ""), self.precision == "fp32" and getattr(graph, "full_float32", True)
        self.fingerprint = model if model and full else digest[:16]
        self._min_size = int(facts.get("min_samples", 1)) if self.takes_waveforms else 1

    def forward(self, signal: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Embeddings (B, E), float32.

        Args:
            signal: Samples (B, S) or features (B, T, M), float32.
            lengths: Real samples, or frames, per row, int64, 0 to S, shape (B,); None where all are.

        Raises:
            InputError: If the batch is shorter than the graph takes.
        """
        if signal.shape[1] < self._min_size:
            raise InputError(f"the graph takes at least {self._min_size} samples, got {signal.shape[1]}")
        names = self.graph.inputs
        if names == ("waveform", "lengths", "longest"):
            rows = [signal.shape[1]] * len(signal) if lengths is None else lengths.tolist()
            flat = torch.cat([row[:length] for row, length in zip(signal, rows, strict=True)])
            return self._call((flat, torch.tensor(rows, dtype=torch.int32), signal.new_zeros(signal.shape[1])))
        if len(names) == 2:
            if lengths is None:
                lengths = torch.full((len(signal),), signal.shape[1], device=signal.device)
            return self._call((signal, lengths))
        if lengths is None or bool((lengths == signal.shape[1]).all()):
            return self._call((signal,))
        # Without lengths only rows of one length share a batch.
        found: dict[int, Tensor] = {}
        for length in set(lengths.tolist()):
            rows = [i for i, other in enumerate(lengths.tolist()) if other == length]
            found |= zip(rows, self._call((signal[rows, :length],)), strict=True)
        return torch.stack([found[i] for i in range(len(signal))])

    def _call(self, values: tuple[Tensor, ...]) -> Tensor:
        tensors = [value.contiguous().to(self.device) for value in values]
        return self.graph(dict(zip(self.graph.inputs, tensors, strict=True)))

    def extra_repr(self) -> str:
        """What tells two graphs apart at a glance."""
        return f"inputs={self.graph.inputs}, precision={self.precision}, fingerprint={self.fingerprint}"


class OnnxGraph:
    """An ONNX file in onnxruntime.

    Args:
        path: The file.
        device: ``cpu``, or ``cuda``, which needs the package onnxruntime-gpu; None takes the CPU.
        threads: Of one operator on the CPU; None takes as many as torch does.

    Attributes:
        max_batch: 1 where the file takes one utterance at a time, else None.

    Raises:
        InputError: If onnxruntime is missing or does not read the file, or has no such device, or the file takes
            utterances of one length, or batches of one size that is not 1.
    """

    def __init__(
        self, path: str | os.PathLike[str], device: torch.device | None, *, threads: int | None = None
    ) -> None:
        if importlib.util.find_spec("onnxruntime") is None:
            raise InputError(f"{path}: running it needs the package 'onnxruntime': pip install onnxruntime")
        import onnxruntime

        providers: list[Any] = ["CPUExecutionProvider"]
        if device is not None and device.type == "cuda":
            if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
                raise InputError(f"{path}: device 'cuda' needs onnxruntime-gpu, this onnxruntime has none")
            # TensorFloat-32 would ruin the front-end.
            providers = [("CUDAExecutionProvider", {"device_id": device.index or 0, "use_tf32": 0}), *providers]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads() if threads is None else threads
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(os.fspath(path), options, providers=providers)
        except Exception as error:  # onnxruntime's own classes have no common one
            lacking = len(providers) == 1 and "NOT_IMPLEMENTED" in str(error) and _has_bfloat16(path)
            hint = "; on a CPU it has no operators of bfloat16" if lacking else ""
            raise InputError(f"{path}: onnxruntime cannot load it{hint}: {' '.join(str(error).split())}") from error
        self._path = path
        self.metadata: Mapping[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)
        self.inputs = tuple(node.name for node in self._session.get_inputs())
        self.device = torch.device("cpu")  # of what it takes and gives; it copies by itself
        rows, size = (*self._session.get_inputs()[0].shape, None, None)[:2]  # numbers where they are fixed
        if isinstance(size, int):
            raise InputError(f"{path}: takes utterances of one length only, {size}; export it with that axis free")
        if isinstance(rows, int) and rows != 1:
            raise InputError(f"{path}: takes batches of {rows} only; export it with that axis free")
        self.max_batch: int | None = rows if isinstance(rows, int) else None

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The first output, of inputs by name."""
        try:
            found = self._session.run(None, {name: value.numpy() for name, value in inputs.items()})
        except Exception as error:  # onnxruntime's own classes have no common one
            raise InputError(f"{self._path}: onnxruntime: {' '.join(str(error).split())}") from error
        return torch.from_numpy(found[0])


def _has_bfloat16(path: str | os.PathLike[str]) -> bool:
    """Whether a file has weights of bfloat16; False where the package onnx is not there to tell."""
    if importlib.util.find_spec("onnx") is None:
        return False
    import onnx

    weights = onnx.load(path, load_external_data=False).graph.initializer
    return any(weight.data_type == onnx.TensorProto.BFLOAT16 for weight in weights)


def _tensorrt(path: Path, device: torch.device | None) -> Graph:
    place = torch.device("cuda") if device is None else device
    graph: Graph = importlib.import_module("spkfast.export.tensorrt").TensorRTGraph(path, device=place)
    return graph


def _aotinductor(path: Path, device: torch.device | None) -> Graph:
    graph: Graph = importlib.import_module("spkfast.export.aotinductor").AotGraph(path, device=device)
    return graph


# By suffix; each takes the path and the device.
RUNNERS: dict[str, Callable[[Path, torch.device | None], Graph]] = {
    ".onnx": OnnxGraph,
    ".engine": _tensorrt,
    ".plan": _tensorrt,
    ".pt2": _aotinductor,
}


def load_graph(
    path: Path, device: torch.device | None, frontend: FrontendSpec | str | None
) -> tuple[GraphNetwork, FrontendSpec, dict[str, Any] | None]:
    """A file of a suffix in :data:`RUNNERS` as a network, its front-end, and its threshold as the metadata have it.

    Args:
        path: The file.
        device: Where to run it; None for where it was made to run.
        frontend: What the front-end is expected to be; that of features whose file does not tell.

    Raises:
        InputError: If the file does not load, has other inputs than graphs of this package or one of features, tells
            another front-end than expected, or none.
    """
    graph = RUNNERS[path.suffix](path, device)
    names = graph.inputs
    known = {("waveform",), ("waveform", "lengths"), ("waveform", "lengths", "longest"), ("feats", "lengths")}
    if names not in known and len(names) != 1:
        raise InputError(f"{path}: has the inputs {', '.join(names)}; a graph of one input or of spkfast has others")
    facts = graph.metadata
    spec = None
    if "frontend" in facts:
        try:
            spec = FrontendSpec.from_dict(json.loads(facts["frontend"]))
        except (TypeError, ValueError) as error:
            raise InputError(f"{path}: damaged: front-end: {error}") from error
        if spec.hash != facts.get("spec_hash"):
            raise InputError(f"{path}: damaged: spec_hash is {facts.get('spec_hash')}, its front-end gives {spec.hash}")
    if isinstance(frontend, str):
        frontend = preset(frontend) if spec is None else fitting_preset(frontend, spec.output_size)
    if spec is None and frontend is None:
        raise InputError(
            f"{path}: does not tell its front-end; name it in Python: load(..., frontend='wespeaker'), say"
        )
    if spec is not None and frontend is not None and frontend.hash != spec.hash:
        raise InputError(f"{path}: front-end differs from that of the caller: {spec.difference(frontend)}")
    spec = frontend if spec is None else spec
    assert spec is not None
    require_spec(spec)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    try:
        threshold = json.loads(facts["threshold"]) if "threshold" in facts else None
        if threshold is not None:
            threshold = {"value": float(threshold["value"]), "list": str(threshold["list"])}
        return GraphNetwork(graph, digest), spec, threshold
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: damaged metadata: {error}") from error
