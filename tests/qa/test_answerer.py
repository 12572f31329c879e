"""The answerer: one question or any number, on a tiny model, and on one that knows a single word."""

import itertools
import math
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from dtbert import BertForQuestionAnswering, LengthSchedule, save_model
from dtbert.model import PackedBatch, SpanLogits
from dtbert.qa import Answer, PairError, QuestionAnswerer, load_tokenizer, reading
from dtbert.qa.answerer import BUFFER_CHARACTERS_PER_TOKEN
from dtbert.weights import resolve_source
from tests.qa.conftest import make_model

NEEDLE = "treasure"  # a token of its own
QUESTION = "Who wrote the letter?"
LETTER = "The letter was written by Ada Lovelace in 1843, and Charles Babbage answered it."


def make_pairs(count: int) -> Iterator[tuple[str, str]]:
    """Questions with contexts of many lengths, some of several windows."""
    for i in range(count):
        yield f"What came after word {i}?", " ".join(f"word{j}" for j in range(i, i + 1 + (37 * i) % 150))


def count_batches(answerer: QuestionAnswerer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each batch that the model gets from now on."""
    sizes: list[int] = []
    forward = answerer.model.forward_packed

    def counting(batch: PackedBatch, schedule: LengthSchedule | None = None) -> SpanLogits:
        sizes.append(batch.packing.num_tokens)
        return forward(batch, schedule)

    monkeypatch.setattr(answerer.model, "forward_packed", counting)
    return sizes


@pytest.fixture
def finder(make_answerer: Callable[..., QuestionAnswerer], monkeypatch: pytest.MonkeyPatch) -> QuestionAnswerer:
    """An answerer whose model is sure of the needle and of nothing else."""
    answerer = make_answerer()
    needle = tokenizer_ids(answerer.tokenizer, NEEDLE)[0]

    def forward(batch: PackedBatch, schedule: LengthSchedule | None = None) -> SpanLogits:
        logits = torch.where(batch.input_ids == needle, 20.0, 0.0)
        return SpanLogits(logits, logits)

    monkeypatch.setattr(answerer.model, "forward_packed", forward)
    return answerer


def tokenizer_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def test_shipped_model_answers_a_question() -> None:
    qa = QuestionAnswerer.load()
    answer, second = qa.top(QUESTION, LETTER, 2)
    assert qa(QUESTION, LETTER) == answer
    assert answer.text == "Ada Lovelace"
    assert LETTER[answer.start : answer.end] == answer.text
    assert 0.4 < answer.score < 1
    assert answer.score > 1.3 * second.score


TEXTS = st.text(st.one_of(st.sampled_from("ab z.\u0301é한İ\0\u200b😀"), st.characters(exclude_categories=["Cs"])))


def error_of(function: Callable[[str, str], object], question: str, context: str) -> str | None:
    try:
        function(question, context)
    except ValueError as error:
        return str(error)
    return None


@given(question=TEXTS, context=TEXTS)
@example(question="Why\0?", context="\u200b" * 300 + "word")
@example(question="Why?", context="\u200b" * 300)
@example(question="\u200b", context="word")
def test_any_two_texts_have_an_answer_or_an_error(answerer: QuestionAnswerer, question: str, context: str) -> None:
    refused = error_of(answerer.windows, question, context)
    assert error_of(answerer, question, context) == refused
    if refused is None:
        answer = answerer(question, context)
        assert 0 <= answer.start < answer.end <= len(context)
        assert answer.text == context[answer.start : answer.end]
        assert 0 < answer.score <= 1


def test_answer_is_found_in_a_megabyte_of_text(finder: QuestionAnswerer) -> None:
    words = ["naïve 한국 word, 😀 "] * 60_000
    words[45_678] = f"It is {NEEDLE}\u0301! "
    context = "".join(words)
    assert len(context.encode()) > 10**6
    answer = finder("Where?", context)
    assert answer.text == f"{NEEDLE}\u0301"
    assert answer.start == context.index(NEEDLE)


def test_batches_stay_within_their_budget_however_long_the_context(
    make_answerer: Callable[..., QuestionAnswerer], monkeypatch: pytest.MonkeyPatch
) -> None:
    answerer = make_answerer(window=64, stride=16, batch_tokens=640)
    sizes = count_batches(answerer, monkeypatch)
    answerer("Where?", "some words " * 3000)
    windows = answerer.windows("Where?", "some words " * 3000)
    assert sum(sizes) == sum(len(window.input_ids) for window in windows)
    assert max(sizes) <= 640
    assert len(sizes) == -(-len(windows) // 10)


def test_top_answers_are_distinct_and_best_first(finder: QuestionAnswerer) -> None:
    context = f"{NEEDLE} one {NEEDLE} two."
    answers = finder.top("Where?", context, 4, overlap=True)
    assert [answer.text for answer in answers] == [
        f"{NEEDLE}",
        f"{NEEDLE} one {NEEDLE}",
        f"{NEEDLE} one",
        f"{NEEDLE} one {NEEDLE} two",
    ]
    assert answers[0].start == 0
    assert [answer.score for answer in answers] == sorted((answer.score for answer in answers), reverse=True)
    assert finder("Where?", context, overlap=True) == answers[0]
    # No answer has a word of a better one, nor of its like elsewhere.
    assert [answer.text for answer in finder.top("Where?", context, 4)] == [NEEDLE, "one", "two", "."]


def test_answers_begin_and_end_at_the_edges_of_words(
    make_answerer: Callable[..., QuestionAnswerer], tokenizer: Tokenizer
) -> None:
    context = "Zxqvlkj sailed, and unhappily Qwrtzpy's xylographers' ship sank."
    pieces = [token for token in tokenizer.encode(context, add_special_tokens=False).tokens if token.startswith("##")]
    assert len(pieces) > 8
    edges = {edge for word in re.finditer(r"\w+|[^\w\s]", context) for edge in word.span()}
    for answerer in (make_answerer(), make_answerer(window=20, stride=7)):
        answers = answerer.top("What?", context, 1000, overlap=True)
        assert len(answers) > 30
        assert {place for answer in answers for place in (answer.start, answer.end)} <= edges


@pytest.mark.parametrize("options", [{"max_answer_tokens": 2}, {"window": 7, "stride": 0}], ids=["longest", "window"])
def test_word_too_long_for_an_answer_still_has_one(
    make_answerer: Callable[..., QuestionAnswerer], options: dict[str, int]
) -> None:
    context = "Zxqvlkjqwrtzpy" * 3
    answer, *_ = make_answerer(**options).top("Q?", context, 3)
    assert answer.text
    assert context[answer.start : answer.end] == answer.text


KEYS = {"where": f"The {NEEDLE} is here.", "b": "Nothing is here.", "c": "Nor here, or here."}


def test_best_answers_of_documents_are_the_best_of_their_own_answers(finder: QuestionAnswerer) -> None:
    expected = sorted(
        ((name, answer) for name, text in KEYS.items() for answer in finder.top("Where?", text, 9)),
        key=lambda one: -one[1].margin,
    )
    for documents in (KEYS, KEYS.items(), iter([[name, text] for name, text in KEYS.items()])):
        found = finder.answer_documents("Where?", documents, 5)
        assert [(name, answer[:3], answer.margin) for name, answer in found] == [
            (name, answer[:3], answer.margin) for name, answer in expected[:5]
        ]
    assert found[0][:1] + found[0].answer[:1] == ("where", NEEDLE)
    assert [one.document for one in finder.answer_documents("Where?", list(KEYS.values()))] == [0]


def test_scores_of_documents_are_probabilities_among_the_spans_of_all(answerer: QuestionAnswerer) -> None:
    documents = {"a": "one two", "b": "three", "c": "one two three"}
    found = answerer.answer_documents("Which?", documents, 100, overlap=True, no_answer=True)
    assert len(found) == 3 + 1 + 6 + 1
    assert sum(answer.score for _, answer in found) == pytest.approx(1, abs=1e-5)
    (nothing,) = (one for one in found if one.document is None)
    assert nothing.answer[:3] == ("", 0, 0)
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
        ({"colour": 2}, TypeError, "no option 'colour': there are budget, no_answer, overlap, schedule, threshold"),
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


def test_top_gives_fewer_answers_where_there_are_no_more(answerer: QuestionAnswerer) -> None:
    answers = answerer.top(QUESTION, "one two", 10, no_answer=True, overlap=True)
    assert sorted(answer.text for answer in answers) == ["", "one", "one two", "two"]
    assert sum(answer.score for answer in answers) == pytest.approx(1, abs=1e-5)
    assert sorted(answer.text for answer in answerer.top(QUESTION, "one two", 10)) in (["one", "two"], ["one two"])


def test_answers_are_at_most_as_long_as_asked(make_answerer: Callable[..., QuestionAnswerer]) -> None:
    answers = make_answerer(max_answer_tokens=2).top(QUESTION, "a b c d", 100, overlap=True)
    assert sorted(answer.text for answer in answers) == ["a", "a b", "b", "b c", "c", "c d", "d"]


def same(got: list[Answer], expected: list[Answer]) -> None:
    assert [answer[:3] for answer in got] == [answer[:3] for answer in expected]
    assert [answer.score for answer in got] == pytest.approx([answer.score for answer in expected], rel=1e-3)


@pytest.mark.parametrize("schedule", [None, LengthSchedule.ratios([0.9, 0.4])], ids=["all", "dropping"])
def test_answer_many_gives_the_answers_of_single_calls_in_order(
    make_answerer: Callable[..., QuestionAnswerer], schedule: LengthSchedule | None
) -> None:
    # A budget so small that the pairs take several buffers.
    answerer = make_answerer(window=60, stride=20, batch_tokens=100)
    pairs = list(make_pairs(30))
    assert sum(len(question + context) for question, context in pairs) > 2 * BUFFER_CHARACTERS_PER_TOKEN * 100
    expected = [answerer(question, context, schedule=schedule) for question, context in pairs]
    same(list(answerer.answer_many(iter(pairs), schedule=schedule)), expected)
    top = list(answerer.answer_many(pairs, schedule=schedule, top_k=3))
    same([answers[0] for answers in top], expected)
    words = [context.split() for _, context in pairs]
    assert all(len(answers) <= 3 for answers in top)
    assert all(len(answers) == 3 for answers, context in zip(top, words, strict=True) if len(context) > 90)


def test_answer_many_of_nothing_is_nothing(answerer: QuestionAnswerer) -> None:
    assert list(answerer.answer_many([])) == []


def test_answer_many_reads_an_endless_iterable_a_bounded_way_ahead(
    make_answerer: Callable[..., QuestionAnswerer],
) -> None:
    answerer = make_answerer(batch_tokens=384)
    read = 0

    def endless() -> Iterator[tuple[str, str]]:
        nonlocal read
        while True:
            read += 1
            yield QUESTION, LETTER

    answers = answerer.answer_many(endless())
    assert read == 0
    same(list(itertools.islice(answers, 5)), [answerer(QUESTION, LETTER)] * 5)
    assert 5 <= read <= 1 + BUFFER_CHARACTERS_PER_TOKEN * 384 // len(QUESTION + LETTER)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ((QUESTION, " "), ValueError, "pair 3: the context is blank"),
        ((QUESTION, "\u200b"), ValueError, "pair 3: the context has only"),
        (("why " * 400, LETTER), ValueError, "pair 3: the question has 400 tokens"),
        (("a\ud800", LETTER), ValueError, "pair 3: the question .* lone surrogate"),
        ((QUESTION, 7), TypeError, "pair 3: the context .* not int"),
        ("ab", TypeError, r"pair 3: .*\(question, context\), got str 'ab'"),
        ((QUESTION, LETTER, "more"), TypeError, "pair 3: .*got tuple"),
    ],
)
def test_answer_many_names_a_wrong_pair_when_the_answers_before_it_are_out(
    answerer: QuestionAnswerer, bad: tuple[str, str], error: type[Exception], message: str
) -> None:
    pairs = [(QUESTION, LETTER)] * 3 + [bad] + [(QUESTION, "")]
    answers = answerer.answer_many(pairs)
    same(list(itertools.islice(answers, 3)), [answerer(QUESTION, LETTER)] * 3)
    with pytest.raises(error, match=message):
        next(answers)


WRONG: list[tuple[object, type[Exception], str]] = [
    ((QUESTION, " "), ValueError, "the context is blank"),
    ((QUESTION, "\u200b"), ValueError, "the context has only"),
    (("why " * 400, LETTER), ValueError, "the question has 400 tokens"),
    (("a\ud800", LETTER), ValueError, "the question holds a lone surrogate"),
    ((QUESTION, 7), TypeError, "the context must be a string"),
    ("ab", TypeError, "expected (question, context), got str 'ab'"),
]


@pytest.mark.parametrize("top_k", [1, 3])
@given(wrong=st.lists(st.none() | st.integers(0, len(WRONG) - 1), max_size=8))
@example(wrong=[0, 1, 2, 3, 4, 5])
@example(wrong=[2, None, 0, 1, None, 4])
def test_answer_many_may_give_errors_in_the_place_of_answers(
    answerer: QuestionAnswerer, top_k: int, wrong: list[int | None]
) -> None:
    pairs: list[Any] = [(QUESTION, f"{i} {LETTER}") if kind is None else WRONG[kind][0] for i, kind in enumerate(wrong)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "BUFFER_PAIRS", 3)
        found: list[Any] = list(answerer.answer_many(iter(pairs), top_k=top_k, errors="yield"))
    assert len(found) == len(pairs)
    for pair, kind, one in zip(pairs, wrong, found, strict=True):
        if kind is None:
            same([one] if top_k == 1 else one, answerer.top(*pair, top_k))
        else:
            _, error, message = WRONG[kind]
            assert type(one) is error
            assert isinstance(one, PairError)
            assert str(one).startswith(message)


def test_answer_many_goes_on_after_more_errors_than_it_reads_ahead(
    answerer: QuestionAnswerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "BUFFER_PAIRS", 2)
    *errors, last = answerer.answer_many([("", LETTER)] * 7 + [(QUESTION, LETTER)], errors="yield")
    assert [str(error).partition(":")[0] for error in errors] == ["the question is empty"] * 7
    assert last == answerer(QUESTION, LETTER)
    # Without answers before it, and far from the beginning, the number is the pair's own.
    answers = answerer.answer_many([(QUESTION, LETTER)] * 5 + [("", LETTER)])
    with pytest.raises(ValueError, match=r"^pair 5: the question"):
        list(answers)


@pytest.mark.parametrize("errors", ["raise", "yield"])
@pytest.mark.parametrize("error", [RuntimeError, ValueError])
def test_answer_many_passes_on_the_iterables_own_error_after_the_answers_before_it(
    answerer: QuestionAnswerer, errors: Any, error: type[Exception]
) -> None:
    def broken() -> Iterator[tuple[str, str]]:
        yield QUESTION, LETTER
        raise error("the disk is gone")

    answers = answerer.answer_many(broken(), errors=errors)
    assert next(answers) == answerer(QUESTION, LETTER)
    with pytest.raises(error, match=r"^the disk is gone"):
        next(answers)


def test_answer_many_says_at_once_what_errors_may_be(answerer: QuestionAnswerer) -> None:
    with pytest.raises(ValueError, match="errors must be 'raise' or 'yield', not 'ignore'"):
        answerer.answer_many([], errors="ignore")  # type: ignore[call-overload]


def test_several_threads_get_the_answers_of_one(make_answerer: Callable[..., QuestionAnswerer]) -> None:
    answerer = make_answerer(window=100, stride=40, batch_tokens=300)
    pairs = list(make_pairs(12))
    schedule = LengthSchedule.ratios([0.9, 0.4])
    expected = list(answerer.answer_many(pairs)), list(answerer.answer_many(pairs, schedule=schedule))

    def work(number: int) -> list[Answer]:
        return list(answerer.answer_many(pairs, schedule=schedule if number % 2 else None))

    with ThreadPoolExecutor(4) as pool:
        for number, answers in enumerate(pool.map(work, range(8))):
            same(answers, expected[number % 2])


@pytest.mark.parametrize(
    ("schedule", "error", "message"),
    [
        (LengthSchedule.ratios([0.5]), ValueError, "1 entries, the model 2 layers"),
        ([0.5, 0.5], TypeError, "LengthSchedule, not list"),
    ],
)
def test_schedule_is_checked_before_anything_is_read(
    answerer: QuestionAnswerer, schedule: LengthSchedule, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        answerer(QUESTION, LETTER, schedule=schedule)
    with pytest.raises(error, match=message):
        answerer.answer_many(iter(()), schedule=schedule)


@pytest.mark.parametrize(
    ("k", "error"), [(0, ValueError), (-1, ValueError), (1.0, TypeError), (True, TypeError), (None, TypeError)]
)
def test_number_of_answers_is_checked(answerer: QuestionAnswerer, k: int, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^k must .* not {k}"):
        answerer.top(QUESTION, LETTER, k)
    with pytest.raises(error, match=rf"^top_k must .* not {k}"):
        answerer.answer_many([], top_k=k)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"window": 600}, ValueError, "600 tokens .* 512"),
        ({"stride": 400}, ValueError, "stride is 400"),
        ({"max_answer_tokens": 0}, ValueError, "^max_answer_tokens .* 1, not 0"),
        ({"max_answer_tokens": "30"}, TypeError, "^max_answer_tokens .* whole number, not '30'"),
        ({"batch_tokens": 100}, ValueError, "^batch_tokens .* 384, not 100"),
    ],
)
def test_options_are_checked(
    make_answerer: Callable[..., QuestionAnswerer],
    options: dict[str, int],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        make_answerer(**options)


def test_model_and_tokenizer_must_fit_each_other(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="not of the same model"):
        QuestionAnswerer(make_model(vocab_size=1000), tokenizer)
    with pytest.raises(TypeError, match="BertForQuestionAnswering, not str"):
        QuestionAnswerer("minilm", tokenizer)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"tokenizer .* not str"):
        QuestionAnswerer(make_model(), "minilm")  # type: ignore[arg-type]


def test_nul_and_control_characters_are_skipped_and_counted(finder: QuestionAnswerer) -> None:
    context = f"a\0b \x1b[1m {NEEDLE}\x07 end"
    answer = finder("Where\0?", context)
    assert (answer.text, answer.start) == (NEEDLE, context.index(NEEDLE))


def test_damaged_weights_are_an_error(make_answerer: Callable[..., QuestionAnswerer]) -> None:
    answerer = make_answerer()
    with torch.no_grad():
        answerer.model.span.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN or infinite"):
        answerer(QUESTION, LETTER)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of the tiny model, with its tokenizer."""
    model = BertForQuestionAnswering(make_model().config)
    model.reset_parameters()
    save_model(model, tmp_path)
    shutil.copy(resolve_source(None) / "tokenizer.json", tmp_path)
    return tmp_path


def test_load_takes_a_folder_or_a_file_in_it(folder: Path) -> None:
    options = {"window": 200, "stride": 50, "max_answer_tokens": 7, "batch_tokens": 1000}
    loaded = QuestionAnswerer.load(folder, **options)
    assert {name: getattr(loaded, name) for name in options} == options
    assert loaded.config == loaded.model.config
    assert loaded(QUESTION, LETTER) == QuestionAnswerer.load(str(folder / "model.safetensors"), **options)(
        QUESTION, LETTER
    )


def test_load_without_a_tokenizer_names_what_is_missing(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json nor vocab\.txt"):
        QuestionAnswerer.load(folder)


def test_default_budget_of_a_cpu_holds_a_window(answerer: QuestionAnswerer) -> None:
    assert answerer.window <= answerer.batch_tokens == 2048
    assert load_tokenizer(resolve_source(None)).get_vocab_size() == answerer.config.vocab_size
