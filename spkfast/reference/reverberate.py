"""Definition of ``reverberate``: convolution of each row with an impulse response out of a bank."""

from __future__ import annotations

import torch
from torch import Tensor


def reverberate(
    waveforms: Tensor, responses: Tensor, begins: Tensor, sizes: Tensor, gains: Tensor, longest: int
) -> Tensor:
    """See :func:`spkfast.functional.reverberate`; no response has more than ``longest`` samples."""
    samples = waveforms.shape[1]
    longest = min(longest, samples)  # what comes later falls behind the end of the row
    k = torch.arange(longest, device=waveforms.device)
    place = (begins[:, None] + k).clamp_(0, max(len(responses) - 1, 0))
    h = responses[place].to(waveforms.dtype) if len(responses) else waveforms.new_zeros(place.shape)
    h = h.masked_fill(k >= sizes[:, None], 0.0)
    if responses.dtype == torch.int16:
        h = h / 32768
    size = fft_size(samples + longest - 1)
    product = torch.fft.rfft(waveforms, size) * torch.fft.rfft(h * gains[:, None].to(h), size)
    wet = torch.fft.irfft(product, size)[:, :samples]
    return torch.where((sizes > 0)[:, None], wet, waveforms)


def fft_size(least: int) -> int:
    """The smallest product of twos, threes and fives from ``least`` on."""
    best = 1 << max(least - 1, 0).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            two = three << max(-(-least // three) - 1, 0).bit_length()
            best = min(best, two)
            three *= 3
        five *= 5
    return best
