"""Attention as training on a CPU computes it: sequence after sequence, with dropout, forward and backward."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dtbert.kernels import AttentionScore, Kept, Packing, native
from dtbert.kernels.reference import score_of, split_heads
from dtbert.training import compiled
from dtbert.training.dropout import draw_signs, rounded


def attention_by_sequence(
    qkv: Tensor,
    packing: Packing,
    num_heads: int,
    probability: float,
    score: AttentionScore | None = None,
    queries: Kept | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`Backend.attention`, some of whose probabilities are dropped, in the dtype of ``qkv``; compiled where that pays.

    Args:
        qkv, packing, num_heads, queries: of `Backend.attention`.
        probability: of a dropped one.
        score: of the probabilities before any is dropped.

    Returns:
        Context ``[T, H]`` or ``[K, H]``, and the score ``[T]``, without a gradient; None where none is asked for.
    """
    if native.trains_attention(qkv, num_heads):
        context = compiled.attention(qkv, packing, num_heads, probability, queries)
        if score is None:
            return context, None
        return context, native.Native().significance(qkv.detach(), packing, num_heads, score)
    found = _BySequence.apply(qkv, packing, num_heads, probability, score, queries)  # type: ignore[no-untyped-call]
    return cast(tuple[Tensor, Tensor | None], found)


class _BySequence(torch.autograd.Function):
    """Of a sequence one matrix ``[N, q, n]`` is held for the gradient: its probabilities, below 0 where dropped.

    Plain operators would hold the probabilities, the mask and their product, and take twice as many passes over them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        packing: Packing,
        num_heads: int,
        probability: float,
        score: AttentionScore | None,
        queries: Kept | None,
    ) -> tuple[Tensor, Tensor | None]:
        query, key, value = split_heads(qkv, num_heads)  # each [N, T, D]
        asked = packing
        if queries is not None:
            query, asked = query.index_select(1, queries.rows), queries.packing
        query = query * query.shape[-1] ** -0.5
        dropped, scale = rounded(probability)
        context = qkv.new_empty(asked.num_tokens, qkv.shape[1] // 3)
        by_head = context.unflatten(1, (num_heads, -1)).transpose(0, 1)
        held, scores = [], []
        for rows, q_rows in zip(packing.slices, asked.slices, strict=True):
            logits = query[:, q_rows] @ key[:, rows].transpose(1, 2)
            probabilities = kept = torch.softmax(logits, -1, out=logits)
            if score is not None:
                scores.append(score_of(score, probabilities, value[:, rows]))
            if dropped:
                kept = probabilities.copysign_(draw_signs(probabilities.shape, dropped)).relu()
            by_head[:, q_rows] = kept @ value[:, rows]
            held.append(probabilities)
        ctx.save_for_backward(query, key, value, *held)
        ctx.packing, ctx.asked, ctx.scale = packing, asked, scale
        ctx.rows = None if queries is None else queries.rows
        significance = None if score is None else torch.cat(scores)
        if significance is not None:
            ctx.mark_non_differentiable(significance)
        return context.mul_(scale) if dropped else context, significance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, *held = ctx.saved_tensors
        num_heads = len(key)
        of_qkv = gradient.new_empty(key.shape[1], 3 * gradient.shape[1])
        of_query, of_key, of_value = split_heads(of_qkv, num_heads)
        of_asked = of_query if ctx.rows is None else torch.empty_like(query)
        gradient = (gradient * ctx.scale).unflatten(1, (num_heads, -1)).transpose(0, 1)
        for rows, q_rows, signed in zip(ctx.packing.slices, ctx.asked.slices, held, strict=True):
            of_context, q, k = gradient[:, q_rows], query[:, q_rows], key[:, rows]
            of_value[:, rows] = signed.relu().transpose(1, 2) @ of_context
            # Where a probability is 0, its sign is of no account.
            of_kept = torch.ops.aten.threshold_backward(of_context @ value[:, rows].transpose(1, 2), signed, 0)
            of_logits = torch._softmax_backward_data(of_kept, signed.abs(), -1, signed.dtype)
            of_asked[:, q_rows] = of_logits @ k
            of_key[:, rows] = of_logits.transpose(1, 2) @ q
        of_asked *= query.shape[-1] ** -0.5
        if ctx.rows is not None:
            of_query.zero_().index_copy_(1, ctx.rows, of_asked)
        return of_qkv, None, None, None, None, None
