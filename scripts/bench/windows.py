"""What is timed: windows of token ids, alone or in batches."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtbert.evaluation import read_squad
from dtbert.model import PackedBatch
from dtbert.qa import load_tokenizer
from dtbert.qa.tokenize import special_ids, tokenize
from dtbert.qa.windows import WindowSize, windows
from dtbert.weights import load_model, resolve_source

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
EQUAL_LENGTHS = {"1x128": (1, 128), "1x384": (1, 384), "8x384": (8, 384)}
SQUAD = "SQuAD windows"
# Tokens of segment 0 in every window: [CLS], a question, [SEP].
_QUESTION_TOKENS = 14
_LENGTHS_FILE = Path(__file__).with_name("squad_window_lengths.json")

Window = Sequence[int]
Logits = tuple[Any, Any]


@dataclass(frozen=True)
class Batch:
    """Windows in each form that an engine takes, made before anything is timed: int64 ``[B, S]``, and packed."""

    ids: Tensor
    mask: Tensor
    segments: Tensor
    lengths: tuple[int, ...]
    packed: PackedBatch

    @classmethod
    def of(cls, work: Sequence[Window], device: torch.device | str = "cpu") -> "Batch":
        lengths = tuple(len(window) for window in work)
        real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        ids = torch.zeros(real.shape, dtype=torch.int64)
        ids[real] = torch.tensor([token for window in work for token in window])
        segments = real.long()
        segments[:, :_QUESTION_TOKENS] = 0
        by_window = [row[:length].tolist() for row, length in zip(segments, lengths, strict=True)]
        packed = PackedBatch.from_lists(work, by_window, device)
        return cls(ids.to(device), real.long().to(device), segments.to(device), lengths, packed)

    @classmethod
    def of_packed(cls, packed: PackedBatch) -> "Batch":
        """The padded form of a packed batch, on the CPU."""
        lengths = packed.packing.seqlens
        real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        ids, segments = torch.zeros(2, *real.shape, dtype=torch.int64).unbind()
        ids[real], segments[real] = packed.input_ids, packed.token_type_ids
        return cls(ids, real.long(), segments, tuple(lengths), packed)

    @property
    def padded(self) -> bool:
        return len(set(self.lengths)) > 1

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @cached_property
    def arrays(self) -> dict[str, NDArray[np.int64]]:
        values = (self.ids, self.mask, self.segments)
        return {name: value.numpy() for name, value in zip(INPUTS, values, strict=True)}

    def windows_of(self, logits: Logits) -> list[Tensor]:
        """The logits of each window, float32 ``[n, 2]``, from padded or packed ones."""
        both = torch.stack([torch.as_tensor(part).float() for part in logits], -1)
        if both.ndim == 2:
            return list(both.split(self.lengths))
        return [row[:length] for row, length in zip(both, self.lengths, strict=True)]


def sized_batches(size: int, work: Sequence[Window], device: torch.device | str = "cpu") -> list[Batch]:
    """Batches of ``size`` windows, in order."""
    return [Batch.of(work[start : start + size], device) for start in range(0, len(work), size)]


def token_batches(tokens: int, work: Sequence[Window], device: torch.device | str = "cpu") -> list[Batch]:
    """Batches of at most ``tokens`` tokens, or of one window, in order."""
    groups: list[list[Window]] = [[]]
    for window in work:
        if groups[-1] and sum(map(len, groups[-1])) + len(window) > tokens:
            groups.append([])
        groups[-1].append(window)
    return [Batch.of(group, device) for group in groups]


def squad_lengths(count: int) -> list[int]:
    """Tokens in the first windows of SQuAD's development set, as recorded."""
    lengths: list[int] = json.loads(_LENGTHS_FILE.read_text("utf-8"))["lengths"]
    return lengths[:count]


def random_windows(lengths: Sequence[int]) -> list[Window]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1000, 30000, (length,), generator=generator).tolist() for length in lengths]


def squad_windows(squad: Path | None, count: int) -> list[Window]:
    """The first windows of a SQuAD file, or random tokens at the lengths of the development set's."""
    if squad is None:
        return random_windows(squad_lengths(count))
    tokenizer, config = load_tokenizer(resolve_source(None)), load_model().config
    cls, sep = special_ids(tokenizer, config.vocab_size)
    found: list[Window] = []
    for question in read_squad(squad):
        example = WindowSize(384, 128, config).example(*tokenize(tokenizer, [question.question, question.context]))
        found += [window.input_ids for window in windows(example, cls, sep)]
        if len(found) >= count:
            break
    return found[:count]
