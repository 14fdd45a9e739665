"""What TDNN layers are trained with: convolution and ReLU with moments, and the affine map that follows them.

Both are ops with a gradient, and on a CPU both with batch norm between them are one. All else between them, as the
gates of squeeze-and-excitation or statistics that processes share, is a few values a channel, and plain torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from spkfast.errors import InputError
from spkfast.ops._packing import code_of, empty_frames, type_of_output
from spkfast.ops._registration import define_like, in_triton_module
from spkfast.reference import Precision


class RowMoments(NamedTuple):
    """Mean and biased variance over the frames of each row, shape (B, N), float32."""

    mean: Tensor
    var: Tensor


def conv_relu(
    x: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    *,
    dilation: int = 1,
    reflect: bool = False,
    precision: Precision = "fp32",
    moments: bool = True,
    relu: bool = True,
    wide: bool = False,
    backend: str = "native",
) -> tuple[Tensor, RowMoments | None]:
    """ReLU of a convolution of the inputs one after the other, and the moments of each row over its frames.

    Args:
        x: Inputs (B, C_i, T), float32 or bfloat16 (on a GPU float16 too), whose channels together are those of the
            weight; fastest where a frame's channels lie side by side.
        weight: Shape (N, C, K), K odd, float32.
        bias: Shape (N,), float32, or None.
        dilation: Spacing of the taps in frames.
        reflect: Pad with mirrored frames in place of zeros.
        precision: What is multiplied, in the gradients too: ``fp32``, ``bf16`` or (on a GPU) ``fp16``.
        moments: Whether moments are wanted; only with ReLU.
        relu: Apply ReLU.
        wide: Give float32 whatever is multiplied.
        backend: ``native`` on a CPU, ``triton`` on a GPU.

    Returns:
        Shape (B, N, T), channels side by side, in the type of the product; and the moments of it.

    Raises:
        InputError: If moments are wanted without ReLU.
    """
    if moments and not relu:
        raise InputError("moments are those of ReLU: give moments=False with relu=False")
    integers = [code_of(precision), dilation, int(reflect), int(moments), int(relu), int(wide)]
    y, mean, var = _op("conv_relu", backend)(list(x), weight, bias, integers)
    return y, RowMoments(mean, var) if moments else None


def channel_affine(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    added: Tensor | None = None,
    *,
    plain: bool = True,
    backend: str = "native",
) -> tuple[Tensor, Tensor]:
    """Each channel times a factor plus a number, and the sum of that and another tensor.

    Args:
        x: Shape (B, N, T), float32 or bfloat16 (on a GPU float16 too).
        scale: By channel, shape (1, N), or by row too, (B, N); float32.
        shift: As ``scale``.
        added: Shape and type of ``x``, or None.
        plain: Whether the map is wanted and not the sum alone.
        backend: ``native`` on a CPU, ``triton`` on a GPU.

    Returns:
        The map and the sum, in the type of ``x``; empty where not wanted, or without ``added``.
    """
    y, total = _op("channel_affine", backend)(x, scale, shift, added, plain)
    return y, total


class Normalised(NamedTuple):
    """Batch norm of the ReLU of a convolution.

    Attributes:
        y: Shape (B, N, T), channels side by side, in the type of the product; empty where not wanted.
        total: The sum of that and another tensor; empty without one.
        mean: Of the batch, shape (N,), float32, without a gradient.
        var: Its biased variance.
    """

    y: Tensor
    total: Tensor
    mean: Tensor
    var: Tensor


def conv_batch_norm(
    x: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    added: Tensor | None = None,
    *,
    eps: float = 1e-5,
    dilation: int = 1,
    reflect: bool = False,
    precision: Precision = "fp32",
    plain: bool = True,
) -> Normalised:
    """:func:`conv_relu`, batch norm by the statistics of the batch, and the sum of that and another tensor, on a CPU.

    What plain torch computes between :func:`conv_relu` and :func:`channel_affine` is computed with them, and the
    gradient of the activations is written once in place of twice.

    Args:
        x: As of :func:`conv_relu`, with at least one frame.
        weight: As of :func:`conv_relu`.
        bias: As of :func:`conv_relu`.
        gamma: Factor after the normalisation, shape (N,), float32, or None for 1.
        beta: Added after it, or None for 0.
        added: Shape (B, N, T), in the type of the product, or None.
        eps: Added to the variance.
        dilation: As of :func:`conv_relu`.
        reflect: As of :func:`conv_relu`.
        precision: As of :func:`conv_relu`.
        plain: Whether the normalised values are wanted and not the sum alone.
    """
    integers = [code_of(precision), dilation, int(reflect), int(plain)]
    op = _op("conv_batch_norm", "native")
    out, total, _, mean, var = op(list(x), weight, bias, gamma, beta, added, integers, eps)
    return Normalised(out, total, mean, var)


def _op(name: str, backend: str) -> Callable[..., Any]:
    return getattr(torch.ops.spkfast, name if backend == "native" else f"{name}_triton")


def _save_for_conv_relu(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, ctx.integers = inputs
    y, mean, _ = output
    ctx.set_materialize_grads(False)
    ctx.has_bias = bias is not None
    ctx.save_for_backward(*x, weight, y, mean)


def _conv_relu_gradient(
    backend: str, ctx: Any, grad_y: Tensor | None, grad_mean: Tensor | None, grad_var: Tensor | None
) -> tuple[Any, ...]:
    *x, weight, y, mean = ctx.saved_tensors
    code, dilation, reflect, moments, relu, _ = ctx.integers
    if not moments:  # what was not wanted may have an empty gradient
        grad_mean = grad_var = None
    if grad_y is None and grad_mean is None and grad_var is None:
        return [None] * len(x), None, None, None
    if relu:
        grad, grad_bias = _op("conv_relu_backward", backend)(grad_y, grad_mean, grad_var, y, mean)
    else:
        assert grad_y is not None and grad_mean is None and grad_var is None
        grad, grad_bias = grad_y, grad_y.sum(dim=2, dtype=torch.float32)
    of_x, of_weight, of_bias, _ = ctx.needs_input_grad
    wanted = (of_x, of_weight)
    grads, grad_weight = _product_gradients(backend, x, weight, grad, code, dilation, reflect, wanted)
    return grads, grad_weight, grad_bias.sum(dim=0) if of_bias and ctx.has_bias else None, None


def _product_gradients(
    backend: str,
    x: list[Tensor],
    weight: Tensor,
    grad: Tensor,
    code: int,
    dilation: int,
    reflect: int,
    wanted: tuple[Sequence[bool], bool],
) -> tuple[list[Tensor | None], Tensor | None]:
    """Gradients of the inputs and the weight of a convolution, of those that are wanted."""
    of_x, of_weight = wanted
    grads: list[Tensor | None] = [None] * len(x)
    if any(of_x):
        margin = weight.shape[2] // 2 * dilation if reflect else 0
        input_gradient = _op("conv_input_gradient", backend)
        if margin:
            found = _reflected(input_gradient(_between_zeros(grad, margin), weight, [code, dilation]), margin)
        else:
            found = input_gradient(grad, weight, [code, dilation])
        parts = found.split([part.shape[1] for part in x], dim=1)
        grads = [part.to(like.dtype) if want else None for part, like, want in zip(parts, x, of_x, strict=True)]
    grad_weight = None
    if of_weight:
        grad_weight = _op("conv_weight_gradient", backend)(x, grad, [weight.shape[2], dilation, reflect, code])
    return grads, grad_weight


def _save_for_batch_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, gamma, _, added, ctx.integers, ctx.eps = inputs
    _, _, y, mean, var = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(y, mean, var)
    ctx.has_bias, ctx.has_gamma, ctx.has_added = bias is not None, gamma is not None, added is not None
    ctx.save_for_backward(*x, weight, y, mean, var, *([gamma] if ctx.has_gamma else []))


def _batch_norm_gradient(
    backend: str, ctx: Any, grad_out: Tensor | None, grad_total: Tensor | None, *_: Any
) -> tuple[Any, ...]:
    *tensors, gamma = ctx.saved_tensors if ctx.has_gamma else (*ctx.saved_tensors, None)
    *x, weight, y, mean, var = tensors
    code, dilation, reflect, plain = ctx.integers
    grad_out, grad_total = (grad_out if plain else None), (grad_total if ctx.has_added else None)
    if grad_out is None and grad_total is None:
        return [None] * len(x), *[None] * 7
    backward = _op("conv_batch_norm_backward", backend)
    grad, grad_bias, grad_gamma, grad_beta = backward(grad_out, grad_total, y, mean, var, gamma, ctx.eps)
    of_x, of_weight, of_bias, of_gamma, of_beta, _, _, _ = ctx.needs_input_grad
    wanted = (of_x, of_weight)
    grads, grad_weight = _product_gradients(backend, x, weight, grad, code, dilation, reflect, wanted)
    return (
        grads,
        grad_weight,
        grad_bias if of_bias else None,
        grad_gamma if of_gamma else None,
        grad_beta if of_beta else None,
        grad_total,
        None,
        None,
    )


def _between_zeros(x: Tensor, margin: int) -> Tensor:
    """(B, N, T) with as many frames of zeros before and after, channels side by side."""
    return F.pad(x.transpose(1, 2), (0, 0, margin, margin)).transpose(1, 2)


def _reflected(x: Tensor, margin: int) -> Tensor:
    """(B, N, T) of (B, N, T + 2 * margin), whose first and last frames are added where they are mirrored from."""
    frames = x.shape[2] - 2 * margin
    outside = torch.cat([torch.arange(-margin, 0), torch.arange(frames, frames + margin)]).to(x.device)
    source = outside.remainder(max(2 * frames - 2, 1))
    source = torch.minimum(source, (2 * frames - 2 - source).abs())
    # Of a short row many frames come to lie on one.
    inside, added = x[..., margin : margin + frames].float(), x.index_select(2, outside + margin).float()
    return inside.index_add(2, source, added).to(x.dtype)


def _save_for_affine(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, scale, _, added, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.has_added = added is not None
    ctx.save_for_backward(x, scale)


def _affine_gradient(backend: str, ctx: Any, grad_y: Tensor | None, grad_total: Tensor | None) -> tuple[Any, ...]:
    x, scale = ctx.saved_tensors
    grad_total = grad_total if ctx.has_added else None
    if grad_y is not None and grad_y.shape != x.shape:  # of an output that was not wanted
        grad_y = None
    if grad_y is None and grad_total is None:
        return None, None, None, None, None
    grad_x, *grads = _op("channel_affine_backward", backend)(grad_y, grad_total, x, scale)
    grad_scale, grad_shift = (grad.sum(dim=0, keepdim=True) if scale.shape[0] == 1 else grad for grad in grads)
    return grad_x, grad_scale, grad_shift, grad_total, None


def _fake_conv_relu(
    x: Sequence[Tensor], weight: Tensor, bias: Tensor | None, integers: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float32 if integers[5] else type_of_output(x[0].dtype, integers[0])
    y = empty_frames(x[0], weight.shape[0], dtype)
    rows = x[0].shape[0] if integers[3] else 0
    mean, var = (y.new_empty((rows, weight.shape[0]), dtype=torch.float32) for _ in range(2))
    return y, mean, var


def _fake_batch_norm(
    x: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    added: Tensor | None,
    integers: Sequence[int],
    eps: float,
) -> tuple[Tensor, ...]:
    y = empty_frames(x[0], weight.shape[0], type_of_output(x[0].dtype, integers[0]))
    out, total = (torch.empty_like(y) if wanted else y.new_empty(0) for wanted in (integers[3] != 0, added is not None))
    mean, var = (y.new_empty(weight.shape[0], dtype=torch.float32) for _ in range(2))
    return out, total, y, mean, var


def _fake_batch_norm_backward(
    grad_out: Tensor | None,
    grad_total: Tensor | None,
    y: Tensor,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    return empty_frames(y, y.shape[1], y.dtype), *[torch.empty_like(mean) for _ in range(3)]


def _fake_conv_relu_backward(
    grad_y: Tensor | None, grad_mean: Tensor | None, grad_var: Tensor | None, y: Tensor, mean: Tensor
) -> tuple[Tensor, Tensor]:
    return empty_frames(y, y.shape[1], y.dtype), y.new_empty(y.shape[:2], dtype=torch.float32)


def _fake_input_gradient(grad: Tensor, weight: Tensor, integers: Sequence[int]) -> Tensor:
    return empty_frames(grad, weight.shape[1], type_of_output(grad.dtype, integers[0]))


def _fake_weight_gradient(x: Sequence[Tensor], grad: Tensor, integers: Sequence[int]) -> Tensor:
    shape = (grad.shape[1], sum(part.shape[1] for part in x), integers[0])
    return grad.new_empty(shape, dtype=torch.float32)


def _fake_affine(x: Tensor, scale: Tensor, shift: Tensor, added: Tensor | None, plain: bool) -> tuple[Tensor, Tensor]:
    y, total = (
        empty_frames(x, x.shape[1], x.dtype) if wanted else x.new_empty(0) for wanted in (plain, added is not None)
    )
    return y, total


def _fake_affine_backward(
    grad_y: Tensor | None, grad_total: Tensor | None, x: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad_scale, grad_shift = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    return empty_frames(x, x.shape[1], x.dtype), grad_scale, grad_shift


def _no_second_derivative(ctx: Any, *grads: Any) -> Any:
    raise InputError("the training kernels have no second derivative: modules in float64 train without them")


_FAKES: dict[str, Callable[..., Any]] = {
    "channel_affine": _fake_affine,
    "channel_affine_backward": _fake_affine_backward,
    "conv_batch_norm": _fake_batch_norm,
    "conv_batch_norm_backward": _fake_batch_norm_backward,
    "conv_input_gradient": _fake_input_gradient,
    "conv_relu": _fake_conv_relu,
    "conv_relu_backward": _fake_conv_relu_backward,
    "conv_weight_gradient": _fake_weight_gradient,
}
# What has a form for a CPU alone.
_NATIVE = ("conv_batch_norm", "conv_batch_norm_backward")
# The gradient, given the backend, and what saves the tensors that it needs.
_GRADIENTS: dict[str, tuple[Callable[..., Any], Callable[..., None]]] = {
    "channel_affine": (_affine_gradient, _save_for_affine),
    "conv_batch_norm": (_batch_norm_gradient, _save_for_batch_norm),
    "conv_relu": (_conv_relu_gradient, _save_for_conv_relu),
}


def _register(name: str) -> None:
    if not hasattr(torch.ops.spkfast, name):  # the library that holds the schemas is missing, and no kernel runs
        return
    forms = {"native": name}
    if name not in _NATIVE:
        forms["triton"] = f"{name}_triton"
        define_like(getattr(torch.ops.spkfast, name), forms["triton"], in_triton_module("tdnn_training", name))
    for backend, form in forms.items():
        op = f"spkfast::{form}"
        torch.library.register_fake(op, _FAKES[name])
        if name in _GRADIENTS:
            gradient, save = _GRADIENTS[name]
            torch.library.register_autograd(op, functools.partial(gradient, backend), setup_context=save)
        else:
            torch.library.register_autograd(op, _no_second_derivative)


for _name in _FAKES:
    _register(_name)
