"""Recipes of augmentation."""

import dataclasses
import math

import pytest

from spkfast.data.recipes import Choice, Gain, Noise, Recipe, Reverb, Stage, recipe
from spkfast.errors import InputError

NAMES = ("none", "room_or_noise", "espnet", "wespeaker", "taoruijie", "clova")


@pytest.mark.parametrize("name", NAMES)
def test_plain_values_there_and_back(name):
    assert Recipe.from_dict(recipe(name).to_dict()) == recipe(name)


def _kinds(name):
    return [
        (stage.probability, [[(e.kind, *dataclasses.astuple(e)) for e in choice.effects] for choice in stage.choices])
        for stage in recipe(name).stages
    ]


def test_toolkits_as_their_sources_say():
    noise, music = ("noise", "noise", (0.0, 15.0), (1, 1)), ("noise", "music", (5.0, 15.0), (1, 1))
    reverb, peak = ("reverb", False), ("peak_normalize", 1e-4)

    def babble(fewest, most):
        return ("noise", "speech", (13.0, 20.0), (fewest, most))

    assert _kinds("espnet") == [(0.5, [[reverb]]), (0.5, [[babble(4, 7)], [noise], [music]])]
    assert recipe("espnet").speeds == recipe("wespeaker").speeds == (1.0, 0.9, 1.1)
    assert _kinds("taoruijie") == [(1.0, [[], [reverb], [babble(3, 8)], [music], [noise], [babble(3, 8), music]])]
    assert _kinds("clova") == [(1.0, [[], [reverb], [music], [babble(3, 7)], [noise]])]
    ((probability, choices),) = _kinds("wespeaker")
    speech = ("noise", "speech", (10.0, 30.0), (1, 1))
    assert probability == 0.6 and choices == [[reverb, peak], [noise, peak], [speech, peak], [music, peak]]
    weights = [choice.weight for choice in recipe("wespeaker").stages[0].choices]
    assert weights[0] == sum(weights[1:])  # half of what is changed gets a room
    assert {recipe(name).power_floor for name in NAMES[2:]} == {1e-4}
    assert recipe("room_or_noise").power_floor == 0


def test_options_replace_fields():
    found = recipe("clova", speeds=[1.0, 0.8], power_floor=0.0)
    assert found.speeds == (1.0, 0.8) and found.power_floor == 0 and found.stages == recipe("clova").stages


def test_what_cannot_be_had_is_left_out():
    left = recipe("espnet").without({"music", "speech"})
    assert left.needs == {"noise", "rir"}
    assert [stage.probability for stage in left.stages] == [0.5, 0.5]
    # Television goes with its babble, the rest of the stage stays.
    assert len(recipe("taoruijie").without({"speech"}).stages[0].choices) == 4
    assert recipe("wespeaker").without({"rir", "noise", "speech", "music"}).stages == ()


def test_choices_of_no_weight_count_for_nothing():
    made = Recipe((Stage((Choice((Noise(),)), Choice((Reverb(),), 0))),))
    assert made.needs == {"noise"}
    assert made.without({"rir"}).stages == (Stage((Choice((Noise(),)),)),)
    # What would be left does nothing.
    assert recipe("clova").without({"rir", "noise", "music", "speech"}).stages == ()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stage": []}, r"'stage'.*did you mean 'stages'"),
        ({"stages": [{"choices": []}]}, r"stages\[0\]: a stage must have a choice"),
        ({"stages": [{"choices": [{"effects": [{"kind": "nois"}]}]}]}, "unknown effect 'nois'.*did you mean 'noise'"),
        ({"stages": [{"choices": [{"effects": [{}]}]}]}, r"choices\[0\].effects\[0\] must have a kind"),
        ({"stages": [{"choices": [{"effects": [{"kind": "noise", "snr": [0, 1]}]}]}]}, "'snr'.*did you mean 'snr_db'"),
        ({"stages": [{"choices": [{"effects": [{"kind": "noise", "snr_db": [5, 1]}]}]}]}, "lowest and highest"),
        ({"stages": [{"choices": [{"effects": [{"kind": "noise", "category": "rain"}]}]}]}, "category of noise 'rain'"),
        ({"stages": [{"choices": [{"effects": [{"kind": "noise", "files": [0, 2]}]}]}]}, "files must be counts"),
        ({"stages": [{"choices": [{"weight": -1}]}]}, "weight must not be negative"),
        ({"stages": [{"probability": 1.5, "choices": [{}]}]}, r"stages\[0\]: probability must lie in 0..1"),
        ({"stages": [{"choices": 3}]}, "choices must be a list"),
        ({"stages": ["noise"]}, r"stages\[0\] must hold keys and values"),
        ({"stages": 3}, "stages must be a list, got 3"),
        ({"stages": None}, "stages must be a list, got None"),
        ({"stages": [{"choices": [{"effects": None}]}]}, r"choices\[0\].effects must be a list"),
        ({"stages": [{"choices": [{"effects": [{"kind": "noise", "files": [1.0, 2.0]}]}]}]}, "files must be counts"),
        ({"stages": [{"choices": [{"effects": [{"kind": "noise", "snr_db": ["0", "15"]}]}]}]}, "two numbers"),
        ({"stages": [{"choices": [{"effects": [{"kind": "noise", "snr_db": [-math.inf, 1]}]}]}]}, "two numbers"),
        ({"stages": [{"choices": [{"effects": [{"kind": "gain", "gain_db": [0, math.inf]}]}]}]}, "two numbers"),
        ({"stages": [{"choices": [{"effects": [{"kind": "reverb", "direct_first": "no"}]}]}]}, "true or false"),
        ({"stages": [{"choices": [{"weight": math.inf}]}]}, "weight must not be negative"),
        ({"stages": [{"choices": [{"weight": 0}]}]}, "choice of positive weight"),
        ({"speeds": [1.0, 1.0001]}, "different ones"),
        ({"speeds": [1.0, 1.0]}, "different ones"),
        ({"speeds": ["fast"]}, "speeds must be factors"),
        ({"power_floor": -1.0}, "power_floor"),
        ({"stages": [{"choices": [{"effects": [{"kind": "companding", "bits": 1}]}]}]}, "bits must lie in 2..16"),
        ({"stages": [{"choices": [{"effects": [{"kind": "companding", "law": "b"}]}]}]}, "law of companding 'b'"),
        ({"stages": [{"choices": [{"effects": [{"kind": "telephone", "band_hz": [3, 3]}]}]}]}, "band_hz"),
        ({"stages": [{"choices": [{"effects": [{"kind": "peak_normalize", "offset": 0}]}]}]}, "offset"),
    ],
)
def test_wrong_values_are_named_with_their_place(values, message):
    with pytest.raises(InputError, match=message):
        Recipe.from_dict(values)


def test_unknown_names():
    with pytest.raises(InputError, match=r"'espnt'.*did you mean 'espnet'"):
        recipe("espnt")
    with pytest.raises(InputError, match=r"'speed'.*did you mean 'speeds'"):
        recipe("espnet", speed=[1.0])


def test_effects_and_needs():
    made = Recipe((Stage((Choice((Gain(),)), Choice((Noise("music"), Reverb())))),))
    assert [effect.kind for effect in made.effects] == ["gain", "noise", "reverb"]
    assert made.needs == {"music", "rir"}
