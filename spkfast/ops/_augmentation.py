"""What the ops of augmentation have in common: checks, and the choice of the implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from spkfast import backends
from spkfast.errors import InputError


def check_waveforms(waveforms: Tensor, *, shorts: bool = False) -> None:
    """Refuses what is no batch of samples.

    Args:
        waveforms: The batch.
        shorts: Whether int16 will do.
    """
    dtypes = (torch.float32, torch.float64, *([torch.int16] if shorts else []))
    if not isinstance(waveforms, Tensor) or waveforms.dtype not in dtypes or waveforms.ndim != 2:
        wanted = "float32, float64 or int16" if shorts else "float32 or float64"
        raise InputError(f"waveforms must be {wanted} of shape (B, S), got {shown(waveforms)}")


def check_recordings(name: str, recordings: Tensor, waveforms: Tensor) -> None:
    """Refuses a bank that is no row of samples."""
    if not isinstance(recordings, Tensor) or recordings.ndim != 1 or recordings.dtype not in (
        torch.int16,
        torch.float32,
        torch.float64,
    ):  # fmt: skip
        raise InputError(f"{name} must be int16, float32 or float64 of shape (N,), got {shown(recordings)}")
    check_device(name, recordings, waveforms)


def check_values(name: str, value: Tensor, waveforms: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Refuses values of other shapes or types than one for each row has."""
    if not isinstance(value, Tensor) or value.dtype != dtype or value.shape != shape:
        kind = str(dtype).removeprefix("torch.")
        raise InputError(f"{name} must be {kind} of shape {shape}, got {shown(value)}")
    check_device(name, value, waveforms)


def check_device(name: str, value: Tensor, waveforms: Tensor) -> None:
    """Refuses tensors on two devices."""
    if value.device != waveforms.device:
        raise InputError(f"{name} must be on {waveforms.device}, where waveforms are, got {value.device}")


def check_inside(name: str, recordings: Tensor, begins: Tensor, sizes: Tensor) -> None:
    """Refuses places outside a bank; on a CPU alone, elsewhere it would wait for the device."""
    if begins.device.type != "cpu" or torch.compiler.is_compiling():
        return
    outside = (sizes > 0) & ((begins < 0) | (begins + sizes > len(recordings)))
    if outside.any():
        at = tuple(outside.nonzero()[0].tolist())
        raise InputError(
            f"begins and sizes must lie inside the {len(recordings)} samples of {name}, row {at[0]} has begin "
            f"{int(begins[at])} and size {int(sizes[at])}"
        )


def resolve(op: str, backend: str, *tensors: Tensor) -> str:
    """The implementation that runs: kernels compute in float32."""
    limits: dict[str, str] = {}
    doubles = [value for value in tensors if value.dtype == torch.float64]
    if doubles:
        limits = dict.fromkeys(("native", "triton"), "it computes in float32, and a tensor is float64")
    elif torch.is_grad_enabled() and any(value.requires_grad for value in tensors):
        limits = dict.fromkeys(("native", "triton"), f"the kernels of {op} have no gradient")
    return backends.resolve(tensors[0].device, backend, op, limits)


def run(
    op: str, definition: Callable[..., Tensor], backend: str, arguments: tuple[Any, ...], *, inplace: bool
) -> Tensor:
    """Runs an op whose first two arguments are the waveforms and a bank; in place with the op ``<op>_``."""
    waveforms, bank = arguments[:2]
    if inplace and not waveforms.is_contiguous():
        raise InputError("waveforms must be contiguous to be changed in place")
    if resolve(op, backend, waveforms, bank) == "reference":
        out = definition(*arguments)
        return waveforms.copy_(out) if inplace else out
    if inplace:
        getattr(torch.ops.spkfast, f"{op}_")(*arguments)
        return cast(Tensor, waveforms)
    return cast(Tensor, getattr(torch.ops.spkfast, op)(*arguments))


def shown(value: object) -> str:
    """A tensor's type and shape, or the type of what is none."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
