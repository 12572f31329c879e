"""The steps on a CPU: attention one sequence at a time and, with AVX512, oneDNN products over weights laid out once.

Steps that torch already does well are `Backend`'s own. Everything here is inference only.
"""

import functools
from contextlib import suppress
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtbert.kernels.backend import Backend, BackendName, product_of
from dtbert.kernels.packing import Kept, Packing
from dtbert.kernels.parameters import LayerNorm, Linear
from dtbert.kernels.reference import Activation, AttentionScore, activate, highest, score_of

# oneDNN's names of the activations: (attribute, scalars, algorithm).
_POST_OP: dict[Activation, tuple[str, list[float], str]] = {
    "gelu": ("gelu", [], "none"),
    "gelu_tanh": ("gelu", [], "tanh"),
    "relu": ("relu", [], ""),
    "silu": ("swish", [], ""),
}

_MATRIX_INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16"),
}


# A smaller matrix stays plain: calling oneDNN's operator takes some 30 us, which is what its product takes in all.
_LEAST_VALUES = 2**16
# That a product over a plain matrix takes.
_FEWEST_ROWS = 16


class Cpu(Backend):
    """The steps of `Backend`, for inference.

    Args:
        blocked: whether `prepare` brings weights into oneDNN's blocked layout; by default where that pays.
    """

    name: ClassVar[BackendName] = "cpu"
    differentiable = False

    def __init__(self, blocked: bool | None = None) -> None:
        self._blocked = blocked

    def prepare(self, model: nn.Module) -> None:
        """Bring weights into the layout that the products take, one after another."""
        for module in model.modules():
            if isinstance(module, Linear) and not module.laid_out and self._takes(module.weight):
                with suppress(RuntimeError):  # a graph needs it as it is, which serves too
                    self._lay_out(module)

    def _takes(self, weight: Tensor) -> bool:
        wanted = blocked_pays(weight) if self._blocked is None else self._blocked
        # What is held in 8 bit has a scale, of which oneDNN would know nothing.
        return wanted and weight.element_size() > 1 and has_blocked_products(weight.dtype)

    def _lay_out(self, layer: Linear) -> None:
        layer.lay_out(to_blocked(layer.weight))

    def linear(self, x: Tensor, layer: Linear, activation: Activation | None = None) -> Tensor:
        weight, bias = layer.weight_and_bias
        if weight.is_mkldnn:
            rows = _round_up(len(x))
            post_op = ("none", [], "") if activation is None else _POST_OP[activation]
            product = torch.ops.mkldnn._linear_pointwise.default(_extend(x, rows), weight, bias, *post_op)
            return product[: len(x)]
        product = _plain_product(x, layer)
        if activation is None:
            return product
        return torch.ops.aten.gelu_.default(product) if activation == "gelu" else activate(product, activation)

    def add_norm(
        self, x: Tensor, layer: Linear, residual: Tensor, norm: LayerNorm, rows: Tensor | None = None
    ) -> Tensor:
        if rows is not None:
            residual = residual.index_select(0, rows)
        weight, bias = layer.weight_and_bias
        if weight.is_mkldnn:
            padded = _round_up(len(x))
            operands = _extend(x, padded), _extend(residual, padded)
            # Without the overload's name torch tries the other one first, and takes 0.6 to 2.7 ms to be refused.
            summed = torch.ops.mkldnn._linear_pointwise.binary(*operands, weight, bias, "add")[: len(x)]
        else:
            summed = _plain_product(x, layer).add_(residual)
        weight, bias = norm.weight_and_bias
        return torch.layer_norm(summed, weight.shape, weight, bias, norm.eps)

    def attention(self, qkv: Tensor, packing: Packing, num_heads: int, queries: Kept | None = None) -> Tensor:
        seqlens = packing.seqlens
        if queries is None and len(qkv) and seqlens.count(packing.max_seqlen) == len(seqlens):
            # Of one length: all at once.
            query, key, value = qkv.view(len(seqlens), packing.max_seqlen, 3, num_heads, -1).unbind(2)
            context = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
            return context.transpose(1, 2).reshape(len(qkv), -1)
        query, key, value = _heads(qkv, num_heads)
        slices = asked = packing.slices
        if queries is not None:
            query, asked = query.index_select(0, queries.rows), queries.packing.slices
        context = torch.empty_like(query, memory_format=torch.contiguous_format)
        for rows, q_rows in zip(slices, asked, strict=True):
            q, k, v = query[q_rows].transpose(0, 1), key[rows].transpose(0, 1), value[rows].transpose(0, 1)
            context[q_rows] = F.scaled_dot_product_attention(q[None], k[None], v[None])[0].transpose(0, 1)
        return context.flatten(1)

    def scored_attention(
        self, qkv: Tensor, packing: Packing, num_heads: int, score: AttentionScore
    ) -> tuple[Tensor, Tensor]:
        """One sequence at a time, so that its probabilities stay in cache."""
        query, key, value = _heads(qkv, num_heads)
        context = torch.empty_like(query, memory_format=torch.contiguous_format)
        scores = qkv.new_empty(len(qkv), dtype=torch.float32)
        for rows in packing.slices:
            v = value[rows].transpose(0, 1)
            probabilities = _probabilities(query[rows].transpose(0, 1), key[rows].transpose(0, 1))
            context[rows] = torch.bmm(probabilities.to(v.dtype), v).transpose(0, 1)
            scores[rows] = score_of(score, probabilities, v)
        return context.flatten(1), scores

    def significance(
        self, qkv: Tensor, packing: Packing, num_heads: int, score: AttentionScore, segments: Tensor | None = None
    ) -> Tensor:
        """``cls`` and ``from_question`` compute their own queries alone."""
        query, key, value = _heads(qkv, num_heads)
        scores = qkv.new_empty(len(qkv), dtype=torch.float32)
        for rows in packing.slices:
            asked, summed = query[rows], score
            if score == "cls":
                asked, summed = asked[:1], "received"
            elif score == "from_question":
                assert segments is not None
                asked, summed = asked[segments[rows] == 0], "received"
            probabilities = _probabilities(asked.transpose(0, 1), key[rows].transpose(0, 1))
            scores[rows] = score_of(summed, probabilities, value[rows].transpose(0, 1))
        return scores

    def select(self, significance: Tensor, packing: Packing, target: Packing) -> Kept:
        if len(target.seqlens) == 1:
            return Kept(highest(significance, target.num_tokens), target)
        # All sequences in one sort.
        seqlens, kept = packing.cu_seqlens.diff()[:, None], target.cu_seqlens.diff()[:, None]
        column = torch.arange(packing.max_seqlen)
        real = column < seqlens  # [B, max_seqlen]
        padded = significance.new_full(real.shape, -torch.inf).masked_scatter_(real, significance)
        order = padded.sort(descending=True, stable=True).indices
        keep = torch.zeros_like(real).scatter_(1, order, column < kept)
        return Kept(keep[real].nonzero().squeeze(1), target)

    def scatter(self, final: Tensor, rows: Tensor, states: Tensor) -> Tensor:
        return final.index_copy_(0, rows, states)


@functools.cache
def has_blocked_products(dtype: torch.dtype) -> bool:
    """Whether this build of torch has oneDNN's products over blocked weights, and they give the right numbers."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.rand(shape, generator=generator).to(dtype) for shape in ((3, 16), (32, 16), (32,)))
    try:
        blocked, product = to_blocked(weight), torch.ops.mkldnn._linear_pointwise
        plain = product.default(x, blocked, bias, "none", [], "")
        added = product.binary(x, plain, blocked, bias, "add")
        fused = product.default(x, blocked, bias, "gelu", [], "none")
    except (AttributeError, RuntimeError, TypeError):  # half private operators
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


def computes_natively(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products in ``dtype`` are worth it on a device: `multiplies_natively`, where that is a CPU."""
    return device.type != "cpu" or multiplies_natively(dtype)


def blocked_pays(weight: Tensor) -> bool:
    """Whether products over this weight, activation and residual fused in, are faster in oneDNN's blocked layout.

    With AVX512 they run at up to twice the rate of torch's own. On AVX2 the rates are alike, and oneDNN's fused
    erf-GELU takes 7 times as long as a pass of its own (384 tokens, 768 x 3072).
    """
    return weight.numel() >= _LEAST_VALUES and "AVX512" in torch.backends.cpu.get_cpu_capability()


def to_blocked(weight: Tensor) -> Tensor:
    """A weight ``[out, in]`` in oneDNN's layout, which takes as many bytes; ``to_dense()`` gives the plain one back."""
    return torch.ops.mkldnn._reorder_linear_weight.default(weight.detach().contiguous(), None)


def _plain_product(x: Tensor, layer: Linear) -> Tensor:
    # On Intel with AVX512 MKL has products of its own for fewer rows, whose last bits are others: a short text would
    # have them alone, and not in company.
    return product_of(_extend(x, max(len(x), _FEWEST_ROWS)), layer)[: len(x)]


def _round_up(rows: int) -> int:
    # oneDNN compiles and keeps a program for each number of rows that it meets, and what lies between these in the
    # heap stays with the process: some 8 MB for each, of a 6 x 384 model. A few tens of sizes bound that.
    step = 8 if rows <= 64 else max(16, 1 << (rows - 1).bit_length() - 4)
    return -(-rows // step) * step


def _extend(x: Tensor, rows: int) -> Tensor:
    # The further rows may hold anything, since a product's rows do not mix: those that a product before computed
    # beyond its end serve.
    if rows == len(x):
        return x
    size = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    if x.is_contiguous() and size >= rows * x.shape[1]:
        return x.as_strided((rows, x.shape[1]), x.stride())
    return F.pad(x, (0, 0, 0, rows - len(x)))


def _heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = qkv.unflatten(1, (3, num_heads, -1)).unbind(1)  # each [T, N, D]
    return query, key, value


def _probabilities(query: Tensor, key: Tensor) -> Tensor:
    # float32 [N, q, n]; query and key are [N, q, D] and [N, n, D].
    scale = query.shape[-1] ** -0.5
    if query.dtype == torch.float32:
        scores = torch.baddbmm(query.new_empty(1), query, key.transpose(1, 2), beta=0, alpha=scale)
    else:
        scores = torch.bmm(query, key.transpose(1, 2)).float().mul_(scale)
    return torch.softmax(scores, -1, out=scores)
