"""Every other step, compiled, against the reference in float64."""

import functools
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor

from dtbert.kernels import Activation, embed_layer_norm, linear_add_layer_norm, linear_gelu, restore, select_tokens
from tests.gpu.cases import BOUND, DTYPES, MIXED, add_norm, assert_near, fused_linear, keep_of, offsets, randn

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
def test_embed_layer_norm_agrees_with_float64(width: int, tokens: int, dtype: torch.dtype) -> None:
    rows = (30522, 512, 2)
    ids = [torch.randint(0, count, (tokens,), device="cuda") for count in rows]
    values = [randn(count, width, dtype=dtype) for count in rows] + [randn(width, dtype=dtype, seed=s) for s in (1, 2)]
    got = embed_layer_norm(*ids, *values, 1e-12, backend="triton")
    check(got, embed_layer_norm(*ids, *doubled(*values), 1e-12, backend="reference"), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", get_args(Activation))
@pytest.mark.parametrize(
    "step",
    [
        pytest.param(functools.partial(linear_gelu, backend="triton"), id="linear_gelu"),
        pytest.param(fused_linear, id="fused_linear"),
    ],
)
def test_linear_gelu_agrees_with_float64(step: Callable[..., Tensor], activation: str, dtype: torch.dtype) -> None:
    for tokens, width, wide in ((1, 312, 1200), (127, 384, 1536), (1000, 768, 3072), (0, 768, 3072)):
        x, bias = randn(tokens, width, dtype=dtype), randn(wide, dtype=dtype, seed=2)
        weight = randn(wide, width, dtype=dtype, seed=1) / width**0.5
        want = linear_gelu(*doubled(x, weight, bias), activation, backend="reference")
        check(step(x, weight, bias, activation), want, dtype)
        want = linear_gelu(*doubled(x, weight), None, activation, backend="reference")
        check(step(x, weight, None, activation), want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gather", [False, True], ids=["all", "kept"])
@pytest.mark.parametrize("width", WIDTHS)
def test_linear_add_layer_norm_agrees_with_float64(width: int, gather: bool, dtype: torch.dtype) -> None:
    keep = keep_of(MIXED, 0.6)[0] if gather else None
    rows, tokens = sum(MIXED) if keep is None else len(keep), sum(MIXED)
    x, residual = randn(rows, width, dtype=dtype), randn(tokens, width, dtype=dtype, seed=1)
    weight = randn(width, width, dtype=dtype, seed=2) / width**0.5
    bias, norm_weight, norm_bias = (randn(width, dtype=dtype, seed=seed) for seed in (3, 4, 5))
    values = (x, weight, bias, residual, norm_weight, norm_bias)
    want = linear_add_layer_norm(*doubled(*values), 1e-12, keep, backend="reference")
    check(linear_add_layer_norm(*values, 1e-12, keep, backend="triton"), want, dtype)
    product = (x.double() @ weight.double().T).to(dtype)
    check(add_norm(product, bias, residual, norm_weight, norm_bias, keep), want, dtype)


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.7, 1.0])
def test_select_tokens_is_the_reference_exactly(fraction: float, ties: bool) -> None:
    lengths = [*MIXED, 2000]
    scores = randn(sum(lengths), dtype=torch.float32)
    if ties:
        scores = scores.round()
        scores[::7] = torch.inf
    _, target = keep_of(lengths, fraction)
    arguments = (scores, offsets(lengths), target, int(target[-1]), max(lengths))
    want = select_tokens(*arguments, backend="reference")
    assert torch.equal(select_tokens(*arguments, backend="triton"), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_restore_is_the_reference_exactly(dtype: torch.dtype) -> None:
    keep, _ = keep_of(MIXED, 0.5)
    states, kept = randn(sum(MIXED), 768, dtype=dtype), randn(len(keep), 768, dtype=dtype, seed=1)
    want = restore(states, keep, kept, backend="reference")
    assert torch.equal(restore(states, keep, kept, backend="triton"), want)


def test_addresses_reach_beyond_2_to_the_31_values() -> None:
    # 3 million rows of 768: offsets past 32 bits. Only the last rows are asked for.
    table = torch.zeros(3_000_000, 768, dtype=torch.bfloat16, device="cuda")
    table[-4:] = randn(4, 768, dtype=torch.bfloat16)
    keep = torch.arange(2_999_996, 3_000_000, device="cuda")
    product, vector = randn(4, 768, dtype=torch.bfloat16, seed=1), randn(768, dtype=torch.bfloat16, seed=2)
    got = add_norm(product, vector, table, vector, vector, keep)
    summed = product.double() + vector.double() + table[keep].double()
    want = torch.nn.functional.layer_norm(summed, (768,), vector.double(), vector.double(), 1e-12)
    check(got, want, torch.bfloat16)
