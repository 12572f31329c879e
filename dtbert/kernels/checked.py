"""The steps as public functions of tensors, which check everything about them before a kernel sees it.

    from dtbert.kernels import attention

    context, significance = attention(qkv, cu_seqlens, max_seqlen, num_heads, significance="received")

What each computes, and the letters in shapes, stand in `dtbert.kernels.Backend` and `dtbert.kernels.reference`. Tensors
are on one device, of one floating dtype and contiguous in their last dimension; sequence b holds the rows
``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``. Every step runs on the backend that `choose_backend` finds for device, dtype
and sizes, on the differentiable `reference` where gradients are needed, or on the one that ``backend`` names. Contents
are checked too, at the cost of waits for the device: a model in a loop calls the backend itself, and attention takes
``check=False``. In a graph of `torch.compile`, which may be whole (``fullgraph=True``), contents are the caller's
promise.

Every step raises TypeError for a wrong dtype and ValueError for shapes, devices, strides or contents that do not fit,
for a backend that does not run there, or for gradients that the named one does not give.
"""

from typing import get_args

import torch
from torch import Tensor

from dtbert.kernels.backend import Backend, BackendName, Sizes, get_backend
from dtbert.kernels.checks import (
    Fault,
    check_contiguous_rows,
    check_integers,
    check_matching,
    check_offsets,
    check_product,
    check_rows,
    check_shape,
    first_true,
    in_another_sequence,
    longer_than,
    not_ascending,
    not_offsets,
    of_right_kinds,
    outside,
    refuse,
)
from dtbert.kernels.packing import Kept, Packing, TokenIds
from dtbert.kernels.parameters import Embeddings, LayerNorm, Linear, of_tensors
from dtbert.kernels.rectangle import packed_attention
from dtbert.kernels.reference import ATTENTION_SCORES, Activation, AttentionScore


@of_right_kinds
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
    """`Backend.embed`: ids are int64 ``[T]``, each a row of its table ``[rows, H]``, the norm's vectors ``[H]``."""
    step = "embed_layer_norm"
    ids = {"input_ids": input_ids, "position_ids": position_ids, "token_type_ids": token_type_ids}
    tables = {"word": word, "position": position, "token_type": token_type}
    norms = {"norm_weight": norm_weight, "norm_bias": norm_bias}
    check_matching(step, **tables, **norms)
    check_shape(step, "word", word, None, None, wanted="rows, hidden size")
    for name, tensor in tables.items():
        check_shape(step, name, tensor, None, word.shape[1], wanted="rows, hidden size")
    for name, tensor in norms.items():
        check_shape(step, name, tensor, word.shape[1], wanted="hidden size")
    check_shape(step, "input_ids", input_ids, None, wanted="tokens")
    for name, tensor in ids.items():
        check_shape(step, name, tensor, input_ids.shape[0], wanted="tokens")
    check_integers(step, word, torch.int64, **ids)
    rows = zip(ids.items(), tables.values(), strict=True)
    refuse(step, *(outside(name, tensor, table.shape[0]) for (name, tensor), table in rows))
    chosen = _backend(step, backend, *tables.values(), *norms.values(), hidden_size=word.shape[1])
    norm = of_tensors(LayerNorm, weight=norm_weight, bias=norm_bias, eps=eps)
    return chosen.embed(TokenIds(input_ids, token_type_ids, position_ids), of_tensors(Embeddings, **tables, norm=norm))


@of_right_kinds
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: BackendName | None = None) -> Tensor:
    """``x @ weight.T + bias``: ``[T, in]`` and ``[out, in]`` to ``[T, out]``."""
    check_product("linear", x, weight, bias)
    return _backend("linear", backend, x, weight, bias).linear(x, of_tensors(Linear, weight=weight, bias=bias))


@of_right_kinds
def linear_gelu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Activation = "gelu",
    *,
    backend: BackendName | None = None,
) -> Tensor:
    """`linear` with an activation: ``"gelu"`` (erf), ``"gelu_tanh"``, ``"relu"`` or ``"silu"``."""
    check_product("linear_gelu", x, weight, bias)
    if activation not in get_args(Activation):
        choices = ", ".join(get_args(Activation))
        raise ValueError(f"linear_gelu: unknown activation {activation!r}: choose one of {choices}")
    layer = of_tensors(Linear, weight=weight, bias=bias)
    return _backend("linear_gelu", backend, x, weight, bias).linear(x, layer, activation)


@of_right_kinds
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
    """`Backend.add_norm`: ``LayerNorm(x @ weight.T + bias + residual[keep_indices])``.

    ``x`` is ``[K, in]``, ``weight`` ``[H, in]``, ``residual`` ``[T, H]``, the vectors ``[H]``; ``keep_indices``, int64
    ``[K]``, ascend, and without them K is T. Returns ``[K, H]``.
    """
    step = "linear_add_layer_norm"
    check_product(step, x, weight, bias)
    check_matching(step, x=x, residual=residual, norm_weight=norm_weight, norm_bias=norm_bias)
    hidden_size = weight.shape[0]
    for name, tensor in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        check_shape(step, name, tensor, hidden_size, wanted="hidden size")
    tokens = x.shape[0] if keep_indices is None else None
    check_shape(step, "residual", residual, tokens, hidden_size, wanted="tokens, hidden size")
    if keep_indices is not None:
        check_rows(step, "keep_indices", keep_indices, x.shape[0], residual)
        refuse(step, *not_ascending("keep_indices", keep_indices, residual.shape[0]))
    chosen = _backend(step, backend, x, weight, bias, residual, norm_weight, norm_bias, hidden_size=hidden_size)
    norm = of_tensors(LayerNorm, weight=norm_weight, bias=norm_bias, eps=eps)
    return chosen.add_norm(x, of_tensors(Linear, weight=weight, bias=bias), residual, norm, keep_indices)


@of_right_kinds
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
    check: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Attention within each sequence and, when asked, the significance of each key, with no matrix in memory on a GPU.

    Args:
        qkv: ``[T, 3 * H]``: queries, keys and values side by side, heads contiguous within each.
        cu_seqlens: int32 ``[B + 1]``; empty sequences are allowed.
        max_seqlen: tokens in the longest sequence, or more.
        num_heads: N.
        significance: which score of the keys to return with the context: see `attention_significance`.
        token_type_ids: int64 ``[T]``, needed by the score ``from_question`` alone: the queries of segment 0.
        query_indices: int64 ``[K]``, ascending rows: compute the context of these queries alone.
            Not together with ``significance``, which needs every query.
        cu_seqlens_q: int32 ``[B + 1]``, where each sequence's queries begin in ``query_indices``.
        backend: the kernels; by device, dtype and sizes if left out.
        check: look at what offsets and indices hold; False: they are the caller's promise, and nothing waits for the
            device. A wrong one gives numbers that mean nothing, and a row that there is not may end the process.

    Returns:
        Context ``[T, H]`` (``[K, H]`` with ``query_indices``) in the dtype of ``qkv``, and float32 significance
        ``[T]`` or None. Softmax and sums are float32.
    """
    step = "attention"
    _check_attention(step, qkv, cu_seqlens, num_heads, significance, token_type_ids)
    if (query_indices is None) != (cu_seqlens_q is None):
        raise ValueError(f"{step}: query_indices and cu_seqlens_q belong together: pass both or neither")
    if query_indices is not None and cu_seqlens_q is not None:
        if significance is not None:
            raise ValueError(f"{step}: significance needs every query: leave query_indices out")
        check_rows(step, "query_indices", query_indices, None, qkv)
        check_offsets(step, "cu_seqlens_q", cu_seqlens_q, qkv)
        check_shape(step, "cu_seqlens_q", cu_seqlens_q, len(cu_seqlens), wanted="sequences + 1")
    trusted = _is_trusted(check, qkv)
    if not trusted:
        faults = _attention_faults(qkv, cu_seqlens, max_seqlen)
        if query_indices is not None and cu_seqlens_q is not None:
            faults += [
                *not_offsets("cu_seqlens_q", cu_seqlens_q, "query_indices", len(query_indices)),
                *not_ascending("query_indices", query_indices, len(qkv)),
                in_another_sequence(query_indices, cu_seqlens_q, cu_seqlens),
            ]
        refuse(step, *faults)
    chosen = _attention_backend(step, backend, qkv, max_seqlen, num_heads)
    packing = _packing(cu_seqlens, qkv.shape[0], max_seqlen if trusted else None)
    if trusted and chosen.name != "triton":
        return packed_attention(qkv, packing, num_heads, significance, token_type_ids, query_indices)
    if significance is not None and significance not in ("cls", "from_question"):
        return chosen.scored_attention(qkv, packing, num_heads, significance)
    queries = None
    if query_indices is not None and cu_seqlens_q is not None:
        asked = _packing(cu_seqlens_q, query_indices.shape[0], max_seqlen if trusted else None)
        queries = Kept(query_indices, asked)
    context = chosen.attention(qkv, packing, num_heads, queries)
    if significance is None:
        return context, None
    return context, chosen.significance(qkv, packing, num_heads, significance, token_type_ids)


@of_right_kinds
def attention_significance(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    num_heads: int,
    kind: AttentionScore,
    token_type_ids: Tensor | None = None,
    *,
    backend: BackendName | None = None,
    check: bool = True,
) -> Tensor:
    """Significance of each token as a key, float32 ``[T]``; ``kind`` is one of `dtbert.kernels.reference.score_of`.

    ``check`` is `attention`'s.
    """
    step = "attention_significance"
    _check_attention(step, qkv, cu_seqlens, num_heads, kind, token_type_ids)
    trusted = _is_trusted(check, qkv)
    if not trusted:
        refuse(step, *_attention_faults(qkv, cu_seqlens, max_seqlen))
    chosen = _attention_backend(step, backend, qkv, max_seqlen, num_heads)
    packing = _packing(cu_seqlens, qkv.shape[0], max_seqlen if trusted else None)
    if trusted and chosen.name != "triton":
        significance = packed_attention(qkv, packing, num_heads, kind, token_type_ids)[1]
        assert significance is not None
        return significance
    return chosen.significance(qkv, packing, num_heads, kind, token_type_ids)


@of_right_kinds
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
        max_seqlen: tokens in the longest sequence now, or more.
        backend: the kernels; by device if left out.

    Returns:
        ``keep_indices``, int64 ``[K]``, ascending.
    """
    step = "select_tokens"
    if significance.dtype != torch.float32:
        raise TypeError(f"{step}: significance is {significance.dtype}, expected torch.float32: call .float() on it")
    check_shape(step, "significance", significance, None, wanted="tokens")
    check_contiguous_rows(step, "significance", significance)
    check_offsets(step, "cu_seqlens", cu_seqlens, significance)
    check_offsets(step, "next_cu_seqlens", next_cu_seqlens, significance)
    check_shape(step, "next_cu_seqlens", next_cu_seqlens, len(cu_seqlens), wanted="sequences + 1")
    too_many = next_cu_seqlens.diff() > cu_seqlens.diff()
    refuse(
        step,
        *not_offsets("cu_seqlens", cu_seqlens, "significance", len(significance)),
        *not_offsets("next_cu_seqlens", next_cu_seqlens, "num_kept", num_kept),
        longer_than(cu_seqlens, max_seqlen),
        (
            too_many.any(),
            lambda: f"next_cu_seqlens keeps more tokens than there are in sequence {first_true(too_many)}",
        ),
        (
            significance.isnan().any(),
            lambda: f"significance is NaN at row {first_true(significance.isnan())}: NaN has no rank",
        ),
    )
    chosen = _backend(step, backend, significance, max_seqlen=max_seqlen)
    return chosen.select(significance, _packing(cu_seqlens), _packing(next_cu_seqlens)).rows


@of_right_kinds
def restore(states: Tensor, keep_indices: Tensor, kept_states: Tensor, *, backend: BackendName | None = None) -> Tensor:
    """A copy of ``states`` ``[T, H]`` with the rows ``keep_indices``, int64 ``[K]``, ascending, from ``[K, H]``."""
    step = "restore"
    check_matching(step, states=states, kept_states=kept_states)
    check_shape(step, "states", states, None, None, wanted="tokens, hidden size")
    check_shape(step, "kept_states", kept_states, None, states.shape[1], wanted="kept tokens, hidden size")
    check_rows(step, "keep_indices", keep_indices, kept_states.shape[0], states)
    refuse(step, *not_ascending("keep_indices", keep_indices, len(states)))
    chosen = _backend(step, backend, states, kept_states, hidden_size=states.shape[1])
    return chosen.scatter(states.clone(), keep_indices, kept_states)


def _backend(step: str, name: BackendName | None, *tensors: Tensor | None, **sizes: int) -> Backend:
    present = [tensor for tensor in tensors if tensor is not None]
    needs_gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in present)
    if name is None and (needs_gradients or (torch.compiler.is_compiling() and present[0].is_cpu)):
        # No graph can be made of what the backends of a CPU do.
        name = "reference"
    chosen = get_backend(present[0].device, name, Sizes(present[0].dtype, **sizes))
    if needs_gradients and not chosen.differentiable:
        raise ValueError(
            f"{step}: gradients are needed, the backend {name!r} is forward only: "
            "call it under torch.no_grad(), or choose the backend 'reference'"
        )
    return chosen


def _attention_backend(step: str, name: BackendName | None, qkv: Tensor, max_seqlen: int, num_heads: int) -> Backend:
    hidden_size = qkv.shape[1] // 3
    return _backend(
        step,
        name,
        qkv,
        head_size=hidden_size // num_heads,
        hidden_size=hidden_size,
        max_seqlen=max_seqlen,
        sequence_span=max_seqlen * qkv.stride(0),
    )


def _is_trusted(check: bool, tensor: Tensor) -> bool:
    """Whether contents are the caller's promise; on a CPU nothing waits for a look at them, but a graph has none."""
    return torch.compiler.is_compiling() or not (check or tensor.is_cpu)


def _packing(cu_seqlens: Tensor, num_tokens: int = 0, trusted_max_seqlen: int | None = None) -> Packing:
    """The packing, its lengths read from the device; where a longest one is trusted, nothing is read."""
    if trusted_max_seqlen is None:
        return Packing(cu_seqlens.diff().tolist(), cu_seqlens)
    return Packing.on_device(cu_seqlens, num_tokens, trusted_max_seqlen)


def _check_attention(
    step: str,
    qkv: Tensor,
    cu_seqlens: Tensor,
    num_heads: int,
    kind: AttentionScore | None,
    token_type_ids: Tensor | None,
) -> None:
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
        check_shape(step, "token_type_ids", token_type_ids, qkv.shape[0], wanted="tokens")
        check_integers(step, qkv, torch.int64, token_type_ids=token_type_ids)


def _attention_faults(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> list[Fault]:
    return [*not_offsets("cu_seqlens", cu_seqlens, "qkv", len(qkv)), longer_than(cu_seqlens, max_seqlen)]
