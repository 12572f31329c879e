"""Attention over packed sequences, fused, and the significance of its keys from a second look at the same products."""

# Triton's kernels carry no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from dtbert.kernels.triton.configs import attention_config, padded_size
from dtbert.kernels.triton.launch import INTERPRETED, architecture, cdiv, launched, operator
from dtbert.kernels.triton.significance import (
    LOG2_E,
    cls_significance,
    combine_partials,
    load_rows,
    load_whole_rows,
    sequence_bounds,
)

MAX_HEAD_SIZE = 128
# Within a sequence the kernels address by 32-bit offsets.
MAX_SEQUENCE_SPAN = 2**31 - 1


@triton.jit(
    do_not_specialize=["tokens", "kept", "query_blocks"], do_not_specialize_on_alignment=["cu_seqlens", "cu_seqlens_q"]
)
def _attention_kernel(
    qkv,  # [T, 3 * H]
    cu_seqlens,  # [B + 1]
    query_indices,  # [K], or anything without gather
    cu_seqlens_q,  # [B + 1], or anything without gather
    token_type_ids,  # [T], or anything without the score from_question
    context,  # [T, H] or [K, H], out; anything without with_context
    partials,  # [query blocks, N, T], out; anything without a score
    scale,  # log2(e) / sqrt(D)
    qkv_stride,
    tokens,
    kept,  # K, rows of query_indices
    query_blocks,
    num_heads: tl.constexpr,
    head_size: tl.constexpr,
    with_context: tl.constexpr,
    score: tl.constexpr,  # "" for none
    gather: tl.constexpr,
    upcast: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    second_n: tl.constexpr,
    block_d: tl.constexpr,
):
    # Query blocks of one sequence and head are neighbours: they read the same keys and values.
    i_program = tl.program_id(0)
    i_m, i_head = i_program % query_blocks, i_program // query_blocks % num_heads
    i_sequence = i_program // (query_blocks * num_heads)
    begin, length = sequence_bounds(cu_seqlens, i_sequence, tokens)
    query_begin, queries = begin, length
    if gather:
        query_begin, queries = sequence_bounds(cu_seqlens_q, i_sequence, kept)
    if i_m * block_m >= queries:
        return

    o_m, o_n, o_d = i_m * block_m + tl.arange(0, block_m), tl.arange(0, block_n), tl.arange(0, block_d)
    m_m = o_m < queries
    if gather:
        i_query = tl.load(query_indices + query_begin + o_m, mask=m_m, other=0)
        m_query = m_m & (i_query >= 0) & (i_query < tokens)
    else:
        i_query, m_query = begin + o_m, m_m
    p_query = qkv + i_head * head_size
    p_key = p_query + num_heads * head_size + begin * qkv_stride
    p_value = p_key + num_heads * head_size
    b_q = load_rows(p_query, i_query, m_query, qkv_stride, head_size, block_d, upcast)

    if score == "from_question":
        m_counts = m_m & (tl.load(token_type_ids + begin + o_m, mask=m_m, other=1) == 0)
        # Nothing to do here: the partials are 0 already.
        if tl.max(m_counts.to(tl.int32), 0) == 0:
            return
    else:
        m_counts = m_m

    # First look: online softmax in powers of two. Past the end of the sequence its last row is loaded again, so that
    # loads need no mask; the scores of that block alone get one.
    b_highest = tl.full([block_m], float("-inf"), tl.float32)
    b_total = tl.zeros([block_m], tl.float32)
    b_context = tl.zeros([block_m, block_d], tl.float32)
    for start in range(0, length, block_n):
        i_key = tl.minimum(start + o_n, length - 1)
        b_k = load_whole_rows(p_key, i_key, qkv_stride, head_size, block_d, upcast)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        if start + block_n > length:
            b_s = tl.where((start + o_n < length)[None, :], b_s, float("-inf"))
        above = tl.maximum(b_highest, tl.max(b_s, 1) * scale)
        b_p = tl.exp2(b_s * scale - above[:, None])
        correction = tl.exp2(b_highest - above)
        b_total = b_total * correction + tl.sum(b_p, 1)
        b_highest = above
        if with_context:
            b_v = load_whole_rows(p_value, i_key, qkv_stride, head_size, block_d, upcast)
            # With the context as its accumulator the product would run on into the next iteration, which ptxas before
            # 13.3 miscompiles where it takes the probabilities from registers, as Hopper's does. Added to the context
            # by a step of its own it is waited for at once (wgmma.wait_group 0).
            b_product = tl.dot(b_p.to(b_v.dtype), b_v, input_precision="ieee")
            b_context = tl.fma(b_context, correction[:, None], b_product)

    if with_context:
        # An exact quotient: 1 / 2^k times integers stays exact.
        b_context *= tl.div_rn(1.0, b_total)[:, None]
        p_context = context + (query_begin + o_m)[:, None] * (num_heads * head_size) + i_head * head_size + o_d[None, :]
        m_context = m_m[:, None] & (o_d < head_size)[None, :]
        tl.store(p_context, b_context.to(context.dtype.element_ty), mask=m_context)

    # Second look: the same products give the probabilities, now that their sums are known.
    if score != "":
        # A row that does not count has probability 2^-inf = 0 everywhere.
        b_lse = tl.where(m_counts, b_highest + tl.log2(b_total), float("inf"))
        o_second = tl.arange(0, second_n)
        p_partial = partials + (i_m.to(tl.int64) * num_heads + i_head) * tokens + begin
        for start in range(0, length, second_n):
            i_key = start + o_second
            if score == "value_norm":
                # Before the product, which needs the registers that the values hold.
                b_v = load_whole_rows(p_value, tl.minimum(i_key, length - 1), qkv_stride, head_size, block_d, True)
                b_norm = tl.sqrt(tl.sum(b_v * b_v, 1))
            b_k = load_whole_rows(p_key, tl.minimum(i_key, length - 1), qkv_stride, head_size, block_d, upcast)
            # Keys as rows: sums along a row cross few threads, those along a column would cross all warps.
            b_p = tl.exp2(tl.dot(b_k, tl.trans(b_q), input_precision="ieee") * scale - b_lse[None, :])
            if score == "received_off_diagonal":
                b_p = tl.where(i_key[:, None] == o_m[None, :], 0.0, b_p)
            b_partial = tl.max(b_p, 1) if score == "received_max" else tl.sum(b_p, 1)
            if score == "value_norm":
                b_partial *= b_norm
            tl.store(p_partial + i_key, b_partial, mask=i_key < length)


@operator("attention")
def attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    num_heads: int,
    with_context: bool,
    score: str,
    token_type_ids: Tensor | None,
    query_indices: Tensor | None,
    cu_seqlens_q: Tensor | None,
    in_parts: bool = False,
) -> tuple[Tensor, Tensor]:
    """Context and significance in one kernel; a score takes a second, small one. What was not asked for is empty.

    Grid: a program a sequence, head and block of queries; those past the end of their sequence return at once.
    Products accumulate in float32, which float32 inputs keep exactly (no TF32); softmax and scores are float32. In
    half precision the probabilities are rounded to it before they meet the values, as in every fused attention.
    Takes 4 n^2 D FLOPs a head, a score 2 n^2 D more; without context 4 n^2 D in all, of which ``from_question`` skips
    the first half in blocks of queries without one of segment 0; ``cls`` takes 2 n D. Reads 3 T H values, keys and
    values again from cache for every block of queries, and writes T H. A score writes and reads 4 N T bytes a block.

    The same sequence gives the same bits in every run and in every batch: no atomics, and configurations that
    depend on architecture, dtype, head size and what is asked for alone. Where ``max_seqlen`` is understated, rows past
    it are undefined, and nothing outside the tensors is touched.

    Args:
        qkv, cu_seqlens, max_seqlen, num_heads: as `Backend.attention`. Rows outside every sequence are undefined.
        with_context: whether context is asked for; not with the scores ``cls`` and ``from_question``.
        score: an `AttentionScore`, or empty to ask for none.
        token_type_ids: int64 ``[T]``, for ``from_question``.
        query_indices, cu_seqlens_q: int64 ``[K]`` and int32 ``[B + 1]``, each sequence's queries; not with a score.
        in_parts: leave a score in parts, ``[query blocks, N, T]``: `query_block` queries in each.
    """
    tokens, hidden_size = qkv.shape[0], qkv.shape[1] // 3
    sequences, head_size = cu_seqlens.shape[0] - 1, hidden_size // num_heads
    rows = tokens if query_indices is None else query_indices.shape[0]
    context = torch.empty(rows if with_context else 0, hidden_size, dtype=qkv.dtype, device=qkv.device)
    significance = torch.empty(0, dtype=torch.float32, device=qkv.device)
    if rows == 0:
        return context, significance
    if score == "cls":
        return context, cls_significance(qkv, cu_seqlens, max_seqlen, num_heads)
    variant = "context" if not score else "received" if with_context else "alone"
    config = attention_config(architecture(qkv.device), qkv.dtype, head_size, variant)
    query_blocks = cdiv(max_seqlen, config.block_m)
    # Blocks without a query of segment 0 leave theirs as they are.
    allocate = torch.zeros if score == "from_question" else torch.empty
    partials = allocate((query_blocks, num_heads, tokens) if score else 0, dtype=torch.float32, device=qkv.device)
    launched(_attention_kernel)[(query_blocks * num_heads * sequences,)](
        qkv,
        cu_seqlens,
        qkv if query_indices is None else query_indices,
        cu_seqlens if cu_seqlens_q is None else cu_seqlens_q,
        qkv if token_type_ids is None else token_type_ids,
        context,
        partials,
        LOG2_E * head_size**-0.5,
        qkv.stride(0),
        tokens,
        rows,
        query_blocks,
        num_heads=num_heads,
        head_size=head_size,
        with_context=with_context,
        score=score,
        gather=query_indices is not None,
        # The interpreter's products of bfloat16 are wrong.
        upcast=INTERPRETED and qkv.dtype == torch.bfloat16,
        block_m=config.block_m,
        block_n=config.block_n,
        second_n=config.second_n,
        block_d=padded_size(head_size),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if in_parts:
        significance = partials
    elif score:
        significance = combine_partials(
            partials, cu_seqlens, max_seqlen, config.block_m, maximum=score == "received_max"
        )
    return context, significance


def query_block(qkv: Tensor, num_heads: int) -> int:
    """How many queries a part of a score is the sum of."""
    head_size = qkv.shape[1] // (3 * num_heads)
    return attention_config(architecture(qkv.device), qkv.dtype, head_size, "received").block_m
