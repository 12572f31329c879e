"""int8 weights: one float16 scale per output row, symmetric, weight = int8 * scale."""

import torch
from torch import Tensor

# Tables of a row or two (segments, the span head) gain nothing: they stay float16.
_MIN_ROWS = 8


def is_quantizable(shape: tuple[int, ...]) -> bool:
    """Whether a tensor of this shape is stored as int8."""
    return len(shape) == 2 and shape[0] >= _MIN_ROWS


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values ``[rows, columns]`` and their float16 scale ``[rows]``; each value is within half a scale step.

    A row whose largest value is above 8 million gets an infinite scale: float16 holds no greater one.
    """
    weight = weight.float()
    largest = weight.abs().amax(1)
    scale = (largest / 127).half()
    # float16 may have rounded down so far that 127 steps do not reach the largest value: take the next greater one.
    scale = (scale.view(torch.int16) + (largest > 127.5 * scale.float())).view(torch.float16)
    steps = torch.where(scale > 0, scale.float(), 1.0)
    return (weight / steps[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale


def dequantize_rows(values: Tensor, scale: Tensor) -> Tensor:
    """float32 ``[rows, columns]`` of `quantize_rows`."""
    return values.float().mul_(scale.float()[:, None])
