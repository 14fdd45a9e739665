"""Public function ``add_noise``: checks, and the choice of the implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from spkfast import reference
from spkfast.backends import Backend
from spkfast.errors import InputError
from spkfast.ops._augmentation import check_inside, check_recordings, check_values, check_waveforms, run, shown
from spkfast.ops._registration import full_precision, register_in_place, register_without_gradient

_definition = full_precision(reference.add_noise)


def add_noise(
    waveforms: Tensor,
    noises: Tensor,
    begins: Tensor,
    sizes: Tensor,
    offsets: Tensor,
    snr_db: Tensor,
    *,
    power_floor: float = 0.0,
    inplace: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Each row with recordings out of a bank added, each of them at its own signal-to-noise ratio.

    A recording is read from its offset on and repeats. Its gain is ``sqrt(P / Q) * 10 ** (-snr_db / 20)`` with P the
    mean square of the row as it came and Q that of the part of the recording that is added, both raised by
    ``power_floor``; a part that is silent adds nothing. On a CPU a row is the same to the last bit in every batch.

    Args:
        waveforms: Samples, float32 or float64, shape (B, S).
        noises: The bank: recordings one after the other, int16 (divided by 32768), float32 or float64, shape (N,).
        begins: First sample in the bank of each of a row's K recordings, int64, shape (B, K).
        sizes: Their samples, int64, shape (B, K); 0 for none.
        offsets: Where in a recording it begins, 0 to its size and less, int64, shape (B, K).
        snr_db: Ratios in decibels, float32, shape (B, K).
        power_floor: 0 gives the very ratios asked for. The toolkits add 1e-4, which makes the noise of a quiet row too
            loud, and a quiet noise too faint.
        inplace: Change the waveforms, which must be contiguous, and return them: rows that stay as they are then cost
            nothing.
        backend: ``reference`` (plain torch), ``native`` (C++, on a CPU), or ``auto``.

    Returns:
        Shape (B, S), in the type of the waveforms.

    Raises:
        InputError: If shapes, types or places are wrong, or the backend cannot run here.

    Reference: Snyder et al., "MUSAN: A Music, Speech, and Noise Corpus", 2015, and "X-vectors: Robust DNN embeddings
    for speaker recognition", ICASSP 2018, for the practice.
    """
    check_waveforms(waveforms)
    check_recordings("noises", noises, waveforms)
    if not isinstance(begins, Tensor) or begins.ndim != 2:
        raise InputError(f"begins must be int64 of shape (B, K), got {shown(begins)}")
    shape = (waveforms.shape[0], begins.shape[1])
    for name, value in (("begins", begins), ("sizes", sizes), ("offsets", offsets)):
        check_values(name, value, waveforms, shape, torch.int64)
    check_values("snr_db", snr_db, waveforms, shape, torch.float32)
    check_inside("noises", noises, begins, sizes)
    if not power_floor >= 0:
        raise InputError(f"power_floor must not be negative, got {power_floor}")
    if offsets.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = (sizes > 0) & ((offsets < 0) | (offsets >= sizes))
        if outside.any():
            row, k = outside.nonzero()[0].tolist()
            last, got = int(sizes[row, k]) - 1, int(offsets[row, k])
            raise InputError(f"offsets must lie in 0..{last}, recording {k} of row {row} has {got}")
    if 0 in (*shape, waveforms.shape[1]):
        return waveforms if inplace else waveforms.clone()
    arguments = (waveforms, noises, begins, sizes, offsets, snr_db, power_floor)
    return run("add_noise", _definition, backend, arguments, inplace=inplace)


def _fake(
    waveforms: Tensor,
    noises: Tensor,
    begins: Tensor,
    sizes: Tensor,
    offsets: Tensor,
    snr_db: Tensor,
    power_floor: float,
) -> Tensor:
    return waveforms.new_empty(waveforms.shape)


register_without_gradient("add_noise", fake=_fake)
register_in_place("add_noise_")
