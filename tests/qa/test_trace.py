"""Traces: which tokens left where, beside the text, and what became of the answer."""

import json
from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from dtbert.model import LengthSchedule
from dtbert.qa import QuestionAnswerer, Trace, TracedWindow
from tests.qa.conftest import LETTER, QUESTION, make_model

SCHEDULE = LengthSchedule.ratios([0.6, 0.3], scorer="received")
LONG = " ".join(f"Letter {number} was written by Zoë Łukasz in the year {1500 + number}." for number in range(12))
SCHEDULES = st.builds(
    lambda ratios, scorer, keep_cls, keep_question: LengthSchedule.ratios(
        sorted(ratios, reverse=True), scorer=scorer, keep_cls=keep_cls, keep_question=keep_question
    ),
    st.lists(st.floats(0.05, 1), min_size=2, max_size=2),
    st.sampled_from(["received", "answer_overlap", "random"]),
    st.booleans(),
    st.booleans(),
)


@pytest.fixture(scope="module")
def narrow(make_answerer: Callable[..., QuestionAnswerer]) -> QuestionAnswerer:
    """Reads 24 tokens at a time."""
    return make_answerer(window=24, stride=6)


def check_window(trace: Trace, window: TracedWindow) -> None:
    """That a window's layers, tokens and text say the same."""
    entered = len(window.tokens)
    for index, layer in enumerate(window.layers):
        assert layer.entered == entered
        assert layer.kept == tuple(
            at for at, token in enumerate(window.tokens) if token.left is None or token.left > index
        )
        there = [token for token in window.tokens if token.left is None or token.left >= index]
        drops = len(layer.kept) < entered
        assert sorted(token.ranks[index] or 0 for token in there) == (
            list(range(1, entered + 1)) if drops else [0] * entered
        )
        for token in window.tokens:
            rank = token.ranks[index]
            if token not in there or not drops:
                assert rank is token.scores[index] is None
            else:
                assert rank is not None
                assert (rank <= len(layer.kept)) == (token.left != index)
        # By falling score, behind those that stay whatever theirs is.
        scores = [token.scores[index] for token in sorted(there, key=lambda token: token.ranks[index] or 0)] * drops
        fixed = sum(score is None for score in scores)
        assert scores[:fixed] == [None] * fixed
        assert scores[fixed:] == sorted(scores[fixed:], reverse=True)
        entered = len(layer.kept)
    assert [token.part for token in window.tokens if token.part == "special"] == ["special"] * 3
    for text, part in ((trace.question, "question"), (trace.context, "context")):
        own = [token for token in window.tokens if token.part == part]
        assert own
        for token in own:
            piece = text[token.start : token.end].lower().replace("ë", "e")
            assert token.text in ("[UNK]", piece, f"##{piece}")
        if part == "context":
            assert (own[0].start, own[-1].end) == (window.start, window.end)
        # A word's tokens stand side by side.
        for before, after in zip(own, own[1:], strict=False):
            assert after.word - before.word in (0, 1)
            assert (after.word == before.word) == after.text.startswith("##")
    for at in window.answer:
        token = window.tokens[at]
        assert token.start < trace.full_answer.end
        assert token.end > trace.full_answer.start


@settings(max_examples=20)
@given(SCHEDULES, st.sampled_from([LETTER, LONG]))
def test_layers_tokens_and_text_say_the_same(narrow: QuestionAnswerer, schedule: LengthSchedule, context: str) -> None:
    trace = narrow.trace(QUESTION, context, schedule=schedule)
    assert trace.answer == narrow(QUESTION, context, schedule=schedule)
    assert trace.full_answer == narrow(QUESTION, context)
    assert trace.survived == (
        (trace.answer.start, trace.answer.end) == (trace.full_answer.start, trace.full_answer.end)
    )
    expected = narrow.windows(QUESTION, context)
    assert [[narrow.tokenizer.token_to_id(token.text) for token in window.tokens] for window in trace.windows] == [
        window.input_ids for window in expected
    ]
    for window in trace.windows:
        check_window(trace, window)
        lengths = schedule.lengths(len(window.tokens))
        assert tuple(len(layer.kept) for layer in window.layers) == lengths
    costs = [
        [one.macs(narrow.config, len(window.input_ids), question_length=7).executed for window in expected]
        for one in (schedule, LengthSchedule.ratios([1, 1]))
    ]
    assert trace.work == pytest.approx(sum(costs[0]) / sum(costs[1]))


def test_the_answer_is_followed_where_it_stays_longest(narrow: QuestionAnswerer) -> None:
    trace = narrow.trace(QUESTION, LONG, schedule=SCHEDULE)
    holding = [window for window in trace.windows if window.answer]
    assert holding
    fates = [
        min(window.tokens[at].left if window.tokens[at].left is not None else 2 for at in window.answer)
        for window in holding
    ]
    window = trace.windows[trace.answer_window]
    assert window == holding[fates.index(max(fates))]
    assert trace.answer_left == window.answer_left == (None if max(fates) == 2 else max(fates))


def test_words_longer_than_any_answer_are_followed_too(make_answerer: Callable[..., QuestionAnswerer]) -> None:
    answerer = make_answerer(max_answer_tokens=2)
    trace = answerer.trace(QUESTION, "antidisestablishmentarianism", schedule=SCHEDULE)
    assert trace.full_answer == answerer(QUESTION, "antidisestablishmentarianism")
    check_window(trace, trace.windows[0])
    assert trace.windows[0].answer


def test_a_window_is_scored_only_where_it_loses_tokens_itself(tokenizer: Tokenizer) -> None:
    # The last window is short, and its batch mates lose tokens where it does not.
    schedule = LengthSchedule.absolute([20, 8], scorer="received")
    traces = [
        QuestionAnswerer(make_model(), tokenizer, window=24, stride=0, batch_tokens=tokens).trace(
            QUESTION, LETTER, schedule=schedule
        )
        for tokens in (24, 2048)
    ]
    assert [len(window.tokens) for window in traces[0].windows] == [24, 11]
    for alone, together in zip(traces[0].windows, traces[1].windows, strict=True):
        assert alone.layers == together.layers
        assert [token._replace(scores=()) for token in alone.tokens] == [
            token._replace(scores=()) for token in together.tokens
        ]
    assert all(token.scores[0] is None for token in traces[1].windows[1].tokens)


def test_without_a_schedule_nothing_leaves(answerer: QuestionAnswerer) -> None:
    trace = answerer.trace(QUESTION, LETTER)
    assert trace.survived
    assert (trace.work, trace.answer_left, trace.schedule) == (1, None, None)
    assert all(token.left is None and set(token.scores) == {None} for token in trace.windows[0].tokens)


def test_json_holds_all_of_it(answerer: QuestionAnswerer) -> None:
    schedule = LengthSchedule.ratios([0.6, 0.3], scorer="received", keep_question=True)
    trace = answerer.trace(QUESTION, LETTER, schedule=schedule)
    fields = json.loads(json.dumps(trace.to_dict(), allow_nan=False))
    assert LengthSchedule.from_dict(fields["schedule"]) == schedule
    assert fields["answer"] == asdict(trace.answer)
    for name in ("question", "context", "budget", "work", "survived", "answer_window", "answer_left"):
        assert fields[name] == getattr(trace, name)
    (window,), (written,) = trace.windows, fields["windows"]
    assert [layer["kept"] for layer in written["layers"]] == [list(layer.kept) for layer in window.layers]
    assert any(token.ranks[0] and token.scores[0] is None for token in window.tokens if token.part == "question")
    for token, one in zip(window.tokens, written["tokens"], strict=True):
        assert set(one) == set(token._fields)
        assert [one[name] for name in ("text", "part", "start", "end", "word", "left")] == list(token[:6])
        assert one["ranks"] == list(token.ranks)
        # As short as it can be without being another float32.
        assert [None if score is None else np.float32(score) for score in one["scores"]] == list(token.scores)


def test_bad_requests_are_refused(answerer: QuestionAnswerer) -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        answerer.trace(QUESTION, LETTER, schedule=SCHEDULE, budget=0.5)
    with pytest.raises(ValueError, match=r"no schedules\.json"):
        answerer.trace(QUESTION, LETTER, budget=0.5)
    with pytest.raises(ValueError, match="the context is blank"):
        answerer.trace(QUESTION, " ")
    with pytest.raises(ValueError, match="3 entries, the model 2 layers"):
        answerer.trace(QUESTION, LETTER, schedule=LengthSchedule.ratios([1, 1, 0.5]))
