"""The final scatter: kept tokens back among the dropped ones."""

# Triton's kernels carry no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from dtbert.kernels.checks import check_restore
from dtbert.kernels.triton.launch import (
    TRITON_NAMES,
    CompileCase,
    architecture,
    check_launch,
    operator,
    wrap_triton,
)
from dtbert.kernels.triton.layer_norm import row_config


@triton.jit
def _restore_kernel(
    states,  # [T, H], changed
    keep_indices,  # [K]
    kept_states,  # [K, H]
    kept,
    states_stride,
    kept_stride,
    hidden_size: tl.constexpr,
    block_t: tl.constexpr,
    block_h: tl.constexpr,
):
    i_rows = tl.program_id(0).to(tl.int64) * block_t + tl.arange(0, block_t)
    columns = tl.arange(0, block_h)
    m_rows = i_rows < kept
    mask = m_rows[:, None] & (columns < hidden_size)[None, :]
    rows = tl.load(kept_states + i_rows[:, None] * kept_stride + columns[None, :], mask=mask)
    targets = tl.load(keep_indices + i_rows, mask=m_rows, other=0)
    tl.store(states + targets[:, None] * states_stride + columns[None, :], rows, mask=mask)


@operator("restore", mutates_args=("states",))
def _restore(states: Tensor, keep_indices: Tensor, kept_states: Tensor) -> None:
    rows, hidden_size = kept_states.shape
    config = row_config(hidden_size, architecture(states.device))
    wrap_triton(_restore_kernel)[(triton.cdiv(rows, config.block_t),)](
        states,
        keep_indices,
        kept_states,
        rows,
        states.stride(0),
        kept_states.stride(0),
        hidden_size=hidden_size,
        block_t=config.block_t,
        block_h=config.block_h,
        num_warps=config.num_warps,
    )


def restore(states: Tensor, keep_indices: Tensor, kept_states: Tensor) -> Tensor:
    """`reference.restore`, in place: ``states`` is the layer's input, which nobody reads again.

    Grid: a program a kept token. Reads and writes K H values, and reads 8 K bytes of indices, which nobody checks here.
    The span head is a product of its own: fused in, it would save one read of T H values in a whole model.
    """
    check_restore("restore", states, keep_indices, kept_states)
    check_launch("restore", states=states, kept_states=kept_states)
    _restore(states, keep_indices, kept_states)
    return states


def compile_cases(arch: str) -> Iterator[CompileCase]:
    """The scatter for the published widths and every dtype."""
    for dtype in TRITON_NAMES.values():
        for hidden_size in (384, 768):
            config = row_config(hidden_size, arch)
            constexprs = {"hidden_size": hidden_size, "block_t": config.block_t, "block_h": config.block_h}
            signature = {
                "states": f"*{dtype}",
                "keep_indices": "*i64",
                "kept_states": f"*{dtype}",
                **dict.fromkeys(("kept", "states_stride", "kept_stride"), "i32"),
                **dict.fromkeys(constexprs, "constexpr"),
            }
            name = f"restore {dtype} H{hidden_size}"
            yield CompileCase(name, _restore_kernel, signature, constexprs, config.num_warps, 1, hot=False)
