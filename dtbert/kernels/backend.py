"""The steps of the network, and the one place that chooses who runs them on a device.

`Backend` is the contract and, in plain torch, the specification: any device and dtype, differentiable. Others override
what they do better: `dtbert.kernels.cpu`, `dtbert.kernels.triton`, and training its own with dropout. What the letters
in shapes mean stands in `dtbert.kernels.reference`.
"""

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtbert.kernels.float8 import FLOAT8, float8_product
from dtbert.kernels.int8 import int8_product
from dtbert.kernels.overlap import question_overlap
from dtbert.kernels.packing import Kept, Left, Packing, Partials, TokenIds
from dtbert.kernels.parameters import Embeddings, LayerNorm, Linear
from dtbert.kernels.reference import (
    Activation,
    AttentionScore,
    activate,
    attention_logits,
    highest,
    score_of,
    split_heads,
)

BackendName = Literal["reference", "cpu", "native", "triton"]

_INSTALL = "pip install 'dtbert[triton]'"

logger = logging.getLogger(__name__)


class ScoreCost(NamedTuple):
    """What scoring and choosing cost a backend: products of queries and keys, beside those of the context, and queries.

    Attributes:
        products: those of all queries that a score which comes with the context takes once more.
        looks: how often the products of a score on its own are computed.
        own_queries: whether ``cls`` and ``from_question`` on their own take the queries that they read alone.
        kept_queries: where tokens are chosen by what no query says, the queries of the kept ones alone are computed, at
            hidden sizes that are multiples of this; 0: at none.
    """

    products: int
    looks: int
    own_queries: bool
    kept_queries: int = 0

    def computes_kept_queries(self, hidden_size: int) -> bool:
        """Whether `kept_queries` holds at a hidden size."""
        return self.kept_queries > 0 and hidden_size % self.kept_queries == 0


SCORE_COSTS: dict[BackendName, ScoreCost] = {
    "reference": ScoreCost(0, 1, False),
    "cpu": ScoreCost(0, 1, True),
    "native": ScoreCost(0, 1, True, 64),
    "triton": ScoreCost(1, 2, True),
}


class Backend:
    """The steps, which trust what they are given: whoever calls them directly takes `dtbert.kernels.checked`."""

    name: ClassVar[BackendName] = "reference"
    differentiable: ClassVar[bool] = True

    def prepare(self, model: nn.Module) -> None:
        """Lay out a model's weights for inference, where that makes the steps faster; `Linear.to_plain` undoes it."""

    def embed(self, ids: TokenIds, tables: Embeddings) -> Tensor:
        """LayerNorm of the sum of the three embeddings of each token: ``[T, H]`` in the tables' dtype."""
        norm = tables.norm
        states = F.embedding(ids.input_ids, tables.word) + F.embedding(ids.token_type_ids, tables.token_type)
        states = states + F.embedding(ids.position_ids, tables.position)
        return F.layer_norm(states, norm.weight.shape, norm.weight, norm.bias, norm.eps)

    def linear(self, x: Tensor, layer: Linear, activation: Activation | None = None) -> Tensor:
        """``activation(x @ weight.T + bias)``: ``[T, in]`` to ``[T, out]``."""
        product = product_of(x, layer)
        return product if activation is None else activate(product, activation)

    def keys_and_values(self, x: Tensor, layer: Linear) -> Tensor:
        """``linear(x, layer)`` of the layer ``"qkv"``, ``[T, 3 * H]``, whose queries need not be there.

        Where tokens are chosen by what no query says, those of the kept ones come later: see `queries`.
        """
        return self.linear(x, layer)

    def queries(self, x: Tensor, layer: Linear, qkv: Tensor, rows: Tensor | None = None) -> Tensor:
        """What `keys_and_values` gave, with the queries of some rows, int64 ``[K]``, or of all; it may be changed."""
        return qkv

    def attention(self, qkv: Tensor, packing: Packing, num_heads: int, queries: Kept | None = None) -> Tensor:
        """Attention within each sequence.

        Args:
            qkv: ``[T, 3 * H]``: queries, keys and values side by side, heads contiguous within each.
            packing: of the T tokens.
            num_heads: N.
            queries: tokens whose context is computed; all by default.

        Returns:
            Context ``[T, H]``, or ``[K, H]`` of the chosen queries, in the dtype of ``qkv``.
        """
        asked = packing.slices if queries is None else queries.packing.slices
        contexts = [qkv.new_zeros(0, qkv.shape[1] // 3)]
        for rows, q_rows in zip(packing.slices, asked, strict=True):
            query, key, value = split_heads(qkv[rows], num_heads)
            if queries is not None:
                query = split_heads(qkv[queries.rows[q_rows]], num_heads)[0]
            contexts.append(_context(attention_logits(query, key).softmax(-1), value))
        return torch.cat(contexts)

    def scored_attention(
        self, qkv: Tensor, packing: Packing, num_heads: int, score: AttentionScore
    ) -> tuple[Tensor, Tensor]:
        """`attention` and `significance` from the same probabilities, for a score that reads all queries."""
        contexts = [qkv.new_zeros(0, qkv.shape[1] // 3)]
        scores = [qkv.new_zeros(0, dtype=torch.promote_types(qkv.dtype, torch.float32))]
        for rows in packing.slices:
            query, key, value = split_heads(qkv[rows], num_heads)
            probabilities = attention_logits(query, key).softmax(-1)
            contexts.append(_context(probabilities, value))
            scores.append(score_of(score, probabilities, value))
        return torch.cat(contexts), torch.cat(scores)

    def partial_attention(
        self, qkv: Tensor, packing: Packing, num_heads: int, score: AttentionScore
    ) -> tuple[Tensor, Tensor | Partials]:
        """`scored_attention`, whose significance may be left in parts, for `drop` to sum."""
        return self.scored_attention(qkv, packing, num_heads, score)

    def significance(
        self, qkv: Tensor, packing: Packing, num_heads: int, score: AttentionScore, segments: Tensor | None = None
    ) -> Tensor:
        """A score of each token, float32 ``[T]``: `dtbert.kernels.reference.score_of`.

        ``segments``, int64 ``[T]``, are read by ``from_question`` alone.
        """
        scores = [qkv.new_zeros(0, dtype=torch.promote_types(qkv.dtype, torch.float32))]
        for rows in packing.slices:
            query, key, value = split_heads(qkv[rows], num_heads)
            of_rows = None if segments is None else segments[rows]
            scores.append(score_of(score, attention_logits(query, key).softmax(-1), value, of_rows))
        return torch.cat(scores)

    def add_norm(
        self, x: Tensor, layer: Linear, residual: Tensor, norm: LayerNorm, rows: Tensor | None = None
    ) -> Tensor:
        """``LayerNorm(x @ weight.T + bias + residual[rows])``.

        Args:
            x: ``[K, in]``, rows of the kept tokens alone.
            layer: ``in`` to H.
            residual: ``[T, H]``, rows of all tokens.
            norm: over H.
            rows: int64 ``[K]``, ascending; all by default.

        Returns:
            ``[K, H]``.
        """
        if rows is not None:
            residual = residual.index_select(0, rows)
        summed = product_of(x, layer) + residual
        return F.layer_norm(summed, norm.weight.shape, norm.weight, norm.bias, norm.eps)

    def question_overlap(self, ids: TokenIds, packing: Packing) -> Tensor:
        """How many words of the question stand near each token, float32 ``[T]``, at least 0.

        Each distinct token of segment 0 shares one unit out among its places in segment 1, so one that is everywhere
        says little anywhere. A place counts in full for its own token, and for others the less the further they are,
        down to nothing at `OVERLAP_REACH` tokens. The first and the last token of segment 0, [CLS] and [SEP], ask for
        nothing. 0 for all tokens of a sequence that has one segment.

        Args:
            ids: of a batch as it enters the network; positions ascend in each sequence.
            packing: of the batch.
        """
        return question_overlap(ids, packing)

    def select(self, significance: Tensor, packing: Packing, target: Packing) -> Kept:
        """The tokens of highest significance of each sequence, ties to the lower position, in text order.

        Args:
            significance: float32 ``[T]``.
            packing: the sequences now.
            target: the same sequences afterwards.
        """
        kept = [
            highest(significance[rows], count) + rows.start
            for rows, count in zip(packing.slices, target.seqlens, strict=True)
        ]
        return Kept(torch.cat([significance.new_zeros(0, dtype=torch.int64), *kept]), target)

    def drop(
        self,
        left: Left,
        target: Packing,
        significance: Tensor | Partials,
        states: Tensor,
        context: Tensor | None = None,
    ) -> tuple[Tensor, Left, Tensor | None]:
        """`select`, and what follows from it: the states of the tokens that are not kept become final.

        Args:
            left: the tokens that entered the layer; its ``final`` may be changed in place.
            target: the same sequences afterwards.
            significance: float32 ``[T]``, or what `partial_attention` left in parts.
            states: ``[T, H]``, those that entered the layer, which become the first ``final``.
            context: ``[T, H]``, if the kept tokens' is wanted.

        Returns:
            Rows of the kept tokens among those that entered, int64 ``[K]``; what is left; and their context.
        """
        assert isinstance(significance, Tensor), "parts are for the backend that left them"
        rows = left.rows
        kept = self.select(left.above_all(significance), left.packing, target).rows
        if rows is None or left.final is None:
            left = left._replace(packing=target, rows=kept, final=states)
        else:
            final = self.scatter(left.final, rows, states)
            left = left._replace(packing=target, rows=rows.index_select(0, kept), final=final)
        return kept, left, None if context is None else context.index_select(0, kept)

    def scatter(self, final: Tensor, rows: Tensor, states: Tensor) -> Tensor:
        """``final`` ``[T, H]`` with ``states`` ``[K, H]`` in its ``rows``; in inference in place."""
        return final.index_copy(0, rows, states)


class Sizes(NamedTuple):
    """What a backend must be able to take; None where it is not known.

    Attributes:
        dtype: of the weights, or of the layers' alone where these are held in 8 bit.
        head_size: D.
        hidden_size: H.
        max_seqlen: tokens in the longest sequence.
        sequence_span: values from the start of the longest sequence to its end, with those that lie between its rows.
    """

    dtype: torch.dtype | None = None
    head_size: int | None = None
    hidden_size: int | None = None
    max_seqlen: int | None = None
    sequence_span: int | None = None


def choose_backend(
    device: torch.device | str, name: BackendName | None = None, sizes: Sizes | None = None
) -> BackendName:
    """The name of the backend for a device, or the named one once it is sure to run there.

    Args:
        device: where the tensors are.
        name: ``"reference"``, ``"cpu"``, ``"native"`` or ``"triton"``. By default on a CPU ``"native"``, if it was
            built and measured to be faster (`dtbert build`), else ``"cpu"``; on a GPU ``"triton"``, if it has kernels
            for the sizes and is installed, of which the log warns; else ``"reference"``.
        sizes: what it must take.

    Raises:
        ValueError: the name is unknown, or the backend does not run on the device, with these sizes, or is not
            installed.
    """
    device = torch.device(device)
    if name is None:
        if device.type == "cpu":
            return "native" if sizes is not None and _native_room().pays(sizes.dtype) else "cpu"
        if device.type == "cuda" and not _has_triton():
            _warn_without_triton()
            return "reference"
        return "triton" if device.type == "cuda" and _why_not_triton(device, sizes or Sizes()) is None else "reference"
    if name not in get_args(BackendName):
        raise ValueError(f"unknown backend {name!r}: choose one of {', '.join(get_args(BackendName))}")
    if name == "cpu" and device.type != "cpu":
        raise ValueError(f"the backend 'cpu' needs tensors on the CPU, not on {device}: leave backend out")
    reason = None
    if name == "native":
        reason = _why_not_native(device, sizes or Sizes())
    elif name == "triton":
        reason = _why_not_triton(device, sizes or Sizes())
    if reason is not None:
        raise ValueError(f"the backend {name!r} {reason}")
    return name


def get_backend(device: torch.device | str, name: BackendName | None = None, sizes: Sizes | None = None) -> Backend:
    """The backend that `choose_backend` names; arguments and errors are its own."""
    chosen = choose_backend(device, name, sizes)
    if chosen == "triton" and sizes is not None and sizes.dtype == FLOAT8:
        return cast(Backend, _triton().Float8())
    return _BACKENDS[chosen]()


def product_of(x: Tensor, layer: Linear) -> Tensor:
    """``x @ weight.T + bias`` by torch, for a weight in its own layout, in int8 or in fp8."""
    if layer.scale is not None:
        product = float8_product if layer.scaled_dtype == FLOAT8 else int8_product
        return product(x, layer.plain_weight, layer.scale, layer.bias)
    return F.linear(x, layer.weight, layer.bias)


def _context(probabilities: Tensor, value: Tensor) -> Tensor:
    """``[q, H]`` in the values' dtype."""
    context = probabilities @ value.to(probabilities.dtype)
    return context.transpose(0, 1).flatten(1).to(value.dtype)


def _why_not_triton(device: torch.device, sizes: Sizes) -> str | None:
    if not _has_triton():
        return f"needs triton, which is not installed: {_INSTALL}, or choose the backend 'reference'"
    if device.type not in ("cuda", "cpu"):
        return f"runs on a CUDA or ROCm GPU, not on {device}: leave backend out"
    triton = _triton()
    if device.type == "cpu" and not triton.INTERPRETED:
        return (
            "runs on a GPU, and on the CPU only interpreted, for tests (TRITON_INTERPRET=1 before triton is imported): "
            "move the tensors to a GPU, or leave backend out"
        )
    if sizes.dtype == FLOAT8:
        if (reason := triton.why_not_float8(device)) is not None:
            return f"multiplies in fp8 on an NVIDIA GPU of compute capability 8.9 or more, {reason}: give bfloat16"
    elif sizes.dtype is not None and sizes.dtype not in triton.FLOAT_DTYPES:
        return f"computes in float32, bfloat16 and float16, not in {sizes.dtype}: choose the backend 'reference'"
    for what, size, most in (
        ("heads of at most {:,} values", sizes.head_size, triton.MAX_HEAD_SIZE),
        ("states of at most {:,} values", sizes.hidden_size, triton.MAX_HIDDEN_SIZE),
        ("sequences of at most {:,} tokens", sizes.max_seqlen, triton.MAX_SEQLEN),
        ("sequences that span at most {:,} values", sizes.sequence_span, triton.MAX_SEQUENCE_SPAN),
    ):
        if size is not None and size > most:
            return f"takes {what.format(most)}, not of {size:,}: choose the backend 'reference'"
    return None


def _why_not_native(device: torch.device, sizes: Sizes) -> str | None:
    if device.type != "cpu":
        return f"needs tensors on the CPU, not on {device}: leave backend out"
    native = _native_room()
    if not native.is_built():
        return "was not built for this torch and processor: run `dtbert build`, or leave backend out"
    if not native.available(sizes.dtype):
        return f"does not compute in {sizes.dtype or 'any dtype'} on this processor: leave backend out"
    return None


def _has_triton() -> bool:
    if torch.compiler.is_compiling():
        return _FOUND_TRITON
    try:
        return importlib.util.find_spec("triton") is not None
    except ImportError:  # something forbids it
        return False


# Where torch.compile makes a graph, nobody can look.
_FOUND_TRITON = _has_triton()


@functools.cache
def _warn_without_triton() -> None:
    logger.warning("triton is not installed: on a GPU the plain steps compute, which are slow; %s", _INSTALL)


def _triton() -> Any:
    # Imported when first used: its import takes a second, and triton may be missing. By a statement, which
    # torch.compile follows.
    from dtbert.kernels import triton

    return triton


def _cpu() -> Backend:
    return importlib.import_module("dtbert.kernels.cpu").Cpu()


def _native_room() -> Any:
    return importlib.import_module("dtbert.kernels.native")


def _native() -> Backend:
    return _native_room().Native()


_BACKENDS: dict[BackendName, Callable[[], Backend]] = {
    "reference": Backend,
    "cpu": _cpu,
    "native": _native,
    "triton": lambda: _triton().Triton(),
}
