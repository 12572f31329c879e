"""Rows in fp8 beside a step's own, with a scale each, and the products of them: `dtbert.kernels.float8` on a GPU.

A kernel that has a whole row at hand writes it in fp8 too. So a tensor carries its rows in fp8 from the step that makes
it to the product that takes it: whoever comes between sees the tensor alone, and one without any gets them by
`scale_rows`.
"""

# Triton's kernels carry no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from dtbert.files import first_line
from dtbert.kernels.float8 import FLOAT8, LARGEST, LEAST, ScaledRows, float8_product, rows_product
from dtbert.kernels.parameters import Linear
from dtbert.kernels.reference import Activation, activate
from dtbert.kernels.triton.launch import INTERPRETED, architecture, cdiv, launched, operator
from dtbert.kernels.triton.layer_norm import MAX_HIDDEN_SIZE, row_config
from dtbert.kernels.triton.linear import activated

_LARGEST, _LEAST = tl.constexpr(LARGEST), tl.constexpr(LEAST)
# Compute capability.
_FIRST = (8, 9)


@triton.jit
def scale_of(highest):
    """The scale of rows by their greatest magnitudes."""
    return tl.div_rn(tl.maximum(highest, _LEAST), _LARGEST)


@triton.jit
def store_scaled(rows, values, scales, offsets, i_rows, m_rows, mask):
    """Write float32 rows, which are 0 outside of ``mask``, in fp8, each with its scale."""
    scale = scale_of(tl.max(tl.abs(rows), 1))
    scaled = rows * tl.div_rn(1.0, scale)[:, None]
    tl.store(values + offsets, scaled.to(values.dtype.element_ty), mask=mask)
    tl.store(scales + i_rows, scale, mask=m_rows)


def allocate_scaled(rows: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where a kernel writes rows in fp8, and their scale ``[rows, 1]``; `rounded` finishes the rows."""
    # The interpreter's own conversion to fp8 is wrong: there torch rounds what the kernel leaves in float32.
    values = torch.empty(rows, width, dtype=torch.float32 if INTERPRETED else FLOAT8, device=device)
    return values, torch.empty(rows, 1, dtype=torch.float32, device=device)


def rounded(values: Tensor) -> Tensor:
    """What a kernel wrote, in fp8."""
    return values.to(FLOAT8) if INTERPRETED else values


@triton.jit(do_not_specialize=["tokens"])
def _scale_rows_kernel(
    x,  # [T, width]
    values,  # [T, width], out
    scales,  # [T], out
    tokens,
    x_stride,
    width: tl.constexpr,
    activation: tl.constexpr,  # "" for none
    block_t: tl.constexpr,
    block_h: tl.constexpr,
):
    i_rows = tl.program_id(0).to(tl.int64) * block_t + tl.arange(0, block_t)
    m_rows = i_rows < tokens
    highest = tl.zeros([block_t], tl.float32)
    for start in tl.static_range(0, width, block_h):
        b_x = _activated_block(x, i_rows, m_rows, start, x_stride, width, activation, block_h)
        highest = tl.maximum(highest, tl.max(tl.abs(b_x), 1))
    scale = scale_of(highest)
    inverse = tl.div_rn(1.0, scale)
    # A row of one block is still in registers.
    for start in tl.static_range(0, width, block_h):
        if width > block_h:
            b_x = _activated_block(x, i_rows, m_rows, start, x_stride, width, activation, block_h)
        columns = start + tl.arange(0, block_h)
        p_values = values + i_rows[:, None] * width + columns[None, :]
        mask = m_rows[:, None] & (columns < width)[None, :]
        tl.store(p_values, (b_x * inverse[:, None]).to(values.dtype.element_ty), mask=mask)
    tl.store(scales + i_rows, scale, mask=m_rows)


@triton.jit
def _activated_block(
    x, i_rows, m_rows, start, x_stride, width: tl.constexpr, activation: tl.constexpr, block_h: tl.constexpr
):
    """Columns from ``start`` on, activated and rounded as a tensor of them would be, float32; 0 outside."""
    columns = start + tl.arange(0, block_h)
    mask = m_rows[:, None] & (columns < width)[None, :]
    b_x = tl.load(x + i_rows[:, None] * x_stride + columns[None, :], mask=mask, other=0.0)
    if activation != "":
        # Each activation of 0 is 0.
        b_x = activated(b_x.to(tl.float32), activation, False).to(x.dtype.element_ty)
    return b_x.to(tl.float32)


@operator("scale_rows")
def scale_rows(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The rows of ``activation(x)``, or of ``x`` where that is empty, as `dtbert.kernels.float8.scale_rows` has them.

    Grid: a program a token. Activation and scale are float32; the activated row is rounded to the dtype of ``x`` first,
    so that the result is that of two steps. Reads T width values, rows of more than 4,096 twice, and writes T width
    bytes and 4 T of scales.
    """
    tokens, width = x.shape
    config = row_config(min(width, MAX_HIDDEN_SIZE), architecture(x.device))
    values, scale = allocate_scaled(tokens, width, x.device)
    launched(_scale_rows_kernel)[(cdiv(tokens, config.block_t),)](
        x,
        values,
        scale,
        tokens,
        x.stride(0),
        width=width,
        activation=activation,
        block_t=config.block_t,
        block_h=config.block_h,
        num_warps=config.num_warps,
    )
    return rounded(values), scale


def carrying(x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """``x``, which from here on carries its rows in fp8; not where torch.compile looks, which knows no such thing."""
    if torch.compiler.is_compiling():
        return x
    x._float8 = ScaledRows(values, scale)  # type: ignore[attr-defined]
    return x


def rows_of(x: Tensor) -> ScaledRows:
    """The rows in fp8 that a tensor carries, or made here."""
    carried: ScaledRows | None = getattr(x, "_float8", None)
    return ScaledRows(*scale_rows(x, "")) if carried is None else carried


def scaled_linear(rows: ScaledRows, layer: Linear, bias: Tensor | None) -> Tensor:
    """What the rows mean times a weight in fp8, bfloat16 ``[T, out]``; sums are float32."""
    weight, scale = layer.weight, layer.scale
    assert scale is not None
    if INTERPRETED:
        product = rows_product(rows, weight, scale)
        return (product if bias is None else product + bias).to(torch.bfloat16)
    # Fast accumulation would keep some 14 bits of a sum: F1 was measured with float32's.
    return torch._scaled_mm(
        rows.values,
        weight.t(),
        rows.scale,
        scale.unsqueeze(0),
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=False,
    )


@functools.cache
def why_not_float8(device: torch.device) -> str | None:
    """What keeps products in fp8 from a device; None where they run and give the right numbers."""
    if device.type == "cpu":  # interpreted
        return None
    if torch.version.hip:
        return "not on one of AMD"
    capability = torch.cuda.get_device_capability(device)
    if capability < _FIRST:
        return f"and {device} is of {capability[0]}.{capability[1]}"
    try:
        right = _is_right(device)
    except RuntimeError as error:  # no kernel for it in this build of torch
        return f"which torch {torch.__version__} does not on {device}: {first_line(error)}"
    return None if right else f"where those of torch {torch.__version__} are wrong on {device}"


@torch.no_grad()
def _is_right(device: torch.device) -> bool:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator).to(device) for shape in ((7, 64), (48, 64)))
    layer = Linear(64, 48).to(device, torch.bfloat16)
    layer.bias.fill_(1)
    rows = ScaledRows(*scale_rows(weight, ""))
    layer.hold_scaled(rows.values, rows.scale.squeeze(1))
    got = scaled_linear(rows_of(x), layer, layer.bias)
    want = float8_product(x, layer.weight, rows.scale.squeeze(1), layer.bias)
    return torch.allclose(got.float(), want, rtol=2e-2, atol=2e-2)


def activated_rows(product: Tensor, activation: Activation) -> Tensor:
    """``activation(product)`` in fp8 alone, for the next product and nobody else; under torch.compile as ever."""
    if torch.compiler.is_compiling():
        return activate(product, activation)
    values, scale = scale_rows(product, activation)
    # A view: a tensor that carried itself would not be freed.
    return carrying(values.view(values.shape), values, scale)
