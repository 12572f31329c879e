"""int8 weights: one float16 scale per output row, symmetric, weight = int8 * scale."""

import torch
from torch import Tensor, nn

from dtbert.kernels.parameters import Linear

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


def layer_linears(model: nn.Module) -> dict[str, Linear]:
    """By name, what a model that computes in int8 holds so: the matrices of its layers."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    return {name: linear for name, linear in linears.items() if linear.layer is not None}


def quantize_layers(model: nn.Module) -> None:
    """Round a model's layers to int8, in place; `Bert.prepare` lays them out."""
    for linear in layer_linears(model).values():
        values, scale = quantize_rows(linear.plain_weight)
        linear.hold_int8(values, scale.float())
