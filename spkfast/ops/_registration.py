"""What every op registers in the same way: its native and Triton forms with one fake and one gradient."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spkfast.errors import InputError

_LIBRARY = torch.library.Library("spkfast", "FRAGMENT")


def full_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with autocast off: a definition in plain torch would otherwise be computed in bfloat16 in places."""

    @functools.wraps(function)
    def wrapped(first: Tensor, *args: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *args)

    return wrapped


def register_op(
    name: str, reference: Callable[..., Any], *, fake: Callable[..., Any], formula: Callable[..., Tensor]
) -> dict[str, Callable[..., Any]]:
    """Registers an op whose first argument alone has a gradient; returns its implementations by backend name.

    The schemas are those of the C++ library; where that is absent they follow from the signatures of the definition.

    Args:
        name: Name of the op, ``spkfast::<name>``; its gradient is ``<name>_backward``.
        reference: The definition.
        fake: Empty outputs of the right shapes.
        formula: The gradient: takes the gradient of the first output, then the arguments of the op.
    """
    backward = f"{name}_backward"
    if not _has_schema(backward):
        _LIBRARY.define(backward + torch.library.infer_schema(formula, mutates_args=()))
    _LIBRARY.impl(backward, full_precision(formula), "CompositeExplicitAutograd")
    torch.library.register_fake(
        f"spkfast::{backward}",
        lambda grad, first, *args: torch.empty_like(first, memory_format=torch.contiguous_format),
    )
    torch.library.register_autograd(f"spkfast::{backward}", functools.partial(_no_second_derivative, name))
    backward_op = getattr(torch.ops.spkfast, backward)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
        ctx.settings = tuple(value for value in inputs if not isinstance(value, Tensor))

    def gradient(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        others = len(ctx.saved_tensors) + len(ctx.settings) - 1
        return (backward_op(grad, *ctx.saved_tensors, *ctx.settings), *[None] * others)

    def forward(*args: Any) -> Any:
        # Imported on first use: triton takes a while, and most machines never run it.
        return importlib.import_module(f"spkfast.kernels.triton.{name}").forward(*args)

    schema = torch.library.infer_schema(reference, mutates_args=())
    torch.library.custom_op(f"spkfast::{name}_triton", forward, mutates_args=(), schema=schema)
    implementations = {
        "reference": full_precision(reference),
        "triton": getattr(torch.ops.spkfast, f"{name}_triton"),
    }
    if _has_schema(name):
        implementations["native"] = getattr(torch.ops.spkfast, name)
    for op in (name, f"{name}_triton"):
        if _has_schema(op):
            torch.library.register_fake(f"spkfast::{op}", fake)
            torch.library.register_autograd(f"spkfast::{op}", gradient, setup_context=setup_context)
    return implementations


def _has_schema(name: str) -> bool:
    return hasattr(torch.ops.spkfast, name)


def _no_second_derivative(name: str, ctx: Any, *grads: Any) -> Any:
    raise InputError(f"{name} has no second derivative here: use backend='reference'")
