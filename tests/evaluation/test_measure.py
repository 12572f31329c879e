"""Predict, score and count, on a tiny model: against the answerer's single calls, the metric and windows by hand."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from dtbert.evaluation import (
    Cost,
    GoldAnswer,
    PreparedQuestions,
    Score,
    SquadQuestion,
    best_threshold,
    check_readable,
    evaluate,
    evenly_spaced,
    measure,
    score_prediction,
)
from dtbert.model import LengthSchedule, PackedBatch, Threshold
from dtbert.qa import QuestionAnswerer, load_tokenizer, reading
from dtbert.weights import resolve_source
from tests.qa.conftest import make_model

CONTEXTS = ["Ada wrote it in London in 1843.", "Zoe said it in Paris. " * 40, "the letter to Ada, " * 120]
DROPPING = LengthSchedule.ratios([0.9, 0.4], scorer="from_question")
SCHEDULES = [None, DROPPING, LengthSchedule.absolute([60, 9], scorer="answer_overlap", keep_question=True)]


def ask(number: int, question: str) -> SquadQuestion:
    context = CONTEXTS[number % 3]
    return SquadQuestion(
        f"q{number}", "t", question, context, (GoldAnswer(context[:3], 0), GoldAnswer(context[4:9], 4))
    )


QUESTIONS = [ask(number, f"who wrote it {'and where ' * number}?") for number in range(9)]
UNREADABLE = [ask(20, "who " * 200), ask(21, " "), ask(22, "\u200b")]


@pytest.fixture(scope="module")
def answerer() -> QuestionAnswerer:
    return QuestionAnswerer(make_model(), load_tokenizer(resolve_source(None)), window=128, stride=32)


@pytest.fixture
def tokenized(answerer: QuestionAnswerer, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that are tokenized from now on, a buffer at a time."""
    texts: list[str] = []

    def tokenize(tokenizer: Tokenizer, more: Sequence[str]) -> Any:
        texts.extend(more)
        return tokenize_texts(tokenizer, more)

    tokenize_texts = reading.tokenize
    monkeypatch.setattr(reading, "tokenize", tokenize)
    return texts


def expected_scores(answerer: QuestionAnswerer, schedule: LengthSchedule | None) -> dict[str, Score]:
    answers = {one.id: answerer(one.question, one.context, schedule=schedule) for one in QUESTIONS}
    return {
        one.id: score_prediction(answers[one.id].text, [answer.text for answer in one.answers]) for one in QUESTIONS
    }


def expected_cost(answerer: QuestionAnswerer, schedule: LengthSchedule | None) -> Cost:
    """Windows by hand: each has room for so many tokens of context, and begins `room - stride` after the last."""
    everything, config = LengthSchedule.ratios([1, 1]), answerer.config
    executed = published = own = padded = windows = tokens = 0
    for one in QUESTIONS:
        head = len(answerer.tokenizer.encode(one.question, add_special_tokens=False).ids) + 2
        tail = len(answerer.tokenizer.encode(one.context, add_special_tokens=False).ids)
        room = answerer.window - head - 1
        begin = 0
        while True:
            length = head + min(room, tail - begin) + 1
            executed += (schedule or everything).macs(config, length, question_length=head).executed
            published += (schedule or everything).macs(config, length).published
            own += everything.macs(config, length).published
            padded += everything.macs(config, answerer.window).published
            windows, tokens = windows + 1, tokens + length
            if begin + room >= tail:
                break
            begin += room - answerer.stride
    assert windows > len(QUESTIONS)
    sums = (executed, published, own, padded, windows)
    return Cost(*(value / len(QUESTIONS) for value in sums), tokens / windows)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_scores_are_the_official_ones_of_the_answers_one_by_one(
    answerer: QuestionAnswerer, schedule: LengthSchedule | None
) -> None:
    expected = expected_scores(answerer, schedule)
    assert len(set(expected.values())) > 1
    prepared = PreparedQuestions(answerer, QUESTIONS)
    assert prepared.evaluate(schedule).per_question == expected
    assert list(prepared.evaluate(schedule, 2, 5).per_question.items()) == list(expected.items())[2:5]
    found = measure(answerer, QUESTIONS, schedule)
    assert found.predictions == prepared.predict(schedule)
    assert list(prepared.predict(schedule, 2, 5).items()) == list(found.predictions.items())[2:5]
    assert found.scores == evaluate(QUESTIONS, found.predictions)
    assert found.scores.per_question == expected
    assert (found.unreadable, found.scores.missing) == ({}, ())
    assert found.questions_per_second > 0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_cost_sums_over_windows_and_averages_over_questions(
    answerer: QuestionAnswerer, schedule: LengthSchedule | None
) -> None:
    expected = expected_cost(answerer, schedule)
    assert PreparedQuestions(answerer, QUESTIONS).cost(schedule) == expected
    assert measure(answerer, QUESTIONS, schedule).cost == expected


def test_cost_of_what_the_text_decides_is_that_of_what_it_kept(answerer: QuestionAnswerer) -> None:
    policy = Threshold([0, 0.02], scorer="cls", keep_question=True)
    executed, published = [], []
    for one in QUESTIONS:
        counts = []
        for window in answerer.windows(one.question, one.context):
            batch = PackedBatch.from_lists([window.input_ids], [window.token_type_ids])
            kept = [layer.lengths[0] for layer in answerer.model.forward_packed(batch, policy, output_kept=True).kept]
            counts.append(
                policy.macs_of_kept(
                    answerer.config, len(window.input_ids), kept, question_length=window.token_type_ids.count(0)
                )
            )
        executed.append(sum(macs.executed for macs in counts))
        published.append(sum(macs.published for macs in counts))
    plain = PreparedQuestions(answerer, QUESTIONS).cost()
    expected = plain._replace(
        executed=sum(executed) / 9, published=sum(published) / 9, executed_p95=float(max(executed))
    )
    assert expected.executed < plain.executed
    questions = [QUESTIONS[0], *UNREADABLE, *QUESTIONS[1:]]
    assert PreparedQuestions(answerer, questions).cost(policy) == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "BUFFER_PAIRS", 2)
        assert measure(answerer, questions, policy).cost == expected
    many = measure(answerer, [QUESTIONS[number // 3] for number in range(24)], policy).cost
    assert many is not None
    # 23 of 24 are the least that are 95%.
    assert many.executed_p95 == sorted(executed[number // 3] for number in range(24))[22]


def test_cost_without_a_schedule_is_the_plain_models(answerer: QuestionAnswerer) -> None:
    prepared = PreparedQuestions(answerer, QUESTIONS)
    plain = prepared.cost()
    assert plain.executed == plain.published == plain.own_length < plain.padded
    assert prepared.cost(LengthSchedule.ratios([1, 1])) == plain
    assert prepared.cost(DROPPING)._replace(executed=0, published=0) == plain._replace(executed=0, published=0)
    assert prepared.cost(DROPPING).executed < plain.executed
    with pytest.raises(ValueError, match="3 entries, the model 2 layers"):
        prepared.cost(LengthSchedule.ratios([1, 1, 1]))


@pytest.mark.parametrize("pairs_at_a_time", [2, 4096])
@settings(max_examples=15)
@given(places=st.lists(st.integers(0, len(QUESTIONS)), min_size=3, max_size=3))
def test_questions_that_cannot_be_read_count_as_wrong_cost_nothing_and_say_why(
    answerer: QuestionAnswerer, pairs_at_a_time: int, places: list[int]
) -> None:
    questions = list(QUESTIONS)
    for place, wrong in zip(places, UNREADABLE, strict=True):
        questions.insert(place, wrong)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "BUFFER_PAIRS", pairs_at_a_time)
        found = measure(answerer, questions, DROPPING)
        prepared = PreparedQuestions(answerer, questions)
    assert found.predictions == prepared.predict(DROPPING) == measure(answerer, QUESTIONS, DROPPING).predictions
    assert list(found.scores.per_question) == [one.id for one in questions]
    assert found.scores.f1 == pytest.approx(evaluate(QUESTIONS, found.predictions).f1 * 9 / 12)
    assert found.unreadable == prepared.unreadable
    assert set(found.scores.missing) == set(found.unreadable) == {"q20", "q21", "q22"}
    assert found.unreadable["q20"].startswith("the question has 200 tokens")
    assert found.unreadable["q21"].startswith("the question is blank")
    assert found.cost == prepared.cost(DROPPING) == expected_cost(answerer, DROPPING)
    with pytest.raises(ValueError, match=r"^question q2\d: the question"):
        check_readable(found.unreadable)


def test_questions_without_an_answer_are_answered_with_nothing_below_the_threshold(answerer: QuestionAnswerer) -> None:
    questions = [*QUESTIONS, *(replace(one, id=f"n{one.id}", answers=()) for one in QUESTIONS)]
    margins = {one.id: answerer(one.question, one.context).margin for one in questions}
    middle = sorted(margins.values())[len(margins) // 2]
    found = measure(answerer, questions, threshold=middle)
    assert found.margins == pytest.approx(margins, abs=1e-4)
    empty = {one for one, text in found.predictions.items() if not text}
    assert empty == {one for one, margin in found.margins.items() if margin < middle}
    assert 0 < len(empty) < len(questions)
    assert found.scores == evaluate(questions, found.predictions)
    always = measure(answerer, questions, no_answer=False)
    assert (always.best, "" in always.predictions.values()) == ({}, False)
    assert found.best["f1"] == best_threshold(questions, always.predictions, found.margins)
    assert found.best["exact_match"] == best_threshold(questions, always.predictions, found.margins, "exact_match")
    own = {one: "" if margin < answerer.threshold else always.predictions[one] for one, margin in margins.items()}
    assert measure(answerer, questions).predictions == PreparedQuestions(answerer, questions).predict() == own
    # Where each question has an answer, each is answered.
    plain = measure(answerer, QUESTIONS)
    assert (plain.best, "" in plain.predictions.values()) == ({}, False)


def test_questions_none_of_which_can_be_read_have_scores_and_no_cost(answerer: QuestionAnswerer) -> None:
    found = measure(answerer, UNREADABLE)
    assert (found.scores.f1, found.cost, found.questions_per_second) == (0, None, 0)
    assert len(found.unreadable) == 3
    with pytest.raises(ValueError, match="none of the questions"):
        PreparedQuestions(answerer, UNREADABLE).cost()
    with pytest.raises(ValueError, match="nothing to score"):
        measure(answerer, [])


def test_each_text_is_tokenized_once_however_often_it_is_asked_about(
    answerer: QuestionAnswerer, tokenized: list[str]
) -> None:
    texts = [text for one in QUESTIONS for text in (one.question, one.context)]
    measure(answerer, QUESTIONS, DROPPING)
    assert tokenized == texts
    tokenized.clear()
    prepared = PreparedQuestions(answerer, QUESTIONS)
    for schedule in SCHEDULES:
        prepared.evaluate(schedule)
        prepared.cost(schedule)
    assert tokenized == texts


def test_measuring_takes_a_part_at_a_time(
    answerer: QuestionAnswerer, tokenized: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "BUFFER_PAIRS", 4)
    done: list[tuple[int, int]] = []
    measure(answerer, QUESTIONS, on_answers=lambda count: done.append((count, len(tokenized))))
    assert done == [(4, 8), (4, 16), (1, 18)]


def test_evenly_spaced_questions_are_from_all_of_the_file() -> None:
    questions = [ask(number, "") for number in range(10)]
    assert [question.id for question in evenly_spaced(questions, 4)] == ["q0", "q2", "q5", "q7"]
    assert evenly_spaced(questions, 10) == evenly_spaced(questions, 99) == evenly_spaced(questions, None) == questions
