"""The command ``bench``: finds the checkout, passes arguments and exit status on, and leaves nothing running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spkfast.cli import bench


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout whose benchmarks are a program that a test writes."""

    def make(program):
        (tmp_path / "benchmarks").mkdir()
        (tmp_path / "benchmarks" / "__main__.py").write_text(program)
        monkeypatch.setattr(bench, "_checkout", lambda: tmp_path)
        return tmp_path

    return make


def test_arguments_and_status_are_passed_on(checkout, capfd, tmp_path, monkeypatch):
    root = checkout("import os, sys; print(sys.argv[1:], os.getcwd()); sys.exit(3)")
    (tmp_path / "elsewhere" / "benchmarks").mkdir(parents=True)
    (tmp_path / "elsewhere" / "benchmarks" / "__main__.py").write_text("raise SystemExit('another project')")
    monkeypatch.chdir(tmp_path / "elsewhere")
    arguments = ["ops", "--only", "a", "b", "--quick", "--out", "here", "--json", "--", "--repeats", "3"]
    assert bench.main(arguments) == 3
    assert capfd.readouterr().out == f"{arguments} {root / 'elsewhere'}\n"


def test_end_by_a_signal_is_a_status_of_shells(checkout):
    checkout("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert bench.main([]) == 128 + signal.SIGKILL


def test_without_a_checkout(spkfast, tmp_path, monkeypatch):
    monkeypatch.setattr(bench.spkfast, "__file__", str(tmp_path / "site-packages" / "spkfast" / "__init__.py"))
    line = spkfast("bench", "ops").error
    assert line.startswith(f"spkfast bench: error: {tmp_path / 'site-packages'} has no benchmarks")
    assert "get the source, run 'make setup' in it" in line


def test_the_checkout_of_the_tests_is_found():
    assert bench._checkout() == Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["op"], "spkfast bench: error: argument group: invalid choice: 'op'"),
        (["--onyl", "x"], "spkfast bench: error: unknown option --onyl (did you mean '--only'?)"),
    ],
)
def test_wrong_usage(spkfast, arguments, error):
    assert spkfast("bench", *arguments).error.startswith(error)


def test_interruption_ends_the_benchmarks(checkout, tmp_path):
    root = checkout(
        "import os, time; from pathlib import Path\n"
        "Path('pid.new').write_text(str(os.getpid())); Path('pid.new').rename('pid'); time.sleep(600)"
    )
    program = (
        "import signal, sys; from pathlib import Path; from spkfast.cli import bench, main\n"
        # Where the test run itself ignores interrupts, as one in the background does, so would this.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"bench._checkout = lambda: Path({str(root)!r}); sys.exit(main.main(['bench']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "pid").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        child = int((tmp_path / "pid").read_text())
        process.send_signal(signal.SIGINT)  # not its child, as a terminal would
        assert process.communicate(timeout=60)[1] == "spkfast bench: error: interrupted\n"
        assert process.returncode == 130
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
