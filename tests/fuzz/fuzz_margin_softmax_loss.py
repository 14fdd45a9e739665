"""Random cases of the sums of margin_softmax_loss: outputs and gradients within what rounding may do to each."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from spkfast.ops import margin_softmax_loss as _registers_the_op  # noqa: F401
from spkfast.reference.margin_softmax_loss import BINARY_A, BINARY_C, LOG_SUM, unit
from tests.fuzz.bounds_products import BFLOAT_UNIT, EXPONENTIAL, TINY, UNIT, Known, assert_within
from tests.fuzz.fuzz_attentive_stats_pool import same
from tests.fuzz.fuzz_tdnn_layer import draw_level_and_threads
from tests.fuzz.surroundings import surroundings

BATCHES = (0, 1, 3, 16, 17, 70)
CLASSES = (1, 2, 5, 63, 130, 1000)
SUBCENTERS = (1, 2, 3)
FEATURES = (1, 7, 64, 192)
TOPKS = (0, 1, 5, 1001)
NAMES = ("sums", "total", "chosen", "best", "own", "rows")
_NEAR_1 = 1.02  # for products of roundings
_UNKNOWN = 2.0**-22  # squares of sines whose derivative is lost
_BLOCK = 96  # rows of the weight whose terms are added before anything else is
_OPS = torch.ops.spkfast


@dataclasses.dataclass
class Case:
    """Arguments of the op, and gradients of its outputs.

    Attributes:
        x: Shape (B, E).
        weight: Shape (N * K, E).
        bias: Of classes or of binary logits, or None.
        target: Shape (B,); what is no class stands for none.
        normalise: Whether rows of ``weight`` are scaled to length 1.
        subcenters: K.
        topk: Classes that are left out.
        bf16: Whether operands are rounded to bfloat16.
        summed: Code of what is summed.
        power: Of binary sums.
        scale: Of cosines.
        margin: Of binary sums.
        grads: Gradients of the sums, of the totals and of the chosen rows.
        level: Instruction set.
        threads: Of a second call.
        kinds: What was drawn.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    normalise: bool
    subcenters: int
    topk: int
    bf16: bool
    summed: int
    power: int
    scale: float
    margin: float
    grads: tuple[Tensor, Tensor, Tensor]
    level: str = ""
    threads: int = 1
    kinds: str = ""

    def __str__(self) -> str:
        return (
            f"B={len(self.x)} N={self.classes} K={self.subcenters} E={self.x.shape[1]} topk={self.topk} "
            f"bias={self.bias is not None} normalise={self.normalise} bf16={self.bf16} summed={self.summed} "
            f"power={self.power} scale={self.scale} margin={self.margin} {self.level} "
            f"threads={self.threads} {self.kinds}"
        )

    @property
    def classes(self) -> int:
        """N."""
        return len(self.weight) // self.subcenters

    def run(self) -> dict[str, Tensor]:
        """Outputs, and gradients as ``of x``, ``of weight`` and ``of bias``."""
        integers = [int(self.normalise), self.subcenters, self.topk, int(self.bf16), self.summed, self.power]
        arguments = (self.x, self.weight, self.bias, self.target, integers, [self.scale, self.margin])
        out = _OPS.margin_softmax_loss(*arguments)
        grads = _OPS.margin_softmax_loss_backward(*self.grads, *arguments, *out)
        return dict(zip((*NAMES, "of x", "of weight", "of bias"), (*out, *grads), strict=True))

    def compare(self, got: dict[str, Tensor]) -> int:
        """Checks what :meth:`run` gave; returns the number of values."""
        return Comparison(self, got).run()


class Comparison:
    """What an exact program has, given the rows that a kernel chose, and by how much a kernel's values may differ."""

    def __init__(self, case: Case, got: dict[str, Tensor]) -> None:
        self.case, self.got = case, got
        k = case.subcenters
        lengths = torch.linalg.vector_norm(case.weight.double(), dim=1)
        short = lengths < 1e-12
        ones = torch.ones_like(lengths)
        self.factors = torch.where(short, 0, 1 / lengths.masked_fill(short, 1)) if case.normalise else ones
        self.x, self.rounded = ((value.bfloat16() if case.bf16 else value).double() for value in (case.x, case.weight))
        features = case.x.shape[1]
        # Of a length, and what is done with it.
        self.of_factors = UNIT * (features / 8 + 5) * case.normalise
        each = (self.x @ self.rounded.T) * self.factors
        size = (self.x.abs() @ self.rounded.abs().T + TINY) * self.factors
        error = _NEAR_1 * (UNIT * (features + 3) * size + self.of_factors * each.abs()) + TINY
        self.each, self.of_each = each.unflatten(1, (-1, k)), error.unflatten(1, (-1, k))
        self.best = self.each.amax(dim=2)
        cosine, error = self.best, self.of_each.amax(dim=2)
        if case.bias is not None and case.summed == LOG_SUM:
            cosine = cosine + case.bias.double()
            error = error + UNIT * (cosine.abs() + error)
        self.cosine, self.error = cosine, error

        rows = got["rows"]
        self.present = rows >= 0
        self.classes = torch.where(self.present, rows // k, case.classes)
        left_out = torch.zeros(len(rows), case.classes + 1, dtype=torch.bool).scatter(1, self.classes, True)
        self.ordinary = ~left_out[:, : case.classes]

    def run(self) -> int:
        """Checks everything; returns the number of values."""
        self._check_rows()
        return self._check_sums() + self._check_gradients()

    def _within(self, name: str, value: Tensor, error: Tensor) -> int:
        got = self.got[name]
        assert got.dtype == torch.float32, f"{name} is {got.dtype}"
        infinite = value.isinf()
        assert got.shape == value.shape and torch.equal(got[infinite].double(), value[infinite]), f"{name}: infinite"
        error = error + UNIT * (value.abs() + error) + TINY
        try:
            return assert_within(got[~infinite], Known(value[~infinite], error[~infinite]))
        except AssertionError as failure:
            raise AssertionError(f"{name}: {failure}") from failure

    def _check_rows(self) -> None:
        case, rows, present = self.case, self.got["rows"], self.present
        assert rows.shape == (len(case.x), 1 + case.topk) and (rows < len(case.weight)).all()
        target = torch.where((case.target >= 0) & (case.target < case.classes), case.target, -1)
        missing = target < 0
        assert torch.equal(present[:, 0], ~missing), "a target is missing"
        assert torch.equal(self.classes[:, 0][~missing], target[~missing]), "the first row is not the target's"
        # As many others as there are, each class once.
        count = torch.where(missing, case.classes, case.classes - 1).clamp_max(case.topk)
        assert torch.equal(present[:, 1:].sum(dim=1), count), "too few or too many of the hardest"
        assert torch.equal(present[:, 1:], torch.arange(case.topk) < count[:, None]), "those that are missing come last"
        ordered = self.classes.sort(dim=1).values
        assert ((ordered[:, 1:] > ordered[:, :-1]) | (ordered[:, 1:] == case.classes)).all(), "a class comes twice"
        chosen = torch.where(present[..., None], case.weight[rows.clamp_min(0)], 0)
        assert torch.equal(self.got["chosen"], chosen), "chosen rows are others"
        # Each is the largest of its class, they fall, and no ordinary one is larger; but for rounding.
        place = torch.where(present, self.classes, 0)
        each, error = (value.flatten(1).gather(1, rows.clamp_min(0)) for value in (self.each, self.of_each))
        largest, slack = self.best.gather(1, place), self.of_each.amax(dim=2).gather(1, place)
        assert (~present | (each + error >= largest - slack)).all(), "not the largest sub-center"
        values, slack = (value.gather(1, place)[:, 1:] for value in (self.cosine, self.error))
        high, low = (values + slack), (values - slack)
        both = present[:, 2:]
        assert (~both | (high[:, :-1] >= low[:, 1:])).all(), "the hardest are not in order"
        if case.topk:
            least = torch.where(present[:, 1:], high, torch.inf).amin(dim=1, keepdim=True)
            assert (~self.ordinary | (self.cosine - self.error <= least)).all(), "one that is harder was not chosen"

    def _check_sums(self) -> int:
        case, cosine, error = self.case, self.cosine, self.error
        target = case.target.clamp(0, case.classes - 1)[:, None]
        missing = ~self.present[:, 0]
        own, of_own = (value.gather(1, target)[:, 0] for value in (cosine, error))
        compared = self._within("own", own.masked_fill(missing, -torch.inf), of_own)
        others = torch.ones_like(self.ordinary).scatter(1, target, missing[:, None])
        best = cosine.masked_fill(~others, -torch.inf).amax(dim=1)
        compared += self._within("best", best, (error * others).amax(dim=1))
        added = UNIT * (_BLOCK + 4)
        if case.summed == LOG_SUM:
            logits = (case.scale * cosine).masked_fill(~self.ordinary, -torch.inf)
            self.sums = logits.logsumexp(dim=1)
            share = (logits - self.sums[:, None]).exp().masked_fill(~self.ordinary, 0)
            reach = torch.where(self.ordinary, (logits.amax(dim=1, keepdim=True) - logits).abs(), 0)
            blocks = 2 + len(case.weight) / (_BLOCK / 2)
            lost = added + blocks * 2 * EXPONENTIAL + 4 * UNIT * reach.amax(dim=1)
            of_term = torch.expm1(case.scale * error + 4 * UNIT * reach)
            self.of_sums = _NEAR_1 * ((share * of_term).sum(dim=1) + lost) + UNIT * self.sums.abs()
            self.of_sums = self.of_sums.masked_fill(self.sums.isinf(), 0)
            self.share = share
            terms = torch.where(self.ordinary, cosine, 0)
            of_total = (error * self.ordinary).sum(dim=1) + added * terms.abs().sum(dim=1)
            compared += self._within("total", terms.sum(dim=1), of_total)
            return compared + self._within("sums", self.sums, self.of_sums)
        assert (self.got["total"] == 0).all()
        logit, of_logit = self._around(lambda c: self._logit(c)[0])
        terms = torch.where(self.ordinary, F.softplus(logit), 0)
        of_terms = torch.where(self.ordinary, logit.sigmoid() * of_logit + of_logit.square(), 0) + 5e-7 * terms
        value = terms.sum(dim=1)
        return compared + self._within("sums", value, of_terms.sum(dim=1) + added * value)

    def _logit(self, cosine: Tensor) -> tuple[Tensor, Tensor]:
        """The logit of a binary classifier, and its derivative."""
        case = self.case
        slope, outer = torch.ones_like(cosine), case.margin
        if case.summed == BINARY_A:
            square = 1 - cosine.square()
            sine = square.clamp_min(1e-12).sqrt()
            slope = np.cos(case.margin) - np.sin(case.margin) * torch.where(square < _UNKNOWN, 0, cosine / sine)
            cosine, outer = cosine * np.cos(case.margin) + sine * np.sin(case.margin), 0.0
        half = (cosine + 1) / 2
        bias = 0.0 if case.bias is None else float(case.bias)
        logit = case.scale * (2 * half**case.power - 1 + outer) + bias
        return logit, case.scale * case.power * half ** (case.power - 1) * slope

    def _around(self, function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """A function of the cosines, and how much it may differ."""
        # What is rounded once more lies between the cosines and what they become.
        reach = self.error + 2 * UNIT
        value = function(self.cosine)
        moved = torch.stack([function(self.cosine + part * reach) - value for part in (-1, -0.5, 0.5, 1)])
        size = self.case.scale * (4 + abs(self.case.margin)) + abs(float(self.case.bias or 0))
        rounded = UNIT * (4 * self.case.power + 16)
        return value, 1.5 * moved.abs().amax(dim=0) + rounded * (size + value.abs())

    def _check_gradients(self) -> int:
        case = self.case
        of_sums, of_total, of_chosen = (grad.double() for grad in case.grads)
        features, rows = case.x.shape[1], len(case.weight)
        if case.summed == LOG_SUM:
            of_sums = of_sums.masked_fill(self.sums.isinf(), 0)[:, None]
            exponential = case.scale * of_sums * self.share
            moved = case.scale * self.error + self.of_sums[:, None]
            moved = moved + 4 * UNIT * (case.scale * self.cosine.abs() + self.sums.abs()[:, None]).nan_to_num(0, 0, 0)
            grad = torch.where(self.ordinary, exponential + of_total[:, None], 0)
            # Below the baseline's smallest power of 2 an exponential is 0.
            error = exponential.abs() * torch.expm1(moved.masked_fill(~self.ordinary, 0) + 3 * EXPONENTIAL)
            error = error + 3 * UNIT * (exponential.abs() + grad.abs()) + 2 * TINY * case.scale * of_sums.abs()
            of_bias = Known(grad.sum(dim=0), error.sum(dim=0) + UNIT * (len(grad) + 20) * grad.abs().sum(dim=0))
        else:
            (logit, of_logit), (slope, of_slope) = (
                self._around(lambda c, i=i: self._logit(c)[i])
                for i in (0, 1)  # type: ignore[misc]
            )
            if case.summed == BINARY_A:
                # Anything from no derivative of the sine to the largest one.
                lost = 1 - self.cosine.square() <= 4 * (self.error + UNIT) + _UNKNOWN
                steepest = case.scale * case.power * 1.1 / _UNKNOWN**0.5 * abs(np.sin(case.margin))
                of_slope = of_slope + torch.where(lost, steepest, 0)
            inner = torch.where(self.ordinary, of_sums[:, None] * logit.sigmoid(), 0)
            of_inner = inner.abs() * (torch.expm1(of_logit.clamp_max(50)) + 8 * UNIT)
            grad, error = inner * slope, of_inner * slope.abs() + inner.abs() * of_slope + of_inner * of_slope
            error = error + 2 * UNIT * grad.abs()
            of_bias = Known(inner.sum()[None], (of_inner.sum() + UNIT * (_BLOCK + 20) * inner.abs().sum())[None])
        compared = 0
        if case.bias is None:
            assert self.got["of bias"].shape == (0,)
        else:
            compared += self._within("of bias", *of_bias)

        # It goes to the largest sub-center, the first of equal ones, or to another that rounding makes larger.
        near = self.each + self.of_each >= (self.best - self.of_each.amax(dim=2))[..., None]
        first = F.one_hot(self.each.max(dim=2).indices, case.subcenters).bool()
        unsure = near & (near.sum(dim=2, keepdim=True) > 1)
        each = torch.where(first, grad[..., None], 0).flatten(1) * self.factors
        of_each = torch.where(near, error[..., None], 0) + torch.where(unsure, grad.abs()[..., None], 0)
        of_each = of_each.flatten(1) * self.factors
        of_each = of_each + (self.of_factors + UNIT) * (each.abs() + of_each) + TINY * (self.factors > 0)
        if case.bf16:
            of_each = of_each + BFLOAT_UNIT * (each.abs() + of_each)
        of_x = of_each @ self.rounded.abs() + TINY * rows
        of_x = of_x + UNIT * (2 * _BLOCK + rows / 16) * ((each.abs() + of_each) @ self.rounded.abs())
        compared += self._within("of x", each @ self.rounded, _NEAR_1 * of_x)

        v = unit(case.weight.double()) * case.normalise
        back, size = each.T @ self.x, (each.abs() + of_each).T @ self.x.abs()
        of_back = of_each.T @ self.x.abs() + UNIT * (len(self.x) + 2) * size + TINY * len(self.x)
        of_weight = back - v * (v * back).sum(dim=1, keepdim=True)
        size = size + v.abs() * (v.abs() * size).sum(dim=1, keepdim=True)
        lost = of_back + v.abs() * (v.abs() * of_back).sum(dim=1, keepdim=True) + UNIT * (features + 12) * size
        present = self.present.flatten()
        places, added = self.got["rows"].flatten()[present], of_chosen.flatten(0, 1)[present]
        of_weight = of_weight.index_add(0, places, added)
        times = torch.bincount(places, minlength=rows)[:, None]
        lost = lost + UNIT * (times + 1) * (size + torch.zeros_like(size).index_add(0, places, added.abs()))
        return compared + self._within("of weight", of_weight, _NEAR_1 * lost)


def draw(rng: np.random.Generator) -> Case:
    """A case."""
    batch, classes, k, features, topk = (
        int(rng.choice(values)) for values in (BATCHES, CLASSES, SUBCENTERS, FEATURES, TOPKS)
    )
    if rng.random() < 0.5:
        batch, classes, features = (int(rng.integers(1, most)) for most in (40, 300, 70))
    summed = int(rng.choice([LOG_SUM, LOG_SUM, BINARY_C, BINARY_A]))
    normalise = summed != LOG_SUM or bool(rng.random() < 0.6)
    x, weight = (_normal(rng, count, features) for count in (batch, classes * k))
    kinds = []
    if normalise:
        x = F.normalize(x, dim=1)
    for kind, chance in (("sizes", 0.3), ("equal", 0.2), ("whole", 0.1), ("zeros", 0.2), ("parallel", 0.2)):
        if rng.random() > chance:
            continue
        kinds.append(kind)
        if kind == "sizes":
            weight = weight * torch.from_numpy(10 ** rng.uniform(-3, 1, (len(weight), 1))).float()
        elif kind == "equal":
            weight = weight[torch.from_numpy(rng.integers(0, len(weight), len(weight)))]
        elif kind == "whole":
            weight = weight.round()
        elif kind == "zeros":
            weight = weight * torch.from_numpy(rng.integers(0, 2, (len(weight), 1))).float()
            x = x * torch.from_numpy(rng.integers(0, 4, (batch, 1)) > 0).float()
        elif batch:
            some = torch.from_numpy(rng.integers(0, batch, len(weight)))
            weight = torch.where(torch.from_numpy(rng.random((len(weight), 1)) < 0.3), -x[some], weight)
            weight = torch.where(torch.from_numpy(rng.random((len(weight), 1)) < 0.3), 3 * x[some], weight)
    bias = None
    if rng.random() < 0.5:
        bias = _normal(rng, classes if summed == LOG_SUM else 1)
    target = torch.from_numpy(rng.integers(-1, classes + 1, batch))
    grads = (_normal(rng, batch), _normal(rng, batch) * int(rng.integers(2)), _normal(rng, batch, 1 + topk, features))
    return Case(
        x, weight, bias, target, normalise, k, topk, bool(rng.random() < 0.4), summed,
        int(rng.choice([1, 2, 3, 7])), float(rng.choice([1.0, 8.0, 32.0, 64.0])), float(rng.choice([0.0, 0.2, 0.5])),
        grads, *draw_level_and_threads(rng), " ".join(kinds),
    )  # fmt: skip


def check(case: Case) -> collections.Counter[str]:
    """Checks one case against exact numbers, and against itself.

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
        return collections.Counter(compared=case.compare(got))


def _normal(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape)).float()
