"""Changes to a finished ONNX graph: names of nodes, quantised products, half precision on runtimes without it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch

from spkfast.ops._packing import Range
from spkfast.reference.tdnn_layer import quantised_weight, quantiser

Target = Literal["cpu", "tensorrt"]
TARGETS = ("cpu", "tensorrt")
_SCOPES = "pkg.torch.onnx.name_scopes"


def tidy(model: Any) -> None:
    """Names nodes by the module they come from, and drops what the exporter noted for itself: stacks, paths, shapes."""
    counts: dict[str, int] = {}
    scope = "graph"
    for node in model.graph.node:
        scopes = [prop.value for prop in node.metadata_props if prop.key == _SCOPES]
        # What the exporter's optimiser made has none of its own: it stands where it was made from.
        scope = _scope(scopes[0]) if scopes else scope
        stem = f"{scope}/{node.op_type}"
        counts[stem] = counts.get(stem, -1) + 1
        node.name = f"{stem}_{counts[stem]}"
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        del value.metadata_props[:]
        value.doc_string = ""
    del model.graph.value_info[:]
    del model.graph.metadata_props[:]
    model.graph.doc_string = ""
    model.graph.name = "spkfast"


def quantise(model: Any, ranges: Mapping[str, Range], peaks: Mapping[str, float], target: Target) -> None:
    """Multiplies in int8 by explicit quantisation.

    Activations have one scale a tensor: unsigned bytes with a zero point for a CPU, signed ones around zero for
    TensorRT. Weights are signed bytes with one scale a channel of the output. Runtimes on a CPU multiply bytes only
    where the product is made bytes, too: for them the output of the ReLU after it is.

    Args:
        model: Graph in float32.
        ranges: Smallest and largest input of a convolution by the name of its weight; the others stay as they are.
        peaks: Largest output of the ReLU after it by the same name; where it is missing that stays float32.
        target: ``cpu`` or ``tensorrt``.
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    nodes, done = [], set()
    products = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "Conv"}
    for node in graph.node:
        if node.op_type == "Relu" and products.get(node.input[0]) in peaks:
            name, stem = node.output[0], node.name
            node.output[0] = f"{stem}/exact"
            parts = [f"{stem}/scale", f"{stem}/zero"]
            values = np.float32(max(peaks[products[node.input[0]]], 1e-30) / 255), np.uint8(0)
            graph.initializer.extend(
                numpy_helper.from_array(np.asarray(v), n) for v, n in zip(values, parts, strict=True)
            )
            nodes += [
                node,
                helper.make_node("QuantizeLinear", [node.output[0], *parts], [f"{stem}/q"], f"{stem}/QuantizeLinear"),
                helper.make_node("DequantizeLinear", [f"{stem}/q", *parts], [name], f"{stem}/DequantizeLinear"),
            ]
            continue
        if node.op_type != "Conv" or node.input[1] not in ranges:
            nodes.append(node)
            continue
        source, weight = node.input[:2]
        scale, zero = _quantiser(ranges[weight], target)
        stem = node.name
        constants: dict[str, Any] = {f"{stem}/scale": np.float32(scale), f"{stem}/zero": zero}
        whole, unit = quantised_weight(torch.from_numpy(numpy_helper.to_array(weights[weight]).copy()))
        constants |= {
            f"{weight}/int8": whole.numpy().astype(np.int8),
            f"{weight}/scale": unit.numpy(),
            f"{weight}/zero": np.zeros(len(unit), np.int8),
        }
        graph.initializer.extend(numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items())
        graph.initializer.remove(weights[weight])
        parts = [f"{stem}/scale", f"{stem}/zero"]
        nodes += [
            helper.make_node("QuantizeLinear", [source, *parts], [f"{stem}/q"], f"{stem}/QuantizeLinear"),
            helper.make_node("DequantizeLinear", [f"{stem}/q", *parts], [f"{stem}/dq"], f"{stem}/DequantizeLinear"),
            helper.make_node(
                "DequantizeLinear",
                [f"{weight}/int8", f"{weight}/scale", f"{weight}/zero"],
                [f"{weight}/dq"],
                f"{stem}/weight/DequantizeLinear",
                axis=0,
            ),
        ]
        node.input[0], node.input[1] = f"{stem}/dq", f"{weight}/dq"
        nodes.append(node)
        done.add(weight)
    missing = sorted(set(ranges) - done)
    if missing:
        raise RuntimeError(f"no convolution of the graph has the weight {missing[0]!r}")
    del graph.node[:]
    graph.node.extend(nodes)


def emulated(model: Any) -> Any:
    """The graph in float32, with every tensor of half precision rounded as if it were kept in it.

    For CPUs, on which runtimes lack products of half precision: sums are float32, as those of tensor cores are.
    Optimisations must be off, as they take a rounding for a needless cast.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    half = {TensorProto.FLOAT16, TensorProto.BFLOAT16}
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.output)}
    for tensor in graph.initializer:
        if tensor.data_type in half:
            wide = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))
    nodes = []
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i in half:
                attribute.i = TensorProto.FLOAT
            elif attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type in half:
                attribute.t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(attribute.t).astype(np.float32)))
        nodes.append(node)
        for k, name in enumerate(node.output):
            if types.get(name) not in half:
                continue
            node.output[k] = f"{name}/exact"
            narrow = helper.make_node("Cast", [f"{name}/exact"], [f"{name}/half"], f"{name}/narrow", to=types[name])
            widen = helper.make_node("Cast", [f"{name}/half"], [name], f"{name}/widen", to=TensorProto.FLOAT)
            nodes += [narrow, widen]
    del graph.node[:]
    graph.node.extend(nodes)
    return result


def _quantiser(bounds: Range, target: Target) -> tuple[float, Any]:
    if target == "cpu":
        scale, zero = quantiser(bounds)
        return scale, np.uint8(zero)
    return max(abs(bounds[0]), abs(bounds[1]), 1e-30) / 127, np.int8(0)


def _scope(text: str) -> str:
    """``network/encoder/stem`` of the exporter's list of module paths, which ends in the name of the node."""
    import ast

    paths = [path for path in ast.literal_eval(text)[:-1] if not path.startswith("_")]
    return (paths[-1] if paths else "").replace(".", "/") or "graph"
