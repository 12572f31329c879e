"""Files of questions as they come: each kind gives the same questions, another kind is named in one line."""

import csv
import gzip
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dtbert.cli.inputs import Source
from dtbert.jobs.lines import Line, parse_line
from tests.cli.conftest import Run

ROWS: list[dict[str, Any]] = [
    {"id": "a", "question": "Who wrote it?", "context": "Zo\u00eb, of Paris, wrote\nit."},
    {"id": "b", "question": 'Who said "no"?', "context": "\ufeffAda said\tit; \u2018no\u2019.", "more": "1"},
]
MARK = b"\xef\xbb\xbf"
EXPECTED = [Line(number, row["id"], (row["question"], row["context"])) for number, row in enumerate(ROWS, start=1)]


def table(delimiter: str) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["more", "question", "context", "id"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


KINDS: dict[str, bytes] = {
    "lines": b"".join(json.dumps(row).encode() + b"\r\n" for row in ROWS),
    "array": json.dumps(ROWS).encode(),
    "array over lines": b"\n" + json.dumps(ROWS, indent=1, ensure_ascii=False).encode(),
    "csv": table(","),
    "tsv": table("\t"),
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(content: bytes) -> Path:
        path = tmp_path / "questions"
        path.write_bytes(content)
        return path

    return write


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("mark", [b"", MARK], ids=["", "BOM"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_file_gives_its_questions(
    write: Callable[[bytes], Path], kind: str, mark: bytes, packed: bool
) -> None:
    content = mark + KINDS[kind]
    questions = Source.of(write(gzip.compress(content) if packed else content))
    assert (questions.kind, questions.packed) == (kind.split()[0], packed)
    assert list(questions.lines()) == EXPECTED
    assert questions.survey()[1] == 2


def test_parquet_gives_its_questions(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "questions"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    questions = Source.of(path)
    assert questions.kind == "parquet"
    assert list(questions.lines()) == EXPECTED
    parquet.write_table(pyarrow.table({"q": [1]}), path)
    with pytest.raises(ValueError, match="no columns question and context: it has q"):
        Source.of(path).survey()
    path.write_bytes(b"PAR1" + b"x" * 99)
    with pytest.raises(ValueError, match="is a damaged Parquet file"):
        Source.of(path).survey()


def test_parquet_without_pyarrow_says_what_it_needs(
    write: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"questions is Parquet, which needs pyarrow: pip install 'dtbert\[parquet\]'"):
        Source.of(write(b"PAR1 and more")).survey()


def test_bad_rows_are_errors_among_the_others(write: Callable[[bytes], Path]) -> None:
    array = json.dumps([ROWS[0], 7, {"question": "Who?"}]).encode()
    assert [line.error is None for line in Source.of(write(array)).lines()] == [True, False, False]
    short = b"question,context\nWho?\n\nWho?,Ada.,,\nWho?,Ada, too.\n"
    first, second, third = Source.of(write(short)).lines()
    assert str(first.error).startswith("context: missing")
    assert (second.number, second.texts) == (2, ("Who?", "Ada."))
    # What was cut off in silence would be answered about.
    assert str(third.error).startswith("the row has 3 cells, the first line 2: put quotes around")


def test_context_of_a_table_may_be_long(write: Callable[[bytes], Path]) -> None:
    (line,) = Source.of(write(b"question,context\nWho?," + b"ada " * 50_000)).lines()
    assert len(line.texts[1]) == 200_000


OTHERS: list[tuple[bytes, str]] = [
    (b"PK\x03\x04...", "is a zip archive or a spreadsheet"),
    (b"BZh91AY", "compressed with bzip2"),
    (b"\xfd7zXZ\0", "compressed with xz"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd"),
    (b"%PDF-1.7", "is a PDF"),
    (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    (gzip.compress(b"PAR1..."), "is Parquet inside gzip"),
    (gzip.compress(KINDS["lines"] * 99)[:-9], "is a damaged gzip file"),
    (b'{"version": "1.1", "data": [{"paragraphs": []}]}', "is a SQuAD file: `dtbert evaluate` reads it"),
    (b'{\n "data": [{"paragraphs": []}]\n}', "is a SQuAD file, which `dtbert evaluate` reads"),
    (b'{\n "question": "Who?",\n "context": "Ada."\n}', "is one JSON object, over several lines"),
    (b"Who wrote it?\nAda.", "is no file of questions: it begins with 'Who wrote it?'"),
    (b"[1, 2]", "is no file of questions: it begins with '[1, 2]'"),
    (KINDS["lines"].decode().encode("utf-16"), "not UTF-8 text (the mark of UTF-16): .* `iconv -f UTF-16 -t UTF-8`"),
    ("question,context\nWo?,K\xf6ln".encode("cp1252"), "0xf6.: convert it, as by `iconv -f WINDOWS-1252 -t UTF-8`"),
    (b'[{"question": "Who?"', "not JSON"),
]


@pytest.mark.parametrize(("content", "said"), OTHERS, ids=range(len(OTHERS)))
def test_file_of_another_kind_is_named_in_one_line(
    run: Run, model_folder: Path, tmp_path: Path, write: Callable[[bytes], Path], content: bytes, said: str
) -> None:
    source = write(content)
    done = run("answer", "--model", model_folder, "--input", source, "--output", tmp_path / "answers")
    assert done.status == 2
    assert done.err.startswith(f"dtbert: error: {source}")
    assert done.err.count("\n") == 1
    for part in said.split(" .* "):
        assert part in done.err.replace(")", ".") or part in done.err
    assert not (tmp_path / "answers").exists()


def test_table_without_the_columns_says_what_it_has(tmp_path: Path) -> None:
    path = tmp_path / "q.csv.gz"
    path.write_bytes(gzip.compress(b"q,text\nWho?,Ada.\n"))
    with pytest.raises(ValueError, match="no columns question and context: its first line has q, text"):
        Source.of(path)


def test_first_line_may_be_a_bad_one(write: Callable[[bytes], Path]) -> None:
    first, *others = Source.of(write(b"oops\n" + KINDS["lines"])).lines()
    assert "not JSON" in str(first.error)
    assert [line.error for line in others] == [None, None]


def test_batch_answers_an_array_and_goes_on_after_an_interruption(
    run: Run, model_folder: Path, tmp_path: Path, write: Callable[[bytes], Path]
) -> None:
    source, output = write(gzip.compress(KINDS["array"])), tmp_path / "answers"
    arguments = ("answer", "--model", model_folder, "--input", source, "--output", output)
    assert run(*arguments).status == 0
    complete = output.read_bytes()
    assert [json.loads(line)["id"] for line in complete.splitlines()] == ["a", "b"]
    output.write_bytes(complete[:-5])
    assert run(*arguments).status == 0
    assert output.read_bytes() == complete


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_parse_line_takes_any_bytes(raw: bytes) -> None:
    line = parse_line(3, raw)
    assert line.number == 3
    assert line.error is not None


@given(
    st.binary(max_size=80) | st.sampled_from(list(KINDS.values())).flatmap(lambda one: st.just(one[: len(one) // 2]))
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_questions_or_a_value_error(write: Callable[[bytes], Path], content: bytes) -> None:
    path = write(content)
    named = True
    try:
        questions = Source.of(path)
        assert questions.survey()[1] == len(list(questions.lines()))
    except ValueError as error:
        named = str(error).startswith(str(path))
    assert named
