"""Choice and compaction: indices, and rows that are moved as they are, so every one must be the same."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtbert.kernels import Left, Packing, Partials
from dtbert.kernels.triton.select import MAX_SEQLEN
from tests.kernels.packings import packing as packing_of
from tests.kernels.triton.cases import DTYPES, ORACLE, TOKENS, TRITON


def check(scores: torch.Tensor, lengths: list[int], counts: list[int]) -> torch.Tensor:
    packing, target = packing_of(lengths), packing_of(counts)
    got = TRITON.select(scores, packing, target)
    assert got.packing is target
    assert got.rows.dtype == torch.int64
    assert got.rows.tolist() == ORACLE.select(scores, packing, target).rows.tolist()
    return got.rows


@pytest.mark.parametrize("tokens", [*TOKENS, 513, 700, 2048])
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


def test_select_takes_the_longest_sequences() -> None:
    scores = torch.cat([torch.randn(MAX_SEQLEN).mul(4).round(), torch.randn(3)])
    check(scores, [MAX_SEQLEN, 3], [MAX_SEQLEN // 3, 2])


@pytest.mark.parametrize("tokens", [400, 1500])
def test_select_tells_neighbouring_floats_apart(tokens: int) -> None:
    bits = torch.arange(tokens).flip(0).int()
    for least in (0, 0x3F800000, -(2**31), 0x7F800000 - tokens):
        check((bits + least).view(torch.float32), [tokens], [tokens // 2])


def test_select_writes_no_further_than_its_rows_and_names_none_beyond_the_sequences() -> None:
    # Offsets that end before the rows do, as those of a batch that was filled up.
    padded = Packing((4, 3), torch.tensor([0, 4, 4], dtype=torch.int32))
    target = Packing((2, 3), torch.tensor([0, 2, 2], dtype=torch.int32))
    assert TRITON.select(torch.arange(7.0), padded, target).rows.tolist() == [2, 3, -1, -1, -1]
    # And those that end beyond the tokens and beyond the rows.
    beyond = Packing((4, 3), torch.tensor([0, 4, 90], dtype=torch.int32))
    target = Packing((2, 2), torch.tensor([0, 2, 80], dtype=torch.int32))
    assert TRITON.select(torch.arange(7.0), beyond, target).rows.tolist() == [2, 3, 5, 6]


def test_select_of_an_understated_length_stays_within_its_rows() -> None:
    packing, target = packing_of([600, 2]), packing_of([300, 1])
    packing.max_seqlen = 3
    rows = TRITON.select(torch.arange(602.0), packing, target).rows
    assert rows[-1] == 601
    assert set(rows[rows >= 0].tolist()) <= set(range(602))


class Dropping:
    """A batch whose tokens are dropped layer by layer, by both backends."""

    def __init__(self, lengths: list[int], dtype: torch.dtype, **protected: object) -> None:
        self.width, self.dtype = 40, dtype
        self.left = [Left(packing_of(lengths), **protected)] * 2

    def drop(self, counts: list[int], significance: torch.Tensor | None = None, parts: object = None) -> list[int]:
        tokens, target = self.left[0].packing.num_tokens, packing_of(counts)
        scores = torch.randint(0, 9, (tokens,)).float() if significance is None else significance
        states, context = (torch.randn(tokens, self.width).to(self.dtype) for _ in range(2))
        want, self.left[1], wanted = ORACLE.drop(self.left[1], target, scores, states.clone(), context)
        rows, self.left[0], got = TRITON.drop(self.left[0], target, scores if parts is None else parts, states, context)
        assert torch.equal(got, wanted)
        self.check()
        assert self.left[0].packing is target
        assert rows.tolist() == want.tolist()
        # Without a context none is moved, and the rest is the same.
        assert self.left[0].rows.tolist() == self.left[1].rows.tolist()
        return self.left[0].rows.tolist()

    def check(self) -> None:
        """States of the tokens that are not left; the others' become final later."""
        (rows, final), (_, want) = ((left.rows, left.final.clone()) for left in self.left)
        for states in (final, want):
            states[rows] = 0
        assert torch.equal(final, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "protected",
    [{}, {"keep_first": True}, {"segments": torch.arange(330) % 3}],
    ids=["any", "first stays", "question stays"],
)
def test_dropping_layer_by_layer_agrees_with_reference(dtype: torch.dtype, protected: dict[str, object]) -> None:
    dropping = Dropping([300, 5, 25], dtype, **protected)
    for counts in ([200, 5, 13], [64, 4, 13], [63, 1, 1]):
        dropping.drop(counts)


@pytest.mark.parametrize("maximum", [False, True], ids=["sum", "maximum"])
def test_parts_of_a_score_are_summed_over_the_blocks_of_each_sequence(maximum: bool) -> None:
    lengths, heads, block = [300, 40, 129], 3, 128
    dropping, tokens = Dropping(lengths, torch.float32), sum(lengths)
    parts = torch.randint(-9, 9, (3, heads, tokens)).float()
    # A block that a sequence does not reach holds anything.
    parts[1:, :, 300:340], parts[2:, :, 340:] = float("nan"), float("nan")
    known = parts.nan_to_num(-torch.inf if maximum else 0.0).flatten(0, 1)
    scores = known.amax(0).clamp(min=0) if maximum else known.sum(0)
    dropping.drop([150, 39, 2], scores, Partials(parts, block, maximum))


def test_dropping_moves_rows_in_many_programs_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["dtbert.kernels.triton.select"], "INTERPRETED", False)
    for lengths, counts in (([150, 3], [70, 3]), ([1030], [600])):
        dropping = Dropping(lengths, torch.bfloat16)
        for layer in (counts, [count // 2 + 1 for count in counts]):
            dropping.drop(layer)


def test_dropping_without_a_context_moves_states_alone() -> None:
    packing, states = packing_of([6]), torch.randn(6, 8)
    _, left, context = TRITON.drop(Left(packing), packing_of([4]), torch.arange(6.0), states)
    assert context is None
    assert left.final is states
    _, left, context = TRITON.drop(left, packing_of([1]), torch.tensor([0.0, 3, 2, 1]), torch.ones(4, 8))
    assert context is None
    assert left.rows.tolist() == [3]
    assert left.final[:, 0].tolist() == [*states[:2, 0].tolist(), 1, states[3, 0].item(), 1, 1]


def test_dropping_follows_no_row_outside_the_batch() -> None:
    guarded = torch.zeros(9, 8)
    left = Left(packing_of([4]), torch.tensor([-1, 0, 5, 2**40]), guarded[2:7], torch.zeros(5, dtype=torch.int64))
    TRITON.drop(left, packing_of([1]), torch.zeros(4), torch.ones(4, 8))
    assert guarded.sum(1).tolist() == [0] * 9
