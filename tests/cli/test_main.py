"""What all commands share: help, exit status, errors, signals, pipes."""

import logging
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dtbert.cli
from dtbert.cli import COMMANDS, build_parser
from dtbert.model.scorers import BUILT_IN_SCORERS
from dtbert.qa import QuestionAnswerer
from tests.cli.conftest import Run

# Python's own buffering, whatever the surroundings ask for.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
MAIN = "import sys; from dtbert.cli import main; sys.exit(main())"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_shows_examples_that_parse(run: Run, command: str) -> None:
    status, out, err = run(command, "--help")
    assert (status, err) == (0, "")
    assert all(len(line) <= 80 for line in out.splitlines())
    lines = out.partition("\nexample")[2].replace("\\\n", " ").splitlines()
    examples = [shlex.split(line.replace("< letter.txt", "")) for line in lines if line.startswith("  dtbert ")]
    assert command in [example[1] for example in examples]
    for example in examples:
        build_parser().parse_args(example[1:])


def test_help_names_every_scorer(run: Run) -> None:
    words = run("answer", "--help").out.replace(",", " ").replace(";", " ").split()
    assert set(BUILT_IN_SCORERS) <= set(words)


def test_version_is_the_packages(run: Run) -> None:
    assert run("--version") == (0, f"dtbert {dtbert.__version__}\n", "")


def test_help_does_not_wait_for_torch() -> None:
    code = (
        f"import sys; from dtbert.cli import main; [main([command, '--help']) for command in {list(COMMANDS)}];"
        "assert not {'torch', 'numpy', 'tqdm', 'tokenizers', 'matplotlib', 'optuna', 'onnx'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["answer", "--frobnicate"], "unrecognized arguments: --frobnicate (see `dtbert answer --help`)"),
        (["convert", "a", "b", "--int4"], "unrecognized arguments: --int4 (see `dtbert convert --help`)"),
        (["answer", "--quest", "x"], "unrecognized arguments: --quest x"),
        (["answer", "--top", "0"], "argument --top: "),
        (["answer", "--threads", "100000"], "expected at most 4096 threads, got 100000"),
        (["answer", "--top", "two"], "got 'two'"),
        (["answer", "--no-answer", "--threshold", "inf"], "expected a number, such as -1.5, got 'inf'"),
        (["answer", "--dtype", "int4"], "invalid choice: 'int4'"),
        (["evaluate"], "required: FILE"),
        (["convert", "x"], "required: DEST"),
        (["export"], "required: FILE"),
    ],
)
def test_wrong_usage_is_one_line_that_points_to_the_help(run: Run, arguments: list[str], message: str) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("dtbert: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert "--help`)" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ("evaluate", "folder"),
        ("train", "--train", "folder", "--out", "run"),
        ("search", "folder", "--out", "front.json"),
        ("profile", "--lengths", "folder"),
        ("profile", "--schedule", "folder"),
        ("answer", "--input", "folder", "--output", "out.jsonl"),
        ("answer", "--input", "folder", "--output", "-"),
    ],
)
def test_folder_where_a_file_is_read_is_one_error(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    status, out, err = run(*arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "folder" in err
    assert "is a folder, name a file in it" in err.replace(":", ",")


def test_interrupt_is_quiet(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(QuestionAnswerer, "load", interrupt)
    assert run("answer", "--question", "Who?", "--context", "Ada wrote it.") == (130, "", "")


@pytest.mark.parametrize("error", [ValueError, TypeError, OSError])
def test_documented_errors_have_no_traceback(run: Run, monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error("what is wrong")

    monkeypatch.setattr(QuestionAnswerer, "load", fail)
    outcome = run("answer", "--question", "Who?", "--context", "Ada wrote it.")
    assert outcome == (2, "", "dtbert: error: what is wrong\n")


def test_memory_that_runs_out_is_one_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        torch.empty(2**60)

    monkeypatch.setattr(QuestionAnswerer, "load", fail)
    status, out, err = run("answer", "--question", "Who?", "--context", "Ada wrote it.")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("dtbert: error: out of memory (")


def test_what_an_error_says_does_not_steer_the_terminal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("bell \x07, and \x9b1m\nnext line: Zo\u00eb")

    monkeypatch.setattr(QuestionAnswerer, "load", fail)
    err = run("answer", "--question", "Who?", "--context", "Ada wrote it.").err
    assert err == "dtbert: error: bell \\x07, and \\x9b1m\nnext line: Zo\u00eb\n"
    record = logging.makeLogRecord({"msg": "clear \x1b[2J"})
    assert dtbert.cli.PlainFormatter().format(record) == "clear \\x1b[2J"


def test_defects_of_dtbert_keep_their_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(QuestionAnswerer, "load", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        run("answer", "--question", "Who?", "--context", "Ada wrote it.")


def test_closed_pipe_is_quiet() -> None:
    command = [sys.executable, "-c", MAIN, "--help"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT)
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate()
    assert (process.returncode, err) == (141, b"")


def test_closed_streams_are_no_reason_to_fail(
    run: Run, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("stdin", "stderr"):
        monkeypatch.setattr(sys, name, None)
    # Not on stdout, where answers are.
    assert run("answer", "--model", model_folder, "--question", "Who?", "--context", "-")[:2] == (2, "")
    monkeypatch.setattr(sys, "stdout", None)
    command = ("--model", str(model_folder), "--question", "Who?", "--context", "Ada wrote it.")
    assert dtbert.cli.main(["trace", *command, "--schedule", "0.5,0.5"]) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which Linux has")
def test_full_disk_is_one_error() -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-c", MAIN, "--help"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=ENVIRONMENT)
    assert done.returncode == 2
    assert done.stderr == b"dtbert: error: No space left on device: make room, then give the command again\n"


def test_output_that_cannot_show_a_character_shows_its_escape() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "utf8=0", "-c", MAIN, "answer", "--question", "Who?", "--context", "Zo\u00eb.txt"],
        capture_output=True,
        env={"PYTHONIOENCODING": "ascii:strict", "LC_ALL": "C.UTF-8"},
    )
    assert done.returncode == 2
    assert b"'Zo\\xeb.txt'" in done.stderr
