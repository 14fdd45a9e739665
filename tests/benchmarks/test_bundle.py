"""A finished run becomes a bundled model with a record, and nothing else does."""

from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch

from benchmarks.accuracy.bundle import bundle, describe_parts, logged_minutes, probe, row, stages
from spkfast import InputError, SpeakerEncoder
from spkfast.cli.main import main
from spkfast.data.lists import Trial
from spkfast.evaluation import evaluate_trials
from tests.training.corpus import TINY, make_tones

SECONDS = 1.5


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six speakers to train on or hold out, and two others in a trial list."""
    folder = make_tones(tmp_path_factory.mktemp("data"), speakers=8, utterances=3, seconds=SECONDS)
    lines = (folder / "train_list.txt").read_text().splitlines()
    (folder / "train_list.txt").write_text("".join(f"{line}\n" for line in lines if line < "spk6"))
    table = "path,speaker,corpus,split,seconds\n"
    for line in lines:
        speaker, path = line.split()
        table += f"{path},{speaker},{'odd' if int(speaker[3]) % 2 else 'even'},"
        table += f"{'train' if speaker < 'spk6' else 'test'},{SECONDS}\n"
    (folder / "utterances.csv").write_text(table)
    (folder / "trials_some.txt").write_text(
        "1 spk6/s/0.wav spk6/s/1.wav\n1 spk7/s/0.wav spk7/s/1.wav\n"
        "0 spk6/s/0.wav spk7/s/1.wav\n0 spk7/s/0.wav spk6/s/1.wav\n"
    )
    return folder


@pytest.fixture(scope="module", params=["", "fine_tuning: {steps: 5, loss: {margin: 0.4}}\n"], ids=["one", "two"])
def recipe(tmp_path_factory, request):
    """Of one run, and of one with a second."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(TINY.replace("recipe: room_or_noise", "recipe: none").replace("steps: 30", "steps: 8"))
    with open(path, "a") as file:
        file.write("validation: {every: 4}\n" + request.param)
    return path


@pytest.fixture(scope="module")
def runs(data, recipe, tmp_path_factory):
    """A run on all speakers, and one like it from which two are held out."""
    folder = tmp_path_factory.mktemp("runs")
    options = ["--data.train_list", str(data / "train_list.txt"), "--seed", "3"]
    for name, held_out in (("all", "0"), ("held_out", "2")):
        out = ["--out", str(folder / name), "--validation.held_out", held_out]
        assert main(["train", str(recipe), *out, *options]) == 0
    return folder / "all", folder / "held_out"


def edited(run, folder, change):
    shutil.copytree(run, folder)
    settings = json.loads((folder / "config.json").read_text())
    change(settings)
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def test_run_becomes_a_model_with_a_record(runs, data, recipe, tmp_path):
    run, held_out = runs
    for _ in range(2):  # over an earlier one, too
        record = bundle(run, held_out, data, "some-model", recipe=recipe, root=tmp_path)
    folder = tmp_path / "spkfast/models/bundled/some-model"
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "model.safetensors"]
    two = "fine_tuning" in recipe.read_text()
    assert stages(run) == [run, *[run / "fine_tuning"] * two]
    encoder, trained = (SpeakerEncoder.load(path, device="cpu") for path in (folder, stages(run)[-1]))
    assert all(map(torch.equal, encoder.model.state_dict().values(), trained.model.state_dict().values()))

    settings = json.loads((run / "config.json").read_text())
    last = json.loads((stages(held_out)[-1] / "validation.jsonl").read_text().splitlines()[-1])
    weights = (folder / "model.safetensors").read_bytes()
    assert record["name"] == "some-model" and record["seed"] == 3
    assert record["steps"] == 8 + 5 * two
    assert record["recipe"] == "tiny.yaml" and record["config"] == recipe.read_text() and record["differences"] == {}
    logs = [(stage / "log.jsonl").read_text().splitlines() for stage in stages(run)]
    seconds = sum(json.loads(line)["seconds"] for log in logs for line in log)
    assert record["training_minutes"] == pytest.approx(seconds / 60)
    assert record["held_out"] == {**last["lists"]["held_out"], "speakers": 2, "teachers": 0}
    assert record["teachers"] is None
    assert record["threshold"] == encoder.threshold.value == record["held_out"]["threshold"]
    assert encoder.threshold.list == "held_out"
    assert record["model"]["sha256"] == hashlib.sha256(weights).hexdigest()
    assert record["model"]["bytes"] == len(weights)
    assert record["model"]["parameters"] == settings["run"]["parameters"]
    assert record["frontend"]["hash"] == encoder.frontend.hash and record["frontend"]["n_mels"] == 80
    counts = [sum(part[key] for part in record["data"]["train"].values()) for key in ("speakers", "utterances")]
    assert counts == [6, 18] and sum(part["speakers"] for part in record["data"]["held_out"].values()) == 2
    json.dumps(record, allow_nan=False)

    expected = json.loads((tmp_path / "tests/fixtures/some-model/expected.json").read_text())
    assert expected["probe_embedding"] == encoder.embed(probe(), backend="reference").tolist()
    assert expected["eer_percent"] == {"trials_some.txt": record["lists"]["trials_some.txt"]["eer_percent"]}


def test_figures_are_those_of_the_command(runs, data, recipe, tmp_path, capsys):
    record = bundle(*runs, data, "some-model", recipe=recipe, root=tmp_path)
    capsys.readouterr()
    trials = str(data / "trials_some.txt")
    assert (
        main(["evaluate", "--model", str(stages(runs[0])[-1]), "--data", str(data), "--trials", trials, "--json"]) == 0
    )
    (found,) = json.loads(capsys.readouterr().out)["lists"]
    ours = record["lists"]["trials_some.txt"]
    shared = found.keys() & ours.keys()
    assert len(shared) == 8 and {key: ours[key] for key in shared} == {key: found[key] for key in shared}


def test_what_differs_from_the_recipe_is_recorded(runs, data, recipe, tmp_path):
    def change(settings):
        settings["optimizer.lr"] = 0.25

    both = [edited(run, tmp_path / run.name, change) for run in runs]
    record = bundle(*both, data, "some-model", recipe=recipe, root=tmp_path)
    assert record["differences"] == {"optimizer.lr": 0.25}
    if len(stages(runs[0])) == 2:
        both = [
            edited(run, tmp_path / f"{run.name}2", lambda found: found["fine_tuning"].update(steps=6)) for run in runs
        ]
        record = bundle(*both, data, "some-model", recipe=recipe, root=tmp_path)
        assert record["differences"] == {"fine_tuning": {"steps": 6, "loss": {"margin": 0.4}}}


def test_teachers_are_told(runs, data, recipe, tmp_path):
    run, held_out = runs
    taught = [
        edited(one, tmp_path / one.name, lambda found: found.update({"distillation.teachers": [str(run)] * 2}))
        for one in runs
    ]
    where = {"recipe": recipe, "teacher_recipe": recipe, "root": tmp_path}
    record = bundle(*taught, data, "some-model", **where)
    minutes = 2 * logged_minutes(run)
    told = {"recipe": "tiny.yaml", "config": recipe.read_text(), "seeds": [3, 3], "training_minutes": minutes}
    assert record["teachers"] == told and record["held_out"]["teachers"] == 2
    assert bundle(*runs, data, "some-model", **where)["teachers"] is None

    def other(found):
        found["distillation.teachers"] = [str(held_out)]

    with pytest.raises(InputError, match=r"a teacher must be of tiny\.yaml and on all speakers"):
        bundle(edited(run, tmp_path / "c", other), taught[1], data, "some-model", **where)


def test_runs_that_do_not_belong_together_are_refused(runs, data, recipe, tmp_path):
    run, held_out = runs

    def refused(match, run=run, held_out=held_out, data=data):
        with pytest.raises(InputError, match=match):
            bundle(run, held_out, data, "some-model", recipe=recipe, root=tmp_path)

    changed = edited(run, tmp_path / "a", lambda settings: settings.update({"optimizer.lr": 0.25}))
    refused(r"differs from the recipe in \{\}, .* in \{'optimizer\.lr': 0\.25\}", run=changed)
    refused("must have no speakers held out, and .* some", run=held_out)
    refused("must have no speakers held out, and .* some", held_out=run)
    fewer = tmp_path / "data"
    shutil.copytree(data, fewer)
    lines = (fewer / "utterances.csv").read_text().splitlines()
    (fewer / "utterances.csv").write_text("\n".join([lines[0], *lines[2:]]))
    refused("was trained on 18 utterances, .* has 17", data=fewer)
    for name, of, file in (("b", run, "log.jsonl"), ("c", held_out, "validation.jsonl")):
        (stages(edited(of, tmp_path / name, lambda settings: None))[-1] / file).write_text("")
    refused("does not tell the time of training", run=tmp_path / "b")
    refused("no validation in its log", held_out=tmp_path / "c")


def test_parts_are_by_what_they_served_for(tmp_path):
    table = "path,speaker,corpus,split,seconds\na/1,a,x,train,30\na/2,a,x,train,60\nb/1,b,x,train,15\nc/1,c,y,test,6\n"
    (tmp_path / "utterances.csv").write_text(table)
    assert describe_parts(tmp_path / "utterances.csv", ["b"]) == {
        "train": {"x": {"speakers": 2, "utterances": 3, "minutes": 1.75}},
        "held_out": {"x": {"speakers": 1, "utterances": 1, "minutes": 0.25}},
        "test": {"y": {"speakers": 1, "utterances": 1, "minutes": 0.1}},
    }


def test_misses_and_false_alarms_are_those_of_verify():
    """A score at the threshold is no acceptance, as in ``SpeakerEncoder.verify``."""
    embeddings = np.eye(3, dtype=np.float32)[[0, 0, 1, 0]]
    trials = [Trial(True, "0", "1"), Trial(True, "0", "2"), Trial(False, "1", "3"), Trial(False, "2", "3")]
    result = evaluate_trials(trials, ["0", "1", "2", "3"], embeddings)
    found = row(result, 0.5)
    assert (found["misses_percent"], found["false_alarms_percent"]) == (50, 50)
    assert row(result, 1.0)["misses_percent"] == 100 and row(result, 1.0)["false_alarms_percent"] == 0
    assert (found["targets"], found["nontargets"]) == (2, 2)


def test_probe_is_a_signal():
    signal = probe()
    assert signal.shape == (48000,) and signal.dtype == np.float32
    assert bool(torch.from_numpy(signal).isfinite().all()) and 0.05 < np.abs(signal).max() < 1
