"""The steps on a CPU: attention one sequence at a time and, with AVX512, oneDNN products over weights packed once.

Steps that torch already does well are `reference`'s own. Everything here is inference only.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from dtbert.kernels.reference import (
    Activation,
    AttentionScore,
    activate,
    embed_layer_norm,
    score_from_probabilities,
)

__all__ = [
    "attention",
    "attention_significance",
    "embed_layer_norm",
    "linear",
    "linear_add_layer_norm",
    "linear_gelu",
    "multiplies_natively",
    "pack_weight",
    "packing_pays",
    "restore",
    "select_tokens",
]

# oneDNN's names of the activations: (attribute, algorithm).
_POST_OP: dict[Activation, tuple[str, str]] = {
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
}

_MATRIX_INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16"),
}


@functools.cache
def _packs(dtype: torch.dtype) -> bool:
    # The operators are half private: one small product tells whether this build of torch has them and whether
    # they give the right numbers.
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.rand(shape, generator=generator).to(dtype) for shape in ((3, 16), (32, 16), (32,)))
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        plain = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        added = torch.ops.mkldnn._linear_pointwise(x, plain, packed, bias, "add")
        fused = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "gelu", [], "none")
    except (AttributeError, RuntimeError, TypeError):
        return False
    expected = F.linear(x.float(), weight.float(), bias.float())
    tolerance = 16 * torch.finfo(dtype).eps
    return all(
        torch.allclose(got.float(), want, rtol=tolerance, atol=tolerance)
        for got, want in ((plain, expected), (added, 2 * expected), (fused, F.gelu(expected)))
    )


@functools.cache
def multiplies_natively(dtype: torch.dtype) -> bool:
    """Whether this CPU has matrix instructions for ``dtype``; without them torch emulates it, slower than float32."""
    if dtype not in _MATRIX_INSTRUCTIONS:
        return True
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if capabilities.get("architecture") == "x86_64":
        # oneDNN itself calls any AVX512 support of bfloat16, and emulates it.
        return any(capabilities.get(name, False) for name in _MATRIX_INSTRUCTIONS[dtype])
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


@functools.cache
def packing_pays() -> bool:
    """Whether products over packed weights, with activation and residual fused in, are the faster ones here.

    With AVX512 they run at twice the rate of torch's own. On AVX2 the rates are alike, oneDNN's fused erf-GELU takes
    7 times as long as a pass of its own, and a fused residual 90 times (384 tokens, 768 x 3072).
    """
    return "AVX512" in torch.backends.cpu.get_cpu_capability()


def pack_weight(weight: Tensor) -> Tensor:
    """A weight ``[out, in]`` in oneDNN's own layout where that pays, else the weight itself.

    The packed tensor takes as many bytes as the plain one; ``to_dense()`` gives the plain one back.
    """
    if weight.is_mkldnn or weight.device.type != "cpu" or not packing_pays() or not _packs(weight.dtype):
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`reference.linear`; ``weight`` is plain or packed by `pack_weight`."""
    if weight.is_mkldnn:
        return _packed_product(x, weight, bias, "none", "")
    return F.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation = "gelu") -> Tensor:
    """`reference.linear_gelu`; fused into a packed product."""
    if weight.is_mkldnn:
        return _packed_product(x, weight, bias, *_POST_OP[activation])
    product = F.linear(x, weight, bias)
    return torch.ops.aten.gelu_(product) if activation == "gelu" else activate(product, activation)


def _packed_product(x: Tensor, weight: Tensor, bias: Tensor | None, attribute: str, algorithm: str) -> Tensor:
    rows = _round_up(len(x))
    return torch.ops.mkldnn._linear_pointwise(_extend(x, rows), weight, bias, attribute, [], algorithm)[: len(x)]


def _round_up(rows: int) -> int:
    # oneDNN compiles and keeps a program for each number of rows that it meets, and what lies between these in the
    # heap stays with the process: some 8 MB for each, of a 6 x 384 model. A few tens of sizes bound that.
    step = 8 if rows <= 64 else max(16, 1 << (rows - 1).bit_length() - 4)
    return -(-rows // step) * step


def _extend(x: Tensor, rows: int) -> Tensor:
    # The further rows may hold anything, since a product's rows do not mix: those that a product before computed
    # beyond its end serve.
    size = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    if x.is_contiguous() and size >= rows * x.shape[1]:
        return x.as_strided((rows, x.shape[1]), x.stride())
    return F.pad(x, (0, 0, 0, rows - len(x)))


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
    """`reference.linear_add_layer_norm`; the residual is fused into a packed product."""
    if keep_indices is not None:
        residual = residual.index_select(0, keep_indices)
    if weight.is_mkldnn:
        rows = _round_up(len(x))
        operands = _extend(x, rows), _extend(residual, rows)
        summed = torch.ops.mkldnn._linear_pointwise(*operands, weight, bias, "add")[: len(x)]
    else:
        summed = F.linear(x, weight, bias).add_(residual)
    return F.layer_norm(summed, norm_weight.shape, norm_weight, norm_bias, eps)


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
    """`reference.attention`, one sequence at a time so that its probabilities stay in cache."""
    query, key, value = qkv.unflatten(1, (3, num_heads, -1)).unbind(1)  # each [T, N, D]
    if query_indices is not None:
        query = query.index_select(0, query_indices)
    starts = cu_seqlens.tolist()
    asked = starts if cu_seqlens_q is None else cu_seqlens_q.tolist()
    context = torch.empty_like(query, memory_format=torch.contiguous_format)
    scores = None if significance is None else qkv.new_empty(len(qkv), dtype=torch.float32)
    for b in range(len(starts) - 1):
        rows, q_rows = slice(starts[b], starts[b + 1]), slice(asked[b], asked[b + 1])
        q, k, v = query[q_rows].transpose(0, 1), key[rows].transpose(0, 1), value[rows].transpose(0, 1)
        if scores is None:
            context[q_rows] = F.scaled_dot_product_attention(q[None], k[None], v[None])[0].transpose(0, 1)
            continue
        probabilities = _probabilities(q, k)
        context[q_rows] = torch.bmm(probabilities.to(v.dtype), v).transpose(0, 1)
        assert significance is not None
        scores[rows] = score_from_probabilities(
            significance, probabilities, v, None if token_type_ids is None else token_type_ids[rows]
        )
    return context.flatten(1), scores


def attention_significance(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    num_heads: int,
    kind: AttentionScore,
    token_type_ids: Tensor | None = None,
) -> Tensor:
    """`reference.attention_significance`; ``cls`` and ``from_question`` compute their own queries alone."""
    query, key, value = qkv.unflatten(1, (3, num_heads, -1)).unbind(1)
    starts = cu_seqlens.tolist()
    scores = qkv.new_empty(len(qkv), dtype=torch.float32)
    for begin, end in zip(starts, starts[1:], strict=False):
        asked = query[begin:end]
        if kind == "cls":
            asked = asked[:1]
        elif kind == "from_question":
            if token_type_ids is None:
                raise ValueError("the score 'from_question' needs token_type_ids: pass the segment id of every token")
            asked = asked[token_type_ids[begin:end] == 0]
        probabilities = _probabilities(asked.transpose(0, 1), key[begin:end].transpose(0, 1))
        summed = "received" if kind in ("cls", "from_question") else kind
        scores[begin:end] = score_from_probabilities(summed, probabilities, value[begin:end].transpose(0, 1), None)
    return scores


def select_tokens(
    significance: Tensor, cu_seqlens: Tensor, next_cu_seqlens: Tensor, num_kept: int, max_seqlen: int
) -> Tensor:
    """`reference.select_tokens`, all sequences in one sort."""
    seqlens, kept = cu_seqlens.diff()[:, None], next_cu_seqlens.diff()[:, None]
    column = torch.arange(max_seqlen)
    real = column < seqlens  # [B, max_seqlen]
    padded = significance.new_full(real.shape, -torch.inf).masked_scatter_(real, significance)
    order = padded.sort(descending=True, stable=True).indices
    keep = torch.zeros_like(real).scatter_(1, order, column < kept)
    return keep[real].nonzero().squeeze(1)


def restore(states: Tensor, keep_indices: Tensor, kept_states: Tensor) -> Tensor:
    """`reference.restore`, in place: ``states`` is the layer's input, which nobody reads again."""
    return states.index_copy_(0, keep_indices, kept_states)


def _probabilities(query: Tensor, key: Tensor) -> Tensor:
    # float32 [N, q, n]; query and key are [N, q, D] and [N, n, D].
    scale = query.shape[-1] ** -0.5
    if query.dtype == torch.float32:
        scores = torch.baddbmm(query.new_empty(1), query, key.transpose(1, 2), beta=0, alpha=scale)
    else:
        scores = torch.bmm(query, key.transpose(1, 2)).float().mul_(scale)
    return torch.softmax(scores, -1, out=scores)
