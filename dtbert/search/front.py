"""From the trials of a study to a front of schedules with intervals."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

import dtbert
from dtbert.evaluation import ids_sha256
from dtbert.model import LengthSchedule
from dtbert.qa import Latency, MeasuredSchedule, ScheduleFront
from dtbert.search.evaluation import Identified
from dtbert.search.records import Record, pareto, records_of
from dtbert.search.study import Search

_RESAMPLES = 1000
# Costs that differ by no more than this part are the same to whoever has a budget.
_NEARLY = 0.005
# What the front has of the study's settings in fields of its own.
_ELSEWHERE = ("model_sha256", "question_ids_sha256")


def full_records(search: Search) -> list[Record]:
    """The trials that answered all questions: these alone may enter a front."""
    return [record for record in records_of(search.study) if len(record.f1) == search.evaluator.num_questions]


def bootstrap_intervals(f1: Sequence[NDArray[np.float64]], seed: int = 0) -> list[tuple[float, float]]:
    """The 95% interval of each mean, in percent: percentiles over questions drawn with replacement.

    Args:
        f1: of each question, from 0 to 1, or differences of these; one array per schedule over the same questions,
            which are drawn together.
    """
    scores = np.stack(f1)
    count = scores.shape[1]
    random = np.random.default_rng(seed)
    means = np.stack([scores[:, random.integers(count, size=count)].mean(1) for _ in range(_RESAMPLES)])
    low, high = np.percentile(100 * means, [2.5, 97.5], axis=0).round(4)
    return list(zip(low.tolist(), high.tolist(), strict=True))


def front_of(search: Search, questions: Sequence[Identified], questions_file: str, model_sha256: str) -> ScheduleFront:
    """The front that a search has found so far, in the order of MACs, see `distinct`.

    Schedules of lengths have a front of their own in it, whatever else beats them: not all can let the text decide.

    What has not been timed yet, with the objective ``"macs"``, is timed now, once a study.

    Args:
        search: its study holds the trials.
        questions: those of its evaluator.
        questions_file: their file's name, for the record.
        model_sha256: of the model's file of weights.

    Raises:
        ValueError: no trial has answered all questions yet.
    """
    records = full_records(search)
    if not records:
        raise ValueError("no trial has answered all questions yet: give the search more trials")
    of_lengths = [record for record in records if isinstance(record.schedule, LengthSchedule)]
    best = {record.number: record for record in (*_best(records), *_best(of_lengths))}
    full = search.full_model
    chosen = sorted(best.values(), key=lambda record: record.macs_fraction)
    *intervals, full_interval = bootstrap_intervals([*(record.f1 for record in chosen), full.f1])
    latencies = search.latencies_of(chosen)
    return ScheduleFront(
        tuple(_entry(*measured) for measured in zip(chosen, intervals, latencies, strict=True)),
        MeasuredSchedule(None, 1.0, full.macs, *_percent(full.f1, full.exact_matches), full_interval),
        questions_file,
        len(questions),
        ids_sha256(questions),
        model_sha256,
        dtbert.__version__,
        {name: value for name, value in search.study.user_attrs["settings"].items() if name not in _ELSEWHERE},
    )


def _best(records: Sequence[Record]) -> list[Record]:
    return distinct([records[index] for index in pareto(records, [record.f1.mean() for record in records])])


def distinct(front: Sequence[Record]) -> list[Record]:
    """A front, the cheapest first, without what is clearly worse than another record at nearly its cost.

    Left out is a record whose cost another that stays exceeds by at most 0.5%, and that is less right beyond doubt: the
    95% interval of the difference of F1, question by question, lies above zero. Else a budget that is a hair too tight
    for a schedule would get a much worse one. Of two that the questions cannot tell apart both stay.
    """
    kept: list[Record] = []
    for record in reversed(front):
        dearer = (other.f1 for other in kept if other.cost <= (1 + _NEARLY) * record.cost)
        if not any(bootstrap_intervals([f1 - record.f1])[0][0] > 0 for f1 in dearer):
            kept.insert(0, record)
    return kept


def _entry(record: Record, interval: tuple[float, float], latency: Latency) -> MeasuredSchedule:
    f1, exact_match = _percent(record.f1, record.exact_matches)
    fraction = round(record.macs_fraction, 6)
    return MeasuredSchedule(record.schedule, fraction, record.macs, f1, exact_match, interval, latency)


def _percent(f1: NDArray[np.float64], exact_matches: int) -> tuple[float, float]:
    return round(100 * float(f1.mean()), 4), round(100 * exact_matches / len(f1), 4)
