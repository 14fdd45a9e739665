"""Distillation: the scores of teachers, what they add to the loss, and runs that have some."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spkfast import InputError, SpeakerEncoder, models
from spkfast.cli.train import parse
from spkfast.evaluation import cosine_scores
from spkfast.frontends import frontend
from spkfast.nn import Fbank
from spkfast.nn.margin_softmax import MarginSoftmaxLoss
from spkfast.training.config import TrainConfig
from spkfast.training.distillation import Teachers, score_loss
from spkfast.training.loop import Trainer
from spkfast.training.task import SpeakerTask
from tests.training.corpus import make_tones

SPEC = frontend("wespeaker")


def network(**changes):
    sizes = {"channels": 16, "mfa_channels": 24, "embedding_dim": 12, "attention_channels": 8, "se_channels": 8}
    return models.create("ecapa_tdnn", **sizes | changes)


def saved(folder: Path, seed: int, **changes) -> Path:
    torch.manual_seed(seed)
    SpeakerEncoder(network(**changes), SPEC).save(folder)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_tones(tmp_path_factory.mktemp("tones"), speakers=6)


def config(corpus: Path, out: Path, teachers: list[Path], weight: float = 100.0, **changes) -> TrainConfig:
    made = TrainConfig(out=str(out), steps=24, batch_size=8, log_steps=4, **changes)
    made.model.options = {"channels": 16, "mfa_channels": 24, "embedding_dim": 12, "attention_channels": 8}
    made.data = dataclasses.replace(
        made.data, train_list=str(corpus / "train_list.txt"), crop_seconds=0.5, sampler="balanced", workers=0
    )
    made.distillation = dataclasses.replace(made.distillation, teachers=list(map(str, teachers)), weight=weight)
    return made


def trained(made: TrainConfig, end: int | None = None) -> Path:
    for progress in Trainer(made).run():
        if progress.step == end:
            break
    return Path(made.out)


def test_scores_are_the_mean_of_the_cosines(tmp_path):
    sources = [saved(tmp_path / str(size), size, embedding_dim=size) for size in (12, 20)]
    teachers = Teachers(list(map(str, sources)), SPEC, torch.device("cpu"))
    waves = [0.1 * torch.randn(8000) for _ in range(5)]
    encoders = [SpeakerEncoder.load(source, device="cpu") for source in sources]
    assert teachers.fingerprints == [encoder.fingerprint for encoder in encoders]
    features, _ = Fbank(SPEC)(torch.stack(waves))
    found = teachers.scores(features)
    rows, columns = torch.cartesian_prod(torch.arange(5), torch.arange(5)).T.tolist()
    want = [cosine_scores(encoder.embed_batch(waves), rows, columns) for encoder in encoders]
    torch.testing.assert_close(
        found, torch.stack([torch.as_tensor(w) for w in want]).mean(0).view(5, 5), atol=1e-5, rtol=0
    )
    assert not found.requires_grad


def test_loss_is_over_pairs_of_different_crops():
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(4, 6, generator=generator, requires_grad=True)
    scores = torch.rand(4, 4, generator=generator).fill_diagonal_(1)
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    cosine = torch.nn.functional.cosine_similarity
    want = sum((cosine(embeddings[i], embeddings[j], dim=0) - scores[i, j]) ** 2 for i, j in pairs) / len(pairs)
    found = score_loss(embeddings, scores)
    torch.testing.assert_close(found, want)
    for a, b in zip(*(torch.autograd.grad(loss, embeddings) for loss in (found, want)), strict=True):
        torch.testing.assert_close(a, b)
    assert score_loss(embeddings[:1], torch.ones(1, 1)) < 1e-12


def test_is_added_to_the_loss_of_the_head():
    net, head = network().train(), MarginSoftmaxLoss(12, 5)
    features, target, scores = torch.randn(4, 50, SPEC.output_size), torch.tensor([0, 1, 2, 3]), torch.rand(4, 4)
    added = SpeakerTask(net, head, 7.0)(features, target, scores)[0] - SpeakerTask(net, head)(features, target)[0]
    torch.testing.assert_close(added, 7 * score_loss(net(features), scores), rtol=1e-4, atol=1e-5)


def test_student_gives_the_scores_of_its_teachers(corpus, tmp_path):
    teachers = [saved(tmp_path / str(seed), seed) for seed in (1, 2)]
    files = sorted(corpus.glob("*/*/*.wav"))

    def scores(source):
        embeddings = torch.nn.functional.normalize(SpeakerEncoder.load(source, device="cpu").embed_batch(files))
        return embeddings @ embeddings.T

    want = torch.stack(list(map(scores, teachers))).mean(0)
    runs = {
        name: config(corpus, tmp_path / name, *those)
        for name, those in (("taught", (teachers, 3000.0)), ("alone", ([], 0.0)))
    }
    errors = {name: float((scores(trained(made)) - want).square().mean()) for name, made in runs.items()}
    assert errors["taught"] < 0.3 * errors["alone"]


def test_resumed_run_is_bit_identical_and_holds_no_teacher(corpus, tmp_path):
    teacher = saved(tmp_path / "teacher", 1, embedding_dim=20)
    whole = trained(config(corpus, tmp_path / "whole", [teacher]))
    parts = config(corpus, tmp_path / "parts", [teacher], checkpoint_minutes=0)
    trained(parts, 11)
    moved = Path(shutil.move(teacher, tmp_path / "elsewhere"))
    parts = dataclasses.replace(
        parts, resume=True, distillation=dataclasses.replace(parts.distillation, teachers=[str(moved)])
    )
    trained(parts)
    ours, theirs = (load_file(out / "model" / "model.safetensors") for out in (whole, tmp_path / "parts"))
    assert ours.keys() == theirs.keys() == network().state_dict().keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    parts.distillation.teachers = [str(saved(tmp_path / "other", 2))]
    with pytest.raises(InputError, match=r"was trained with teachers \(distillation\.teachers\)="):
        Trainer(parts)


def test_what_cannot_teach_is_refused(corpus, tmp_path):
    with pytest.raises(InputError, match=r"distillation\.teachers: .*missing: no such model"):
        Trainer(config(corpus, tmp_path / "run", [tmp_path / "missing"]))
    SpeakerEncoder(network(), frontend("taoruijie")).save(tmp_path / "other")
    with pytest.raises(InputError, match=r"distillation\.teachers: .*front-end"):
        Trainer(config(corpus, tmp_path / "run", [tmp_path / "other"]))
    for teachers, weight in (([tmp_path / "other"], 0), ([], 1.0)):
        with pytest.raises(InputError, match=r"distillation\.weight must be above 0 with .*teachers, and 0 without"):
            Trainer(config(corpus, tmp_path / "run", teachers, weight))


def test_speakers_held_out_that_a_teacher_knows_are_told(corpus, tmp_path):
    teacher = trained(config(corpus, tmp_path / "teacher", [], 0.0))
    made = config(corpus, tmp_path / "run", [teacher])
    made.validation.held_out = 2
    warnings: list[str] = []
    Trainer(made, warn=warnings.append)
    assert sum(f"held_out: 2 of the 2 speakers of its trials were trained on in {teacher}" in w for w in warnings) == 1
    made.distillation.teachers = [str(saved(tmp_path / "other", 1))]  # whose speakers are not known
    Trainer(made, warn=warnings.append)
    assert len(warnings) == 1


@pytest.mark.parametrize(("given", "teachers"), [("a", ["a"]), ("[a, b]", ["a", "b"])])
def test_one_or_several_on_the_command_line(given, teachers):
    assert parse(["--data.train_list", "x", "--distillation.teachers", given])[0].distillation.teachers == teachers
