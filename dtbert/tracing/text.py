"""Traces as text: what the layers dropped marked in the text itself."""

from collections.abc import Iterator
from itertools import groupby
from typing import Literal, NamedTuple

from dtbert.qa import Trace, TracedWindow


class Word(NamedTuple):
    """Characters ``start`` to ``end`` of a text, and the layer, from 0, that dropped the last of them, if one did."""

    start: int
    end: int
    left: int | None
    in_answer: bool


def words_of(window: TracedWindow, part: Literal["question", "context"]) -> Iterator[Word]:
    """The words of a part of a window, in order; a word that the window cuts is what there is of it."""
    tokens = [(at, token) for at, token in enumerate(window.tokens) if token.part == part]
    for _, of_word in groupby(tokens, lambda one: one[1].word):
        own = list(of_word)
        left = [token.left for _, token in own]
        last = None if None in left else max(one for one in left if one is not None)
        start, end = own[0][1].start, own[-1][1].end
        assert start is not None
        assert end is not None
        yield Word(start, end, last, any(at in window.answer for at, _ in own))


class Marks:
    """How a text shows what left, ``{3 in layer 3}``, and ``[the answer]``; subclasses show it otherwise."""

    def plain(self, text: str) -> str:
        """What belongs to no word, and the inner of all else."""
        return text

    def kept(self, text: str) -> str:
        """Words that stayed to the end."""
        return text

    def dropped(self, text: str, layer: int) -> str:
        """Words that a layer, counted from 1, dropped."""
        return f"{{{layer} {text}}}"

    def answer(self, text: str) -> str:
        """The full model's answer, its words marked."""
        return f"[{text}]"


def marked(trace: Trace, marks: Marks | None = None) -> str:
    """The question, an empty line, and the context of `Trace.answer_window`, in which is marked what was dropped."""
    window, marks = trace.windows[trace.answer_window], marks or Marks()
    question = _marked(trace.question, 0, len(trace.question), words_of(window, "question"), marks)
    return f"{question}\n\n{_marked(trace.context, window.start, window.end, words_of(window, 'context'), marks)}"


def _marked(text: str, start: int, end: int, words: Iterator[Word], marks: Marks) -> str:
    pieces, place = list[str](), start
    for in_answer, of_answer in groupby(words, lambda word: word.in_answer):
        inner = list[str]()
        for left, alike in groupby(of_answer, lambda word: word.left):
            run = list(alike)
            # What stands before the answer is outside of its marks.
            (inner if inner else pieces).append(marks.plain(text[place : run[0].start]))
            written, place = marks.plain(text[run[0].start : run[-1].end]), run[-1].end
            inner.append(marks.kept(written) if left is None else marks.dropped(written, left + 1))
        pieces.append(marks.answer("".join(inner)) if in_answer else "".join(inner))
    return "".join([*pieces, marks.plain(text[place:end])])
