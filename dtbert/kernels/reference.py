"""What the steps compute, for one sequence at a time and in plain torch: the specification, differentiable.

Letters in shapes: B sequences, T packed tokens of all sequences end to end, K of them kept, N heads, D head size,
H = N * D hidden size, F feed-forward size, n tokens of one sequence, q of its queries. Statistics, softmax and
significance are float32 (float64 for float64 inputs).
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]
AttentionScore = Literal["received", "received_off_diagonal", "received_max", "cls", "from_question", "value_norm"]
ATTENTION_SCORES: tuple[AttentionScore, ...] = get_args(AttentionScore)


def activate(x: Tensor, activation: Activation) -> Tensor:
    """The feed-forward's activation, elementwise: erf-GELU, tanh-GELU, ReLU or SiLU."""
    if activation in ("relu", "silu"):
        return F.relu(x) if activation == "relu" else F.silu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each ``[N, T, D]``, from ``[T, 3 * H]``."""
    query, key, value = qkv.unflatten(1, (3, num_heads, -1)).permute(1, 2, 0, 3)
    return query, key, value


def attention_logits(query: Tensor, key: Tensor) -> Tensor:
    """Scaled products ``[..., q, n]``, float32, from queries ``[..., q, D]`` and keys ``[..., n, D]``."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    return (query.to(dtype) * query.shape[-1] ** -0.5) @ key.to(dtype).transpose(-1, -2)


def score_of(score: AttentionScore, probabilities: Tensor, value: Tensor, segments: Tensor | None = None) -> Tensor:
    """Significance of each token as a key, from the attention probabilities P[h, q, k] of its own sequence.

    ``received`` sums P over heads and queries (Dynamic-TinyBERT, LAT); ``received_off_diagonal`` leaves out a
    token's attention to itself (PoWER-BERT); ``received_max`` is the maximum over heads and queries; ``cls``
    sums over heads the row of the sequence's first token; ``from_question`` sums over heads and the queries of
    segment 0; ``value_norm`` is ``received`` with each head weighted by the Euclidean norm of the token's value.

    Args:
        score: which.
        probabilities: ``[N, q, n]``; a padded batch may lead, with probabilities of 0 at padded queries.
        value: ``[N, n, D]``.
        segments: ids ``[n]``, for ``from_question`` alone.

    Returns:
        ``[n]``.
    """
    if score == "received" or probabilities.shape[-2] == 0:
        return probabilities.sum((-3, -2))
    if score == "received_off_diagonal":
        return probabilities.sum((-3, -2)) - probabilities.diagonal(dim1=-2, dim2=-1).sum(-2)
    if score == "received_max":
        return probabilities.amax((-3, -2))
    if score == "cls":
        return probabilities[..., 0, :].sum(-2)
    if score == "value_norm":
        return (probabilities.sum(-2) * value.to(probabilities.dtype).norm(dim=-1)).sum(-2)
    assert segments is not None
    return (probabilities * (segments == 0)[..., None, :, None]).sum((-3, -2))


def highest(significance: Tensor, count: int) -> Tensor:
    """Places of the ``count`` highest of ``[..., n]``, ties to the lower place, in ascending order."""
    return significance.sort(descending=True, stable=True).indices[..., :count].sort().values
