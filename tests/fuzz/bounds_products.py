"""How far a CPU kernel of tdnn_layer and se_res2net_block may be from the definition: what rounding may do.

An operand that is rounded to few bits may fall on the other side of a boundary once its value has an error: it differs
then by one step. Here each value has its own bound, so that only operands near a boundary count as different.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from spkfast import reference
from spkfast.ops.se_res2net_block import BlockForm
from spkfast.reference import Precision, SERes2NetParams, TdnnParams
from spkfast.reference.tdnn_layer import quantised_weight, quantiser

UNIT = 2.0**-24  # half of the last place of a float32 number, as a share of it
BFLOAT_UNIT = 2.0**-8
TINY = 2.0**-126  # products of bfloat16 numbers take smaller ones for 0
# Of the kernels' exponential function, exp(x) of x <= 0, as a share of it.
EXPONENTIAL = 1.7e-7

Range = tuple[float, float]


class Known(NamedTuple):
    """What an exact program has, float64, and by how much a kernel's value may differ."""

    value: Tensor
    error: Tensor


def exact(x: Tensor) -> Known:
    """Values that a kernel is given."""
    return Known(x.double(), torch.zeros(x.shape, dtype=torch.float64))


def stored(known: Known, dtype: torch.dtype) -> Known:
    """Values in memory: bfloat16 ones were rounded."""
    if dtype != torch.bfloat16:
        return known
    size = known.value.abs() + known.error
    return known._replace(error=known.error + BFLOAT_UNIT * size + TINY * (size > 0))


def plus(a: Known, b: Known) -> Known:
    """A sum in float32."""
    value = a.value + b.value
    error = a.error + b.error
    return Known(value, error + UNIT * (value.abs() + error))


def layer(
    x: Known,
    params: TdnnParams,
    lengths: Tensor | None,
    precision: Precision,
    input_range: Range | None,
    *,
    dilation: int = 1,
    reflect: bool = False,
    relu: bool = True,
    tanh: bool = False,
    offset: Tensor | None = None,
) -> Known:
    """``tdnn_layer`` before its output is rounded to its type."""

    def multiplied(values: Tensor, weight: Tensor) -> Tensor:
        return reference.tdnn_layer(
            [values], TdnnParams(weight), None, lengths,
            dilation=dilation, reflect=reflect, relu=False, tanh=False, precision="fp32", input_range=None,
        )  # fmt: skip

    values, weight = _operands(x, precision, input_range), params.weight.float()
    added = size_added = torch.zeros(1, weight.shape[0], 1, dtype=torch.float64)
    for vector in (params.bias, offset):
        if vector is not None:
            added = added + vector.double()[..., None]
            size_added = size_added + vector.double().abs()[..., None]
    roundings = 4.0
    if precision == "int8":
        # Of bytes, which are off by `zero`, the sum is exact; what follows it rounds that and what sets it right.
        assert input_range is not None
        whole, unit = quantised_weight(weight)
        scale, zero = quantiser(input_range)
        weight = whole.double() * unit.double()[:, None, None]
        shifted = (zero * scale * weight.sum(dim=(1, 2)))[:, None]
        terms = (multiplied(values.value, weight) + shifted).abs() + 2 * shifted.abs()
        roundings += 4
    else:
        weight = weight.bfloat16().double() if precision == "bf16" else weight.double()
        terms = multiplied(values.value.abs() + values.error, weight.abs())
        roundings += weight[0].numel()
    carried = multiplied(values.error, weight.abs())
    value = multiplied(values.value, weight) + added
    error = carried + 1.01 * UNIT * roundings * (terms + carried + size_added) + weight[0].numel() * TINY
    if relu:
        value = value.relu()
    if params.scale is not None and params.shift is not None:
        scales, shift = params.scale.double()[:, None], params.shift.double()[:, None]
        error = error * scales.abs() + 2 * UNIT * ((value.abs() + error) * scales.abs() + shift.abs()) + TINY
        value = value * scales + shift
    if tanh:
        value = value.tanh()
        # (1 - e) / (1 + e) moves by at most half of what e does as a share of it, and rounds three times.
        error = error + EXPONENTIAL / 2 + 3 * UNIT
    return _masked(Known(value, error), lengths)


def block(
    x: Tensor,
    params: SERes2NetParams,
    padded: Tensor | None,
    excited: Tensor | None,
    form: BlockForm,
    dilation: int,
    precision: Precision,
    input_ranges: Mapping[str, Range] | None,
) -> Known:
    """``se_res2net_block`` before its output is rounded to its type; in between it has the type of ``x``."""
    ranges, first = input_ranges or {}, int(form.identity == "first")

    def run(name: str, layer_params: TdnnParams, values: Known, *, relu: bool = True) -> Known:
        options = {"dilation": dilation, "reflect": form.padding_mode == "reflect", "relu": relu}
        return layer(values, layer_params, padded, precision, ranges.get(name), **options)  # type: ignore[arg-type]

    hidden = stored(run("in", params.in_, exact(x)), x.dtype)
    count = len(params.res) + 1
    groups = [Known(*parts) for parts in zip(*(part.chunk(count, dim=1) for part in hidden), strict=True)]
    outputs: list[Known] = []
    for j, convolution in enumerate(params.res):
        group = groups[j + first]
        outputs.append(run(f"res.{j}", convolution, plus(group, outputs[-1]) if outputs else group))
    parts = [stored(output, x.dtype) for output in outputs]
    parts = [groups[0], *parts] if first else [*parts, groups[-1]]
    y = stored(
        run("out", params.out, Known(*(torch.cat(values, dim=1) for values in zip(*parts, strict=True)))), x.dtype
    )
    gates = _gates(y, params, excited)
    rest = exact(x)
    if params.shortcut is not None:
        rest = stored(run("in", params.shortcut, rest, relu=False), x.dtype)
    size = (y.value.abs() + y.error) * (gates.value + gates.error)
    error = y.error * gates.value + (y.value.abs() + y.error) * gates.error + rest.error
    value = y.value * gates.value + rest.value
    return _masked(Known(value, error + 2 * UNIT * (size + rest.value.abs() + rest.error)), padded)


def assert_within(got: Tensor, known: Known) -> int:
    """Checks what a kernel gave; returns the number of values."""
    want, allowed = stored(known, got.dtype)
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    error = (got.double() - want).abs()
    wrong = ~((error <= allowed) | (got.isnan() & want.isnan()))
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} values are wrong; first at {place}: {float(got[place])!r}, exactly "
            f"{float(want[place])!r}, allowed error {float(allowed[place]):.3g}"
        )
    return got.numel()


def _operands(x: Known, precision: Precision, input_range: Range | None) -> Known:
    """Values as a product takes them."""
    if precision == "fp32":
        return x
    if precision == "bf16":
        value = x.value.bfloat16().double()
        low, high = ((x.value + sign * x.error).bfloat16().double() for sign in (-1, 1))
        return Known(value, torch.maximum(high - value, value - low) + TINY)
    assert input_range is not None
    scale, zero = quantiser(input_range)
    # The factor and its product are float32 numbers.
    error = x.error + 3 * UNIT * (x.value.abs() + x.error)
    value, low, high = (((x.value + sign * error) * (1 / scale)).round().add(zero).clamp(0, 255) for sign in (0, -1, 1))
    return Known((value - zero) * scale, torch.maximum(high - value, value - low) * scale)


def _gates(y: Known, params: SERes2NetParams, lengths: Tensor | None) -> Known:
    frames = y.value.shape[2] if lengths is None else lengths[:, None].clamp_min(1)
    real = _masked(y, lengths)
    value, error = real.value.sum(dim=2) / frames, real.error.sum(dim=2) / frames
    size = real.value.abs().sum(dim=2) / frames + error
    x = Known(value, error + UNIT * (y.value.shape[2] + 2) * size)
    squeeze, excite = params.squeeze, params.excite
    hidden = _dense(x, squeeze.weight[..., 0].double(), squeeze.bias)
    hidden = hidden._replace(value=hidden.value.relu())
    weight, bias = excite.weight[..., 0].double(), excite.bias
    if squeeze.scale is None or squeeze.shift is None:
        gates = _dense(hidden, weight, bias)
    else:
        # What the kernels do beforehand rounds as often as the program that does it here.
        shifted = _dense(exact(squeeze.shift[None]), weight, bias)
        gates = plus(_dense(hidden, weight * squeeze.scale.double(), None), shifted)
    value = gates.value.sigmoid()
    # A quotient of e or 1 by 1 + e.
    error = gates.error / 4 + value * (2 * EXPONENTIAL + 3 * UNIT)
    return Known(value[..., None], error[..., None])


def _dense(x: Known, weight: Tensor, bias: Tensor | None) -> Known:
    added = torch.zeros(1) if bias is None else bias.double()
    value = x.value @ weight.T + added
    carried = x.error @ weight.abs().T
    size = (x.value.abs() + x.error) @ weight.abs().T + added.abs()
    return Known(value, carried + UNIT * (weight.shape[1] + 6) * size + TINY)


def _masked(known: Known, lengths: Tensor | None) -> Known:
    if lengths is None:
        return known
    padding = torch.arange(known.value.shape[2]) >= lengths[:, None, None]
    return Known(known.value.masked_fill(padding, 0), known.error.masked_fill(padding, 0))
