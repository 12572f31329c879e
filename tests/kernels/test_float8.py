"""Products in fp8: their specification, against float64 and what rounding to e4m3 allows."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dtbert.kernels import Backend
from dtbert.kernels.float8 import FLOAT8, LARGEST, LEAST, float8_product, scale_rows
from dtbert.kernels.parameters import Linear, of_tensors
from tests.kernels.test_int8 import tokens_of
from tests.kernels.test_native import randn

SIZES = {"rows": st.integers(1, 20), "columns": st.integers(1, 90), "seed": st.integers(0, 2**20)}


def rounding(x: Tensor, scale: Tensor) -> Tensor:
    """How far rounding to 4 significant bits, or to the least number of e4m3, may move each value."""
    return (1 + 1e-6) * torch.maximum(x.abs().double() * 2**-4, scale.double() * 2**-10)


@given(**SIZES)
def test_rows_are_right_to_four_bits_and_reach_the_greatest_number(rows: int, columns: int, seed: int) -> None:
    x = tokens_of(rows, columns, seed)
    values, scale = scale_rows(x)
    assert (values.dtype, scale.dtype, scale.shape) == (FLOAT8, torch.float32, (rows, 1))
    meant = values.double() * scale.double()
    assert ((meant - x.double()).abs() <= rounding(x, scale)).all()
    greatest = values.float().abs().amax(1)
    assert torch.equal(greatest, torch.where(x.any(1), LARGEST, 0.0))


@given(outputs=st.integers(1, 40), **SIZES)
def test_product_is_as_right_as_its_rounding_allows(rows: int, columns: int, outputs: int, seed: int) -> None:
    x, weight = tokens_of(rows, columns, seed), randn(outputs, columns, seed=seed + 1)
    bias = randn(outputs, seed=seed + 2)
    values, scale = scale_rows(weight)
    got = float8_product(x, values, scale.squeeze(1), bias)
    of_x, of_weight = rounding(x, scale_rows(x).scale), rounding(weight, scale)
    exact, wide = x.double() @ weight.double().T + bias.double(), x.abs().double()
    allowed = of_x @ weight.abs().double().T + (wide + of_x) @ of_weight.T
    assert ((got.double() - exact).abs() <= allowed + 1e-5 * (exact.abs() + bias.abs())).all()


@given(outputs=st.integers(1, 40), **SIZES)
def test_product_is_that_of_the_rounded_values(rows: int, columns: int, outputs: int, seed: int) -> None:
    x, bias = tokens_of(rows, columns, seed), randn(outputs, seed=seed + 2)
    layer = of_tensors(Linear, weight=None, bias=bias)
    values, scale = scale_rows(randn(outputs, columns, seed=seed + 1))
    layer.hold_scaled(values, scale.squeeze(1))
    of_x = scale_rows(x)
    want = (of_x.values.double() * of_x.scale.double()) @ (values.double() * scale.double()).T + bias.double()
    got = Backend().linear(x, layer)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    # Its batch mates change no bit.
    assert torch.equal(got, torch.cat([Backend().linear(row[None], layer) for row in x]))


def test_values_that_are_not_finite_stay_in_their_row() -> None:
    x = randn(5, 32, seed=0)
    x[1, 3], x[2, 4], x[3, 5] = torch.inf, -torch.inf, torch.nan
    values, scale = scale_rows(randn(16, 32, seed=1))
    got = float8_product(x, values, scale.squeeze(1), torch.zeros(16))
    assert got[[0, 4]].isfinite().all()
    assert got[1:4].isnan().all()


def test_rows_at_the_ends_of_float32_are_finite() -> None:
    x = torch.ones(4, 8) * torch.tensor([3.4e38, 1e-30, 1e-38, 0])[:, None]
    values, scale = scale_rows(x)
    assert values.float().isfinite().all()
    torch.testing.assert_close(values.float()[:2] * scale[:2], x[:2])
    # As good as 0.
    assert (values.float() * scale)[2:].max() <= LEAST
    assert scale.min() >= torch.finfo(torch.float32).tiny
