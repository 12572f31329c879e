"""The steps on a CPU, compiled for it: products that are finished where they lie in cache, attention with its scores.

`build` compiles them once, where there is a C++ compiler; without that nothing here is used. The steps of `Native` are
for inference; those of training stand beside it.
"""

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dtbert.kernels.backend import SCORE_COSTS, Backend
from dtbert.kernels.cpu import Cpu, multiplies_natively
from dtbert.kernels.int8 import int8_product
from dtbert.kernels.native.compiler import BuildError, build, is_built, library, load, record, verdict
from dtbert.kernels.packing import Kept, Packing
from dtbert.kernels.parameters import LayerNorm, Linear
from dtbert.kernels.reference import Activation, AttentionScore

__all__ = [
    "BuildError",
    "Native",
    "available",
    "build",
    "dropped_attention",
    "dropped_attention_gradient",
    "dropped_norm",
    "dropped_norm_gradient",
    "gelu",
    "gelu_gradient",
    "is_built",
    "library",
    "pays",
    "record",
    "trains",
    "trains_attention",
    "why_not",
]

# As the numbers of both stand in the sources.
_SCORES: dict[str, int] = {
    "": 0,
    "received": 1,
    "received_off_diagonal": 2,
    "received_max": 3,
    "cls": 4,
    "from_question": 5,
    "value_norm": 6,
}
_ACTIVATIONS: dict[Activation | None, int] = {None: 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "silu": 4}
# Of the states, and with int8 of the weights.
_DTYPES = (torch.float32, torch.bfloat16)
# Values that the steps take at a time.
_TILE = 16
# A smaller matrix stays plain.
_LEAST_VALUES = 2**12


class Native(Cpu):
    """The steps of `Cpu`, compiled; what they do not take, `Cpu` does."""

    name = "native"

    def _takes(self, weight: Tensor) -> bool:
        outputs, inputs = weight.shape
        return (
            weight.dtype in (*_DTYPES, torch.int8)
            and weight.numel() >= _LEAST_VALUES
            and outputs % _TILE == inputs % _TILE == 0
        )

    def _lay_out(self, layer: Linear) -> None:
        if layer.bias.dtype not in _DTYPES:  # as that of the states, which the products do not take
            return
        outputs, inputs = layer.weight.shape
        panels = _ops().to_panels(layer.weight.detach().contiguous(), layer.scale)
        layer.lay_out(panels, functools.partial(_from_panels, outputs=outputs, inputs=inputs))

    def linear(self, x: Tensor, layer: Linear, activation: Activation | None = None) -> Tensor:
        panels, bias = layer.weight_and_bias
        if panels.dim() != 1:
            return super().linear(x, layer, activation)
        return _ops().linear(_rows(x), panels, bias, _ACTIVATIONS[activation])

    def keys_and_values(self, x: Tensor, layer: Linear) -> Tensor:
        panels, bias = layer.weight_and_bias
        if not _in_parts(panels, bias):
            return super().keys_and_values(x, layer)
        qkv, x = x.new_empty(len(x), len(bias)), _rows(x)
        _ops().linear_part(x, panels, bias, len(bias) // 3, len(bias), None, qkv)
        return qkv

    def queries(self, x: Tensor, layer: Linear, qkv: Tensor, rows: Tensor | None = None) -> Tensor:
        panels, bias = layer.weight_and_bias
        if _in_parts(panels, bias):
            _ops().linear_part(_rows(x), panels, bias, 0, len(bias) // 3, rows, qkv)
        return qkv

    def add_norm(
        self, x: Tensor, layer: Linear, residual: Tensor, norm: LayerNorm, rows: Tensor | None = None
    ) -> Tensor:
        panels, bias = layer.weight_and_bias
        if panels.dim() != 1:
            return super().add_norm(x, layer, residual, norm, rows)
        operands = _rows(x), panels, bias, _rows(residual)
        return _ops().add_norm(*operands, *norm.weight_and_bias, norm.eps, rows)

    def attention(self, qkv: Tensor, packing: Packing, num_heads: int, queries: Kept | None = None) -> Tensor:
        if not _attends(qkv, num_heads):
            return super().attention(qkv, packing, num_heads, queries)
        return _attention(qkv, packing, num_heads, True, "", None, *_chosen(queries))[0]

    def scored_attention(
        self, qkv: Tensor, packing: Packing, num_heads: int, score: AttentionScore
    ) -> tuple[Tensor, Tensor]:
        if not _attends(qkv, num_heads):
            return super().scored_attention(qkv, packing, num_heads, score)
        return _attention(qkv, packing, num_heads, True, score, None, None, None)

    def significance(
        self, qkv: Tensor, packing: Packing, num_heads: int, score: AttentionScore, segments: Tensor | None = None
    ) -> Tensor:
        if not _attends(qkv, num_heads):
            return super().significance(qkv, packing, num_heads, score, segments)
        return _attention(qkv, packing, num_heads, False, score, segments, None, None)[1]

    def select(self, significance: Tensor, packing: Packing, target: Packing) -> Kept:
        if significance.dtype != torch.float32:
            return super().select(significance, packing, target)
        asked = significance.contiguous(), packing.cu_seqlens, target.cu_seqlens, target.num_tokens
        return Kept(_ops().select(*asked), target)


def dropped_attention(
    qkv: Tensor, packing: Packing, num_heads: int, dropped: float, seed: int, queries: Kept | None = None
) -> tuple[Tensor, Tensor]:
    """`Backend.attention`, some of whose probabilities are dropped, for training.

    Args:
        qkv, packing, num_heads, queries: of `Backend.attention`, where `trains_attention` says so.
        dropped: the part of the probabilities, from 0 to below 1.
        seed: of what is dropped.

    Returns:
        Context ``[T, H]`` or ``[K, H]``, and what its gradient takes: head by head of each sequence its probabilities,
        rows padded to `_TILE`, the dropped ones with a sign.
    """
    asked = _rows(qkv), packing.cu_seqlens, packing.max_seqlen, num_heads
    return _ops().dropped_attention(*asked, dropped, seed, *_chosen(queries))


def dropped_attention_gradient(
    gradient: Tensor,
    qkv: Tensor,
    held: Tensor,
    packing: Packing,
    num_heads: int,
    dropped: float,
    queries: Kept | None = None,
) -> Tensor:
    """The gradient ``[T, 3 * H]`` of ``qkv``, from the context's and what `dropped_attention` held."""
    asked = gradient.contiguous(), _rows(qkv), held, packing.cu_seqlens, packing.max_seqlen, num_heads
    return _ops().dropped_attention_gradient(*asked, dropped, *_chosen(queries))


def dropped_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dropped: float, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm of a sum ``[T, H]``, some of whose values of ``x`` are dropped, for training where `trains` says so.

    Args:
        x, residual: ``[T, H]``.
        weight, bias: ``[H]``, of the same dtype.
        eps: of the norm.
        dropped: the part of the values, from 0 to below 1.
        seed: of what is dropped.

    Returns:
        The norm ``[T, H]``, and what its gradient takes: that before weight and bias, and float32 ``[T]``.
    """
    return _ops().dropped_norm(x.contiguous(), residual.contiguous(), weight, bias, eps, dropped, seed)


def dropped_norm_gradient(
    gradient: Tensor, normed: Tensor, inverses: Tensor, weight: Tensor, dropped: float, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of ``x``, ``residual``, ``weight`` and ``bias``, from the norm's and what `dropped_norm` held."""
    asked = gradient.contiguous(), normed, inverses, weight, dropped, seed
    of_x, of_residual, parts = _ops().dropped_norm_gradient(*asked)
    of_weight, of_bias = parts.sum(0).to(weight.dtype).unbind()
    return of_x, of_residual, of_weight, of_bias


def gelu(x: Tensor) -> Tensor:
    """erf-GELU, elementwise, where `trains` says so."""
    return _ops().gelu(x.contiguous())


def gelu_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient of ``x``, from that of its `gelu`."""
    return _ops().gelu_gradient(gradient.contiguous(), x.contiguous())


def trains(x: Tensor) -> bool:
    """Whether the compiled steps pay for a tensor ``[T, H]``, and take it in training."""
    return x.is_cpu and x.shape[1] % _TILE == 0 and x.dtype in _DTYPES and pays(x.dtype) and _trains_right(x.dtype)


def trains_attention(qkv: Tensor, num_heads: int) -> bool:
    """The same of attention's ``[T, 3 * H]``."""
    return _attends(qkv, num_heads) and trains(qkv)


@functools.cache
def available(dtype: torch.dtype | None = None) -> bool:
    """Whether the compiled steps are here, take a dtype, or any where none is named, and give the right numbers."""
    return load() and any(_right(one) for one in (*_DTYPES, torch.int8) if dtype in (None, one))


@functools.cache
def pays(dtype: torch.dtype | None) -> bool:
    """Whether the compiled steps are here and were measured to be faster on this machine (`dtbert build`)."""
    if dtype is None or not is_built() or verdict().get(str(dtype), math.inf) >= 1:
        return False
    return available(dtype)


def why_not(dtype: torch.dtype) -> str:
    """What keeps the compiled steps from being the default in a dtype."""
    if not is_built():
        return "its steps were not compiled for this torch and processor (run `dtbert build`)"
    if not available(dtype):
        return "this processor has no instructions for it"
    return "`dtbert build` has not found it faster here"


def _right(dtype: torch.dtype) -> bool:
    if dtype == torch.int8:
        return _int8_is_right()
    if not multiplies_natively(dtype):
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.rand(shape, generator=generator).to(dtype) for shape in ((5, 48), (80, 48), (80,)))
    want = F.gelu(F.linear(x.float(), weight.float(), bias.float()))
    packing = Packing((3, 2), torch.tensor([0, 3, 5], dtype=torch.int32))
    try:
        got = _ops().linear(x, _ops().to_panels(weight, None), bias, _ACTIVATIONS["gelu"])
        context, _ = _attention(x, packing, 1, True, "received", None, None, None)
    except RuntimeError:  # an instruction that this processor lacks
        return False
    tolerance = 16 * torch.finfo(dtype).eps
    expected = Backend().attention(x.float(), packing, 1)
    return all(
        torch.allclose(one.float(), other, rtol=tolerance, atol=tolerance)
        for one, other in ((got, want), (context, expected))
    )


@functools.cache
def _trains_right(dtype: torch.dtype) -> bool:
    """Whether the gradients of the steps for training are those of plain ones."""
    x = torch.rand((5, 48), generator=torch.Generator().manual_seed(0)).to(dtype)
    packing, weights = Packing((3, 2), torch.tensor([0, 3, 5], dtype=torch.int32)), x[:, :16].contiguous()
    try:
        context, held = dropped_attention(x, packing, 1, 0.0, 0)
        of_qkv = dropped_attention_gradient(weights, x, held, packing, 1, 0.0)
    except RuntimeError:  # an instruction that this processor lacks
        return False
    _, normed, inverses = dropped_norm(weights, weights, weights[0], weights[1], 1e-5, 0.0, 0)
    of_part = dropped_norm_gradient(weights, normed, inverses, weights[0], 0.0, 0)[0]
    found = context, of_qkv, of_part, gelu_gradient(x, x)
    with torch.enable_grad():
        qkv, part, wide = (one.detach().float().requires_grad_() for one in (x, weights, x))
        plain = (
            Backend().attention(qkv, packing, 1),
            F.layer_norm(part + weights, (16,), *weights[:2].float()),
            F.gelu(wide),
        )
        losses = ((one * by.float()).sum() for one, by in zip(plain, (weights, weights, x), strict=True))
        wanted = [torch.autograd.grad(loss, of)[0] for loss, of in zip(losses, (qkv, part, wide), strict=True)]
    tolerance = 16 * torch.finfo(dtype).eps
    return all(
        torch.allclose(one.float(), other, rtol=tolerance, atol=tolerance)
        for one, other in zip(found, (plain[0], *wanted), strict=True)
    )


def _int8_is_right() -> bool:
    generator = torch.Generator().manual_seed(0)
    x, bias = torch.randn((5, 48), generator=generator), torch.randn(80, generator=generator)
    values, scale = torch.randint(-127, 128, (80, 48), generator=generator, dtype=torch.int8), bias.abs()
    try:
        got = _ops().linear(x, _ops().to_panels(values, scale), bias, _ACTIVATIONS[None])
    except RuntimeError:  # no instructions for it
        return False
    return torch.allclose(got, int8_product(x, values, scale, bias), rtol=1e-4, atol=1e-3)


def _attends(qkv: Tensor, num_heads: int) -> bool:
    head_size = qkv.shape[1] // (3 * num_heads)
    return qkv.dtype in _DTYPES and head_size % _TILE == 0


def _in_parts(panels: Tensor, bias: Tensor) -> bool:
    """Whether the panels of a layer's queries hold nothing else."""
    return panels.dim() == 1 and SCORE_COSTS["native"].computes_kept_queries(len(bias) // 3)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _chosen(queries: Kept | None) -> tuple[Tensor | None, Tensor | None]:
    """Rows of the queries, and where each sequence's begin; None: all."""
    return (None, None) if queries is None else (queries.rows, queries.packing.cu_seqlens)


def _ops() -> Any:
    return torch.ops.dtbert_native


def _attention(
    qkv: Tensor,
    packing: Packing,
    num_heads: int,
    with_context: bool,
    score: str,
    segments: Tensor | None,
    rows: Tensor | None,
    cu_rows: Tensor | None,
) -> tuple[Tensor, Tensor]:
    asked = _rows(qkv), packing.cu_seqlens, packing.max_seqlen, num_heads, with_context, _SCORES[score]
    return _ops().attention(*asked, segments, rows, cu_rows)


def _from_panels(panels: Tensor, outputs: int, inputs: int) -> Tensor:
    return _ops().from_panels(panels, outputs, inputs)
