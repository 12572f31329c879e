"""The final scatter: nothing is computed, so every value must be the same."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.triton.cases import DTYPES, ORACLE, TOKENS, TRITON, WIDTHS, far_apart


def check(tokens: int, kept: list[int], width: int, dtype: torch.dtype) -> None:
    final, states = torch.randn(tokens, width).to(dtype), torch.randn(len(kept), width).to(dtype)
    rows = torch.tensor(kept, dtype=torch.int64)
    want = ORACLE.scatter(final, rows, states)
    assert torch.equal(TRITON.scatter(final, rows, states), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_scatter_agrees_with_reference(width: int, dtype: torch.dtype) -> None:
    check(63, list(range(1, 63, 3)), width, dtype)


@pytest.mark.parametrize("tokens", TOKENS)
def test_scatter_takes_any_number_of_tokens(tokens: int) -> None:
    check(tokens, list(range(0, tokens, 2)), 33, torch.float32)


@settings(max_examples=15)
@given(data=st.data(), width=st.integers(1, 300), tokens=st.integers(1, 12))
def test_scatter_takes_any_set_and_width(data: st.DataObject, width: int, tokens: int) -> None:
    check(tokens, sorted(data.draw(st.sets(st.integers(0, tokens - 1)))), width, torch.float16)


def test_scatter_writes_in_place() -> None:
    final = torch.zeros(3, 8)
    assert TRITON.scatter(final, torch.tensor([1]), torch.ones(1, 8)) is final
    assert final.sum(1).tolist() == [0, 8, 0]


def test_scatter_addresses_more_than_2_to_the_31_values() -> None:
    final = far_apart(3, 16, torch.float16)
    TRITON.scatter(final, torch.tensor([2]), torch.ones(1, 16, dtype=torch.float16))
    assert final.sum(1).tolist() == [0, 0, 16]


@pytest.mark.usefixtures("one_row_a_program")
def test_scatter_takes_one_row_a_program_as_on_a_gpu() -> None:
    check(5, [0, 2, 3], 40, torch.float32)


def test_scatter_leaves_rows_outside_alone() -> None:
    guarded = torch.zeros(5, 8)
    TRITON.scatter(guarded[1:4], torch.tensor([-1, 1, 3, 2**40]), torch.ones(4, 8))
    assert guarded.sum(1).tolist() == [0, 0, 8, 0, 0]
