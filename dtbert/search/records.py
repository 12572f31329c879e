"""Trials as what they measured, and the comparison that ends a bad one early."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna import Study
from optuna.trial import FrozenTrial, TrialState

from dtbert.model import Macs, Policy
from dtbert.qa import Latency

# What a trial's user attributes are called.
SCHEDULE, MACS, MACS_FRACTION, F1, EXACT_MATCHES = "schedule", "macs", "macs_fraction", "f1", "exact_matches"
LATENCY, COST, ORIGIN, SAME_AS, ERROR = "latency", "cost", "origin", "same_as", "error"
PROCESS = "process"  # the one that answers its questions
ALIVE = "alive"  # when its process last said that it goes on, in seconds since 1970


@dataclass(frozen=True)
class Record:
    """What a trial measured.

    Attributes:
        cost: what the search brings down: the part of the full model's MACs, or of its time.
        macs, macs_fraction: where the text decides how many tokens stay, of the questions answered.
        f1: of each question it answered, from 0 to 1, in the order of evaluation.
        exact_matches: how many of them were matched exactly.
        origin: of a start, what it is; empty for a schedule that the sampler drew.
    """

    number: int
    schedule: Policy
    macs: Macs
    macs_fraction: float
    cost: float
    f1: NDArray[np.float64]
    exact_matches: int
    latency: Latency | None
    origin: str

    def estimated_f1(self, full_model: NDArray[np.float64]) -> float:
        """`estimated_f1` of what was answered."""
        return estimated_f1(self.f1, full_model)


def estimated_f1(f1: NDArray[np.float64], full_model: NDArray[np.float64]) -> float:
    """F1 in percent over all questions: what the full model has there, and the difference where both answered."""
    return float(100 * (full_model.mean() + (f1 - full_model[: len(f1)]).mean()))


def records_of(study: Study) -> list[Record]:
    """The trials of a study that answered questions, running ones included; one record for each schedule."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.RUNNING))
    return [_record(trial) for trial in trials if F1 in trial.user_attrs]


def is_beaten(f1: NDArray[np.float64], cost: float, peers: Iterable[Record], margin: float) -> bool:
    """Whether a peer that costs no more is better on the same questions, beyond doubt.

    Args:
        f1: of the questions answered so far.
        margin: standard errors of the mean difference, question by question, that are beyond doubt of a single peer.
            The best of many looks better than it is, so with each peer it takes more, as Bonferroni has it.
    """
    count = len(f1)
    differences = [peer.f1[:count] - f1 for peer in peers if peer.cost <= cost and len(peer.f1) >= count]
    least = margin_of_many(margin, len(differences))
    return any(
        difference.mean() > least * difference.std(ddof=min(1, count - 1)) / count**0.5 for difference in differences
    )


def margin_of_many(margin: float, count: int) -> float:
    """The standard errors that the greatest of so many normal values exceeds as seldom, at most, as one the margin."""
    tail = math.erfc(margin / math.sqrt(2)) / 2
    # So far out that a double cannot tell: nothing is beyond doubt there anyway.
    return -NormalDist().inv_cdf(tail / count) if count > 1 and tail / count > 0 else margin


def pareto(records: Sequence[Record], f1: Sequence[float]) -> list[int]:
    """Which records no other one beats in both cost and F1, the cheapest first; of equals the first stays."""
    chosen: list[int] = []
    for index in sorted(range(len(records)), key=lambda index: (records[index].cost, -f1[index])):
        if not chosen or f1[index] > f1[chosen[-1]]:
            chosen.append(index)
    return chosen


def _record(trial: FrozenTrial) -> Record:
    attributes: dict[str, Any] = trial.user_attrs
    latency = attributes.get(LATENCY)
    return Record(
        trial.number,
        Policy.from_dict(attributes[SCHEDULE]),
        Macs(*attributes[MACS]),
        attributes[MACS_FRACTION],
        attributes[COST],
        np.array(attributes[F1]),
        attributes[EXACT_MATCHES],
        None if latency is None else Latency(**latency),
        attributes.get(ORIGIN, ""),
    )
