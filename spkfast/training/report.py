"""The report of a training run, made of the files in its folder."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spkfast.errors import InputError
from spkfast.evaluation.report import shown_rates, write_report
from spkfast.training.log import VALIDATION, mean_rate, read_log
from spkfast.training.meter import duration

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONFIG = "config.json"

Entries = Sequence[Mapping[str, Any]]


def write_training_report(folder: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` into a run's folder; the run may still go on.

    It is made of ``log.jsonl``, ``validation.jsonl`` and ``config.json``. That holds the settings of the run, nested or
    with dotted names, and below ``run`` what was found: ``steps``, ``speakers``, ``utterances``, ``crops_per_step``.
    What is missing from them is missing from the report, and all figures are where matplotlib is not installed. Rates
    are means over the ``seconds`` of the entries of the log.

    Args:
        folder: The run's folder.

    Returns:
        The report.

    Raises:
        InputError: If there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name that of a training run")
    log, validations, settings = read_log(folder), read_log(folder, VALIDATION), _settings(folder / CONFIG)
    has_matplotlib = importlib.util.find_spec("matplotlib") is not None
    return write_report(
        folder / "report.html",
        title=f"Training of {settings['model.name']}" if "model.name" in settings else "Training",
        notes=_notes(log, validations, settings, has_matplotlib),
        summary=_summary(folder, log, validations, settings),
        table=_table(validations),
        table_title="Error rates",
        figures=_figures(log, validations, settings) if has_matplotlib else None,
        settings={name: value if isinstance(value, str) else json.dumps(value) for name, value in settings.items()},
    )


def best_validation(validations: Entries) -> Mapping[str, Any] | None:
    """The entry of ``validation.jsonl`` with the lowest mean error rate, the earliest of equal ones."""
    known = [entry for entry in validations if entry.get("mean_eer_percent") is not None]
    return min(known, key=lambda entry: (entry["mean_eer_percent"], entry["step"]), default=None)


def _settings(path: Path) -> dict[str, Any]:
    """Settings by dotted name; none where the file is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return _flat(content) if isinstance(content, dict) else {}


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return flat


def _notes(log: Entries, validations: Entries, settings: Mapping[str, Any], has_matplotlib: bool) -> list[str]:
    notes = []
    steps = settings.get("run.steps")
    if steps and (not log or log[-1]["step"] < steps):
        notes.append(f"The run stands at step {log[-1]['step'] if log else 0:,} of {steps:,}.")
    if any("loader_wait" in entry for entry in log):
        notes.append(
            "Loader wait is the share of the time of training in which the loop waits for crops to be read; device "
            "busy is that in which the device has a step to work on, of a CPU the rest. Validation and checkpoints "
            "count as neither."
        )
    if validations:
        weights = settings.get("averaging.name", "none")
        of = "" if weights == "none" else f" of the averaged weights ({weights})"
        notes.append(
            f"Error rates are equal error rates{of}: as many trials of one speaker are refused as trials of two are "
            "accepted. Intervals are over speakers (bootstrap)."
        )
    if not has_matplotlib:
        notes.append("There are no figures, as matplotlib is not installed.")
    return notes


def _summary(folder: Path, log: Entries, validations: Entries, settings: Mapping[str, Any]) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "run": str(folder),
        "training data": settings.get("data.train_list"),
        "speakers": settings.get("run.speakers"),
        "utterances": settings.get("run.utterances"),
        "steps": log[-1]["step"] if log else None,
    }
    for name, entries in (("time of training", log), ("time of validation", validations)):
        if any(entry.get("seconds") for entry in entries):
            summary[name] = duration(sum(_seconds(entry) for entry in entries))
    for name, key, factor, form in (
        ("crops per second", "crops_per_second", 1, "{:,.0f}"),
        ("loader wait", "loader_wait", 100, "{:.1f} %"),
        ("device busy", "device_busy", 100, "{:.1f} %"),
    ):
        mean = mean_rate(log, key)
        summary[name] = None if mean is None else form.format(factor * mean)
    best = best_validation(validations)
    if best is not None:
        what = "EER" if len(best.get("lists", ())) < 2 else "mean EER"
        summary[f"lowest {what}"] = f"{best['mean_eer_percent']:.2f} % (step {best['step']:,})"
        last = validations[-1]
        if last.get("mean_eer_percent") is not None:
            summary[f"final {what}"] = f"{last['mean_eer_percent']:.2f} % (step {last['step']:,})"
    return {name: value for name, value in summary.items() if value is not None}


def _seconds(entry: Mapping[str, Any]) -> float:
    """The time that an entry tells of; 0 where it does not say."""
    return entry.get("seconds") or 0.0


def _table(validations: Entries) -> list[dict[str, Any]]:
    """A row for each list and model: the best and the last one."""
    best = best_validation(validations)
    if best is None:
        return []
    models = {"best and last": best} if best is validations[-1] else {"best": best, "last": validations[-1]}
    return [
        {
            "trials": f"{name} ({rates['num_trials']:,})",
            "model": f"{model} (step {entry['step']:,})",
            **shown_rates(rates),
        }
        for name in best.get("lists", ())
        for model, entry in models.items()
        if (rates := entry.get("lists", {}).get(name)) is not None
    ]


def _figures(log: Entries, validations: Entries, settings: Mapping[str, Any]) -> dict[str, Figure]:
    from spkfast.evaluation.plots import Scale, error_curve, loss_curve, step_plot

    steps = [entry["step"] for entry in log]

    def has(*keys: str) -> bool:
        return all(any(entry.get(key) is not None for entry in log) for key in keys)

    def values(key: str, factor: float = 1.0) -> list[float | None]:
        return [None if entry.get(key) is None else factor * entry[key] for entry in log]

    figures: dict[str, Figure] = {}
    if has("loss"):
        accuracies = values("accuracy") if has("accuracy") else None
        figures["Loss and accuracy on training crops"] = loss_curve(steps, values("loss"), accuracies=accuracies)
    if validations:
        names = list(dict.fromkeys(name for entry in validations for name in entry.get("lists", {})))
        tracks = {
            key: {name: [entry.get("lists", {}).get(name, {}).get(key) for entry in validations] for name in names}
            for key in ("eer_percent", "eer_low_percent", "eer_high_percent")
        }
        best = best_validation(validations)
        figures["Error rate in validation"] = error_curve(
            [entry["step"] for entry in validations],
            tracks["eer_percent"],
            intervals={name: (tracks["eer_low_percent"][name], tracks["eer_high_percent"][name]) for name in names},
            best=None if best is None else best["step"],
        )
    if has("lr"):
        unit = " (radians)" if settings.get("loss.kind") == "aam" else ""
        margin = Scale(f"margin{unit}", {"margin": values("margin")}, low=0) if has("margin") else None
        rate = Scale("learning rate", {"learning rate": values("lr")}, low=0)
        figures["Learning rate and margin"] = step_plot(steps, rate, margin)
    if has("grad_norm"):
        clip = settings.get("optimizer.clip_grad_norm")
        limit = (f"clipped above {clip:g}", clip) if clip else None
        norm = Scale("norm of the gradient", {"norm": values("grad_norm")}, log=True, mean=True, limit=limit)
        figures["Gradient"] = step_plot(steps, norm)
    if has("crops_per_second"):
        shares = {
            name: values(key, 100)
            for name, key in (("loader wait", "loader_wait"), ("device busy", "device_busy"))
            if has(key)
        }
        speed = Scale("crops per second", {"crops per second": values("crops_per_second")}, low=0)
        right = Scale("share of time (%)", shares, low=0, high=100) if shares else None
        figures["Speed"] = step_plot(steps, speed, right)
    return figures
