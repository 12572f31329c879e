"""LengthDrop: the schedules that a model meets while it learns to do without tokens (Kim and Cho 2021, section 3.2)."""

import math
import random
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from dtbert.model import LengthSchedule


class SubModel(NamedTuple):
    """What one pass leaves out: tokens by a schedule, and whole layers (0-based)."""

    schedule: LengthSchedule
    skip_layers: frozenset[int] = frozenset()


class LengthDrop(NamedTuple):
    """How sub-models are drawn.

    Attributes:
        num_sandwich: random sub-models in a step, besides the full model and the smallest sub-model.
        ratio_bound: a layer drops at most this part of the tokens that enter it: one number in (0, 1) for all layers,
            or one in [0, 1) for each, not all 0.
        layer_dropout: probability with which a random sub-model leaves a layer out, in [0, 1).
        scorers: a sub-model's tokens are chosen by one of these; ``+question`` after a name keeps the question first.
        answer_loss: weight with which the span head learns to read the states that enter each layer, as the scorers
            ``answer`` and ``answer_overlap`` do, from the full model's own logits; 0: it learns the last layer's alone.

    The full model never loses a layer. Lengths are parts of each sequence's own length.
    """

    num_sandwich: int = 2
    ratio_bound: float | Sequence[float] = 0.2
    layer_dropout: float = 0.0
    scorers: Sequence[str] = ("received",)
    answer_loss: float = 0.0

    def check(self) -> None:
        """Raise ValueError where a number is outside its range, or a scorer unknown."""
        if self.num_sandwich < 0:
            raise ValueError(f"num_sandwich must be at least 0, not {self.num_sandwich}")
        if not isinstance(self.ratio_bound, Sequence):
            if not 0 < self.ratio_bound < 1:
                raise ValueError(f"ratio_bound must be above 0 and below 1, not {self.ratio_bound}")
        elif not all(0 <= bound < 1 for bound in self.ratio_bound) or not any(self.ratio_bound):
            raise ValueError(
                f"a ratio_bound for each layer must be at least 0 and below 1, and one above 0, not {self.ratio_bound}"
            )
        if not 0 <= self.answer_loss < math.inf:
            raise ValueError(f"answer_loss must be at least 0, not {self.answer_loss}")
        if not 0 <= self.layer_dropout < 1:
            raise ValueError(f"layer_dropout must be at least 0 and below 1, not {self.layer_dropout}")
        if not self.scorers:
            raise ValueError("scorers is empty: name at least one")
        for scorer in self.scorers:
            _schedule([1.0], scorer)

    def bounds(self, num_layers: int) -> Sequence[float]:
        """The ratio_bound of each layer.

        Raises:
            ValueError: there is one for each layer of another number.
        """
        if not isinstance(self.ratio_bound, Sequence):
            return [self.ratio_bound] * num_layers
        if len(self.ratio_bound) != num_layers:
            raise ValueError(
                f"{len(self.ratio_bound)} ratio_bounds for {num_layers} layers: give one, or one for each layer"
            )
        return self.ratio_bound

    def sub_models(self, num_layers: int, seed: int, step: int) -> list[SubModel]:
        """The sub-models of a step, the smallest last: a pure function of its arguments.

        Each layer keeps a part, drawn uniformly from [1 - ratio_bound, 1], of what the layer before it kept; in the
        smallest sub-model each keeps 1 - ratio_bound.
        """
        bounds = self.bounds(num_layers)
        drawn = random.Random(f"length drop {seed} {step}")
        found = []
        for _ in range(self.num_sandwich):
            ratios = _running_product(drawn.uniform(1 - bound, 1) for bound in bounds)
            skipped = frozenset(layer for layer in range(num_layers) if drawn.random() < self.layer_dropout)
            found.append(SubModel(_schedule(ratios, drawn.choice(self.scorers)), skipped))
        smallest = _running_product(1 - bound for bound in bounds)
        return [*found, SubModel(_schedule(smallest, drawn.choice(self.scorers)))]


def _running_product(factors: Iterable[float]) -> list[float]:
    product, found = 1.0, []
    for factor in factors:
        product *= factor
        found.append(product)
    return found


def _schedule(ratios: list[float], scorer: str) -> LengthSchedule:
    name, plus, option = scorer.partition("+")
    if plus and option != "question":
        raise ValueError(f"unknown option {option!r} of the scorer {scorer!r}: there is '+question' alone")
    return LengthSchedule.ratios(ratios, scorer=name, keep_question=bool(plus))
