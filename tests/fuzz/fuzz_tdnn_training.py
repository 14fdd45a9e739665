"""Random cases of the ops that train TDNN layers on the CPU: each op against its definition, and their gradients."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from spkfast import reference
from spkfast.nn.se_res2net import pad_by_reflection
from spkfast.ops._tdnn_training import channel_affine, conv_batch_norm, conv_relu
from spkfast.reference import Precision, TdnnParams
from spkfast.reference import tdnn_training as definition
from spkfast.reference.tdnn_layer import as_multiplied, output_type, weight_as_multiplied
from tests.fuzz.bounds_products import BFLOAT_UNIT, TINY, UNIT, Known, assert_within, exact, layer
from tests.fuzz.fuzz_attentive_stats_pool import described, same
from tests.fuzz.fuzz_tdnn_layer import draw_frame_count, draw_level_and_threads, draw_params, draw_part
from tests.fuzz.surroundings import surroundings

_CHANNELS = (1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 31, 33, 64, 65, 100, 130)
_BATCHES = (0, 1, 2, 3, 5, 8)
_CODES: dict[Precision, int] = {"fp32": 0, "bf16": 1}
_TYPES = (torch.float32, torch.bfloat16)
_NEAR_1 = 1.01  # for products of roundings
_OPS = torch.ops.spkfast


@dataclasses.dataclass
class Convolution:
    """A step of training a convolution with ReLU.

    Attributes:
        x: Inputs (B, C_i, T).
        params: Weight and bias.
        grads: Gradients of the output, of its mean and of its variance.
        slope: What the gradients of inputs and weight are also made of, shape (B, N, T): any layout and type.
        wanted: Which gradients autograd is asked for: of each input, the weight and the bias.
        threads: Of a second run, which must give the same.
    """

    x: list[Tensor]
    params: TdnnParams
    grads: tuple[Tensor | None, Tensor | None, Tensor | None]
    slope: Tensor
    wanted: list[bool]
    dilation: int
    reflect: bool
    relu: bool
    moments: bool
    precision: Precision
    level: str
    threads: int
    kinds: list[str]

    def __str__(self) -> str:
        return (
            f"x {', '.join(described(part) for part in self.x)}, weight {tuple(self.params.weight.shape)}, bias "
            f"{self.params.bias is not None}, grads {', '.join(described(grad) for grad in self.grads)}, slope "
            f"{described(self.slope)}, wanted {self.wanted}, dilation {self.dilation}, reflect {self.reflect}, relu "
            f"{self.relu}, moments {self.moments}, {self.precision}, level {self.level}, threads {self.threads}, "
            f"{', '.join(self.kinds)}"
        )

    @property
    def integers(self) -> list[int]:
        """Of ``conv_relu``."""
        return [_CODES[self.precision], self.dilation, int(self.reflect), int(self.moments), int(self.relu), 0]

    def run(self) -> dict[str, Tensor]:
        """All that the ops give; what has a value for each row under a name that ends in ``rows``."""
        weight, bias = self.params.weight, self.params.bias
        taps, code = weight.shape[2], _CODES[self.precision]
        y, mean, var = _OPS.conv_relu(self.x, weight, bias, self.integers)
        got = {"y rows": y}
        if self.moments:
            got |= {"mean rows": mean, "var rows": var}
        if self.relu:
            got["sums rows"], got["bias rows"] = _OPS.conv_relu_backward(*self.grads, y, mean)
        got["inputs rows"] = _OPS.conv_input_gradient(self.slope, weight, [code, self.dilation])
        got["weight"] = _OPS.conv_weight_gradient(self.x, self.slope, [taps, self.dilation, int(self.reflect), code])
        return got

    def gradients(self) -> list[Tensor | None]:
        """Of each input, the weight and the bias by autograd; none where no output has one."""
        leaves, asked = _leaves((*self.x, self.params.weight, self.params.bias), self.wanted)
        *x, weight, bias = leaves
        assert weight is not None
        y, moments = conv_relu(
            [part for part in x if part is not None], weight, bias, dilation=self.dilation, reflect=self.reflect,
            precision=self.precision, moments=self.moments, relu=self.relu,
        )  # fmt: skip
        return _gradients(leaves, asked, (y, *(moments or ())), self.grads)

    @property
    def rows(self) -> int:
        """Rows B."""
        return len(self.slope)

    def row(self, row: int) -> Convolution:
        """One row of it."""
        grads = [None if grad is None else grad[row : row + 1] for grad in self.grads]
        return dataclasses.replace(
            self,
            x=[part[row : row + 1] for part in self.x],
            grads=(grads[0], grads[1], grads[2]),
            slope=self.slope[row : row + 1],
        )

    def compare(self, got: dict[str, Tensor]) -> int:
        """Checks what :meth:`run` and autograd gave; returns the number of values."""
        joined = torch.cat([part.double() for part in self.x], dim=1)
        compared = assert_within(
            got["y rows"],
            layer(
                exact(joined), self.params, None, self.precision, None,
                dilation=self.dilation, reflect=self.reflect, relu=self.relu,
            ),
        )  # fmt: skip
        y, mean = got["y rows"].double(), None
        if self.moments:
            of_mean, of_var = _moments(y)
            mean = got["mean rows"]
            compared += assert_within(mean, of_mean) + assert_within(got["var rows"], of_var)
        if self.relu:
            sums, of_bias = _relu_gradient(self.grads, y, mean)
            compared += assert_within(got["sums rows"], sums) + assert_within(got["bias rows"], of_bias)
        compared += assert_within(got["inputs rows"].float(), self._input_gradient(self.slope, reflect=False))
        compared += self._compare_weight_gradient(got["weight"], self.slope)
        return compared + self._compare_autograd(got)

    def _compare_autograd(self, got: dict[str, Tensor]) -> int:
        *of_product, of_bias = self.gradients()
        # What the products take is known to the last bit: it was checked above.
        slope = got["sums rows"] if self.relu else self.grads[0]
        if slope is None:
            return 0
        compared = self.compare_products(of_product, slope)
        if of_bias is not None:
            of_rows = got["bias rows"] if self.relu else slope.transpose(1, 2).flatten(0, 1)
            compared += assert_within(of_bias, _sum_of_rows(exact(of_rows), keepdim=False))
        return compared

    def compare_products(self, found: Sequence[Tensor | None], slope: Tensor) -> int:
        """Checks gradients of each input and of the weight, made of ``slope``; returns the number of values."""
        *of_x, of_weight = found
        compared, parts = 0, [part.shape[1] for part in self.x]
        if any(value is not None for value in of_x):
            known = self._input_gradient(slope, reflect=self.reflect)
            rounded = output_type(slope.dtype, self.precision) == torch.bfloat16  # before, as `known` knows
            for of_part, part, *wanted in zip(of_x, self.x, *(value.split(parts, 1) for value in known), strict=True):
                if of_part is not None:
                    assert of_part.dtype == part.dtype
                    compared += assert_within(of_part.float() if rounded else of_part, Known(*wanted))
        if of_weight is not None:
            compared += self._compare_weight_gradient(of_weight, slope)
        return compared

    def _input_gradient(self, slope: Tensor, *, reflect: bool) -> Known:
        """Gradient of the inputs one after the other, rounded to the type that the product gives."""
        weight = weight_as_multiplied(self.params.weight.double(), self.precision)
        values = as_multiplied(slope.double(), self.precision, None)

        def transposed(values: Tensor, weight: Tensor) -> Tensor:
            x = torch.zeros(len(slope), weight.shape[1], slope.shape[2], dtype=torch.float64, requires_grad=True)
            out = reference.tdnn_layer(
                [x], TdnnParams(weight), None, None,
                dilation=self.dilation, reflect=reflect, relu=False, tanh=False, precision="fp32", input_range=None,
            )  # fmt: skip
            return torch.autograd.grad(out, x, values)[0]

        size = transposed(values.abs(), weight.abs())
        outputs, _, taps = weight.shape
        error = _NEAR_1 * UNIT * (outputs * taps + 4) * size
        error = error + transposed(torch.full_like(values, TINY), weight.abs() + 1)
        added = torch.zeros(slope.shape[2], dtype=torch.float64)  # frames beyond the ends that are added to each
        margin = taps // 2 * self.dilation if reflect else 0
        if margin and slope.numel():
            mirrored = pad_by_reflection(torch.arange(slope.shape[2])[None, None], margin)[0, 0]
            outside = torch.cat([mirrored[:margin], mirrored[mirrored.numel() - margin :]])
            added = torch.bincount(outside, minlength=slope.shape[2]).double()
        # Rounded once, and once more for each that is added.
        unit = BFLOAT_UNIT if output_type(slope.dtype, self.precision) == torch.bfloat16 else UNIT
        error = error + ((1 + unit) ** (added + 1) - 1) * (size + error)
        return Known(transposed(values, weight), error)

    def _compare_weight_gradient(self, got: Tensor, slope: Tensor) -> int:
        values, grad = (
            as_multiplied(value.double(), self.precision, None)
            for value in (torch.cat([part.double() for part in self.x], dim=1), slope)
        )

        def gradient(values: Tensor, grad: Tensor) -> Tensor:
            return definition.conv_weight_gradient(
                [values], grad, taps=self.params.weight.shape[2], dilation=self.dilation, reflect=self.reflect,
                precision="fp32",
            )  # fmt: skip

        # Where a value is NaN, all taps of its channel may be.
        unclear = (values.isnan().any(2).any(0) | grad.isnan().any(2).any(0)[:, None])[..., None].expand(got.shape)
        values, grad = values.nan_to_num(), grad.nan_to_num()
        terms = grad.shape[0] * grad.shape[2]
        error = _NEAR_1 * UNIT * (terms + 4) * gradient(values.abs(), grad.abs())
        error = error + gradient(values.abs() + 1, torch.full_like(grad, TINY))
        error = error + gradient(torch.full_like(values, TINY), grad.abs())
        known = Known(gradient(values, grad), error)
        return assert_within(got.masked_fill(unclear, 0), Known(*(value.masked_fill(unclear, 0) for value in known)))


@dataclasses.dataclass
class Affine:
    """A step of training the affine map of channels; as :class:`Convolution`.

    Attributes:
        x: Shape (B, N, T).
        factors: Scale and shift, shape (1, N) or (B, N).
        added: Shape and type of ``x``, or None.
        grads: Gradients of the map and of the sum.
        wanted: Which gradients autograd is asked for: of ``x``, scale, shift and ``added``.
    """

    x: Tensor
    factors: tuple[Tensor, Tensor]
    added: Tensor | None
    grads: tuple[Tensor | None, Tensor | None]
    plain: bool
    wanted: list[bool]
    level: str
    threads: int
    kinds: list[str]

    def __str__(self) -> str:
        return (
            f"x {described(self.x)}, scale and shift {', '.join(described(factor) for factor in self.factors)}, added "
            f"{described(self.added)}, grads {', '.join(described(grad) for grad in self.grads)}, plain {self.plain}, "
            f"wanted {self.wanted}, level {self.level}, threads {self.threads}, {', '.join(self.kinds)}"
        )

    def run(self) -> dict[str, Tensor]:
        """All that the ops give; what has a value for each row under a name that ends in ``rows``."""
        y, total = _OPS.channel_affine(self.x, *self.factors, self.added, self.plain)
        got = {"y rows" if self.plain else "y": y, "total" if self.added is None else "total rows": total}
        back = _OPS.channel_affine_backward(*self.grads, self.x, self.factors[0])
        return got | dict(zip(("x rows", "scale rows", "shift rows"), back, strict=True))

    def gradients(self) -> list[Tensor | None]:
        """Of ``x``, scale, shift and ``added`` by autograd; none where no output has one."""
        leaves, asked = _leaves((self.x, *self.factors, self.added), self.wanted)
        x, scale, shift, added = leaves
        assert x is not None and scale is not None and shift is not None
        outputs = channel_affine(x, scale, shift, added, plain=self.plain)
        return _gradients(leaves, asked, outputs, self._grads_of_outputs())

    def _grads_of_outputs(self) -> list[Tensor | None]:
        """Of those outputs that there are."""
        exist = (self.plain, self.added is not None)
        return [grad if there else None for grad, there in zip(self.grads, exist, strict=True)]

    @property
    def rows(self) -> int:
        """Rows B."""
        return len(self.x)

    def row(self, row: int) -> Affine:
        """One row of it."""
        scale, shift = (factor if len(factor) == 1 else factor[row : row + 1] for factor in self.factors)
        of_y, of_total = (None if grad is None else grad[row : row + 1] for grad in self.grads)
        added = None if self.added is None else self.added[row : row + 1]
        return dataclasses.replace(
            self, x=self.x[row : row + 1], factors=(scale, shift), added=added, grads=(of_y, of_total)
        )

    def compare(self, got: dict[str, Tensor]) -> int:
        """Checks what :meth:`run` and autograd gave; returns the number of values."""
        x, (scale, shift) = self.x.double(), (factor.double()[..., None] for factor in self.factors)
        value, size = x * scale + shift, (x * scale).abs() + shift.abs()
        known, compared = Known(value, 2 * _NEAR_1 * UNIT * size + TINY), 0
        if self.plain:
            compared += assert_within(got["y rows"], known)
        else:
            assert got["y"].shape == (0,)
        if self.added is not None:
            size = size + self.added.double().abs()
            total = Known(value + self.added.double(), 3 * _NEAR_1 * UNIT * size + TINY)
            compared += assert_within(got["total rows"], total)
        else:
            assert got["total"].shape == (0,)
        for name, wanted in zip(("x", "scale", "shift"), self._back(self.grads), strict=True):
            compared += assert_within(got[f"{name} rows"], wanted)
        return compared + self._compare_autograd()

    def _back(self, grads: Sequence[Tensor | None]) -> tuple[Known, Known, Known]:
        x, scale = self.x.double(), self.factors[0].double()[..., None]
        given = [grad.double() for grad in grads if grad is not None]
        grad, size = (sum(values, torch.zeros_like(x)) for values in (given, [value.abs() for value in given]))
        terms = self.x.shape[2] + 3
        return (
            Known(grad * scale, 2 * _NEAR_1 * UNIT * size * scale.abs() + TINY * (1 + scale.abs())),
            Known(
                (grad * x).sum(dim=2), _NEAR_1 * UNIT * terms * (size * x.abs()).sum(dim=2) + terms * TINY
            ),
            Known(grad.sum(dim=2), _NEAR_1 * UNIT * terms * size.sum(dim=2)),
        )  # fmt: skip

    def _compare_autograd(self) -> int:
        of_x, *of_factors, of_added = self.gradients()
        grads = self._grads_of_outputs()
        wanted, *of_rows = self._back(grads)
        compared = 0 if of_x is None else assert_within(of_x, wanted)
        for found, factor, rows in zip(of_factors, self.factors, of_rows, strict=True):
            if found is not None:
                compared += assert_within(found, _sum_of_rows(rows) if len(factor) == 1 else rows)
        if of_added is not None:
            assert grads[1] is not None
            assert same(of_added, grads[1]), "the gradient of what is added is not that of the sum"
        return compared


@dataclasses.dataclass
class BatchNorm:
    """A step of training a convolution with ReLU and batch norm.

    Attributes:
        convolution: What comes before batch norm; its own gradients of outputs are not used.
        factors: Factor and offset after the normalisation, shape (N,), or None.
        added: Shape and type of the output, or None.
        grads: Gradients of the output and of the sum.
        wanted: Which gradients autograd is asked for: of the two factors and of ``added``.
    """

    convolution: Convolution
    factors: tuple[Tensor | None, Tensor | None]
    added: Tensor | None
    grads: tuple[Tensor | None, Tensor | None]
    plain: bool
    eps: float
    wanted: list[bool]
    kinds: list[str]

    @property
    def level(self) -> str:
        """Instruction set."""
        return self.convolution.level

    @property
    def threads(self) -> int:
        """Of a second run."""
        return self.convolution.threads

    def __str__(self) -> str:
        return (
            f"batch norm {', '.join(described(factor) for factor in self.factors)}, eps {self.eps}, added "
            f"{described(self.added)}, grads {', '.join(described(grad) for grad in self.grads)}, plain {self.plain}, "
            f"wanted {self.wanted}, {', '.join(self.kinds)}; {self.convolution}"
        )

    def run(self) -> dict[str, Tensor]:
        """All that the ops give."""
        of = self.convolution
        code = _CODES[of.precision]
        names = ("out", "total", "y", "mean", "var")
        outputs = _OPS.conv_batch_norm(
            of.x, of.params.weight, of.params.bias, *self.factors, self.added,
            [code, of.dilation, int(of.reflect), int(self.plain)], self.eps,
        )  # fmt: skip
        got = dict(zip(names, outputs, strict=True))
        back = _OPS.conv_batch_norm_backward(
            *self._grads_of_outputs(), got["y"], got["mean"], got["var"], self.factors[0], self.eps
        )
        return got | dict(zip(("sums", "of bias", "of gamma", "of beta"), back, strict=True))

    def gradients(self) -> list[Tensor | None]:
        """Of each input, the weight, the bias, both factors and ``added`` by autograd; none where no output has one."""
        of = self.convolution
        tensors = (*of.x, of.params.weight, of.params.bias, *self.factors, self.added)
        leaves, asked = _leaves(tensors, [*of.wanted, *self.wanted])
        *x, weight, bias, gamma, beta, added = leaves
        assert weight is not None
        found = conv_batch_norm(
            [part for part in x if part is not None], weight, bias, gamma, beta, added, eps=self.eps,
            dilation=of.dilation, reflect=of.reflect, precision=of.precision, plain=self.plain,
        )  # fmt: skip
        return _gradients(leaves, asked, found[:2], self._grads_of_outputs())

    def _grads_of_outputs(self) -> list[Tensor | None]:
        """Of those outputs that there are."""
        exist = (self.plain, self.added is not None)
        return [grad if there else None for grad, there in zip(self.grads, exist, strict=True)]

    def compare(self, got: dict[str, Tensor]) -> int:
        """Checks what :meth:`run` and autograd gave; returns the number of values."""
        of, frames = self.convolution, got["y"].shape[2]
        assert same(got["y"], dataclasses.replace(of, moments=False).run()["y rows"]), "y is not that of conv_relu"
        y = got["y"].double()
        compared = sum(
            assert_within(got[name], known) for name, known in zip(("mean", "var"), _batch_moments(y), strict=True)
        )
        # From here on with the moments as they were found.
        mean, root = (got[name].double()[:, None] for name in ("mean", "var"))
        root = (root + self.eps).rsqrt()
        gamma, beta = (
            torch.tensor(default, dtype=torch.float64) if factor is None else factor.double()[:, None]
            for factor, default in zip(self.factors, (1.0, 0.0), strict=True)
        )
        scale = root * gamma
        shift = beta - scale * mean
        value, size = y * scale + shift, (y * scale).abs() + shift.abs()
        if self.plain:
            compared += assert_within(got["out"], Known(value, 3 * _NEAR_1 * UNIT * size + TINY))
        else:
            assert got["out"].shape == (0,)
        if self.added is not None:
            added = self.added.double()
            total = Known(value + added, 4 * _NEAR_1 * UNIT * (size + added.abs()) + TINY)
            compared += assert_within(got["total"], total)
        else:
            assert got["total"].shape == (0,)

        given = [grad.double() for grad in self._grads_of_outputs() if grad is not None]
        grad, size = (sum(values, torch.zeros_like(y)) for values in (given, [value.abs() for value in given]))
        far, share = y - mean, 1 / (y.shape[0] * frames)
        # Sums over rows and frames, of gradients and of their products with what is normalised, and their errors.
        sums, products = (values.sum(dim=(0, 2))[:, None] for values in (grad, grad * far))
        of_sums, of_products = (
            _NEAR_1 * UNIT * (frames + 6) * values.sum(dim=(0, 2))[:, None] + TINY
            for values in (size, size * far.abs())
        )
        compared += assert_within(got["of beta"], Known(sums[:, 0], of_sums[:, 0]))
        of_gamma = (root * of_products + 3 * UNIT * (root * products).abs() + TINY)[:, 0]
        compared += assert_within(got["of gamma"], Known((root * products)[:, 0], of_gamma))
        square = root.square() * far
        value = scale * (grad - share * sums - share * square * products)
        terms = size + share * sums.abs() + share * (square * products).abs()
        error = 8 * UNIT * scale.abs() * terms + 4 * TINY * (1 + far.abs())
        error = error + scale.abs() * share * (of_sums + square.abs() * of_products)
        value, error, terms = (part.masked_fill(y <= 0, 0) for part in (value, error, terms * scale.abs()))
        compared += assert_within(got["sums"], Known(value, error))
        of_bias = error.sum(dim=(0, 2)) + _NEAR_1 * UNIT * (frames + 4) * (terms + error).sum(dim=(0, 2))
        compared += assert_within(got["of bias"], Known(value.sum(dim=(0, 2)), of_bias))
        return compared + self._compare_autograd(got)

    def _compare_autograd(self, got: dict[str, Tensor]) -> int:
        *of_product, of_bias, of_gamma, of_beta, of_added = self.gradients()
        for name, found in (("of bias", of_bias), ("of gamma", of_gamma), ("of beta", of_beta)):
            assert found is None or same(found, got[name]), f"{name}: autograd gives another"
        if of_added is not None:
            grad = self._grads_of_outputs()[1]
            assert grad is not None
            assert same(of_added, grad), "the gradient of what is added is not that of the sum"
        return self.convolution.compare_products(of_product, got["sums"])


Case = Convolution | Affine | BatchNorm


def draw(rng: np.random.Generator) -> Case:
    """A case."""
    drawn = rng.random()
    return _draw_affine(rng) if drawn < 0.3 else _draw_convolution(rng) if drawn < 0.7 else _draw_batch_norm(rng)


def check(case: Case) -> collections.Counter[str]:
    """Checks one case against the definitions in float64, and against itself.

    Raises:
        AssertionError: If a kernel is wrong.
    """
    with surroundings(case.level):
        got = case.run()
        if case.threads > 1:
            torch.set_num_threads(case.threads)
            again = case.run()
            torch.set_num_threads(1)
            for name, value in got.items():
                assert same(again[name], value), f"{name}: with more threads it is another"
        alone = [] if isinstance(case, BatchNorm) else [case.row(row) for row in range(min(2, case.rows))]
        for row, one in enumerate(alone):
            for name, value in one.run().items():
                if name.endswith(" rows"):
                    assert same(value[0], got[name][row]), f"{name}: row {row} alone is another"
        return collections.Counter(compared=case.compare(got))


def _draw_convolution(rng: np.random.Generator) -> Convolution:
    precision: Precision = ("fp32", "bf16")[int(rng.integers(2))]
    batch = int(rng.choice(_BATCHES, p=[0.02, 0.3, 0.28, 0.2, 0.1, 0.1]))
    parts = [int(rng.choice(_CHANNELS)) for _ in range(rng.choice([1, 2, 3], p=[0.7, 0.15, 0.15]))]
    if len(parts) > 1 and rng.random() < 0.1:
        parts[int(rng.integers(len(parts)))] = 0
    if rng.random() < 0.03:
        parts[0] = 300  # more than one block of the gradient of the weight has
    outputs, taps = int(rng.choice(_CHANNELS)), int(rng.choice([1, 3, 5, 7], p=[0.3, 0.45, 0.15, 0.1]))
    frames = draw_frame_count(rng, batch * sum(parts) * outputs * taps)
    if rng.random() < 0.03:  # several blocks of time, and parts of it
        batch, parts, outputs, taps = 2, parts[:1], min(outputs, 5), min(taps, 3)
        frames = int(rng.integers(700, 1700)) // max(1, parts[0] // 8)
    size = float(rng.choice([1, 1, 1, 1e-3, 1e6, 1e-25]))
    dtype = _TYPES[int(rng.integers(2))]
    drawn = [draw_part(rng, (batch, part, frames), size, dtype, None, True) for part in parts]
    relu = bool(rng.random() < 0.85)
    moments = relu and bool(rng.random() < 0.8)
    of_y, kind = draw_part(rng, (batch, outputs, frames), 1.0, output_type(dtype, precision), None, True)
    of_mean, of_var = (_vectors(rng, batch, outputs) if moments and rng.random() < 0.7 else None for _ in range(2))
    slope, of_slope = draw_part(rng, (batch, outputs, frames), size, _TYPES[int(rng.integers(2))], None, True)
    return Convolution(
        [x for x, _ in drawn], draw_params(rng, outputs, sum(parts), taps, size, affine=0),
        (of_y if not relu or rng.random() < 0.75 else None, of_mean, of_var), slope,
        [bool(rng.random() < 0.7) for _ in range(len(parts) + 2)], int(rng.choice([1, 1, 2, 3, 4, 60])),
        bool(rng.random() < 0.4), relu, moments, precision, *draw_level_and_threads(rng),
        [*(f"x {kind}" for _, kind in drawn), f"grad {kind}", f"slope {of_slope}"],
    )  # fmt: skip


def _draw_affine(rng: np.random.Generator) -> Affine:
    batch = int(rng.choice(_BATCHES, p=[0.02, 0.3, 0.28, 0.2, 0.1, 0.1]))
    channels = int(rng.choice(_CHANNELS))
    frames = draw_frame_count(rng, 4 * batch * channels)
    if rng.random() < 0.1:  # enough for several threads
        frames *= 4
    size, dtype = float(rng.choice([1, 1, 1, 1e-3, 1e6, 1e-25])), _TYPES[int(rng.integers(2))]
    shape = (batch, channels, frames)
    (x, kind), *others = (draw_part(rng, shape, size, dtype, None, True) for _ in range(4))
    added, of_y, of_total = (other if rng.random() < 0.6 else None for other, _ in others)
    rows = 1 if rng.random() < 0.5 else batch
    level, threads = draw_level_and_threads(rng)
    return Affine(
        x, (_vectors(rng, rows, channels), _vectors(rng, rows, channels)), added, (of_y, of_total),
        added is None or bool(rng.random() < 0.6), [bool(rng.random() < 0.7) for _ in range(4)], level,
        max(threads, int(rng.choice([1, 2, 3], p=[0.7, 0.15, 0.15]))), [kind, *(of_other for _, of_other in others)],
    )  # fmt: skip


def _draw_batch_norm(rng: np.random.Generator) -> Case:
    of = dataclasses.replace(_draw_convolution(rng), relu=True, moments=False, grads=(None, None, None))
    if not of.slope.numel():  # of no values there are no statistics
        return of
    dtype = output_type(of.x[0].dtype, of.precision)
    batch, channels, frames = of.slope.shape
    drawn = [draw_part(rng, (batch, channels, frames), 1.0, dtype, None, True) for _ in range(3)]
    added, of_out, of_total = (value if rng.random() < 0.7 else None for value, _ in drawn)
    gamma, beta = (_vectors(rng, 1, channels)[0] if rng.random() < 0.8 else None for _ in range(2))
    return BatchNorm(
        of, (gamma, beta), added, (of_out, of_total), added is None or bool(rng.random() < 0.7),
        float(rng.choice([1e-5, 1e-3])), [bool(rng.random() < 0.7) for _ in range(3)], [kind for _, kind in drawn],
    )  # fmt: skip


def _vectors(rng: np.random.Generator, rows: int, channels: int) -> Tensor:
    """Float32 values (rows, channels), now and then every second one among NaN."""
    values = torch.from_numpy(rng.standard_normal((rows, channels))).float()
    if rng.random() < 0.3:
        values = torch.full((rows, channels, 2), torch.nan).index_copy(2, torch.tensor([0]), values[..., None])[..., 0]
    return values


def _leaves(tensors: Sequence[Tensor | None], wanted: Sequence[bool]) -> tuple[list[Tensor | None], list[Tensor]]:
    """The tensors as leaves of autograd, and those whose gradient is wanted."""
    leaves = [None if tensor is None else tensor.detach() for tensor in tensors]
    chosen = zip(leaves, wanted, strict=True)
    return leaves, [leaf.requires_grad_() for leaf, want in chosen if want and leaf is not None]


def _gradients(
    leaves: Sequence[Tensor | None],
    asked: Sequence[Tensor],
    outputs: Sequence[Tensor],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """By autograd, in the places of the leaves that are asked for."""
    there = [(out, grad) for out, grad in zip(outputs, grads, strict=False) if grad is not None]
    if not asked or not there:
        return [None] * len(leaves)
    found = iter(torch.autograd.grad([out for out, _ in there], asked, [grad for _, grad in there], allow_unused=True))
    return [next(found) if leaf is not None and leaf.requires_grad else None for leaf in leaves]


def _moments(y: Tensor) -> tuple[Known, Known]:
    """Mean and biased variance over the frames of (B, N, T); 0 of none."""
    frames = y.shape[2]
    if not frames:
        nothing = exact(y.new_zeros(y.shape[:2]))
        return nothing, nothing
    mean = y.mean(dim=2)
    error = _NEAR_1 * UNIT * (frames + 3) * y.abs().mean(dim=2) + TINY
    # A wrong mean adds its error's square; a difference from it rounds too.
    var = (y - mean[..., None]).square().mean(dim=2)
    rounded = _NEAR_1 * UNIT * (frames + 6) * (var + error.square()) + TINY
    return Known(mean, error), Known(var, error.square() + rounded)


def _relu_gradient(grads: Sequence[Tensor | None], y: Tensor, mean: Tensor | None) -> tuple[Known, Known]:
    """Of the sums that ReLU takes, and of the bias for each row."""
    of_y, of_mean, of_var = (None if grad is None else grad.double() for grad in grads)
    frames = y.shape[2]
    if not frames:
        return exact(y), exact(y.new_zeros(y.shape[:2]))
    size = torch.zeros_like(y) if of_y is None else of_y.abs()
    if of_mean is not None:
        size = size + of_mean.abs()[..., None] / frames
        # A variance whose gradient is missing has 0: a mean that is NaN shows.
        of_var = torch.zeros_like(of_mean) if of_var is None else of_var
    means = y.new_zeros(y.shape[:2]) if mean is None else mean.double()
    if of_var is not None:
        size = size + 2 / frames * of_var.abs()[..., None] * (y - means[..., None]).abs()
    value, of_bias = definition.conv_relu_backward(of_y, of_mean, of_var, y, means)
    error = (8 * UNIT * size + 4 * TINY).masked_fill(y <= 0, 0)
    size = size.masked_fill(y <= 0, 0)
    of_sums = error.sum(dim=2) + _NEAR_1 * UNIT * (frames + 2) * (size + error).sum(dim=2)
    return Known(value, error), Known(of_bias, of_sums)


def _batch_moments(y: Tensor) -> tuple[Known, Known]:
    """Mean and biased variance over rows and frames of (B, N, T), made of those of each row."""
    (means, of_means), (_, of_vars) = _moments(y)
    mean, of_mean = means.mean(dim=0), of_means.mean(dim=0) + 2 * UNIT * means.abs().mean(dim=0)
    var = y.var(dim=(0, 2), unbiased=False)
    far, of_far = (means - mean).abs(), of_means + of_mean
    error = (of_vars + 2 * far * of_far + of_far.square()).mean(dim=0)
    return Known(mean, of_mean), Known(var, error + 2 * UNIT * (var + error) + TINY)


def _sum_of_rows(rows: Known, *, keepdim: bool = True) -> Known:
    """Over the first dimension, added up in float32."""
    value, error, size = (part.sum(dim=0, keepdim=keepdim) for part in (*rows, rows.value.abs() + rows.error))
    return Known(value, error + _NEAR_1 * UNIT * (len(rows.value) + 1) * size)
