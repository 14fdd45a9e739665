"""Spans of a run, as a config has them, in steps."""

from __future__ import annotations

import dataclasses
import re
from fractions import Fraction

from spkfast.errors import InputError
from spkfast.training.config import Span

_WORDS = re.compile(r"([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*(epochs?|%)")


@dataclasses.dataclass(frozen=True)
class Length:
    """How long a run is.

    Args:
        steps: Steps of the run.
        steps_per_epoch: Steps in which the training data are seen once.
    """

    steps: int
    steps_per_epoch: int

    @classmethod
    def of_run(cls, steps: Span, steps_per_epoch: int) -> Length:
        """The length of a run that is itself given in steps or as ``N epochs``.

        Raises:
            InputError: If ``steps`` is neither, or less than one step.
        """
        if isinstance(steps, str) and steps.strip().endswith("%"):
            raise InputError(f"steps must be a number of steps or 'N epochs', got {steps!r}, a share of itself")
        count = cls(0, steps_per_epoch).span(steps, "steps")
        if count < 1:
            raise InputError(f"steps must be at least 1, got {told(steps, count)}")
        return cls(count, steps_per_epoch)

    def span(self, value: Span, name: str) -> int:
        """A span in whole steps; what falls between two steps goes to the nearest, halves to the even one.

        Args:
            value: Steps, ``N epochs`` or ``N %`` of the run, at least 0.
            name: Name of the setting, for the error.

        Raises:
            InputError: If ``value`` is none of these.
        """
        if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 and value % 1 == 0:
            return int(value)
        words = _WORDS.fullmatch(value.strip()) if isinstance(value, str) else None
        if words is None:
            # The length of the run, which is not known here yet, is no share of it.
            forms = ", 'N epochs' or 'N %' of the run" if self.steps else " or 'N epochs'"
            raise InputError(f"{name} must be a number of steps{forms}, and at least 0, got {value!r}")
        # A fraction, since 0.29 of 100 steps is less than 29 in floating point.
        number, unit = Fraction(words[1]), words[2]
        return round(number * self.steps / 100 if unit == "%" else number * self.steps_per_epoch)


def told(value: Span, steps: int) -> str:
    """A span as it was given, and what it comes to, for errors."""
    return f"{value!r} ({steps} steps)" if isinstance(value, str) else str(steps)
