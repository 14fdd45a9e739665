"""Choosing a command, and how every kind of trouble ends."""

import os
import subprocess
import sys

import pytest

import spkfast as package
from spkfast.cli import info
from spkfast.errors import InputError


def test_help_lists_every_command(spkfast):
    status, out, err = spkfast("--help")
    assert status == 0 and not err
    for command in ("info", "demo", "train", "embed", "verify", "evaluate", "calibrate"):
        assert f"\n  {command} " in out
    assert spkfast("--version").out == f"spkfast {package.__version__}\n"


@pytest.mark.parametrize("command", ["info", "demo", "embed", "verify", "evaluate", "calibrate"])
def test_help_of_a_command(spkfast, command):
    status, out, _ = spkfast(command, "--help")
    assert status == 0 and out.startswith(f"usage: spkfast {command}")


def test_help_does_not_load_torch():
    program = (
        "import sys; from spkfast.cli.main import main; "
        "assert [main(a) for a in (['--help'], ['embed', '--help'], ['calibrate', '--help'])] == [0, 0, 0]; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "spkfast: error: name a command: "),
        (["embd"], "spkfast: error: unknown command 'embd' (did you mean 'embed'?)"),
        (["--hepl"], "spkfast: error: unknown option '--hepl' (did you mean '--help'?)"),
        (["common"], "spkfast: error: unknown command 'common'"),
        (
            ["verify", "a", "b", "--modle", "m"],
            "spkfast verify: error: unknown option --modle (did you mean '--model'?)",
        ),
        (["verify", "a", "b"], "spkfast verify: error: the following arguments are required: --model"),
        (["info", "--json=yes"], "spkfast info: error: argument --json: ignored explicit argument 'yes'"),
        (
            ["evaluate", "--method", "best"],
            "spkfast evaluate: error: argument --method: invalid choice: 'best'",
        ),
        (
            ["embed", "a", "--model", "m", "--out", "x.npz", "--batch-seconds", "-1"],
            "spkfast embed: error: argument --batch-seconds: must be positive, got -1",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage(spkfast, arguments, error):
    assert spkfast(*arguments).error.startswith(error)


@pytest.mark.parametrize(
    ("trouble", "status", "line"),
    [
        (InputError("x.wav: no\nsuch file"), 2, "spkfast info: error: x.wav: no such file\n"),
        (PermissionError(13, "Permission denied", "/x"), 2, "spkfast info: error: /x: Permission denied\n"),
        (OSError(28, "No space left on device"), 2, "spkfast info: error: No space left on device\n"),
        (ModuleNotFoundError("no", name="soundfile"), 2, "spkfast info: error: needs the package 'soundfile': pip"),
        (KeyboardInterrupt(), 130, "spkfast info: error: interrupted\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_trouble_is_one_line(spkfast, monkeypatch, trouble, status, line):
    def fail(argv):
        raise trouble

    monkeypatch.setattr(info, "main", fail)
    outcome = spkfast("info")
    assert outcome.status == status
    assert outcome.err.startswith(line) and outcome.err.count("\n") == 1


def test_defects_are_not_hidden(spkfast, monkeypatch):
    def fail(argv):
        raise ZeroDivisionError

    monkeypatch.setattr(info, "main", fail)
    with pytest.raises(ZeroDivisionError):
        spkfast("info")


def test_as_a_program(tmp_path):
    missing = tmp_path / "none.wav"
    command = [sys.executable, "-m", "spkfast", "embed", str(missing), "--model", str(tmp_path), "--out", "x.npz"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2 and not run.stdout
    words = f"spkfast embed: error: {tmp_path}: not a model folder: holds no config.yaml with model.safetensors"
    assert run.stderr.startswith(words) and run.stderr.count("\n") == 1


def test_reader_that_leaves_early():
    read, write = os.pipe()
    os.close(read)
    run = subprocess.run([sys.executable, "-m", "spkfast", "--help"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert run.returncode == 1 and run.stderr == ""
