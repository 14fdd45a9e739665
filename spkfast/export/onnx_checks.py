"""What must hold of an ONNX graph: types that agree, nothing sensitive in half precision, operators that exist."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

_HALF = ("float16", "bfloat16")
_FLOAT = frozenset(("float32", *_HALF))
_INTEGER = frozenset(("int32", "int64"))
_BOOL = frozenset(("bool",))
# Sums over many values, and what is steep: half precision costs digits that matter, or overflows.
_SENSITIVE = {
    "CumSum", "Div", "Exp", "GlobalAveragePool", "InstanceNormalization", "LayerNormalization", "Log", "LogSoftmax",
    "LpNormalization", "Pow", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMean", "ReduceProd",
    "ReduceSum", "ReduceSumSquare", "Reciprocal", "Softmax", "Sqrt",
}  # fmt: skip
# Parts of a graph in float32 throughout, by how the names of their nodes begin.
_FLOAT32_PARTS = ("frontend", "network/projector")

# What TensorRT's parser reads without a plugin, and with which types: the table of onnx-tensorrt 10.0, from which
# nothing was taken since; operators that no graph here has are left out.
_ANY = _FLOAT | _INTEGER | _BOOL
TENSORRT_OPERATORS: dict[str, frozenset[str]] = {
    **dict.fromkeys(("Cast", "Concat", "Constant", "ConstantOfShape", "Expand", "Flatten", "Gather"), _ANY),
    **dict.fromkeys(("GatherElements", "GatherND", "Identity", "Reshape", "Shape", "Size", "Slice", "Split"), _ANY),
    **dict.fromkeys(("Squeeze", "Tile", "Transpose", "Trilu", "Unsqueeze", "Where"), _ANY),
    **dict.fromkeys(("Abs", "Add", "Div", "Equal", "Greater", "GreaterOrEqual", "Less"), _FLOAT | _INTEGER),
    **dict.fromkeys(("LessOrEqual", "Max", "Min", "Mod", "Mul", "Neg", "Pad", "Range"), _FLOAT | _INTEGER),
    **dict.fromkeys(("ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum"), _FLOAT | _INTEGER),
    **dict.fromkeys(("ReduceL2", "ReduceSumSquare", "Relu", "ScatterElements", "Sign", "Sub"), _FLOAT | _INTEGER),
    **dict.fromkeys(("And", "Not", "Or", "Xor"), _BOOL),
    # Of integers the table has no Clip, the parser does.
    "Clip": _FLOAT | _INTEGER,
    **dict.fromkeys(("Ceil", "Conv", "Cos", "Erf", "Exp", "Floor", "Gemm", "LeakyRelu", "Log"), _FLOAT),
    **dict.fromkeys(("LogSoftmax", "MatMul", "Pow", "Reciprocal", "Round", "Sigmoid", "Sin", "Softmax"), _FLOAT),
    **dict.fromkeys(("Softplus", "Sqrt", "Tanh", "BatchNormalization", "LayerNormalization"), _FLOAT),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), _FLOAT | {"int8"}),
}
_CONSTANT_AXES = {"ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceL2", "Squeeze", "Unsqueeze"}


def types_of(model: Any) -> dict[str, str]:
    """Type of every tensor by name, after a check of all types and shapes.

    Raises:
        ValueError: If the graph is invalid; what mixes types that must be equal is.
    """
    import onnx

    try:
        onnx.checker.check_model(model, full_check=True)
        inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True).graph
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ValueError(f"the ONNX graph is invalid: {error}") from error
    found = {value.name: value.type.tensor_type.elem_type for value in (*inferred.input, *inferred.value_info)}
    found |= {value.name: value.type.tensor_type.elem_type for value in inferred.output}
    found |= {tensor.name: tensor.data_type for tensor in inferred.initializer}
    return {name: _type_name(kind) for name, kind in found.items()}


def sensitive_in_half(model: Any, types: dict[str, str]) -> list[str]:
    """Tensors of half precision where float32 must be; empty where all is well.

    Those are sums, means, roots and powers, the softmax, all that a logarithm is made of (which is the front-end), what
    a graph of this package has in front-end and projector, and the outputs.
    """
    made_by = {name: node for node in model.graph.node for name in node.output}
    before_log: set[str] = set()
    waiting = [name for node in model.graph.node if node.op_type == "Log" for name in node.input]
    while waiting:
        name = waiting.pop()
        if name and name not in before_log:
            before_log.add(name)
            waiting += made_by[name].input if name in made_by else []
    found = [f"{name}: comes before a logarithm" for name in sorted(before_log) if types.get(name) in _HALF]
    for node in model.graph.node:
        part = next((part for part in _FLOAT32_PARTS if node.name.startswith(part + "/")), None)
        reason = f"{node.op_type} {node.name}" if node.op_type in _SENSITIVE else part
        # A cast into a part that is float32 reads half precision.
        names = node.output if node.op_type == "Cast" else (*node.input, *node.output)
        if reason is not None:
            found += [f"{name}: {reason}" for name in names if types.get(name) in _HALF]
    return found + [f"{value.name}: output" for value in model.graph.output if types.get(value.name) in _HALF]


def unsupported_by_tensorrt(model: Any, types: dict[str, str]) -> list[str]:
    """Why TensorRT 10.12 to 11 would not read the graph, one line a node; empty where it does.

    Checked against the operator table of its parser, not by the parser.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    found = []
    for node in model.graph.node:
        allowed = TENSORRT_OPERATORS.get(node.op_type)
        if allowed is None or node.domain not in ("", "ai.onnx"):
            found.append(f"{node.op_type} {node.name}: not in the operator table")
            continue
        wrong = {types[name] for name in _values(node) if name in types} - allowed
        if wrong:
            found.append(f"{node.op_type} {node.name}: {', '.join(sorted(wrong))}")
        if node.op_type in _CONSTANT_AXES and len(node.input) > 1 and node.input[1] not in constants:
            found.append(f"{node.op_type} {node.name}: axes are no constant")
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) > 2:
            import onnx

            zero = constants.get(node.input[2])
            if zero is None or np.any(onnx.numpy_helper.to_array(zero)):
                found.append(f"{node.op_type} {node.name}: its zero point is no constant 0")
    return found


def _values(node: Any) -> list[str]:
    """Tensors of a node whose type the table tells: not sizes, axes, indices and conditions."""
    if node.op_type in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"):
        return list(node.input)
    if node.op_type in ("Cast", "Where", "Shape", "Size", "QuantizeLinear", "DequantizeLinear"):
        return [*node.input, *node.output]
    return [*node.input[:1], *node.output]


def operators_of(model: Any) -> dict[str, int]:
    """How many nodes of each operator there are."""
    return dict(sorted(Counter(node.op_type for node in model.graph.node).items()))


def _type_name(kind: int) -> str:
    import onnx

    name: str = onnx.TensorProto.DataType.Name(kind).lower()
    return {"float": "float32", "double": "float64"}.get(name, name)
