"""What a run may be given: names, ranges of numbers, and what a second run takes from the first."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import re
import subprocess
import sys

import pytest

from spkfast.cli.train import parse
from spkfast.errors import InputError
from spkfast.training.config import (
    ModelConfig,
    TrainConfig,
    ValidationConfig,
    changed,
    check,
    fine_tuned,
    fits,
    flatten,
    kinds,
)


def a_run(**changes) -> TrainConfig:
    """A run that is valid but for the changes; two underlines stand for a dot."""
    made = TrainConfig()
    made.data.train_list = "list.txt"
    for name, value in changes.items():
        *sections, field = name.split("__")
        setattr(functools.reduce(getattr, sections, made), field, value)
    return made


def test_what_is_left_out_is_valid() -> None:
    check(a_run())


# What is expected, one number within, and others outside.
RANGES = {
    "batch_size": ("at least 2", 2, 1),
    "accumulate": ("at least 1", 1, 0),
    "seed": ("at least 0 and at most 4294967295", 0, -1, 2**32),
    "checkpoint_minutes": ("at least 0", 0.0, -1.0, math.nan),
    "keep_checkpoints": ("at least 1", 1, 0),
    "log_steps": ("at least 1", 1, 0),
    "data.crop_seconds": ("above 0 and at most 600", 600.0, 0.0, 601.0, math.nan),
    "data.workers": ("at least 0", 0, -1),
    "data.max_unreadable": ("at least 0 and at most 1", 1.0, -0.1, 1.1),
    "loss.margin": ("at least 0 and at most 1.5", 0.0, -0.1, 1.6, math.nan),
    "optimizer.lr": ("at least 0 and below inf", 0.0, -0.1, math.inf, math.nan),
    "optimizer.lr_batch_size": ("at least 1", 1, 0),
    "optimizer.momentum": ("at least 0 and below 1", 0.0, -0.1, 1.0, math.nan),
    "optimizer.weight_decay": ("at least 0 and below inf", 0.0, -1e-4, math.inf),
    "optimizer.clip_grad_norm": ("at least 0", 0.0, -1.0, math.nan),
    "schedule.final_lr": ("at least 0 and below inf", 0.0, -1e-5),
    "schedule.warmup_lr": ("at least 0 and below inf", 0.0, -1e-5),
    "schedule.cycle_decay": ("above 0 and at most 1", 1.0, 0.0, 1.1),
    "schedule.factor": ("above 0 and at most 1", 1.0, 0.0, -0.5, 1.1),
    "averaging.decay": ("at least 0 and below 1", 0.0, -0.1, 1.0, math.nan),
    "averaging.snapshots": ("at least 1", 1, 0),
    "validation.keep": ("at least 0", 0, -1),
}


@pytest.mark.parametrize("name", RANGES)
def test_numbers_out_of_range_are_refused_whether_they_are_used_or_not(name: str) -> None:
    words, good, *bad = RANGES[name]
    check(a_run(**{name.replace(".", "__"): good}))
    for value in bad:
        with pytest.raises(InputError, match=f"^{re.escape(f'{name} must be {words}, got {value}')}$"):
            check(a_run(**{name.replace(".", "__"): value}))


@pytest.mark.parametrize("betas", [(1.0, 0.9), (0.9, 1.0), [-0.1, 0.9]])
def test_each_of_several_numbers_is_checked(betas) -> None:
    with pytest.raises(InputError, match=r"^optimizer\.betas must be at least 0 and below 1, got (1\.0|-0\.1)$"):
        check(a_run(optimizer__betas=betas))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "bf17"}, "unknown precision 'bf17' (did you mean 'bf16'?); known: fp32, bf16, fp16"),
        ({"precision": 16}, "unknown precision '16'"),
        ({"validation__take": "bets"}, "unknown validation.take 'bets' (did you mean 'best'?); known: best, last"),
        ({"optimizer__name": "sdg"}, "unknown optimizer.name 'sdg' (did you mean 'sgd'?)"),
        ({"schedule__name": "cosin"}, "unknown schedule.name 'cosin' (did you mean 'cosine'?)"),
        ({"averaging__name": "emma"}, "unknown averaging.name 'emma' (did you mean 'ema'?)"),
        ({"loss__kind": "aamm"}, "unknown loss.kind 'aamm' (did you mean 'aam'?)"),
        ({"loss__fallback": "liner"}, "unknown loss.fallback 'liner' (did you mean 'linear'?)"),
        ({"loss__margin_growth": "liner"}, "unknown loss.margin_growth 'liner' (did you mean 'linear'?)"),
        (
            {"validation__take": "best", "validation__keep": 0},
            "validation.keep must be at least 1 with validation.take",
        ),
        ({"out": ""}, "out must name a folder"),
        ({"data__train_list": ""}, "data.train_list is not set: give --data.train_list FILE"),
        ({"batch_size": 6.5}, "batch_size must be a whole number, got 6.5"),
        ({"steps": [6]}, "steps must be a number of steps or 'N epochs', got [6]"),
        ({"schedule__warmup": True}, "schedule.warmup must be a number of steps, 'N epochs' or 'N %' of the run, got"),
        ({"sync_batch_norm": 1}, "sync_batch_norm must be true or false, got 1"),
        ({"optimizer__betas": [0.9]}, "optimizer.betas must be two numbers, got [0.9]"),
        ({"validation__trials": ["a", 3]}, "validation.trials must be a list of texts or text, got ['a', 3]"),
        ({"data__noise": math}, "data.noise must be text or null, got an object of module"),
        ({"model": "ecapa_tdnn"}, "model must be a ModelConfig, got 'ecapa_tdnn'"),
        ({"model": ModelConfig(name=re.compile("a network"))}, "model.name must be text, got an object of Pattern"),
    ],
)
def test_names_and_what_does_not_go_together_are_refused(changes, message) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        check(a_run(**changes))


@pytest.mark.parametrize("every", [0, "0 %", "0.0 epochs", "0 epoch", "often"])
def test_a_span_of_nothing_between_validations_is_refused(every) -> None:
    message = f"validation.every must be steps, 'N epochs' or 'N %' of the run, and above 0, got {every!r}"
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        check(a_run(validation__every=every))


@pytest.mark.parametrize("every", [1, "0.1 %", "10 epochs"])
def test_any_other_span_between_validations_will_do(every) -> None:
    check(a_run(validation__every=every))


def test_a_project_of_weights_and_biases_needs_it(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check(a_run())
    with pytest.raises(InputError, match=r"^wandb names a project, .* pip install wandb$"):
        check(a_run(wandb="speakers"))


def test_checking_needs_no_torch() -> None:
    code = (
        "import sys\nfrom spkfast.training.config import TrainConfig, check\n"
        "config = TrainConfig()\nconfig.data.train_list = 'list'\ncheck(config)\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["out", "init_from", "resume", "seed", "fine_tuning"])
def test_a_second_run_cannot_be_given_what_the_first_settles(name: str) -> None:
    value = getattr(TrainConfig(), name)
    with pytest.raises(InputError, match=rf"^fine_tuning\.{name} must be left out, as the first run settles it$"):
        fine_tuned(a_run(fine_tuning={"steps": 5, name: value}))


def test_a_second_run_differs_in_what_it_is_given_alone() -> None:
    first = a_run(seed=7, fine_tuning={"steps": 5, "loss": {"margin": 0.5}, "validation": {"trials": "a.txt"}})
    second = fine_tuned(first)
    changed = {name for name, value in flatten(second).items() if value != flatten(first)[name]}
    assert changed == {"steps", "loss.margin", "validation.trials", "out", "init_from", "fine_tuning"}
    assert second.validation.trials == ["a.txt"] and second.init_from == first.out
    assert fine_tuned(second) is None


@pytest.mark.parametrize(
    ("given", "found"),
    [("a.txt", ["a.txt"]), ("[a.txt]", ["a.txt"]), ("[a.txt, b c.txt]", ["a.txt", "b c.txt"]), ("[]", [])],
)
def test_one_trial_list_is_given_as_it_is(tmp_path, given, found) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"validation: {{trials: {given}}}")
    for argv in ([str(file)], ["--validation.trials", given], [f"--validation.trials={given}"]):
        assert parse(argv)[0].validation.trials == found
    assert parse(["--fine_tuning.validation.trials", given])[0].fine_tuning["validation"]["trials"] in (given, found)


def test_one_trial_list_from_python() -> None:
    assert ValidationConfig("a.txt").trials == ["a.txt"]
    assert dataclasses.replace(ValidationConfig(["a.txt"]), trials="b.txt").trials == ["b.txt"]


@pytest.mark.parametrize("name, value", [("optimizer__lr", None), ("batch_size", "8"), ("keep_checkpoints", True)])
def test_what_is_no_number_is_refused(name, value) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(name.replace('__', '.'))} must be .*, got {value!r}$"):
        check(a_run(**{name: value}))
    check(a_run(optimizer__lr_batch_size=None))


def test_a_negative_span_of_validation_is_refused() -> None:
    with pytest.raises(InputError, match=r"^validation\.every must be .* above 0, got -3$"):
        check(a_run(validation__every=-3))


def test_what_is_no_config_is_refused() -> None:
    with pytest.raises(InputError, match=r"^config must be a TrainConfig, got \{'steps': 3\}$"):
        check({"steps": 3})


@pytest.mark.parametrize("name", kinds())
def test_null_is_taken_where_it_means_none_and_else_refused_by_name(tmp_path, name: str) -> None:
    section, _, key = name.rpartition(".")
    file = tmp_path / "run.yaml"
    run = a_run(**{name.replace(".", "__"): None})
    for prefix in ("", "fine_tuning.") if name != "fine_tuning" else ("",):
        file.write_text(f"{prefix}{section}:\n  {key}:\n" if section else f"{prefix}{key}:\n")
        if fits(kinds()[name], None):
            check(run)
            assert flatten(changed(TrainConfig(), parse([str(file)])[0].fine_tuning or {}))[name] is None
            continue
        with pytest.raises(InputError, match=rf"^(unknown )?{re.escape(prefix + name)} .*None") as error:
            parse([str(file)])
        assert "\n" not in str(error.value)
    if not fits(kinds()[name], None):
        with pytest.raises(InputError, match=rf"^(unknown )?{re.escape(name)} "):
            check(run)


@pytest.mark.parametrize("name", [name for name, kind in kinds().items() if fits(kind, "")])
def test_no_text_is_refused_by_name(tmp_path, name: str) -> None:
    section, _, key = name.rpartition(".")
    message = f"^{re.escape(name)} must not be empty{', give null for none' if fits(kinds()[name], None) else ''}$"
    file = tmp_path / "run.yaml"
    for value in ("''", "' '", *(["['']"] if fits(kinds()[name], [""]) else [])):
        file.write_text(f"{section}: {{{key}: {value}}}\n" if section else f"{key}: {value}\n")
        for argv in ([str(file)], [f"--{name}", value.strip("'")]):
            with pytest.raises(InputError, match=message):
                parse(argv)
    with pytest.raises(InputError, match=f"^{re.escape(name)} "):
        check(a_run(**{name.replace(".", "__"): ""}))
