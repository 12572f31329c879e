"""Where `dtbert answer --input --output` writes: to no file but its own, and it notices what others do to that."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from dtbert.cli import batch
from tests.cli.conftest import Run
from tests.cli.questions import GOOD, read


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
