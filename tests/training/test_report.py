"""The report of a training run: made of whatever files there are, and true to them."""

import importlib.util
import json
import math
import re

import pytest

from spkfast.errors import InputError
from spkfast.training.config import TrainConfig, flatten
from spkfast.training.log import LOG, VALIDATION, RunLog
from spkfast.training.report import best_validation, write_training_report

CAPTIONS = [
    "Loss and accuracy on training crops",
    "Error rate in validation",
    "Learning rate and margin",
    "Gradient",
    "Speed",
]


def write_log(folder):
    log = RunLog(folder / LOG, 0)
    # Steps differ in crops, as those of length buckets do: 200 crops in 2 s, 300 in 1 s, 100 in 5 s.
    for step, speed, seconds, wait in ((20, 100.0, 2.0, 0.1), (40, 300.0, 1.0, 0.1), (120, 20.0, 5.0, 0.3)):
        log.write(
            step,
            {
                "loss": 100 / step, "accuracy": step / 100, "target_cosine": 0.5,
                "grad_norm": math.inf if step == 40 else 2.0, "lr": 0.1, "margin": 0.1, "crops_per_second": speed,
                "loader_wait": wait, "device_busy": 1 - wait, "seconds": seconds,
            },
        )  # fmt: skip


def rates(eer):
    return {
        "eer_percent": eer, "eer_low_percent": eer - 1, "eer_high_percent": eer + 1, "min_dcf": eer / 10,
        "threshold": 0.3, "num_trials": 1200,
    }  # fmt: skip


def write_validations(folder, *means):
    log = RunLog(folder / VALIDATION, 0)
    for number, mean in enumerate(means, start=1):
        lists = {"dev <1>": rates(mean - 1), "clean": rates(mean + 1)}
        log.write(20 * number, {"mean_eer_percent": mean, "seconds": 30.0, "lists": lists})


def write_config(folder, **run):
    config = TrainConfig()
    config.data.train_list = "lists/train <2>.txt"
    (folder / "config.json").write_text(json.dumps({**flatten(config), "run": run}))


def page(folder):
    path = write_training_report(folder)
    assert path == folder / "report.html"
    return path.read_text()


def summary(text):
    return dict(re.findall(r"<div><dt>(.*?)</dt><dd>(.*?)</dd></div>", text))


def rows(text):
    table = re.search(r"<h2>Error rates</h2>.*?</table>", text, re.DOTALL)
    return [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", table[0])[1:]] if table else []


def captions(text):
    return re.findall(r"<figcaption>(.*?)</figcaption>", text)


def test_whole_report(tmp_path):
    write_log(tmp_path)
    write_validations(tmp_path, 9.0, 4.0, 5.0)
    write_config(tmp_path, steps=120, speakers=205, utterances=12345, crops_per_step=5)
    text = page(tmp_path)
    assert "<h1>Training of ecapa_tdnn</h1>" in text and captions(text) == CAPTIONS
    assert summary(text) == {
        "run": str(tmp_path), "training data": "lists/train &lt;2&gt;.txt", "speakers": "205", "utterances": "12,345",
        "steps": "120", "time of training": "8 s", "time of validation": "90 s",
        # Means over time: 600 crops in 8 s; (2 * 0.1 + 0.1 + 5 * 0.3) / 8.
        "crops per second": "75", "loader wait": "22.5 %", "device busy": "77.5 %",
        "lowest mean EER": "4.00 % (step 40)", "final mean EER": "5.00 % (step 60)",
    }  # fmt: skip
    assert rows(text) == [
        ["dev &lt;1&gt; (1,200)", "best (step 40)", "3.00", "2.00 to 4.00", "0.3000"],
        ["dev &lt;1&gt; (1,200)", "last (step 60)", "4.00", "3.00 to 5.00", "0.4000"],
        ["clean (1,200)", "best (step 40)", "5.00", "4.00 to 6.00", "0.5000"],
        ["clean (1,200)", "last (step 60)", "6.00", "5.00 to 7.00", "0.6000"],
    ]
    assert "stands at step" not in text
    assert "<td>loss.margin_end</td><td>30 %</td>" in text and "<td>optimizer.lr</td><td>0.1</td>" in text


def test_the_best_model_may_be_the_last(tmp_path):
    write_validations(tmp_path, 9.0, 4.0)
    assert [row[1] for row in rows(page(tmp_path))] == ["best and last (step 40)"] * 2


def test_of_equal_validations_the_earlier_is_the_best():
    entries = [{"step": step, "mean_eer_percent": mean} for step, mean in ((1, None), (2, 4.0), (3, 4.0), (4, 5.0))]
    assert best_validation(entries)["step"] == 2
    assert best_validation(entries[:1]) is None and best_validation([]) is None


@pytest.mark.parametrize(
    ("file", "content"),
    [
        (LOG, None), (LOG, '{"ste'), (VALIDATION, None), (VALIDATION, "[1]\n"), ("config.json", None),
        ("config.json", '{"ste'), ("config.json", "[1]\n"),
    ],
)  # fmt: skip
def test_a_report_is_made_of_what_there_is(tmp_path, file, content):
    write_log(tmp_path)
    write_validations(tmp_path, 9.0, 4.0)
    write_config(tmp_path, steps=120, speakers=205)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_text(content)
    text = page(tmp_path)
    found = summary(text)
    assert ("steps" in found) == ("loader wait" in found) == (file != LOG)
    assert ("lowest mean EER" in found) == (len(rows(text)) == 2) == (file != VALIDATION)
    assert ("speakers" in found) == ("<summary>Settings</summary>" in text) == (file != "config.json")
    lost = {LOG: [0, 2, 3, 4], VALIDATION: [1], "config.json": []}[file]
    assert captions(text) == [caption for number, caption in enumerate(CAPTIONS) if number not in lost]


def test_an_empty_folder_has_a_report_and_none_has_none(tmp_path):
    assert "<h1>Training</h1>" in page(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        write_training_report(tmp_path / "none")


def test_nested_settings_are_the_same_as_dotted_ones(tmp_path):
    text = []
    for settings in (
        {"model": {"name": "resnet34", "options": {"channels": 8}}, "optimizer": {"clip_grad_norm": 5.0}},
        {"model.name": "resnet34", "model.options": {"channels": 8}, "optimizer.clip_grad_norm": 5.0},
    ):
        (tmp_path / "config.json").write_text(json.dumps(settings))
        text.append(page(tmp_path))
    assert text[0] == text[1] and "Training of resnet34" in text[0]
    assert "<td>model.options.channels</td><td>8</td>" in text[0]


def test_a_run_that_goes_on_says_how_far_it_is(tmp_path):
    write_config(tmp_path, steps=6000)
    assert "The run stands at step 0 of 6,000." in page(tmp_path)
    write_log(tmp_path)
    assert "The run stands at step 120 of 6,000." in page(tmp_path)


def test_an_older_log_without_rates(tmp_path):
    RunLog(tmp_path / LOG, 0).write(20, {"loss": 2.0, "lr": 0.1})
    text = page(tmp_path)
    assert captions(text) == [CAPTIONS[0], CAPTIONS[2]]
    assert summary(text) == {"run": str(tmp_path), "steps": "20"}


def test_figures_need_matplotlib_and_nothing_else_does(tmp_path, monkeypatch):
    write_log(tmp_path)
    write_validations(tmp_path, 9.0, 4.0)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    text = page(tmp_path)
    assert not captions(text) and "matplotlib is not installed" in text and len(rows(text)) == 2
