"""LayerNorm of rows that a program holds in registers, and how many of them that is."""

# Triton's kernels carry no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import functools
from typing import NamedTuple

import triton
import triton.language as tl

from dtbert.kernels.triton.launch import next_power_of_2


@triton.jit
def normalize_rows(rows, m_columns, norm_weight, norm_bias, columns, hidden_size: tl.constexpr, eps):
    """LayerNorm of float32 rows, 0 where ``m_columns`` is False; the result is float32."""
    mean = tl.sum(rows, 1) / hidden_size
    # Two passes over registers: the mean of squares less the square of the mean would cancel.
    centred = tl.where(m_columns[None, :], rows - mean[:, None], 0.0)
    scale = 1 / tl.sqrt(tl.sum(centred * centred, 1) / hidden_size + eps)
    weight = tl.load(norm_weight + columns, mask=m_columns, other=0.0).to(tl.float32)
    bias = tl.load(norm_bias + columns, mask=m_columns, other=0.0).to(tl.float32)
    return centred * scale[:, None] * weight[None, :] + bias[None, :]


class RowConfig(NamedTuple):
    """How a kernel over whole rows is launched: a tile of ``block_t`` rows of ``block_h`` columns a program."""

    block_t: int
    block_h: int
    num_warps: int


# Warps by columns, the same on every GPU, and one row a program: a single warp sums without a barrier.
_WARPS = {1024: 1, 2048: 4, 4096: 8}
# The interpreter takes a millisecond a program, however much it does.
INTERPRETED_ROWS = 16


MAX_HIDDEN_SIZE = max(_WARPS)


@functools.cache
def row_config(hidden_size: int, arch: str) -> RowConfig:
    """The tile for rows of ``hidden_size`` values, at most `MAX_HIDDEN_SIZE`."""
    block_h = next_power_of_2(hidden_size)
    num_warps = next(num_warps for columns, num_warps in _WARPS.items() if block_h <= columns)
    return RowConfig(INTERPRETED_ROWS if arch == "interpreter" else 1, block_h, num_warps)
