"""The best models of a training run: whole on disk, whenever the run is cut off."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from spkfast.errors import InputError
from spkfast.training.log import VALIDATION, read_log

# Beside the files of the model: step, error rate, and what else is known of the model.
_FACTS = "validation.json"


class Best:
    """Models of the lowest error rates, of equal ones the earlier, each in a folder ``step_<step>``.

    The folders are all there is: one is renamed to its name when it is whole and away from it before it is removed, so
    that the ranking can be read from them at any time.

    A run that was cut off goes on from a checkpoint, where the ranking must be the one of then. So models that were
    best at the last checkpoint also stay until the next one.

    Args:
        folder: Holds the models, and nothing else.
        keep: How many are kept.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder = folder
        self._keep = keep
        self._checkpoint = 0

    def add(self, step: int, eer_percent: float, save: Callable[[Path], None], extra: dict[str, Any]) -> None:
        """Saves a model if it is one of the best; those that are no longer needed go when it is there.

        Args:
            step: Steps that were done; more than at the last call.
            eer_percent: What models are ranked by.
            save: Writes the model into a folder, which it makes.
            extra: Plain values that are written beside the error rate.

        Raises:
            OSError: If it cannot be written; the other models are as before.
            InputError: If what is known of another model cannot be read.
        """
        self._clear()
        # What comes later than this is of a run that was cut off and has gone on from before.
        self._remove([model for model in self._ranked() if model.step >= step])
        final = self._folder / f"step_{step:08d}"
        if sum(model < _Model(eer_percent, step, final) for model in self._ranked()) >= self._keep:
            return
        facts = json.dumps({"step": step, "eer_percent": eer_percent, **extra}, allow_nan=False)
        partial = self._folder / f".partial_{step:08d}"
        try:
            _save(save, partial)
            with open(partial / _FACTS, "w", encoding="utf-8") as file:
                file.write(facts)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, final)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self._prune()

    def best(self) -> Path | None:
        """Folder of the model of the lowest error rate, for :meth:`SpeakerEncoder.load`; None where there is none."""
        ranked = self._ranked()
        return ranked[0].path if ranked else None

    def checkpointed(self, step: int) -> None:
        """To be called when a checkpoint was written, from which the run may go on: removes what that does not need."""
        self._checkpoint = step
        self._clear()
        self._prune()

    def drop_after(self, step: int) -> None:
        """To be called when a run goes on from a checkpoint: removes the models of later steps."""
        self._clear()
        self._remove([model for model in self._ranked() if model.step > step])
        self.checkpointed(step)

    def _ranked(self) -> list[_Model]:
        return sorted(_read(path) for path in self._folder.glob("step_*"))

    def _prune(self) -> None:
        ranked = self._ranked()
        then = [model for model in ranked if model.step <= self._checkpoint]
        needed = {*ranked[: self._keep], *then[: self._keep]}
        self._remove([model for model in ranked if model not in needed])

    def _remove(self, models: list[_Model]) -> None:
        for model in models:
            removed = self._folder / f".removed_{model.step:08d}"
            os.replace(model.path, removed)
            shutil.rmtree(removed, ignore_errors=True)

    def _clear(self) -> None:
        """Removes what a run that was killed has left, that of a killed :meth:`SpeakerEncoder.save` too."""
        for pattern in (".removed_*", ".partial_*", "..partial_*"):
            for path in self._folder.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)


def taken_validation(folder: Path, take: str) -> dict[str, Any] | None:
    """What the log of a run that has ended says of the model that came of it; None where there was no validation.

    Args:
        folder: The run's folder.
        take: Its ``validation.take``.
    """
    validations = {entry["step"]: entry for entry in read_log(folder, VALIDATION)}
    best = Best(folder / "best", 1).best() if take == "best" else None
    # Where no best model could be written, it is the last one.
    step = max(validations, default=None) if best is None else _read(best).step
    return None if step is None else validations.get(step)


class _Model(NamedTuple):
    """A model, in the order of the ranking."""

    eer_percent: float
    step: int
    path: Path


def _read(path: Path) -> _Model:
    try:
        facts = json.loads((path / _FACTS).read_text(encoding="utf-8"))
        return _Model(float(facts["eer_percent"]), int(facts["step"]), path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path / _FACTS}: cannot be read ({error}); move {path} out of this folder") from error


def _save(save: Callable[[Path], None], folder: Path) -> None:
    from safetensors import SafetensorError

    try:
        save(folder)
    except SafetensorError as error:  # what its writer makes of every error of the disk
        raise OSError(f"{folder}: cannot be written ({error})") from error
