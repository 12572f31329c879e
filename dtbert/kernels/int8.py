"""Products in int8: weights with a scale per output, activations rounded to 8 bit token by token as they come."""

from typing import NamedTuple

import torch
from torch import Tensor


class Quantized(NamedTuple):
    """Tokens in 8 bit: a value is ``(values - zero) * step``.

    Attributes:
        values: ``[T, in]``, whole numbers from 0 to 255, in float32.
        zero: ``[T, 1]``, what stands for 0, in float32.
        step: float32 ``[T, 1]``, between two neighbouring values.
    """

    values: Tensor
    zero: Tensor
    step: Tensor


def quantize_tokens(x: Tensor) -> Quantized:
    """Round each token's values, with 0 among them, to 256 levels between its least and its greatest.

    Nothing depends on other tokens, so neither batch mates nor padding change a result. A token with a value that is
    not finite, or with a range beyond float32, has levels or a step that make its products NaN.
    """
    x = x.float()
    low = -x.amin(1, keepdim=True).clamp_max(0)
    span = x.amax(1, keepdim=True).clamp_min(0) + low
    inverse = 255 / span
    # Of nothing, or of less than has an inverse, all is 0.
    inverse = torch.where(inverse == torch.inf, 0, inverse)
    zero = (low * inverse).round()
    # In float64 a product is exact, as it is where a processor rounds it and a sum together.
    values = (x.double() * inverse.double()).round_().float() + zero
    # Both ends of the range may have been rounded up.
    return Quantized(values.clamp_max_(255), zero, span / 255)


def int8_product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """``x @ weight.T + bias`` with the tokens in 8 bit, in plain torch: the specification, not a fast way.

    Args:
        x: ``[T, in]``.
        weight: int8 ``[out, in]``.
        scale: float32 ``[out]``, of the weight.
        bias: ``[out]``.

    Returns:
        ``[T, out]`` in the dtype of ``x``; NaN for a token with a value that is not finite, or a range beyond float32.
    """
    values, zero, step = quantize_tokens(x)
    # In float64 sums of whole numbers are exact, as they are in int32.
    whole = (values - zero).double() @ weight.double().T
    return (whole.float() * (scale * step) + bias).to(x.dtype)
