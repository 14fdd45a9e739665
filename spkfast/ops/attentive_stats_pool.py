"""Public functions ``attentive_stats_pool`` and ``weighted_moments``: checks, and the choice of the implementation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spkfast import backends, reference
from spkfast.backends import Backend
from spkfast.errors import InputError, check_counts
from spkfast.ops._registration import register_with_backward


class Stats(NamedTuple):
    """Mean and standard deviation over time, each of shape (B, C)."""

    mean: Tensor
    std: Tensor


class Moments(NamedTuple):
    """Mean and variance over time, each of shape (B, C)."""

    mean: Tensor
    var: Tensor


def attentive_stats_pool(
    x: Tensor,
    logits: Tensor,
    lengths: Tensor | None = None,
    *,
    eps: float = 1e-7,
    max_var: float | None = None,
    backend: Backend = "auto",
) -> Stats:
    """Mean and standard deviation over time, weighted by the softmax of attention logits.

    Per channel ``w = softmax(logits)`` over the real frames, ``mean = sum(w * x)``, ``var = sum(w * (x - mean)**2)``
    and ``std = sqrt(clamp(var, eps, max_var))``. Sums are in float32 for any input type, and what padding holds never
    counts, not even NaN. Differentiable in ``x`` and ``logits``; where the variance is clamped its gradient is 0.

    Args:
        x: Frames, shape (B, C, T), in any layout; (B, T, C) memory (a transpose) is read as it lies.
        logits: Attention logits, shape (B, C, T), or (B, 1, T) where all channels share the weights.
        lengths: Real frames per row, int64, 0 to T, shape (B,); None where all T are.
        eps: Lower bound of the variance.
        max_var: Upper bound of the variance, or None.
        backend: ``reference`` (plain torch), ``native`` (C++, or CUDA C++ on a GPU), ``triton``, or ``auto``, which
            takes the fastest one that exists here for this device and type.

    Returns:
        Mean and standard deviation, shape (B, C), float32 (float64 for float64 input). A row without frames has mean 0
        and variance 0.

    Raises:
        InputError: If shapes or dtypes are wrong, a length lies outside 0..T (on a CPU; a GPU and transforms of
            ``torch.func`` are not asked, and read it as the nearer of the two), or the backend cannot run here.

    Reference: Okabe et al., "Attentive Statistics Pooling for Deep Speaker Embedding", Interspeech 2018.
    """
    return with_std(weighted_moments(x, logits, lengths, backend=backend), eps, max_var)


def weighted_moments(
    x: Tensor, logits: Tensor | None = None, lengths: Tensor | None = None, *, backend: Backend = "auto"
) -> Moments:
    """Mean and biased variance over time; the part of :func:`attentive_stats_pool` before the square root.

    Args:
        x: Frames, shape (B, C, T).
        logits: Attention logits, shape (B, C, T) or (B, 1, T); None where all real frames weigh the same.
        lengths: Real frames per row, int64, 0 to T, shape (B,); None where all T are.
        backend: As :func:`attentive_stats_pool`.

    Raises:
        InputError: As :func:`attentive_stats_pool`.
    """
    check_frames("x", x)
    check_lengths(lengths, x)
    if logits is not None:
        check_frames("logits", logits)
        batch, channels, frames = x.shape
        if logits.shape not in ((batch, channels, frames), (batch, 1, frames)):
            raise InputError(
                f"logits must have shape (B, C, T) = {(batch, channels, frames)} or (B, 1, T), got "
                f"{tuple(logits.shape)}"
            )
        check_device("logits", logits, x)
        common = torch.promote_types(x.dtype, logits.dtype)
        x, logits = x.to(common), logits.to(common)
    chosen = backends.resolve(x.device, backend, "attentive_stats_pool", limits(x))
    return Moments(*_IMPLEMENTATIONS[chosen](x, logits, lengths)[:2])


def with_std(moments: Moments, eps: float, max_var: float | None) -> Stats:
    """Standard deviation in place of the variance, bounded before the root so that its gradient is finite."""
    if not isinstance(eps, int | float) or not 0 < eps < torch.inf:
        raise InputError(f"eps must be a positive number, got {eps!r}")
    if max_var is not None and not max_var >= eps:
        raise InputError(f"max_var must be at least eps = {eps}, or None, got {max_var}")
    tiny = torch.finfo(moments.var.dtype).tiny  # what rounds to 0 bounds nothing
    return Stats(moments.mean, moments.var.clamp(max(eps, tiny), max_var).sqrt())


def check_floating(name: str, value: Tensor) -> None:
    """Refuses what is no floating tensor."""
    if not isinstance(value, Tensor):
        raise InputError(f"{name} must be a torch tensor, got {type(value).__name__}")
    if value.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise InputError(f"{name} must be float16, bfloat16, float32 or float64, got {value.dtype}")


def check_frames(name: str, value: Tensor) -> None:
    """Refuses what is no floating (B, C, T) tensor."""
    check_floating(name, value)
    if value.ndim != 3:
        raise InputError(
            f"{name} must have three dimensions, (B, C, T) or for hidden (B, H, T), got {tuple(value.shape)}"
        )


def check_device(name: str, value: Tensor, x: Tensor) -> None:
    """Refuses a tensor that is not where ``x`` is."""
    if value.device != x.device:
        raise InputError(f"{name} must be on {x.device}, where x is, got {value.device}")


def check_lengths(lengths: Tensor | None, x: Tensor) -> bool:
    """Refuses lengths of a wrong type, shape or place; and, where that costs no wait, outside 0..T.

    Returns:
        Whether every row is known to have all T frames. What is traced has rows of other lengths to come.
    """
    if lengths is None:
        return True
    if not isinstance(lengths, Tensor) or lengths.dtype != torch.int64:
        kind = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise InputError(f"lengths must be an int64 tensor of frames, got {kind}")
    if lengths.shape != x.shape[:1]:
        raise InputError(f"lengths must have shape (B,) = ({x.shape[0]},), got {tuple(lengths.shape)}")
    check_device("lengths", lengths, x)
    # vmap shows no values.
    asked = lengths.device.type == "cpu" and not torch.compiler.is_compiling() and not backends.is_transformed()
    if not asked or not lengths.numel():
        return False
    counts = lengths.tolist()  # for one utterance in a part of the time that tensors of one number take
    check_counts("lengths", counts, x.shape[2])
    return min(counts) == x.shape[2] and not torch.jit.is_tracing()


def limits(x: Tensor) -> dict[str, str]:
    """Why a backend cannot take this call, by backend."""
    if x.dtype == torch.float64:
        return dict.fromkeys(("native", "triton"), "it computes in float32, x is float64")
    return {}


def channels_last(x: Tensor) -> bool:
    """Whether the channels of a frame lie side by side, and the frames of a channel do not.

    The rule by which kernels lay out gradients; csrc/attentive_stats_pool.h has it too.
    """
    return x.stride(1) == 1 and x.stride(2) != 1


def empty_gradient(x: Tensor) -> Tensor:
    """An empty tensor of the shape and layout that the gradient of ``x`` has."""
    if channels_last(x):
        return x.new_empty(x.shape[0], x.shape[2], x.shape[1]).transpose(1, 2)
    return x.new_empty(x.shape)


def _fake(x: Tensor, logits: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, ...]:
    shared = 1 if logits is None else logits.shape[1]
    sizes = [(x.shape[0], channels) for channels in (x.shape[1], x.shape[1], shared, shared)]
    return tuple(x.new_empty(size, dtype=torch.float32) for size in sizes)


def _backward_fake(
    grad_mean: Tensor, grad_var: Tensor, x: Tensor, logits: Tensor | None, *rest: Tensor | None
) -> tuple[Tensor, Tensor]:
    if logits is None:
        return empty_gradient(x), x.new_empty(0)
    if logits.shape[1] == x.shape[1]:
        return empty_gradient(x), empty_gradient(x)
    return empty_gradient(x), logits.new_empty(logits.shape)


_IMPLEMENTATIONS = register_with_backward(
    "attentive_stats_pool",
    reference.attentive_stats_pool,
    fake=_fake,
    backward_fake=_backward_fake,
    num_outputs=2,
    differentiable=(0, 1),
)
