"""Score normalisation against the toolkits' own figures and against a loop over the definition."""

import json

import numpy as np
import pytest
import torch

from spkfast.errors import InputError
from spkfast.evaluation import as_norm, cohort_statistics, cosine_scores, normalized, s_norm, t_norm, z_norm


def rows(count, size=8, seed=0):
    return np.random.default_rng(seed).normal(size=(count, size))


def trials(count, num_rows, seed=1):
    return np.random.default_rng(seed).integers(num_rows, size=(2, count))


def by_definition(score, enrol, test, cohort, top_n, correction, sides="et"):
    def unit(x):
        return x / np.linalg.norm(x)

    found, deviations = [], []
    for side, name in ((enrol, "e"), (test, "t")):
        if name in sides:
            cosines = sorted((unit(side) @ unit(one) for one in cohort), reverse=True)[:top_n]
            deviations.append(np.std(cosines, ddof=correction))
            found.append((score - np.mean(cosines)) / deviations[-1])
    return np.mean(found), min(deviations)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("top_n", [2, 7, 40, None])
@pytest.mark.parametrize(("function", "sides"), [(s_norm, "et"), (z_norm, "e"), (t_norm, "t")])
def test_follows_the_definition(function, sides, top_n, unbiased, dtype):
    embeddings, cohort = rows(12).astype(dtype), rows(40, seed=2).astype(dtype)
    enrol, test = trials(30, 12)
    scores = cosine_scores(embeddings, enrol, test)
    found = function(scores, enrol, test, embeddings, cohort, top_n=top_n, unbiased=unbiased)
    assert found.dtype == dtype
    for one, score, e, t in zip(found, scores, enrol, test, strict=True):
        first, second = embeddings[e].astype(float), embeddings[t].astype(float)
        want, deviation = by_definition(score, first, second, cohort, top_n, unbiased, sides)
        # Cosines are off by some units in the last place; mean and deviation of them too.
        assert one == pytest.approx(want, abs=8 * np.finfo(dtype).eps / deviation * (1 + abs(want)))
    if function is s_norm and top_n:
        again = as_norm(scores, enrol, test, embeddings, cohort, top_n=top_n, unbiased=unbiased)
        np.testing.assert_array_equal(again, found)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("mean", [0, 1])
@pytest.mark.parametrize("top_n", [5, 20, 100, None])
def test_matches_wespeaker(golden, top_n, mean, dtype):
    arrays = np.load(golden / "scoring/score_norm_wespeaker.npz")
    shift = mean * arrays["mean_vec"]
    embeddings, cohort = ((arrays[name] - shift).astype(dtype) for name in ("eval", "cohort"))
    enrol, test = arrays["pairs"].T
    name = f"asnorm{top_n}_mean{mean}" if top_n else f"snorm_mean{mean}"
    statistics = cohort_statistics(embeddings, cohort, top_n=top_n)
    np.testing.assert_allclose(statistics.mean, arrays[f"{name}_cohort_mean"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(statistics.std, arrays[f"{name}_cohort_std"], rtol=0, atol=1e-5)
    scores = cosine_scores(embeddings, enrol, test)
    np.testing.assert_allclose(scores, arrays[f"raw_mean{mean}"], rtol=0, atol=1e-5)
    found = s_norm(scores, enrol, test, embeddings, cohort, top_n=top_n)
    # From the toolkit's own arrays, since its file has five decimals.
    raw, of_mean, of_std = (arrays[key] for key in (f"raw_mean{mean}", f"{name}_cohort_mean", f"{name}_cohort_std"))
    want = sum((raw - of_mean[side]) / of_std[side] for side in (enrol, test)) / 2
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5 * np.abs(want).max())
    np.testing.assert_allclose(found, arrays[f"{name}_file"][:, 0], rtol=0, atol=0.5e-5 + 1e-5 * np.abs(want).max())


@pytest.mark.parametrize("name", ["znorm", "tnorm", "snorm"])
@pytest.mark.parametrize("top_n", [5, 20, None])
def test_matches_speechbrain(golden, top_n, name):
    assert "unbiased" in " ".join(json.loads((golden / "scoring/score_norm_speechbrain.json").read_text())["notes"])
    arrays = np.load(golden / "scoring/score_norm_speechbrain.npz")
    enrol, test = arrays["pairs"].T
    embeddings, cohort = arrays["eval"], arrays["cohort"]
    scores = cosine_scores(embeddings, enrol, test)
    np.testing.assert_allclose(scores, arrays["cosine"], rtol=0, atol=1e-5)
    function = {"znorm": z_norm, "tnorm": t_norm, "snorm": s_norm}[name]
    found = function(scores, enrol, test, embeddings, cohort, top_n=top_n, unbiased=True)
    want = arrays[f"{name}_top{top_n}" if top_n else name]
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_other_rows_of_the_matrix_do_not_count():
    embeddings, cohort = rows(6), rows(20, seed=2)
    embeddings[5] = embeddings[4] = 1.0
    cohort = np.concatenate([cohort[:2], cohort[:2], cohort])
    scores, enrol, test = np.array([0.1, 0.2]), np.array([0, 3]), np.array([2, 1])
    found = as_norm(scores, enrol, test, embeddings, cohort, top_n=9)
    np.testing.assert_array_equal(found, as_norm(scores, enrol, test, embeddings[:4], cohort, top_n=9))


def test_torch_gives_torch():
    embeddings, cohort = rows(6), rows(20, seed=2)
    enrol, test = trials(9, 6)
    scores = cosine_scores(embeddings, enrol, test)
    want = as_norm(scores, enrol, test, embeddings, cohort, top_n=5)
    found = as_norm(
        torch.tensor(scores), torch.tensor(enrol), torch.tensor(test), *map(torch.tensor, (embeddings, cohort)), top_n=5
    )
    assert isinstance(found, torch.Tensor) and isinstance(want, np.ndarray)
    np.testing.assert_array_equal(found.numpy(), want)
    assert isinstance(cohort_statistics(torch.tensor(embeddings), torch.tensor(cohort)).mean, torch.Tensor)


def test_statistics_of_some_rows():
    embeddings, cohort = rows(6), rows(20, seed=2)
    every = cohort_statistics(embeddings, cohort, top_n=5)
    some = cohort_statistics(embeddings, cohort, top_n=5, index=np.array([4, 1, 4], dtype=np.uint16))
    assert np.isnan(some.mean[[0, 2, 3, 5]]).all()
    np.testing.assert_allclose(some.std[[1, 4]], every.std[[1, 4]], rtol=1e-14)
    assert np.isfinite(normalized(np.array([0.1]), [1], [4], some)).all()
    with pytest.raises(InputError, match="statistics must have a mean and a deviation of every row"):
        normalized(np.array([0.1]), [1], [2], some)
    for index, message in (([6], r"index must lie in \[0, 6\)"), ([-1], "index must lie in"), ([0.5], "hold integers")):
        with pytest.raises(InputError, match=message):
            cohort_statistics(embeddings, cohort, index=index)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_n": 21}, r"top_n must lie in 1\.\.20, the size of the cohort, got 21"),
        ({"top_n": 0}, r"top_n must lie in 1\.\.20"),
        ({"top_n": 1, "unbiased": True}, r"top_n must lie in 2\.\.20"),
        ({"top_n": 1}, "the 1 cosines of the cohort that count are all equal for row 0"),
        ({"cohort": rows(20, 7)}, "cohort must be torch.float64 of dimension 8 on cpu, .* got .* dimension 7"),
        ({"cohort": np.zeros((20, 8))}, "cohort must be finite and not zero, row 0 is not"),
        ({"cohort": np.ones((20, 8))}, "are all equal for row 0 of the embeddings"),
        ({"scores": np.array([0.1, np.nan])}, "scores must be finite, got nan"),
        ({"scores": np.array([0.1])}, r"scores must be floating of shape \(2,\), got torch.float64 \(1,\)"),
        ({"enrol_index": [0, 6]}, r"enrol_index must lie in \[0, 6\), got 0 to 6"),
    ],
)
def test_bad_input(changes, message):
    arguments = {
        "scores": np.array([0.1, 0.2]),
        "enrol_index": [0, 1],
        "test_index": [2, 3],
        "embeddings": rows(6),
        "cohort": rows(20, seed=2),
        "top_n": 5,
    }
    with pytest.raises(InputError, match=message):
        as_norm(**{**arguments, **changes})
