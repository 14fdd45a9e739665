"""Scoring of trial lists: cosine scores, equal error rate, detection cost, plots."""

from typing import Any

from spkfast.evaluation.metrics import Eer, EerDifference, eer, eer_difference, error_rates, min_dcf
from spkfast.evaluation.scoring import TrialResult, cosine_scores, evaluate_trials

__all__ = [
    "Eer",
    "EerDifference",
    "TrialResult",
    "cosine_scores",
    "det_plot",
    "eer",
    "eer_difference",
    "error_rates",
    "evaluate_trials",
    "min_dcf",
]


def __getattr__(name: str) -> Any:
    if name == "det_plot":  # needs matplotlib, which the rest does without
        from spkfast.evaluation.plots import det_plot

        return det_plot
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
