"""Spans: the best over all windows, their probability, ties, and distinct texts, against plain loops."""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dtbert.qa.spans import Answer, BestAnswers, WindowSpans
from dtbert.qa.tokenize import Tokens


class Batch(NamedTuple):
    start: Tensor
    end: Tensor
    firsts: Tensor
    counts: Tensor


# Whole numbers, so that sums are exact and ties are many.
LOGITS = st.integers(-3, 3)


@st.composite
def packed_logits(draw: st.DrawFn) -> Batch:
    counts = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    before = draw(st.lists(st.integers(0, 4), min_size=len(counts), max_size=len(counts)))
    firsts, tokens = [], 0
    for skipped, count in zip(before, counts, strict=True):
        firsts.append(tokens + skipped)
        tokens += skipped + count + 1
    start, end = (draw(st.lists(LOGITS, min_size=tokens, max_size=tokens)) for _ in range(2))
    return Batch(
        *(torch.tensor(v, dtype=torch.float32) for v in (start, end)), torch.tensor(firsts), torch.tensor(counts)
    )


def enumerate_spans(batch: Batch, window: int, longest: int) -> list[tuple[float, int, int]]:
    """All spans of a window by two loops, best first, then the earlier start, then the shorter."""
    first, count = int(batch.firsts[window]), int(batch.counts[window])
    start, end = (logits[first : first + count].tolist() for logits in (batch.start, batch.end))
    spans = [(start[i] + end[j], i, j) for i in range(count) for j in range(i, min(i + longest, count))]
    return sorted(spans, key=lambda span: (-span[0], span[1], span[2]))


@given(batch=packed_logits(), longest=st.integers(1, 15), depth=st.integers(1, 9))
def test_spans_of_each_window_are_those_of_a_double_loop(batch: Batch, longest: int, depth: int) -> None:
    spans = WindowSpans(*batch, longest, depth)
    for window in range(len(batch.counts)):
        expected = enumerate_spans(batch, window, longest)
        assert [tuple(span) for span in spans.of(window)] == expected[: 1 if depth == 1 else None]
        total = math.log(sum(math.exp(score) for score, _, _ in expected))
        assert spans.log_totals[window] == pytest.approx(total, abs=1e-5)


@given(batch=packed_logits(), longest=st.integers(1, 5))
def test_spans_do_not_depend_on_the_other_windows(batch: Batch, longest: int) -> None:
    together = WindowSpans(*batch, longest, 2)
    for window in range(len(batch.counts)):
        own = slice(window, window + 1)
        alone = WindowSpans(batch.start, batch.end, batch.firsts[own], batch.counts[own], longest, 2)
        assert list(alone.of(0)) == list(together.of(window))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_an_error(bad: float) -> None:
    start = torch.zeros(6)
    start[3] = bad
    with pytest.raises(ValueError, match=r"NaN .* torch\.float32"):
        WindowSpans(start, torch.zeros(6), torch.tensor([1]), torch.tensor([4]), 30, 1)


def test_half_precision_logits_are_added_in_float32() -> None:
    start = torch.tensor([0, 256, 0], dtype=torch.bfloat16)
    end = torch.tensor([0, 1, 0], dtype=torch.bfloat16)
    (span,) = WindowSpans(start, end, torch.tensor([0]), torch.tensor([3]), 2, 1).of(0)
    assert span.score == 257  # in bfloat16 it would be 256


def make_context(words: list[str]) -> Tokens:
    ends = np.cumsum([len(word) + 1 for word in words]) - 1
    starts = ends - [len(word) for word in words]
    return Tokens(" ".join(words), np.zeros(len(words), np.int64), np.stack([starts, ends], 1))


@given(
    words=st.lists(st.sampled_from(["a", "b", "c"]), min_size=2, max_size=10),
    cut=st.floats(0, 1),
    overlap=st.integers(0, 3),
    seed=st.integers(0, 99),
    k=st.integers(1, 12),
    longest=st.integers(1, 4),
    reverse=st.booleans(),
)
def test_best_answers_are_those_of_all_windows_sorted_at_once(
    words: list[str], cut: float, overlap: int, seed: int, k: int, longest: int, reverse: bool
) -> None:
    context = make_context(words)
    middle = 1 + int(cut * (len(words) - 2))
    parts = [(0, min(middle + overlap, len(words))), (middle, len(words))]
    if reverse:
        parts.reverse()
    generator = torch.Generator().manual_seed(seed)
    best, everything = BestAnswers(context, k), []
    for begin, end in parts:
        start, stop = (torch.randint(-2, 3, (end - begin,), generator=generator).float() for _ in range(2))
        batch = Batch(start, stop, torch.tensor([0]), torch.tensor([end - begin]))
        spans = WindowSpans(*batch, longest, 1 if k == 1 else 4 * k)
        best.add(spans.of(0), begin, spans.log_totals[0])
        everything += [(-score, begin + i, begin + j) for score, i, j in enumerate_spans(batch, 0, longest)]
    total = sum(math.exp(-score) for score, _, _ in everything)
    expected: dict[str, Answer] = {}
    for score, first, last in sorted(everything):
        left, right = int(context.offsets[first, 0]), int(context.offsets[last, 1])
        text = context.text[left:right]
        expected.setdefault(text, Answer(text, left, right, math.exp(-score) / total))
    got = best.answers()
    assert [answer[:3] for answer in got] == [answer[:3] for answer in list(expected.values())[:k]]
    np.testing.assert_allclose([a.score for a in got], [a.score for a in list(expected.values())[:k]], rtol=1e-5)


def test_scores_of_all_answers_add_up_to_one() -> None:
    count = 9
    context = make_context([f"w{i}" for i in range(count)])
    torch.manual_seed(1)
    spans = WindowSpans(torch.randn(count), torch.randn(count), torch.tensor([0]), torch.tensor([count]), count, 8)
    best = BestAnswers(context, 1000)
    best.add(spans.of(0), 0, spans.log_totals[0])
    answers = best.answers()
    assert len(answers) == count * (count + 1) // 2
    assert sum(answer.score for answer in answers) == pytest.approx(1, abs=1e-5)
    assert all(0 < answer.score <= 1 for answer in answers)


def test_only_span_has_probability_one() -> None:
    spans = WindowSpans(torch.tensor([7.3]), torch.tensor([-90.1]), torch.tensor([0]), torch.tensor([1]), 30, 1)
    best = BestAnswers(make_context(["one"]), 1)
    best.add(spans.of(0), 0, spans.log_totals[0])
    assert best.answers() == [Answer("one", 0, 3, 1.0)]
