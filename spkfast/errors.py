"""The one exception that means "your input is wrong", which the command line turns into one line and exit status 2."""


class InputError(ValueError):
    """A file, list, option or array that cannot be used; the message names it and says what to do."""
