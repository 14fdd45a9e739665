"""What the commands share: progress, printing, bad files; and what ``spkfast train`` reads and tells."""

import json
import math
import re
import sys

import pytest

from spkfast.cli import common, train
from spkfast.cli.common import BadFiles, meter, print_result, progress
from spkfast.errors import InputError
from spkfast.training.config import flatten
from spkfast.training.log import VALIDATION, RunLog
from spkfast.training.loop import Progress
from spkfast.training.meter import duration


@pytest.fixture
def clock(monkeypatch):
    """Time that goes on by 10 s at each look."""
    ticks = iter(range(0, 10**6, 10))
    monkeypatch.setattr(common.time, "monotonic", lambda: next(ticks))


def test_progress_is_a_line_every_30_seconds(clock, capsys):
    assert list(progress(["a"] * 7, description="reading")) == ["a"] * 7
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "reading: 2/7, 0.0667/s, 75 s left\nreading: 5/7, 0.0833/s, 24 s left\n"


def test_progress_without_a_total(clock, capsys):
    assert list(progress((n for n in range(3)), description="reading")) == [0, 1, 2]
    assert capsys.readouterr().err == "reading: 2, 0.0667/s\n"


def test_a_note_stands_in_place_of_the_rate(clock, capsys):
    with meter("training") as update:
        for done in range(1, 4):
            update(done, 9, f"loss {done}")
    assert capsys.readouterr().err == "training: 3/9, loss 3, 60 s left\n"


def test_what_was_done_before_took_no_time(clock, capsys):
    with meter("training", start=100) as update:
        for done in range(101, 104):
            update(done, 106)
    assert capsys.readouterr().err == "training: 103/106, 0.1/s, 30 s left\n"
    with meter("training", start=100) as update:
        for _ in range(3):
            update(100, 106)
    assert capsys.readouterr().err == "training: 100/106, 0/s\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"), (119.4, "119 s"), (120, "2 min"), (7149, "119 min"), (7200, "2 h 00 min"),
        (7260, "2 h 01 min"), (360_000, "100 h 00 min"),
    ],
)  # fmt: skip
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_quick_work_says_nothing(capsys):
    with meter("reading") as update:
        for done in range(100):
            update(done, 100)
    assert capsys.readouterr() == ("", "")


def test_progress_is_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(progress(range(5), description="reading")) == list(range(5))
    out, err = capsys.readouterr()
    assert out == "" and "reading" in err and "5/5" in err and "/s" in err


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_a_bar_keeps_its_numbers_where_the_terminal_is_narrow(monkeypatch, capsys, columns):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    note = "loss [bold] 3.210, " + "more of it, " * 8
    with meter("training", start=1000) as update:
        update(1005, 120_000, note)
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err).split("\r")[-1].strip("\n")
    assert len(last) <= columns and "1005/120000" in last and "loss [" in last and last.rstrip().endswith(":--")
    assert (note.strip(" ,") in last) == (columns == 200)


def test_prints_json(capsys):
    result = {"a": 0.5, "b": float("inf"), "c": [{"d": float("nan"), "e": None}], "f": (1, 2)}
    print_result(result, True, shown={"other": 1})
    assert json.loads(capsys.readouterr().out) == {"a": 0.5, "b": None, "c": [{"d": None, "e": None}], "f": [1, 2]}


RESULT = {
    "score": 0.123456,
    "ok": True,
    "none": None,
    "rows": [{"x": 1, "name": "ab"}, {"x": 22}],
    "in": {"k": ["u", "v"]},
}


def test_prints_plain_tables(capsys):
    print_result(RESULT, False)
    assert capsys.readouterr().out == (
        "score  0.1235\nok     yes\nnone   -\n\nrows\nx   name\n1   ab\n22  -\n\nin\nk  u, v\n"
    )


def test_prints_rich_tables_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    print_result({**RESULT, "path": "a[b]/c.wav"}, False)
    out = capsys.readouterr().out
    for text in ("score", "0.1235", "rows", "name", "22", "u, v", "a[b]/c.wav"):
        assert text in out


def test_bad_files_are_told_and_counted(capsys):
    bad = BadFiles(strict=False)
    bad.close(3)
    assert capsys.readouterr().err == ""
    bad.skip(InputError("a.wav: no such file"))
    bad.close(3)
    assert capsys.readouterr().err == "skipped: a.wav: no such file\n1 of 3 files skipped\n"
    with pytest.raises(InputError, match="none of the 1 files could be used"):
        bad.close(1)
    with pytest.raises(InputError, match=r"b\.wav"):
        BadFiles(strict=True).skip(InputError("b.wav: empty"))


class Run:
    """A trainer of three steps, of which one was done before."""

    is_main_process = True
    first_step = 1

    def run(self):
        yield Progress(2, 3, 3.5, 0.25, math.nan, math.nan, math.nan, None)
        yield Progress(3, 3, 2.5, 0.5, 226.4, 0.031, 0.969, 4.217)


def test_training_shows_loss_error_rate_speed_and_time_left(clock, capsys, monkeypatch):
    monkeypatch.setattr(common, "_SECONDS_BETWEEN_LINES", 10.0)
    assert train.follow(Run()).step == 3
    assert capsys.readouterr().err == (
        "training: 2/3, loss 3.500, 10 s left\n"
        "training: 3/3, loss 2.500, EER 4.22 %, 226 utt/s, loader wait 3 %, device busy 97 %, 0 s left\n"
    )
    monkeypatch.setattr(Run, "is_main_process", False)
    assert train.follow(Run()).step == 3
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(Run, "run", lambda self: iter([]))
    assert train.follow(Run()) is None


def test_the_result_has_the_rates_of_the_model_taken_the_best_one_and_the_report(tmp_path):
    assert train._validated(tmp_path, "best") == {}
    log = RunLog(tmp_path / VALIDATION, 0)
    for step, rate in ((20, 4.0), (40, 5.0)):
        log.write(step, {"mean_eer_percent": rate, "seconds": 1.0, "lists": {"dev": {"eer_percent": rate}}})
    # Without a model that was the best one, what came of the run is the last.
    for take in ("best", "last"):
        assert train._validated(tmp_path, take) == {"lists": {"dev": {"eer_percent": 5.0}}}
    path = tmp_path / "best" / "step_00000020"
    path.mkdir(parents=True)
    (path / "validation.json").write_text(json.dumps({"step": 20, "eer_percent": 4.0}))
    for take, rate in (("best", 4.0), ("last", 5.0)):
        assert train._validated(tmp_path, take) == {"lists": {"dev": {"eer_percent": rate}}, "best": str(path)}


FINE_TUNING = "fine_tuning: {steps: 5 epochs, loss: {margin: 0.5}, data: {augment: {options: {speeds: [1]}}}}"


def parsed(folder, text, *options):
    (folder / "run.yaml").write_text(text)
    return train.parse([str(folder / "run.yaml"), *options])[0]


@pytest.mark.parametrize(
    ("text", "options", "found"),
    [
        ("steps: 3", [], None),
        ("fine_tuning: {}", [], {}),
        (
            FINE_TUNING,
            [],
            {"steps": "5 epochs", "loss": {"margin": 0.5}, "data": {"augment": {"options": {"speeds": [1]}}}},
        ),
        ("fine_tuning: {loss.margin: 1, optimizer.lr: 1e-3}", [], {"loss": {"margin": 1.0}, "optimizer": {"lr": 1e-3}}),
        (
            FINE_TUNING,
            ["--fine_tuning.loss.margin", "0.4", "--fine_tuning.data.crop_seconds=6", "--fine_tuning.steps", "30"],
            {
                "steps": 30,
                "loss": {"margin": 0.4},
                "data": {"augment": {"options": {"speeds": [1]}}, "crop_seconds": 6.0},
            },
        ),
        (
            "steps: 3",
            ["--fine_tuning", "{model.options: {channels: 8}}", "--fine_tuning.model.options.scale", "4"],
            {"model": {"options": {"channels": 8, "scale": 4}}},
        ),
        (
            "steps: 3",
            ["--fine_tuning.data.augment.spec_augment", "null"],
            {"data": {"augment": {"spec_augment": None}}},
        ),
    ],
)
def test_what_differs_in_fine_tuning_is_nested_and_typed(tmp_path, text, options, found):
    config = parsed(tmp_path, text, *options)
    assert config.fine_tuning == found
    assert repr(config.fine_tuning) == repr(found)  # 6 and 6.0 are equal
    assert config.loss.margin == 0.2


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("fine_tuning: {loss: {margn: 1}}", [], "run.yaml: unknown key 'fine_tuning.loss.margn' (did you mean"),
        ("fine_tuning: {fine_tuning: {steps: 1}}", [], "unknown key 'fine_tuning.fine_tuning'"),
        ("fine_tuning: {loss: 3}", [], "fine_tuning.loss must hold keys and values, got 3"),
        ("fine_tuning: {loss: {margin: wide}}", [], "margin"),
        ("fine_tuning: 3", [], "fine_tuning must be keys and values or null, got 3"),
        ("steps: 3", ["--model.options", "null"], "model.options must be keys and values, got None"),
        ("steps: 3", ["--json=yes"], "--json takes no value, got 'yes'"),
        ("steps: 3", ["--data.strict", "maybe"], "data.strict must be true or false, got 'maybe'"),
        ("steps: [6]", [], "steps must be a number of steps or 'N epochs', got [6]"),
        ("batch_size: 6.5", [], "batch_size must be a whole number, got 6.5"),
        ("data: {noise: 3}", [], "data.noise must be text or null, got 3"),
        ("loss: 3", [], "run.yaml: loss must hold keys and values, got 3"),
        ("data: {augment: null}", [], "data.augment must hold keys and values, got None"),
        ("steps: 3", ["--fine_tuning.loss.margn", "1"], "unknown option --fine_tuning.loss.margn (did you mean"),
        ("steps: 3", ["--fine_tuning", "{loss: {margn: 1}}"], "unknown key 'fine_tuning.loss.margn'"),
        ("steps: 3", ["--fine_tuning.loss.kind", "amm"], "loss.kind"),
        ("steps: 3", ["--fine_tuning.loss.margin"], "--fine_tuning.loss.margin: expected a value"),
        ("steps: 3", ["--fine_tuning.loss.margin", "["], "--fine_tuning.loss.margin: not a YAML value"),
        ("steps: 3", ["--data.augmant.options", "{}"], "unknown option --data.augmant.options (did you mean"),
    ],
)
def test_bad_keys_and_values_of_a_run_are_named(tmp_path, text, options, words):
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        parsed(tmp_path, text, *options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "name", "found"),
    [
        (["--data.augment.options", "{power_floor: 0}"], "data.augment.options", {"speeds": [1.0], "power_floor": 0}),
        (["--data.augment", "{options: {power_floor: 1e-4}}"], "data.augment.options",
         {"speeds": [1.0], "power_floor": 1e-4}),
        (["--model.options", "{channels: 64}"], "model.options", {"channels": 64, "scale": 4}),
        (["--model.options.channels", "64"], "model.options", {"channels": 64, "scale": 4}),
        (["--model.options", "null", "--model.options", "{channels: 64}"], "model.options", {"channels": 64}),
        (["--optimizer", "{lr: .01}"], "optimizer.momentum", 0.8),
        (["--optimizer", "{lr: .01}"], "optimizer.lr", 0.01),
        (["--optimizer", "OTHER"], "optimizer.weight_decay", 0.5),
        (["--config", "OTHER"], "steps", 8),
        (["--fine_tuning", "{loss: {scale: 16}}"], "fine_tuning", {"loss": {"margin": 0.5, "scale": 16.0}}),
        (["--fine_tuning", "null"], "fine_tuning", None),
    ],
)  # fmt: skip
def test_mappings_on_the_command_line_are_merged_into_those_of_the_file(tmp_path, options, name, found):
    text = (
        "model: {options: {channels: 16, scale: 4}}\ndata: {augment: {options: {speeds: [1.0]}}}\n"
        "optimizer: {momentum: 0.8}\nfine_tuning: {loss: {margin: 0.5}}\n"
    )
    other = tmp_path / "other.yaml"
    other.write_text("steps: 8\n" if name == "steps" else "weight_decay: 0.5\n")
    options = [str(other) if option == "OTHER" else option for option in options]
    assert flatten(parsed(tmp_path, text, *options))[name] == found


def test_the_config_may_stand_anywhere_and_options_go_before_it(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("steps: 3\nout: a\n")
    for argv in (["--steps", "5", str(file)], ["--resume", str(file), "--steps=5", "--strict", "--json"]):
        config, as_json = train.parse(argv)
        assert (config.steps, config.out) == (5, "a")
        assert (config.resume, config.data.strict, as_json) == (("--resume" in argv,) * 3)


def test_all_settings_are_printed_as_a_config(tmp_path, capsys):
    argv = ["steps: 5 epochs", "--optimizer.betas", "[0.5, 0.6]", "--data.train_list", "list.txt"]
    with pytest.raises(SystemExit):
        parsed(tmp_path, *argv, "--print_config")
    assert parsed(tmp_path, capsys.readouterr().out) == parsed(tmp_path, *argv)


@pytest.mark.parametrize("text", ["a #b.txt", "*.txt", "@team", "2024", "1e-3", "a: b: c", "true"])
def test_text_is_taken_as_it_is(tmp_path, text):
    config = parsed(tmp_path, "steps: 3", "--out", text, "--wandb", text, "--validation.trials", text)
    assert (config.out, config.wandb, config.validation.trials) == (text, text, [text])


@pytest.mark.parametrize(
    ("key", "likely"),
    [
        ("optimizer.learning_rate", "optimizer.lr"),
        ("learning_rate", "optimizer.lr"),
        ("bs", "batch_size"),
        ("batchsize", "batch_size"),
        ("max_epochs", "steps"),
        ("num_workers", "data.workers"),
        ("optimiser.lr", "optimizer.lr"),
        ("validation.rot", "validation.root"),
        ("margin", "loss.margin"),
        ("fine_tuning.optimizer.learning_rate", "fine_tuning.optimizer.lr"),
        ("optimizer.nesterov", None),
        ("gpus", None),
    ],
)
def test_the_key_that_was_meant_is_suggested(tmp_path, key, likely):
    words = f" (did you mean {likely!r}?)" if likely else ""
    with pytest.raises(InputError, match=re.escape(f"run.yaml: unknown key {key!r}{words}") + "$"):
        parsed(tmp_path, f"{key}: 1")
    words = f" (did you mean '--{likely}'?)" if likely else ""
    with pytest.raises(InputError, match=re.escape(f"unknown option --{key}{words}") + "$"):
        parsed(tmp_path, "steps: 3", f"--{key}", "1")


def test_keywords_of_something_else_may_be_options(tmp_path):
    config = parsed(
        tmp_path, "data: {augment: {spec_augment: {max_bins: 5}}}",
        "--model.options.channels", "8", "--data.augment.options.speeds", "[1.0]", "--data.sampler_options.n", "2",
        "--data.augment.spec_augment.max_frames", "3",
    )  # fmt: skip
    assert config.model.options == {"channels": 8} and config.data.sampler_options == {"n": 2}
    assert config.data.augment.options == {"speeds": [1.0]}
    assert config.data.augment.spec_augment == {"max_bins": 5, "max_frames": 3}
