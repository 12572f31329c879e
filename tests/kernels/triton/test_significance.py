"""Every score of the fused attention against the reference in float64, and its exact answers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtbert.kernels import ATTENTION_SCORES, AttentionScore
from tests.kernels.triton.cases import DTYPES, ORACLE, TOKENS, TRITON, assert_close
from tests.kernels.triton.packing import Packed, among_others, looking_at, pack

SCORES = pytest.mark.parametrize("kind", ATTENTION_SCORES)
# Those that read all queries come with the context, too.
WITH_CONTEXT = tuple(kind for kind in ATTENTION_SCORES if kind not in ("cls", "from_question"))


def scores_of(packed: Packed, kind: AttentionScore, segments: torch.Tensor | None = None) -> list[torch.Tensor]:
    """By every way to ask for it."""
    alone = TRITON.significance(*packed, kind, segments)
    return [alone, TRITON.scored_attention(*packed, kind)[1]] if kind in WITH_CONTEXT else [alone]


def check(packed: Packed, kind: AttentionScore, segments: torch.Tensor | None = None) -> None:
    want = ORACLE.significance(*packed.doubled(), kind, segments)
    # Scores are sums of float32 products, whatever the dtype of what enters them.
    for got in scores_of(packed, kind, segments):
        assert_close(got, want, torch.float32)
    if kind in WITH_CONTEXT:
        context, _ = TRITON.scored_attention(*packed, kind)
        assert_close(context, ORACLE.attention(*packed.doubled()), packed.qkv.dtype)


def segments_of(lengths: list[int], question: int) -> torch.Tensor:
    return torch.cat([torch.arange(length) >= question for length in [*lengths, 0]]).long()


@SCORES
@pytest.mark.parametrize("tokens", [1, 63, 200])
def test_score_agrees_with_reference(tokens: int, kind: AttentionScore) -> None:
    check(pack([tokens], 1, 64), kind, segments_of([tokens], 20))


@pytest.mark.parametrize("tokens", TOKENS)
def test_received_agrees_with_reference_at_any_length(tokens: int) -> None:
    check(pack([tokens], 1, 64), "received")


@SCORES
@pytest.mark.parametrize("dtype", DTYPES)
def test_score_takes_mixed_lengths_empty_sequences_and_any_dtype(dtype: torch.dtype, kind: AttentionScore) -> None:
    lengths = [0, 130, 1, 0, 63, 0]
    check(pack(lengths, 1, 32, dtype), kind, segments_of(lengths, 11))


@SCORES
def test_score_of_many_heads_agrees_with_reference(kind: AttentionScore) -> None:
    check(pack([5, 9], 12, 26), kind, segments_of([5, 9], 3))


@SCORES
@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_score_of_no_tokens_is_empty(lengths: list[int], kind: AttentionScore) -> None:
    check(pack(lengths, 2, 16), kind, segments_of(lengths, 1))


@SCORES
@settings(max_examples=3)
@given(data=st.data(), heads=st.integers(1, 3), seed=st.integers(0, 2**16))
def test_score_of_any_packing(data: st.DataObject, kind: AttentionScore, heads: int, seed: int) -> None:
    lengths = data.draw(st.lists(st.integers(0, 80), min_size=1, max_size=3))
    # Segments in any order, and sequences without a question.
    segments = torch.randint(0, 2, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    check(pack(lengths, heads, 16, seed=seed), kind, segments)


@SCORES
@pytest.mark.parametrize("dtype", DTYPES)
def test_score_of_attention_to_one_token_is_a_count(dtype: torch.dtype, kind: AttentionScore) -> None:
    tokens = 150
    chosen = torch.randint(0, tokens, (tokens,))
    chosen[::4] = torch.arange(0, tokens, 4)  # some look at themselves
    packed, segments = looking_at(chosen, dtype), torch.arange(tokens) % 3
    votes = torch.nn.functional.one_hot(chosen, tokens).float()  # [queries, keys]
    want = {
        "received": votes.sum(0),
        "received_off_diagonal": votes.fill_diagonal_(0).sum(0) if kind == "received_off_diagonal" else None,
        "received_max": votes.amax(0),
        "cls": votes[0],
        "from_question": votes[segments == 0].sum(0),
        "value_norm": votes.sum(0) * packed.qkv[:, 128:].float().norm(dim=1),
    }[kind]
    for got in scores_of(packed, kind, segments):
        if kind == "value_norm":
            torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
        else:
            assert torch.equal(got, want)


@SCORES
def test_score_gives_a_sequence_the_same_bits_in_any_batch_and_run(kind: AttentionScore) -> None:
    alone, segments = pack([100], 1, 32), segments_of([100], 9)
    together, rows = among_others(alone)
    more = torch.cat([segments_of([130, 7], 70), segments, segments[:3]])
    first = scores_of(together, kind, more)
    for score, lonely, again in zip(
        first, scores_of(alone, kind, segments), scores_of(together, kind, more), strict=True
    ):
        assert torch.equal(score[rows], lonely)
        assert torch.equal(score, again)


def test_from_question_of_a_sequence_without_a_question_is_zero() -> None:
    packed, segments = pack([70, 10], 2, 16), torch.ones(80, dtype=torch.int64)
    segments[70:] = 0
    check(packed, "from_question", segments)
    assert TRITON.significance(*packed, "from_question", segments)[:70].eq(0).all()


def test_probabilities_received_sum_to_the_number_of_queries() -> None:
    lengths = [1, 90, 64]
    significance = TRITON.significance(*pack(lengths, 3, 32), "received")
    for part, length in zip(significance.split(lengths), lengths, strict=True):
        torch.testing.assert_close(part.sum().item(), 3.0 * length, rtol=1e-6, atol=0)
