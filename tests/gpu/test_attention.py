"""Attention and its scores, compiled, against the reference in float64."""

from typing import Any

import pytest
import torch

from dtbert.kernels import ATTENTION_SCORES, reference
from tests.gpu.cases import BOUND, DTYPES, MIXED, SCORE_BOUND, assert_near, keep_of, offsets, randn, segments_of

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]

HEADS = 12
CASES = [(64, score) for score in (None, *ATTENTION_SCORES)]
CASES += [(head_size, score) for head_size in (32, 128) for score in (None, "received", "cls")]


def check(triton: Any, lengths: list[int], head_size: int, dtype: torch.dtype, score: Any, heads: int = HEADS) -> None:
    qkv, cu_seqlens = randn(sum(lengths), 3 * heads * head_size, dtype=dtype), offsets(lengths)
    options = {"significance": score, "token_type_ids": segments_of(lengths)}
    context, significance = triton.attention(qkv, cu_seqlens, max(lengths), heads, **options)
    expected = reference.attention(qkv.double(), cu_seqlens, max(lengths), heads, **options)
    assert context.dtype == dtype
    assert_near(context, expected[0], BOUND[dtype])
    if score is None:
        assert significance is None
        return
    assert significance.dtype == torch.float32
    assert_near(significance, expected[1], SCORE_BOUND)
    alone = triton.attention_significance(qkv, cu_seqlens, max(lengths), heads, score, options["token_type_ids"])
    assert_near(alone, expected[1], SCORE_BOUND)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_size", "score"), CASES)
def test_attention_agrees_with_float64(triton: Any, head_size: int, score: str | None, dtype: torch.dtype) -> None:
    check(triton, MIXED, head_size, dtype, score)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score", [None, "received", "cls"])
def test_attention_agrees_beyond_512_tokens(triton: Any, score: str | None, dtype: torch.dtype) -> None:
    check(triton, [700, 2048, 1, 1500], 64, dtype, score)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 33, 64, 65, 129, 255, 257])
def test_attention_agrees_around_the_edges_of_blocks(triton: Any, length: int) -> None:
    check(triton, [length] * 3, 64, torch.bfloat16, "received")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [32, 64, 128])
def test_attention_of_kept_queries_agrees_with_float64(triton: Any, head_size: int, dtype: torch.dtype) -> None:
    qkv, cu_seqlens = randn(sum(MIXED), 3 * HEADS * head_size, dtype=dtype), offsets(MIXED)
    keep, kept_offsets = keep_of(MIXED, 0.4)
    options = {"query_indices": keep, "cu_seqlens_q": kept_offsets}
    context, _ = triton.attention(qkv, cu_seqlens, max(MIXED), HEADS, **options)
    expected, _ = reference.attention(qkv.double(), cu_seqlens, max(MIXED), HEADS)
    assert_near(context, expected[keep], BOUND[dtype])


@pytest.mark.parametrize("score", [None, *ATTENTION_SCORES])
@pytest.mark.parametrize("lengths", [[0, 5, 0, 0, 130, 0], [0, 0], [0]], ids=str)
def test_attention_passes_by_empty_sequences(triton: Any, lengths: list[int], score: Any) -> None:
    qkv, cu_seqlens = randn(sum(lengths), 3 * 2 * 64, dtype=torch.bfloat16), offsets(lengths)
    options = {"significance": score, "token_type_ids": segments_of(lengths)}
    context, significance = triton.attention(qkv, cu_seqlens, max(lengths), 2, **options)
    assert context.shape == (sum(lengths), 128)
    assert (significance is None) == (score is None)
    if sum(lengths):
        expected = reference.attention(qkv.double(), cu_seqlens, max(lengths), 2, **options)
        assert_near(context, expected[0], BOUND[torch.bfloat16])
        if score is not None:
            assert_near(significance, expected[1], SCORE_BOUND)


def test_attention_reads_rows_of_a_wider_tensor(triton: Any) -> None:
    wide = randn(300, 3 * 2 * 64 + 64, dtype=torch.bfloat16)
    qkv, cu_seqlens = wide[:, : 3 * 2 * 64], offsets([100, 200])
    context, significance = triton.attention(qkv, cu_seqlens, 200, 2, significance="received")
    expected = reference.attention(qkv.double(), cu_seqlens, 200, 2, significance="received")
    assert_near(context, expected[0], BOUND[torch.bfloat16])
    assert_near(significance, expected[1], SCORE_BOUND)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_survives_scores_far_from_zero(triton: Any, dtype: torch.dtype) -> None:
    qkv, cu_seqlens = 12 * randn(500, 3 * 2 * 64, dtype=dtype), offsets([200, 300])
    context, _ = triton.attention(qkv, cu_seqlens, 300, 2)
    expected, _ = reference.attention(qkv.double(), cu_seqlens, 300, 2)
    assert_near(context, expected, 10 * BOUND[dtype])
