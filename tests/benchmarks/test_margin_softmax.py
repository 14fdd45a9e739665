"""The heads that are timed beside ours compute the same, and the benchmark runs."""

from __future__ import annotations

import pytest
import torch

from benchmarks import timing
from benchmarks.ops import bench_margin_softmax
from benchmarks.peers import heads
from spkfast.reference import margin_softmax_loss


@pytest.mark.parametrize("head", bench_margin_softmax._HEADS.values(), ids=str)
@pytest.mark.parametrize("written", [heads.over_all_classes, heads.on_targets])
def test_written_heads_are_the_definition(head, written):
    x, weight, target = (
        value.double() if value.is_floating_point() else value for value in bench_margin_softmax.inputs(head, 9, 5)
    )
    x[0] = -weight[target[0] * head.subcenters]  # past pi - margin
    want = margin_softmax_loss(x, weight, target, None, bench_margin_softmax._form(head)).loss.mean()
    torch.testing.assert_close(written(x, weight, target, head), want, rtol=1e-12, atol=0)


def test_benchmark_runs(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # takes long, and is what torch is tested for
    apart = []

    def together(names, head, speakers, batch, repeats):
        apart.append(names)
        calls = bench_margin_softmax._contenders(head, speakers, batch)
        calls |= bench_margin_softmax._yardsticks(head, speakers, batch)
        return timing.interleaved({name: calls[name] for name in names}, repeats=repeats)

    monkeypatch.setattr(bench_margin_softmax, "_apart", together)
    found = bench_margin_softmax.rows(300, 8, 500, 1)
    assert len(apart) == 2
    names = [*bench_margin_softmax._HEADS]
    kept = [name + bench_margin_softmax._KEPT for name in names]
    assert [row["case"] for row in found] == [*names, "1 center", *kept]
    assert not any(figure["at_least"] for row in found[3:] for figure in row["figures"])
    for row in found[:2] + found[3:]:
        contenders = row["contenders"]
        assert {"native fp32", "native bf16", "eager, over all classes"} <= set(contenders)
        assert all(entry["counts"] for name, entry in contenders.items() if "counts" in entry)
        assert any("native fp32" in figure["name"] for figure in row["figures"])


def test_contenders_run_in_processes_of_their_own():
    head = heads.Head(1, 0)
    timings, spread = bench_margin_softmax._apart(["native fp32", "products"], head, 300, 8, 1)
    assert [*timings] == ["native fp32", "products"] and spread >= 0
    with pytest.raises(SystemExit, match="faster: KeyError"):
        bench_margin_softmax._apart(["faster"], head, 300, 8, 1)


def test_a_wrong_gradient_counts_in_no_figure():
    exact = (torch.tensor(1.0), torch.ones(2, 3), torch.ones(4, 3))
    loss_error, error = bench_margin_softmax._errors(
        (torch.tensor(1.5), torch.ones(2, 3), 1.5 * torch.ones(4, 3)), exact
    )
    assert loss_error == pytest.approx(0.5) and error == pytest.approx(0.5)
    row = {"median_ms": 1.0}
    found = {"native fp32": row | {"counts": False}, "eager, on targets": row | {"counts": True}}
    (figure,) = bench_margin_softmax._figures(found, heads.Head(1, 0))[:1]
    assert figure.verdict == "missed"
