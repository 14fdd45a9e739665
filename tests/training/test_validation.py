"""Validation during training: its figures, what it refuses before training, and that it disturbs nothing."""

from __future__ import annotations

import copy
import itertools
import random
import shutil
import threading

import numpy as np
import pytest
import soundfile
import torch

from spkfast import models
from spkfast.cli.common import embed_all
from spkfast.data.corpus import Corpus, Entry
from spkfast.data.lists import read_trials
from spkfast.data.manifests import read_corpus
from spkfast.data.shards import write_shards
from spkfast.data.trials import hold_out
from spkfast.errors import InputError
from spkfast.evaluation import evaluate_trials
from spkfast.inference import SpeakerEncoder
from spkfast.training import validation
from spkfast.training.config import ValidationConfig
from spkfast.training.validation import ListResult, Validation, mean_eer
from tests.training.corpus import make_tones

SIZES = {"channels": 16, "mfa_channels": 24, "embedding_dim": 12, "attention_channels": 8, "se_channels": 8}


def make_encoder():
    torch.manual_seed(0)
    return SpeakerEncoder(models.create("ecapa_tdnn", feature_dim=80, **SIZES), "wespeaker", device="cpu")


@pytest.fixture
def encoder():
    return make_encoder()


@pytest.fixture(scope="module")
def tones(tmp_path_factory):
    """Five speakers of three utterances, of other lengths each, and two lists: all pairs, and some of them."""
    folder = make_tones(tmp_path_factory.mktemp("tones"), speakers=5)
    paths = [f"spk{s}/s/{u}.wav" for s in range(5) for u in range(3)]
    for number, path in enumerate(paths):
        samples, rate = soundfile.read(folder / path, dtype="int16")
        soundfile.write(folder / path, samples[: 8000 + 977 * (number * 7 % 16)], rate)
    write_trials(folder / "all.txt", list(itertools.combinations(paths, 2)))
    write_trials(folder / "some.txt", list(itertools.combinations(paths[2:8], 2)))
    return folder


def write_trials(file, pairs):
    file.write_text("".join(f"{int(a.split('/')[0] == b.split('/')[0])} {a} {b}\n" for a, b in pairs))


def make(*lists, held=None, warn=None, sample_rate=16000, seed=0, rank=0, frame_length=1, **config):
    told = []
    config = ValidationConfig(trials=[str(one) for one in lists], **config)
    found = Validation(
        config, held, sample_rate=sample_rate, seed=seed, rank=rank, warn=warn or told.append, frame_length=frame_length
    )
    assert warn or not told
    return found


def refuse(match, *arguments, **options):
    with pytest.raises(InputError, match=match) as caught:
        make(*arguments, **options)
    assert "\n" not in str(caught.value)


@pytest.fixture
def scored(monkeypatch):
    """The embeddings that each list was scored with, by path, as they come."""
    calls = []

    def watch(trials, keys, embeddings):
        calls.append(dict(zip(keys, embeddings, strict=True)))
        return evaluate_trials(trials, keys, embeddings)

    monkeypatch.setattr(validation, "evaluate_trials", watch)
    return calls


def assert_alike(found, expected):
    """That embeddings agree as far as those of one utterance in different batches do."""
    assert found.keys() == expected.keys()
    for key, row in expected.items():
        assert np.linalg.norm(found[key] - row) < 1e-5 * np.linalg.norm(row)


def by_files(encoder, folder, keys):
    """The way of ``spkfast evaluate``."""
    keys = list(keys)
    return dict(zip(keys, embed_all(encoder, folder, keys), strict=True))


def test_figures_are_those_of_evaluate(tones, encoder, scored, monkeypatch):
    lists = make(tones / "all.txt", tones / "some.txt")
    assert lists.names == ["all", "some"]
    found = lists.run(encoder)
    assert list(found) == lists.names and len(scored[0]) == 15 and len(scored[1]) == 6
    for name, embeddings in zip(lists.names, scored, strict=True):
        assert_alike(embeddings, by_files(encoder, tones, embeddings))
        trials = read_trials(tones / f"{name}.txt")
        rates = evaluate_trials(trials, list(embeddings), np.stack([*embeddings.values()]))
        value, threshold, low, high = rates.eer
        assert found[name] == (100 * value, 100 * low, 100 * high, rates.min_dcf, threshold, len(trials))
    assert 0 <= found["all"].eer_low_percent <= found["all"].eer_percent <= found["all"].eer_high_percent < 100
    assert mean_eer(found) == (found["all"].eer_percent + found["some"].eer_percent) / 2
    assert lists.run(encoder) == found
    monkeypatch.setattr(validation, "_WINDOW_SECONDS", 1.0)  # of an utterance or two each: other batches
    lists.run(encoder)
    assert_alike(scored[-2], scored[0])


def test_each_utterance_is_embedded_once_in_windows_of_like_length(tones, encoder, monkeypatch):
    seen = []
    embed_batch = encoder.embed_batch
    monkeypatch.setattr(
        encoder, "embed_batch", lambda waveforms: seen.append([len(w) for w in waveforms]) or embed_batch(waveforms)
    )
    monkeypatch.setattr(validation, "_WINDOW_SECONDS", 3.0)
    make(tones / "all.txt", tones / "some.txt", held=read_corpus(tones / "train_list.txt")).run(encoder)
    lengths = [*itertools.chain(*seen)]
    assert len(lengths) == 15 and lengths == sorted(lengths) and len(seen) > 1
    assert max(sum(window) for window in seen) <= 3 * 16000 + lengths[-1]


def test_lists_start_from_their_own_folder_or_a_root(tones, encoder, tmp_path):
    (tmp_path / "lists").mkdir()
    shutil.copy(tones / "some.txt", tmp_path / "lists" / "moved.txt")
    refuse(
        r"moved.txt: names an utterance that cannot be used: .*lists/spk0/s/2.wav: no such file",
        tmp_path / "lists/moved.txt",
    )
    moved, here = make(tmp_path / "lists/moved.txt", root=str(tones)), make(tones / "some.txt")
    assert moved.run(encoder)["moved"] == here.run(encoder)["some"]


def test_what_is_refused_before_training(tones, tmp_path):
    shutil.copytree(tones, tmp_path / "x")
    folder = tmp_path / "x"
    refuse(r"missing.txt: no such list file", folder / "missing.txt")
    refuse(r"some.txt: another list is called 'some' too", tones / "some.txt", folder / "some.txt")
    shutil.copy(folder / "some.txt", folder / "held_out.txt")
    corpus = read_corpus(folder / "train_list.txt")
    refuse(r"another list is called 'held_out' too", folder / "held_out.txt", held=corpus)
    write_trials(folder / "one.txt", [("spk0/s/0.wav", "spk0/s/1.wav")])
    refuse(r"one.txt: 1 of 1 trials are targets; an error rate needs both kinds", folder / "one.txt")
    refuse(r"some.txt: names an .*wav: too short: \d+ samples at 16000 Hz", folder / "some.txt", frame_length=16001)
    (folder / "spk1/s/1.wav").write_text("not audio")
    refuse(r"some.txt: names an .*spk1/s/1.wav: not an audio file", folder / "some.txt")
    refuse(r"train_list.txt: names an .*spk1/s/1.wav: not an audio file", held=corpus)
    alone = Corpus([Entry(f"s{k}", f"{k}", str(folder / f"spk{k}/s/0.wav")) for k in range(4)], "these")
    refuse(r"validation.held_out: these: none of 4 speakers has two utterances", held=alone)


def test_speakers_that_are_trained_on_are_told(tones):
    told = []
    training, held = hold_out(read_corpus(tones / "train_list.txt"), 2, seed=0)
    lists = make(tones / "all.txt", tones / "some.txt", held=held, warn=told.append)
    assert not told
    lists.check_disjoint(training.speakers)
    assert [line.split(";")[0] for line in told] == [
        f"{name}: {len(both)} of the {total} speakers of its trials are trained on, the first is {both[0]!r}"
        for name, total in (("all", 5), ("some", 3))
        for both in [[speaker for speaker in training.speakers if name == "all" or speaker in ("spk0", "spk1", "spk2")]]
        if both
    ]
    told.clear()
    lists.check_disjoint(["other"])
    assert not told
    lists.check_disjoint([held.speakers[1], "other"], "were trained on in x")  # those held out by their names too
    assert any(line.startswith("held_out: 1 of the 2 speakers of its trials were trained on in x") for line in told)


def test_one_of_several_processes_warns(tones, tmp_path):
    shutil.copytree(tones, tmp_path / "x")
    samples, _ = soundfile.read(tmp_path / "x/spk0/s/2.wav", dtype="int16")
    soundfile.write(tmp_path / "x/spk0/s/2.wav", samples[::2], 8000)
    told: dict[int, list[str]] = {0: [], 1: []}
    for rank, lines in told.items():
        make(tmp_path / "x/some.txt", warn=lines.append, rank=rank).check_disjoint(
            read_corpus(tones / "train_list.txt").speakers
        )
    assert len(told[0]) == 2 and not told[1]


def test_other_rates_are_told_and_resampled(tones, tmp_path, encoder, scored):
    shutil.copytree(tones, tmp_path / "x")
    samples, _ = soundfile.read(tmp_path / "x/spk0/s/2.wav", dtype="int16")
    soundfile.write(tmp_path / "x/spk0/s/2.wav", samples[::2], 8000)
    told = []
    make(tmp_path / "x/some.txt", warn=told.append).run(encoder)
    assert len(told) == 1 and "1 of 6 utterances of the trials, the first is " in told[0]
    assert "spk0/s/2.wav with 8000 Hz, are resampled to 16000 Hz" in told[0]
    assert_alike(scored[0], by_files(encoder, tmp_path / "x", scored[0]))


def together(parts, runs):
    """What each process gives, as threads that gather."""
    given, results = [None] * parts, [None] * parts
    barrier = threading.Barrier(parts, timeout=60)

    def gather(rank, mine):
        given[rank] = mine
        barrier.wait()
        return list(given)

    def work(rank):
        try:
            results[rank] = runs[rank](rank=rank, world_size=parts, gather=lambda mine: gather(rank, mine))
        except InputError as error:
            results[rank] = str(error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(parts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("parts", [2, 7])
def test_processes_share_the_work(tones, encoder, scored, parts):
    lists = make(tones / "some.txt")
    lists.run(encoder)
    encoders = [copy.deepcopy(encoder) for _ in range(parts)]
    runs = [lambda encoder=encoder, **options: lists.run(encoder, **options) for encoder in encoders]
    found = together(parts, runs)  # of six utterances: a seventh process has none
    assert all(one == found[0] for one in found) and len(scored) == 1 + parts
    assert_alike(scored[1], scored[0])


def test_an_utterance_that_is_gone_is_told_by_all(tones, tmp_path, encoder):
    shutil.copytree(tones, tmp_path / "x")
    lists = make(tmp_path / "x/some.txt")
    (tmp_path / "x/spk1/s/0.wav").unlink()
    with pytest.raises(InputError, match=r"spk1/s/0.wav: no such file"):
        lists.run(encoder)
    encoders = [copy.deepcopy(encoder) for _ in range(2)]
    runs = [lambda encoder=encoder, **options: lists.run(encoder, **options) for encoder in encoders]
    found = together(2, runs)
    assert found[0] == found[1] and "spk1/s/0.wav: no such file" in found[0]


def test_an_utterance_without_a_finite_embedding_is_told(tones, encoder, monkeypatch):
    lists = make(tones / "some.txt")
    lengths = sorted(soundfile.info(path).frames for path in map(str, {*tones.glob("spk1/s/*.wav")}))
    bad = next(path for path in tones.glob("spk1/s/*.wav") if soundfile.info(str(path)).frames == lengths[1])
    forward = encoder._forward

    def poisoned(waveforms, backend):
        out = forward(waveforms, backend)
        out[[len(waveform) == lengths[1] for waveform in waveforms]] = torch.nan
        return out

    monkeypatch.setattr(encoder, "_forward", poisoned)
    with pytest.raises(InputError, match=rf"^{bad}: the model gives no finite embedding"):
        lists.run(encoder)


def test_trials_among_speakers_held_out(tones, encoder):
    corpus = read_corpus(tones / "train_list.txt")
    lists = make(held=corpus)
    assert lists.names == ["held_out"]
    found = lists.run(encoder)["held_out"]
    assert found.num_trials == 30  # three pairs of each of five speakers, and as many of two speakers
    assert found.eer_low_percent is not None
    other = make(held=corpus, seed=1)
    assert other.fingerprint != lists.fingerprint and other.run(encoder)["held_out"] != found


def test_speakers_of_any_name_have_an_interval(tones, encoder):
    """A path tells its speaker by its first component, which these names would not be."""
    corpus = read_corpus(tones / "train_list.txt")
    names = dict(zip(corpus.speakers, ["", "..", "a/b", "a/c", "/d"], strict=True))
    renamed = Corpus(entry._replace(speaker=f"{names[entry.speaker]}/ x") for entry in corpus)
    assert sorted(names, key=lambda name: f"{names[name]}/ x") != corpus.speakers
    found = make(held=renamed).run(encoder)["held_out"]
    assert found.eer_low_percent is not None and found.num_trials == 30


def test_held_out_utterances_are_segments_or_lie_in_shards(tones, tmp_path, encoder):
    """The same audio in three ways gives the same figures, as the same trials are drawn."""
    files = read_corpus(tones / "train_list.txt")
    entries, ends = [], {}
    for entry in files:
        samples, rate = soundfile.read(entry.path, dtype="int16")
        before = ends.setdefault(entry.speaker, [np.zeros(160, dtype=np.int16)])
        start = sum(map(len, before)) / rate
        before.append(samples)
        entries.append(
            Entry(entry.speaker, entry.id, str(tmp_path / f"{entry.speaker}.wav"), start, len(samples) / rate)
        )
    for speaker, parts in ends.items():
        soundfile.write(tmp_path / f"{speaker}.wav", np.concatenate(parts), 16000)
    write_shards(files, tmp_path / "shards")
    order = {name: number for number, name in enumerate(files.ids)}
    packed = Corpus(sorted(read_corpus(tmp_path / "shards"), key=lambda entry: order[entry.id]))
    assert packed[0].offset > 0
    found = [make(held=corpus).run(encoder) for corpus in (files, Corpus(entries), packed)]
    assert found[0] == found[1] == found[2]


def test_targets_among_speakers_held_out_pair_recordings(tones, tmp_path, encoder):
    """In shards, the ids tell the recordings: of three utterances in two, two pairs. Of files, their places do."""
    files = read_corpus(tones / "train_list.txt")
    named = Corpus(entry._replace(id=f"{entry.speaker}/{k % 3 % 2}/{k}") for k, entry in enumerate(files))
    write_shards(named, tmp_path / "shards")
    packed = read_corpus(tmp_path / "shards")
    assert len(set(packed.files)) == 1
    assert [make(held=corpus).run(encoder)["held_out"].num_trials for corpus in (packed, named)] == [20, 30]


def test_held_out_errors_name_the_utterance(tones, tmp_path, encoder):
    files = read_corpus(tones / "train_list.txt")
    late = Corpus(entry._replace(start=9.0, seconds=1.0) if entry.id == "spk1/s/1.wav" else entry for entry in files)
    refuse(r"spk1/s/1.wav.*'spk1/s/1.wav' begins at 9 s of", held=late)
    write_shards(files, tmp_path / "shards")
    lists = make(held=read_corpus(tmp_path / "shards"))
    shard = next((tmp_path / "shards").glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:20000])
    with pytest.raises(InputError, match=r"tar: the shard is truncated: 'spk"):
        lists.run(encoder)


def test_fingerprint_tells_trials_and_audio_but_not_places(tones, tmp_path):
    shutil.copytree(tones, tmp_path / "x")
    first = make(tones / "all.txt", tones / "some.txt").fingerprint
    corpus = read_corpus(tones / "train_list.txt")
    assert make(tmp_path / "x/some.txt", tmp_path / "x/all.txt").fingerprint == first
    moved = read_corpus(tones / "train_list.txt", root=tmp_path / "x")
    assert make(held=moved).fingerprint == make(held=corpus).fingerprint
    assert len({first, make(tones / "all.txt").fingerprint, make(tones / "some.txt").fingerprint}) == 3
    lines = (tones / "some.txt").read_text().splitlines()
    (tmp_path / "x/some.txt").write_text("\n".join(lines[1:]))
    assert make(tones / "all.txt", tmp_path / "x/some.txt").fingerprint != first
    shutil.copy(tones / "some.txt", tmp_path / "x/some.txt")
    samples, rate = soundfile.read(tones / "spk1/s/0.wav", dtype="int16")
    soundfile.write(tmp_path / "x/spk1/s/0.wav", samples[:-1], rate)
    assert make(tones / "all.txt", tmp_path / "x/some.txt").fingerprint != first
    assert make(held=moved).fingerprint != make(held=corpus).fingerprint


def test_disturbs_no_training(tones):
    """Weights of a run to the last bit, and the state of every generator, with validations and without."""

    def train(lists):
        encoder = make_encoder()
        net = encoder.model.train()
        part = net.encoder.stem.bn
        part.eval()  # a part that is left out of training stays so
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, fused=True)
        for _ in range(4):
            net(torch.randn(4, 60, 80)).square().mean().backward()
            optimizer.step()
            if lists:
                gradients = [parameter.grad.clone() for parameter in net.parameters()]
                first = lists.run(encoder)
                assert first == lists.run(copy.deepcopy(encoder))  # on the weights as they are
                assert all(torch.equal(a, p.grad) for a, p in zip(gradients, net.parameters(), strict=True))
                assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
            optimizer.zero_grad()
        modes = [module.training for module in net.modules()]
        assert not part.training and modes.count(False) == 1
        weights = [value.numpy().tobytes() for value in net.state_dict().values()]
        return weights, random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()

    assert train(make(tones / "some.txt")) == train(None)


def test_no_lists(encoder):
    assert make().names == [] and make().run(encoder) == {}


def test_mean_does_not_depend_on_the_order():
    results = {str(k): ListResult(eer, None, None, 1.0, 0.0, 2) for k, eer in enumerate((0.1, 0.2, 0.3, 1e-9, 50.0))}
    means = {mean_eer(dict(order)) for order in itertools.permutations(results.items())}
    assert len(means) == 1 and means.pop() == pytest.approx(10.12, abs=1e-6)


def test_real_speech(speech, encoder, scored):
    corpus = read_corpus(speech / "train_list.txt")
    training, held = hold_out(corpus, 4, seed=0)
    told = []
    lists = make(speech / "trials_fsdd.txt", held=held, root=str(speech), warn=told.append)
    lists.check_disjoint(training.speakers)
    assert not told
    found = lists.run(encoder)
    assert list(found) == ["trials_fsdd", "held_out"] and found["trials_fsdd"].num_trials == 1152
    assert_alike(scored[0], by_files(encoder, speech, scored[0]))
    # A network that learned nothing still hears some of what sets speakers apart.
    assert all(0 < one.eer_percent < 50 for one in found.values())
