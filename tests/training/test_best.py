"""The best models of a run: which are kept, and that nothing is lost wherever the run is cut off."""

from __future__ import annotations

import functools
import json
import os
import resource
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file

from spkfast import models
from spkfast.errors import InputError
from spkfast.inference import SpeakerEncoder
from spkfast.training.best import Best

SIZES = {"channels": 16, "mfa_channels": 24, "embedding_dim": 12, "attention_channels": 8, "se_channels": 8}
FIRST = "encoder.stem.conv.weight"
# Step and error rate of the validations of a run; a tie, and models that are none of the best.
RUN = [(10, 9.0), (20, 4.0), (30, 6.0), (40, 4.0), (50, 8.0), (60, 3.0), (70, 5.0)]


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return SpeakerEncoder(models.create("ecapa_tdnn", feature_dim=80, **SIZES), "wespeaker")


def add(best, encoder, step, eer):
    """The model of a step is told by its weights."""
    with torch.no_grad():
        encoder.model.get_parameter(FIRST).fill_(step)
    best.add(step, eer, encoder.save, {"lists": {"dev": eer}})


def contents(folder):
    """Bytes of every file."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def steps(folder):
    """Steps of the models; each is whole and has its own weights."""
    found = sorted(folder.glob("step_*"))
    for path in found:
        step = json.loads((path / "validation.json").read_text())["step"]
        assert path.name == f"step_{step:08d}"
        assert sorted(os.listdir(path)) == ["config.yaml", "model.safetensors", "validation.json"]
        assert (load_file(path / "model.safetensors")[FIRST] == step).all()
    return [int(path.name[5:]) for path in found]


@pytest.fixture(scope="module")
def unbroken(encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken") / "best"
    best = Best(folder, 3)
    for step, eer in RUN:
        add(best, encoder, step, eer)
    best.checkpointed(70)
    return folder


def test_keeps_the_lowest_and_of_equal_ones_the_earlier(encoder, tmp_path):
    folder = tmp_path / "best"
    best = Best(folder, 2)
    assert best.best() is None
    kept = []
    for step, eer in RUN:
        add(best, encoder, step, eer)
        kept.append(steps(folder))
    assert kept == [[10], [10, 20], [20, 30], [20, 40], [20, 40], [20, 60], [20, 60]]
    assert best.best() == folder / "step_00000060"
    assert (SpeakerEncoder.load(best.best(), device="cpu").model.get_parameter(FIRST) == 60).all()
    facts = json.loads((folder / "step_00000060" / "validation.json").read_text())
    assert facts == {"step": 60, "eer_percent": 3.0, "lists": {"dev": 3.0}}
    assert Best(folder, 2).best() == folder / "step_00000060"  # all that is known is in the folder


def test_keeps_what_was_best_at_the_last_checkpoint(encoder, tmp_path):
    folder = tmp_path / "best"
    best = Best(folder, 2)
    for step, eer in RUN[:3]:
        add(best, encoder, step, eer)
    best.checkpointed(35)
    add(best, encoder, 40, 4.0)
    add(best, encoder, 60, 3.0)
    assert steps(folder) == [20, 30, 60]  # 40 is in neither ranking
    best = Best(folder, 2)
    best.drop_after(35)
    assert steps(folder) == [20, 30] and best.best() == folder / "step_00000020"
    add(best, encoder, 40, 4.0)
    assert steps(folder) == [20, 30, 40]
    best.checkpointed(45)
    assert steps(folder) == [20, 40]


def test_later_models_are_of_a_run_that_was_given_up(encoder, tmp_path):
    folder = tmp_path / "best"
    for step, eer in RUN[:4]:
        add(Best(folder, 3), encoder, step, eer)
    assert steps(folder) == [20, 30, 40]
    add(Best(folder, 3), encoder, 30, 7.0)
    assert steps(folder) == [20, 30] and '"eer_percent": 7.0' in (folder / "step_00000030/validation.json").read_text()


@pytest.mark.parametrize("checkpoint", [0, 30, 45])
@pytest.mark.parametrize("killed", [40, 60, 70])
def test_resumed_run_has_the_bytes_of_the_unbroken_one(encoder, unbroken, tmp_path, checkpoint, killed):
    folder = tmp_path / "best"
    best = Best(folder, 3)
    for step, eer in RUN:
        if step > killed:
            break
        add(best, encoder, step, eer)
        if step <= checkpoint < step + 10:
            best.checkpointed(checkpoint)
    best = Best(folder, 3)
    best.drop_after(min(checkpoint, killed))
    done = [model for model in RUN if model[0] <= min(checkpoint, killed)]
    assert steps(folder) == sorted(step for step, _ in sorted(done, key=lambda model: model[::-1])[:3])
    for step, eer in RUN[len(done) :]:
        add(best, encoder, step, eer)
    best.checkpointed(70)
    assert contents(folder) == contents(unbroken) and len(steps(folder)) == 3


CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod"}


def is_change(event, arguments):
    """Whether an audit event tells of a change of the disk."""
    if event == "open":
        return bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    return event in CHANGES


def cut(work, number):
    """Does the work in a process that ends, as by kill -9, right before its ``number``-th change of the disk.

    Returns:
        Whether it was cut.
    """
    process = os.fork()
    if process == 0:
        left = number

        def watch(event, arguments):
            nonlocal left
            if is_change(event, arguments):
                left -= 1
                if left < 0:
                    os._exit(9)

        try:
            sys.addaudithook(watch)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert code in (0, 9)
    return code == 9


@pytest.mark.parametrize("place", ["model", "checkpoint"])
def test_cut_off_anywhere_nothing_is_lost(encoder, unbroken, tmp_path, place):
    """Cut off before each change of the disk by the sixth model, or by the checkpoint after it, the run goes on."""
    template = tmp_path / "template"
    best = Best(template, 3)
    for step, eer in RUN[:5]:
        add(best, encoder, step, eer)
    best.checkpointed(50)
    number, was_cut = 0, True
    while was_cut:
        folder = tmp_path / str(number)
        shutil.copytree(template, folder)
        best = Best(folder, 3)
        best.drop_after(50)
        last = functools.partial(add, best, encoder, *RUN[5])
        if place == "checkpoint":
            last()
            last = functools.partial(best.checkpointed, 65)
        was_cut = cut(last, number)
        found = steps(folder)
        assert {20, 40} < set(found) and set(found) <= {20, 30, 40, 60}
        best = Best(folder, 3)
        best.drop_after(50 if place == "model" else 65)
        assert steps(folder) == ([20, 30, 40] if place == "model" else [20, 40, 60])
        for step, eer in RUN[5 if place == "model" else 6 :]:
            add(best, encoder, step, eer)
        best.checkpointed(70)
        assert sorted(os.listdir(folder)) == sorted(os.listdir(unbroken)) and contents(folder) == contents(unbroken)
        number += 1
    assert number > 3


def test_full_disk_loses_nothing(encoder, tmp_path):
    folder = tmp_path / "best"
    best = Best(folder, 1)
    add(best, encoder, 10, 5.0)
    before = contents(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The weights do not fit, whole or at all; then they do, and of the facts only a part.
    for size in (0, 2000, 1 + max(len(content) for content in before.values())):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with pytest.raises(OSError):
                best.add(20, 4.0, encoder.save, {"much": "x" * 1_000_000})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert contents(folder) == before and os.listdir(folder) == ["step_00000010"]
    add(best, encoder, 20, 4.0)
    assert steps(folder) == [20]


def test_facts_that_cannot_be_written_leave_nothing(encoder, tmp_path):
    best = Best(tmp_path / "best", 1)
    with pytest.raises(ValueError, match="JSON"):
        best.add(10, 5.0, encoder.save, {"loss": float("nan")})
    assert best.best() is None and not (tmp_path / "best").exists()


def test_other_things_in_the_folder_are_named(encoder, tmp_path):
    best = Best(tmp_path / "best", 1)
    add(best, encoder, 10, 5.0)
    (tmp_path / "best" / "step_00000010" / "validation.json").write_text("{}")
    with pytest.raises(InputError, match=r"step_00000010/validation.json: cannot be read .* move .*step_00000010 out"):
        best.best()
