"""Traces as text: nothing is lost, and each mark is in its place."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtbert.model import LengthSchedule
from dtbert.qa import QuestionAnswerer, Trace
from dtbert.tracing import Marks, marked
from tests.qa.conftest import LETTER, QUESTION

TEXTS = [LETTER, "Zoë\u0301 said: 'no'.\n\n\tPrice {3 $5} [sic] " * 5, "antidisestablishmentarianism"]


class Private(Marks):
    """Marks that no text has."""

    def kept(self, text: str) -> str:
        return f"\ue000{text}\ue001"

    def dropped(self, text: str, layer: int) -> str:
        return f"\ue002{layer}\ue003{text}\ue001"

    def answer(self, text: str) -> str:
        return f"\ue004{text}\ue005"


def traced(answerer: QuestionAnswerer, context: str, ratios: list[float]) -> Trace:
    schedule = LengthSchedule.ratios(sorted(ratios, reverse=True), scorer="random")
    return answerer.trace(QUESTION, context, schedule=schedule)


@settings(max_examples=8)
@given(st.sampled_from(TEXTS), st.lists(st.floats(0.05, 1), min_size=2, max_size=2))
def test_marks_stand_around_the_words_that_left(answerer: QuestionAnswerer, context: str, ratios: list[float]) -> None:
    trace = traced(answerer, context, ratios)
    window = trace.windows[trace.answer_window]
    written = marked(trace, Private())
    unmarked = re.sub("\ue002\\d+\ue003|[\ue000\ue001\ue004\ue005]", "", written)
    assert unmarked == f"{QUESTION}\n\n{context[window.start : window.end]}"
    # Where each character stands, and which layer its word left in.
    left: list[int | None] = []
    now: int | None = None
    for piece in re.findall("\ue002\\d+\ue003|.", written, re.DOTALL):
        if piece[0] == "\ue002":
            now = int(piece[1:-1]) - 1
        elif piece == "\ue000":
            now = None
        elif piece not in "\ue001\ue004\ue005":
            left.append(now)
    for part, offset in (("question", 0), ("context", len(QUESTION) + 2 - window.start)):
        words: dict[int, list[int | None]] = {}
        for token in window.tokens:
            if token.part == part:
                words.setdefault(token.word, []).append(token.left)
        for token in window.tokens:
            if token.part == part:
                fates = words[token.word]
                expected = None if None in fates else max(fates)
                assert set(left[token.start + offset : token.end + offset]) == {expected}
    (answer,) = re.findall("\ue004(.*?)\ue005", written, re.DOTALL)
    inside = re.sub("\ue002\\d+\ue003|[\ue000\ue001]", "", answer)
    assert trace.full_answer.text in inside


def test_plain_marks_read_well(answerer: QuestionAnswerer) -> None:
    trace = traced(answerer, LETTER, [1, 1])
    assert marked(trace) == f"{QUESTION}\n\n" + LETTER.replace(trace.full_answer.text, f"[{trace.full_answer.text}]", 1)


def test_runs_of_words_that_left_together_are_marked_once(answerer: QuestionAnswerer) -> None:
    trace = traced(answerer, LETTER, [0.05, 0.05])
    for text in marked(trace).split("\n\n"):
        assert not re.search(r"\{(\d+) [^{}\[\]]*\}\s*\{\1 ", text)


@pytest.mark.parametrize("context", TEXTS)
def test_a_trace_of_nothing_dropped_has_no_mark_but_the_answers(answerer: QuestionAnswerer, context: str) -> None:
    written = marked(answerer.trace(QUESTION, context), Private())
    assert "\ue002" not in written
    assert written.count("\ue004") == 1
