"""Ranking and compaction: indices, so every one must be the same."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtbert.kernels import reference
from dtbert.kernels.triton import select_tokens as select_tokens_of_triton
from dtbert.kernels.triton.select_tokens import MAX_SEQLEN
from tests.kernels.triton.cases import TOKENS


def offsets(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def check(scores: torch.Tensor, lengths: list[int], counts: list[int]) -> torch.Tensor:
    inputs = scores, offsets(lengths), offsets(counts), sum(counts), max(lengths, default=0)
    got = select_tokens_of_triton(*inputs)
    assert got.dtype == torch.int64
    assert got.tolist() == reference.select_tokens(*inputs).tolist()
    return got


@pytest.mark.parametrize("tokens", [*TOKENS, 700])
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "tied"])
def test_select_tokens_agrees_with_reference(ties: bool, tokens: int) -> None:
    scores = torch.randint(0, 3, (tokens,)).float() if ties else torch.randn(tokens)
    for count in {1, tokens // 3 + 1, tokens}:
        check(scores, [tokens], [count])


def test_select_tokens_takes_mixed_lengths_and_empty_sequences() -> None:
    lengths = [0, 1, 63, 512, 0, 200, 0]
    check(torch.randn(sum(lengths)), lengths, [0, 1, 20, 512, 0, 3, 0])
    check(torch.randn(0), [0, 0], [0, 0])
    check(torch.randn(0), [], [])


@settings(max_examples=25)
@given(data=st.data())
def test_select_tokens_agrees_with_reference_for_any_packing(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 40), max_size=4))
    counts = [data.draw(st.integers(0, length)) for length in lengths]
    few = st.sampled_from([0.0, -0.0, 1.0, 2.5, float("inf"), float("-inf")])
    value = data.draw(st.sampled_from([few, st.floats(width=32, allow_nan=False)]))
    scores = data.draw(st.lists(value, min_size=sum(lengths), max_size=sum(lengths)))
    check(torch.tensor(scores, dtype=torch.float32), lengths, counts)


def test_select_tokens_breaks_ties_by_the_lower_position() -> None:
    assert check(torch.zeros(300), [300], [7]).tolist() == list(range(7))


def test_select_tokens_keeps_protected_tokens_first() -> None:
    scores = torch.rand(300)
    protected = [5, 100, 257, 299]
    scores[protected] = float("inf")
    assert check(scores, [300], [4]).tolist() == protected
    assert check(scores, [300], [2]).tolist() == protected[:2]


def test_select_tokens_counts_nan_as_infinity() -> None:
    scores = torch.tensor([1.0, float("nan"), 2.0, float("inf"), float("nan")])
    inputs = scores, offsets([5]), offsets([3]), 3, 5
    assert select_tokens_of_triton(*inputs).tolist() == [1, 3, 4]


@settings(max_examples=6)
@given(data=st.data())
def test_select_tokens_does_not_depend_on_the_batch(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 30), min_size=2, max_size=4))
    counts = [data.draw(st.integers(1, length)) for length in lengths]
    scores = torch.randint(0, 4, (sum(lengths),)).float()
    together = check(scores, lengths, counts)
    alone, start = [], 0
    for length, count in zip(lengths, counts, strict=True):
        alone.append(check(scores[start : start + length], [length], [count]) + start)
        start += length
    assert torch.equal(together, torch.cat(alone))


def test_select_tokens_refuses_a_sequence_past_its_limit() -> None:
    inputs = torch.zeros(2), offsets([2]), offsets([1]), 1
    with pytest.raises(ValueError, match=f"a sequence of {MAX_SEQLEN + 1} tokens, the kernel ranks up to {MAX_SEQLEN}"):
        select_tokens_of_triton(*inputs, MAX_SEQLEN + 1)
