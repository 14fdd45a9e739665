"""Public function ``se_res2net_block``: the block of ECAPA-TDNN as one op, in inference form."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spkfast import backends, reference
from spkfast.backends import Backend
from spkfast.errors import InputError, check_name
from spkfast.ops._packing import PackedLayer, Range, check_precision, checked_range, code_of, empty_frames, pack_layer
from spkfast.ops._registration import full_precision, register_inference
from spkfast.ops.attentive_stats_pool import check_floating, check_frames, check_lengths
from spkfast.ops.tdnn_layer import check_packed, check_weights, inference_limits, kernel_of
from spkfast.reference import Precision, SERes2NetParams, TdnnParams

_REFERENCE = full_precision(reference.se_res2net_block)
# Of the C++ kernels of a GPU, whose launch has room for no more.
_MAX_GPU_CONVOLUTIONS = 32


class BlockForm(NamedTuple):
    """What differs between the toolkits' blocks beside their weights.

    Attributes:
        identity: Group of channels that the Res2 convolutions pass: ``first`` or ``last``.
        padding_mode: What convolutions read beyond the ends: ``zeros`` or ``reflect``.
    """

    identity: str = "last"
    padding_mode: str = "zeros"


BLOCK_FORMS: Mapping[str, BlockForm] = {
    "wespeaker": BlockForm(),
    "speechbrain": BlockForm("first", "reflect"),
    "3dspeaker": BlockForm("first", "reflect"),
    "taoruijie": BlockForm(),
    "espnet": BlockForm(),
}


class PackedBlock(NamedTuple):
    """Weights of a block in the form that its kernels read.

    Attributes:
        tensors: Weight and vectors of ``in``, ``out``, the two layers of the squeeze-and-excitation, the shortcut where
            there is one, and the Res2 convolutions.
        floats: Quantisers of ``in``, ``out`` and the Res2 convolutions: factor and zero.
        precision: Of the products.
        inputs: Channels of the input.
        channels: Channels of the output.
        convolutions: How many Res2 convolutions there are.
        taps: Of them; 1 where there is none.
    """

    tensors: list[Tensor]
    floats: list[float]
    precision: Precision
    inputs: int
    channels: int
    convolutions: int
    taps: int

    @property
    def code(self) -> int:
        """The number of the precision in the ops."""
        return code_of(self.precision)


def se_res2net_block(
    x: Tensor,
    params: SERes2NetParams | Mapping[str, Tensor],
    lengths: Tensor | None = None,
    *,
    dialect: str = "wespeaker",
    dilation: int = 1,
    precision: Precision = "fp32",
    input_ranges: Mapping[str, Range] | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """SE-Res2Net block of ECAPA-TDNN: 1x1 layer, Res2 convolutions, 1x1 layer, squeeze-and-excitation, residual sum.

    A row of a padded batch gives what the same utterance gives alone. Inference form: batch norm is a factor and a
    shift. Where a gradient is wanted the reference runs.

    Args:
        x: Shape (B, C_in, T), in any layout; channels last (strides (T * C, 1, C)) is read as it is.
        params: Weights: ``in.conv.weight``, ``in.conv.bias``, ``in.bn.scale``, ``in.bn.shift``, the same of
            ``res.0`` and so on, and of ``out``; ``se.fc1.weight``, ``se.fc1.bias``, ``se.fc2.weight``, ``se.fc2.bias``,
            with ``se.bn.scale`` and ``se.bn.shift`` where there is one; and ``shortcut.weight`` and ``shortcut.bias``
            where C_in is not C. Or :class:`SERes2NetParams`.
        lengths: Real frames per row, int64, 0 to T, shape (B,); None where all T are.
        dialect: Toolkit whose block it is; see :data:`BLOCK_FORMS`.
        dilation: Of the Res2 convolutions, in frames.
        precision: What the convolutions multiply: ``fp32``, ``bf16``, ``fp16`` (on a GPU) or ``int8`` (on a CPU). Sums
            and the squeeze-and-excitation are float32.
        input_ranges: Smallest and largest input of ``in``, ``res.0`` and so on, and ``out``, for ``int8``.
        backend: ``auto`` for the fastest that exists here, or ``reference``, ``native`` or ``triton``.

    Returns:
        Shape (B, C, T), channels last, 0 in the padding, in the type of ``x``.

    Raises:
        InputError: If shapes, types or devices disagree, a weight is missing or unknown, a length lies outside 0..T (on
            a CPU), or ``backend`` cannot run.

    Reference: Desplanques et al., "ECAPA-TDNN: Emphasized Channel Attention, Propagation and Aggregation in TDNN Based
    Speaker Verification", Interspeech 2020.
    """
    check_name("dialect", dialect, list(BLOCK_FORMS))
    form = BLOCK_FORMS[dialect]
    if not isinstance(params, SERes2NetParams):
        params = named_params(params)
    return run_block(x, params, lengths, lengths, form, dilation, precision, input_ranges, backend=backend)


def run_block(
    x: Tensor,
    params: SERes2NetParams,
    padded: Tensor | None,
    excited: Tensor | None,
    form: BlockForm,
    dilation: int,
    precision: Precision,
    input_ranges: Mapping[str, Range] | None,
    *,
    packed: PackedBlock | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """:func:`se_res2net_block` with the lengths of the convolutions and of the excitation apart, and packed weights.

    Raises:
        InputError: As there, and if ``packed`` is not of such weights.
    """
    check_frames("x", x)
    check_lengths(padded, x)
    check_lengths(excited, x)
    check_precision(precision)
    if dilation < 1:
        raise InputError(f"dilation must be at least 1, got {dilation}")
    if precision == "int8":
        block_ranges(params, input_ranges)
    tensors = [x, *check_block(params, x)]
    convolutions, taps = _chain_of(params)
    limits = inference_limits("se_res2net_block", x, tensors, precision) | _gpu_limits(x.device, convolutions)
    chosen = backends.resolve(x.device, backend, "se_res2net_block", limits)
    if chosen == "reference":
        return _REFERENCE(
            x, params, padded, excited,
            dilation=dilation, reflect=form.padding_mode == "reflect", first_passes=form.identity == "first",
            precision=precision, input_ranges=input_ranges,
        )  # fmt: skip
    if packed is None:
        packed = pack_block(params, precision, input_ranges, backend=chosen)
    else:
        check_packed(packed.tensors[0], x, packed.precision, precision, chosen)
        channels = params.in_.weight.shape[0]
        if packed.channels != channels:
            raise InputError(f"packed must have {channels} channels, as params have, got {packed.channels}")
    return run_packed_block(x, packed, padded, excited, form, convolutions, taps, dilation, backend=chosen)


def run_packed_block(
    x: Tensor,
    packed: PackedBlock,
    padded: Tensor | None,
    excited: Tensor | None,
    form: BlockForm,
    convolutions: int,
    taps: int,
    dilation: int,
    *,
    backend: str | None = None,
) -> Tensor:
    """:func:`run_block` on the kernels, without checks but those of what they would read beyond."""
    if x.shape[1] != packed.inputs:
        raise InputError(f"x must have {packed.inputs} channels, as packed has, got {x.shape[1]}")
    if (convolutions, taps) != (packed.convolutions, packed.taps):
        raise InputError(
            f"packed must have {convolutions} Res2 convolutions of {taps} taps, got {packed.convolutions} of "
            f"{packed.taps}"
        )
    flags = (form.padding_mode == "reflect") + 2 * (form.identity == "first")
    shortcut = len(packed.tensors) > 2 * (4 + convolutions)
    integers = [packed.code, convolutions, taps, dilation, flags, int(shortcut)]
    op = _IMPLEMENTATIONS[backend or kernel_of("se_res2net_block", x.device, _gpu_limits(x.device, convolutions))]
    found = op(x, packed.tensors, padded, excited, integers, packed.floats)
    assert isinstance(found, Tensor)
    return found


def named_params(params: Mapping[str, Tensor]) -> SERes2NetParams:
    """The weights of a block from their canonical names."""
    left = dict(params)

    def layer(convolution: str, norm: str | None = None) -> TdnnParams:
        try:
            weight = left.pop(f"{convolution}.weight")
        except KeyError:
            raise InputError(f"params lack {convolution}.weight") from None
        if isinstance(weight, Tensor) and weight.ndim == 2:
            weight = weight[..., None]
        bias = left.pop(f"{convolution}.bias", None)
        if norm is None:
            return TdnnParams(weight, bias)
        return TdnnParams(weight, bias, left.pop(f"{norm}.scale", None), left.pop(f"{norm}.shift", None))

    count = len({match[1] for name in params if (match := re.match(r"res\.(\d+)\.", name))})
    found = SERes2NetParams(
        layer("in.conv", "in.bn"),
        [layer(f"res.{j}.conv", f"res.{j}.bn") for j in range(count)],
        layer("out.conv", "out.bn"),
        layer("se.fc1", "se.bn"),
        layer("se.fc2"),
        layer("shortcut") if "shortcut.weight" in left else None,
    )
    if left:
        raise InputError(f"params hold {next(iter(left))}, which a block does not have")
    return found


def pack_block(
    params: SERes2NetParams,
    precision: Precision,
    input_ranges: Mapping[str, Range] | None = None,
    *,
    backend: str = "native",
) -> PackedBlock:
    """Packs the weights of a block.

    Raises:
        InputError: If the precision is unknown, or for ``int8`` a range is missing, a weight is not finite or its sums
            do not fit 32 bits.
    """
    ranges: Mapping[str, Range | None] = {}
    if precision == "int8":
        ranges = block_ranges(params, input_ranges)

    def layer(name: str, layer_params: TdnnParams) -> PackedLayer:
        if layer_params.scale is None and name != "shortcut":  # the kernels always apply it
            ones = torch.ones_like(layer_params.weight[:, 0, 0])
            layer_params = layer_params._replace(scale=ones, shift=torch.zeros_like(ones))
        own = ranges.get("in" if name == "shortcut" else name)
        weight = f"{name}.weight" if name == "shortcut" else f"{name}.conv.weight"
        return pack_layer(layer_params, [layer_params.weight.shape[1]], precision, own, backend=backend, name=weight)

    # Batch norm of the squeeze goes forward into the layer that follows it, exactly: both are linear.
    squeeze, excite = params.squeeze, params.excite
    if squeeze.scale is not None and squeeze.shift is not None:
        weight = excite.weight.double()
        bias = torch.matmul(weight[..., 0], squeeze.shift.double())
        excite = excite._replace(
            weight=weight * squeeze.scale[:, None], bias=bias if excite.bias is None else excite.bias + bias
        )
        squeeze = squeeze._replace(scale=None, shift=None)
    in_, out = layer("in", params.in_), layer("out", params.out)
    res = [layer(f"res.{j}", convolution) for j, convolution in enumerate(params.res)]
    dense = [pack_layer(part, [part.weight.shape[1]], "fp32", backend=backend) for part in (squeeze, excite)]
    shortcut = [] if params.shortcut is None else [layer("shortcut", params.shortcut)]
    layers = [in_, out, *dense, *shortcut, *res]
    return PackedBlock(
        [tensor for packed in layers for tensor in (packed.weight, packed.vectors)],
        [value for packed in (in_, out, *res) for value in packed.input_quantiser],
        precision,
        params.in_.weight.shape[1],
        params.in_.weight.shape[0],
        *_chain_of(params),
    )


def block_ranges(params: SERes2NetParams, input_ranges: Mapping[str, Range] | None) -> dict[str, Range]:
    """The ranges of all layers of a block that are quantised."""
    names = ["in", *(f"res.{j}" for j in range(len(params.res))), "out"]
    return {name: checked_range(f"input_ranges[{name!r}]", (input_ranges or {}).get(name)) for name in names}


def check_block(params: SERes2NetParams, x: Tensor) -> list[Tensor]:
    """Checks the weights of a block against its input, and gives them all."""
    layers = {"in.conv.": params.in_, "out.conv.": params.out, "se.fc1.": params.squeeze, "se.fc2.": params.excite}
    layers |= {f"res.{j}.conv.": convolution for j, convolution in enumerate(params.res)}
    if params.shortcut is not None:
        layers["shortcut."] = params.shortcut
    for prefix, layer in layers.items():
        check_floating(prefix + "weight", layer.weight)
        if layer.weight.ndim != 3:
            raise InputError(f"{prefix}weight must have shape (N, C, K), got {tuple(layer.weight.shape)}")
    channels, units, groups = params.in_.weight.shape[0], params.squeeze.weight.shape[0], len(params.res) + 1
    if channels % groups:
        raise InputError(f"in.conv.weight must have a multiple of {groups} channels, got {channels}")
    if params.shortcut is None and x.shape[1] != channels:
        raise InputError(f"shortcut.weight is needed: x has {x.shape[1]} channels and the block {channels}")
    width = channels // groups
    sizes = {"in.conv.": (x.shape[1], channels), "shortcut.": (x.shape[1], channels), "out.conv.": (channels, channels)}
    sizes |= {"se.fc1.": (channels, units), "se.fc2.": (units, channels)}
    _, taps = _chain_of(params)
    for prefix, layer in layers.items():
        inputs, outputs = sizes.get(prefix, (width, width))
        own = taps if prefix.startswith("res.") else 1
        if prefix in ("se.fc2.", "shortcut.") and not layer.scale is layer.shift is None:
            raise InputError(f"{prefix[:-1]} has no batch norm: scale and shift must be None")
        norm = "se.bn." if prefix == "se.fc1." else prefix.replace("conv.", "bn.")
        check_weights(layer, inputs, x, prefix, norm)
        if layer.weight.shape[0] != outputs:
            raise InputError(f"{prefix}weight must have {outputs} output channels, got {layer.weight.shape[0]}")
        if layer.weight.shape[2] != own:
            raise InputError(f"{prefix}weight must have K = {own} taps, got {layer.weight.shape[2]}")
    return [value for layer in layers.values() for value in layer if value is not None]


def _chain_of(params: SERes2NetParams) -> tuple[int, int]:
    """How many Res2 convolutions there are, and their taps."""
    return len(params.res), params.res[0].weight.shape[2] if params.res else 1


def _gpu_limits(device: torch.device, convolutions: int) -> dict[str, str]:
    if convolutions <= _MAX_GPU_CONVOLUTIONS or device.type == "cpu":
        return {}
    return {"native": f"its C++ kernels take at most {_MAX_GPU_CONVOLUTIONS} Res2 convolutions, got {convolutions}"}


def _fake(
    x: Tensor,
    params: Sequence[Tensor],
    padded: Tensor | None,
    excited: Tensor | None,
    integers: Sequence[int],
    floats: Sequence[float],
) -> Tensor:
    return empty_frames(x, params[1].shape[1], x.dtype)


_IMPLEMENTATIONS: dict[str, Any] = register_inference("se_res2net_block", fake=_fake)
