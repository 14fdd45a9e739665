"""The committed records keep the rules of the gate, and records that are worse do not."""

from __future__ import annotations

import copy
import functools
import json
import sys
import tomllib

import pytest
import torch

from benchmarks import gate, report, timing
from benchmarks.shapes import BULK
from spkfast import frontend, functional

PATH = "some-machine/op.json"
ROW = "forward, 1 x 2"
SPEED = {
    "op": "op",
    "results": [
        {
            "case": "forward",
            "workload": "1 x 2",
            "aa_spread": 0.02,
            "figures": [
                {"name": "eager / native", "value": 4.0, "at_least": 3.0, "at_most": None},
                {"name": "us", "value": 2.0, "at_least": None, "at_most": 3.0},
                {"name": "peer / native", "value": 2.0, "at_least": None, "at_most": None},
                {"name": "anything", "value": 2.0, "at_least": None, "at_most": None},
            ],
        }
    ],
}
RATE = {"eer_percent": 4.0, "eer_low_percent": 2.0, "eer_high_percent": 6.0}


def records(spread=0.02, **values):
    """One record, with other values of figures; None removes one."""
    record = copy.deepcopy(SPEED)
    (row,) = record["results"]
    row["aa_spread"] = spread
    for figure in row["figures"]:
        figure["value"] = values.get(figure["name"].replace(" / ", "_"), figure["value"])
    row["figures"] = [figure for figure in row["figures"] if figure["value"] is not None]
    return {PATH: record}


def miss(figure, row=ROW):
    return {"record": PATH, "row": row, "figure": figure, "reason": "so it is"}


def test_committed_records_keep_the_rules():
    assert gate.check(gate.read(report.RESULTS), tomllib.loads(gate.KNOWN.read_text())["miss"]) == []


def test_known_misses_are_of_committed_records_and_have_reasons():
    known = tomllib.loads(gate.KNOWN.read_text())["miss"]
    assert all((report.RESULTS / miss["record"]).is_file() and miss["reason"] for miss in known)


@pytest.mark.parametrize(
    ("values", "spread", "broken"),
    [
        ({}, 0.02, False),
        ({"eager_native": 2.95}, 0.02, False),  # within the spread
        ({"eager_native": 2.9}, 0.02, True),
        ({"eager_native": 2.9}, 0.05, False),
        ({"eager_native": 2.5}, 0.9, True),  # a noisy row excuses no more than a tenth
        ({"us": 3.05}, 0.02, False),
        ({"us": 3.1}, 0.02, True),
        ({"peer_native": 0.1}, 0.02, False),  # has no goal
    ],
)
def test_goals_are_met_within_the_spread(values, spread, broken):
    wrong = gate.check(records(spread, **values), [])
    assert bool(wrong) == broken
    if broken:
        name = next(iter(values)).replace("_", " / ")
        assert len(wrong) == 1 and wrong[0].startswith(f"{PATH}: {ROW}: {name} is {next(iter(values.values()))}")


def test_known_miss_is_let_pass_while_it_is_one():
    assert gate.check(records(eager_native=2.0), [miss("eager / native")]) == []
    (line,) = gate.check(records(), [miss("eager / native")])
    assert "no longer missed" in line and "eager / native" in line
    assert len(gate.check(records(eager_native=2.0), [miss("eager / native", row="another")])) == 2
    assert gate.check(records(), [{**miss("eager / native"), "record": "elsewhere.json"}]) == []


def test_bounds_of_precisions_hold():
    rows = {"modules": RATE, "int8": {**RATE, "bounds": {"score": 0.05}, "within_bounds": True}}
    record = {"benchmark": "precisions", "lists": {"trials.txt": rows}}
    assert gate.check({"m/precisions.json": record}, []) == []
    rows["int8"]["within_bounds"] = False
    (line,) = gate.check({"m/precisions.json": record}, [])
    assert line.startswith("m/precisions.json: lists, trials.txt, int8 is not within its bounds")
    known = [{"record": "m/precisions.json", "row": "lists, trials.txt, int8", "figure": gate.BOUNDS, "reason": "few"}]
    assert gate.check({"m/precisions.json": record}, known) == []
    rows["int8"]["within_bounds"] = True
    (line,) = gate.check({"m/precisions.json": record}, known)
    assert line.endswith("lists, trials.txt, int8, bounds is no longer missed, or not there: remove it")


@pytest.mark.parametrize(
    ("values", "spread", "broken"),
    [
        ({}, 0.0, ""),
        ({"eager_native": 3.6}, 0.0, ""),  # a tenth, and the spread of the base
        ({"eager_native": 3.5}, 0.0, "eager / native went from 4 to 3.5"),
        ({"eager_native": 3.5}, 0.02, ""),
        ({"eager_native": 9.0}, 0.0, ""),
        ({"us": 2.2}, 0.0, ""),
        ({"us": 2.3}, 0.0, "us went from 2 to 2.3"),
        ({"us": 0.5}, 0.0, ""),
        ({"peer_native": 1.7}, 0.0, "peer / native went from 2 to 1.7"),  # has no goal, but is of a peer
        ({"anything": 0.1}, 0.0, ""),
        ({"eager_native": None}, 0.0, "eager / native, which has a goal, is gone"),
        ({"peer_native": None}, 0.0, ""),
    ],
)
def test_figures_do_not_fall(values, spread, broken):
    wrong = gate.compare(records(spread, **values), records())
    assert len(wrong) == bool(broken)
    if broken:
        assert wrong[0].startswith(f"{PATH}: {ROW}: {broken}")


def test_error_rates_do_not_rise_above_the_interval():
    def of(rate):
        return {"m/x.json": {"benchmark": "bundled", "lists": {"trials.txt": {**RATE, "eer_percent": rate}}}}

    assert gate.compare(of(6.0), of(4.0)) == gate.compare(of(1.0), of(4.0)) == []
    (line,) = gate.compare(of(6.5), of(4.0))
    assert line == "m/x.json: lists, trials.txt: EER 6.50 % is above the base's interval, up to 6.00 %"
    unsure = {"m/x.json": {"lists": {"trials.txt": {"eer_percent": 4.0, "eer_high_percent": None}}}}
    assert gate.compare(of(60.0), unsure) == []


def test_mean_over_seeds_does_not_rise():
    def of(rates):
        runs = [{"seed": s, "lists": {"a.txt": {"eer_percent": rate}}} for s, rate in enumerate(rates)]
        return {"m/x.json": {"recipes": {"mini.yaml": {"runs": runs}}}}

    base = of([4.0, 4.2, 4.4])
    assert gate.compare(of([4.2, 4.4, 4.6]), base) == []
    # Differences of means by 1.0, with a standard error of sqrt(2 * 0.04 / 3) = 0.163 and t(4) = 2.776: 0.55 at least.
    (line,) = gate.compare(of([5.0, 5.2, 5.4]), base)
    assert line == "m/x.json: mini.yaml, a.txt: the mean EER over seeds has risen by at least 0.55 points"
    assert gate.compare(of([3.0, 3.2, 3.4]), base) == []
    assert gate.compare(base, base) == []


def test_nothing_in_common_is_an_error():
    (line,) = gate.compare(records(), {"other/op.json": SPEED})
    assert line.startswith("nothing to compare")


def test_program(tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["gate", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            gate.main()
        return stop.value.code, capsys.readouterr().out

    for name, found in (("new", records(eager_native=3.2)), ("old", records())):
        for path, record in found.items():
            (tmp_path / name / path).parent.mkdir(parents=True)
            (tmp_path / name / path).write_text(json.dumps(record))
        (tmp_path / name / "gpu").mkdir()
        (tmp_path / name / "gpu" / "x.json").write_text("{}")
    assert run(tmp_path / "new") == (0, "1 records keep every rule\n")
    status, said = run(tmp_path / "new", tmp_path / "old")
    assert status == 1 and "went from 4 to 3.2" in said
    assert run(tmp_path / "new" / "some-machine", tmp_path / "old" / "some-machine")[0] == 1
    assert "holds no records" in run(tmp_path)[0]
    (tmp_path / "new" / "some-machine" / "index.json").write_text(json.dumps({"quick": True}))
    assert "is of a quick run" in run(tmp_path / "new")[0]


def recorded_ratio():
    """Definition over kernel, of the front-end of wespeaker in bulk."""
    record = json.loads((report.RESULTS / "amd-epyc-2-cores" / "log_mel_fbank.json").read_text())
    rows = record["results"][0]["contenders"]
    return rows["reference"]["median_ms"] / rows["native"]["median_ms"]


@pytest.mark.full
@pytest.mark.parametrize("op", ["log_mel_fbank", "paired_dot"])
def test_kernels_are_faster_than_their_definitions(op):
    torch.set_num_threads(1)
    if op == "log_mel_fbank":
        # A third of what was recorded: processors differ, and work beside it slows the two by unlike factors.
        arguments, options, least = (BULK.inputs()[0],), {"spec": frontend("wespeaker")}, recorded_ratio() / 3
    else:
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(20_000, 192, generator=generator)
        first, second = torch.randint(len(rows), (2, 200_000), generator=generator)
        # Bounds of traffic: the definition passes over the rows of pairs eight times (each of two gathers reads and
        # writes, the product reads both and writes, the sum reads), the kernel reads them twice. Half of 8 / 2.
        arguments, options, least = (rows, rows, first, second), {}, 2.0
    function = getattr(functional, op)
    contenders = {
        backend: functools.partial(function, *arguments, **options, backend=backend)
        for backend in ("native", "reference")
    }
    timings, _ = timing.interleaved(contenders, repeats=5)
    # Of the fastest turns, as other work only ever adds to a turn.
    ratio = min(timings["reference"].seconds) / min(timings["native"].seconds)
    assert ratio >= least
