"""A made-up task of two layers whose Pareto front is known: keep the same in both, with the scorer `cls`.

Letting the text decide harms by half as much at the same cost.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np

from dtbert.evaluation import Score
from dtbert.model import LengthSchedule, Macs, Policy, Threshold
from dtbert.qa import Latency
from dtbert.search import Effort, Search, SearchSpace, constant_ratio, open_study, space_of

FULL_MACS = 1_000_000
SCORERS = ("cls", "random")
MIXED = space_of(("lengths", "threshold"), 2, SCORERS, (False,))
STARTS = [constant_ratio(factor, 2, scorer) for factor in (0.7, 0.85, 0.95) for scorer in SCORERS]


@dataclass
class Toy:
    """A policy costs the mean of what its layers keep; ``noise`` makes its questions differ from other policies'."""

    measure, unit, piece = "F1", "questions", "window"

    num_questions: int = 600
    noise: float = 0.0
    name: str = "toy"
    answered: list[tuple[Policy | None, int, int]] = field(default_factory=list)

    def macs(self, schedule: Policy | None) -> Macs:
        executed = FULL_MACS if schedule is None else round(FULL_MACS * sum(kept_by(schedule)) / 2)
        return Macs(executed + 1, executed)

    def quality(self, schedule: Policy | None) -> float:
        """Expected F1, from 0 to 1."""
        if schedule is None:
            return 0.9
        dropped = np.array([1 - ratio for ratio in kept_by(schedule)])
        harm = 0.5 if isinstance(schedule, LengthSchedule) else 0.25
        return float(0.9 - harm * (dropped**2).sum()) - 0.1 * (schedule.scorer == "random")

    def scores(self, schedule: Policy | None, begin: int, end: int) -> list[Score]:
        self.answered.append((schedule, begin, end))
        # Spread evenly over 0 to 1, and so is every beginning.
        spread = (np.arange(self.num_questions) * 0.6180339887) % 1
        difficulty = (spread.argsort().argsort() + 0.5) / self.num_questions
        if schedule is not None and self.noise:
            seed = zlib.crc32(schedule.to_json().encode())
            difficulty += np.random.default_rng(seed).normal(0, self.noise, self.num_questions)
        right = (difficulty < self.quality(schedule))[begin:end]
        return [Score(float(one), float(one)) for one in right]

    def latencies(self, schedules: Sequence[Policy]) -> list[Latency]:
        seconds = [0.5 * self.macs(schedule).executed / FULL_MACS for schedule in schedules]
        return [Latency(own, 0.5, *self.device()) for own in seconds]

    def device(self) -> tuple[str, str, int]:
        return self.name, "float32", 1


def kept_by(policy: Policy) -> Sequence[float]:
    """The part that each layer keeps; a threshold of 0.0001 keeps nearly all, one of 0.0316 a third."""
    if isinstance(policy, Threshold):
        return [1 - 20 * threshold for threshold in policy.thresholds]
    assert isinstance(policy, LengthSchedule)
    return policy.length_config


def best_f1(cost: float) -> float:
    """The front in closed form: the highest F1 in percent at a cost."""
    return 100 * (0.9 - (1 - cost) ** 2)


def toy_search(storage: str | None = None, toy: Toy | None = None, seed: int = 0, **options: Any) -> Search:
    sampler = options.pop("sampler", "tpe")
    study = open_study(storage, "toy", {"toy": 1}, sampler, seed)
    effort = options.pop("effort", Effort(()))
    space = options.pop("space", SearchSpace(2, SCORERS, (False,)))
    return Search(study, space, toy or Toy(), macs_range=options.pop("macs_range", (0.3, 1)), effort=effort, **options)


def take_part(storage: str, seed: int, trials: int, barrier: Barrier) -> None:
    """One of several processes that share a study, all of which start at the same moment."""
    barrier.wait()
    toy_search(storage, seed=seed).run(trials)


def sqlite(folder: Path) -> str:
    return f"sqlite:///{folder / 'study.db'}"
