"""What every op registers in the same way: its native and Triton forms with one fake and one gradient."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any, cast

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


def gradient_of(reference: Callable[..., Any]) -> Callable[..., Tensor]:
    """The gradient of a definition's first output with respect to its first argument, by differentiating it."""

    def formula(grad: Tensor, first: Tensor, *args: Any) -> Tensor:
        # Inside an op autograd is switched off, and under a dispatch mode (FlopCounterMode) functorch is too.
        included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
        for name, key in torch._C.DispatchKey.__members__.items():
            if "Autograd" in name or "FuncTorch" in name:
                excluded = excluded.remove(key)
        with torch._C._ForceDispatchKeyGuard(included, excluded):
            pull_back = torch.func.vjp(lambda value: reference(value, *args)[0], first)[1]
            (gradient,) = pull_back(grad)
            return cast(Tensor, gradient.contiguous())

    signature = inspect.signature(reference)
    grad = inspect.Parameter("grad", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=Tensor)
    formula.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[grad, *signature.parameters.values()], return_annotation=Tensor
    )
    return formula


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
        ctx.others = [None if isinstance(value, Tensor) else (value,) for value in inputs]

    def gradient(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        tensors = iter(ctx.saved_tensors)
        inputs = [next(tensors) if other is None else other[0] for other in ctx.others]
        return (backward_op(grad, *inputs), *[None] * (len(inputs) - 1))

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
