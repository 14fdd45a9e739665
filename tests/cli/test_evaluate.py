"""``spkfast evaluate``: protocols, crops, conditions, records and their comparison."""

import json

import numpy as np
import pytest

from spkfast import SpeakerEncoder
from spkfast.data.lists import read_trials
from spkfast.evaluation import cosine_scores, differences, eer, estimates, mcnemar, threshold_at_far
from spkfast.evaluation.protocols import PROTOCOLS, Crops, Protocol


@pytest.fixture
def scored(tmp_path):
    """Scores of two systems of 8 speakers, the second one worse."""
    rng = np.random.default_rng(0)
    names = [f"s{s}/r/{k}.wav" for s in range(8) for k in range(5)]
    pairs = [(a, b) for a in range(40) for b in range(a)]
    labels = np.array([a // 5 == b // 5 for a, b in pairs])
    for name, distance in (("good", 2.5), ("poor", 1.0)):
        scores = rng.normal(size=len(pairs)) + distance * labels
        lines = [
            f"{int(y)} {names[a]} {names[b]} {s:.5f}\n" for (a, b), y, s in zip(pairs, labels, scores, strict=True)
        ]
        (tmp_path / name).mkdir()
        (tmp_path / name / "trials.txt").write_text("".join(lines))
    return tmp_path


def listed(path):
    return read_trials(path, scored=True)


def result(spkfast, *options):
    done = spkfast("evaluate", *options, "--json")
    assert done.status == 0, done.err
    return json.loads(done.out)


def test_metrics_and_threshold_of_scored_lists(scored, spkfast):
    path = scored / "good/trials.txt"
    metrics = ["eer", "min_dcf:0.05", "act_dcf:0.01:10:1", "cllr", "min_cllr"]
    row = result(spkfast, "--scored", path, "--metrics", *metrics, "--far", "0.05", "--resamples", "40")["lists"][0]
    trials = listed(path)
    sides = trials.speakers(lambda name: name[:2])
    want = estimates(
        trials.scores, trials.labels, metrics, enrol_speakers=sides[0], test_speakers=sides[1], num_resamples=40
    )
    assert row["metrics"] == {name: pytest.approx(figure._asdict()) for name, figure in want.items()}
    assert row["p_target"] == 0.05 and row["speakers"] == 8
    assert row["threshold_at_far"] == threshold_at_far(trials.scores, trials.labels, 0.05).threshold
    row = result(spkfast, "--scored", path, "--resamples", "0", "--method", "clova")["lists"][0]
    assert row["eer_percent"] == 100 * eer(trials.scores, trials.labels, method="clova").value
    assert row["eer_low_percent"] is None
    done = spkfast("evaluate", "--scored", path, "--metrics", *metrics)
    assert all(head in done.out for head in ("EER %", "minDCF (p 0.05)", "actDCF (p 0.01:10:1)", "Cllr", "min Cllr"))


def test_records_compare_trial_by_trial(scored, spkfast):
    for name in ("good", "poor"):
        done = spkfast("evaluate", "--scored", scored / name / "trials.txt", "--out", scored / f"{name}.json")
        assert done.status == 0
    record = json.loads((scored / "good.json").read_text())
    assert record["resamples"] == 1000 and record["versions"]["spkfast"] and len(record["lists"][0]["sha256"]) == 64
    found = result(spkfast, "--compare", scored / "good.json", scored / "poor.json")["lists"][0]
    good, poor = (listed(scored / name / "trials.txt") for name in ("good", "poor"))
    sides = good.speakers(lambda name: name[:2])
    want = differences(
        good.scores, poor.scores, good.labels, ["eer", "min_dcf:0.01"], enrol_speakers=sides[0], test_speakers=sides[1]
    )
    assert found["differences"] == {name: pytest.approx(value._asdict()) for name, value in want.items()}
    assert found["differences"]["eer"]["low"] > 0 and found["differences"]["eer"]["p_value"] < 0.05
    thresholds = [eer(one.scores, one.labels).threshold for one in (good, poor)]
    alone = mcnemar(
        good.scores, poor.scores, good.labels, first_threshold=thresholds[0], second_threshold=thresholds[1]
    )
    assert found["mcnemar"] == alone._asdict() and alone.second_alone > alone.first_alone
    out = spkfast("evaluate", "--compare", scored / "good.json", scored / "poor.json").out
    assert "EER %" in out and "McNemar" in out
    plain = result(spkfast, "--compare", scored / "good.json", scored / "poor.json", "--resamples", "0")["lists"][0]
    assert plain["differences"] is None and plain["first"] == found["first"]
    same = result(spkfast, "--compare", scored / "good.json", scored / "good.json")["lists"][0]
    assert same["differences"]["eer"] == {"value": 0, "low": 0, "high": 0, "p_value": 1}


def test_records_of_other_trials_do_not_compare(scored, spkfast):
    path = scored / "good/trials.txt"
    assert spkfast("evaluate", "--scored", path, "--out", scored / "a.json").status == 0
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[1:]))
    assert spkfast("evaluate", "--scored", path, "--out", scored / "b.json").status == 0
    error = spkfast("evaluate", "--compare", scored / "a.json", scored / "b.json").error
    assert "no list in common, none has the same trials" in error
    whole = (scored / "a.scores.npz").read_bytes()
    for damaged in (whole[:100], (scored / "b.scores.npz").read_bytes(), b""):
        (scored / "a.scores.npz").write_bytes(damaged)
        error = spkfast("evaluate", "--compare", scored / "a.json", scored / "b.json").error
        assert "a.scores.npz: damaged, or not of a.json" in error
    (scored / "a.scores.npz").unlink()
    assert "a.scores.npz: is missing" in spkfast("evaluate", "--compare", scored / "a.json", scored / "b.json").error
    (scored / "d.json").write_text("{}")
    assert "not a record of spkfast" in spkfast("evaluate", "--compare", scored / "d.json", scored / "b.json").error


def test_facts_that_differ_are_told(scored, spkfast):
    path = scored / "good/trials.txt"
    spkfast("evaluate", "--scored", path, "--out", scored / "a.json")
    spkfast("evaluate", "--scored", path, "--method", "clova", "--metrics", "eer", "cllr", "--out", scored / "b.json")
    found = result(spkfast, "--compare", scored / "a.json", scored / "b.json")
    assert found["differ_in"] == {"method": ["interp", "clova"]}
    # All metrics of either, since the scores are there.
    assert [*found["lists"][0]["differences"]] == ["eer", "min_dcf:0.01", "eer:clova", "cllr"]


def test_conditions(scored, spkfast):
    path = scored / "good/trials.txt"
    trials = listed(path)
    lines = [f"{name},{'fm'[k // 5 % 2]},{1 + k % 5 + k / 100},x,{k // 5}n\n" for k, name in enumerate(trials.names)]
    (scored / "table.csv").write_text("path,gender,seconds,corpus,speaker\n" + "".join(lines))
    rows = {
        row["condition"]: row for row in result(spkfast, "--scored", path, "--by", scored / "table.csv")["conditions"]
    }
    gender = np.array(["fm"[k // 5 % 2] for k in range(40)])
    place = np.array([trials.names.index(name) for name in trials.names])
    sides = gender[place][trials.enrol], gender[place][trials.test]
    for name, chosen in (
        ("gender f", (sides[0] == "f") & (sides[1] == "f")),
        ("gender m", (sides[0] == "m") & (sides[1] == "m")),
        ("gender f / m", sides[0] != sides[1]),
    ):
        assert rows[name]["targets"] + rows[name]["nontargets"] == chosen.sum()
        if trials.labels[chosen].any():
            want = eer(trials.scores[chosen], trials.labels[chosen]).value
            assert rows[name]["metrics"]["eer"]["value"] == pytest.approx(want)
            assert rows[name]["metrics"]["eer"]["low"] is not None
        else:
            assert rows[name]["metrics"] is None
    parts = [row for name, row in rows.items() if name.startswith("seconds ")]
    assert len(parts) == 3 and sum(row["targets"] + row["nontargets"] for row in parts) == len(trials)
    assert not any(name.startswith(("corpus", "speaker")) for name in rows)  # which tell nothing
    only = result(spkfast, "--scored", path, "--by", scored / "table.csv", "--columns", "gender")["conditions"]
    assert {row["condition"] for row in only} == {"gender f", "gender m", "gender f / m"}
    error = spkfast("evaluate", "--scored", path, "--by", scored / "table.csv", "--columns", "gendr").error
    assert "unknown column 'gendr' (did you mean 'gender'?)" in error
    for content, message in (
        ("", "the table is empty"),
        ("name,gender\nx,f\n", "has none of the columns path, utterance"),
        ("path,gender,gender\nx,f,m\n", "has a column twice"),
        ("path,gender\nx,f\nx,f\n", "table.csv:3: x is there twice"),
        ("path,gender\nx\n", "table.csv:2: expected 2 columns, got 1"),
        ("path,gender\nx,f\n", "the trials name this path, but the table has no gender of it"),
    ):
        (scored / "table.csv").write_text(content)
        assert message in spkfast("evaluate", "--scored", path, "--by", scored / "table.csv").error


def test_protocol_counts_trials(data, model, spkfast, monkeypatch):
    error = spkfast("evaluate", "--model", model, "--data", data, "--protocol", "vox1-o-cleaned").error
    assert error.endswith("veri_test2.txt: no such list file")
    (data / "trials.txt").rename(data / "veri_test2.txt")
    error = spkfast("evaluate", "--model", model, "--data", data, "--protocol", "vox1-o-cleaned").error
    assert error.endswith("vox1-o-cleaned has 37,611 trials, this list has 36")
    monkeypatch.setitem(PROTOCOLS, "vox1-o-cleaned", Protocol("vox1-o-cleaned", "veri_test2.txt", 36))
    options = ("--data", data, "--protocol", "vox1-o-cleaned", "--out", data / "record.json")
    found = result(spkfast, "--model", model, *options)
    assert [*found["lists"][0]["metrics"]] == ["eer", "min_dcf:0.01", "min_dcf:0.05"]
    encoder = SpeakerEncoder.load(model)
    record = json.loads((data / "record.json").read_text())
    assert record["model"]["fingerprint"] == encoder.fingerprint and record["frontend"] == encoder.frontend.hash
    assert record["protocol"] == "vox1-o-cleaned" and record["crops"] == "whole"


@pytest.mark.parametrize("way", ["3x0.1", "whole+3x0.1", "whole", "3x0.1:distance"])
def test_crops_follow_the_definition(data, model, spkfast, way):
    spkfast("evaluate", "--model", model, "--data", data, "--crops", way, "--scores", data / "s.txt")
    found = read_trials(data / "s.txt", scored=True)
    encoder = SpeakerEncoder.load(model)
    crops, wholes = [], []
    for name in found.names:
        samples = encoder.load_audio(data / name)
        starts = np.linspace(0, len(samples) - 1600, 3).astype(int)
        crops.append(encoder.embed_batch([samples[s : s + 1600] for s in starts], normalize=True).numpy())
        wholes.append(encoder.embed(samples, normalize=True).numpy())
    for e, t, score in zip(found.enrol, found.test, found.scores, strict=True):
        cosines = {
            "whole": wholes[e] @ wholes[t],
            "3x0.1": np.mean(crops[e] @ crops[t].T),
            "3x0.1:distance": -np.mean(np.linalg.norm(crops[e][:, None] - crops[t][None], axis=2)),
        }
        assert score == pytest.approx(np.mean([cosines[part] for part in way.split("+")]), abs=2e-5)


def test_short_audio_is_repeated_for_crops():
    crops = Crops.parse("2x0.5")
    assert [part.tolist() for part in crops.cut(np.arange(3), 10)] == [[0, 1, 2, 0, 1]] * 2
    assert [part.tolist() for part in crops.cut(np.arange(8), 10)] == [[0, 1, 2, 3, 4], [3, 4, 5, 6, 7]]
    assert str(Crops.parse("10x4:distance")) == "10x4:distance"
    assert str(Crops.parse("whole+5x3")) == "whole+5x3" and str(Crops.parse("whole")) == "whole"
    for text in (
        "",
        "0x4",
        "00x4",
        "4",
        "whole5x3",
        "5x0",
        "+5x3",
        "5x3+whole",
        "whole:distance",
        "5x3:cosine",
        "whole+5x3:distance",
        ":distance",
    ):
        with pytest.raises(ValueError, match="crops must be"):
            Crops.parse(text)


def test_histogram_and_embeddings_of_any_kind(data, model, spkfast):
    spkfast("embed", data, "--model", model, "--out", data / "x.safetensors")
    done = spkfast(
        "evaluate", "--embeddings", data / "x.safetensors", "--trials", data / "trials.txt", "--histogram",
        data / "h.png", "--out", data / "r.json",
    )  # fmt: skip
    assert done.status == 0 and (data / "h.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((data / "r.json").read_text())
    assert record["model"]["fingerprint"] == SpeakerEncoder.load(model).fingerprint
    stored = np.load(data / "r.scores.npz")["scores_0"]
    from spkfast.data.embeddings import read_embeddings

    kept = read_embeddings(data / "x.safetensors")
    want = cosine_scores(kept.embeddings, *read_trials(data / "trials.txt").rows(kept.keys))
    np.testing.assert_array_equal(stored, want)
