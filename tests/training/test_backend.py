"""The steps of training against the reference, and the padded attention against the one that goes by sequences."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dtbert.kernels import ATTENTION_SCORES, AttentionScore, Backend, Kept
from dtbert.model import Packing
from dtbert.training.backend import TrainingBackend

LENGTHS = (5, 1, 9, 3)
HEADS = 2
REFERENCE = Backend()
SEGMENTS = torch.cat([torch.arange(length) >= 2 for length in LENGTHS]).long()


def packing(lengths: tuple[int, ...] = LENGTHS) -> Packing:
    return Packing.stack([lengths], torch.device("cpu"))[0]


def projected() -> Tensor:
    return torch.randn(sum(LENGTHS), 3 * HEADS * 4, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("padded", [False, True], ids=["by sequence", "padded"])
@pytest.mark.parametrize("score", [None, *ATTENTION_SCORES])
def test_attention_agrees_with_reference(score: AttentionScore | None, padded: bool) -> None:
    qkv, now = projected(), packing()
    backend = TrainingBackend(padded=padded)
    context, wanted = (one.attention(qkv, now, HEADS) for one in (backend, REFERENCE))
    if score is not None:
        alone = backend.significance(qkv, now, HEADS, score, SEGMENTS)
        wanted_scores = REFERENCE.significance(qkv, now, HEADS, score, SEGMENTS)
        torch.testing.assert_close(alone, wanted_scores)
        assert not alone.requires_grad
        if score not in ("cls", "from_question"):
            context, scores = backend.scored_attention(qkv, now, HEADS, score)
            torch.testing.assert_close(scores, wanted_scores)
            assert not scores.requires_grad
    torch.testing.assert_close(context, wanted)
    weights = torch.randn_like(context)
    gradients = [torch.autograd.grad((one * weights).sum(), qkv)[0] for one in (context, wanted)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("padded", [False, True], ids=["by sequence", "padded"])
def test_attention_of_some_queries_agrees_with_reference(padded: bool) -> None:
    qkv = projected()
    queries = Kept(torch.tensor([0, 3, 5, 6, 9, 14, 16]), packing((2, 1, 3, 1)))
    context, wanted = (
        one.attention(qkv, packing(), HEADS, queries) for one in (TrainingBackend(padded=padded), REFERENCE)
    )
    torch.testing.assert_close(context, wanted)


@pytest.mark.parametrize("padded", [False, True], ids=["by sequence", "padded"])
def test_kept_attention_is_that_of_each_sequence(padded: bool) -> None:
    qkv = projected()
    for keep in ("probabilities", "scores"):
        backend = TrainingBackend(keep=keep, padded=padded)
        backend.attention(qkv, packing(), HEADS)
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
def test_select_agrees_with_reference_where_scores_tie(lengths: list[int], seed: int, part: float) -> None:
    now, after = packing(tuple(lengths)), packing(tuple(max(1, round(part * length)) for length in lengths))
    scores = torch.randint(4, (sum(lengths),), generator=torch.Generator().manual_seed(seed)).float()
    kept, wanted = (one.select(scores, now, after).rows for one in (TrainingBackend(), REFERENCE))
    assert torch.equal(kept, wanted)


@pytest.mark.parametrize("padded", [False, True], ids=["by sequence", "padded"])
def test_dropout_keeps_the_mean_and_the_scores(padded: bool) -> None:
    qkv = torch.randn(64, 3 * HEADS * 4)
    one = packing((64,))
    plain, wanted = REFERENCE.scored_attention(qkv, one, HEADS, "received")
    backend = TrainingBackend(attention_dropout=0.5, padded=padded)
    contexts = []
    for _ in range(200):
        context, scores = backend.scored_attention(qkv, one, HEADS, "received")
        torch.testing.assert_close(scores, wanted)
        contexts.append(context)
    drawn = torch.stack(contexts)
    assert drawn.std(0).min() > 0
    # 200 draws: the mean is within some standard errors of what it is the mean of.
    assert ((drawn.mean(0) - plain).abs() / (drawn.std(0) / 200**0.5)).max() < 6
