"""The official metric: its published result, its corner cases, and its laws."""

import gzip
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtbert.evaluation import (
    GoldAnswer,
    Score,
    SquadQuestion,
    best_threshold,
    evaluate,
    exact_match,
    f1,
    normalize_answer,
    read_squad,
    score_prediction,
)
from dtbert.evaluation.metric import Measure

WORDS = st.lists(st.sampled_from(["the", "A", "denver", "Denver,", "broncos!", "in", "1995"]), max_size=6).map(" ".join)


def question(identifier: str, *answers: str) -> SquadQuestion:
    return SquadQuestion(identifier, "", "?", "", tuple(GoldAnswer(text, 0) for text in answers))


def test_metric_gives_the_published_scores_for_the_published_predictions(shared_data: Path) -> None:
    questions = read_squad(shared_data / "squad" / "squad-dev-v1.1.json.gz")
    with gzip.open(shared_data / "squad" / "squad-dev-v1.1.bert-ensemble-predictions.json.gz") as file:
        predictions = json.load(file)
    result = evaluate(questions, predictions)
    assert (round(result.exact_match, 3), round(result.f1, 3)) == (86.206, 92.196)
    assert len(result.per_question) == 10570
    assert result.missing == ()


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Denver Broncos", "denver broncos"),
        ("  An  apple\ta\nday ", "apple day"),
        ("U.S.A.", "usa"),
        ("a-b (the) 'c'", "ab c"),
        # Punctuation goes before articles, so that what it joins is a word; other scripts' punctuation stays.
        ("the-end", "theend"),
        ("\N{LEFT DOUBLE QUOTATION MARK}The end", "\N{LEFT DOUBLE QUOTATION MARK} end"),
        ("Beyonc\u00e9's", "beyonc\u00e9s"),
        ("theatre and another", "theatre and another"),
        ("THE", ""),
    ],
)
def test_normalize_answer_drops_case_punctuation_and_articles(text: str, normal: str) -> None:
    assert normalize_answer(text) == normal


@pytest.mark.parametrize(
    ("prediction", "answer", "exact", "overlap"),
    [
        ("The Broncos", "broncos.", 1.0, 1.0),
        ("Denver Broncos", "the Broncos", 0.0, 2 / 3),
        ("one one two", "one two two", 0.0, 2 / 3),  # each word counts as often as both have it
        ("red", "blue", 0.0, 0.0),
        ("", "blue", 0.0, 0.0),
        ("the", "a", 1.0, 0.0),  # equal once normalised, with no word in common: as the official script
    ],
)
def test_scores_of_a_pair_are_the_official_ones(prediction: str, answer: str, exact: float, overlap: float) -> None:
    assert exact_match(prediction, answer) == exact
    assert f1(prediction, answer) == pytest.approx(overlap, abs=1e-12)


def test_score_prediction_takes_the_best_answer_for_each_measure() -> None:
    assert score_prediction("the", ["a", "x"]) == Score(1.0, 0.0)
    assert score_prediction("in Denver", ["Denver", "Broncos"]) == Score(0.0, pytest.approx(2 / 3))


@pytest.mark.parametrize(("prediction", "right"), [("", 1.0), ("the", 1.0), (" - ", 1.0), ("Denver", 0.0)])
def test_where_there_is_no_answer_none_is_right(prediction: str, right: float) -> None:
    assert score_prediction(prediction, []) == Score(right, right)


def test_evaluate_counts_a_missing_prediction_as_zero_and_names_it() -> None:
    questions = [question("a", "x"), question("b", "y z"), question("c", "q")]
    result = evaluate(questions, {"b": "y", "a": "x", "other": "q"})
    assert result.missing == ("c",)
    assert result.exact_match == pytest.approx(100 / 3)
    assert result.f1 == pytest.approx(100 * (1 + 2 / 3) / 3)
    assert list(result.per_question) == ["a", "b", "c"]
    assert result.per_question["c"] == Score(0.0, 0.0)


def test_evaluate_refuses_nothing_to_score() -> None:
    with pytest.raises(ValueError, match="nothing to score"):
        evaluate([], {})


@given(WORDS, WORDS)
def test_f1_is_symmetric_bounded_and_one_for_equal_words(left: str, right: str) -> None:
    assert f1(left, right) == f1(right, left)
    assert 0 <= f1(left, right) <= 1
    if exact_match(left, right) and normalize_answer(left):
        assert f1(left, right) == 1


@given(st.text())
def test_normalize_answer_is_idempotent_where_it_leaves_no_new_article(text: str) -> None:
    once = normalize_answer(text)
    assert once == " ".join(once.split())
    assert exact_match(text, text) == 1


def impossible(identifier: str) -> SquadQuestion:
    return SquadQuestion(identifier, "", "?", "", ())


def test_questions_without_an_answer_are_scored_as_by_the_official_script_of_2_0() -> None:
    questions = [question("a", "x y"), impossible("b"), impossible("c"), question("d", "z"), question("e", "the")]
    result = evaluate(questions, {"a": "x", "b": "", "c": "x", "d": "", "e": ""})
    assert result.has_answer == Score(pytest.approx(100 / 3), pytest.approx(100 * (2 / 3 + 1) / 3))
    assert result.no_answer == Score(50.0, 50.0)
    assert (result.exact_match, result.f1) == (40.0, pytest.approx(100 * (2 / 3 + 1 + 1) / 5))
    # In a file where each question has an answer nothing changes.
    first = evaluate([question("e", "the")], {"e": ""})
    assert (first.exact_match, first.f1, first.no_answer) == (100.0, 0.0, None)
    assert first.has_answer == Score(100.0, 0.0)


def brute_force_threshold(
    questions: list[SquadQuestion], spans: dict[str, str], margins: dict[str, float], measure: str
) -> float:
    tried = [-99.0, 99.0, *margins.values()]
    answers = [{one: "" if margins[one] < threshold else text for one, text in spans.items()} for threshold in tried]
    return max(getattr(evaluate(questions, one), measure) for one in answers)


@given(st.lists(st.tuples(st.booleans(), WORDS, WORDS, st.integers(-3, 3)), min_size=1, max_size=8))
@pytest.mark.parametrize("measure", ["exact_match", "f1"])
def test_best_threshold_is_the_best_of_all(measure: Measure, drawn: list[tuple[bool, str, str, int]]) -> None:
    numbered = list(enumerate(drawn))
    questions = [impossible(str(i)) if none else question(str(i), answer) for i, (none, answer, _, _) in numbered]
    spans = {str(i): span + " x" for i, (_, _, span, _) in numbered}
    margins = {str(i): float(margin) for i, (_, _, _, margin) in numbered}
    best = best_threshold(questions, spans, margins, measure)
    assert best.score == pytest.approx(brute_force_threshold(questions, spans, margins, measure))
    chosen = {one: "" if margins[one] < best.threshold else text for one, text in spans.items()}
    # Without predictions a question scores nothing, with an empty one as it deserves.
    assert getattr(evaluate(questions, chosen), measure) == pytest.approx(best.score)
    assert math.isfinite(best.threshold)


def test_best_threshold_without_questions_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to score"):
        best_threshold([], {}, {})
    assert best_threshold([impossible("a")], {}, {}) == (100.0, 0.0)
