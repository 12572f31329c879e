"""`dtbert answer --input --output`: bad lines, and going on after an interruption at any moment."""

import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dtbert.cli import batch, main
from dtbert.cli.batch import chunks, remaining
from dtbert.cli.inputs import Line, Questions
from dtbert.qa import QuestionAnswerer
from tests.cli.command import run_command
from tests.cli.conftest import WORDS, Run

GOOD = {"id": "a", "question": "Who wrote it?", "context": "Ada wrote it in London."}

# Each: a line of the input, the id that its output has, and what its error says.
BAD_LINES: list[tuple[bytes, Any, str]] = [
    (b'{"question": "Who"', None, "at character 19)"),
    (b"[" * 100_000, None, "not JSON"),
    (b'{"id": ' + b"9" * 5000 + b"}", None, "not JSON"),
    (b"caf\xe9", None, "(byte 4 is 0xe9)"),
    (b"[1, 2]", None, '"question" and "context"'),
    (b'{"id": 1.5, "question": "Who?", "context": "Ada."}', None, "id: expected a text or a whole number, found 1.5"),
    (b'{"id": true, "question": "Who?", "context": "Ada."}', None, "id: expected a text or a whole number, found true"),
    (b'{"id": 7, "question": "Who?"}', 7, "context: missing"),
    (b'{"id": "b", "context": "Ada."}', "b", "question: missing"),
    (b'{"id": 8, "question": ["Who?"], "context": "Ada."}', 8, "question: expected a text, found a list"),
    (b'{"question": "Who?", "context": null}', None, "context: expected a text, found null"),
    (b'{"question": "", "context": "Ada."}', None, "the question is empty"),
    (b'{"question": "Who?", "context": " \\n"}', None, "the context is blank"),
    (b'{"question": "Who\\ud800?", "context": "Ada."}', None, "lone surrogate"),
    (b'{"id": "\\udfff", "question": "Who?", "context": "\\udfff"}', "\udfff", "lone surrogate"),
    (json.dumps({"question": "who " * 400, "context": "Ada."}).encode(), None, "the question has 400 tokens"),
    (b'{"question": "Who?", "context": "\\u0000"}', None, "the context has only"),
]


def write_questions(path: Path, count: int) -> Path:
    """Questions over contexts of very different lengths, some bad, some lines blank."""
    choose = random.Random(0)
    words = WORDS.split()
    with path.open("wb") as file:
        for number in range(count):
            context = " ".join(choose.choices(words, k=choose.choice([3, 10, 30, 90])))
            fields = {"id": number, "question": "Who wrote " + choose.choice(words) + "?", "context": context}
            file.write(json.dumps(fields).encode() + b"\n")
            if number % 5 == 3:
                file.write(choose.choice(BAD_LINES[5:])[0] + b"\n" + b" \t\r\n" * choose.randrange(3))
    return path


@pytest.fixture
def command(model_folder: Path, tmp_path: Path) -> tuple[str, ...]:
    files = ("--input", str(tmp_path / "q.jsonl"), "--output", str(tmp_path / "a.jsonl"))
    return ("answer", "--model", str(model_folder), *files)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


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


# Characters for each token of a batch, so that a few lines fill one.
SMALL = 0.5


@pytest.fixture(scope="module")
def whole(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an input, and the output of an unbroken run."""
    folder = tmp_path_factory.mktemp("whole")
    write_questions(folder / "q.jsonl", 30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch, "CHARACTERS_PER_TOKEN", SMALL)
        assert run_in(folder, model_folder) == 1
    assert len(read(folder / "a.jsonl")) == 36
    return folder


def run_in(folder: Path, model_folder: Path) -> int:
    files = ["--input", str(folder / "q.jsonl"), "--output", str(folder / "a.jsonl")]
    return main(["answer", "--model", str(model_folder), *files])


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_batch_goes_on_from_any_byte(
    whole: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, data: st.DataObject
) -> None:
    monkeypatch.setattr(batch, "CHARACTERS_PER_TOKEN", SMALL)
    output = whole / "a.jsonl"
    complete = output.read_bytes()
    newlines = [index + 1 for index, byte in enumerate(complete) if byte == ord("\n")]
    size = data.draw(st.integers(0, len(complete)) | st.sampled_from([*newlines, *(end - 1 for end in newlines)]))
    try:
        output.write_bytes(complete[:size])
        assert run_in(whole, model_folder) == 1
        assert output.read_bytes() == complete
    finally:
        output.write_bytes(complete)


def test_batch_that_goes_on_says_and_does_little_again(
    whole: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(batch, "CHARACTERS_PER_TOKEN", SMALL)
    asked: list[str] = []
    answer_many = QuestionAnswerer.answer_many

    def counted(answerer: QuestionAnswerer, pairs: Any, **options: Any) -> Any:
        given = list(pairs)
        asked.extend(context for _, context in given)
        return answer_many(answerer, given, **options)

    monkeypatch.setattr(QuestionAnswerer, "answer_many", counted)
    output = whole / "a.jsonl"
    complete = output.read_bytes()
    lines = complete.splitlines(keepends=True)
    sizes = [len(chunk) for chunk in chunks(Questions.of(whole / "q.jsonl").lines(), int(SMALL * 2048))]
    begins = [sum(sizes[:index]) for index in range(len(sizes))]
    assert len(sizes) > 4
    for done, again in ((begins[2], 0), (begins[2] + 2, 2), (begins[-1] - 1, sizes[-2] - 1)):
        asked.clear()
        capsys.readouterr()
        output.write_bytes(b"".join(lines[:done]))
        assert run_in(whole, model_folder) == 1
        assert output.read_bytes() == complete
        note = f"dtbert: going on after {done} of 36 lines, {again or 'none'} of them once more"
        assert capsys.readouterr().err.startswith(note)
        assert len(asked) <= again + len(lines) - done
    assert again > 0


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no forkserver")
def test_batch_survives_kills_at_any_moment(model_folder: Path, tmp_path: Path, more_kills: int) -> None:
    write_questions(tmp_path / "q.jsonl", 1200)
    assert run_in(tmp_path, model_folder) == 1
    unbroken, broken, log = (tmp_path / name for name in ("a.jsonl", "broken.jsonl", "log"))
    size = unbroken.stat().st_size
    files = ["--input", str(tmp_path / "q.jsonl"), "--output", str(broken), "--threads", "1"]
    # Each process is a copy of one that has loaded torch, and so starts at once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.cli.command"])

    def start() -> ForkServerProcess:
        arguments = ["answer", "--model", str(model_folder), *files]
        process = context.Process(target=run_command, args=(arguments, log))
        process.start()
        return process

    choose = random.Random(0)
    # The first interruption is Ctrl-C, which tidies up; the others leave no chance to.
    kills = more_kills or 6
    moments = [1, *sorted(choose.randrange(size // 10, size * 3 // 4) for _ in range(kills))]
    for moment, end in zip(moments, [signal.SIGINT, *[signal.SIGKILL] * kills], strict=True):
        process = start()
        while process.exitcode is None and (not broken.exists() or broken.stat().st_size < moment):
            process.join(0.002)
        assert process.pid is not None
        os.kill(process.pid, end)
        process.join()
        assert process.exitcode == (130 if end == signal.SIGINT else -signal.SIGKILL), log.read_text()
        assert moment <= broken.stat().st_size < size
    process = start()
    process.join()
    assert process.exitcode == 1
    assert broken.read_bytes() == unbroken.read_bytes()
    assert [line["line"] for line in read(broken)] == [
        line.number for line in Questions.of(tmp_path / "q.jsonl").lines()
    ]
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: lines[1:],
        lambda lines: [*lines[:3], *lines[2:]],
        lambda lines: [*lines, lines[-1]],
        lambda lines: [lines[0], b'{"line": 2, "id": "other"}\n', *lines[2:]],
        lambda lines: [lines[0], b'{"line": 2}\n', *lines[2:]],
        lambda lines: [*lines[:4], b"\n", *lines[4:]],
        lambda lines: [*lines[:4], b"[]\n"],
        lambda lines: [b"\0" * 9 + b"\n"],
    ],
    ids=["lost", "doubled", "one more", "other id", "no id", "blank", "list", "zeros"],
)
def test_batch_refuses_an_output_of_another_input(
    whole: Path, model_folder: Path, capsys: pytest.CaptureFixture[str], change: Callable[[list[bytes]], list[bytes]]
) -> None:
    output = whole / "a.jsonl"
    complete = output.read_bytes()
    changed = b"".join(change(complete.splitlines(keepends=True)))
    try:
        output.write_bytes(changed)
        assert run_in(whole, model_folder) == 2
        assert output.read_bytes() == changed
    finally:
        output.write_bytes(complete)
    assert "name another --output, or delete" in capsys.readouterr().err


def test_batch_refuses_an_output_made_otherwise(run: Run, command: tuple[str, ...], tmp_path: Path) -> None:
    source, output, record = (tmp_path / name for name in ("q.jsonl", "a.jsonl", "a.jsonl.settings.json"))
    source.write_text(json.dumps(GOOD))
    assert run(*command).status == 0
    before = output.read_bytes()

    def refused(*more: str) -> str:
        outcome = run(*command, *more)
        assert outcome.status == 2
        assert output.read_bytes() == before
        assert "delete" in outcome.err
        assert outcome.err.count("\n") == 1
        return outcome.err

    assert "(schedule, top)" in refused("--schedule", "1,0.5", "--scorer", "cls", "--top", "2")
    assert "(dtype)" in refused("--dtype", "bfloat16")
    source.write_text(json.dumps({**GOOD, "question": "Where?"}))
    assert "(input)" in refused()
    source.write_text(json.dumps(GOOD))
    assert run(*command).status == 0
    record.write_text("{")
    assert "is damaged" in refused()
    record.unlink()
    assert "a.jsonl.settings.json" in refused()
    # What the messages advise works.
    output.unlink()
    assert run(*command, "--top", "2").status == 0
    assert "answers" in read(output)[0]


@pytest.mark.parametrize("changed", ["model.safetensors", "config.json", "vocab.txt"])
def test_batch_does_not_go_on_with_another_model(
    run: Run, command: tuple[str, ...], model_folder: Path, tmp_path: Path, changed: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(model_folder, model)
    (tmp_path / "q.jsonl").write_text(f"{json.dumps(GOOD)}\n" * 3)
    command = tuple(str(model) if one == str(model_folder) else one for one in command)
    assert run(*command).status == 0
    before = (tmp_path / "a.jsonl").read_bytes()
    file = model / changed
    if changed == "model.safetensors":
        save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file)
    else:
        file.write_text(file.read_text().replace('"gelu"', '"relu"').replace("zoe", "zoo"))
    status, _, err = run(*command)
    assert (status, (tmp_path / "a.jsonl").read_bytes()) == (2, before)
    assert "(the model's weights, config or tokenizer): name another --output" in err


@pytest.mark.parametrize("what", ["input", "output", "output replaced"])
def test_batch_stops_where_a_file_is_changed_meanwhile(
    run: Run, command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    source, output = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    source.write_text(f"{json.dumps(GOOD)}\n" * 3)
    results = batch.results

    def change_then_answer(*arguments: Any) -> Any:
        for number, one in enumerate(results(*arguments)):
            if number == 1 and what == "input":
                source.write_text(json.dumps(GOOD))
            elif number == 1:
                output.unlink()
                if what == "output replaced":
                    output.write_text("mine")
            yield one

    monkeypatch.setattr(batch, "results", change_then_answer)
    status, _, err = run(*command)
    assert status == 2
    assert f"{source} was changed" in err if what == "input" else f"{output} was removed or replaced" in err
    assert output.exists() == (what != "output")
    if what == "output replaced":
        assert output.read_text() == "mine"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such files")
def test_batch_writes_to_regular_files_alone(run: Run, command: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps(GOOD))
    os.mkfifo(tmp_path / "pipe")
    for place in ("/dev/full", "/dev/stdout", tmp_path / "pipe"):
        status, _, err = run(*command[:-1], place)
        assert status == 2
        assert "is no regular file" in err
    (tmp_path / "link").symlink_to(tmp_path / "a.jsonl")
    assert run(*command[:-1], tmp_path / "link").status == 0
    assert len(read(tmp_path / "a.jsonl")) == 1


def test_batch_replaces_no_file_that_it_did_not_make(
    run: Run, command: tuple[str, ...], model_folder: Path, tmp_path: Path
) -> None:
    line = json.dumps(GOOD)
    (tmp_path / "a.jsonl.settings.json").write_text(line)
    (tmp_path / "b.jsonl.settings.json").write_text('{"theme": "dark"}')
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "empty.jsonl.settings.json").write_text("settings of mine")
    source = tmp_path / "a.jsonl.settings.json"
    inputs = ("answer", "--model", str(model_folder), "--input", str(source), "--output")
    for name, said in (
        ("a.jsonl", f"{source} is the input itself"),
        ("b.jsonl", "which is there already and is no run's"),
        ("empty.jsonl", "which is there already and is no run's"),
    ):
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        status, _, err = run(*inputs, tmp_path / name)
        assert status == 2
        assert said in err
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "c.jsonl.settings.json").symlink_to(tmp_path / "planted")
    assert run(*inputs, tmp_path / "c.jsonl").status == 2
    assert not (tmp_path / "planted").exists()
    for name in ("vocab.txt", "config.json", "model.safetensors"):
        status, _, err = run(*inputs, model_folder / name)
        assert (status, "is a file of the model" in err) == (2, True)


def test_batch_says_ids_and_texts_without_steering_the_terminal(
    run: Run, command: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps({"id": 1, "question": "who?", "\x1b[2J\x9b1m": ""}))
    _, _, err = run(*command)
    assert "context: missing" in err
    assert not {"\x1b", "\x9b"} & set(err)
    assert "\\x1b[2J\\x9b1m" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--input", "q.jsonl", "--output", "q.jsonl"), "is the input itself"),
        (("--input", "nothing", "--output", "a.jsonl"), "--input nothing must be a file"),
        (("--input", ".", "--output", "a.jsonl"), "--input . must be a file"),
        (("--input", "q.jsonl", "--output", "x/a.jsonl"), "there is no folder x"),
        (("--input", "q.jsonl", "--output", "a.jsonl", "--schedule", "1,1,1"), "3 entries, the model 2 layers"),
        (("--input", "q.jsonl", "--output", "a.jsonl", "--model", "./no"), "no such file or folder: './no'"),
    ],
)
def test_batch_that_cannot_start_leaves_nothing(
    run: Run,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("q.jsonl").write_text(json.dumps(GOOD))
    status, out, err = run("answer", "--model", model_folder, *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert [path.name for path in tmp_path.iterdir()] == ["q.jsonl"]
    assert Path("q.jsonl").read_text() == json.dumps(GOOD)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no flock")
def test_batch_refuses_an_output_that_another_process_writes(
    run: Run, command: tuple[str, ...], tmp_path: Path
) -> None:
    import fcntl

    (tmp_path / "q.jsonl").write_text(json.dumps(GOOD))
    with (tmp_path / "a.jsonl").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        status, _, err = run(*command)
    assert status == 2
    assert "another process is writing" in err
    assert run(*command).status == 0


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


LINES = st.lists(st.builds(lambda size: Line(1, None, "q", "c" * size), st.integers(0, 60)), max_size=40)


def size(chunk: list[Line]) -> int:
    return sum(len(line.question + line.context) + 12 for line in chunk)


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


def test_batch_holds_a_chunk_at_a_time(model_folder: Path) -> None:
    taken: list[int] = []

    def lines() -> Iterator[Line]:
        for number in range(1, 41):
            taken.append(number)
            yield Line(number, None, "Who wrote it?", "Ada wrote it.")

    answerer = QuestionAnswerer.load(model_folder)
    for line, fields in batch.results(answerer, remaining(lines(), 0, 4 * 40), 1, {}):
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
