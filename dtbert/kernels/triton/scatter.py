"""Rows of states to where they belong among those of all tokens."""

# Triton's kernels carry no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl
from torch import Tensor

from dtbert.kernels.triton.launch import architecture, cdiv, launched, operator
from dtbert.kernels.triton.layer_norm import row_config


@triton.jit(do_not_specialize=["kept", "tokens"], do_not_specialize_on_alignment=["rows"])
def _scatter_kernel(
    final,  # [T, H], changed
    rows,  # [K]
    states,  # [K, H]
    kept,
    tokens,
    final_stride,
    states_stride,
    hidden_size: tl.constexpr,
    block_t: tl.constexpr,
    block_h: tl.constexpr,
):
    i_rows = tl.program_id(0).to(tl.int64) * block_t + tl.arange(0, block_t)
    columns = tl.arange(0, block_h)
    m_rows = i_rows < kept
    mask = m_rows[:, None] & (columns < hidden_size)[None, :]
    values = tl.load(states + i_rows[:, None] * states_stride + columns[None, :], mask=mask)
    targets = tl.load(rows + i_rows, mask=m_rows, other=-1)
    m_targets = mask & ((targets >= 0) & (targets < tokens))[:, None]
    tl.store(final + targets[:, None] * final_stride + columns[None, :], values, mask=m_targets)


@operator("scatter", mutates_args=("final",))
def scatter(final: Tensor, rows: Tensor, states: Tensor) -> None:
    """`Backend.scatter`, in place.

    Grid: a program a row. Reads and writes K H values, and reads 8 K bytes of rows; one outside ``final`` is left out.
    The span head is a product of its own: fused in, it would save one read of T H values in a whole model.
    """
    kept, hidden_size = states.shape
    config = row_config(hidden_size, architecture(final.device))
    launched(_scatter_kernel)[(cdiv(kept, config.block_t),)](
        final,
        rows,
        states,
        kept,
        final.shape[0],
        final.stride(0),
        states.stride(0),
        hidden_size=hidden_size,
        block_t=config.block_t,
        block_h=config.block_h,
        num_warps=config.num_warps,
    )
