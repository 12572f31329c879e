"""Products: cuBLAS; with an activation also as one kernel."""

# Triton's kernels carry no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from collections.abc import Mapping

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from dtbert.kernels.reference import Activation
from dtbert.kernels.triton.configs import linear_config
from dtbert.kernels.triton.launch import INTERPRETED, architecture, cdiv, launched, operator

# From how many tokens on the one kernel is taken, by architecture and dtype. On an H200, bfloat16, 768 x 3072 with
# erf-GELU, it beat cuBLAS and a pass wherever it was timed, in us: 7.8 against 9.0 at 384 tokens, 35 against 37 at
# 3,072, 129 against 153 at 12,288, 522 against 581 at 49,152. Fewer than 384 were not timed.
FUSED_FROM: Mapping[tuple[str, torch.dtype], int] = {("sm_90", torch.bfloat16): 1024, ("sm_90", torch.float16): 1024}

# Programs of so many row blocks share the columns of the weight that they read.
_GROUP = tl.constexpr(8)


@triton.jit
def _erf_gelu(x):
    """x * Phi(x) to 4e-5, for results of 16 bit: erf takes a third of the time of a product of 768 x 3072."""
    half, z = 0.5 * x, tl.minimum(tl.abs(x) * 0.7071067811865476, 3.0)
    # erf(z) / z on [0, 3] as a polynomial in z^2, fitted to the least weighted error.
    square = z * z
    ratio = 3.33132951e-08 * square - 1.6493343e-06
    ratio = ratio * square + 3.61806476e-05
    ratio = ratio * square - 0.000467789099
    ratio = ratio * square + 0.00401360714
    ratio = ratio * square - 0.0244417797
    ratio = ratio * square + 0.109993378
    ratio = ratio * square - 0.374456259
    ratio = ratio * square + 1.1280378
    return half + tl.abs(half) * tl.minimum(ratio * z, 1.0)


@triton.jit
def activated(x, activation: tl.constexpr, exact: tl.constexpr):
    if activation == "gelu":
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476)) if exact else _erf_gelu(x)
    if activation == "gelu_tanh":
        # (1 + tanh(y)) / 2 = sigmoid(2 y)
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    if activation == "silu":
        return x * tl.sigmoid(x)
    return tl.maximum(x, 0.0)


@triton.jit(do_not_specialize=["tokens"])
def _fused_linear_kernel(
    x,  # [T, in]
    weight,  # [out, in]
    bias,  # [out], or anything without has_bias
    output,  # [T, out], out
    tokens,
    outputs,
    x_stride,
    weight_stride,
    inputs: tl.constexpr,
    has_bias: tl.constexpr,
    activation: tl.constexpr,
    upcast: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
):
    i_program = tl.program_id(0)
    blocks_m, blocks_n = tl.cdiv(tokens, block_m), tl.cdiv(outputs, block_n)
    i_group = i_program // (_GROUP * blocks_n)
    first_m = i_group * _GROUP
    group = tl.minimum(blocks_m - first_m, _GROUP)
    i_m = first_m + i_program % (_GROUP * blocks_n) % group
    i_n = i_program % (_GROUP * blocks_n) // group

    o_m = i_m * block_m + tl.arange(0, block_m)
    o_n = i_n * block_n + tl.arange(0, block_n)
    o_k = tl.arange(0, block_k)
    m_m, m_n = o_m < tokens, o_n < outputs
    # Rows past the end read the first one: the store leaves them out.
    p_x = x + tl.where(m_m, o_m, 0).to(tl.int64)[:, None] * x_stride + o_k[None, :]
    p_weight = weight + tl.where(m_n, o_n, 0).to(tl.int64)[None, :] * weight_stride + o_k[:, None]
    b_sum = tl.zeros([block_m, block_n], tl.float32)
    for k in range(0, inputs, block_k):
        if inputs % block_k == 0:
            b_x, b_weight = tl.load(p_x), tl.load(p_weight)
        else:
            m_k = o_k < inputs - k
            b_x = tl.load(p_x, mask=m_k[None, :], other=0.0)
            b_weight = tl.load(p_weight, mask=m_k[:, None], other=0.0)
        if upcast:  # the interpreter's products of bfloat16 are wrong
            b_x, b_weight = b_x.to(tl.float32), b_weight.to(tl.float32)
        b_sum = tl.dot(b_x, b_weight, b_sum, input_precision="ieee")
        p_x += block_k
        p_weight += block_k
    if has_bias:
        b_sum += tl.load(bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    b_output = activated(b_sum, activation, output.dtype.element_ty == tl.float32).to(output.dtype.element_ty)
    p_output = output + o_m.to(tl.int64)[:, None] * outputs + o_n[None, :]
    tl.store(p_output, b_output, mask=m_m[:, None] & m_n[None, :])


@operator("fused_linear")
def fused_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """`Backend.linear` with an activation in one kernel, whether or not that is the faster way here.

    Grid: a program a block of tokens and outputs. Accumulates in float32, which float32 inputs keep exactly (no TF32).
    Does 2 T in out FLOPs, reads T in + out in and writes T out values; cuBLAS and a pass move 2 T out more.
    """
    (tokens, inputs), outputs = x.shape, weight.shape[0]
    config = linear_config(architecture(x.device), x.dtype, inputs)
    output = torch.empty(tokens, outputs, dtype=x.dtype, device=x.device)
    grid = cdiv(tokens, config.block_m) * cdiv(outputs, config.block_n)
    launched(_fused_linear_kernel)[(grid,)](
        x,
        weight,
        x if bias is None else bias,
        output,
        tokens,
        outputs,
        x.stride(0),
        weight.stride(0),
        inputs=inputs,
        has_bias=bias is not None,
        activation=activation,
        upcast=INTERPRETED,
        block_m=config.block_m,
        block_n=config.block_n,
        block_k=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return output


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation | None) -> Tensor:
    """`Backend.linear`: cuBLAS, or `activated_linear`."""
    return F.linear(x, weight, bias) if activation is None else activated_linear(x, weight, bias, activation)


# An operator, so that torch.compile does not trace the choice: torch 2.11 breaks the graph there, and then itself.
@operator("activated_linear")
def activated_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """`Backend.linear` with an activation: cuBLAS and a pass in place, or `fused_linear` where `FUSED_FROM` says so."""
    if FUSED_FROM:
        least = FUSED_FROM.get((architecture(x.device), x.dtype))
        if least is not None and len(x) >= least:
            return fused_linear(x, weight, bias, activation)
    product = F.linear(x, weight, bias)
    if activation == "relu":
        return product.relu_()
    if activation == "silu":
        return F.silu(product, inplace=True)
    return torch.ops.aten.gelu_.default(product, approximate="tanh" if activation == "gelu_tanh" else "none")
