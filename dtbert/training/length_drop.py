"""LengthDrop: the schedules that a model meets while it learns to do without tokens (Kim and Cho 2021, section 3.2)."""

import operator
import random
from collections.abc import Iterable
from itertools import accumulate
from typing import NamedTuple

from dtbert.model import LengthSchedule
from dtbert.training.options import LengthDrop


class SubModel(NamedTuple):
    """What one pass leaves out: tokens by a schedule, and whole layers (0-based)."""

    schedule: LengthSchedule | None
    skip_layers: frozenset[int] = frozenset()


def sub_models(drop: LengthDrop, num_layers: int, seed: int, step: int) -> list[SubModel]:
    """The sub-models of a step, the smallest last: a pure function of its arguments.

    Each layer keeps a part, drawn uniformly from [1 - ratio_bound, 1], of what the layer before it kept; in the
    smallest sub-model each keeps 1 - ratio_bound.

    Raises:
        ValueError: as `LengthDrop.bounds`.
    """
    bounds = drop.bounds(num_layers)
    drawn = random.Random(f"length drop {seed} {step}")
    found = []
    for _ in range(drop.num_sandwich):
        ratios = _running_product(drawn.uniform(1 - bound, 1) for bound in bounds)
        skipped = frozenset(layer for layer in range(num_layers) if drawn.random() < drop.layer_dropout)
        found.append(SubModel(ratios_by(drawn.choice(drop.scorers), ratios), skipped))
    smallest = _running_product(1 - bound for bound in bounds)
    return [*found, SubModel(ratios_by(drawn.choice(drop.scorers), smallest))]


def ratios_by(scorer: str, ratios: list[float]) -> LengthSchedule:
    """A schedule by a scorer's name, which ``+question`` may follow; ValueError for a name that is none."""
    name, plus, option = scorer.partition("+")
    if plus and option != "question":
        raise ValueError(f"unknown option {option!r} of the scorer {scorer!r}: there is '+question' alone")
    return LengthSchedule.ratios(ratios, scorer=name, keep_question=bool(plus))


def _running_product(factors: Iterable[float]) -> list[float]:
    return list(accumulate(factors, operator.mul))
