"""What is wrong is not timed, and a row holds what was measured."""

from __future__ import annotations

import pytest
import torch

from benchmarks import comparison
from benchmarks.timing import Figure

EXACT = torch.linspace(-1, 1, 1000, dtype=torch.float64)
PLAIN = EXACT.float() + 1e-6


def _compare(contenders, **options):
    contenders = {name: (lambda value=value: [value]) for name, value in contenders.items()}
    return comparison.compare("forward", "1000", contenders, exact=[EXACT], definition=[PLAIN], repeats=2, **options)


def test_row_has_errors_rates_and_peaks():
    result = _compare(
        {"native": EXACT.float(), "peer": EXACT.float() + 1e-5},
        parts={"a part": lambda: []},
        bytes_moved=10**6,
        flops=10**9,
        peaks={"native": 2**20, "peer": None},
    )
    rows = result["contenders"]
    assert rows["native"]["max_error"] < 1e-7
    assert rows["peer"]["max_error"] == pytest.approx(1e-5, rel=0.02)
    assert rows["native"]["gb_per_s"] == pytest.approx(1 / rows["native"]["median_ms"])
    assert rows["native"]["gflop_per_s"] == pytest.approx(1e3 / rows["native"]["median_ms"])
    assert rows["native"]["peak_mib"] == 1
    assert "peak_mib" not in rows["peer"]
    assert "max_error" not in rows["a part"]


def test_figures_are_ratios_of_medians(capsys):
    result = _compare({"native": PLAIN, "peer": PLAIN})
    result["contenders"]["native"]["median_ms"], result["contenders"]["peer"]["median_ms"] = 2.0, 5.0
    figure = comparison.ratio(result, "peer", "native", 3)
    assert figure == Figure("peer / native", 2.5, at_least=3)
    assert comparison.finish(result, [figure])["figures"][0]["value"] == 2.5
    assert "peer / native: 2.50 (at least 3: missed)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "error", "timed"),
    [("native", 3e-6, True), ("native", 5e-6, False), ("peer", 5e-6, True), ("peer", 1e-3, False)],
)
def test_what_is_wrong_is_not_timed(name, error, timed):
    contenders = {name: EXACT.float() + error}
    if timed:
        _compare(contenders)
    else:
        with pytest.raises(SystemExit, match=f"not timed: {name}"):
            _compare(contenders)


def test_nan_is_wrong():
    with pytest.raises(SystemExit, match="not timed: peer"):
        _compare({"peer": EXACT.float() * torch.nan})


def test_gradients_follow_the_outputs():
    x, weight = torch.ones(2, 3, 4), torch.full((3, 1), 2.0)
    lengths = torch.tensor([4, 4])

    def function(x, weight, lengths):
        total = (x * weight).sum(dim=2)
        return total, 2 * total

    inputs = (x, weight, lengths)
    forward, both = (comparison.call_of(function, inputs, gradient=gradient)() for gradient in (False, True))
    assert [value.shape for value in forward] == [(2, 3), (2, 3)]
    assert [value.shape for value in both] == [(2, 3), (2, 3), x.shape, weight.shape]
    torch.testing.assert_close(both[2].sum(dim=(0, 2)), 2 * both[3][:, 0])
    assert not x.requires_grad


def test_peaks_leave_out_gradients(monkeypatch):
    monkeypatch.setattr(comparison.memory, "peak_bytes", lambda call: call())
    calls = {"native": lambda: 1000, "peer": lambda: None}
    peaks = comparison.peaks_of(calls, gradients_of=[torch.zeros(100)])
    assert peaks == {"native": 600, "peer": None}
