"""Predict, score and count: what a model gets right on questions with a schedule, and what that costs."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from dtbert.evaluation.metric import Evaluation, evaluate
from dtbert.evaluation.reader import SquadQuestion
from dtbert.model import BertConfig, LengthSchedule, Macs
from dtbert.qa import Answer, PairError, Prepared, QuestionAnswerer


class Cost(NamedTuple):
    """What answering costs: means over questions, each of them the sum over its windows; and tokens a window.

    Attributes:
        executed, published: MACs a question with the schedule, as `dtbert.model.Macs`.
        own_length: MACs a question where nothing is dropped.
        padded: MACs a question where nothing is dropped and every window is padded to the answerer's ``window``.
        windows: windows a question.
        tokens: tokens a window.
    """

    executed: float
    published: float
    own_length: float
    padded: float
    windows: float
    tokens: float


@dataclass(frozen=True)
class Workload:
    """The windows that a model reads to answer questions.

    Attributes:
        config: the model's sizes.
        window: tokens that a window may have.
        num_questions: those that the model can read, at least 1.
        lengths: how many windows there are by their tokens, and how many of these are of segment 0.
    """

    config: BertConfig
    window: int
    num_questions: int
    lengths: Mapping[tuple[int, int], int]

    def cost(self, schedule: LengthSchedule | None = None) -> Cost:
        """What answering costs with a schedule, or with nothing dropped; quick, for windows alike are counted once.

        Raises:
            ValueError: the schedule has another number of layers than the model.
        """
        full = self._full
        macs = full if schedule is None else self._macs(schedule)
        windows = sum(self.lengths.values())
        padded = windows * self._keep_all.macs(self.config, self.window).executed
        tokens = sum(count * length for (length, _), count in self.lengths.items())
        n = self.num_questions
        return Cost(macs.executed / n, macs.published / n, full.executed / n, padded / n, windows / n, tokens / windows)

    @cached_property
    def _full(self) -> Macs:
        return self._macs(self._keep_all)

    @property
    def _keep_all(self) -> LengthSchedule:
        return LengthSchedule.ratios([1] * self.config.num_hidden_layers)

    def _macs(self, schedule: LengthSchedule) -> Macs:
        published = executed = 0
        for (length, question_length), count in self.lengths.items():
            macs = schedule.macs(self.config, length, question_length=question_length)
            published += count * macs.published
            executed += count * macs.executed
        return Macs(published, executed)


@dataclass(frozen=True)
class PreparedQuestions:
    """Questions that are tokenized once, to be answered and scored with any schedule; a slice of them is one too.

    A question that the model cannot read has no prediction, counts as wrong, and costs nothing.

    Attributes:
        answerer: the model.
        questions, prepared: as many of each, in the same order.
    """

    answerer: QuestionAnswerer
    questions: Sequence[SquadQuestion]
    prepared: Prepared

    @classmethod
    def of(cls, answerer: QuestionAnswerer, questions: Sequence[SquadQuestion]) -> "PreparedQuestions":
        """All questions, with their tokens in memory."""
        return cls(answerer, tuple(questions), answerer.prepare(_pairs(questions), errors="yield"))

    @classmethod
    def parts_of(cls, answerer: QuestionAnswerer, questions: Sequence[SquadQuestion]) -> Iterator["PreparedQuestions"]:
        """The questions a part at a time, so that memory for tokens is bounded."""
        begin = 0
        for prepared in answerer.prepare_many(_pairs(questions), errors="yield"):
            yield cls(answerer, questions[begin : begin + len(prepared)], prepared)
            begin += len(prepared)

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, rows: slice) -> "PreparedQuestions":
        return PreparedQuestions(self.answerer, self.questions[rows], self.prepared[rows])

    @property
    def unreadable(self) -> dict[str, str]:
        """What is wrong with each question that the model cannot read, by id."""
        examples = zip(self.questions, self.prepared.examples, strict=True)
        return {question.id: str(example) for question, example in examples if isinstance(example, PairError)}

    @cached_property
    def workload(self) -> Workload:
        """What the model reads."""
        lengths = Counter(self.prepared.window_lengths())
        return Workload(self.answerer.config, self.answerer.window, len(self) - len(self.unreadable), lengths)

    def predict(self, schedule: LengthSchedule | None = None) -> dict[str, str]:
        """The text of each answer by question id; errors of the schedule as calling the answerer."""
        answers = zip(self.questions, self.answerer.answer_prepared(self.prepared, schedule=schedule), strict=True)
        return {question.id: answer.text for question, answer in answers if isinstance(answer, Answer)}

    def evaluate(self, schedule: LengthSchedule | None = None) -> Evaluation:
        """The official metric of the answers; errors as `predict`, and ValueError where there are no questions."""
        return evaluate(self.questions, self.predict(schedule))


@dataclass(frozen=True)
class Measurement:
    """What a model does with questions.

    Attributes:
        predictions: the text of each answer by question id.
        unreadable: what is wrong with each question that the model cannot read, by id; it counts as wrong.
        scores: the official metric.
        cost: of the questions that the model can read; None where there are none.
        seconds: reading and answering took.
    """

    predictions: dict[str, str]
    unreadable: dict[str, str]
    scores: Evaluation
    cost: Cost | None
    seconds: float

    @property
    def questions_per_second(self) -> float:
        """Answers a second."""
        return len(self.predictions) / self.seconds


def measure(
    answerer: QuestionAnswerer,
    questions: Sequence[SquadQuestion],
    schedule: LengthSchedule | None = None,
    *,
    on_part: Callable[[int], object] = lambda _: None,
) -> Measurement:
    """Answer questions once, in bounded memory for their tokens, score the answers and count the work.

    Args:
        answerer: the model.
        questions: of `read_squad`, say.
        schedule: tokens that each layer keeps; all by default.
        on_part: called with the number of questions that are done since it was called before.

    Raises:
        TypeError, ValueError: for the schedule, as calling the answerer; there are no questions.
    """
    predictions: dict[str, str] = {}
    unreadable: dict[str, str] = {}
    lengths: Counter[tuple[int, int]] = Counter()
    start = time.perf_counter()
    for part in PreparedQuestions.parts_of(answerer, questions):
        predictions |= part.predict(schedule)
        unreadable |= part.unreadable
        lengths.update(part.prepared.window_lengths())
        on_part(len(part))
    seconds = time.perf_counter() - start
    scores = evaluate(questions, predictions)
    workload = Workload(answerer.config, answerer.window, len(predictions), lengths)
    cost = workload.cost(schedule) if predictions else None
    return Measurement(predictions, unreadable, scores, cost, seconds)


def check_readable(unreadable: Mapping[str, str]) -> None:
    """Raise ValueError for the first question that a model cannot read, if there is one; the message has its id."""
    for identifier, reason in unreadable.items():
        raise ValueError(f"question {identifier}: {reason}; take it out of the file")


def evenly_spaced(questions: Sequence[SquadQuestion], limit: int | None) -> Sequence[SquadQuestion]:
    """``limit`` of the questions, at even distances, so that all parts of the file are heard; all for None."""
    if limit is None or limit >= len(questions):
        return questions
    return [questions[index * len(questions) // limit] for index in range(limit)]


def _pairs(questions: Sequence[SquadQuestion]) -> Iterator[tuple[str, str]]:
    return ((question.question, question.context) for question in questions)
