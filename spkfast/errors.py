"""Wrong input: its one exception, which the command line turns into one line and exit status 2."""

import difflib


class InputError(ValueError):
    """A file, list, option or array that cannot be used; the message names it and says what to do."""


def nearest(name: str, known: list[str]) -> str:
    """`` (did you mean 'x'?)`` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
