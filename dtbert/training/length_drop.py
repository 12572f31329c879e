"""LengthDrop: the schedules that a model meets while it learns to do without tokens (Kim and Cho 2021, section 3.2)."""

import operator
import random
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from dtbert.kernels import Left, Packing, Partials
from dtbert.model import LengthSchedule
from dtbert.model.adaptive import counts_by_share
from dtbert.model.policy import Targets, in_first_layers
from dtbert.training.options import LengthDrop
from dtbert.training.places import places_of


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

    def schedule(ratios: list[float]) -> LengthSchedule:
        scorer, policy = drawn.choice(drop.scorers), drawn.choice(drop.policies)
        return ratios_by(scorer, ratios, of_batch=policy == "threshold")

    found = []
    for _ in range(drop.num_sandwich):
        ratios = _running_product(drawn.uniform(1 - bound, 1) for bound in bounds)
        skipped = frozenset(layer for layer in range(num_layers) if drawn.random() < drop.layer_dropout)
        found.append(SubModel(schedule(ratios), skipped))
    return [*found, SubModel(schedule(_running_product(1 - bound for bound in bounds)))]


def scorer_and_layers(scorer: str) -> tuple[str, int | None]:
    """A scorer's name, and how many of the first layers keep the question: 0, or None for all.

    Raises:
        ValueError: what follows the name is neither ``+question`` nor ``+question:3``.
    """
    name, plus, option = scorer.partition("+")
    option, in_some, number = option.partition(":")
    if plus and (option != "question" or (in_some and not (number.isdecimal() and int(number)))):
        raise ValueError(
            f"unknown option {scorer.partition('+')[2]!r} of the scorer {scorer!r}: there is '+question', and "
            "'+question:3' for 3 layers"
        )
    return name, int(number) if in_some else None if plus else 0


def ratios_by(scorer: str, ratios: list[float], *, of_batch: bool = False) -> LengthSchedule:
    """A schedule by a scorer's name, which ``+question`` may follow.

    After ``+question:3`` the first 3 layers keep the question, those after them [CLS] alone of it.

    Raises:
        ValueError: as `scorer_and_layers`, or there are fewer layers.
    """
    name, layers = scorer_and_layers(scorer)
    if layers is not None and layers > len(ratios):
        raise ValueError(f"the scorer {scorer!r} keeps the question in {layers} layers, of a model with {len(ratios)}")
    keep_question = in_first_layers(len(ratios) if layers is None else layers, len(ratios))
    kind = BatchSchedule if of_batch else LengthSchedule
    return kind.ratios(ratios, scorer=name, keep_question=keep_question, keep_cls=len(set(keep_question)) > 1)


@dataclass(frozen=True)
class BatchSchedule(LengthSchedule):
    """Lengths of a batch as a whole: of all its tokens those with the highest shares stay, whosesoever they are.

    So do the tokens of a `Threshold` that keeps as many of the batch. As what it keeps of a sequence depends on the
    others, it is for training alone.
    """

    def targets(self, packing: Packing) -> Targets:  # type: ignore[override]  # known only layer by layer
        return _BatchTargets(self, packing)


class _BatchTargets:
    def __init__(self, schedule: BatchSchedule, packing: Packing) -> None:
        self._scorers, self._entered = schedule.scorers, packing.num_tokens
        self._totals = [sum(kept) for kept in schedule.kept(packing.seqlens)]

    @property
    def last_drop(self) -> int:
        return max((layer for layer, total in enumerate(self._totals) if total < self._entered), default=-1)

    def may_drop(self, layer: int, packing: Packing) -> bool:
        return self._totals[layer] < packing.num_tokens

    def target(self, layer: int, left: Left, significance: Tensor | Partials) -> Packing:
        assert isinstance(significance, Tensor), "parts are for the backend that left them"
        if not self.may_drop(layer, left.packing):
            return left.packing

        def count(shares: Tensor, forced: Tensor) -> Tensor:
            of_all = (shares / shares.sum(1, keepdim=True)).masked_fill(forced, torch.inf)
            of_all = of_all.masked_fill(~places_of(left.packing).real, -torch.inf)
            # One of each sequence stays: these come first.
            others = max(0, self._totals[layer] - len(shares))
            of_all = of_all.sort(1, descending=True).values[:, 1:]
            highest = of_all.flatten().topk(others, sorted=False).indices
            kept = torch.ones_like(shares[:, 0])
            return kept.index_add(0, highest // max(1, of_all.shape[1]), torch.ones_like(highest))

        counts = counts_by_share(count, layer, self._scorers[layer], left, significance)
        return Packing.stack([counts], significance.device)[0]


def _running_product(factors: Iterable[float]) -> list[float]:
    return list(accumulate(factors, operator.mul))
