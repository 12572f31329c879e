"""Held-out questions, on which a model is measured while it trains."""

from collections.abc import Mapping, Sequence

from dtbert.evaluation import PreparedQuestions, SquadQuestion
from dtbert.model import LengthSchedule
from dtbert.qa import QuestionAnswerer


class HeldOut:
    """Measures an answerer on questions, at full length and at schedules.

    Args:
        answerer: with the model that is trained.
        questions: a question that the answerer cannot read counts as wrong.
        schedules: by the name that the measured values carry.

    Attributes:
        unanswerable: what is wrong with each question that counts as wrong.
    """

    def __init__(
        self, answerer: QuestionAnswerer, questions: Sequence[SquadQuestion], schedules: Mapping[str, LengthSchedule]
    ) -> None:
        for schedule in schedules.values():
            schedule.check_layers(answerer.config.num_hidden_layers)
        self._questions, self._schedules = PreparedQuestions(answerer, questions), dict(schedules)
        self.unanswerable = [f"{identifier}: {reason}" for identifier, reason in self._questions.unreadable.items()]

    def __call__(self) -> dict[str, float]:
        """F1 and exact match in percent, at full length and at each schedule; their mean F1 as ``main``."""
        measured: dict[str, float] = {}
        for name, schedule in {"": None, **self._schedules}.items():
            scores = self._questions.evaluate(schedule)
            suffix = f" {name}" if name else ""
            measured |= {f"f1{suffix}": scores.f1, f"exact_match{suffix}": scores.exact_match}
        f1 = [value for name, value in measured.items() if name.startswith("f1")]
        return {**measured, "main": sum(f1) / len(f1)}
