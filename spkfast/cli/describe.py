"""The command ``describe``: what is in a corpus, and what is wrong with its audio."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spkfast.cli.common import Parser, add_json, meter, print_result
from spkfast.errors import InputError

if TYPE_CHECKING:
    from spkfast.data.describe import Description, Distribution

HELP = "hours, speakers, lengths, clipping, silence and duplicates of a corpus"

_SHOWN = 10


def main(argv: list[str]) -> None:
    """Runs ``spkfast describe``."""
    parser = Parser("describe", HELP)
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="list 'speaker path', CSV, TSV, JSON lines, lhotse cuts, Kaldi directory, folder of audio or shards",
    )
    parser.add_argument("--root", metavar="FOLDER", help="where relative paths start from [the folder of SOURCE]")
    parser.add_argument("--speakers", metavar="FILE", help="lines 'utterance speaker' that go before what SOURCE says")
    parser.add_argument("--sample", type=int, metavar="N", help="read a random choice of N utterances [all]")
    parser.add_argument("--seed", type=int, default=0, help="seed of that choice [0]")
    parser.add_argument(
        "--silence-db", type=float, default=-60.0, metavar="DB", help="level in dBFS that counts as silence [-60]"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="threads that read [one per core, 8 at most]")
    parser.add_argument("--plot", metavar="FILE", help="histograms, as .png, .svg or .pdf")
    add_json(parser)
    args = parser.parse_args(argv)
    if args.seed < 0:
        raise InputError(f"--seed must be at least 0, got {args.seed}")
    if args.plot and Path(args.plot).suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"--plot must end with .png, .svg or .pdf, got {args.plot}")
    if args.plot:  # what cannot be drawn is told before all is read rather than after
        importlib.import_module("matplotlib")
        if not Path(args.plot).absolute().parent.is_dir():
            raise InputError(f"--plot {args.plot}: no such folder {Path(args.plot).parent}")

    from spkfast.data.describe import describe
    from spkfast.data.manifests import read_corpus

    corpus = read_corpus(args.source, root=args.root, speakers=args.speakers, warn=_say)
    with meter("reading") as update:
        found = describe(
            corpus,
            silence_db=args.silence_db,
            workers=args.workers,
            sample=args.sample,
            seed=args.seed,
            progress=update,
        )
    if args.plot:
        found.plot().savefig(args.plot, dpi=150)
    print_result(found.to_dict(), args.json, shown=_shown(found))


def _say(message: str) -> None:
    print(message, file=sys.stderr)


def _shown(found: Description) -> dict[str, Any]:
    """What people see: counts, and the first utterances of each fault."""
    asked = found.read + len(found.unreadable)
    hours = f"{found.hours:.2f}"
    if asked < found.utterances:
        hours += f" in a choice of {asked} utterances; about {found.estimated_hours:.4g} in all"
    shown: dict[str, Any] = {
        "corpus": found.name,
        "speakers": found.speakers,
        "utterances": found.utterances,
        "hours": hours,
        "spread": [
            _row("utterances per speaker", found.utterances_per_speaker),
            _row("length in seconds", found.seconds),
            *([_row("loudest 10 ms in dBFS", found.loudest_db)] if found.loudest_db else []),
        ],
        "sampling rates": [{"Hz": rate, "utterances": count} for rate, count in found.sample_rates.items()],
        "faults": [
            {"fault": name, "utterances": count, "of those read": f"{count / asked:.2%}"}
            for name, count in (
                ("clipped", len(found.clipped)),
                ("silent", len(found.silent)),
                ("shorter than the manifest says", len(found.shorter)),
                ("audio there under another name", sum(len(group) - 1 for group in found.duplicates)),
                ("SAME AUDIO, ANOTHER SPEAKER", sum(len(group) for group in found.duplicates_across_speakers)),
                ("unreadable", len(found.unreadable)),
            )
        ],
    }
    lists = {
        "SAME AUDIO, ANOTHER SPEAKER": [" = ".join(group) for group in found.duplicates_across_speakers],
        "same audio": [" = ".join(group) for group in found.duplicates],
        "clipped": found.clipped,
        "silent": found.silent,
        "shorter": found.shorter,
        "unreadable": list(found.unreadable.values()),
    }
    for name, lines in lists.items():
        if lines:
            title = f"{name} (the first {_SHOWN} of {len(lines)}; --json has all)" if len(lines) > _SHOWN else name
            shown[title] = [{"": line} for line in lines[:_SHOWN]]
    return shown


def _row(name: str, spread: Distribution) -> dict[str, Any]:
    return {"": name, "least": spread.min, "median": spread.median, "most": spread.max}
