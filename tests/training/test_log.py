"""The log of a run: what a kill, a resumption, a full disk and numbers out of range leave in it; and trackers."""

import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from types import SimpleNamespace

import pytest
from accelerate import Accelerator

from spkfast.training.config import TrainConfig
from spkfast.training.log import LOG, VALIDATION, RunLog, drop_events, finite, mean_rate, read_log, trackers


def steps(folder, name=LOG):
    return [entry["step"] for entry in read_log(folder, name)]


def test_entries_come_back_in_order(tmp_path):
    log = RunLog(tmp_path / "new" / LOG, 0)
    lists = {"dev": {"eer_percent": 4.5, "eer_low_percent": None, "num_trials": 1200}}
    log.write(20, {"loss": 1.5, "lr": 0.1})
    log.write(40, {"lists": lists})
    assert read_log(tmp_path / "new") == [{"step": 20, "loss": 1.5, "lr": 0.1}, {"step": 40, "lists": lists}]


def test_training_and_validation_are_two_files_and_either_may_be_missing(tmp_path):
    RunLog(tmp_path / VALIDATION, 0).write(5, {"seconds": 1.0})
    assert read_log(tmp_path) == [] and steps(tmp_path, VALIDATION) == [5]


def test_resuming_drops_later_entries_and_a_half_written_one(tmp_path):
    log = RunLog(tmp_path / LOG, 0)
    for step in (20, 40, 60):
        log.write(step, {"loss": 1.0})
    with open(tmp_path / LOG, "a") as file:
        file.write('{"step": 80, "lo')
    assert steps(tmp_path) == [20, 40, 60]
    RunLog(tmp_path / LOG, 40).write(50, {})
    assert steps(tmp_path) == [20, 40, 50]
    assert len((tmp_path / LOG).read_text().splitlines()) == 3
    RunLog(tmp_path / LOG, 0)
    assert (tmp_path / LOG).read_bytes() == b""


@pytest.mark.parametrize(
    "end", [b'{"step": 80}', b'{"step"', b"\0\0\0", b"[1]\n", b"7\n", b'{"loss": 1}\n', b'{"step": "x"}\n', b"\xff\n"]
)
def test_a_damaged_end_is_no_entry_and_is_cut_off(tmp_path, end):
    """A number too: without the end of the line, 80 may be what there is of 8000."""
    (tmp_path / LOG).write_bytes(b'{"step": 20}\n' + end)
    assert steps(tmp_path) == [20]
    RunLog(tmp_path / LOG, 10**6).write(100, {})
    assert steps(tmp_path) == [20, 100]
    assert (tmp_path / LOG).read_bytes() == b'{"step": 20}\n{"step": 100}\n'


def test_damage_in_the_middle_costs_no_other_entry(tmp_path):
    (tmp_path / LOG).write_bytes(b'{"step": 20}\n\0\0\n{"step": 60}\n{"step": 80}\n')
    RunLog(tmp_path / LOG, 60)
    assert steps(tmp_path) == [20, 60]


def test_numbers_that_are_not_finite_are_still_json(tmp_path):
    values = {"a": math.nan, "b": [math.inf, 1.0], "c": {"d": -math.inf}, "e": (1, "x", True, None)}
    RunLog(tmp_path / LOG, 0).write(1, values)

    def refuse(word):
        raise AssertionError(word)

    (entry,) = [json.loads(line, parse_constant=refuse) for line in (tmp_path / LOG).read_text().splitlines()]
    assert entry == {"step": 1, "a": None, "b": [None, 1.0], "c": {"d": None}, "e": [1, "x", True, None]}
    assert finite(2.5) == 2.5 and finite(math.nan) is None


def test_a_full_disk_is_told_once_and_spoils_no_other_entry(tmp_path):
    told = []
    log = RunLog(tmp_path / LOG, 0, warn=told.append)
    log.write(20, {"loss": 1.0})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        # Room for ten more bytes, then for none.
        for room in (10, 0):
            resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(tmp_path / LOG) + room, before[1]))
            log.write(40, {"loss": 1.0})
            assert steps(tmp_path) == [20]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    log.write(60, {"loss": 1.0})
    assert steps(tmp_path) == [20, 60] and (tmp_path / LOG).read_text().endswith("\n")
    assert len((tmp_path / LOG).read_text().splitlines()) == 2
    assert len(told) == 1 and str(tmp_path / LOG) in told[0] and "training goes on" in told[0]


def test_without_a_function_to_call_the_full_disk_is_a_warning(tmp_path):
    log = RunLog(tmp_path / "run" / LOG, 0)
    (tmp_path / "run" / LOG).unlink()
    (tmp_path / "run").rmdir()
    with pytest.warns(UserWarning, match="No such file or directory"):
        log.write(20, {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log.write(40, {})


def test_each_tracker_has_its_own_place_and_weights_and_biases_the_settings(tmp_path, monkeypatch):
    begun, logged = [], []

    def init(**settings):
        begun.append(settings)
        return SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    config = TrainConfig(out=str(tmp_path / "run"), wandb="speakers", steps=3)
    accelerator = Accelerator(cpu=True, log_with=trackers(config))
    assert not (tmp_path / "run").exists()  # nothing begins before it is asked for
    accelerator.init_trackers("")
    accelerator.log({"loss": 1.5}, step=20)
    for tracker in accelerator.trackers:
        tracker.finish()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["tensorboard"]
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents*"))
    assert [(one["project"], one["dir"], one["config"]["steps"]) for one in begun] == [("speakers", config.out, 3)]
    assert logged == [(20, {"loss": 1.5})]
    config.wandb = None
    assert [tracker.name for tracker in trackers(config)] == ["tensorboard"]


def test_a_place_that_cannot_be_written_is_an_error_at_the_start(tmp_path):
    (tmp_path / LOG).mkdir()
    with pytest.raises(IsADirectoryError):
        RunLog(tmp_path / LOG, 0)


def test_a_kill_leaves_whole_entries(tmp_path):
    code = (
        "from spkfast.training.log import RunLog, LOG\n"
        f"log = RunLog({str(tmp_path / LOG)!r}, 0)\n"
        "for step in range(10**9): log.write(step, {'text': 'x' * 5000})"
    )
    run = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while not (tmp_path / LOG).exists() or (tmp_path / LOG).stat().st_size < 10**5:
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    run.send_signal(signal.SIGKILL)
    run.wait()
    found = steps(tmp_path)
    assert len(found) > 10 and found == list(range(len(found)))
    RunLog(tmp_path / LOG, 10).write(11, {})
    assert steps(tmp_path) == list(range(12))


def test_a_mean_rate_is_over_the_time_that_is_told():
    log = [{"rate": 10.0, "seconds": 3.0}, {"rate": 40.0, "seconds": 1.0}, {"seconds": 5.0}, {"rate": 7.0}]
    assert mean_rate(log, "rate") == (30 + 40) / 4
    assert mean_rate(log[2:], "rate") is None and mean_rate([], "rate") is None


def test_events_of_tensorboard_alone_are_dropped(tmp_path):
    drop_events(tmp_path)
    (tmp_path / "tensorboard").mkdir()
    for name in ("events.out.tfevents.1.host", "events.out.tfevents.2.host", "mine.txt"):
        (tmp_path / "tensorboard" / name).touch()
    drop_events(tmp_path)
    assert [path.name for path in (tmp_path / "tensorboard").iterdir()] == ["mine.txt"]
