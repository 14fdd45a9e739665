"""Public function ``tdnn_layer``: a convolution over time with what follows it, in inference form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spkfast import backends, reference
from spkfast.backends import Backend
from spkfast.errors import InputError, check_name
from spkfast.ops._packing import (
    PackedLayer,
    Range,
    check_precision,
    checked_range,
    empty_frames,
    pack_layer,
    precision_limits,
    type_of_output,
)
from spkfast.ops._registration import full_precision, register_inference
from spkfast.ops.attentive_stats_pool import check_device, check_floating, check_frames, check_lengths
from spkfast.reference import Precision, TdnnParams

_REFERENCE = full_precision(reference.tdnn_layer)
# Of the C++ kernel of a GPU, whose launch has room for no more.
_MAX_GPU_INPUTS = 16


def tdnn_layer(
    x: Tensor | Sequence[Tensor],
    params: TdnnParams,
    lengths: Tensor | None = None,
    *,
    offset: Tensor | None = None,
    dilation: int = 1,
    padding_mode: str = "zeros",
    relu: bool = True,
    tanh: bool = False,
    precision: Precision = "fp32",
    input_range: Range | None = None,
    packed: PackedLayer | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Convolution over time, bias, ReLU, batch norm, hyperbolic tangent; the number of frames stays.

    Every row of a padded batch is padded at its own end, as if it were alone. Inference form: batch norm is a factor
    and a shift. Where a gradient is wanted the reference runs.

    Args:
        x: Frames, shape (B, C, T), in any layout (channels last, strides (T * C, 1, C), is read as it is); or several
            such inputs, read as if their channels followed one another.
        params: Weights: ``weight`` (N, C, K) with odd K, ``bias``, and batch norm as ``scale`` and ``shift``.
        lengths: Real frames per row, int64, 0 to T, shape (B,); None where all T are.
        offset: Added to the bias of each row, shape (B, N).
        dilation: Spacing of the taps in frames.
        padding_mode: What lies beyond the ends: ``zeros``, or ``reflect``, the frames mirrored at the first and last.
        relu: Apply ReLU.
        tanh: Apply the hyperbolic tangent last.
        precision: What is multiplied: ``fp32``, ``bf16``, ``fp16`` (on a GPU) or ``int8`` (on a CPU). Sums are float32.
        input_range: Smallest and largest value of the inputs, for ``int8``; values beyond are cut.
        packed: The same weights packed by :func:`pack_tdnn_layer` for inputs of these channels, which saves packing
            them at each call.
        backend: ``auto`` for the fastest that exists here, or ``reference``, ``native`` or ``triton``.

    Returns:
        Shape (B, N, T), channels last, 0 in the padding: float32 at ``fp32`` (float64 for float64 input), float16 at
        ``fp16``, else bfloat16.

    Raises:
        InputError: If shapes, types or devices disagree, a name is unknown, a length lies outside 0..T (on a CPU),
            ``packed`` is not of these weights and inputs, or ``backend`` cannot run.

    Reference: Snyder et al., "X-vectors: Robust DNN Embeddings for Speaker Recognition", ICASSP 2018 (TDNN layers);
    Desplanques et al., "ECAPA-TDNN", Interspeech 2020.
    """
    inputs = [x] if isinstance(x, Tensor) else list(x)
    check_inputs(inputs, params, lengths)
    check_precision(precision)
    check_name("padding_mode", padding_mode, ["zeros", "reflect"])
    if dilation < 1:
        raise InputError(f"dilation must be at least 1, got {dilation}")
    if offset is not None:
        shape = (inputs[0].shape[0], params.weight.shape[0])
        check_floating("offset", offset)
        check_device("offset", offset, inputs[0])
        if offset.shape != shape:
            raise InputError(f"offset must have shape (B, N) = {shape}, got {tuple(offset.shape)}")
    if precision == "int8":
        checked_range("input_range", input_range)
    tensors = [*inputs, *(value for value in (*params, offset) if value is not None)]
    limits = inference_limits("tdnn_layer", inputs[0], tensors, precision) | _gpu_limits(inputs)
    chosen = backends.resolve(inputs[0].device, backend, "tdnn_layer", limits)
    reflect = padding_mode == "reflect"
    if chosen == "reference":
        return _REFERENCE(
            inputs, params, offset, lengths,
            dilation=dilation, reflect=reflect, relu=relu, tanh=tanh, precision=precision, input_range=input_range,
        )  # fmt: skip
    if packed is not None:
        outputs, _, taps = params.weight.shape
        check_packed(packed.weight, inputs[0], packed.precision, precision, chosen)
        if (packed.vectors.shape[1], packed.taps) != (outputs, taps):
            raise InputError(
                f"packed must have N = {outputs} and K = {taps}, as weight has, got {packed.vectors.shape[1]} and "
                f"{packed.taps}"
            )
    else:
        packed = pack_layer(params, [part.shape[1] for part in inputs], precision, input_range, backend=chosen)
    return run_packed_layer(
        inputs, packed, lengths, offset=offset, dilation=dilation, reflect=reflect, relu=relu, tanh=tanh, backend=chosen
    )


def run_packed_layer(
    inputs: Sequence[Tensor],
    packed: PackedLayer,
    lengths: Tensor | None,
    *,
    offset: Tensor | None = None,
    dilation: int = 1,
    reflect: bool = False,
    relu: bool = True,
    tanh: bool = False,
    backend: str | None = None,
) -> Tensor:
    """:func:`tdnn_layer` on the kernels, without checks but that of the channels, which they would read beyond."""
    channels = tuple([part.shape[1] for part in inputs])
    if channels != packed.parts:
        raise InputError(f"x must have {packed.parts} channels, as packed has, got {channels}")
    integers = [packed.code, packed.taps, dilation, int(reflect), int(relu), int(packed.affine), int(tanh)]
    op = _IMPLEMENTATIONS[backend or kernel_of("tdnn_layer", inputs[0].device, _gpu_limits(inputs))]
    if offset is not None:
        offset = offset.float()
    found = op(inputs, packed.weight, packed.vectors, offset, lengths, integers, packed.input_quantiser)
    assert isinstance(found, Tensor)
    return found


def pack_tdnn_layer(
    params: TdnnParams,
    parts: Sequence[int] | None = None,
    *,
    precision: Precision = "fp32",
    input_range: Range | None = None,
) -> PackedLayer:
    """Weights of :func:`tdnn_layer` in the form that its kernels read.

    Args:
        params: The weights.
        parts: Channels of each input; None for a single one.
        precision: As of the layer.
        input_range: As of the layer.

    Raises:
        InputError: If the precision is unknown, the parts are not the channels of the weight, or for ``int8`` the range
            is missing, the weight is not finite or its sums do not fit 32 bits.
    """
    return pack_layer(params, [params.weight.shape[1]] if parts is None else parts, precision, input_range)


def check_inputs(inputs: Sequence[Tensor], params: TdnnParams, lengths: Tensor | None) -> None:
    """Shapes, types and devices of the inputs and weights of a layer."""
    if not inputs:
        raise InputError("x must have at least one tensor")
    first = inputs[0]
    for part in inputs:
        check_frames("x", part)
        check_device("x", part, first)
        if part.shape[::2] != first.shape[::2] or part.dtype != first.dtype:
            raise InputError(
                f"x must agree in batch, frames and type, got {tuple(first.shape)} {first.dtype} and "
                f"{tuple(part.shape)} {part.dtype}"
            )
    check_lengths(lengths, first)
    check_weights(params, sum(part.shape[1] for part in inputs), first)


def check_packed(weight: Tensor, x: Tensor, precision: str, wanted: str, backend: str) -> None:
    """Place, precision and form of a packed weight: the C++ kernels of a CPU alone read bytes, see ``PackedLayer``."""
    check_device("packed", weight, x)
    if precision != wanted:
        raise InputError(f"packed must be of precision {wanted!r}, got {precision!r}")
    if (weight.dtype == torch.uint8) != (backend == "native" and x.device.type == "cpu"):
        kind = "bytes for the C++ kernels of a CPU" if weight.dtype == torch.uint8 else "a matrix for other kernels"
        raise InputError(f"packed must have the form that backend {backend!r} reads on {x.device.type}, got {kind}")


def check_weights(params: TdnnParams, channels: int, x: Tensor, prefix: str = "", norm: str = "") -> None:
    """Shapes, types and the device of the weights of a layer that reads so many channels.

    Args:
        params: The weights.
        channels: The channels.
        x: A tensor where they should be.
        prefix: Of the names of weight and bias.
        norm: Of those of scale and shift.
    """
    weight = params.weight
    check_floating(prefix + "weight", weight)
    if weight.ndim != 3 or weight.shape[1] != channels or weight.shape[2] % 2 == 0:
        raise InputError(
            f"{prefix}weight must have shape (N, C, K) with C = {channels} and odd K, got {tuple(weight.shape)}"
        )
    if 0 in weight.shape:
        raise InputError(f"{prefix}weight must not be empty, got {tuple(weight.shape)}")
    if (params.scale is None) != (params.shift is None):
        raise InputError(f"{norm}scale and {norm}shift must be given together")
    for field, value in params._asdict().items():
        if value is None:
            continue
        name = (norm if field in ("scale", "shift") else prefix) + field
        check_floating(name, value)
        check_device(name, value, x)
        if field != "weight" and value.shape != weight.shape[:1]:
            raise InputError(f"{name} must have shape (N,) = {tuple(weight.shape[:1])}, got {tuple(value.shape)}")


def inference_limits(op: str, x: Tensor, tensors: Sequence[Tensor], precision: str) -> dict[str, str]:
    """Reason, by backend, why its kernels cannot take these tensors."""
    reason = ""
    if torch.is_grad_enabled() and any(value.requires_grad for value in tensors):
        reason = f"{op} is an inference form, whose kernels have no gradient; call it under torch.no_grad()"
    elif x.dtype not in (torch.float32, torch.bfloat16, *([] if x.device.type == "cpu" else [torch.float16])):
        reason = f"its kernels take no {x.dtype}"
    elif any(value.device.type == "meta" for value in tensors):
        reason = "meta tensors have no values"
    found = precision_limits(x.device, precision)
    return {name: reason or found.get(name, "") for name in ("native", "triton")}


def kernel_of(op: str, device: torch.device, limits: dict[str, str]) -> str:
    """The fastest backend with kernels that take a call.

    Raises:
        InputError: If there is none.
    """
    name = backends.resolve(device, "auto", op, limits)
    return backends.resolve(device, "native", op, limits) if name == "reference" else name  # which says why not


def _gpu_limits(inputs: Sequence[Tensor]) -> dict[str, str]:
    if len(inputs) <= _MAX_GPU_INPUTS or inputs[0].device.type == "cpu":
        return {}
    return {"native": f"its C++ kernel takes at most {_MAX_GPU_INPUTS} tensors as x, got {len(inputs)}"}


def _fake(
    x: Sequence[Tensor],
    weight: Tensor,
    vectors: Tensor,
    offset: Tensor | None,
    lengths: Tensor | None,
    integers: Sequence[int],
    floats: Sequence[float],
) -> Tensor:
    return empty_frames(x[0], vectors.shape[1], type_of_output(x[0].dtype, integers[0]))


_IMPLEMENTATIONS = register_inference("tdnn_layer", fake=_fake)
