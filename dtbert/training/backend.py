"""The steps of the network as training needs them: differentiable, with BERT's dropout."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dtbert.kernels import AttentionScore, reference
from dtbert.kernels.reference import attention_logits, score_from_probabilities

AttentionTarget = Literal["probabilities", "scores"]

# One layer's attention for distillation: tensors [b, N, n, n] of b sequences each, 0 past a sequence's end.
AttentionPieces = list[Tensor]


class TrainingBackend:
    """The backend `reference` with dropout after the embeddings, on attention probabilities and before residuals.

    Args:
        hidden_dropout: probability for hidden states.
        attention_dropout: probability for attention probabilities.
        keep: collect each layer's attention in ``kept``: its probabilities, or the scores before the softmax.
        padded: compute attention for all sequences at once, padded to the longest, instead of one after the other;
            by default where the tensors are not on a CPU, for there a launch costs more than the padding.

    Scores of tokens come from the probabilities before dropout, and no gradient goes through them.
    """

    linear = staticmethod(reference.linear)
    linear_gelu = staticmethod(reference.linear_gelu)
    restore = staticmethod(reference.restore)

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

    def embed_layer_norm(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        token_type_ids: Tensor,
        word: Tensor,
        position: Tensor,
        token_type: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        eps: float,
    ) -> Tensor:
        states = reference.embed_layer_norm(
            input_ids, position_ids, token_type_ids, word, position, token_type, norm_weight, norm_bias, eps
        )
        return F.dropout(states, self.hidden_dropout)

    def linear_add_layer_norm(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        eps: float,
        keep_indices: Tensor | None = None,
    ) -> Tensor:
        if keep_indices is not None:
            residual = residual.index_select(0, keep_indices)
        summed = F.dropout(reference.linear(x, weight, bias), self.hidden_dropout) + residual
        return F.layer_norm(summed, norm_weight.shape, norm_weight, norm_bias, eps)

    def attention(
        self,
        qkv: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        num_heads: int,
        *,
        significance: AttentionScore | None = None,
        token_type_ids: Tensor | None = None,
        query_indices: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """`reference.attention`, with dropout."""
        query, key, value = qkv.unflatten(1, (3, num_heads, -1)).permute(1, 2, 0, 3)  # each [N, T, D]
        if query_indices is not None:
            query = query.index_select(1, query_indices)
        queries = cu_seqlens if cu_seqlens_q is None else cu_seqlens_q
        if self._pads(qkv):
            places = _Places.of(queries, query.shape[1]), _Places.of(cu_seqlens, key.shape[1])
            return self._padded_attention(query, key, value, places, significance, token_type_ids)
        seqlens = cu_seqlens.diff().tolist()
        segments = [None] * len(seqlens) if token_type_ids is None else token_type_ids.split(seqlens)
        contexts, scores = [], []
        self._begin_layer()
        # Split, not sliced: the gradient of a slice is a tensor of the whole batch's size.
        parts = zip(
            query.split(queries.diff().tolist(), 1),
            key.split(seqlens, 1),
            value.split(seqlens, 1),
            segments,
            strict=True,
        )
        for one_query, one_key, one_value, one_segments in parts:
            logits, probabilities = _probabilities(one_query, one_key)
            if significance is not None:
                detached = probabilities.detach(), one_value.detach()
                scores.append(score_from_probabilities(significance, *detached, one_segments))
            self._keep(logits[None], probabilities[None])
            dropped = F.dropout(probabilities, self.attention_dropout).to(one_value.dtype)
            contexts.append((dropped @ one_value).transpose(0, 1).flatten(1))
        return torch.cat(contexts), torch.cat(scores) if significance is not None else None

    def _padded_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        places: "tuple[_Places, _Places]",
        significance: AttentionScore | None,
        token_type_ids: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        of_queries, of_keys = places
        query, key, value = of_queries.pad(query), of_keys.pad(key), of_keys.pad(value)  # each [B, N, S, D]
        real = of_keys.real[:, None, None]  # [B, 1, 1, S]
        self._begin_layer()
        if significance is None and self.keep is None:
            context = F.scaled_dot_product_attention(query, key, value, real, self.attention_dropout)
            return of_queries.unpad(context).transpose(0, 1).flatten(1), None
        logits, probabilities = _probabilities(query, key, real)
        both = real & of_queries.real[:, None, :, None]
        if self.keep is not None:
            self._keep(logits.masked_fill(~both, 0), probabilities * both)
        dropped = F.dropout(probabilities, self.attention_dropout).to(value.dtype)
        context = of_queries.unpad(dropped @ value).transpose(0, 1).flatten(1)
        if significance is None:
            return context, None
        detached = probabilities.detach() * both, value.detach()
        scores = score_from_probabilities(significance, *detached, of_keys.pad_ids(token_type_ids))
        return context, of_keys.unpad_scores(scores)

    @torch.no_grad()
    def attention_significance(
        self,
        qkv: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        num_heads: int,
        kind: AttentionScore,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """`reference.attention_significance`, without a gradient; ``cls`` computes its own query alone."""
        if kind != "cls" and not self._pads(qkv):
            return reference.attention_significance(qkv, cu_seqlens, max_seqlen, num_heads, kind, token_type_ids)
        query, key, value = qkv.unflatten(1, (3, num_heads, -1)).permute(1, 2, 0, 3)
        if not self._pads(qkv):
            firsts = query.index_select(1, cu_seqlens[:-1].long()).split(1, 1)
            keys = key.split(cu_seqlens.diff().tolist(), 1)
            return torch.cat([_probabilities(*pair)[1].sum((0, 1)) for pair in zip(firsts, keys, strict=True)])
        places = _Places.of(cu_seqlens, key.shape[1])
        query = places.pad(query)[:, :, :1] if kind == "cls" else places.pad(query)
        _, probabilities = _probabilities(query, places.pad(key), places.real[:, None, None])
        if kind != "cls":
            probabilities = probabilities * places.real[:, None, :, None]
        return places.unpad_scores(
            score_from_probabilities(kind, probabilities, places.pad(value), places.pad_ids(token_type_ids))
        )

    @staticmethod
    def select_tokens(
        significance: Tensor, cu_seqlens: Tensor, next_cu_seqlens: Tensor, num_kept: int, max_seqlen: int
    ) -> Tensor:
        """`reference.select_tokens`, for all sequences at once."""
        sequence = _sequences(cu_seqlens, len(significance))
        order = torch.sort(significance, descending=True, stable=True).indices
        order = order[torch.sort(sequence[order], stable=True).indices]
        rank = torch.arange(len(order), device=order.device) - cu_seqlens[sequence]
        return order[rank < next_cu_seqlens.diff()[sequence]].sort().values

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
    def of(cls, cu_seqlens: Tensor, num_tokens: int) -> "_Places":
        lengths = cu_seqlens.diff()
        longest = int(lengths.max())
        sequence = _sequences(cu_seqlens, num_tokens)
        columns = torch.arange(num_tokens, device=sequence.device) - cu_seqlens[sequence]
        real = torch.arange(longest, device=sequence.device) < lengths[:, None]
        return cls(sequence * longest + columns, real)

    def pad(self, packed: Tensor) -> Tensor:
        """``[N, T, D]`` to ``[B, N, S, D]``, 0 past each sequence's end."""
        padded = packed.new_zeros(len(packed), self.real.numel(), packed.shape[2]).index_copy(1, self.rows, packed)
        return padded.unflatten(1, self.real.shape).transpose(0, 1)

    def unpad(self, padded: Tensor) -> Tensor:
        """``[B, N, S, D]`` to ``[N, T, D]``."""
        return padded.transpose(0, 1).flatten(1, 2).index_select(1, self.rows)

    def pad_ids(self, ids: Tensor | None) -> Tensor | None:
        """``[T]`` to ``[B, S]``."""
        return None if ids is None else self.pad(ids[None, :, None])[:, 0, :, 0]

    def unpad_scores(self, scores: Tensor) -> Tensor:
        """``[B, S]`` to ``[T]``."""
        return scores.flatten().index_select(0, self.rows)


def _sequences(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """Which sequence each packed token is of, int64 ``[T]``."""
    numbers = torch.arange(len(cu_seqlens) - 1, device=cu_seqlens.device)
    return numbers.repeat_interleave(cu_seqlens.diff().long(), output_size=num_tokens)


def _probabilities(query: Tensor, key: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scores ``[..., q, n]`` in float32, and their softmax over the ``real`` keys."""
    scores = attention_logits(query, key)
    if real is not None:
        scores = scores.masked_fill(~real, -torch.inf)
    return scores, scores.softmax(-1)
