"""Definition of ``add_noise``: recordings out of a bank, each at its own signal-to-noise ratio."""

from __future__ import annotations

import torch
from torch import Tensor


def add_noise(
    waveforms: Tensor,
    noises: Tensor,
    begins: Tensor,
    sizes: Tensor,
    offsets: Tensor,
    snr_db: Tensor,
    power_floor: float,
) -> Tensor:
    """See :func:`spkfast.functional.add_noise`."""
    out, power = waveforms, _power(waveforms)
    n = torch.arange(waveforms.shape[1], device=waveforms.device)
    for k in range(begins.shape[1]):
        begin, size, offset, snr = (value[:, k : k + 1] for value in (begins, sizes, offsets, snr_db))
        place = begin + (offset + n) % size.clamp_min(1)
        noise = noises[place.clamp_(0, max(len(noises) - 1, 0))].to(waveforms.dtype) if len(noises) else 0 * out
        if noises.dtype == torch.int16:
            noise = noise / 32768
        of_noise = _power(noise)
        # Before the division and the root, whose gradients would be NaN.
        nothing = (size <= 0) | (of_noise == 0) | (power + power_floor == 0)
        ratio = (power + power_floor).masked_fill(nothing, 1.0) / (of_noise + power_floor).masked_fill(nothing, 1.0)
        gain = (ratio.sqrt() * 10 ** (snr.double() / -20)).masked_fill(nothing, 0.0)
        out = out + gain.to(waveforms.dtype) * noise
    return out


def _power(x: Tensor) -> Tensor:
    return x.double().square().mean(dim=1, keepdim=True)
