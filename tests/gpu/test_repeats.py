"""The same bits in every run and in every batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dtbert.kernels import ATTENTION_SCORES, attention, embed_layer_norm, select_tokens
from tests.gpu.cases import DTYPES, MIXED, add_norm, fused_linear, keep_of, offsets, randn, segments_of

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]

RUNS = 20
HEADS, HEAD_SIZE = 12, 64


def attend(qkv: Tensor, lengths: list[int], segments: Tensor, score: Any) -> list[Tensor]:
    options = {"significance": score, "token_type_ids": segments}
    out = attention(qkv, offsets(lengths), max(lengths), HEADS, **options, backend="triton")
    return [tensor for tensor in out if tensor is not None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score", [None, *ATTENTION_SCORES])
def test_attention_repeats_bit_for_bit(score: str | None, dtype: torch.dtype) -> None:
    qkv, segments = randn(sum(MIXED), 3 * HEADS * HEAD_SIZE, dtype=dtype), segments_of(MIXED)
    first = attend(qkv, MIXED, segments, score)
    for _ in range(RUNS):
        again = attend(qkv, MIXED, segments, score)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score", [None, *ATTENTION_SCORES])
def test_attention_of_a_sequence_is_the_same_alone_and_in_a_batch(score: str | None, dtype: torch.dtype) -> None:
    qkv, segments = randn(sum(MIXED), 3 * HEADS * HEAD_SIZE, dtype=dtype), segments_of(MIXED)
    together = attend(qkv, MIXED, segments, score)
    parts = [tensor.split(MIXED) for tensor in together]
    for index, length in enumerate(MIXED):
        if length:
            rows = slice(sum(MIXED[:index]), sum(MIXED[: index + 1]))
            alone = attend(qkv[rows].contiguous(), [length], segments[rows], score)
            assert all(torch.equal(one, part[index]) for one, part in zip(alone, parts, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_kept_queries_has_the_bits_of_all_queries(dtype: torch.dtype) -> None:
    qkv, cu_seqlens = randn(sum(MIXED), 3 * HEADS * HEAD_SIZE, dtype=dtype), offsets(MIXED)
    keep, kept_offsets = keep_of(MIXED, 0.5)
    arguments = (qkv, cu_seqlens, max(MIXED), HEADS)
    every, _ = attention(*arguments, backend="triton")
    some, _ = attention(*arguments, query_indices=keep, cu_seqlens_q=kept_offsets, backend="triton")
    assert torch.equal(some, every[keep])


def row_steps(dtype: torch.dtype) -> dict[str, Callable[[slice], Tensor]]:
    """The steps that work row by row, as functions of the rows they are given."""
    x, residual = randn(600, 768, dtype=dtype), randn(600, 768, dtype=dtype, seed=1)
    vectors = [randn(768, dtype=dtype, seed=seed) for seed in (2, 3, 4)]
    weight = randn(3072, 768, dtype=dtype, seed=5)
    ids = [torch.randint(0, rows, (600,), device="cuda") for rows in (1000, 512, 2)]
    tables = [randn(rows, 768, dtype=dtype, seed=6) for rows in (1000, 512, 2)]
    return {
        "embed": lambda rows: embed_layer_norm(*(i[rows] for i in ids), *tables, *vectors[1:], 1e-12, backend="triton"),
        "add_norm": lambda rows: add_norm(x[rows], vectors[0], residual[rows], *vectors[1:]),
        "fused_linear": lambda rows: fused_linear(x[rows], weight, None, "gelu"),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", ["embed", "add_norm", "fused_linear"])
def test_rows_are_the_same_in_every_run_and_batch(step: str, dtype: torch.dtype) -> None:
    run = row_steps(dtype)[step]
    everything = run(slice(0, 600))
    for _ in range(RUNS):
        assert torch.equal(run(slice(0, 600)), everything)
    for rows in (slice(0, 1), slice(299, 428), slice(599, 600)):
        assert torch.equal(run(rows), everything[rows])


def test_selection_of_a_sequence_is_the_same_alone_and_in_a_batch() -> None:
    scores = randn(sum(MIXED), dtype=torch.float32).round(decimals=1)
    _, target = keep_of(MIXED, 0.5)
    together = select_tokens(scores, offsets(MIXED), target, int(target[-1]), max(MIXED), backend="triton")
    begins, counts = offsets(MIXED).tolist(), target.diff().tolist()
    for index, (length, part) in enumerate(zip(MIXED, together.split(counts), strict=True)):
        if length:
            rows = slice(begins[index], begins[index + 1])
            sizes = (offsets([length]), offsets([counts[index]]), counts[index], length)
            alone = select_tokens(scores[rows], *sizes, backend="triton")
            assert torch.equal(alone + begins[index], part)
