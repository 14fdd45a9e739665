"""Checkpoints: written whole or not at all, kept to a number, and refused where they do not belong to the run."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from spkfast.errors import InputError

FORMAT_VERSION = 3
_STATE, _RUN = "state.pt", "run.json"
# The keys of the config that settle what is compared beside its values.
_SET_BY = {
    "contents of the data": "data.train_list, data.speakers, data.noise, data.rir",
    "contents of the trials": "validation.trials, validation.held_out",
    "teachers": "distillation.teachers",
}


def save(
    folder: Path, step: int, state: dict[str, Any], own: dict[str, Any], settings: dict[str, Any], keep: int,
    accelerator: Any,
) -> str:  # fmt: skip
    """Write ``folder/step_<step>``; keep the newest ``keep``, at least 1. All processes call it.

    A disk that is full leaves the earlier checkpoints as they are. One that cannot be removed stays for now.

    Args:
        folder: Holds the checkpoints.
        step: Steps done.
        state: What all processes have alike, as plain values and tensors; the main process writes it.
        own: What each process has for itself.
        settings: What a resumed run must have alike.
        keep: How many are kept.
        accelerator: Tells the processes apart.

    Returns:
        Why it could not be written, in all processes; empty where it was.
    """
    from accelerate.utils import gather_object

    final = folder / f"step_{step:08d}"
    partial = folder / f".partial_{step:08d}"
    error = ""
    try:
        if accelerator.is_main_process:
            _clear(folder)
            partial.mkdir(parents=True)
    except OSError as reason:
        error = _told(reason)
    accelerator.wait_for_everyone()
    try:
        if not error:
            _write(partial / _own(accelerator), own)
            if accelerator.is_main_process:
                _write(partial / _STATE, state)
                run = {"format_version": FORMAT_VERSION, "step": step, "config": settings}
                with open(partial / _RUN, "w", encoding="utf-8") as file:
                    json.dump(run, file)
                    _flush(file)
    except (OSError, RuntimeError) as reason:
        error = _told(reason)
    error = _first(gather_object([error]))
    if accelerator.is_main_process:
        try:
            if not error:
                _remove(final)
                os.replace(partial, final)
        except OSError as reason:
            error = _told(reason)
        if error:
            shutil.rmtree(partial, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                for old in checkpoints(folder)[:-keep]:
                    _remove(old)
    return _first(gather_object([error]))


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(folder.glob("step_*"))


def load(
    path: Path, settings: dict[str, Any], free: frozenset[str], accelerator: Any
) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """The step to go on with, what all processes have alike, and what this one has for itself.

    Raises:
        InputError: If the checkpoint is damaged, of another format version, or of a run with other settings, all of
            which the message names.
    """
    try:
        run = json.loads((path / _RUN).read_text(encoding="utf-8"))
        version, step, theirs = run["format_version"], int(run["step"]), dict(run["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a whole checkpoint ({error})") from error
    if version != FORMAT_VERSION:
        raise InputError(f"{path}: checkpoint format version {version}, this spkfast reads version {FORMAT_VERSION}")
    check_settings(path, theirs, settings, free)
    try:
        state, own = (
            torch.load(path / name, map_location="cpu", weights_only=True) for name in (_STATE, _own(accelerator))
        )
    except Exception as error:  # whatever torch's reader raises for a damaged file
        raise InputError(f"{path}: cannot be restored ({_told(error)})") from error
    return step, state, own


def check_settings(path: Path, theirs: dict[str, Any], settings: dict[str, Any], free: frozenset[str]) -> None:
    """Refuses to go on with a run under other settings.

    Args:
        path: Where ``theirs`` were found.
        theirs: Settings of the run.
        settings: Those given now.
        free: Which of them may differ.

    Raises:
        InputError: If others differ, all of which the message names.
    """
    differing = [
        f"{key}{f' ({_SET_BY[key]})' if key in _SET_BY else ''}={theirs.get(key)!r}, the config has "
        f"{settings.get(key)!r}"
        for key in sorted(set(settings) | set(theirs))
        if key not in free and settings.get(key) != theirs.get(key)
    ]
    if differing:
        raise InputError(
            f"{path}: was trained with {'; with '.join(differing)}; resume with the same settings or choose another "
            "folder"
        )


def _first(errors: list[str]) -> str:
    return next(filter(None, errors), "")


def _own(accelerator: Any) -> str:
    return f"process_{accelerator.process_index:05d}.pt"


def _write(path: Path, value: dict[str, Any]) -> None:
    """On disk before the name that promises a whole checkpoint."""
    with open(path, "wb") as file:
        writer: Any = _Writer(file)
        try:
            torch.save(value, writer)
        except RuntimeError as error:  # which torch makes of any error of the disk
            raise writer.error or error from error
        _flush(file)


class _Writer:
    """A file that remembers why it could not be written."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.flush = file.flush
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return int(self._file.write(data))
        except OSError as error:
            self.error = error
            raise


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _remove(path: Path) -> None:
    """Renamed first: what is half removed must not look like a checkpoint."""
    if path.exists():
        removed = path.with_name(f".removed_{path.name}")
        os.replace(path, removed)
        shutil.rmtree(removed, ignore_errors=True)


def _clear(folder: Path) -> None:
    """Removes what a run that was killed has left."""
    for pattern in (".partial_*", ".removed_*"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def _told(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
