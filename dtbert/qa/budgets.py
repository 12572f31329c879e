"""Budgets: the schedules that a search found for a model, what each costs and how right it is; `schedules.json`.

Among them may be policies by which the text decides. Where it cannot, in an ONNX file, or a device is waited for, on a
GPU, a budget chooses among the others, the static ones: each a `LengthSchedule`, known before a text is read.
"""

import json
import math
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from dtbert.files import Json, naming, write_whole
from dtbert.model import BertConfig, LengthSchedule, Macs, OwnScorer, Policy
from dtbert.qa.measured import Digest, head_of, parse, read_beside, text_of

SCHEDULES_FILE = "schedules.json"
_FORMAT = 1
_ANEW = "; make it anew with `dtbert search`, or remove it"


@dataclass(frozen=True)
class Latency:
    """Median seconds that a question takes, and those of the full model measured beside it."""

    seconds: float
    full_model_seconds: float
    device: str
    dtype: str
    threads: int


@dataclass(frozen=True)
class MeasuredSchedule:
    """A schedule, what it costs and how right it is on the questions of its `ScheduleFront`.

    Attributes:
        schedule: None is the full model: nothing is dropped.
        macs_fraction: executed MACs over the full model's at each window's own length.
        macs: a question, in the mean.
        f1, exact_match: percent.
        f1_interval: 95% bootstrap interval of ``f1`` over the questions.
        latency: None where it was not measured.
    """

    schedule: Policy | None
    macs_fraction: float
    macs: Macs
    f1: float
    exact_match: float
    f1_interval: tuple[float, float]
    latency: Latency | None = None

    def __post_init__(self) -> None:
        if not 0 < self.macs_fraction <= 1:
            raise ValueError(f"macs_fraction must be above 0 and at most 1, not {self.macs_fraction}")
        for percent in (self.f1, self.exact_match, *self.f1_interval):
            if not 0 <= percent <= 100:
                raise ValueError(f"f1, exact_match and f1_interval are percent, from 0 to 100, not {percent}")

    @property
    def is_static(self) -> bool:
        """Whether it says how many tokens stay before a text is read, as the full model does, which keeps all."""
        return self.schedule is None or isinstance(self.schedule, LengthSchedule)

    @property
    def least_budget(self) -> float:
        """The least budget of four digits that it costs at most."""
        return math.ceil(round(self.macs_fraction * 1e4, 2)) / 1e4

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them."""
        return {
            **vars(self),
            "schedule": None if self.schedule is None else self.schedule.to_dict(),
            "macs": self.macs._asdict(),
            "f1_interval": list(self.f1_interval),
            "latency": None if self.latency is None else vars(self.latency),
        }

    @classmethod
    def from_dict(cls, fields: Any, place: str = "") -> "MeasuredSchedule":
        """The entry of `to_dict`; ValueError names the field that is wrong, by its place in a document."""
        entry = Json(fields, place).exactly(cls.__dataclass_fields__)
        interval = entry.field("f1_interval")
        if len(interval.items()) != 2:
            raise interval.error(f"expected two numbers, found {len(interval.value)}")
        low, high = (bound.of(float) for bound in interval.items())
        schedule, latency = entry.get("schedule"), entry.get("latency")
        return entry.made(
            cls,
            None if schedule is None else schedule.made(Policy.from_dict, schedule.value),
            entry.field("macs_fraction").of(float),
            entry.field("macs").record(Macs),
            entry.field("f1").of(float),
            entry.field("exact_match").of(float),
            (low, high),
            None if latency is None else latency.record(Latency),
        )


@dataclass(frozen=True)
class ScheduleFront:
    """The schedules of a `schedules.json`.

    Attributes:
        schedules: those with the fewest MACs first. None is both dearer and less right than another, but for static
            ones, which are compared among themselves alone. What was dear may have been time, see
            `MeasuredSchedule.latency`.
        full_model: the same questions with nothing dropped.
        questions_file, num_questions, question_ids_sha256: what they were measured on; the hash is of the sorted
            ids, one a line.
        model_sha256: of the file of weights.
        dtbert_version: that measured them.
        settings: of the search, what its trials depend on beside weights and questions; empty where it is not known.
    """

    schedules: tuple[MeasuredSchedule, ...]
    full_model: MeasuredSchedule
    questions_file: str
    num_questions: int
    question_ids_sha256: str
    model_sha256: str
    dtbert_version: str
    settings: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.full_model.schedule is not None:
            raise ValueError("full_model has a schedule: it is the model with nothing dropped")
        if any(entry.schedule is None for entry in self.schedules):
            raise ValueError("an entry has no schedule: the model with nothing dropped is full_model")

    @property
    def own_scorer(self) -> OwnScorer | None:
        """What all schedules drop by; None where they differ, or name none."""
        schedules = (entry.schedule for entry in self.schedules if entry.schedule is not None)
        found = {(schedule.scorer, any(schedule.keeps_question)) for schedule in schedules}
        scorer, keep_question = found.pop() if len(found) == 1 else (None, False)
        return None if scorer is None else OwnScorer(scorer, keep_question)

    def check_layers(self, num_layers: int) -> None:
        """Raise ValueError unless each schedule has one entry per layer of the model."""
        for entry in self.schedules:
            if entry.schedule is not None:
                entry.schedule.check_layers(num_layers)

    def choices(self, static: bool = False) -> tuple[MeasuredSchedule, ...]:
        """The schedules that a budget chooses from, the cheapest first.

        Args:
            static: static ones alone, where there are such; otherwise all but static ones that another kind beats.
        """
        alone = tuple(entry for entry in self.schedules if entry.is_static)
        if static and alone:
            return alone
        others = [entry for entry in self.schedules if not entry.is_static]

        def is_beaten(entry: MeasuredSchedule) -> bool:
            return any(one.f1 > entry.f1 and one.macs_fraction <= entry.macs_fraction for one in others)

        return tuple(entry for entry in self.schedules if not (entry.is_static and is_beaten(entry)))

    def within(self, budget: float, static: bool = False) -> MeasuredSchedule:
        """The most accurate entry that costs at most a part of the full model's MACs; of equals the cheapest.

        At a budget of 1 it is the full model, which gives the same as no budget, whatever was more accurate on the few
        questions of a search.

        Args:
            budget: above 0, at most 1, which the full model itself costs.
            static: as `choices`.

        Raises:
            TypeError: not a number.
            ValueError: out of range, or below the cheapest entry.
        """
        check_budget(budget)
        if budget == 1:
            return self.full_model
        entries = (*self.choices(static), self.full_model)
        affordable = [entry for entry in entries if entry.macs_fraction <= budget]
        if not affordable:
            cheapest = min(entries, key=lambda entry: entry.macs_fraction)
            raise ValueError(
                f"budget {budget} is below the cheapest schedule: it takes {cheapest.least_budget:g} of the full "
                f"model's MACs (F1 {cheapest.f1:.1f}); give at least that, or pass a schedule of your own"
            )
        return max(affordable, key=lambda entry: (entry.f1, -entry.macs_fraction))

    def to_json(self) -> str:
        """The text of a `schedules.json`, one schedule a line; equal fronts give equal texts."""
        fields = {**({"settings": self.settings} if self.settings else {}), "full_model": self.full_model.to_dict()}
        entries = [json.dumps(entry.to_dict()) for entry in self.schedules]
        return text_of(self, _FORMAT, fields, "schedules", entries)

    @classmethod
    def from_json(cls, text: str | bytes) -> "ScheduleFront":
        """The front of `to_json`.

        Raises:
            ValueError: not JSON, of another format, or a field is missing, unknown or wrong; the message names it.
        """
        document = parse(text, _FORMAT)
        settings = document.get("settings")
        head = head_of(document, ("full_model", "schedules", *(() if settings is None else ("settings",))))
        return cls(
            tuple(MeasuredSchedule.from_dict(*entry) for entry in document.field("schedules").items()),
            MeasuredSchedule.from_dict(*document.field("full_model")),
            settings={} if settings is None else settings.of(dict),
            **head,
        )


def read_schedules(path: str | PathLike[str]) -> ScheduleFront:
    """The front in a `schedules.json`.

    Raises:
        OSError: the file cannot be read.
        ValueError: as `ScheduleFront.from_json`; the message names the file.
    """
    with naming(path, _ANEW):
        return ScheduleFront.from_json(Path(path).read_bytes())


def write_schedules(path: str | PathLike[str], front: ScheduleFront) -> None:
    """Write a front; the file is never seen in part, and stays as it was where writing fails."""
    write_whole(path, front.to_json())


def schedules_of(path: Path, num_layers: int, digest: Digest | None = None) -> ScheduleFront | None:
    """The front beside a model's weights, None where there is none; a warning where it is of other weights.

    Raises:
        OSError, ValueError: as `read_schedules`, or its schedules are for another number of layers.
    """

    def read(file: Path) -> ScheduleFront:
        front = read_schedules(file)
        with naming(file, _ANEW):
            front.check_layers(num_layers)
        return front

    other = (
        "was measured with other weights than these: its F1 may not hold here; remove it, and `dtbert search` makes "
        "one anew"
    )
    return read_beside(path, SCHEDULES_FILE, read, other, digest)


def within_budget(front: ScheduleFront | None, budget: float, static: bool) -> MeasuredSchedule:
    """As `ScheduleFront.within`; ValueError also where the model has no `schedules.json`."""
    check_budget(budget)
    if front is None:
        raise ValueError(
            f"budget {budget}: this model has no {SCHEDULES_FILE} to choose a schedule from; make one in its folder "
            "with `dtbert search`, or pass schedule= (`--schedule`) instead"
        )
    return front.within(budget, static)


def own_scorer(front: ScheduleFront | None, config: BertConfig) -> OwnScorer:
    """What a model's tokens are dropped by where a schedule names no scorer: as its front has it, else its config."""
    of_front = None if front is None else front.own_scorer
    return of_front or config.own_scorer


def check_budget(budget: float) -> None:
    """Raise TypeError or ValueError unless the budget is a number above 0 and at most 1."""
    if not isinstance(budget, int | float) or isinstance(budget, bool):
        raise TypeError(f"budget must be a number, the part of the full model's MACs, or 'auto', not {budget!r}")
    if not 0 < budget <= 1:
        raise ValueError(f"budget must be above 0 and at most 1, the full model's MACs, not {budget}")
