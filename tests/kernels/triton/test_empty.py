"""Batches without tokens, without sequences, or with nothing kept: every backend gives the same, and no error."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dtbert import kernels
from dtbert.kernels import ATTENTION_SCORES

H, N = 24, 3

Call = tuple[str, dict[str, Any]]


def offsets(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def attention_calls(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, queries: Tensor, asked: Tensor) -> Iterator[Call]:
    common = {"qkv": qkv, "cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen, "num_heads": N}
    segments = torch.ones(len(qkv), dtype=torch.int64)
    yield "attention", common
    yield "attention", {**common, "query_indices": queries, "cu_seqlens_q": asked}
    for score in ATTENTION_SCORES:
        yield "attention", {**common, "significance": score, "token_type_ids": segments}
        yield "attention_significance", {**common, "kind": score, "token_type_ids": segments}


def calls() -> Iterator[Call]:
    rand = torch.Generator().manual_seed(0)
    norm = {"norm_weight": torch.randn(H, generator=rand), "norm_bias": torch.randn(H, generator=rand), "eps": 1e-5}
    product = {"weight": torch.randn(H, H, generator=rand), "bias": torch.randn(H, generator=rand)}
    nothing, some = torch.zeros(0, H), torch.randn(5, H, generator=rand)
    for cu_seqlens in (offsets(0), offsets(0, 0, 0)):
        for bound in (0, 7):
            yield from attention_calls(torch.zeros(0, 3 * H), cu_seqlens, bound, ids(), cu_seqlens)
            packing = {"cu_seqlens": cu_seqlens, "max_seqlen": bound, "next_cu_seqlens": cu_seqlens}
            yield "select_tokens", {**packing, "significance": torch.zeros(0), "num_kept": 0}
    # Of one sequence two tokens, of one none, of one three; in the question none.
    mixed = offsets(0, 2, 2, 5)
    yield from attention_calls(torch.randn(5, 3 * H, generator=rand), mixed, 3, ids(), offsets(0, 0, 0, 0))
    yield from attention_calls(torch.randn(5, 3 * H, generator=rand), mixed, 3, ids(4), offsets(0, 0, 0, 1))
    packing = {"cu_seqlens": mixed, "max_seqlen": 3, "next_cu_seqlens": offsets(0, 0, 0, 0)}
    yield "select_tokens", {**packing, "significance": torch.randn(5, generator=rand), "num_kept": 0}
    yield "linear", {**product, "x": nothing}
    yield "linear_gelu", {**product, "x": nothing}
    yield "linear_add_layer_norm", {**product, **norm, "x": nothing, "residual": nothing}
    yield "linear_add_layer_norm", {**product, **norm, "x": nothing, "residual": some, "keep_indices": ids()}
    tables = dict.fromkeys(("word", "position", "token_type"), some)
    yield "embed_layer_norm", {**tables, **norm, "input_ids": ids(), "position_ids": ids(), "token_type_ids": ids()}
    yield "restore", {"states": some, "keep_indices": ids(), "kept_states": nothing}
    yield "restore", {"states": nothing, "keep_indices": ids(), "kept_states": nothing}


CALLS = list(calls())


@pytest.mark.parametrize(("step", "arguments"), CALLS, ids=[f"{place}-{step}" for place, (step, _) in enumerate(CALLS)])
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_empty_batches_agree(step: str, arguments: dict[str, Any], backend: str) -> None:
    got, want = (
        getattr(kernels, step)(
            **{name: value.clone() if isinstance(value, Tensor) else value for name, value in arguments.items()},
            backend=name,
        )
        for name in (backend, "reference")
    )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
