"""`dtbert answer` with - for --input or --output: the same answers as from file to file, as they come."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

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
    for text, source, target, message in (
        ("question,context\na,b\n", "-", "-", "--input -: stdin must be JSON objects, one a line"),
        (LINES, "-", "full.jsonl", "--output full.jsonl is there already, and a run that keeps nothing beside it"),
        (LINES, "-", ".", "--output . is a folder"),
        (LINES, "nothing.jsonl", "-", "nothing.jsonl: No such file"),
    ):
        feed(monkeypatch, text)
        status, out, err = run(*command, "--input", source, "--output", target)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert err.startswith(f"dtbert: error: {message}")
    assert Path("full.jsonl").read_text() == "{}\n"
    feed(monkeypatch, "\n")
    assert run(*command, "--input", "-", "--output", "-") == (0, "", "")


def test_pipe_that_has_closed_is_quiet(model_folder: Path) -> None:
    command = [sys.executable, "-m", "dtbert", "answer", "--model", model_folder, "--input", "-", "--output", "-"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate(json.dumps(ROWS[0]).encode())
    assert (process.returncode, err) == (141, b"")
