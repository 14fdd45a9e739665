"""Refuses records that are worse than their goals, or than other records of the same machine.

    python -m benchmarks.gate RESULTS [BASE]

Each folder holds records, or folders of records by machine. The exit status is 1 where a rule is broken:

* A figure with a goal meets it, or misses it by no more than the A/A spread of its row, or stands in known_misses.toml.
* An accuracy record that compares ways on the same trials is within its bounds, whose intervals pair the two, or stands
  there with "bounds" for the figure.
* Beside BASE, a figure with a goal, or a ratio to a peer, has not lost more than 10 % beyond the A/A spreads of both
  rows, and none with a goal is gone.
* Beside BASE, an EER is not above the 95 % interval over speakers that the base has for it, and the mean EER of a
  recipe over its seeds has not risen by Welch's 95 % interval.

A spread above that of a noisy row counts as just that: a row measured on a busy machine excuses no more.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.plots import PEER_RATIO
from benchmarks.timing import NOISY, Figure

ROOT = Path(__file__).resolve().parents[1]
KNOWN = ROOT / "benchmarks/known_misses.toml"
BOUNDS = "bounds"  # in place of a figure, of what a record tells to be within its bounds or not
INDEX = "index.json"
_MOST_LOSS = 0.1
_CONFIDENCE = 0.95

Records = Mapping[str, dict[str, Any]]


def main() -> None:
    """Prints what is wrong and ends with a status that says so."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("base", type=Path, nargs="?")
    parser.add_argument("--known", type=Path, default=KNOWN, help="file of the misses that are let pass")
    args = parser.parse_args()
    records = read(args.results)
    wrong = check(records, tomllib.loads(args.known.read_text())["miss"])
    if args.base:
        wrong += compare(records, read(args.base))
    print("\n".join(wrong) if wrong else f"{len(records)} records keep every rule")
    sys.exit(bool(wrong))


def read(folder: Path) -> Records:
    """Records by their path in the folder, those of GPUs left out: ``make gpu-status`` judges them.

    Raises:
        SystemExit: If there is none, or they are of a quick run.
    """
    found = {}
    for path in sorted([*folder.glob("*.json"), *folder.glob("*/*.json")]):
        content = json.loads(path.read_text())
        if path.name != INDEX and path.parent.name != "gpu":
            found[path.relative_to(folder).as_posix()] = content
        elif content.get("quick"):
            raise SystemExit(f"{path}: is of a quick run, whose figures mean nothing")
    if not found:
        raise SystemExit(f"{folder}: holds no records")
    return found


def check(records: Records, known: Sequence[Mapping[str, str]]) -> list[str]:
    """What breaks the rules for records alone; see the top of this file."""
    excused = {(miss["record"], miss["row"], miss["figure"]): miss["reason"] for miss in known}
    wrong, needed = [], set()
    for (path, row, name), (figure, spread) in _figures(records).items():
        # By its spread nearer to the goal, whichever side that is on.
        nearer = Figure("", figure.value * (1 + spread), figure.at_least)
        if figure.at_most is not None:
            nearer = Figure("", figure.value * (1 - spread), at_most=figure.at_most)
        if nearer.verdict == "missed":
            needed.add((path, row, name))
            if not excused.get((path, row, name)):
                wrong.append(
                    f"{path}: {row}: {name} is {figure.value:.3g}, {figure.goal} was to be met; "
                    f"the A/A spread that counts is {spread:.1%}"
                )
    for path, record in records.items():
        for where, values in _parts(record):
            if values.get("within_bounds") is False:
                needed.add((path, where, BOUNDS))
                if not excused.get((path, where, BOUNDS)):
                    wrong.append(f"{path}: {where} is not within its bounds {values['bounds']}")
    wrong += [
        f"known misses: {', '.join(key)} is no longer missed, or not there: remove it"
        for key in excused
        if key[0] in records and key not in needed
    ]
    return wrong


def compare(records: Records, base: Records) -> list[str]:
    """What has become worse than in the base; see the top of this file."""
    if not records.keys() & base.keys():
        return [f"nothing to compare: no record is in both, {', '.join(records)} and {', '.join(base)}"]
    wrong = []
    now, before = _figures(records), _figures(base)
    for key, (old, old_spread) in before.items():
        path, row, name = key
        if path not in records or not (old.goal or PEER_RATIO.match(name)):
            continue
        if key not in now:
            if old.goal:
                wrong.append(f"{path}: {row}: {name}, which has a goal, is gone")
            continue
        new, spread = now[key]
        kept = new.value / old.value if old.at_most is None else old.value / new.value
        allowed = _MOST_LOSS + spread + old_spread
        if kept < 1 - allowed:
            wrong.append(
                f"{path}: {row}: {name} went from {old.value:.3g} to {new.value:.3g}, worse by more than {allowed:.1%}"
            )
    for path in sorted(records.keys() & base.keys()):
        found = dict(_parts(base[path]))
        for where, values in _parts(records[path]):
            rate, highest = values.get("eer_percent"), found.get(where, {}).get("eer_high_percent")
            if isinstance(rate, float) and highest is not None and rate > highest:
                wrong.append(f"{path}: {where}: EER {rate:.2f} % is above the base's interval, up to {highest:.2f} %")
        wrong += [f"{path}: {line}" for line in _recipes(records[path], base[path])]
    return wrong


def _recipes(record: Mapping[str, Any], base: Mapping[str, Any]) -> Iterator[str]:
    """Recipes whose mean over seeds has risen."""
    from scipy import stats

    for recipe in record.get("recipes", {}).keys() & base.get("recipes", {}).keys():
        runs, old = (part["recipes"][recipe]["runs"] for part in (record, base))
        for trials in runs[0]["lists"].keys() & old[0]["lists"].keys():
            rates, before = ([run["lists"][trials]["eer_percent"] for run in part] for part in (runs, old))
            if min(len(rates), len(before)) < 2 or rates == before:
                continue
            rise = stats.ttest_ind(rates, before, equal_var=False).confidence_interval(_CONFIDENCE).low
            if rise > 0:
                yield f"{recipe}, {trials}: the mean EER over seeds has risen by at least {rise:.2f} points"


def _figures(records: Records) -> dict[tuple[str, str, str], tuple[Figure, float]]:
    """Figures by record, row and name, with the spread that counts."""
    found = {}
    for path, record in records.items():
        for row in record.get("results", []):
            case = f"{row['frontend'] if 'frontend' in row else row['case']}, {row['workload']}"
            for figure in (Figure(**fields) for fields in row["figures"]):
                found[path, case, figure.name] = figure, min(row["aa_spread"], NOISY)
    return found


def _parts(value: Any, where: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every mapping inside a record with the keys that lead there."""
    if isinstance(value, dict):
        yield where, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _parts(inner, f"{where}, {key}" if where else str(key))


if __name__ == "__main__":
    main()
