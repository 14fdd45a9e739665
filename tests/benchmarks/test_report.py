"""The generated page is the one that the committed results give."""

from __future__ import annotations

from benchmarks import report


def test_benchmarks_page_is_current():
    assert report.PAGE.read_text() == report.page(report.RESULTS)
