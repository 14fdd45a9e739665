"""``spkfast train``: training and resuming from a YAML file."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import gc
import os
import re
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_origin

from spkfast.cli.common import meter, print_result, shown_rates
from spkfast.errors import InputError
from spkfast.memory import keep_freed_memory
from spkfast.training.config import TrainConfig, changed, check_value, fine_tuned, fits, flatten, kinds

if TYPE_CHECKING:
    from spkfast.training.loop import Progress, Trainer

FINE_TUNING = "fine_tuning"
# Names that other toolkits have for what is a key here.
_SYNONYMS = {
    "learning_rate": "lr",
    "bs": "batch_size",
    "epochs": "steps",
    "num_epochs": "steps",
    "max_epochs": "steps",
    "max_steps": "steps",
    "num_workers": "workers",
}
# Keys whose relative paths start from the working folder.
_PATHS = ("data.train_list", "data.root", "data.speakers", "data.noise", "data.rir", "validation.trials",
          "validation.root", "validation.held_out")  # fmt: skip
_OTHER_OPTIONS = {
    "strict": "As --data.strict true.",
    "json": "Print the result as JSON.",
    "print_config": "Print all settings as YAML, and end.",
}

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
    from spkfast.training.log import mean_rate, read_log
    from spkfast.training.loop import Trainer
    from spkfast.training.task import MODEL

    trainer = Trainer(config, warn=_say)
    if second is not None:
        _check_second(config, second)
    if config.resume and trainer.is_main_process:
        found = f"going on after step {trainer.first_step}" if trainer.first_step else "no checkpoint there yet"
        _say(f"{trainer.folder}: {found}")
    with _stopping(trainer):
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
    log = read_log(trainer.folder)
    for entry in log[-1:]:
        result |= {name: entry[name] for name in ("loss", "accuracy")}
        result["crops_per_second"] = mean_rate(log, "crops_per_second")  # of the whole run
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


@contextlib.contextmanager
def _stopping(trainer: Trainer) -> Iterator[None]:
    """While a signal to end lets the run write a checkpoint before the command ends; a second Ctrl-C does not wait.

    Raises:
        SystemExit: After a signal, with the exit status of a process that it ended.
    """
    received: list[int] = []

    def stop(number: int, frame: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not received and trainer.is_main_process:
            # Not by print, in the midst of which the signal may have come.
            os.write(2, b"stopping after a checkpoint; Ctrl-C ends at once\n")
        received.append(number)
        trainer.stop()

    former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    former = {number: handler for number, handler in former.items() if handler not in (signal.SIG_IGN, None)}
    for number in former:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    if received or trainer.stopped:
        if trainer.is_main_process:
            _say(f"{trainer.folder}: stopped; go on with --resume")
        _leave_group()
        raise SystemExit(128 + (received[0] if received else signal.SIGTERM))


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
    import yaml

    if not {"-h", "--help"}.isdisjoint(argv):
        _print_help()
        raise SystemExit(0)
    known = _keys()
    files, given, flags = _arguments(argv, known)
    nested: dict[str, Any] = {}
    for file in files:
        _merge(nested, _read(file, known))
    for name, value in given:
        one: dict[str, Any] = {}
        _merge(one, {name: value})
        _checked(one, known)
        _merge(nested, one)
    run = _made(nested, known)
    _check_paths(run, files)
    if "print_config" in flags:
        print(yaml.safe_dump(dataclasses.asdict(run), sort_keys=False), end="")
        raise SystemExit(0)
    return run, "json" in flags


def _print_help() -> None:
    import jsonargparse

    parser = jsonargparse.ArgumentParser(
        prog="spkfast train",
        description="Train a speaker network. CONFIG is a YAML file; any key can be given as an option instead.",
        usage="spkfast train CONFIG [--key value ...] [--resume] [--strict] [--json]",
    )
    parser.add_argument("--config", help="YAML file; also as the one argument without a name")
    for name, text in _OTHER_OPTIONS.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    parser.add_class_arguments(TrainConfig, as_group=False)
    parser.print_help()


def _arguments(argv: list[str], known: list[str]) -> tuple[list[Path], list[tuple[str, Any]], set[str]]:
    """Config files, dotted names of options with their values, in the order given, and flags."""
    files: list[Path] = []
    given: list[tuple[str, Any]] = []
    flags = set()
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("-"):
            files.append(Path(argument))
            continue
        option, equals, text = argument.partition("=")
        name = option.removeprefix("--")
        if name in ("json", "print_config"):
            if equals:
                raise InputError(f"{option} takes no value, got {text!r}")
            flags.add(name)
            continue
        if name == option or not (name in ("config", "strict") or _is_known(name, known)):
            raise InputError(f"unknown option {option}{_suggestion(name, [*known, 'config', *_OTHER_OPTIONS], '--')}")
        following = rest[0] if rest else "--"
        if equals:
            pass
        elif name in ("resume", "strict") and following not in ("true", "false"):
            text = "true"
        elif following.startswith("--"):
            raise InputError(f"{option}: expected a value")
        else:
            text = rest.pop(0)
        if name == "config":
            files.append(Path(text))
        else:
            name = "data.strict" if name == "strict" else name
            given.append((name, _value(name, text, known)))
    return files, given, flags


def _value(name: str, text: str, known: list[str]) -> Any:
    """The value of an option: what YAML makes of the text, or the text itself where that is what the key takes."""
    import yaml

    kind = kinds().get(name.removeprefix(f"{FINE_TUNING}."))
    takes_text = kind is not None and fits(kind, text)
    try:
        value = _load(text)
    except (yaml.YAMLError, ValueError) as error:
        if takes_text:
            return text
        raise InputError(f"--{name}: not a YAML value ({' '.join(str(error).split())})") from error
    if takes_text and (not text.strip() or isinstance(value, str) or not (value is None or fits(kind, value))):
        return text
    if isinstance(value, str) and name in known and (kind is None or name == FINE_TUNING) and Path(value).is_file():
        return _read(Path(value), known, f"{name}.")
    return value


def _load(text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """With 1e-3 for a number, as in later versions of YAML."""

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
        list("-+.0123456789"),
    )
    return yaml.load(text, Loader)


def _made(nested: dict[str, Any], known: list[str]) -> TrainConfig:
    """The run of nested settings, whose values are checked; those of the fine-tuning too, which is days later."""
    of_kind = kinds()
    for name in _checked(nested, known):
        kind = of_kind[name.removeprefix(f"{FINE_TUNING}.")]
        *sections, key = name.split(".")
        inner = nested
        for section in sections:
            inner = inner[section]
        check_value(name, kind, inner[key])
        form = get_origin(kind) or kind
        if form in (float, tuple):
            inner[key] = form(inner[key])
    made: TrainConfig = changed(TrainConfig(), nested)
    return made


def _check_paths(run: TrainConfig, files: list[Path]) -> None:
    """A path that is right from the folder of the config is a likely mistake."""
    values = flatten(run)
    for name in _PATHS:
        for value in values[name] if isinstance(values[name], list) else [values[name]]:
            for file in files:
                if isinstance(value, str) and value and not Path(value).exists() and (file.parent / value).exists():
                    raise InputError(
                        f"{name}: {value}: no such file or folder: relative paths start from the working folder, not "
                        f"from that of {file}; there it is {file.parent / value}"
                    )


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


def _read(path: Path, known: list[str], prefix: str = "") -> dict[str, Any]:
    """The settings of a YAML file, or those of a section, whose names are checked."""
    import yaml

    if not path.is_file():
        raise InputError(f"{path}: is a folder, not a config file" if path.is_dir() else f"{path}: no such config file")
    try:
        content = _load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{path}: not a YAML file ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: must hold keys and values, found {type(content).__name__}")
    try:
        _checked(content, known, prefix)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return content


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
            raise InputError(f"unknown key {name!r}{_suggestion(name, known)}")
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
    names = [name for name, kind in kinds().items() if fits(kind, {}) and name != FINE_TUNING]
    return [*names, *(f"{FINE_TUNING}.{name}" for name in names)]


def _suggestion(name: str, known: list[str], prefix: str = "") -> str:
    """The key most like an unknown one: by its last part, since a section in common makes no key alike."""
    *sections, key = name.split(".")
    ends: dict[str, list[str]] = {}
    for other in known:
        if other.startswith(f"{FINE_TUNING}.") == (sections[:1] == [FINE_TUNING]):
            ends.setdefault(other.rpartition(".")[2], []).append(other)
    ends = {theirs: ends[ours] for theirs, ours in _SYNONYMS.items() if ours in ends} | ends
    for close in difflib.get_close_matches(key.replace("-", "_"), ends, n=1):
        likely = difflib.get_close_matches(".".join([*sections, close]), ends[close], n=1, cutoff=0)
        return f" (did you mean {prefix + likely[0]!r}?)"
    return ""
