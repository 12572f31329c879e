"""Files of lines as they come: JSON lines, an array, CSV, TSV, Parquet; all but the last also packed by gzip."""

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, cast

from dtbert.files import GZIP_MAGIC, Json, file_sha256, first_line, utf8
from dtbert.jobs.lines import QUESTIONS, Columns, Line, line_of, parse_line

Kind = Literal["lines", "array", "csv", "tsv", "parquet"]

_HEAD = 1 << 16
_ARRAY = re.compile(rb"\s*\[\s*[{\]]")
# How other files begin, and what to do with them.
_OTHERS = {
    b"PK\x03\x04": "a zip archive or a spreadsheet: unpack it, or save it as CSV",
    b"BZh": "compressed with bzip2: unpack it first (bunzip2)",
    b"\xfd7zXZ": "compressed with xz: unpack it first (unxz)",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it first (unzstd)",
    b"%PDF": "a PDF: take its text out first, as by pdftotext",
    b"version https://git-lfs": "a Git LFS pointer: fetch the file itself (git lfs pull)",
}


@dataclass(frozen=True)
class Source:
    """A file of lines with such texts, whose kind is seen from its content."""

    path: Path
    kind: Kind
    packed: bool
    columns: Columns = QUESTIONS

    @classmethod
    def of(cls, path: Path, columns: Columns = QUESTIONS) -> "Source":
        """The file of this path.

        Raises:
            ValueError: a file of another kind; the message names it, in one line.
            OSError: it cannot be read.
        """
        with path.open("rb") as file:
            packed = file.read(2) == GZIP_MAGIC
        with _opened(path, packed) as file:
            head = file.read(_HEAD)
        if len(head) == _HEAD:  # where it ends it may cut a character
            head = head[: codecs.utf_8_decode(head, "ignore")[1]]
        if head.startswith(b"PAR1"):
            if packed:
                raise ValueError(f"{path} is Parquet inside gzip: unpack it first (gunzip)")
            return cls(path, "parquet", packed, columns)
        if (other := other_kind(head)) is not None:
            raise ValueError(f"{path} is {other}")
        return cls(path, _kind_of(path, head, columns), packed, columns)

    def survey(self) -> tuple[str, int]:
        """The file's SHA-256, and how many lines it has; ValueError where it is damaged."""
        return file_sha256(self.path), sum(1 for _ in self._rows())

    def lines(self) -> Iterator[Line]:
        """The lines, one at a time; blank ones are passed over, and counted."""
        for number, row in self._rows():
            if isinstance(row, bytes):
                yield parse_line(number, row, self.columns)
            else:
                yield line_of(number, row, self.columns) if isinstance(row, Json) else Line(number, error=row)

    def _rows(self) -> Iterator[tuple[int, bytes | Json | str]]:
        if self.kind == "parquet":
            yield from enumerate(_parquet_rows(self.path, self.columns), start=1)
            return
        with _opened(self.path, self.packed) as file:
            if self.kind == "lines":
                yield from ((number, raw) for number, raw in enumerate(file, start=1) if raw.strip())
            elif self.kind == "array":
                yield from enumerate((Json(item) for item in Json.parse(file.read()).of(list)), start=1)
            else:
                yield from enumerate(_table_rows(file, self.kind, self.columns), start=1)


def other_kind(head: bytes) -> str | None:
    """What a file is that holds no text as it is, by its first bytes, and what to do with it; else None."""
    return next((what for beginning, what in _OTHERS.items() if head.startswith(beginning)), None)


@contextmanager
def _opened(path: Path, packed: bool) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked; errors name it."""
    try:
        with gzip.open(path) if packed else path.open("rb") as file:
            yield cast(BinaryIO, file)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is a damaged gzip file ({error}): fetch it again") from error
    except csv.Error as error:
        raise ValueError(f"{path} is a damaged table ({error})") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _kind_of(path: Path, head: bytes, columns: Columns) -> Kind:
    if _ARRAY.match(head.removeprefix(b"\xef\xbb\xbf")):
        return "array"
    lines = [line for line in head.splitlines() if line.strip()]
    if not lines:
        return "lines"
    try:
        first = utf8(lines[0])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if first.lstrip().startswith("{"):
        _check_object(path, first, head)
        return "lines"
    named_tsv = path.name.removesuffix(".gz").endswith(".tsv")
    kinds: tuple[Kind, ...] = ("tsv", "csv") if named_tsv else ("csv", "tsv")
    tables = {kind: _cells(first, kind) for kind in kinds}
    for kind, names in tables.items():
        if set(columns.texts) <= set(names):
            return kind
    if path.name.removesuffix(".gz").endswith((".csv", ".tsv")):
        names = max(tables.values(), key=len)
        raise ValueError(f"{path} has no {columns.names}: its first line has {', '.join(names)}")
    if any(line.lstrip().startswith(b"{") for line in lines):
        return "lines"
    raise ValueError(
        f"{path} is no file of {columns.what}: it begins with {first[:20]!r}; expected JSON objects, one a line, an "
        f"array of them, CSV or TSV whose first line has {' and '.join(columns.texts)}, or Parquet"
    )


def _check_object(path: Path, first: str, head: bytes) -> None:
    """Raise ValueError for a file that is one object as a whole."""
    if first.strip() == "{":
        what = "a SQuAD file, which `dtbert evaluate` reads" if b'"paragraphs"' in head else "one JSON object"
        raise ValueError(f"{path} is {what}, over several lines: give objects, one a line")
    if re.match(r'\s*\{\s*"(data|version)"', first) and "paragraphs" in first:
        raise ValueError(f"{path} is a SQuAD file: `dtbert evaluate` reads it")


def _cells(line: str, kind: Kind) -> list[str]:
    try:
        return [name.strip() for name in next(csv.reader([line], delimiter=_delimiter(kind)), [])]
    except csv.Error:
        return []


def _delimiter(kind: Kind) -> str:
    return "\t" if kind == "tsv" else ","


def _table_rows(file: BinaryIO, kind: Kind, columns: Columns) -> Iterator[Json | str]:
    # A context may be longer than the 131,072 characters that the module allows.
    csv.field_size_limit(2**31 - 1)
    text = io.TextIOWrapper(file, "utf-8-sig", newline="")
    try:
        rows = csv.reader(text, delimiter=_delimiter(kind))
        header = [name.strip() for name in next(row for row in rows if row)]
        for row in rows:
            if row:
                yield _of_cells(header, row, columns)
    except UnicodeDecodeError as error:
        utf8(error.object)  # says more
        raise
    finally:
        text.detach()


def _of_cells(header: list[str], row: list[str], columns: Columns) -> Json | str:
    if any(row[len(header) :]):
        return (
            f"the row has {len(row)} cells, the first line {len(header)}: put quotes around a text that holds what "
            "separates cells"
        )
    # An empty cell is how a table leaves out what a row may do without.
    cells = zip(header, row, strict=False)
    return Json({name: cell for name, cell in cells if name in columns.read and (cell or name not in columns.more)})


def _parquet_rows(path: Path, columns: Columns) -> Iterator[Json]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError(
            f"{path} is Parquet, which needs pyarrow: pip install 'dtbert[parquet]', or give JSON lines"
        ) from None
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(columns=columns.of_table(str(path), file.schema_arrow.names)):
                yield from map(Json, batch.to_pylist())
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is a damaged Parquet file ({json.dumps(first_line(error))})") from error
