"""The command ``evaluate``: equal error rate and detection cost on trial lists."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from spkfast.cli.common import (
    MODEL_HELP,
    Parser,
    add_backend,
    add_batch_seconds,
    add_json,
    add_precision,
    embed_all,
    print_result,
    rates,
    shown_rates,
)
from spkfast.errors import InputError

HELP = "EER with its interval and minDCF on trial lists"


def main(argv: list[str]) -> None:
    """Runs ``spkfast evaluate``."""
    parser = Parser("evaluate", HELP)
    parser.add_argument("--trials", nargs="+", metavar="T", help="lists of lines 'label path path' [ROOT/trials.txt]")
    parser.add_argument("--model", help=MODEL_HELP)
    parser.add_argument("--data", metavar="ROOT", help="folder that the paths of the trials start from; with --model")
    parser.add_argument("--embeddings", metavar="X.npz", help="embeddings from 'spkfast embed', instead of a model")
    parser.add_argument("--scores", metavar="FILE", help="write lines 'label path path score'")
    parser.add_argument("--det", metavar="PNG", help="write a plot of misses against false alarms")
    parser.add_argument(
        "--method",
        choices=("interp", "clova", "speechbrain"),
        default="interp",
        help="definition of the equal error rate [interp]",
    )
    add_precision(parser)
    add_batch_seconds(parser)
    add_backend(parser)
    add_json(parser)
    args = parser.parse_args(argv)
    if bool(args.model) == bool(args.embeddings):
        parser.error("give either --model with --data, or --embeddings")
    if bool(args.model) != bool(args.data):
        parser.error("--model and --data go together")
    if args.embeddings and args.precision != "fp32":
        parser.error("--precision goes with --model: stored embeddings have theirs")
    if args.det and Path(args.det).suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"--det must end with .png, .pdf or .svg, got {args.det}")
    if not args.trials and not args.data:
        parser.error("--trials is needed with --embeddings")

    from spkfast.data.lists import read_trials, trial_paths
    from spkfast.evaluation import evaluate_trials

    names = args.trials or [str(Path(args.data) / "trials.txt")]
    lists = {name: read_trials(name) for name in names}
    started = time.monotonic()
    if args.model:
        keys = trial_paths(trial for trials in lists.values() for trial in trials)
        embeddings = _embed(args, keys)
    else:
        from spkfast.cli.embed import read_embeddings

        stored = read_embeddings(args.embeddings)
        keys, embeddings = stored.keys, stored.embeddings
    results = {name: evaluate_trials(trials, keys, embeddings, method=args.method) for name, trials in lists.items()}
    if args.scores:
        with open(args.scores, "w", encoding="utf-8") as file:
            for name, trials in lists.items():
                for trial, score in zip(trials, results[name].scores, strict=True):
                    file.write(f"{int(trial.target)} {trial.enrol} {trial.test} {score:.6f}\n")
    if args.det:
        from spkfast.evaluation import det_plot

        det_plot({name: (r.scores, r.labels) for name, r in results.items()}).savefig(args.det, dpi=150)
    rows = [_row(name, result) for name, result in results.items()]
    shown = [
        {
            "trials": row["trials"],
            **shown_rates(row),
            "targets": row["targets"],
            "nontargets": row["nontargets"],
            "speakers": row["speakers"],
        }
        for row in rows
    ]
    result = {
        "method": args.method,
        "backend": args.backend,
        "precision": args.precision if args.model else None,
        "seconds": time.monotonic() - started,
        "lists": rows,
    }
    print_result(result, args.json, shown={"": shown})


def _embed(args: Any, paths: list[str]) -> Any:
    from spkfast.inference import SpeakerEncoder

    root = Path(args.data)
    for path in paths:
        if not (root / path).is_file():
            raise InputError(f"{root / path}: no such file, but the trials name it")
    encoder = SpeakerEncoder.load(args.model, precision=args.precision)
    return embed_all(encoder, root, paths, backend=args.backend, batch_seconds=args.batch_seconds)


def _row(name: str, result: Any) -> dict[str, Any]:
    targets = int(result.labels.sum())
    return {
        "trials": name,
        **rates(result),
        "eer_threshold": result.eer.threshold,
        "p_target": 0.01,
        "targets": targets,
        "nontargets": len(result.labels) - targets,
        "speakers": result.num_speakers,
    }
