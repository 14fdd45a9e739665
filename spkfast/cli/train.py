"""``spkfast train``: training and resuming from a YAML file."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from spkfast.cli.common import meter, print_result, shown_rates
from spkfast.errors import InputError, nearest
from spkfast.memory import keep_freed_memory
from spkfast.training.config import TrainConfig, fine_tuned, flatten

if TYPE_CHECKING:
    from spkfast.training.loop import Progress, Trainer

FINE_TUNING = "fine_tuning"

HELP = "train a speaker network, or resume a run that was cut off"


def main(argv: list[str]) -> None:
    """Runs ``spkfast train``."""
    config, as_json = parse(argv)
    keep_freed_memory()
    second = fine_tuned(config)
    result = None
    if second is None or not _is_past(config):
        result = _train(config, second)
    if second is not None:
        gc.collect()  # a network and its optimiser are parts of cycles
        result = _train(second)
    _leave_group()
    if result is None:  # one of several processes
        return
    shown = dict(result)
    if "lists" in result:
        shown["lists"] = [{"trials": name, **shown_rates(row)} for name, row in result["lists"].items()]
    print_result(result, as_json, shown)


def _leave_group() -> None:
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _is_past(first: TrainConfig) -> bool:
    """Whether a first run has ended and nothing of it but the model was kept, which is all that the second needs."""
    from spkfast.training.checkpoint import checkpoints
    from spkfast.training.task import MODEL

    folder = Path(first.out)
    return first.resume and (folder / MODEL).is_dir() and not checkpoints(folder / "checkpoints")


def _check_second(first: TrainConfig, second: TrainConfig) -> None:
    """An error in what a second run is given would show when the first has ended, days later."""
    import torch

    from spkfast.training.loop import Trainer
    from spkfast.training.task import check_continues

    # Of the first run, which has been made.
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        check_continues(first, second)
        with torch.random.fork_rng(devices):
            Trainer(dataclasses.replace(second, init_from=None))
    except InputError as error:
        raise InputError(f"{FINE_TUNING}: {error}") from error
    gc.collect()


def _train(config: TrainConfig, second: TrainConfig | None = None) -> dict[str, Any] | None:
    """Trains to the end; what came of it, in the main process. A second run that is to follow is checked before."""
    from spkfast.training.log import read_log
    from spkfast.training.loop import Trainer
    from spkfast.training.task import MODEL

    trainer = Trainer(config, warn=_say)
    if second is not None:
        _check_second(config, second)
    if config.resume and trainer.is_main_process:
        found = f"going on after step {trainer.first_step}" if trainer.first_step else "no checkpoint there yet"
        _say(f"{trainer.folder}: {found}")
    last = follow(trainer)
    if not trainer.is_main_process:
        return None
    bad = len(trainer.bad_files)
    if bad:
        _say(f"{bad} of {len(trainer.dataset)} files skipped")
    result: dict[str, Any] = {
        "model": str(trainer.folder / MODEL),
        "steps": last.step if last else trainer.first_step,
    }
    for entry in read_log(trainer.folder)[-1:]:
        result |= {name: entry[name] for name in ("loss", "accuracy", "crops_per_second")}
    result |= {"files_skipped": bad, **_validated(trainer.folder, config.validation.take)}
    report = trainer.folder / "report.html"
    return result | ({"report": str(report)} if report.is_file() else {})


def follow(trainer: Trainer) -> Progress | None:
    """Trains to the end, the main process showing how far it is; the last step, None where none was left to do."""
    shown = meter("training", trainer.first_step) if trainer.is_main_process else contextlib.nullcontext()
    last = None
    with shown as update:
        for step in trainer.run():
            last = step
            if update is not None:
                update(step.step, step.steps, _note(step))
    return last


def _note(progress: Progress) -> str:
    parts = [f"loss {progress.loss:.3f}"]
    if progress.eer_percent is not None:
        parts.append(f"EER {progress.eer_percent:.2f} %")
    if progress.crops_per_second > 0:  # not in the first steps, before it was measured
        parts += [
            f"{progress.crops_per_second:.0f} utt/s",
            f"loader wait {100 * progress.loader_wait:.0f} %",
            f"device busy {100 * progress.device_busy:.0f} %",
        ]
    return ", ".join(parts)


def _validated(folder: Path, take: str) -> dict[str, Any]:
    """Error rates of the model that was taken, and the place of the best one; nothing where there was no validation."""
    from spkfast.training.best import Best, taken_validation

    taken = taken_validation(folder, take)
    if taken is None:
        return {}
    best = Best(folder / "best", 1).best()
    return {"lists": taken["lists"], **({"best": str(best)} if best else {})}


def _say(message: str) -> None:
    print(message, file=sys.stderr)


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
    argv, differing = _split(argv)
    try:
        config = parser.instantiate(parser.parse_args(argv))
        run = TrainConfig(**{field.name: getattr(config, field.name) for field in dataclasses.fields(TrainConfig)})
        if run.fine_tuning is not None or differing:
            run.fine_tuning = _fine_tuning(parser, [run.fine_tuning or {}, differing], known)
    except jsonargparse.ArgumentError as error:
        raise InputError(" ".join(str(error).split())) from error
    return run, as_json


def _split(argv: list[str]) -> tuple[list[str], dict[str, Any]]:
    """The options of the run, and by dotted name the values of those of its fine-tuning."""
    import yaml

    prefix = f"--{FINE_TUNING}."
    rest: list[str] = []
    differing: dict[str, Any] = {}
    arguments = iter(argv)
    for argument in arguments:
        if not argument.startswith(prefix):
            rest.append(argument)
            continue
        option, is_given, value = argument.partition("=")
        try:
            differing[option.removeprefix(prefix)] = yaml.safe_load(value if is_given else next(arguments))
        except StopIteration:
            raise InputError(f"{option}: expected a value") from None
        except yaml.YAMLError as error:
            raise InputError(f"{option}: not a YAML value ({' '.join(str(error).split())})") from error
    return rest, differing


def _fine_tuning(parser: Any, given: list[dict[str, Any]], known: list[str]) -> dict[str, Any]:
    """What differs in the fine-tuning, nested and of the types that a run has: an error would show after days only."""
    import jsonargparse

    nested: dict[str, Any] = {}
    for values in given:
        _merge(nested, values)
    names = _checked(nested, known, f"{FINE_TUNING}.")
    try:
        typed = parser.parse_object(nested)
    except jsonargparse.ArgumentError as error:
        raise InputError(f"{FINE_TUNING}: {' '.join(str(error).split())}") from error
    result: dict[str, Any] = {}
    _merge(result, {name: typed[name] for name in (name.removeprefix(f"{FINE_TUNING}.") for name in names)})
    return result


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Puts values, whose names may be dotted, into nested dictionaries, over those that are there."""
    for name, value in values.items():
        *sections, key = str(name).split(".")
        inner = into
        for section in [*sections, *([key] if isinstance(value, dict) else [])]:
            if not isinstance(inner.get(section), dict):
                inner[section] = {}
            inner = inner[section]
        if isinstance(value, dict):
            _merge(inner, value)
        else:
            inner[key] = value


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
    try:
        _checked(content, known)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _checked(content: Mapping[str, Any], known: list[str], prefix: str = "") -> list[str]:
    """Dotted names of all that nested settings set.

    Raises:
        InputError: If one is unknown, or a section holds something else than keys and values.
    """
    leaves = flatten(TrainConfig())
    names = []
    for key, value in content.items():
        name = f"{prefix}{key}"
        if not _is_known(name, known):
            raise InputError(f"unknown key {name!r}{nearest(name, known)}")
        if isinstance(value, Mapping) and any(other.startswith(f"{name}.") for other in known):
            names += _checked(value, known, f"{name}.")
        elif name.removeprefix(f"{FINE_TUNING}.") in leaves or name not in known:
            names.append(name)
        else:
            raise InputError(f"{name} must hold keys and values, got {value!r}")
    return names


def _keys() -> list[str]:
    """Dotted names of all fields, sections included, those of the fine-tuning too."""
    leaves = list(flatten(TrainConfig()))
    keys = [*leaves, *dict.fromkeys(leaf.rpartition(".")[0] for leaf in leaves if "." in leaf)]
    return [*keys, *(f"{FINE_TUNING}.{key}" for key in keys if key != FINE_TUNING)]


def _is_known(key: str, known: list[str]) -> bool:
    # What may stand in a dictionary is for the model, the front-end and so on to say.
    return key in known or key.startswith(tuple(f"{name}." for name in _dictionaries()))


def _dictionaries() -> list[str]:
    """Dotted names of the fields that hold keywords of something else, those of the fine-tuning too."""
    names = [name for name in _dictionaries_of(TrainConfig) if name != FINE_TUNING]
    return [*names, *(f"{FINE_TUNING}.{name}" for name in names)]


def _dictionaries_of(config: Any, prefix: str = "") -> Iterator[str]:
    for name, kind in get_type_hints(config).items():
        if dataclasses.is_dataclass(kind):
            yield from _dictionaries_of(kind, f"{prefix}{name}.")
        elif any(get_origin(part) is dict for part in (kind, *get_args(kind))):
            yield prefix + name


def _take(argv: list[str], flag: str) -> bool:
    if flag not in argv:
        return False
    argv.remove(flag)
    return True
