"""What is said of an ONNX file that onnxruntime has no operators for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spkfast import InputError
from spkfast.export.runners import OnnxGraph

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


@pytest.mark.parametrize("kind", ["BFLOAT16", "DOUBLE"])
@pytest.mark.parametrize("device", [None, "cpu", "cuda"])
def test_bfloat16_is_named_where_it_is_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str | None, kind: str
) -> None:
    element = getattr(onnx.TensorProto, kind)
    signal, output = (onnx.helper.make_tensor_value_info(name, element, ["B", 1, "S"]) for name in ("x", "y"))
    weight = onnx.helper.make_tensor("weight", element, [1, 1, 3], [1.0, 2.0, 3.0])
    node = onnx.helper.make_node("Conv", ["x", "weight"], ["y"])
    graph = onnx.helper.make_graph([node], "convolution", [signal], [output], [weight])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 22)], ir_version=10)
    onnx.save(model, tmp_path / "model.onnx")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(InputError, match="NOT_IMPLEMENTED") as caught:
        OnnxGraph(tmp_path / "model.onnx", None if device is None else torch.device(device))
    assert ("on a CPU it has no operators of bfloat16" in str(caught.value)) == (
        kind == "BFLOAT16" and device != "cuda"
    )
