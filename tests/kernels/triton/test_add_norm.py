"""Product, gather, bias, residual and LayerNorm against the reference in float64."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dtbert.kernels.parameters import LayerNorm, Linear
from tests.kernels.triton.cases import (
    DTYPES,
    ORACLE,
    TOKENS,
    TRITON,
    WIDTHS,
    assert_close,
    doubled,
    far_apart,
    parameters,
    random_linear,
    random_norm,
)


class Inputs(NamedTuple):
    x: Tensor
    layer: Linear
    residual: Tensor
    norm: LayerNorm


def inputs(rows: int, tokens: int, width: int, dtype: torch.dtype, seed: int = 0, eps: float = 1e-12) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    x, residual = (torch.randn(count, width, generator=generator).to(dtype) for count in (rows, tokens))
    layer = random_linear(width, width, dtype, generator)
    return Inputs(x, layer, residual, random_norm(width, dtype, generator, eps))


def check(given: Inputs, rows: Tensor | None = None) -> None:
    x, layer, residual, norm = given
    want = ORACLE.add_norm(x.double(), doubled(layer), residual.double(), doubled(norm), rows)
    assert_close(TRITON.add_norm(*given, rows), want, x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("gather", [False, True], ids=["all", "kept"])
def test_add_norm_agrees_with_reference(gather: bool, width: int, dtype: torch.dtype) -> None:
    rows = torch.randperm(127)[:63].sort().values if gather else None
    check(inputs(63, 127 if gather else 63, width, dtype), rows)


@pytest.mark.parametrize("tokens", [0, *TOKENS])
def test_add_norm_takes_any_number_of_tokens(tokens: int) -> None:
    check(inputs(tokens, tokens, 33, torch.float32))


@settings(max_examples=15)
@given(data=st.data(), width=st.integers(2, 200), tokens=st.integers(1, 12), seed=st.integers(0, 99))
def test_add_norm_gathers_any_set(data: st.DataObject, width: int, tokens: int, seed: int) -> None:
    kept = sorted(data.draw(st.sets(st.integers(0, tokens - 1))))
    check(inputs(len(kept), tokens, width, torch.float32, seed, 1e-5), torch.tensor(kept, dtype=torch.int64))


def test_add_norm_takes_a_product_of_another_width() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = random_linear(70, 33, torch.float32, generator)
    check(inputs(5, 9, 33, torch.float32)._replace(x=torch.randn(5, 70), layer=layer), torch.tensor([0, 3, 4, 7, 8]))


def test_add_norm_never_reads_dropped_rows() -> None:
    given, rows = inputs(2, 5, 32, torch.float32), torch.tensor([1, 3])
    want = TRITON.add_norm(*given, rows)
    given.residual[[0, 2, 4]] = float("nan")
    assert torch.equal(TRITON.add_norm(*given, rows), want)


def test_add_norm_reads_rows_of_a_wider_tensor() -> None:
    given = inputs(3, 5, 40, torch.float32)
    check(given._replace(residual=torch.randn(5, 64)[:, 7:47]), torch.tensor([0, 2, 3]))


def test_add_norm_of_integers_is_exact() -> None:
    # Rows of -1 and 1 in equal numbers have mean 0 and variance 1, also after the sum.
    signs = torch.tensor([1.0, -1.0]).repeat(192)
    layer = parameters(Linear, weight=torch.eye(384), bias=-11 * signs)
    norm = parameters(LayerNorm, weight=torch.arange(384.0), bias=torch.arange(384.0) - 5, eps=0.0)
    product, residual = 5 * signs.expand(3, -1).contiguous(), 7 * signs.expand(4, -1).contiguous()
    got = TRITON.add_norm(product, layer, residual, norm, torch.tensor([0, 2, 3]))
    assert torch.equal(got, (norm.weight * signs + norm.bias).expand(3, -1))


def test_add_norm_addresses_more_than_2_to_the_31_values() -> None:
    given, rows = inputs(2, 2, 16, torch.float16), torch.tensor([0, 2])
    residual = far_apart(3, 16, torch.float16)
    residual[2] = torch.randn(16)
    got = TRITON.add_norm(*given._replace(residual=residual), rows)
    assert torch.equal(got, TRITON.add_norm(*given._replace(residual=residual[rows])))


@pytest.mark.usefixtures("one_row_a_program")
def test_add_norm_takes_one_row_a_program_as_on_a_gpu() -> None:
    check(inputs(3, 5, 40, torch.float32), torch.tensor([0, 2, 3]))


def test_add_norm_follows_no_row_outside_the_residual() -> None:
    given, none = inputs(3, 5, 40, torch.float32), inputs(3, 5, 40, torch.float32)
    none.residual.zero_()
    for outside in (-1, 5, 2**40, -(2**40)):
        got = TRITON.add_norm(*given, torch.tensor([0, outside, 3]))
        assert torch.equal(got[[0, 2]], TRITON.add_norm(*given, torch.tensor([0, 1, 3]))[[0, 2]])
        assert torch.equal(got[1], TRITON.add_norm(*none, torch.tensor([0, 1, 3]))[1])
