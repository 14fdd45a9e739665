"""Weights of products in the form that the kernels of a device read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from spkfast.errors import InputError, check_name
from spkfast.ops._registration import register_without_gradient
from spkfast.reference import Precision, TdnnParams
from spkfast.reference.tdnn_layer import HALF, output_type, quantised_weight, quantiser

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
# The number of a precision in the ops.
_CODES: dict[str, int] = {"fp32": 0, "bf16": 1, "int8": 2, "fp16": 3}
# The largest sum of bytes and whole weights per product; sums are 32-bit whole numbers.
_LARGEST_PRODUCT = 255 * 127
Range = tuple[float, float]


class PackedLayer(NamedTuple):
    """Weights of a layer for one precision.

    Attributes:
        weight: For the C++ kernels of a CPU bytes in their order (``csrc/cpu/product_kernel.h``). For all others a
            matrix (R, N) in the type of the products, with rows of one input after the other, in each of one tap after
            the other, in each of one channel after the other.
        vectors: By output channel, float32, shape (4, N): bias, scale, shift, and what a whole number stands for.
        taps: Taps K.
        affine: Whether scale and shift are to be applied.
        precision: Of the products.
        input_quantiser: Factor from a value to a byte, and the byte of 0; for ``int8``.
        parts: Channels of each of the inputs.
    """

    weight: Tensor
    vectors: Tensor
    taps: int
    affine: bool
    precision: Precision
    input_quantiser: tuple[float, float]
    parts: tuple[int, ...]

    @property
    def code(self) -> int:
        """The number of the precision in the ops."""
        return code_of(self.precision)


def pack_layer(
    params: TdnnParams,
    parts: Sequence[int],
    precision: Precision,
    input_range: Range | None = None,
    *,
    backend: str = "native",
    name: str = "weight",
) -> PackedLayer:
    """Packs the weights of a layer.

    Args:
        params: The weights.
        parts: Channels of each of the inputs.
        precision: Of the products.
        input_range: Smallest and largest input, for ``int8``.
        backend: Whose kernels read them.
        name: Of the weight, in messages.

    Raises:
        InputError: If the precision is unknown, the parts are not the channels of the weight, or for ``int8`` the range
            is missing, the weight is not finite or its sums do not fit 32 bits.
    """
    check_precision(precision)
    if sum(parts) != params.weight.shape[1]:
        raise InputError(f"parts must add up to the {params.weight.shape[1]} channels of {name}, got {list(parts)}")
    weight = params.weight.detach().float()
    zeros = weight.new_zeros(weight.shape[0])
    vectors = [
        fallback if value is None else value.detach().float()
        for value, fallback in ((params.bias, zeros), (params.scale, zeros + 1), (params.shift, zeros), (None, zeros))
    ]
    factors = (1.0, 0.0)
    if precision == "int8":
        scale, zero = quantiser(checked_range("input_range", input_range))
        _check_quantisable(name, weight)
        weight, unit = quantised_weight(weight)
        vectors[3] = unit * scale
        # The bytes are off by `zero`.
        vectors[0] = vectors[0] - (weight.double().sum(dim=(1, 2)) * zero).float() * vectors[3]
        factors = (1 / scale, float(zero))
    if weight.device.type == "cpu" and backend == "native":
        packed = torch.ops.spkfast.product_pack(weight, list(parts), _CODES[precision])
    else:
        rows = [part.permute(2, 1, 0).flatten(0, 1) for part in weight.split(list(parts), dim=1)]
        packed = torch.cat(rows).to(HALF.get(precision, torch.float32)).contiguous()
    taps, affine = weight.shape[2], params.scale is not None
    return PackedLayer(packed, torch.stack(vectors), taps, affine, precision, factors, tuple(parts))


def _check_quantisable(name: str, weight: Tensor) -> None:
    products, most = weight.shape[1] * weight.shape[2], (2**31 - 1) // _LARGEST_PRODUCT
    if products > most:
        raise InputError(f"{name} must have at most {most} products C * K a sum at precision='int8', got {products}")
    # A compiled graph cannot branch on values, and elsewhere there are none or they cost a wait.
    if weight.device.type == "cpu" and not torch.compiler.is_compiling() and not weight.isfinite().all():
        raise InputError(f"{name} must be finite at precision='int8', got NaN or infinity")


def checked_range(name: str, value: Range | None) -> Range:
    """A range of inputs that can be quantised."""
    if value is None:
        raise InputError(f"precision='int8' needs {name}, the smallest and the largest input")
    low, high = value
    if not -float("inf") < low <= high < float("inf"):
        raise InputError(f"{name} must be finite, the smaller value first, got {value}")
    return low, high


def check_precision(precision: str) -> None:
    check_name("precision", precision, list(PRECISIONS))


def precision_limits(device: torch.device, precision: str) -> dict[str, str]:
    """Reason, by backend, why a precision does not run on a device."""
    if device.type == "cpu" and precision == "fp16":
        return {"native": "fp16 products run on a GPU"}
    if precision == "int8":
        names = ("triton",) if device.type == "cpu" else ("native", "triton")
        return {name: "int8 products run on a CPU, in C++" for name in names}
    return {}


def empty_frames(like: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """(B, N, T) with a frame's channels side by side."""
    batch, _, frames = like.shape
    return like.new_empty_strided((batch, channels, frames), (frames * channels, 1, channels), dtype=dtype)


def _fake_pack(weight: Tensor, parts: Sequence[int], precision: int) -> Tensor:
    channels, _, taps = weight.shape
    in_step = 1 << precision  # channels of 32 bits
    steps = taps * sum((part + in_step - 1) // in_step for part in parts)
    return weight.new_empty((channels + 63) // 64 * 64 * 4 * steps, dtype=torch.uint8)


def code_of(precision: Precision) -> int:
    """The number of a precision in the ops."""
    return _CODES[precision]


def type_of_output(dtype: torch.dtype, code: int) -> torch.dtype:
    """Type of the output of a layer whose precision has this number."""
    return output_type(dtype, next(name for name in PRECISIONS if _CODES[name] == code))


register_without_gradient("product_pack", fake=_fake_pack)
