"""Dropout, which on a CPU draws 15 bits a value: torch's own draws a double for each, a third of a step's time."""

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
    dropped = int(probability * 2**_BITS)
    return x if dropped == 0 else _Masked.apply(x, dropped)  # type: ignore[no-untyped-call]


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, dropped: int) -> Tensor:
        """``dropped`` of 2**15 values, in the mean, are 0."""
        mask = _mask(x, dropped)
        ctx.save_for_backward(mask)
        ctx.scale = 2**_BITS / (2**_BITS - dropped)  # type: ignore[attr-defined]
        return _masked(x, mask, ctx.scale)  # type: ignore[attr-defined]

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return _masked(gradient, mask, ctx.scale), None  # type: ignore[attr-defined]


def _mask(x: Tensor, dropped: int) -> Tensor:
    """All bits of what stays, none of what is dropped: int16 in the shape of ``x``."""
    # Numbers of 64 bits from their whole range, each of them four draws.
    drawn = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    # The sign of a number's distance to the threshold; without the lowest bit, so that no distance overflows.
    distance = drawn[: x.numel()].bitwise_right_shift_(1).sub_(dropped - 2 ** (_BITS - 1))
    return distance.bitwise_right_shift_(15).bitwise_not_().view(x.shape)


def _masked(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    word = _WORDS[x.element_size()]
    return x.contiguous().view(word).bitwise_and(mask.to(word)).view(x.dtype).mul_(scale)
