"""The classifier from text to label: against transformers, in batches of any size, and what it refuses."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dtbert import LengthSchedule, Policy, TextClassifier, Threshold
from tests.text.conftest import LABELS, write_classifier
from tests.tolerances import assert_as_right_as_peer
from tests.training.conftest import WORDS


@pytest.fixture(scope="module")
def classify(classifier_folder: Path) -> TextClassifier:
    return TextClassifier.load(classifier_folder)


def some_texts(count: int, longest: int = 40) -> list[str]:
    drawn = random.Random(count)
    return [" ".join(drawn.choices(WORDS, k=drawn.randint(1, longest))) for _ in range(count)]


def by_transformers(folder: Path, texts: list[Any], dtype: torch.dtype) -> torch.Tensor:
    """Scores of texts, or pairs of them, one at a time."""
    model = transformers.BertForSequenceClassification.from_pretrained(folder, dtype=dtype).eval()
    tokenizer = transformers.BertTokenizer.from_pretrained(folder)
    rows = []
    with torch.no_grad():
        for text in texts:
            encoded = tokenizer(*(text if isinstance(text, tuple) else (text,)), return_tensors="pt")
            rows.append(model(**encoded).logits[0])
    logits = torch.stack(rows)
    return logits if model.config.num_labels == 1 else logits.softmax(1)


def test_scores_are_those_of_transformers_for_texts_and_pairs(
    classify: TextClassifier, classifier_folder: Path
) -> None:
    texts: list[Any] = some_texts(6)
    texts += zip(some_texts(5, 20), some_texts(5, 30), strict=True)
    got = list(classify.classify_many(texts))
    assert [one.label for one in got] == [max(one.scores, key=one.scores.__getitem__) for one in got]
    assert all(one.score == one.scores[one.label] for one in got)
    assert all(tuple(one.scores) == LABELS for one in got)
    theirs, exact = (by_transformers(classifier_folder, texts, dtype) for dtype in (torch.float32, torch.float64))
    assert_as_right_as_peer([torch.tensor([list(one.scores.values()) for one in got])], [theirs], [exact])
    assert exact.std(0).max() > 1e-2, "texts differ in their scores"


def test_one_label_is_a_number(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "number", ("similarity",))
    pair = tuple(some_texts(2))
    got = TextClassifier.load(folder)(*pair)
    theirs, exact = (by_transformers(folder, [pair], dtype) for dtype in (torch.float32, torch.float64))
    assert (got.label, got.scores) == ("similarity", {"similarity": got.score})
    assert_as_right_as_peer([torch.tensor([[got.score]])], [theirs], [exact])


@pytest.mark.parametrize(
    "schedule",
    [None, LengthSchedule.ratios([0.7, 0.4], scorer="cls"), Threshold([0.02, 0.05], scorer="cls")],
    ids=["all", "dropping", "threshold"],
)
def test_any_number_in_any_batch_gives_the_labels_of_single_calls(
    classify: TextClassifier, schedule: Policy | None
) -> None:
    texts = some_texts(23)
    single = [classify(text, schedule=schedule) for text in texts]
    small = TextClassifier(classify.model, classify.tokenizer, batch_tokens=64)
    for batched in (classify(texts, schedule=schedule), small(texts, schedule=schedule)):
        assert [one.label for one in batched] == [one.label for one in single]
        assert [one.score for one in batched] == pytest.approx([one.score for one in single], abs=1e-6)
    assert classify([]) == []
    pairs = classify(texts[:3], texts[3:6])
    assert [one.label for one in pairs] == [classify(*both).label for both in zip(texts[:3], texts[3:6], strict=True)]


def test_a_text_that_cannot_be_read_is_an_error_with_its_number_or_in_its_place(classify: TextClassifier) -> None:
    texts: list[Any] = ["bo ba", "", "bo", 3, ("bo", " "), ("a", "b", "c"), "bo " * 63, "bo " * 62, "\u200b"]
    found = list(classify.classify_many(texts, errors="yield"))
    wrong = {number: f"{type(one).__name__}: {one}" for number, one in enumerate(found) if isinstance(one, Exception)}
    assert wrong == {
        1: "ValueError: the text is empty: give it at least one word",
        3: "TypeError: the text must be a string, not int",
        4: "ValueError: the pair is blank: give it at least one word",
        5: "TypeError: expected a text or a pair of two, got 3 in a tuple",
        6: "ValueError: the text has 65 tokens with its special ones, the model reads 64 at most: shorten or split it; "
        "nothing is cut off in silence",
        8: "ValueError: the text has only characters that the tokenizer skips: give it at least one word",
    }
    labels = classify.classify_many(texts)
    assert next(labels) == found[0]
    with pytest.raises(ValueError, match=r"^text 1: the text is empty"):
        next(labels)
    with pytest.raises(ValueError, match=r"^the text is blank"):
        classify("  ")


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("bo", ["ba"]), {}, TypeError, "one text and a list of pairs"),
        ((["bo", "ba"], ["bo"]), {}, ValueError, "2 texts and 1 to pair with them"),
        ((["bo", "ba"], "bo"), {}, ValueError, "2 texts and one to pair with them"),
        (("bo",), {"schedule": [1, 1]}, TypeError, "schedule must be a LengthSchedule, not list"),
        (("bo",), {"schedule": LengthSchedule.ratios([1])}, ValueError, "1 entries, the model 2 layers"),
        (("bo",), {"budget": 0.5}, ValueError, "no schedules.json to choose a schedule from"),
        (("bo",), {"budget": 0.5, "schedule": LengthSchedule.ratios([1, 1])}, ValueError, "exclude each other"),
    ],
)
def test_calls_that_make_no_sense_are_refused(
    classify: TextClassifier, arguments: Any, options: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        classify(*arguments, **options)


def test_what_is_no_classifier_is_refused(classify: TextClassifier, minilm: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the classifier is missing: `dtbert train --task` trains one"):
        TextClassifier.load(minilm)
    with pytest.raises(TypeError, match="must be a BertForSequenceClassification, not str"):
        TextClassifier("model", classify.tokenizer)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_tokens must be at least 64, not 10"):
        TextClassifier(classify.model, classify.tokenizer, batch_tokens=10)
    one_segment = TextClassifier.load(write_classifier(tmp_path / "one", type_vocab_size=1))
    with pytest.raises(ValueError, match="1 segment: it was not trained for pairs"):
        one_segment("bo", "ba")
