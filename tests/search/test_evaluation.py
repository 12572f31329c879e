"""What a schedule is worth: scores, multiply-accumulates and time of a tiny model's answers."""

import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dtbert.evaluation import GoldAnswer, PreparedQuestions, PreparedTexts, SquadQuestion, score_prediction
from dtbert.evaluation.work import answered
from dtbert.model import LengthSchedule, Macs, TopP
from dtbert.qa import QuestionAnswerer, load_tokenizer
from dtbert.search import QuestionEvaluator, TextEvaluator
from dtbert.text import TextClassifier
from dtbert.weights import resolve_source
from tests.qa.conftest import make_model
from tests.text.conftest import write_classifier
from tests.training.test_texts import made_up

TEXT = "The letter was written by Ada Lovelace in London, in 1843, and answered from Paris. "
SCHEDULES = [
    None,
    LengthSchedule.ratios([0.6, 0.3], scorer="from_question"),
    LengthSchedule.ratios([0.6, 0.3], scorer="answer_overlap", keep_question=True),
]


def question(number: int, asked: str, times: int, answer: str) -> SquadQuestion:
    context = TEXT * times
    return SquadQuestion(str(number), "t", asked, context, (GoldAnswer(answer, context.index(answer)),))


QUESTIONS = [
    question(0, "Who wrote the letter?", 1, "Ada Lovelace"),
    question(1, "In which year was that letter of hers written in London?", 9, "1843"),  # of two windows
    question(2, "Where from?", 2, "Paris"),
]


@pytest.fixture(scope="module")
def answerer() -> QuestionAnswerer:
    return QuestionAnswerer(make_model(), load_tokenizer(resolve_source(None)), window=128, stride=32)


@pytest.fixture
def evaluator(answerer: QuestionAnswerer) -> QuestionEvaluator:
    return QuestionEvaluator(answerer, QUESTIONS)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_macs_are_the_mean_over_questions_of_the_sum_over_their_windows(
    evaluator: QuestionEvaluator, answerer: QuestionAnswerer, schedule: LengthSchedule | None
) -> None:
    published = executed = windows = 0
    for one in QUESTIONS:
        for window in answerer.windows(one.question, one.context):
            everything = schedule or LengthSchedule.ratios([1, 1])
            macs = everything.macs(
                answerer.config, len(window.input_ids), question_length=window.token_type_ids.count(0)
            )
            published, executed, windows = published + macs.published, executed + macs.executed, windows + 1
    assert windows > len(QUESTIONS)
    assert evaluator.macs(schedule) == (round(published / 3), round(executed / 3))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_scores_are_those_of_the_answers_one_by_one(
    evaluator: QuestionEvaluator, answerer: QuestionAnswerer, schedule: LengthSchedule | None
) -> None:
    expected = [
        score_prediction(answerer(one.question, one.context, schedule=schedule).text, [one.answers[0].text])
        for one in QUESTIONS
    ]
    assert evaluator.scores(schedule, 0, 3) == expected
    assert evaluator.scores(schedule, 1, 2) == expected[1:2]


def test_what_the_text_decides_is_counted_as_it_is_answered(
    evaluator: QuestionEvaluator, answerer: QuestionAnswerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, prepared, full = TopP([1, 0.6], scorer="cls"), PreparedQuestions(answerer, QUESTIONS), evaluator.macs(None)
    (first,) = prepared.evaluate_and_count(policy, 0, 1)[1]
    monkeypatch.setattr("dtbert.search.evaluation._COUNTED", 1)
    # Of the first question alone it is told what all would take.
    guess = evaluator.macs(policy).executed
    assert guess == pytest.approx(full.executed * first.executed / prepared.full_work(0, 1), abs=1)
    counts = []
    # Not by its name, which is the function's that the package has of it.
    room = sys.modules["dtbert.evaluation.measure"]
    monkeypatch.setattr(room, "answered", lambda of, part, by: counts.append(len(part)) or answered(of, part, by))
    assert evaluator.scores(policy, 0, 1) + evaluator.scores(policy, 1, 3) == [
        score_prediction(answerer(one.question, one.context, schedule=policy).text, [one.answers[0].text])
        for one in QUESTIONS
    ]
    assert counts == [2]
    cost = prepared.cost(policy)
    assert evaluator.macs(policy) == (round(cost.published), round(cost.executed))
    assert guess != round(cost.executed) < full.executed


def test_latency_is_the_schedules_own_and_the_full_models_beside_it(
    evaluator: QuestionEvaluator, answerer: QuestionAnswerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = LengthSchedule.ratios([1, 0.5]), LengthSchedule.ratios([0.4, 0.3])
    now, calls = 0.0, 0

    def answer(prepared: Any, *, schedule: LengthSchedule | None = None) -> list[Any]:
        nonlocal now, calls
        slowness = (100, 0.5, 1, 1.7)[calls // 3]  # of the rounds, the first of which warms up
        now += 3 * slowness * (2.0 if schedule is None else schedule.length_config[0])  # three questions
        calls += 1
        return []

    monkeypatch.setattr(answerer, "answer_prepared", answer)
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    latencies = evaluator.latencies([first, second])
    assert [latency.seconds for latency in latencies] == pytest.approx([1, 0.4])
    for latency in latencies:
        assert latency.full_model_seconds == pytest.approx(2)
        assert (latency.device, latency.dtype, latency.threads) == ("cpu", "float32", torch.get_num_threads())


def test_questions_that_the_model_cannot_read_are_named(answerer: QuestionAnswerer) -> None:
    with pytest.raises(ValueError, match="no questions"):
        QuestionEvaluator(answerer, [])
    with pytest.raises(ValueError, match="question 7: "):
        QuestionEvaluator(answerer, [question(7, "who " * 200, 1, "Paris")])


def test_labels_are_counted_as_they_are_made_where_the_text_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = TextClassifier.load(write_classifier(tmp_path / "model", ("negative", "positive")))
    texts, policy, work = PreparedTexts(classifier, made_up(12)), TopP([0.6, 1], scorer="cls"), list[Macs]()
    predicted = texts.predict(policy, work=work)
    monkeypatch.setattr("dtbert.search.evaluation._COUNTED", 1)
    evaluator = TextEvaluator(texts)
    full, guess = evaluator.macs(None).executed, evaluator.macs(policy).executed
    # Of the first text alone it is told what all would take.
    assert guess == pytest.approx(full * work[0].executed / texts.full_work(0, 1), abs=1)
    right = [float(one) for one in predicted == texts.gold]
    assert [one.f1 for one in evaluator.scores(policy, 0, 5) + evaluator.scores(policy, 5, 12)] == right
    cost = texts.cost(policy, work)
    assert cost is not None
    assert evaluator.macs(policy) == (round(cost.published), round(cost.executed))
    assert guess != round(cost.executed) < full
    assert texts.full_work() == sum(texts.full_work(number, number + 1) for number in range(12))
