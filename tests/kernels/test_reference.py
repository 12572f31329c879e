"""The reference against NumPy in float64, written from the definitions alone."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtbert.kernels import ATTENTION_SCORES, reference
from tests.tolerances import STEP

ERF = np.vectorize(math.erf)


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
def test_embed_layer_norm_agrees_with_numpy(dtype: torch.dtype) -> None:
    tables = [torch.randn(rows, 24, dtype=dtype) for rows in (50, 30, 2)]
    weight, bias = torch.randn(24, dtype=dtype), torch.randn(24, dtype=dtype)
    ids = [torch.randint(0, len(table), (17,)) for table in tables]
    got = reference.embed_layer_norm(*ids, *tables, weight, bias, 1e-12)
    summed = sum(table.double().numpy()[index] for table, index in zip(tables, ids, strict=True))
    want = layer_norm(summed, weight.double().numpy(), bias.double().numpy(), 1e-12)
    np.testing.assert_allclose(got.double(), want, atol=STEP[dtype], rtol=STEP[dtype])


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
def test_linear_gelu_agrees_with_numpy(activation: str) -> None:
    x, weight, bias = (torch.randn(shape, dtype=torch.float64) for shape in ((9, 12), (20, 12), (20,)))
    y = x.numpy() @ weight.numpy().T + bias.numpy()
    want = {
        "gelu": y * 0.5 * (1 + ERF(y / math.sqrt(2))),
        "gelu_tanh": 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))),
        "relu": np.maximum(y, 0),
    }[activation]
    np.testing.assert_allclose(reference.linear_gelu(x, weight, bias, activation), want, atol=1e-12)


def test_linear_add_layer_norm_agrees_with_numpy() -> None:
    x, weight, bias = (torch.randn(shape, dtype=torch.float64) for shape in ((5, 12), (8, 12), (8,)))
    residual, norm_weight, norm_bias = (torch.randn(shape, dtype=torch.float64) for shape in ((11, 8), (8,), (8,)))
    keep = torch.tensor([0, 2, 3, 7, 10])
    got = reference.linear_add_layer_norm(x, weight, bias, residual, norm_weight, norm_bias, 1e-5, keep)
    summed = x.numpy() @ weight.numpy().T + bias.numpy() + residual.numpy()[keep.numpy()]
    np.testing.assert_allclose(got, layer_norm(summed, norm_weight.numpy(), norm_bias.numpy(), 1e-5), atol=1e-12)


@pytest.mark.parametrize("kind", ATTENTION_SCORES)
@given(
    seqlens=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    heads=st.integers(1, 3),
    head_size=st.sampled_from([1, 3, 8]),
    seed=st.integers(0, 2**16),
)
def test_attention_agrees_with_numpy(kind: str, seqlens: list[int], heads: int, head_size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    total = sum(seqlens)
    qkv = torch.randn(total, 3 * heads * head_size, dtype=torch.float64, generator=generator)
    segments = torch.randint(0, 2, (total,), generator=generator)
    cu_seqlens = torch.tensor([0, *np.cumsum(seqlens)], dtype=torch.int32)
    context, score = reference.attention(
        qkv, cu_seqlens, max(seqlens), heads, significance=kind, token_type_ids=segments
    )
    alone = reference.attention_significance(qkv, cu_seqlens, max(seqlens), heads, kind, segments)
    assert context.shape == (total, heads * head_size)
    torch.testing.assert_close(alone, score, rtol=0, atol=0)
    for begin, end in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False):
        if begin == end:
            continue
        p, value = probabilities_of(qkv[begin:end].numpy(), heads)
        want = (p @ value).transpose(1, 0, 2).reshape(end - begin, -1)
        np.testing.assert_allclose(context[begin:end], want, atol=1e-12)
        expected = significance_of(kind, p, value, segments[begin:end].numpy())
        np.testing.assert_allclose(score[begin:end], expected, atol=1e-12)


def test_attention_of_chosen_queries_is_that_of_all_queries() -> None:
    qkv, cu_seqlens = torch.randn(12, 48), torch.tensor([0, 5, 12], dtype=torch.int32)
    keep, cu_seqlens_q = torch.tensor([1, 4, 5, 6, 11]), torch.tensor([0, 2, 5], dtype=torch.int32)
    every, _ = reference.attention(qkv, cu_seqlens, 7, 2)
    some, _ = reference.attention(qkv, cu_seqlens, 7, 2, query_indices=keep, cu_seqlens_q=cu_seqlens_q)
    torch.testing.assert_close(some, every[keep])


def test_select_tokens_keeps_highest_with_ties_to_lower_position_in_text_order() -> None:
    significance = torch.tensor([1.0, 3.0, 3.0, 3.0, 2.0, -1.0, 0.0, -1.0])
    cu_seqlens, kept = torch.tensor([0, 5, 8], dtype=torch.int32), torch.tensor([0, 2, 4], dtype=torch.int32)
    keep = reference.select_tokens(significance, cu_seqlens, kept, 4, 5)
    assert keep.tolist() == [1, 2, 5, 6]


@given(
    scores=st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0, torch.inf]), max_size=12), min_size=1, max_size=4),
    data=st.data(),
)
def test_select_tokens_agrees_with_counting_ranks(scores: list[list[float]], data: st.DataObject) -> None:
    counts = [data.draw(st.integers(min(1, len(row)), len(row))) for row in scores]
    cu_seqlens = torch.tensor([0, *np.cumsum([len(row) for row in scores])], dtype=torch.int32)
    next_cu_seqlens = torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32)
    flat = torch.tensor([value for row in scores for value in row], dtype=torch.float32)
    keep = reference.select_tokens(flat, cu_seqlens, next_cu_seqlens, sum(counts), max(map(len, scores)))
    want = []
    for start, row, count in zip(cu_seqlens.tolist(), scores, counts, strict=False):
        for i, value in enumerate(row):
            rank = sum(other > value or (other == value and j < i) for j, other in enumerate(row))
            if rank < count:
                want.append(start + i)
    assert keep.tolist() == want


def test_restore_replaces_kept_rows_and_leaves_its_input() -> None:
    states, kept = torch.zeros(4, 2), torch.ones(2, 2)
    assert reference.restore(states, torch.tensor([1, 3]), kept)[:, 0].tolist() == [0, 1, 0, 1]
    assert states.sum() == 0


def test_every_step_is_differentiable() -> None:
    qkv = torch.randn(7, 12, dtype=torch.float64, requires_grad=True)
    cu_seqlens = torch.tensor([0, 3, 7], dtype=torch.int32)

    def both(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return reference.attention(x, cu_seqlens, 4, 2, significance="value_norm")

    torch.autograd.gradcheck(both, (qkv,))


def test_attention_score_from_question_without_segments_says_what_to_pass() -> None:
    with pytest.raises(ValueError, match="token_type_ids"):
        reference.attention_significance(torch.randn(3, 12), torch.tensor([0, 3]), 3, 2, "from_question")


def test_unknown_attention_score_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="received_max"):
        reference.attention_significance(torch.randn(3, 12), torch.tensor([0, 3]), 3, 2, "loudest")  # type: ignore[arg-type]
