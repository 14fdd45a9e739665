"""TensorRT itself, where there is one and a GPU: engines of the model that comes with the package."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

import spkfast
from spkfast.errors import InputError
from spkfast.export.tensorrt import Profile, TensorRTGraph, build_tensorrt, trtexec_command
from spkfast.export.tensorrt_graph import load_tensorrt, log_of
from tests.fixtures import tensorrt_graphs

pytestmark = pytest.mark.tensorrt
PROFILES = [Profile((1, 1, 1), (0, 1, 4)), Profile((2, 4, 8), (0, 1, 4))]


@pytest.fixture(scope="module", autouse=True)
def _tensorrt(require: Callable[[str, bool, str], None]) -> None:
    require("tensorrt", importlib.util.find_spec("tensorrt") is not None, "the package tensorrt is not installed")
    require("tensorrt", torch.cuda.is_available(), "torch finds no CUDA device")


def export(folder: Path, inputs: str, precision: str) -> Path:
    from spkfast.export import to_onnx

    path = folder / f"{inputs}-{precision}.onnx"
    noise = np.random.default_rng(0).standard_normal((20, 16000)).astype(np.float32) * 0.1
    settings: dict[str, Any] = {"calibration": list(noise), "target": "tensorrt"} if precision == "int8" else {}
    encoder = spkfast.SpeakerEncoder.load("ecapa-mini", device="cpu")
    to_onnx(encoder, path, inputs=inputs, precision=precision, **settings)  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
@pytest.mark.parametrize("inputs", ["waveform", "features"])
def test_engines_give_the_embeddings_of_onnxruntime(tmp_path: Path, inputs: str, precision: str) -> None:
    """Which also asks that ``lengths`` is no shape tensor, and stays int64."""
    reference = export(tmp_path, inputs, "fp32")
    path = reference if precision == "fp32" else export(tmp_path, inputs, precision)
    # onnxruntime on a CPU has no bf16 convolutions.
    other = reference if precision == "bf16" else None
    report = build_tensorrt(path, tmp_path / "model.plan", profiles=PROFILES, reference=other)
    assert report.parity and report.facts["precision"] == precision
    print(f"{inputs} {precision}: {report.build_seconds:.0f} s, {report.engine_bytes} B", *report.parity, sep="\n  ")


def test_rows_do_not_depend_on_padding_or_on_graphs(tmp_path: Path) -> None:
    path = export(tmp_path, "waveform", "fp32")
    build_tensorrt(path, tmp_path / "model.plan", profiles=PROFILES, validate=False)
    graph = TensorRTGraph(tmp_path / "model.plan", onnx_path=path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    for lengths in ([400], [64000], [5000, 400, 30000], [20000] * 5, [8000, 7999], [64000] * 8):
        x = 0.1 * torch.randn(len(lengths), max(lengths), generator=generator)
        feed = {"waveform": x.numpy(), "lengths": np.array(lengths)}
        want = torch.from_numpy(session.run(None, feed)[0])
        inputs = {"waveform": x.cuda(), "lengths": torch.tensor(lengths).cuda()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        for _ in range(3):  # directly, captured, replayed
            with torch.cuda.stream(stream):
                got = graph(inputs).cpu()
            assert (got - want).norm(dim=1).div(want.norm(dim=1)).max() < 1e-3
    with pytest.raises(InputError, match="lies in no profile"):
        graph({"waveform": torch.zeros(9, 400), "lengths": torch.full((9,), 400)})


def test_timings_are_used_again(tmp_path: Path) -> None:
    path = export(tmp_path, "features", "fp16")
    reports = [
        build_tensorrt(path, tmp_path / "model.plan", timing_cache=tmp_path / "cache", validate=False) for _ in range(2)
    ]
    assert reports[0].timing_cache is not None and reports[0].timing_cache.stat().st_size > 0
    print(*(f"{report.build_seconds:.1f} s" for report in reports))


def test_what_the_parser_does_not_know_is_named(tmp_path: Path) -> None:
    import onnx

    path = tensorrt_graphs.write(tmp_path / "model.onnx")
    model = onnx.load(path)
    model.graph.node[0].op_type, model.graph.node[0].domain = "Unheard", "spkfast"
    model.opset_import.append(onnx.helper.make_opsetid("spkfast", 1))
    onnx.save(model, path)
    with pytest.raises(InputError, match="Unheard"):
        build_tensorrt(path, tmp_path / "model.plan", validate=False)
    assert not (tmp_path / "model.plan").exists()


def test_the_library_has_a_logger(tmp_path: Path) -> None:
    trt = load_tensorrt()
    assert isinstance(log_of(trt), trt.ILogger)
    assert trtexec_command(export(tmp_path, "waveform", "fp32"), "model.plan")[0] == "trtexec"
