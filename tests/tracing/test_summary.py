"""Over a data set: how long answers stay, and which classes of words go."""

import pytest

from dtbert.evaluation import GoldAnswer, PreparedQuestions, SquadQuestion
from dtbert.model import LengthSchedule
from dtbert.qa import QuestionAnswerer
from dtbert.tracing import summarize

CONTEXT = (
    'It rained. "The letter," said Zoë, "was written by Ada Lovelace in 1843." Paris answered. '
    + "It rained more. " * 9
)
SCHEDULE = LengthSchedule.ratios([0.6, 0.4], scorer="random", keep_question=True)


def asked(number: int, question: str, *answers: tuple[str, int | None], context: str = CONTEXT) -> SquadQuestion:
    return SquadQuestion(str(number), "t", question, context, tuple(GoldAnswer(*answer) for answer in answers))


@pytest.fixture(scope="module")
def questions() -> list[SquadQuestion]:
    return [
        asked(0, "Who wrote the letter?", ("Ada Lovelace", CONTEXT.index("Ada")), ("Ada", CONTEXT.index("Ada"))),
        asked(1, "When was it?", ("1843", None), ("in 1843", CONTEXT.index("in 1843"))),
        asked(2, "Who answered?", ("Paris", None)),
        asked(3, "Who sang?"),
        asked(4, "who " * 60, ("Paris", CONTEXT.index("Paris"))),
        # No window holds so much.
        asked(5, "What?", (CONTEXT.strip(), 0)),
    ]


def test_answers_and_classes_are_counted_as_the_traces_have_them(
    answerer: QuestionAnswerer, questions: list[SquadQuestion]
) -> None:
    done: list[int] = []
    counted, (full, half) = summarize(PreparedQuestions(answerer, questions), [None, SCHEDULE], done.append)
    assert counted == 2
    assert sum(done) == 3 * counted
    assert (full.work, full.same_answer, full.answers_left) == (1, 1, (1, 1))
    assert all(set(one.left) == {1} for one in full.classes.values())
    survivors = [0, 0]
    tokens = dict.fromkeys(half.classes, 0)
    left = {name: [0, 0] for name in half.classes}
    same = 0
    for question, gold in zip(questions[:2], ("Ada Lovelace", "in 1843"), strict=True):
        trace = answerer.trace(question.question, CONTEXT, schedule=SCHEDULE)
        same += trace.survived
        begin = CONTEXT.index(gold)
        end = begin + len(gold)
        longest = 0
        for window in trace.windows:
            edges = []
            for token in window.tokens:
                piece = CONTEXT[token.start : token.end] if token.part == "context" else ""
                if token.part != "context":
                    name = token.part
                elif begin <= token.start and token.end <= end:
                    name = "answer"
                    edges += [token] * (token.start == begin or token.end == end)
                elif not piece.isalnum():
                    name = "punctuation"
                elif CONTEXT.index('"The') <= token.start < CONTEXT.index("Paris"):
                    name = "sentence of the answer"
                else:
                    name = "other"
                passed = 2 if token.left is None else token.left
                tokens[name] += 1
                for layer in range(2):
                    left[name][layer] += passed > layer
            if len(edges) == 2:
                longest = max(longest, min(2 if token.left is None else token.left for token in edges))
        for layer in range(2):
            survivors[layer] += longest > layer
    assert half.answers_left == tuple(number / 2 for number in survivors)
    assert half.same_answer == same / 2
    for name, of_class in half.classes.items():
        assert of_class.tokens == tokens[name] > 0
        assert of_class.left == pytest.approx([number / tokens[name] for number in left[name]])
    assert half.classes["question"].left == (1, 1)
    assert half.classes["special"].left[1] < 1


def test_questions_without_a_place_of_their_answer_cannot_be_followed(
    answerer: QuestionAnswerer, questions: list[SquadQuestion]
) -> None:
    with pytest.raises(ValueError, match="nothing to follow"):
        summarize(PreparedQuestions(answerer, questions[2:]), [SCHEDULE])
