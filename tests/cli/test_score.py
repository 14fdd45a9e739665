"""``spkfast score``: each way of scoring against the functions under it, files in and out, and what is refused."""

import json
import os
import stat
import threading

import numpy as np
import pytest

from spkfast.data.embeddings import StoredEmbeddings, write_embeddings
from spkfast.data.lists import read_trials
from spkfast.evaluation import (
    LogisticCalibration,
    Plda,
    Qmf,
    as_norm,
    cosine_scores,
    enrol,
    s_norm,
    t_norm,
    wespeaker_quality,
)

SPEAKERS, EACH, DIM = 12, 6, 16
KEYS = [f"s{speaker}/r/{k}.wav" for speaker in range(SPEAKERS) for k in range(EACH)]
RNG = np.random.default_rng(0)


def voices(count, each, noise=0.9, seed=0):
    rng = np.random.default_rng(seed)
    middle = np.repeat(rng.normal(size=(count, DIM)), each, axis=0)
    return (3 * (middle + noise * rng.normal(size=middle.shape))).astype(np.float32)


EMBEDDINGS = voices(SPEAKERS, EACH)
COHORT = voices(10, 4, seed=1)
COHORT_KEYS = [f"c{k // 4}/r/{k}.wav" for k in range(len(COHORT))]


@pytest.fixture
def folder(tmp_path):
    write_embeddings(tmp_path / "x.safetensors", StoredEmbeddings(KEYS, EMBEDDINGS, model="m1"))
    write_embeddings(tmp_path / "cohort.npz", StoredEmbeddings(COHORT_KEYS, COHORT, model="m1"))
    pairs = RNG.permutation([(a, b) for a in range(len(KEYS)) for b in range(a)])[:600]
    same = [a // EACH == b // EACH for a, b in pairs]
    lines = [f"{int(label)} {KEYS[a]} {KEYS[b]}\n" for (a, b), label in zip(pairs, same, strict=True)]
    (tmp_path / "trials.txt").write_text("".join(lines))
    return tmp_path


@pytest.fixture
def score(folder, spkfast):
    def run(*options, trials="trials.txt", embeddings="x.safetensors", out="scores.txt"):
        done = spkfast("score", folder / trials, folder / embeddings, "--out", folder / out, *options)
        assert done.status == 0, done.err
        found = folder / out
        return np.load(found) if found.suffix == ".npy" else read_trials(found, labelled=None, scored=True).scores

    return run


def sides(folder):
    return read_trials(folder / "trials.txt").rows(KEYS)


def test_cosine_in_every_form(folder, score, spkfast):
    want = cosine_scores(EMBEDDINGS, *sides(folder))
    np.testing.assert_array_equal(score(out="new/scores.npy"), want)
    np.testing.assert_allclose(score(), want, rtol=1e-6)
    listed = read_trials(folder / "trials.txt")
    vox = (folder / "scores.txt").read_text().splitlines()
    assert [line.rsplit(" ", 1)[0] for line in vox] == (folder / "trials.txt").read_text().splitlines()
    for name, line in (("kaldi", "{e} {t} {kind}"), ("plain", "{e} {t}")):
        lines = [line.format(e=t.enrol, t=t.test, kind="target" if t.target else "nontarget") for t in listed]
        (folder / name).write_text("\n".join(lines))
        np.testing.assert_allclose(score(trials=name), want, rtol=1e-6)
        assert [line.rsplit(" ", 1)[0] for line in (folder / "scores.txt").read_text().splitlines()] == lines
    said = json.loads(spkfast("score", folder / "plain", folder / "x.safetensors", "--out", folder / "y", "--json").out)
    assert said["trials"] == 600 and said["lowest"] == pytest.approx(float(want.min()))


def test_norms(folder, score):
    enrol_rows, test_rows = sides(folder)
    raw = cosine_scores(EMBEDDINGS, enrol_rows, test_rows)
    arguments = (raw, enrol_rows, test_rows, EMBEDDINGS, COHORT)
    options = ("--cohort", folder / "cohort.npz")
    np.testing.assert_allclose(score("--norm", "s", *options), s_norm(*arguments), rtol=1e-5, atol=1e-6)
    found = score("--norm", "as", "--top-n", "7", "--unbiased", *options)
    np.testing.assert_allclose(found, as_norm(*arguments, top_n=7, unbiased=True), rtol=1e-5, atol=1e-6)
    found = score("--norm", "t", *options)
    np.testing.assert_allclose(found, t_norm(*arguments), rtol=1e-5, atol=1e-6)
    means = COHORT.reshape(10, 4, DIM).mean(axis=1)
    shift = COHORT.mean(axis=0, dtype=float).astype(np.float32)
    found = score("--norm", "as", "--top-n", "4", "--cohort-means", "--mean", folder / "cohort.npz", *options)
    raw = cosine_scores(EMBEDDINGS - shift, enrol_rows, test_rows)
    want = as_norm(raw, enrol_rows, test_rows, EMBEDDINGS - shift, means - shift, top_n=4)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)
    (folder / "speakers").write_text("".join(f"{key} {k % 2}\n" for k, key in enumerate(COHORT_KEYS)))
    found = score("--norm", "s", "--cohort-means", "--speakers", folder / "speakers", *options)
    means = np.stack([COHORT[k::2].mean(axis=0) for k in range(2)])
    raw = cosine_scores(EMBEDDINGS, enrol_rows, test_rows)
    np.testing.assert_allclose(found, s_norm(raw, enrol_rows, test_rows, EMBEDDINGS, means), rtol=1e-4, atol=1e-5)


def test_enrolment_from_several_utterances(folder, score, spkfast):
    (folder / "spk2utt").write_text("".join(f"p{s} {' '.join(KEYS[s * EACH : s * EACH + 3])}\n" for s in range(4)))
    lines = [f"{int(s == t)} p{s} {KEYS[t * EACH + 4]}\n" for s in range(4) for t in range(4)]
    (folder / "enrolled").write_text("".join(lines))
    _, models = enrol(EMBEDDINGS, {f"p{s}": [s * EACH, s * EACH + 1, s * EACH + 2] for s in range(4)})
    both = np.concatenate([models, EMBEDDINGS[4::EACH][:4]])
    want = cosine_scores(both, np.repeat(np.arange(4), 4), 4 + np.tile(np.arange(4), 4))
    np.testing.assert_allclose(score("--enrol", folder / "spk2utt", trials="enrolled"), want, rtol=1e-6)
    (folder / "enrolled").write_text(lines[0] + f"0 p9 {KEYS[0]}\n")
    done = spkfast("score", folder / "enrolled", folder / "x.safetensors", "--out", "y", "--enrol", folder / "spk2utt")
    assert done.status == 2 and "p9: " in done.err and "enrolled:2 enrols this name, but" in done.err


def test_plda(folder, score):
    plda = Plda.fit(COHORT, np.repeat(np.arange(10), 4), lda_dim=6)
    plda.save(folder / "plda.safetensors")
    want = plda.scores(EMBEDDINGS, *sides(folder))
    np.testing.assert_allclose(score("--plda", folder / "plda.safetensors"), want, rtol=1e-5, atol=1e-5)
    folded = Plda(plda.mean, plda.diagonalizer, plda.psi, np.eye(6), np.zeros(6))
    folded.to_kaldi(folder / "plda.kaldi")
    small = (EMBEDDINGS @ plda.projection.T).astype(np.float32)
    write_embeddings(folder / "small.npz", StoredEmbeddings(KEYS, small))
    found = score("--plda", folder / "plda.kaldi", embeddings="small.npz")
    want = Plda.from_kaldi(folder / "plda.kaldi").scores(small, *sides(folder))
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)


def test_enrolment_for_plda(folder, score):
    plda = Plda.fit(COHORT, np.repeat(np.arange(10), 4), lda_dim=6)
    plda.save(folder / "plda.safetensors")
    groups = {f"p{s}": list(range(s * EACH, s * EACH + 3 + s % 2)) for s in range(4)}
    (folder / "spk2utt").write_text("".join(f"{p} {' '.join(KEYS[k] for k in rows)}\n" for p, rows in groups.items()))
    (folder / "enrolled").write_text(
        "".join(f"{int(s == t)} p{s} {KEYS[t * EACH + 5]}\n" for s in range(4) for t in range(4))
    )
    models = np.stack([EMBEDDINGS[rows].mean(axis=0) for rows in groups.values()])
    both = np.concatenate([models, EMBEDDINGS[5::EACH][:4]])
    want = plda.scores(
        both, np.repeat(np.arange(4), 4), 4 + np.tile(np.arange(4), 4), num_enrol=np.array([3, 4, 3, 4, 1, 1, 1, 1])
    )
    found = score("--enrol", folder / "spk2utt", "--plda", folder / "plda.safetensors", trials="enrolled")
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4)


def test_kaldi_model_with_its_mean_and_transform(folder, score):
    plda = Plda.fit(COHORT, np.repeat(np.arange(10), 4), lda_dim=6)
    plda.to_kaldi(folder / "plda", transform=folder / "transform.mat")
    want = Plda.from_kaldi(folder / "plda", transform=folder / "transform.mat").scores(EMBEDDINGS, *sides(folder))
    found = score("--plda", folder / "plda", "--plda-transform", folder / "transform.mat")
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)


def test_written_scores_are_the_scores(folder, score):
    want = cosine_scores(EMBEDDINGS, *sides(folder))
    np.testing.assert_array_equal(score().astype(np.float32), want)
    calibrated = score("--fit-calibration", folder / "c.json", out="y.npy")
    np.testing.assert_array_equal(score("--calibration", folder / "c.json"), calibrated)


def test_embeddings_that_no_trial_names_do_not_matter(folder, score, spkfast):
    want = score()
    more = np.concatenate([EMBEDDINGS, np.zeros((1, DIM), np.float32)])
    write_embeddings(folder / "x.safetensors", StoredEmbeddings([*KEYS, "zero/u.wav"], more, model="m1"))
    np.testing.assert_array_equal(score(), want)
    (folder / "zero.txt").write_text(f"0 {KEYS[0]} zero/u.wav\n")
    done = spkfast("score", folder / "zero.txt", folder / "x.safetensors", "--out", folder / "y")
    assert done.status == 2 and "x.safetensors: the embedding of zero/u.wav must be finite and not zero" in done.err


def test_calibration_of_other_scores_is_refused(folder, score, spkfast):
    score("--fit-calibration", folder / "c.json")
    options = ("--norm", "as", "--top-n", "7", "--cohort", folder / "cohort.npz")
    done = spkfast(
        "score", folder / "trials.txt", folder / "x.safetensors", "--out", folder / "y", "--calibration",
        folder / "c.json", *options,
    )  # fmt: skip
    assert done.status == 2 and "c.json: was learnt on scores by cosine, norm None, top None, model m1" in done.err
    labels, raw = read_trials(folder / "trials.txt").labels, cosine_scores(EMBEDDINGS, *sides(folder))
    own = LogisticCalibration.fit(raw, labels, description="mine")
    own.save(folder / "own.json")
    np.testing.assert_allclose(score("--calibration", folder / "own.json"), own.apply(raw), rtol=1e-12)


def test_calibration(folder, score):
    labels = read_trials(folder / "trials.txt").labels
    raw = cosine_scores(EMBEDDINGS, *sides(folder))
    want = LogisticCalibration.fit(raw, labels).apply(raw)
    np.testing.assert_allclose(score("--fit-calibration", folder / "c.json"), want, rtol=1e-5)
    np.testing.assert_allclose(score("--calibration", folder / "c.json"), want, rtol=1e-5)


def test_quality_measures(folder, score, spkfast):
    labels, (e, t) = read_trials(folder / "trials.txt").labels, sides(folder)
    raw = as_norm(cosine_scores(EMBEDDINGS, e, t), e, t, EMBEDDINGS, COHORT, top_n=9)
    from spkfast.evaluation import cohort_statistics

    measures = {
        "magnitudes": np.linalg.norm(EMBEDDINGS, axis=1),
        "cohort_means": cohort_statistics(EMBEDDINGS, COHORT, top_n=9).mean,
        "durations_s": 1 + np.arange(len(KEYS)) % 7,
    }
    (folder / "seconds").write_text("".join(f"{key} {1 + k % 7}\n" for k, key in enumerate(KEYS)))
    features = wespeaker_quality(raw, e, t, **measures)
    want = Qmf.fit(features, labels).apply(features)
    options = ("--norm", "as", "--top-n", "9", "--cohort", folder / "cohort.npz", "--durations", folder / "seconds")
    np.testing.assert_allclose(score("--fit-qmf", folder / "q.json", *options), want, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(score("--qmf", folder / "q.json", *options), want, rtol=1e-3, atol=1e-3)
    no_durations = spkfast(
        "score",
        folder / "trials.txt",
        folder / "x.safetensors",
        "--out",
        folder / "y",
        "--qmf",
        folder / "q.json",
        *options[:-2],
    )
    assert "q.json: has 13 weights for 9 measures: learnt with --durations" in no_durations.error
    (folder / "seconds").write_text(f"{KEYS[0]} no\n")
    done = spkfast(
        "score",
        folder / "trials.txt",
        folder / "x.safetensors",
        "--out",
        folder / "y",
        "--qmf",
        folder / "q.json",
        *options,
    )
    assert f"seconds:1: the duration of {KEYS[0]} must be a positive number, got 'no'" in done.error
    (folder / "seconds").write_text(f"{KEYS[0]} 3\n")
    done = spkfast(
        "score",
        folder / "trials.txt",
        folder / "x.safetensors",
        "--out",
        folder / "y",
        "--qmf",
        folder / "q.json",
        *options,
    )
    assert done.status == 2 and "has no duration of" in done.err and not (folder / "y").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--norm", "as"], "--norm and --cohort go together"),
        (["--top-n", "5"], "--top-n needs --norm"),
        (["--durations", "f"], "--durations needs --qmf or --fit-qmf"),
        (["--qmf", "q"], "quality measures need --norm"),
        (["--calibration", "a", "--fit-calibration", "b"], "--calibration and --fit-calibration exclude each other"),
        (["--plda", "p", "--mean", "m"], "--plda goes without --norm"),
        (["--plda", "p.safetensors", "--plda-mean", "m"], "--plda-mean and --plda-transform go with a file of Kaldi"),
        (["--norm", "as", "--cohort", "c", "--qmf", "q", "--enrol", "e"], "quality measures are of single utterances"),
        (["--norm", "as", "--cohort", "cohort.npz", "--top-n", "0"], "top_n must lie in 1..40"),
        (["--norm", "s", "--cohort", "flat.npz", "--cohort-means"], "does not begin with the folder of its speaker"),
        (["--norm", "s", "--cohort", "cohort.npz", "--cohort-means", "--speakers", "none"], "none: no such file"),
        (["--enrol", "missing"], "missing: no such file"),
        (["--enrol", "unknown"], "unknown: "),
        (
            ["--norm", "as", "--cohort", "cohort.npz", "--top-n", "41"],
            r"top_n must lie in 1..40, the size of the cohort",
        ),
        (
            ["--norm", "as", "--cohort", "cohort.npz"],
            "cohort.npz: the cohort has 40, of which 300 would count: give --top-n",
        ),
        (["--norm", "s", "--cohort", "other.npz"], "other.npz: is of model m2, the embeddings of the trials of m1"),
        (["--mean", "other.npz"], "is of model m2"),
        (["--mean", "narrow.npz"], "--mean has 3 dimensions, the embeddings have 16"),
    ],
)
def test_refusals(folder, spkfast, monkeypatch, options, message):
    monkeypatch.chdir(folder)
    write_embeddings("other.npz", StoredEmbeddings(COHORT_KEYS, COHORT, model="m2"))
    write_embeddings("narrow.npz", StoredEmbeddings(COHORT_KEYS, COHORT[:, :3]))
    write_embeddings("flat.npz", StoredEmbeddings([key.replace("/", "_") for key in COHORT_KEYS], COHORT))
    names = {trial.enrol for trial in read_trials("trials.txt")}
    (folder / "unknown").write_text("".join(f"{name} s99/none.wav\n" for name in names))
    done = spkfast("score", "trials.txt", "x.safetensors", "--out", "y", *options)
    assert done.status == 2 and message in done.err and done.err.count("\n") == 1


def test_outputs_that_would_destroy_something(folder, spkfast, monkeypatch):
    monkeypatch.chdir(folder)
    before = (folder / "trials.txt").read_bytes()
    for out, message in (
        ("trials.txt", "--out trials.txt is what trials.txt is"),
        ("./trials.txt", "is what trials.txt is"),
        ("x.safetensors", "--out must be a text file or end with .npy"),
        ("scores.npz", "--out must be a text file or end with .npy"),
        (".", "--out must be a text file"),
    ):
        assert message in spkfast("score", "trials.txt", "x.safetensors", "--out", out).error
    assert (folder / "trials.txt").read_bytes() == before
    os.mkfifo("pipe")
    reader = threading.Thread(target=lambda: said.append((folder / "pipe").read_text()))
    said = []
    reader.start()
    assert spkfast("score", "trials.txt", "x.safetensors", "--out", "pipe").status == 0
    reader.join()
    assert len(said[0].splitlines()) == 600 and stat.S_ISFIFO(os.stat("pipe").st_mode)


def test_bad_lists(folder, spkfast):
    def error(text):
        (folder / "bad.txt").write_text(text)
        done = spkfast("score", folder / "bad.txt", folder / "x.safetensors", "--out", folder / "y")
        assert done.status == 2 and not (folder / "y").exists()
        return done.err

    assert "s99/r/0.wav: " in error(f"1 {KEYS[0]} {KEYS[1]}\n0 {KEYS[0]} s99/r/0.wav\n")
    assert "bad.txt:2 names this path, but it has no embedding" in error(f"1 {KEYS[0]} {KEYS[1]}\n0 {KEYS[0]} s99/r\n")
    assert "bad.txt:2: the trial of line 1 again" in error(f"1 {KEYS[0]} {KEYS[1]}\n" * 2)
    done = spkfast("score", folder / "bad.txt", folder / "x.safetensors", "--out", folder / "y", "--allow-duplicates")
    assert done.status == 0
