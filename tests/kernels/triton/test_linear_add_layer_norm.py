"""Product, gather, bias, residual and LayerNorm against the reference in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dtbert.kernels import reference
from dtbert.kernels.triton import gather_add_layer_norm, layer_norm, linear_add_layer_norm
from tests.kernels.triton.cases import DTYPES, TOKENS, WIDTHS, assert_close, doubled, far_apart


def inputs(rows: int, tokens: int, width: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, width), (width, width), (width,), (tokens, width), (width,), (width,))
    x, weight, *rest = (torch.randn(shape, generator=generator) for shape in shapes)
    return [tensor.to(dtype) for tensor in (x, weight / width**0.5, *rest)]


def check(values: list[Tensor], keep_indices: Tensor | None = None, eps: float = 1e-12) -> None:
    got = linear_add_layer_norm(*values, eps, keep_indices)
    assert_close(got, reference.linear_add_layer_norm(*doubled(*values), eps, keep_indices), values[0].dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("gather", [False, True], ids=["all", "kept"])
def test_linear_add_layer_norm_agrees_with_reference(gather: bool, width: int, dtype: torch.dtype) -> None:
    keep_indices = torch.randperm(127)[:63].sort().values if gather else None
    check(inputs(63, 127 if gather else 63, width, dtype), keep_indices)


@pytest.mark.parametrize("tokens", [0, *TOKENS])
def test_linear_add_layer_norm_takes_any_number_of_tokens(tokens: int) -> None:
    check(inputs(tokens, tokens, 33, torch.float32))


@settings(max_examples=15)
@given(data=st.data(), width=st.integers(2, 200), tokens=st.integers(1, 12), seed=st.integers(0, 99))
def test_linear_add_layer_norm_gathers_any_set(data: st.DataObject, width: int, tokens: int, seed: int) -> None:
    kept = sorted(data.draw(st.sets(st.integers(0, tokens - 1))))
    check(inputs(len(kept), tokens, width, torch.float32, seed), torch.tensor(kept, dtype=torch.int64), 1e-5)


def test_gather_add_layer_norm_is_what_follows_the_product() -> None:
    x, weight, bias, residual, *norm = inputs(5, 9, 48, torch.float32)
    keep_indices = torch.tensor([0, 3, 4, 7, 8])
    got = gather_add_layer_norm(x @ weight.T, bias, residual, *norm, 1e-12, keep_indices)
    want = linear_add_layer_norm(x, weight, bias, residual, *norm, 1e-12, keep_indices)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


def test_gather_add_layer_norm_never_reads_dropped_rows() -> None:
    product, _, bias, residual, *norm = inputs(2, 5, 32, torch.float32)
    keep_indices = torch.tensor([1, 3])
    want = gather_add_layer_norm(product, bias, residual, *norm, 1e-12, keep_indices)
    residual[[0, 2, 4]] = float("nan")
    assert torch.equal(gather_add_layer_norm(product, bias, residual, *norm, 1e-12, keep_indices), want)


def test_gather_add_layer_norm_of_integers_is_exact() -> None:
    # Rows of -1 and 1 in equal numbers have mean 0 and variance 1, also after the sum.
    signs = torch.tensor([1.0, -1.0]).repeat(192)
    product, residual = 5 * signs.expand(3, -1).contiguous(), 7 * signs.expand(4, -1).contiguous()
    bias, weight, norm_bias = -11 * signs, torch.arange(384.0), torch.arange(384.0) - 5
    got = gather_add_layer_norm(product, bias, residual, weight, norm_bias, 0.0, torch.tensor([0, 2, 3]))
    assert torch.equal(got, (weight * signs + norm_bias).expand(3, -1))


def test_gather_add_layer_norm_addresses_more_than_2_to_the_31_values() -> None:
    product, _, bias, _, *norm = inputs(2, 2, 16, torch.float16)
    residual = far_apart(3, 16, torch.float16)
    residual[2] = torch.randn(16)
    keep_indices = torch.tensor([0, 2])
    got = gather_add_layer_norm(product, bias, residual, *norm, 1e-12, keep_indices)
    want = gather_add_layer_norm(product, bias, residual[keep_indices], *norm, 1e-12)
    assert torch.equal(got, want)


def test_linear_add_layer_norm_takes_one_row_a_program_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_norm, "INTERPRETED_ROWS", 1)
    check(inputs(3, 5, 40, torch.float32), torch.tensor([0, 2, 3]))
