"""The generated page is the one that the committed results give, and says what the records say."""

from __future__ import annotations

import json

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


def test_benchmarks_page_is_current():
    assert report.PAGE.read_text() == report.page(report.RESULTS)


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
