"""The steps of the network as training needs them: differentiable, with BERT's dropout."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dtbert.kernels import AttentionScore, Backend, Kept, Packing, TokenIds
from dtbert.kernels.parameters import Embeddings, LayerNorm, Linear
from dtbert.kernels.reference import attention_logits, score_of, split_heads
from dtbert.training.options import AttentionTarget

# One layer's attention for distillation: tensors [b, N, n, n] of b sequences each, 0 past a sequence's end.
AttentionPieces = list[Tensor]


class TrainingBackend(Backend):
    """The steps with dropout after the embeddings, on attention probabilities and before residuals.

    Args:
        hidden_dropout: probability for hidden states.
        attention_dropout: probability for attention probabilities.
        keep: collect each layer's attention in ``kept``: its probabilities, or the scores before the softmax.
        padded: compute attention for all sequences at once, padded to the longest, instead of one after the other;
            by default where the tensors are not on a CPU, for there a launch costs more than the padding.

    Scores of tokens come from the probabilities before dropout, and no gradient goes through them.
    """

    def __init__(
        self,
        hidden_dropout: float = 0.0,
        attention_dropout: float = 0.0,
        *,
        keep: AttentionTarget | None = None,
        padded: bool | None = None,
    ) -> None:
        self.hidden_dropout, self.attention_dropout = hidden_dropout, attention_dropout
        self.keep, self.padded = keep, padded
        self.kept: list[AttentionPieces] = []

    def embed(self, ids: TokenIds, tables: Embeddings) -> Tensor:
        return F.dropout(super().embed(ids, tables), self.hidden_dropout)

    def add_norm(
        self, x: Tensor, layer: Linear, residual: Tensor, norm: LayerNorm, rows: Tensor | None = None
    ) -> Tensor:
        if rows is not None:
            residual = residual.index_select(0, rows)
        summed = F.dropout(self.linear(x, layer), self.hidden_dropout) + residual
        return F.layer_norm(summed, norm.weight.shape, norm.weight, norm.bias, norm.eps)

    def attention(self, qkv: Tensor, packing: Packing, num_heads: int, queries: Kept | None = None) -> Tensor:
        return self._attention(qkv, packing, num_heads, None, queries)[0]

    def scored_attention(
        self, qkv: Tensor, packing: Packing, num_heads: int, score: AttentionScore
    ) -> tuple[Tensor, Tensor]:
        context, scores = self._attention(qkv, packing, num_heads, score, None)
        return context, torch.cat(scores)

    @torch.no_grad()
    def significance(
        self, qkv: Tensor, packing: Packing, num_heads: int, score: AttentionScore, segments: Tensor | None = None
    ) -> Tensor:
        """Without a gradient; ``cls`` computes its own query alone."""
        if score != "cls" and not self._pads(qkv):
            return super().significance(qkv, packing, num_heads, score, segments)
        query, key, value = split_heads(qkv, num_heads)
        places = _Places.of(packing)
        query = places.pad(query)[:, :, :1] if score == "cls" else places.pad(query)
        _, probabilities = _probabilities(query, places.pad(key), places.real[:, None, None])
        if score != "cls":
            probabilities = probabilities * places.real[:, None, :, None]
        padded = None if segments is None else places.pad_ids(segments)
        return places.unpad_scores(score_of(score, probabilities, places.pad(value), padded))

    def select(self, significance: Tensor, packing: Packing, target: Packing) -> Kept:
        """All sequences at once."""
        sequence = _sequences(packing)
        order = torch.sort(significance, descending=True, stable=True).indices
        order = order[torch.sort(sequence[order], stable=True).indices]
        rank = torch.arange(len(order), device=order.device) - packing.cu_seqlens[sequence]
        return Kept(order[rank < target.cu_seqlens.diff()[sequence]].sort().values, target)

    def _attention(
        self, qkv: Tensor, packing: Packing, num_heads: int, score: AttentionScore | None, queries: Kept | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Context, and scores in pieces, none where none are asked for."""
        query, key, value = split_heads(qkv, num_heads)
        if queries is not None:
            query = query.index_select(1, queries.rows)
        asked = packing if queries is None else queries.packing
        if self._pads(qkv):
            return self._padded_attention(query, key, value, (_Places.of(asked), _Places.of(packing)), score)
        contexts, scores = [], []
        self._begin_layer()
        # Split, not sliced: the gradient of a slice is a tensor of the whole batch's size.
        seqlens = list(packing.seqlens)
        parts = query.split(list(asked.seqlens), 1), key.split(seqlens, 1), value.split(seqlens, 1)
        for one_query, one_key, one_value in zip(*parts, strict=True):
            logits, probabilities = _probabilities(one_query, one_key)
            if score is not None:
                scores.append(score_of(score, probabilities.detach(), one_value.detach()))
            self._keep(logits[None], probabilities[None])
            dropped = F.dropout(probabilities, self.attention_dropout).to(one_value.dtype)
            contexts.append((dropped @ one_value).transpose(0, 1).flatten(1))
        return torch.cat(contexts), scores

    def _padded_attention(
        self, query: Tensor, key: Tensor, value: Tensor, places: "tuple[_Places, _Places]", score: AttentionScore | None
    ) -> tuple[Tensor, list[Tensor]]:
        of_queries, of_keys = places
        query, key, value = of_queries.pad(query), of_keys.pad(key), of_keys.pad(value)  # each [B, N, S, D]
        real = of_keys.real[:, None, None]  # [B, 1, 1, S]
        self._begin_layer()
        if score is None and self.keep is None:
            context = F.scaled_dot_product_attention(query, key, value, real, self.attention_dropout)
            return of_queries.unpad(context).transpose(0, 1).flatten(1), []
        logits, probabilities = _probabilities(query, key, real)
        both = real & of_queries.real[:, None, :, None]
        if self.keep is not None:
            self._keep(logits.masked_fill(~both, 0), probabilities * both)
        dropped = F.dropout(probabilities, self.attention_dropout).to(value.dtype)
        context = of_queries.unpad(dropped @ value).transpose(0, 1).flatten(1)
        if score is None:
            return context, []
        scores = score_of(score, probabilities.detach() * both, value.detach())
        return context, [of_keys.unpad_scores(scores)]

    def _pads(self, x: Tensor) -> bool:
        return not x.is_cpu if self.padded is None else self.padded

    def _begin_layer(self) -> None:
        if self.keep is not None:
            self.kept.append([])

    def _keep(self, logits: Tensor, probabilities: Tensor) -> None:
        if self.keep is not None:
            self.kept[-1].append(logits if self.keep == "scores" else probabilities)


class _Places(NamedTuple):
    """Where packed tokens go in a padded batch: rows of ``[B * S]``, and which of ``[B, S]`` are real."""

    rows: Tensor
    real: Tensor

    @classmethod
    def of(cls, packing: Packing) -> "_Places":
        longest, sequence = packing.max_seqlen, _sequences(packing)
        columns = torch.arange(packing.num_tokens, device=sequence.device) - packing.cu_seqlens[sequence]
        real = torch.arange(longest, device=sequence.device) < packing.cu_seqlens.diff()[:, None]
        return cls(sequence * longest + columns, real)

    def pad(self, packed: Tensor) -> Tensor:
        """``[N, T, D]`` to ``[B, N, S, D]``, 0 past each sequence's end."""
        padded = packed.new_zeros(len(packed), self.real.numel(), packed.shape[2]).index_copy(1, self.rows, packed)
        return padded.unflatten(1, self.real.shape).transpose(0, 1)

    def unpad(self, padded: Tensor) -> Tensor:
        """``[B, N, S, D]`` to ``[N, T, D]``."""
        return padded.transpose(0, 1).flatten(1, 2).index_select(1, self.rows)

    def pad_ids(self, ids: Tensor) -> Tensor:
        """``[T]`` to ``[B, S]``."""
        return self.pad(ids[None, :, None])[:, 0, :, 0]

    def unpad_scores(self, scores: Tensor) -> Tensor:
        """``[B, S]`` to ``[T]``."""
        return scores.flatten().index_select(0, self.rows)


def _sequences(packing: Packing) -> Tensor:
    """Which sequence each packed token is of, int64 ``[T]``."""
    lengths = packing.cu_seqlens.diff().long()
    numbers = torch.arange(len(lengths), device=lengths.device)
    return numbers.repeat_interleave(lengths, output_size=packing.num_tokens)


def _probabilities(query: Tensor, key: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scores ``[..., q, n]`` in float32, and their softmax over the ``real`` keys."""
    scores = attention_logits(query, key)
    if real is not None:
        scores = scores.masked_fill(~real, -torch.inf)
    return scores, scores.softmax(-1)
