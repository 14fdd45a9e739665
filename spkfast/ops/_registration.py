"""What every op registers in the same way: its native and Triton forms with one fake and one gradient."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from spkfast.errors import InputError

_LIBRARY = torch.library.Library("spkfast", "FRAGMENT")


def no_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """Switches autocast off on devices of a type, where there is one; on meta tensors, say, there is none."""
    available = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if available else contextlib.nullcontext()


def full_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with autocast off: a definition in plain torch would otherwise be computed in bfloat16 in places."""

    @functools.wraps(function)
    def wrapped(first: Tensor | Sequence[Tensor], *args: Any, **options: Any) -> Any:
        device = (first if isinstance(first, Tensor) else first[0]).device.type
        with no_autocast(device):
            return function(first, *args, **options)

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


def register_with_backward(
    name: str,
    reference: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    backward_fake: Callable[..., Any],
    num_outputs: int,
    differentiable: Sequence[int],
    formula: Callable[[str], Callable[..., Any]] | None = None,
) -> dict[str, Callable[..., Any]]:
    """Registers an op whose gradient is an op too; returns its implementations by backend name.

    The op gives the outputs of its definition and then what its gradient needs. ``<name>_backward`` takes the gradients
    of the former, the arguments of the op and all its outputs, and gives the gradients of the arguments that have one.
    The Triton module of the op has ``forward`` and, where there is no ``formula``, ``backward`` with those signatures.

    Args:
        name: Name of the op, ``spkfast::<name>``.
        reference: The definition.
        fake: Empty outputs of the right shapes.
        backward_fake: The same for the gradient.
        num_outputs: How many outputs the definition has.
        differentiable: Positions of the arguments that have a gradient.
        formula: The gradient in terms of other ops, by backend (``native`` or ``triton``); None where it is a kernel.
    """
    implementations = {"reference": full_precision(reference)}
    if not _has_schema(name):  # the library that holds the schemas is missing, and no kernel runs
        return implementations
    native, triton = getattr(torch.ops.spkfast, name), f"{name}_triton"
    native_backward = getattr(torch.ops.spkfast, f"{name}_backward")
    define_like(native, triton, in_triton_module(name, "forward"))
    if formula is None:
        define_like(native_backward, f"{triton}_backward", in_triton_module(name, "backward"))
    else:
        _LIBRARY.impl(f"{name}_backward", full_precision(formula("native")), "CompositeExplicitAutograd")
        define_like(native_backward, f"{triton}_backward", full_precision(formula("triton")))
    for op in (name, triton):
        backward = getattr(torch.ops.spkfast, f"{op}_backward")
        torch.library.register_fake(f"spkfast::{op}", fake)
        torch.library.register_fake(f"spkfast::{op}_backward", backward_fake)
        torch.library.register_autograd(f"spkfast::{op}_backward", functools.partial(_no_second_derivative, name))
        torch.library.register_autograd(
            f"spkfast::{op}",
            functools.partial(_call_backward, backward, num_outputs, tuple(differentiable)),
            setup_context=_save_all,
        )
    return implementations | {"native": native, "triton": getattr(torch.ops.spkfast, triton)}


def register_inference(name: str, *, fake: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """Registers an op without a gradient; returns its kernels by backend name.

    The Triton module of the op has ``forward`` with the signature of the op.

    Args:
        name: Name of the op, ``spkfast::<name>``.
        fake: Empty outputs of the right shapes.
    """
    if not _has_schema(name):  # the library that holds the schemas is missing, and no kernel runs
        return {}
    native, triton = getattr(torch.ops.spkfast, name), f"{name}_triton"
    define_like(native, triton, in_triton_module(name, "forward"))
    for op in (name, triton):
        register_without_gradient(op, fake=fake)
    return {"native": native, "triton": getattr(torch.ops.spkfast, triton)}


def register_without_gradient(name: str, *, fake: Callable[..., Any]) -> None:
    """Gives an op, where it exists, its empty outputs, and a message in place of a gradient."""
    if _has_schema(name):
        torch.library.register_fake(f"spkfast::{name}", fake)
        shown = name.removesuffix("_triton")
        torch.library.register_autograd(f"spkfast::{name}", functools.partial(_no_derivative, shown))


def register_in_place(name: str) -> None:
    """Gives an op, where it exists, that changes its first argument and returns nothing its fake.

    It also tells autograd of the change, which otherwise would differentiate what was computed before from new values.
    """
    if not _has_schema(name):
        return
    op = getattr(torch.ops.spkfast, name).default

    def counted(keys: Any, first: Tensor, *args: Any) -> None:
        torch.autograd.graph.increment_version(first)
        op.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, first, *args)

    _LIBRARY.impl(name, counted, "ADInplaceOrView", with_keyset=True)
    torch.library.register_fake(f"spkfast::{name}", lambda *args: None)


def define_like(op: Any, name: str, function: Callable[..., Any]) -> None:
    """Defines ``spkfast::<name>`` with the schema of another op."""
    schema = str(op.default._schema)
    torch.library.custom_op(f"spkfast::{name}", function, mutates_args=(), schema=schema[schema.index("(") :])


def in_triton_module(name: str, function: str) -> Callable[..., Any]:
    """A function of a module of Triton kernels."""

    # Imported on first use: triton takes a while, and most machines never run it.
    def call(*args: Any) -> Any:
        return getattr(importlib.import_module(f"spkfast.kernels.triton.{name}"), function)(*args)

    return call


def _save_all(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    values = (*inputs, *output)
    ctx.others = [None if isinstance(value, Tensor) else (value,) for value in values]
    ctx.num_inputs = len(inputs)
    ctx.save_for_backward(*(value for value in values if isinstance(value, Tensor)))


def _call_backward(
    backward: Callable[..., Any], num_outputs: int, differentiable: tuple[int, ...], ctx: Any, *grads: Tensor | None
) -> tuple[Tensor | None, ...]:
    tensors = iter(ctx.saved_tensors)
    values = [next(tensors) if other is None else other[0] for other in ctx.others]
    outputs = values[ctx.num_inputs :]
    found = [
        torch.zeros_like(cast(Tensor, output)) if grad is None else grad.contiguous()
        for grad, output in zip(grads[:num_outputs], outputs, strict=False)
    ]
    gradients: list[Tensor | None] = [None] * ctx.num_inputs
    for position, gradient in zip(differentiable, backward(*found, *values), strict=True):
        if values[position] is not None:
            gradients[position] = gradient
    return tuple(gradients)


def _has_schema(name: str) -> bool:
    return hasattr(torch.ops.spkfast, name)


def _no_derivative(name: str, ctx: Any, *grads: Any) -> Any:
    raise InputError(f"{name} is an inference form without a gradient: use backend='reference'")


def _no_second_derivative(name: str, ctx: Any, *grads: Any) -> Any:
    raise InputError(f"{name} has no second derivative here: use backend='reference'")
