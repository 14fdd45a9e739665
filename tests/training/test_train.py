"""Training from the command line: resuming after a kill, bad files, bad configs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

from spkfast.cli.main import main
from spkfast.data.lists import read_train_list
from spkfast.training.loop import read_log
from tests.training.corpus import TINY, make_tones


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = make_tones(tmp_path_factory.mktemp("tones"))
    (folder / "tiny.yaml").write_text(TINY)
    return folder


def arguments(corpus, out, *more):
    """A run that uses all that is random: speeds, noise, room responses, balanced draws, and a reading process."""
    return [
        str(corpus / "tiny.yaml"), "--out", str(out), "--data.train_list", str(corpus / "train_list.txt"),
        "--data.noise", str(corpus / "spk0"), "--data.rir", str(corpus / "spk1"), *more,
    ]  # fmt: skip


def weights(out):
    """Every tensor of a trained model to the last bit."""
    tensors = load_file(out / "model" / "model.safetensors")
    return {name: value.numpy().tobytes() for name, value in tensors.items()}


def timeless(log):
    """Entries of a log without what a clock measured."""
    measured = {"crops_per_second", "loader_wait", "device_busy", "seconds"}
    return [{name: value for name, value in entry.items() if name not in measured} for entry in log]


@pytest.fixture(scope="module")
def unbroken(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "unbroken"
    assert main(["train", *arguments(corpus, out, "--json")]) == 0
    return out


def test_learns_and_leaves_a_model_a_log_and_a_checkpoint(unbroken):
    log = read_log(unbroken)
    assert [entry["step"] for entry in log] == [5, 10, 15, 20, 25, 30]
    assert log[-1]["loss"] < log[0]["loss"]
    assert log[-1]["margin"] == 0.2 and 0 <= log[-1]["accuracy"] <= 1
    assert [path.name for path in (unbroken / "checkpoints").iterdir()] == ["step_00000030"]
    assert list(unbroken.glob("**/events.out.tfevents*"))


def test_killed_and_resumed_run_equals_the_unbroken_one(corpus, unbroken, tmp_path):
    """kill -9 at some step after the tenth, then --resume: the weights agree to the last bit."""
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "spkfast", "train", *arguments(corpus, out, "--checkpoint_minutes", "0")]
    # A pause after each checkpoint would hide a half-written one, so nothing slows the run down.
    run = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not any(int(path.name[5:]) >= 10 for path in (out / "checkpoints").glob("step_*")):
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    assert not (out / "model").exists()
    assert main(["train", *arguments(corpus, out)]) == 2  # a folder with checkpoints wants --resume
    assert subprocess.run([*command, "--resume"], capture_output=True, check=False).returncode == 0
    assert weights(out) == weights(unbroken)
    assert timeless(read_log(out)) == timeless(read_log(unbroken))


def test_reading_in_other_processes_changes_nothing(corpus, unbroken, tmp_path):
    for workers in ("0", "2"):
        assert main(["train", *arguments(corpus, tmp_path / workers, "--data.workers", workers)]) == 0
        assert weights(tmp_path / workers) == weights(unbroken)


def test_mixed_precision_learns(corpus, tmp_path):
    assert main(["train", *arguments(corpus, tmp_path / "run", "--precision", "bf16")]) == 0
    log = read_log(tmp_path / "run")
    assert log[-1]["loss"] < log[0]["loss"]


@pytest.mark.full
def test_two_processes_train_together(corpus, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "spkfast"]
    command = [
        *launcher,
        "train",
        *arguments(corpus, tmp_path / "run", "--batch_size", "4", "--checkpoint_minutes", "0.001"),
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    log = read_log(tmp_path / "run")
    assert [entry["step"] for entry in log] == [5, 10, 15, 20, 25, 30] and log[-1]["loss"] < log[0]["loss"]
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_resume_refuses_other_settings_and_other_versions(corpus, unbroken, tmp_path, capsys):
    def failure(*more):
        assert main(["train", *arguments(corpus, unbroken, "--resume", *more)]) == 2
        return one_line(capsys)

    assert "was trained with steps=30" in failure("--steps", "40")
    lines = (corpus / "train_list.txt").read_text().splitlines()
    (corpus / "other.txt").write_text("\n".join(lines[:-1]))
    assert "contents of the data" in failure("--data.train_list", str(corpus / "other.txt"))
    assert "contents of the data" in failure("--data.noise", str(corpus / "spk2"))
    checkpoint = unbroken / "checkpoints" / "step_00000030"
    version = json.dumps({**json.loads((checkpoint / "run.json").read_text()), "format_version": 99}).encode()
    for name, content, words in (
        ("run.json", version, "format version 99"),
        ("run.json", b"{", "not a whole checkpoint"),
        ("state.pt", None, "cannot be restored"),
        ("process_00000.pt", None, "cannot be restored"),
    ):
        whole = (checkpoint / name).read_bytes()
        try:
            (checkpoint / name).write_bytes(whole[: len(whole) // 2] if content is None else content)
            assert words in failure()
        finally:
            (checkpoint / name).write_bytes(whole)


def test_bad_files_are_named_and_counted_and_strict_ends_the_run(tmp_path, capsys):
    corpus = make_tones(tmp_path)
    (corpus / "tiny.yaml").write_text(TINY)
    (corpus / "spk3" / "s" / "0.wav").write_bytes(b"RIFF nonsense")
    os.remove(corpus / "spk2" / "s" / "1.wav")
    assert main(["train", *arguments(corpus, tmp_path / "run", "--steps", "4", "--json")]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["files_skipped"] == 2
    assert "spk3/s/0.wav" in err and "spk2/s/1.wav" in err and "2 of 12 files skipped" in err
    assert main(["train", *arguments(corpus, tmp_path / "strict", "--steps", "4", "--strict")]) == 2
    assert "spk" in one_line(capsys)
    for path in corpus.glob("spk*/s/*.wav"):
        path.write_bytes(b"")
    rooms = make_tones(tmp_path / "others")
    noise, rir = ("--data.noise", str(rooms / "spk0")), ("--data.rir", str(rooms / "spk1"))
    assert main(["train", *arguments(corpus, tmp_path / "none", "--steps", "4", *noise, *rir)]) == 2
    assert "utterances could not be read, 16 in a row" in one_line(capsys)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--batch_sise", "4"], "unknown option --batch_sise (did you mean '--batch_size'?)"),
        (["--data.crop_secods=4"], "did you mean '--data.crop_seconds'?"),
        (["--batch_size", "many"], "batch_size must be a whole number, got 'many'"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--batch_size", "1"], "batch_size must be at least 2"),
        (["--data.workers", "-1"], "data.workers must be at least 0"),
        (["--seed", "-1"], "seed must be at least 0"),
        (["--keep_checkpoints", "0"], "keep_checkpoints must be at least 1"),
        (["--loss.margin_start", "90 %"], "loss.margin_start"),
        (["--data.augment.recipe", "espnt"], "unknown recipe of augmentation 'espnt' (did you mean 'espnet'?)"),
        (["--data.augment.options", "{speed: [1.0]}"], "unknown option 'speed'"),
        (
            ["--data.augment.recipe", "none"],
            "data.noise is given, but data.augment.recipe=none uses none; leave it out by --data.noise null "
            "--data.rir null",
        ),
        (["--data.noise", ""], "data.noise must not be empty, give null for none"),
        (["--steps", "6.5"], "steps must be a number of steps or 'N epochs', and at least 0, got 6.5"),
        (["--steps", "abc"], "steps must be a number of steps or 'N epochs', and at least 0, got 'abc'"),
        (["--data.augment.spec_augment", "{max_frame: 3}"], "unknown option 'max_frame'"),
        (["--data.augment.spec_augment", "{max_frames: -3}"], "data.augment.spec_augment: max_frames must be a count"),
        (["--data.sampler", "balanc"], "unknown sampler 'balanc' (did you mean 'balanced'?)"),
        (["--data.sampler_options", "{n: 3}"], "unknown option 'n' of sampler balanced"),
        (["--seed", "99999999999999999999"], "at most 4294967295, got 99999999999999999999"),
        (["--data.augment.options", "{speeds: [1.0, 1.0]}"], "speeds must be different ones"),
        (["--loss.scale", "0"], "loss.scale must be positive"),
        (["--data.augment.options", "{speeds: []}"], "speeds must be factors"),
        (["--data.crop_seconds", "0.01"], "data.crop_seconds=0.01 is shorter than one frame"),
        (["--model.options.channels", "abc"], "channels must be a positive integer"),
        (["--model.options.channels", "0"], "channels must be a positive integer, got 0"),
        (["--model.options.kernel_sizes", "[4, 3, 3, 3]"], "kernel_sizes must be odd"),
        (["--model.name", "ecapa"], "unknown model 'ecapa' (did you mean 'ecapa_tdnn'?)"),
        (["--model.options.chanels", "8"], "unknown option 'chanels' of model ecapa_tdnn (did you mean 'channels'?)"),
        (["--frontend.preset", "wespeker"], "unknown front-end preset 'wespeker'"),
        (["--data.train_list", "/nowhere/list.txt"], "/nowhere/list.txt: no such file or folder"),
        (["--data.noise", "/nowhere"], "/nowhere: no such folder"),
        (["--optimizer.lr", "1e30", "--schedule.warmup", "0"], "the loss became"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_settings_are_one_line(corpus, tmp_path, capsys, more, words):
    assert main(["train", *arguments(corpus, tmp_path / "run", *more)]) == 2
    assert words in one_line(capsys)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stepz: 4\n", "unknown key 'stepz' (did you mean 'steps'?)"),
        ("optimizer: {learning_rate: 4}\n", "unknown key 'optimizer.learning_rate' (did you mean 'optimizer.lr'?)"),
        ("- 1\n", "must hold keys and values"),
        ("steps: [\n", "not a YAML file"),
    ],
)
def test_bad_config_file(corpus, tmp_path, capsys, text, words):
    (tmp_path / "c.yaml").write_text(text)
    assert main(["train", str(tmp_path / "c.yaml"), "--data.train_list", str(corpus / "train_list.txt")]) == 2
    line = one_line(capsys)
    assert words in line and "c.yaml" in line
    assert main(["train", str(tmp_path / "missing.yaml")]) == 2
    assert "missing.yaml: no such config file" in one_line(capsys)


def test_help_lists_every_option_of_the_usage_line(capsys):
    assert main(["train", "--help"]) == 0
    usage, options = capsys.readouterr().out.split("options:\n")
    for option in ("--resume", "--strict", "--json"):
        assert f"[{option}]" in usage and f"\n  {option} " in options
    assert "docs/schedules.md has" in " ".join(options.split())


def test_a_path_that_is_right_from_the_folder_of_the_config_is_told(corpus, tmp_path, capsys, monkeypatch):
    (tmp_path / "c.yaml").write_text("data: {train_list: train_list.txt}\n")
    monkeypatch.chdir(corpus.parent)
    (tmp_path / "train_list.txt").write_text("spk0 a.wav\n")
    assert main(["train", str(tmp_path / "c.yaml")]) == 2
    assert one_line(capsys).endswith(
        "data.train_list: train_list.txt: no such file or folder: relative paths start from the working folder, not "
        f"from that of {tmp_path}/c.yaml; there it is {tmp_path}/train_list.txt"
    )


def test_paths_of_a_list_that_start_elsewhere_are_told_with_the_option_for_it(corpus, tmp_path, capsys):
    (tmp_path / "list.txt").write_text((corpus / "train_list.txt").read_text())
    assert main(["train", *arguments(corpus, tmp_path / "run", "--data.train_list", str(tmp_path / "list.txt"))]) == 2
    first = capsys.readouterr().err.splitlines()[0]
    assert f"no such file; relative paths start from {tmp_path}/, another folder is given as root (--data.root" in first


def test_list_errors_name_file_and_line(corpus, tmp_path, capsys):
    (tmp_path / "train_list.txt").write_text("spk0 a.wav\nspk1 b.wav c.wav\n")
    assert (
        main(["train", *arguments(corpus, tmp_path / "run", "--data.train_list", str(tmp_path / "train_list.txt"))])
        == 2
    )
    assert "train_list.txt:2: expected 2 columns 'speaker path', got 3" in one_line(capsys)
    assert len(read_train_list(corpus / "train_list.txt")) == 12


def one_line(capsys) -> str:
    """The one line on standard error."""
    # Beside it, what there is to say of the data: the responses of this corpus are longer than a crop.
    lines = [line for line in capsys.readouterr().err.splitlines() if "impulse responses are longer" not in line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("spkfast train: error: ")
    return lines[0]
