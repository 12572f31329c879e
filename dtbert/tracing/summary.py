"""What schedules drop over a data set: how long the answers stay, and which kinds of words go."""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dtbert.evaluation import PreparedQuestions, SquadQuestion, evaluate
from dtbert.model import Policy
from dtbert.qa import Answer, Prepared
from dtbert.qa.trace import Follower, same_place
from dtbert.qa.windows import Example

CLASSES = ("answer", "sentence of the answer", "question", "punctuation", "other", "special")
_ANSWER, _SENTENCE, _QUESTION, _PUNCTUATION, _OTHER, _SPECIAL = range(len(CLASSES))
# Between sentences: after a full stop and what closes quotes and brackets, before a space; and at an empty line.
_BETWEEN_SENTENCES = re.compile(r"""(?<=[.!?\u3002\uff01\uff1f])["'\u2019\u201d)\]]*\s+|\n\s*\n""")
# Questions whose windows are held at a time.
_AT_ONCE = 512


class ClassLeft(NamedTuple):
    """How many tokens of a class the windows have, and by layer the part of them that is left after it."""

    tokens: int
    left: tuple[float, ...]


class Summary(NamedTuple):
    """What one schedule did with the questions.

    Attributes:
        schedule: as it was run; None drops nothing.
        work: executed multiply-accumulates, as a part of the full model's at each window's own length.
        f1: percent.
        same_answer: the part of the questions whose answer is the full model's, character by character.
        answers_left: by layer, the part of the questions of whose right answer the first and the last token are left
            after it, in one window at least.
        classes: by each of `CLASSES`.
    """

    schedule: Policy | None
    work: float
    f1: float
    same_answer: float
    answers_left: tuple[float, ...]
    classes: dict[str, ClassLeft]


class _Placed(NamedTuple):
    """A question whose right answer is known and lies in one window at least.

    ``first`` and ``last`` are its tokens, ``classes`` those of the context's tokens.
    """

    question: SquadQuestion
    example: Example
    first: int
    last: int
    classes: NDArray[np.int64]


def summarize(
    prepared: PreparedQuestions,
    schedules: Sequence[Policy | None],
    on_answers: Callable[[int], object] = lambda _: None,
) -> tuple[int, list[Summary]]:
    """Follow the tokens of questions through the layers, by each of some schedules.

    Counted are questions with an answer whose place in the context is known, which the model can read, and of which
    one window holds the whole answer: the first such answer of each.

    Args:
        prepared: the model and the questions.
        schedules: in order; None drops nothing.
        on_answers: called with the number of answers since the last call; of all schedules and the full model.

    Returns:
        The number of questions that are counted, and a summary by schedule.

    Raises:
        ValueError: no question is left to be counted; or for a schedule, as calling the answerer.
    """
    schedules = [prepared.answerer.resolve(schedule) for schedule in schedules]
    pairs = zip(prepared.questions, prepared.prepared.examples, strict=True)
    placed = [found for question, one in pairs if isinstance(one, Example) and (found := _placed(question, one))]
    if not placed:
        raise ValueError(
            "no question has an answer whose place is known and that the model can read: nothing to follow"
        )
    full = [answer for answers, _ in _followed(prepared, placed, None, on_answers) for answer in answers]
    return len(placed), [_summary(prepared, placed, schedule, full, on_answers) for schedule in schedules]


def _summary(
    prepared: PreparedQuestions,
    placed: Sequence[_Placed],
    schedule: Policy | None,
    full: Sequence[Answer],
    on_answers: Callable[[int], object],
) -> Summary:
    num_layers = prepared.answerer.config.num_hidden_layers
    # Tokens of each class by the layers that they passed, and answers by the same.
    passed = np.zeros((len(CLASSES), num_layers + 1), np.int64)
    answers_passed = np.zeros(num_layers + 1, np.int64)
    found = list[Answer]()
    for answers, follower in _followed(prepared, placed, schedule, on_answers):
        for row, one in enumerate(placed[len(found) : len(found) + len(answers)]):
            around = len(one.example.question.ids) + 2
            longest = 0
            for part, left, _ in follower.windows(row, one.example):
                classes = np.full(part.num_tokens, _SPECIAL)
                classes[1 : around - 1] = _QUESTION
                classes[around:-1] = one.classes[part.begin : part.end]
                np.add.at(passed, (classes, left), 1)
                if part.begin <= one.first and one.last < part.end:
                    edges = left[[around + one.first - part.begin, around + one.last - part.begin]]
                    longest = max(longest, int(edges.min()))
            answers_passed[longest] += 1
        found += answers
    same = sum(map(same_place, found, full))
    questions = [one.question for one in placed]
    predictions = {question.id: answer.text for question, answer in zip(questions, found, strict=True)}
    cost = prepared.cost(schedule)
    answers_left = _left(answers_passed)
    classes_left = {name: ClassLeft(int(row.sum()), _left(row)) for name, row in zip(CLASSES, passed, strict=True)}
    f1 = evaluate(questions, predictions).f1
    return Summary(schedule, cost.executed / cost.own_length, f1, same / len(placed), answers_left, classes_left)


def _left(passed: NDArray[np.int64]) -> tuple[float, ...]:
    """By layer, the part that passed it, of numbers of those that passed so many layers; all of nothing."""
    beyond = passed[::-1].cumsum()[::-1]
    return tuple((beyond[1:] / max(int(beyond[0]), 1)).tolist()) if beyond[0] else (1.0,) * (len(passed) - 1)


def _followed(
    prepared: PreparedQuestions,
    placed: Sequence[_Placed],
    schedule: Policy | None,
    on_answers: Callable[[int], object],
) -> Iterator[tuple[list[Answer], Follower]]:
    """Answers to some of the questions at a time, and what the layers kept of their windows."""
    for begin in range(0, len(placed), _AT_ONCE):
        follower = Follower()
        some = Prepared(tuple(one.example for one in placed[begin : begin + _AT_ONCE]))
        answers = prepared.answerer.answer_prepared(some, schedule=schedule, watch=follower)
        on_answers(len(answers))
        yield [answer for answer in answers if isinstance(answer, Answer)], follower


def _placed(question: SquadQuestion, example: Example) -> _Placed | None:
    for answer in question.answers:
        if answer.start is None or not answer.text:
            continue
        tokens = example.context.within(answer.start, answer.start + len(answer.text))
        if not len(tokens):
            continue
        first, last = int(tokens[0]), int(tokens[-1])
        if any(begin <= first and last < end for begin, end in example.parts):
            return _Placed(question, example, first, last, _classes(example, answer.start, first, last))
    return None


def _classes(example: Example, start: int, first: int, last: int) -> NDArray[np.int64]:
    """The class of each token of the context; ``start`` is the answer's first character."""
    context = example.context
    breaks = [found.end() for found in _BETWEEN_SENTENCES.finditer(context.text)]
    begin = max((one for one in breaks if one <= start), default=0)
    end = min((one for one in breaks if one > start), default=len(context.text))
    offsets = context.offsets
    classes = np.where((offsets[:, 0] >= begin) & (offsets[:, 0] < end), _SENTENCE, _OTHER)
    pieces = (context.text[begin:end] for begin, end in offsets.tolist())
    classes[[not any(map(str.isalnum, piece)) for piece in pieces]] = _PUNCTUATION
    classes[first : last + 1] = _ANSWER
    return classes
