"""From tokens to rows: packed batches of texts through a model."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from dtbert.model import OwnScorer, PackedBatch, Policy, SequenceModel
from dtbert.qa.calls import P, check_count, resolved
from dtbert.text.reading import TextReader, TextTokens


class TextModel:
    """What a classifier and a sentence encoder share: a model, its reader, and how much goes through at once.

    Args:
        model: in evaluation mode.
        tokenizer: the model's own; its truncation and padding are left out.
        batch_tokens: tokens that go through the model together, at least as many as its positions; by default 2,048 on
            a CPU and 32,768 elsewhere.

    Raises:
        TypeError, ValueError: not the model's tokenizer, or a number of tokens that is none or too small.
    """

    def __init__(self, model: SequenceModel, tokenizer: Tokenizer, batch_tokens: int | None = None) -> None:
        if batch_tokens is None:
            batch_tokens = max(2048 if model.device.type == "cpu" else 32768, model.config.max_position_embeddings)
        check_count("batch_tokens", batch_tokens, model.config.max_position_embeddings)
        self.reader = TextReader(tokenizer, model.config)
        self.config, self.tokenizer, self.batch_tokens = model.config, self.reader.tokenizer, batch_tokens

    @property
    def own_scorer(self) -> OwnScorer:
        """What drops tokens where a schedule names no scorer; ``received`` where the config does not say."""
        return self.config.own_scorer

    def resolve(self, schedule: P | None) -> P | None:
        """The schedule as it is run, as `dtbert.QuestionAnswerer.resolve`."""
        return resolved(schedule, self.config, self.own_scorer)


# Called with the numbers of some texts, and how many tokens of each of them left each layer.
Watch = Callable[[Sequence[int], Sequence[tuple[int, ...]]], object]


def rows_of(
    model: SequenceModel,
    texts: Sequence[TextTokens],
    schedule: Policy | None,
    batch_tokens: int,
    watch: Watch | None = None,
) -> Tensor:
    """The model's row of each text, in order: float32 ``[n, row_size]`` on the CPU."""
    rows = torch.empty(len(texts), model.row_size)
    order: list[int] = []
    found: list[Tensor] = []
    for numbers in batches([len(one.ids) for one in texts], batch_tokens):
        with torch.inference_mode():
            batch = pack([texts[number] for number in numbers], model.device)
            if watch is None:
                found.append(model.forward_packed(batch, schedule))
            else:
                rows_and_kept = model.forward_packed(batch, schedule, output_kept=True)
                found.append(rows_and_kept.rows)
                watch(numbers, list(zip(*(layer.lengths for layer in rows_and_kept.kept), strict=True)))
        order += numbers
    if found:
        # What was computed waits on the device until all of it is there.
        rows[order] = torch.cat(found).float().cpu()
    return rows


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """The numbers of all texts, the longest first, as many at a time as ``batch_tokens`` holds."""
    batch: list[int] = []
    room = batch_tokens
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        if batch and lengths[number] > room:
            yield batch
            batch, room = [], batch_tokens
        batch.append(number)
        room -= lengths[number]
    if batch:
        yield batch


def pack(texts: Sequence[TextTokens], device: torch.device) -> PackedBatch:
    """The packed batch of some texts."""
    lengths = np.array([len(one.ids) for one in texts])
    positions = np.arange(lengths.sum()) - (lengths.cumsum() - lengths).repeat(lengths)
    segments = positions >= np.array([one.num_first for one in texts]).repeat(lengths)
    rows = np.stack([np.concatenate([one.ids for one in texts]), segments, positions])
    return PackedBatch.from_rows(torch.from_numpy(rows), lengths.tolist(), device)
