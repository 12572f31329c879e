"""The CPU's steps against the reference: blocked and plain weights, fused and separate epilogues, every dtype."""

import itertools
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dtbert.kernels import ATTENTION_SCORES, Activation, AttentionScore, Backend, Kept
from dtbert.kernels.cpu import Cpu, blocked_pays, has_blocked_products, to_blocked
from dtbert.kernels.parameters import LayerNorm, Linear, of_tensors
from tests.kernels.packings import packing
from tests.tolerances import STEP

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTHS = [[1], [63, 1, 128], [127, 200], [384], [50, 50, 50], [512, 2]]
REFERENCE = Backend()


def name_of(value: object) -> str:
    return str(value).removeprefix("torch.").replace(" ", "")


def assert_close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(got.double(), want.double(), atol=STEP[dtype], rtol=STEP[dtype])


def prepared(weight: Tensor, bias: Tensor, blocked: bool) -> Linear:
    layer = of_tensors(Linear, weight=weight, bias=bias)
    Cpu(blocked).prepare(layer)
    return layer


def test_this_machine_has_blocked_products_in_float32() -> None:
    # Without this the tests below would compare the plain path with itself.
    assert has_blocked_products(torch.float32)


@given(rows=st.integers(1, 40), spare=st.integers(0, 40))
def test_blocked_product_does_not_see_what_lies_behind_its_rows(rows: int, spare: int) -> None:
    weight, bias = torch.randn(24, 16), torch.randn(24)
    storage = torch.full((rows + spare, 16), torch.nan)
    storage[:rows] = torch.randn(rows, 16)
    x = storage[:rows]
    want = REFERENCE.linear(x, of_tensors(Linear, weight=weight, bias=bias))
    assert_close(Cpu().linear(x, prepared(weight, bias, True)), want, torch.float32)


@pytest.mark.parametrize("blocked", [True, False], ids=["blocked", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("rows", [1, 7, 128, 200])
def test_products_agree_with_reference(rows: int, dtype: torch.dtype, blocked: bool) -> None:
    x, weight = torch.randn(rows, 96, dtype=dtype), torch.randn(72, 96, dtype=dtype) * 0.1
    bias, residual = torch.randn(72, dtype=dtype), torch.randn(rows + 3, 72, dtype=dtype)
    norm_weight, norm_bias = torch.randn(72, dtype=dtype), torch.randn(72, dtype=dtype)
    norm = of_tensors(LayerNorm, weight=norm_weight, bias=norm_bias, eps=1e-12)
    keep = torch.randperm(rows + 3)[:rows].sort().values
    cpu, layer = Cpu(), prepared(weight, bias, blocked)
    assert layer.weight.is_mkldnn == (blocked and has_blocked_products(dtype))
    exact = of_tensors(Linear, weight=weight.double(), bias=bias.double())
    exact_norm = of_tensors(LayerNorm, weight=norm_weight.double(), bias=norm_bias.double(), eps=1e-12)
    untouched = residual.clone()
    for activation in (None, *get_args(Activation)):
        want = REFERENCE.linear(x.double(), exact, activation)
        assert_close(cpu.linear(x, layer, activation), want, dtype)
    for own, chosen in ((residual, keep), (residual[:rows], None)):
        want = REFERENCE.add_norm(x.double(), exact, own.double(), exact_norm, chosen)
        assert_close(cpu.add_norm(x, layer, own, norm, chosen), want, dtype)
    torch.testing.assert_close(residual, untouched, rtol=0, atol=0)


def test_blocked_weight_gives_the_plain_one_back_and_is_laid_out_once() -> None:
    weight = torch.randn(24, 40)
    layer = prepared(weight, torch.randn(24), True)
    blocked = layer.weight
    assert torch.equal(blocked.to_dense(), weight)
    Cpu(True).prepare(layer)
    assert layer.weight is blocked
    assert torch.equal(to_blocked(weight).to_dense(), weight)


def test_small_weights_stay_as_they_are() -> None:
    assert not blocked_pays(torch.empty(2, 768))
    assert not blocked_pays(torch.empty(192, 48))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("seqlens", LENGTHS, ids=name_of)
def test_attention_agrees_with_reference(seqlens: list[int], dtype: torch.dtype) -> None:
    qkv, now = torch.randn(sum(seqlens), 3 * 2 * 16).to(dtype), packing(seqlens)
    context = Cpu().attention(qkv, now, 2)
    assert context.dtype == dtype
    assert_close(context, REFERENCE.attention(qkv.double(), now, 2), dtype)


@pytest.mark.parametrize("score", ATTENTION_SCORES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("seqlens", LENGTHS, ids=name_of)
def test_scores_agree_with_reference(seqlens: list[int], dtype: torch.dtype, score: AttentionScore) -> None:
    qkv, now = torch.randn(sum(seqlens), 3 * 2 * 16).to(dtype), packing(seqlens)
    segments = torch.randint(0, 2, (sum(seqlens),))
    expected = REFERENCE.significance(qkv.double(), now, 2, score, segments)
    found = [Cpu().significance(qkv, now, 2, score, segments)]
    if score not in ("cls", "from_question"):
        context, beside = Cpu().scored_attention(qkv, now, 2, score)
        assert_close(context, REFERENCE.attention(qkv.double(), now, 2), dtype)
        found.append(beside)
    # A sum over up to 512 queries: the error is held relative to the largest score.
    scale = expected.max().clamp(min=1)
    for got in found:
        assert got.dtype == torch.float32
        assert_close(got / scale, expected / scale, dtype)


@given(seqlens=st.lists(st.integers(1, 50), min_size=1, max_size=5), data=st.data())
def test_attention_of_chosen_queries_agrees_with_reference(seqlens: list[int], data: st.DataObject) -> None:
    chosen = [sorted(data.draw(st.sets(st.integers(0, length - 1)))) for length in seqlens]
    starts = itertools.accumulate(seqlens, initial=0)
    rows = [start + i for start, own in zip(starts, chosen, strict=False) for i in own]
    queries = Kept(torch.tensor(rows, dtype=torch.int64), packing([len(own) for own in chosen]))
    qkv, now = torch.randn(sum(seqlens), 3 * 2 * 8), packing(seqlens)
    want = REFERENCE.attention(qkv, now, 2, queries)
    assert_close(Cpu().attention(qkv, now, 2, queries), want, torch.float32)


@given(
    rows=st.lists(
        st.lists(st.sampled_from([0.0, 1.0, 2.0, -torch.inf, torch.inf]), max_size=9), min_size=1, max_size=5
    ),
    data=st.data(),
)
def test_select_agrees_with_reference_on_ties(rows: list[list[float]], data: st.DataObject) -> None:
    target = packing([data.draw(st.integers(0, len(row))) for row in rows])
    scores = torch.tensor([value for row in rows for value in row], dtype=torch.float32)
    arguments = scores, packing([len(row) for row in rows]), target
    assert Cpu().select(*arguments).rows.tolist() == REFERENCE.select(*arguments).rows.tolist()


def test_scatter_agrees_with_reference() -> None:
    final, rows, states = torch.randn(6, 3), torch.tensor([0, 4]), torch.randn(2, 3)
    want = REFERENCE.scatter(final, rows, states)
    assert torch.equal(Cpu().scatter(final.clone(), rows, states), want)
