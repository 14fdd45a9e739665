"""Where the time of training goes: crops per second, waiting for them, and the device at work."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch


class Rates(NamedTuple):
    """What a :class:`Meter` found in one window.

    Attributes:
        crops_per_second: Crops trained on in a second.
        loader_wait: Share of the time spent waiting for a batch, 0 to 1.
        device_busy: Share of the time in which the device had a step's work to do, 0 to 1.
        seconds: Length of the window, without its pauses.
    """

    crops_per_second: float
    loader_wait: float
    device_busy: float
    seconds: float


class Meter:
    """Measures the steps of a training loop in windows, the first of which opens when the meter is made.

    On CUDA the device's time is taken from events round each step. They are read once the device has passed them,
    and nothing ever waits for it: a step counts in the window in which it was found to be done. Gaps between the
    kernels of a step count as work. Elsewhere the device is the processor, busy whenever it is not waiting for a batch.

    Args:
        device: Device that trains.
        clock: Seconds that pass.
        mark: Records an event and gives it; it tells ``query()``, whether the device has passed it, and
            ``elapsed_time(later)`` in milliseconds. None records CUDA's, where ``device`` is of that type.
    """

    def __init__(
        self,
        device: torch.device | str,
        *,
        clock: Callable[[], float] = time.perf_counter,
        mark: Callable[[], Any] | None = None,
    ) -> None:
        self._clock = clock
        self._mark = mark or _cuda_mark(device)
        self._begun: Any = None
        self._pending: deque[tuple[Any, Any]] = deque()
        self._opened = clock()
        self._rows = 0
        self._waited = self._paused = self._busy = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Round fetching the next batch."""
        since = self._clock()
        try:
            yield
        finally:
            self._waited += self._clock() - since

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Round what is not training, such as validation and checkpoints: its time is left out."""
        since = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - since

    def begin(self) -> None:
        """Before a step is launched."""
        if self._mark is not None:
            self._begun = self._mark()

    def end(self, rows: int) -> None:
        """After a step is launched.

        Args:
            rows: Its crops, those of all processes together.
        """
        self._rows += rows
        if self._mark is not None:
            self._pending.append((self._begun, self._mark()))
            self._collect()

    def read(self) -> Rates:
        """The rates since the last call, or since the meter was made; opens the next window."""
        self._collect()
        now = self._clock()
        seconds = now - self._opened - self._paused
        share = 1 / max(seconds, 1e-9)  # a window may be shorter than a tick of the clock
        wait = min(1.0, self._waited * share)
        busy = min(1.0, self._busy * share) if self._mark is not None else 1.0 - wait
        rates = Rates(self._rows * share, wait, busy, seconds)
        self._opened = now
        self._rows = 0
        self._waited = self._paused = self._busy = 0.0
        return rates

    def _collect(self) -> None:
        """Adds up the steps that the device has finished; it does them in order."""
        while self._pending and self._pending[0][1].query():
            begun, ended = self._pending.popleft()
            self._busy += begun.elapsed_time(ended) / 1000


def _cuda_mark(device: torch.device | str) -> Callable[[], torch.cuda.Event] | None:
    import torch

    if torch.device(device).type != "cuda":
        return None

    def mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    return mark


def duration(seconds: float) -> str:
    """A length of time for people: seconds, minutes, or hours and minutes."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
