"""The search itself: an Optuna study of two objectives, F1 up and cost down, whose bad trials end early."""

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from optuna import Study, Trial
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from dtbert.model import LengthSchedule, Macs, Policy
from dtbert.qa import Latency
from dtbert.search import records
from dtbert.search.evaluation import Evaluator
from dtbert.search.processes import has_ended, this_process
from dtbert.search.records import Record, estimated_f1, is_beaten, records_of
from dtbert.search.space import MixedSpace, Space
from dtbert.search.storage import STORAGE_ERRORS

Objective = Literal["macs", "latency"]

# When so many draws in a row are outside the range or repeated, there is nothing left to try.
MOST_IDLE = 500
# Seconds between a process' signs that its trial goes on, and without one until others take the trial for lost.
SIGN_EVERY = 20.0
LOST_AFTER = 180.0


@dataclass(frozen=True)
class Effort:
    """How much is spent on a trial before it may be given up.

    Attributes:
        rungs: numbers of questions after which a trial is compared with those that cost no more.
        margin: it ends there if one of them is better beyond doubt: by more than this many standard errors, and by more
            the more of them there are, see `is_beaten`.
    """

    rungs: tuple[int, ...] = (100, 200, 400, 800)
    margin: float = 1.0

    def __post_init__(self) -> None:
        if any(rung < 1 for rung in self.rungs) or list(self.rungs) != sorted(set(self.rungs)):
            raise ValueError(f"rungs must be growing numbers of questions, not {list(self.rungs)}")
        if not 0 <= self.margin < math.inf:
            raise ValueError(f"margin must be a number of standard errors, 0 or more, not {self.margin}")

    def steps(self, num_questions: int) -> list[int]:
        """The numbers of questions at which a trial stops to look, the last being all."""
        return [*(rung for rung in self.rungs if rung < num_questions), num_questions]


class Savings(NamedTuple):
    """Questions that were answered for trials, and those that it would have been without rungs."""

    answered: int
    without_rungs: int


class Counts(NamedTuple):
    """Trials of a study: ``finished`` sums up the next three; those repeated or outside the range cost nothing.

    Interrupted trials are not among them: they are tried again.
    """

    finished: int
    all_questions: int
    ended_early: int
    failed: int
    repeated: int
    outside_range: int


@dataclass(frozen=True)
class FullModel:
    """The scores of the model with nothing dropped, on all questions."""

    macs: Macs
    f1: NDArray[np.float64]
    exact_matches: int


class Search:
    """A search over a study, which other processes may share.

    Args:
        study: of `open_study`.
        space: the schedules to choose from.
        evaluator: what they are worth.
        objective: the cost that goes down: executed MACs, or measured seconds, as parts of the full model's.
        macs_range: parts of the full model's MACs; schedules outside are drawn anew.
        effort: when to give up on a trial.

    Raises:
        ValueError: a range that is none.
    """

    def __init__(
        self,
        study: Study,
        space: Space | MixedSpace,
        evaluator: Evaluator,
        *,
        objective: Objective = "macs",
        macs_range: tuple[float, float] = (0.0, 1.0),
        effort: Effort | None = None,
    ) -> None:
        low, high = macs_range
        if not 0 <= low < high <= 1:
            raise ValueError(f"the range of MACs must be two growing parts of the full model's, not {low} to {high}")
        self.study, self.space, self.evaluator = study, space, evaluator
        self.objective, self.macs_range, self.effort = objective, macs_range, effort or Effort()
        self.full_model = self._full_model()

    def add_starts(self, schedules: Sequence[Policy], origin: str) -> int:
        """Put schedules in line to be tried first, those inside the range and not yet in the study; how many.

        The cheapest come first: a bad schedule ends early only where one that costs no more was there before it.

        Raises:
            ValueError: one is not in the search space.
        """
        tried = [trial.params for trial in self.study.get_trials(deepcopy=False)]
        tried += [trial.system_attrs.get("fixed_params", {}) for trial in self.study.get_trials(deepcopy=False)]
        new = []
        for schedule in schedules:
            parameters = self.space.parameters_of(schedule)
            if parameters not in tried:
                tried.append(parameters)
                cost = self._macs_fraction(self.evaluator.macs(schedule))
                new += [(cost, parameters)] if self._is_inside(cost) else []
        for _, parameters in sorted(new, key=lambda one: one[0]):
            self.study.enqueue_trial(parameters, user_attrs={records.ORIGIN: origin})
        return len(new)

    def run(self, num_trials: int, on_trial: Callable[[], None] = lambda: None) -> None:
        """Go on until the study has so many trials, other processes' and earlier ones included.

        A trial that raises is recorded as failed, with its message. One that was interrupted, or whose process has
        ended or given no sign for three minutes, is put in line again, even where there are enough trials.

        Args:
            num_trials: finished ones, failed ones included, those repeated or outside the range not.
            on_trial: called after each trial.

        Raises:
            ValueError: no new schedule inside the range is drawn any more.
            StorageInternalError, SQLAlchemyError: of Optuna and its storage, which fails: see `naming_storage`.
        """
        idle = 0
        if (process := this_process()) is not None:
            self.study.set_user_attr(f"{records.PROCESS} {process}", process)
        while self._retry_lost() or self.num_finished() < num_trials:
            trial = self.study.ask()
            trial.set_user_attr(records.PROCESS, this_process())
            trial.set_user_attr(records.ALIVE, time.time())
            try:
                with _signs_of_life(trial):
                    values, is_new = self._evaluate(trial)
            except KeyboardInterrupt:
                self._retry(self.study.get_trials(deepcopy=False)[trial.number])
                raise
            except STORAGE_ERRORS:
                raise
            except Exception as error:  # whatever it is, the others may do
                with suppress(UpdateFinishedTrialError):  # another process took it for lost, and tries it again
                    trial.set_user_attr(records.ERROR, f"{type(error).__name__}: {error}")
                self._tell(trial, state=TrialState.FAIL)
                idle = 0
            else:
                self._tell(trial, values, TrialState.PRUNED if values is None else None)
                idle = 0 if is_new else idle + 1
            on_trial()
            if idle == MOST_IDLE:
                low, high = self.macs_range
                raise ValueError(
                    f"{idle} draws in a row were tried before, or had MACs outside {low} to {high} of the full "
                    f"model's: give a wider range, or no more than the {self.num_finished()} trials that are there"
                )

    def num_finished(self) -> int:
        """Trials that count: those that answered questions to the end, and failed ones."""
        return self.counts().finished

    def num_waiting(self) -> int:
        """Schedules in line, which are tried before the sampler draws any."""
        return len(self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))

    def counts(self) -> Counts:
        """How the trials ended."""
        trials = self.study.get_trials(deepcopy=False)
        complete = [trial.user_attrs for trial in trials if trial.state == TrialState.COMPLETE]
        repeated = sum(records.SAME_AS in attributes for attributes in complete)
        everything = sum(len(one.get(records.F1, ())) == self.evaluator.num_questions for one in complete)
        outside, failed = sum(trial.state == TrialState.PRUNED for trial in trials), len(self.errors())
        ended_early = len(complete) - everything - repeated
        return Counts(everything + ended_early + failed, everything, ended_early, failed, repeated, outside)

    def errors(self) -> list[str]:
        """Messages of the trials that failed, in their order."""
        failed = self.study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
        return [trial.user_attrs[records.ERROR] for trial in failed if records.ERROR in trial.user_attrs]

    def savings(self) -> Savings:
        """What the rungs saved so far."""
        answered = [len(record.f1) for record in records_of(self.study)]
        return Savings(sum(answered), len(answered) * self.evaluator.num_questions)

    def latencies_of(self, chosen: Sequence[Record]) -> list[Latency]:
        """The times of trials: those that were measured with them, and of the others now, once a device."""
        device = " ".join(map(str, self.evaluator.device()))
        keys = {record.number: f"latency {record.number} {device}" for record in chosen if record.latency is None}
        stored: dict[str, Any] = self.study.user_attrs
        missing = [record for record in chosen if record.number in keys and keys[record.number] not in stored]
        if missing:
            timed = self.evaluator.latencies([record.schedule for record in missing])
            for record, latency in zip(missing, timed, strict=True):
                self.study.set_user_attr(keys[record.number], vars(latency))
            stored = self.study.user_attrs
        return [record.latency or Latency(**stored[keys[record.number]]) for record in chosen]

    def _full_model(self) -> FullModel:
        """Its scores, measured once a study."""
        stored: dict[str, Any] | None = self.study.user_attrs.get("full_model")
        if stored is None:
            scores = self.evaluator.scores(None, 0, self.evaluator.num_questions)
            stored = {
                records.MACS: list(self.evaluator.macs(None)),
                records.F1: [round(score.f1, 6) for score in scores],
                records.EXACT_MATCHES: round(sum(score.exact_match for score in scores)),
            }
            self.study.set_user_attr("full_model", stored)
        return FullModel(Macs(*stored[records.MACS]), np.array(stored[records.F1]), stored[records.EXACT_MATCHES])

    def _evaluate(self, trial: Trial) -> tuple[tuple[float, float] | None, bool]:
        """Estimated F1 and cost, None outside the range; and whether a new schedule was tried.

        What is measured is stored with the trial.
        """
        schedule = self.space.suggest(trial)
        fraction = self._count(trial, schedule)
        if not self._is_inside(fraction):
            return None, False
        for peer in self._peers(trial):
            if peer.schedule == schedule and len(peer.f1) == self.evaluator.num_questions:
                trial.set_user_attr(records.SAME_AS, peer.number)
                return (peer.estimated_f1(self.full_model.f1), peer.cost), False
        trial.set_user_attr(records.SCHEDULE, schedule.to_dict())
        cost = fraction
        if self.objective == "latency":
            (latency,) = self.evaluator.latencies([schedule])
            trial.set_user_attr(records.LATENCY, vars(latency))
            cost = latency.seconds / latency.full_model_seconds
        trial.set_user_attr(records.COST, cost)
        f1 = self._climb(trial, schedule, cost)
        # Where the text decides how many tokens stay, its answers told what it takes.
        fraction = self._count(trial, schedule)
        if self.objective == "macs":
            cost = fraction
            trial.set_user_attr(records.COST, cost)
        return (estimated_f1(f1, self.full_model.f1), cost), True

    def _peers(self, trial: Trial) -> list[Record]:
        return [record for record in records_of(self.study) if record.number != trial.number]

    def _rivals(self, trial: Trial, schedule: Policy) -> list[Record]:
        """The other trials that a front may hold instead: of a schedule of lengths other such, see `front_of`."""
        peers, of_lengths = self._peers(trial), isinstance(schedule, LengthSchedule)
        return [peer for peer in peers if not of_lengths or isinstance(peer.schedule, LengthSchedule)]

    def _climb(self, trial: Trial, schedule: Policy, cost: float) -> NDArray[np.float64]:
        """F1 of the questions up to the rung where the trial was beaten, or of all."""
        f1: list[float] = []
        exact_matches = 0.0
        for step in self.effort.steps(self.evaluator.num_questions):
            scores = self.evaluator.scores(schedule, len(f1), step)
            f1 += [round(score.f1, 6) for score in scores]
            exact_matches += sum(score.exact_match for score in scores)
            trial.set_user_attr(records.EXACT_MATCHES, round(exact_matches))
            trial.set_user_attr(records.F1, f1)
            last = step == self.evaluator.num_questions
            if not last and is_beaten(np.array(f1), cost, self._rivals(trial, schedule), self.effort.margin):
                break
        return np.array(f1)

    def _count(self, trial: Trial, schedule: Policy) -> float:
        """The part of the full model's MACs, which is stored with the trial."""
        macs = self.evaluator.macs(schedule)
        fraction = self._macs_fraction(macs)
        trial.set_user_attr(records.MACS, list(macs))
        trial.set_user_attr(records.MACS_FRACTION, fraction)
        return fraction

    def _macs_fraction(self, macs: Macs) -> float:
        return macs.executed / self.full_model.macs.executed

    def _is_inside(self, fraction: float) -> bool:
        return self.macs_range[0] <= fraction <= self.macs_range[1]

    def _tell(
        self, trial: Trial | int, values: tuple[float, float] | None = None, state: TrialState | None = None
    ) -> bool:
        """End a trial; False where it has ended: another process took it for lost."""
        try:
            self.study.tell(trial, values, state)
        except (UpdateFinishedTrialError, ValueError):
            return False
        return True

    def _retry_lost(self) -> int:
        """Put the trials of processes that were killed in line again; how many."""
        lost = 0
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            started = math.inf if trial.datetime_start is None else trial.datetime_start.timestamp()
            silent = time.time() - trial.user_attrs.get(records.ALIVE, started) > LOST_AFTER
            if silent or self._has_ended(trial):
                lost += self._retry(trial)
        return lost

    def _has_ended(self, trial: FrozenTrial) -> bool:
        """Whether the process of a trial is known to have ended."""
        if records.PROCESS in trial.user_attrs or records.ALIVE in trial.user_attrs:
            return has_ended(trial.user_attrs.get(records.PROCESS))
        # It ended before it could say that it runs this one: so it is if all of the others have.
        known = (value for name, value in self.study.user_attrs.items() if name.startswith(f"{records.PROCESS} "))
        others = [process for process in known if process != this_process()]
        return bool(others) and all(map(has_ended, others))

    def _retry(self, trial: FrozenTrial) -> bool:
        """End a trial that was interrupted, and put its schedule in line; False where another process has."""
        if not self._tell(trial.number, state=TrialState.FAIL):
            return False
        origin = {name: value for name, value in trial.user_attrs.items() if name == records.ORIGIN}
        self.study.enqueue_trial({**trial.system_attrs.get("fixed_params", {}), **trial.params}, user_attrs=origin)
        return True


@contextmanager
def _signs_of_life(trial: Trial) -> Iterator[None]:
    """Let other processes know that this one goes on with its trial."""
    done = threading.Event()

    def give() -> None:
        while not done.wait(SIGN_EVERY):
            with suppress(Exception):  # a storage that is busy: the next sign may get through
                trial.set_user_attr(records.ALIVE, time.time())

    thread = threading.Thread(target=give, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
