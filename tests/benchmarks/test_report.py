"""The generated page is the one that the committed results give, and says what the records say."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import report

ROW = {"median_ms": 20.0, "min_ms": 19.0, "max_ms": 22.0, "repeats": 10, "us_per_frame": 0.31, "x_real_time": 32000.0}
RECORD = {
    "op": "log_mel_fbank",
    "machine": {"cpu": "some CPU", "cores": 2, "torch": "2.11.0"},
    "threads": 1,
    "results": [
        {
            "frontend": "wespeaker",
            "workload": "64 x 10 s",
            "aa_spread": 0.02,
            "contenders": {"native": {**ROW, "max_error": 1e-3}},
            "figures": [
                {"name": "peer / native", "value": 16.25, "at_least": 15, "at_most": None},
                {"name": "us per frame", "value": 0.31, "at_least": None, "at_most": 0.3},
                {"name": "other / native", "value": 2.5, "at_least": None, "at_most": None},
            ],
        },
        {"frontend": "vgg", "workload": "1 x 1 s", "aa_spread": 0.2, "contenders": {}, "figures": []},
    ],
}

TENSORS = {
    "op": "attentive_stats_pool",
    "machine": {"cpu": "some CPU", "cores": 2, "torch": "2.11.0"},
    "threads": 2,
    "remark": "An error is a share.",
    "results": [
        {
            "case": "forward",
            "workload": "32 x 8 x 9",
            "aa_spread": 0.02,
            "contenders": {
                "native": {"median_ms": 2.0, "min_ms": 1.0, "max_ms": 3.0, "gb_per_s": 20.25, "max_error": 1e-7},
                "eager": {"median_ms": 8.0, "min_ms": 7.0, "max_ms": 9.0, "peak_mib": 112.25, "max_error": 2e-7},
                "a part": {"median_ms": 1.0, "min_ms": 0.5, "max_ms": 1.5},
            },
            "figures": [{"name": "eager / native", "value": 4.0, "at_least": 2, "at_most": None}],
        }
    ],
}


RATES = {
    "eer_percent": 4.125,
    "eer_low_percent": 1.0,
    "eer_high_percent": 9.5,
    "min_dcf": 0.5,
    "eer_threshold": 0.25,
    "misses_percent": 30.0,
    "false_alarms_percent": 2.5,
    "targets": 1350,
    "nontargets": 2250,
    "speakers": 16,
}
PART = {"speakers": 7, "utterances": 8, "minutes": 9.25}
BUNDLED = {
    "benchmark": "bundled",
    "name": "ecapa-mini",
    "date": "2026-01-01",
    "machine": RECORD["machine"],
    "recipe": "mini.yaml",
    "config": "# a recipe\nsteps: {of: 1000}\n",
    "differences": {"averaging.name": "none", "steps": 7000},
    "seed": 3,
    "steps": 7000,
    "training_minutes": 31.4,
    "teachers": {"recipe": "other.yaml", "config": "# another\n", "seeds": [4, 5, 6], "training_minutes": 40.25},
    "held_out": {**RATES, "eer_percent": 3.0, "threshold": 0.3125, "num_trials": 2000, "speakers": 24, "teachers": 2},
    "threshold": 0.3125,
    "data": {"train": {"librispeech-tc100": PART, "asc": PART}, "held_out": {"asc": PART}, "test": {"fsdd": PART}},
    "model": {
        "name": "ecapa_tdnn",
        "config": {"dialect": "wespeaker", "channels": 128, "mfa_channels": 384, "embedding_dim": 192},
        "parameters": 620000,
        "bytes": 2495360,
        "sha256": "abc",
    },
    "frontend": {
        "preset": "wespeaker",
        "hash": "608f",
        "sample_rate": 16000,
        "n_mels": 80,
        "frame_length_ms": 25.0,
        "frame_shift_ms": 10.0,
    },
    "lists": {"trials.txt": RATES, "trials_fsdd.txt": {**RATES, "speakers": 6}},
}


GENERATED = [report.PAGE, report.README, *sorted(report.MODELS.glob("*/README.md"))]


@pytest.mark.parametrize("path", GENERATED, ids=lambda path: path.relative_to(report.ROOT).as_posix())
def test_generated_files_are_current(path):
    assert path.read_text() == report.files(report.RESULTS)[path]


def write(folder, record):
    """A record among the results of a machine."""
    (folder / "some-machine").mkdir()
    (folder / "some-machine" / "record.json").write_text(json.dumps(record))


def test_seeds_of_a_recipe_have_a_row_each_and_a_mean(tmp_path):
    lists = {"trials.txt": {**RATES, "speakers": 16}}
    runs = [{"seed": seed, "training_minutes": 7.0 + seed, "lists": lists} for seed in (0, 1)]
    recipe = {
        "config": "steps: 1",
        "training_minutes": 8.25,
        "held_out": {**RATES, "eer_percent": 3.5},
        "eer_percent": {"trials.txt": {"mean": 4.5, "lowest": 4.0, "highest": 5.0}},
        "runs": runs,
    }
    taught = {**recipe, "runs": [{**runs[0], "teachers": [0, 1]}]}
    record = {
        "benchmark": "real_speech",
        "date": "2026-01-01",
        "machine": RECORD["machine"],
        "threads": 1,
        "recipes": {"mini.yaml": recipe, "mini_distilled.yaml": taught},
    }
    write(tmp_path, record)
    lines = report.page(tmp_path).splitlines()
    # Named so in the recipe.
    assert any(line.startswith("## `configs/mini.yaml`") and "real speech" in line for line in lines)
    assert any("Minutes are those of training and validation on 1 thread(s)" in line for line in lines)
    for name in ("mini.yaml", "mini_distilled.yaml"):
        assert f"`configs/{name}`, on the speakers held out 3.50 (1.00 to 9.50):" in lines
    table = lines.index("| seed | minutes | trials.txt (16 speakers) |")
    assert lines[table + 1 : table + 5] == [
        "|---|---|---|",
        "| 0 | 7.0 | 4.12 (1.00 to 9.50) |",
        "| 1 | 8.0 | 4.12 (1.00 to 9.50) |",
        "| mean (lowest to highest) | at most 8.2 | 4.50 (4.00 to 5.00) |",
    ]
    table = lines.index("| seed | teachers | minutes | trials.txt (16 speakers) |")
    assert lines[table + 2] == "| 0 | 0, 1 | 7.0 | 4.12 (1.00 to 9.50) |"


def test_bundled_model_has_a_section_and_a_card(tmp_path):
    write(tmp_path, BUNDLED)
    files = report.files(tmp_path)
    assert list(files) == [report.PAGE, report.README, report.MODELS / "ecapa-mini" / "README.md"]
    page, _, card = (text.splitlines() for text in files.values())
    for lines in (page, card):
        assert "| trials.txt | 16 | 1,350 + 2,250 | 4.12 (1.00 to 9.50) | 0.5000 | 30.00 | 2.50 |" in lines
    assert any(line.startswith("## `ecapa-mini`") for line in page)
    assert any(
        "31.4 minutes of training after 40.2 of its 3 teachers; 620,000 parameters, 2.5 MB" in line for line in page
    )
    assert any("0.3125, set on 24 speakers held out at an EER of 3.00 % (1.00 to 9.50)" in line for line in page)
    text = " ".join(files[report.MODELS / "ecapa-mini" / "README.md"].split())
    for words in (
        "620,000 parameters, 2.5 MB. It was trained on 14 speakers",
        'SpeakerEncoder.load("ecapa-mini")',
        "`ecapa_tdnn`, dialect `wespeaker`: 128 channels, 384 in the aggregation, embedding of 192",
        "preset `wespeaker`, hash `608f`: 80 mel bands of 25 ms every 10 ms",
        "2,495,360 bytes, SHA-256 `abc`",
        "decides at a cosine of 0.3125.",
        "on 2,000 trials among 24 speakers, with a network that was trained in the same way, by 2 teachers, "
        "without them and has an EER of 3.00 (1.00 to 9.50) % on these",
        '7,000 steps of `configs/mini.yaml` with `seed` 3, `averaging.name` "none", `steps` 7000 on all '
        "speakers, 31 minutes on some CPU, 2 cores",
        "```yaml # a recipe steps: {of: 1000} ``` Its 3 teachers, 40 minutes in all, are runs of `configs/other.yaml` "
        "with `seed` 4, 5, 6: ```yaml # another ``` ## Data",
        "| of these, choosing recipe and threshold | Arabic Speech Commands | 7 | 8 | 9.2 |",
        "14 speakers with 18 minutes",
        "No test list has more than 16 speakers",
        "it misses 30.0 % and accepts 2.5 % falsely, where a threshold of 0.2500 would have 4.1 % of both",
        "CC BY 4.0",
        "CC BY 3.0",
        "CC BY-SA 4.0",
        "MIT",
    ):
        assert words in text, words


def test_no_card_without_credit(tmp_path):
    write(tmp_path, {**BUNDLED, "data": {**BUNDLED["data"], "train": {"some corpus": PART}}})
    with pytest.raises(KeyError, match="some corpus"):
        report.files(tmp_path)


def test_check_tells_what_is_out_of_date(tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    write(tmp_path / "results", BUNDLED)
    (tmp_path / "models" / "ecapa-mini").mkdir(parents=True)
    (tmp_path / "readme.md").write_text("<!-- bench:summary -->\n<!-- /bench:summary -->\n")
    paths = {"ROOT": "", "RESULTS": "results", "PAGE": "page.md", "README": "readme.md", "MODELS": "models"}
    for name, path in paths.items():
        monkeypatch.setattr(report, name, tmp_path / path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["report", *arguments])
        report.main()

    with pytest.raises(SystemExit, match=r"page\.md is out of date"):
        run("--check")
    run()
    run("--check")
    card = tmp_path / "models/ecapa-mini/README.md"
    card.write_text(card.read_text() + "and more")
    with pytest.raises(SystemExit, match=r"ecapa-mini/README\.md is out of date"):
        run("--check")
    run()
    readme = tmp_path / "readme.md"
    readme.write_text(readme.read_text().replace("4.12", "3.12"))
    with pytest.raises(SystemExit, match=r"readme\.md is out of date"):
        run("--check")


def test_page_says_what_was_measured_and_which_goals_are_missed(tmp_path):
    folder = tmp_path / "some-machine"
    folder.mkdir()
    (folder / "log_mel_fbank.json").write_text(json.dumps(RECORD))
    lines = report.page(tmp_path).splitlines()
    assert "| wespeaker | 64 x 10 s | 2.0 % | peer / native | 16.25 | at least 15 | met |" in lines
    assert "| wespeaker | 64 x 10 s | 2.0 % | us per frame | 0.31 | at most 0.3 | missed |" in lines
    assert "| wespeaker | 64 x 10 s | 2.0 % | other / native | 2.50 |  |  |" in lines
    assert "| wespeaker | 64 x 10 s | native | 20.000 (19.000 to 22.000) | 0.31 | 32000 | 1.0e-03 |" in lines
    assert any("busy** in 1 of 2" in line for line in lines)


def test_columns_are_those_that_the_record_has(tmp_path):
    folder = tmp_path / "some-machine"
    folder.mkdir()
    (folder / "attentive_stats_pool.json").write_text(json.dumps(TENSORS))
    lines = report.page(tmp_path).splitlines()
    assert "An error is a share." in lines
    assert "| forward | 32 x 8 x 9 | 2.0 % | eager / native | 4.00 | at least 2 | met |" in lines
    table = lines.index("| case | workload | contender | ms | GB/s | peak MiB | largest error |")
    assert lines[table + 1 : table + 5] == [
        "|---|---|---|---|---|---|---|",
        "| forward | 32 x 8 x 9 | native | 2.000 (1.000 to 3.000) | 20.2 |  | 1.0e-07 |",
        "| forward | 32 x 8 x 9 | eager | 8.000 (7.000 to 9.000) |  | 112.2 | 2.0e-07 |",
        "| forward | 32 x 8 x 9 | a part | 1.000 (0.500 to 1.500) |  |  |  |",
    ]


def test_precisions_stand_beside_their_bounds(tmp_path):
    rate = {"eer_percent": 5.0, "eer_low_percent": 1.0, "eer_high_percent": 9.0, "min_dcf": 0.5, "lowest_cosine": 1.0}
    change = {"change_percent": -0.25, "change_low_percent": -0.5, "change_high_percent": 0.125}
    bounds = {"largest_score_difference": 0.01, "bounds": {}, "within_bounds": False}
    nobody = {"eer_low_percent": None, "eer_high_percent": None}
    record = {
        "benchmark": "precisions",
        "date": "2026-01-01",
        "machine": RECORD["machine"],
        "model": {"name": "some_model", "config": {"channels": 128}},
        "lists": {"a.txt": {"modules": rate, "int8": rate | change | bounds}, "b.txt": {"modules": rate | nobody}},
    }
    folder = tmp_path / "some-machine"
    folder.mkdir()
    (folder / "precisions.json").write_text(json.dumps(record))
    lines = report.page(tmp_path).splitlines()
    assert any("`some_model`, ECAPA-TDNN of 128 channels" in line for line in lines)
    assert "| a.txt | modules | 5.00 (1.00 to 9.00) | 0.5000 |  |  | 1.000000 |  |" in lines
    changed = "-0.25 (-0.50 to +0.12) | 1.0e-02 | 1.000000 | no |"
    assert f"| a.txt | int8 | 5.00 (1.00 to 9.00) | 0.5000 | {changed}" in lines
    assert "| b.txt | modules | 5.00 | 0.5000 |  |  | 1.000000 |  |" in lines
