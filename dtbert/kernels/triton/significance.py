"""From attention to one score a token: the sum over heads and query blocks, and the row of [CLS] alone."""

# Triton's kernels carry no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from dtbert.kernels.triton.launch import cdiv, launched, next_power_of_2

# Tokens a program.
_BLOCK_TOKENS = 64
_NUM_WARPS = 4

# Powers of two, so that the kernels work in 2^x.
LOG2_E = 1.4426950408889634


@triton.jit
def load_rows(base, rows, mask, row_stride, head_size: tl.constexpr, block_d: tl.constexpr, upcast: tl.constexpr):
    """Rows of one head, ``[rows, block_d]``, with 0 where the mask is off and past the head size.

    ``rows`` are int64, or int32 within one sequence, which saves the registers that decide how many programs fit.
    """
    o_d = tl.arange(0, block_d)
    mask = mask[:, None]
    if head_size != block_d:
        mask = mask & (o_d < head_size)[None, :]
    rows = tl.load(base + rows[:, None] * row_stride + o_d[None, :], mask=mask, other=0.0)
    return rows.to(tl.float32) if upcast else rows


@triton.jit
def load_whole_rows(base, rows, row_stride, head_size: tl.constexpr, block_d: tl.constexpr, upcast: tl.constexpr):
    """`load_rows` where every row is there."""
    o_d = tl.arange(0, block_d)
    pointers = base + rows[:, None] * row_stride + o_d[None, :]
    mask = None if head_size == block_d else (o_d < head_size)[None, :]
    rows = tl.load(pointers, mask=mask, other=None if head_size == block_d else 0.0)
    return rows.to(tl.float32) if upcast else rows


@triton.jit
def sequence_bounds(cu_seqlens, i_sequence, tokens):
    """First row (int64) and length (int32) of a sequence; whatever ``cu_seqlens`` says, no row outside the tensor."""
    begin = tl.maximum(tl.load(cu_seqlens + i_sequence), 0)
    end = tl.minimum(tl.load(cu_seqlens + i_sequence + 1), tokens)
    return begin.to(tl.int64), end - begin


@triton.jit(do_not_specialize=["tokens", "token_blocks", "query_blocks"], do_not_specialize_on_alignment=["cu_seqlens"])
def _combine_partials_kernel(
    partials,  # [query blocks, N, T]
    cu_seqlens,  # [B + 1]
    significance,  # [T], out
    tokens,
    token_blocks,
    query_blocks,
    num_heads: tl.constexpr,
    maximum: tl.constexpr,
    block_m: tl.constexpr,
    block_h: tl.constexpr,
    block_n: tl.constexpr,
):
    i_program = tl.program_id(0)
    i_n, i_sequence = i_program % token_blocks, i_program // token_blocks
    begin, length = sequence_bounds(cu_seqlens, i_sequence, tokens)
    if i_n * block_n >= length:
        return
    o_h, o_n = tl.arange(0, block_h), i_n * block_n + tl.arange(0, block_n)
    m_n = o_n < length
    mask = (o_h < num_heads)[:, None] & m_n[None, :]
    p_partial = partials + begin + o_h.to(tl.int64)[:, None] * tokens + o_n[None, :]
    # The sequence's own query blocks in their order, then the heads: the same sums whatever else is in the batch. Where
    # the longest length was understated, there are fewer blocks than the sequence's length asks for.
    b_score = tl.zeros([block_h, block_n], tl.float32)
    for _ in range(0, tl.minimum(length, query_blocks * block_m), block_m):
        b_partial = tl.load(p_partial, mask=mask, other=0.0)
        b_score = tl.maximum(b_score, b_partial) if maximum else b_score + b_partial
        # By tl.cast: torch.compile makes a constant of 1, whatever the decorator says, and a constant has no `to`.
        p_partial += tl.cast(tokens, tl.int64) * num_heads
    score = tl.max(b_score, 0) if maximum else tl.sum(b_score, 0)
    tl.store(significance + begin + o_n, score, mask=m_n)


@triton.jit(do_not_specialize=["tokens", "token_blocks"], do_not_specialize_on_alignment=["cu_seqlens"])
def _cls_logits_kernel(
    qkv,  # [T, 3 * H]
    cu_seqlens,  # [B + 1]
    logits,  # [N, T], out: log2 of what the softmax sums
    highest,  # [B, token blocks, N], out: each block's greatest logit
    total,  # [B, token blocks, N], out: its sum of 2^(logit - greatest)
    scale,
    qkv_stride,
    tokens,
    token_blocks,
    num_heads: tl.constexpr,
    head_size: tl.constexpr,
    block_d: tl.constexpr,
    block_n: tl.constexpr,
):
    i_program = tl.program_id(0)
    i_n, i_head = i_program % token_blocks, i_program // token_blocks % num_heads
    i_sequence = i_program // (token_blocks * num_heads)
    begin, length = sequence_bounds(cu_seqlens, i_sequence, tokens)
    if i_n * block_n >= length:
        return
    o_d, o_n = tl.arange(0, block_d), i_n * block_n + tl.arange(0, block_n)
    m_n = o_n < length
    p_query = qkv + begin * qkv_stride + i_head * head_size
    b_q = tl.load(p_query + o_d, mask=o_d < head_size, other=0.0).to(tl.float32)
    b_k = load_rows(p_query + num_heads * head_size, o_n, m_n, qkv_stride, head_size, block_d, True)
    logit = tl.where(m_n, tl.sum(b_k * b_q[None, :], 1) * scale, float("-inf"))
    block_highest = tl.max(logit, 0)
    tl.store(logits + i_head.to(tl.int64) * tokens + begin + o_n, logit, mask=m_n)
    i_statistic = (i_sequence.to(tl.int64) * token_blocks + i_n) * num_heads + i_head
    tl.store(highest + i_statistic, block_highest)
    tl.store(total + i_statistic, tl.sum(tl.exp2(logit - block_highest), 0))


@triton.jit(do_not_specialize=["tokens", "token_blocks"], do_not_specialize_on_alignment=["cu_seqlens"])
def _cls_sum_kernel(
    logits,  # [N, T]
    highest,  # [B, token blocks, N]
    total,  # [B, token blocks, N]
    cu_seqlens,  # [B + 1]
    significance,  # [T], out
    tokens,
    token_blocks,
    num_heads: tl.constexpr,
    block_h: tl.constexpr,
    block_n: tl.constexpr,
):
    i_program = tl.program_id(0)
    i_n, i_sequence = i_program % token_blocks, i_program // token_blocks
    begin, length = sequence_bounds(cu_seqlens, i_sequence, tokens)
    if i_n * block_n >= length:
        return
    o_h, o_n = tl.arange(0, block_h), i_n * block_n + tl.arange(0, block_n)
    m_h, m_n = o_h < num_heads, o_n < length
    # Each head's log-sum-exp, from the sequence's own blocks in their order.
    i_statistic = i_sequence.to(tl.int64) * token_blocks * num_heads + o_h
    b_highest = tl.full([block_h], float("-inf"), tl.float32)
    b_total = tl.zeros([block_h], tl.float32)
    for _ in range(0, tl.minimum(length, token_blocks * block_n), block_n):
        block_highest = tl.load(highest + i_statistic, mask=m_h, other=0.0)
        block_total = tl.load(total + i_statistic, mask=m_h, other=1.0)
        above = tl.maximum(b_highest, block_highest)
        b_total = b_total * tl.exp2(b_highest - above) + block_total * tl.exp2(block_highest - above)
        b_highest = above
        i_statistic += num_heads
    p_logit = logits + begin + o_h.to(tl.int64)[:, None] * tokens + o_n[None, :]
    logit = tl.load(p_logit, mask=m_h[:, None] & m_n[None, :], other=float("-inf"))
    probability = tl.exp2(logit - (b_highest + tl.log2(b_total))[:, None])
    tl.store(significance + begin + o_n, tl.sum(probability, 0), mask=m_n)


def combine_partials(
    partials: Tensor, cu_seqlens: Tensor, max_seqlen: int, block_m: int, *, maximum: bool = False
) -> Tensor:
    """Sum, or maximum, over heads and each sequence's own query blocks: float32 ``[query blocks, N, T]`` to ``[T]``.

    Grid: a program a sequence and block of 64 tokens. Reads 4 N T bytes a query block and writes 4 T.
    """
    query_blocks, num_heads, tokens = partials.shape
    significance = torch.empty(tokens, dtype=torch.float32, device=partials.device)
    token_blocks = cdiv(max_seqlen, _BLOCK_TOKENS)
    launched(_combine_partials_kernel)[(token_blocks * (cu_seqlens.shape[0] - 1),)](
        partials,
        cu_seqlens,
        significance,
        tokens,
        token_blocks,
        query_blocks,
        num_heads=num_heads,
        maximum=maximum,
        block_m=block_m,
        block_h=next_power_of_2(num_heads),
        block_n=_BLOCK_TOKENS,
        num_warps=_NUM_WARPS,
    )
    return significance


def cls_significance(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, num_heads: int) -> Tensor:
    """The score ``cls``, float32 ``[T]``: attention from each sequence's first token alone, summed over heads.

    Grid: a program a sequence, head and block of 64 keys, then one a sequence and block. All in float32. Reads the
    keys once, T H values, and writes and reads 4 N T bytes of logits: n D products a head where the others take n^2 D.
    """
    tokens, head_size = qkv.shape[0], qkv.shape[1] // (3 * num_heads)
    sequences, token_blocks = cu_seqlens.shape[0] - 1, cdiv(max_seqlen, _BLOCK_TOKENS)
    logits = torch.empty(num_heads, tokens, dtype=torch.float32, device=qkv.device)
    highest = torch.empty(sequences, token_blocks, num_heads, dtype=torch.float32, device=qkv.device)
    total = torch.empty(sequences, token_blocks, num_heads, dtype=torch.float32, device=qkv.device)
    significance = torch.empty(tokens, dtype=torch.float32, device=qkv.device)
    launched(_cls_logits_kernel)[(token_blocks * num_heads * sequences,)](
        qkv,
        cu_seqlens,
        logits,
        highest,
        total,
        LOG2_E * head_size**-0.5,
        qkv.stride(0),
        tokens,
        token_blocks,
        num_heads=num_heads,
        head_size=head_size,
        block_d=next_power_of_2(head_size),
        block_n=_BLOCK_TOKENS,
        num_warps=_NUM_WARPS,
    )
    launched(_cls_sum_kernel)[(token_blocks * sequences,)](
        logits,
        highest,
        total,
        cu_seqlens,
        significance,
        tokens,
        token_blocks,
        num_heads=num_heads,
        block_h=next_power_of_2(num_heads),
        block_n=_BLOCK_TOKENS,
        num_warps=_NUM_WARPS,
    )
    return significance
