"""Dropout, which on a CPU draws 15 bits a value: torch's own draws a double for each, a third of a step's time."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

_BITS = 15
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def dropout(x: Tensor, probability: float) -> Tensor:
    """``x`` with values set to 0 by chance and the others scaled up, so that the mean stays.

    On a CPU the probability is rounded down to a multiple of 2**-15, and the scale is that one's.
    """
    if not x.is_cpu:
        return F.dropout(x, probability)
    dropped, scale = rounded(probability)
    return x if dropped == 0 else _Masked.apply(x, dropped, scale)  # type: ignore[no-untyped-call]


def rounded(probability: float) -> tuple[int, float]:
    """How many of 2**15 values are dropped, and what the others are scaled by."""
    dropped = int(probability * 2**_BITS)
    return dropped, 2**_BITS / (2**_BITS - dropped)


def draw_signs(shape: Sequence[int], dropped: int) -> Tensor:
    """int16 in a shape, of which ``dropped`` of 2**15, in the mean, are below 0."""
    count = math.prod(shape)
    # Numbers of 64 bits from their whole range, each of them four draws.
    drawn = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    # The distance to the threshold; without the lowest bit, so that none overflows.
    return drawn[:count].bitwise_right_shift_(1).sub_(dropped - 2 ** (_BITS - 1)).view(*shape)


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, dropped: int, scale: float) -> Tensor:
        # All bits of what stays, none of what is dropped.
        mask = draw_signs(x.shape, dropped).bitwise_right_shift_(15).bitwise_not_()
        ctx.save_for_backward(mask)
        ctx.scale = scale  # type: ignore[attr-defined]
        return _masked(x, mask, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return _masked(gradient, mask, ctx.scale), None, None  # type: ignore[attr-defined]


def _masked(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    word = _WORDS[x.element_size()]
    return x.contiguous().view(word).bitwise_and(mask.to(word)).view(x.dtype).mul_(scale)
