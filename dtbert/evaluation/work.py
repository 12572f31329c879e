"""The work of each question, by what the layers kept of its windows."""

import math
from collections.abc import Mapping, Sequence
from functools import cache

import torch

from dtbert.model import AdaptivePolicy, LayerKept, LengthSchedule, Macs, Policy
from dtbert.qa import Cascade, Cascaded, Prepared, QuestionAnswerer
from dtbert.qa.answering import Watch
from dtbert.qa.windows import Example, Part


class KeptWork:
    """Multiply-accumulates of questions as they are answered.

    Attributes:
        of_questions: of each that could be read, the sum over its windows.
    """

    def __init__(self, answerer: QuestionAnswerer, policy: AdaptivePolicy) -> None:
        self._answerer, self._policy = answerer, policy.resolve(answerer.own_scorer)
        self.of_questions: list[Macs] = []

    def watch(self, prepared: Prepared) -> Watch:
        """What `answer_prepared` tells of these questions, which come after those before."""
        examples = [one for one in prepared.examples if isinstance(one, Example)]
        first = len(self.of_questions)
        self.of_questions += [Macs(0, 0)] * len(examples)
        config = self._answerer.config
        with torch.inference_mode():  # as it answers
            backend = self._answerer.model.backend_name

        def add(parts: Sequence[Part], kept: Sequence[LayerKept]) -> None:
            for part, lengths in zip(parts, zip(*(layer.lengths for layer in kept), strict=True), strict=True):
                question = len(examples[part.row].question.ids) + 2
                macs = self._policy.macs_of_kept(
                    config, part.num_tokens, lengths, question_length=question, backend=backend
                )
                self.of_questions[first + part.row] = sum_of([self.of_questions[first + part.row], macs])

        return add


# Of each window of a question: its tokens, and how many of them are of segment 0.
Windows = Sequence[tuple[int, int]]


def windows_of_each(prepared: Prepared) -> list[Windows]:
    """The windows of each question that can be read."""
    rows = (row for row, one in enumerate(prepared.examples) if isinstance(one, Example))
    return [prepared.rows([row]).window_lengths() for row in rows]


def macs_of_each(
    answerer: QuestionAnswerer, questions: Sequence[Windows], schedule: LengthSchedule | None
) -> list[Macs]:
    """What answering each question takes."""

    @cache
    def of(window: tuple[int, int]) -> Macs:
        return macs_of_windows(answerer, {window: 1}, schedule)

    return [sum_of([of(window) for window in windows]) for windows in questions]


def answered(answerer: QuestionAnswerer, prepared: Prepared, schedule: Policy | None) -> tuple[Cascaded, list[Macs]]:
    """The answers to some questions, none of them given again, and what each took of those that can be read."""
    once = Cascade(schedule, -1.0, 0.0, 0.0)
    if isinstance(schedule, AdaptivePolicy):
        work = KeptWork(answerer, schedule)
        return answerer.answer_cascade(prepared, once, watch=work.watch(prepared)), work.of_questions
    assert schedule is None or isinstance(schedule, LengthSchedule)
    return answerer.answer_cascade(prepared, once), macs_of_each(answerer, windows_of_each(prepared), schedule)


def with_again(
    answerer: QuestionAnswerer, questions: Sequence[Windows], done: Policy | list[Macs] | None, again: Sequence[bool]
) -> list[Macs]:
    """What each question took by a schedule, or as counted, and where it was answered again with nothing dropped."""
    if not isinstance(done, list):
        assert done is None or isinstance(done, LengthSchedule)
        done = macs_of_each(answerer, questions, done)
    full = macs_of_each(answerer, questions, None)
    return [sum_of([one, more]) if twice else one for one, more, twice in zip(done, full, again, strict=True)]


def sum_of(macs: Sequence[Macs]) -> Macs:
    """Of some, at least one."""
    return Macs(*map(sum, zip(*macs, strict=True)))


def executed_p95(work: Sequence[Macs]) -> float:
    """The least that 95 of 100 do not exceed."""
    return float(sorted(one.executed for one in work)[math.ceil(0.95 * len(work)) - 1])


def macs_of_windows(
    answerer: QuestionAnswerer, lengths: Mapping[tuple[int, int], int], schedule: LengthSchedule | None
) -> Macs:
    """Of windows by their tokens and those of segment 0, where those alike are counted once."""
    schedule = answerer.resolve(schedule) or LengthSchedule.ratios([1] * answerer.config.num_hidden_layers)
    published = executed = 0
    with torch.inference_mode():  # as it answers
        backend = answerer.model.backend_name
    for (length, question_length), count in lengths.items():
        macs = schedule.macs(answerer.config, length, question_length=question_length, backend=backend)
        published, executed = published + count * macs.published, executed + count * macs.executed
    return Macs(published, executed)
