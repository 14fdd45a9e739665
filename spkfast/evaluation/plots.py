"""Figures of an evaluation: DET curves, score histograms, training curves, drawn without a display."""

from __future__ import annotations

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


def loss_curve(steps: Sequence[float], losses: Sequence[float], *, accuracies: Sequence[float] | None = None) -> Figure:
    """Training loss over steps, each value and a running mean; accuracy on a second axis where given.

    Args:
        steps: Step of each value, ascending.
        losses: Loss at each step.
        accuracies: Fraction of right decisions at each step.

    Raises:
        InputError: If the lengths differ or there is no value.
    """
    if not len(steps) or any(len(values) != len(steps) for values in (losses, accuracies) if values is not None):
        raise InputError(
            f"steps, losses and accuracies must have one length above 0, got {len(steps)}, {len(losses)}"
            + ("" if accuracies is None else f" and {len(accuracies)}")
        )
    figure, axes = _figure()
    _trace(axes, steps, losses, "loss", _COLOURS[0])
    axes.set(xlabel="step", ylabel="loss")
    axes.set_ylim(bottom=0)
    if accuracies is not None:
        right = axes.twinx()
        _trace(right, steps, [100 * value for value in accuracies], "accuracy", _COLOURS[1])
        right.set(ylabel="accuracy (%)", ylim=(0, 100))
        right.spines["top"].set_visible(False)
        lines = [
            line for part in (axes, right) for line in part.get_lines() if not str(line.get_label()).startswith("_")
        ]
        axes.legend(handles=lines, frameon=False, fontsize=9, loc="center right")
    return figure


def deviate(rates: Sequence[float] | np.ndarray) -> np.ndarray:
    """Quantiles of the normal distribution; rates of 0 and 1 go to the rim of the plot, not to infinity."""
    clipped = np.clip(rates, _LOWEST / 10, 1 - _LOWEST / 10)
    return np.vectorize(_SCALE.inv_cdf, otypes=[float])(clipped)


def _trace(axes: Axes, steps: Sequence[float], values: Sequence[float], label: str, colour: str) -> None:
    track = np.asarray(values, dtype=float)
    window = max(1, len(track) // 20)
    total = np.cumsum(np.r_[0.0, track])
    first = np.maximum(0, np.arange(len(track)) - window + 1)
    mean = (total[1:] - total[first]) / (np.arange(len(track)) - first + 1)
    axes.plot(steps, track, color=colour, alpha=0.3, linewidth=0.8)
    axes.plot(steps, mean, color=colour, linewidth=1.8, label=label)


def _figure(width: float = 6.4, height: float = 4.0) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(color="0.85", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes
