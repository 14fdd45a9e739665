"""What random cases of the ops of augmentation have in common: signals, layouts, and banks that end where they must."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.fuzz.fuzz_attentive_stats_pool import same

_SIGNALS = ("noise", "noise", "noise", "impulse", "silence", "constant", "sine", "onset")


def draw_count(rng: np.random.Generator, most: int) -> int:
    """A number of samples from 1 on: often around a multiple of what vectors, blocks and transforms hold."""
    if rng.random() < 0.4:
        return int(
            np.clip(rng.choice([4, 8, 16, 64, 256, 512, 1024]) * rng.integers(1, 6) + rng.integers(-1, 2), 1, most)
        )
    return int(most ** rng.random())


def draw_signal(rng: np.random.Generator, samples: int) -> np.ndarray:
    """Samples within [-1, 1], float64, none of them so small that its square is none in float32."""
    kind, n = _SIGNALS[int(rng.integers(len(_SIGNALS)))], np.arange(samples)
    scale = 10 ** rng.uniform(-4, 0)
    if kind == "impulse":
        return scale * (n == rng.integers(max(samples, 1)))
    if kind == "silence":
        return np.zeros(samples)
    if kind == "constant":
        return np.full(samples, scale)
    if kind == "sine":
        return scale * np.sin(n * rng.uniform(0, np.pi))
    noise = scale * rng.uniform(-1, 1, samples)
    return np.where(n < samples // 2, 0, noise) if kind == "onset" else noise


def draw_rows(rng: np.random.Generator, batch: int, samples: int, dtype: torch.dtype) -> Tensor:
    """Waveforms (B, S) of a type, in memory of their size or not contiguous."""
    x = torch.from_numpy(np.stack([draw_signal(rng, samples) for _ in range(batch)] or [np.zeros((0, samples))[:0]]))
    return laid_out(rng, in_type(x.reshape(batch, samples), dtype))


def draw_bank(rng: np.random.Generator, sizes: list[int]) -> tuple[Tensor, Tensor]:
    """Recordings of these sizes without anything around them, float32 or int16, and where each begins."""
    parts = [draw_signal(rng, size) for size in sizes]
    bank = in_type(torch.from_numpy(np.concatenate([*parts, np.zeros(0)])), draw_type(rng))
    return bank, torch.tensor([0, *sizes[:-1]][: len(sizes)], dtype=torch.int64).cumsum(0)


def draw_type(rng: np.random.Generator) -> torch.dtype:
    """That of samples."""
    return (torch.float32, torch.int16)[int(rng.integers(2))]


def in_type(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values in [-1, 1] in a type, in memory of their very size: a sanitizer sees what is read past its end."""
    return ((values * 32768).round().clamp(-32768, 32767) if dtype == torch.int16 else values).to(dtype).clone()


def exactly(samples: Tensor) -> np.ndarray:
    """The samples that a kernel takes them for, float64."""
    return (samples.double() / (32768 if samples.dtype == torch.int16 else 1)).numpy()


def laid_out(rng: np.random.Generator, values: Tensor) -> Tensor:
    """The values, at times not contiguous."""
    way = rng.integers(6)
    if way == 0 and values.ndim == 2:
        return values.T.contiguous().T
    if way == 1:
        return torch.stack([values, values], dim=-1)[..., 0]
    return values


def assert_same_elsewhere(case: Any, got: Tensor, *, inplace: bool = True) -> None:
    """Checks that a case gives the very same with more threads, and in place where its op can."""
    if inplace:
        changed = case.x.clone(memory_format=torch.contiguous_format)
        case.run(x=changed, inplace=True)
        assert same(changed, got), "in place it is another"
    if case.threads > 1:
        torch.set_num_threads(case.threads)
        again = case.run()
        torch.set_num_threads(1)
        assert same(again, got), "it depends on the number of threads"


def assert_close(got: Tensor, want: np.ndarray, allowed: np.ndarray, what: str) -> int:
    """Checks values against known ones; returns how many."""
    assert tuple(got.shape) == want.shape, f"shape {tuple(got.shape)}, not {want.shape}"
    wrong = ~(np.abs(got.double().numpy() - want) <= allowed)
    if wrong.any():
        at = tuple(np.argwhere(wrong)[0].tolist())
        bound = float(np.broadcast_to(allowed, want.shape)[at])
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.size} values are wrong; first {at}: {float(got[at])!r}, exactly "
            f"{float(want[at])!r}, allowed {bound!r} more or less"
        )
    return want.size
