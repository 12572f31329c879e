"""Embedding lookup, sum and LayerNorm against the reference in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dtbert.kernels import reference
from dtbert.kernels.triton import embed_layer_norm, layer_norm
from tests.kernels.triton.cases import DTYPES, TOKENS, WIDTHS, assert_close, doubled, far_apart

ROWS = (50, 512, 2)


def inputs(tokens: int, width: int, dtype: torch.dtype, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, rows, (tokens,), generator=generator) for rows in ROWS]
    tables = [torch.randn(rows, width, generator=generator).to(dtype) for rows in ROWS]
    norms = [torch.randn(width, generator=generator).to(dtype) for _ in range(2)]
    return ids, tables + norms


def check(ids: list[Tensor], values: list[Tensor], eps: float = 1e-12) -> None:
    got = embed_layer_norm(*ids, *values, eps)
    assert_close(got, reference.embed_layer_norm(*ids, *doubled(*values), eps), values[0].dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_embed_layer_norm_agrees_with_reference(width: int, dtype: torch.dtype) -> None:
    check(*inputs(63, width, dtype))


@pytest.mark.parametrize("tokens", [0, *TOKENS])
def test_embed_layer_norm_takes_any_number_of_tokens(tokens: int) -> None:
    check(*inputs(tokens, 33, torch.float32))


@settings(max_examples=15)
@given(width=st.integers(1, 300), tokens=st.integers(1, 5), seed=st.integers(0, 99), eps=st.sampled_from([1e-12, 1e-5]))
def test_embed_layer_norm_takes_any_width(width: int, tokens: int, seed: int, eps: float) -> None:
    ids, values = inputs(tokens, width, torch.float32, seed)
    # A row of one value has no variance at all: its result is the bias, whatever rounding does to the rest.
    check(ids, values, eps if width > 1 else 1.0)


def test_embed_layer_norm_of_equal_values_is_the_bias() -> None:
    ids, (word, position, token_type, weight, bias) = inputs(4, 384, torch.float32)
    tables = [torch.full_like(table, 3.0) for table in (word, position, token_type)]
    assert torch.equal(embed_layer_norm(*ids, *tables, weight, bias, 1e-12), bias.expand(4, -1))


def test_embed_layer_norm_reads_rows_of_a_wider_table() -> None:
    ids, (word, *rest) = inputs(9, 40, torch.float32)
    wide = torch.randn(len(word), 64)
    wide[:, :40] = word
    check(ids, [wide[:, :40], *rest])


def test_embed_layer_norm_addresses_tables_of_more_than_2_to_the_31_values() -> None:
    _, (_, *rest) = inputs(1, 16, torch.float16)
    word = far_apart(3, 16, torch.float16)
    word[2] = torch.randn(16)
    check([torch.tensor([2, 0]), torch.tensor([1, 2]), torch.tensor([0, 1])], [word, *rest])


def test_embed_layer_norm_takes_one_row_a_program_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_norm, "INTERPRETED_ROWS", 1)
    check(*inputs(5, 40, torch.float32))
