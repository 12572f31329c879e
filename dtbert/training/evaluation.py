"""Held-out questions and texts, on which a model is measured while it trains."""

from collections.abc import Mapping

from dtbert.evaluation import PreparedQuestions, PreparedTexts
from dtbert.model import Policy


def held_out_scores(questions: PreparedQuestions, schedules: Mapping[str, Policy]) -> dict[str, float]:
    """F1 and exact match in percent, at full length and under each schedule's name; their mean F1 as ``main``."""
    measured: dict[str, float] = {}
    for name, schedule in {"": None, **schedules}.items():
        scores = questions.evaluate(schedule)
        suffix = f" {name}" if name else ""
        measured |= {f"f1{suffix}": scores.f1, f"exact_match{suffix}": scores.exact_match}
    f1 = [value for name, value in measured.items() if name.startswith("f1")]
    return {**measured, "main": sum(f1) / len(f1)}


def held_out_text_scores(texts: PreparedTexts, schedules: Mapping[str, Policy]) -> dict[str, float]:
    """The task's metrics in percent, at full length and under each schedule's name; the mean of all as ``main``."""
    measured: dict[str, float] = {}
    for name, schedule in {"": None, **schedules}.items():
        suffix = f" {name}" if name else ""
        scores = texts.scores(texts.predict(schedule))
        measured |= {f"{metric}{suffix}": value for metric, value in scores.items()}
    return {**measured, "main": sum(measured.values()) / len(measured)}
