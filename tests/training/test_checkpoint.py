"""Checkpoints: what a disk refuses is told to all processes, and harms none that are there."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import SimpleNamespace

import accelerate.utils
import pytest

from spkfast.errors import InputError
from spkfast.training import checkpoint


def an_accelerator(rank: int = 0, wait=lambda: None) -> SimpleNamespace:
    return SimpleNamespace(process_index=rank, is_main_process=rank == 0, wait_for_everyone=wait)


def save(folder: Path, step: int, keep: int = 1, accelerator: SimpleNamespace | None = None) -> str:
    accelerator = accelerator or an_accelerator()
    return checkpoint.save(folder, step, {"step": step}, {"rank": 0}, {"steps": 9}, keep, accelerator)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refusing(refused, real=os.replace):
    """As ``os.replace``, but for some names."""

    def replace(source, target):
        if refused(Path(source).name, Path(target).name):
            raise OSError(1, "Operation not permitted")
        real(source, target)

    return replace


def test_the_newest_are_kept(tmp_path: Path) -> None:
    assert [save(tmp_path, step, keep=2) for step in (3, 6, 9)] == ["", "", ""]
    assert names(tmp_path) == ["step_00000006", "step_00000009"]
    step, state, own = checkpoint.load(
        checkpoint.checkpoints(tmp_path)[-1], {"steps": 9}, frozenset(), an_accelerator()
    )
    assert (step, state, own) == (9, {"step": 9}, {"rank": 0})


def test_one_that_cannot_get_its_name_is_told_and_the_earlier_ones_stay(tmp_path, monkeypatch) -> None:
    assert save(tmp_path, 3) == ""
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refusing(lambda source, target: target == "step_00000006"))
        assert "Operation not permitted" in save(tmp_path, 6)
        assert names(tmp_path) == ["step_00000003"]
    assert save(tmp_path, 9) == "" and names(tmp_path) == ["step_00000009"]


def test_one_of_the_same_step_that_cannot_be_removed_is_told_and_stays(tmp_path, monkeypatch) -> None:
    assert save(tmp_path, 3) == ""
    monkeypatch.setattr(os, "replace", refusing(lambda source, target: source == "step_00000003"))
    assert "Operation not permitted" in save(tmp_path, 3)
    assert names(tmp_path) == ["step_00000003"]


def test_an_old_one_that_cannot_be_removed_stays_until_the_next_time(tmp_path, monkeypatch) -> None:
    assert save(tmp_path, 3) == ""
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refusing(lambda source, target: source == "step_00000003"))
        assert save(tmp_path, 6) == ""  # the new one is there
        assert names(tmp_path) == ["step_00000003", "step_00000006"]
    assert save(tmp_path, 9) == "" and names(tmp_path) == ["step_00000009"]


@pytest.mark.parametrize("refused", ["", "process_00001.pt", "step_00000003"])
def test_all_processes_are_told_alike(tmp_path, monkeypatch, refused: str) -> None:
    """The second one's own file, which it writes itself, or the name, which the first one gives."""
    barrier = threading.Barrier(2, timeout=20)
    given: list[list[str]] = [[], []]
    told = ["?", "?"]
    mine = threading.local()

    def gather(values: list[str]) -> list[str]:
        given[mine.rank] = values
        barrier.wait()
        everything = [*given[0], *given[1]]
        barrier.wait()
        return everything

    def write(path: Path, value, real=checkpoint._write) -> None:
        if path.name == refused:
            raise OSError(28, "No space left on device")
        real(path, value)

    def work(rank: int) -> None:
        mine.rank = rank
        told[rank] = save(tmp_path, 3, accelerator=an_accelerator(rank, lambda: barrier.wait()))

    monkeypatch.setattr(accelerate.utils, "gather_object", gather)
    monkeypatch.setattr(checkpoint, "_write", write)
    monkeypatch.setattr(os, "replace", refusing(lambda source, target: target == refused))
    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told[0] == told[1] and bool(told[0]) == bool(refused)
    assert names(tmp_path) == ([] if refused else ["step_00000003"])


def test_what_differs_is_told_with_the_keys_that_settle_it(tmp_path) -> None:
    found = {"steps": 9, "out": "a", "contents of the data": "1", "contents of the trials": "2", "teachers": []}
    given = {"steps": 9, "out": "b", "contents of the data": "3", "contents of the trials": "4", "teachers": ["5"]}
    checkpoint.check_settings(tmp_path, found, {**found, "out": "b"}, frozenset({"out"}))
    with pytest.raises(InputError) as raised:
        checkpoint.check_settings(tmp_path, found, given, frozenset({"out"}))
    data, trials = "data.train_list, data.speakers, data.noise, data.rir", "validation.trials, validation.held_out"
    assert str(raised.value) == (
        f"{tmp_path}: was trained with contents of the data ({data})='1', the config has '3'; with contents of the "
        f"trials ({trials})='2', the config has '4'; with teachers (distillation.teachers)=[], the config has ['5']; "
        "resume with the same settings or choose another folder"
    )
