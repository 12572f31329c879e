"""The compiled steps as autograd takes them: what training on a CPU does where `dtbert build` found them faster."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dtbert.kernels import Kept, Packing, native
from dtbert.kernels.parameters import LayerNorm
from dtbert.training.dropout import rounded


def attention(qkv: Tensor, packing: Packing, num_heads: int, probability: float, queries: Kept | None) -> Tensor:
    """`Backend.attention`, some of whose probabilities are dropped, of what `native.trains_attention`."""
    return cast(Tensor, _Attention.apply(qkv, packing, num_heads, probability, queries))  # type: ignore[no-untyped-call]


def add_norm(x: Tensor, residual: Tensor, norm: LayerNorm, probability: float) -> Tensor:
    """``LayerNorm(dropout(x) + residual)`` of ``[T, H]``, of what `native.trains`."""
    return cast(Tensor, _AddNorm.apply(x, residual, norm.weight, norm.bias, norm.eps, probability))  # type: ignore[no-untyped-call]


def gelu(x: Tensor) -> Tensor:
    """erf-GELU, of what `native.trains`."""
    return cast(Tensor, _Gelu.apply(x))  # type: ignore[no-untyped-call]


def _drawn(probability: float) -> tuple[float, int]:
    """The part that is dropped, as `dropout` rounds it, and a seed, for which torch is asked where any is."""
    dropped = 1 - 1 / rounded(probability)[1]
    return dropped, int(torch.randint(2**63 - 1, ())) if dropped else 0


class _Attention(torch.autograd.Function):
    """As `dtbert.training.attention` by sequences, with the same held."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, packing: Packing, num_heads: int, probability: float, queries: Kept | None
    ) -> Tensor:
        dropped, seed = _drawn(probability)
        context, held = native.dropped_attention(qkv, packing, num_heads, dropped, seed, queries)
        ctx.save_for_backward(qkv, held)
        ctx.asked = packing, num_heads, dropped, queries
        return context

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return native.dropped_attention_gradient(gradient, *ctx.saved_tensors, *ctx.asked), None, None, None, None


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, probability: float
    ) -> Tensor:
        ctx.dropped, ctx.seed = _drawn(probability)
        out, *held = native.dropped_norm(x, residual, weight, bias, eps, ctx.dropped, ctx.seed)
        ctx.save_for_backward(*held, weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        normed, inverses, weight = ctx.saved_tensors
        found = native.dropped_norm_gradient(gradient, normed, inverses, weight, ctx.dropped, ctx.seed)
        return *found, None, None


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return native.gelu(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return native.gelu_gradient(gradient, *ctx.saved_tensors)
