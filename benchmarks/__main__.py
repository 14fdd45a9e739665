"""Every benchmark behind one command: ``python -m benchmarks``, which ``spkfast bench`` starts.

The table of benchmarks is read from the files: a program in one of the folders below is one, and its own options tell
what it needs. Each runs in a process of its own, in turn; one that fails or cannot run stops no other.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Any

from benchmarks import plots, report
from benchmarks.machine import describe_machine
from benchmarks.timing import NOISY, Figure
from spkfast.cli.bench import parse
from spkfast.cli.common import print_result
from spkfast.errors import InputError, check_name

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"ops": "ops", "models": "models", "data": "pipeline", "evaluation": "pipeline", "accuracy": "accuracy"}
INDEX = "index.json"
# What options of benchmarks are set to in a quick run; one with none of them has no quick form.
QUICK = {
    "--repeats": "2",
    "--rounds": "1",
    "--steps": "1",
    "--batch": "8",
    "--batches": "1",
    "--channels": "512",
    "--speakers": "1000",
    "--most-speakers": "2000",
    "--share": "0.01",
    "--sizes": "small",
    "--seconds": "1",
    "--precisions": "fp32",
    "--recipe": "espnet",
}
_QUICK_CEILINGS = ("--mib", "64", "--size", "512", "--repeats", "2")
_ORIGIN = "`spkfast bench` from the records beside this page"
_END_SECONDS = 10.0
_GIVEN = ("--data", "--out")  # required arguments that this command knows
_SPEECH = "SPKFAST_SPEECH"
_NOTHING = "nothing measured: "  # begins the last line of a benchmark that lacks what it needs


class LeftOut(Exception):
    """Why a benchmark cannot run."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A benchmark, as its file tells.

    Attributes:
        name: Stem of the file without ``bench_``.
        module: What ``python -m`` runs.
        group: What :data:`FOLDERS` says of its folder.
        summary: First sentence of the docstring.
        options: Names of the options that it has.
        required: Arguments that it cannot do without.
        needs: ``speech``, ``a GPU``, or arguments that only a person can give.
    """

    name: str
    module: str
    group: str
    summary: str
    options: frozenset[str]
    required: tuple[str, ...]
    needs: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> Program | None:
        """The program in a file, or None where that only defines things for others."""
        tree = ast.parse(path.read_text())
        if not any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body):
            return None
        options, required, speech = set(), [], False
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            function, given = ast.unparse(call.func), [ast.unparse(value) for value in call.args]
            if function.endswith(".add_argument"):
                name = ast.literal_eval(call.args[0])
                options.add(name)
                if name[0] != "-" or any(k.arg == "required" and ast.literal_eval(k.value) for k in call.keywords):
                    required.append(name)
            # With a default there is something else to take.
            speech |= function == "os.environ.get" and given == [repr(_SPEECH)]
        needs = [
            *(["speech"] if speech or "--data" in required else []),
            *(["a GPU"] if "--device" in options else []),
            *(name for name in required if name not in _GIVEN),
        ]
        summary = re.split(r":\s|\.\n|\.$|\n\n", ast.get_docstring(tree) or "")[0].replace("\n", " ")
        return cls(
            path.stem.removeprefix("bench_"),
            f"benchmarks.{path.parent.name}.{path.stem}",
            FOLDERS[path.parent.name],
            summary,
            frozenset(options),
            tuple(required),
            tuple(needs),
        )

    def arguments(self, out: Path, quick: bool, options: Sequence[str] = ()) -> list[str]:
        """The command line, the caller's options last.

        Raises:
            LeftOut: If this command cannot give it all that it needs.
        """
        arguments = ["--out", str(out)]
        foreign = [name for name in self.required if name not in _GIVEN]
        if foreign and not options:
            raise LeftOut(f"needs {', '.join(foreign)}: name them after --, with --only {self.name}")
        if "--data" in self.required:
            if not os.environ.get(_SPEECH):
                raise LeftOut(f"{_SPEECH} names no folder of speech")
            arguments += ["--data", os.environ[_SPEECH]]
        if quick:
            chosen = [word for option, value in QUICK.items() if option in self.options for word in (option, value)]
            if not chosen:
                raise LeftOut("has no quick form")
            arguments += chosen
        return [*arguments, *options]


def main(argv: list[str]) -> int:
    """Runs what was asked for; the exit status is 1 where something failed, or nothing or not all named was measured.

    Raises:
        InputError: If a name is unknown.
    """
    args = parse(argv)
    programs = [program for program in find() if args.group in (program.group, "all")]
    for name in args.only or []:
        check_name("benchmark", name, [program.name for program in programs])
    programs = [program for program in programs if not args.only or program.name in args.only]
    if args.list:
        rows = [
            {"benchmark": p.name, "group": p.group, "needs": ", ".join(p.needs), "what": p.summary} for p in programs
        ]
        print_result({"benchmarks": rows, "packages not installed": ", ".join(absent_packages()) or "none"}, args.json)
        return 0
    machine = describe_machine()
    default = ROOT / ("build/bench" if args.quick else "benchmarks/results") / machine_name(machine)
    folder = (args.out or default).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    echo = sys.stderr if args.json else sys.stdout
    index = run_all(programs, folder, machine, quick=args.quick, options=args.options, echo=echo)
    rows = index["benchmarks"]
    shown = [
        {
            "benchmark": row["name"],
            "outcome": row["outcome"],
            "minutes": f"{row['seconds'] / 60:.1f}",
            "noisy rows": row["noisy"],
            "goals missed": row["missed"],
            "why": row["reason"],
        }
        for row in rows
    ]
    load = f"{index['load_before']:.1f}, {index['load_after']:.1f} on {machine['cores']} cores"
    summary = {
        "folder": str(folder),
        "load before and after": load,
        "packages not installed": ", ".join(index["absent"]) or "none",
        "benchmarks": shown,
    }
    print_result(index, args.json, shown=summary)
    outcomes = [row["outcome"] for row in rows]
    complete = not args.only or "left out" not in outcomes
    return 0 if "failed" not in outcomes and "measured" in outcomes and complete else 1


def find() -> list[Program]:
    """All benchmarks, in the order of the folders."""
    paths = (path for folder in FOLDERS for path in sorted((ROOT / "benchmarks" / folder).glob("*.py")))
    return [program for program in map(Program.read, paths) if program is not None]


def absent_packages() -> list[str]:
    """Packages that a benchmark imports and that are not installed here: contenders without which it goes on."""
    names = set()
    for path in (ROOT / "benchmarks").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.split(".")[0])
    return sorted(
        name for name in names - set(sys.stdlib_module_names) - {"tests"} if importlib.util.find_spec(name) is None
    )


def machine_name(machine: dict[str, Any]) -> str:
    """Name of the folder of a machine's records, such as ``amd-epyc-2-cores``."""
    processor = re.sub(r"[^a-z0-9]+", "-", machine["cpu"].split(",")[0].lower()).strip("-")
    return f"{processor or 'unknown'}-{machine['cores']}-cores"


def run_all(
    programs: Sequence[Program],
    folder: Path,
    machine: dict[str, Any],
    *,
    quick: bool,
    options: Sequence[str] = (),
    echo: IO[str],
) -> dict[str, Any]:
    """Runs benchmarks in turn, writes their records, the index, a page and plots, and gives the index."""
    before = os.getloadavg()[0]
    if before > machine["cores"] / 2:
        print(f"the machine is busy before anything runs: load {before:.1f}", file=echo)
    rows, measured = [], {}
    with tempfile.TemporaryDirectory() as temporary:
        if any(program.group != "accuracy" for program in programs):
            measured = _ceilings(Path(temporary) / "ceilings.json", machine["cores"], quick, echo)
        for program in programs:
            rows.append(_measure(program, Path(temporary), folder, measured, quick, options, echo))
    index = {
        "machine": machine,
        "quick": quick,
        "load_before": before,
        "load_after": os.getloadavg()[0],
        "absent": absent_packages(),
        "ceilings": measured,
        "benchmarks": rows,
    }
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    _write_page(folder, quick)
    return index


def _ceilings(out: Path, cores: int, quick: bool, echo: IO[str]) -> dict[str, Any]:
    threads = map(str, sorted({1, cores}))
    command = ["benchmarks.ceilings", "--out", str(out), "--threads", *threads, *(_QUICK_CEILINGS if quick else ())]
    status, last = _run(command, echo)
    if status:
        print(f"without ceilings: {last}", file=echo)
    return {} if status else json.loads(out.read_text())


def _measure(
    program: Program,
    temporary: Path,
    folder: Path,
    ceilings: dict[str, Any],
    quick: bool,
    options: Sequence[str],
    echo: IO[str],
) -> dict[str, Any]:
    """Runs one benchmark, a second time where the machine was busy, and keeps the quieter record."""
    print(f"\n=== {program.name}", file=echo, flush=True)
    started = time.monotonic()
    outcome, reason, record, quietest = "failed", "", None, temporary / f"{program.name}.json"
    try:
        for attempt in range(2):
            out = temporary / f"{program.name}-{attempt}.json"
            status, last = _run([program.module, *program.arguments(out, quick, options)], echo)
            if last.startswith(_NOTHING) or not (status or out.exists()):
                raise LeftOut(last.removeprefix(_NOTHING))
            if status:
                reason = last or f"exit status {status}"
                break
            found = json.loads(out.read_text())
            if record is None or len(_noisy(found)) < len(_noisy(record)):
                record = found
                out.replace(quietest)
            if quick or not _noisy(record):
                break
        if record is not None:
            outcome = "measured"
            _keep(record, quietest, folder / f"{program.name}.json", ceilings)
    except LeftOut as why:
        outcome, reason = "left out", str(why)
        print(f"left out: {reason}", file=echo)
    rows = (record or {}).get("results", [])
    figures = [Figure(**figure) for row in rows for figure in row["figures"]]
    return {
        "name": program.name,
        "group": program.group,
        "outcome": outcome,
        "reason": reason,
        "seconds": time.monotonic() - started,
        "noisy": len(_noisy(record or {})),
        "missed": sum(figure.verdict == "missed" for figure in figures),
        "absent": {name: why for row in rows for name, why in row.get("absent", {}).items()},
    }


def _noisy(record: dict[str, Any]) -> list[Any]:
    return [row for row in record.get("results", []) if row["aa_spread"] > NOISY]


def _keep(record: dict[str, Any], source: Path, target: Path, ceilings: dict[str, Any]) -> None:
    """Puts a record into the folder, with the ceilings where it holds rates."""
    if ceilings and "results" in record:
        target.write_text(json.dumps(record | {"ceilings": ceilings}, indent=1) + "\n")
    else:
        shutil.copyfile(source, target)


def _write_page(folder: Path, quick: bool) -> None:
    """The page and a plot for each group, of all records in the folder."""
    records = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json")) if path.name != INDEX}
    groups = {program.name: program.group for program in find()}
    lines = ["**A quick run: no figure here is one to quote.**", ""] if quick else []
    for group in sorted(set(groups.values())):
        of_group = [record for name, record in records.items() if groups.get(name) == group]
        if importlib.util.find_spec("matplotlib") and plots.draw(of_group, folder / f"{group}.svg"):
            lines += [f"![Ratios to peers: {group}]({group}.svg)", ""]
    (folder / "benchmarks.md").write_text(report.text(records.values(), _ORIGIN, lines))


def _run(command: Sequence[str], echo: IO[str]) -> tuple[int, str]:
    """Runs a module of the checkout to its end, with all that it started; its exit status and its last line."""
    # On the path rather than from the checkout, since paths among the options are relative to where the user stands.
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    environment.pop("OMP_WAIT_POLICY", None)  # the command line sets it; contenders run as they are delivered
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        process_group=0,
    )
    last = ""
    try:
        for line in _lines(process):
            echo.write(line)
            echo.flush()
            last = line.strip() or last
        return process.wait(), last
    finally:
        _end(process)


def _lines(process: subprocess.Popen[str]) -> Iterator[str]:
    assert process.stdout
    with process.stdout:
        yield from process.stdout


def _end(process: subprocess.Popen[str]) -> None:
    """Ends what is left of a process and of those that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        deadline = time.monotonic() + _END_SECONDS
        while time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)


def _interrupt(number: int, frame: FrameType | None) -> None:
    for each in (signal.SIGINT, signal.SIGTERM):  # a second one must not stop the ending of the processes
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


def _program() -> int:
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return main(sys.argv[1:])
    except InputError as error:
        print(f"spkfast bench: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(_program())
