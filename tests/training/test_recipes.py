"""Recipes: each says what it is held to, and each trains, in its own size, on a corpus of tones."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch
import yaml

from spkfast.cli.train import main, parse
from spkfast.training import averaging, optimizers, schedule
from spkfast.training.config import TrainConfig, check, fine_tuned
from spkfast.training.log import read_log
from spkfast.training.spans import Length
from tests.training.corpus import make_tones

FOLDER = Path(__file__).parents[2] / "configs"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = make_tones(tmp_path_factory.mktemp("tones"), speakers=8)
    for kind in ("noise", "music", "speech"):
        (folder / "additions").mkdir(exist_ok=True)
        (folder / "additions" / kind).symlink_to(folder / "spk0", target_is_directory=True)
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_says_its_corpus_its_published_rate_and_its_command(name):
    text = (FOLDER / f"{name}.yaml").read_text()
    comments = re.match(r"(#.*\n)+", text)[0]
    for word in ("Corpus:", "Published:", "Measured:", "Command:"):
        assert len(re.findall(f"^# {word} +\\S", comments, re.MULTILINE)) == 1, word
    assert f"spkfast train configs/{name}.yaml " in comments
    assert yaml.safe_load(text)["out"] == f"exp/{name}"
    # The whole command, line ends aside, is one that is understood.
    command = re.search(r"# Command: +spkfast train (.*?)(?=\n# \w+:|\n#\n|\Z)", comments, re.DOTALL)[1]
    words = re.sub(r"\n# +", " ", command).replace("'", "").split()
    config, _ = parse([str(FOLDER / f"{name}.yaml"), *words[1:]])
    assert config.data.train_list


def assert_fits(config: TrainConfig) -> None:
    """That a run takes its numbers, and that its spans fit its length, of whatever corpus of a thousand batches."""
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, train_list="list"))
    check(config)
    length = Length.of_run(config.steps, 1000)
    rates = [optimizers.scaled(config.optimizer, rate, 64) for rate in (config.optimizer.lr, config.schedule.final_lr)]
    schedule.learning_rate(config.schedule, *rates, length)
    schedule.margin(config.loss, length)
    averaging.create(config.averaging, torch.nn.Linear(1, 1), length)
    assert length.span(config.validation.every, "validation.every") > 0


@pytest.mark.parametrize("name", RECIPES)
def test_spans_of_both_runs_fit(name):
    config, _ = parse([str(FOLDER / f"{name}.yaml")])
    for run in (config, fine_tuned(config)):
        if run is not None:
            assert_fits(run)


@pytest.mark.parametrize("name", ["wespeaker_ecapa512", "wespeaker_ecapa1024"])
def test_the_page_has_the_fine_tuning_of_the_recipes(name):
    page = (FOLDER.parent / "docs" / "training.md").read_text()
    block = re.search(r"```yaml\n(fine_tuning:.*?)```", page, re.DOTALL)[1]
    assert yaml.safe_load(block)["fine_tuning"] == yaml.safe_load((FOLDER / f"{name}.yaml").read_text())["fine_tuning"]


def test_the_penalty_on_the_hardest_speakers_is_that_of_espnet_at_the_margin():
    """0.06 for each 0.2 of margin."""
    loss = parse([str(FOLDER / "espnet_ecapa_mel.yaml")])[0].loss
    assert loss.topk_margin == pytest.approx(0.06 * loss.margin / 0.2)


@pytest.mark.full
@pytest.mark.parametrize("name", RECIPES)
def test_trains(name, corpus, tmp_path):
    spans = ["--steps", "20", "--log_steps", "10", "--schedule.warmup", "2", "--schedule.cycle", "10"]
    spans += ["--loss.margin_start", "0", "--loss.margin_end", "10", "--averaging.every", "1"]
    sizes = [
        "--batch_size",
        "4",
        "--data.crop_seconds",
        "0.5",
        "--data.workers",
        "0",
        "--optimizer.lr_batch_size",
        "null",
    ]
    data = ["--data.train_list", str(corpus / "train_list.txt"), "--data.rir", str(corpus / "spk1")]
    data += ["--data.noise", str(corpus / "additions"), "--validation.held_out", "2", "--validation.every", "20"]
    second = ["--fine_tuning.steps", "2", "--fine_tuning.batch_size", "4", "--fine_tuning.data.crop_seconds", "0.8"]
    second += ["--fine_tuning.schedule.warmup", "1", "--fine_tuning.loss.margin_end", "0"]
    recipe = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    is_tuned = "fine_tuning" in recipe
    if "distillation" in recipe:  # of other runs
        data += ["--distillation.teachers", "ecapa-mini", "--init_from", "ecapa-mini"]
    out = tmp_path / "run"
    main([str(FOLDER / f"{name}.yaml"), "--out", str(out), *spans, *sizes, *data, *(second if is_tuned else [])])
    entries = read_log(out)
    assert [entry["step"] for entry in entries] == [10, 20] and all(math.isfinite(entry["loss"]) for entry in entries)
    assert (out / "model" / "model.safetensors").exists()
    assert (out / "fine_tuning" / "model" / "model.safetensors").exists() == is_tuned
