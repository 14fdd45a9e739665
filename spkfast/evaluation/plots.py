"""Figures of an evaluation: DET curves, score histograms, training curves, drawn without a display."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from spkfast.errors import InputError
from spkfast.evaluation.metrics import eer, error_rates

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TICKS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.95)
_LOWEST, _HIGHEST = 0.0005, 0.97
# Dashes of one curve show in the gaps of another: those of two backends should coincide, and both be seen.
_LINES: tuple[tuple[int, tuple[int, ...]] | str, ...] = ("-", (0, (5, 5)), (5, (5, 5)), ":")
_SCALE = NormalDist()
# Told apart by colour-blind readers too, and clear on white and on black.
_COLOURS = ("#2f6fde", "#d9622b", "#2a9d6f", "#a05bc9", "#c0392b", "#8a8a1f")


def det_plot(curves: Mapping[str, tuple[Any, Any]]) -> Figure:
    """Detection error trade-off: miss rate over false-alarm rate, on normal-deviate axes, the equal error rate marked.

    Args:
        curves: Scores and labels (1 for the same speaker), each of shape (trials,), by the name of the system.

    Raises:
        InputError: If there is no curve, or as :func:`spkfast.evaluation.error_rates`.

    Reference: Martin et al., "The DET curve in assessment of detection task performance", Eurospeech 1997.
    """
    if not curves:
        raise InputError("curves must name at least one system")
    figure, axes = _figure(width=5.4, height=5.2)
    ends = deviate([_LOWEST, _HIGHEST])
    axes.plot(ends, ends, color="0.6", linewidth=0.8)
    for index, (name, (scores, labels)) in enumerate(curves.items()):
        miss, false_alarm, _ = error_rates(scores, labels)
        rate = eer(scores, labels).value
        colour, line = _COLOURS[index % len(_COLOURS)], _LINES[index % len(_LINES)]
        label = f"{name} ({rate:.2%})"
        axes.plot(deviate(false_alarm), deviate(miss), label=label, linewidth=2, color=colour, linestyle=line)
        axes.plot(deviate([rate]), deviate([rate]), marker="o", markersize=6, color=colour, gid=f"eer-{index}")
    for axis, set_limits in ((axes.xaxis, axes.set_xlim), (axes.yaxis, axes.set_ylim)):
        axis.set_ticks(deviate(_TICKS), [f"{100 * tick:g}" for tick in _TICKS])
        set_limits(*ends)
    axes.set(xlabel="false alarms (%)", ylabel="misses (%)", aspect="equal")
    axes.legend(title="equal error rate at the dots", loc="upper right", frameon=True, framealpha=0.9, fontsize=9)
    return figure


def score_histogram(scores: Any, labels: Any, threshold: float | None = None) -> Figure:
    """Densities of the scores of the same and of different speakers, with the threshold as a vertical line.

    Args:
        scores: Higher for the same speaker, shape (trials,).
        labels: 1 for the same speaker, 0 for different ones, shape (trials,).
        threshold: Drawn where given.

    Raises:
        InputError: As :func:`spkfast.evaluation.error_rates`.
    """
    error_rates(scores, labels)
    values, target = np.asarray(scores, dtype=float), np.asarray(labels) == 1
    figure, axes = _figure()
    bins = np.histogram_bin_edges(values, bins=50).tolist()
    for part, name, colour in ((~target, "different speakers", _COLOURS[1]), (target, "same speaker", _COLOURS[0])):
        axes.hist(
            values[part], bins=bins, density=True, alpha=0.6, color=colour, label=f"{name} ({part.sum():,} trials)"
        )
    if threshold is not None:
        axes.axvline(threshold, color="0.2", linestyle="--", linewidth=1.2, label=f"threshold {threshold:.3f}")
    axes.set(xlabel="score", ylabel="density")
    axes.set_ylim(top=1.25 * axes.get_ylim()[1])  # room for the legend
    axes.legend(frameon=False, fontsize=9)
    return figure


@dataclasses.dataclass(frozen=True)
class Scale:
    """A vertical axis of :func:`step_plot` and the curves that belong to it.

    Args:
        label: What it shows, with the unit.
        curves: A value for each step by name of the curve; None or NaN leaves a gap.
        low: Lower end; None for one that fits.
        high: Upper end.
        log: Logarithmic.
        mean: Draw a running mean over a twentieth of the values, and the values themselves thin behind it.
        limit: Drawn as a horizontal dashed line, by its name.
    """

    label: str
    curves: Mapping[str, Sequence[float | None]]
    low: float | None = None
    high: float | None = None
    log: bool = False
    mean: bool = False
    limit: tuple[str, float] | None = None


def step_plot(steps: Sequence[float], left: Scale, right: Scale | None = None) -> Figure:
    """Curves over the steps of a run, on one or two vertical axes.

    Args:
        steps: Step of each value, ascending.
        left: The axis on the left.
        right: That on the right, where given.

    Raises:
        InputError: If there is no step, or a curve has another number of values.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    scales = [left] if right is None else [left, right]
    counts = {name: len(values) for scale in scales for name, values in scale.curves.items()}
    if not len(steps) or any(count != len(steps) for count in counts.values()):
        found = "".join(f", {name} {count}" for name, count in counts.items())
        raise InputError(f"all curves must have one length above 0, got steps {len(steps)}{found}")
    figure, axes = _figure()
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel("step")
    colours = iter(_COLOURS * len(counts))
    for scale, side in zip(scales, (axes, axes.twinx() if right else axes), strict=False):
        for name, values in scale.curves.items():
            colour = next(colours)
            _trace(side, steps, values, name, colour, mean=scale.mean)
            if right is not None and len(scale.curves) == 1:
                side.yaxis.label.set_color(colour)
        if scale.limit is not None:
            name, value = scale.limit
            side.axhline(value, color="0.4", linestyle="--", linewidth=1.2, label=name)
        if scale.log:
            side.set_yscale("log")
            side.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            side.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            side.yaxis.set_minor_formatter(NullFormatter())
        side.set_ylabel(scale.label)
        side.set_ylim(scale.low, scale.high)
        side.spines["top"].set_visible(False)
    _legend_above(figure)
    return figure


def loss_curve(
    steps: Sequence[float], losses: Sequence[float | None], *, accuracies: Sequence[float | None] | None = None
) -> Figure:
    """Training loss over steps, each value and a running mean; accuracy on a second axis where given.

    Args:
        steps: Step of each value, ascending.
        losses: Loss at each step; None or NaN leaves a gap.
        accuracies: Fraction of right decisions at each step.

    Raises:
        InputError: If the lengths differ or there is no value.
    """
    loss = Scale("loss", {"loss": losses}, low=0, mean=True)
    if accuracies is None:
        return step_plot(steps, loss)
    values = _percent(accuracies)
    return step_plot(steps, loss, Scale("accuracy (%)", {"accuracy": values}, low=0, high=100, mean=True))


def error_curve(
    steps: Sequence[float],
    rates: Mapping[str, Sequence[float | None]],
    *,
    intervals: Mapping[str, tuple[Sequence[float | None], Sequence[float | None]]] | None = None,
    best: float | None = None,
) -> Figure:
    """Equal error rate of each trial list over the steps of a run.

    Args:
        steps: Step of each validation, ascending.
        rates: Rates in percent by list; None or NaN leaves a gap.
        intervals: Lower and upper ends of the rates' intervals, by list; drawn as bands.
        best: Step of the best model, marked by a line.

    Raises:
        InputError: If there is no step, or a list has another number of rates.
    """
    figure = step_plot(steps, Scale("equal error rate (%)", rates, low=0))
    (axes,) = figure.axes
    for line in axes.get_lines():
        line.set(marker="o", markersize=4, clip_on=False)  # a rate of 0 is seen whole
    for name, colour in zip(rates, _COLOURS * len(rates), strict=False):
        if intervals and name in intervals:
            low, high = (_numbers(values) for values in intervals[name])
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.autoscale(axis="y")  # the bands are higher than the curves
    axes.set_ylim(bottom=0)
    if best is not None:
        axes.axvline(best, color="0.4", linestyle="--", linewidth=1.2, label=f"best (step {best:,.0f})")
    _legend_above(figure)
    return figure


def deviate(rates: Sequence[float] | np.ndarray) -> np.ndarray:
    """Quantiles of the normal distribution; rates of 0 and 1 go to the rim of the plot, not to infinity."""
    clipped = np.clip(rates, _LOWEST / 10, 1 - _LOWEST / 10)
    return np.vectorize(_SCALE.inv_cdf, otypes=[float])(clipped)


def _percent(shares: Sequence[float | None]) -> list[float]:
    return (100 * _numbers(shares)).tolist()


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    """The values in float64, NaN in place of None."""
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def _trace(
    axes: Axes, steps: Sequence[float], values: Sequence[float | None], label: str, colour: str, *, mean: bool
) -> None:
    track = _numbers(values)
    alone = "o" if len(track) == 1 else ""  # a line of one point is not seen
    if mean:
        axes.plot(steps, track, color=colour, alpha=0.3, linewidth=0.8)
        track = _running_mean(track, max(1, len(track) // 20))
    axes.plot(steps, track, color=colour, linewidth=1.8, label=label, marker=alone)


def _running_mean(track: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last ``window`` values that are numbers; NaN where none is."""
    known = np.isfinite(track)
    total, count = (np.cumsum(np.r_[0.0, part]) for part in (np.where(known, track, 0.0), known))
    first = np.maximum(0, np.arange(len(track)) - window + 1)
    with np.errstate(invalid="ignore"):
        return (total[1:] - total[first]) / (count[1:] - count[first])


def _legend_above(figure: Figure) -> None:
    """One legend for all axes, above them, where it hides nothing."""
    for legend in list(figure.legends):
        legend.remove()
    handles = [line for axes in figure.axes for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
    figure.legend(handles=handles, loc="outside upper left", ncols=3, frameon=False, fontsize=9)


def _figure(width: float = 6.4, height: float = 4.0) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(color="0.85", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes
