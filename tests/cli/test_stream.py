"""`dtbert answer` with - for --input or --output: the same answers as from file to file, as they come."""

import argparse
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dtbert.cli.batch import Work
from dtbert.cli.stream import Write, _stdin_lines, pipe
from dtbert.jobs.lines import QUESTIONS, Line
from tests.cli.conftest import Run

ROWS = [
    {"id": "a", "question": "Who wrote it?", "context": "Ada wrote the letter in London."},
    {"id": 2, "question": "", "context": "Ada."},
    {"question": "Where?", "context": "Zoe said it in Paris, and Ada wrote it in 1843."},
]
LINES = "\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\nnot JSON\n"
ERRORS = [
    "line 3: the question is empty: give it at least one word",
    "line 6: not JSON (Expecting value at character 1)",
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").write_text(LINES, "utf-8")
    return tmp_path


def feed(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="ascii"))


def test_answers_are_those_from_file_to_file(
    run: Run, model_folder: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("answer", "--model", model_folder, "--top", 2)
    assert run(*command, "--input", "in.jsonl", "--output", "out.jsonl").status == 1
    expected = Path("out.jsonl").read_text("utf-8")
    assert [json.loads(line)["line"] for line in expected.splitlines()] == [1, 3, 5, 6]
    for source, target in (("-", "-"), ("in.jsonl", "-"), ("-", "new.jsonl")):
        feed(monkeypatch, LINES)
        status, out, err = run(*command, "--input", source, "--output", target, "--json")
        name = "stdin" if source == "-" else source
        assert (status, err.splitlines()) == (
            1,
            [*(f"dtbert: {name}, {one}" for one in ERRORS), "dtbert: 2 of 4 lines failed"],
        )
        assert (out if target == "-" else Path(target).read_text("utf-8")) == expected
    assert sorted(path.name for path in folder.iterdir()) == [
        "in.jsonl",
        "new.jsonl",
        "out.jsonl",
        "out.jsonl.settings.json",
    ]


def test_what_cannot_be_streamed_is_said(
    run: Run, model_folder: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("answer", "--model", model_folder)
    Path("full.jsonl").write_text("{}\n")
    os.mkfifo("pipe")
    for text, source, target, message in (
        ("question,context\na,b\n", "-", "-", "--input -: stdin must be JSON objects, one a line"),
        (LINES, "-", "full.jsonl", "--output full.jsonl is there already, and a run that keeps nothing beside it"),
        (LINES, "-", ".", "--output . is a folder"),
        (LINES, "nothing.jsonl", "-", "--input nothing.jsonl must be a file: there is none"),
        ("", "pipe", "-", "--input pipe must be a file: it is read more than once; - is stdin"),
    ):
        feed(monkeypatch, text)
        status, out, err = run(*command, "--input", source, "--output", target)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert err.startswith(f"dtbert: error: {message}")
    assert Path("full.jsonl").read_text() == "{}\n"
    feed(monkeypatch, "\n")
    assert run(*command, "--input", "-", "--output", "-") == (0, "", "")


def test_who_waits_for_an_answer_before_asking_on_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, last = (json.dumps(row) for row in ROWS)
    # The second comes in two parts, the last without the end of its line.
    sent = [f"{first}\n\n{second[:9]}", f"{second[9:]}\n", last]
    source, sink = os.pipe()
    seen: list[tuple[int, int]] = []

    def send() -> None:
        if sent:
            os.write(sink, sent.pop(0).encode())
        if not sent:
            os.close(sink)

    @contextmanager
    def conversation(output: str, work: Work) -> Iterator[Write]:
        send()

        def write(line: Line, fields: dict[str, Any]) -> None:
            seen.append((line.number, fields["together"]))
            if sent:
                send()

        yield write

    def together(lines: Sequence[Line]) -> Iterator[tuple[Line, dict[str, Any]]]:
        return ((line, {"together": len(lines)}) for line in lines)

    model: Any = SimpleNamespace(batch_tokens=2048)
    arguments = argparse.Namespace(input="-", output=str(tmp_path / "out"), model=None, quiet=True)
    with os.fdopen(source) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert pipe(arguments, QUESTIONS, lambda _: Work(model, together, {}), conversation) == 0
    assert seen == [(1, 1), (3, 1), (4, 1)]


def test_what_is_there_is_not_cut_where_a_read_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    source, sink = os.pipe()
    os.write(sink, f"{json.dumps(ROWS[0])}\n".encode() * 50)
    os.close(sink)
    monkeypatch.setattr("dtbert.cli.stream._READ", 100)
    with os.fdopen(source) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        lines = list(_stdin_lines(QUESTIONS))
    assert [line and (line.number, line.id) for line in lines] == [(number, "a") for number in range(1, 51)]


def test_pipe_that_has_closed_is_quiet(model_folder: Path) -> None:
    command = [sys.executable, "-m", "dtbert", "answer", "--model", model_folder, "--input", "-", "--output", "-"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate(json.dumps(ROWS[0]).encode())
    assert (process.returncode, err) == (141, b"")
