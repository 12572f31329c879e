"""Embedding lookup, sum and LayerNorm in one pass."""

# Triton's kernels carry no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from dtbert.kernels.triton.float8 import allocate_scaled, rounded, store_scaled
from dtbert.kernels.triton.launch import architecture, cdiv, launched, operator
from dtbert.kernels.triton.layer_norm import normalize_rows, row_config


@triton.jit
def _row_of(ids, i_tokens, m_tokens, rows, columns, stride, mask, table):
    """The rows of a table that ids name, float32; of an id outside of it NaN, which shows in what is made of it."""
    i_row = tl.load(ids + i_tokens, mask=m_tokens, other=0)
    m_row = (i_row >= 0) & (i_row < rows)
    o_row = i_row[:, None] * stride + columns[None, :]
    values = tl.load(table + o_row, mask=mask & m_row[:, None], other=0.0).to(tl.float32)
    return tl.where(m_row[:, None], values, float("nan"))


# Ids are rows of one tensor, and counts differ from batch to batch.
@triton.jit(
    do_not_specialize=["tokens", "words", "positions", "token_types"],
    do_not_specialize_on_alignment=["input_ids", "position_ids", "token_type_ids"],
)
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
    values,  # [T, H], out, the states in fp8; anything without float8
    scales,  # [T], out, of these; anything without float8
    tokens,
    words,  # V
    positions,  # P
    token_types,  # S
    word_stride,
    position_stride,
    token_type_stride,
    eps,
    hidden_size: tl.constexpr,
    float8: tl.constexpr,
    block_t: tl.constexpr,
    block_h: tl.constexpr,
):
    i_tokens = tl.program_id(0).to(tl.int64) * block_t + tl.arange(0, block_t)
    columns = tl.arange(0, block_h)
    m_tokens, m_columns = i_tokens < tokens, columns < hidden_size
    mask = m_tokens[:, None] & m_columns[None, :]
    rows = _row_of(input_ids, i_tokens, m_tokens, words, columns, word_stride, mask, word)
    rows += _row_of(token_type_ids, i_tokens, m_tokens, token_types, columns, token_type_stride, mask, token_type)
    rows += _row_of(position_ids, i_tokens, m_tokens, positions, columns, position_stride, mask, position)
    rows = tl.where(m_columns[None, :], rows, 0.0)
    rows = normalize_rows(rows, m_columns, norm_weight, norm_bias, columns, hidden_size, eps)
    o_states = i_tokens[:, None] * hidden_size + columns[None, :]
    rows = rows.to(states.dtype.element_ty)
    tl.store(states + o_states, rows, mask=mask)
    if float8:
        store_scaled(rows.to(tl.float32), values, scales, o_states, i_tokens, m_tokens, mask)


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
    """`Backend.embed`; a token with an id outside its table becomes NaN.

    Grid: a program a token. Sum and statistics are float32. Moves 24 T bytes of ids, reads 3 T H and writes T H values.
    """
    states = torch.empty(input_ids.shape[0], word.shape[1], dtype=word.dtype, device=word.device)
    ids, tables = (input_ids, position_ids, token_type_ids), (word, position, token_type)
    _launch(ids, tables, norm_weight, norm_bias, eps, states, None)
    return states


@operator("embed_float8")
def embed_float8(
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    word: Tensor,
    token_type: Tensor,
    position: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`embed`, and its states in fp8 with their scale ``[T, 1]``; writes T H + 4 T bytes more."""
    tokens, hidden_size = input_ids.shape[0], word.shape[1]
    states = torch.empty(tokens, hidden_size, dtype=word.dtype, device=word.device)
    values, scale = allocate_scaled(tokens, hidden_size, word.device)
    ids, tables = (input_ids, position_ids, token_type_ids), (word, position, token_type)
    _launch(ids, tables, norm_weight, norm_bias, eps, states, (values, scale))
    return states, rounded(values), scale


def _launch(
    ids: tuple[Tensor, Tensor, Tensor],
    tables: tuple[Tensor, Tensor, Tensor],
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    states: Tensor,
    float8: tuple[Tensor, Tensor] | None,
) -> None:
    tokens, hidden_size = states.shape
    config = row_config(hidden_size, architecture(states.device))
    launched(_embed_kernel)[(cdiv(tokens, config.block_t),)](
        *ids,
        *tables,
        norm_weight,
        norm_bias,
        states,
        *(float8 or (states, states)),
        tokens,
        *(table.shape[0] for table in tables),
        *(table.stride(0) for table in tables),
        eps,
        hidden_size=hidden_size,
        float8=float8 is not None,
        block_t=config.block_t,
        block_h=config.block_h,
        num_warps=config.num_warps,
    )
