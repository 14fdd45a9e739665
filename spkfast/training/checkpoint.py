"""Checkpoints: written whole or not at all, kept to a number, and refused where they do not belong to the run."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from spkfast.errors import InputError

FORMAT_VERSION = 2


def save(folder: Path, step: int, config: dict[str, Any], keep: int, accelerator: Any) -> None:
    """Write ``folder/step_<step>`` with the accelerator's whole state; keep the newest ``keep``, at least 1."""
    final = folder / f"step_{step:08d}"
    partial = folder / f".partial_{step:08d}"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return
    (partial / "run.json").write_text(json.dumps({"format_version": FORMAT_VERSION, "step": step, "config": config}))
    for file in partial.iterdir():  # on disk before the name that promises a whole checkpoint
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(folder.glob("step_*"))


def load(path: Path, config: dict[str, Any], free: frozenset[str], accelerator: Any) -> int:
    """Restore the accelerator's state and return the step to go on with.

    Raises:
        InputError: If the checkpoint is damaged, of another format version, or of a run with other settings.
    """
    try:
        run = json.loads((path / "run.json").read_text())
        version, step, theirs = run["format_version"], run["step"], run["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a whole checkpoint ({error})") from error
    if version != FORMAT_VERSION:
        raise InputError(f"{path}: checkpoint format version {version}, this spkfast reads version {FORMAT_VERSION}")
    for key in sorted(set(config) | set(theirs)):
        if key not in free and config.get(key) != theirs.get(key):
            raise InputError(
                f"{path}: was trained with {key}={theirs.get(key)!r}, the config has {config.get(key)!r}; "
                "resume with the same settings or choose another folder"
            )
    try:
        accelerator.load_state(str(path))
    except Exception as error:  # whatever the readers of three file formats raise for a damaged file
        raise InputError(f"{path}: cannot be restored ({' '.join(str(error).split())[:200]})") from error
    return int(step)
