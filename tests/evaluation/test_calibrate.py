"""A calibration and what a cascade costs, on a tiny model: against single answers and sums by hand."""

import math
from dataclasses import replace

import pytest

from dtbert.evaluation import GoldAnswer, PreparedQuestions, SquadQuestion, calibrate, measure
from dtbert.model import LengthSchedule, Policy, TopP
from dtbert.qa import Answer, Cascade, QuestionAnswerer, load_tokenizer
from dtbert.weights import resolve_source
from tests.evaluation.test_measure import CONTEXTS
from tests.qa.conftest import make_model

GOLD = (GoldAnswer("Ada", 0),)
QUESTIONS = [
    SquadQuestion(f"q{row}", "t", f"who wrote it {'and where ' * (row % 7)}?", CONTEXTS[row % 3], GOLD)
    for row in range(15)
]
TOO_LONG = SquadQuestion("long", "t", "who " * 200, CONTEXTS[0], GOLD)
SCHEDULE = LengthSchedule.ratios([0.95, 0.9], scorer="answer")
POLICY = TopP([1, 0.97], scorer="answer", floor=(0, 0.1))


@pytest.fixture(scope="module")
def answerer() -> QuestionAnswerer:
    return QuestionAnswerer(make_model(), load_tokenizer(resolve_source(None)), window=128, stride=32)


def answers(answerer: QuestionAnswerer, schedule: Policy | None) -> list[Answer]:
    # With overlap an answer's score is of its span alone.
    return [answerer(one.question, one.context, schedule=schedule, overlap=True) for one in QUESTIONS]


def macs(answerer: QuestionAnswerer, schedule: Policy | None) -> list[float]:
    return [PreparedQuestions(answerer, [one]).cost(schedule).executed for one in QUESTIONS]


@pytest.mark.parametrize("schedule", [SCHEDULE, POLICY], ids=["ratios", "top-p"])
def test_calibration_has_what_differs_and_what_again_would_cost(answerer: QuestionAnswerer, schedule: Policy) -> None:
    done: list[int] = []
    prepared = PreparedQuestions(answerer, QUESTIONS)
    (stage,) = calibrate(prepared, [schedule], done.append)
    full, first, work = answers(answerer, None), answers(answerer, schedule), macs(answerer, None)
    differing = [
        one.score for one, other in zip(first, full, strict=True) if one.start != other.start or one.end != other.end
    ]
    assert 0 < len(differing) < len(QUESTIONS)
    assert stage.certainties == pytest.approx(sorted(differing, reverse=True), abs=2e-5)
    assert all(
        certainty >= one for certainty, one in zip(stage.certainties, sorted(differing, reverse=True), strict=True)
    )
    below = [sum(macs for macs, one in zip(work, first, strict=True) if one.score <= at) for at in stage.certainties]
    assert stage.again == pytest.approx([one / sum(work) for one in below], abs=1e-4)
    assert stage.macs_fraction == pytest.approx(sum(macs(answerer, schedule)) / sum(work), abs=1e-6)
    assert (stage.schedule, done) == (schedule, [15, 15])


def test_calibration_refuses_what_cannot_be_read(answerer: QuestionAnswerer) -> None:
    with pytest.raises(ValueError, match=r"question long: .*take it out of the file"):
        calibrate(PreparedQuestions(answerer, [*QUESTIONS, TOO_LONG]), [SCHEDULE])


@pytest.mark.parametrize("schedule", [SCHEDULE, POLICY], ids=["ratios", "top-p"])
def test_cascade_is_measured_as_executed(answerer: QuestionAnswerer, schedule: Policy) -> None:
    full, first = answers(answerer, None), answers(answerer, schedule)
    middle = sorted(one.score for one in first)[6]
    cascade = Cascade(schedule, middle, 0.8, 0.5)
    found = measure(answerer, [*QUESTIONS, TOO_LONG], cascade)
    again = [one.score <= middle for one in first]
    expected = [other if twice else one for one, other, twice in zip(first, full, again, strict=True)]
    assert found.predictions == {one.id: answer.text for one, answer in zip(QUESTIONS, expected, strict=True)}
    both = zip(macs(answerer, schedule), macs(answerer, None), again, strict=True)
    work = sorted(one + whole * twice for one, whole, twice in both)
    assert found.cost is not None
    assert found.cost.executed == pytest.approx(sum(work) / 15)
    assert found.cost.executed_p95 == work[math.ceil(0.95 * 15) - 1]
    same = [(one.start, one.end) == (other.start, other.end) for one, other in zip(expected, full, strict=True)]
    assert found.cascading == pytest.approx((sum(again) / 15, sum(same) / 15))
    assert list(found.unreadable) == ["long"]


def test_cascade_of_the_full_model_costs_what_that_does(answerer: QuestionAnswerer) -> None:
    plain, found = measure(answerer, QUESTIONS), measure(answerer, QUESTIONS, Cascade(None, 0.0, 1, 1.0))
    assert (found.predictions, found.cost, found.cascading) == (plain.predictions, plain.cost, (0, 1))
    assert plain.cascading is None
    unread = measure(answerer, [replace(TOO_LONG)], Cascade(SCHEDULE, 0.5, 0.8, 0.5))
    assert (unread.cost, unread.cascading) == (None, None)
