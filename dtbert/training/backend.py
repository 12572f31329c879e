"""The steps of the network as training needs them: differentiable, with BERT's dropout."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dtbert.kernels import Activation, AttentionScore, Backend, Kept, Packing, TokenIds, native
from dtbert.kernels.parameters import Embeddings, LayerNorm, Linear
from dtbert.kernels.reference import activate, score_of, split_heads
from dtbert.training import compiled
from dtbert.training.attention import attention_by_sequence
from dtbert.training.dropout import dropout
from dtbert.training.options import AttentionTarget
from dtbert.training.places import Places, places_of
from dtbert.training.products import linear

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

    def keeping_nothing(self) -> "TrainingBackend":
        """The same for passes of which nobody reads the attention; what was kept of those before is let go."""
        self.kept.clear()
        return TrainingBackend(self.hidden_dropout, self.attention_dropout, padded=self.padded)

    def embed(self, ids: TokenIds, tables: Embeddings) -> Tensor:
        return dropout(super().embed(ids, tables), self.hidden_dropout)

    def linear(self, x: Tensor, layer: Linear, activation: Activation | None = None) -> Tensor:
        scaled = layer.scale is not None  # a teacher may be
        product = super().linear(x, layer) if scaled else linear(x, layer.weight, layer.bias)
        if activation is None:
            return product
        return (
            compiled.gelu(product) if activation == "gelu" and native.trains(product) else activate(product, activation)
        )

    def add_norm(
        self, x: Tensor, layer: Linear, residual: Tensor, norm: LayerNorm, rows: Tensor | None = None
    ) -> Tensor:
        if rows is not None:
            residual = residual.index_select(0, rows)
        product = self.linear(x, layer)
        if native.trains(product):
            return compiled.add_norm(product, residual, norm, self.hidden_dropout)
        summed = dropout(product, self.hidden_dropout) + residual
        return F.layer_norm(summed, norm.weight.shape, norm.weight, norm.bias, norm.eps)

    def attention(self, qkv: Tensor, packing: Packing, num_heads: int, queries: Kept | None = None) -> Tensor:
        return self._attention(qkv, packing, num_heads, None, queries)[0]

    def scored_attention(
        self, qkv: Tensor, packing: Packing, num_heads: int, score: AttentionScore
    ) -> tuple[Tensor, Tensor]:
        if self._pads(qkv):
            # Looked at twice, no probabilities are held for the gradient.
            return self.attention(qkv, packing, num_heads), self.significance(qkv, packing, num_heads, score)
        context, scores = self._attention(qkv, packing, num_heads, score, None)
        assert scores is not None
        return context, scores

    @torch.no_grad()
    def significance(
        self, qkv: Tensor, packing: Packing, num_heads: int, score: AttentionScore, segments: Tensor | None = None
    ) -> Tensor:
        """Without a gradient; ``cls`` computes its own query alone."""
        if score != "cls" and not self._pads(qkv):
            return super().significance(qkv, packing, num_heads, score, segments)
        places = places_of(packing)
        query, key, value = _pad_heads(qkv, places, num_heads)
        query = query[:, :, :1] if score == "cls" else query
        _, probabilities = _probabilities(query, key, places.real[:, None, None])
        if score != "cls":
            probabilities = probabilities * places.real[:, None, :, None]
        padded = None if segments is None else places.pad(segments)
        return places.unpad(score_of(score, probabilities, value, padded))

    def select(self, significance: Tensor, packing: Packing, target: Packing) -> Kept:
        """All sequences at once."""
        places, after = places_of(packing), places_of(target)
        # Padding comes last: it is lowest, and of equals the lower place stays before the higher.
        order = places.pad(significance, -torch.inf).sort(dim=1, descending=True, stable=True).indices
        order = order[:, : target.max_seqlen].masked_fill(~after.real, packing.max_seqlen).sort(dim=1).values
        return Kept(after.unpad(order + packing.cu_seqlens[:-1, None]), target)

    def _attention(
        self, qkv: Tensor, packing: Packing, num_heads: int, score: AttentionScore | None, queries: Kept | None
    ) -> tuple[Tensor, Tensor | None]:
        """Context, and the score where one is asked for and nothing is padded."""
        if self.keep is not None:
            self.kept.append([])
        if not self._pads(qkv):
            attend = attention_by_sequence if qkv.is_cpu and self.keep is None else self._plain_attention
            return attend(qkv, packing, num_heads, self.attention_dropout, score, queries)
        asked, rows = (packing, None) if queries is None else (queries.packing, queries.rows)
        attention = self._packed_attention if self._is_packed(qkv) else self._padded_attention
        return attention(qkv, (asked, packing), num_heads, rows), None

    def _plain_attention(
        self,
        qkv: Tensor,
        packing: Packing,
        num_heads: int,
        probability: float,
        score: AttentionScore | None,
        queries: Kept | None,
    ) -> tuple[Tensor, Tensor | None]:
        """As `attention_by_sequence`, by plain operators: what is kept has a gradient, too."""
        query, key, value = split_heads(qkv, num_heads)
        asked = packing
        if queries is not None:
            query, asked = query.index_select(1, queries.rows), queries.packing
        contexts, scores = [], []
        # Split, not sliced: the gradient of a slice is a tensor of the whole batch's size.
        seqlens = list(packing.seqlens)
        parts = query.split(list(asked.seqlens), 1), key.split(seqlens, 1), value.split(seqlens, 1)
        for one_query, one_key, one_value in zip(*parts, strict=True):
            logits, probabilities = _probabilities(one_query, one_key)
            if score is not None:
                scores.append(score_of(score, probabilities.detach(), one_value.detach()))
            self._keep(logits[None], probabilities[None])
            dropped = dropout(probabilities, probability).to(one_value.dtype)
            contexts.append((dropped @ one_value).transpose(0, 1).flatten(1))
        return torch.cat(contexts), torch.cat(scores) if scores else None

    def _packed_attention(
        self, qkv: Tensor, packings: tuple[Packing, Packing], num_heads: int, rows: Tensor | None
    ) -> Tensor:
        """By flash-attention: in half precision on a GPU, without padding and without a stored matrix."""
        asked, packing = packings
        query, key, value = qkv.unflatten(1, (3, num_heads, -1)).unbind(1)
        if rows is not None:
            query = query.index_select(0, rows)
        # The operator of torch.nn.attention.varlen, which has no dropout.
        context = torch.ops.aten._flash_attention_forward(
            query,
            key,
            value,
            asked.cu_seqlens,
            packing.cu_seqlens,
            asked.max_seqlen,
            packing.max_seqlen,
            self.attention_dropout,
            False,
            return_debug_mask=False,
        )[0]
        return cast(Tensor, context.flatten(1))

    def _padded_attention(
        self, qkv: Tensor, packings: tuple[Packing, Packing], num_heads: int, rows: Tensor | None
    ) -> Tensor:
        of_queries, of_keys = map(places_of, packings)
        query, key, value = _pad_heads(qkv, of_keys, num_heads)
        if rows is not None:
            asked = qkv.unflatten(1, (3, num_heads, -1))[:, 0].index_select(0, rows)
            query = of_queries.pad(asked).transpose(1, 2)
        real = of_keys.real[:, None, None]  # [B, 1, 1, S]
        if self.keep is None:
            context = F.scaled_dot_product_attention(query, key, value, real, self.attention_dropout)
        else:
            logits, probabilities = _probabilities(query, key, real)
            both = real & of_queries.real[:, None, :, None]
            self._keep(logits.masked_fill(~both, 0), probabilities * both)
            context = dropout(probabilities, self.attention_dropout).to(value.dtype) @ value
        return of_queries.unpad(context.transpose(1, 2)).flatten(1)

    def _pads(self, x: Tensor) -> bool:
        return not x.is_cpu if self.padded is None else self.padded

    def _is_packed(self, qkv: Tensor) -> bool:
        return qkv.is_cuda and qkv.dtype in (torch.bfloat16, torch.float16) and self.keep is None

    def _keep(self, logits: Tensor, probabilities: Tensor) -> None:
        if self.keep is not None:
            self.kept[-1].append(logits if self.keep == "scores" else probabilities)


def _pad_heads(qkv: Tensor, places: Places, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each ``[B, N, S, D]``, from ``[T, 3 * H]``."""
    query, key, value = places.pad(qkv).unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    return query, key, value


def _probabilities(query: Tensor, key: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scores ``[..., q, n]``, and their softmax over the ``real`` keys in float32 or wider."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if real is not None:
        scores = scores.masked_fill(~real, -torch.inf)
    return scores, scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
