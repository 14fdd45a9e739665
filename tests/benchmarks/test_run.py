"""All benchmarks behind one command: the table is that of the files, and one that fails stops no other."""

from __future__ import annotations

import importlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import ceilings, plots, report
from spkfast.cli.bench import GROUPS
from spkfast.errors import InputError
from tests.benchmarks.test_report import BUNDLED, RECORD, TENSORS

run = importlib.import_module("benchmarks.__main__")

MACHINE = {"cpu": "Some (R) CPU, family 1", "cores": 2, "torch": "2.11.0"}
PROGRAM = '''"""Speed of {name}: how it is run.

More."""
import argparse, json, os
from pathlib import Path

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
{body}

if __name__ == "__main__":
    main()
'''
WRITES = """
    record = json.loads({text!r})
    calls = args.out.parent / "calls-{name}"
    calls.write_text((calls.read_text() if calls.exists() else "") + "x")
    record["results"][0]["aa_spread"] = {spreads!r}[len(calls.read_text()) - 1]
    record["repeats"] = args.repeats
    record["policy"] = os.environ.get("OMP_WAIT_POLICY")
    print("measured")
    args.out.write_text(json.dumps(record))
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with programs of a test, by name, and ceilings."""
    row = RECORD["results"][0]
    row = {**row, "contenders": {"native fp32": {**row["contenders"]["native"], "gflop_per_s": 50.0}}}
    text = json.dumps({**RECORD, "results": [row]})

    def make(**bodies):
        folder = tmp_path / "benchmarks" / "ops"
        folder.mkdir(parents=True)
        rates = json.dumps({"1": {"fp32_gflop_per_s": 100.0}})
        (folder.parent / "ceilings.py").write_text(
            f"import sys; open(sys.argv[sys.argv.index('--out') + 1], 'w').write({rates!r})"
        )
        for name, body in bodies.items():
            if isinstance(body, list):
                body = WRITES.format(name=name, spreads=body, text=text)
            (folder / f"bench_{name}.py").write_text(PROGRAM.format(name=name, body=body))
        (folder / "helper.py").write_text("VALUE = 1")
        monkeypatch.setattr(run, "ROOT", tmp_path)
        return run.find()

    return make


def run_all(programs, folder, **options):
    folder.mkdir()
    echo = io.StringIO()
    index = run.run_all(programs, folder, MACHINE, **{"quick": False, **options}, echo=echo)
    return {row["name"]: row for row in index["benchmarks"]}, echo.getvalue()


def test_table_is_that_of_the_files():
    programs = {program.name: program for program in run.find()}
    files = [path for folder in run.FOLDERS for path in (run.ROOT / "benchmarks" / folder).glob("bench_*.py")]
    assert {path.stem.removeprefix("bench_") for path in files} <= set(programs)
    assert len(programs) == len(run.find()), "two benchmarks have one name"
    assert {program.group for program in programs.values()} == set(GROUPS)
    assert programs["log_mel_fbank"] == run.Program(
        "log_mel_fbank",
        "benchmarks.ops.bench_log_mel_fbank",
        "ops",
        "Speed of log_mel_fbank on the CPU beside its peers",
        frozenset({"--repeats", "--out"}),
        (),
        (),
    )
    needs = {name: program.needs for name, program in programs.items()}
    assert needs["ecapa_inference"] == () and needs["ecapa_gpu"] == ("a GPU",)
    assert needs["training_pipeline"] == needs["precisions"] == ("speech",)
    assert needs["bundle"] == ("speech", "run", "held_out")
    assert programs["augmentation"].group == programs["scoring"].group == "pipeline"
    assert all(program.summary and "\n" not in program.summary for program in programs.values())


def test_quick_settings_are_those_of_some_benchmark():
    options = set().union(*(program.options for program in run.find()))
    assert set(run.QUICK) <= options


def test_arguments(monkeypatch, tmp_path):
    programs = {program.name: program for program in run.find()}
    out = tmp_path / "x.json"
    assert programs["log_mel_fbank"].arguments(out, quick=False) == ["--out", str(out)]
    assert programs["log_mel_fbank"].arguments(out, quick=True) == ["--out", str(out), "--repeats", "2"]
    monkeypatch.setenv("SPKFAST_SPEECH", "/speech")
    assert programs["precisions"].arguments(out, quick=False) == ["--out", str(out), "--data", "/speech"]
    named = programs["bundle"].arguments(out, False, ["a", "b"])
    assert named == ["--out", str(out), "--data", "/speech", "a", "b"]
    for name, quick, reason in [
        ("precisions", True, "has no quick form"),
        ("bundle", False, "needs run, held_out: name them after --, with --only bundle"),
    ]:
        with pytest.raises(run.LeftOut, match=reason):
            programs[name].arguments(out, quick)
    monkeypatch.delenv("SPKFAST_SPEECH")
    with pytest.raises(run.LeftOut, match="SPKFAST_SPEECH names no folder of speech"):
        programs["precisions"].arguments(out, quick=False)


def test_one_that_fails_or_cannot_run_stops_no_other(checkout, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    programs = checkout(
        broken="    raise ValueError('no such\\nthing')",
        lacking="    raise SystemExit('nothing measured: no speech')",
        silent="    print('nothing measured: no GPU')",
        works=[0.02],
    )
    assert [program.name for program in programs] == ["broken", "lacking", "silent", "works"]
    rows, said = run_all(programs, tmp_path / "out")
    assert {name: (row["outcome"], row["reason"]) for name, row in rows.items()} == {
        "broken": ("failed", "thing"),
        "lacking": ("left out", "no speech"),
        "silent": ("left out", "no GPU"),
        "works": ("measured", ""),
    }
    assert rows["works"]["missed"] == 1 and rows["works"]["noisy"] == 0
    assert "ValueError: no such" in said and "\nmeasured\n" in said and "left out: no speech" in said
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"works.json", "index.json", "benchmarks.md", "ops.svg"}
    record = json.loads((tmp_path / "out" / "works.json").read_text())
    assert record["repeats"] == 10 and record["policy"] is None
    assert record["ceilings"] == {"1": {"fp32_gflop_per_s": 100.0}}
    lines = (tmp_path / "out" / "benchmarks.md").read_text().splitlines()
    assert "Generated by `spkfast bench` from the records beside this page; nothing here is typed by hand." in lines
    assert "![Ratios to peers: ops](ops.svg)" in lines
    assert "| front-end | workload | contender | ms | us a frame | x real time | GFLOP/s | % of ceiling |" in [
        line.replace(" largest error |", "") for line in lines
    ]
    assert any("| 50 | 50 |" in line for line in lines)
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["machine"] == MACHINE and not index["quick"] and index["ceilings"]["1"]
    assert {"load_before", "load_after", "absent"} <= set(index)


def test_noisy_row_is_measured_once_more_and_the_quieter_record_kept(checkout, tmp_path):
    programs = checkout(better=[0.5, 0.02], worse=[0.5, 0.6], quiet=[0.02, 0.5])
    rows, _ = run_all(programs, tmp_path / "out")
    assert {name: row["noisy"] for name, row in rows.items()} == {"better": 0, "quiet": 0, "worse": 1}
    kept = {name: json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in rows}
    assert {name: record["results"][0]["aa_spread"] for name, record in kept.items()} == {
        "better": 0.02,
        "quiet": 0.02,
        "worse": 0.5,
    }
    assert "noisy" in (tmp_path / "out" / "benchmarks.md").read_text()


def test_quick_run_says_that_it_is_one(checkout, tmp_path):
    programs = checkout(works=[0.5, 0.02])
    run_all(programs, tmp_path / "out", quick=True)
    record = json.loads((tmp_path / "out" / "works.json").read_text())
    assert record["repeats"] == 2 and record["results"][0]["aa_spread"] == 0.5  # not measured once more
    assert "**A quick run: no figure here is one to quote.**" in (tmp_path / "out" / "benchmarks.md").read_text()


@pytest.mark.parametrize(
    ("only", "status"),
    [
        ([], 1),  # one failed
        (["works"], 0),
        (["works", "lacking"], 1),  # one that was named was left out
        (["lacking"], 1),
    ],
)
def test_exit_status(checkout, tmp_path, monkeypatch, capsys, only, status):
    programs = checkout(
        broken="    raise ValueError('x')", lacking="    raise SystemExit('nothing measured: x')", works=[0.02]
    )
    monkeypatch.setattr(run, "find", lambda: programs)
    arguments = ["all", "--out", str(tmp_path / "out"), "--json", *(["--only", *only] if only else [])]
    assert run.main(arguments) == status
    said = capsys.readouterr()
    names = only or ["broken", "lacking", "works"]
    assert sorted(row["name"] for row in json.loads(said.out)["benchmarks"]) == sorted(names)
    assert "===" in said.err
    if not only:
        programs.pop(0)
        assert run.main(arguments) == 0  # what lacks something does not fail a whole group


def test_options_go_to_the_benchmarks(checkout, tmp_path, monkeypatch):
    checkout(works=[0.02])
    (tmp_path / "elsewhere" / "benchmarks").mkdir(parents=True)
    (tmp_path / "elsewhere" / "benchmarks" / "ceilings.py").write_text("raise SystemExit('another project')")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run.main(["ops", "--quick", "--out", "out", "--", "--repeats", "7"]) == 0
    record = json.loads((tmp_path / "elsewhere" / "out" / "works.json").read_text())
    assert record["repeats"] == 7 and record["ceilings"]


def test_list_and_unknown_names(capsys):
    assert run.main(["pipeline", "--list"]) == 0
    said = capsys.readouterr().out
    assert "augmentation  " in said and "log_mel_fbank" not in said and "packages not installed" in said
    with pytest.raises(InputError, match="unknown benchmark 'log_mel_fbnk' \\(did you mean 'log_mel_fbank'"):
        run.main(["ops", "--only", "log_mel_fbnk"])
    with pytest.raises(InputError, match="unknown benchmark 'log_mel_fbank'"):
        run.main(["pipeline", "--only", "log_mel_fbank"])


def test_absent_packages_are_those_that_benchmarks_import(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "ROOT", tmp_path)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "x.py").write_text(
        "import os, no_such_peer.part\nfrom torch import nn\ndef f():\n    from no_other import x\nfrom . import y\n"
    )
    assert run.absent_packages() == ["no_other", "no_such_peer"]


def test_name_of_a_machine():
    assert run.machine_name(MACHINE) == "some-r-cpu-2-cores"
    assert run.machine_name({"cpu": "", "cores": 1}) == "unknown-1-cores"


def test_interruption_ends_what_a_benchmark_started(checkout, tmp_path):
    checkout(
        sleeps="""
    import subprocess, sys, time
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path("pids.new").write_text(f"{os.getpid()} {child.pid}"); Path("pids.new").rename("pids"); time.sleep(600)"""
    )
    program = (
        "import importlib, sys; from pathlib import Path; run = importlib.import_module('benchmarks.__main__')\n"
        f"run.ROOT = Path({str(tmp_path)!r})\n"
        f"sys.argv[1:] = ['--out', {str(tmp_path / 'out')!r}]; sys.exit(run._program())"
    )
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", program],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    pids = []
    try:
        deadline = time.monotonic() + 90
        while not (tmp_path / "pids").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
        process.terminate()
        assert process.communicate(timeout=60)[1] == ""
        assert process.returncode == 130
        assert not [pid for pid in pids if alive(pid)]
    finally:
        process.terminate()
        process.wait(60)
        for pid in filter(alive, pids):
            os.kill(pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    """Whether a process runs: one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


RATES = {
    "1": {"read_gb_per_s": 10.0, "copy_gb_per_s": 8.0, "fp32_gflop_per_s": 100.0, "bf16_gflop_per_s": 200.0},
    "2": {"read_gb_per_s": 16.0, "copy_gb_per_s": 20.0, "fp32_gflop_per_s": 200.0},
}


@pytest.mark.parametrize(
    ("threads", "case", "name", "row", "share"),
    [
        (1, "forward", "native", {"gb_per_s": 5.0}, 0.5),
        (2, "forward", "native", {"gb_per_s": 5.0}, 0.25),  # the higher one of reading and copying
        (2, "forward, 1 thread", "native", {"gb_per_s": 5.0}, 0.5),
        (1, "forward", "native, 2 threads", {"gb_per_s": 5.0}, 0.25),
        (1, "forward", "spkfast bf16", {"gflop_per_s": 50.0}, 0.25),
        (1, "forward, bfloat16", "native", {"gflop_per_s": 50.0}, 0.25),
        (1, "forward, bfloat16", "native fp32", {"gflop_per_s": 50.0}, 0.5),
        (1, "forward", "native fp32", {"gflop_per_s": 50.0, "gb_per_s": 9.0}, 0.9),  # the nearer one
        (1, "forward", "native", {"gflop_per_s": 50.0}, None),  # of which precision is not said
        (1, "forward", "native int8", {"gflop_per_s": 50.0}, None),
        (4, "forward", "native fp32", {"gflop_per_s": 50.0, "gb_per_s": 9.0}, None),
        (1, "forward", "native fp32", {}, None),
    ],
)
def test_share_of_the_ceiling(threads, case, name, row, share):
    assert ceilings.share(RATES, threads, case, name, row) == share


def test_ceilings_are_measured():
    rates = ceilings.measure(threads=1, mib=1, size=64, repeats=1)
    assert set(rates) == {
        "read_gb_per_s",
        "copy_gb_per_s",
        *(f"{precision}_gflop_per_s" for precision in ("fp32", "bf16", "int8")),
    }
    # Any processor that torch runs on makes more than ten million operations a second.
    assert min(rates.values()) > 0.01


def test_more_threads_can_do_what_fewer_can(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ceilings, "measure", lambda threads, *sizes: {"a": 1.0 / threads, "b": 1.0 * threads})
    monkeypatch.setattr(sys, "argv", ["ceilings", "--out", str(tmp_path / "x.json"), "--threads", "2", "1"])
    ceilings.main()
    assert json.loads((tmp_path / "x.json").read_text()) == {"1": {"a": 1.0, "b": 1.0}, "2": {"a": 1.0, "b": 2.0}}
    assert "ceilings, 2 thread(s): a 1.0, b 2.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "ratio"),
    [
        ("batched torch / native", True),
        ("usual way / spkfast, augmentation alone", True),
        ("best fp32 peer / spkfast fp32", True),
        ("native, 1 thread / 2 threads", False),
        ("lengths / none", False),
        ("eager / native, peak memory, %", False),
        ("native fp32 / eager, peak memory, %", False),
        ("native, us per frame", False),
        ("100 pushes of 10 ms / offline", False),
    ],
)
def test_which_figures_are_ratios_to_peers(name, ratio):
    assert bool(plots.PEER_RATIO.match(name)) == ratio


def test_plot_is_the_same_for_the_same_records(tmp_path):
    assert plots.draw([RECORD], tmp_path / "a.svg")
    first = (tmp_path / "a.svg").read_bytes()
    assert plots.draw([RECORD], tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_bytes() == first and first.startswith(b"<?xml")
    assert not plots.draw([{"op": "x", "results": [{**RECORD["results"][0], "figures": []}]}], tmp_path / "b.svg")
    assert not (tmp_path / "b.svg").exists()


def test_readme_has_the_first_goal_of_each_benchmark_and_error_rates():
    text = "before\n<!-- bench:summary -->\nold\n<!-- /bench:summary -->\nafter\n"
    lines = report.readme(text, [RECORD, TENSORS, BUNDLED]).splitlines()
    assert lines[:2] == ["before", "<!-- bench:summary -->"] and lines[-2:] == ["<!-- /bench:summary -->", "after"]
    assert "old" not in lines
    assert "| log_mel_fbank | wespeaker, 64 x 10 s | peer / native | 16.2 |" in lines
    assert "| attentive_stats_pool | forward, 32 x 8 x 9 | eager / native | 4.0 |" in lines
    assert any("some CPU, 2 cores, torch 2.11.0" in line for line in lines)
    assert any("EER of `ecapa-mini`" in line and "4.12 (1.00 to 9.50) on trials.txt" in line for line in lines)
    assert report.readme("\n".join(lines), [RECORD, TENSORS, BUNDLED]) == "\n".join(lines)
    with pytest.raises(ValueError, match=r"README\.md must have one block"):
        report.readme("no block", [])
