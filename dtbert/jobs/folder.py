"""The output of a job: a folder with the plan of its blocks, a part for each that is done, and a record of it.

    _manifest.json            what the job is: its settings, its input files, its blocks; written before any part
    part-000000.jsonl         the answers to the first block, or part-000000.parquet
    _blocks/part-000000.json  written after the part: how long it took, how many rows failed
    _times.json               all records and how long the last run took; written when all is done

Whatever reads folders of Parquet or JSON lines passes over names that begin with ``_`` or ``.``. A block is done where
its record and its part are there. Each file is written whole, and a block that is answered twice gives the same part:
so it does not matter when whoever writes is killed, nor whether two write the same.
"""

import glob
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from dtbert.files import Json, differing, lock, naming
from dtbert.jobs.blocks import Block, InputFile
from dtbert.jobs.lines import SETTINGS
from dtbert.jobs.places import Place

Format = Literal["jsonl", "parquet"]
FORMATS = get_args(Format)

_MANIFEST, _RECORDS, _TIMES = "_manifest.json", "_blocks", "_times.json"


@dataclass(frozen=True)
class Record:
    """What is known of a block that is done.

    Attributes:
        block: its number.
        rows, failed: rows of its part, and those that hold an error.
        characters: of its questions and contexts.
        bytes_read, bytes_written: of the input (of Parquet without compression, as text), and of the part.
        read_seconds, answer_seconds, write_seconds: how long each took.
        worker: the process that did it, ``host:pid``.
    """

    block: int
    rows: int
    failed: int
    characters: int
    bytes_read: int
    bytes_written: int
    read_seconds: float
    answer_seconds: float
    write_seconds: float
    worker: str


@dataclass(frozen=True)
class Manifest:
    """What a job is."""

    settings: dict[str, Any]
    files: list[InputFile]
    blocks: list[Block]

    def to_json(self) -> str:
        """As `_manifest.json` has it: blocks one a line."""
        files = [file._asdict() for file in self.files]
        blocks = ",\n".join(json.dumps(asdict(block)) for block in self.blocks)
        return (
            f'{{"settings": {json.dumps(self.settings)},\n"files": {json.dumps(files)},\n"blocks": [\n{blocks}\n]}}\n'
        )

    @classmethod
    def parse(cls, text: bytes) -> "Manifest":
        """The same from its JSON; ValueError says what is wrong with it."""
        found = Json.parse(text).exactly(["settings", "files", "blocks"])
        return cls(
            found.field("settings").of(dict),
            [one.record(InputFile) for one in found.field("files").items()],
            [one.record(Block) for one in found.field("blocks").items()],
        )


@dataclass(frozen=True)
class OutputFolder:
    """The folder that a job writes."""

    place: Place
    format: Format

    def manifest(self, settings: Mapping[str, Any], files: Iterable[InputFile]) -> Manifest | None:
        """The manifest of the same job, which was interrupted here or is done; None where the folder is new.

        Raises:
            ValueError: the folder holds the parts of another job, or a damaged manifest.
            FileExistsError: it holds something else, or is a file.
            OSError: it cannot be read.
        """
        fs, place = self.place.fs, self.place / _MANIFEST
        advice = f": name another --output, or delete {self.place.name} to start afresh"
        if not fs.exists(place.path):
            if fs.isfile(self.place.path) or (fs.exists(self.place.path) and self._files()):
                raise FileExistsError(
                    f"--output {self.place.name} is there already, and is no job's folder: name another"
                )
            return None
        with naming(f"{place.name} is damaged", advice):
            before = Manifest.parse(fs.cat_file(place.path))
        changed = differing(before.settings, settings)
        if before.files != list(files):
            changed.append("input files")
        if changed:
            names = ", ".join(SETTINGS.get(name, name) for name in changed)
            raise ValueError(f"{self.place.name} was made from other settings ({names}){advice}")
        return before

    def write_manifest(self, manifest: Manifest) -> None:
        """Make the folder the one of this job."""
        self.place.fs.makedirs((self.place / _RECORDS).path, exist_ok=True)
        (self.place / _MANIFEST).write(manifest.to_json().encode())

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other jobs of this machine from the folder, where it is local.

        Raises:
            ValueError: another process writes there.
        """
        if not self.place.local:
            yield
            return
        self.place.fs.makedirs(self.place.path, exist_ok=True)
        descriptor = os.open(self.place.path, os.O_RDONLY)
        try:
            if not lock(descriptor):
                raise ValueError(f"another process is writing {self.place.name}: wait for it, or name another --output")
            yield
        finally:
            os.close(descriptor)

    def part(self, block: int) -> Place:
        """Where the answers to a block are written."""
        return self.place / f"{_name(block)}.{self.format}"

    def write_record(self, record: Record) -> None:
        """Say that a block is done, when its part is written."""
        self._record(record.block).write(json.dumps(asdict(record)).encode())

    def left(self, blocks: Iterable[Block]) -> list[Block]:
        """The blocks that are not done yet."""
        there = self._files()
        return [one for one in blocks if not there >= {self.part(one.number).path, self._record(one.number).path}]

    def records(self, blocks: Iterable[Block]) -> list[Record]:
        """The records of blocks that are done, in their order."""
        paths = [self._record(block.number).path for block in blocks]
        # A folder whose name holds a bracket is no pattern.
        found = self.place.fs.cat([glob.escape(path) for path in paths]) if paths else {}
        return [Json.parse(found[path]).record(Record) for path in paths]

    def finished(self) -> bool:
        """Whether a run has come to the end."""
        return bool(self.place.fs.exists((self.place / _TIMES).path))

    def finish(self, times: Mapping[str, Any]) -> None:
        """Write the times, and remove what killed workers had begun to write."""
        (self.place / _TIMES).write(json.dumps(times).encode())
        if begun := [path for path in self._files() if path.endswith(".partial")]:
            self.place.fs.rm(begun)

    def _record(self, block: int) -> Place:
        return self.place / _RECORDS / f"{_name(block)}.json"

    def _files(self) -> set[str]:
        self.place.fs.invalidate_cache()
        return set(self.place.fs.find(self.place.path))


def _name(block: int) -> str:
    return f"part-{block:06}"
