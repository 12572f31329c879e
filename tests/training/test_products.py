"""Products in pieces against plain ones in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from dtbert.training.products import linear, pieces
from tests.kernels.test_native import error, randn


@given(rows=st.integers(0, 70_000))
def test_pieces_cover_all_rows_and_hardly_one_twice(rows: int) -> None:
    covered = pieces(rows)

    assert sorted({row for piece in covered for row in range(piece.start, piece.stop)}) == list(range(rows))
    twice = sum(piece.stop - piece.start for piece in covered) - rows
    assert twice <= max(1, rows / 32)


def test_the_pieces_are_of_few_lengths() -> None:
    lengths = {piece.stop - piece.start for rows in range(64, 16_385) for piece in pieces(rows)}

    assert len(lengths) < 100


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@given(rows=st.integers(0, 700), sizes=st.tuples(st.integers(1, 50), st.integers(1, 50)), seed=st.integers(0, 2**20))
def test_products_and_their_gradients_agree_with_float64(
    dtype: torch.dtype, rows: int, sizes: tuple[int, int], seed: int
) -> None:
    inner, outer = sizes
    x, weight, bias = (
        randn(*shape, seed=seed + at, dtype=dtype).requires_grad_()
        for at, shape in enumerate(((rows, inner), (outer, inner), (outer,)))
    )
    gradient = randn(rows, outer, seed=seed + 3, dtype=dtype)
    exact = [one.detach().double().requires_grad_() for one in (x, weight, bias)]
    expected = F.linear(*exact)

    product = linear(x, weight, bias)
    product.backward(gradient)
    expected.backward(gradient.double())

    assert product.dtype == dtype
    assert error(product.detach(), expected.detach()) < 1e-2
    for one, judge in zip((x, weight, bias), exact, strict=True):
        assert one.grad is not None
        assert judge.grad is not None
        assert one.grad.dtype == dtype
        assert error(one.grad, judge.grad) < 1e-2


def test_what_needs_no_gradient_gets_none() -> None:
    x, weight, bias = (randn(*shape, seed=0, dtype=torch.bfloat16) for shape in ((90, 8), (4, 8), (4,)))

    linear(x, weight.requires_grad_(), bias).sum().backward()

    assert x.grad is None
    assert bias.grad is None
    assert weight.grad is not None


def test_wider_numbers_are_left_to_torch() -> None:
    inputs = [randn(*shape, seed=0, dtype=torch.float64).requires_grad_() for shape in ((90, 8), (4, 8), (4,))]

    assert gradcheck(linear, inputs)
