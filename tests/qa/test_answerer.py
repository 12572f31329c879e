"""The answerer: one question or any number, on a tiny model, and on one that knows a single word."""

import itertools
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from dtbert import BertForQuestionAnswering, LengthSchedule, save_model
from dtbert.model import PackedBatch, SpanLogits
from dtbert.qa import Answer, PairError, QuestionAnswerer, load_tokenizer, reading
from dtbert.qa.reading import BUFFER_CHARACTERS_PER_TOKEN
from dtbert.weights import resolve_source
from tests.qa.conftest import LETTER, NEEDLE, QUESTION, make_model, same


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


def test_top_gives_fewer_answers_where_there_are_no_more(answerer: QuestionAnswerer) -> None:
    answers = answerer.top(QUESTION, "one two", 10, no_answer=True, overlap=True)
    assert sorted(answer.text for answer in answers) == ["", "one", "one two", "two"]
    assert sum(answer.score for answer in answers) == pytest.approx(1, abs=1e-5)
    assert sorted(answer.text for answer in answerer.top(QUESTION, "one two", 10)) in (["one", "two"], ["one two"])


def test_answers_are_at_most_as_long_as_asked(make_answerer: Callable[..., QuestionAnswerer]) -> None:
    answers = make_answerer(max_answer_tokens=2).top(QUESTION, "a b c d", 100, overlap=True)
    assert sorted(answer.text for answer in answers) == ["a", "a b", "b", "b c", "c", "c d", "d"]


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
