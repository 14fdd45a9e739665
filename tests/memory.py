"""How much memory a call takes at its peak."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int:
    """Most bytes that tensors hold at any moment of a call, results included, beyond what was held before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        kept = function()
        torch.cuda.synchronize(device)
        del kept
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = function()
    del kept
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    held = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
