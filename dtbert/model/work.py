"""What a forward costs, from sizes alone: multiply-accumulates of a schedule, FLOPs and bytes of each step.

FLOPs are two for each multiply-add of a product (projections, attention, scores of keys, span head). LayerNorm,
softmax, activations, biases and sorting count as none, so steps made of these alone are limited by memory. Bytes are
the ideal: each input read once, each output written once, nothing between stored or read again. Offsets
(``cu_seqlens``) are left out. What an implementation does beyond that shows as a lower share of the limit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from dtbert.kernels import (
    SCORE_COSTS,
    Activation,
    AttentionScore,
    BackendName,
    Kept,
    Left,
    Packing,
    Partials,
    ScoreCost,
    TokenIds,
)
from dtbert.kernels.parameters import Embeddings, LayerNorm, Linear
from dtbert.model.config import BertConfig
from dtbert.model.scorers import ScoredTokens, scorer_named

if TYPE_CHECKING:
    from dtbert.model.policy import Policy

_INDEX_BYTES = 8
_SCORE_BYTES = 4


class Macs(NamedTuple):
    """Multiply-accumulates of one sequence.

    ``published`` is the count of the literature (torchprofile's, there called FLOPs); ``executed`` what dtbert
    computes, which is less because dropped rows skip the attention output projection, and with some scorers the
    attention too, on some backends their queries with it.
    """

    published: int
    executed: int


def macs_of(
    policy: "Policy",
    config: BertConfig,
    lengths: Sequence[int],
    scored: Sequence[bool],
    question_length: int | None = None,
    backend: BackendName = "cpu",
    head: int | None = None,
) -> Macs:
    """`LengthSchedule.macs`, of arguments that fit each other.

    Args:
        policy: its scorers, and the layers that it leaves out, which cost nothing.
        config: the model's sizes.
        lengths: tokens that enter the first layer, then those that leave each.
        scored: whether each layer asks the scorer.
        question_length, backend: as `LengthSchedule.macs`.
        head: the head's own; by default the span head's.
    """
    d, f = config.hidden_size, config.intermediate_size
    if head is None:
        head = 2 * (d + 1) * lengths[0]
    published = executed = d * lengths[0] + head
    for layer, (before, kept) in enumerate(pairwise(lengths)):
        if layer in policy.skip_layers:
            continue
        shared = 2 * kept * d * f + d * (before + kept)
        published += 4 * before * d * d + 2 * before * before * d + shared
        scorer, cost = scorer_named(policy.scorers[layer]), SCORE_COSTS[backend]
        # A layer where nothing goes has the queries of all tokens.
        projected = kept if cost.computes_kept_queries(d) and not scorer.reads_queries else before
        executed += (2 * before + projected + kept) * d * d + shared
        queries = before if kept == before or scorer.with_context else kept
        executed += 2 * queries * before * d
        if scored[layer]:
            question = before if question_length is None else question_length
            executed += scorer.macs(ScoredTokens(before, question, d), cost)
    return Macs(published, executed)


@dataclass(frozen=True)
class Work:
    """Floating-point operations, and bytes read and written."""

    flops: int
    bytes: int

    @property
    def intensity(self) -> float:
        """FLOPs a byte."""
        return self.flops / self.bytes if self.bytes else 0.0


class StepWork:
    """The work of each step of a backend: methods of its names and arguments, read before or after the step runs.

    Args:
        cost: the backend's, of scores: its own products count.
    """

    def __init__(self, cost: ScoreCost) -> None:
        self._cost = cost

    def embed(self, ids: TokenIds, tables: Embeddings) -> Work:
        """Ids in, one row of each table per token or the whole table if that is less, states out."""
        tokens, (_, hidden_size) = len(ids.input_ids), tables.word.shape
        rows = sum(min(tokens, len(table)) for table in (tables.word, tables.position, tables.token_type)) + 2 + tokens
        return Work(0, 3 * _INDEX_BYTES * tokens + rows * hidden_size * tables.word.element_size())

    def linear(self, x: Tensor, layer: Linear, activation: Activation | None = None) -> Work:
        """A product with bias, with or without an activation."""
        # Not of the weight, which a backend may hold in a layout of its own.
        return self._part(len(x), x.shape[1], len(layer.bias), layer)

    def leaves_queries_out(self, x: Tensor) -> bool:
        """Whether `keys_and_values` of such states has no queries yet."""
        return self._cost.computes_kept_queries(x.shape[1])

    def keys_and_values(self, x: Tensor, layer: Linear) -> Work:
        """`linear`, without the queries where the backend computes these of the kept tokens alone."""
        if not self.leaves_queries_out(x):
            return self.linear(x, layer)
        return self._part(len(x), x.shape[1], 2 * x.shape[1], layer)

    def queries(self, x: Tensor, layer: Linear, qkv: Tensor, rows: Tensor | None = None) -> Work:
        """The queries that `keys_and_values` left out, of some rows or all."""
        if not self.leaves_queries_out(x):
            return Work(0, 0)
        return self._part(len(x) if rows is None else len(rows), x.shape[1], x.shape[1], layer)

    def _part(self, tokens: int, in_features: int, out_features: int, layer: Linear) -> Work:
        states = (tokens * (in_features + out_features) + out_features) * layer.bias.element_size()
        weights = in_features * out_features * layer.weight.element_size()
        return Work(2 * tokens * in_features * out_features, states + weights)

    def add_norm(self, x: Tensor, layer: Linear, residual: Tensor, norm: LayerNorm, rows: Tensor | None = None) -> Work:
        """A product over the kept tokens, their residual rows, LayerNorm; ``rows`` are an index per token."""
        product, tokens = self.linear(x, layer), len(x)
        extra = (tokens + 2) * len(layer.bias) * layer.bias.element_size() + (
            0 if rows is None else _INDEX_BYTES * tokens
        )
        return Work(product.flops, product.bytes + extra)

    def attention(self, qkv: Tensor, packing: Packing, num_heads: int, queries: Kept | None = None) -> Work:
        """Both products of attention, each sequence's queries with its own keys."""
        hidden_size, asked = qkv.shape[1] // 3, packing if queries is None else queries.packing
        moved = 2 * (asked.num_tokens + packing.num_tokens) * hidden_size * qkv.element_size()
        if queries is not None:
            moved += _INDEX_BYTES * asked.num_tokens
        return Work(4 * hidden_size * _pairs(asked.seqlens, packing.seqlens), moved)

    def scored_attention(self, qkv: Tensor, packing: Packing, num_heads: int, score: AttentionScore) -> Work:
        """Attention and a score of the keys."""
        plain, hidden_size = self.attention(qkv, packing, num_heads), qkv.shape[1] // 3
        scorer = scorer_named(score)
        macs = sum(scorer.macs(ScoredTokens(length, length, hidden_size), self._cost) for length in packing.seqlens)
        return Work(plain.flops + 2 * macs, plain.bytes + _SCORE_BYTES * packing.num_tokens)

    def partial_attention(self, qkv: Tensor, packing: Packing, num_heads: int, score: AttentionScore) -> Work:
        """`scored_attention`: that the parts of a score are written and read is an implementation's."""
        return self.scored_attention(qkv, packing, num_heads, score)

    def significance(
        self, qkv: Tensor, packing: Packing, num_heads: int, score: AttentionScore, segments: Tensor | None = None
    ) -> Work:
        """Scores of the keys without a context: the first product, of the queries that the score reads."""
        hidden_size, tokens = qkv.shape[1] // 3, packing.num_tokens
        seqlens = asked = packing.seqlens
        if self._cost.own_queries and score == "cls":
            asked = tuple(min(1, length) for length in seqlens)
        elif self._cost.own_queries and segments is not None:
            asked = tuple(int((own == 0).sum()) for own in segments.split(list(seqlens)))
        looks = 1 if score == "cls" else self._cost.looks
        flops = 2 * looks * hidden_size * _pairs(asked, seqlens)
        values = (sum(asked) + tokens) * hidden_size
        if score == "value_norm":
            flops += 2 * tokens * hidden_size
            values += tokens * hidden_size
        indices = _INDEX_BYTES * tokens if score == "from_question" else 0
        return Work(flops, values * qkv.element_size() + _SCORE_BYTES * tokens + indices)

    def select(self, significance: Tensor, packing: Packing, target: Packing) -> Work:
        """A float32 score per token in, an index per kept token out."""
        return Work(0, _SCORE_BYTES * packing.num_tokens + _INDEX_BYTES * target.num_tokens)

    def drop(
        self,
        left: Left,
        target: Packing,
        significance: Tensor | Partials,
        states: Tensor,
        context: Tensor | None = None,
    ) -> Work:
        """`select`; a context's kept rows moved together, and from the second time on the other states put aside."""
        kept, row = target.num_tokens, states.shape[1] * states.element_size()
        moved = 0 if context is None else 2 * kept * row
        if left.final is not None:
            moved += 2 * (left.packing.num_tokens - kept) * row + _INDEX_BYTES * (left.packing.num_tokens + kept)
        if left.segments is not None:
            moved += _INDEX_BYTES * left.packing.num_tokens
        return Work(0, _SCORE_BYTES * left.packing.num_tokens + _INDEX_BYTES * kept + moved)

    def scatter(self, final: Tensor, rows: Tensor, states: Tensor) -> Work:
        """The kept rows and their indices in, the rows written where they belong; the other rows stay in place."""
        return Work(0, len(rows) * (2 * states.shape[1] * states.element_size() + _INDEX_BYTES))


def _pairs(queries: Sequence[int], seqlens: Sequence[int]) -> int:
    return sum(asked * length for asked, length in zip(queries, seqlens, strict=True))
