"""The tokens that each sequence keeps, by a search for the lowest score among them, and what moves with the choice."""

# Triton's kernels carry no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dtbert.kernels.triton.launch import INTERPRETED, cdiv, launched, next_power_of_2, operator
from dtbert.kernels.triton.significance import sequence_bounds

# A program holds all scores of its sequence in registers.
MAX_SEQLEN = 16384
# Up to so many tokens a program sums a score's parts itself: it reads all of them, as do the others of its sequence.
MAX_SUMMED = 512

# Bytes of a row that a program moves at a time.
_BLOCK_BYTES = 256


class _Config(NamedTuple):
    """``block_tokens`` scores a program, of which it writes ``chunks`` times ``block_rows``, 16 at most a sequence."""

    block_tokens: int
    block_rows: int
    chunks: int
    num_warps: int


def _config(max_seqlen: int) -> _Config:
    # One for all usual lengths: they differ from layer to layer, and each is another compiled kernel.
    block_tokens = max(MAX_SUMMED, next_power_of_2(max_seqlen))
    if INTERPRETED:  # a program takes as long as its operations are many
        return _Config(block_tokens, block_tokens // 2, 1, 4)
    return _Config(block_tokens, 32, block_tokens // 512, min(16, max(4, block_tokens // 256)))


@triton.jit
def _ordered(score):
    """uint32 in the order of float32 scores: 0 alike of both signs, NaN as infinity, and all above 0."""
    score = tl.where(score != score, float("inf"), tl.where(score == 0, 0.0, score))
    bits = score.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -(2**31))).to(tl.uint32, bitcast=True)


@triton.jit
def _lowest_kept(key, count, block_tokens: tl.constexpr):
    """The greatest number that at least ``count`` keys reach, found from its highest bits to its lowest."""
    # Two bits at a time: the counts of three candidates fit in one number, and so in one sum over the block's threads.
    bits: tl.constexpr = 2 if block_tokens < 1024 else 1
    lowest = tl.full([], 0, tl.uint32)
    for i_digit in range(32 // bits):
        shift = tl.cast(32 - bits - bits * i_digit, tl.uint32)
        reached = tl.zeros([block_tokens], tl.int32)
        for digit in tl.static_range(1, 1 << bits):
            candidate = lowest | (tl.full([], digit, tl.uint32) << shift)
            reached += (key >= candidate).to(tl.int32) << (10 * (digit - 1))
        total = tl.sum(reached, 0)
        found = tl.full([], 0, tl.uint32)
        for digit in tl.static_range(1, 1 << bits):
            counted = (total >> (10 * (digit - 1))) & 1023 if bits > 1 else total
            found += (counted >= count).to(tl.uint32)
        lowest = lowest | (found << shift)
    return lowest


@triton.jit(
    do_not_specialize=["tokens", "kept", "query_block", "final_rows"],
    do_not_specialize_on_alignment=["significance", "cu_seqlens", "target_cu_seqlens", "left_rows", "segments"],
)
def _select_kernel(
    significance,  # [T], or [query blocks, N, T] in parts
    cu_seqlens,  # [B + 1]
    target_cu_seqlens,  # [B + 1]
    left_rows,  # [T], or anything without was_left
    segments,  # [final rows], or anything without keep_question
    states,  # [T, H]
    context,  # [T, H]
    rows,  # [K], out
    next_rows,  # [K], out
    next_context,  # [K, H], out
    final,  # [final rows, H], changed
    tokens,
    kept,
    query_block,  # queries of a part
    final_rows,
    num_heads: tl.constexpr,  # parts of a block of queries
    maximum: tl.constexpr,
    keep_first: tl.constexpr,
    keep_question: tl.constexpr,
    was_left: tl.constexpr,  # tokens were dropped before: left_rows, next_rows and final are meant
    move_context: tl.constexpr,
    hidden_size: tl.constexpr,
    block_tokens: tl.constexpr,
    block_rows: tl.constexpr,
    chunks: tl.constexpr,
    block_h: tl.constexpr,
):
    i_sequence = tl.program_id(0)
    begin, length = sequence_bounds(cu_seqlens, i_sequence, tokens)
    target_begin, asked = sequence_bounds(target_cu_seqlens, i_sequence, kept)
    if i_sequence == tl.num_programs(0) - 1:
        # What no sequence fills names no row: kernels do not follow it.
        for first in range(tl.program_id(1), tl.cdiv(kept - target_begin - asked, block_tokens), tl.num_programs(1)):
            o_rest = target_begin + asked + first * block_tokens + tl.arange(0, block_tokens)
            tl.store(rows + o_rest, -1, mask=o_rest < kept)
            if was_left:
                tl.store(next_rows + o_rest, -1, mask=o_rest < kept)
    # However low the caller put the longest length.
    length = tl.minimum(length, tl.num_programs(1) * chunks * block_rows)
    count = tl.minimum(asked, length)
    if tl.maximum(length, asked) <= 0:
        return

    o_all = tl.arange(0, block_tokens)
    m_all = o_all < length
    score = tl.zeros([block_tokens], tl.float32)
    p_score = significance + begin + o_all
    # The sequence's own parts in their order: the same sums whatever else is in the batch.
    for _ in range(0, length, query_block):
        for _ in tl.static_range(num_heads):
            part = tl.load(p_score, mask=m_all, other=0.0)
            score = tl.maximum(score, part) if maximum else score + part
            p_score += tokens
    if keep_question:
        i_segment = begin + o_all
        if was_left:
            i_segment = tl.load(left_rows + i_segment, mask=m_all, other=-1)
        m_segment = m_all & (i_segment >= 0) & (i_segment < final_rows)
        score = tl.where(tl.load(segments + i_segment, mask=m_segment, other=1) == 0, float("inf"), score)
    if keep_first:
        score = tl.where(o_all == 0, float("inf"), score)
    # Past the end is below everything.
    key = tl.where(m_all, _ordered(score), 0)

    lowest = _lowest_kept(key, count, block_tokens)
    above, tied = key > lowest, (key == lowest) & m_all
    ties = count - tl.sum(above.to(tl.int32), 0)
    # Of all tokens up to each, those above and those tied, in one sum.
    running = tl.cumsum(above.to(tl.int32) + (tied.to(tl.int32) << 16), 0)
    stays = above | (tied & ((running >> 16) <= ties))
    # Where it goes among the kept; -1: nowhere.
    place = tl.where(stays, (running & 0xFFFF) + tl.minimum(running >> 16, ties) - 1, -1)

    for i_chunk in range(chunks):
        o_own = (tl.program_id(1) * chunks + i_chunk) * block_rows + tl.arange(0, block_rows)
        m_own = o_own < length
        own_place = tl.gather(place, o_own, 0)
        m_stays = m_own & (own_place >= 0)
        i_from, i_to = begin + o_own, target_begin + own_place
        tl.store(rows + i_to, i_from, mask=m_stays)
        if was_left:
            i_final = tl.load(left_rows + i_from, mask=m_own, other=-1)
            tl.store(next_rows + i_to, i_final, mask=m_stays)
            m_final = m_own & (own_place < 0) & (i_final >= 0) & (i_final < final_rows)
        for first in range(0, hidden_size, block_h):
            columns = first + tl.arange(0, block_h)
            m_columns = (columns < hidden_size)[None, :]
            if move_context:
                mask = m_stays[:, None] & m_columns
                values = tl.load(context + i_from[:, None] * hidden_size + columns[None, :], mask=mask)
                tl.store(next_context + i_to[:, None] * hidden_size + columns[None, :], values, mask=mask)
            if was_left:
                mask = m_final[:, None] & m_columns
                values = tl.load(states + i_from[:, None] * hidden_size + columns[None, :], mask=mask)
                tl.store(final + i_final[:, None] * hidden_size + columns[None, :], values, mask=mask)


class _Left(NamedTuple):
    """What of tokens that were dropped before goes on: see `drop_again`."""

    rows: Tensor
    final: Tensor
    states: Tensor


@operator("select")
def select(
    significance: Tensor,
    cu_seqlens: Tensor,
    target_cu_seqlens: Tensor,
    max_seqlen: int,
    num_kept: int,
    query_block: int = MAX_SEQLEN,
    maximum: bool = False,
    keep_first: bool = False,
    segments: Tensor | None = None,
    context: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`Backend.select` and, as far as it is given, the context that `Backend.drop` moves; NaN counts as infinity.

    Grid: a sequence, and up to 16 programs for it, each of which finds the lowest score that is kept, by 16 sums over
    the sequence (32 beyond 512 tokens), and moves its own tokens. Scores are float32, and counts integers, so the
    choice is the same in every run and every batch. Reads 4 T bytes of scores (4 N T a block of queries) in each
    program, and 8 T of rows; writes 8 K of rows, or 16 K; moves T H values in all.

    Args:
        significance: float32 ``[T]``, or in parts ``[query blocks, N, T]``, each of ``query_block`` queries, of which
            a sequence has those of its own length alone; to be summed, or of which to take the ``maximum``.
        cu_seqlens, target_cu_seqlens: the sequences now and afterwards, int32 ``[B + 1]``.
        max_seqlen: tokens in the longest sequence now, at most `MAX_SEQLEN`.
        num_kept: K. Rows that no sequence fills are -1.
        keep_first: keep each sequence's first token whatever its score, as do ``segments`` those of segment 0.
        segments: int64, of the batch as it entered the network.
        context: ``[T, H]``.

    Returns:
        The kept rows, int64 ``[K]``; and with ``context`` that of the kept rows, ``[K, H]``, else nothing.
    """
    scores = significance, query_block, maximum
    rows, _, next_context = _launch(
        scores, (cu_seqlens, target_cu_seqlens), max_seqlen, num_kept, keep_first, segments, None, context
    )
    return rows, next_context


# `final` has no default: torch 2.11 leaves arguments at their defaults out, and then misses one that is changed.
@operator("drop_again", mutates_args=("final",))
def drop_again(
    significance: Tensor,
    cu_seqlens: Tensor,
    target_cu_seqlens: Tensor,
    left_rows: Tensor,
    final: Tensor,
    states: Tensor,
    max_seqlen: int,
    num_kept: int,
    query_block: int = MAX_SEQLEN,
    maximum: bool = False,
    keep_first: bool = False,
    segments: Tensor | None = None,
    context: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`select` among tokens that are left, and `Backend.drop` of the others: their states become final.

    Args:
        left_rows: int64 ``[T]``, where the tokens stand in the batch that entered the network.
        final, states: rows of that batch, where those ``[T, H]`` that are not kept go.

    Returns:
        The kept rows, the kept ones of ``left_rows``, both int64 ``[K]``, and the context as `select`.
    """
    scores, left = (significance, query_block, maximum), _Left(left_rows, final, states)
    return _launch(scores, (cu_seqlens, target_cu_seqlens), max_seqlen, num_kept, keep_first, segments, left, context)


def _launch(
    scores: tuple[Tensor, int, bool],
    offsets: tuple[Tensor, Tensor],
    max_seqlen: int,
    num_kept: int,
    keep_first: bool,
    segments: Tensor | None,
    left: _Left | None,
    context: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    significance, query_block, maximum = scores
    device, sequences = significance.device, offsets[0].shape[0] - 1
    num_heads, tokens = (1, len(significance)) if significance.ndim == 1 else significance.shape[1:]
    rows = torch.empty(num_kept, dtype=torch.int64, device=device)
    next_rows = torch.empty(0 if left is None else num_kept, dtype=torch.int64, device=device)
    moved = context if context is not None else None if left is None else left.states
    hidden_size = 0 if moved is None else moved.shape[1]
    shape = (0 if context is None else num_kept, hidden_size)
    dtype = significance.dtype if moved is None else moved.dtype
    next_context = torch.empty(shape, dtype=dtype, device=device)
    left_rows, final, states = (rows, next_context, next_context) if left is None else left
    config = _config(max_seqlen)
    launched(_select_kernel)[(sequences, cdiv(max_seqlen, config.chunks * config.block_rows))](
        significance,
        *offsets,
        left_rows,
        rows if segments is None else segments,
        states,
        next_context if context is None else context,
        rows,
        next_rows,
        next_context,
        final,
        tokens,
        num_kept,
        query_block,
        tokens if left is None else len(final),
        num_heads=num_heads,
        maximum=maximum,
        keep_first=keep_first,
        keep_question=segments is not None,
        was_left=left is not None,
        move_context=context is not None,
        hidden_size=hidden_size,
        block_tokens=config.block_tokens,
        block_rows=config.block_rows,
        chunks=config.chunks,
        block_h=_BLOCK_BYTES // dtype.itemsize,
        num_warps=config.num_warps,
    )
    return rows, next_rows, next_context
