"""`dtbert answer --input --output` goes on after an interruption at any moment, and with nothing but the same run."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dtbert.cli import batch, main
from dtbert.cli.batch import chunks
from dtbert.cli.inputs import Source
from dtbert.qa import QuestionAnswerer
from tests.cli.command import run_command
from tests.cli.conftest import Run
from tests.cli.questions import GOOD, read, write_questions

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
    sizes = [len(chunk) for chunk in chunks(Source.of(whole / "q.jsonl").lines(), int(SMALL * 2048))]
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
    assert [line["line"] for line in read(broken)] == [line.number for line in Source.of(tmp_path / "q.jsonl").lines()]
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
