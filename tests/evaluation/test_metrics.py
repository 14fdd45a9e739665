"""Error rates against the toolkits' own figures, against loops over the definition, and by hand."""

import json
from statistics import NormalDist

import numpy as np
import pytest
import torch

from spkfast.errors import InputError
from spkfast.evaluation import metrics
from spkfast.evaluation.metrics import (
    act_dcf,
    bayes_threshold,
    cllr,
    differences,
    eer,
    error_rates,
    estimates,
    mcnemar,
    min_cllr,
    min_dcf,
)

CASES = (
    "gauss", "ties_2dec", "ties_1dec", "few_targets", "few_nontargets", "separated", "inverted", "tiny", "tiny_doc",
    "pair", "all_equal", "float32",
)  # fmt: skip
TIED = ("ties_2dec", "ties_1dec", "all_equal")
METHODS = {"clovaai": "clova", "espnet": "clova", "wespeaker": "interp", "speechbrain": "speechbrain"}


def trials(seed=0, n=300, decimals=1):
    rng = np.random.default_rng(seed)
    labels = rng.random(n) < 0.4
    return np.round(rng.normal(size=n) + 1.5 * labels, decimals), labels.astype(int)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("peer", METHODS)
def test_matches_the_toolkits(golden, peer, case):
    result = json.loads((golden / f"scoring/metrics_{peer}.json").read_text())["results"][case]
    arrays = np.load(golden / f"scoring/metrics_{peer}.npz")
    scores, labels = arrays[f"{case}__scores"], arrays[f"{case}__labels"]
    tolerance = 1e-7 if peer == "speechbrain" else 1e-12  # speechbrain counts in float32
    got = eer(scores, labels, method=METHODS[peer])
    # wespeaker's figure for tied scores depends on the order of an unstable sort, and it fails on `pair`.
    if peer != "wespeaker" or case not in (*TIED, "pair"):
        want = result["eer"]["eer_percent"] / 100 if "eer_percent" in result["eer"] else result["eer"]["eer"]
        assert got.value == pytest.approx(want, abs=tolerance)
        if "threshold" in result["eer"]:
            assert got.threshold == result["eer"]["threshold"]
    # All but speechbrain count tied trials one by one.
    together = {"ties": "together" if peer == "speechbrain" else "in_order"}
    for point in result["dcf"]:
        costs = point["p_target"], point["c_miss"], point["c_fa"]
        want = point.get("min_dcf")
        if want is None:
            want = point["min_dcf_unnormalised"] / min(costs[0] * costs[1], costs[2] * (1 - costs[0]))
        if peer == "wespeaker" and case in TIED:
            order = np.argsort(labels, kind="stable"), np.argsort(-labels, kind="stable")
            best, worst = (min_dcf(scores[way], labels[way], *costs, **together) for way in order)
            assert best - tolerance <= want <= worst + tolerance
        else:
            assert min_dcf(scores, labels, *costs, **together) == pytest.approx(want, abs=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_matches_speechbrain_to_its_own_rounding(golden, case):
    result = json.loads((golden / "scoring/metrics_speechbrain.json").read_text())["results"][case]
    arrays = np.load(golden / "scoring/metrics_speechbrain.npz")
    rates = error_rates(arrays[f"{case}__scores"], arrays[f"{case}__labels"])
    misses, false_alarms = (rate.astype(np.float32) for rate in rates[:2])
    nearest = 1 + np.argmin(np.abs(false_alarms[1:] - misses[1:]))
    rate = (float(false_alarms[nearest]) + float(misses[nearest])) / 2
    assert rate == pytest.approx(result["eer"]["eer"], rel=0, abs=1e-12)
    for point in result["dcf"]:
        prior, miss, fa = (np.float32(point[name]) for name in ("p_target", "c_miss", "c_fa"))
        costs = miss * misses * prior + fa * false_alarms * np.float32(1 - point["p_target"])
        assert costs.min() == pytest.approx(point["min_dcf_unnormalised"], rel=0, abs=1e-12)


def test_error_rates_follow_the_definition():
    scores, labels = trials()
    miss, false_alarm, thresholds = error_rates(scores, labels)
    assert thresholds[0] == -np.inf
    np.testing.assert_array_equal(thresholds[1:], np.unique(scores))
    for m, f, t in zip(miss, false_alarm, thresholds, strict=True):
        assert m == pytest.approx(np.mean(scores[labels == 1] <= t), abs=1e-15)
        assert f == pytest.approx(np.mean(scores[labels == 0] > t), abs=1e-15)


@pytest.mark.parametrize("method", ["interp", "clova", "speechbrain"])
def test_by_hand(method):
    # One of four targets below one of four nontargets: at the threshold between, both rates are 1/4.
    assert eer([0.1, 0.2, 0.3, 0.6, 0.5, 0.7, 0.8, 0.9], [0, 0, 0, 0, 1, 1, 1, 1], method=method).value == 0.25
    assert eer([0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1], method=method).value == 0
    assert eer([0.8, 0.9, 0.1, 0.2], [0, 0, 1, 1], method=method).value == 1


def test_interpolates_between_points():
    # Points around equality: misses 0 of 1 with false alarms 1/2, then misses 1 with false alarms 1/2.
    assert eer([0.2, 0.5, 0.8], [0, 1, 0]) == (0.5, 0.5, None, None)
    # All scores equal: from (0, 1) straight to (1, 0).
    assert eer([0.5] * 4, [0, 1, 0, 1]).value == 0.5


@pytest.mark.parametrize("method", ["interp", "clova", "speechbrain"])
def test_order_of_trials_does_not_matter(method):
    scores, labels = trials()
    order = np.random.default_rng(1).permutation(len(scores))
    assert eer(scores, labels, method=method) == eer(scores[order], labels[order], method=method)
    assert min_dcf(scores, labels) == min_dcf(scores[order], labels[order])


@pytest.mark.parametrize("method", ["interp", "clova", "speechbrain"])
def test_weights_are_repeated_trials(method):
    scores, labels = trials()
    sorted_trials = metrics._Trials(scores, labels == 1)
    for seed in range(20):
        weights = np.random.default_rng(seed).integers(4, size=len(scores))
        got, _ = metrics._METHODS[method](*sorted_trials.errors(weights[sorted_trials.order].astype(float)))
        want = eer(np.repeat(scores, weights), np.repeat(labels, weights), method=method).value
        assert got == pytest.approx(want, abs=1e-12)


def drawn_weights(enrol, test, num_resamples, seed):
    speakers = metrics._speakers(enrol, test, len(enrol))
    for drawn in metrics._draws(speakers.total, num_resamples, seed):
        yield drawn[speakers.first] * drawn[speakers.second]


def test_weight_is_the_product_of_the_counts():
    enrol, test = ["a", "a", "b", "c", "b"], ["a", "b", "c", "c", "b"]
    seen = set()
    for weights in drawn_weights(enrol, test, 200, seed=3):
        a, c, b = weights[0], weights[3], weights[4]  # same-speaker trials: the count itself
        assert a + b + c == 3
        assert list(weights) == [a, a * b, b * c, c, b]
        seen.add((a, b, c))
    assert len(seen) == 10  # every way to draw three of three


def test_interval_over_speakers():
    rng = np.random.default_rng(0)

    def interval(num_speakers, **options):
        enrol, test = rng.integers(num_speakers, size=(2, 4000))
        test = np.where(rng.random(4000) < 0.4, enrol, test)
        voice = rng.normal(size=num_speakers)  # what makes trials of a speaker alike
        scores = rng.normal(size=4000) + 2 * (enrol == test) + voice[enrol] + voice[test]
        return eer(scores, enrol == test, enrol_speakers=enrol, test_speakers=test, num_resamples=200, **options)

    few, many = interval(8), interval(200)
    for result in (few, many):
        assert 0 < result.low < result.value < result.high < 1
    assert few.high - few.low > 1.5 * (many.high - many.low)


def test_ends_are_quantiles_around_the_rank_of_the_figure():
    from scipy.stats import norm, t

    values = np.random.default_rng(0).normal(size=20001)
    for speakers in (16, 200, 10**6):
        reach = np.sqrt(speakers / (speakers - 1)) * t.ppf(0.975, speakers - 1)
        for value in (0, 0.3):
            centre = 2 * norm.ppf(np.mean(values < value))
            want = np.quantile(values, norm.cdf([centre - reach, centre + reach]))
            assert metrics._interval(values, value, speakers) == pytest.approx(want, abs=2e-3)
    assert metrics._interval(np.zeros(20), 0, 3) == (0, 0)  # no spread
    assert metrics._interval(np.arange(20.0), -1, 3)[0] == pytest.approx(0, abs=1e-3)  # below all resamples
    assert metrics._interval(np.zeros(19), 0, 3) == (None, None)


def simulated(rng, num_speakers, others):
    """Trials of speakers with offsets, 10 utterances each: all targets, each utterance against so many others."""
    speaker, utterance = rng.normal(size=num_speakers) * OFFSET, rng.normal(size=(num_speakers, 10)) * DRIFT
    first, second = np.triu_indices(10, 1)
    same = np.repeat(np.arange(num_speakers), len(first))
    one, other = np.tile(first, num_speakers), np.tile(second, num_speakers)
    targets = DISTANCE + 2 * speaker[same] + utterance[same, one] + utterance[same, other]
    enrol = np.repeat(np.arange(num_speakers), 10 * others)
    test = (enrol + 1 + rng.integers(num_speakers - 1, size=len(enrol))) % num_speakers
    nontargets = speaker[enrol] + speaker[test]
    for side in (enrol, test):
        nontargets += utterance[side, rng.integers(10, size=len(side))]
    scores = np.concatenate([targets, nontargets])
    labels = np.arange(len(scores)) < len(targets)
    sides = {"enrol_speakers": np.append(same, enrol), "test_speakers": np.append(same, test)}
    return scores + rng.normal(size=len(scores)), labels, sides


OFFSET, DRIFT, DISTANCE = 0.5, 0.3, 3.0
# Both kinds of score are normal; where the rates are equal, the threshold is as many deviations from either mean.
TRUTH = NormalDist().cdf(-DISTANCE / sum(np.sqrt(k * OFFSET**2 + 2 * DRIFT**2 + 1) for k in (4, 2)))


def coverage(num_speakers, others, runs=500):
    rng = np.random.default_rng(0)
    covered = 0
    for run in range(runs):
        scores, labels, sides = simulated(rng, num_speakers, others)
        rate = eer(scores, labels, **sides, num_resamples=200, seed=run)
        covered += rate.low <= TRUTH <= rate.high
    return covered / runs


@pytest.mark.full
def test_intervals_cover_the_truth(capsys):
    found = coverage(200, 10)
    with capsys.disabled():
        print(f"\ncoverage of 95 % intervals: 200 speakers {found:.1%}, 16 speakers {coverage(16, 10):.1%}")
    assert 0.93 <= found <= 0.97


def test_interval_is_repeatable_and_optional():
    scores, labels = trials()
    speakers = [f"s{i % 12}" for i in range(len(scores))]
    first = eer(scores, labels, enrol_speakers=speakers, test_speakers=speakers[::-1], num_resamples=50)
    again = eer(scores, labels, enrol_speakers=speakers, test_speakers=speakers[::-1], num_resamples=50)
    other = eer(scores, labels, enrol_speakers=speakers, test_speakers=speakers[::-1], num_resamples=50, seed=1)
    assert first == again
    assert first[:2] == other[:2] and first != other
    assert eer(scores, labels)[2:] == (None, None)


def test_resamples_without_both_kinds_are_left_out():
    # A resample has both kinds of trial only where it has the second speaker and another one.
    def low(seed, num_resamples):
        speakers = ["a", "b", "c"]
        options = {"num_resamples": num_resamples, "seed": seed}
        return eer([0.9, 0.1, 0.8], [1, 0, 1], enrol_speakers=speakers, test_speakers=speakers, **options).low

    assert {low(seed, 20) for seed in range(9)} == {None}  # fewer than 20 of 20 are left
    assert {low(seed, 50) for seed in range(5)} == {0.0}
    with pytest.raises(InputError, match="num_resamples must be at least 20, got 19"):
        low(0, 19)


def test_takes_torch_and_lists():
    scores, labels = trials()
    want = eer(scores, labels)
    assert eer(torch.tensor(scores, requires_grad=True), torch.tensor(labels)) == want
    assert eer(scores.tolist(), [bool(label) for label in labels]) == want
    assert eer(torch.tensor([0.5, 1.5], dtype=torch.bfloat16), [0, 1]).threshold == 0.5


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([0.1, 0.2], [1]), {}, r"one shape \(trials,\), got \(2,\) and \(1,\)"),
        (([[0.1, 0.2]], [[0, 1]]), {}, "one shape"),
        (([0.1, np.nan], [0, 1]), {}, "scores must be finite, got nan for trial 1"),
        (([0.1, -np.inf], [0, 1]), {}, "scores must be finite, got -inf for trial 1"),
        (([0.1, 0.2], [0, 2]), {}, "labels must be 0 or 1, got .*2.* for trial 1"),
        (([0.1, 0.2], [1, 1]), {}, "both 0 and 1, got 2 targets in 2 trials"),
        (([], []), {}, "both 0 and 1"),
        ((["a", "b"], [0, 1]), {}, "scores must be numbers"),
        (([0.1, 0.2], [0, 1]), {"method": "best"}, "method must be one of interp, clova, speechbrain, got 'best'"),
        (([0.1, 0.2], [0, 1]), {"enrol_speakers": ["a", "b"]}, "must be given together"),
        (([0.1, 0.2], [0, 1]), {"enrol_speakers": ["a", "b"], "test_speakers": ["a"]}, "test_speakers must have shape"),
    ],
)
def test_bad_input(arguments, options, message):
    with pytest.raises(InputError, match=message):
        eer(*arguments, **options)


def test_bad_costs():
    with pytest.raises(InputError, match="p_target must lie between 0 and 1, got 0"):
        min_dcf([0.1, 0.2], [0, 1], p_target=0)
    for cost in (0, np.inf, np.nan):
        with pytest.raises(InputError, match="must be positive and finite"):
            min_dcf([0.1, 0.2], [0, 1], c_fa=cost)


def test_no_interval_from_two_speakers():
    """Every resample with both of two speakers is the list itself: no width, no knowledge."""
    rate = eer([0.9, 0.2, 0.8, 0.1, 0.5], [1, 1, 1, 0, 0], enrol_speakers=list("aabab"), test_speakers=list("aabba"))
    assert rate.low is None and rate.high is None


def _speakers(n=300):
    rng = np.random.default_rng(5)
    return {"enrol_speakers": rng.integers(8, size=n), "test_speakers": rng.integers(8, size=n)}


ALL = ("eer", "eer:clova", "min_dcf:0.01", "min_dcf:0.05:10:1", "act_dcf:0.3", "cllr", "min_cllr")


def of_repeated(scores, labels, metric):
    return estimates(scores, labels, [metric])[metric].value


@pytest.mark.parametrize("metric", ALL)
def test_difference_is_that_of_both_figures_on_the_same_resamples(metric):
    first, labels = trials(1)
    second = first + np.random.default_rng(2).normal(size=300)
    speakers = _speakers()
    found = differences(first, second, labels, [metric], **speakers, num_resamples=50, seed=3)[metric]
    assert found.value == of_repeated(second, labels, metric) - of_repeated(first, labels, metric)
    values = []
    for weights in drawn_weights(*speakers.values(), 50, 3):
        counts = weights.astype(int)
        drawn = [np.repeat(values, counts) for values in (first, second, labels)]
        values.append(of_repeated(drawn[1], drawn[2], metric) - of_repeated(drawn[0], drawn[2], metric))
    want = metrics._interval(np.array(values), found.value, 8)
    assert (found.low, found.high) == pytest.approx(want)
    assert found.p_value == pytest.approx(metrics._p_value(np.array(values), found.value, 8))


def test_p_value_agrees_with_the_interval():
    from scipy.stats import norm, t

    rng = np.random.default_rng(0)
    for speakers in (5, 16, 200):
        for centre in rng.normal(size=20) * 2:
            values = rng.normal(size=5000) + centre
            value = centre + 0.2 * rng.normal()
            low, high = metrics._interval(values, value, speakers)
            p_value = metrics._p_value(values, value, speakers)
            assert (p_value < 0.05) == (not low <= 0 <= high) or abs(p_value - 0.05) < 2e-3
    # Without bias and with many speakers it is the usual one.
    values = norm.ppf((np.arange(9999) + 0.5) / 9999) + 1.5
    assert metrics._p_value(values, 1.5, 10**6) == pytest.approx(2 * norm.sf(1.5), rel=1e-2)
    assert metrics._p_value(values, 1.5, 10) == pytest.approx(2 * t.sf(1.5 * np.sqrt(0.9), 9), rel=1e-2)


def test_resamples_can_be_watched():
    seen = []

    def watch(resamples, total):
        for resample in resamples:
            seen.append(total)
            yield resample

    scores, labels = trials(1)
    speakers = _speakers()
    plain = estimates(scores, labels, **speakers, num_resamples=30)
    assert estimates(scores, labels, **speakers, num_resamples=30, watch=watch) == plain and seen == [30] * 30
    differences(scores, scores, labels, **speakers, num_resamples=20, watch=watch)
    assert seen[30:] == [20] * 20


def test_no_difference_from_itself():
    scores, labels = trials(1)
    found = differences(scores, 2 * scores, labels, ["eer", "min_dcf:0.01", "min_cllr"], **_speakers())
    assert {tuple(value) for value in found.values()} == {(0, 0, 0, 1)}


def test_a_difference_of_a_worse_system_is_significant():
    scores, labels = trials(1)
    found = differences(scores, np.random.default_rng(2).normal(size=300), labels, **_speakers())["eer"]
    assert found.low > 0 and found.p_value < 0.05


def test_pairing_makes_the_interval_narrower():
    scores, labels = trials(1, decimals=6)
    second = scores + 0.01 * np.random.default_rng(2).normal(size=300)
    found, alone = differences(scores, second, labels, **_speakers())["eer"], eer(scores, labels, **_speakers())
    assert found.high - found.low < (alone.high - alone.low) / 3


def test_difference_refuses_unknown_metrics_and_other_trials():
    scores, labels = trials(1)
    with pytest.raises(InputError, match=r"unknown metric 'eerr' \(did you mean 'eer'\?\); known: eer, eer:clova"):
        differences(scores, scores, labels, ["eerr"], **_speakers())
    with pytest.raises(InputError, match=r"^second_scores and labels must have one shape"):
        differences(scores, scores[:-1], labels, **_speakers())
    with pytest.raises(InputError, match=r"^first_scores must be finite, got nan for trial 0"):
        differences(np.where(np.arange(300) == 0, np.nan, scores), scores, labels, **_speakers())


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("eer:best", "method must be one of"),
        ("min_dcf", "unknown metric 'min_dcf'"),
        ("min_dcf:0.01:1", "unknown metric"),
        ("min_dcf:x", "metric 'min_dcf:x': could not convert"),
        ("act_dcf:1", "metric 'act_dcf:1': p_target must lie between 0 and 1"),
        ("cllr:1", "unknown metric"),
    ],
)
def test_bad_metrics(metric, message):
    with pytest.raises(InputError, match=message):
        estimates([0.1, 0.2], [0, 1], [metric])


def test_estimates_are_the_single_figures():
    scores, labels = trials(4)
    speakers = _speakers()
    found = estimates(scores, labels, ALL, **speakers, num_resamples=60, seed=2)
    rate = eer(scores, labels, **speakers, num_resamples=60, seed=2)
    assert found["eer"] == (rate.value, rate.low, rate.high)
    assert found["eer:clova"].value == eer(scores, labels, method="clova").value
    assert found["min_dcf:0.01"].value == min_dcf(scores, labels)
    assert found["min_dcf:0.05:10:1"].value == min_dcf(scores, labels, 0.05, 10, 1)
    assert found["act_dcf:0.3"].value == act_dcf(scores, labels, 0.3)
    assert found["cllr"].value == cllr(scores, labels) and found["min_cllr"].value == min_cllr(scores, labels)
    assert all(value.low <= value.value <= value.high for value in found.values())
    assert estimates(scores, labels)["eer"] == (rate.value, None, None)


def test_cost_at_the_threshold_of_bayes():
    scores, labels = trials(decimals=1)
    for point in ((0.01, 1, 1), (0.3, 1, 1), (0.5, 1, 1), (0.4, 10, 3), (0.999, 1, 1)):
        threshold = bayes_threshold(*point)
        prior, miss, fa = point
        assert threshold == pytest.approx(np.log(fa * (1 - prior) / (miss * prior)), abs=1e-12)
        cost = miss * prior * np.mean(scores[labels == 1] <= threshold)
        cost += fa * (1 - prior) * np.mean(scores[labels == 0] > threshold)
        want = cost / min(miss * prior, fa * (1 - prior))
        got = act_dcf(scores, labels, *point)
        assert got == pytest.approx(want, abs=1e-12) and got >= min_dcf(scores, labels, *point)


def test_cllr_follows_the_definition():
    scores, labels = trials()
    of_targets = np.mean(np.log2(1 + np.exp(-scores[labels == 1])))
    of_nontargets = np.mean(np.log2(1 + np.exp(scores[labels == 0])))
    assert cllr(scores, labels) == pytest.approx((of_targets + of_nontargets) / 2, abs=1e-14)
    assert cllr(np.zeros(4), [0, 1, 0, 1]) == 1
    assert cllr([-1e4, 1e4], [0, 1]) == 0
    assert cllr([1e4, -1e4], [0, 1]) == pytest.approx(1e4 / np.log(2))


def test_min_cllr_is_the_least_of_all_increasing_maps():
    from scipy.optimize import LinearConstraint, minimize

    scores, labels = trials(3, n=40, decimals=0)
    levels, level = np.unique(scores, return_inverse=True)
    increasing = LinearConstraint(np.diff(np.eye(len(levels)), axis=0), 0, np.inf)
    best = minimize(lambda x: cllr(np.clip(x, -30, 30)[level], labels), levels, constraints=increasing, method="SLSQP")
    found = min_cllr(scores, labels)
    assert best.fun - 1e-4 < found <= best.fun + 1e-9
    assert found == min_cllr(np.exp(scores), labels) <= cllr(scores, labels)
    assert min_cllr([0.1, 0.2, 0.8], [0, 0, 1]) == 0  # certain
    assert min_cllr([0.9, 0.8, 0.1], [0, 0, 1]) == 1  # tells nothing that an increasing map could use


def test_mcnemar_by_hand():
    labels = [1, 1, 1, 1, 0, 0, 0, 0]
    right = np.array([1, 1, 1, 1, 0, 0, 0, 0.0])
    wrong = np.array([0, 0, 0, 1, 1, 0, 0, 0.0])
    options = {"first_threshold": 0.5, "second_threshold": 0.5}
    assert mcnemar(right, wrong, labels, **options) == (0, 4, 2 / 2**4)
    assert mcnemar(wrong, right, labels, **options) == (4, 0, 2 / 2**4)
    assert mcnemar(right, right, labels, **options) == (0, 0, 1)
    # At a threshold of 1 nothing is accepted: all four targets are lost.
    assert mcnemar(right, wrong, labels, first_threshold=1, second_threshold=0.5) == (1, 1, 1)


@pytest.mark.parametrize("metric", ["eer", "min_dcf:0.3"])
def test_ties_in_order_lie_between_the_best_and_the_worst_order(metric):
    scores, labels = trials()
    find = {
        "eer": lambda s, y: eer(s, y, ties="in_order").value,
        "min_dcf:0.3": lambda s, y: min_dcf(s, y, 0.3, ties="in_order"),
    }[metric]
    orders = {"best": np.argsort(labels, kind="stable"), "worst": np.argsort(-labels, kind="stable")}
    best, worst = (find(scores[order], labels[order]) for order in orders.values())
    together = of_repeated(scores, labels, metric)
    assert best < worst and best <= find(scores, labels) <= worst and best <= together <= worst
    nudge = 1e-9 * np.arange(len(scores))  # tells trials apart as they stand
    assert find(scores, labels) == pytest.approx(of_repeated(scores + nudge, labels, metric), abs=1e-14)
    with pytest.raises(InputError, match="ties must be one of together, in_order, got 'none'"):
        eer(scores, labels, ties="none")
