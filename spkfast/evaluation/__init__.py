"""Scoring of trial lists: cosine scores, equal error rate, detection cost, plots."""

from typing import Any

from spkfast.evaluation.calibration import (
    FarThreshold,
    LogisticCalibration,
    Qmf,
    espnet_quality,
    threshold_at_far,
    wespeaker_quality,
)
from spkfast.evaluation.enrolment import enrol, read_spk2utt
from spkfast.evaluation.index import Matches, SpeakerIndex
from spkfast.evaluation.metrics import (
    Difference,
    Eer,
    Estimate,
    McNemar,
    act_dcf,
    bayes_threshold,
    cllr,
    differences,
    eer,
    error_rates,
    estimates,
    mcnemar,
    min_cllr,
    min_dcf,
)
from spkfast.evaluation.normalization import (
    CohortStatistics,
    as_norm,
    cohort_statistics,
    normalized,
    s_norm,
    t_norm,
    z_norm,
)
from spkfast.evaluation.plda import Enrolment, Plda
from spkfast.evaluation.scoring import TrialResult, cosine_matrix, cosine_scores, evaluate_trials

__all__ = [
    "CohortStatistics",
    "Difference",
    "Eer",
    "Enrolment",
    "Estimate",
    "FarThreshold",
    "LogisticCalibration",
    "Matches",
    "McNemar",
    "Plda",
    "Qmf",
    "SpeakerIndex",
    "TrialResult",
    "act_dcf",
    "as_norm",
    "bayes_threshold",
    "cllr",
    "cohort_statistics",
    "cosine_matrix",
    "cosine_scores",
    "det_plot",
    "differences",
    "eer",
    "enrol",
    "error_rates",
    "espnet_quality",
    "estimates",
    "evaluate_trials",
    "mcnemar",
    "min_cllr",
    "min_dcf",
    "normalized",
    "read_spk2utt",
    "s_norm",
    "t_norm",
    "threshold_at_far",
    "wespeaker_quality",
    "z_norm",
]


def __getattr__(name: str) -> Any:
    if name == "det_plot":  # needs matplotlib, which the rest does without
        from spkfast.evaluation.plots import det_plot

        return det_plot
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
