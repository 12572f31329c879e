"""What a call may ask for: no answer, thresholds, and what transformers' pipeline took."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from dtbert.qa import Answer, QuestionAnswerer
from tests.qa.conftest import LETTER, NEEDLE, QUESTION, same


def test_nothing_is_an_answer_where_it_is_asked_for(finder: QuestionAnswerer) -> None:
    there, not_there = f"It is the {NEEDLE}.", "It rained."
    assert finder("Where?", there, no_answer=True) == finder("Where?", there)
    spans = len(finder.top("Where?", not_there, 99, overlap=True))
    # All spans are as likely as nothing.
    nothing = Answer("", 0, 0, pytest.approx(1 / (spans + 1), rel=1e-5), 0.0)
    assert finder("Where?", not_there, no_answer=True, threshold=0.1) == nothing
    assert finder("Where?", not_there, no_answer=True).text == "It"
    assert finder("Where?", not_there).text == "It"
    found = finder.top("Where?", there, 3, no_answer=True, threshold=0.1)
    assert [answer.text for answer in found] == [NEEDLE, "", "It"]
    pairs = [("Where?", there), ("Where?", not_there)]
    many = finder.answer_many(pairs, no_answer=True, threshold=0.1)
    assert [answer.text for answer in many] == [NEEDLE, ""]


def test_threshold_is_the_answerers_own_unless_given(make_answerer: Callable[..., QuestionAnswerer]) -> None:
    margin = make_answerer()(QUESTION, LETTER).margin
    for threshold, text in ((margin + 1, ""), (margin - 1, make_answerer()(QUESTION, LETTER).text)):
        answerer = make_answerer(threshold=threshold)
        assert answerer.threshold == threshold
        assert answerer(QUESTION, LETTER, no_answer=True).text == text
        assert answerer(QUESTION, LETTER, no_answer=True, threshold=margin + 1).text == ""
    assert make_answerer().threshold == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"threshold": 1.0}, ValueError, "give no_answer=True with it"),
        ({"threshold": "1", "no_answer": True}, TypeError, "threshold must be a number, not '1'"),
        ({"threshold": math.nan, "no_answer": True}, ValueError, "not NaN"),
        ({"no_answer": 1}, TypeError, "no_answer must be True or False, not 1"),
        ({"overlap": None}, TypeError, "overlap must be True or False, not None"),
        ({"handle_impossible_answer": True}, TypeError, "no option 'handle_impossible_answer': write no_answer=True"),
        ({"max_answer_len": 15}, TypeError, "max_answer_len.* max_answer_tokens"),
        ({"doc_stride": 64}, TypeError, "doc_stride.* stride"),
        ({"max_seq_len": 384}, TypeError, "max_seq_len.* window"),
        ({"topk": 2}, TypeError, "topk.* top_k"),
        (
            {"colour": 2},
            TypeError,
            "no option 'colour': there are agreement, budget, no_answer, overlap, schedule, threshold",
        ),
    ],
)
def test_options_of_a_call_are_checked(
    answerer: QuestionAnswerer, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    for call in (answerer, lambda *pair, **more: answerer.top(*pair, 1, **more)):
        with pytest.raises(error, match=message):
            call(QUESTION, LETTER, **options)
    with pytest.raises(error, match=message):
        answerer.answer_many([], **options)
    with pytest.raises(error, match=message):
        answerer.answer_documents(QUESTION, [], **options)


def test_load_says_what_transformers_options_are_called_here() -> None:
    with pytest.raises(TypeError, match=r"max_seq_len.* window"):
        QuestionAnswerer.load(max_seq_len=384)  # type: ignore[call-arg]


def test_calls_of_transformers_pipeline_are_understood(answerer: QuestionAnswerer) -> None:
    other = "Zoe wrote it."
    one, two = answerer(QUESTION, LETTER), answerer("Who?", other)
    best = answerer.top(QUESTION, LETTER, 2)
    first, second = {"question": QUESTION, "context": LETTER, "id": 7}, {"question": "Who?", "context": other}
    calls: list[tuple[Any, Any]] = [
        (answerer(question=QUESTION, context=LETTER), one),
        (answerer(question=QUESTION, context=LETTER, top_k=2), best),
        (answerer(first), one),
        (answerer(first, top_k=2), best),
        (answerer([first, second]), [one, two]),
        (answerer([first], top_k=2), [best]),
        (answerer([first]), [one]),
        (answerer(question=[QUESTION, "Who?"], context=[LETTER, other]), [one, two]),
        (answerer(question=(QUESTION, "Who?"), context=LETTER), [one, answerer("Who?", LETTER)]),
        (list(answerer.answer_many([first, (QUESTION, LETTER)])), [one, one]),
        (answerer([]), []),
    ]
    for got, expected in calls:
        same(flat(got), flat(expected))
        assert isinstance(got, Answer) == isinstance(expected, Answer)


def flat(found: Any) -> list[Answer]:
    return [found] if isinstance(found, Answer) else [answer for one in found for answer in flat(one)]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((QUESTION,), TypeError, "the context is missing"),
        ((7,), TypeError, "the context is missing"),
        (({"question": QUESTION},), ValueError, "no 'context'; it has 'question'"),
        (({"question": QUESTION, "context": LETTER}, LETTER), TypeError, "a dictionary, which has a context already"),
        (([QUESTION], [LETTER, LETTER]), ValueError, "1 questions and 2 contexts"),
        (([QUESTION, ""], LETTER), ValueError, "^pair 1: the question is empty"),
        ((QUESTION, [LETTER]), TypeError, "answer_documents"),
        ((QUESTION, ""), ValueError, "^the context is empty"),
        (([QUESTION],), TypeError, "^pair 0: expected"),
    ],
)
def test_call_says_what_does_not_belong_together(
    answerer: QuestionAnswerer, arguments: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        answerer(*arguments)
