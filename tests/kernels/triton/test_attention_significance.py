"""Every score of the fused attention against the reference in float64, and its exact answers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtbert.kernels import reference
from dtbert.kernels.reference import ATTENTION_SCORES, AttentionScore
from dtbert.kernels.triton import attention, attention_significance
from tests.kernels.triton.cases import DTYPES, TOKENS, assert_close
from tests.kernels.triton.packing import Packed, looking_at, offsets, pack

SCORES = pytest.mark.parametrize("kind", ATTENTION_SCORES)


def check(packed: Packed, kind: AttentionScore, segments: torch.Tensor | None = None) -> None:
    context, significance = attention(*packed, significance=kind, token_type_ids=segments)
    alone = attention_significance(*packed, kind, segments)
    want_context, want = reference.attention(*packed.doubled(), significance=kind, token_type_ids=segments)
    assert significance is not None
    assert_close(context, want_context, packed.qkv.dtype)
    # Scores are sums of float32 products, whatever the dtype of what enters them.
    assert_close(significance, want, torch.float32)
    assert_close(alone, want, torch.float32)


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
    for got in (
        attention(*packed, significance=kind, token_type_ids=segments)[1],
        attention_significance(*packed, kind, segments),
    ):
        if kind == "value_norm":
            torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
        else:
            assert torch.equal(got, want)


@SCORES
def test_score_gives_a_sequence_the_same_bits_in_any_batch_and_run(kind: AttentionScore) -> None:
    alone, segments = pack([100], 1, 32), segments_of([100], 9)
    others = pack([130, 7], 1, 32, seed=1).qkv
    together = Packed(torch.cat([others, alone.qkv, others[:3]]), offsets([130, 7, 100, 3]), 130, 1)
    more = torch.cat([segments_of([130, 7], 70), segments, segments[:3]])
    for score in (
        lambda packed, ids: attention(*packed, significance=kind, token_type_ids=ids)[1],
        lambda packed, ids: attention_significance(*packed, kind, ids),
    ):
        first = score(together, more)
        assert torch.equal(first[137:237], score(alone, segments))
        assert torch.equal(first, score(together, more))


def test_from_question_of_a_sequence_without_a_question_is_zero() -> None:
    packed, segments = pack([70, 10], 2, 16), torch.ones(80, dtype=torch.int64)
    segments[70:] = 0
    check(packed, "from_question", segments)
    assert attention_significance(*packed, "from_question", segments)[:70].eq(0).all()


def test_probabilities_received_sum_to_the_number_of_queries() -> None:
    lengths = [1, 90, 64]
    significance = attention_significance(*pack(lengths, 3, 32), "received")
    for part, length in zip(significance.split(lengths), lengths, strict=True):
        torch.testing.assert_close(part.sum().item(), 3.0 * length, rtol=1e-6, atol=0)
