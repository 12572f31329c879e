"""Scorers: which tokens matter to a layer. One is a function from what the layer has at hand to a float per token.

def shortest_first(view: LayerView) -> Tensor:
    return -view.position_ids.float()

register_scorer("shortest_first", shortest_first)
schedule = LengthSchedule.ratios([1, 1, 0.8, 0.6, 0.4, 0.2], scorer="shortest_first")
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from dtbert.kernels import ATTENTION_SCORES, AttentionScore, Backend, Packing, Partials, ScoreCost
from dtbert.model.batch import PackedBatch

SpanHead = Callable[[Tensor], Tensor]


@dataclass
class LayerView:
    """What a layer has at hand when it chooses among its T tokens.

    Attributes:
        layer: 0-based index of the layer.
        hidden_states: ``[T, H]``, the states that entered the layer.
        qkv: ``[T, 3 * H]``, their queries, keys and values side by side.
        packing: where each sequence lies among the T tokens.
        num_heads: N.
    """

    layer: int
    hidden_states: Tensor
    qkv: Tensor
    packing: Packing
    num_heads: int
    text: "Text" = field(repr=False)
    rows: Tensor | None = field(repr=False)
    backend: Backend = field(repr=False)
    span_head: SpanHead | None = field(repr=False)
    earlier: "Sequence[EarlierScore] | None" = field(default=None, repr=False)

    @property
    def earlier_scores(self) -> tuple[Tensor, ...]:
        """What the layers before said of the tokens that are left, in their order: ``[T]`` each.

        Raises:
            ValueError: the scorer was not registered as one that remembers.
        """
        if self.earlier is None:
            raise ValueError("earlier scores are not kept: register the scorer with remembers=True")
        return tuple(self._left(score.of_batch(self.text.batch)) for score in self.earlier)

    @property
    def accumulated(self) -> Tensor:
        """The sum of `earlier_scores`, float ``[T]``; 0 where there are none."""
        return sum(self.earlier_scores, self.hidden_states.new_zeros(len(self.hidden_states), dtype=torch.float32))

    @property
    def batch(self) -> PackedBatch:
        """Ids, segments and original positions of the tokens that are still there."""
        input_ids = self._left(self.text.batch.input_ids)
        return PackedBatch(input_ids, self.token_type_ids, self.position_ids, self.packing)

    @property
    def token_type_ids(self) -> Tensor:
        """int64 ``[T]``; 0 is the question's segment."""
        return self._left(self.text.batch.token_type_ids)

    @property
    def position_ids(self) -> Tensor:
        """int64 ``[T]``: each token's place in its original sequence."""
        return self._left(self.text.batch.position_ids)

    def attention(self, kind: AttentionScore) -> Tensor:
        """An attention-based score, float32 ``[T]``, computed without a stored matrix.

        Raises:
            ValueError: there is no such score.
        """
        if kind not in ATTENTION_SCORES:
            raise ValueError(f"unknown attention score {kind!r}: choose one of {', '.join(ATTENTION_SCORES)}")
        segments = self.token_type_ids if kind == "from_question" else None
        return self.backend.significance(self.qkv, self.packing, self.num_heads, kind, segments)

    def span_logits(self) -> Tensor:
        """The span head applied to the layer's own states: ``[T, 2]``, start and end.

        Raises:
            ValueError: the model has no span head.
        """
        if self.span_head is None:
            raise ValueError("this scorer reads the span head, which a bare encoder does not have")
        return self.span_head(self.hidden_states)

    def question_overlap(self) -> Tensor:
        """How many words of the question stand near each token, float32 ``[T]``: `dtbert.model.question_overlap`."""
        return self._left(self.text.overlap(self.backend))

    def log_overlap(self) -> Tensor:
        """``(question_overlap() + 0.1).log()``."""
        return self._left(self.text.log_overlap(self.backend))

    def _left(self, values: Tensor) -> Tensor:
        # By `index`, which takes -1: the rows of padding, for which any value will do.
        return values if self.rows is None else values[self.rows]


class EarlierScore(NamedTuple):
    """What a layer said of the tokens that entered it: ``[T]``, and where these stand in the batch; None: all."""

    values: Tensor
    rows: Tensor | None

    def of_batch(self, batch: PackedBatch) -> Tensor:
        """The values where their tokens stand in the batch, 0 elsewhere."""
        if self.rows is None:
            return self.values
        return self.values.new_zeros(batch.packing.num_tokens).index_put_((self.rows,), self.values)


class Text:
    """A batch as it entered the network, and what scorers ask of the whole of it, computed when first asked for."""

    def __init__(self, batch: PackedBatch) -> None:
        self.batch = batch
        self._overlap: Tensor | None = None
        self._log_overlap: Tensor | None = None

    def overlap(self, backend: Backend) -> Tensor:
        if self._overlap is None:
            self._overlap = backend.question_overlap(self.batch.ids, self.batch.packing)
        return self._overlap

    def log_overlap(self, backend: Backend) -> Tensor:
        if self._log_overlap is None:
            self._log_overlap = (self.overlap(backend) + 0.1).log()
        return self._log_overlap


class ScoredTokens(NamedTuple):
    """Of what a layer's scoring is counted: n tokens of which q are the question's, states of H values."""

    tokens: int
    question: int
    hidden_size: int


# Multiply-accumulates of a layer's scoring, on a backend.
Count = Callable[[ScoredTokens, ScoreCost], int]


@dataclass(frozen=True)
class Scorer:
    """A row of the table of scorers.

    Attributes:
        function: what a layer has at hand to significance, float32 ``[T]``.
        attention: the attention score that it is, if it is one.
        with_context: whether it needs every query of the layer, so that it comes with the context, in one pass.
        reads_queries: whether it reads queries at all.
        needs_span_head: whether it reads the span head.
        macs: multiply-accumulates that it takes beside the context's.
        logarithmic: whether it is the logarithm of what policies share out among tokens.
        remembers: whether it reads what was said in the layers before.
        given: the function as somebody registered it.
    """

    function: Callable[[LayerView], Tensor]
    attention: AttentionScore | None = None
    with_context: bool = False
    reads_queries: bool = True
    needs_span_head: bool = False
    macs: Count = lambda sizes, cost: 0
    logarithmic: bool = False
    remembers: bool = False
    given: Callable[[LayerView], Tensor] | None = None


def _answer(view: LayerView) -> Tensor:
    return view.span_logits().amax(1).float()


def _random(view: LayerView) -> Tensor:
    # An integer hash (splitmix64's finaliser, cut to 63 bits), so that a token's score depends on its position and the
    # layer, and on nothing else in the batch.
    x = view.position_ids + 1000003 * (view.layer + 1) + 7919 * 1000003
    for multiplier, shift in ((0x3F58476D1CE4E5B9, 30), (0x14D049BB133111EB, 27), (0x2545F4914F6CDD1D, 31)):
        x = ((x ^ (x >> shift)) * multiplier) & 0x7FFFFFFFFFFFFFFF
    return (x >> 39).float()  # 24 bits: every value is exact in float32


def _attention(score: AttentionScore, macs: Count, *, with_context: bool = False) -> Scorer:
    return Scorer(lambda view: view.attention(score), score, with_context, macs=macs)


def _again(sizes: ScoredTokens, cost: ScoreCost) -> int:
    return cost.products * sizes.tokens**2 * sizes.hidden_size


def _of_queries(sizes: ScoredTokens, cost: ScoreCost, queries: int, looks: int) -> int:
    asked = queries if cost.own_queries else sizes.tokens
    return looks * asked * sizes.tokens * sizes.hidden_size


def _of_span_head(sizes: ScoredTokens, cost: ScoreCost) -> int:
    return 2 * sizes.tokens * sizes.hidden_size


def _answer_overlap(weight: float) -> Scorer:
    # As log-probabilities add up: what the state looks like, and where one would look for it.
    def score(view: LayerView) -> Tensor:
        return torch.add(view.span_logits().amax(1), view.log_overlap(), alpha=weight)

    return Scorer(score, reads_queries=False, needs_span_head=True, macs=_of_span_head, logarithmic=True)


_TABLE: dict[str, Scorer] = {
    "received": _attention("received", _again, with_context=True),
    "received_off_diagonal": _attention("received_off_diagonal", _again, with_context=True),
    "received_max": _attention("received_max", _again, with_context=True),
    "cls": _attention("cls", lambda sizes, cost: _of_queries(sizes, cost, 1, 1)),
    "from_question": _attention(
        "from_question", lambda sizes, cost: _of_queries(sizes, cost, min(sizes.question, sizes.tokens), cost.looks)
    ),
    "value_norm": _attention(
        "value_norm",
        lambda sizes, cost: _again(sizes, cost) + sizes.tokens * sizes.hidden_size,
        with_context=True,
    ),
    "answer": Scorer(_answer, reads_queries=False, needs_span_head=True, macs=_of_span_head, logarithmic=True),
    "overlap": Scorer(LayerView.question_overlap, reads_queries=False),
    "answer_overlap": _answer_overlap(2),
    "answer_overlap_3": _answer_overlap(3),
    "random": Scorer(_random, reads_queries=False),
}
BUILT_IN_SCORERS: tuple[str, ...] = tuple(_TABLE)


def register_scorer(
    name: str,
    function: Callable[[LayerView], Tensor],
    *,
    logarithmic: bool = False,
    remembers: bool = False,
    macs: float | str | Count = 0,
) -> None:
    """Make a scorer available to schedules under a name.

    Args:
        name: how schedules refer to it; registering it again replaces the function.
        function: takes a `LayerView` and returns a float (or an integer) per token, ``[T]``; the highest stay. A
            token's score must not depend on other sequences of the batch.
        logarithmic: whether the scores are logarithms, which a policy that shares their sum out, such as `Threshold`,
            exponentiates; otherwise such a policy wants them to be at least 0.
        remembers: whether it reads `LayerView.earlier_scores`, or their sum `LayerView.accumulated`: then all layers up
            to the last that drops are scored, those that drop nothing included.
        macs: multiply-accumulates that it takes, which ``executed`` counts: a number for each token that is scored; the
            name of a built-in scorer that it asks for, as ``"from_question"`` for ``view.attention("from_question")``;
            or a function of `ScoredTokens` and the backend's `ScoreCost` for a layer. By default none.

    Raises:
        ValueError: the name is empty or a built-in scorer's, or ``macs`` is below 0 or no built-in scorer's name.
        TypeError: the function is not callable, or ``macs`` is neither a number, nor a name, nor callable.
    """
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"a scorer's name must be a non-empty string, not {name!r}")
    if name in BUILT_IN_SCORERS:
        raise ValueError(f"{name!r} is built in: register yours under another name")
    if not callable(function):
        raise TypeError(f"the scorer {name!r} must be a function of a LayerView, not {type(function).__name__}")
    _TABLE[name] = Scorer(
        lambda view: _checked(name, function(view), view),
        macs=_count_of(name, macs),
        logarithmic=logarithmic,
        remembers=remembers,
        given=function,
    )


def make_known(name: str, function: Callable[[LayerView], Tensor]) -> None:
    """Make a function available under a name, as it is registered under another, or by `register_scorer`'s defaults."""
    row = next((row for row in _TABLE.values() if row.given is function), None)
    if row is None:
        register_scorer(name, function)
    else:
        _TABLE[name] = row


def available_scorers() -> tuple[str, ...]:
    """Names of the built-in and the registered scorers."""
    return tuple(_TABLE)


def is_logarithmic(name: str) -> bool:
    """Whether a scorer's significance is the logarithm of what policies share out; ValueError where there is none."""
    return scorer_named(name).logarithmic


def unknown_scorer(name: str) -> str:
    """What is said of a name that no scorer has."""
    return (
        f"unknown scorer {name!r}: choose one of {', '.join(_TABLE)}; or register your own by dtbert.register_scorer, "
        "on the command line by --scorer MODULE:FUNCTION"
    )


def scorer_named(name: str) -> Scorer:
    """The row of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in _TABLE:
        raise ValueError(unknown_scorer(name))
    return _TABLE[name]


def in_order(significance: Tensor | Partials, states: Tensor) -> Tensor | Partials:
    """Significance as a backend takes it: of what float32 would round, numbers of the same order."""
    if isinstance(significance, Partials) or significance.dtype == torch.promote_types(states.dtype, torch.float32):
        return significance
    # Their ranks have the same order, and the same equals.
    return significance.unique(return_inverse=True)[1].float()


def _count_of(name: str, macs: float | str | Count) -> Count:
    if isinstance(macs, str):
        if macs not in BUILT_IN_SCORERS:
            raise ValueError(f"macs of {name!r} names {macs!r}: expected one of {', '.join(BUILT_IN_SCORERS)}")
        row = _TABLE[macs]
        if not row.with_context:
            return row.macs
        # Asked for by another, it comes without a context, and so without the products of one.
        return lambda sizes, cost: (
            _of_queries(sizes, cost, sizes.tokens, cost.looks) + row.macs(sizes, cost._replace(products=0))
        )
    if callable(macs):
        return lambda sizes, cost: _whole(name, macs(sizes, cost))
    _whole(name, macs)
    return lambda sizes, cost: round(macs * sizes.tokens)


def _whole(name: str, macs: float) -> int:
    if not isinstance(macs, int | float) or isinstance(macs, bool):
        raise TypeError(
            f"macs of {name!r} must be a number, a built-in scorer's name or a function that gives one, not {macs!r}"
        )
    if not 0 <= macs < math.inf:
        raise ValueError(f"macs of {name!r} must be at least 0 and finite, not {macs}")
    return round(macs)


def _checked(name: str, score: Tensor, view: LayerView) -> Tensor:
    """What somebody's function returned; ValueError where that is no float per token."""
    tokens = len(view.hidden_states)
    if not isinstance(score, Tensor) or score.shape != (tokens,) or score.device != view.qkv.device:
        came = f"{list(score.shape)} on {score.device}" if isinstance(score, Tensor) else type(score).__name__
        raise ValueError(
            f"the scorer {name!r} must return one float per token, [{tokens}] on {view.qkv.device}, not {came}"
        )
    if score.isnan().any():
        raise ValueError(f"the scorer {name!r} returned NaN for {int(score.isnan().sum())} of {tokens} tokens")
    if score.dtype == torch.bool:
        score = score.long()  # of which sums are counts
    return score.float().contiguous() if score.dtype in (torch.bfloat16, torch.float16) else score.contiguous()
