"""Products in half precision on a CPU, in pieces of few sizes.

oneDNN compiles a program for each shape that it meets, in half precision for 4 to 12 ms, which is several times what
the product itself takes where the processor has matrix instructions. The tokens of a step, and those that a layer
keeps, never number the same twice.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``x @ weight.T + bias``, ``[T, in]`` to ``[T, out]``, all of one dtype."""
    if not x.is_cpu or x.element_size() != 2:
        return F.linear(x, weight, bias)
    return cast(Tensor, _Linear.apply(x, weight, bias))  # type: ignore[no-untyped-call]


def pieces(rows: int) -> list[slice]:
    """Slices that cover so many rows, of few lengths whatever their number; the last may overlap the one before.

    One of eight lengths in an octave, then what is left, rounded up to a quarter of the distance of two such.
    """
    step = max(8, 1 << max(0, rows.bit_length() - 4))
    main = rows // step * step
    if main in (0, rows):
        return [slice(0, rows)]
    quarter = step // 4
    return [slice(0, main), slice(rows - -(-(rows - main) // quarter) * quarter, rows)]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        out = x.new_empty(len(x), len(weight))
        for rows in pieces(len(x)):
            torch.addmm(bias, x[rows], weight.t(), out=out[rows])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        gradient = gradient.contiguous()
        of_x = of_weight = None
        if needs_x:
            of_x = torch.empty_like(x)
            for rows in pieces(len(x)):
                torch.mm(gradient[rows], weight, out=of_x[rows])
        if needs_weight:
            of_weight = _gradient_of_weight(gradient, x)
        return of_x, of_weight, gradient.sum(0) if needs_bias else None


def _gradient_of_weight(gradient: Tensor, x: Tensor) -> Tensor:
    main, *rest = pieces(len(x))
    if not rest:
        return gradient.t() @ x
    # Few rows first: what they come to is rounded, then once more with what is added.
    missing = rest[0].stop - rest[0].start - (len(x) - main.stop)
    few, few_x = (F.pad(one[main.stop :], (0, 0, 0, missing)) for one in (gradient, x))
    return torch.addmm(few.t() @ few_x, gradient[main].t(), x[main])
