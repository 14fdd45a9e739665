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
    from torch import Tensor, nn

# Of training steps. So small a rate leaves weights and gradients, however often a step is timed, what they were.
_RATE = 1e-6
_SHARPNESS = 32.0


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


def spkfast_training(folder: Path, channels: int, precision: str, threads: int) -> Contender:
    """A training step of the network of this project, under autocast for bf16; see :func:`_training_step`."""
    import torch

    from spkfast import models

    torch.set_num_threads(threads)
    net = models.create("ecapa_tdnn", channels=channels)
    return _training_step(folder, net, net, precision)


def torch_training(
    folder: Path, channels: int, precision: str, *, once: bool, compiled: bool, threads: int
) -> Contender:
    """A training step of the plain network, under autocast for bf16; see :func:`_training_step`.

    Args:
        folder: Holds the weights and the batch.
        channels: Channels of stem and blocks.
        precision: ``fp32`` or ``bf16``.
        once: Whether the attention's context is multiplied once; see :class:`benchmarks.peers.ecapa.Ecapa`.
        compiled: Whether torch.compile makes the network of it.
        threads: Threads of torch.
    """
    import torch

    from benchmarks.peers import ecapa

    torch.set_num_threads(threads)
    net = ecapa.Ecapa(channels, context_once=once)
    return _training_step(folder, net, torch.compile(net) if compiled else net, precision)


def training_products(batch: int, frames: int, channels: int, precision: str, threads: int) -> Contender:
    """The bare matrix products of a training step by torch.mm, each with operands of its own.

    After all products of the forward pass come those of the gradients of weight and input, from the last layer to the
    first, whose input needs none. Operands lie as a network has them: frames in rows, weights (N, K).

    Args:
        batch: Utterances.
        frames: Frames of each.
        channels: Channels of stem and blocks.
        precision: ``fp32`` or ``bf16``.
        threads: Threads of torch.
    """
    import torch

    from benchmarks.peers import ecapa

    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    forward: list[tuple[Tensor, Tensor]] = []
    backward: list[tuple[Tensor, Tensor]] = []
    for m, k, n in ecapa.products(batch, frames, channels):
        x, w, grad = (torch.randn(shape, generator=generator).to(dtype) for shape in ((m, k), (n, k), (m, n)))
        if forward:
            backward.append((grad, w))
        forward.append((x, w.T))
        backward.append((grad.T, x))
    pairs = [*forward, *reversed(backward)]

    @torch.inference_mode()
    def run() -> None:
        for a, b in pairs:
            torch.mm(a, b)

    run()
    return Contender(run)


def training_loss(embeddings: Tensor, directions: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of cosines with fixed directions, as sharp as margin heads have them; in float32 or wider.

    Args:
        embeddings: Shape (B, E).
        directions: One of length 1 for each class, shape (N, E).
        labels: Class of each row, int64 (B,).
    """
    import torch
    from torch.nn import functional as F

    wide = torch.promote_types(embeddings.dtype, torch.float32)
    cosines = F.normalize(embeddings.to(wide)) @ directions.to(wide).T
    return F.cross_entropy(_SHARPNESS * cosines, labels)


def loss_and_gradients(net: nn.Module, loss: Tensor) -> Tensor:
    """The loss and, one after the other by name, its gradients for all parameters of the network, which had none."""
    import torch

    loss.backward()
    gradients = [value.grad for _, value in sorted(net.named_parameters())]
    return torch.cat([loss.detach()[None], *(value.flatten() for value in gradients if value is not None)])


def _training_step(folder: Path, net: nn.Module, embed: Callable[[Tensor], Tensor], precision: str) -> Contender:
    """Forward and backward pass and a step of SGD with momentum; the output is that of :func:`loss_and_gradients`.

    ``folder`` holds ``weights.pt`` and ``batch.pt``: features (B, T, 80) and the arguments of :func:`training_loss`.
    """
    import torch

    weights = torch.load(folder / "weights.pt")
    features, directions, labels = torch.load(folder / "batch.pt")
    net.load_state_dict(weights)
    net.train()

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            embeddings = embed(features)
        return training_loss(embeddings, directions, labels)

    output = loss_and_gradients(net, loss()).numpy()
    # Steps start from where the check did, which has moved the running statistics.
    net.zero_grad()
    net.load_state_dict(weights)
    optimizer = torch.optim.SGD(net.parameters(), lr=_RATE, momentum=0.9, fused=False)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return Contender(step, output)
