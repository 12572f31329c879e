"""Where a text speaks of what is asked: whole numbers until the end, so every value must be the same."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtbert.kernels import TokenIds
from tests.kernels.packings import packing as packing_of
from tests.kernels.triton.cases import ORACLE, TRITON


def check(lengths: list[int], questions: list[int], words: int, seed: int = 0, gaps: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    packing, tokens = packing_of(lengths), sum(lengths)
    input_ids = torch.randint(0, words, (tokens,), generator=generator)
    pairs = list(zip(lengths, questions, strict=True))
    segments = torch.cat([torch.arange(length) >= question for length, question in pairs]).long()
    steps = torch.randint(1, gaps + 1, (tokens,), generator=generator)
    positions = torch.cat([steps[rows].cumsum(0) for rows in packing.slices])
    ids = TokenIds(input_ids, segments, positions)
    got = TRITON.question_overlap(ids, packing)
    assert torch.equal(got, ORACLE.question_overlap(ids, packing))
    return got


@pytest.mark.parametrize("words", [3, 100])
def test_overlap_agrees_with_reference(words: int) -> None:
    assert check([384, 1, 63, 64, 65, 200, 129], [14, 1, 8, 64, 9, 0, 20], words).max() > 0


@settings(max_examples=15)
@given(
    pairs=st.lists(st.tuples(st.integers(1, 140), st.integers(0, 12)), min_size=1, max_size=3),
    words=st.integers(1, 12),
    gaps=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_overlap_takes_any_batch(pairs: list[tuple[int, int]], words: int, gaps: int, seed: int) -> None:
    lengths, questions = zip(*pairs, strict=True)
    check(list(lengths), list(questions), words, seed, gaps)


def test_overlap_takes_empty_sequences() -> None:
    check([0, 9, 0], [0, 4, 0], 2)
    check([0], [0], 2)


def test_one_word_everywhere_has_its_unit_shared_out() -> None:
    # The greatest sum there is: a single place in the middle of a text.
    packing = packing_of([70])
    segments = torch.tensor([0] * 3 + [1] * 67)
    words = torch.arange(70)
    words[40] = 1
    overlap = TRITON.question_overlap(TokenIds(words, segments, torch.arange(70)), packing)
    assert overlap[40] == 1
    assert overlap[40 - 32] == overlap[40 + 29] - 3 / 32 == 0
