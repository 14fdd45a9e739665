"""Fills model_card.md, the card of a bundled model, from the record of its training and evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TEMPLATE = Path(__file__).with_suffix(".md")

# Those that the card credits; another one makes no card.
_CORPORA = {
    "librispeech-tc100": "LibriSpeech train-clean-100, excerpts",
    "librispeech-to": "LibriSpeech test-other, excerpts",
    "asc": "Arabic Speech Commands",
    "fsdd": "Free Spoken Digit Dataset",
}
_PARTS = {"train": "training", "held_out": "of these, choosing recipe and threshold", "test": "the tests above"}


def card(record: dict[str, Any], machine: str) -> str:
    """Text of the card, in Markdown.

    Args:
        record: What ``benchmarks.accuracy.bundle`` wrote.
        machine: The machine in words.

    Raises:
        KeyError: If a corpus is not credited, or the test over another channel is missing.
    """
    model, held_out, lists, parts = (record[key] for key in ("model", "held_out", "lists", "data"))
    narrow = lists["trials_fsdd.txt"]
    return TEMPLATE.read_text().format(
        **{key: record[key] for key in ("name", "recipe", "seed")},
        **{key: model["config"][key] for key in ("dialect", "channels", "mfa_channels", "embedding_dim")},
        **record["frontend"],
        network=model["name"],
        parameters=f"{model['parameters']:,}",
        bytes=f"{model['bytes']:,}",
        megabytes=f"{model['bytes'] / 1e6:.1f}",
        sha256=model["sha256"],
        lists="\n".join(table(record)),
        threshold=f"{record['threshold']:.4f}",
        held_out_trials=f"{held_out['num_trials']:,}",
        held_out_speakers=held_out["speakers"],
        held_out_rate=rate(held_out),
        held_out_teachers=f", by {held_out['teachers']} teachers," if held_out["teachers"] else "",
        steps=f"{record['steps']:,}",
        differences="".join(f", `{name}` {json.dumps(value)}" for name, value in record["differences"].items()),
        minutes=f"{record['training_minutes']:.0f}",
        machine=machine,
        config=record["config"].rstrip("\n"),
        teachers="\n".join(_teachers(record["teachers"])),
        data="\n".join(
            f"| {_PARTS[part]} | {_CORPORA[corpus]} | {row['speakers']} | {row['utterances']} | {row['minutes']:.1f} |"
            for part, corpora in parts.items()
            for corpus, row in corpora.items()
        ),
        speakers=sum(row["speakers"] for row in parts["train"].values()),
        train_minutes=f"{sum(row['minutes'] for row in parts['train'].values()):.0f}",
        most_speakers=max(row["speakers"] for row in lists.values()),
        narrow_misses=f"{narrow['misses_percent']:.1f}",
        narrow_false_alarms=f"{narrow['false_alarms_percent']:.1f}",
        narrow_threshold=f"{narrow['eer_threshold']:.4f}",
        narrow_rate=f"{narrow['eer_percent']:.1f}",
    )


def _teachers(teachers: dict[str, Any] | None) -> list[str]:
    if teachers is None:
        return []
    seeds = ", ".join(map(str, teachers["seeds"]))
    return [
        f"\nIts {len(teachers['seeds'])} teachers, {teachers['training_minutes']:.0f} minutes in all, are runs of "
        f"`configs/{teachers['recipe']}` with `seed` {seeds}:\n",
        "```yaml",
        teachers["config"].rstrip("\n"),
        "```\n",
    ]


def table(record: dict[str, Any]) -> list[str]:
    """Lines of Markdown: error rates on each list, and those at the threshold of the model."""
    lines = [
        "| list | speakers | target + non-target trials | EER % (95 % interval) | minDCF | misses % | false alarms % |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in record["lists"].items():
        cells = [
            name,
            str(row["speakers"]),
            f"{row['targets']:,} + {row['nontargets']:,}",
            rate(row),
            f"{row['min_dcf']:.4f}",
            f"{row['misses_percent']:.2f}",
            f"{row['false_alarms_percent']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def rate(row: dict[str, Any]) -> str:
    """Equal error rate in percent, and its interval where there is one."""
    low, high = row["eer_low_percent"], row["eer_high_percent"]
    return f"{row['eer_percent']:.2f}" + ("" if low is None else f" ({low:.2f} to {high:.2f})")
