"""The index of speakers: against all cosines, through changes, on disk, and what it refuses."""

import importlib.util
import json

import numpy as np
import pytest
import torch

from spkfast.errors import InputError
from spkfast.evaluation.index import SpeakerIndex

pytest.importorskip("usearch")

# Length of the error of a vector of length one with 16 values: rounded to 24 and to 11 bits (below 2^-14, f16 has steps
# of 2^-24), and cut to whole steps of 1/127.
ERRORS = {"f32": 2**-24, "f16": 2**-11 + 4 * 2**-25, "i8": 4 / 127}


@pytest.fixture
def rows():
    return np.random.default_rng(0).normal(size=(300, 16)).astype(np.float32)


def names(count, start=0):
    return [f"spk{i}" for i in range(start, start + count)]


def cosines(a, b):
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a.astype(float), b.astype(float)))
    return a @ b.T


@pytest.mark.parametrize("dtype", ["f32", "f16", "i8"])
@pytest.mark.parametrize("exact", [None, False])
def test_nearest_speakers(rows, dtype, exact):
    # As many candidates as there are speakers: the graph misses none.
    index = SpeakerIndex(16, dtype=dtype, expansion_search=300, expansion_add=300)
    index.add(names(200), rows[:200])
    queries = 100 * rows[200:]
    found = index.search(queries, 5, exact=exact)
    want = cosines(queries, rows[:200])
    # Each side is turned by the arc sine of its error, and the cosine changes by no more than the angle does. Sums of
    # 16 products in float32 besides.
    allowed = 2 * np.arcsin(ERRORS[dtype]) + 16 * 2**-24
    best = -np.sort(-want, axis=1)[:, :5]
    for row, (of_one, scores) in enumerate(zip(found.names, found.scores, strict=True)):
        assert len(of_one) == len(set(of_one)) == 5 and (np.diff(scores) <= 0).all()
        np.testing.assert_allclose(scores, want[row, [int(name[3:]) for name in of_one]], rtol=0, atol=allowed)
        np.testing.assert_allclose(scores, best[row], rtol=0, atol=allowed)


def test_threshold_and_count(rows):
    index = SpeakerIndex(16, dtype="f32")
    index.add(names(3), rows[:3])
    assert [len(of_one) for of_one in index.search(rows[:2], 10).names] == [3, 3]
    found = index.search(rows[:1], 10, threshold=0.99)
    assert found.names == [["spk0"]] and found.scores[0].shape == (1,)
    assert index.search(-rows[:1], 1, threshold=0.99).names == [[]]
    score = float(index.search(rows[1:2], 2).scores[0][1])
    assert len(index.search(rows[1:2], 2, threshold=score).names[0]) == 1, "a score must lie above the threshold"
    assert index.search(rows[:0]).names == []


def test_torch_and_scaled_embeddings(rows):
    index = SpeakerIndex(16)
    index.add(names(5), torch.from_numpy(rows[:5]).double() * 1e6)  # past the range of f16
    assert [of_one[0] for of_one in index.search(torch.from_numpy(rows[:5]) * 1e-6).names] == names(5)


@pytest.mark.parametrize("exact", [True, False])
def test_changes(rows, exact):
    index = SpeakerIndex(16, expansion_search=300)  # so that the graph leaves none out
    assert len(index) == 0 and index.search(rows[:2]).names == [[], []]
    index.add(names(100), rows[:100])
    assert len(index) == 100 and "spk99" in index and "spk100" not in index
    index.remove("spk7")
    assert len(index) == 99 and "spk7" not in index
    assert "spk7" not in index.search(rows[7:8], 99, exact=exact).names[0]
    assert len(index.search(rows[:1], 200, exact=exact).names[0]) == 99
    index.add(["spk7", "new"], rows[[7, 150]])
    assert [of_one[0] for of_one in index.search(rows[[7, 150]], 1, exact=exact).names] == ["spk7", "new"]

    index.add([*names(50, start=30), "more"], rows[200:251], replace=True)
    assert len(index) == 102
    found = index.search(rows[200:251], 1, exact=exact)
    assert [of_one[0] for of_one in found.names] == [*names(50, start=30), "more"]
    for of_one in index.search(rows[30:80], 1, threshold=0.99, exact=exact).names:
        assert of_one == [], "the old embedding of a replaced speaker was found"


def test_graph_leads_to_each_speaker(tmp_path):
    rows = np.random.default_rng(1).normal(size=(2000, 32))
    for name in ("one", "other"):
        index = SpeakerIndex(32, threads=16)
        index.add(names(2000), rows)
        index.save(tmp_path / name)
    assert index.search(rows, 1, exact=False).names == [[name] for name in names(2000)]
    one, other = ((tmp_path / name / "graph.usearch").read_bytes() for name in ("one", "other"))
    assert one == other


def test_small_ones_are_searched_exactly(rows, monkeypatch):
    from spkfast.evaluation import index as module

    index, asked = SpeakerIndex(16), []
    index.add(names(3), rows[:3])
    search = index._graph.search
    index._graph = type("Listener", (), {"search": lambda _, *a, **o: asked.append(o["exact"]) or search(*a, **o)})()
    index.search(rows[:1])
    monkeypatch.setattr(module, "_MOST_FOR_EXACT", 2)
    index.search(rows[:1])
    index.search(rows[:1], exact=True)
    assert asked == [True, False, True]


@pytest.mark.parametrize("dtype", ["f32", "i8"])
def test_save_and_load(rows, tmp_path, dtype):
    index = SpeakerIndex(16, dtype=dtype, model="m", connectivity=8)
    index.add(["ä", *names(99)], rows[:100])
    index.remove("spk5")
    for _ in range(2):  # the second time in place of the first
        index.save(tmp_path / "index")
        assert [path.name for path in tmp_path.iterdir()] == ["index"]
    loaded = SpeakerIndex.load(tmp_path / "index", model="m", expansion_search=99)
    assert (len(loaded), loaded.embedding_dim, loaded.dtype, loaded.model) == (99, 16, dtype, "m")
    assert "ä" in loaded and "spk5" not in loaded and loaded._graph.expansion_search == 99
    want, got = index.search(rows), loaded.search(rows)
    assert got.names == want.names
    np.testing.assert_array_equal(np.concatenate(got.scores), np.concatenate(want.scores))
    loaded.add(["spk5"], rows[200:201])
    assert loaded.search(rows[200:201], 1).names == [["spk5"]]


def test_damaged_files(rows, tmp_path):
    index, path = SpeakerIndex(16), tmp_path / "index"
    index.add(names(10), rows[:10])
    index.save(path)
    graph, facts = path / "graph.usearch", path / "speakers.json"
    whole, text = graph.read_bytes(), facts.read_text()
    for content in (whole[:-8], whole[:50] + bytes([whole[50] ^ 1]) + whole[51:], b""):
        graph.write_bytes(content)
        with pytest.raises(InputError, match=r"graph\.usearch: missing or damaged"):
            SpeakerIndex.load(path)
    graph.write_bytes(whole)
    for content, error in (
        (text[:-5], r"speakers\.json: damaged"),
        ("{}", r"speakers\.json: damaged"),
        (json.dumps({**json.loads(text), "format_version": 7}), "format version 7, this spkfast reads 1"),
    ):
        facts.write_text(content)
        with pytest.raises(InputError, match=error):
            SpeakerIndex.load(path)
    with pytest.raises(InputError, match=r"no index of speakers: holds no speakers\.json"):
        SpeakerIndex.load(tmp_path)
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match="is there already, and is no index"):
        index.save(tmp_path / "other")


def test_another_model(rows, tmp_path):
    index = SpeakerIndex(16, model="m")
    index.add(names(2), rows[:2], model="m")
    index.save(tmp_path / "index")
    for call in (
        lambda: index.add(["x"], rows[:1], model="other"),
        lambda: index.search(rows[:1], model="other"),
        lambda: SpeakerIndex.load(tmp_path / "index", model="other"),
    ):
        with pytest.raises(InputError, match="must come from the model m of the index, these come from other"):
            call()
    assert len(index) == 2


def test_bad_input(rows):
    index = SpeakerIndex(16)
    index.add(names(3), rows[:3])
    zero, nan = rows[:2].copy(), rows[:2].copy()
    zero[1], nan[1, 3] = 0, np.nan
    for call, error in (
        (lambda: index.add(["a", "a"], rows[:2]), "names must differ, 'a' comes twice"),
        (lambda: index.add(["a", "spk1"], rows[:2]), "the speaker 'spk1' is in the index; replace=True puts"),
        (lambda: index.add(["a"], rows[:2]), "names must have length G = 2, got 1"),
        (lambda: index.add(["a", "b"], zero), "embeddings must be finite and not zero, row 1 is not"),
        (lambda: index.add(["a", "b"], nan), "embeddings must be finite and not zero, row 1 is not"),
        (lambda: index.search(nan), "embeddings must be finite and not zero, row 1 is not"),
        (lambda: index.search(rows[0]), r"must be floating with shape \(rows, 16\), got float32 \(16,\)"),
        (lambda: index.search(rows[:, :8]), r"must be floating with shape \(rows, 16\), got float32 \(300, 8\)"),
        (lambda: index.search(rows.astype(int)), r"must be floating with shape \(rows, 16\), got int64 \(300, 16\)"),
        (lambda: index.search(rows, 0), "count must be positive, got 0"),
        (lambda: index.remove("spk"), r"the speaker 'spk' is not in the index \(did you mean 'spk"),
        (lambda: SpeakerIndex(0), "embedding_dim must be positive, got 0"),
        (lambda: SpeakerIndex(4, expansion_add=0), "expansion_add must be positive, got 0"),
        (lambda: SpeakerIndex(4, threads=-1), "threads must be at least 0, got -1"),
        (lambda: SpeakerIndex(4, dtype="f8"), "unknown dtype 'f8'"),
    ):
        with pytest.raises(InputError, match=error):
            call()
    assert len(index) == 3 and "a" not in index


def test_usearch_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs the package 'usearch': pip install 'spkfast\[index\]'"):
        SpeakerIndex(4)
