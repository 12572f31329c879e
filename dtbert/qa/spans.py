"""Spans: from the scores of tokens to the best answers, over all windows of a question."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dtbert.qa.tokenize import BEGINS, ENDS
from dtbert.qa.windows import Example, Part, SpanPlaces


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer: ``text == context[start:end]``, offsets in characters; that there is none is ``""`` from 0 to 0.

    It unpacks, ``text, start, end, score, margin = answer``; what serialises dataclasses makes an object of it.

    Attributes:
        text, start, end: the span.
        score: its probability, among all spans of all windows of the question and the answer that there is none. A span
            that shares words with a better one is the same answer in other words: its probability counts there, unless
            answers may overlap.
        margin: the logarithm of the span's odds against that there is no answer: start logit + end logit, less those of
            its window's [CLS].
    """

    text: str
    start: int
    end: int
    score: float
    margin: float

    def __iter__(self) -> Iterator[Any]:
        return iter((self.text, self.start, self.end, self.score, self.margin))


class Span(NamedTuple):
    """Tokens ``first`` to ``last`` of a context.

    ``log_mass`` is the logarithm of the sum of ``exp(margin)`` over it and the spans that share tokens with it.
    """

    margin: float
    first: int
    last: int
    log_mass: float


class WindowSpans:
    """The spans of each window of a batch that begin and end at a word's edge.

    A span's margin is start logit + end logit, less those of the window's [CLS]: within a window only differences of
    logits mean something, and [CLS], trained to be the answer of a window that holds none, is what all windows share.

    Args:
        start_logits, end_logits: of the packed batch, ``[T]``.
        places: where spans may lie in it.
        max_answer_tokens: longest span.

    Attributes:
        best: of each window, its tokens counted from the window's first one; among equals the earlier start, then the
            shorter. Its margin is -inf where the window has no span.
        log_totals: per window, the logarithm of the sum of ``exp(margin)`` over its spans.

    Raises:
        ValueError: a logit is NaN or infinite.
    """

    def __init__(self, start_logits: Tensor, end_logits: Tensor, places: SpanPlaces, max_answer_tokens: int) -> None:
        length = places.length
        width = min(max_answer_tokens, length)
        column = torch.arange(length, device=start_logits.device)
        rows = (places.firsts[:, None] + column).clamp_(max=len(places.edges) - 1)
        edges = places.edges[rows].masked_fill_(column >= places.counts[:, None], 0)
        nothing = start_logits[places.cls].float() + end_logits[places.cls].float()
        starts = (start_logits.float()[rows] - nothing[:, None]).masked_fill_(edges & BEGINS == 0, -math.inf)
        ends = end_logits.float()[rows].masked_fill_(edges & ENDS == 0, -math.inf)
        # Entry [w, i, j] is the span that starts at i and has j + 1 tokens.
        ends = F.pad(ends, (0, width - 1), value=-math.inf).unfold(1, width, 1)
        self._margins = starts[:, :, None] + ends  # [W, length, width]
        # Of equal values, max names the first.
        best, at = self._margins.flatten(1).max(1)
        base = best.masked_fill(best == -math.inf, 0)
        weights = (self._margins - base[:, None, None]).exp_()
        log_totals = base + _log_sum(weights)
        # The rows from which spans reach the best one: at most so many before its first token, and its own.
        first, last = (at // width)[:, None], (at // width + at % width)[:, None]
        near = torch.arange(min(2 * width - 1, length), device=column.device)
        near = (first - width + 1).clamp_(min=0, max=length - len(near)) + near
        shares = (near <= last)[:, :, None] & (near[:, :, None] + column[:width] >= first[:, :, None])
        weights = weights[torch.arange(len(near), device=column.device)[:, None], near].mul_(shares)
        log_mass = base + _log_sum(weights)
        # All in one wait for the device; a place is exact in float32.
        checked = log_totals.nan_to_num(math.nan, math.inf, 0) + 0 * nothing
        found = torch.stack([best, at.float(), log_mass, log_totals, checked]).tolist()
        if not all(map(math.isfinite, found[4])):
            raise ValueError(
                f"the model gave logits that are NaN or infinite in {start_logits.dtype}: its weights are damaged, or "
                "too large for the dtype; try bfloat16 or float32"
            )
        self.log_totals: list[float] = found[3]
        self.best = [
            Span(margin, int(place) // width, int(place) // width + int(place) % width, mass)
            for margin, place, mass in zip(*found[:3], strict=True)
        ]

    def margins(self, window: int, count: int) -> NDArray[np.float32]:
        """Of all spans of a window of so many context tokens, by first token and length - 1; -inf where none is."""
        return self._on_host[window, :count]

    @cached_property
    def _on_host(self) -> NDArray[np.float32]:
        return self._margins.cpu().numpy()


class Found(NamedTuple):
    """A span that may be an answer: ``text`` from character ``start`` to ``end``; margin and mass as `Span`'s."""

    text: str
    start: int
    end: int
    margin: float
    log_mass: float

    def answer(self, log_total: float) -> Answer:
        """The answer, of the logarithm of the sum that makes probabilities."""
        # Rounded, a part may be above the whole.
        return Answer(self.text, self.start, self.end, math.exp(min(self.log_mass - log_total, 0)), self.margin)


NOTHING = Found("", 0, 0, 0.0, 0.0)


def with_nothing(log_totals: Iterable[float]) -> float:
    """The logarithm of the sum that makes probabilities: of the spans of some windows or texts, and `NOTHING`."""
    return float(np.logaddexp.reduce([NOTHING.margin, *log_totals]))


def ranked(found: Sequence[Found], threshold: float | None) -> list[Found]:
    """What was found, best first; where there is a threshold `NOTHING` comes before the first whose margin is below."""
    if threshold is None:
        return list(found)
    better = sum(one.margin >= threshold for one in found)
    return [*found[:better], NOTHING, *found[better:]]


class BestAnswers:
    """The best answers to one question about one context, as its windows come in.

    A span that several windows read counts once, with the margin of the window that is surest of it: one at whose edge
    it stands has seen less of what is around it.

    Args:
        example: the question and the context.
        k: how many answers are wanted.
        max_answer_tokens: longest answer.
        overlap: whether an answer may share characters with a better one.
    """

    def __init__(self, example: Example, k: int, max_answer_tokens: int, overlap: bool) -> None:
        self._context, self._k, self._overlap = example.context, k, overlap
        # The best span of a single window and its total are known; for all else each span's margin is needed.
        self._best, self._log_total = Span(-math.inf, 0, 0, -math.inf), -math.inf
        self._is_single = len(example.parts) == 1
        self._margins: NDArray[np.float32] | None = None
        if k > 1 or not self._is_single:
            width = min(max_answer_tokens, max(end - begin for begin, end in example.parts))
            self._margins = np.full((len(self._context.ids), width), -np.inf, np.float32)

    def add(self, spans: WindowSpans, window: int, part: Part) -> None:
        """Take a window in."""
        if self._is_single:
            self._best, self._log_total = spans.best[window], spans.log_totals[window]
        if self._margins is None:
            return
        # Either may be the wider: a batch is as wide as its longest window, a context as its own.
        margins = spans.margins(window, part.end - part.begin)[:, : self._margins.shape[1]]
        known = self._margins[part.begin : part.end, : margins.shape[1]]
        np.maximum(known, margins, out=known)

    @property
    def is_empty(self) -> bool:
        """Whether no window had a span at the edges of words."""
        return self.log_total == -math.inf

    @property
    def log_total(self) -> float:
        """The logarithm of the sum of ``exp(margin)`` over all spans."""
        if self._margins is None or self._is_single:
            return self._log_total
        return _log_sum_exp(self._margins)

    @property
    def certainty(self) -> float:
        """The probability of the best span alone: of these very words, among all spans and that there is no answer."""
        margin = self._best.margin if self._margins is None else float(self._margins.max())
        return math.exp(min(margin - with_nothing([self.log_total]), 0))

    def found(self) -> list[Found]:
        """Best first; fewer than ``k`` where the context has no more, none where none is at the edges of words."""
        return [self._at(span) for span in self._ranked()]

    def answers(self, threshold: float | None = None) -> list[Answer]:
        """What was `found`, with its probabilities, and where a threshold is given as `ranked` has it."""
        total = with_nothing([self.log_total])
        return [one.answer(total) for one in ranked(self.found(), threshold)[: self._k]]

    def _at(self, span: Span) -> Found:
        start, end = self._context.characters(span.first, span.last)
        log_mass = span.margin if self._overlap else span.log_mass
        return Found(self._context.text[start:end], start, end, span.margin, log_mass)

    def _ranked(self) -> list[Span]:
        """The best spans of distinct text; those that overlap a better one, or its like elsewhere, only if they may."""
        if self._margins is None:
            return [] if self.is_empty else [self._best]
        margins, best = self._margins.copy(), list[Span]()
        length, width = margins.shape
        taken = np.zeros(length + 1, np.int64)
        while len(best) < self._k:
            first, more = divmod(int(margins.argmax()), width)
            if margins[first, more] == -np.inf:
                break
            near = margins[max(0, first - width + 1) : first + more + 1]
            sharing = np.arange(len(near))[:, None] + np.arange(width) >= min(first, width - 1)
            best.append(Span(float(margins[first, more]), first, first + more, _log_sum_exp(near[sharing])))
            alike = self._alike(first, first + more)
            if self._overlap:
                margins[alike, more] = -np.inf
                continue
            begin, end = self._touching(first, first + more)
            changes = np.bincount([begin, *alike], minlength=length + 1)
            changes -= np.bincount([end, *(place + more + 1 for place in alike)], minlength=length + 1)
            taken[changes.cumsum() > 0] = 1
            before = np.concatenate([[0], taken.cumsum()])
            ends = np.minimum(np.arange(length)[:, None] + np.arange(1, width + 1), length)
            margins[before[ends] > before[:length, None]] = -np.inf
        # To the last digit what is said where one answer is asked for.
        return [self._best, *best[1:]] if best and self._is_single else best

    def _alike(self, first: int, last: int) -> list[int]:
        """The first tokens of all spans with the text of this one."""
        text, ids, offsets = self._context.text, self._context.ids, self._context.offsets
        same = np.ones(len(ids) - (last - first), np.bool_)
        for token in range(first, last + 1):
            same &= ids[token - first : len(same) + token - first] == ids[token]
        wanted = text[offsets[first, 0] : offsets[last, 1]]
        places = [int(place) for place in np.flatnonzero(same)]
        return [one for one in places if text[offsets[one, 0] : offsets[one + last - first, 1]] == wanted]

    def _touching(self, first: int, last: int) -> tuple[int, int]:
        """The range of the tokens that share a character with a span's text."""
        start, end = self._context.characters(first, last)
        begin = int(np.searchsorted(self._context.offsets[:, 1], start, side="right"))
        return min(begin, first), max(int(np.searchsorted(self._context.offsets[:, 0], end, side="left")), last + 1)


def _log_sum(weights: Tensor) -> Tensor:
    # Of each window [W, ...], weights from 0 to 1. In whole 2**-36ths sums are exact, so that neither their order nor
    # the zeros of longer windows beside one change a bit of them.
    return (weights * 2.0**36).long().sum((1, 2)).double().mul_(2.0**-36).log_().float()


def _log_sum_exp(values: NDArray[np.float32]) -> float:
    highest = float(values.max())
    if highest == -math.inf:
        return highest
    return highest + math.log(np.exp(values - np.float32(highest)).sum(dtype=np.float64))
