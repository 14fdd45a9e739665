"""The command ``evaluate``: error rates and costs of trial lists with intervals, records of them, and comparisons."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spkfast.cli.common import (
    FILE_HELP,
    Parser,
    add_backend,
    add_batch_seconds,
    add_json,
    add_precision,
    embed_all,
    load_encoder,
    print_result,
    progress,
)
from spkfast.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np

    from spkfast.data.lists import TrialList
    from spkfast.evaluation.conditions import Condition
    from spkfast.evaluation.metrics import Estimate
    from spkfast.evaluation.protocols import Protocol
    from spkfast.evaluation.records import Comparison, ListResult

HELP = "EER and costs of trial lists, with intervals; comparison of two systems"

_METRICS = ("eer", "min_dcf:0.01")
_FEWEST_RESAMPLES = 20


def main(argv: list[str]) -> None:
    """Runs ``spkfast evaluate``."""
    parser = Parser("evaluate", HELP)
    parser.add_argument(
        "--trials",
        nargs="+",
        metavar="T",
        help="lists of lines 'label path path' or 'path path target|nontarget' [ROOT/trials.txt]",
    )
    parser.add_argument("--model", help=FILE_HELP)
    parser.add_argument("--data", metavar="ROOT", help="folder that the paths of the trials start from; with --model")
    parser.add_argument("--embeddings", metavar="X", help="embeddings from 'spkfast embed', instead of a model")
    parser.add_argument("--scored", nargs="+", metavar="FILE", help="lists from 'spkfast score', instead of a model")
    parser.add_argument("--protocol", metavar="NAME", help="public list: vox1-o, vox1-o-cleaned, ... -e, -h; or voxsrc")
    parser.add_argument(
        "--crops",
        metavar="WAY",
        help="what is compared: whole, 10x4 (ten crops of 4 s), 10x4:distance, whole+5x3 [whole]",
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        metavar="M",
        help="eer, min_dcf:P, act_dcf:P[:MISS:FA], cllr, min_cllr [eer min_dcf:0.01]",
    )
    parser.add_argument("--method", choices=("interp", "clova", "speechbrain"), help="definition of the EER [interp]")
    parser.add_argument(
        "--resamples", type=_count, default=1000, metavar="N", help="of the intervals; 0 for none [1000]"
    )
    parser.add_argument("--by", metavar="CSV", help="figures by condition too: a table with a column 'path' and others")
    parser.add_argument("--columns", nargs="+", metavar="C", help="columns of --by [all that make sense]")
    parser.add_argument("--far", type=float, metavar="RATE", help="tell the threshold for this false-alarm rate too")
    parser.add_argument("--out", metavar="JSON", help="write a record: figures and all they depend on, and the scores")
    parser.add_argument("--scores", metavar="FILE", help="write the lines with their scores")
    parser.add_argument("--det", metavar="PNG", help="write a plot of misses against false alarms")
    parser.add_argument("--histogram", metavar="PNG", help="write a plot of the scores of the first list")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two records of --out, trial by trial")
    parser.add_argument("--allow-duplicates", action="store_true", help="trials may be there twice")
    add_precision(parser)
    add_batch_seconds(parser)
    add_backend(parser)
    add_json(parser)
    args = parser.parse_args(argv)
    if args.compare:
        _compare(args)
        return
    _check(parser, args)

    from spkfast.evaluation.metrics import check_metrics
    from spkfast.evaluation.protocols import Crops, find_protocol
    from spkfast.evaluation.records import list_result, write_record

    protocol = find_protocol(args.protocol) if args.protocol else None
    crops = Crops.parse(args.crops or "whole")
    metrics = tuple(args.metrics or (protocol.metrics if protocol else _METRICS))
    if args.method:
        metrics = tuple(f"eer:{args.method}" if name == "eer" else name for name in metrics)
    check_metrics(metrics)
    metadata = _metadata(args)
    started = time.monotonic()
    lists = _lists(args, protocol)
    facts, scores = _scores(args, lists, crops)
    results = [
        list_result(name, trials, scores[name], metrics, num_resamples=args.resamples, watch=_watch)
        for name, trials in lists.items()
    ]
    conditions = _conditions(args, metadata, lists, results, metrics)
    if args.scores:
        with open(args.scores, "w", encoding="utf-8") as file:
            for name, trials in lists.items():
                file.writelines(f"{line}\n" for line in trials.text(scores[name]))
    _plot(args, results)
    facts = {
        "protocol": args.protocol,
        "crops": str(crops) if args.model else None,
        "method": args.method or "interp",
        "backend": args.backend,
        "precision": args.precision if args.model else None,
        **facts,
        "resamples": args.resamples,
        "confidence": 0.95 if args.resamples else None,
        "seconds": time.monotonic() - started,
    }
    if args.out:
        write_record(args.out, facts, results)
    at_far = [_at_far(args.far, result) for result in results]
    rows = [_row(result) | point for result, point in zip(results, at_far, strict=True)]
    shown = [_shown(result) | point for result, point in zip(results, at_far, strict=True)]
    by = [{"trials": name, **_shown_condition(one)} for name, found in conditions.items() for one in found]
    made = {"lists": rows}
    if conditions:
        made["conditions"] = [
            {"trials": name, **_condition_row(one)} for name, found in conditions.items() for one in found
        ]
    print_result(facts | made, args.json, shown={"": shown} | ({"by condition": by} if by else {}))


def _check(parser: Parser, args: Any) -> None:
    """Refuses options that need others."""
    if sum(map(bool, (args.model, args.embeddings, args.scored))) != 1:
        parser.error("give either --model with --data, or --embeddings, or --scored")
    if bool(args.model) != bool(args.data):
        parser.error("--model and --data go together")
    if not args.model and args.precision != "fp32":
        parser.error("--precision goes with --model: stored embeddings have theirs")
    if not args.model and args.crops:
        parser.error("--crops goes with --model: stored embeddings are of whole utterances")
    if args.scored and args.trials:
        parser.error("--scored names the lists: leave --trials out")
    if args.columns and not args.by:
        parser.error("--columns needs --by")
    for option in ("det", "histogram"):
        path = getattr(args, option)
        if path and Path(path).suffix not in (".png", ".pdf", ".svg"):
            parser.error(f"--{option} must end with .png, .pdf or .svg, got {path}")
    if args.out and Path(args.out).suffix != ".json":
        parser.error(f"--out must end with .json, got {args.out}")
    if args.embeddings and not args.trials:
        parser.error("--trials is needed with --embeddings")


def _lists(args: Any, protocol: Protocol | None) -> dict[str, TrialList]:
    """The trial lists by name; of a public one, as many trials as it has."""
    from spkfast.data.lists import read_trials

    file = protocol.trials if protocol else "trials.txt"
    names = args.scored or args.trials or [str(Path(args.data) / file)]
    # Public lists are as they are.
    duplicates = args.allow_duplicates or protocol is not None
    lists = {name: read_trials(name, scored=bool(args.scored), duplicates=duplicates) for name in names}
    if protocol is not None and protocol.num_trials is not None:
        for name, trials in lists.items():
            if len(trials) != protocol.num_trials:
                raise InputError(
                    f"{name}: {protocol.name} has {protocol.num_trials:,} trials, this list has {len(trials):,}"
                )
    return lists


def _scores(args: Any, lists: dict[str, TrialList], crops: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What the scores are of, and the scores by list."""
    import numpy as np

    from spkfast.data.lists import trial_paths

    if args.scored:
        return {"scoring": "of the file"}, {name: np.asarray(trials.scores) for name, trials in lists.items()}

    import torch

    from spkfast.evaluation.protocols import distance_scores
    from spkfast.evaluation.scoring import paired, unit_rows

    if args.embeddings:
        from spkfast.data.embeddings import read_embeddings

        stored = read_embeddings(args.embeddings)
        rows = np.unique(np.concatenate([side for trials in lists.values() for side in trials.rows(stored.keys)]))
        keys, unit = [stored.keys[row] for row in rows.tolist()], unit_rows(stored.embeddings[rows])
        facts = {"scoring": "cosine", "model": {"fingerprint": stored.model}, "frontend": stored.frontend}
    else:
        keys = list(dict.fromkeys(path for trials in lists.values() for path in trial_paths(trials)))
        vectors, facts = _embed(args, keys, crops)
        unit = torch.from_numpy(vectors)
    scores = {}
    for name, trials in lists.items():
        first, second = (torch.from_numpy(side) for side in trials.rows(keys))
        if crops.distance:
            scores[name] = distance_scores(unit.view(len(unit), crops.count, -1), first, second).numpy()
        else:
            scores[name] = paired(unit, unit, first, second).clamp_(-1, 1).numpy()
    return facts, scores


def _embed(args: Any, paths: list[str], crops: Any) -> tuple[np.ndarray, dict[str, Any]]:
    """Vectors whose dot products are the scores, and what made them."""
    import numpy as np

    from spkfast.evaluation.protocols import embed_for_scoring
    from spkfast.evaluation.scoring import unit_rows

    root = Path(args.data)
    for path in paths:
        if not (root / path).is_file():
            raise InputError(f"{root / path}: no such file, but the trials name it")
    encoder = load_encoder(args.model, args.precision)
    options = {"backend": args.backend, "batch_seconds": args.batch_seconds}
    if not crops.count:
        vectors = unit_rows(embed_all(encoder, root, paths, **options)).numpy()
    else:
        found = embed_for_scoring(encoder, [root / path for path in paths], crops, **options)
        vectors = np.stack([one.numpy() for one in progress(found, len(paths), "embedding")])
    facts = {
        "scoring": "distance" if crops.distance else "cosine",
        "model": {"name": args.model, "fingerprint": encoder.fingerprint},
        "frontend": encoder.frontend.hash,
    }
    return vectors, facts


def _metadata(args: Any) -> dict[str, dict[str, str]]:
    """Columns of the table of conditions."""
    from spkfast.evaluation.conditions import check_columns, read_metadata

    metadata = read_metadata(args.by) if args.by else {}
    check_columns(args.columns or (), metadata)
    return metadata


def _conditions(
    args: Any,
    metadata: dict[str, dict[str, str]],
    lists: dict[str, TrialList],
    results: list[ListResult],
    metrics: tuple[str, ...],
) -> dict[str, list[Condition]]:
    if not args.by:
        return {}
    from spkfast.evaluation.conditions import by_condition

    return {
        result.name: by_condition(
            lists[result.name],
            result.scores,
            metadata,
            args.columns or (),
            metrics=metrics,
            speakers=result.speakers if args.resamples else None,
            num_resamples=args.resamples or 1000,
        )
        for result in results
    }


def _plot(args: Any, results: list[ListResult]) -> None:
    if args.det:
        from spkfast.evaluation import det_plot

        det_plot({result.name: (result.scores, result.labels) for result in results}).savefig(args.det, dpi=150)
    if args.histogram:
        from spkfast.evaluation.plots import score_histogram

        score_histogram(results[0].scores, results[0].labels, results[0].threshold).savefig(args.histogram, dpi=150)


def _compare(args: Any) -> None:
    """Two records side by side."""
    from spkfast.evaluation.records import compare_records, read_record

    first, second = (read_record(path) for path in args.compare)
    found = compare_records(first, second, num_resamples=args.resamples, watch=_watch)
    differ = [
        name
        for name in ("protocol", "crops", "scoring", "precision", "method", "frontend")
        if first.facts.get(name) != second.facts.get(name)
    ]
    result = {
        "first": str(first.path),
        "second": str(second.path),
        "differ_in": {name: [first.facts.get(name), second.facts.get(name)] for name in differ},
        "lists": [_comparison_row(one) for one in found],
    }
    shown: dict[str, Any] = {"": [row for one in found for row in _shown_comparison(one)]}
    if differ:
        shown["They differ in"] = [
            {"": name, "first": str(first.facts.get(name)), "second": str(second.facts.get(name))} for name in differ
        ]
    print_result(json.loads(json.dumps(result)), args.json, shown=shown)


def _is_rate(metric: str) -> bool:
    return metric.split(":")[0] == "eer"


def _percent(metric: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.2f}" if _is_rate(metric) else f"{value:.4f}"


def _heading(metric: str) -> str:
    kind, *rest = metric.split(":")
    names = {"eer": "EER %", "min_dcf": "minDCF", "act_dcf": "actDCF", "cllr": "Cllr", "min_cllr": "min Cllr"}
    if kind in ("min_dcf", "act_dcf"):
        return f"{names[kind]} (p {':'.join(rest)})"
    return f"{names[kind]} ({rest[0]})" if rest else names[kind]


def _shown_figures(figures: dict[str, Estimate]) -> dict[str, str]:
    """Figures for people; the interval stands beside the rates."""
    cells = {}
    several = sum(map(_is_rate, figures)) > 1
    for metric, figure in figures.items():
        cells[_heading(metric)] = _percent(metric, figure.value)
        if _is_rate(metric):
            interval = (
                "-" if figure.low is None else f"{_percent(metric, figure.low)} to {_percent(metric, figure.high)}"
            )
            cells[f"{_heading(metric)}, 95 % interval" if several else "95 % interval"] = interval
    return cells


def _shown(result: ListResult) -> dict[str, Any]:
    row = result.to_dict()
    counts = {name: row[name] for name in ("targets", "nontargets", "speakers")}
    return {"trials": result.name, **_shown_figures(result.figures), **counts}


def _row(result: ListResult) -> dict[str, Any]:
    """A list for programs: rates in percent, costs as they are; all figures with their intervals under ``metrics``."""
    row = result.to_dict()
    found: dict[str, Any] = {"trials": result.name}
    for metric, figure in result.figures.items():
        if _is_rate(metric):
            ends = {"eer_percent": figure.value, "eer_low_percent": figure.low, "eer_high_percent": figure.high}
            found |= {name: None if value is None else 100 * value for name, value in ends.items()}
            break
    found["eer_threshold"] = result.threshold
    costs = [metric for metric in result.figures if metric.startswith("min_dcf:")]
    if costs:
        found |= {"min_dcf": result.figures[costs[0]].value, "p_target": float(costs[0].split(":")[1])}
    found |= {name: row[name] for name in ("targets", "nontargets", "speakers")}
    return found | {"sha256": row["sha256"], "metrics": row["metrics"]}


def _at_far(far: float | None, result: ListResult) -> dict[str, float]:
    if far is None:
        return {}
    from spkfast.evaluation import threshold_at_far

    point = threshold_at_far(result.scores, result.labels, far)
    return {"threshold_at_far": point.threshold, "far": point.far, "miss_rate": point.miss_rate}


def _shown_condition(one: Condition) -> dict[str, Any]:
    figures = _shown_figures(one.figures) if one.figures else {}
    return {"condition": one.name, **figures, "targets": one.targets, "nontargets": one.nontargets}


def _condition_row(one: Condition) -> dict[str, Any]:
    figures = None if one.figures is None else {name: figure._asdict() for name, figure in one.figures.items()}
    return {"condition": one.name, "targets": one.targets, "nontargets": one.nontargets, "metrics": figures}


def _comparison_row(one: Comparison) -> dict[str, Any]:
    changes = None if one.differences is None else {name: d._asdict() for name, d in one.differences.items()}
    return {
        "trials": one.name,
        "first": {name: figure.value for name, figure in one.first.items()},
        "second": {name: figure.value for name, figure in one.second.items()},
        "differences": changes,
        "mcnemar": one.mcnemar._asdict(),
    }


def _shown_comparison(one: Comparison) -> list[dict[str, Any]]:
    rows = []
    for metric, figure in one.first.items():
        row = {
            "trials": one.name,
            "metric": _heading(metric),
            "first": _percent(metric, figure.value),
            "second": _percent(metric, one.second[metric].value),
        }
        change = None if one.differences is None else one.differences[metric]
        known = change is not None and change.low is not None
        row["difference"] = _percent(metric, one.second[metric].value - figure.value)
        row["95 % interval"] = (
            f"{_percent(metric, change.low)} to {_percent(metric, change.high)}" if change and known else "-"
        )
        row["p"] = f"{change.p_value:.3f}" if change and change.p_value is not None else "-"
        rows.append(row)
    alone = one.mcnemar
    rows.append(
        {
            "trials": one.name,
            "metric": "errors of one alone (McNemar, trials as if independent)",
            "first": str(alone.first_alone),
            "second": str(alone.second_alone),
            "p": f"{alone.p_value:.3f}",
        }
    )
    return rows


def _watch(resamples: Iterable[Any], total: int) -> Iterable[Any]:
    return progress(resamples, total, "resampling")


def _count(text: str) -> int:
    if not text.isdecimal() or 0 < int(text) < _FEWEST_RESAMPLES:
        raise argparse.ArgumentTypeError(f"must be 0 or a whole number from {_FEWEST_RESAMPLES} on, got {text}")
    return int(text)
