"""Attention over B rows of n tokens each with a mask, in plain torch: no shape depends on how long a sequence is.

So a graph can be made of it, and no host waits to learn a length from the device.
"""

import torch
from torch import Tensor

from dtbert.kernels.backend import Backend
from dtbert.kernels.packing import Kept, Packing
from dtbert.kernels.reference import AttentionScore, attention_logits, score_of


class Rectangle(Backend):
    """The plain steps over B rows of n tokens each; attention is among the tokens of a row that a mask has left."""

    def __init__(self, batch_size: int, length: int, mask: Tensor | None) -> None:
        self.shape, self.mask = (batch_size, length), mask

    def first_tokens(self, like: Tensor) -> Tensor:
        """The column of the first token of each row that is left, int64 ``[B, 1]``."""
        if self.mask is None:
            return torch.zeros_like(like[:, :1], dtype=torch.int64)
        return self.mask.int().argmax(1, keepdim=True)

    def attention(self, qkv: Tensor, packing: Packing, num_heads: int, queries: Kept | None = None) -> Tensor:
        assert queries is None
        return self.context(qkv, num_heads)

    def context(self, qkv: Tensor, num_heads: int, columns: Tensor | None = None) -> Tensor:
        """`Backend.attention`, of the queries in some columns alone: ``[B, K]`` to ``[B * K, H]``."""
        query, key, value = self._heads(qkv, num_heads)
        if columns is not None:
            query = _columns(query, columns)
        probabilities = self._probabilities(query, key)
        return (probabilities @ value.to(probabilities.dtype)).transpose(1, 2).flatten(2).flatten(0, 1).to(qkv.dtype)

    def scored_attention(
        self, qkv: Tensor, packing: Packing, num_heads: int, score: AttentionScore
    ) -> tuple[Tensor, Tensor]:
        return self.attention(qkv, packing, num_heads), self.significance(qkv, packing, num_heads, score)

    def significance(
        self, qkv: Tensor, packing: Packing, num_heads: int, score: AttentionScore, segments: Tensor | None = None
    ) -> Tensor:
        query, key, value = self._heads(qkv, num_heads)
        if score == "cls":
            query = _columns(query, self.first_tokens(query[:, 0, :, 0]))
        probabilities = self._probabilities(query, key)
        if score != "cls" and self.mask is not None:
            probabilities = probabilities.masked_fill(~self.mask[:, None, :, None], 0)
        if segments is not None:
            segments = segments.view(self.shape)
        return score_of(score, probabilities, value, segments).flatten()

    def _heads(self, qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each ``[B, N, n, D]``."""
        query, key, value = qkv.view(*self.shape, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
        return query, key, value

    def _probabilities(self, query: Tensor, key: Tensor) -> Tensor:
        logits = attention_logits(query, key)
        if self.mask is not None:
            # Not infinite: a row with nothing left would be NaN, and so would gradients.
            logits = logits.masked_fill(~self.mask[:, None, None], torch.finfo(logits.dtype).min)
        return logits.softmax(-1)


def _columns(query: Tensor, columns: Tensor) -> Tensor:
    """The queries ``[B, N, K, D]`` in the columns ``[B, K]`` of ``[B, N, n, D]``."""
    return query.gather(2, columns[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))


def packed_attention(
    qkv: Tensor,
    packing: Packing,
    num_heads: int,
    score: AttentionScore | None = None,
    segments: Tensor | None = None,
    queries: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Context and, where a score is asked for, significance, of packed tokens whose lengths the device alone knows.

    Args:
        qkv, num_heads: as `Backend.attention`.
        packing: of `Packing.on_device`. Where its ``max_seqlen`` is understated, or rows are in no sequence, what comes
            back for some tokens means nothing.
        score, segments: as `Backend.significance`.
        queries: rows whose context is asked for, int64 ``[K]``; all by default.
    """
    batch_size, length, tokens = packing.cu_seqlens.shape[0] - 1, packing.max_seqlen, qkv.shape[0]
    if batch_size == 0 or length == 0 or tokens == 0:
        nothing = None if score is None else qkv.new_zeros(tokens, dtype=torch.promote_types(qkv.dtype, torch.float32))
        return qkv.new_zeros(tokens if queries is None else queries.shape[0], qkv.shape[1] // 3), nothing
    begins = packing.cu_seqlens[:-1, None].long()
    columns = torch.arange(length, device=qkv.device)
    mask = columns < packing.cu_seqlens.diff()[:, None]
    rows = (begins + columns).clamp(0, tokens - 1).flatten()
    rectangle = Rectangle(batch_size, length, mask)
    of_rows = qkv.index_select(0, rows)
    # Where each token stands in the rectangle.
    token = torch.arange(tokens, device=qkv.device)
    sequence = torch.searchsorted(packing.cu_seqlens[1:], token, right=True).clamp(max=batch_size - 1)
    places = (sequence * length + token - begins[:, 0].index_select(0, sequence)).clamp(0, batch_size * length - 1)
    asked = places if queries is None else places.index_select(0, queries)
    context = rectangle.context(of_rows, num_heads).index_select(0, asked)
    if score is None:
        return context, None
    segments = None if segments is None else segments.index_select(0, rows)
    return context, rectangle.significance(of_rows, packing, num_heads, score, segments).index_select(0, places)
