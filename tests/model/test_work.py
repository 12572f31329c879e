"""The work of each step against counts by hand."""

import torch
from torch import Tensor

from dtbert.kernels import SCORE_COSTS, Kept, Left, Packing
from dtbert.kernels.parameters import Embeddings, LayerNorm, Linear
from dtbert.model.batch import PackedBatch
from dtbert.model.work import StepWork, Work

H, FLOAT, N = 4, 4, 2
CPU, TRITON = StepWork(SCORE_COSTS["cpu"]), StepWork(SCORE_COSTS["triton"])


def packing(*seqlens: int) -> Packing:
    return Packing.stack([seqlens], torch.device("cpu"))[0]


BOTH = packing(2, 3)
QKV = torch.zeros(5, 3 * H)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


def test_products_read_weights_once() -> None:
    # 3 x 4 in, 4 x 5 weights, 5 biases, 3 x 5 out.
    assert CPU.linear(zeros(3, 4), Linear(4, 5)) == Work(2 * 3 * 4 * 5, 4 * (12 + 20 + 5 + 15))
    # In half the bytes: the same FLOPs, twice the intensity.
    half = CPU.linear(zeros(3, 4).half(), Linear(4, 5).half())
    assert half.intensity == 2 * CPU.linear(zeros(3, 4), Linear(4, 5)).intensity


def test_products_cost_the_same_in_a_backends_layout() -> None:
    plain, laid_out, norm = Linear(4, 5), Linear(4, 5), LayerNorm(5, 1e-12)
    laid_out.lay_out(zeros(64), unpack=lambda weight: weight[:20].view(5, 4))
    assert CPU.linear(zeros(3, 4), laid_out) == CPU.linear(zeros(3, 4), plain)
    before = CPU.add_norm(zeros(3, 4), plain, zeros(3, 5), norm)
    assert CPU.add_norm(zeros(3, 4), laid_out, zeros(3, 5), norm) == before


def test_residual_and_norm_add_traffic_and_no_flops() -> None:
    arguments = zeros(3, 4), Linear(4, 5), zeros(9, 5), LayerNorm(5, 1e-12)
    plain = CPU.linear(zeros(3, 4), Linear(4, 5))
    added = 4 * (15 + 5 + 5)  # residual, norm's weight and bias
    assert CPU.add_norm(*arguments) == Work(plain.flops, plain.bytes + added)
    assert CPU.add_norm(*arguments, torch.arange(3)) == Work(plain.flops, plain.bytes + added + 3 * 8)


def test_attention_counts_pairs_within_each_sequence() -> None:
    pairs = 2 * 2 + 3 * 3
    # Queries, keys and values in, context out, 5 rows each.
    plain = CPU.attention(QKV, BOTH, N)
    assert plain == Work(2 * 2 * pairs * H, 4 * 5 * H * FLOAT)
    scored = CPU.scored_attention(QKV, BOTH, N, "received")
    assert scored == Work(plain.flops, plain.bytes + 5 * 4)
    norms = CPU.scored_attention(QKV, BOTH, N, "value_norm")
    assert norms == Work(plain.flops + 2 * 5 * H, scored.bytes)
    # A fused kernel stores no probabilities: it computes the products of queries and keys once more.
    assert TRITON.scored_attention(QKV, BOTH, N, "received") == Work(plain.flops + 2 * pairs * H, scored.bytes)


def test_attention_of_picked_queries_leaves_the_others_out() -> None:
    picked = CPU.attention(QKV, BOTH, N, Kept(torch.tensor([0, 3]), packing(1, 1)))
    assert picked == Work(2 * 2 * (2 + 3) * H, (2 + 2 + 5 + 5) * H * FLOAT + 2 * 8)


def test_scores_alone_take_the_products_of_their_queries() -> None:
    cls = CPU.significance(QKV, BOTH, N, "cls")
    assert cls == Work(2 * (2 + 3) * H, (2 + 5) * H * FLOAT + 5 * 4)
    segments = torch.tensor([0, 1, 0, 0, 1])
    question = CPU.significance(QKV, BOTH, N, "from_question", segments)
    assert question == Work(2 * (2 + 6) * H, (3 + 5) * H * FLOAT + 5 * 4 + 5 * 8)
    assert TRITON.significance(QKV, BOTH, N, "from_question", segments) == Work(2 * question.flops, question.bytes)
    norms = CPU.significance(QKV, BOTH, N, "value_norm")
    assert norms == Work(2 * 13 * H + 2 * 5 * H, (5 + 5 + 5) * H * FLOAT + 5 * 4)


def test_steps_without_products_only_move_bytes() -> None:
    assert CPU.select(zeros(5), BOTH, packing(1, 2)) == Work(0, 5 * 4 + 3 * 8)
    assert CPU.scatter(zeros(5, H), torch.arange(3), zeros(3, H)) == Work(0, 2 * 3 * H * FLOAT + 3 * 8)
    # At first the states stay where they are; later those of 2 tokens move, by 5 rows of which 3 are kept.
    scores, states, target = zeros(5), zeros(5, H), packing(1, 2)
    assert CPU.drop(Left(BOTH), target, scores, states) == CPU.select(scores, BOTH, target)
    again = Left(BOTH, torch.arange(5), states, segments=torch.zeros(5).long())
    moved = 2 * 3 * H * FLOAT + 2 * 2 * H * FLOAT + 8 * (5 + 3) + 8 * 5
    assert CPU.drop(again, target, scores, states, states) == Work(0, 5 * 4 + 3 * 8 + moved)
    # Three ids a token; 5 word rows, all of the 3 positions and 2 segments, norm's weight and bias; 5 rows out.
    ids = PackedBatch.from_lists([[1, 2, 3, 4, 5]]).ids
    assert CPU.embed(ids, Embeddings(100, 3, 2, H, 1e-12)) == Work(0, 3 * 8 * 5 + (5 + 3 + 2 + 2 + 5) * H * FLOAT)
