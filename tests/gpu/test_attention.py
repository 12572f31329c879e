"""Attention and its scores, compiled, against the reference in float64."""

from typing import Any

import pytest
import torch

from dtbert.kernels import ATTENTION_SCORES, attention, attention_significance
from tests.gpu.cases import BOUND, DTYPES, MIXED, SCORE_BOUND, assert_near, keep_of, offsets, randn, segments_of

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]

HEADS = 12
CASES = [(64, score) for score in (None, *ATTENTION_SCORES)]
CASES += [(head_size, score) for head_size in (32, 128) for score in (None, "received", "cls")]


def check(lengths: list[int], head_size: int, dtype: torch.dtype, score: Any) -> None:
    qkv = randn(sum(lengths), 3 * HEADS * head_size, dtype=dtype)
    sizes, segments = (offsets(lengths), max(lengths), HEADS), segments_of(lengths)
    options = {"significance": score, "token_type_ids": segments}
    context, significance = attention(qkv, *sizes, **options, backend="triton")
    expected = attention(qkv.double(), *sizes, **options, backend="reference")
    assert context.dtype == dtype
    assert_near(context, expected[0], BOUND[dtype])
    if score is None:
        assert significance is None
        return
    assert significance.dtype == torch.float32
    assert_near(significance, expected[1], SCORE_BOUND)
    alone = attention_significance(qkv, *sizes, score, segments, backend="triton")
    assert_near(alone, expected[1], SCORE_BOUND)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_size", "score"), CASES)
def test_attention_agrees_with_float64(head_size: int, score: str | None, dtype: torch.dtype) -> None:
    check(MIXED, head_size, dtype, score)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score", [None, "received", "cls"])
def test_attention_agrees_beyond_512_tokens(score: str | None, dtype: torch.dtype) -> None:
    check([700, 2048, 1, 1500], 64, dtype, score)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 33, 64, 65, 129, 255, 257])
def test_attention_agrees_around_the_edges_of_blocks(length: int) -> None:
    check([length] * 3, 64, torch.bfloat16, "received")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [32, 64, 128])
def test_attention_of_kept_queries_agrees_with_float64(head_size: int, dtype: torch.dtype) -> None:
    qkv, cu_seqlens = randn(sum(MIXED), 3 * HEADS * head_size, dtype=dtype), offsets(MIXED)
    keep, kept_offsets = keep_of(MIXED, 0.4)
    options = {"query_indices": keep, "cu_seqlens_q": kept_offsets}
    context, _ = attention(qkv, cu_seqlens, max(MIXED), HEADS, **options, backend="triton")
    expected, _ = attention(qkv.double(), cu_seqlens, max(MIXED), HEADS, backend="reference")
    assert_near(context, expected[keep], BOUND[dtype])


@pytest.mark.parametrize("score", [None, *ATTENTION_SCORES])
@pytest.mark.parametrize("lengths", [[0, 5, 0, 0, 130, 0], [0, 0], [0]], ids=str)
def test_attention_passes_by_empty_sequences(lengths: list[int], score: Any) -> None:
    qkv, cu_seqlens = randn(sum(lengths), 3 * 2 * 64, dtype=torch.bfloat16), offsets(lengths)
    options = {"significance": score, "token_type_ids": segments_of(lengths)}
    context, significance = attention(qkv, cu_seqlens, max(lengths), 2, **options, backend="triton")
    assert context.shape == (sum(lengths), 128)
    assert (significance is None) == (score is None)
    if sum(lengths):
        expected = attention(qkv.double(), cu_seqlens, max(lengths), 2, **options, backend="reference")
        assert_near(context, expected[0], BOUND[torch.bfloat16])
        if score is not None:
            assert_near(significance, expected[1], SCORE_BOUND)


def test_attention_reads_rows_of_a_wider_tensor() -> None:
    wide = randn(300, 3 * 2 * 64 + 64, dtype=torch.bfloat16)
    qkv, cu_seqlens = wide[:, : 3 * 2 * 64], offsets([100, 200])
    context, significance = attention(qkv, cu_seqlens, 200, 2, significance="received", backend="triton")
    expected = attention(qkv.double(), cu_seqlens, 200, 2, significance="received", backend="reference")
    assert_near(context, expected[0], BOUND[torch.bfloat16])
    assert_near(significance, expected[1], SCORE_BOUND)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_survives_scores_far_from_zero(dtype: torch.dtype) -> None:
    qkv, cu_seqlens = 12 * randn(500, 3 * 2 * 64, dtype=dtype), offsets([200, 300])
    context, _ = attention(qkv, cu_seqlens, 300, 2, backend="triton")
    expected, _ = attention(qkv.double(), cu_seqlens, 300, 2, backend="reference")
    assert_near(context, expected, 10 * BOUND[dtype])
