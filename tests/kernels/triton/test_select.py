"""Ranking and compaction: indices, so every one must be the same."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.packings import packing as packing_of
from tests.kernels.triton.cases import ORACLE, TOKENS, TRITON


def check(scores: torch.Tensor, lengths: list[int], counts: list[int]) -> torch.Tensor:
    packing, target = packing_of(lengths), packing_of(counts)
    got = TRITON.select(scores, packing, target)
    assert got.packing is target
    assert got.rows.dtype == torch.int64
    assert got.rows.tolist() == ORACLE.select(scores, packing, target).rows.tolist()
    return got.rows


@pytest.mark.parametrize("tokens", [*TOKENS, 700])
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "tied"])
def test_select_agrees_with_reference(ties: bool, tokens: int) -> None:
    scores = torch.randint(0, 3, (tokens,)).float() if ties else torch.randn(tokens)
    for count in {1, tokens // 3 + 1, tokens}:
        check(scores, [tokens], [count])


def test_select_takes_mixed_lengths_and_empty_sequences() -> None:
    lengths = [0, 1, 63, 512, 0, 200, 0]
    check(torch.randn(sum(lengths)), lengths, [0, 1, 20, 512, 0, 3, 0])
    check(torch.randn(0), [0, 0], [0, 0])
    check(torch.randn(0), [], [])


@settings(max_examples=25)
@given(data=st.data())
def test_select_agrees_with_reference_for_any_packing(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 40), max_size=4))
    counts = [data.draw(st.integers(0, length)) for length in lengths]
    few = st.sampled_from([0.0, -0.0, 1.0, 2.5, float("inf"), float("-inf")])
    value = data.draw(st.sampled_from([few, st.floats(width=32, allow_nan=False)]))
    scores = data.draw(st.lists(value, min_size=sum(lengths), max_size=sum(lengths)))
    check(torch.tensor(scores, dtype=torch.float32), lengths, counts)


def test_select_breaks_ties_by_the_lower_position() -> None:
    assert check(torch.zeros(300), [300], [7]).tolist() == list(range(7))


def test_select_keeps_protected_tokens_first() -> None:
    scores = torch.rand(300)
    protected = [5, 100, 257, 299]
    scores[protected] = float("inf")
    assert check(scores, [300], [4]).tolist() == protected
    assert check(scores, [300], [2]).tolist() == protected[:2]


def test_select_counts_nan_as_infinity() -> None:
    scores = torch.tensor([1.0, float("nan"), 2.0, float("inf"), float("nan")])
    assert TRITON.select(scores, packing_of([5]), packing_of([3])).rows.tolist() == [1, 3, 4]


@settings(max_examples=6)
@given(data=st.data())
def test_select_does_not_depend_on_the_batch(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 30), min_size=2, max_size=4))
    counts = [data.draw(st.integers(1, length)) for length in lengths]
    scores = torch.randint(0, 4, (sum(lengths),)).float()
    together = check(scores, lengths, counts)
    alone = [
        check(scores[rows], [length], [count]) + rows.start
        for rows, length, count in zip(packing_of(lengths).slices, lengths, counts, strict=True)
    ]
    assert torch.equal(together, torch.cat(alone))
