"""Recipes: each says what it is held to, and each trains, in its own size, on a corpus of tones."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import yaml

from spkfast.cli.train import main, parse
from spkfast.training.log import read_log
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
    is_tuned = "fine_tuning" in yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    out = tmp_path / "run"
    main([str(FOLDER / f"{name}.yaml"), "--out", str(out), *spans, *sizes, *data, *(second if is_tuned else [])])
    entries = read_log(out)
    assert [entry["step"] for entry in entries] == [10, 20] and all(math.isfinite(entry["loss"]) for entry in entries)
    assert (out / "model" / "model.safetensors").exists()
    assert (out / "fine_tuning" / "model" / "model.safetensors").exists() == is_tuned
