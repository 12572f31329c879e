"""`dtbert answer --input --output`: good and bad lines, a chunk at a time."""

import io
import json
import sys
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtbert.cli.batch import Work, chunks, remaining, results
from dtbert.jobs.lines import Line, answered
from dtbert.qa import QuestionAnswerer
from tests.cli.conftest import Run
from tests.cli.questions import BAD_LINES, GOOD, read


def test_batch_answers_each_line_in_order(
    run: Run, command: tuple[str, ...], model_folder: Path, tmp_path: Path
) -> None:
    plain = {"question": "Where?", "context": "Zo\u00eb wrote it.", "more": 1}
    source = b"\xef\xbb\xbf%s\r\n\n  \n%s" % (json.dumps(GOOD).encode(), json.dumps(plain).encode())
    (tmp_path / "q.jsonl").write_bytes(source)
    assert run(*command) == (0, "", "")
    answerer = QuestionAnswerer.load(model_folder)
    first, second = read(tmp_path / "a.jsonl")
    best = answerer(GOOD["question"], GOOD["context"])
    assert first == {
        "line": 1,
        "id": "a",
        "answer": best.text,
        "start": best.start,
        "end": best.end,
        "score": pytest.approx(best.score, rel=1e-5),
        "margin": pytest.approx(best.margin, rel=1e-5),
    }
    assert (second["line"], second["answer"]) == (4, answerer("Where?", "Zo\u00eb wrote it.").text)
    assert "id" not in second


def test_batch_with_top_lists_the_answers(run: Run, command: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps(GOOD))
    run(*command, "--top", 3)
    (line,) = read(tmp_path / "a.jsonl")
    assert len(line["answers"]) == 3
    assert line["answers"][0]["answer"] == line["answer"]


def test_batch_reports_bad_lines_and_answers_the_rest(run: Run, command: tuple[str, ...], tmp_path: Path) -> None:
    source = tmp_path / "q.jsonl"
    good = json.dumps(GOOD).encode()
    source.write_bytes(b"\n".join([good, *(line for line, _, _ in BAD_LINES), good, b""]))
    status, out, err = run(*command)
    assert (status, out) == (1, "")
    lines = read(tmp_path / "a.jsonl")
    assert [line["line"] for line in lines] == list(range(1, len(BAD_LINES) + 3))
    assert {"answer", "score"} <= lines[0].keys() & lines[-1].keys()
    messages = err.splitlines()
    for number, ((_, identifier, message), line) in enumerate(zip(BAD_LINES, lines[1:-1], strict=True), start=2):
        assert message in line["error"]
        assert line.get("id") == identifier
        assert "answer" not in line
        assert messages[number - 2] == f"dtbert: {source}, line {number}: {line['error']}"
    total = f"dtbert: {len(BAD_LINES)} of {len(BAD_LINES) + 2} lines failed: see"
    assert messages[-1].startswith(total)
    # A second run has nothing to do, and says the same of the whole.
    before = (tmp_path / "a.jsonl").read_bytes()
    again = run(*command)
    assert (again.status, again.err.splitlines()) == (1, messages[-1:])
    assert (tmp_path / "a.jsonl").read_bytes() == before


def test_batch_says_ids_and_texts_without_steering_the_terminal(
    run: Run, command: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps({"id": 1, "question": "who?", "\x1b[2J\x9b1m": ""}))
    _, _, err = run(*command)
    assert "context: missing" in err
    assert not {"\x1b", "\x9b"} & set(err)
    assert "\\x1b[2J\\x9b1m" in err


def test_batch_of_an_empty_input_has_an_empty_output(run: Run, command: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_bytes(b"\n \n")
    assert run(*command) == (0, "", "")
    assert (tmp_path / "a.jsonl").read_bytes() == b""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("quiet", "shown"), [((), True), (("--quiet",), False)])
def test_batch_shows_progress_on_a_terminal_unless_quiet(
    run: Run,
    command: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    quiet: tuple[str, ...],
    shown: bool,
) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps(GOOD))
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    run(*command, *quiet)
    assert ("1/1" in terminal.getvalue()) == shown


LINES = st.lists(st.builds(lambda size: Line(1, None, ("q", "c" * size)), st.integers(0, 60)), max_size=40)


def size(chunk: list[Line]) -> int:
    return sum(len("".join(line.texts)) + 12 for line in chunk)


@given(LINES, st.integers(0, 40))
def test_chunks_hold_every_line_and_are_bounded(lines: list[Line], done: int) -> None:
    found = list(chunks(iter(lines), 50))
    assert [line for chunk in found for line in chunk] == lines
    assert all(len(chunk) == 1 or (chunk and size(chunk) <= 50) for chunk in found)
    # None could hold the first line of the next, too.
    assert all(size([*chunk, after[0]]) > 50 for chunk, after in pairwise(found))
    # What goes on after some lines has the same chunks, of which the first may hold some that are done.
    left = list(remaining(iter(lines), done, 50))
    assert [chunk for chunk, _ in left] == found[len(found) - len(left) :]
    assert [line for chunk, there in left for line in chunk[there:]] == lines[done:]
    assert not any(there for _, there in left[1:])
    # Where none has come yet, those before are not waited with.
    before, after = lines[:done], lines[done:]
    assert list(chunks(iter([*before, None, *after]), 50)) == [*chunks(iter(before), 50), *chunks(iter(after), 50)]


def test_batch_holds_a_chunk_at_a_time(model_folder: Path) -> None:
    taken: list[int] = []

    def lines() -> Iterator[Line]:
        for number in range(1, 41):
            taken.append(number)
            yield Line(number, None, ("Who wrote it?", "Ada wrote it."))

    answerer = QuestionAnswerer.load(model_folder)
    work = Work(answerer, partial(answered, answerer, top=1, asking={}), {})
    for line, fields in results(work, remaining(lines(), 0, 4 * 40)):
        assert "answer" in fields
        # A chunk of four, and the first of the next.
        assert len(taken) <= line.number + 4
    assert len(taken) == 40


def test_batch_may_answer_with_nothing(run: Run, command: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps(GOOD))
    assert run(*command, "--no-answer", "--threshold", 1e6, "--top", 2).status == 0
    (line,) = read(tmp_path / "a.jsonl")
    assert (line["answer"], line["start"], line["end"], line["margin"]) == ("", 0, 0, 0)
    assert 0 < line["score"] < 1
    assert line["answers"][1]["answer"] != ""
    assert "(threshold)" in run(*command, "--no-answer", "--threshold", -1e6, "--top", 2).err
    assert "(overlap)" in run(*command, "--no-answer", "--threshold", 1e6, "--top", 2, "--overlap").err
    assert "give --no-answer with it" in run(*command, "--threshold", 1).err
