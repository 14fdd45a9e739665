"""Two-covariance PLDA against its definition, and Kaldi's files."""

import re
import struct
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from spkfast.errors import InputError
from spkfast.evaluation import plda as module
from spkfast.evaluation.plda import Plda

scipy_stats = pytest.importorskip("scipy.stats")

DIM = 4
MEAN = np.array([0.5, -1.0, 0.0, 2.0])
FIELDS = ("mean", "diagonalizer", "psi", "projection", "offset")


def covariance(seed, scale):
    root = np.random.default_rng(seed).normal(size=(DIM, DIM))
    return scale * (root @ root.T + np.eye(DIM))


WITHIN, BETWEEN = covariance(1, 0.5), covariance(2, 1.0)


def simulated(counts, seed=0):
    """Embeddings (U, DIM) and speakers (U,), with so many utterances of each."""
    rng = np.random.default_rng(seed)
    speakers = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    means = rng.multivariate_normal(MEAN, BETWEEN, size=len(counts))
    return means[speakers] + rng.multivariate_normal(np.zeros(DIM), WITHIN, size=len(speakers)), speakers


def stacked(mean, within, between, num_utterances):
    """The distribution of all utterances of one speaker, one after the other."""
    every = np.kron(np.ones((num_utterances, num_utterances)), between) + np.kron(np.eye(num_utterances), within)
    return scipy_stats.multivariate_normal(np.tile(mean, num_utterances), every)


def log_likelihood(model, embeddings, speakers):
    mean, within, between = model
    of = [embeddings[speakers == name] for name in np.unique(speakers)]
    return sum(stacked(mean, within, between, len(rows)).logpdf(rows.ravel()) for rows in of)


def parameters(plda):
    """In the space of the embeddings, of a model that only shifts them."""
    return plda.mean - plda.offset, plda.within_covariance, plda.between_covariance


def small_model(**settings):
    rng = np.random.default_rng(3)
    values = rng.normal(size=3), rng.normal(size=(3, 3)), np.array([4.0, 1.0, 0.0])
    return Plda(*values, rng.normal(size=(3, 5)), rng.normal(size=3), **settings)


def rows(count=20, size=5):
    return np.random.default_rng(4).normal(size=(count, size))


def test_finds_the_parameters_that_made_the_embeddings():
    counts = np.random.default_rng(5).integers(2, 9, size=3000)
    embeddings, speakers = simulated(counts)
    mean, within, between = parameters(Plda.fit(embeddings, speakers, length_norm=False))

    def deviation(matrix, count):  # of an element of a sample covariance
        variances = np.diag(matrix)
        return np.sqrt((np.outer(variances, variances) + matrix**2) / count)

    of_means = BETWEEN + WITHIN / counts.min()  # no speaker says less than one with the fewest utterances
    assert (np.abs(within - WITHIN) < 4 * deviation(WITHIN, counts.sum() - len(counts))).all()
    assert (np.abs(between - BETWEEN) < 4 * deviation(of_means, len(counts))).all()
    assert (np.abs(mean - MEAN) < 4 * np.sqrt(np.diag(of_means) / len(counts))).all()


def test_is_the_closed_form_where_all_have_as_many_utterances():
    embeddings, speakers = simulated(np.full(60, 5))
    mean, within, between = parameters(Plda.fit(embeddings, speakers, length_norm=False, num_iterations=400))
    means = np.stack([embeddings[speakers == name].mean(axis=0) for name in range(60)])
    rest = embeddings - means[speakers]
    around = means - embeddings.mean(axis=0)
    np.testing.assert_allclose(mean, embeddings.mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(within, rest.T @ rest / (60 * 4), atol=1e-9)
    np.testing.assert_allclose(between, around.T @ around / 60 - rest.T @ rest / (60 * 4 * 5), atol=1e-9)
    _, within, between = parameters(Plda.fit(embeddings, speakers, length_norm=False, num_iterations=0))
    np.testing.assert_allclose(within, rest.T @ rest / (60 * 4), atol=1e-9)
    np.testing.assert_allclose(between, around.T @ around / 59 - rest.T @ rest / (60 * 4 * 5), atol=1e-9)


def test_iterations_never_lower_the_likelihood_and_end_at_its_top():
    embeddings, speakers = simulated(np.tile([1, 1, 2, 3, 3, 5, 8, 1, 2, 12], 3))
    models = [
        parameters(Plda.fit(embeddings, speakers, length_norm=False, num_iterations=n)) for n in (0, 1, 2, 3, 5, 100)
    ]
    values = np.array([log_likelihood(model, embeddings, speakers) for model in models])
    assert (np.diff(values) > 0).all()
    rng = np.random.default_rng(6)
    for _ in range(10):
        # At the top steps either way lose; on a slope one of them gains.
        shift, *steps = rng.normal(size=DIM), *rng.normal(size=(2, DIM, DIM))
        size = 1e-3
        near = [
            log_likelihood(
                (
                    models[-1][0] + sign * size * shift,
                    models[-1][1] + sign * size * (steps[0] + steps[0].T),
                    models[-1][2] + sign * size * (steps[1] + steps[1].T),
                ),
                embeddings,
                speakers,
            )
            for sign in (-1, 1)
        ]
        assert max(near) < values[-1]


def test_scores_follow_the_definition():
    embeddings, speakers = simulated(np.array([3, 1, 5, 2, 4, 6, 2, 7]))
    plda = Plda.fit(embeddings, speakers, length_norm=False)
    model = parameters(plda)
    enrolled = plda.enrol(embeddings, speakers)
    tests = simulated(np.full(3, 1), seed=9)[0]
    assert enrolled.names.tolist() == list(range(8)) and enrolled.num_utterances.tolist() == [3, 1, 5, 2, 4, 6, 2, 7]
    vectors = np.concatenate([enrolled.vectors, plda.transform(tests)])
    counts = np.append(enrolled.num_utterances, [1, 1, 1])
    trials = np.array([(speaker, 8 + test) for speaker in range(8) for test in range(3)])
    got = plda.scores(vectors, trials[:, 0], trials[:, 1], num_enrol=counts, transformed=True)
    alone = stacked(*model, 1)
    for score, (speaker, test) in zip(got, trials, strict=True):
        of = embeddings[speakers == speaker]
        together = np.append(of, tests[test - 8])
        expected = stacked(*model, len(of) + 1).logpdf(together) - stacked(*model, len(of)).logpdf(of.ravel())
        assert score == pytest.approx(expected - alone.logpdf(tests[test - 8]), abs=1e-9)
    matrix = plda.score_matrix(
        enrolled.vectors, plda.transform(tests), num_enrol=enrolled.num_utterances, transformed=True
    )
    np.testing.assert_allclose(matrix.ravel(), got, atol=1e-12)
    # Without length normalisation, averages of embeddings say the same.
    averages = np.stack([embeddings[speakers == name].mean(axis=0) for name in range(8)])
    np.testing.assert_allclose(plda.score_matrix(averages, tests, num_enrol=counts[:8]).ravel(), got, atol=1e-9)


def ratio(plda, enrol, test, count):
    """One trial as Ioffe and Kaldi compute it: the density of the test given the speaker, over that of anyone."""

    def vector(x, count):
        x = plda.projection @ x + plda.offset
        if plda.length_norm:
            x = x * np.sqrt(3 / (x @ x))
        x = plda.diagonalizer @ (x - plda.mean)
        if plda.normalize_length:
            weights = np.ones(3) if plda.simple_length_norm else 1 / (plda.psi + 1 / count)
            x = x * np.sqrt(3 / (x @ (weights * x)))
        return x

    first, second = vector(enrol, count), vector(test, 1)
    known = count * plda.psi + 1
    normal = scipy_stats.norm
    given = normal.logpdf(second, count * plda.psi / known * first, np.sqrt(1 + plda.psi / known))
    return (given - normal.logpdf(second, 0, np.sqrt(1 + plda.psi))).sum()


SETTINGS = [
    {},
    {"length_norm": True},
    {"length_norm": True, "normalize_length": True},
    {"normalize_length": True, "simple_length_norm": True},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_scores_are_those_of_kaldi(settings, kind, monkeypatch):
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 7)
    monkeypatch.setattr(module, "_TRIALS_AT_ONCE", 4)
    monkeypatch.setattr(module, "_SCORES_AT_ONCE", 30)
    plda = small_model(**settings)
    embeddings = rows()
    rng = np.random.default_rng(7)
    counts = rng.integers(1, 4, size=20)
    enrol, test = rng.integers(20, size=(2, 30))
    given = (embeddings, enrol, test, counts)
    if kind == "torch":
        given = tuple(torch.from_numpy(value) for value in given)
    got = plda.scores(*given[:3], num_enrol=given[3])
    matrix = plda.score_matrix(given[0], given[0][:9], num_enrol=given[3])
    assert isinstance(got, type(given[0])) and isinstance(matrix, type(given[0]))
    expected = [ratio(plda, embeddings[a], embeddings[b], counts[a]) for a, b in zip(enrol, test, strict=True)]
    np.testing.assert_allclose(np.asarray(got), expected, atol=1e-10)
    expected = [[ratio(plda, a, b, count) for b in embeddings[:9]] for a, count in zip(embeddings, counts, strict=True)]
    np.testing.assert_allclose(np.asarray(matrix), expected, atol=1e-10)
    once = plda.scores(given[0], given[1], given[2])
    np.testing.assert_allclose(once[0], ratio(plda, embeddings[enrol[0]], embeddings[test[0]], 1), atol=1e-10)
    twice = plda.scores(given[0], given[1], given[2], num_enrol=2)
    np.testing.assert_allclose(twice[0], ratio(plda, embeddings[enrol[0]], embeddings[test[0]], 2), atol=1e-10)


def test_float32_gives_float32():
    plda = small_model(length_norm=True)
    embeddings = rows().astype(np.float32)
    index = np.arange(20)
    got = plda.scores(embeddings, index, index[::-1])
    exact = plda.scores(embeddings.astype(np.float64), index, index[::-1])
    assert (
        got.dtype == plda.transform(embeddings).dtype == plda.score_matrix(embeddings, embeddings).dtype == np.float32
    )
    # Each of the D products has three roundings to half an epsilon, the sum D, and the score one.
    vectors = np.abs(plda.transform(embeddings.astype(np.float64)))
    size = (vectors * vectors[::-1]).sum(axis=1)
    assert (np.abs(got - exact) <= np.finfo(np.float32).eps / 2 * ((3 + 3) * size + np.abs(exact)) * 1.01).all()
    assert plda.transform(torch.from_numpy(embeddings).bfloat16()).dtype == torch.float32


def test_takes_memory_that_cannot_be_written():
    plda = small_model()
    embeddings, index = rows(), np.arange(20, dtype=np.uint32)
    expected = plda.scores(embeddings, index, index)
    for array in (embeddings, index):
        array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(plda.scores(embeddings, index, index), expected)


def test_fits_torch_and_in_blocks_as_numpy(monkeypatch):
    embeddings, speakers = simulated(np.full(30, 4))
    whole = Plda.fit(embeddings, [f"s{name:02}" for name in speakers], lda_dim=2, model="abc")
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 11)
    parts = Plda.fit(torch.from_numpy(embeddings), torch.from_numpy(speakers), lda_dim=2, model="abc")
    assert whole.model == parts.model == "abc" and (whole.dim, whole.embedding_dim) == (2, DIM)
    np.testing.assert_allclose(
        whole.scores(embeddings, speakers, speakers[::-1]),
        parts.scores(embeddings, speakers, speakers[::-1]),
        atol=1e-9,
    )
    first, second = whole.adapt(2 * embeddings), whole.adapt(torch.from_numpy(2 * embeddings))
    np.testing.assert_allclose(first.within_covariance, second.within_covariance, atol=1e-9)


def test_discriminant_analysis_is_that_of_scikit_learn():
    discriminant = pytest.importorskip("sklearn.discriminant_analysis")
    embeddings, speakers = simulated(np.random.default_rng(8).integers(2, 9, size=40))
    plda = Plda.fit(embeddings, speakers, lda_dim=2)
    theirs = discriminant.LinearDiscriminantAnalysis(solver="eigen").fit(embeddings, speakers).scalings_[:, :2].T
    cosines = (plda.projection * theirs).sum(axis=1)
    cosines /= np.linalg.norm(plda.projection, axis=1) * np.linalg.norm(theirs, axis=1)
    np.testing.assert_allclose(np.abs(cosines), 1, atol=1e-9)
    np.testing.assert_allclose(plda.offset, -plda.projection @ embeddings.mean(axis=0), atol=1e-12)
    means = np.stack([embeddings[speakers == name].mean(axis=0) for name in range(40)])
    rest = (embeddings - means[speakers]) @ plda.projection.T
    np.testing.assert_allclose(rest.T @ rest / (len(rest) - 40), np.eye(2), atol=1e-9)
    # The model is of vectors of length sqrt(D).
    projected = embeddings @ plda.projection.T + plda.offset
    projected *= np.sqrt(2) / np.linalg.norm(projected, axis=1, keepdims=True)
    np.testing.assert_allclose(plda.transform(embeddings), (projected - plda.mean) @ plda.diagonalizer.T, atol=1e-12)


@pytest.mark.parametrize("recenter", [True, False], ids=["recentred", "as it was"])
def test_adaptation_gives_the_excess_away(recenter):
    embeddings, speakers = simulated(np.full(200, 4))
    plda = Plda.fit(embeddings, speakers, length_norm=False)
    foreign = np.random.default_rng(10).normal(size=(500, DIM)) @ (5 * np.eye(DIM)) + [3.0, 0, 0, 0]
    everything = np.cov(foreign.T, bias=True)
    within, between = plda.within_covariance, plda.between_covariance
    assert np.linalg.eigvalsh(everything - within - between)[0] > 0  # more in each direction
    adapted = plda.adapt(foreign, mean_diff_scale=0.5, recenter=recenter)
    np.testing.assert_allclose(adapted.mean - adapted.offset, foreign.mean(axis=0), atol=1e-10)
    difference = adapted.mean - plda.mean
    assert np.abs(adapted.mean).max() < 1e-12 if recenter else np.abs(difference).max() > 1
    excess = everything + 0.5 * np.outer(difference, difference) - within - between
    np.testing.assert_allclose(adapted.within_covariance, within + 0.3 * excess, atol=1e-9)
    np.testing.assert_allclose(adapted.between_covariance, between + 0.7 * excess, atol=1e-9)
    np.testing.assert_allclose(
        adapted.diagonalizer @ adapted.within_covariance @ adapted.diagonalizer.T, np.eye(DIM), atol=1e-9
    )


def test_adaptation_keeps_what_varies_less_and_may_keep_the_offset():
    plda = small_model()
    near = np.linalg.lstsq(plda.projection, plda.mean - plda.offset, rcond=None)[0] + 1e-3 * rows()
    kept = plda.adapt(near, mean_diff_scale=0.0, recenter=False)
    np.testing.assert_allclose(kept.within_covariance, plda.within_covariance, atol=1e-9)
    np.testing.assert_allclose(kept.between_covariance, plda.between_covariance, atol=1e-9)
    projected = near @ plda.projection.T + plda.offset
    np.testing.assert_allclose(kept.mean, projected.mean(axis=0), atol=1e-12)
    np.testing.assert_array_equal(kept.offset, plda.offset)
    # Far away in one direction alone, the square of the way is the excess.
    far = near + np.linalg.lstsq(plda.projection, 50 * np.eye(3)[0], rcond=None)[0]
    shift = far @ plda.projection.T + plda.offset - plda.mean
    total = plda.within_covariance + plda.between_covariance
    moved = plda.adapt(far, within_covar_scale=1.0, between_covar_scale=0.0, recenter=False)
    along = shift.mean(axis=0)
    assert along @ np.linalg.solve(total, along) > 1
    np.testing.assert_allclose(moved.between_covariance, plda.between_covariance, atol=1e-6)
    normal = np.linalg.solve(total, along)
    # In the direction that the total covariance pairs with the shift, all of the new variance is within.
    expected = normal @ (np.outer(along, along) + np.cov((shift).T, bias=True)) @ normal
    np.testing.assert_allclose(
        normal @ (moved.within_covariance + plda.between_covariance) @ normal, expected, rtol=1e-6
    )


TEXT = """<Plda>  [ 1 -1 ]
 [
  1 0 
  0 2 ]
 [ 3 0 ]
</Plda> 
"""


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # The vectors are (2, 0) and (0, 1). Given the first, the second has mean (1.5, 0) and variance (1.75, 1).
        ({"normalize_length": False}, 0.5 * (np.log(4 / 1.75) - 1.5**2 / 1.75)),
        # Divided by the variances (4, 1) their squared lengths are 1 and 1, not 2: they grow by the root of 2.
        ({}, 0.5 * (np.log(4 / 1.75) - 2 * 1.5**2 / 1.75)),
        # Their squared lengths are 4 and 1: (root of 2, 0) and (0, root of 2).
        ({"simple_length_norm": True}, 0.5 * (np.log(4 / 1.75) - 0.5 * 1.5**2 / 1.75)),
    ],
    ids=["plain", "normalized", "simple"],
)
def test_reads_text_by_hand(tmp_path, settings, expected):
    (tmp_path / "plda").write_text(TEXT)
    plda = Plda.from_kaldi(tmp_path / "plda", length_norm=False, **settings)
    got = plda.scores(np.array([[3.0, -1.0], [1.0, -0.5]]), [0], [1])
    assert got[0] == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "text"])
def test_kaldi_files_make_the_round_trip(tmp_path, binary):
    plda = small_model(length_norm=True, normalize_length=True)
    plda.to_kaldi(tmp_path / "plda", transform=tmp_path / "transform.mat", binary=binary)
    again = Plda.from_kaldi(tmp_path / "plda", transform=tmp_path / "transform.mat")
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(again, name), getattr(plda, name))
    assert (tmp_path / "plda").read_bytes().startswith(b"\0B<Plda> DV \4\3\0\0\0" if binary else b"<Plda>  [ ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plda", "transform.mat"]


def test_kaldiio_reads_and_writes_the_matrices(tmp_path):
    kaldiio = pytest.importorskip("kaldiio")
    plda = small_model()
    plda.to_kaldi(tmp_path / "plda", transform=tmp_path / "transform.mat")
    theirs = kaldiio.load_mat(str(tmp_path / "transform.mat"))
    np.testing.assert_array_equal(theirs, np.column_stack([plda.projection, plda.offset]))
    mean = np.arange(5, dtype=np.float32)
    kaldiio.save_mat(str(tmp_path / "mean.vec"), mean)
    for columns in (5, 6):
        kaldiio.save_mat(str(tmp_path / "lda.mat"), theirs[:, :columns].astype(np.float32))
        read = Plda.from_kaldi(tmp_path / "plda", mean=tmp_path / "mean.vec", transform=tmp_path / "lda.mat")
        single = theirs.astype(np.float32).astype(np.float64)
        np.testing.assert_array_equal(read.projection, single[:, :5])
        np.testing.assert_allclose(
            read.offset, (single[:, 5] if columns == 6 else 0) - single[:, :5] @ mean, atol=1e-12
        )
        arrays = Plda.from_kaldi(tmp_path / "plda", mean=mean, transform=theirs[:, :columns].astype(np.float32))
        np.testing.assert_array_equal(arrays.offset, read.offset)


def test_mean_alone_shifts(tmp_path):
    (tmp_path / "plda").write_text(TEXT)
    (tmp_path / "mean.vec").write_text(" [ 0.5 1 ]\n")
    plda = Plda.from_kaldi(tmp_path / "plda", mean=tmp_path / "mean.vec", length_norm=False, normalize_length=False)
    np.testing.assert_array_equal(plda.transform(np.array([[3.0, 1.0]])), [[1.5, 2.0]])


def test_a_model_of_one_dimension_makes_the_round_trip(tmp_path):
    plda = Plda([1.0], [[2.0]], [3.0], [[1.0]], [0.0])
    plda.to_kaldi(tmp_path / "plda", binary=False)
    assert Plda.from_kaldi(tmp_path / "plda").diagonalizer.tolist() == [[2.0]]


def binary_plda(*parts):
    return b"\0B<Plda> " + b"".join(parts) + b"</Plda> "


VECTOR = b"DV " + struct.pack("<bid", 4, 1, 1.0)
MATRIX = b"DM " + struct.pack("<bibid", 4, 1, 4, 1, 1.0)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "b'' where b'<Plda>' is expected"),
        (b"\0B<Nnet> ", "b'<Nnet>' where b'<Plda>' is expected"),
        (binary_plda(VECTOR, VECTOR, VECTOR), "1 dimensions where 2 are expected"),
        (binary_plda(VECTOR, MATRIX, b"CM " + VECTOR[3:]), "b'CM' where one of FV, DV, FM, DM is expected"),
        (binary_plda(VECTOR, MATRIX, VECTOR)[:-20], "not in Kaldi's form"),
        (binary_plda(VECTOR, MATRIX, VECTOR) + b"x", "more than is expected"),
        (binary_plda(VECTOR, MATRIX, b"DV " + struct.pack("<bi", 8, 1)), "a wrong size"),
        (binary_plda(VECTOR, MATRIX, b"DV " + struct.pack("<bidd", 4, 2, 1.0, 1.0)), r"mean must have shape \(D\)"),
        (binary_plda(VECTOR, MATRIX, b"DV " + struct.pack("<bid", 4, 1, -1.0)), "psi must not be negative, got -1.0"),
        (TEXT.replace("]", "").encode(), "no array in brackets"),
        (TEXT.replace("2 ]", "x ]").encode(), "could not convert"),
        (TEXT.replace("0 2", "2").encode(), "not in Kaldi's form"),
        (TEXT.replace("3 0", "nan 0").encode(), "psi must be finite"),
    ],
)
def test_damaged_kaldi_files(tmp_path, contents, message):
    (tmp_path / "plda").write_bytes(contents)
    with pytest.raises(InputError, match=message) as caught:
        Plda.from_kaldi(tmp_path / "plda")
    assert str(tmp_path / "plda") in str(caught.value)


def test_kaldi_files_that_do_not_fit(tmp_path):
    with pytest.raises(InputError, match=r"plda: cannot be read: No such file"):
        Plda.from_kaldi(tmp_path / "plda")
    with pytest.raises(InputError, match="transform must name a file"):
        small_model().to_kaldi(tmp_path / "plda")
    (tmp_path / "plda").write_text(TEXT)
    with pytest.raises(InputError, match=r"mean must have shape \(E,\) = \(2,\), got \(3,\)"):
        Plda.from_kaldi(tmp_path / "plda", mean=np.zeros(3))
    with pytest.raises(InputError, match=r"transform must have 2 dimensions, got \(3,\)"):
        Plda.from_kaldi(tmp_path / "plda", transform=np.zeros(3))
    with pytest.raises(InputError, match=r"projection must have shape \(D, E\) = \(2, 4\), got \(3, 4\)"):
        Plda.from_kaldi(tmp_path / "plda", mean=np.zeros(4), transform=np.zeros((3, 4)))


def test_is_saved_and_loaded(tmp_path):
    plda = small_model(length_norm=True, simple_length_norm=True, model="0123abcd")
    path = tmp_path / "plda.safetensors"
    plda.save(path)
    again = Plda.load(path)
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(again, name), getattr(plda, name))
    assert (again.length_norm, again.normalize_length, again.simple_length_norm) == (True, False, True)
    assert again.model == "0123abcd" and "0123abcd" in repr(again)
    contents = path.read_bytes()
    replace(plda, psi=2 * plda.psi).save(path)
    assert path.read_bytes() != contents and [p.name for p in tmp_path.iterdir()] == [path.name]
    np.testing.assert_array_equal(Plda.load(path).psi, 2 * plda.psi)


def test_files_of_something_else(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "plda.safetensors"
    with pytest.raises(InputError, match=r"plda\.safetensors: not a PLDA model"):
        Plda.load(path)
    path.write_bytes(b"x" * 100)
    with pytest.raises(InputError, match=r"plda\.safetensors: not a PLDA model"):
        Plda.load(path)
    path.write_bytes(safetensors.save({"mean": np.zeros(2)}))
    with pytest.raises(InputError, match="safetensors of something else"):
        Plda.load(path)
    facts = '{"kind": "plda", "format_version": 7}'
    path.write_bytes(safetensors.save({"mean": np.zeros(2)}, metadata={"spkfast": facts}))
    with pytest.raises(InputError, match="format version 7, this spkfast reads version 1"):
        Plda.load(path)
    path.write_bytes(safetensors.save({"mean": np.zeros(2)}, metadata={"spkfast": facts.replace("7", "1")}))
    with pytest.raises(InputError, match=r"damaged: .*psi"):
        Plda.load(path)


def broken(value):
    embeddings = rows(6)
    embeddings[4, 2] = value
    return embeddings


@pytest.mark.parametrize(
    ("embeddings", "speakers", "options", "message"),
    [
        (rows(6), [1] * 6, {}, "speakers must name at least two speakers, got 1"),
        (rows(6), range(6), {}, "no speaker has two utterances"),
        (rows(6), [0, 0, 0, 1, 1], {}, r"speakers must have shape \(U,\) = \(6,\), not empty, got \(5,\)"),
        (rows(0), [], {}, "not empty"),
        (rows(6)[0], [0, 0, 0, 1, 1], {}, r"embeddings must be floating with shape \(U, E\)"),
        (rows(6).astype(int), [0, 0, 0, 1, 1, 1], {}, "embeddings must be floating"),
        (broken(np.nan), [0, 0, 0, 1, 1, 1], {}, "embeddings must be finite, row 4 is not"),
        (broken(np.inf), [0, 0, 0, 1, 1, 1], {}, "embeddings must be finite, row 4 is not"),
        (rows(40), np.arange(40) % 4, {"lda_dim": 4}, r"lda_dim must lie in \[1, 3\], for 5 dimensions and 4 speakers"),
        (rows(40), np.arange(40) % 9, {"lda_dim": 6}, r"lda_dim must lie in \[1, 5\]"),
        (rows(40), np.arange(40) % 9, {"lda_dim": 0}, "lda_dim must lie in"),
        (rows(40), np.arange(40) % 9, {"num_iterations": -1}, "num_iterations must not be negative, got -1"),
        (rows(6), [0, 0, 0, 1, 1, 1], {}, "singular in 5 dimensions"),
        (rows(40)[:, [0, 1, 1]], np.arange(40) % 9, {"length_norm": False}, "singular in 3 dimensions"),
        (rows(40)[:, [0, 1, 1]], np.arange(40) % 9, {"lda_dim": 1}, "singular in 3 dimensions"),
    ],
)
def test_bad_training(embeddings, speakers, options, message):
    with pytest.raises(InputError, match=message):
        Plda.fit(embeddings, speakers, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.transform(rows(size=4)), "embeddings must have 5 dimensions, as this model, got 4"),
        (lambda p: p.scores(rows(size=4), [0], [0]), "embeddings must have 5 dimensions"),
        (lambda p: p.scores(rows(), [0], [0], transformed=True), "embeddings must have 3 dimensions"),
        (lambda p: p.score_matrix(rows(), rows(size=3)), "test must have 5 dimensions"),
        (lambda p: p.score_matrix(rows(size=3), rows()), "enrol must have 5 dimensions"),
        (lambda p: p.enrol(rows(size=3), range(20)), "embeddings must have 5 dimensions"),
        (lambda p: p.adapt(rows(size=3)), "embeddings must have 5 dimensions"),
        (lambda p: p.adapt(rows(1)), "embeddings must hold at least two rows, got 1"),
        (lambda p: p.adapt(rows(), between_covar_scale=-0.1), "between_covar_scale must be finite and not negative"),
        (lambda p: p.transform(broken(np.nan)), "embeddings must be finite, row 4 is not"),
        (lambda p: p.scores(broken(np.nan)[:, :3], [0], [0], transformed=True), "embeddings must be finite, row 4"),
        (lambda p: p.scores(rows(), [0, 20], [0, 0]), r"enrol_index must lie in \[0, 20\), got 0 to 20"),
        (lambda p: p.scores(rows(), [0], [-1]), "test_index must lie in"),
        (lambda p: p.scores(rows(), [0, 1], [0]), r"test_index must have shape \(trials,\) = \(2,\), got \(1,\)"),
        (lambda p: p.scores(rows(), 0, 0), r"enrol_index must have shape \(trials,\), got \(\)"),
        (lambda p: p.scores(rows(), [0.5], [0]), "enrol_index must hold integers, got float64"),
        (lambda p: p.scores(rows(), torch.tensor([True]), [0]), "enrol_index must hold integers, got torch.bool"),
        (lambda p: p.scores(rows(), [0], [0], num_enrol=[1, 2]), r"num_enrol must be an integer or have shape \(20,\)"),
        (lambda p: p.scores(rows(), [0], [0], num_enrol=0), "num_enrol must be at least 1, got 0"),
        (lambda p: p.transform(rows(), num_utterances=1.5), "num_utterances must hold integers"),
        (lambda p: replace(p, psi=-p.psi), "psi must not be negative, got -4.0"),
        (lambda p: replace(p, mean=p.mean[:2]), r"mean must have shape \(D\) = \(3,\), got \(2,\)"),
        (lambda p: replace(p, projection=np.zeros((0, 0))), "projection must have shape"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call(small_model())


def test_an_embedding_without_direction(monkeypatch):
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 1)
    plda = Plda(np.zeros(2), np.eye(2), np.ones(2), np.eye(2), np.array([-1.0, -2.0]), length_norm=True)
    with pytest.raises(InputError, match="embeddings must differ from their mean to have a length, row 1 does not"):
        plda.transform(np.array([[0.0, 0.0], [1.0, 2.0]]))


def test_page(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "plda.md").read_text()
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(11)
    speakers = np.repeat(np.arange(200), 6)
    embeddings = rng.normal(size=(200, 160))[speakers] + rng.normal(size=(1200, 160))
    names = {"embeddings": embeddings, "speakers": speakers, "in_domain": 2 * embeddings + 1}
    names |= {"enrol_index": np.arange(0, 1200, 6), "test_index": np.arange(1, 1200, 6)}
    for code in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(code, names)
    others = names["plda"].scores(embeddings, names["enrol_index"], np.roll(names["test_index"], 1))
    assert names["scores"].shape == (200,) and (names["scores"] > 0).mean() > 0.9 and (others < 0).mean() > 0.9
    assert names["matrix"].shape == (200, 1200)
    np.testing.assert_allclose(names["of_kaldi"].transform(embeddings), names["plda"].transform(embeddings), atol=1e-12)
