"""Makers of contenders for exported graphs; each runs in a worker and imports its runtime alone.

``folder`` holds the model, its graphs, and ``waveform.npz``, ``features.npz`` and ``products.npz``: what graphs of that
kind are called with, by the name of the input.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers import contenders
from benchmarks.peers.worker import Contender

MODEL = "model"


def native(folder: Path, precision: str, threads: int) -> Contender:
    """The engine of this project: a waveform in, its embedding out."""
    import torch

    from spkfast import SpeakerEncoder

    torch.set_num_threads(threads)
    encoder = SpeakerEncoder.load(folder / MODEL, device="cpu", precision=precision)
    (waveform,) = _inputs(folder, "waveform")["waveform"]
    call = functools.partial(encoder.embed, waveform)
    return Contender(call, call()[None].numpy())


def onnxruntime(folder: Path, graph: str, inputs: str, threads: int) -> Contender:
    """A graph in onnxruntime's CPU provider."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(str(folder / graph), options, providers=["CPUExecutionProvider"])
    signals = _inputs(folder, inputs)
    call = functools.partial(session.run, None, {node.name: signals[node.name] for node in session.get_inputs()})
    return Contender(call, call()[0])


def openvino(folder: Path, graph: str, inputs: str, threads: int) -> Contender:
    """A graph in OpenVINO's CPU plugin, for the least latency; of float32 it makes nothing less, see its hint."""
    import openvino

    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(folder / graph), "CPU", settings)
    request = compiled.create_infer_request()
    signals = _inputs(folder, inputs)
    for node in compiled.inputs:
        request.set_tensor(node, openvino.Tensor(signals[node.any_name], shared_memory=True))

    # The request reads the memory of the inputs, but does not keep it.
    def run(kept: dict[str, NDArray[np.generic]] = signals) -> NDArray[np.float32]:
        request.infer()
        return request.get_output_tensor(0).data

    return Contender(run, run().copy(), contenders._executed(compiled))


def _inputs(folder: Path, kind: str) -> dict[str, NDArray[np.generic]]:
    with np.load(folder / f"{kind}.npz") as arrays:
        return dict(arrays)
