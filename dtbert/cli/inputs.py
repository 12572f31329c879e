"""Files of questions as they come: JSON lines, an array, CSV, TSV, Parquet; all but the last also packed by gzip."""

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from dtbert.files import GZIP_MAGIC, Json, file_sha256, utf8
from dtbert.jobs.lines import COLUMNS, Line, line_of, parse_line, question_columns

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
_EXPECTED = (
    "expected JSON objects, one a line, an array of them, CSV or TSV whose first line has question and context, or "
    "Parquet"
)


@dataclass(frozen=True)
class Questions:
    """A file of questions, whose kind is seen from its content."""

    path: Path
    kind: Kind
    packed: bool

    @classmethod
    def of(cls, path: Path) -> "Questions":
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
            return cls(path, "parquet", packed)
        if (other := other_kind(head)) is not None:
            raise ValueError(f"{path} is {other}")
        return cls(path, _kind_of(path, head), packed)

    def survey(self) -> tuple[str, int]:
        """The file's SHA-256, and how many questions it has; ValueError where it is damaged."""
        return file_sha256(self.path), sum(1 for _ in self._rows())

    def lines(self) -> Iterator[Line]:
        """The questions, one at a time; blank lines are passed over, and counted."""
        for number, row in self._rows():
            yield parse_line(number, row) if isinstance(row, bytes) else line_of(number, row)

    def _rows(self) -> Iterator[tuple[int, bytes | Json]]:
        if self.kind == "parquet":
            yield from enumerate(map(Json, _parquet_rows(self.path)), start=1)
            return
        with _opened(self.path, self.packed) as file:
            if self.kind == "lines":
                yield from ((number, raw) for number, raw in enumerate(file, start=1) if raw.strip())
            elif self.kind == "array":
                yield from enumerate((Json(item) for item in Json.parse(file.read()).of(list)), start=1)
            else:
                yield from enumerate(map(Json, _table_rows(file, self.kind)), start=1)


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


def _kind_of(path: Path, head: bytes) -> Kind:
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
    tables: dict[Kind, list[str]] = {kind: _cells(first, kind) for kind in ("csv", "tsv")}
    for kind, names in tables.items():
        if {"question", "context"} <= set(names):
            return kind
    if path.name.removesuffix(".gz").endswith((".csv", ".tsv")):
        names = max(tables.values(), key=len)
        raise ValueError(f"{path} has no columns question and context: its first line has {', '.join(names)}")
    if any(line.lstrip().startswith(b"{") for line in lines):
        return "lines"
    raise ValueError(f"{path} is no file of questions: it begins with {first[:20]!r}; {_EXPECTED}")


def _check_object(path: Path, first: str, head: bytes) -> None:
    """Raise ValueError for a file that is one object as a whole."""
    if first.strip() == "{":
        what = "a SQuAD file, which `dtbert evaluate` reads" if b'"paragraphs"' in head else "one JSON object"
        raise ValueError(f"{path} is {what}, over several lines: give objects with question and context, one a line")
    if re.match(r'\s*\{\s*"(data|version)"', first) and "paragraphs" in first:
        raise ValueError(f"{path} is a SQuAD file: `dtbert evaluate` reads it")


def _cells(line: str, kind: Kind) -> list[str]:
    try:
        return [name.strip() for name in next(csv.reader([line], delimiter=_delimiter(kind)), [])]
    except csv.Error:
        return []


def _delimiter(kind: Kind) -> str:
    return "\t" if kind == "tsv" else ","


def _table_rows(file: BinaryIO, kind: Kind) -> Iterator[Mapping[str, Any]]:
    # A context may be longer than the 131,072 characters that the module allows.
    csv.field_size_limit(2**31 - 1)
    text = io.TextIOWrapper(file, "utf-8-sig", newline="")
    try:
        rows = csv.reader(text, delimiter=_delimiter(kind))
        header = [name.strip() for name in next(row for row in rows if row)]
        for row in rows:
            if row:
                yield {name: cell for name, cell in zip(header, row, strict=False) if name in COLUMNS}
    except UnicodeDecodeError as error:
        utf8(error.object)  # says more
        raise
    finally:
        text.detach()


def _parquet_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError(
            f"{path} is Parquet, which needs pyarrow: pip install 'dtbert[parquet]', or give JSON lines"
        ) from None
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(columns=question_columns(str(path), file.schema_arrow.names)):
                yield from batch.to_pylist()
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is a damaged Parquet file ({json.dumps(reason)})") from error
