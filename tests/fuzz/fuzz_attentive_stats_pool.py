"""Random cases of attentive_stats_pool on the CPU: shapes, layouts, ragged batches and values nobody would think of."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import spkfast
from spkfast import functional
from spkfast.backends import Backend
from tests.fuzz.bounds_attentive_stats_pool import error_bounds, rounded
from tests.fuzz.surroundings import surroundings
from tests.parity import FACTOR

_ALL_LEVELS = ("scalar", "avx2", "avx512", "avx512bf16")
_LEVELS = _ALL_LEVELS[: _ALL_LEVELS.index(spkfast.info()["cpu"]["level"]) + 1][:3]  # the last has no kernel of its own
_LAYOUTS = (
    "contiguous", "contiguous", "contiguous", "channels last", "channels last", "channels last", "slice",
    "slice of channels last", "every second frame", "every second channel", "rows last", "same rows", "same channels",
    "same frames",
)  # fmt: skip
_VALUES = ("normal", "offset", "constant", "outlier", "tiny", "denormal", "huge", "largest")
_CHANCES = (0.4, 0.15, 0.1, 0.1, 0.08, 0.05, 0.1, 0.02)
_SCORES = ("normal", "normal", "flat", "spread", "offset", "minus infinity", "peak", "rising", "falling")
_MOST_VALUES = 30_000


@dataclasses.dataclass
class Case:
    """One call of the op.

    Attributes:
        lengths: May lie outside 0..T, which the public function refuses and the op below it takes as the nearer.
        grads: Gradients of mean and variance, float32, shape (B, C).
        level: Instruction set.
        threads: Of a second call, which must give the same.
        kinds: What the tensors hold, and how they lie in memory.
    """

    x: Tensor
    logits: Tensor | None
    lengths: Tensor | None
    grads: tuple[Tensor, Tensor]
    level: str
    threads: int
    kinds: list[str]

    def __str__(self) -> str:
        lengths = None if self.lengths is None else self.lengths.tolist()
        return (
            f"x {described(self.x)}, logits {described(self.logits)}, lengths {lengths}, level {self.level}, "
            f"threads {self.threads}, {', '.join(self.kinds)}"
        )


def described(x: Tensor | None) -> str:
    """Type, shape and strides."""
    return "None" if x is None else f"{x.dtype} {tuple(x.shape)} strides {x.stride()}"


def draw(rng: np.random.Generator) -> Case:
    """A case."""
    shape, dtype = draw_shape(rng), draw_dtype(rng)
    lengths = draw_lengths(rng, shape)
    x, of_x = draw_frames(rng, draw_values(rng, shape), dtype, lengths)
    kinds, logits = [f"x {of_x}"], None
    heads = (shape[1], 1, None)[int(rng.choice(3, p=[0.5, 0.3, 0.2]))]
    if heads is not None:
        logits, of_logits = draw_frames(rng, _draw_scores(rng, (shape[0], heads, shape[2])), dtype, lengths)
        kinds.append(f"logits {of_logits}")
    return Case(x, logits, lengths, draw_grads(rng, shape), *draw_surroundings(rng), kinds)


def draw_shape(rng: np.random.Generator) -> tuple[int, int, int]:
    """Batch, channels and frames, mostly few."""
    batch = int(rng.choice([0, 1, 2, 3, 5, 8], p=[0.02, 0.3, 0.28, 0.2, 0.1, 0.1]))
    channels = int(rng.choice([0, 1, 2, 3, 8, 15, 16, 17, 33, 64, 65, 100], p=[0.02, *[0.98 / 11] * 11]))
    frames = int(rng.choice([0, 1, 2, 15, 16, 17, 32, int(2 ** rng.uniform(0, 7)), int(2 ** rng.uniform(5, 12))],
                            p=[0.02, 0.08, 0.05, 0.05, 0.05, 0.05, 0.05, 0.45, 0.2]))  # fmt: skip
    return batch, channels, min(frames, _MOST_VALUES // max(1, batch * channels))


def draw_dtype(rng: np.random.Generator) -> torch.dtype:
    """A type of the kernels."""
    return (torch.float32, torch.float16, torch.bfloat16)[int(rng.choice(3, p=[0.6, 0.2, 0.2]))]


def draw_lengths(rng: np.random.Generator, shape: tuple[int, int, int]) -> Tensor | None:
    """Lengths, often at the edges, now and then outside 0..T; or None."""
    batch, _, frames = shape
    if rng.random() < 0.3:
        return None
    lengths = rng.integers(0, frames + 1, batch)
    edge = rng.random(batch) < 0.4
    lengths[edge] = np.clip(rng.choice([0, 1, frames - 1, frames], int(edge.sum())), 0, frames)
    if rng.random() < 0.05:
        lengths[rng.random(batch) < 0.5] = rng.choice([-1, frames + 1, 2**62, -(2**63)])
    drawn = torch.from_numpy(lengths)
    return drawn.repeat_interleave(2)[::2] if rng.random() < 0.2 else drawn


def draw_values(rng: np.random.Generator, shape: tuple[int, int, int]) -> tuple[NDArray[np.float64], list[str]]:
    """Values of every size, and what the rows hold."""
    batch, channels, frames = shape
    kinds = [str(rng.choice(_VALUES, p=_CHANCES)) for _ in range(batch)]
    x = rng.standard_normal(shape) * rng.uniform(0.1, 3, (batch, channels, 1)) + rng.normal(0, 1, (1, channels, 1))
    for row, kind in zip(x, kinds, strict=True):
        if kind == "offset":
            row += rng.choice([-1, 1]) * 10 ** rng.uniform(1, 4)
        elif kind == "constant":
            row[...] = row[:, :1] if frames else 0
        elif kind == "outlier":
            row *= np.where(rng.random((channels, frames)) < 0.05, 1e4, 1)
        elif kind != "normal":
            row *= {"tiny": 1e-6, "denormal": 1e-40, "huge": 1e12, "largest": 1e37}[kind]
    return x, kinds


def _draw_scores(rng: np.random.Generator, shape: tuple[int, int, int]) -> tuple[NDArray[np.float64], list[str]]:
    batch, heads, frames = shape
    kinds = [str(rng.choice(_SCORES)) for _ in range(batch)]
    logits = rng.standard_normal(shape) * 10 ** rng.uniform(-1, 1)
    ramp = np.linspace(0, 10 ** rng.uniform(0, 2.3), frames)
    for row, kind in zip(logits, kinds, strict=True):
        if kind == "flat":
            row[...] = rng.choice([0.0, -7.0, 1e4])
        elif kind == "spread":
            row *= 10
        elif kind == "offset":
            row += rng.choice([-1e4, 1e4])
        elif kind == "minus infinity":
            row[rng.random((heads, frames)) < rng.choice([0.1, 0.5, 0.95])] = -np.inf
            if rng.random() < 0.3:  # whole blocks
                row[:, : rng.integers(0, frames + 1)] = -np.inf
            row[:, :1] = np.where(rng.random((heads, 1)) < 0.9, 0, row[:, :1])  # rarely no weight at all
        elif kind == "peak" and frames:
            row[:, rng.integers(frames)] += 50
        elif kind == "rising":
            row += ramp
        elif kind == "falling":
            row -= ramp
    return logits, kinds


def draw_frames(
    rng: np.random.Generator,
    drawn: tuple[NDArray[np.float64], list[str]],
    dtype: torch.dtype,
    lengths: Tensor | None,
) -> tuple[Tensor, str]:
    """The values in a type and a layout, with anything in padding and rarely NaN in a real frame; and what they are."""
    values, kinds = drawn
    layout, most = str(rng.choice(_LAYOUTS)), torch.finfo(dtype).max
    x = laid_out(torch.from_numpy(np.where(np.isinf(values), values, np.clip(values, -most, most))).to(dtype), layout)
    batch, rows, frames = x.shape
    if not layout.startswith("same"):
        if lengths is not None:
            padding = torch.arange(frames) >= lengths[:, None, None]
            x.masked_fill_(padding.expand(x.shape), float(rng.choice([0.0, np.nan, np.inf, -np.inf, 1e4])))
        if x.numel() and rng.random() < 0.05:
            x[rng.integers(batch), rng.integers(rows), rng.integers(frames)] = torch.nan
            kinds = [*kinds, "NaN"]
    return x, f"{layout} {kinds}"


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The values (B, C, T) in another order in memory, or what is the same all along one dimension."""
    if layout == "channels last":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "slice":
        whole = x.new_full((x.shape[0] + 1, x.shape[1] + 2, x.shape[2] + 3), torch.nan)
        return whole[1:, 1:-1, 2:-1].copy_(x)
    if layout == "slice of channels last":
        return laid_out(x.transpose(1, 2), "slice").transpose(1, 2)
    if layout == "every second frame":
        return x.repeat_interleave(2, dim=2)[..., ::2]
    if layout == "every second channel":
        return laid_out(x.repeat_interleave(2, dim=1), "channels last")[:, ::2]
    if layout == "rows last":
        return x.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    for dim, name in enumerate(("same rows", "same channels", "same frames")):
        if layout == name and x.shape[dim]:
            return x.narrow(dim, 0, 1).expand(x.shape)
    return x.contiguous()


def draw_grads(rng: np.random.Generator, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Gradients of mean and variance."""
    mean, var = (torch.from_numpy(rng.standard_normal(shape[:2])).float() for _ in range(2))
    return mean, var


def draw_surroundings(rng: np.random.Generator) -> tuple[str, int]:
    """Instruction set, and threads of a second call."""
    return _LEVELS[int(rng.integers(3)) % len(_LEVELS)], int(rng.choice([1, 2, 3], p=[0.9, 0.05, 0.05]))


def check(case: Case) -> collections.Counter[str]:
    """Checks one case against the definition in float64, and against itself.

    Raises:
        AssertionError: If the kernel is wrong.
    """
    with surroundings(case.level):
        counts = counted(case.lengths, case.x)
        tensors = [case.x, case.logits]
        if case.lengths is not None and not torch.equal(counts, case.lengths):
            _check_clamped(case, counts)
        lengths = None if case.lengths is None else counts
        call = functional.weighted_moments
        check_alone(call, tensors, lengths, case.grads, case.threads, num_results=4)
        got, exact, plain = three_ways(call, tensors, lengths, case.grads)
        doubles = [None if value is None else value.double() for value in (*tensors, *case.grads)]
        bounds = error_bounds(doubles[0], doubles[1], counts, *doubles[2:])  # type: ignore[arg-type]
        shared = case.logits is not None and case.logits.shape[1] == 1
        free_rows = bounds.free.any(dim=1, keepdim=True) if shared else bounds.free
        return compare(
            dict(zip(("mean", "var", "grad_x", "grad_logits"), zip(got, exact, plain, strict=True), strict=False)),
            {"mean": bounds.mean, "var": bounds.var, "grad_x": bounds.grad_x, "grad_logits": bounds.grad_logits},
            {
                "mean": bounds.free,
                "var": bounds.free,
                "grad_x": bounds.free[..., None].expand(case.x.shape),
                "grad_logits": free_rows[..., None],
            },
        )


def counted(lengths: Tensor | None, x: Tensor) -> Tensor:
    """Real frames of each row."""
    return torch.full((len(x),), x.shape[2]) if lengths is None else lengths.clamp(0, x.shape[2])


def run(
    call: Callable[..., Any],
    tensors: Sequence[Tensor | None],
    lengths: Tensor | None,
    grads: Sequence[Tensor],
    backend: Backend,
) -> list[Tensor]:
    """Mean, variance, and the gradient of each tensor."""
    leaves = [None if value is None else value.detach().requires_grad_() for value in tensors]
    moments = call(*leaves, lengths, backend=backend)
    known = [leaf for leaf in leaves if leaf is not None]
    backwards = torch.autograd.grad(tuple(moments), known, [grad.to(moments.mean.dtype) for grad in grads])
    return [moments.mean.detach(), moments.var.detach(), *backwards]


def three_ways(
    call: Callable[..., Any], tensors: Sequence[Tensor | None], lengths: Tensor | None, grads: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """What :func:`run` gives natively, by the definition in float64, and by the definition in float32."""

    def definition(dtype: torch.dtype) -> list[Tensor]:
        wide = [None if value is None else value.to(dtype) for value in tensors]
        return run(call, wide, lengths, grads, "reference")

    return run(call, tensors, lengths, grads, "native"), definition(torch.float64), definition(torch.float32)


def check_alone(
    call: Callable[..., Any],
    tensors: Sequence[Tensor | None],
    lengths: Tensor | None,
    grads: Sequence[Tensor],
    threads: int,
    *,
    num_results: int,
) -> None:
    """Checks that threads change nothing, nor do other rows and padding change a row, of the first few results.

    Of ``tensors`` those of three dimensions are (B, ..., T), and others the same for all rows.
    """
    together = run(call, tensors, lengths, grads, "native")
    if threads > 1:
        torch.set_num_threads(threads)
        try:
            again = run(call, tensors, lengths, grads, "native")
        finally:
            torch.set_num_threads(1)
        for name, (one, other) in enumerate(zip(again[:num_results], together, strict=False)):
            assert same(one, other), f"result {name} depends on the number of threads"
    x = tensors[0]
    assert x is not None
    counts = counted(lengths, x)
    for row in range(min(len(x), 2)):
        count = int(counts[row])
        part = [value if value is None or value.ndim < 3 else value[row : row + 1, :, :count] for value in tensors]
        alone = run(call, part, None, [grad[row : row + 1] for grad in grads], "native")
        for name, (one, whole) in enumerate(zip(alone[:num_results], together, strict=False)):
            here = whole[row, :, :count] if whole.ndim == 3 else whole[row]
            assert same(one[0], here), f"result {name} of row {row} alone is another"


def _check_clamped(case: Case, counts: Tensor) -> None:
    forward, backward = torch.ops.spkfast.attentive_stats_pool, torch.ops.spkfast.attentive_stats_pool_backward
    found = []
    for lengths in (case.lengths, counts):
        outputs = forward(case.x, case.logits, lengths)
        found.append([*outputs, *backward(*case.grads, case.x, case.logits, lengths, *outputs)])
    for name, (one, other) in enumerate(zip(*found, strict=True)):
        assert same(one, other), f"result {name} of lengths out of range is another"


def compare(
    results: dict[str, tuple[Tensor, Tensor, Tensor]], bounds: dict[str, Tensor], free: dict[str, Tensor]
) -> collections.Counter[str]:
    """Counts values, each as the kernel, float64 and float32 have it, that lie within their bounds.

    Raises:
        AssertionError: At the first that does not, and is not free.
    """
    total: collections.Counter[str] = collections.Counter()
    for name, (got, exact, plain) in results.items():
        assert got.shape == exact.shape, f"{name} has shape {tuple(got.shape)}, not {tuple(exact.shape)}"
        error = (got.double() - exact).abs()
        bound = rounded(bounds[name], exact, got.dtype)
        allowed = (error <= bound) | (got.isnan() & exact.isnan())
        allowed |= error <= rounded(FACTOR * (plain.double() - exact).abs(), exact, got.dtype)
        loose = (free[name] & ~(exact.isnan() & plain.isnan())).expand(exact.shape)
        wrong = ~allowed & ~loose
        if wrong.any():
            place = tuple(wrong.nonzero()[0].tolist())
            raise AssertionError(
                f"{int(wrong.sum())} of {wrong.numel()} values of {name} are wrong; first at {place}: "
                f"{float(got[place])!r}, exactly {float(exact[place])!r}, definition in float32 "
                f"{float(plain[place])!r}, allowed error {float(bound[place]):.3g}"
            )
        total += collections.Counter(compared=int((~loose).sum()), free=int(loose.sum()))
    return total


def same(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN to NaN."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
