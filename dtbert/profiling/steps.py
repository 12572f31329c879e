"""What each step must do at the least, from sizes alone: floating-point operations and bytes moved.

FLOPs are two for each multiply-add of a product (projections, attention, scores of keys, span head), as
`LengthSchedule.macs` counts them; LayerNorm, softmax, activations, biases and sorting count as none, so steps made of
these alone are limited by memory. Bytes are the ideal: each input read once, each output written once, nothing
between stored or read again. Offsets (``cu_seqlens``) are left out. What an implementation does beyond that shows as
a lower share of the limit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dtbert.kernels import AttentionScore

_INDEX_BYTES = 8
_SCORE_BYTES = 4


@dataclass(frozen=True)
class Work:
    """Floating-point operations, and bytes read and written."""

    flops: int
    bytes: int

    @property
    def intensity(self) -> float:
        """FLOPs a byte."""
        return self.flops / self.bytes if self.bytes else 0.0


def embed_layer_norm(tokens: int, hidden_size: int, table_rows: Sequence[int], value_bytes: int) -> Work:
    """Ids in, one row of each table per token or the whole table if that is less, states out."""
    rows = sum(min(tokens, table) for table in table_rows) + 2 + tokens
    return Work(0, 3 * _INDEX_BYTES * tokens + rows * hidden_size * value_bytes)


def linear(tokens: int, in_features: int, out_features: int, value_bytes: int) -> Work:
    """A product with bias, with or without an activation: `linear` and `linear_gelu`."""
    values = tokens * (in_features + out_features) + (in_features + 1) * out_features
    return Work(2 * tokens * in_features * out_features, values * value_bytes)


def linear_add_layer_norm(
    tokens: int, in_features: int, out_features: int, value_bytes: int, *, gathered: bool
) -> Work:
    """A product over the kept tokens, their residual rows, LayerNorm; ``gathered`` reads an index per token."""
    product = linear(tokens, in_features, out_features, value_bytes)
    extra = (tokens + 2) * out_features * value_bytes + (_INDEX_BYTES * tokens if gathered else 0)
    return Work(product.flops, product.bytes + extra)


def attention(
    queries: Sequence[int],
    seqlens: Sequence[int],
    hidden_size: int,
    value_bytes: int,
    *,
    significance: AttentionScore | None = None,
    gathered: bool = False,
) -> Work:
    """Both products of attention, each sequence's queries with its own keys.

    Args:
        queries: tokens of each sequence whose context is computed.
        seqlens: tokens of each sequence.
        hidden_size: H.
        value_bytes: bytes of one value of the states.
        significance: the score returned with the context.
        gathered: the queries are picked by an index.
    """
    asked, tokens = sum(queries), sum(seqlens)
    flops = 4 * hidden_size * _pairs(queries, seqlens)
    moved = (2 * asked + 2 * tokens) * hidden_size * value_bytes + (_INDEX_BYTES * asked if gathered else 0)
    if significance is not None:
        moved += _SCORE_BYTES * tokens
    if significance == "value_norm":
        flops += 2 * tokens * hidden_size
    return Work(flops, moved)


def attention_significance(
    queries: Sequence[int], seqlens: Sequence[int], hidden_size: int, value_bytes: int, kind: AttentionScore
) -> Work:
    """Scores of the keys without a context: the first product, of the queries that the score reads."""
    asked, tokens = sum(queries), sum(seqlens)
    flops = 2 * hidden_size * _pairs(queries, seqlens)
    moved = (asked + tokens) * hidden_size * value_bytes + _SCORE_BYTES * tokens
    if kind == "value_norm":
        flops += 2 * tokens * hidden_size
        moved += tokens * hidden_size * value_bytes
    if kind == "from_question":
        moved += _INDEX_BYTES * tokens
    return Work(flops, moved)


def select_tokens(tokens: int, kept: int) -> Work:
    """A float32 score per token in, an index per kept token out."""
    return Work(0, _SCORE_BYTES * tokens + _INDEX_BYTES * kept)


def restore(kept: int, hidden_size: int, value_bytes: int) -> Work:
    """The kept rows and their indices in, the rows written where they belong; the other rows stay in place."""
    return Work(0, kept * (2 * hidden_size * value_bytes + _INDEX_BYTES))


def _pairs(queries: Sequence[int], seqlens: Sequence[int]) -> int:
    return sum(asked * length for asked, length in zip(queries, seqlens, strict=True))
