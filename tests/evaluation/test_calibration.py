"""Calibration against scikit-learn, the analytic likelihood ratio, brute force and the toolkits' own figures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import expit, logit

from spkfast.errors import InputError
from spkfast.evaluation import calibration
from spkfast.evaluation.calibration import (
    LogisticCalibration,
    Qmf,
    espnet_quality,
    threshold_at_far,
    wespeaker_quality,
)

SETTINGS = ("asnorm5_mean0_dur", "asnorm5_mean0_nodur", "asnorm20_mean1_dur", "asnorm20_mean1_nodur")
SEPARABLE = SETTINGS[:2]  # 15 targets among 330 trials; a linear programme finds weights without an error
# Half the distance between the means of targets and nontargets, over the deviation of both.
STRENGTHS = (1.2, 0.8)


def trials(n=4000, systems=1, seed=0):
    """Scores of known likelihood ratio: targets N(m, 1) and nontargets N(-m, 1) have 2 m x."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(n) < 0.3).astype(int)
    strength = np.array(STRENGTHS[:systems])
    hidden = rng.normal(size=(n, systems)) + strength * (2 * labels[:, None] - 1)
    return 0.2 * hidden + 0.3, labels, hidden @ (2 * strength)


def class_weights(labels, p_target):
    return np.where(labels == 1, p_target / labels.sum(), (1 - p_target) / (1 - labels).sum())


def derivatives(model, inputs, labels, p_target=0.5):
    """Gradient, Hessian, and second moment of the gradient's terms, by weights and offset."""
    design = np.column_stack([inputs, np.ones(len(inputs))])
    share = expit(inputs @ model.weights + model.offset + logit(p_target))
    weight = class_weights(labels, p_target)
    terms = (weight * (share - labels))[:, None] * design
    return terms.sum(axis=0), (design.T * (weight * share * (1 - share))) @ design, terms.T @ terms


def cllr(ratios, labels):
    targets, nontargets = ratios[labels == 1], ratios[labels == 0]
    return (np.logaddexp(0, -targets).mean() + np.logaddexp(0, nontargets).mean()) / (2 * np.log(2))


def sklearn_fit(inputs, labels, p_target, c=1e12):
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=c, solver="newton-cholesky", tol=1e-10, max_iter=1000)
    model.fit(inputs, labels, sample_weight=class_weights(labels, p_target))
    return LogisticCalibration(model.coef_[0], model.intercept_[0] - logit(p_target))


@pytest.mark.parametrize("p_target", [0.5, 0.01, 0.9])
@pytest.mark.parametrize("systems", [1, 2])
def test_optimum_is_that_of_sklearn(systems, p_target):
    scores, labels, _ = trials(systems=systems)
    scores = scores + scores**3  # no straight line is right, so that the prior matters
    got = LogisticCalibration.fit(scores, labels, p_target=p_target)
    want = sklearn_fit(scores, labels, p_target)
    gradient, hessian, _ = derivatives(got, scores, labels, p_target)
    # The sum's terms are at most |design| times the weights, which add up to 1; 1e-14 allows for their rounding.
    assert np.abs(gradient).max() <= 1e-14 * max(1, np.abs(scores).max())
    # What a gradient that is not zero says about the distance to the optimum, times two for what curvature adds.
    theirs, _, _ = derivatives(want, scores, labels, p_target)
    bound = 2 * np.linalg.norm(np.linalg.inv(hessian), 2) * (np.linalg.norm(theirs) + np.linalg.norm(gradient))
    assert bound < 1e-4
    assert np.abs(got.weights - want.weights).max() <= bound
    assert abs(got.offset - want.offset) <= bound
    assert got.fitted_on["p_target"] == p_target and got.fitted_on["targets"] == labels.sum()


def test_priors_differ():
    scores, labels, _ = trials()
    scores = scores + scores**3
    low, high = (LogisticCalibration.fit(scores, labels, p_target=p) for p in (0.01, 0.9))
    assert abs(low.weights[0] / high.weights[0] - 1) > 0.1


@pytest.mark.parametrize("p_target", [0.5, 0.05])
@pytest.mark.parametrize("systems", [1, 2])
def test_recovers_the_analytic_likelihood_ratio(systems, p_target):
    scores, labels, ratios = trials(n=200_000, systems=systems, seed=1)
    got = LogisticCalibration.fit(scores, labels, p_target=p_target)
    weights = 2 * np.array(STRENGTHS[:systems]) / 0.2
    want = LogisticCalibration(weights, -0.3 * weights.sum())
    # Deviation of an M-estimator: inverse Hessian times the deviation of the gradient; a normal value exceeds five of
    # them once in 1.7 million.
    _, hessian, moment = derivatives(want, scores, labels, p_target)
    inverse = np.linalg.inv(hessian)
    deviation = np.sqrt(np.diag(inverse @ moment @ inverse))
    error = np.append(got.weights - want.weights, got.offset - want.offset)
    assert (np.abs(error) <= 5 * deviation).all()
    assert (deviation[:-1] < 0.05 * weights).all()  # so that the bound says something
    np.testing.assert_allclose(want.apply(scores), ratios, atol=1e-12)


def test_fusion_is_better_than_each_system():
    scores, labels, _ = trials(systems=2)
    fused = cllr(LogisticCalibration.fit(scores, labels).apply(scores), labels)
    for system in scores.T:
        assert fused < cllr(LogisticCalibration.fit(system, labels).apply(system), labels) - 0.02


def test_unit_and_origin_do_not_matter():
    scores, labels, _ = trials(systems=2)
    want = LogisticCalibration.fit(scores, labels).apply(scores)
    moved = scores * [1e-6, -1e5] + [1.0, 1e6]
    got = LogisticCalibration.fit(moved, labels)
    # The first system now enters as scores near 1 times weights of ten million: a few roundings of that product.
    np.testing.assert_allclose(got.apply(moved), want, rtol=0, atol=8 * got.weights[0] * 2**-53)


def test_blocks_make_no_difference(monkeypatch):
    scores, labels, _ = trials(systems=2)
    want = LogisticCalibration.fit(scores, labels)
    want_applied = want.apply(scores)
    monkeypatch.setattr(calibration, "_blocks", lambda rows, _=1: (slice(i, i + 7) for i in range(0, rows, 7)))
    got = LogisticCalibration.fit(scores, labels)
    np.testing.assert_allclose(got.weights, want.weights, rtol=1e-12)  # only the order of the sums differs
    np.testing.assert_allclose(want.apply(scores), want_applied, rtol=1e-13)


def test_dependent_and_constant_systems():
    scores, labels, _ = trials()
    alone = LogisticCalibration.fit(scores, labels)
    twice = LogisticCalibration.fit(np.hstack([scores, scores, np.full_like(scores, 0.1)]), labels)
    np.testing.assert_allclose(twice.weights, [alone.weights[0] / 2, alone.weights[0] / 2, 0], rtol=1e-9)
    assert twice.offset == pytest.approx(alone.offset, rel=1e-9)


def test_outlier():
    rng = np.random.default_rng(2)
    scores = np.append(rng.normal(size=3000), [-50.0])
    labels = np.append(scores[:-1] > 0, True).astype(int)
    got = LogisticCalibration.fit(scores, labels)
    gradient, _, _ = derivatives(got, scores[:, None], labels)
    assert np.abs(gradient).max() <= 1e-14 * 50


def test_newton_alone_would_not_arrive():
    """Scores over three orders of magnitude: a full step goes too far, a part of it does not."""
    targets = [
        [-0.7, 4.8],
        [21.3, 0.3],
        [32.1, -9.2],
        [41.0, 0.4],
        [123.4, -112.4],
        [-0.7, 0.3],
        [0.4, 0.8],
        [51.6, 4.4],
        [-0.9, 9.2],
    ]
    nontargets = [[-0.5, -2.7], [-1.3, -0.3], [0.1, -0.1], [-0.8, -114.6]]
    scores, labels = np.array(targets + nontargets), np.repeat([1, 0], [len(targets), len(nontargets)])
    got = LogisticCalibration.fit(scores, labels)
    gradient, _, _ = derivatives(got, scores, labels)
    # Ratios up to a few hundred hold their rounding, which the gradient multiplies by scores that are as large.
    assert np.abs(gradient).max() <= np.abs(scores).max() * np.abs(got.apply(scores)).max() * 2**-52


def test_tells_when_there_is_no_optimum():
    """A linear programme decides: weights with margins that are nowhere negative and not all zero."""
    from scipy.optimize import linprog

    outcomes = []
    for seed in range(80):
        rng = np.random.default_rng(seed)
        systems = 1 + seed % 3
        scores = np.round(rng.standard_t(2, size=(20, systems)), 1)
        labels = (rng.random(20) < expit(3 * scores.sum(axis=1))).astype(int)
        margins = np.column_stack([scores, np.ones(20)]) * (2 * labels[:, None] - 1)
        best = linprog(-margins.sum(axis=0), A_ub=-margins, b_ub=np.zeros(20), bounds=[(-1, 1)] * (systems + 1))
        separable = -best.fun > 1e-9
        outcomes.append(separable)
        if separable:
            with pytest.raises(InputError, match="apart"):
                LogisticCalibration.fit(scores, labels)
        else:
            LogisticCalibration.fit(scores, labels)
    assert 20 <= sum(outcomes) <= 60


@pytest.mark.parametrize(
    ("scores", "labels"),
    [
        ([0.0, 1, 2, 3], [0, 0, 1, 1]),
        ([3.0, 2, 1, 0], [0, 0, 1, 1]),
        ([[0.0, 0], [1, 2], [1, 0], [2, 2]], [0, 0, 1, 1]),  # neither system does it alone
        ([0.0, 1, 1, 2], [0, 0, 1, 1]),  # the tie is the only error
    ],
)
def test_separable_classes(scores, labels):
    cause = "no optimum that can be found: .* but for ties" if scores[1] == 1 == scores[2] else "apart without error"
    with pytest.raises(InputError, match=f"^scores .*{cause}.* set l2 above 0$"):
        LogisticCalibration.fit(scores, labels)
    inputs, labels = np.array(scores).reshape(4, -1), np.array(labels)
    mean, deviation = inputs.mean(axis=0), inputs.std(axis=0)
    got = LogisticCalibration.fit(scores, labels, p_target=0.2, l2=0.01)
    # The same cost on standardised scores; both stop within 1e-8 of the optimum, where weights are a few units.
    want = sklearn_fit((inputs - mean) / deviation, labels, 0.2, c=100).apply((inputs - mean) / deviation)
    np.testing.assert_allclose(got.apply(scores), want, atol=1e-7)


def test_torch_in_torch_out():
    scores, labels, _ = trials()
    model = LogisticCalibration.fit(torch.tensor(scores), torch.tensor(labels))
    assert repr(model) == repr(LogisticCalibration.fit(scores, labels))
    ratios = model.apply(torch.tensor(scores[:, 0], dtype=torch.float32))
    assert isinstance(ratios, torch.Tensor) and ratios.dtype == torch.float64
    np.testing.assert_array_equal(ratios, model.apply(scores[:, 0].astype(np.float32)))
    assert isinstance(model.apply([0.1, 0.2]), np.ndarray)


def test_files(tmp_path):
    scores, labels, _ = trials(systems=2)
    for kind, other in ((LogisticCalibration, Qmf), (Qmf, LogisticCalibration)):
        model = kind.fit(scores, labels, p_target=0.1, description="list A")
        file = tmp_path / "new" / f"{kind.__name__}.json"
        model.save(file)
        again = kind.load(file)
        np.testing.assert_array_equal(again.apply(scores), model.apply(scores))
        assert again.fitted_on == model.fitted_on
        assert again.fitted_on["description"] == "list A" and again.fitted_on["nontargets"] == (1 - labels).sum()
        assert [path.name for path in file.parent.glob(".*")] == []
        with pytest.raises(InputError, match=f"{file}: kind must be '{other.__name__}', got '{kind.__name__}'"):
            other.load(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "must hold an object"),
        ("{", "cannot be read as JSON"),
        ('{"kind": "Qmf", "weights": [1.0]}', "needs numbers weights and offset"),
        ('{"kind": "Qmf", "weights": ["x"], "offset": 0, "fitted_on": {}}', "needs numbers"),
        ('{"kind": "Qmf", "weights": [], "offset": 0, "fitted_on": {}}', r"weights must have shape \(features,\)"),
        ('{"kind": "Qmf", "weights": [NaN], "offset": 0, "fitted_on": {}}', "must be finite"),
    ],
)
def test_damaged_files(tmp_path, content, message):
    file = tmp_path / "model.json"
    file.write_text(content)
    with pytest.raises(InputError, match=f"^{file}: .*{message}"):
        Qmf.load(file)
    with pytest.raises(InputError, match=r"missing\.json: cannot be read"):
        Qmf.load(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("scores", "labels", "options", "message"),
    [
        ([1.0, 2, 3], [1, 1, 1], {}, "labels must hold both 0 and 1, got 3 targets in 3 trials"),
        ([], [], {}, "labels must hold both"),
        ([1.0, np.nan], [0, 1], {}, r"scores must be finite, got \[nan\] for trial 1"),
        ([[1.0, 0], [0, 0], [np.inf, 0]], [0, 1, 1], {}, "scores must be finite, got .* for trial 2"),
        ([1.0, 2], [0, 2], {}, "labels must be 0 or 1, got .*2.* for trial 1"),
        ([1.0, 2, 3], [0, 1], {}, r"must have one shape \(trials,\), got \(3,\) and \(2,\)"),
        (np.ones((2, 1, 1)), [0, 1], {}, r"scores must be numbers of shape .* got float64 \(2, 1, 1\)"),
        (["a", "b"], [0, 1], {}, "scores must be numbers"),
        ([1.0, 1, 1], [0, 1, 1], {}, "scores must differ"),
        ([1.0, 2], [0, 1], {"p_target": 1.0}, "p_target must lie between 0 and 1, got 1.0"),
        ([1.0, 2], [0, 1], {"p_target": float("nan")}, "p_target must lie"),
        ([1.0, 2], [0, 1], {"l2": -1.0}, "l2 must be finite and not negative, got -1.0"),
    ],
)
def test_bad_trials(scores, labels, options, message):
    with pytest.raises(InputError, match=message):
        LogisticCalibration.fit(scores, labels, **options)


def test_bad_use():
    model = LogisticCalibration([1.0, 2.0], 0.0)
    with pytest.raises(InputError, match=r"scores must have shape \(trials, 2\), as those of the fit, got \(3,\)"):
        model.apply(np.zeros(3))
    with pytest.raises(InputError, match="scores must be finite"):
        model.apply([[0.0, np.inf]])
    assert model.apply(np.zeros((0, 2))).shape == (0,)
    features, labels, _ = trials()
    with pytest.raises(InputError, match="solver must be one of newton, espnet, got 'lbfgs'"):
        Qmf.fit(features, labels, solver="lbfgs")
    with pytest.raises(InputError, match="p_target and l2 are options of the solver newton"):
        Qmf.fit(features, labels, solver="espnet", l2=0.1)


@pytest.mark.parametrize("far", [0.0, 0.01, 0.05, 0.29, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("decimals", [0, 1, 8])
def test_threshold_is_the_least_one(far, decimals):
    rng = np.random.default_rng(3)
    labels = np.repeat([0, 1], [100, 30])
    scores = np.round(rng.normal(size=130) + labels, decimals)
    got = threshold_at_far(torch.tensor(scores), labels, far)
    candidates = np.append(-np.inf, np.unique(scores))
    rates = np.array([np.mean(scores[labels == 0] > threshold) for threshold in candidates])
    want = int(np.argmax(rates <= far))
    # Between two scores the decisions are the same: the least threshold of all is the score of a nontarget.
    assert got.far == rates[want]
    assert got.threshold == candidates[want]
    assert got.miss_rate == np.mean(scores[labels == 1] <= candidates[want])


def test_threshold_bad_input():
    scores, labels = [0.0, 1, 2, 3, 4], [0, 0, 0, 0, 1]
    assert threshold_at_far(scores, labels, 0.25).threshold == 2
    with pytest.raises(InputError, match=r"far must be 0 or at least the share of one of the 4 nontargets, got 0\.2;"):
        threshold_at_far(scores, labels, 0.2)
    for far in (-0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match=r"far must lie in \[0, 1\]"):
            threshold_at_far(scores, labels, far)


@pytest.mark.parametrize("setting", SETTINGS)
def test_features_are_those_of_wespeaker(golden, setting):
    arrays = np.load(golden / "scoring/score_norm_wespeaker.npz")
    norm, with_duration = setting.rsplit("_", 1)
    printed = arrays[f"{norm}_file"]
    mean = arrays["mean_vec"] if norm.endswith("mean1") else 0
    features = wespeaker_quality(
        printed[:, 0],
        *arrays["pairs"].T,
        # Text files stand between wespeaker's steps: durations have 6 decimals, other values and the features 4.
        magnitudes=np.round(np.linalg.norm(arrays["eval"] - mean, axis=1).astype(np.float64), 4),
        cohort_means=np.round(arrays[f"{norm}_cohort_mean"], 4),
        durations_s=np.round(arrays["durations"], 6) if with_duration == "dur" else None,
        max_duration_s=10.0,
    )
    want = arrays[f"qmf_{setting}_factors"]
    assert features.shape == want.shape == (330, 13 if with_duration == "dur" else 9)
    np.testing.assert_array_equal(features[:, 0], want[:, 0])
    np.testing.assert_allclose(np.round(features[:, 1:], 4), want[:, 1:], rtol=0, atol=1e-9)


@pytest.mark.parametrize("setting", SETTINGS)
def test_optimum_is_below_where_wespeaker_stops(golden, setting):
    """Where that is depends on the last bit of its inputs: the weights are compared through what they do."""
    arrays = np.load(golden / "scoring/score_norm_wespeaker.npz")
    features, weights, bias, scores, reached = (
        arrays[f"qmf_{setting}_{name}"] for name in ("factors", "weight", "bias", "scores", "cllr")
    )
    labels = arrays["labels"]
    # wespeaker reads its weights back as float32. The rest is the order of 14 terms, of up to a thousand each.
    theirs = Qmf(torch.tensor(weights[0], dtype=torch.float32), np.float32(bias[0]))
    np.testing.assert_allclose(theirs.apply(features), scores, rtol=0, atol=14 * 1e3 * 2**-52)
    assert cllr(scores, labels) == pytest.approx(reached, abs=1e-8)
    if setting in SEPARABLE:
        with pytest.raises(InputError, match="features tell the two labels apart"):
            Qmf.fit(features, labels)
        model = Qmf.fit(features, labels, l2=1e-5)
    else:
        model = Qmf.fit(features, labels)
    assert cllr(model.apply(features), labels) < reached


def test_features_of_wespeaker_by_hand():
    features = wespeaker_quality(
        torch.tensor([1.5, -2.0]),
        torch.tensor([0, 2]),
        [1, 1],
        magnitudes=[2.0, 3.0, 6.0],
        cohort_means=[0.1, 0.2, 0.4],
        durations_s=[5.0, 30.0, 10.0],
    )
    assert isinstance(features, torch.Tensor)
    want = [
        [1.5, 5, 20, 15, 4, 2, 3, 1, 1.5, 0.1, 0.2, 0.1, 2],
        [-2, 10, 20, 10, 2, 3, 6, 3, 2, 0.2, 0.4, 0.2, 2],
    ]
    np.testing.assert_allclose(features, want, rtol=1e-15)


def utterances(count=20, crops=4, dimensions=6):
    rng = np.random.default_rng(4)
    embeddings = rng.normal(size=(count, crops, dimensions)).astype(np.float32)
    return {"embeddings": embeddings, "durations_s": rng.uniform(2, 15, count)}


def test_espnet(monkeypatch):
    from sklearn.linear_model import LogisticRegression

    monkeypatch.setattr(calibration, "_blocks", lambda rows, _=1: (slice(i, i + 7) for i in range(0, rows, 7)))
    of_utterance = utterances()
    rng = np.random.default_rng(5)
    enrol, test = rng.integers(20, size=(2, 300))
    labels = rng.integers(2, size=300)
    scores = rng.normal(size=300) + labels
    want = []
    for score, a, b in zip(scores, enrol, test, strict=True):
        row = [score, *(np.log(of_utterance["durations_s"][i]) for i in (a, b))]
        first, second = (of_utterance["embeddings"][i] for i in (a, b))
        row += [np.mean([np.abs(crop).sum() for crop in side]) for side in (first, second)]
        row += [np.mean([np.sqrt(crop @ crop) for crop in side]) for side in (first, second)]
        row += [np.std(side.mean(axis=0)) for side in (first, second)]
        want.append([*row, *first.std(axis=0), *second.std(axis=0)])
    got = espnet_quality(scores, enrol, test, **of_utterance)
    assert got.dtype == np.float32 and got.shape == (300, 9 + 2 * 6)
    # Values up to ten, from sums of 24 float32 numbers.
    np.testing.assert_allclose(got, np.array(want, dtype=np.float32), atol=10 * 24 * 2**-24)

    theirs = LogisticRegression(random_state=0, solver="liblinear").fit(got, labels)
    model = Qmf.fit(got, labels, solver="espnet")
    np.testing.assert_allclose(model.probability(got), theirs.predict_proba(got)[:, 1], rtol=1e-12)
    np.testing.assert_allclose(model.apply(got), theirs.decision_function(got), rtol=0, atol=1e-12)
    assert isinstance(model.probability(torch.tensor(got)), torch.Tensor)
    assert model.fitted_on["solver"] == "espnet"


def test_one_crop_has_no_deviation():
    of_utterance = utterances(crops=1)
    rng = np.random.default_rng(6)
    enrol, test = rng.integers(20, size=(2, 200))
    labels = rng.integers(2, size=200)
    features = espnet_quality(rng.normal(size=200) + labels, enrol, test, **of_utterance)
    assert (features[:, 9:] == 0).all() and (features[:, :9] != 0).all()
    assert (Qmf.fit(features, labels).weights[9:] == 0).all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"enrol_index": [0, 3]}, r"enrol_index must lie in \[0, 3\), the rows of magnitudes, got 0 to 3"),
        ({"test_index": [-1, 0]}, "test_index must lie in"),
        ({"test_index": [0]}, r"test_index must have shape \(2,\), as the scores, got \(1,\)"),
        ({"enrol_index": [0.0, 1.0]}, "enrol_index must hold integers, got float64"),
        ({"scores": [0.0, np.nan]}, "scores must be finite, that of trial 1 is not"),
        ({"scores": [[0.0, 1.0]]}, r"scores must have shape \(trials,\)"),
        ({"magnitudes": [1.0, 0.0, 1.0]}, "magnitudes must be finite and positive, got 0.0 for utterance 1"),
        ({"durations_s": [1.0, 2.0]}, r"durations_s must be numbers, one per utterance \(3,\), got float64 \(2,\)"),
        ({"durations_s": [1.0, -2.0, 1.0]}, "durations_s must be finite and positive, got -2.0"),
        ({"cohort_means": [0.1, np.inf, 0.1]}, "cohort_means must be finite, got inf for utterance 1"),
        ({"cohort_means": [0.1, 0.0, 0.1]}, "cohort_means must not be zero .* trial 1"),
        ({"durations_s": [1.0, 2.0, 3.0], "max_duration_s": 0.0}, "max_duration_s must be positive, got 0.0"),
    ],
)
def test_bad_quality_measures(changed, message):
    given = {
        "scores": [0.0, 1.0],
        "enrol_index": [0, 0],
        "test_index": [2, 1],
        "magnitudes": [1.0, 2.0, 3.0],
        "cohort_means": [0.1, 0.2, 0.3],
    }
    wespeaker_quality(**given)
    with pytest.raises(InputError, match=message):
        wespeaker_quality(**{**given, **changed})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"embeddings": np.zeros((20, 6))}, r"embeddings must be floating with shape \(U, crops, E\)"),
        ({"embeddings": np.zeros((20, 0, 6))}, "embeddings must be floating"),
        ({"embeddings": np.full((20, 4, 6), np.inf)}, "embeddings must be finite, those of utterance 0 are not"),
        ({"durations_s": np.zeros(20)}, "durations_s must be finite and positive"),
        ({"durations_s": np.ones(3)}, r"durations_s must be numbers, one per utterance \(20,\)"),
    ],
)
def test_bad_crops(changed, message):
    with pytest.raises(InputError, match=message):
        espnet_quality([0.0], [0], [1], **{**utterances(), **changed})


def test_page(tmp_path, monkeypatch):
    """The snippets of the page run in turn, as printed."""
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "calibration.md").read_text()
    names: dict[str, object] = {}
    for code in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(code, names)
    saved = json.loads((tmp_path / "calibration.json").read_text())
    assert saved["fitted_on"]["p_target"] == 0.05
    assert cllr(names["fused_ratios"], names["labels"]) < cllr(names["ratios"], names["labels"])
    assert names["far_threshold"].far <= 0.01 and names["features"].shape[1] == 13
