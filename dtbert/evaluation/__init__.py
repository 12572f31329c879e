"""Accuracy and work: readers and metrics of SQuAD and of GLUE's tasks, and what a model gets right at what cost."""

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
from dtbert.evaluation.reader import GoldAnswer, SquadQuestion, ids_sha256, read_squad
from dtbert.evaluation.task_reader import LabelledText, LabelledTexts, read_task
from dtbert.evaluation.tasks import TASKS, Task, task_named
from dtbert.evaluation.text_measure import PreparedTexts, TextCost, TextMeasurement, measure_texts

__all__ = [
    "TASKS",
    "BestThreshold",
    "Cascading",
    "Cost",
    "Evaluation",
    "GoldAnswer",
    "LabelledText",
    "LabelledTexts",
    "Measurement",
    "PreparedQuestions",
    "PreparedTexts",
    "Score",
    "SquadQuestion",
    "Task",
    "TextCost",
    "TextMeasurement",
    "best_threshold",
    "calibrate",
    "check_readable",
    "evaluate",
    "evenly_spaced",
    "exact_match",
    "f1",
    "ids_sha256",
    "measure",
    "measure_texts",
    "normalize_answer",
    "read_squad",
    "read_task",
    "score_prediction",
    "task_named",
]
