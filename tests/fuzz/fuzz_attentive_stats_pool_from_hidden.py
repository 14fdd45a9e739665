"""Random cases of attentive_stats_pool_from_hidden on the CPU, with the frames and batches of attentive_stats_pool."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np
import torch
from torch import Tensor

from spkfast import functional
from tests.fuzz.bounds_attentive_stats_pool import TINY, UNIT, error_bounds
from tests.fuzz.fuzz_attentive_stats_pool import (
    check_alone,
    compare,
    counted,
    described,
    draw_dtype,
    draw_frames,
    draw_grads,
    draw_lengths,
    draw_shape,
    draw_surroundings,
    draw_values,
    same,
    three_ways,
)
from tests.fuzz.surroundings import surroundings

_RESULTS = ("mean", "var", "grad_x", "grad_hidden", "grad_weight", "grad_bias")


@dataclasses.dataclass
class Case:
    """One call of the op; as the case of ``attentive_stats_pool``.

    Attributes:
        lengths: May lie outside 0..T.
    """

    x: Tensor
    hidden: Tensor
    weight: Tensor
    bias: Tensor
    lengths: Tensor | None
    grads: tuple[Tensor, Tensor]
    level: str
    threads: int
    kinds: list[str]

    def __str__(self) -> str:
        lengths = None if self.lengths is None else self.lengths.tolist()
        return (
            f"x {described(self.x)}, hidden {described(self.hidden)}, weight {described(self.weight)}, lengths "
            f"{lengths}, level {self.level}, threads {self.threads}, {', '.join(self.kinds)}"
        )


def draw(rng: np.random.Generator) -> Case:
    """A case."""
    shape, dtype = draw_shape(rng), draw_dtype(rng)
    batch, channels, frames = shape
    units = int(rng.choice([1, 2, 7, 8, 16, 33, 64]))
    lengths = draw_lengths(rng, shape)
    x, of_x = draw_frames(rng, draw_values(rng, shape), dtype, lengths)
    values = rng.standard_normal((batch, units, frames)) * 10 ** rng.uniform(-1, 0.5)
    if rng.random() < 0.3:  # as after a ReLU
        values = np.maximum(values, 0)
    hidden, of_hidden = draw_frames(rng, (values, []), dtype, lengths)
    weight = rng.standard_normal((channels, units)) * 10 ** rng.uniform(-1, 0.5) / units**0.5
    bias = rng.standard_normal(channels) * rng.choice([0, 1, 1e3], p=[0.2, 0.7, 0.1])
    tensors = [torch.from_numpy(value).to(dtype) for value in (weight, bias)]
    if rng.random() < 0.3:
        tensors = [tensors[0].T.contiguous().T, tensors[1].repeat_interleave(2)[::2]]
    kinds = [f"x {of_x}", f"hidden {of_hidden}"]
    return Case(x, hidden, tensors[0], tensors[1], lengths, draw_grads(rng, shape), *draw_surroundings(rng), kinds)


def check(case: Case) -> collections.Counter[str]:
    """Checks one case against the definition in float64, and against itself.

    Raises:
        AssertionError: If the kernel is wrong.
    """
    with surroundings(case.level):
        counts = counted(case.lengths, case.x)
        if case.lengths is not None and not torch.equal(counts, case.lengths):
            _check_clamped(case, counts)
        lengths = None if case.lengths is None else counts
        tensors = [case.x, case.hidden, case.weight, case.bias]
        call = functional.weighted_moments_from_hidden
        # The gradient is made of matrix products, which round as their sizes and threads are.
        check_alone(call, tensors, lengths, case.grads, case.threads, num_results=2)
        ways = zip(*three_ways(call, tensors, lengths, case.grads), strict=True)
        results = dict(zip(_RESULTS, ways, strict=True))
        # A softmax over frames does not see a bias: no gradient, be there NaN or not.
        results["grad_bias"] = (results["grad_bias"][0], *[torch.zeros(len(case.bias), dtype=torch.float64)] * 2)
        return compare(results, *_bounds(case, counts))


def _check_clamped(case: Case, counts: Tensor) -> None:
    forward = torch.ops.spkfast.attentive_stats_pool_from_hidden
    tensors = (case.x, case.hidden, case.weight, case.bias)
    for one, other in zip(forward(*tensors, case.lengths), forward(*tensors, counts), strict=True):
        assert same(one, other), "lengths out of range are not taken as the nearer"


def _bounds(case: Case, counts: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Largest error of each result, and where there is nothing to compare."""
    x, hidden, weight, bias, grad_mean, grad_var = (
        value.double() for value in (case.x, case.hidden, case.weight, case.bias, *case.grads)
    )
    units, frames = hidden.shape[1:]
    padding = torch.arange(frames) >= counts[:, None, None]
    hidden = hidden.masked_fill(padding, 0)
    logits = weight @ hidden + bias[:, None]
    logit_error = (units + 2) * UNIT * (weight.abs() @ hidden.abs() + bias.abs()[:, None])
    bounds = error_bounds(x, logits, counts, grad_mean, grad_var, logit_error)
    # What the products of the gradient read: its error, and its terms, which the roundings of a sum are relative to.
    x = x.masked_fill(padding, 0)
    weights = logits.masked_fill(padding, -torch.inf).softmax(dim=-1).masked_fill(padding, 0)
    mean = (weights * x).sum(dim=-1, keepdim=True)
    d = x - mean
    var = (weights * d.square()).sum(dim=-1, keepdim=True)
    terms = weights * (grad_mean[..., None] * d + grad_var[..., None] * (d.square() - var)).abs()
    channels, summed = x.shape[1], len(x) * frames
    of_grad = bounds.grad_logits
    errors = {
        "mean": bounds.mean,
        "var": bounds.var,
        "grad_x": bounds.grad_x,
        "grad_hidden": weight.abs().T @ (of_grad + (channels + 4) * UNIT * terms) + (channels + 4) * TINY,
        "grad_weight": ((of_grad + (summed + 4) * UNIT * terms) @ hidden.abs().transpose(1, 2)).sum(dim=0)
        + (summed + 4) * TINY,
        "grad_bias": (of_grad + (summed + 4) * UNIT * terms).sum(dim=(0, 2)),
    }
    free = bounds.free
    return errors, {
        "mean": free,
        "var": free,
        "grad_x": free[..., None],
        "grad_hidden": free.any(dim=1)[:, None, None],
        "grad_weight": free.any(dim=0)[:, None],
        "grad_bias": free.any(dim=0),
    }
