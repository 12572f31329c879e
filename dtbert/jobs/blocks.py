"""Blocks: what a job answers at a time, a range of one input file.

Where blocks are cut is planned once, before the first is answered, and written down; each knows a digest of what it was
cut from, so that no block is ever answered from other bytes than planned. Of JSON lines the plan reads all bytes, and
parses none; of Parquet it reads the footers, and some rows of each row group.
"""

import glob
import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from dtbert.files import Json
from dtbert.jobs.lines import QUESTIONS, Line, line_of, parse_line
from dtbert.jobs.places import Place

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

_HEAD = 1 << 16
_PARQUET = b"PAR1"
_TAIL = 8  # bytes after a Parquet file's footer: its length, and PAR1 again
_SAMPLE = 256  # rows of a row group whose texts are measured


class InputFile(NamedTuple):
    """A file of questions, and its size in bytes."""

    name: str
    size: int


@dataclass(frozen=True)
class Block:
    """A range of an input file.

    Attributes:
        number: of all blocks of the job, from 0; it names the output.
        file: the input file, as `Place.name` has it.
        kind: ``"lines"`` or ``"parquet"``.
        first: the number of its first line or row in the file, from 1.
        rows: lines or rows, blank lines counted.
        start, size: the bytes that ``sha256`` is of: the lines themselves, or the footer of a Parquet file, which
            says where everything is.
        sha256: in hexadecimal.
    """

    number: int
    file: str
    kind: str
    first: int
    rows: int
    start: int
    size: int
    sha256: str


def input_files(source: str) -> list[InputFile]:
    """The files of questions that a name stands for, in the order of their names: a file, a folder, or a pattern.

    Of a folder they are all files in it and in folders below, except what begins with ``.`` or ``_``.

    Raises:
        OSError: there is none, or it cannot be read.
        ValueError: no such kind of place is known, or one that does not say how large its files are.
    """
    place = Place.of(source)
    fs, path = place.fs, place.path
    if fs.isdir(path):
        found = {
            file: info
            for file, info in fs.find(path, detail=True).items()
            if not any(part.startswith((".", "_")) for part in file.removeprefix(path).split("/"))
        }
    elif fs.exists(path):
        found = {path: fs.info(path)}
    else:
        found = fs.glob(path, detail=True) if glob.has_magic(path) else {}
    files = [InputFile(place.at(file).name, info["size"]) for file, info in found.items() if info["type"] == "file"]
    if not files:
        raise FileNotFoundError(f"--input {source}: there are no files")
    if unknown := next((file.name for file in files if file.size is None), None):
        raise ValueError(f"{unknown} is of unknown size, so it cannot be cut into blocks: copy it to another place")
    return sorted(files)


def plan(files: Iterable[InputFile], block_bytes: int) -> list[Block]:
    """The blocks of all files: as many whole rows as fill so many bytes of text, or one row.

    Raises:
        ValueError: a file that holds neither JSON lines nor Parquet with these columns; the message names it.
        OSError: one cannot be read.
    """
    found: list[Block] = []
    for name, size in files:
        place = Place.of(name)
        ranges = _ranges(place, size, block_bytes) if size else ()
        found += (Block(number, name, *one) for number, one in enumerate(ranges, start=len(found)))
    return found


def read_block(block: Block) -> list[Line]:
    """The questions of a block; blank lines are passed over.

    Raises:
        ValueError: the file is not what it was when the job was planned.
        OSError: it cannot be read.
    """
    place = Place.of(block.file)
    content = place.fs.cat_file(place.path, block.start, block.start + block.size)
    if hashlib.sha256(content).hexdigest() != block.sha256:
        raise ValueError(
            f"{block.file} was changed since the job was planned: put it back, or name another --output for a new job"
        )
    if block.kind == "lines":
        numbered = enumerate(io.BytesIO(content), block.first)
        return [parse_line(number, raw) for number, raw in numbered if raw.strip()]
    rows = _parquet_rows(place, block.first - 1, block.rows)
    return [line_of(number, Json(row)) for number, row in enumerate(rows, block.first)]


# What `Block` has after its file.
_Range = tuple[str, int, int, int, int, str]


def _ranges(place: Place, size: int, block_bytes: int) -> Iterator[_Range]:
    head = place.fs.cat_file(place.path, 0, min(size, _HEAD))
    if head.startswith(_PARQUET):
        return _parquet_ranges(place, size, block_bytes)
    lines = [line for line in head.removeprefix(b"\xef\xbb\xbf").splitlines() if line.strip()]
    if lines and not any(line.lstrip().startswith(b"{") for line in lines):
        raise ValueError(
            f"{place.name} is neither JSON objects, one a line, nor Parquet (it begins with {head[:8]!r}): unpack or "
            "convert it first, or leave it out by a pattern such as 'folder/*.jsonl'"
        )
    return _line_ranges(place, block_bytes)


def _line_ranges(place: Place, block_bytes: int) -> Iterator[_Range]:
    first, start = 1, 0
    with place.fs.open(place.path, "rb") as file:
        while content := file.read(block_bytes):
            if not content.endswith(b"\n"):
                content += file.readline()
            rows = content.count(b"\n") + (not content.endswith(b"\n"))
            yield "lines", first, rows, start, len(content), hashlib.sha256(content).hexdigest()
            first, start = first + rows, start + len(content)


def _parquet_ranges(place: Place, size: int, block_bytes: int) -> Iterator[_Range]:
    with place.fs.open(place.path, "rb") as raw, _parquet(place, raw) as file:
        groups = [(file.metadata.row_group(index).num_rows, index) for index in range(file.num_row_groups)]
        sizes = [(rows, _text_bytes(file, index)) for rows, index in groups if rows]
    length = int.from_bytes(place.fs.cat_file(place.path, size - _TAIL, size)[:4], "little")
    start = size - _TAIL - length
    footer = hashlib.sha256(place.fs.cat_file(place.path, start, size - _TAIL)).hexdigest()
    first = 1
    for rows in row_cuts(sizes, block_bytes):
        yield "parquet", first, rows, start, length, footer
        first += rows


def row_cuts(groups: Iterable[tuple[int, float]], most: int) -> Iterator[int]:
    """How many rows each block has, of row groups with so many rows, and so many bytes in each of these."""
    rows, size = 0, 0.0
    for count, each in groups:
        left = count
        while left:
            room = max(0, int((most - size) / each))
            taken = min(left, room if rows else max(room, 1))
            rows, size, left = rows + taken, size + taken * each, left - taken
            if left:
                yield rows
                rows, size = 0, 0.0
    if rows:
        yield rows


def _text_bytes(file: "ParquetFile", group: int) -> float:
    """The mean size of a row's question and context, by the first rows: what the file says is compressed."""
    columns = QUESTIONS.of_table("", file.schema_arrow.names)
    rows = next(file.iter_batches(_SAMPLE, [group], columns)).to_pylist()
    return max(1.0, sum(len(text) for row in rows for text in row.values() if isinstance(text, str)) / len(rows))


def _parquet_rows(place: Place, skipped: int, rows: int) -> Iterator[Mapping[str, Any]]:
    """So many rows after the skipped ones; of the row groups that hold none of them nothing is read."""
    with place.fs.open(place.path, "rb") as raw, _parquet(place, raw) as file:
        groups: list[int] = []
        start = left_out = 0
        for index in range(file.num_row_groups):
            end = start + file.metadata.row_group(index).num_rows
            if skipped < end and start < skipped + rows:
                left_out = left_out if groups else skipped - start
                groups.append(index)
            start = end
        for batch in file.iter_batches(row_groups=groups, columns=QUESTIONS.of_table("", file.schema_arrow.names)):
            taken = batch.slice(left_out, rows)
            yield from taken.to_pylist()
            left_out, rows = max(0, left_out - len(batch)), rows - len(taken)
            if not rows:
                return


def _parquet(place: Place, raw: Any) -> "ParquetFile":
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(raw)
    except ArrowException as error:
        raise ValueError(f"{place.name} is a damaged Parquet file ({str(error).partition(chr(10))[0]})") from error
    QUESTIONS.of_table(place.name, file.schema_arrow.names)
    return file
