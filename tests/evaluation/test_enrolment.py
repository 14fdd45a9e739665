"""Speaker models: against a loop over speakers, and what is said of bad input."""

import numpy as np
import pytest
import torch

from spkfast.errors import InputError
from spkfast.evaluation import enrolment
from spkfast.evaluation.enrolment import enrol, read_spk2utt

NAMES = ["b", "a", "b", "c", "a", "b"]


@pytest.fixture
def rows():
    return np.random.default_rng(0).normal(size=(6, 4))


def expected(rows, members, weights, normalize):
    models = []
    for of_one in members:
        used = [rows[i] / (np.sqrt((rows[i] ** 2).sum()) if normalize else 1) for i in of_one]
        models.append(sum(weights[i] * x for i, x in zip(of_one, used, strict=True)) / sum(weights[i] for i in of_one))
    return np.stack(models)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("at_once", [1, 4, 65536])
def test_mean_of_each_speaker(rows, normalize, weighted, at_once, monkeypatch):
    monkeypatch.setattr(enrolment, "_ROWS_AT_ONCE", at_once)
    weights = np.arange(1.0, 7.0) if weighted else np.ones(6)
    given = weights if weighted else None
    names, models = enrol(rows, NAMES, weights=given, normalize=normalize)
    assert names == ["b", "a", "c"] and isinstance(models, np.ndarray)
    # Sums of at most six terms near one, in float64.
    np.testing.assert_allclose(models, expected(rows, [[0, 2, 5], [1, 4], [3]], weights, normalize), atol=1e-14)

    # An utterance of several speakers, and one of none.
    groups = {"x": [0, 1], "y": np.array([1, 2, 3]), "z": torch.tensor([5])}
    names, models = enrol(rows, groups, weights=given, normalize=normalize)
    assert names == ["x", "y", "z"]
    np.testing.assert_allclose(models, expected(rows, [[0, 1], [1, 2, 3], [5]], weights, normalize), atol=1e-14)


def test_types(rows):
    single = rows.astype(np.float32)
    names, models = enrol(single, np.array(NAMES))
    assert names == ["b", "a", "c"] and models.dtype == np.float32
    # One rounding of each value, which lies below one.
    np.testing.assert_allclose(models, enrol(single.astype(float), NAMES)[1], rtol=0, atol=2**-24)
    _, tensor = enrol(torch.from_numpy(single), NAMES, weights=torch.ones(6))
    assert isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32
    np.testing.assert_array_equal(tensor, models)
    names, models = enrol(single, {})
    assert names == [] and models.shape == (0, 4)


def test_a_zero_embedding_has_a_mean_but_no_direction(rows):
    rows[4] = 0
    np.testing.assert_allclose(enrol(rows, NAMES, normalize=False)[1][1], rows[1] / 2)
    with pytest.raises(InputError, match="embeddings must be finite and not zero, row 4 of 'a' is not"):
        enrol(rows, NAMES)
    enrol(rows, {"b": [0, 2]})  # row 4 is not used


@pytest.mark.parametrize(
    ("groups", "options", "error"),
    [
        (NAMES[:5], {}, r"groups must have length U = 6, got 5"),
        ({"a": []}, {}, r"groups\['a'\] must be rows, integers of shape \(rows,\), got float64 \(0,\)"),
        ({"a": [0.5]}, {}, r"groups\['a'\] must be rows, integers of shape \(rows,\), got float64 \(1,\)"),
        ({"a": [0, 6]}, {}, r"groups\['a'\] must lie in \[0, 6\), got 0 to 6"),
        ({"a": [-1]}, {}, r"groups\['a'\] must lie in \[0, 6\), got -1 to -1"),
        (NAMES, {"weights": [1.0] * 5}, r"weights must have shape \(U,\) = \(6,\), got \(5,\)"),
        (NAMES, {"weights": [1, 1, -1, 1, 1, 1]}, r"weights must be finite and at least 0, got -1.0 for row 2"),
        (NAMES, {"weights": [1, 1, 1, np.inf, 1, 1]}, r"weights must be finite and at least 0, got inf for row 3"),
        (NAMES, {"weights": [1, 0, 1, 1, 0, 1]}, r"weights of 'a' must not all be 0"),
    ],
)
def test_bad_input(rows, groups, options, error):
    with pytest.raises(InputError, match=f"^{error}$"):
        enrol(rows, groups, **options)


@pytest.mark.parametrize("normalize", [True, False])
def test_bad_embeddings(rows, normalize, monkeypatch):
    monkeypatch.setattr(enrolment, "_ROWS_AT_ONCE", 2)
    for wrong, error in (
        (rows[0], r"embeddings must be floating with shape \(U, E\), got torch.float64 \(4,\)"),
        (np.ones((6, 4), int), r"embeddings must be floating with shape \(U, E\), got torch.int64 \(6, 4\)"),
        (np.where(np.arange(6)[:, None] == 3, np.nan, rows), "embeddings must be finite.*, row 3 of 'c' is not"),
    ):
        with pytest.raises(InputError, match=error):
            enrol(wrong, NAMES, normalize=normalize)


def test_read_spk2utt(tmp_path):
    path = tmp_path / "spk2utt"
    path.write_text("a a-1 a-2\n\nb a-1\n")
    assert read_spk2utt(path) == {"a": ["a-1", "a-2"], "b": ["a-1"]}
    for content, error in (
        ("a a-1\nb\n", f"{path}:2: expected 'speaker utterance utterance ...', got 1 column"),
        ("a a-1\na a-2\n", f"{path}:2: the speaker 'a' is there twice"),
        ("a a-1 a-2 a-1\n", f"{path}:1: 'a' has the utterance 'a-1' twice"),
        ("\n", f"{path}: the file is empty"),
    ):
        path.write_text(content)
        with pytest.raises(InputError) as caught:
            read_spk2utt(path)
        assert str(caught.value) == error
    path.write_bytes(b"a a-1\nb \xff\n")
    with pytest.raises(InputError, match=":2: not UTF-8 text"):
        read_spk2utt(path)
    with pytest.raises(InputError, match="no such file"):
        read_spk2utt(tmp_path / "nothing")
