"""Makers of contenders for whole-network inference; each runs in a worker and imports its runtime alone.

``folder`` holds ``weights.pt``, ``features.pt``, ``calibration.pt`` and the graphs of :mod:`benchmarks.peers.graphs`.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.worker import Contender

if TYPE_CHECKING:
    from torch import Tensor


def spkfast(folder: Path, channels: int, precision: str, threads: int) -> Contender:
    """The network of this project at a precision of inference."""
    import torch

    from spkfast import models, nn

    torch.set_num_threads(threads)
    net = models.create("ecapa_tdnn", channels=channels).eval()
    net.load_state_dict(torch.load(folder / "weights.pt"))
    if precision == "int8":
        nn.calibrate(net, list(torch.load(folder / "calibration.pt")))
    nn.set_precision(net, precision)

    @torch.inference_mode()
    def embed(features: Tensor) -> Tensor:
        return net(features)

    return _of_torch(embed, torch.load(folder / "features.pt"))


def torch_eager(folder: Path, channels: int, precision: str, threads: int) -> Contender:
    """The plain network; for bf16 under autocast, as its users run it."""
    return _plain(folder, channels, precision, threads, lambda net: net)


def torch_compile(folder: Path, channels: int, precision: str, threads: int) -> Contender:
    """The plain network compiled with its weights frozen in."""
    import torch
    from torch._inductor import config

    config.freezing = True
    return _plain(folder, channels, precision, threads, torch.compile)


def onnxruntime(folder: Path, graph: str, threads: int) -> Contender:
    """A graph in onnxruntime's CPU provider."""
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(str(folder / graph), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: torch.load(folder / "features.pt").numpy()}
    call = functools.partial(session.run, None, feed)
    return Contender(call, call()[0])


def openvino(folder: Path, graph: str, precision: str, threads: int) -> Contender:
    """A graph in OpenVINO's CPU plugin, for the least latency."""
    import openvino
    import torch

    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision}
    compiled = openvino.Core().compile_model(str(folder / graph), "CPU", settings)
    request = compiled.create_infer_request()
    features = torch.load(folder / "features.pt").numpy()
    request.set_input_tensor(openvino.Tensor(features, shared_memory=True))

    # The request reads the memory of the features, but does not keep it.
    def run(kept: NDArray[np.float32] = features) -> NDArray[np.float32]:
        request.infer()
        return request.get_output_tensor().data

    return Contender(run, run().copy(), _executed(compiled))


def products(batch: int, frames: int, channels: int, form: str, threads: int) -> Contender:
    """The bare matrix products of the network one after the other, each with operands of its own.

    Args:
        batch: Utterances.
        frames: Frames of each.
        channels: Channels of stem and blocks.
        form: ``mm`` for torch.mm in fp32; ``fp32``, ``bf16`` or ``int8`` for oneDNN with packed weights.
        threads: Threads of torch.
    """
    import torch

    from benchmarks.peers import ecapa

    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    multiply: Callable[[Any, Any], Tensor]
    calls = []
    for m, k, n in ecapa.products(batch, frames, channels):
        if form == "int8":
            x = torch.randint(0, 256, (m, k), dtype=torch.uint8, generator=generator)
            w = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=generator)
            packed = torch.ops.onednn.qlinear_prepack(w, [m, k])
            scales, zeros = torch.full((n,), 0.01), torch.zeros(n, dtype=torch.int32)
            multiply = functools.partial(
                torch.ops.onednn.qlinear_pointwise, x, 0.01, 0, packed, scales, zeros, None, 1.0, 0, torch.uint8,
                "none", [], "",
            )  # fmt: skip
        else:
            dtype = torch.bfloat16 if form == "bf16" else torch.float32
            x, w = (torch.randn(shape, generator=generator).to(dtype) for shape in ((m, k), (n, k)))
            if form == "mm":
                multiply = functools.partial(torch.mm, x, w.T.contiguous(), out=torch.empty(m, n))
            else:
                packed = torch.ops.mkldnn._reorder_linear_weight(w, m)
                multiply = functools.partial(torch.ops.mkldnn._linear_pointwise, x, packed, None, "none", [], "")
        calls.append(multiply)

    @torch.inference_mode()
    def run() -> None:
        for call in calls:
            call()

    run()
    return Contender(run)


def _plain(
    folder: Path, channels: int, precision: str, threads: int, prepare: Callable[[Any], Callable[[Tensor], Tensor]]
) -> Contender:
    import torch

    from benchmarks.peers import ecapa

    torch.set_num_threads(threads)
    net = ecapa.Ecapa(channels).eval()
    net.load_state_dict(torch.load(folder / "weights.pt"))
    prepared = prepare(net)

    @torch.no_grad()  # freezing refuses inference mode
    def embed(features: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return prepared(features)

    return _of_torch(embed, torch.load(folder / "features.pt"))


def _of_torch(embed: Callable[[Tensor], Tensor], features: Tensor) -> Contender:
    output = embed(features)
    return Contender(functools.partial(embed, features), output.float().numpy().astype(np.float32))


def _executed(compiled: Any) -> str:
    """In which precision OpenVINO says that it runs products."""
    infos = [op.get_rt_info() for op in compiled.get_runtime_model().get_ops()]
    kinds = collections.Counter(
        info["runtimePrecision"].astype(str)
        for info in infos
        if info["layerType"].astype(str) in ("Convolution", "FullyConnected")
    )
    return "products run in " + ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common())
