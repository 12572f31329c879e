"""Calibrate a cascade: which answers of small budgets are the full model's, and how sure each is."""

import math
from collections.abc import Callable, Iterable

import numpy as np

from dtbert.evaluation.measure import PreparedQuestions, check_readable
from dtbert.evaluation.work import answered
from dtbert.model import Policy
from dtbert.qa import CascadeStage
from dtbert.qa.cascade import is_same

# Rounded up, by which a question may be answered again that need not be, but never the other way round.
_STEPS = 10**5


def calibrate(
    prepared: PreparedQuestions, schedules: Iterable[Policy], on_answers: Callable[[int], object] = lambda _: None
) -> tuple[CascadeStage, ...]:
    """A stage of each schedule, by its answers beside those of the full model.

    Args:
        prepared: the model, and questions that were held out; their right answers are of no account.
        schedules: of the first answers.
        on_answers: called with the number of questions that are answered since the last call; each once by the full
            model and by each schedule.

    Raises:
        ValueError: a question cannot be read; a schedule, as calling the answerer.
    """
    check_readable(prepared.unreadable)
    full, work = answered(prepared.answerer, prepared.prepared, None)
    on_answers(len(full.answers))
    macs = np.array([one.executed for one in work], np.float64)
    stages = []
    for given in schedules:
        schedule = prepared.answerer.resolve(given)
        assert schedule is not None
        first, work = answered(prepared.answerer, prepared.prepared, schedule)
        on_answers(len(first.answers))
        certainties = np.array([_rounded_up(one) for one in first.certainties])
        differs = [not is_same(*both) for both in zip(first.answers, full.answers, strict=True)]
        differing = np.sort(certainties[differs])[::-1]
        order = certainties.argsort()
        below = np.concatenate([[0], macs[order].cumsum()]) / macs.sum()
        again = below[certainties[order].searchsorted(differing, side="right")].round(4)
        fraction = round(sum(one.executed for one in work) / macs.sum(), 6)
        stages.append(CascadeStage(schedule, fraction, tuple(differing.tolist()), tuple(again.tolist())))
    return tuple(stages)


def _rounded_up(certainty: float) -> float:
    # A hair more, for a product may itself be rounded down.
    return min(math.ceil(certainty * _STEPS + 1e-6) / _STEPS, 1.0)
