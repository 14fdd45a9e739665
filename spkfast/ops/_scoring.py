"""What the ops of scoring have in common: checks, and the choice of the implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from spkfast import backends
from spkfast.errors import InputError


def check_rows(name: str, value: Tensor, like: Tensor | None = None) -> None:
    """Refuses what is no floating matrix, or another type, size or device than that of another one."""
    if not isinstance(value, Tensor) or value.ndim != 2 or not value.is_floating_point():
        raise InputError(f"{name} must be floating of shape (rows, values), got {shown(value)}")
    if like is not None and (value.dtype, value.device, value.shape[1]) != (like.dtype, like.device, like.shape[1]):
        raise InputError(f"{name} must have type, device and row length of {shown(like)}, got {shown(value)}")


def resolve(op: str, backend: str, *tensors: Tensor) -> str:
    """The implementation that runs: kernels compute in float32."""
    limits: dict[str, str] = {}
    others = [value for value in tensors if value.dtype != torch.float32]
    if others:
        limits = dict.fromkeys(("native", "triton"), f"it takes float32, and a tensor is {others[0].dtype}")
    elif torch.is_grad_enabled() and any(value.requires_grad for value in tensors):
        limits = dict.fromkeys(("native", "triton"), f"the kernels of {op} have no gradient")
    return backends.resolve(tensors[0].device, backend, op, limits)


def shown(value: object) -> str:
    """Type, shape and device of a tensor, for messages."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)} on {value.device}"
