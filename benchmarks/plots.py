"""Figures of a run: how many times as long peers take, with the A/A spread of the row."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.timing import NOISY, Figure

# Names of figures that are times of a peer over times of ours; others are rates, shares or gains of threads.
PEER_RATIO = re.compile(r"(?!native|spkfast).+ / (native|spkfast)\b(?!.*%)")
_OURS, _BUSY = "#2f6fde", "#b0b7c3"


def ratios(records: Iterable[dict[str, Any]]) -> Iterator[tuple[str, str, Figure, float]]:
    """Each ratio to a peer: benchmark, row, figure, and A/A spread of the row."""
    for record in records:
        for row in record.get("results", []):
            for figure in (Figure(**fields) for fields in row["figures"]):
                if PEER_RATIO.match(figure.name):
                    name = row["frontend"] if "frontend" in row else row["case"]
                    yield record["op"], f"{name}, {row['workload']}", figure, row["aa_spread"]


def draw(records: Iterable[dict[str, Any]], path: Path) -> bool:
    """Writes a bar for each ratio to a peer, the goal as a tick; False where there is none.

    Args:
        records: Of one group.
        path: SVG file.
    """
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    bars = list(ratios(records))
    if not bars:
        return False
    values = [figure.value for _, _, figure, _ in bars]
    labels = [f"{op}: {row}: {figure.name}" for op, row, figure, _ in bars]
    with matplotlib.rc_context({"svg.hashsalt": path.stem, "font.size": 7}):
        canvas = Canvas(figsize=(12, 1 + 0.18 * len(bars)), layout="constrained")
        axes = canvas.subplots()
        axes.barh(
            range(len(bars)),
            [value - 1 for value in values],  # from where both take as long
            left=1,
            xerr=[value * spread for value, (*_, spread) in zip(values, bars, strict=True)],
            color=[_BUSY if spread > NOISY else _OURS for *_, spread in bars],
            error_kw={"linewidth": 0.8, "capsize": 1.5},
        )
        for place, (_, _, figure, _) in enumerate(bars):
            if figure.at_least is not None:
                axes.plot([figure.at_least] * 2, [place - 0.4, place + 0.4], color="black", linewidth=1.5)
        axes.axvline(1, color="0.4", linewidth=0.8)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_yticks(range(len(bars)), labels)
        axes.set_ylim(len(bars) - 0.4, -0.6)
        axes.set_xlabel("times as long as ours")
        canvas.suptitle("Peers beside spkfast; whiskers: A/A spread, black: goal, grey: the machine was busy")
        canvas.savefig(path, metadata={"Date": None})  # the same records give the same file
    return True
