"""What every part writes as it goes: JSON Lines, of which a crash costs the last one at the most."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def append(path: Path, kind: str, record: Record) -> None:
    """Add a line, in one write: several processes may share the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The first line break ends what a killed process left of its line.
    line = "\n" + json.dumps({"kind": kind, **record}, default=str) + "\n"
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(handle, line.encode())
    finally:
        os.close(handle)


def read(path: Path) -> tuple[list[Record], int]:
    """The records, and how many lines are none: those of processes that were killed while they wrote."""
    found, broken = [], 0
    for line in path.read_text("utf-8", "replace").splitlines() if path.is_file() else ():
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            broken += 1
            continue
        if isinstance(record, dict) and "kind" in record:
            found.append(record)
        else:
            broken += 1
    return found, broken


def of_kind(records: list[Record], kind: str) -> Iterator[Record]:
    return (record for record in records if record["kind"] == kind)
