"""The report of an evaluation or a training run: one HTML file that needs nothing else, neither network nor folder."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spkfast.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
:root { color-scheme: light dark; --text: #1c2430; --soft: #5b6676;
  --page: #f6f7f9; --card: #fff; --line: #dfe3e8; --note: #fff6df; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e9ee; --soft: #9aa5b4; --page: #14181d; --card: #1d232a; --line: #333c46; --note: #35301f; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .75rem; }
.notes { background: var(--note); border-radius: .5rem; margin: 0; padding: .75rem 1rem; }
.notes p { margin: 0; } .notes p + p { margin-top: .4rem; }
.summary { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .75rem;
  margin: 1.25rem 0 0; }
.summary div, figure, .table { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
.summary div { padding: .7rem 1rem; }
dt { color: var(--soft); font-size: .85rem; }
dd { margin: 0; font-size: 1.15rem; font-weight: 600; overflow-wrap: anywhere; }
.table { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .6rem 1rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; font-weight: 600; }
thead th { color: var(--soft); font-size: .85rem; font-weight: 500; white-space: normal; vertical-align: bottom; }
tbody tr:last-child > * { border-bottom: 0; }
details .table { margin-top: .75rem; }
summary { cursor: pointer; font-weight: 600; margin-top: 2.25rem; }
details td { text-align: left; white-space: normal; overflow-wrap: anywhere; padding: .3rem 1rem; }
.figures { columns: 2 24rem; column-gap: 1rem; }
figure { margin: 0 0 1rem; padding: 1rem; break-inside: avoid; }
figcaption { font-weight: 600; margin-bottom: .5rem; }
img { display: block; width: 100%; height: auto; border-radius: .25rem; }
/* White becomes nearly the colour of the card, hues stay. */
@media (prefers-color-scheme: dark) { img { filter: invert(.88) hue-rotate(180deg); } }
"""


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    notes: Sequence[str] = (),
    summary: Mapping[str, Any] | None = None,
    table: Sequence[Mapping[str, Any]] = (),
    table_title: str = "Accuracy and speed",
    figures: Mapping[str, Figure] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write a report; text is escaped, figures are embedded, so the file can be sent by itself.

    Args:
        path: The HTML file; its folder is made, and a file that is there is replaced.
        title: Headline.
        notes: What a reader must know first, such as that the data is synthetic; one paragraph each.
        summary: Key figures by name.
        table: One mapping per row, from column to value. The columns stand in the order in which rows first name them;
            where a row lacks one, or has None there, a dash stands. Numbers are rounded to four digits, text is kept.
        table_title: Heading of the table.
        figures: Matplotlib figures by caption.
        settings: Whatever else a reader may look up, by name; folded until asked for.

    Returns:
        The file.

    Raises:
        InputError: If the path is a folder.
    """
    target = Path(path)
    if target.is_dir():
        raise InputError(f"{target}: is a folder; name an HTML file for the report")
    parts = [f"<h1>{escape(title)}</h1>"]
    if notes:
        parts.append(f'<div class="notes">{"".join(f"<p>{escape(note)}</p>" for note in notes)}</div>')
    if summary:
        items = "".join(f"<div><dt>{escape(name)}</dt><dd>{_cell(value)}</dd></div>" for name, value in summary.items())
        parts.append(f'<dl class="summary">{items}</dl>')
    if table:
        parts.append(f"<h2>{escape(table_title)}</h2>{_table(table)}")
    if figures:
        images = "".join(_image(caption, figure) for caption, figure in figures.items())
        parts.append(f'<h2>Figures</h2><div class="figures">{images}</div>')
    if settings:
        rows = [{"setting": name, "value": value} for name, value in settings.items()]
        parts.append(f"<details><summary>Settings</summary>{_table(rows)}</details>")
    body = "\n".join(parts)
    page = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    # A reader never sees half a page, and a failed run leaves the last report as it was.
    partial = target.with_name(f".{target.name}.partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(target)
    return target


def shown_rates(row: Mapping[str, Any]) -> dict[str, str]:
    """Error rate with its interval, and detection cost, as every table shows them.

    Args:
        row: ``eer_percent``, ``eer_low_percent``, ``eer_high_percent`` and ``min_dcf``; a dash stands for None.
    """
    rate, low, high, cost = (row[name] for name in ("eer_percent", "eer_low_percent", "eer_high_percent", "min_dcf"))
    return {
        "EER %": "-" if rate is None else f"{rate:.2f}",
        "95 % interval": "-" if low is None or high is None else f"{low:.2f} to {high:.2f}",
        "minDCF (p 0.01)": "-" if cost is None else f"{cost:.4f}",
    }


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{_cell(row.get(column))}</td>' for column in columns)}</tr>" for row in rows)
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool | str):
        return escape(str(value))
    if isinstance(value, int):
        return f"{value:,}"
    try:
        return f"{float(value):,.4g}"
    except (TypeError, ValueError):
        return escape(str(value))


def _image(caption: str, figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    text = escape(caption)
    return f'<figure><figcaption>{text}</figcaption><img alt="{text}" src="data:image/png;base64,{data}"></figure>'
