"""The steps as public functions, which check everything about their input before a kernel sees it.

    from dtbert.kernels import attention

    context, significance = attention(qkv, cu_seqlens, max_seqlen, num_heads, significance="received")

Letters in shapes: B sequences, T packed tokens of all sequences end to end, K of them kept, N heads, D head size,
H = N * D hidden size, F feed-forward size. Sequence b holds the rows ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``.

Every step runs on the kernels that `choose_backend` finds for device, dtype and head size, or on ``backend``; where
gradients are needed, on `reference` unless another is named. Tensors are on one device and contiguous in their last
dimension; `triton` takes float32, bfloat16 and float16. Where indices or offsets are checked, that costs one wait for
the device: a model in a loop calls the functions of `get_backend` itself, which look at metadata alone.

Every step raises TypeError for a wrong dtype and ValueError for shapes, devices, strides or contents that do not fit,
or for a backend that does not run there.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dtbert.kernels.backend import Backend, BackendName, get_backend
from dtbert.kernels.checks import (
    check_activation,
    check_embedding,
    check_gather,
    check_integers,
    check_matching,
    check_offsets,
    check_product,
    check_restore,
    check_selection,
    check_shape,
)
from dtbert.kernels.reference import ATTENTION_SCORES, Activation, AttentionScore

# Whether something is wrong, as a bool on the device, and what to say then.
Fault = tuple[Tensor, Callable[[], str]]


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
    *,
    backend: BackendName | None = None,
) -> Tensor:
    """Sum of the three embeddings of every token, then LayerNorm.

    Args:
        input_ids, position_ids, token_type_ids: int64 ``[T]``, each a row of its table.
        word, position, token_type: tables ``[rows, H]``.
        norm_weight, norm_bias: ``[H]``.
        eps: added to the variance.
        backend: the kernels; by device if left out.

    Returns:
        Hidden states ``[T, H]`` in the tables' dtype; sum and statistics are float32.
    """
    step = "embed_layer_norm"
    ids = {"input_ids": input_ids, "position_ids": position_ids, "token_type_ids": token_type_ids}
    tables = {"word": word, "position": position, "token_type": token_type}
    check_embedding(step, ids, tables, {"norm_weight": norm_weight, "norm_bias": norm_bias})
    rows = zip(ids.items(), tables.values(), strict=True)
    _refuse(step, *(_outside(name, tensor, table.shape[0]) for (name, tensor), table in rows))
    chosen = _backend(backend, word, position, token_type, norm_weight, norm_bias)
    return chosen.embed_layer_norm(
        input_ids, position_ids, token_type_ids, word, position, token_type, norm_weight, norm_bias, eps
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: BackendName | None = None) -> Tensor:
    """``x @ weight.T + bias``: ``[T, in]`` and ``[out, in]`` to ``[T, out]``; ``backend`` as everywhere."""
    check_product("linear", x, weight, bias)
    return _backend(backend, x, weight, bias).linear(x, weight, bias)


def linear_gelu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Activation = "gelu",
    *,
    backend: BackendName | None = None,
) -> Tensor:
    """``activation(x @ weight.T + bias)``, the first product of the feed-forward.

    Args:
        x: ``[T, H]``.
        weight, bias: ``[F, H]`` and ``[F]``.
        activation: ``"gelu"`` (erf), ``"gelu_tanh"`` or ``"relu"``.
        backend: the kernels; by device if left out.

    Returns:
        ``[T, F]``.
    """
    check_product("linear_gelu", x, weight, bias)
    check_activation("linear_gelu", activation)
    return _backend(backend, x, weight, bias).linear_gelu(x, weight, bias, activation)


def linear_add_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    keep_indices: Tensor | None = None,
    *,
    backend: BackendName | None = None,
) -> Tensor:
    """``LayerNorm(x @ weight.T + bias + residual[keep_indices])``.

    Args:
        x: ``[K, in]``, rows of the kept tokens alone.
        weight, bias: ``[H, in]`` and ``[H]``.
        residual: ``[T, H]``, rows of all tokens; ``[K, H]`` without ``keep_indices``.
        norm_weight, norm_bias: ``[H]``.
        eps: added to the variance.
        keep_indices: int64 ``[K]``, ascending rows of ``residual``; all of them when absent.
        backend: the kernels; by device if left out.

    Returns:
        ``[K, H]``; statistics are float32.
    """
    step = "linear_add_layer_norm"
    check_product(step, x, weight, bias)
    check_matching(step, x=x, residual=residual, norm_weight=norm_weight, norm_bias=norm_bias)
    vectors = {"bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias}
    check_gather(step, x.shape[0], vectors, residual, keep_indices)
    if keep_indices is not None:
        _refuse(step, *_not_ascending("keep_indices", keep_indices, residual.shape[0]))
    chosen = _backend(backend, x, weight, bias, residual, norm_weight, norm_bias)
    return chosen.linear_add_layer_norm(x, weight, bias, residual, norm_weight, norm_bias, eps, keep_indices)


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
    backend: BackendName | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention within each sequence and, when asked, the significance of each key, with no matrix in memory on a GPU.

    Args:
        qkv: ``[T, 3 * H]``: queries, keys and values side by side, heads contiguous within each.
        cu_seqlens: int32 ``[B + 1]``; empty sequences are allowed.
        max_seqlen: tokens in the longest sequence.
        num_heads: N.
        significance: which score of the keys to return with the context: see `attention_significance`.
        token_type_ids: int64 ``[T]``, needed by the score ``from_question`` alone: the queries of segment 0.
        query_indices: int64 ``[K]``, ascending rows: compute the context of these queries alone.
            Not together with ``significance``, which needs every query.
        cu_seqlens_q: int32 ``[B + 1]``, where each sequence's queries begin in ``query_indices``.
        backend: the kernels; by device, dtype and head size if left out.

    Returns:
        Context ``[T, H]`` (``[K, H]`` with ``query_indices``) in the dtype of ``qkv``, and float32 significance
        ``[T]`` or None. Softmax and sums are float32.
    """
    step = "attention"
    faults = _check_attention(step, qkv, cu_seqlens, max_seqlen, num_heads, significance, token_type_ids)
    if (query_indices is None) != (cu_seqlens_q is None):
        raise ValueError(f"{step}: query_indices and cu_seqlens_q belong together: pass both or neither")
    if query_indices is not None and cu_seqlens_q is not None:
        if significance is not None:
            raise ValueError(f"{step}: significance needs every query: leave query_indices out")
        check_shape(step, "query_indices", query_indices, None, wanted="kept tokens")
        check_integers(step, qkv, torch.int64, query_indices=query_indices)
        check_offsets(step, "cu_seqlens_q", cu_seqlens_q, qkv)
        check_shape(step, "cu_seqlens_q", cu_seqlens_q, len(cu_seqlens), wanted="sequences + 1")
        faults += [
            *_not_offsets("cu_seqlens_q", cu_seqlens_q, "query_indices", len(query_indices)),
            *_not_ascending("query_indices", query_indices, len(qkv)),
            _in_another_sequence(query_indices, cu_seqlens_q, cu_seqlens),
        ]
    _refuse(step, *faults)
    return _backend(backend, qkv, head_size=qkv.shape[1] // 3 // num_heads).attention(
        qkv,
        cu_seqlens,
        max_seqlen,
        num_heads,
        significance=significance,
        token_type_ids=token_type_ids,
        query_indices=query_indices,
        cu_seqlens_q=cu_seqlens_q,
    )


def attention_significance(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    num_heads: int,
    kind: AttentionScore,
    token_type_ids: Tensor | None = None,
    *,
    backend: BackendName | None = None,
) -> Tensor:
    """Significance of each token as a key, from the attention probabilities P[h, q, k] of its own sequence.

    ``received`` sums P over heads and queries (Dynamic-TinyBERT, LAT); ``received_off_diagonal`` leaves out a
    token's attention to itself (PoWER-BERT); ``received_max`` is the maximum over heads and queries; ``cls``
    sums over heads the row of the sequence's first token; ``from_question`` sums over heads and the queries of
    segment 0; ``value_norm`` is ``received`` with each head weighted by the Euclidean norm of the token's value.

    Args:
        qkv, cu_seqlens, max_seqlen, num_heads, token_type_ids, backend: as `attention`.
        kind: the score.

    Returns:
        float32 ``[T]``.
    """
    step = "attention_significance"
    _refuse(step, *_check_attention(step, qkv, cu_seqlens, max_seqlen, num_heads, kind, token_type_ids))
    chosen = _backend(backend, qkv, head_size=qkv.shape[1] // 3 // num_heads)
    return chosen.attention_significance(qkv, cu_seqlens, max_seqlen, num_heads, kind, token_type_ids)


def select_tokens(
    significance: Tensor,
    cu_seqlens: Tensor,
    next_cu_seqlens: Tensor,
    num_kept: int,
    max_seqlen: int,
    *,
    backend: BackendName | None = None,
) -> Tensor:
    """The rows each sequence keeps: those of highest significance, ties to the lower position, in text order.

    Args:
        significance: float32 ``[T]``, without NaN.
        cu_seqlens: int32 ``[B + 1]``, the sequences now.
        next_cu_seqlens: int32 ``[B + 1]``, the sequences afterwards: how many tokens each keeps.
        num_kept: K, the last entry of ``next_cu_seqlens``.
        max_seqlen: tokens in the longest sequence now.
        backend: the kernels; by device if left out.

    Returns:
        ``keep_indices``, int64 ``[K]``, ascending.
    """
    step = "select_tokens"
    check_selection(step, significance, cu_seqlens, next_cu_seqlens)
    too_many = next_cu_seqlens.diff() > cu_seqlens.diff()
    _refuse(
        step,
        *_not_offsets("cu_seqlens", cu_seqlens, "significance", len(significance)),
        *_not_offsets("next_cu_seqlens", next_cu_seqlens, "num_kept", num_kept),
        _another_maximum(cu_seqlens, max_seqlen),
        (
            too_many.any(),
            lambda: f"next_cu_seqlens keeps more tokens than there are in sequence {_first(too_many)}",
        ),
        (
            significance.isnan().any(),
            lambda: f"significance is NaN at row {_first(significance.isnan())}: NaN has no rank",
        ),
    )
    chosen = _backend(backend, significance)
    return chosen.select_tokens(significance, cu_seqlens, next_cu_seqlens, num_kept, max_seqlen)


def restore(states: Tensor, keep_indices: Tensor, kept_states: Tensor, *, backend: BackendName | None = None) -> Tensor:
    """``states`` with the rows of the kept tokens replaced; ``states`` itself stays as it is.

    Args:
        states: ``[T, H]``.
        keep_indices: int64 ``[K]``, ascending rows of ``states``.
        kept_states: ``[K, H]``.
        backend: the kernels; by device if left out.

    Returns:
        ``[T, H]``.
    """
    check_restore("restore", states, keep_indices, kept_states)
    _refuse("restore", *_not_ascending("keep_indices", keep_indices, len(states)))
    # A backend may restore in place.
    return _backend(backend, states, kept_states).restore(states.clone(), keep_indices, kept_states)


def _backend(name: BackendName | None, *tensors: Tensor | None, head_size: int | None = None) -> Backend:
    present = [tensor for tensor in tensors if tensor is not None]
    if name is None and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in present):
        name = "reference"
    return get_backend(present[0].device, name, dtype=present[0].dtype, head_size=head_size)


def _check_attention(
    step: str,
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    num_heads: int,
    kind: AttentionScore | None,
    token_type_ids: Tensor | None,
) -> list[Fault]:
    check_matching(step, qkv=qkv)
    check_shape(step, "qkv", qkv, None, None, wanted="tokens, 3 * hidden size")
    if num_heads < 1 or qkv.shape[1] == 0 or qkv.shape[1] % (3 * num_heads):
        raise ValueError(
            f"{step}: qkv has {qkv.shape[1]} columns, which is no multiple of 3 * num_heads = {3 * num_heads}"
        )
    check_offsets(step, "cu_seqlens", cu_seqlens, qkv)
    if kind is not None and kind not in ATTENTION_SCORES:
        raise ValueError(f"{step}: unknown attention score {kind!r}: choose one of {', '.join(ATTENTION_SCORES)}")
    if kind == "from_question" and token_type_ids is None:
        raise ValueError(f"{step}: the score 'from_question' needs token_type_ids: pass the segment id of every token")
    if token_type_ids is not None:
        check_shape(step, "token_type_ids", token_type_ids, len(qkv), wanted="tokens")
        check_integers(step, qkv, torch.int64, token_type_ids=token_type_ids)
    return [*_not_offsets("cu_seqlens", cu_seqlens, "qkv", len(qkv)), _another_maximum(cu_seqlens, max_seqlen)]


def _refuse(step: str, *faults: Fault) -> None:
    """Raise ValueError for the first fault; one wait for the device, a second one to say what came."""
    present = torch.stack([wrong for wrong, _ in faults]).tolist()
    for wrong, (_, say) in zip(present, faults, strict=True):
        if wrong:
            raise ValueError(f"{step}: {say()}")


def _outside(name: str, ids: Tensor, size: int) -> Fault:
    outside = (ids < 0) | (ids >= size)
    return (
        outside.any(),
        lambda: (
            f"{name} holds {ids[_first(outside)].item()} at token {_first(outside)}, its table rows 0 to {size - 1}"
        ),
    )


def _not_ascending(name: str, indices: Tensor, rows: int) -> tuple[Fault, Fault]:
    outside, falling = (indices < 0) | (indices >= rows), indices.diff() <= 0
    return (
        (
            outside.any(),
            lambda: f"{name} holds {indices[_first(outside)].item()}, there are the rows 0 to {rows - 1}",
        ),
        (
            falling.any(),
            lambda: (
                f"{name} must ascend, but {indices[_first(falling)].item()} comes before "
                f"{indices[_first(falling) + 1].item()}"
            ),
        ),
    )


def _not_offsets(name: str, cu_seqlens: Tensor, of: str, rows: int) -> tuple[Fault, Fault, Fault]:
    falling = cu_seqlens.diff() < 0
    return (
        (cu_seqlens[0] != 0, lambda: f"{name} starts at {cu_seqlens[0].item()}, expected 0"),
        (
            falling.any(),
            lambda: (
                f"{name} falls from {cu_seqlens[_first(falling)].item()} to "
                f"{cu_seqlens[_first(falling) + 1].item()} at sequence {_first(falling)}: offsets must not fall"
            ),
        ),
        (
            cu_seqlens[-1] != rows,
            lambda: f"{name} ends at {cu_seqlens[-1].item()}, {of} {'is' if of == 'num_kept' else 'has'} {rows}",
        ),
    )


def _another_maximum(cu_seqlens: Tensor, max_seqlen: int) -> Fault:
    longest = cu_seqlens.diff().amax() if len(cu_seqlens) > 1 else cu_seqlens[0]
    return (
        longest != max_seqlen,
        lambda: f"max_seqlen is {max_seqlen}, the longest sequence of cu_seqlens has {longest.item()} tokens",
    )


def _in_another_sequence(query_indices: Tensor, cu_seqlens_q: Tensor, cu_seqlens: Tensor) -> Fault:
    place = torch.arange(len(query_indices), dtype=torch.int32, device=query_indices.device)
    asked = torch.searchsorted(cu_seqlens_q[1:], place, right=True)
    holds = torch.searchsorted(cu_seqlens[1:], query_indices.int(), right=True)
    wrong = asked != holds
    return (
        wrong.any(),
        lambda: (
            f"query_indices holds {query_indices[_first(wrong)].item()} for sequence {asked[_first(wrong)].item()}, "
            f"but that row belongs to sequence {holds[_first(wrong)].item()}"
        ),
    )


def _first(wrong: Tensor) -> int:
    return int(wrong.int().argmax())
