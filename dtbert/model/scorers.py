"""Scorers: which tokens matter to a layer. One is a function from what the layer has at hand to a float per token.

def shortest_first(view: LayerView) -> Tensor:
    return -view.position_ids.float()

register_scorer("shortest_first", shortest_first)
schedule = LengthSchedule.ratios([1, 1, 0.8, 0.6, 0.4, 0.2], scorer="shortest_first")
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dtbert.kernels import ATTENTION_SCORES, AttentionScore, Backend
from dtbert.model.overlap import question_overlap
from dtbert.model.packing import PackedBatch

# These need every query of the layer, so they come with the context, in one pass of the kernel.
SCORES_WITH_CONTEXT: frozenset[AttentionScore] = frozenset(
    ("received", "received_off_diagonal", "received_max", "value_norm")
)

# These read `PackedBatch.overlap`, which is of the whole text: computed once, before the first layer.
SCORES_BY_OVERLAP = frozenset(("overlap", "answer_overlap"))


@dataclass(frozen=True)
class LayerView:
    """What a layer has at hand when it chooses among its T tokens.

    Attributes:
        layer: 0-based index of the layer.
        hidden_states: ``[T, H]``, the states that entered the layer.
        qkv: ``[T, 3 * H]``, their queries, keys and values side by side.
        batch: ids, segments, original positions and lengths of the tokens that are still there.
        num_heads: N.
    """

    layer: int
    hidden_states: Tensor
    qkv: Tensor
    batch: PackedBatch
    num_heads: int
    backend: Backend
    span_head: Callable[[Tensor], Tensor] | None

    @property
    def token_type_ids(self) -> Tensor:
        """int64 ``[T]``; 0 is the question's segment."""
        return self.batch.token_type_ids

    @property
    def position_ids(self) -> Tensor:
        """int64 ``[T]``: each token's place in its original sequence."""
        return self.batch.position_ids

    def attention(self, kind: AttentionScore) -> Tensor:
        """An attention-based score, float32 ``[T]``, computed without a stored matrix."""
        packing = self.batch.packing
        return self.backend.attention_significance(
            self.qkv, packing.cu_seqlens, packing.max_seqlen, self.num_heads, kind, self.token_type_ids
        )

    def span_logits(self) -> Tensor:
        """The span head applied to the layer's own states: ``[T, 2]``, start and end.

        Raises:
            ValueError: the model has no span head.
        """
        if self.span_head is None:
            raise ValueError("this scorer reads the span head, which a bare encoder does not have")
        return self.span_head(self.hidden_states)

    def question_overlap(self) -> Tensor:
        """How many words of the question stand near each token, float32 ``[T]``: `dtbert.model.question_overlap`.

        Of the whole text where the schedule has a scorer that reads it, else of the tokens that are still there.
        """
        return question_overlap(self.batch) if self.batch.overlap is None else self.batch.overlap


Scorer = Callable[[LayerView], Tensor]


def _answer(view: LayerView) -> Tensor:
    return view.span_logits().float().amax(1)


def _overlap(view: LayerView) -> Tensor:
    return view.question_overlap()


def _answer_overlap(view: LayerView) -> Tensor:
    # As log-probabilities add up: what the state looks like, and where one would look for it.
    return _answer(view) + 2 * (view.question_overlap() + 0.1).log()


def _random(seed: int) -> Scorer:
    def score(view: LayerView) -> Tensor:
        # An integer hash (splitmix64's finaliser, cut to 63 bits), so that a token's score depends on its position,
        # the layer and the seed, and on nothing else in the batch.
        x = view.position_ids + 1000003 * (view.layer + 1) + 7919 * 1000003 * (seed + 1)
        for multiplier, shift in (
            (0x3F58476D1CE4E5B9, 30),
            (0x14D049BB133111EB, 27),
            (0x2545F4914F6CDD1D, 31),
        ):
            x = ((x ^ (x >> shift)) * multiplier) & 0x7FFFFFFFFFFFFFFF
        return (x >> 39).float()  # 24 bits: every value is exact in float32

    return score


_SCORERS: dict[str, Scorer] = {
    "answer": _answer,
    "overlap": _overlap,
    "answer_overlap": _answer_overlap,
    "random": _random(0),
}
BUILT_IN_SCORERS: tuple[str, ...] = (*ATTENTION_SCORES, *_SCORERS)


def register_scorer(name: str, function: Scorer) -> None:
    """Make a scorer available to schedules under a name.

    Args:
        name: how schedules refer to it; registering it again replaces the function.
        function: takes a `LayerView` and returns float32 ``[T]``; the highest scores stay. A token's score must
            not depend on other sequences of the batch.

    Raises:
        ValueError: the name is empty or a built-in scorer's.
        TypeError: the function is not callable.
    """
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"a scorer's name must be a non-empty string, not {name!r}")
    if name in BUILT_IN_SCORERS:
        raise ValueError(f"{name!r} is built in: register yours under another name")
    if not callable(function):
        raise TypeError(f"the scorer {name!r} must be a function of a LayerView, not {type(function).__name__}")
    _SCORERS[name] = function


def available_scorers() -> tuple[str, ...]:
    """Names of the built-in and the registered scorers."""
    return tuple(dict.fromkeys((*BUILT_IN_SCORERS, *_SCORERS)))


def score_tokens(name: str, view: LayerView) -> Tensor:
    """Significance of each token by the named scorer, float32 ``[T]``.

    Raises:
        ValueError: unknown name, or a registered scorer returned another shape, NaN, or a tensor on another device.
    """
    if name in ATTENTION_SCORES:
        return view.attention(name)
    if name not in _SCORERS:
        raise ValueError(f"unknown scorer {name!r}: choose one of {', '.join(available_scorers())}, or register it")
    score = _SCORERS[name](view)
    if name in BUILT_IN_SCORERS:
        return score
    tokens = len(view.hidden_states)
    if not isinstance(score, Tensor) or score.shape != (tokens,) or score.device != view.qkv.device:
        came = f"{list(score.shape)} on {score.device}" if isinstance(score, Tensor) else type(score).__name__
        raise ValueError(
            f"the scorer {name!r} must return one float per token, [{tokens}] on {view.qkv.device}, not {came}"
        )
    if score.isnan().any():
        raise ValueError(f"the scorer {name!r} returned NaN for {int(score.isnan().sum())} of {tokens} tokens")
    return score.to(torch.float32)
