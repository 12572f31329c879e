"""Weights in 8 bit, one scale per output row: int8, symmetric, as files hold them too, or fp8."""

import logging

import torch
from torch import Tensor, nn

from dtbert.kernels.float8 import FLOAT8, scale_rows
from dtbert.kernels.parameters import Linear

# Tables of a row or two (segments, the span head) gain nothing: they stay float16.
_MIN_ROWS = 8

logger = logging.getLogger(__name__)


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


def scaled(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A matrix rounded to int8 or fp8, and its scale, float32 ``[rows]``, as `Linear.hold_scaled` takes them."""
    if dtype == FLOAT8:
        values, scale = scale_rows(weight)
        return values, scale.squeeze(1)
    values, scale = quantize_rows(weight)
    return values, scale.float()


def layer_linears(model: nn.Module, dtype: torch.dtype) -> dict[str, Linear]:
    """By name, what a model that computes in int8 or fp8 holds so: the matrices of its layers.

    GPUs multiply in fp8 by multiples of 16: other matrices stay as they are, of which the log warns.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    found = {name: linear for name, linear in linears.items() if linear.layer is not None}
    if dtype != FLOAT8:
        return found
    odd = [name for name, linear in found.items() if any(size % 16 for size in linear.weight.shape)]
    if odd:
        logger.warning("of sizes that 16 does not divide, and so not multiplied in fp8: %s", ", ".join(odd))
    return {name: linear for name, linear in found.items() if name not in odd}


def quantize_layers(model: nn.Module, dtype: torch.dtype) -> None:
    """Round a model's layers to int8 or fp8, in place; `Bert.prepare` lays them out."""
    for linear in layer_linears(model, dtype).values():
        linear.hold_scaled(*scaled(linear.plain_weight, dtype))
