"""Attention by sequences against plain operators, which draw the same and leave the gradient to autograd."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dtbert.kernels import ATTENTION_SCORES, AttentionScore, Kept
from dtbert.model import Packing
from dtbert.training.attention import attention_by_sequence
from dtbert.training.backend import TrainingBackend

HEADS, HEAD_SIZE = 3, 4
# The others read some queries alone, and go by a way of their own.
OF_ALL_QUERIES = [one for one in ATTENTION_SCORES if one not in ("cls", "from_question")]


def packing(lengths: list[int]) -> Packing:
    return Packing.stack([lengths], torch.device("cpu"))[0]


def some_of(lengths: list[int], seed: int) -> Kept:
    """At least one token of each sequence."""
    generator = torch.Generator().manual_seed(seed)
    rows, counts, begin = list[Tensor](), list[int](), 0
    for length in lengths:
        kept = torch.randint(length, (length,), generator=generator).unique()
        rows.append(begin + kept)
        counts.append(len(kept))
        begin += length
    return Kept(torch.cat(rows), packing(counts))


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    chance=st.sampled_from([0.0, 0.1, 0.6]),
    score=st.sampled_from([None, *OF_ALL_QUERIES]),
    chooses=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_context_score_and_gradient_are_those_of_plain_operators(
    lengths: list[int], chance: float, score: AttentionScore | None, chooses: bool, seed: int
) -> None:
    now, queries = packing(lengths), some_of(lengths, seed) if chooses else None
    generator = torch.Generator().manual_seed(seed)
    shape = sum(lengths), 3 * HEADS * HEAD_SIZE
    # Far apart: some probabilities are next to nothing.
    qkv = (4 * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()
    found = []
    for attend in (attention_by_sequence, TrainingBackend()._plain_attention):
        torch.manual_seed(seed)
        context, significance = attend(qkv, now, HEADS, chance, None if chooses else score, queries)
        weights = torch.randn(context.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        found.append((context, significance, torch.autograd.grad((context * weights).sum(), qkv)[0]))
    (context, significance, gradient), wanted = found
    torch.testing.assert_close(context, wanted[0])
    torch.testing.assert_close(gradient, wanted[2])
    if significance is not None and wanted[1] is not None:
        torch.testing.assert_close(significance, wanted[1])
        assert not significance.requires_grad
    assert (significance is None) == (wanted[1] is None)


def test_probability_that_underflows_has_no_gradient() -> None:
    qkv = torch.zeros(2, 3 * HEAD_SIZE)
    qkv[:, 2 * HEAD_SIZE :] = torch.randn(2, HEAD_SIZE)
    qkv[:, 0] = qkv[:, HEAD_SIZE] = torch.tensor([30.0, -30.0])
    qkv.requires_grad_()
    context, _ = attention_by_sequence(qkv, packing([2]), 1, 0.5)
    context.sum().backward()
    assert qkv.grad is not None
    assert qkv.grad.isfinite().all()
    assert torch.equal(qkv.grad[:, : 2 * HEAD_SIZE], torch.zeros(2, 2 * HEAD_SIZE))
