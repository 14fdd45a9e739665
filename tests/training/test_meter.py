"""The meter of a training loop, with a clock and a device that go as they are told."""

import time

import pytest
import torch

from spkfast.training.meter import Meter


class Clock:
    """Time that goes on only when asked to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def go(self, seconds):
        self.now += seconds


class Device:
    """A queue of work that is done one after another, as a stream's."""

    def __init__(self, clock):
        self.clock, self.free, self.looks = clock, clock(), 0

    def launch(self, seconds):
        self.free = max(self.free, self.clock()) + seconds

    def mark(self):
        return Mark(self, max(self.free, self.clock()))


class Mark:
    def __init__(self, device, passed):
        self.device, self.passed = device, passed

    def query(self):
        return self.device.clock() >= self.passed

    def elapsed_time(self, later):
        assert self.query() and later.query(), "would wait, or fail"
        return 1000 * (later.passed - self.passed)


@pytest.fixture
def clock():
    return Clock()


def test_rates_of_a_window_on_a_cpu(clock):
    meter = Meter("cpu", clock=clock)
    for _ in range(4):
        with meter.waiting():
            clock.go(0.25)
        meter.begin()
        clock.go(1.5)
        meter.end(32)
        clock.go(0.25)
    assert meter.read() == (pytest.approx(128 / 8), pytest.approx(1 / 8), pytest.approx(7 / 8), pytest.approx(8))


def test_each_window_starts_anew(clock):
    meter = Meter("cpu", clock=clock)
    with meter.waiting():
        clock.go(3)
    meter.end(30)
    assert meter.read() == (10, 1, 0, 3)
    clock.go(2)
    meter.end(30)
    assert meter.read() == (15, 0, 1, 2)


@pytest.mark.parametrize("kind", ["cpu", "device"])
def test_pauses_count_for_nothing(clock, kind):
    device = Device(clock)
    meter = Meter("cpu", clock=clock, mark=device.mark if kind == "device" else None)

    def step():
        with meter.waiting():
            clock.go(1)
        meter.begin()
        device.launch(3)
        clock.go(3)
        meter.end(8)

    step()
    with meter.paused():
        clock.go(1000)
    step()
    assert meter.read() == (2, 0.25, 0.75, 8)


def test_a_device_is_busy_from_begin_to_end_of_its_own_time(clock):
    """Launched in no time, the work takes 1.5 s of every 2 s."""
    device = Device(clock)
    meter = Meter("cpu", clock=clock, mark=device.mark)
    for _ in range(10):
        meter.begin()
        device.launch(1.5)
        meter.end(8)
        with meter.waiting():
            clock.go(2)
    assert meter.read() == (4, 1, 0.75, 20)


def test_steps_that_the_device_has_not_finished_count_later_and_are_not_waited_for(clock):
    device = Device(clock)
    meter = Meter("cpu", clock=clock, mark=device.mark)
    for _ in range(3):
        meter.begin()
        device.launch(2)
        meter.end(8)
    clock.go(4.5)
    assert meter.read().device_busy == pytest.approx(4 / 4.5)
    clock.go(4)
    assert meter.read().device_busy == pytest.approx(2 / 4)
    clock.go(1)
    assert meter.read().device_busy == 0


def test_work_of_earlier_windows_makes_no_share_above_one(clock):
    device = Device(clock)
    meter = Meter("cpu", clock=clock, mark=device.mark)
    meter.begin()
    device.launch(2)
    meter.end(8)
    clock.go(1.5)
    assert meter.read().device_busy == 0
    clock.go(0.5)
    assert meter.read().device_busy == 1


def test_finished_steps_are_not_kept(clock):
    """A window may be as long as the run."""
    device = Device(clock)
    meter = Meter("cpu", clock=clock, mark=device.mark)
    for _ in range(1000):
        meter.begin()
        device.launch(1)
        meter.end(8)
        clock.go(1)
    assert len(meter._pending) <= 1


def test_an_empty_window_is_no_error(clock):
    meter = Meter("cpu", clock=clock)
    assert meter.read() == (0, 0, 1, 0)


def test_waiting_ends_with_an_error_too(clock):
    meter = Meter("cpu", clock=clock)
    with pytest.raises(StopIteration), meter.waiting():
        clock.go(1)
        next(iter([]))
    clock.go(1)
    assert meter.read().loader_wait == 0.5


def test_a_step_on_a_cpu_costs_less_than_20_microseconds():
    """Of processor time, the best of several rounds: others may use the machine."""
    meter = Meter("cpu")

    def one_round():
        since = time.process_time()
        for _ in range(2000):
            with meter.waiting():
                pass
            meter.begin()
            meter.end(64)
        return (time.process_time() - since) / 2000

    assert min(one_round() for _ in range(5)) < 20e-6


@pytest.mark.gpu
def test_a_gpu_that_always_has_work_is_busy(require):
    require("cuda", torch.cuda.is_available(), "torch finds no CUDA device")
    x = torch.randn(2048, 2048, device="cuda")
    meter = Meter(x.device)
    for _ in range(50):
        meter.begin()
        for _ in range(20):
            x = torch.nn.functional.normalize(x @ x)
        meter.end(8)
    torch.cuda.synchronize()
    assert meter.read().device_busy > 0.8
    time.sleep(0.2)
    assert meter.read().device_busy == 0
