"""Embedding lookup, sum and LayerNorm against the reference in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtbert.kernels import TokenIds
from dtbert.kernels.parameters import Embeddings
from tests.kernels.triton.cases import (
    DTYPES,
    ORACLE,
    TOKENS,
    TRITON,
    WIDTHS,
    assert_close,
    doubled,
    far_apart,
    parameters,
    random_norm,
)

# By the order of TokenIds.
ROWS = {"word": 50, "token_type": 2, "position": 512}


def inputs(
    tokens: int, width: int, dtype: torch.dtype, seed: int = 0, eps: float = 1e-12
) -> tuple[TokenIds, Embeddings]:
    generator = torch.Generator().manual_seed(seed)
    ids = TokenIds(*(torch.randint(0, rows, (tokens,), generator=generator) for rows in ROWS.values()))
    tables = {name: torch.randn(rows, width, generator=generator).to(dtype) for name, rows in ROWS.items()}
    return ids, parameters(Embeddings, **tables, norm=random_norm(width, dtype, generator, eps))


def check(ids: TokenIds, tables: Embeddings) -> None:
    assert_close(TRITON.embed(ids, tables), ORACLE.embed(ids, doubled(tables)), tables.word.dtype)


def with_word(tables: Embeddings, word: torch.Tensor) -> Embeddings:
    return parameters(Embeddings, word=word, token_type=tables.token_type, position=tables.position, norm=tables.norm)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_embed_agrees_with_reference(width: int, dtype: torch.dtype) -> None:
    check(*inputs(63, width, dtype))


@pytest.mark.parametrize("tokens", [0, *TOKENS])
def test_embed_takes_any_number_of_tokens(tokens: int) -> None:
    check(*inputs(tokens, 33, torch.float32))


@settings(max_examples=15)
@given(width=st.integers(1, 300), tokens=st.integers(1, 5), seed=st.integers(0, 99), eps=st.sampled_from([1e-12, 1e-5]))
def test_embed_takes_any_width(width: int, tokens: int, seed: int, eps: float) -> None:
    # A row of one value has no variance at all: its result is the bias, whatever rounding does to the rest.
    check(*inputs(tokens, width, torch.float32, seed, eps if width > 1 else 1.0))


def test_embed_of_equal_values_is_the_bias() -> None:
    ids, tables = inputs(4, 384, torch.float32)
    for table in (tables.word, tables.position, tables.token_type):
        table.fill_(3.0)
    assert torch.equal(TRITON.embed(ids, tables), tables.norm.bias.expand(4, -1))


def test_embed_reads_rows_of_a_wider_table() -> None:
    ids, tables = inputs(9, 40, torch.float32)
    wide = torch.randn(len(tables.word), 64)
    check(ids, with_word(tables, wide[:, :40]))


def test_embed_addresses_tables_of_more_than_2_to_the_31_values() -> None:
    _, tables = inputs(1, 16, torch.float16)
    word = far_apart(3, 16, torch.float16)
    word[2] = torch.randn(16)
    ids = TokenIds(torch.tensor([2, 0]), torch.tensor([0, 1]), torch.tensor([1, 2]))
    check(ids, with_word(tables, word))


@pytest.mark.usefixtures("one_row_a_program")
def test_embed_takes_one_row_a_program_as_on_a_gpu() -> None:
    check(*inputs(5, 40, torch.float32))


@pytest.mark.parametrize("table", range(3), ids=ROWS)
def test_embed_reads_nothing_outside_its_tables(table: int) -> None:
    ids, tables = inputs(5, 40, torch.float32)
    want = TRITON.embed(ids, tables)
    rows = list(ROWS.values())[table]
    for outside in (-1, rows, 2**40, -(2**40)):
        # Elsewhere a read that far away ends the process.
        changed = [column.clone() for column in ids]
        changed[table][2] = outside
        got = TRITON.embed(TokenIds(*changed), tables)
        assert got[2].isnan().all()
        assert torch.equal(got[[0, 1, 3, 4]], want[[0, 1, 3, 4]])
