"""``spkfast train``: training and resuming from a YAML file."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from spkfast.cli.common import print_result, progress
from spkfast.errors import InputError, nearest
from spkfast.training.config import TrainConfig, flatten

HELP = "train a speaker network, or resume a run that was cut off"


def main(argv: list[str]) -> None:
    """Runs ``spkfast train``."""
    config, as_json = parse(argv)

    from spkfast.training.loop import Trainer

    trainer = Trainer(config, warn=lambda message: print(message, file=sys.stderr))
    if config.resume and trainer.is_main_process:
        found = f"going on after step {trainer.first_step}" if trainer.first_step else "no checkpoint there yet"
        print(f"{trainer.folder}: {found}", file=sys.stderr)
    steps = trainer.run()
    if trainer.is_main_process:
        steps = progress(steps, config.steps - trainer.first_step, "training")
    last = None
    for step in steps:
        last = step
    if not trainer.is_main_process:
        return
    bad = len(trainer.bad_files)
    if bad:
        print(f"{bad} of {len(trainer.dataset)} files skipped", file=sys.stderr)
    result: dict[str, Any] = {"model": str(trainer.folder / "model"), "steps": config.steps}
    if last is not None:
        result |= {"loss": last.loss, "accuracy": last.accuracy, "crops_per_second": last.crops_per_second}
    print_result({**result, "files_skipped": bad}, as_json)


def parse(argv: list[str]) -> tuple[TrainConfig, bool]:
    """The run that a command line asks for, and whether its result is wanted as JSON.

    Raises:
        InputError: If the file is missing or no YAML, or a key or value is not one of TrainConfig's.
    """
    import jsonargparse

    parser = jsonargparse.ArgumentParser(
        prog="spkfast train",
        description="Train a speaker network. CONFIG is a YAML file; any key can be given as an option instead.",
        usage="spkfast train CONFIG [--key value ...] [--resume] [--strict] [--json]",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file; also as first argument")
    parser.add_class_arguments(TrainConfig, as_group=False)
    argv = list(argv)
    as_json = _take(argv, "--json")
    for flag, key in (("--resume", "resume"), ("--strict", "data.strict")):
        if _take(argv, flag):
            argv.append(f"--{key}=true")
    if argv and not argv[0].startswith("-"):
        argv.insert(0, "--config")
    known = _keys()
    for position, argument in enumerate(argv):
        option, _, value = argument.partition("=")
        if option == "--config":
            _check_file(Path(value or next(iter(argv[position + 1 :]), "")), known)
        elif option.startswith("--") and not _is_known(option[2:], [*known, "help", "print_config"]):
            raise InputError(f"unknown option {option}{nearest(option, ['--' + key for key in known])}")
    try:
        config = parser.instantiate(parser.parse_args(argv))
    except jsonargparse.ArgumentError as error:
        raise InputError(" ".join(str(error).split())) from error
    return TrainConfig(
        **{field.name: getattr(config, field.name) for field in dataclasses.fields(TrainConfig)}
    ), as_json


def _check_file(path: Path, known: list[str]) -> None:
    """A misspelt key is told with its place and the nearest one before the parser sees it."""
    import yaml

    if not path.is_file():
        raise InputError(f"{path}: is a folder, not a config file" if path.is_dir() else f"{path}: no such config file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a YAML file ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: must hold keys and values, found {type(content).__name__}")
    for key in _flat(content, known):
        if not _is_known(key, known):
            raise InputError(f"{path}: unknown key {key!r}{nearest(key, known)}")


def _flat(content: dict[str, Any], known: list[str], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key, value in content.items():
        name = f"{prefix}{key}"
        is_section = any(other.startswith(name + ".") for other in known)
        keys += _flat(value, known, name + ".") if is_section and isinstance(value, dict) else [name]
    return keys


def _keys() -> list[str]:
    """Dotted names of all fields, sections included."""
    leaves = list(flatten(TrainConfig()))
    return [*leaves, *dict.fromkeys(leaf.rpartition(".")[0] for leaf in leaves if "." in leaf)]


def _is_known(key: str, known: list[str]) -> bool:
    # What may stand in these two is for the model and the front-end to say.
    return key in known or key.startswith(("model.options.", "frontend.options."))


def _take(argv: list[str], flag: str) -> bool:
    if flag not in argv:
        return False
    argv.remove(flag)
    return True
