"""The reference against NumPy in float64, written from the definitions alone."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtbert.kernels import ATTENTION_SCORES, Activation, AttentionScore, Backend, Kept, TokenIds
from dtbert.kernels.parameters import Embeddings, LayerNorm, Linear, of_tensors
from tests.kernels.packings import packing
from tests.tolerances import STEP

ERF = np.vectorize(math.erf)
REFERENCE = Backend()
WITH_CONTEXT = [score for score in ATTENTION_SCORES if score not in ("cls", "from_question")]


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + eps) * weight + bias


def probabilities_of(qkv: np.ndarray, heads: int) -> tuple[np.ndarray, np.ndarray]:
    query, key, value = (part.reshape(len(qkv), heads, -1).transpose(1, 0, 2) for part in np.split(qkv, 3, axis=1))
    scores = query @ key.transpose(0, 2, 1) / math.sqrt(query.shape[-1])
    exp = np.exp(scores - scores.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True), value


def significance_of(kind: str, p: np.ndarray, value: np.ndarray, segments: np.ndarray) -> np.ndarray:
    heads, n, _ = p.shape
    result = np.zeros(n)
    for k in range(n):
        column = p[:, :, k]
        if kind == "received":
            result[k] = column.sum()
        elif kind == "received_off_diagonal":
            result[k] = column.sum() - column[:, k].sum()
        elif kind == "received_max":
            result[k] = column.max()
        elif kind == "cls":
            result[k] = column[:, 0].sum()
        elif kind == "from_question":
            result[k] = column[:, segments == 0].sum()
        elif kind == "value_norm":
            result[k] = sum(column[h].sum() * np.linalg.norm(value[h, k]) for h in range(heads))
    return result


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_embed_agrees_with_numpy(dtype: torch.dtype) -> None:
    word, token_type, position = tables = [torch.randn(rows, 24, dtype=dtype) for rows in (50, 2, 30)]
    norm = of_tensors(LayerNorm, weight=torch.randn(24, dtype=dtype), bias=torch.randn(24, dtype=dtype), eps=1e-12)
    ids = TokenIds(*(torch.randint(0, len(table), (17,)) for table in tables))
    parameters = of_tensors(Embeddings, word=word, token_type=token_type, position=position, norm=norm)
    got = REFERENCE.embed(ids, parameters)
    summed = sum(table.double().numpy()[index] for table, index in zip(tables, ids, strict=True))
    want = layer_norm(summed, norm.weight.double().numpy(), norm.bias.double().numpy(), 1e-12)
    np.testing.assert_allclose(got.double(), want, atol=STEP[dtype], rtol=STEP[dtype])


@pytest.mark.parametrize("activation", [None, *get_args(Activation)])
def test_linear_agrees_with_numpy(activation: Activation | None) -> None:
    x, weight, bias = (torch.randn(shape, dtype=torch.float64) for shape in ((9, 12), (20, 12), (20,)))
    y = x.numpy() @ weight.numpy().T + bias.numpy()
    want = {
        None: y,
        "gelu": y * 0.5 * (1 + ERF(y / math.sqrt(2))),
        "gelu_tanh": 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))),
        "relu": np.maximum(y, 0),
        "silu": y / (1 + np.exp(-y)),
    }[activation]
    got = REFERENCE.linear(x, of_tensors(Linear, weight=weight, bias=bias), activation)
    np.testing.assert_allclose(got, want, atol=1e-12)


def test_add_norm_agrees_with_numpy() -> None:
    x, weight, bias = (torch.randn(shape, dtype=torch.float64) for shape in ((5, 12), (8, 12), (8,)))
    residual, norm_weight, norm_bias = (torch.randn(shape, dtype=torch.float64) for shape in ((11, 8), (8,), (8,)))
    keep = torch.tensor([0, 2, 3, 7, 10])
    norm = of_tensors(LayerNorm, weight=norm_weight, bias=norm_bias, eps=1e-5)
    got = REFERENCE.add_norm(x, of_tensors(Linear, weight=weight, bias=bias), residual, norm, keep)
    summed = x.numpy() @ weight.numpy().T + bias.numpy() + residual.numpy()[keep.numpy()]
    np.testing.assert_allclose(got, layer_norm(summed, norm_weight.numpy(), norm_bias.numpy(), 1e-5), atol=1e-12)


@pytest.mark.parametrize("score", ATTENTION_SCORES)
@given(
    seqlens=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    heads=st.integers(1, 3),
    head_size=st.sampled_from([1, 3, 8]),
    seed=st.integers(0, 2**16),
)
def test_attention_agrees_with_numpy(
    score: AttentionScore, seqlens: list[int], heads: int, head_size: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    total = sum(seqlens)
    qkv = torch.randn(total, 3 * heads * head_size, dtype=torch.float64, generator=generator)
    segments = torch.randint(0, 2, (total,), generator=generator)
    now = packing(seqlens)
    context = REFERENCE.attention(qkv, now, heads)
    significance = REFERENCE.significance(qkv, now, heads, score, segments)
    assert context.shape == (total, heads * head_size)
    if score in WITH_CONTEXT:
        both = REFERENCE.scored_attention(qkv, now, heads, score)
        torch.testing.assert_close(both, (context, significance), rtol=0, atol=0)
    for rows in now.slices:
        if rows.start == rows.stop:
            continue
        p, value = probabilities_of(qkv[rows].numpy(), heads)
        want = (p @ value).transpose(1, 0, 2).reshape(rows.stop - rows.start, -1)
        np.testing.assert_allclose(context[rows], want, atol=1e-12)
        expected = significance_of(score, p, value, segments[rows].numpy())
        np.testing.assert_allclose(significance[rows], expected, atol=1e-12)


def test_attention_of_chosen_queries_is_that_of_all_queries() -> None:
    qkv, now = torch.randn(12, 48), packing([5, 7])
    queries = Kept(torch.tensor([1, 4, 5, 6, 11]), packing([2, 3]))
    every = REFERENCE.attention(qkv, now, 2)
    torch.testing.assert_close(REFERENCE.attention(qkv, now, 2, queries), every[queries.rows])


def test_select_keeps_highest_with_ties_to_lower_position_in_text_order() -> None:
    significance = torch.tensor([1.0, 3.0, 3.0, 3.0, 2.0, -1.0, 0.0, -1.0])
    kept = REFERENCE.select(significance, packing([5, 3]), packing([2, 2]))
    assert kept.rows.tolist() == [1, 2, 5, 6]
    assert kept.packing.seqlens == (2, 2)


@given(
    scores=st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0, torch.inf]), max_size=12), min_size=1, max_size=4),
    data=st.data(),
)
def test_select_agrees_with_counting_ranks(scores: list[list[float]], data: st.DataObject) -> None:
    counts = [data.draw(st.integers(min(1, len(row)), len(row))) for row in scores]
    now = packing([len(row) for row in scores])
    flat = torch.tensor([value for row in scores for value in row], dtype=torch.float32)
    want = []
    for rows, row, count in zip(now.slices, scores, counts, strict=True):
        for i, value in enumerate(row):
            rank = sum(other > value or (other == value and j < i) for j, other in enumerate(row))
            if rank < count:
                want.append(rows.start + i)
    assert REFERENCE.select(flat, now, packing(counts)).rows.tolist() == want


def test_scatter_replaces_rows_and_leaves_its_input() -> None:
    final, states = torch.zeros(4, 2), torch.ones(2, 2)
    assert REFERENCE.scatter(final, torch.tensor([1, 3]), states)[:, 0].tolist() == [0, 1, 0, 1]
    assert final.sum() == 0


def test_every_step_is_differentiable() -> None:
    qkv = torch.randn(7, 12, dtype=torch.float64, requires_grad=True)

    def both(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return REFERENCE.scored_attention(x, packing([3, 4]), 2, "value_norm")

    torch.autograd.gradcheck(both, (qkv,))
