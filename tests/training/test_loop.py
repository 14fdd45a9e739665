"""The loop: parts of a batch, processes, precisions, averages, validation, fine-tuning, and what may go wrong."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import distributed

from spkfast import SpeakerEncoder
from spkfast.cli.train import _stopping, main, parse
from spkfast.errors import InputError
from spkfast.training.best import taken_validation
from spkfast.training.config import TrainConfig, fine_tuned
from spkfast.training.lock import locked
from spkfast.training.log import VALIDATION, mean_rate, read_log
from spkfast.training.loop import Trainer
from tests.training.corpus import TINY, make_tones

NETWORK = {"channels": 16, "mfa_channels": 24, "embedding_dim": 12, "attention_channels": 8, "se_channels": 8}
# Everything that has a state: averages, validation on speakers held out, a schedule with cycles, a margin that grows.
FULL = f"""
{TINY}
averaging: {{name: ema, decay: 0.9}}
validation: {{held_out: 2, every: 6, keep: 2, take: best}}
"""


@pytest.fixture(autouse=True)
def _heeds_interrupts():
    """As a command in a terminal: what is started in the background ignores them, and so do its children."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = make_tones(tmp_path_factory.mktemp("tones"), speakers=6)
    (folder / "full.yaml").write_text(FULL)
    return folder


def config(corpus: Path, out: Path, **changes) -> TrainConfig:
    """A run without anything random in its network; a name with a dot is one of a section."""
    made = TrainConfig(out=str(out), steps=12, batch_size=8, log_steps=3)
    made.model.options = dict(NETWORK)
    made.data = dataclasses.replace(
        made.data, train_list=str(corpus / "train_list.txt"), crop_seconds=0.5, sampler="balanced", workers=0
    )
    made.optimizer.lr = 0.05
    for name, value in changes.items():
        section, _, field = name.rpartition("__")
        setattr(getattr(made, section) if section else made, field, value)
    return made


def trained(made: TrainConfig, warnings: list[str] | None = None) -> Trainer:
    trainer = Trainer(made, warn=[].append if warnings is None else warnings.append)
    for _ in trainer.run():
        pass
    return trainer


def model(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def losses(out: Path) -> list[float]:
    return [entry["loss"] for entry in read_log(out)]


def test_a_batch_in_parts_is_one_step(corpus, tmp_path):
    """Without batch norm between the rows, parts of a batch give the gradient of the whole."""
    whole, parts = (tmp_path / name for name in ("whole", "parts"))
    frozen = {"averaging__name": "none", "optimizer__clip_grad_norm": 1.0, "steps": 4, "log_steps": 1}
    for out, rows, accumulate in ((whole, 8, 1), (parts, 2, 4)):
        trainer = Trainer(config(corpus, out, batch_size=rows, accumulate=accumulate, **frozen))
        for part in trainer._task.modules():
            if isinstance(part, torch.nn.BatchNorm1d):
                part.eval()  # statistics that do not depend on the batch
        trainer._wrapped.train = lambda: None
        for _ in trainer.run():
            pass
    assert losses(whole) == pytest.approx(losses(parts), rel=1e-5)
    for name, value in model(whole).items():
        torch.testing.assert_close(model(parts)[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_fp16_scales_its_gradients_and_passes_over_steps_that_overflow(corpus, tmp_path):
    trainer = Trainer(config(corpus, tmp_path / "run", precision="fp16", steps=30))
    assert trainer._scaler.is_enabled()
    trainer._scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    norms = []
    read = trainer._read
    trainer._read = lambda launched: norms.append(launched.numbers[3].item()) or read(launched)
    for _ in trainer.run():
        pass
    assert not math.isfinite(norms[0]) and math.isfinite(norms[-1])
    assert trainer._scaler.get_scale() < 2.0**20
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]


def test_averaged_weights_are_what_is_saved(corpus, tmp_path):
    """``last``: the mean of the weights of two runs that end where the snapshots are taken."""
    constant = {"schedule__name": "constant", "schedule__warmup": 0, "loss__margin_end": 0}
    for steps in (8, 12):
        trained(config(corpus, tmp_path / str(steps), steps=steps, **constant))
    snapshots = {"averaging__name": "last", "averaging__snapshots": 2, "averaging__every": 4}
    trained(config(corpus, tmp_path / "average", **constant, **snapshots))
    first, last = model(tmp_path / "8"), model(tmp_path / "12")
    for name, value in model(tmp_path / "average").items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (first[name] + last[name]) / 2, rtol=1e-5, atol=1e-6, msg=name)
    assert not torch.equal(first["encoder.stem.conv.weight"], last["encoder.stem.conv.weight"])


def test_validates_keeps_the_best_and_sets_a_threshold(corpus, tmp_path):
    out = tmp_path / "run"
    made = config(corpus, out, validation__held_out=2, validation__every=4, validation__keep=2)
    trainer = trained(made)
    assert len(trainer.dataset) == 12  # of 18 utterances of 6 speakers
    entries = read_log(out, VALIDATION)
    assert [entry["step"] for entry in entries] == [4, 8, 12]
    ranked = sorted(entries, key=lambda entry: (entry["mean_eer_percent"], entry["step"]))
    assert {path.name for path in (out / "best").glob("step_*")} == {f"step_{e['step']:08d}" for e in ranked[:2]}
    encoder = SpeakerEncoder.load(out)
    assert encoder.threshold.list == "held_out"
    assert encoder.threshold.value == pytest.approx(entries[-1]["lists"]["held_out"]["threshold"])
    run = json.loads((out / "config.json").read_text())["run"]
    assert run["speakers"] == 4 and len(run["held_out_speakers"]) == 2

    best = tmp_path / "best"
    trained(dataclasses.replace(made, out=str(best), validation=dataclasses.replace(made.validation, take="best")))
    place = out / "best" / f"step_{ranked[0]['step']:08d}"
    assert ranked[0]["step"] < 12  # not the last one
    assert all(map(torch.equal, model(best).values(), load_file(place / "model.safetensors").values()))
    heads = [load_file(folder / "head.safetensors")["weight"] for folder in (best, place, out)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_who_takes_the_encoder_meanwhile_changes_nothing(corpus, tmp_path):
    trained(config(corpus, tmp_path / "run"))
    trainer = Trainer(config(corpus, tmp_path / "watched"))
    for _ in trainer.run():
        assert not trainer.encoder.model.training
    assert all(map(torch.equal, model(tmp_path / "run").values(), model(tmp_path / "watched").values()))


def test_random_numbers_of_a_network_go_on_where_they_were(corpus, tmp_path):
    """As of dropout; a reading process is given its seed from the same numbers."""

    def dropout(module, inputs, output):
        return torch.nn.functional.dropout(output, 0.3, module.training)

    def run(out: Path, end: int | None = None, **changes) -> None:
        made = config(corpus, out, checkpoint_minutes=0, data__workers=1, **changes)
        trainer = Trainer(made)
        trainer._task.net.register_forward_hook(dropout)
        for progress in trainer.run():
            if progress.step == end:
                break

    run(tmp_path / "whole")
    run(tmp_path / "parts", 7)
    run(tmp_path / "parts", resume=True)
    assert all(map(torch.equal, model(tmp_path / "whole").values(), model(tmp_path / "parts").values()))


def test_fine_tuning_starts_from_the_first_run_and_drops_its_copies_at_other_speeds(corpus, tmp_path):
    out = tmp_path / "run"
    made = config(corpus, out, steps=6)
    made.data.augment.options = {"speeds": [1.0, 0.9, 1.1]}
    made.fine_tuning = {
        "steps": 3,
        "data": {"crop_seconds": 0.8, "augment": {"options": {"speeds": [1.0]}}},
        "loss": {"margin": 0.5, "margin_start": 0, "margin_end": 0},
        "optimizer": {"lr": 0.0},
        "schedule": {"final_lr": 0.0, "name": "constant", "warmup": 0},
    }
    first = trained(made)
    second_config = fine_tuned(made)
    assert second_config.data.train_list == made.data.train_list and second_config.fine_tuning is None
    warnings: list[str] = []
    second = trained(second_config, warnings)
    assert second.folder == out / "fine_tuning"
    assert any("6 of its 18 classes; 0 are new" in line for line in warnings)
    # At a learning rate of 0 the parameters are those of the first run.
    before, after = model(out), model(out / "fine_tuning")
    assert all(
        torch.equal(before[name], after[name]) for name in before if "running" not in name and "num_b" not in name
    )
    assert torch.equal(second._task.head.weight, first._task.head.weight[:6])
    assert second._task.head.margin == 0.5
    assert not any(torch.equal(before[name], after[name]) for name in before if "running_mean" in name)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data": {"crop_seconds": 0.01}}, "shorter than one frame"),
        ({"loss": {"margin_end": "2 weeks"}}, "loss.margin_end must be"),
        ({"averaging": {"name": "last", "every": 0}}, "averaging.every"),
        ({"model": {"options": {"channels": 32}}}, "model must be that of the run"),
        ({"frontend": {"preset": "taoruijie"}}, "frontend must be that of the run"),
        ({"loss": {"num_subcenters": 2}}, "num_subcenters must be such"),
    ],
)
def test_what_a_second_run_is_given_is_seen_before_the_first(corpus, tmp_path, changes, message):
    made = config(corpus, tmp_path / "run", fine_tuning=changes)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(dataclasses.asdict(made) | {"optimizer": {"lr": 0.05}}))
    with pytest.raises(InputError, match=f"^fine_tuning: .*{message}"):
        main([str(file)])
    assert not (tmp_path / "run").exists()


def test_an_error_of_the_first_run_is_not_told_as_the_second_s(corpus, tmp_path):
    made = config(corpus, tmp_path / "run", fine_tuning={"steps": 2})
    made.data.train_list = str(tmp_path / "none.txt")
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(dataclasses.asdict(made) | {"optimizer": {"lr": 0.05}}))
    with pytest.raises(InputError, match=r"^(?!fine_tuning).*none\.txt: no such file"):
        main([str(file)])


def test_a_second_run_goes_on_without_the_checkpoints_of_the_first(corpus, tmp_path, capsys):
    made = config(corpus, tmp_path / "run", steps=3, fine_tuning={"steps": 6, "schedule": {"warmup": 0}})
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(dataclasses.asdict(made) | {"optimizer": {"lr": 0.05}}))
    main([str(file)])
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    shutil.rmtree(tmp_path / "run" / "fine_tuning" / "model")
    main([str(file), "--resume"])
    assert "going on after step 6" in capsys.readouterr().err
    assert (tmp_path / "run" / "fine_tuning" / "model").is_dir()


def test_trains_without_tensorboard(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.utils.is_tensorboard_available", lambda: False)
    trained(config(corpus, tmp_path / "run", steps=2))
    assert not (tmp_path / "run" / "tensorboard").exists() and (tmp_path / "run" / "model").is_dir()


def test_where_no_best_model_could_be_written_the_rate_is_that_of_the_last(corpus, tmp_path):
    out = tmp_path / "run"
    trained(config(corpus, out, validation__held_out=2, validation__every=4, validation__take="best"))
    entries = read_log(out, VALIDATION)
    best = min(entries, key=lambda entry: (entry["mean_eer_percent"], entry["step"]))
    assert best != entries[-1]
    assert taken_validation(out, "best") == best and taken_validation(out, "last") == entries[-1]
    shutil.rmtree(out / "best")
    assert taken_validation(out, "best") == entries[-1]


def test_a_finished_run_is_not_written_over(corpus, tmp_path):
    out = tmp_path / "run"
    trained(config(corpus, out, steps=3))
    shutil.rmtree(out / "checkpoints")
    with pytest.raises(InputError, match=r"holds the model of an earlier run; choose another --out"):
        Trainer(config(corpus, out, steps=3))
    with pytest.raises(InputError, match=r"none of its checkpoints"):
        Trainer(config(corpus, out, steps=3, resume=True))
    assert read_log(out)


def cut_off(made: TrainConfig, step: int) -> None:
    for progress in Trainer(made).run():
        if progress.step == step:
            break


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_that_was_cut_off_before_its_first_checkpoint_is_not_written_over(corpus, tmp_path):
    out = tmp_path / "run"
    made = config(corpus, out, validation__held_out=2, validation__every=4)
    cut_off(made, 2)
    cut_off(made, 7)  # nothing was lost by that
    before = contents(out)
    with pytest.raises(
        InputError,
        match=r"run: holds log.jsonl, validation.jsonl, best/ of an earlier run; resume it with --resume or choose",
    ):
        Trainer(made)
    with pytest.raises(
        InputError,
        match=r"run/config.json: was trained with optimizer.lr=0.05, the config has 0.1; resume with the same",
    ):
        Trainer(config(corpus, out, validation__held_out=2, validation__every=4, optimizer__lr=0.1, resume=True))
    assert contents(out) == before
    trained(dataclasses.replace(made, resume=True))
    trained(dataclasses.replace(made, out=str(tmp_path / "whole")))
    assert all(map(torch.equal, model(out).values(), model(tmp_path / "whole").values()))
    assert losses(out) == losses(tmp_path / "whole")
    assert len(list((out / "tensorboard").iterdir())) == 1


def test_settings_that_cannot_be_read_are_not_taken_for_the_same(corpus, tmp_path):
    cut_off(config(corpus, tmp_path / "run"), 4)
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config.json: cannot be read .*; choose another --out"):
        Trainer(config(corpus, tmp_path / "run", resume=True))


def test_a_second_run_in_the_folder_is_refused_before_it_writes(corpus, tmp_path):
    out = tmp_path / "run"
    made = config(corpus, out, data__workers=1)
    first, second, other = Trainer(made), Trainer(made), Trainer(config(corpus, tmp_path / "other"))
    running = first.run()
    next(running)
    next(other.run())
    before = contents(out)
    with pytest.raises(InputError, match=r"run: another run is writing there"):
        next(second.run())
    assert contents(out) == before
    running.close()
    assert next(second.run()).step == 1


def test_held_out_speakers_that_the_network_to_start_from_knows_are_told(corpus, tmp_path):
    def told(**changes) -> list[str]:
        lines: list[str] = []
        Trainer(config(corpus, tmp_path / "new", validation__held_out=2, **changes), warn=lines.append)
        return [line for line in lines if line.startswith("held_out")]

    trained(config(corpus, tmp_path / "all", steps=3))
    (line,) = told(init_from=str(tmp_path / "all"))
    assert "held_out: 2 of the 2 speakers of its trials were trained on in" in line and "the first is 'spk" in line
    made = config(corpus, tmp_path / "run", steps=3, validation__held_out=2)
    made.fine_tuning = {"validation": {"held_out": 3}}
    trained(made)
    assert told(init_from=str(tmp_path / "run")) == []
    lines: list[str] = []
    Trainer(fine_tuned(made), warn=lines.append)
    assert len([line for line in lines if line.startswith("held_out: 1 of the 3 speakers")]) == 1


def test_its_settings_are_a_config_file(corpus, tmp_path, capsys):
    """Of all kinds: a tuple, lists, None, spans, a path of other letters, a second run."""
    made = config(corpus, tmp_path / "r\u00fcn 1", steps="2 epochs", optimizer__betas=(0.5, 0.9))
    made.schedule.final_lr = 1e-7
    made.data.augment.options = {"speeds": [1.0, 0.9]}
    made.fine_tuning = {"steps": 2, "schedule": {"warmup": 0}, "data": {"augment": {"options": {"speeds": [1.0]}}}}
    cut_off(made, 2)
    file = Path(made.out) / "config.yaml"
    assert parse([str(file)]) == (made, False)
    with pytest.raises(InputError, match="not a model folder"):  # but of one, it would be in a file of this name
        SpeakerEncoder.load(made.out)
    main([str(file), "--resume", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["model"] == str(Path(made.out) / "fine_tuning" / "model")
    assert parse([str(Path(made.out) / "fine_tuning" / "config.yaml")])[0] == fine_tuned(made)
    assert not parse([str(file)])[0].resume
    SpeakerEncoder.load(made.out)


def test_the_rate_that_is_told_is_that_of_the_whole_run(corpus, tmp_path, capsys):
    made = config(corpus, tmp_path / "run", steps=7)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(dataclasses.asdict(made) | {"optimizer": {"lr": 0.05}}))
    main([str(tmp_path / "run.yaml"), "--json"])
    told = json.loads(capsys.readouterr().out)
    log = read_log(tmp_path / "run")
    assert told["crops_per_second"] == pytest.approx(7 * 8 / sum(entry["seconds"] for entry in log))
    assert told["crops_per_second"] == mean_rate(log, "crops_per_second") != log[-1]["crops_per_second"]
    assert told["loss"] == log[-1]["loss"]


@pytest.mark.parametrize("inner", ["", "state.pt"])
def test_a_checkpoint_is_no_model_and_tells_where_it_is(corpus, tmp_path, inner):
    trained(config(corpus, tmp_path / "run", steps=3))
    source = tmp_path / "run" / "checkpoints" / "step_00000003" / inner
    for take in (SpeakerEncoder.load, lambda path: Trainer(config(corpus, tmp_path / "new", init_from=str(path)))):
        with pytest.raises(
            InputError, match=rf"for --resume only; .* in {tmp_path}/run/model once .* {tmp_path}/run/best"
        ):
            take(source)


@pytest.mark.parametrize("source", ["model", "model/model", "model/model/model.safetensors"])
def test_new_speakers_get_new_classes(corpus, tmp_path, source):
    trained(config(corpus, tmp_path / "model", steps=3))
    lines = (corpus / "train_list.txt").read_text().splitlines()
    renamed = [line.replace("spk0 ", "someone ") for line in lines]
    (corpus / "renamed.txt").write_text("\n".join(renamed) + "\n")
    made = config(corpus, tmp_path / "new", steps=3, init_from=str(tmp_path / source))
    made.data.train_list = str(corpus / "renamed.txt")
    warnings: list[str] = []
    new = Trainer(made, warn=warnings.append)
    assert any("5 of its 6 classes; 1 are new" in line for line in warnings)
    old = load_file(tmp_path / "model" / "head.safetensors")["weight"]
    rows = new._task.head.weight.detach()
    assert torch.equal(rows[1:], old[1:]) and new.dataset.num_classes == 6
    assert rows[0].norm() == pytest.approx(float(old.norm(dim=1).mean()), rel=1e-5)


def test_init_from_refuses_another_network_or_front_end(corpus, tmp_path):
    trained(config(corpus, tmp_path / "old", steps=3))
    made = config(corpus, tmp_path / "new", init_from=str(tmp_path / "old"))
    made.model.options["channels"] = 32
    with pytest.raises(InputError, match=r"init_from: the network of .* has channels=.*16.*, the config .*32"):
        Trainer(made)
    made.model.options["channels"] = 16
    made.frontend.preset = "taoruijie"
    with pytest.raises(InputError, match="front-end"):
        Trainer(made)
    made.frontend.preset, made.loss.num_subcenters = "wespeaker", 2
    with pytest.raises(InputError, match="its classes do not fit the loss of this config"):
        Trainer(made)


def test_a_loss_that_is_not_finite_keeps_the_batch(corpus, tmp_path):
    trainer = Trainer(config(corpus, tmp_path / "run"))
    batches = trainer._inputs.batches

    def spoilt():
        for number, batch in enumerate(batches()):
            trainer._task.net.encoder.stem.conv.weight.data.fill_(math.nan if number == 5 else 1e-3)
            kept.append(batch)
            yield batch

    kept: list = []
    trainer._inputs.batches = spoilt
    with pytest.raises(InputError, match=r"the loss became nan at step 6; .* in (\S+\.pt)"):
        for _ in trainer.run():
            pass
    (path,) = (tmp_path / "run").glob("nonfinite_*.pt")
    content = torch.load(path, weights_only=True)
    assert content["step"] == 6 and torch.equal(content["crops"], kept[5].crops)
    assert content["speakers"] == [f"spk{label}" for label in kept[5].labels.tolist()]
    assert not (tmp_path / "run" / "model").exists()


def test_a_checkpoint_of_another_config_is_refused_with_every_difference(corpus, tmp_path):
    trained(config(corpus, tmp_path / "run"))
    other = config(corpus, tmp_path / "run", resume=True, optimizer__lr=0.1, batch_size=4, loss__margin=0.4)
    with pytest.raises(InputError) as raised:
        Trainer(other)
    pairs = (("batch_size", 8, 4), ("loss.margin", 0.2, 0.4), ("optimizer.lr", 0.05, 0.1))
    told = "; with ".join(f"{name}={theirs}, the config has {ours}" for name, theirs, ours in pairs)
    assert f"was trained with {told}; resume with the same settings" in str(raised.value)


def test_a_full_disk_loses_nothing_and_says_so(corpus, tmp_path):
    """Files above a size cannot be written from some step on: training goes on, earlier checkpoints stay whole."""
    out = tmp_path / "run"
    made = config(corpus, out, checkpoint_minutes=0, keep_checkpoints=1)
    warnings: list[str] = []
    trainer = Trainer(made, warn=warnings.append)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    former = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for progress in trainer.run():
            if progress.step == 3:  # its checkpoint is written after this
                continue
            if progress.step == 4:
                assert (out / "checkpoints" / "step_00000003").is_dir()
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
            if progress.step == 11:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, former)
    told = [line for line in warnings if "no checkpoint could be written" in line]
    assert len(told) == 2 and "File too large" in told[0] and "earlier ones are kept" in told[0]
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_00000012"]
    whole = tmp_path / "whole"
    trained(dataclasses.replace(made, out=str(whole)))
    assert all(map(torch.equal, model(out).values(), model(whole).values()))


def test_trackers_that_cannot_be_written_are_left_out(corpus, tmp_path):
    warnings: list[str] = []
    trainer = Trainer(config(corpus, tmp_path / "run"), warn=warnings.append)

    def full(entry, step):
        raise OSError(28, "No space left on device")

    trainer._accelerator.log = full
    for _ in trainer.run():
        pass
    assert any("trackers cannot be written any more" in line for line in warnings)
    assert len(losses(tmp_path / "run")) == 4 and (tmp_path / "run" / "model").is_dir()


def test_a_disk_that_is_full_at_the_end_is_an_error_and_the_run_can_be_resumed(corpus, tmp_path):
    out = tmp_path / "run"
    made = config(corpus, out, checkpoint_minutes=0, keep_checkpoints=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    former = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(InputError, match=r"the last checkpoint could not be written .* free space, --resume"):
            for progress in Trainer(made).run():
                if progress.step == 11:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, former)
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == ["step_00000006", "step_00000009"]
    trained(dataclasses.replace(made, resume=True))
    trained(dataclasses.replace(made, out=str(tmp_path / "whole")))
    assert all(map(torch.equal, model(out).values(), model(tmp_path / "whole").values()))


def command(corpus: Path, out: Path, *more: str) -> list[str]:
    """A run with all that has a state and all that is random, a reading process included."""
    return [
        sys.executable, "-m", "spkfast", "train", str(corpus / "full.yaml"), "--out", str(out),
        "--data.train_list", str(corpus / "train_list.txt"), "--data.noise", str(corpus / "spk0"),
        "--data.rir", str(corpus / "spk1"), "--checkpoint_minutes", "0", "--log_steps", "1", *more,
    ]  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_killed_at_a_random_step_and_resumed_is_bit_identical(corpus, tmp_path, precision):
    out, whole = tmp_path / "killed", tmp_path / "whole"
    more = ("--precision", precision)
    subprocess.run(command(corpus, whole, *more), check=True, capture_output=True)
    for at in (random.randint(1, 12), random.randint(15, 25)):  # twice in one run
        run = subprocess.Popen(command(corpus, out, *more, "--resume"), stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        deadline = time.monotonic() + 240
        while not any(int(path.name[5:]) >= at for path in (out / "checkpoints").glob("step_*")):
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
        run.send_signal(signal.SIGKILL)
        run.communicate()
    subprocess.run(command(corpus, out, *more, "--resume"), check=True, capture_output=True)
    assert model(out).keys() == model(whole).keys()
    assert all(torch.equal(value, model(whole)[name]) for name, value in model(out).items())
    for name in ("head.safetensors",):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert [path.name for path in sorted((out / "best").iterdir())] == [
        path.name for path in sorted((whole / "best").iterdir())
    ]
    without = [{k: v for k, v in entry.items() if k != "seconds"} for entry in read_log(out, VALIDATION)]
    assert without == [{k: v for k, v in entry.items() if k != "seconds"} for entry in read_log(whole, VALIDATION)]
    assert SpeakerEncoder.load(out).threshold == SpeakerEncoder.load(whole).threshold


def started(command: list[str]) -> subprocess.Popen:
    """In a group of its own, with the processes that it begins."""
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)


def wait_for(run: subprocess.Popen, out: Path, step: int) -> None:
    deadline = time.monotonic() + 240
    while not any(entry["step"] >= step for entry in read_log(out)):
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)


def unlike(out: Path, whole: Path) -> list[str]:
    """What differs between two runs that should have come to the same."""
    names = [name for name, value in model(whole).items() if not torch.equal(value, model(out)[name])]
    if (out / "head.safetensors").read_bytes() != (whole / "head.safetensors").read_bytes():
        names.append("head")
    logs = [
        [{k: v for k, v in entry.items() if k != "seconds"} for entry in read_log(folder, VALIDATION)]
        for folder in (out, whole)
    ]
    return names + ([VALIDATION] if logs[0] != logs[1] else [])


def test_a_signal_to_end_leaves_a_checkpoint_and_the_resumed_run_is_bit_identical(corpus, tmp_path):
    """To the whole group, as from a terminal or Slurm, between two entries of the log; before a second run."""
    out, whole = tmp_path / "stopped", tmp_path / "whole"
    more = ("--checkpoint_minutes", "60", "--log_steps", "4", "--fine_tuning.steps", "6")
    subprocess.run(command(corpus, whole, *more), check=True, capture_output=True)
    reached = 0
    for number, at in ((signal.SIGTERM, 4), (signal.SIGINT, 16)):
        run = started(command(corpus, out, *more, "--resume"))
        wait_for(run, out, at)
        os.killpg(run.pid, number)
        errors = run.communicate()[1]
        assert run.returncode == 128 + number, errors
        assert "stopping after a checkpoint" in errors and f"{out}: stopped; go on with --resume" in errors
        assert "Traceback" not in errors
        newest = int(sorted((out / "checkpoints").iterdir())[-1].name[5:])
        assert reached < newest < 30 and newest == read_log(out)[-1]["step"]
        reached = newest
        assert not (out / "model").exists() and not (out / "fine_tuning").exists()
    subprocess.run(command(corpus, out, *more, "--resume"), check=True, capture_output=True)
    assert unlike(out, whole) == [] and unlike(out / "fine_tuning", whole / "fine_tuning") == []


def test_a_run_asked_to_stop_ends_with_a_checkpoint(corpus, tmp_path):
    out = tmp_path / "run"
    made = config(corpus, out, steps=8, log_steps=5, averaging__name="ema")
    trainer = Trainer(made)
    steps = []
    for progress in trainer.run():
        steps.append(progress.step)
        if progress.step == 1:
            trainer.stop()
    assert trainer.stopped and steps == [1, 2, 3]  # the third one was begun when the first was told
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_00000003"]
    assert not (out / "model").exists()
    assert not trained(dataclasses.replace(made, resume=True)).stopped
    trained(dataclasses.replace(made, out=str(tmp_path / "whole")))
    assert unlike(out, tmp_path / "whole") == []
    assert [entry["step"] for entry in read_log(out)] == [3, 5, 8]


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(corpus, tmp_path, monkeypatch):
    trainer = Trainer(config(corpus, tmp_path / "run"))
    monkeypatch.setattr("spkfast.training.checkpoint.save", lambda *arguments: "No space left on device")
    with pytest.raises(InputError, match=r"the last checkpoint could not be written .*No space left.*--resume"):
        for _ in trainer.run():
            trainer.stop()


class Asked:
    is_main_process, folder, stopped = True, Path("x"), False

    def __init__(self) -> None:
        self.times = 0

    def stop(self) -> None:
        self.times += 1


def test_a_second_interrupt_does_not_wait_and_handlers_are_put_back(capfd):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    trainer = Asked()
    with pytest.raises(KeyboardInterrupt), _stopping(trainer):
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
    assert trainer.times == 2 and capfd.readouterr().err.count("stopping after a checkpoint") == 1
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_the_exit_status_is_that_of_the_signal_in_every_process():
    for number in (signal.SIGINT, signal.SIGTERM):
        with pytest.raises(SystemExit) as ended, _stopping(Asked()):
            signal.raise_signal(number)
        assert ended.value.code == 128 + number
    told = Asked()
    with pytest.raises(SystemExit) as ended, _stopping(told):
        told.stopped = True  # another process was given the signal
    assert ended.value.code == 143
    with _stopping(Asked()):
        pass
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as for a job in the background
    try:
        with _stopping(Asked()):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, former)


@pytest.mark.full
@pytest.mark.skipif(not (distributed.is_available() and distributed.is_gloo_available()), reason="torch has no Gloo")
def test_two_processes_stop_together_and_are_refused_together(corpus, tmp_path):
    out, whole = tmp_path / "stopped", tmp_path / "whole"
    more = ("--checkpoint_minutes", "60", "--log_steps", "2", "--batch_size", "4", "--steps", "100")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

    def launch(where: Path) -> list[str]:
        return [*launcher, *command(corpus, where, *more, "--resume")[1:]]

    subprocess.run(launch(whole), check=True, capture_output=True)
    with locked(out):
        refused = subprocess.run(launch(out), capture_output=True, text=True, check=False)
    assert refused.returncode and refused.stderr.count("another run is writing there") == 2
    assert [path.name for path in out.iterdir()] == [".lock"]
    run = started(launch(out))
    wait_for(run, out, 4)
    run.send_signal(signal.SIGTERM)  # the launcher passes it on to both groups
    errors = run.communicate()[1]
    assert run.returncode and "stopped; go on with --resume" in errors
    newest = int(sorted((out / "checkpoints").iterdir())[-1].name[5:])
    assert 4 <= newest < 100
    subprocess.run(launch(out), check=True, capture_output=True)
    assert unlike(out, whole) == []


@pytest.mark.full
@pytest.mark.skipif(not (distributed.is_available() and distributed.is_gloo_available()), reason="torch has no Gloo")
def test_two_processes_train_like_one(corpus, tmp_path):
    """50 steps at equal global batch, with synchronised batch norm: losses and weights within 1e-4.

    From a network that is trained a little: at the rates of a first training rounding grows tenfold in three steps,
    whatever adds up in another order.
    """
    settings = yaml.safe_load(TINY) | {"steps": 60}
    (tmp_path / "start.yaml").write_text(yaml.safe_dump(settings))
    settings |= {
        "steps": 50, "log_steps": 1, "sync_batch_norm": True, "init_from": str(tmp_path / "start"),
        "optimizer": {"lr": 1e-3}, "schedule": {"name": "constant", "warmup": 5}, "loss": {"margin_end": 0},
        "validation": {"held_out": 2, "every": 25},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    one = [sys.executable]
    for name, file, start, rows in (("start", "start", one, 8), ("one", "run", one, 8), ("two", "run", launcher, 4)):
        run = [
            *start, "-m", "spkfast", "train", str(tmp_path / f"{file}.yaml"), "--out", str(tmp_path / name),
            "--batch_size", str(rows), "--data.train_list", str(corpus / "train_list.txt"),
            "--data.noise", str(corpus / "spk0"), "--data.rir", str(corpus / "spk1"),
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = subprocess.run(run, capture_output=True, text=True, check=False, env=environment)
        assert result.returncode == 0, result.stderr
    found = {name: losses(tmp_path / name) for name in ("one", "two")}
    assert len(found["one"]) == 50 and found["two"] == pytest.approx(found["one"], rel=1e-4)
    eers = [[entry["mean_eer_percent"] for entry in read_log(tmp_path / name, VALIDATION)] for name in found]
    assert len(eers[0]) == 2 and eers[0] == pytest.approx(eers[1])
    before, after, other = (model(tmp_path / name) for name in ("start", *found))
    for name, value in after.items():
        length = float(value.double().norm())
        assert float((other[name].double() - value.double()).norm()) <= 1e-4 * length, name
    moved = [float((after[n].double() - before[n].double()).norm() / before[n].double().norm()) for n in after]
    assert max(moved) > 0.1
