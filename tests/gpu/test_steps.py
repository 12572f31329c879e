"""Every other step, compiled, against the reference in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dtbert.kernels import reference
from tests.gpu.cases import BOUND, DTYPES, MIXED, assert_near, keep_of, offsets, randn

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]

WIDTHS = [312, 384, 768]
TOKENS = [0, 1, 127, 1000]


def doubled(*tensors: Tensor) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]


def check(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    assert got.shape == want.shape
    if len(want):
        assert_near(got, want, BOUND[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("width", WIDTHS)
def test_embed_layer_norm_agrees_with_float64(triton: Any, width: int, tokens: int, dtype: torch.dtype) -> None:
    rows = (30522, 512, 2)
    ids = [torch.randint(0, count, (tokens,), device="cuda") for count in rows]
    values = [randn(count, width, dtype=dtype) for count in rows] + [randn(width, dtype=dtype, seed=s) for s in (1, 2)]
    got = triton.embed_layer_norm(*ids, *values, 1e-12)
    check(got, reference.embed_layer_norm(*ids, *doubled(*values), 1e-12), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("step", ["linear_gelu", "fused_linear_gelu"])
def test_linear_gelu_agrees_with_float64(triton: Any, step: str, activation: str, dtype: torch.dtype) -> None:
    for tokens, width, wide in ((1, 312, 1200), (127, 384, 1536), (1000, 768, 3072), (0, 768, 3072)):
        x, bias = randn(tokens, width, dtype=dtype), randn(wide, dtype=dtype, seed=2)
        weight = randn(wide, width, dtype=dtype, seed=1) / width**0.5
        got = getattr(triton, step)(x, weight, bias, activation)
        check(got, reference.linear_gelu(*doubled(x, weight, bias), activation), dtype)
        without_bias = getattr(triton, step)(x, weight, None, activation)
        check(without_bias, reference.linear_gelu(*doubled(x, weight), None, activation), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gather", [False, True], ids=["all", "kept"])
@pytest.mark.parametrize("width", WIDTHS)
def test_linear_add_layer_norm_agrees_with_float64(triton: Any, width: int, gather: bool, dtype: torch.dtype) -> None:
    keep = keep_of(MIXED, 0.6)[0] if gather else None
    rows, tokens = sum(MIXED) if keep is None else len(keep), sum(MIXED)
    x, residual = randn(rows, width, dtype=dtype), randn(tokens, width, dtype=dtype, seed=1)
    weight = randn(width, width, dtype=dtype, seed=2) / width**0.5
    bias, norm_weight, norm_bias = (randn(width, dtype=dtype, seed=seed) for seed in (3, 4, 5))
    want = reference.linear_add_layer_norm(*doubled(x, weight, bias, residual, norm_weight, norm_bias), 1e-12, keep)
    got = triton.linear_add_layer_norm(x, weight, bias, residual, norm_weight, norm_bias, 1e-12, keep)
    check(got, want, dtype)
    product = (x.double() @ weight.double().T).to(dtype)
    fused = triton.gather_add_layer_norm(product, bias, residual, norm_weight, norm_bias, 1e-12, keep)
    check(fused, want, dtype)


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.7, 1.0])
def test_select_tokens_is_the_reference_exactly(triton: Any, fraction: float, ties: bool) -> None:
    lengths = [*MIXED, 2000]
    scores = randn(sum(lengths), dtype=torch.float32)
    if ties:
        scores = scores.round()
        scores[::7] = torch.inf
    _, target = keep_of(lengths, fraction)
    arguments = (scores, offsets(lengths), target, int(target[-1]), max(lengths))
    assert torch.equal(triton.select_tokens(*arguments), reference.select_tokens(*arguments))


@pytest.mark.parametrize("dtype", DTYPES)
def test_restore_is_the_reference_exactly(triton: Any, dtype: torch.dtype) -> None:
    keep, _ = keep_of(MIXED, 0.5)
    states, kept = randn(sum(MIXED), 768, dtype=dtype), randn(len(keep), 768, dtype=dtype, seed=1)
    want = reference.restore(states, keep, kept)
    assert torch.equal(triton.restore(states, keep, kept), want)


def test_addresses_reach_beyond_2_to_the_31_values(triton: Any) -> None:
    # 3 million rows of 768: offsets past 32 bits. Only the last rows are asked for.
    table = torch.zeros(3_000_000, 768, dtype=torch.bfloat16, device="cuda")
    table[-4:] = randn(4, 768, dtype=torch.bfloat16)
    keep = torch.arange(2_999_996, 3_000_000, device="cuda")
    product, vector = randn(4, 768, dtype=torch.bfloat16, seed=1), randn(768, dtype=torch.bfloat16, seed=2)
    got = triton.gather_add_layer_norm(product, vector, table, vector, vector, 1e-12, keep)
    summed = product.double() + vector.double() + table[keep].double()
    want = torch.nn.functional.layer_norm(summed, (768,), vector.double(), vector.double(), 1e-12)
    check(got, want, torch.bfloat16)
