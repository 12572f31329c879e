"""The rows each sequence keeps: ranked by counting, compacted in text order, on the device."""

# Triton's kernels carry no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from dtbert.kernels.triton.launch import operator, wrap_triton

_BLOCK_TOKENS = 256
_BLOCK_OTHERS = 32
_NUM_WARPS = 8
_NUM_STAGES = 2

# A program compares all pairs of its sequence's tokens: beyond this a sort is the better tool.
MAX_SEQLEN = 16384


@triton.jit(do_not_specialize_on_alignment=["cu_seqlens", "target_cu_seqlens"])
def _select_kernel(
    significance,  # [T]
    cu_seqlens,  # [B + 1]
    target_cu_seqlens,  # [B + 1]
    rows,  # [K], out
    block_tokens: tl.constexpr,
    block_others: tl.constexpr,
):
    i_sequence = tl.program_id(0)
    start = tl.load(cu_seqlens + i_sequence).to(tl.int64)
    length = (tl.load(cu_seqlens + i_sequence + 1) - start).to(tl.int32)
    target_start = tl.load(target_cu_seqlens + i_sequence).to(tl.int64)
    count = (tl.load(target_cu_seqlens + i_sequence + 1) - target_start).to(tl.int32)
    p_score = significance + start
    written = 0
    for first in range(0, length, block_tokens):
        tokens = first + tl.arange(0, block_tokens)
        score = tl.load(p_score + tokens, mask=tokens < length, other=float("-inf"))
        score = tl.where(score != score, float("inf"), score)
        rank = tl.zeros([block_tokens], tl.int32)
        for other in range(0, length, block_others):
            others = other + tl.arange(0, block_others)
            rival = tl.load(p_score + others, mask=others < length, other=float("-inf"))
            rival = tl.where(rival != rival, float("inf"), rival)
            earlier = others[None, :] < tokens[:, None]
            # Padding of the block has the lowest score and comes last, so it precedes no token.
            precedes = (rival[None, :] > score[:, None]) | ((rival[None, :] == score[:, None]) & earlier)
            rank += tl.sum(precedes.to(tl.int32), 1)
        keep = (rank < count) & (tokens < length)
        place = written + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(rows + target_start + place, start + tokens, mask=keep)
        written += tl.sum(keep.to(tl.int32), 0)


@operator("select")
def select(significance: Tensor, cu_seqlens: Tensor, target_cu_seqlens: Tensor, num_kept: int) -> Tensor:
    """The rows of `Backend.select`, without asking the device for anything; NaN counts as infinity.

    Grid: a program a sequence, which compares all pairs of its tokens: 2 n^2 comparisons, n at most `MAX_SEQLEN`.
    Integers are exact, so the choice is the same in every run and every batch. Moves 4 T bytes of scores (from
    cache n / 256 times) and 8 K of indices.
    """
    rows = torch.empty(num_kept, dtype=torch.int64, device=significance.device)
    wrap_triton(_select_kernel)[(cu_seqlens.shape[0] - 1,)](
        significance,
        cu_seqlens,
        target_cu_seqlens,
        rows,
        block_tokens=_BLOCK_TOKENS,
        block_others=_BLOCK_OTHERS,
        num_warps=_NUM_WARPS,
        num_stages=_NUM_STAGES,
    )
    return rows
