"""Products in fp8 (e4m3): weights with a scale per output, activations rounded to 8 bit token by token as they come."""

from typing import NamedTuple

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
# The greatest number of e4m3.
LARGEST = 448.0
# What a row's greatest value counts as at the least, so that its scale and the inverse of that are normal numbers.
LEAST = 2.0**-100


class ScaledRows(NamedTuple):
    """Rows in 8 bit: ``values * scale`` is meant.

    Attributes:
        values: e4m3 ``[T, in]``.
        scale: float32 ``[T, 1]``.
    """

    values: Tensor
    scale: Tensor


def scale_rows(x: Tensor) -> ScaledRows:
    """Round each row to e4m3, whose greatest number stands for the row's greatest magnitude.

    A value keeps 4 significant bits; one below 2^-14.8 of the row's greatest becomes a multiple of 2^-17.8 of that. A
    row with a value that is not finite has a NaN. Nothing depends on other rows.
    """
    x = x.float()
    greatest = x.abs().amax(1, keepdim=True).clamp_min(LEAST)
    # By a tensor: on a GPU torch multiplies by the inverse of a number, and the last bit is another.
    scale = greatest / torch.full_like(greatest, LARGEST)
    return ScaledRows((x * (1 / scale)).to(FLOAT8), scale)


def rows_product(rows: ScaledRows, weight: Tensor, scale: Tensor) -> Tensor:
    """What the rows mean times ``weight.T * scale``, float32 ``[T, out]``; arguments as `float8_product`."""
    # In float64 sums of up to 2^17 such products are exact: they are whole multiples of 2^-18 below 2^35.
    total = rows.values.double() @ weight.double().T
    return total.float() * (rows.scale * scale)


def float8_product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """``x @ weight.T + bias`` with the tokens in fp8, in plain torch: the specification, not a fast way.

    Args:
        x: ``[T, in]``.
        weight: e4m3 ``[out, in]``.
        scale: float32 ``[out]``, of the weight.
        bias: ``[out]``.

    Returns:
        ``[T, out]`` in the dtype of ``x``.
    """
    return (rows_product(scale_rows(x), weight, scale) + bias).to(x.dtype)
