"""Spans: from the scores of tokens to the best answers, over all windows of a question."""

import math
from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dtbert.qa.tokenize import Tokens


class Answer(NamedTuple):
    """An answer: ``text == context[start:end]``, offsets in characters.

    ``score`` is its probability: the softmax over all spans of all windows of the question.
    """

    text: str
    start: int
    end: int
    score: float


class Span(NamedTuple):
    """Tokens ``first`` to ``last`` of a window's context; ``score`` is start logit + end logit."""

    score: float
    first: int
    last: int


class WindowSpans:
    """The spans of each window of a batch, best first; among equals the earlier start, then the shorter.

    Args:
        start_logits, end_logits: of the packed batch, ``[T]``.
        firsts, counts: the row of each window's first context token, and how many it has, int64 ``[W]``.
        max_answer_tokens: longest span.
        depth: 1 for the best span of each window alone; else all can be read, and so many are at hand at once.

    Attributes:
        log_totals: per window, the logarithm of the sum of ``exp(score)`` over its spans.

    Raises:
        ValueError: a logit is NaN or infinite.
    """

    def __init__(
        self,
        start_logits: Tensor,
        end_logits: Tensor,
        firsts: Tensor,
        counts: Tensor,
        max_answer_tokens: int,
        depth: int,
    ) -> None:
        length = int(counts.max())
        self._width = min(max_answer_tokens, length)
        column = torch.arange(length, device=firsts.device)
        rows = (firsts[:, None] + column).clamp_(max=len(start_logits) - 1)
        outside = column >= counts[:, None]
        starts = start_logits.float()[rows].masked_fill_(outside, -math.inf)  # [W, length]
        ends = end_logits.float()[rows].masked_fill_(outside, -math.inf)
        # Entry [w, i, j] is the span that starts at i and has j + 1 tokens.
        ends = F.pad(ends, (0, self._width - 1), value=-math.inf).unfold(1, self._width, 1)
        scores = (starts[:, :, None] + ends).flatten(1)
        self.log_totals: list[float] = scores.logsumexp(1).tolist()
        if not all(map(math.isfinite, self.log_totals)):
            raise ValueError(
                f"the model gave logits that are NaN or infinite in {start_logits.dtype}: its weights are damaged, or "
                "too large for the dtype; try bfloat16 or float32"
            )
        if depth == 1:
            # Of equal values, max names the first.
            self._scores, self._places = scores.max(1, keepdim=True)
        else:
            self._scores, self._places = scores.sort(dim=1, descending=True, stable=True)
        self._depth = depth
        self._head_scores, self._head_places = self._scores[:, :depth].tolist(), self._places[:, :depth].tolist()

    def of(self, window: int) -> Iterator[Span]:
        """The spans of one window."""
        head = zip(self._head_scores[window], self._head_places[window], strict=True)
        for score, place in chain(head, self._tail(window)):
            if score == -math.inf:
                return
            first, more = divmod(place, self._width)
            yield Span(score, first, first + more)

    def _tail(self, window: int) -> Iterator[tuple[float, int]]:
        scores, places = self._scores[window, self._depth :], self._places[window, self._depth :]
        yield from zip(scores.tolist(), places.tolist(), strict=True)


class BestAnswers:
    """The ``k`` best answers of distinct text to one question, as its windows come in."""

    def __init__(self, context: Tokens, k: int) -> None:
        self._context, self._k = context, k
        self._log_total = -math.inf
        # By text: (-score, first token, last token, start, end), which sorts by score, then place, then length.
        self._best: dict[str, tuple[float, int, int, int, int]] = {}

    def add(self, spans: Iterator[Span], begin: int, log_total: float) -> None:
        """Take a window in: its spans, best first; the context token it begins with; its `log_totals`."""
        self._log_total = float(np.logaddexp(self._log_total, log_total))
        seen = set()
        for score, first, last in spans:
            start, end = self._context.characters(begin + first, begin + last)
            text = self._context.text[start:end]
            if text in seen:
                continue
            seen.add(text)
            found = (-score, begin + first, begin + last, start, end)
            self._best[text] = min(found, self._best.get(text, found))
            if len(seen) == self._k:
                break
        if len(self._best) > self._k:
            ranked = sorted(self._best.items(), key=lambda item: item[1])
            self._best = dict(ranked[: self._k])

    def answers(self) -> list[Answer]:
        """Best first; fewer than ``k`` where the context has no more distinct spans."""
        ranked = sorted(self._best.items(), key=lambda item: item[1])
        return [Answer(text, start, end, math.exp(-s - self._log_total)) for text, (s, _, _, start, end) in ranked]
