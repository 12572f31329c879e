"""Spans: the best over all windows, their probability, ties, and distinct texts, against plain loops."""

import json
import math
import pickle
from dataclasses import FrozenInstanceError, asdict, replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from torch import Tensor

from dtbert.qa import DocumentAnswer
from dtbert.qa.spans import NOTHING, Answer, BestAnswers, Found, WindowSpans, ranked, with_nothing
from dtbert.qa.tokenize import BEGINS, ENDS, Tokens
from dtbert.qa.windows import Example, Part, SpanPlaces, parts_of, span_places

CPU = torch.device("cpu")


class Batch(NamedTuple):
    start: Tensor
    end: Tensor
    places: SpanPlaces


# Whole numbers, so that sums are exact and ties are many.
LOGITS = st.integers(-3, 3)


@st.composite
def packed_logits(draw: st.DrawFn) -> Batch:
    counts = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    before = draw(st.lists(st.integers(1, 4), min_size=len(counts), max_size=len(counts)))
    cls, tokens = [], 0
    for skipped, count in zip(before, counts, strict=True):
        cls.append(tokens)
        tokens += skipped + count + 1
    start, end = (torch.tensor(draw(st.lists(LOGITS, min_size=tokens, max_size=tokens))).float() for _ in range(2))
    edges = torch.tensor(draw(st.lists(st.integers(0, 3), min_size=tokens, max_size=tokens)))
    rows = torch.tensor(cls)
    firsts = rows + torch.tensor(before)
    return Batch(start, end, SpanPlaces(rows, firsts, torch.tensor(counts), edges, max(counts)))


def enumerate_spans(batch: Batch, window: int, longest: int) -> list[tuple[float, int, int]]:
    """All spans of a window by two loops, best first, then the earlier start, then the shorter."""
    places = batch.places
    first, count, cls = (int(rows[window]) for rows in (places.firsts, places.counts, places.cls))
    nothing = float(batch.start[cls] + batch.end[cls])
    spans = []
    for i in range(count):
        for j in range(i, min(i + longest, count)):
            edges = int(places.edges[first + i]) & BEGINS and int(places.edges[first + j]) & ENDS
            if edges:
                spans.append((float(batch.start[first + i] + batch.end[first + j]) - nothing, i, j))
    return sorted(spans, key=lambda span: (-span[0], span[1], span[2]))


@given(counts=st.lists(st.integers(1, 200), min_size=2, max_size=5), seed=st.integers(0, 999))
def test_a_window_has_the_same_bits_alone_as_beside_longer_ones(counts: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(2, count + 1, generator=generator) for count in counts]  # [CLS], then the context
    for window in logits:
        window[:, 0] += 4  # so that totals are near 0, where float32 tells the most apart

    def spans_of(windows: list[Tensor]) -> WindowSpans:
        lengths = torch.tensor([window.shape[1] for window in windows])
        cls, edges = lengths.cumsum(0) - lengths, torch.full((int(lengths.sum()),), BEGINS + ENDS)
        places = SpanPlaces(cls, cls + 1, lengths - 1, edges, int(lengths.max()) - 1)
        start, end = torch.cat(windows, 1)
        return WindowSpans(start, end, places, 30)

    together = spans_of(logits)
    for number, window in enumerate(logits):
        alone = spans_of([window])
        assert together.best[number] == alone.best[0]
        assert together.log_totals[number] == alone.log_totals[0]


@given(batch=packed_logits(), longest=st.integers(1, 15))
def test_spans_of_each_window_are_those_of_a_double_loop(batch: Batch, longest: int) -> None:
    spans = WindowSpans(*batch, longest)
    for window, count in enumerate(batch.places.counts.tolist()):
        expected = enumerate_spans(batch, window, longest)
        margins = spans.margins(window, count)
        found = [(float(margins[i, more]), i, i + more) for i, more in np.argwhere(margins > -np.inf).tolist()]
        assert sorted(found, key=lambda span: (-span[0], span[1], span[2])) == expected
        if expected:
            assert tuple(spans.best[window])[:3] == expected[0]
            _, first, last = expected[0]
            mass = math.log(sum(math.exp(margin) for margin, i, j in expected if i <= last and j >= first))
            assert spans.best[window].log_mass == pytest.approx(mass, abs=1e-5)
            total = math.log(sum(math.exp(margin) for margin, _, _ in expected))
            assert spans.log_totals[window] == pytest.approx(total, abs=1e-5)
        else:
            assert spans.best[window].margin == spans.log_totals[window] == -math.inf


def one_window(start: Tensor, end: Tensor) -> SpanPlaces:
    """The places of a window of [CLS] and context alone, each token a word."""
    count = len(start) - 1
    edges = torch.full((count + 1,), BEGINS + ENDS)
    return SpanPlaces(torch.tensor([0]), torch.tensor([1]), torch.tensor([count]), edges, count)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("token", [0, 3], ids=["CLS", "context"])
def test_logits_that_are_not_finite_are_an_error(bad: float, token: int) -> None:
    start = torch.zeros(6)
    start[token] = bad
    with pytest.raises(ValueError, match=r"NaN .* torch\.float32"):
        WindowSpans(start, torch.zeros(6), one_window(start, start), 30)


def test_half_precision_logits_are_added_in_float32() -> None:
    start = torch.tensor([0, 0, 256, 0], dtype=torch.bfloat16)
    end = torch.tensor([0, 0, 1, 0], dtype=torch.bfloat16)
    spans = WindowSpans(start, end, one_window(start, end), 2)
    assert spans.best[0].margin == 257  # in bfloat16 it would be 256


def make_context(words: list[str], edges: list[int] | None = None) -> Tokens:
    """A context of words; edges say which are pieces, that have no space before them."""
    edges = edges or [BEGINS + ENDS] * len(words)
    text, offsets = "", []
    for word, edge in zip(words, edges, strict=True):
        text += " " if text and edge & BEGINS else ""
        offsets.append((len(text), len(text) + len(word)))
        text += word
    ids = np.array([ord(word[0]) for word in words], np.int64)
    return Tokens(text, ids, np.array(offsets, np.int64), np.array(edges, np.int64))


@st.composite
def windowed(draw: st.DrawFn) -> Example:
    words = draw(st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=12))
    begins = [True, *draw(st.lists(st.sampled_from([True, True, False]), min_size=len(words), max_size=len(words)))]
    begins[len(words)] = True
    edges = [BEGINS * begin + ENDS * after for begin, after in zip(begins, begins[1:], strict=False)]
    step, stride = draw(st.integers(1, 5)), draw(st.integers(0, 5))
    context = make_context(words, edges)
    ends = range(step + stride, len(words) + step, step)
    parts = [(max(0, end - step - stride), min(end, len(words))) for end in ends] or [(0, len(words))]
    return Example(make_context(["q"]), context, parts)


def read_windows(
    example: Example, seed: int, longest: int
) -> tuple[list[Part], list[WindowSpans], list[tuple[float, int, int]]]:
    """Each window's spans with random logits; and the margin of every distinct span by plain loops."""
    generator = torch.Generator().manual_seed(seed)
    parts = parts_of(0, example)
    read = []
    margins: dict[tuple[int, int], float] = {}
    for part in parts:
        start, end = (torch.randint(-2, 3, (part.num_tokens,), generator=generator).float() for _ in range(2))
        read.append(WindowSpans(start, end, span_places([example], [part], CPU), longest))
        nothing = float(start[0] + end[0])
        for i in range(part.begin, part.end):
            for j in range(i, min(i + longest, part.end)):
                if example.context.edges[i] & BEGINS and example.context.edges[j] & ENDS:
                    margin = float(start[3 + i - part.begin] + end[3 + j - part.begin]) - nothing
                    margins[i, j] = max(margin, margins.get((i, j), -math.inf))
    return parts, read, sorted((-margin, i, j) for (i, j), margin in margins.items())


@given(
    example=windowed(),
    seed=st.integers(0, 99),
    k=st.integers(1, 12),
    longest=st.integers(1, 4),
    overlap=st.booleans(),
    reverse=st.booleans(),
)
def test_best_answers_are_those_of_all_windows_sorted_at_once(
    example: Example, seed: int, k: int, longest: int, overlap: bool, reverse: bool
) -> None:
    context = example.context
    parts, read, expected = read_windows(example, seed, longest)
    best = BestAnswers(example, k, longest, overlap)
    for part, spans in sorted(zip(parts, read, strict=True), key=lambda one: one[0].begin, reverse=reverse):
        best.add(spans, 0, part)
    total = 1 + sum(math.exp(-negative) for negative, _, _ in expected)
    assert math.exp(with_nothing([best.log_total])) == pytest.approx(total, rel=1e-5)
    everywhere = [context.characters(i, j) for i in range(len(context.ids)) for j in range(i, len(context.ids))]
    answers: list[Answer] = []
    left = expected
    while left:
        negative, first, last = left[0]
        start, end = context.characters(first, last)
        text, tokens = context.text[start:end], context.ids[first : last + 1].tolist()
        sharing = left[:1] if overlap else [one for one in left if one[1] <= last and one[2] >= first]
        score = sum(math.exp(-one) for one, _, _ in sharing) / total
        answers.append(Answer(text, start, end, score, -negative))
        alike = [
            (one, other)
            for one, other in everywhere
            if context.text[one:other] == text and token_ids(context, one, other) == tokens
        ]
        places = {one: context.characters(*one[1:]) for one in left}
        if overlap:
            left = [one for one in left if places[one] not in alike]
        else:
            left = [one for one in left if not touches(places[one], alike)]
    got = best.answers()
    assert [replace(answer, score=0) for answer in got] == [replace(one, score=0) for one in answers[:k]]
    np.testing.assert_allclose([one.score for one in got], [one.score for one in answers[:k]], rtol=1e-5)
    assert best.is_empty == (not expected)


def touches(place: tuple[int, int], others: list[tuple[int, int]]) -> bool:
    return any(place[0] < end and start < place[1] for start, end in others)


def token_ids(context: Tokens, start: int, end: int) -> list[int]:
    inside = (context.offsets[:, 0] >= start) & (context.offsets[:, 1] <= end)
    return [int(one) for one in context.ids[inside]]


def test_sure_answer_in_an_overlap_is_as_sure_as_elsewhere() -> None:
    words = [f"{letter}{number}" for number in range(3) for letter in "abcdefgh"]
    scores = []
    for place in (4, 12):  # read by one window, and by two
        example = Example(make_context(["q"]), make_context(words), [(0, 16), (8, 24)])
        best = BestAnswers(example, 1, 3, False)
        for part in parts_of(0, example):
            logits = torch.zeros(part.num_tokens)
            if part.begin <= place < part.end:
                logits[3 + place - part.begin] = 5.0
            best.add(WindowSpans(logits, logits, span_places([example], [part], CPU), 3), 0, part)
        (answer,) = best.answers()
        assert (answer.text, answer.margin) == (words[place], 10)
        scores.append(answer.score)
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)


def whole(words: list[str], start: Tensor, end: Tensor, k: int, overlap: bool = False) -> BestAnswers:
    """The answers in one window of [CLS] q [SEP] words [SEP], of which logits are given for [CLS] and the words."""
    example = Example(make_context(["q"]), make_context(words), [(0, len(words))])
    (part,) = parts_of(0, example)
    start, end = (torch.cat([one[:1], torch.zeros(2), one[1:], torch.zeros(1)]) for one in (start, end))
    best = BestAnswers(example, k, len(words), overlap)
    best.add(WindowSpans(start, end, span_places([example], [part], CPU), len(words)), 0, part)
    return best


@pytest.mark.parametrize("overlap", [False, True])
def test_scores_of_all_answers_and_of_nothing_add_up_to_one(overlap: bool) -> None:
    count = 9
    torch.manual_seed(1)
    best = whole(
        [f"{chr(97 + i)}{i}" for i in range(count)], torch.randn(count + 1), torch.randn(count + 1), 1000, True
    )
    answers = best.answers(threshold=0.0)
    if overlap:
        assert len(answers) == count * (count + 1) // 2 + 1
    assert sum(answer.score for answer in answers) == pytest.approx(1, abs=1e-5)
    assert all(0 < answer.score <= 1 for answer in answers)


def test_only_span_is_as_likely_as_its_odds_against_nothing() -> None:
    best = whole(["one"], torch.tensor([1.0, 3.5]), torch.tensor([-2.0, -2.5]), 1)
    assert best.answers() == [Answer("one", 0, 3, pytest.approx(math.exp(2) / (1 + math.exp(2)), rel=1e-6), 2.0)]


def test_sure_answer_has_a_score_of_at_most_one() -> None:
    best = whole(["one"], torch.tensor([-3e4, 3.1e4]), torch.tensor([0.0, 0.1]), 1)
    assert best.answers()[0].score == 1


def test_score_does_not_change_with_what_is_added_to_all_logits_of_a_window() -> None:
    start, end = torch.randn(5), torch.randn(5)
    (plain,), (moved,) = (whole(["a", "b", "c", "d"], start + by, end - 2 * by, 1).answers() for by in (0.0, 4.0))
    assert tuple(plain)[:3] == tuple(moved)[:3]
    assert tuple(plain)[3:] == pytest.approx(tuple(moved)[3:], rel=1e-5)


def test_nothing_comes_before_the_first_answer_below_the_threshold() -> None:
    found = [Found(text, 0, 1, margin, margin) for text, margin in (("a", 3.0), ("b", 1.0), ("c", -2.0))]
    assert ranked(found, None) == found
    for threshold, before in ((3.5, 0), (3.0, 1), (0.0, 2), (-2.0, 3)):
        assert ranked(found, threshold) == [*found[:before], NOTHING, *found[before:]]
    best = whole(["one"], torch.tensor([1.0, 3.5]), torch.tensor([-2.0, -2.5]), 1)
    nothing = pytest.approx(1 / (1 + math.exp(2)), rel=1e-6)
    assert best.answers(threshold=2.5) == [Answer("", 0, 0, nothing, 0.0)]
    assert best.answers(threshold=1.5)[0].text == "one"


def test_no_answer_repeats_the_words_around_a_better_ones_like() -> None:
    words = ["ada", "said", "it", "and", "ada", "said", "no"]
    logits = torch.tensor([0.0, 9, 2, 0, 0, 8, 7, 0])
    texts = [answer.text for answer in whole(words, logits, logits, 9).answers()]
    assert texts[0] == "ada"
    assert all("ada" not in text for text in texts[1:])
    assert "ada said" in [answer.text for answer in whole(words, logits, logits, 9, overlap=True).answers()]


def test_answer_is_an_object_that_unpacks() -> None:
    answer = Answer("Zo\u00eb", 3, 6, 0.5, 1.25)
    text, start, end, score, margin = answer
    assert Answer(text, start, end, score, margin) == answer != Answer("Zo\u00eb", 3, 6, 0.5, 1.5)
    assert {answer, Answer(*answer)} == {pickle.loads(pickle.dumps(answer))}
    with pytest.raises(FrozenInstanceError):
        answer.text = "Ada"  # type: ignore[misc]
    of_document = DocumentAnswer("letter", answer)
    document, same = of_document
    assert (document, same) == ("letter", answer)
    fields = {"text": "Zo\u00eb", "start": 3, "end": 6, "score": 0.5, "margin": 1.25}
    for found, expected in ((answer, fields), (of_document, {"document": "letter", "answer": fields})):
        assert json.loads(json.dumps(asdict(found))) == expected
        # As a web handler's result, of a type that is known and of one that is not.
        for kind in (type(found), Any):
            assert json.loads(TypeAdapter(kind).dump_json(found)) == expected
    assert TypeAdapter(Answer).validate_python(fields) == answer
