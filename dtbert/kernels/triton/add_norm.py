"""What follows a product by cuBLAS: gather, bias, residual and LayerNorm in one pass."""

# Triton's kernels carry no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from dtbert.kernels.triton.float8 import allocate_scaled, rounded, store_scaled
from dtbert.kernels.triton.launch import architecture, cdiv, launched, operator
from dtbert.kernels.triton.layer_norm import normalize_rows, row_config


@triton.jit(do_not_specialize=["kept", "tokens"], do_not_specialize_on_alignment=["keep_indices"])
def _add_norm_kernel(
    product,  # [K, H]
    bias,  # [H]
    residual,  # [T, H]
    norm_weight,  # [H]
    norm_bias,  # [H]
    keep_indices,  # [K], or anything without gather
    states,  # [K, H], out
    values,  # [K, H], out, the states in fp8; anything without float8
    scales,  # [K], out, of these; anything without float8
    kept,
    tokens,
    product_stride,
    residual_stride,
    eps,
    hidden_size: tl.constexpr,
    gather: tl.constexpr,
    float8: tl.constexpr,
    block_t: tl.constexpr,
    block_h: tl.constexpr,
):
    i_rows = tl.program_id(0).to(tl.int64) * block_t + tl.arange(0, block_t)
    columns = tl.arange(0, block_h)
    m_rows, m_columns = i_rows < kept, columns < hidden_size
    mask = m_rows[:, None] & m_columns[None, :]
    i_residual = tl.load(keep_indices + i_rows, mask=m_rows, other=-1) if gather else i_rows
    # An index outside the batch names nothing.
    m_residual = mask & ((i_residual >= 0) & (i_residual < tokens))[:, None]
    o_residual = i_residual[:, None] * residual_stride + columns[None, :]
    rows = tl.load(product + i_rows[:, None] * product_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    rows += tl.load(bias + columns, mask=m_columns, other=0.0).to(tl.float32)[None, :]
    rows += tl.load(residual + o_residual, mask=m_residual, other=0.0).to(tl.float32)
    rows = normalize_rows(rows, m_columns, norm_weight, norm_bias, columns, hidden_size, eps)
    rows = rows.to(states.dtype.element_ty)
    o_states = i_rows[:, None] * hidden_size + columns[None, :]
    tl.store(states + o_states, rows, mask=mask)
    if float8:
        store_scaled(rows.to(tl.float32), values, scales, o_states, i_rows, m_rows, mask)


@operator("add_norm")
def add_norm(
    product: Tensor,
    bias: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    rows: Tensor | None,
) -> Tensor:
    """``LayerNorm(product + bias + residual[rows])``: what `Backend.add_norm` does after its product, ``[K, H]``.

    Grid: a program a kept token. Sum and statistics are float32. Reads 2 K H and writes K H values, and 8 K bytes of
    rows; those of dropped tokens are never touched. An index outside the batch adds no residual.
    """
    kept, hidden_size = product.shape
    states = torch.empty(kept, hidden_size, dtype=product.dtype, device=product.device)
    _launch(product, bias, residual, norm_weight, norm_bias, eps, rows, states, None)
    return states


@operator("add_norm_float8")
def add_norm_float8(
    product: Tensor,
    bias: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`add_norm`, and its states in fp8 with their scale ``[K, 1]``; writes K H + 4 K bytes more."""
    kept, hidden_size = product.shape
    states = torch.empty(kept, hidden_size, dtype=product.dtype, device=product.device)
    values, scale = allocate_scaled(kept, hidden_size, product.device)
    _launch(product, bias, residual, norm_weight, norm_bias, eps, rows, states, (values, scale))
    return states, rounded(values), scale


def _launch(
    product: Tensor,
    bias: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    rows: Tensor | None,
    states: Tensor,
    float8: tuple[Tensor, Tensor] | None,
) -> None:
    kept, hidden_size = product.shape
    config = row_config(hidden_size, architecture(product.device))
    launched(_add_norm_kernel)[(cdiv(kept, config.block_t),)](
        product,
        bias,
        residual,
        norm_weight,
        norm_bias,
        product if rows is None else rows,
        states,
        *(float8 or (states, states)),
        kept,
        residual.shape[0],
        product.stride(0),
        residual.stride(0),
        eps,
        hidden_size=hidden_size,
        gather=rows is not None,
        float8=float8 is not None,
        block_t=config.block_t,
        block_h=config.block_h,
        num_warps=config.num_warps,
    )
