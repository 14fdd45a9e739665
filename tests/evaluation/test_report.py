"""The report: one file that needs nothing else, escapes what it is given and can be parsed."""

import base64
import re
from html.parser import HTMLParser

import pytest

from spkfast.errors import InputError
from spkfast.evaluation.plots import loss_curve
from spkfast.evaluation.report import shown_rates, write_report

VOID = {"meta", "img"}


class Page(HTMLParser):
    """Tags balanced, text per cell, attributes of images."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.cells, self.images, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.images.append(dict(attrs))
        if tag in ("td", "th"):
            self.cells.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


@pytest.fixture
def page(tmp_path):
    rows = [
        {"system": "untrained", "EER %": "34.10"},
        {"system": "fast <b>", "EER %": 7.26149, "speed": 12345, "gap": None},
    ]
    path = write_report(
        tmp_path / "new" / "report.html",
        title="A & B",
        notes=["The data is synthetic.", "<script>alert(1)</script>"],
        summary={"speakers": 104, "median \"x\"": 0.123456},
        table=rows,
        figures={"Loss <1>": loss_curve([1, 2], [3.0, 1.0])},
    )  # fmt: skip
    return path.read_text(encoding="utf-8")


def test_table_holds_every_row_with_dashes_for_what_is_missing(page):
    cells = Page(page).cells
    assert cells == [
        "system", "EER %", "speed", "gap",
        "untrained", "34.10", "-", "-",
        "fast <b>", "7.261", "12,345", "-",
    ]  # fmt: skip


def test_text_is_escaped(page):
    parsed = Page(page)
    assert "<script" not in page and "<b>" not in page
    for text in ("A & B", "The data is synthetic.", "<script>alert(1)</script>", 'median "x"', "0.1235", "Loss <1>"):
        assert text in parsed.text


def test_file_needs_nothing_else(page):
    (image,) = Page(page).images
    kind, data = image["src"].split(",")
    assert kind == "data:image/png;base64" and base64.b64decode(data).startswith(b"\x89PNG")
    assert image["alt"] == "Loss <1>"
    rest = page.replace(image["src"], "")
    assert not re.search(r"https?:|//|url\(|@import|<link|<script", rest)
    assert "prefers-color-scheme: dark" in rest


def test_report_of_a_title_alone_and_a_second_one_over_it(tmp_path):
    path = tmp_path / "report.html"
    write_report(path, title="first")
    assert write_report(path, title="second") == path
    text = path.read_text()
    assert "<h1>second</h1>" in text and not re.search("<table|<figure|class=", text)
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_the_table_has_the_heading_that_it_is_given(page, tmp_path):
    assert "<h2>Accuracy and speed</h2>" in page
    path = write_report(tmp_path / "other.html", title="x", table=[{"a": 1}], table_title="Rates <1>")
    assert "<h2>Rates &lt;1&gt;</h2>" in path.read_text() and "Accuracy" not in path.read_text()


def test_settings_are_a_folded_table(tmp_path):
    path = write_report(tmp_path / "report.html", title="x", settings={"loss.margin": "0.2", "a<b": None})
    text = path.read_text()
    assert Page(text).cells == ["setting", "value", "loss.margin", "0.2", "a<b", "-"]
    assert re.search(r"<details><summary>Settings</summary>.*</details>", text, re.DOTALL)


def test_rates_for_people():
    row = {"eer_percent": 4.217, "eer_low_percent": 3.5, "eer_high_percent": 5.128, "min_dcf": 0.25}
    assert list(shown_rates(row).values()) == ["4.22", "3.50 to 5.13", "0.2500"]
    assert list(shown_rates({**row, "eer_low_percent": None, "eer_high_percent": None}).values())[1] == "-"
    assert set(shown_rates(dict.fromkeys(row)).values()) == {"-"}


def test_a_folder_is_no_report(tmp_path):
    with pytest.raises(InputError, match="is a folder"):
        write_report(tmp_path, title="x")
