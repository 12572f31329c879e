"""Which tokens the compiled selection keeps, against the plain one."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtbert.kernels import Backend, native
from tests.kernels.packings import packing

NATIVE, PLAIN = native.Native(), Backend()
SCORES = st.sampled_from([0.0, -0.0, 1.0, 1e-42, -1e-42, -2.5, math.inf, -math.inf, math.nan, -math.nan])


@pytest.fixture(scope="module", autouse=True)
def _built(built_steps: None) -> None:
    """All tests here need them."""


@given(rows=st.lists(st.lists(SCORES, max_size=40), max_size=7), data=st.data())
def test_select_agrees_with_the_plain_one_on_ties_and_what_is_not_finite(
    rows: list[list[float]], data: st.DataObject
) -> None:
    target = packing([data.draw(st.integers(0, len(row))) for row in rows])
    scores = torch.tensor([value for row in rows for value in row], dtype=torch.float32)
    arguments = scores, packing([len(row) for row in rows]), target

    kept = NATIVE.select(*arguments)

    assert kept.rows.dtype == torch.int64
    assert kept.packing is target
    assert kept.rows.tolist() == PLAIN.select(*arguments).rows.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_select_takes_what_a_scorer_may_give(dtype: torch.dtype) -> None:
    lengths, kept = [512, 3, 77], [200, 3, 1]
    scores = torch.rand(2 * sum(lengths)).to(dtype)[::2]

    rows = NATIVE.select(scores, packing(lengths), packing(kept)).rows

    assert rows.tolist() == PLAIN.select(scores, packing(lengths), packing(kept)).rows.tolist()
