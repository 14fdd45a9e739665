"""Public function ``reverberate``: checks, and the choice of the implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from spkfast import reference
from spkfast.backends import Backend
from spkfast.errors import InputError
from spkfast.ops._augmentation import check_inside, check_recordings, check_values, check_waveforms, run
from spkfast.ops._registration import full_precision, register_in_place, register_without_gradient

_definition = full_precision(reference.reverberate)


def reverberate(
    waveforms: Tensor,
    responses: Tensor,
    begins: Tensor,
    sizes: Tensor,
    gains: Tensor | None = None,
    *,
    longest: int | None = None,
    inplace: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Each row convolved with its own impulse response out of a bank, and cut to the length that it had.

    ``y[n] = gain * sum_k h[k] x[n - k]``, by Fourier transforms. On a CPU a row is the same to the last bit in every
    batch.

    Args:
        waveforms: Samples, float32 or float64, shape (B, S).
        responses: The bank: impulse responses one after the other, int16 (divided by 32768), float32 or float64,
            shape (N,).
        begins: First sample in the bank of each row's response, int64, shape (B,).
        sizes: Its samples, int64, shape (B,); 0 leaves the row as it is.
        gains: Factor on each response, float32, shape (B,); None for 1. One over the root of its energy is usual.
        longest: A bound on ``sizes``, which makes the transforms short; samples of a response past it are dropped.
            None for S.
        inplace: Change the waveforms, which must be contiguous, and return them: rows that stay as they are then cost
            nothing.
        backend: ``reference`` (plain torch), ``native`` (C++, on a CPU), or ``auto``.

    Returns:
        Shape (B, S), in the type of the waveforms.

    Raises:
        InputError: If shapes, types or places are wrong, or the backend cannot run here.
    """
    check_waveforms(waveforms)
    batch = waveforms.shape[0]
    check_recordings("responses", responses, waveforms)
    check_values("begins", begins, waveforms, (batch,), torch.int64)
    check_values("sizes", sizes, waveforms, (batch,), torch.int64)
    if gains is None:
        gains = waveforms.new_ones(batch, dtype=torch.float32)
    check_values("gains", gains, waveforms, (batch,), torch.float32)
    check_inside("responses", responses, begins, sizes)
    if longest is None:
        # Not the largest of the sizes: a row must not change with its neighbours, nor the host wait for the device.
        longest = max(waveforms.shape[1], 1)
    if longest < 1:
        raise InputError(f"longest must be at least 1, got {longest}")
    if 0 in waveforms.shape:
        return waveforms if inplace else waveforms.clone()
    arguments = (waveforms, responses, begins, sizes, gains, longest)
    return run("reverberate", _definition, backend, arguments, inplace=inplace)


def _fake(waveforms: Tensor, responses: Tensor, begins: Tensor, sizes: Tensor, gains: Tensor, longest: int) -> Tensor:
    return waveforms.new_empty(waveforms.shape)


register_without_gradient("reverberate", fake=_fake)
register_in_place("reverberate_")
