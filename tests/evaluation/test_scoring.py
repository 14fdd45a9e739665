"""Cosine scores and the figures of a trial list."""

import warnings

import numpy as np
import pytest
import torch

from spkfast.data.lists import Trial
from spkfast.errors import InputError
from spkfast.evaluation import cosine_scores, eer, evaluate_trials, min_dcf, scoring


def rows(count=7, size=5):
    return np.random.default_rng(0).normal(size=(count, size))


def test_cosine_follows_the_definition(monkeypatch):
    monkeypatch.setattr(scoring, "_TRIALS_AT_ONCE", 4)
    embeddings = rows()
    enrol, test = np.random.default_rng(1).integers(7, size=(2, 10))
    got = cosine_scores(embeddings, enrol, test)
    for score, a, b in zip(got, embeddings[enrol], embeddings[test], strict=True):
        assert score == pytest.approx(a @ b / np.sqrt(a @ a * (b @ b)), abs=1e-15)


def test_returns_the_kind_it_was_given():
    embeddings = rows()
    of_numpy = cosine_scores(embeddings, [0, 1], [2, 3])
    of_torch = cosine_scores(torch.tensor(embeddings), torch.tensor([0, 1]), torch.tensor([2, 3]))
    assert isinstance(of_numpy, np.ndarray) and isinstance(of_torch, torch.Tensor)
    np.testing.assert_array_equal(of_numpy, of_torch.numpy())
    assert cosine_scores(embeddings.astype(np.float32), [0], [1]).dtype == np.float32
    assert cosine_scores(embeddings, np.zeros(0, int), np.zeros(0, int)).shape == (0,)


def test_stays_within_one():
    embeddings = np.random.default_rng(2).normal(size=(500, 192)).astype(np.float32)
    index = np.arange(500)
    assert cosine_scores(embeddings, index, index).max() <= 1
    assert cosine_scores(np.concatenate([embeddings, -embeddings]), index, index + 500).min() >= -1


def test_takes_matrices_of_any_kind():
    embeddings = rows()
    enrol, test = np.array([0, 1, 6]), np.array([2, 3, 6], dtype=np.uint16)
    want = cosine_scores(embeddings, enrol, test)
    frozen = embeddings.copy()
    frozen.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for given in (embeddings.tolist(), embeddings.astype(">f8"), frozen, np.asfortranarray(embeddings)):
            np.testing.assert_array_equal(cosine_scores(given, enrol.tolist(), test), want)
        np.testing.assert_array_equal(cosine_scores(embeddings[::-1], 6 - enrol, 6 - test), want)
        np.testing.assert_array_equal(cosine_scores(torch.tensor(embeddings), enrol, test).numpy(), want)
    for scale in (1e30, 1e-30):  # whose squares are out of range
        found = cosine_scores((scale * embeddings).astype(np.float32), enrol, test)
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("embeddings", "enrol", "test", "message"),
    [
        (rows()[0], [0], [0], r"embeddings must be floating with shape \(U, E\)"),
        (rows().astype(int), [0], [0], "embeddings must be floating"),
        (rows(), [0, 7], [0, 0], r"enrol_index must lie in \[0, 7\), got 0 to 7"),
        (rows(), [0], [-1], "test_index must lie in"),
        (rows(), [0.5], [0], "enrol_index must hold integers"),
        (rows(), [0, 1], [0], "test_index must have shape"),
        (np.array([[1.0, 0.0], [0.0, 0.0]]), [0], [0], "row 1 is not"),
        (np.array([[np.nan, 0.0], [0.0, 1.0]]), [1], [1], "row 0 is not"),
    ],
)
def test_bad_input(embeddings, enrol, test, message):
    with pytest.raises(InputError, match=message):
        cosine_scores(embeddings, enrol, test)


def test_trial_list():
    keys = [f"s{i}/r/{j}.flac" for i in range(3) for j in range(3)]
    embeddings = rows(9) + np.repeat(rows(3), 3, axis=0)
    trials = [Trial(a[:2] == b[:2], a, b) for i, a in enumerate(keys) for b in keys[:i]]
    result = evaluate_trials(trials, keys, embeddings)
    assert result.num_speakers == 3
    assert result.labels.sum() == 9 and len(result.scores) == 36
    want = eer(
        result.scores,
        result.labels,
        enrol_speakers=[t.enrol[:2] for t in trials],
        test_speakers=[t.test[:2] for t in trials],
    )
    assert result.eer == want and result.eer.low is not None
    assert result.min_dcf == min_dcf(result.scores, result.labels, p_target=0.01)
    with pytest.raises(InputError, match=r"^x/y\.flac: .* no embedding"):
        evaluate_trials([*trials, Trial(False, keys[0], "x/y.flac")], keys, embeddings)


def test_no_interval_where_paths_do_not_tell_the_speaker():
    trials = [Trial(True, "wav/a1", "wav/a2"), Trial(False, "wav/a1", "wav/b1"), Trial(False, "wav/a2", "wav/b1")]
    result = evaluate_trials(trials, ["wav/a1", "wav/a2", "wav/b1"], rows(3))
    assert result.eer.low is None and result.eer.high is None and result.num_speakers is None
