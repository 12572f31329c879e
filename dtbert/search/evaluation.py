"""What a schedule is worth: the scores of its answers or labels, its multiply-accumulates, its time."""

import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, TypeVar

import torch

from dtbert.evaluation import Cost, PreparedQuestions, PreparedTexts, Score, SquadQuestion, TextCost, check_readable
from dtbert.evaluation.label_metrics import Values
from dtbert.files import text_sha256
from dtbert.model import AdaptivePolicy, Macs, Policy
from dtbert.model.bert import Bert
from dtbert.qa import Latency, QuestionAnswerer

_TIMED_QUESTIONS = 32
_TIMED_ROUNDS = 3
# Questions by which it is first told what a policy takes by which the text decides.
_COUNTED = 100


@dataclass
class _Answered:
    """What a policy made of the first questions: scores, work, and what the full model would have taken for them."""

    schedule: AdaptivePolicy | None
    scores: list[Score] = field(default_factory=list)
    work: list[Macs] = field(default_factory=list)
    full: int = 0

    def macs(self, full: Cost | TextCost) -> Macs:
        """In the mean over all questions, as the full model's is."""
        part = full.executed / self.full
        return Macs(*(round(part * sum(counts)) for counts in zip(*self.work, strict=True)))


class Identified(Protocol):
    """What a search is over: questions, or labelled texts, which belong to no article."""

    @property
    def id(self) -> str: ...

    @property
    def title(self) -> str: ...


Q = TypeVar("Q", bound=Identified)


class Evaluator(ABC):
    """What a search asks about schedules, of what a model makes of questions; the schedule None is the full model.

    Attributes:
        measure: what the score of a question is called, as a mean in percent.
        unit, piece: what the questions are, and what is read of them at a time.
        model: the network.
    """

    measure: ClassVar[str]
    unit: ClassVar[str]
    piece: ClassVar[str]
    model: Bert

    def __init__(self) -> None:
        self._answered = _Answered(None)

    @property
    @abstractmethod
    def num_questions(self) -> int: ...

    @abstractmethod
    def answer_first(self, count: int, schedule: Policy | None) -> object:
        """Answer the first questions, and wait for the answers."""

    @abstractmethod
    def _cost(self, schedule: Policy | None) -> Cost | TextCost: ...

    @abstractmethod
    def _scores(self, schedule: Policy | None, begin: int, end: int) -> list[Score]: ...

    @abstractmethod
    def _scored_and_counted(
        self, schedule: AdaptivePolicy, begin: int, end: int
    ) -> tuple[list[Score], list[Macs], int]:
        """Scores, what each question took, and executed MACs of them all where nothing is dropped."""

    def macs(self, schedule: Policy | None) -> Macs:
        """Multiply-accumulates a question, in the mean over all questions; quick, for nothing is answered.

        Where the text decides how many tokens stay, the first questions are answered; from those that are answered so
        far it is estimated, as a part of the full model's, what all would take.
        """
        if isinstance(schedule, AdaptivePolicy):
            return self._answer(schedule, min(_COUNTED, self.num_questions)).macs(self._cost(None))
        cost = self._cost(schedule)
        return Macs(round(cost.published), round(cost.executed))

    def scores(self, schedule: Policy | None, begin: int, end: int) -> list[Score]:
        """The scores of the questions number ``begin`` to ``end``, from 0 to 1 each."""
        if isinstance(schedule, AdaptivePolicy):
            return self._answer(schedule, end).scores[begin:end]
        return self._scores(schedule, begin, end)

    def _answer(self, schedule: AdaptivePolicy, end: int) -> _Answered:
        """What was found of the questions up to this one; those of the last schedule are answered once."""
        if self._answered.schedule != schedule:
            self._answered = _Answered(schedule)
        answered = self._answered
        if (begin := len(answered.scores)) < end:
            scores, work, full = self._scored_and_counted(schedule, begin, end)
            answered.scores += scores
            answered.work += work
            answered.full += full
        return answered

    def latencies(self, schedules: Sequence[Policy]) -> list[Latency]:
        """Seconds a question of each schedule, and the full model's beside it.

        Medians of rounds in which the schedules and the full model take turns on the first questions.
        """
        count = min(_TIMED_QUESTIONS, self.num_questions)
        # The first round warms up.
        rounds = [
            [self._seconds(count, schedule) / count for schedule in (None, *schedules)]
            for _ in range(_TIMED_ROUNDS + 1)
        ][1:]
        full_model, *own = (round(statistics.median(times), 9) for times in zip(*rounds, strict=True))
        return [Latency(seconds, full_model, *self.device()) for seconds in own]

    def device(self) -> tuple[str, str, int]:
        """What latencies hold for: the device, the dtype, and the number of threads."""
        device, dtype = self.model.device, str(self.model.dtype).removeprefix("torch.")
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return name, dtype, torch.get_num_threads()

    def _seconds(self, count: int, schedule: Policy | None) -> float:
        start = time.perf_counter()
        self.answer_first(count, schedule)
        return time.perf_counter() - start


class QuestionEvaluator(Evaluator):
    """By the answers to questions.

    Args:
        answerer: the model.
        questions: in the order of evaluation, see `in_search_order`.

    Raises:
        ValueError: there are no questions, or one that the model cannot read; the message has its id.
    """

    measure, unit, piece = "F1", "questions", "window"

    def __init__(self, answerer: QuestionAnswerer, questions: Sequence[SquadQuestion]) -> None:
        if not questions:
            raise ValueError("there are no questions to search with")
        self.model, self.answerer = answerer.model, answerer
        super().__init__()
        self._questions = PreparedQuestions(answerer, questions)
        check_readable(self._questions.unreadable)

    @property
    def num_questions(self) -> int:
        return len(self._questions.questions)

    def _cost(self, schedule: Policy | None) -> Cost:
        return self._questions.cost(schedule)

    def _scores(self, schedule: Policy | None, begin: int, end: int) -> list[Score]:
        return list(self._questions.evaluate(schedule, begin, end).per_question.values())

    def _scored_and_counted(
        self, schedule: AdaptivePolicy, begin: int, end: int
    ) -> tuple[list[Score], list[Macs], int]:
        scores, work = self._questions.evaluate_and_count(schedule, begin, end)
        return list(scores.per_question.values()), work, self._questions.full_work(begin, end)

    def answer_first(self, count: int, schedule: Policy | None) -> object:
        return self.answerer.answer_prepared(self._questions.prepared[:count], schedule=schedule)


class TextEvaluator(Evaluator):
    """By the labels of texts: a right one scores 1, so that the mean is the accuracy, which is the F1 over all labels.

    Args:
        texts: in the order of evaluation, with their model.

    Raises:
        ValueError: the task has numbers, whose correlation is no mean over texts; or the model cannot read a text.
    """

    measure, unit, piece = "accuracy", "texts", "text"

    def __init__(self, texts: PreparedTexts) -> None:
        if not texts.data.labels:
            raise ValueError(f"{texts.data.task.name} has numbers, a search goes by right and wrong labels")
        for line, reason in texts.unreadable.items():
            raise ValueError(f"line {line}: {reason}; take it out of the file")
        super().__init__()
        self.model, self._texts = texts.model.model, texts

    @property
    def num_questions(self) -> int:
        return len(self._texts)

    def answer_first(self, count: int, schedule: Policy | None) -> object:
        return self._texts.predict(schedule, 0, count)

    def _cost(self, schedule: Policy | None) -> TextCost:
        cost = self._texts.cost(schedule)
        assert cost is not None
        return cost

    def _scores(self, schedule: Policy | None, begin: int, end: int) -> list[Score]:
        return self._right(self._texts.predict(schedule, begin, end), begin)

    def _scored_and_counted(
        self, schedule: AdaptivePolicy, begin: int, end: int
    ) -> tuple[list[Score], list[Macs], int]:
        work: list[Macs] = []
        predicted = self._texts.predict(schedule, begin, end, work)
        return self._right(predicted, begin), work, self._texts.full_work(begin, end)

    def _right(self, predicted: Values, begin: int) -> list[Score]:
        right = predicted == self._texts.gold[begin : begin + len(predicted)]
        return [Score(one, one) for one in right.astype(float).tolist()]


def in_search_order(questions: Sequence[Q]) -> list[Q]:
    """The questions in an order of which every beginning is spread evenly over the articles.

    It depends on titles and ids alone, so that processes and later runs agree on it.
    """
    articles: dict[str, list[Q]] = {}
    for question in sorted(questions, key=lambda question: text_sha256(question.id)):
        articles.setdefault(question.title, []).append(question)
    placed = [
        ((rank + 0.5) / len(article), text_sha256(question.title + question.id), question)
        for article in articles.values()
        for rank, question in enumerate(article)
    ]
    return [question for _, _, question in sorted(placed, key=lambda item: item[:2])]
