"""Training data: windows of questions with the place of the answer, in batches of a number of tokens."""

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from dtbert.evaluation import SquadQuestion
from dtbert.kernels.packing import to_device
from dtbert.model import BertConfig, PackedBatch
from dtbert.qa.reading import read_examples
from dtbert.qa.tokenize import Tokens, special_ids
from dtbert.qa.windows import Example, PairError, Part, WindowSize, pack, parts_of

# Questions of so many characters go through the tokenizer together.
_BUFFER_CHARACTERS = 2**20
# [CLS] and the [SEP] after the question.
_NUM_BEFORE_CONTEXT = 2


class TrainingData(ABC):
    """What is trained on, one after another: windows of questions, or texts; ``unit`` is what one is called."""

    unit: ClassVar[str]

    @property
    @abstractmethod
    def lengths(self) -> list[int]:
        """Tokens of each."""

    @abstractmethod
    def id_of(self, index: int) -> str:
        """What names the question or the text that one of them is of."""

    @abstractmethod
    def collate(self, indices: Sequence[int], device: torch.device) -> Any:
        """A packed batch of some of them, with their labels."""

    def check_fits(self, batch_tokens: int) -> None:
        """Raise ValueError where one of them has more tokens than a step."""
        longest = max(self.lengths)
        if longest > batch_tokens:
            raise ValueError(f"a {self.unit} has {longest} tokens, a step {batch_tokens}: give larger batches")

    def batches(self, batch_tokens: int, seed: int, epoch: int) -> list[list[int]]:
        """The numbers of all of an epoch in random order, as many in each batch as ``batch_tokens`` holds.

        A pure function of its arguments, so that a run that was interrupted finds its place again.
        """
        lengths = self.lengths
        order = list(range(len(lengths)))
        random.Random(f"data {seed} {epoch}").shuffle(order)
        found: list[list[int]] = []
        room = 0
        for index in order:
            if lengths[index] > room:
                found.append([])
                room = batch_tokens
            found[-1].append(index)
            room -= lengths[index]
        return found


class LabelledBatch(NamedTuple):
    """A packed batch of W windows, and the token at which the answer starts and ends.

    ``starts`` and ``ends`` are int64 ``[W]``, counted from the window's first token; 0, which is [CLS], where the
    window does not hold the answer. ``ids`` are the questions'.
    """

    batch: PackedBatch
    starts: Tensor
    ends: Tensor
    ids: tuple[str, ...]


@dataclass(frozen=True)
class TrainingSet(TrainingData):
    """Questions cut into windows.

    Attributes:
        examples: tokens of each question and its context.
        ids: of the questions, one per example.
        parts: the windows of all examples.
        labels: first and last token of the answer in each window, int64 ``[W, 2]``.
        unusable: what is wrong with each question that was left out.
    """

    unit = "window"

    examples: list[Example]
    ids: list[str]
    parts: list[Part]
    labels: np.ndarray
    special: tuple[int, int]
    unusable: list[str]

    @classmethod
    def from_questions(
        cls,
        questions: Sequence[SquadQuestion],
        tokenizer: Tokenizer,
        config: BertConfig,
        *,
        window: int = 384,
        stride: int = 128,
    ) -> "TrainingSet":
        """Tokenize questions and label their windows with the first accepted answer whose place is known.

        The windows of a question that has no answer are labelled with [CLS].

        Args:
            questions: of `dtbert.evaluation.read_squad`.
            tokenizer: made plain, as `dtbert.qa.load_tokenizer` gives it.
            config: of the model to be trained.
            window, stride: tokens, as of `dtbert.QuestionAnswerer`.

        Raises:
            ValueError: no question is left, or window and stride do not fit the model.
        """
        size = WindowSize(window, stride, config)
        special = special_ids(tokenizer, config.vocab_size)
        pairs = ((one.question, one.context) for one in questions)
        read = chain.from_iterable(read_examples(pairs, tokenizer, size, _BUFFER_CHARACTERS))
        found, labels = cls([], [], [], np.empty((0, 2), np.int64), special, []), []
        for one, example in zip(questions, read, strict=True):
            try:
                if isinstance(example, PairError):
                    raise example
                span = None if one.is_impossible else _answer_tokens(example.context, *_characters(one))
            except ValueError as error:
                found.unusable.append(f"{one.id}: {error}")
                continue
            found.ids.append(one.id)
            found.parts.extend(parts_of(len(found.examples), example))
            found.examples.append(example)
            labels += [(0, 0)] * len(example.parts) if span is None else _labels(example, *span)
        if not found.parts:
            raise ValueError(f"none of {len(questions)} questions can be trained on: {'; '.join(found.unusable[:3])}")
        return replace(found, labels=np.array(labels, np.int64))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each window."""
        return [part.num_tokens for part in self.parts]

    def id_of(self, index: int) -> str:
        """The question of a window."""
        return self.ids[self.parts[index].row]

    def collate(self, indices: Sequence[int], device: torch.device) -> LabelledBatch:
        """The packed batch of some windows."""
        parts = [self.parts[index] for index in indices]
        batch = pack(self.examples, parts, *self.special, device)
        labels = to_device(torch.from_numpy(self.labels[list(indices)]), device)
        return LabelledBatch(batch, labels[:, 0], labels[:, 1], tuple(self.ids[part.row] for part in parts))


def _labels(example: Example, first: int, last: int) -> list[tuple[int, int]]:
    """The place of an answer in each window of its question, from the window's first token."""
    before = _NUM_BEFORE_CONTEXT + len(example.question.ids)
    return [
        (before + first - begin, before + last - begin) if begin <= first and last < end else (0, 0)
        for begin, end in example.parts
    ]


def _characters(question: SquadQuestion) -> tuple[int, int]:
    """Where the first answer whose place is known starts and ends."""
    for text, start in question.answers:
        if start is not None:
            return start, start + len(text)
    raise ValueError(f"the context does not have {question.answers[0].text!r} at its answer_start")


def _answer_tokens(context: Tokens, start: int, end: int) -> tuple[int, int]:
    """First and last token of the characters ``start`` to ``end``."""
    if start == end:
        raise ValueError("the answer is empty")
    first = int(np.searchsorted(context.offsets[:, 1], start, side="right"))
    last = int(np.searchsorted(context.offsets[:, 0], end, side="left")) - 1
    if first > last:
        raise ValueError(f"the answer {context.text[start:end]!r} has only characters that the tokenizer skips")
    return first, last
