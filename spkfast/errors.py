"""Wrong input: its one exception, which the command line turns into one line and exit status 2."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """A file, list, option or array that cannot be used; the message names it and says what to do."""


class BatchSizeError(InputError):
    """A batch of more rows, or longer ones, than an exported graph was made for."""


def nearest(name: str, known: list[str]) -> str:
    """`` (did you mean 'x'?)`` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def check_name(kind: str, name: str, known: list[str]) -> None:
    """Refuses a name that a registry of ``kind`` does not have."""
    if name not in known:
        raise InputError(f"unknown {kind} {name!r}{nearest(name, known)}; known: {', '.join(known)}")


def check_options(kind: str, name: str, options: Iterable[str], known: list[str]) -> None:
    """Refuses a keyword that ``name``, of a registry of ``kind``, does not take."""
    for key in options:
        if key not in known:
            raise InputError(f"unknown option {key!r} of {kind} {name}{nearest(key, known)}")


def check_counts(name: str, counts: list[int], most: int) -> None:
    """Refuses counts, one for each row, outside 0..most."""
    for row, count in enumerate(counts):
        if not 0 <= count <= most:
            raise InputError(f"{name} must lie in 0..{most}, row {row} has {count}")
