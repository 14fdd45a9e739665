"""The log of a run: files of JSON lines that outlive a kill, a resumption and a full disk, and trackers."""

from __future__ import annotations

import errno
import json
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spkfast.training.config import TrainConfig, flatten

LOG = "log.jsonl"
VALIDATION = "validation.jsonl"
_TENSORBOARD = "tensorboard"


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)


class RunLog:
    """Lines of JSON, one an entry, each with the ``step`` it tells of, in ascending order.

    Entries past the step that a run goes on from are dropped, as is a line that was half written when it was killed.

    Args:
        path: The file; its folder is made.
        first_step: Steps already done.
        warn: Called once, with a line, if an entry cannot be written: training goes on without it.

    Raises:
        OSError: If the file cannot be opened for writing.
    """

    def __init__(self, path: str | os.PathLike[str], first_step: int, warn: Callable[[str], None] = _warn) -> None:
        self._path = Path(path)
        self._warn: Callable[[str], None] | None = warn
        self._path.parent.mkdir(parents=True, exist_ok=True)
        kept = end = 0
        # Cut off, not written anew: that needs no space, and a kill in between loses nothing.
        with open(self._path, "a+b") as file:
            file.seek(0)
            for line in file:
                end += len(line)
                entry = _entry(line)
                if entry is not None and entry["step"] <= first_step:
                    kept = end
            file.truncate(kept)

    def write(self, step: int, entry: Mapping[str, Any]) -> None:
        """Adds an entry; numbers that are not finite become None, which JSON can hold.

        Args:
            step: Steps done.
            entry: Plain values, nested where wanted.
        """
        line = (json.dumps(finite({"step": step, **entry})) + "\n").encode()
        try:
            with open(self._path, "ab", buffering=0) as file:
                size = file.seek(0, os.SEEK_END)
                try:
                    if file.write(line) != len(line):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                except OSError:
                    file.truncate(size)  # the part that was written would spoil the next entry
                    raise
        except OSError as error:
            if self._warn is not None:
                self._warn(f"{self._path}: an entry cannot be written ({error.strerror}); training goes on")
                self._warn = None


def read_log(folder: str | os.PathLike[str], name: str = LOG) -> list[dict[str, Any]]:
    """Entries of a run's log, oldest first; none where there is no log.

    Args:
        folder: The run's folder.
        name: ``log.jsonl`` of training, or ``validation.jsonl``.
    """
    path = Path(folder) / name
    if not path.exists():
        return []
    with open(path, "rb") as file:
        return [entry for entry in map(_entry, file) if entry is not None]


def mean_rate(log: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Mean of a rate over the time that the entries of a log tell of; None where they do not."""
    known = [entry for entry in log if entry.get(name) is not None and entry.get("seconds")]
    total = math.fsum(entry["seconds"] for entry in known)
    return math.fsum(entry[name] * entry["seconds"] for entry in known) / total if total else None


def trackers(config: TrainConfig) -> list[Any]:
    """What shows the log elsewhere: ``log_with`` of an accelerate ``Accelerator``, which starts them.

    TensorBoard has its files in ``out/tensorboard``, where it is installed. Weights & Biases gets the settings too, in
    the project that ``wandb`` names.
    """
    from accelerate.tracking import TensorBoardTracker, WandBTracker
    from accelerate.utils import is_tensorboard_available

    made: list[Any] = [TensorBoardTracker(_TENSORBOARD, config.out)] if is_tensorboard_available() else []
    if config.wandb:
        made.append(WandBTracker(config.wandb, dir=config.out, config=flatten(config)))
    return made


def drop_events(folder: str | os.PathLike[str]) -> None:
    """Removes what TensorBoard has of a run that starts anew: it would show both as one."""
    for path in (Path(folder) / _TENSORBOARD).glob("events.out.tfevents.*"):
        path.unlink()


def finite(value: Any) -> Any:
    """A plain value with None in place of each number that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _entry(line: bytes) -> dict[str, Any] | None:
    """What a line holds; None for one that was cut short."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if line.endswith(b"\n") and isinstance(entry, dict) and isinstance(entry.get("step"), int) else None
