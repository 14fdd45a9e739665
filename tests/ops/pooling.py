"""What the tests of both forms of attentive_stats_pool share: input, layouts, an oracle, bounds of rounding."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from torch import Tensor

from spkfast import functional
from spkfast.backends import Backend
from tests.fuzz.bounds_attentive_stats_pool import error_bounds


def frames_like(shape: tuple[int, int, int], device: torch.device | None = None, seed: int = 0) -> Tensor:
    """Frames (B, C, T) as a network has them: each channel with a mean and a deviation of its own."""
    generator = torch.Generator().manual_seed(seed)
    scale = 1 + torch.rand(1, shape[1], 1, generator=generator)
    return (scale * torch.randn(shape, generator=generator) + scale - 1).to(device)


def logits_like(
    kind: str, shape: tuple[int, int, int], device: torch.device | None = None, seed: int = 1
) -> Tensor | None:
    """Logits: ``full``, one for each channel; ``shared`` by all of them; or None for ``equal`` weights."""
    if kind == "equal":
        return None
    generator = torch.Generator().manual_seed(seed)
    channels = shape[1] if kind == "full" else 1
    return 2 * torch.randn(shape[0], channels, shape[2], generator=generator).to(device)


def channels_last(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def cut_out(x: Tensor) -> Tensor:
    """The values as a part of a larger tensor that holds NaN elsewhere."""
    whole = x.new_full((x.shape[0] + 1, x.shape[1] + 5, x.shape[2] + 5), math.nan)
    return whole[1:, 3:-2, 3:-2].copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.Tensor.contiguous,
    "channels last": channels_last,
    "slice": cut_out,
    "slice of channels last": lambda x: cut_out(x.transpose(1, 2)).transpose(1, 2),
    "every second frame": lambda x: x.repeat_interleave(2, dim=2)[..., ::2],
    "every second channel": lambda x: channels_last(x.repeat_interleave(2, dim=1))[:, ::2],
    "rows last": lambda x: x.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    "rows in the middle": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}


def oracle(x: Tensor, logits: Tensor | None, lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of each row and channel by loops over Python's numbers, with exact sums."""
    batch, channels, _ = x.shape
    mean, var = np.zeros((batch, channels)), np.zeros((batch, channels))
    for b, c in itertools.product(range(batch), range(channels)):
        values = x[b, c, : lengths[b]].tolist()
        if not values:
            continue
        scores = [0.0] * len(values) if logits is None else logits[b, c % logits.shape[1], : lengths[b]].tolist()
        weights = [math.exp(score - max(scores)) for score in scores]
        weights = [weight / math.fsum(weights) for weight in weights]
        mean[b, c] = math.fsum(w * value for w, value in zip(weights, values, strict=True))
        var[b, c] = math.fsum(w * (value - mean[b, c]) ** 2 for w, value in zip(weights, values, strict=True))
    return mean, var


def assert_within_bounds(backend: Backend, x: Tensor, logits: Tensor, lengths: Tensor) -> None:
    """Checks values and gradients against the definition in float64, within what rounding may do to each of them.

    For weights of which one is nearly all: there the definition in float32 is exact by luck, and no measure.
    """
    generator = torch.Generator().manual_seed(7)
    grads = [torch.randn(x.shape[:2], generator=generator).to(x.device) for _ in range(2)]
    found = []
    for dtype, name in ((torch.float64, "reference"), (torch.float32, backend)):
        leaves = [value.detach().to(dtype).requires_grad_() for value in (x, logits)]
        moments = functional.weighted_moments(*leaves, lengths, backend=cast(Backend, name))
        gradients = torch.autograd.grad(tuple(moments), leaves, [grad.to(dtype) for grad in grads])
        found.append([value.detach().double().cpu() for value in (*moments, *gradients)])
    bounds = error_bounds(*(value.double().cpu() for value in (x, logits)), lengths.cpu(), *(
        grad.double().cpu() for grad in grads
    ))  # fmt: skip
    assert not bounds.free.any()
    names = ("mean", "var", "gradient of x", "gradient of logits")
    for name, exact, got, bound in zip(names, *found, bounds, strict=False):
        error = (got - exact).abs()
        assert (error <= bound).all(), (
            f"{name}: error {error.max():.3g}, {float((error / bound).max()):.3g} of its bound"
        )
