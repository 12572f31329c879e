"""Where a text speaks of what is asked, by comparing all pairs of its tokens."""

# Triton's kernels carry no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from dtbert.kernels.overlap import OVERLAP_REACH, OVERLAP_UNIT
from dtbert.kernels.triton.launch import cdiv, launched, operator
from dtbert.kernels.triton.significance import sequence_bounds

# Tokens of a program with their neighbours, and others that it compares them with at a time.
_BLOCK_TOKENS = 128
_BLOCK_OTHERS = 16
_NUM_WARPS = 8


@triton.jit(
    do_not_specialize=["tokens"],
    do_not_specialize_on_alignment=["input_ids", "token_type_ids", "position_ids", "cu_seqlens"],
)
def _question_overlap_kernel(
    input_ids,  # [T]
    token_type_ids,  # [T]
    position_ids,  # [T]
    cu_seqlens,  # [B + 1]
    overlap,  # [T], out
    tokens,
    reach: tl.constexpr,
    unit: tl.constexpr,
    block_tokens: tl.constexpr,
    block_others: tl.constexpr,
):
    begin, length = sequence_bounds(cu_seqlens, tl.program_id(0), tokens)
    # A program's own tokens stand between those that reach them.
    first = tl.program_id(1) * (block_tokens - 2 * reach)
    if first >= length:
        return
    o_near, o_others = first - reach + tl.arange(0, block_tokens), tl.arange(0, block_others)
    m_near = (o_near >= 0) & (o_near < length)
    p_segment = token_type_ids + begin
    id_near = tl.load(input_ids + begin + o_near, mask=m_near, other=-1)
    in_text = tl.load(p_segment + o_near, mask=m_near, other=0) != 0

    places = tl.zeros([block_tokens], tl.int32)
    asked = tl.zeros([block_tokens], tl.int32)
    for start in range(0, length, block_others):
        o_n = start + o_others
        m_n = o_n < length
        ids = tl.load(input_ids + begin + o_n, mask=m_n, other=-1)
        in_question = m_n & (tl.load(p_segment + o_n, mask=m_n, other=1) == 0)
        # All of the question but its ends.
        before = tl.load(p_segment + o_n - 1, mask=m_n & (o_n > 0), other=1) == 0
        after = tl.load(p_segment + o_n + 1, mask=o_n + 1 < length, other=1) == 0
        asks = in_question & before & after
        same = id_near[:, None] == ids[None, :]
        places += tl.sum((same & (m_n & (in_question == 0))[None, :]).to(tl.int32), 1)
        asked += tl.sum((same & asks[None, :]).to(tl.int32), 1)

    share = tl.where(in_text & (asked > 0), unit // tl.maximum(places, 1), 0)
    # Past the ends of the sequence no token asks for anything, so their places do not matter. Shares and weights are
    # whole, and their sum is below 2^30.
    position = tl.load(position_ids + begin + o_near, mask=m_near, other=0).to(tl.int32)
    distance = tl.abs(position[:, None] - position[None, :])
    total = tl.sum(share[None, :] * tl.maximum(reach - distance, 0), 1)
    m_own = m_near & (o_near >= first) & (o_near < first + block_tokens - 2 * reach)
    tl.store(overlap + begin + o_near, total.to(tl.float32) / (reach * unit), mask=m_own)


@operator("question_overlap")
def question_overlap(
    input_ids: Tensor, token_type_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> Tensor:
    """`Backend.question_overlap`: the same numbers to the bit.

    Grid: a sequence, and a program for each 64 of its tokens, which compares them and the 32 on both sides with all.
    Counts are int32. Reads 8 T bytes of ids once, ids and segments again from cache for every program; writes 4 T.
    """
    tokens = input_ids.shape[0]
    overlap = torch.empty(tokens, dtype=torch.float32, device=input_ids.device)
    own = _BLOCK_TOKENS - 2 * OVERLAP_REACH
    launched(_question_overlap_kernel)[(cu_seqlens.shape[0] - 1, cdiv(max_seqlen, own))](
        input_ids,
        token_type_ids,
        position_ids,
        cu_seqlens,
        overlap,
        tokens,
        reach=OVERLAP_REACH,
        unit=OVERLAP_UNIT,
        block_tokens=_BLOCK_TOKENS,
        block_others=_BLOCK_OTHERS,
        num_warps=_NUM_WARPS,
    )
    return overlap
