"""Every step of the network in plain torch: the specification, and the oracle of the tests.

Letters in shapes: B sequences, T packed tokens of all sequences end to end, N heads, D head size, H = N * D
hidden size, F feed-forward size. ``cu_seqlens`` is int32 ``[B + 1]``: sequence b holds the rows
``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``. All steps are differentiable and run on any device and dtype;
statistics, softmax and significance are float32 (float64 for float64 inputs).
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["gelu", "gelu_tanh", "relu"]
AttentionScore = Literal["received", "received_off_diagonal", "received_max", "cls", "from_question", "value_norm"]
ATTENTION_SCORES: tuple[AttentionScore, ...] = get_args(AttentionScore)


def embed_layer_norm(
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
) -> Tensor:
    """Sum of the three embeddings, then LayerNorm.

    Args:
        input_ids, position_ids, token_type_ids: int64 ``[T]``.
        word, position, token_type: tables ``[rows, H]``.
        norm_weight, norm_bias: ``[H]``.
        eps: added to the variance.

    Returns:
        Hidden states ``[T, H]`` in the tables' dtype.
    """
    summed = (
        F.embedding(input_ids, word) + F.embedding(token_type_ids, token_type) + F.embedding(position_ids, position)
    )
    return F.layer_norm(summed, norm_weight.shape, norm_weight, norm_bias, eps)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias``: ``[T, in]`` and ``[out, in]`` to ``[T, out]``."""
    return F.linear(x, weight, bias)


def activate(x: Tensor, activation: Activation) -> Tensor:
    """The feed-forward's activation, elementwise: erf-GELU, tanh-GELU or ReLU."""
    if activation == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation = "gelu") -> Tensor:
    """``activation(x @ weight.T + bias)``: ``[T, H]`` and ``[F, H]`` to ``[T, F]``."""
    return activate(linear(x, weight, bias), activation)


def linear_add_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    keep_indices: Tensor | None = None,
) -> Tensor:
    """``LayerNorm(x @ weight.T + bias + residual[keep_indices])``.

    Args:
        x: ``[K, in]``, rows of the kept tokens alone.
        weight, bias: ``[H, in]`` and ``[H]``.
        residual: ``[T, H]``, rows of all tokens; ``[K, H]`` without ``keep_indices``.
        norm_weight, norm_bias: ``[H]``.
        eps: added to the variance.
        keep_indices: int64 ``[K]``, ascending rows of ``residual``; all of them when absent.

    Returns:
        ``[K, H]``.
    """
    if keep_indices is not None:
        residual = residual.index_select(0, keep_indices)
    return F.layer_norm(linear(x, weight, bias) + residual, norm_weight.shape, norm_weight, norm_bias, eps)


def attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    num_heads: int,
    *,
    significance: AttentionScore | None = None,
    token_type_ids: Tensor | None = None,
    query_indices: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention within each sequence and, when asked, the significance of each key.

    Args:
        qkv: ``[T, 3 * H]``: queries, keys and values side by side, heads contiguous within each.
        cu_seqlens: int32 ``[B + 1]``.
        max_seqlen: tokens in the longest sequence.
        num_heads: N.
        significance: which score of the keys to return with the context (`attention_significance`).
        token_type_ids: int64 ``[T]``, needed by the score ``from_question`` alone.
        query_indices: int64 ``[K]``, ascending rows: compute the context of these queries alone.
            Not together with ``significance``, which needs every query.
        cu_seqlens_q: int32 ``[B + 1]``, where each sequence's queries begin in ``query_indices``.

    Returns:
        Context ``[T, H]`` (``[K, H]`` with ``query_indices``) in the dtype of ``qkv``, and float32
        significance ``[T]`` or None.
    """
    starts = cu_seqlens.tolist()
    queries = starts if cu_seqlens_q is None else cu_seqlens_q.tolist()
    contexts, scores = [], []
    for b in range(len(starts) - 1):
        rows = slice(starts[b], starts[b + 1])
        asked = rows if query_indices is None else query_indices[queries[b] : queries[b + 1]]
        query, key, value = _heads(qkv[rows], num_heads)
        if query_indices is not None:
            query = _heads(qkv[asked], num_heads)[0]
        probabilities = attention_logits(query, key).softmax(-1)
        context = probabilities @ value.to(probabilities.dtype)
        contexts.append(context.transpose(0, 1).flatten(1).to(qkv.dtype))
        if significance is not None:
            segments = None if token_type_ids is None else token_type_ids[rows]
            scores.append(score_from_probabilities(significance, probabilities, value, segments))
    empty = qkv.new_zeros(0, qkv.shape[1] // 3)
    return torch.cat([empty, *contexts]), None if significance is None else torch.cat(scores)


def attention_significance(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    num_heads: int,
    kind: AttentionScore,
    token_type_ids: Tensor | None = None,
) -> Tensor:
    """Significance of each token as a key, from the attention probabilities P[h, q, k] of its own sequence.

    ``received`` sums P over heads and queries (Dynamic-TinyBERT, LAT); ``received_off_diagonal`` leaves out a
    token's attention to itself (PoWER-BERT); ``received_max`` is the maximum over heads and queries; ``cls``
    sums over heads the row of the sequence's first token; ``from_question`` sums over heads and the queries of
    segment 0; ``value_norm`` is ``received`` with each head weighted by the Euclidean norm of the token's value.

    Args:
        As `attention`; ``token_type_ids`` is needed by ``from_question`` alone.

    Returns:
        float32 ``[T]``.
    """
    starts = cu_seqlens.tolist()
    scores = [qkv.new_zeros(0, dtype=_statistics_dtype(qkv))]
    for begin, end in zip(starts, starts[1:], strict=False):
        query, key, value = _heads(qkv[begin:end], num_heads)
        segments = None if token_type_ids is None else token_type_ids[begin:end]
        scores.append(score_from_probabilities(kind, attention_logits(query, key).softmax(-1), value, segments))
    return torch.cat(scores)


def select_tokens(
    significance: Tensor, cu_seqlens: Tensor, next_cu_seqlens: Tensor, num_kept: int, max_seqlen: int
) -> Tensor:
    """The rows each sequence keeps: those of highest significance, ties to the lower position, in text order.

    Args:
        significance: float32 ``[T]``.
        cu_seqlens: int32 ``[B + 1]``, the sequences now.
        next_cu_seqlens: int32 ``[B + 1]``, the sequences afterwards: how many tokens each keeps.
        num_kept: K, the last entry of ``next_cu_seqlens``.
        max_seqlen: tokens in the longest sequence now.

    Returns:
        ``keep_indices``, int64 ``[K]``, ascending.
    """
    starts, kept = cu_seqlens.tolist(), next_cu_seqlens.diff().tolist()
    keep = [significance.new_zeros(0, dtype=torch.int64)]
    for begin, end, count in zip(starts, starts[1:], kept, strict=False):
        order = torch.sort(significance[begin:end], descending=True, stable=True).indices
        keep.append(order[:count].sort().values + begin)
    return torch.cat(keep)


def restore(states: Tensor, keep_indices: Tensor, kept_states: Tensor) -> Tensor:
    """``states`` with the rows of the kept tokens replaced: ``[T, H]``, ``[K]`` and ``[K, H]`` to ``[T, H]``."""
    return states.index_copy(0, keep_indices, kept_states)


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = qkv.unflatten(1, (3, num_heads, -1)).permute(1, 2, 0, 3)  # each [N, n, D]
    return query, key, value


def attention_logits(query: Tensor, key: Tensor) -> Tensor:
    """Scaled products ``[..., q, n]``, float32, from queries ``[..., q, D]`` and keys ``[..., n, D]``."""
    dtype = _statistics_dtype(query)
    return (query.to(dtype) * query.shape[-1] ** -0.5) @ key.to(dtype).transpose(-1, -2)


def score_from_probabilities(
    kind: AttentionScore, probabilities: Tensor, value: Tensor, segments: Tensor | None
) -> Tensor:
    """A sequence's score ``[n]`` from probabilities ``[N, q, n]``, values ``[N, n, D]`` and segment ids ``[n]``.

    A padded batch may lead: ``[B, n]`` from ``[B, N, q, n]``, ``[B, N, n, D]`` and ``[B, n]``, 0 at padded queries.
    """
    if kind == "received" or probabilities.shape[-2] == 0:
        return probabilities.flatten(-3, -2).sum(-2)
    if kind == "received_off_diagonal":
        return probabilities.flatten(-3, -2).sum(-2) - probabilities.diagonal(dim1=-2, dim2=-1).sum(-2)
    if kind == "received_max":
        return probabilities.flatten(-3, -2).amax(-2)
    if kind == "cls":
        return probabilities[..., 0, :].sum(-2)
    if kind == "value_norm":
        return (probabilities.sum(-2) * value.to(probabilities.dtype).norm(dim=-1)).sum(-2)
    if kind == "from_question":
        if segments is None:
            raise ValueError("the score 'from_question' needs token_type_ids: pass the segment id of every token")
        return (probabilities * (segments == 0)[..., None, :, None]).sum((-3, -2))
    raise ValueError(f"unknown attention score {kind!r}: choose one of {', '.join(ATTENTION_SCORES)}")
