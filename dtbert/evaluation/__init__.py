"""Accuracy and work: SQuAD's reader and official metric, and what a model gets right at what cost."""

from dtbert.evaluation.calibrate import calibrate
from dtbert.evaluation.measure import (
    Cascading,
    Cost,
    Measurement,
    PreparedQuestions,
    check_readable,
    evenly_spaced,
    measure,
)
from dtbert.evaluation.metric import (
    BestThreshold,
    Evaluation,
    Score,
    best_threshold,
    evaluate,
    exact_match,
    f1,
    normalize_answer,
    score_prediction,
)
from dtbert.evaluation.reader import GoldAnswer, SquadQuestion, read_squad

__all__ = [
    "BestThreshold",
    "Cascading",
    "Cost",
    "Evaluation",
    "GoldAnswer",
    "Measurement",
    "PreparedQuestions",
    "Score",
    "SquadQuestion",
    "best_threshold",
    "calibrate",
    "check_readable",
    "evaluate",
    "evenly_spaced",
    "exact_match",
    "f1",
    "measure",
    "normalize_answer",
    "read_squad",
    "score_prediction",
]
