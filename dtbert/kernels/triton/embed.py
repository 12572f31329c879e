"""Embedding lookup, sum and LayerNorm in one pass."""

# Triton's kernels carry no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from dtbert.kernels.triton.launch import architecture, cdiv, operator, wrap_triton
from dtbert.kernels.triton.layer_norm import normalize_rows, row_config


@triton.jit(do_not_specialize=["tokens"])
def _embed_kernel(
    input_ids,  # [T]
    position_ids,  # [T]
    token_type_ids,  # [T]
    word,  # [V, H]
    position,  # [P, H]
    token_type,  # [S, H]
    norm_weight,  # [H]
    norm_bias,  # [H]
    states,  # [T, H], out
    tokens,
    word_stride,
    position_stride,
    token_type_stride,
    eps,
    hidden_size: tl.constexpr,
    block_t: tl.constexpr,
    block_h: tl.constexpr,
):
    i_tokens = tl.program_id(0).to(tl.int64) * block_t + tl.arange(0, block_t)
    columns = tl.arange(0, block_h)
    m_tokens, m_columns = i_tokens < tokens, columns < hidden_size
    mask = m_tokens[:, None] & m_columns[None, :]
    o_word = tl.load(input_ids + i_tokens, mask=m_tokens, other=0)[:, None] * word_stride + columns[None, :]
    o_position = tl.load(position_ids + i_tokens, mask=m_tokens, other=0)[:, None] * position_stride + columns[None, :]
    o_type = tl.load(token_type_ids + i_tokens, mask=m_tokens, other=0)[:, None] * token_type_stride + columns[None, :]
    rows = tl.load(word + o_word, mask=mask, other=0.0).to(tl.float32)
    rows += tl.load(token_type + o_type, mask=mask, other=0.0).to(tl.float32)
    rows += tl.load(position + o_position, mask=mask, other=0.0).to(tl.float32)
    rows = normalize_rows(rows, m_columns, norm_weight, norm_bias, columns, hidden_size, eps)
    o_states = i_tokens[:, None] * hidden_size + columns[None, :]
    tl.store(states + o_states, rows.to(states.dtype.element_ty), mask=mask)


@operator("embed")
def embed(
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    word: Tensor,
    token_type: Tensor,
    position: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
) -> Tensor:
    """`Backend.embed`; ids must lie in their tables, which nobody checks here.

    Grid: a program a token. Sum and statistics are float32. Moves 24 T bytes of ids, reads 3 T H and writes T H values.
    """
    tokens, hidden_size = input_ids.shape[0], word.shape[1]
    config = row_config(hidden_size, architecture(word.device))
    states = torch.empty(tokens, hidden_size, dtype=word.dtype, device=word.device)
    wrap_triton(_embed_kernel)[(cdiv(tokens, config.block_t),)](
        input_ids,
        position_ids,
        token_type_ids,
        word,
        position,
        token_type,
        norm_weight,
        norm_bias,
        states,
        tokens,
        word.stride(0),
        position.stride(0),
        token_type.stride(0),
        eps,
        hidden_size=hidden_size,
        block_t=config.block_t,
        block_h=config.block_h,
        num_warps=config.num_warps,
    )
    return states
