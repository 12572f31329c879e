"""Read labelled texts: GLUE's official tables, and JSON lines or arrays, as the data sets are exported."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from dtbert.evaluation.reader import unpacked
from dtbert.evaluation.tasks import Task
from dtbert.files import Json, naming, text_sha256, utf8

_UNPUBLISHED = "; -1 stands for a label that was not published"


@dataclass(frozen=True, slots=True)
class LabelledText:
    """A text, or a pair of them, and its label: a number of one of the task's labels, or the number itself.

    ``line`` is its line or, in an array, its place in the file, from 1.
    """

    line: int
    text: str
    pair: str | None
    label: float

    @property
    def texts(self) -> str | tuple[str, str]:
        """As a classifier takes them."""
        return self.text if self.pair is None else (self.text, self.pair)

    @property
    def id(self) -> str:
        """Its line and a digest of its texts."""
        return f"{self.line}-{text_sha256(repr(self.texts))[:12]}"

    @property
    def title(self) -> str:
        """None, as of questions without an article."""
        return ""


class LabelledTexts(NamedTuple):
    """The texts of a file.

    Attributes:
        task: what it was read as.
        labels: their names by number; empty where each text has a number.
        examples: in the file's order.
        damaged: what is wrong with each line that lacks a column, or has a label that is none; these are left out.
    """

    task: Task
    labels: tuple[str, ...]
    examples: list[LabelledText]
    damaged: list[str]


def read_task(path: str | PathLike[str], task: Task, labels: Sequence[str] | None = None) -> LabelledTexts:
    """The labelled texts of a file.

    A table has a line of names, or is CoLA's; its fields are separated by tabs, and quotes are characters like others,
    as in GLUE's files. JSON objects stand one a line, or in an array. All may be compressed with gzip.

    Args:
        path: the file; what it is, is seen from the content.
        task: of `task_named`.
        labels: of a task that has none of its own: their names by number, by default all that the file has, sorted.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not such a file, or has no labels; the message names it.
    """
    with naming(path):
        rows = list(_rows(utf8(unpacked(Path(path).read_bytes())), task))
        columns = _columns(rows, task)
        found, damaged = [], []
        for line, fields in rows:
            try:
                found.append((line, *_values(fields, columns)))
            except ValueError as error:
                damaged.append(f"line {line}: {error}")
        if not found:
            raise ValueError(f"no line has all its columns; {damaged[0]}")
        names = _names(task, labels, [label for *_, label in found])
        examples = []
        for line, text, pair, label in found:
            try:
                number = _number(label, *task.numbers) if task.is_regression else _place(label, names)
                examples.append(LabelledText(line, text, pair, number))
            except ValueError as error:
                damaged.append(f"line {line}: {error}")
        if not examples:
            raise ValueError(f"no line has a label that is one; {damaged[0]}")
        return LabelledTexts(task, names, examples, damaged)


def _rows(text: str, task: Task) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The lines or objects of a file, by the names of their columns."""
    start = text.lstrip()[:1]
    if start == "[":
        yield from ((number, one.of(dict)) for number, one in enumerate(Json.parse(text).items(), start=1))
        return
    # Of other line breaks than these a text may hold some.
    lines = [(number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), start=1)]
    lines = [(number, line) for number, line in lines if line.strip()]
    if start == "{":
        for number, line in lines:
            with naming(f"line {number}"):
                yield number, Json.parse(line).of(dict)
        return
    if not lines:  # but a byte order mark, or spaces of other kinds
        return
    header = [name.strip() for name in lines[0][1].split("\t")]
    if task.headless and not set(header) & {name for names in task.texts for name in names}:
        header = list(task.headless)
    else:
        lines = lines[1:]
    for number, line in lines:
        yield number, dict(zip(header, line.split("\t"), strict=False))


def _columns(rows: Sequence[tuple[int, Mapping[str, Any]]], task: Task) -> list[str | None]:
    """The names of the texts' columns and of the label's; None for a second text that the file does without."""
    if not rows:
        raise ValueError("holds no texts")
    # One that was broken off has fewer.
    first = max((fields for _, fields in rows), key=len)
    chosen: list[str | None] = []
    for place, names in enumerate((*task.texts, task.label)):
        name = next((name for name in names if name in first), None)
        if name is None and not (place == 1 and task.optional_pair):
            advice = ""
            if names == task.label:
                advice = "; GLUE's test sets come without labels: measure on its dev sets"
            there = ", ".join(map(repr, list(first)[:12]))
            raise ValueError(f"has no column {' or '.join(map(repr, names))} for {task.name}: it has {there}{advice}")
        chosen.append(name)
    return chosen


def _values(fields: Mapping[str, Any], columns: Sequence[str | None]) -> tuple[str, str | None, Any]:
    *texts, label = [None if name is None else Json(fields).field(name) for name in columns]
    text, pair = (*(None if one is None else one.of(str) for one in texts), None)[:2]
    assert label is not None
    assert text is not None
    return text, pair, label.value


def _names(task: Task, labels: Sequence[str] | None, found: Sequence[Any]) -> tuple[str, ...]:
    if task.labels is not None:
        return task.labels
    if labels is not None:
        return tuple(labels)
    # Numbers in their own order, names in the alphabet's.
    named = {_name(label) for label in found if isinstance(label, str | int) and label != ""}
    names = sorted(named, key=lambda name: (not name.isdecimal(), name.zfill(20), name))
    if len(names) < 2:
        raise ValueError(f"every text has the same label, {', '.join(names)}: there is nothing to tell apart")
    return tuple(names)


def _name(label: Any) -> str:
    if not isinstance(label, str | int) or label == "":
        raise ValueError(f"the label is {json.dumps(label, default=repr)[:40]}: expected a name or a whole number")
    return str(label).lower() if isinstance(label, bool) else str(label)


def _place(label: Any, names: Sequence[str]) -> int:
    name = _name(label)
    if name in names:
        return names.index(name)
    # Names that are numbers themselves are not counted.
    if name.isdecimal() and int(name) < len(names) and not any(map(str.isdecimal, names)):
        return int(name)
    missing = _UNPUBLISHED if name == "-1" else ""
    raise ValueError(f"the label is {name[:40]!r}: expected one of {', '.join(names[:20])}{missing}")


def _number(label: Any, low: float, high: float) -> float:
    try:
        number = float(label) if not isinstance(label, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    shown = json.dumps(label, default=repr)[:40]
    if not math.isfinite(number):
        raise ValueError(f"the label is {shown}: expected a number")
    if not low <= number <= high:
        missing = _UNPUBLISHED if number == -1 else ""
        raise ValueError(f"the label is {shown}: expected a number from {low:g} to {high:g}{missing}")
    return number
