"""Held-out questions, on which a model is measured while it trains."""

from collections.abc import Mapping, Sequence

import torch

from dtbert.evaluation import SquadQuestion, evaluate
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
        self._answerer, self._questions, self._schedules = answerer, list(questions), dict(schedules)
        self._asked: list[SquadQuestion] = []
        self.unanswerable: list[str] = []
        for schedule in self._schedules.values():
            schedule.check_layers(answerer.config.num_hidden_layers)
        for one in self._questions:
            try:
                answerer.check_pair(one.question, one.context)
            except ValueError as error:
                self.unanswerable.append(f"{one.id}: {error}")
            else:
                self._asked.append(one)

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """F1 and exact match in percent, at full length and at each schedule; their mean F1 as ``main``."""
        pairs = [(one.question, one.context) for one in self._asked]
        measured: dict[str, float] = {}
        for name, schedule in {"": None, **self._schedules}.items():
            answers = self._answerer.answer_many(pairs, schedule=schedule)
            predictions = {one.id: answer.text for one, answer in zip(self._asked, answers, strict=True)}
            scores = evaluate(self._questions, predictions)
            suffix = f" {name}" if name else ""
            measured |= {f"f1{suffix}": scores.f1, f"exact_match{suffix}": scores.exact_match}
        f1 = [value for name, value in measured.items() if name.startswith("f1")]
        return {**measured, "main": sum(f1) / len(f1)}
