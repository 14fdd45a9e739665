"""What the commands share: the argument parser, progress, printing of results, and files that cannot be used."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar

from spkfast.errors import InputError, nearest
from spkfast.training.log import finite
from spkfast.training.meter import duration

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from spkfast.backends import Backend
    from spkfast.evaluation import TrialResult
    from spkfast.inference import SpeakerEncoder

Item = TypeVar("Item")

BACKENDS = ("auto", "reference", "native", "triton")
PRECISIONS = ("fp32", "bf16", "fp16", "int8")
MODEL_HELP = "folder of the model, checkpoint of another toolkit, or ecapa-mini, which comes with the package"
# Of commands that need no weights.
FILE_HELP = f"{MODEL_HELP}; or an exported file (.onnx, .engine, .plan, .pt2)"

_SECONDS_BETWEEN_LINES = 30.0


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with the nearest option where one is misspelt."""

    def __init__(self, command: str, help: str) -> None:
        super().__init__(prog=f"spkfast {command}", description=help, allow_abbrev=False)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses; a misspelt option is told before anything that may be missing because of it."""
        args = sys.argv[1:] if args is None else list(args)
        for argument in args[: args.index("--")] if "--" in args else args:
            option = argument.split("=", 1)[0]
            if option.startswith("--") and option not in self._option_string_actions:
                known = [name for name in self._option_string_actions if name.startswith("--")]
                self.error(f"unknown option {option}{nearest(option, known)}")
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raises the message for the command line to print."""
        raise InputError(f"{message}; see '{self.prog} --help'")


def add_backend(parser: argparse.ArgumentParser) -> None:
    """The option that chooses the implementation of the front-end."""
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="implementation of the front-end [auto]")


def add_precision(parser: argparse.ArgumentParser) -> None:
    """The option that chooses what the network multiplies."""
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="products of the network; int8 (on a CPU) after 'spkfast calibrate', fp16 on a GPU [fp32]",
    )


def add_batch_seconds(parser: argparse.ArgumentParser) -> None:
    """The option that bounds a batch."""
    parser.add_argument(
        "--batch-seconds", type=_positive, default=60.0, metavar="S", help="most audio in one batch, in seconds [60]"
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option that prints the result for programs."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def load_encoder(model: str, precision: str) -> SpeakerEncoder:
    """The model of a command, which warns of audio without any sound: that has an embedding, but no speaker."""
    from spkfast.inference import SpeakerEncoder

    class Listener(SpeakerEncoder):
        def load_audio(self, audio: Any, *args: Any, **options: Any) -> np.ndarray:
            samples = super().load_audio(audio, *args, **options)
            if samples.min() == samples.max():
                print(f"warning: {audio}: holds no sound, all samples are equal: no speaker", file=sys.stderr)
            return samples

    return Listener.load(model, precision=precision)


class BadFiles:
    """Files of a long list that cannot be used: told one by one, counted at the end.

    Args:
        strict: Let the first one end the run.
    """

    def __init__(self, strict: bool) -> None:
        self._strict = strict
        self.count = 0

    def skip(self, error: InputError) -> None:
        """Tells of one file and counts it.

        Raises:
            InputError: The error itself, if strict.
        """
        if self._strict:
            raise error
        self.count += 1
        print(f"skipped: {error}", file=sys.stderr)

    def close(self, total: int) -> None:
        """Tells the count.

        Raises:
            InputError: If every one of ``total`` files was skipped.
        """
        if not self.count:
            return
        if self.count == total:
            raise InputError(f"none of the {total} files could be used")
        print(f"{self.count} of {total} files skipped", file=sys.stderr)


def progress(iterable: Iterable[Item], total: int | None = None, description: str = "") -> Iterator[Item]:
    """Passes items on and shows on a :func:`meter` how many have come."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with meter(description) as update:
        update(0, total)
        for done, item in enumerate(iterable, start=1):
            update(done, total)
            yield item


class Update(Protocol):
    """Tells a :func:`meter` how far the work is."""

    def __call__(self, done: int, total: int | None, note: str = "") -> None:
        """Takes the number done, the total (None where unknown), and what to show in place of the rate."""


@contextlib.contextmanager
def meter(description: str, start: int = 0) -> Iterator[Update]:
    """Shows how far long work is, with its rate or a note and the remaining time, on standard error.

    A bar where that is a terminal, otherwise a line every 30 seconds.

    Args:
        description: What is done.
        start: How much of it was done before: it took none of the time that passes.
    """
    if sys.stderr.isatty() and _has_rich():
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            ProgressColumn,
            Task,
            TextColumn,
            TimeRemainingColumn,
        )
        from rich.text import Text

        class Note(ProgressColumn):
            """Cut short, as the bar is, where the terminal is narrow: the numbers beside them stay."""

            def render(self, task: Task) -> Text:
                return Text(task.fields["note"], no_wrap=True, overflow="ellipsis")

        columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), Note(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(description, total=None, completed=start, note="")
            started = time.monotonic()

            def update(done: int, total: int | None, note: str = "") -> None:
                shown = note or _rate(done - start, time.monotonic() - started)
                bar.update(task, completed=done, total=total, note=shown)

            yield update
    else:
        yield _line_meter(description, start)


def embed_all(
    encoder: SpeakerEncoder,
    root: Path,
    paths: list[str],
    *,
    backend: Backend = "auto",
    batch_seconds: float = 60.0,
    description: str = "embedding",
) -> np.ndarray:
    """Embeddings (U, E) of every path below ``root``.

    Raises:
        InputError: If one has none: without its trials, a rate would be that of another list.
    """
    import numpy as np

    rows = []
    found = encoder.embed_files((root / path for path in paths), backend=backend, batch_seconds=batch_seconds)
    for embedding in progress(found, len(paths), description):
        if isinstance(embedding, InputError):
            raise embedding
        rows.append(embedding.numpy())
    return np.stack(rows)


def print_result(result: dict[str, Any], as_json: bool, shown: dict[str, Any] | None = None) -> None:
    """Prints a result: JSON for programs, tables for people.

    Args:
        result: Plain values; a nested dictionary is a section, a list of dictionaries a table.
        as_json: Print JSON.
        shown: What people see instead of ``result``.
    """
    if as_json:
        print(json.dumps(finite(result), indent=2))
        return
    if sys.stdout.isatty() and _has_rich():
        _print_rich(shown or result)
    else:
        print("\n".join(_plain(shown or result)))


def speakers_of_keys(file: str | None, keys: Iterable[str]) -> dict[str, str]:
    """Speaker of each key: what the file of ``--speakers`` says, else the first component of a path.

    Raises:
        InputError: If the file cannot be read, or neither tells the speaker of a key.
    """
    from spkfast.data.lists import speaker_of
    from spkfast.data.manifests import read_speakers

    told = read_speakers(file) if file is not None else {}
    found = {}
    for key in keys:
        if key not in told and (key.startswith("/") or "/" not in key):
            raise InputError(f"{key}: does not begin with the folder of its speaker; --speakers FILE tells it")
        found[key] = told.get(key) or speaker_of(key)
    return found


def rates(result: TrialResult) -> dict[str, Any]:
    """Error rate with its interval in percent, and detection cost, as every command names them in JSON."""
    value, _, low, high = result.eer
    return {
        "eer_percent": 100 * value,
        "eer_low_percent": None if low is None else 100 * low,
        "eer_high_percent": None if high is None else 100 * high,
        "min_dcf": result.min_dcf,
    }


def shown_rates(row: dict[str, Any]) -> dict[str, str]:
    """The same for people."""
    from spkfast.evaluation import report

    return report.shown_rates(row)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text}") from None
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value


def _line_meter(description: str, start: int) -> Update:
    started = told = time.monotonic()

    def update(done: int, total: int | None, note: str = "") -> None:
        nonlocal told
        now = time.monotonic()
        if now - told < _SECONDS_BETWEEN_LINES:
            return
        told = now
        of = f"/{total}" if total else ""
        new = done - start
        remaining = f", {duration((now - started) / new * (total - done))} left" if total and new else ""
        shown = note or _rate(new, now - started)
        print(f"{description}: {done}{of}, {shown}{remaining}", file=sys.stderr, flush=True)

    return update


def _rate(done: int, seconds: float) -> str:
    return f"{done / max(seconds, 1e-9):.3g}/s"


def _has_rich() -> bool:
    return importlib.util.find_spec("rich") is not None


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    return ", ".join(_text(inner) for inner in value) if isinstance(value, list | tuple) else str(value)


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _parts(result: dict[str, Any], title: str = "") -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Title, head and rows of each table: one of the plain values, then one for every nested part."""
    nested = {key: value for key, value in result.items() if isinstance(value, dict) or _is_table(value)}
    plain = [[key, _text(value)] for key, value in result.items() if key not in nested]
    if plain:
        yield title, [], plain
    for key, value in nested.items():
        name = f"{title}, {key}" if title else key
        if isinstance(value, dict):
            yield from _parts(value, name)
        else:
            head = list(dict.fromkeys(column for row in value for column in row))
            yield name, head, [[_text(row.get(column)) for column in head] for row in value]


def _plain(result: dict[str, Any]) -> Iterator[str]:
    for number, (title, head, rows) in enumerate(_parts(result)):
        if title:
            yield ("\n" if number else "") + title
        cells = [head, *rows] if head else rows
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        for row in cells:
            yield "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()


def _print_rich(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for title, head, rows in _parts(result):
        table = Table(title=Text(title) if title else None, title_justify="left", show_header=bool(head))
        for column in head or rows[0]:
            table.add_column(Text(column) if head else "")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))  # plain text: brackets in a path are not markup
        console.print(table)
