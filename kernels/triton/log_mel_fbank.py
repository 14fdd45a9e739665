"""Log-mel filterbank features in Triton: the DFT and the filters as matrix products over tiles of frames."""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tile sizes by dimension: T frames, L samples, F spectrum bins, M mel bins. Larger ones spill registers.
_POWER_TILE = {"BLOCK_T": 32, "BLOCK_L": 32, "BLOCK_F": 64}
_MEL_TILE = {"BLOCK_T": 32, "BLOCK_F": 32, "BLOCK_M": 128}
_MEAN_TILE = {"BLOCK_T": 128, "BLOCK_M": 32}
# Triton 3.10 turns fusion off unless asked; asking keeps the numbers the same across versions.
_OPTIONS = {"num_warps": 8, "num_stages": 2, "enable_fp_fusion": True}

# One compiled form whatever the sizes and alignment: sums then add in the same order, and a row alone equals the row in
# a batch to the last bit.
_ANY_SIZE = {
    "do_not_specialize": ["num_samples", "num_frames", "frame_length", "frame_shift", "num_bins", "num_mels"],
    "do_not_specialize_on_alignment": ["waveforms", "features", "power"],
}


@triton.jit
def _count_frames(lengths, utterance, num_samples, frame_length, frame_shift):
    """Frames of an utterance. A length past the row would read out of bounds and is taken as the row's."""
    samples = tl.minimum(tl.load(lengths + utterance), num_samples)
    return tl.where(samples < frame_length, 0, (samples - frame_length) // frame_shift + 1)


@triton.jit(**_ANY_SIZE)
def _power_kernel(
    waveforms, lengths, window, cosine, sine, power,
    num_samples, num_frames, frame_length, frame_shift, num_bins, sample_scale, preemphasis,
    REMOVE_DC: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Power spectrum (B, T, F) of one tile of frames and bins; frames past the end are left as they are."""
    bin_tiles, frame_tiles = tl.cdiv(num_bins, BLOCK_F), tl.cdiv(num_frames, BLOCK_T)
    tile = tl.program_id(0) // bin_tiles
    utterance = (tile // frame_tiles).to(tl.int64)
    t = (tile % frame_tiles) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    k = (tl.program_id(0) % bin_tiles) * BLOCK_F + tl.arange(0, BLOCK_F)  # [BLOCK_F]
    live = t < _count_frames(lengths, utterance, num_samples, frame_length, frame_shift)
    start = waveforms + utterance * num_samples + t.to(tl.int64)[:, None] * frame_shift  # [BLOCK_T, 1]

    if tl.max(live.to(tl.int32), axis=0) > 0:  # A tile past the end of its utterance has nothing to compute.
        mean = tl.zeros([BLOCK_T], tl.float32)
        if REMOVE_DC:
            for first in range(0, frame_length, BLOCK_L):
                n = first + tl.arange(0, BLOCK_L)  # [BLOCK_L]
                mask = live[:, None] & (n < frame_length)[None, :]
                mean += tl.sum(tl.load(start + n[None, :], mask=mask, other=0.0) * sample_scale, axis=1)
            mean = mean / frame_length

        real = tl.zeros([BLOCK_T, BLOCK_F], tl.float32)
        imaginary = tl.zeros([BLOCK_T, BLOCK_F], tl.float32)
        for first in range(0, frame_length, BLOCK_L):
            n = first + tl.arange(0, BLOCK_L)  # [BLOCK_L]
            mask = live[:, None] & (n < frame_length)[None, :]
            current = tl.load(start + n[None, :], mask=mask, other=0.0) * sample_scale - mean[:, None]
            before = tl.load(start + tl.maximum(n - 1, 0)[None, :], mask=mask, other=0.0) * sample_scale - mean[:, None]
            weights = tl.load(window + n, mask=n < frame_length, other=0.0)
            windowed = (current - preemphasis * before) * weights[None, :]  # [BLOCK_T, BLOCK_L]
            table = n[:, None] * num_bins + k[None, :]  # [BLOCK_L, BLOCK_F]
            table_mask = (n < frame_length)[:, None] & (k < num_bins)[None, :]
            real = tl.dot(
                windowed, tl.load(cosine + table, mask=table_mask, other=0.0), acc=real, input_precision="tf32x3"
            )
            imaginary = tl.dot(
                windowed, tl.load(sine + table, mask=table_mask, other=0.0), acc=imaginary, input_precision="tf32x3"
            )
        row = utterance * num_frames + t  # [BLOCK_T]
        mask = live[:, None] & (k < num_bins)[None, :]
        tl.store(power + row[:, None] * num_bins + k[None, :], real * real + imaginary * imaginary, mask=mask)


@triton.jit(**_ANY_SIZE)
def _mel_kernel(
    power, lengths, mel, features, frame_lengths,
    num_samples, num_frames, frame_length, frame_shift, num_bins, num_mels, log_floor,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Logarithm of the filter energies (B, T, M) of one tile of frames and filters, and the frame counts (B,)."""
    mel_tiles, frame_tiles = tl.cdiv(num_mels, BLOCK_M), tl.cdiv(num_frames, BLOCK_T)
    tile = tl.program_id(0) // mel_tiles
    utterance = (tile // frame_tiles).to(tl.int64)
    frames = _count_frames(lengths, utterance, num_samples, frame_length, frame_shift)
    tl.store(frame_lengths + utterance, frames)  # Every tile of an utterance stores the same value.
    t = (tile % frame_tiles) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    m = (tl.program_id(0) % mel_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    live = t < frames
    row = utterance * num_frames + t  # [BLOCK_T]

    energies = tl.zeros([BLOCK_T, BLOCK_M], tl.float32)
    for first in range(0, num_bins, BLOCK_F):
        k = first + tl.arange(0, BLOCK_F)  # [BLOCK_F]
        tile_power = tl.load(
            power + row[:, None] * num_bins + k[None, :], mask=live[:, None] & (k < num_bins)[None, :], other=0.0
        )  # [BLOCK_T, BLOCK_F]
        filters = tl.load(
            mel + m[None, :] * num_bins + k[:, None], mask=(m < num_mels)[None, :] & (k < num_bins)[:, None], other=0.0
        )  # [BLOCK_F, BLOCK_M]
        energies = tl.dot(tile_power, filters, acc=energies, input_precision="tf32x3")
    # Not tl.maximum, which would turn NaN into the floor.
    values = tl.log(tl.where(energies < log_floor, log_floor, energies))
    values = tl.where(live[:, None], values, 0.0)
    mask = (t < num_frames)[:, None] & (m < num_mels)[None, :]
    tl.store(features + row[:, None] * num_mels + m[None, :], values, mask=mask)


@triton.jit(**_ANY_SIZE)
def _mean_kernel(
    features, lengths, num_samples, num_frames, frame_length, frame_shift, num_mels,
    BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Takes the mean over the frames off one tile of filters (B, T, M), in place."""
    tiles = tl.cdiv(num_mels, BLOCK_M)
    utterance = (tl.program_id(0) // tiles).to(tl.int64)
    m = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    frames = _count_frames(lengths, utterance, num_samples, frame_length, frame_shift).to(tl.int32)
    column = features + utterance * num_frames * num_mels + m  # [BLOCK_M]

    total = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, frames, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)  # [BLOCK_T]
        mask = (t < frames)[:, None] & (m < num_mels)[None, :]
        total += tl.sum(tl.load(column[None, :] + t.to(tl.int64)[:, None] * num_mels, mask=mask, other=0.0), axis=0)
    mean = total / tl.maximum(frames, 1)
    for first in range(0, frames, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)  # [BLOCK_T]
        mask = (t < frames)[:, None] & (m < num_mels)[None, :]
        address = column[None, :] + t.to(tl.int64)[:, None] * num_mels
        tl.store(address, tl.load(address, mask=mask, other=0.0) - mean[None, :], mask=mask)


@functools.lru_cache(maxsize=16)
def _dft_tables(frame_length: int, fft_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of the DFT (frame_length, fft_size // 2 + 1), rounded once from float64."""
    n = torch.arange(frame_length)[:, None]
    k = torch.arange(fft_size // 2 + 1)[None, :]
    # Whole turns are taken off while the phase is still an integer.
    phase = (n * k % fft_size).double() * (-2 * math.pi / fft_size)
    return phase.cos().float().to(device), phase.sin().float().to(device)


def _grid(batch: int, *tiled: tuple[int, int]) -> tuple[int]:
    """One program per utterance and tile of each (size, tile size)."""
    return (batch * math.prod(triton.cdiv(size, tile) for size, tile in tiled),)


def forward(
    waveforms: Tensor,
    lengths: Tensor,
    window: Tensor,
    mel: Tensor,
    frame_shift: int,
    fft_size: int,
    sample_scale: float,
    preemphasis: float,
    remove_dc: bool,
    log_floor: float,
    mean_norm: bool,
) -> tuple[Tensor, Tensor]:
    """Log-mel energies (B, T, M) and frame counts (B,); frames past an utterance's end are zero.

    Args:
        waveforms: Samples, float32, shape (B, S).
        lengths: Samples per utterance, int64, shape (B,).
        window: Window, float32, shape (L,).
        mel: Filters, float32, shape (M, fft_size // 2 + 1).
        frame_shift: Hop in samples.
        fft_size: Points of the DFT, L at least; any size.
        sample_scale: Factor on the samples.
        preemphasis: Pre-emphasis coefficient.
        remove_dc: Subtract the mean of each frame.
        log_floor: Lower bound before the logarithm.
        mean_norm: Subtract the mean over the frames of each utterance.

    Raises:
        ValueError: If a tensor is not float32.
    """
    for name, tensor in (("waveforms", waveforms), ("window", window), ("mel", mel)):
        if tensor.dtype != torch.float32:
            raise ValueError(f"{name} must be float32 for the Triton kernel, got {tensor.dtype}")
    waveforms, lengths, window, mel = (tensor.contiguous() for tensor in (waveforms, lengths, window, mel))
    batch, num_samples = waveforms.shape
    frame_length, (num_mels, num_bins) = window.shape[0], mel.shape
    num_frames = 0 if num_samples < frame_length else (num_samples - frame_length) // frame_shift + 1
    features = waveforms.new_empty(batch, num_frames, num_mels)
    frame_lengths = torch.empty_like(lengths)
    if features.numel() == 0:
        return features, frame_lengths.zero_()
    cosine, sine = _dft_tables(frame_length, fft_size, waveforms.device)
    power = waveforms.new_empty(batch, num_frames, num_bins)
    with torch.cuda.device_of(waveforms):
        _power_kernel[_grid(batch, (num_frames, _POWER_TILE["BLOCK_T"]), (num_bins, _POWER_TILE["BLOCK_F"]))](
            waveforms, lengths, window, cosine, sine, power,
            num_samples, num_frames, frame_length, frame_shift, num_bins, sample_scale, preemphasis,
            REMOVE_DC=remove_dc, **_POWER_TILE, **_OPTIONS,
        )  # fmt: skip
        _mel_kernel[_grid(batch, (num_frames, _MEL_TILE["BLOCK_T"]), (num_mels, _MEL_TILE["BLOCK_M"]))](
            power, lengths, mel, features, frame_lengths,
            num_samples, num_frames, frame_length, frame_shift, num_bins, num_mels, log_floor,
            **_MEL_TILE, **_OPTIONS,
        )  # fmt: skip
        if mean_norm:
            _mean_kernel[_grid(batch, (num_mels, _MEAN_TILE["BLOCK_M"]))](
                features,
                lengths,
                num_samples,
                num_frames,
                frame_length,
                frame_shift,
                num_mels,
                **_MEAN_TILE,
                **_OPTIONS,
            )
    return features, frame_lengths
