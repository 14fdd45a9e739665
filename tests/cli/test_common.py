"""What the commands share: progress, printing, bad files."""

import json
import sys

import pytest

from spkfast.cli import common
from spkfast.cli.common import BadFiles, meter, print_result, progress
from spkfast.errors import InputError


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
