"""What may happen to a training crop, and how often: effects, and the ways of the toolkits to put them together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Any, ClassVar, Literal

from spkfast.data.banks import CATEGORIES
from spkfast.errors import InputError, check_name, check_options
from spkfast.reference.change_speed import ratio

Range = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Noise:
    """Recordings of one category, each at its own signal-to-noise ratio; several of speech make babble.

    Attributes:
        category: ``music``, ``noise`` or ``speech``.
        snr_db: Lowest and highest ratio in decibels, drawn uniformly for each recording.
        files: Fewest and most recordings, drawn uniformly; the same one may come twice.
    """

    kind: ClassVar[str] = "noise"
    category: str = "noise"
    snr_db: Range = (0.0, 15.0)
    files: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        check_name("category of noise", self.category, list(CATEGORIES))
        _check_range("snr_db", self.snr_db)
        _check_range("files", self.files)
        if self.files[0] < 1 or not all(isinstance(n, int) for n in self.files):
            raise InputError(f"files must be counts from 1, got {list(self.files)}")


@dataclasses.dataclass(frozen=True)
class Reverb:
    """A room impulse response, scaled to unit energy; the crop keeps its length.

    Attributes:
        direct_first: Let the response begin at its highest peak, the direct path, so that the speech is not delayed.
    """

    kind: ClassVar[str] = "reverb"
    direct_first: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.direct_first, bool):
            raise InputError(f"direct_first must be true or false, got {self.direct_first!r}")


@dataclasses.dataclass(frozen=True)
class Gain:
    """A factor.

    Attributes:
        gain_db: Lowest and highest value in decibels, drawn uniformly.
    """

    kind: ClassVar[str] = "gain"
    gain_db: Range = (-10.0, 10.0)

    def __post_init__(self) -> None:
        _check_range("gain_db", self.gain_db)


@dataclasses.dataclass(frozen=True)
class Telephone:
    """The band of a telephone line, by a minimum-phase filter.

    Attributes:
        band_hz: Its lower and upper end, where 6 dB are lost.
    """

    kind: ClassVar[str] = "telephone"
    band_hz: Range = (300.0, 3400.0)

    def __post_init__(self) -> None:
        _check_range("band_hz", self.band_hz)
        if self.band_hz[0] < 0 or self.band_hz[0] == self.band_hz[1]:
            raise InputError(f"band_hz must be two frequencies, the lower one first, got {list(self.band_hz)}")


@dataclasses.dataclass(frozen=True)
class Companding:
    """Coarse quantisation on a logarithmic scale, as telephone codecs do it.

    Attributes:
        law: ``mu`` (mu = 255) or ``a`` (A = 87.6).
        bits: Bits of a sample.

    Reference: ITU-T Recommendation G.711, of which these are the smooth curves.
    """

    kind: ClassVar[str] = "companding"
    law: Literal["mu", "a"] = "mu"
    bits: int = 8

    def __post_init__(self) -> None:
        check_name("law of companding", self.law, ["mu", "a"])
        if not isinstance(self.bits, int) or isinstance(self.bits, bool) or not 2 <= self.bits <= 16:
            raise InputError(f"bits must lie in 2..16, got {self.bits!r}")


@dataclasses.dataclass(frozen=True)
class PeakNormalize:
    """Division by the largest magnitude.

    Attributes:
        offset: Added to that.
    """

    kind: ClassVar[str] = "peak_normalize"
    offset: float = 1e-4

    def __post_init__(self) -> None:
        if not _is_number(self.offset) or self.offset <= 0:
            raise InputError(f"offset must be positive, got {self.offset}")


Effect = Noise | Reverb | Gain | Telephone | Companding | PeakNormalize
_EFFECTS: dict[str, Any] = {
    effect.kind: effect for effect in (Noise, Reverb, Gain, Telephone, Companding, PeakNormalize)
}


@dataclasses.dataclass(frozen=True)
class Choice:
    """Effects that come together, one after the other; none leaves the crop as it is.

    Attributes:
        effects: The effects.
        weight: How often this choice is taken, against the others of its stage.
    """

    effects: tuple[Effect, ...] = ()
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not _is_number(self.weight) or self.weight < 0:
            raise InputError(f"weight must not be negative, got {self.weight!r}")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One of several choices, with a probability.

    Attributes:
        choices: The choices.
        probability: Chance that one of them is taken at all.
    """

    choices: tuple[Choice, ...]
    probability: float = 1.0

    def __post_init__(self) -> None:
        if not _is_number(self.probability) or not 0 <= self.probability <= 1:
            raise InputError(f"probability must lie in 0..1, got {self.probability!r}")
        if not sum(choice.weight for choice in self.choices) > 0:
            raise InputError("a stage must have a choice of positive weight")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Stages, one after the other, each drawn for itself.

    Attributes:
        stages: The stages.
        speeds: Speed factors, drawn uniformly before anything else; each one makes new speakers.
        power_floor: See :func:`spkfast.functional.add_noise`.
    """

    stages: tuple[Stage, ...] = ()
    speeds: tuple[float, ...] = (1.0,)
    power_floor: float = 0.0

    def __post_init__(self) -> None:
        check_speeds(self.speeds)
        if not _is_number(self.power_floor) or self.power_floor < 0:
            raise InputError(f"power_floor must not be negative, got {self.power_floor!r}")

    @property
    def effects(self) -> list[Effect]:
        """Every effect that may happen."""
        return [
            effect for stage in self.stages for choice in stage.choices if choice.weight for effect in choice.effects
        ]

    @property
    def needs(self) -> set[str]:
        """Categories of recordings that the effects take, ``rir`` for impulse responses."""
        return {_need(effect) for effect in self.effects} - {""}

    def without(self, categories: Collection[str]) -> Recipe:
        """The recipe without the choices that need one of these categories; the others share what was theirs."""
        stages = []
        for stage in self.stages:
            kept = tuple(
                choice
                for choice in stage.choices
                if choice.weight and not {_need(effect) for effect in choice.effects} & set(categories)
            )
            if any(choice.effects for choice in kept):
                stages.append(dataclasses.replace(stage, choices=kept))
        return dataclasses.replace(self, stages=tuple(stages))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, which :meth:`from_dict` reads."""
        return {
            "stages": [
                {
                    "probability": stage.probability,
                    "choices": [
                        {
                            "weight": choice.weight,
                            "effects": [{"kind": e.kind} | _plain(dataclasses.asdict(e)) for e in choice.effects],
                        }
                        for choice in stage.choices
                    ],
                }
                for stage in self.stages
            ],
            "speeds": list(self.speeds),
            "power_floor": self.power_floor,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """A recipe from plain values, as a YAML file holds them.

        Raises:
            InputError: If a key or value is wrong; the message says where.
        """
        values = _mapping("recipe", values, ["stages", "speeds", "power_floor"])
        try:
            return cls(
                tuple(
                    _stage(stage, f"stages[{k}]") for k, stage in enumerate(_list("stages", values.get("stages", ())))
                ),
                tuple(_list("speeds", values.get("speeds", (1.0,)))),
                values.get("power_floor", 0.0),
            )
        except (TypeError, ValueError) as error:
            raise error if isinstance(error, InputError) else InputError(f"recipe: {error}") from error


def recipe(name: str, **options: Any) -> Recipe:
    """The augmentation of a toolkit.

    ``espnet``, ``wespeaker``, ``taoruijie`` and ``clova`` are what these systems do, their floor under powers included;
    ``room_or_noise`` is a room response or a noise at the exact ratio, for crops of corpora without music and speech to
    add; ``none`` changes nothing.

    Args:
        name: One of these names.
        options: Fields of :class:`Recipe` that differ, as plain values.

    Raises:
        InputError: If the name or an option is unknown, or a value is wrong.
    """
    check_name("recipe of augmentation", name, list(_RECIPES))
    found = _RECIPES[name]
    if not options:
        return found
    return Recipe.from_dict({**found.to_dict(), **_mapping(f"recipe {name}", options, list(found.to_dict()))})


def _need(effect: Effect) -> str:
    """Category of recordings that an effect takes, or an empty string."""
    if isinstance(effect, Noise):
        return effect.category
    return "rir" if isinstance(effect, Reverb) else ""


def _stage(values: Any, where: str) -> Stage:
    values = _mapping(where, values, ["probability", "choices"])
    choices = _list(f"{where}.choices", values.get("choices", ()))
    return _made(
        where,
        Stage,
        choices=tuple(_choice(choice, f"{where}.choices[{k}]") for k, choice in enumerate(choices)),
        probability=values.get("probability", 1.0),
    )


def _choice(values: Any, where: str) -> Choice:
    values = _mapping(where, values, ["weight", "effects"])
    effects = []
    for k, effect in enumerate(_list(f"{where}.effects", values.get("effects", ()))):
        place = f"{where}.effects[{k}]"
        if not isinstance(effect, dict) or "kind" not in effect:
            raise InputError(f"{place} must have a kind, one of {', '.join(_EFFECTS)}, got {effect!r}")
        check_name("effect", effect["kind"], list(_EFFECTS))
        made = _EFFECTS[effect["kind"]]
        fields = [field.name for field in dataclasses.fields(made)]
        options = _mapping(place, {key: value for key, value in effect.items() if key != "kind"}, fields)
        effects.append(
            _made(place, made, **{k: tuple(v) if isinstance(v, list | tuple) else v for k, v in options.items()})
        )
    return _made(where, Choice, effects=tuple(effects), weight=values.get("weight", 1.0))


def _made(where: str, kind: Any, **options: Any) -> Any:
    try:
        return kind(**options)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: {error}") from error


def _list(where: str, values: Any) -> Any:
    if not isinstance(values, list | tuple):
        raise InputError(f"{where} must be a list, got {values!r}")
    return values


def _mapping(where: str, values: Any, known: list[str]) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise InputError(f"{where} must hold keys and values, got {values!r}")
    check_options("augmentation", where, values, known)
    return values


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def _check_range(name: str, value: Any) -> None:
    if not isinstance(value, tuple) or len(value) != 2 or not all(_is_number(v) for v in value) or value[0] > value[1]:
        raise InputError(f"{name} must be lowest and highest, two numbers, got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_speeds(speeds: Sequence[float]) -> None:
    """Refuses factors that ``functional.change_speed`` does not take, and two that are the same to it.

    Raises:
        InputError: Then.
    """
    if not speeds or not all(_is_number(speed) and 0.1 <= speed <= 10 for speed in speeds):
        raise InputError(f"speeds must be factors from 0.1 to 10, got {list(speeds)}")
    if len({ratio(speed) for speed in speeds}) < len(speeds):
        raise InputError(f"speeds must be different ones, got {list(speeds)}")


_NOISE, _MUSIC = Noise("noise", (0.0, 15.0)), Noise("music", (5.0, 15.0))
_TOOLKIT_FLOOR = 1e-4
_SPEEDS = (1.0, 0.9, 1.1)


def _babble(fewest: int, most: int) -> Noise:
    return Noise("speech", (13.0, 20.0), (fewest, most))


_PEAK = PeakNormalize()
_RECIPES = {
    "none": Recipe(),
    "room_or_noise": Recipe((Stage((Choice((_NOISE,)), Choice((Reverb(),))), 0.6),)),
    "espnet": Recipe(
        (
            Stage((Choice((Reverb(),)),), 0.5),
            Stage((Choice((_babble(4, 7),)), Choice((_NOISE,)), Choice((_MUSIC,))), 0.5),
        ),
        _SPEEDS,
        _TOOLKIT_FLOOR,
    ),
    # Its noises are drawn among all files: these are the numbers of files of MUSAN.
    "wespeaker": Recipe(
        (
            Stage(
                (
                    Choice((Reverb(), _PEAK), 2016),
                    Choice((_NOISE, _PEAK), 930),
                    Choice((Noise("speech", (10.0, 30.0)), _PEAK), 426),
                    Choice((_MUSIC, _PEAK), 660),
                ),
                0.6,
            ),
        ),
        _SPEEDS,
        _TOOLKIT_FLOOR,
    ),
    "taoruijie": Recipe(
        (
            Stage(
                (
                    Choice(),
                    Choice((Reverb(),)),
                    Choice((_babble(3, 8),)),
                    Choice((_MUSIC,)),
                    Choice((_NOISE,)),
                    Choice((_babble(3, 8), _MUSIC)),  # television
                )
            ),
        ),
        power_floor=_TOOLKIT_FLOOR,
    ),
    "clova": Recipe(
        (Stage((Choice(), Choice((Reverb(),)), Choice((_MUSIC,)), Choice((_babble(3, 7),)), Choice((_NOISE,)))),),
        power_floor=_TOOLKIT_FLOOR,
    ),
}
