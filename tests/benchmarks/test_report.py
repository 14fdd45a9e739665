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
