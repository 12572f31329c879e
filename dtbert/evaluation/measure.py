"""Predict, score and count: what a model gets right on questions with a schedule, and what that costs."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple, TypeVar, get_args

from dtbert.evaluation.metric import BestThreshold, Evaluation, Measure, best_threshold, evaluate
from dtbert.evaluation.reader import SquadQuestion
from dtbert.evaluation.work import (
    KeptWork,
    Windows,
    answered,
    executed_p95,
    macs_of_windows,
    sum_of,
    windows_of_each,
    with_again,
)
from dtbert.model import AdaptivePolicy, LengthSchedule, Macs, Policy
from dtbert.qa import Answer, Cascade, PairError, Prepared, QuestionAnswerer
from dtbert.qa.cascade import is_same

T = TypeVar("T")


class Cost(NamedTuple):
    """What answering costs: means over questions, each of them the sum over its windows; and tokens a window.

    Attributes:
        executed, published: MACs a question with the schedule, as `dtbert.model.Macs`.
        own_length: MACs a question where nothing is dropped.
        padded: MACs a question where nothing is dropped and every window is padded to the answerer's ``window``.
        windows: windows a question.
        tokens: tokens a window.
        executed_p95: executed MACs that 95 of 100 questions do not exceed, where the text decides how many tokens stay,
            or a cascade what is answered again; else None.
    """

    executed: float
    published: float
    own_length: float
    padded: float
    windows: float
    tokens: float
    executed_p95: float | None = None


class PreparedQuestions:
    """Questions that are tokenized once, to be answered, scored and counted with any schedule.

    A question that the model cannot read has no prediction, counts as wrong, and costs nothing. Where one of the
    questions has no answer, the prediction is empty for spans whose margin is below the answerer's threshold.

    Attributes:
        answerer, questions, prepared: the model, the questions, and their tokens.
        unreadable: what is wrong with each question that the model cannot read, by id.
    """

    def __init__(self, answerer: QuestionAnswerer, questions: Sequence[SquadQuestion]) -> None:
        self.answerer, self.questions = answerer, tuple(questions)
        parts = answerer.prepare_many(_pairs(questions))
        self.prepared = Prepared(tuple(one for part in parts for one in part.examples))
        self.unreadable = _unreadable(questions, self.prepared.examples)
        self._lengths = Counter(self.prepared.window_lengths())
        self._threshold = answerer.threshold if _some_impossible(questions) else None

    def predict(self, schedule: Policy | None = None, begin: int = 0, end: int | None = None) -> dict[str, str]:
        """Answers by id, to the questions number ``begin`` to ``end``; errors of the schedule as the answerer's."""
        answers = self.answerer.answer_prepared(self.prepared[begin:end], schedule=schedule)
        return _predictions(self.questions[begin:end], answers, self._threshold)

    def evaluate(self, schedule: Policy | None = None, begin: int = 0, end: int | None = None) -> Evaluation:
        """The official metric of `predict`; ValueError where there are no questions."""
        return evaluate(self.questions[begin:end], self.predict(schedule, begin, end))

    def cost(self, schedule: Policy | None = None) -> Cost:
        """Of the questions that can be read; ValueError where there are none.

        They are answered for it where the text decides how many tokens stay, and otherwise not.
        """
        done = self.evaluate_and_count(schedule)[1] if isinstance(schedule, AdaptivePolicy) else schedule
        return _cost(self.answerer, len(self.questions) - len(self.unreadable), self._lengths, self._full, done)

    def evaluate_and_count(
        self, schedule: AdaptivePolicy, begin: int = 0, end: int | None = None
    ) -> tuple[Evaluation, list[Macs]]:
        """`evaluate`, and what answering each of the questions took that can be read."""
        found, work = answered(self.answerer, self.prepared[begin:end], schedule)
        questions = self.questions[begin:end]
        return evaluate(questions, _predictions(questions, found.answers, self._threshold)), work

    def full_work(self, begin: int = 0, end: int | None = None) -> int:
        """Executed MACs of the questions number ``begin`` to ``end`` where nothing is dropped."""
        return macs_of_windows(self.answerer, Counter(self.prepared[begin:end].window_lengths()), None).executed

    @cached_property
    def _full(self) -> Macs:
        # A search counts many schedules against it.
        return macs_of_windows(self.answerer, self._lengths, None)


class Cascading(NamedTuple):
    """What a cascade did with questions.

    Attributes:
        again: the part of them that was answered again, at full length.
        agreement: the part of the answers that are the full model's, the same span.
    """

    again: float
    agreement: float


class Measurement(NamedTuple):
    """What a model did with questions.

    Attributes:
        predictions: the text of each answer by question id.
        margins: of the best span of each question, by id.
        best: the official best thresholds, by measure; empty where there is always an answer.
        unreadable: what is wrong with each question that the model cannot read, by id; it counts as wrong.
        scores: the official metric.
        cost: of the questions that the model can read; None where there are none.
        questions_per_second: answers, from text to text.
        cascading: where they were answered by a cascade; None where none could be read.
    """

    predictions: dict[str, str]
    margins: dict[str, float]
    best: dict[Measure, BestThreshold]
    unreadable: dict[str, str]
    scores: Evaluation
    cost: Cost | None
    questions_per_second: float
    cascading: Cascading | None = None


def measure(
    answerer: QuestionAnswerer,
    questions: Sequence[SquadQuestion],
    schedule: Policy | Cascade | None = None,
    *,
    no_answer: bool | None = None,
    threshold: float | None = None,
    on_answers: Callable[[int], object] = lambda _: None,
) -> Measurement:
    """Answer questions once, in bounded memory for their tokens, score the answers and count the work.

    Args:
        answerer, questions: the model, and what it is asked.
        schedule: tokens that each layer keeps, all by default; or a cascade. Of what that did not answer again the full
            model's answers are measured, too, outside of the time.
        no_answer: whether the answer may be that there is none; by default where one of the questions has none.
        threshold: of the margin, for that; by default the answerer's.
        on_answers: called with the number of questions that are done since the last call.

    Raises:
        TypeError, ValueError: for the schedule, as calling the answerer; there are no questions.
    """
    answers: list[Answer | PairError] = []
    lengths: Counter[tuple[int, int]] = Counter()
    windows: list[Windows] = []
    cascade, first = (schedule, schedule.schedule) if isinstance(schedule, Cascade) else (None, schedule)
    work = KeptWork(answerer, first) if isinstance(first, AdaptivePolicy) else None
    again: list[int] = []
    start = time.perf_counter()
    for part in answerer.prepare_many(_pairs(questions)):
        watch = None if work is None else work.watch(part)
        if cascade is None:
            answers += answerer.answer_prepared(part, schedule=first, watch=watch)
        else:
            found = answerer.answer_cascade(part, cascade, watch=watch)
            again += [len(answers) + row for row in found.again]
            answers += found.answers
            windows += windows_of_each(part)
        lengths.update(part.window_lengths())
        on_answers(len(part))
    seconds = time.perf_counter() - start
    spans = _predictions(questions, answers)
    margins = {one.id: found.margin for one, found in zip(questions, answers, strict=True) if isinstance(found, Answer)}
    full = macs_of_windows(answerer, lengths, None)
    done = first if work is None else work.of_questions
    if cascade is not None and cascade.schedule is not None:
        twice = set(again)
        done = with_again(
            answerer, windows, done, [row in twice for row, one in enumerate(answers) if isinstance(one, Answer)]
        )
    cost = _cost(answerer, len(spans), lengths, full, done) if spans else None
    predictions, best = spans, dict[Measure, BestThreshold]()
    if _some_impossible(questions) if no_answer is None else no_answer:
        predictions = _predictions(questions, answers, answerer.threshold if threshold is None else threshold)
        best = {name: best_threshold(questions, spans, margins, name) for name in get_args(Measure)}
    scores = evaluate(questions, predictions)
    unreadable = _unreadable(questions, answers)
    cascading = None
    if cascade is not None and spans:
        cascading = _cascading(answerer, questions, answers, set(again)) if cascade.schedule else Cascading(0.0, 1.0)
    return Measurement(predictions, margins, best, unreadable, scores, cost, len(predictions) / seconds, cascading)


def check_readable(unreadable: Mapping[str, str]) -> None:
    """Raise ValueError for the first question that a model cannot read, if there is one; the message has its id."""
    for identifier, reason in unreadable.items():
        raise ValueError(f"question {identifier}: {reason}; take it out of the file")


def evenly_spaced(questions: Sequence[T], limit: int | None) -> Sequence[T]:
    """``limit`` of the questions, at even distances, so that all parts of the file are heard; all for None."""
    if limit is None or limit >= len(questions):
        return questions
    return [questions[index * len(questions) // limit] for index in range(limit)]


def _pairs(questions: Sequence[SquadQuestion]) -> Iterator[tuple[str, str]]:
    return ((one.question, one.context) for one in questions)


def _some_impossible(questions: Sequence[SquadQuestion]) -> bool:
    return any(question.is_impossible for question in questions)


def _predictions(
    questions: Sequence[SquadQuestion], answers: Sequence[Answer | PairError], threshold: float | None = None
) -> dict[str, str]:
    return {
        one.id: "" if threshold is not None and found.margin < threshold else found.text
        for one, found in zip(questions, answers, strict=True)
        if isinstance(found, Answer)
    }


def _cascading(
    answerer: QuestionAnswerer,
    questions: Sequence[SquadQuestion],
    answers: Sequence[Answer | PairError],
    again: set[int],
) -> Cascading:
    first = [
        (one, found)
        for row, (one, found) in enumerate(zip(questions, answers, strict=True))
        if row not in again and isinstance(found, Answer)
    ]
    full = answerer.answer_many(_pairs([one for one, _ in first]))
    differing = sum(not is_same(found, other) for (_, found), other in zip(first, full, strict=True))
    count = len(first) + len(again)
    return Cascading(len(again) / count, 1 - differing / count)


def _unreadable(questions: Sequence[SquadQuestion], found: Sequence[object]) -> dict[str, str]:
    return {one.id: str(why) for one, why in zip(questions, found, strict=True) if isinstance(why, PairError)}


def _cost(
    answerer: QuestionAnswerer,
    num_questions: int,
    lengths: Mapping[tuple[int, int], int],
    full: Macs,
    done: Policy | list[Macs] | None,
) -> Cost:
    """Of windows by their tokens and those of segment 0, where those alike are counted once; or of each question."""
    if not num_questions:
        raise ValueError("the model can read none of the questions: there is no work to count")
    p95 = None
    if isinstance(done, list):
        macs, p95 = sum_of(done), executed_p95(done)
    else:
        assert done is None or isinstance(done, LengthSchedule)
        macs = full if done is None else macs_of_windows(answerer, lengths, done)
    windows = sum(lengths.values())
    tokens = sum(count * length for (length, _), count in lengths.items())
    padding = macs_of_windows(answerer, {(answerer.window, answerer.window): 1}, None)
    n = num_questions
    own, padded = full.executed / n, windows * padding.executed / n
    return Cost(macs.executed / n, macs.published / n, own, padded, windows / n, tokens / windows, p95)
