"""Public function ``change_speed``: checks, tables, and the choice of the implementation."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from spkfast import reference
from spkfast.backends import Backend
from spkfast.errors import InputError, check_counts
from spkfast.ops._augmentation import check_values, check_waveforms, resolve
from spkfast.ops._registration import full_precision, register_without_gradient
from spkfast.reference.change_speed import filters, ratio

_definition = full_precision(reference.change_speed)


def change_speed(
    waveforms: Tensor,
    which: Tensor,
    *,
    speeds: Sequence[float],
    num_samples: int,
    lengths: Tensor | None = None,
    context: int = 0,
    backend: Backend = "auto",
) -> Tensor:
    """Rows of a batch played faster or slower, pitch included, each at its own speed.

    Output n of a row at speed s stands exactly at input position ``context + n * s``, with s taken as a fraction p/q.
    Its value is a windowed sinc's sum over the input around it: frequencies up to 0.892 of half the lower of the two
    rates pass, and from that half on they are 80 dB down. On a CPU a row is the same to the last bit in every batch.

    Args:
        waveforms: Samples, float32 or float64, or int16 (divided by 32768), shape (B, S).
        which: Place in ``speeds`` of each row's speed, int64, shape (B,).
        speeds: Factors from 0.1 to 10; 1.1 is 10 percent faster and higher, 1 copies.
        num_samples: Outputs of each row.
        lengths: Samples of each row from ``context`` on, int64, shape (B,); what follows counts as zero. Where they do
            not give ``num_samples`` outputs, those that they give repeat. None for all.
        context: Samples that stand before the first output, for the sums around it.
        backend: ``reference`` (plain torch), ``native`` (C++, on a CPU), or ``auto``.

    Returns:
        Shape (B, num_samples), float64 where the waveforms are, else float32.

    Raises:
        InputError: If shapes, types, speeds or places are wrong, or the backend cannot run here.

    Reference: Ko et al., "Audio augmentation for speech recognition", Interspeech 2015; Smith and Gossett, "A flexible
    sampling-rate conversion method", ICASSP 1984.
    """
    check_waveforms(waveforms, shorts=True)
    batch, samples = waveforms.shape
    speeds = tuple(float(speed) for speed in speeds)
    if not speeds or not all(0.1 <= speed <= 10 for speed in speeds):
        raise InputError(f"speeds must be factors from 0.1 to 10, got {list(speeds)}")
    check_values("which", which, waveforms, (batch,), torch.int64)
    if not 0 <= context <= samples:
        raise InputError(f"context must lie in 0..{samples}, got {context}")
    if num_samples < 0:
        raise InputError(f"num_samples must not be negative, got {num_samples}")
    if lengths is None:
        lengths = which.new_full((batch,), samples - context)
    check_values("lengths", lengths, waveforms, (batch,), torch.int64)
    if which.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_places(which, lengths, len(speeds), samples - context)
    if resolve("change_speed", backend, waveforms) == "reference":
        return _definition(waveforms, lengths, which, list(speeds), context, num_samples)
    tables, ratios = _tables(speeds)
    out = torch.ops.spkfast.change_speed(waveforms, lengths, which, tables, ratios, context, num_samples)
    return cast(Tensor, out)


def _check_places(which: Tensor, lengths: Tensor, speeds: int, longest: int) -> None:
    for name, value, most in (("which", which, speeds - 1), ("lengths", lengths, longest)):
        check_counts(name, value.tolist(), most)


@torch.compiler.assume_constant_result  # not to be traced, nor computed at every call of a compiled graph
def _tables(speeds: tuple[float, ...]) -> tuple[list[Tensor], list[int]]:
    return _cached_tables(speeds)


@functools.lru_cache(maxsize=16)
def _cached_tables(speeds: tuple[float, ...]) -> tuple[list[Tensor], list[int]]:
    # Kept for later calls: neither made under inference mode nor fake, as a call that is being traced would have them.
    with torch.inference_mode(False), _disable_current_modes():
        tables = [torch.from_numpy(filters(speed)).float() for speed in speeds]
    return tables, [number for speed in speeds for number in ratio(speed).as_integer_ratio()]


def _fake(
    waveforms: Tensor,
    lengths: Tensor,
    which: Tensor,
    filters: Sequence[Tensor],
    ratios: Sequence[int],
    context: int,
    num_samples: int,
) -> Tensor:
    return waveforms.new_empty(waveforms.shape[0], num_samples, dtype=torch.float32)


register_without_gradient("change_speed", fake=_fake)
