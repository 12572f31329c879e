"""The steps of training against the reference, and the padded attention against the one that goes by sequences."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dtbert.kernels import ATTENTION_SCORES, AttentionScore, reference
from dtbert.model import Packing
from dtbert.training.backend import TrainingBackend

LENGTHS = (5, 1, 9, 3)
HEADS = 2
SEGMENTS = torch.cat([torch.arange(length) >= 2 for length in LENGTHS]).long()


def packing(lengths: tuple[int, ...] = LENGTHS) -> Packing:
    return Packing.stack([lengths], torch.device("cpu"))[0]


def projected() -> Tensor:
    return torch.randn(sum(LENGTHS), 3 * HEADS * 4, dtype=torch.float64, requires_grad=True)


def call(backend: Any, qkv: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
    now = packing()
    return backend.attention(qkv, now.cu_seqlens, now.max_seqlen, HEADS, **options)


@pytest.mark.parametrize("padded", [False, True], ids=["by sequence", "padded"])
@pytest.mark.parametrize("kind", [None, *ATTENTION_SCORES])
def test_attention_agrees_with_reference(kind: AttentionScore | None, padded: bool) -> None:
    qkv = projected()
    backend = TrainingBackend(padded=padded)
    context, scores = call(backend, qkv, significance=kind, token_type_ids=SEGMENTS)
    wanted_context, wanted_scores = call(reference, qkv, significance=kind, token_type_ids=SEGMENTS)
    torch.testing.assert_close(context, wanted_context)
    assert (scores is None) == (kind is None)
    if kind is not None:
        torch.testing.assert_close(scores, wanted_scores)
        assert not scores.requires_grad
        alone = backend.attention_significance(qkv, packing().cu_seqlens, max(LENGTHS), HEADS, kind, SEGMENTS)
        torch.testing.assert_close(alone, wanted_scores)
    weights = torch.randn_like(context)
    gradients = [torch.autograd.grad((one * weights).sum(), qkv)[0] for one in (context, wanted_context)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("padded", [False, True], ids=["by sequence", "padded"])
def test_attention_of_some_queries_agrees_with_reference(padded: bool) -> None:
    qkv = projected()
    rows = torch.tensor([0, 3, 5, 6, 9, 14, 16])
    some = {"query_indices": rows, "cu_seqlens_q": packing((2, 1, 3, 1)).cu_seqlens}
    context, _ = call(TrainingBackend(padded=padded), qkv, **some)
    torch.testing.assert_close(context, call(reference, qkv, **some)[0])


@pytest.mark.parametrize("padded", [False, True], ids=["by sequence", "padded"])
def test_kept_attention_is_that_of_each_sequence(padded: bool) -> None:
    qkv = projected()
    for keep in ("probabilities", "scores"):
        backend = TrainingBackend(keep=keep, padded=padded)
        call(backend, qkv)
        (pieces,) = backend.kept
        sequences = [one for piece in pieces for one in piece]
        for kept, rows in zip(sequences, qkv.split(LENGTHS), strict=True):
            query, key, _ = rows.unflatten(1, (3, HEADS, -1)).permute(1, 2, 0, 3)
            wanted = (query / query.shape[-1] ** 0.5) @ key.transpose(1, 2)
            wanted = wanted.softmax(-1) if keep == "probabilities" else wanted
            padding = kept.shape[1] - len(rows)
            torch.testing.assert_close(kept, F.pad(wanted, (0, padding, 0, padding)))


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
    part=st.floats(0.05, 1),
)
def test_select_tokens_agrees_with_reference_where_scores_tie(lengths: list[int], seed: int, part: float) -> None:
    now, after = packing(tuple(lengths)), packing(tuple(max(1, round(part * length)) for length in lengths))
    scores = torch.randint(4, (sum(lengths),), generator=torch.Generator().manual_seed(seed)).float()
    arguments = (scores, now.cu_seqlens, after.cu_seqlens, after.num_tokens, now.max_seqlen)
    assert torch.equal(TrainingBackend.select_tokens(*arguments), reference.select_tokens(*arguments))


@pytest.mark.parametrize("padded", [False, True], ids=["by sequence", "padded"])
def test_dropout_keeps_the_mean_and_the_scores(padded: bool) -> None:
    qkv = torch.randn(64, 3 * HEADS * 4)
    one = packing((64,))
    arguments = (qkv, one.cu_seqlens, 64, HEADS)
    plain, wanted = reference.attention(*arguments, significance="received")
    backend = TrainingBackend(attention_dropout=0.5, padded=padded)
    contexts = []
    for _ in range(200):
        context, scores = backend.attention(*arguments, significance="received")
        torch.testing.assert_close(scores, wanted)
        contexts.append(context)
    drawn = torch.stack(contexts)
    assert drawn.std(0).min() > 0
    # 200 draws: the mean is within some standard errors of what it is the mean of.
    assert ((drawn.mean(0) - plain).abs() / (drawn.std(0) / 200**0.5)).max() < 6
