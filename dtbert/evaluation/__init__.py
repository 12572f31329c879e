"""SQuAD 1.1: the reader of its files and its official metric."""

from dtbert.evaluation.metric import Evaluation, Score, evaluate, exact_match, f1, normalize_answer, score_prediction
from dtbert.evaluation.reader import GoldAnswer, SquadQuestion, read_squad

__all__ = [
    "Evaluation",
    "GoldAnswer",
    "Score",
    "SquadQuestion",
    "evaluate",
    "exact_match",
    "f1",
    "normalize_answer",
    "read_squad",
    "score_prediction",
]
