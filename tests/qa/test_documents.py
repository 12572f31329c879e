"""One question, many documents: the best answers of all, their names, and what is said of documents without words."""

import math

import pytest

from dtbert.qa import Answer, QuestionAnswerer, reading
from tests.qa.conftest import NEEDLE

KEYS = {"where": f"The {NEEDLE} is here.", "b": "Nothing is here.", "c": "Nor here, or here."}


def test_best_answers_of_documents_are_the_best_of_their_own_answers(finder: QuestionAnswerer) -> None:
    expected = sorted(
        ((name, answer) for name, text in KEYS.items() for answer in finder.top("Where?", text, 9)),
        key=lambda one: -one[1].margin,
    )
    for documents in (KEYS, KEYS.items(), iter([[name, text] for name, text in KEYS.items()])):
        found = finder.answer_documents("Where?", documents, 5)
        assert [(name, tuple(answer)[:3], answer.margin) for name, answer in found] == [
            (name, tuple(answer)[:3], answer.margin) for name, answer in expected[:5]
        ]
    assert (found[0].document, found[0].answer.text) == ("where", NEEDLE)
    assert [one.document for one in finder.answer_documents("Where?", list(KEYS.values()))] == [0]


def test_scores_of_documents_are_probabilities_among_the_spans_of_all(answerer: QuestionAnswerer) -> None:
    documents = {"a": "one two", "b": "three", "c": "one two three"}
    found = answerer.answer_documents("Which?", documents, 100, overlap=True, no_answer=True)
    assert len(found) == 3 + 1 + 6 + 1
    assert sum(answer.score for _, answer in found) == pytest.approx(1, abs=1e-5)
    (nothing,) = (one for one in found if one.document is None)
    assert tuple(nothing.answer)[:3] == ("", 0, 0)
    odds = [math.exp(answer.margin) * nothing.answer.score for _, answer in found]
    assert [answer.score for _, answer in found] == pytest.approx(odds, rel=1e-5)
    assert answerer.answer_documents("Which?", documents, no_answer=True, threshold=1e9)[0] == nothing


def test_documents_are_read_in_bounded_memory(finder: QuestionAnswerer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BUFFER_PAIRS", 7)
    documents = ((number, f"It is {NEEDLE if number == 61 else 'elsewhere'}.") for number in range(100))
    ((name, answer),) = finder.answer_documents("Where?", documents)
    assert (name, answer.text) == (61, NEEDLE)


def test_documents_without_words_are_named_or_skipped(finder: QuestionAnswerer) -> None:
    documents = {"blank": " ", "good": NEEDLE, "nul": "\0"}
    with pytest.raises(ValueError, match="document 'blank': the context is blank"):
        finder.answer_documents("Where?", documents)
    assert [one.document for one in finder.answer_documents("Where?", documents, 3, errors="skip")] == ["good"]
    assert finder.answer_documents("Where?", [], no_answer=True)[0].answer == Answer("", 0, 0, 1.0, 0.0)
    assert finder.answer_documents("Where?", []) == []
    with pytest.raises(ValueError, match="the question is empty"):
        finder.answer_documents("", documents, errors="skip")
    with pytest.raises(ValueError, match="question has 400 tokens"):
        finder.answer_documents("why " * 400, documents, errors="skip")
    with pytest.raises(TypeError, match="documents is one text"):
        finder.answer_documents("Where?", "the text")
    with pytest.raises(TypeError, match=r"document 1 must be a text or \(name, text\), not int"):
        finder.answer_documents("Where?", ["a", 7])  # type: ignore[list-item]
