"""The steps of the network as training needs them: differentiable, with BERT's dropout."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dtbert.kernels import AttentionScore, reference
from dtbert.kernels.reference import score_from_probabilities


class TrainingBackend:
    """The backend `reference` with dropout after the embeddings, on attention probabilities and before residuals.

    Args:
        hidden_dropout: probability for hidden states.
        attention_dropout: probability for attention probabilities.
        keep_probabilities: collect the attention probabilities in ``probabilities``, for distillation: per layer, one
            tensor ``[N, n, n]`` per sequence.

    Scores of tokens come from the probabilities before dropout, and no gradient goes through them.
    """

    linear = staticmethod(reference.linear)
    linear_gelu = staticmethod(reference.linear_gelu)
    select_tokens = staticmethod(reference.select_tokens)
    restore = staticmethod(reference.restore)

    def __init__(
        self, hidden_dropout: float = 0.0, attention_dropout: float = 0.0, *, keep_probabilities: bool = False
    ) -> None:
        self.hidden_dropout, self.attention_dropout = hidden_dropout, attention_dropout
        self.keep_probabilities = keep_probabilities
        self.probabilities: list[list[Tensor]] = []

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
        seqlens = cu_seqlens.diff().tolist()
        queries = seqlens if cu_seqlens_q is None else cu_seqlens_q.diff().tolist()
        segments = [None] * len(seqlens) if token_type_ids is None else token_type_ids.split(seqlens)
        query, key, value = qkv.unflatten(1, (3, num_heads, -1)).permute(1, 2, 0, 3)  # each [N, T, D]
        if query_indices is not None:
            query = query.index_select(1, query_indices)
        contexts, scores, kept = [], [], []
        # Split, not sliced: the gradient of a slice is a tensor of the whole batch's size.
        parts = zip(query.split(queries, 1), key.split(seqlens, 1), value.split(seqlens, 1), segments, strict=True)
        for one_query, one_key, one_value, one_segments in parts:
            probabilities = reference.attention_probabilities(one_query, one_key)
            if significance is not None:
                detached = probabilities.detach(), one_value.detach()
                scores.append(score_from_probabilities(significance, *detached, one_segments))
            if self.keep_probabilities:
                kept.append(probabilities)
            dropped = F.dropout(probabilities, self.attention_dropout).to(one_value.dtype)
            contexts.append((dropped @ one_value).transpose(0, 1).flatten(1))
        if self.keep_probabilities:
            self.probabilities.append(kept)
        return torch.cat(contexts), torch.cat(scores) if significance is not None else None

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
        if kind != "cls":
            return reference.attention_significance(qkv, cu_seqlens, max_seqlen, num_heads, kind, token_type_ids)
        query, key, _ = qkv.unflatten(1, (3, num_heads, -1)).permute(1, 2, 0, 3)
        starts = cu_seqlens.tolist()
        return torch.cat(
            [
                reference.attention_probabilities(query[:, begin : begin + 1], key[:, begin:end]).sum((0, 1))
                for begin, end in zip(starts, starts[1:], strict=False)
            ]
        )
