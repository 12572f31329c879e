"""Tables of schedules, one a row: Length-Adaptive Transformer's search stores them so, others publish them."""

from typing import NamedTuple

from dtbert.files import naming
from dtbert.model.schedule import LengthSchedule


class StoredSchedule(NamedTuple):
    """A row: its line, the schedule, and its MACs and F1 as the table has them."""

    line: int
    schedule: LengthSchedule
    macs: int
    f1: float


def is_store(text: str) -> bool:
    """Whether a text is a table: one schedule has no tab, and JSON none outside its indentation."""
    return "\t" in text.lstrip().partition("\n")[0]


def read_store(text: str) -> list[StoredSchedule]:
    """The rows of a table with tabs: lengths as `LengthSchedule.parse` reads them, MACs, F1, and whatever follows.

    Raises:
        ValueError: a row is not such a one, or a first row of names has others; the message says which.
    """
    lines = [(number, line.split("\t")) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if lines and not any(letter.isdigit() for letter in lines[0][1][0]):
        _, head = lines.pop(0)
        if head[1:3] not in (["macs", "f1"], ["macs", "score"]):
            raise ValueError(f"expected the columns length_config, macs and f1 with tabs, found {head!r:.80}")
    rows = []
    for number, columns in lines:
        with naming(f"line {number}"):
            if len(columns) < 3:
                raise ValueError(f"expected lengths, MACs and F1 with tabs between, found {columns!r:.80}")
            rows.append(StoredSchedule(number, LengthSchedule.parse(columns[0]), int(columns[1]), float(columns[2])))
    if not rows:
        raise ValueError("the table has no rows")
    return rows
