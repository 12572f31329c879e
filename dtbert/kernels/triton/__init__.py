"""The steps on a GPU: Triton kernels, one step per file, and cuBLAS for the products. Inference only.

Importing this package imports triton. With ``TRITON_INTERPRET=1`` set before that, the kernels are interpreted on the
CPU: slow, and for tests alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtbert.kernels.backend import Backend
from dtbert.kernels.packing import Kept, Left, Packing, Partials, TokenIds
from dtbert.kernels.parameters import Embeddings, LayerNorm, Linear
from dtbert.kernels.reference import Activation, AttentionScore
from dtbert.kernels.triton.add_norm import add_norm, add_norm_float8
from dtbert.kernels.triton.attention import MAX_HEAD_SIZE, MAX_SEQUENCE_SPAN, attention, query_block
from dtbert.kernels.triton.embed import embed, embed_float8
from dtbert.kernels.triton.float8 import activated_rows, carrying, rows_of, scaled_linear, why_not_float8
from dtbert.kernels.triton.launch import FLOAT_DTYPES, INTERPRETED
from dtbert.kernels.triton.layer_norm import MAX_HIDDEN_SIZE
from dtbert.kernels.triton.linear import linear
from dtbert.kernels.triton.overlap import question_overlap
from dtbert.kernels.triton.scatter import scatter
from dtbert.kernels.triton.select import MAX_SEQLEN, MAX_SUMMED, drop_again, select

__all__ = [
    "FLOAT_DTYPES",
    "INTERPRETED",
    "MAX_HEAD_SIZE",
    "MAX_HIDDEN_SIZE",
    "MAX_SEQLEN",
    "MAX_SEQUENCE_SPAN",
    "Float8",
    "Triton",
    "why_not_float8",
]


class Triton(Backend):
    """The steps of `Backend` as launches; nothing is read back from the device, and nothing is checked."""

    name = "triton"
    differentiable = False

    def embed(self, ids: TokenIds, tables: Embeddings) -> Tensor:
        norm = tables.norm
        return embed(*ids, tables.word, tables.token_type, tables.position, *norm.weight_and_bias, norm.eps)

    def linear(self, x: Tensor, layer: Linear, activation: Activation | None = None) -> Tensor:
        return linear(x, *layer.weight_and_bias, activation)

    def attention(self, qkv: Tensor, packing: Packing, num_heads: int, queries: Kept | None = None) -> Tensor:
        chosen = (None, None) if queries is None else (queries.rows, queries.packing.cu_seqlens)
        return attention(qkv, packing.cu_seqlens, packing.max_seqlen, num_heads, True, "", None, *chosen)[0]

    def scored_attention(
        self, qkv: Tensor, packing: Packing, num_heads: int, score: AttentionScore
    ) -> tuple[Tensor, Tensor]:
        return attention(qkv, packing.cu_seqlens, packing.max_seqlen, num_heads, True, score, None, None, None)

    def partial_attention(
        self, qkv: Tensor, packing: Packing, num_heads: int, score: AttentionScore
    ) -> tuple[Tensor, Tensor | Partials]:
        # torch.compile does not trace the choice of a configuration, which `query_block` reads.
        if packing.max_seqlen > MAX_SUMMED or torch.compiler.is_compiling():
            return self.scored_attention(qkv, packing, num_heads, score)
        asked = qkv, packing.cu_seqlens, packing.max_seqlen, num_heads, True, score, None, None, None, True
        context, parts = attention(*asked)
        return context, Partials(parts, query_block(qkv, num_heads), score == "received_max")

    def significance(
        self, qkv: Tensor, packing: Packing, num_heads: int, score: AttentionScore, segments: Tensor | None = None
    ) -> Tensor:
        if score != "from_question":
            segments = None
        return attention(qkv, packing.cu_seqlens, packing.max_seqlen, num_heads, False, score, segments, None, None)[1]

    def add_norm(
        self, x: Tensor, layer: Linear, residual: Tensor, norm: LayerNorm, rows: Tensor | None = None
    ) -> Tensor:
        weight, bias = layer.weight_and_bias
        return add_norm(F.linear(x, weight), bias, residual, *norm.weight_and_bias, norm.eps, rows)

    def question_overlap(self, ids: TokenIds, packing: Packing) -> Tensor:
        return question_overlap(*ids, packing.cu_seqlens, packing.max_seqlen)

    def select(self, significance: Tensor, packing: Packing, target: Packing) -> Kept:
        offsets = packing.cu_seqlens, target.cu_seqlens
        return Kept(select(significance, *offsets, packing.max_seqlen, target.num_tokens)[0], target)

    def drop(
        self,
        left: Left,
        target: Packing,
        significance: Tensor | Partials,
        states: Tensor,
        context: Tensor | None = None,
    ) -> tuple[Tensor, Left, Tensor | None]:
        """In one launch: `dtbert.kernels.triton.select`."""
        parts = significance if isinstance(significance, Partials) else Partials(significance, MAX_SEQLEN, False)
        now = left.packing
        scores = parts.values, now.cu_seqlens, target.cu_seqlens
        rest = now.max_seqlen, target.num_tokens, parts.block, parts.maximum, left.keep_first, left.segments, context
        if left.rows is None or left.final is None:
            first = (*scores, *rest)
            rows, kept_context = select(*first)
            left = left._replace(packing=target, rows=rows, final=states)
        else:
            again = (*scores, left.rows, left.final, states, *rest)
            rows, next_rows, kept_context = drop_again(*again)
            left = left._replace(packing=target, rows=next_rows)
        return rows, left, None if context is None else kept_context

    def scatter(self, final: Tensor, rows: Tensor, states: Tensor) -> Tensor:
        scatter(final, rows, states)
        return final


class Float8(Triton):
    """`Triton` for a model whose layers multiply in fp8: a step whose result a product takes writes it in fp8, too.

    The context of attention, which a kernel has head by head, gets its rows in a pass of its own.
    """

    def prepare(self, model: nn.Module) -> None:
        """Nothing to lay out.

        Raises:
            ValueError: the states are not in bfloat16, the one dtype in which torch's product leaves them on all GPUs.
        """
        for module in model.modules():
            if isinstance(module, Linear) and module.scale is not None and module.bias.dtype != torch.bfloat16:
                raise ValueError(
                    f"products in fp8 take and leave states in bfloat16, not in {module.bias.dtype}: load the model "
                    "in that dtype, or leave its dtype as it was loaded"
                )

    def embed(self, ids: TokenIds, tables: Embeddings) -> Tensor:
        norm = tables.norm
        given = *ids, tables.word, tables.token_type, tables.position, *norm.weight_and_bias, norm.eps
        return carrying(*embed_float8(*given))

    def linear(self, x: Tensor, layer: Linear, activation: Activation | None = None) -> Tensor:
        """With an activation the result is in fp8 alone, for `add_norm`."""
        if layer.scale is None:
            return super().linear(x, layer, activation)
        product = scaled_linear(rows_of(x), layer, layer.bias)
        return product if activation is None else activated_rows(product, activation)

    def add_norm(
        self, x: Tensor, layer: Linear, residual: Tensor, norm: LayerNorm, rows: Tensor | None = None
    ) -> Tensor:
        if layer.scale is None:
            return super().add_norm(x, layer, residual, norm, rows)
        product = scaled_linear(rows_of(x), layer, None)
        return carrying(*add_norm_float8(product, layer.bias, residual, *norm.weight_and_bias, norm.eps, rows))
