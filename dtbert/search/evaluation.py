"""What a schedule is worth: the scores of its answers, its multiply-accumulates, its time."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from dtbert.evaluation import Cost, PreparedQuestions, Score, SquadQuestion, check_readable
from dtbert.files import text_sha256
from dtbert.model import AdaptivePolicy, Macs, Policy
from dtbert.qa import Latency, Prepared, QuestionAnswerer

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

    def macs(self, full: Cost) -> Macs:
        """In the mean over all questions, as the full model's is."""
        part = full.executed / self.full
        return Macs(*(round(part * sum(counts)) for counts in zip(*self.work, strict=True)))


class QuestionEvaluator:
    """What a search asks about schedules, of a model's answers to questions; the schedule None is the full model.

    Args:
        answerer: the model.
        questions: in the order of evaluation, see `in_search_order`.

    Raises:
        ValueError: there are no questions, or one that the model cannot read; the message has its id.
    """

    def __init__(self, answerer: QuestionAnswerer, questions: Sequence[SquadQuestion]) -> None:
        if not questions:
            raise ValueError("there are no questions to search with")
        self.answerer, self._questions = answerer, PreparedQuestions(answerer, questions)
        check_readable(self._questions.unreadable)
        self._answered = _Answered(None)

    @property
    def num_questions(self) -> int:
        return len(self._questions.questions)

    def macs(self, schedule: Policy | None) -> Macs:
        """Multiply-accumulates a question, in the mean over all questions; quick, for nothing is answered.

        Where the text decides how many tokens stay, the first questions are answered; from those that are answered so
        far it is estimated, as a part of the full model's, what all would take.
        """
        cost = self._questions.cost(None)
        if isinstance(schedule, AdaptivePolicy):
            return self._answer(schedule, min(_COUNTED, self.num_questions)).macs(cost)
        cost = self._questions.cost(schedule)
        return Macs(round(cost.published), round(cost.executed))

    def scores(self, schedule: Policy | None, begin: int, end: int) -> list[Score]:
        """The scores of the questions number ``begin`` to ``end``, from 0 to 1 each."""
        if isinstance(schedule, AdaptivePolicy):
            return self._answer(schedule, end).scores[begin:end]
        return list(self._questions.evaluate(schedule, begin, end).per_question.values())

    def latencies(self, schedules: Sequence[Policy]) -> list[Latency]:
        """Seconds a question of each schedule, and the full model's beside it.

        Medians of rounds in which the schedules and the full model take turns on the first questions.
        """
        sample = self._questions.prepared[:_TIMED_QUESTIONS]
        # The first round warms up.
        rounds = [
            [self._seconds(sample, schedule) / len(sample) for schedule in (None, *schedules)]
            for _ in range(_TIMED_ROUNDS + 1)
        ][1:]
        full_model, *own = (round(statistics.median(times), 9) for times in zip(*rounds, strict=True))
        return [Latency(seconds, full_model, *self.device()) for seconds in own]

    def device(self) -> tuple[str, str, int]:
        """What latencies hold for: the device, the dtype, and the number of threads."""
        device, dtype = self.answerer.model.device, str(self.answerer.model.dtype).removeprefix("torch.")
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return name, dtype, torch.get_num_threads()

    def _answer(self, schedule: AdaptivePolicy, end: int) -> "_Answered":
        """What was found of the questions up to this one; those of the last schedule are answered once."""
        if self._answered.schedule != schedule:
            self._answered = _Answered(schedule)
        answered = self._answered
        if (begin := len(answered.scores)) < end:
            scores, work = self._questions.evaluate_and_count(schedule, begin, end)
            answered.scores += scores.per_question.values()
            answered.work += work
            answered.full += self._questions.full_work(begin, end)
        return answered

    def _seconds(self, sample: Prepared, schedule: Policy | None) -> float:
        start = time.perf_counter()
        self.answerer.answer_prepared(sample, schedule=schedule)  # its answers are on the CPU: the device is done
        return time.perf_counter() - start


def in_search_order(questions: Sequence[SquadQuestion]) -> list[SquadQuestion]:
    """The questions in an order of which every beginning is spread evenly over the articles.

    It depends on titles and ids alone, so that processes and later runs agree on it.
    """
    articles: dict[str, list[SquadQuestion]] = {}
    for question in sorted(questions, key=lambda question: text_sha256(question.id)):
        articles.setdefault(question.title, []).append(question)
    placed = [
        ((rank + 0.5) / len(article), text_sha256(question.title + question.id), question)
        for article in articles.values()
        for rank, question in enumerate(article)
    ]
    return [question for _, _, question in sorted(placed, key=lambda item: item[:2])]


def ids_sha256(questions: Sequence[SquadQuestion]) -> str:
    """The SHA-256 of the sorted ids, one a line."""
    return text_sha256("\n".join(sorted(question.id for question in questions)))
