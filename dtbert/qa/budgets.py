"""Budgets: the schedules that a search found for a model, what each costs and how right it is; `schedules.json`."""

import json
import logging
import math
import secrets
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from dtbert.model import LengthSchedule, Macs
from dtbert.weights import model_folder, weights_sha256

SCHEDULES_FILE = "schedules.json"
_FORMAT = 1
_ANEW = "; make it anew with `dtbert search`, or remove it"
_KINDS = {dict: "an object", list: "a list", str: "a text", int: "a whole number", float: "a number"}

T = TypeVar("T")

logger = logging.getLogger(__name__)


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

    schedule: LengthSchedule | None
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

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them."""
        return {
            "schedule": None if self.schedule is None else self.schedule.to_dict(),
            "macs_fraction": self.macs_fraction,
            "macs": self.macs._asdict(),
            "f1": self.f1,
            "exact_match": self.exact_match,
            "f1_interval": list(self.f1_interval),
            "latency": None if self.latency is None else vars(self.latency),
        }

    @classmethod
    def from_dict(cls, fields: Any) -> "MeasuredSchedule":
        """The entry of `to_dict`; ValueError names the field that is wrong."""
        entry = _object(fields, cls.__dataclass_fields__)
        macs = _object(_field(entry, "macs", dict), Macs._fields)
        interval = _field(entry, "f1_interval", list)
        if len(interval) != 2:
            raise ValueError(f"f1_interval: expected two numbers, found {len(interval)}")
        low, high = (_number("f1_interval", value) for value in interval)
        schedule, latency = entry["schedule"], entry["latency"]
        return cls(
            None if schedule is None else LengthSchedule.from_dict(schedule),
            _number("macs_fraction", entry["macs_fraction"]),
            Macs(_field(macs, "published", int), _field(macs, "executed", int)),
            _number("f1", entry["f1"]),
            _number("exact_match", entry["exact_match"]),
            (low, high),
            None if latency is None else _latency(latency),
        )


@dataclass(frozen=True)
class ScheduleFront:
    """The schedules of a `schedules.json`, of which none is both dearer and less right than another.

    Attributes:
        schedules: those with the fewest MACs first; what was dear may have been time, see `MeasuredSchedule.latency`.
        full_model: the same questions with nothing dropped.
        questions_file, num_questions, question_ids_sha256: what they were measured on; the hash is of the sorted
            ids, one a line.
        model_sha256: of the file of weights.
        dtbert_version: that measured them.
    """

    schedules: tuple[MeasuredSchedule, ...]
    full_model: MeasuredSchedule
    questions_file: str
    num_questions: int
    question_ids_sha256: str
    model_sha256: str
    dtbert_version: str

    def __post_init__(self) -> None:
        if self.full_model.schedule is not None:
            raise ValueError("full_model has a schedule: it is the model with nothing dropped")
        if any(entry.schedule is None for entry in self.schedules):
            raise ValueError("an entry has no schedule: the model with nothing dropped is full_model")

    def check_layers(self, num_layers: int) -> None:
        """Raise ValueError unless each schedule has one entry per layer of the model."""
        for entry in self.schedules:
            if entry.schedule is not None:
                entry.schedule.check_layers(num_layers)

    def within(self, budget: float) -> MeasuredSchedule:
        """The most accurate entry that costs at most a part of the full model's MACs; of equals the cheapest.

        Args:
            budget: above 0, at most 1, which the full model itself costs.

        Raises:
            TypeError: not a number.
            ValueError: out of range, or below the cheapest entry.
        """
        check_budget(budget)
        entries = (*self.schedules, self.full_model)
        affordable = [entry for entry in entries if entry.macs_fraction <= budget]
        if not affordable:
            cheapest = min(entries, key=lambda entry: entry.macs_fraction)
            # Rounded up, so that what the message names is enough.
            least = math.ceil(cheapest.macs_fraction * 1e4) / 1e4
            raise ValueError(
                f"budget {budget} is below the cheapest schedule: it takes {least:g} of the full model's MACs "
                f"(F1 {cheapest.f1:.1f}); give at least that, or pass a schedule of your own"
            )
        return max(affordable, key=lambda entry: (entry.f1, -entry.macs_fraction))

    def to_json(self) -> str:
        """The text of a `schedules.json`, one schedule a line; equal fronts give equal texts."""
        fields: dict[str, Any] = {
            "format": _FORMAT,
            "dtbert": self.dtbert_version,
            "model_sha256": self.model_sha256,
            "questions": {
                "file": self.questions_file,
                "count": self.num_questions,
                "ids_sha256": self.question_ids_sha256,
            },
            "full_model": self.full_model.to_dict(),
        }
        head = "".join(f" {json.dumps(name)}: {json.dumps(value)},\n" for name, value in fields.items())
        entries = ",\n".join(f"  {json.dumps(entry.to_dict())}" for entry in self.schedules)
        body = f"\n{entries}\n " if entries else ""
        return f'{{\n{head} "schedules": [{body}]\n}}\n'

    @classmethod
    def from_json(cls, text: str) -> "ScheduleFront":
        """The front of `to_json`.

        Raises:
            ValueError: not JSON, of another format, or a field is missing, unknown or wrong; the message names it.
        """
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not JSON ({error})") from error
        if isinstance(document, dict) and document.get("format") != _FORMAT:
            raise ValueError(f"format is {document.get('format')!r}, this dtbert reads {_FORMAT}")
        names = ("format", "dtbert", "model_sha256", "questions", "full_model", "schedules")
        fields = _object(document, names)
        questions = _named("questions", lambda: _object(fields["questions"], ("file", "count", "ids_sha256")))
        schedules = _field(fields, "schedules", list)
        return cls(
            tuple(
                _named(f"schedules[{index}]", lambda entry=entry: MeasuredSchedule.from_dict(entry))
                for index, entry in enumerate(schedules)
            ),
            _named("full_model", lambda: MeasuredSchedule.from_dict(fields["full_model"])),
            _field(questions, "file", str),
            _field(questions, "count", int),
            _field(questions, "ids_sha256", str),
            _field(fields, "model_sha256", str),
            _field(fields, "dtbert", str),
        )


def read_schedules(path: str | PathLike[str]) -> ScheduleFront:
    """The front in a `schedules.json`.

    Raises:
        OSError: the file cannot be read.
        ValueError: as `ScheduleFront.from_json`; the message names the file.
    """
    try:
        return ScheduleFront.from_json(Path(path).read_bytes().decode("utf-8"))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}{_ANEW}") from error


def write_schedules(path: str | PathLike[str], front: ScheduleFront) -> None:
    """Write a front; the file is never seen in part, and stays as it was where writing fails."""
    target = Path(path)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.write_text(front.to_json(), "utf-8")
        partial.replace(target)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def schedules_of(path: Path, num_layers: int) -> ScheduleFront | None:
    """The front beside a model's weights, None where there is none; a warning where it is of other weights.

    Raises:
        OSError, ValueError: as `read_schedules`, or its schedules are for another number of layers.
    """
    file = model_folder(path) / SCHEDULES_FILE
    if not file.is_file():
        return None
    front = read_schedules(file)
    try:
        front.check_layers(num_layers)
    except ValueError as error:
        raise ValueError(f"{file}: {error}{_ANEW}") from error
    if front.model_sha256 != weights_sha256(path):
        logger.warning(
            "%s was measured with other weights than these: its F1 may not hold here; `dtbert search` makes one anew",
            file,
        )
    return front


def check_budget(budget: float) -> None:
    """Raise TypeError or ValueError unless the budget is a number above 0 and at most 1."""
    if not isinstance(budget, int | float) or isinstance(budget, bool):
        raise TypeError(f"budget must be a number, the part of the full model's MACs, not {budget!r}")
    if not 0 < budget <= 1:
        raise ValueError(f"budget must be above 0 and at most 1, the full model's MACs, not {budget}")


def _latency(value: Any) -> Latency:
    fields = _named("latency", lambda: _object(value, Latency.__dataclass_fields__))
    return Latency(
        _number("latency.seconds", fields["seconds"]),
        _number("latency.full_model_seconds", fields["full_model_seconds"]),
        _field(fields, "device", str),
        _field(fields, "dtype", str),
        _field(fields, "threads", int),
    )


def _named(place: str, read: Any) -> Any:
    try:
        return read()
    except (ValueError, TypeError) as error:
        raise ValueError(f"{place}: {error}") from error


def _object(value: Any, names: Any) -> Mapping[str, Any]:
    """The value as an object with exactly these fields."""
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, found {_KINDS.get(type(value), repr(value))}")
    missing, unknown = sorted(set(names) - set(value)), sorted(set(value) - set(names))
    if missing or unknown:
        raise ValueError(f"expected the fields {', '.join(names)}: missing {missing}, unknown {unknown}")
    return value


def _field(fields: Mapping[str, Any], name: str, kind: type[T]) -> T:
    value = fields[name]
    if type(value) is not kind:
        raise ValueError(f"{name}: expected {_KINDS[kind]}, found {_KINDS.get(type(value), repr(value))}")
    return value


def _number(name: str, value: Any) -> float:
    if type(value) not in (int, float):
        raise ValueError(f"{name}: expected a number, found {_KINDS.get(type(value), repr(value))}")
    if not abs(value) <= sys.float_info.max:
        raise ValueError(f"{name}: expected a finite number, found {str(value)[:20]}")
    return float(value)
