"""Windows: a question and one part of its context at a time, so that a context may have any length."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtbert.kernels.packing import to_device
from dtbert.model import BertConfig, PackedBatch
from dtbert.qa.tokenize import BEGINS, ENDS, Tokens

# [CLS] question [SEP] context [SEP]
_NUM_SPECIAL = 3
# ... with one token of question, and one of context that the window before did not have.
_SMALLEST = _NUM_SPECIAL + 2

# What is wrong with a question and a context that cannot be read.
PairError = TypeError | ValueError


class Window(NamedTuple):
    """What the model reads at a time: ``[CLS] question [SEP] part of the context [SEP]``.

    Attributes:
        input_ids: token ids.
        token_type_ids: 0 up to the first ``[SEP]``, 1 after it.
        context_start: which token of the context comes first in this window.
    """

    input_ids: list[int]
    token_type_ids: list[int]
    context_start: int


class Example(NamedTuple):
    """A question and its context as tokens, and the ``(begin, end)`` of each window's part of the context."""

    question: Tokens
    context: Tokens
    parts: list[tuple[int, int]]

    def at_any_token(self) -> "Example":
        """This example, with answers that may begin and end inside of words."""
        return self._replace(context=self.context._replace(edges=np.full_like(self.context.edges, BEGINS + ENDS)))


@dataclass(frozen=True)
class Prepared:
    """Questions ready to be answered any number of times; a slice of them is one too.

    Attributes:
        examples: in order; in place of a question that cannot be read, its error.
    """

    examples: tuple[Example | PairError, ...]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, rows: slice) -> "Prepared":
        return Prepared(self.examples[rows])

    def rows(self, rows: Iterable[int]) -> "Prepared":
        """Some of the questions, by their numbers."""
        return Prepared(tuple(self.examples[row] for row in rows))

    def window_lengths(self) -> list[tuple[int, int]]:
        """Of each window of the questions that can be read: its tokens, and how many of them are of segment 0."""
        examples = (example for example in self.examples if isinstance(example, Example))
        return [(part.num_tokens, len(one.question.ids) + 2) for one in examples for part in parts_of(0, one)]


@dataclass(frozen=True)
class WindowSize:
    """Tokens in a window, and tokens of context that consecutive windows share.

    Raises:
        TypeError: not whole numbers.
        ValueError: the window exceeds the model's positions, or leaves no room beside the stride.
    """

    window: int
    stride: int
    config: BertConfig

    def __post_init__(self) -> None:
        for name in ("window", "stride"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be a whole number of tokens, not {value!r}")
        if self.window < _SMALLEST:
            raise ValueError(f"a window must hold at least {_SMALLEST} tokens, not {self.window}")
        if self.window > self.config.max_position_embeddings:
            raise ValueError(
                f"a window of {self.window} tokens is longer than the model's {self.config.max_position_embeddings} "
                "positions: give a smaller window"
            )
        if self.config.type_vocab_size < 2:
            raise ValueError("the model has 1 segment, question answering needs 2: it was not trained for this task")
        if not 0 <= self.stride <= self.window - _SMALLEST:
            raise ValueError(
                f"stride is {self.stride}, with a window of {self.window} tokens it must be from 0 to "
                f"{self.window - _SMALLEST}: give a smaller stride or a larger window"
            )

    def example(self, question: Tokens, context: Tokens) -> Example:
        """Split a context into parts that fit into a window beside the question.

        Raises:
            ValueError: a text has no tokens, or the question leaves no more room than the stride.
        """
        for name, tokens in (("question", question), ("context", context)):
            if not len(tokens.ids):
                raise ValueError(f"the {name} has only characters that the tokenizer skips: give it at least one word")
        length, room = len(context.ids), self.window - _NUM_SPECIAL - len(question.ids)
        step = room - self.stride
        if step <= 0:
            raise ValueError(
                f"the question has {len(question.ids)} tokens: a window of {self.window} leaves {max(room, 0)} for the "
                f"context, not more than the stride of {self.stride}; shorten the question to "
                f"{self.window - _NUM_SPECIAL - self.stride - 1} tokens, or give a larger window or a smaller stride"
            )
        # The last window is the first that reaches the end.
        begins = range(0, max(length - room, 0) + step, step)
        return Example(question, context, [(begin, min(begin + room, length)) for begin in begins])


class Part(NamedTuple):
    """One window of a batch: the tokens ``begin`` to ``end`` of the context of example number ``row``."""

    row: int
    begin: int
    end: int
    num_tokens: int


def parts_of(row: int, example: Example) -> list[Part]:
    """The windows of an example."""
    around = len(example.question.ids) + _NUM_SPECIAL
    return [Part(row, begin, end, around + end - begin) for begin, end in example.parts]


def batches(examples: Sequence[Example], batch_tokens: int) -> Iterator[list[Part]]:
    """All windows of the examples, the longest first, as many at a time as ``batch_tokens`` holds when padded."""
    parts = [part for row, example in enumerate(examples) for part in parts_of(row, example)]
    parts.sort(key=lambda part: -part.num_tokens)
    begin = 0
    while begin < len(parts):
        end = begin + max(1, batch_tokens // parts[begin].num_tokens)
        yield parts[begin:end]
        begin = end


def pack(examples: Sequence[Example], parts: Sequence[Part], cls: int, sep: int, device: torch.device) -> PackedBatch:
    """The packed batch of some windows."""
    pieces: list[NDArray[np.int64] | list[int]] = []
    lengths: list[int] = []
    for row, begin, end, _ in parts:
        question, context = examples[row].question.ids, examples[row].context.ids
        pieces += [[cls], question, [sep], context[begin:end], [sep]]
        lengths += [len(question) + 2, end - begin + 1]
    segment_lengths = np.array(lengths)
    seqlens = segment_lengths.reshape(-1, 2).sum(1)
    input_ids = np.concatenate(pieces, dtype=np.int64)
    segments = np.resize([0, 1], len(lengths)).repeat(segment_lengths)
    positions = np.arange(len(input_ids)) - (seqlens.cumsum() - seqlens).repeat(seqlens)
    rows = torch.from_numpy(np.stack([input_ids, segments, positions]))
    return PackedBatch.from_rows(rows, seqlens.tolist(), device)


class SpanPlaces(NamedTuple):
    """Where spans may lie among the T rows of a packed batch of W windows.

    Attributes:
        cls: the row of each window's [CLS], int64 ``[W]``.
        firsts, counts: the row of each window's first context token, and how many it has, int64 ``[W]``.
        edges: where words begin and end among the context's tokens, as `Tokens.edges`, int64 ``[T]``.
        length: the most context tokens of a window.
    """

    cls: Tensor
    firsts: Tensor
    counts: Tensor
    edges: Tensor
    length: int


def span_places(examples: Sequence[Example], parts: Sequence[Part], device: torch.device) -> SpanPlaces:
    """Where spans may lie among the rows of `pack`'s batch of these windows, in one transfer to the device."""
    everything = np.zeros(3 * len(parts) + sum(part.num_tokens for part in parts), np.int64)
    windows, edges = everything[: 3 * len(parts)].reshape(-1, 3), everything[3 * len(parts) :]
    cls = 0
    for window, (row, begin, end, num_tokens) in enumerate(parts):
        first = cls + len(examples[row].question.ids) + 2
        edges[first : first + end - begin] = examples[row].context.edges[begin:end]
        windows[window] = cls, first, end - begin
        cls += num_tokens
    there = to_device(torch.from_numpy(everything), device)
    cls_rows, firsts, counts = there[: windows.size].view(-1, 3).unbind(1)
    return SpanPlaces(cls_rows, firsts, counts, there[windows.size :], int(windows[:, 2].max()))


def windows(example: Example, cls: int, sep: int) -> list[Window]:
    """The windows of one example, in order of the text."""
    parts = parts_of(0, example)
    batch = pack([example], parts, cls, sep, torch.device("cpu"))
    seqlens = list(batch.packing.seqlens)
    rows = zip(batch.input_ids.split(seqlens), batch.token_type_ids.split(seqlens), parts, strict=True)
    return [Window(ids.tolist(), segments.tolist(), part.begin) for ids, segments, part in rows]
