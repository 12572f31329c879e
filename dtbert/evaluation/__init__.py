"""Accuracy and work: SQuAD 1.1's reader and official metric, and what a model gets right at what cost."""

from dtbert.evaluation.measure import Cost, Measurement, PreparedQuestions, check_readable, evenly_spaced, measure
from dtbert.evaluation.metric import Evaluation, Score, evaluate, exact_match, f1, normalize_answer, score_prediction
from dtbert.evaluation.reader import GoldAnswer, SquadQuestion, read_squad

__all__ = [
    "Cost",
    "Evaluation",
    "GoldAnswer",
    "Measurement",
    "PreparedQuestions",
    "Score",
    "SquadQuestion",
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
