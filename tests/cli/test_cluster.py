"""`dtbert answer --engine ray`, with blocks answered in this process: what a job gives, and what it refuses."""

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import dataset, parquet

from dtbert.jobs import cluster
from dtbert.jobs.blocks import Block
from dtbert.jobs.places import Place
from dtbert.jobs.worker import Worker
from tests.cli.conftest import Outcome, Run
from tests.cli.questions import GOOD, read, write_questions

# Whole lines of these make several blocks of what `write_questions` writes.
TOKENS = "1200"

Job = Callable[..., Outcome]


@pytest.fixture
def answered_blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the blocks that were answered, in this process: no cluster is started."""
    numbers: list[int] = []

    def answer_blocks(blocks: Sequence[Block], worker: Worker, _: object) -> dict[str, Any]:
        for block in blocks:
            numbers.append(block.number)
            error = worker(json.loads(json.dumps(vars(block))))["error"]
            if error is not None:
                raise ValueError(error)
        return {"workers": 1, "threads": 1, "seconds": 1.0}

    monkeypatch.setattr(cluster, "check_ray", lambda: None)
    monkeypatch.setattr(cluster, "answer_blocks", answer_blocks)
    return numbers


@pytest.fixture
def job(run: Run, model_folder: Path, tmp_path: Path, answered_blocks: list[int]) -> Job:
    """Runs a job from tmp_path/in to tmp_path/out, with more arguments."""
    (tmp_path / "in").mkdir()
    write_questions(tmp_path / "in" / "a.jsonl", 60)
    write_questions(tmp_path / "in" / "b.jsonl", 9)

    def job(*more: object) -> Outcome:
        files = ("--input", tmp_path / "in", "--output", tmp_path / "out", "--model", model_folder)
        return run("answer", *files, "--engine", "ray", "--block-tokens", TOKENS, *more)

    return job


def parts(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("part-*"))}


def test_job_gives_what_answer_gives_of_each_file(job: Job, run: Run, model_folder: Path, tmp_path: Path) -> None:
    status, out, err = job("--top", 2, "--schedule", "1,0.5")
    assert (status, out) == (1, "")
    assert "lines failed: see" in err.splitlines()[-1]
    found = [line for path in sorted((tmp_path / "out").glob("part-*")) for line in read(path)]
    assert len(list((tmp_path / "out").glob("part-*"))) >= 4
    for name in ("a.jsonl", "b.jsonl"):
        source, output = tmp_path / "in" / name, tmp_path / f"alone-{name}"
        run("answer", "--input", source, "--output", output, "--model", model_folder, "--top", 2, "--schedule", "1,0.5")
        ours = [{**line} for line in found if line["file"] == str(source)]
        expected = read(output)
        assert [line["line"] for line in ours] == [line["line"] for line in expected]
        for line, other in zip(ours, expected, strict=True):
            assert line.pop("file") == str(source)
            assert line.keys() == other.keys()
            for field in ("id", "answer", "start", "end", "error"):
                assert line.get(field) == other.get(field)
            if "score" in line:
                assert line["score"] == pytest.approx(other["score"], rel=1e-4)
                assert len(line["answers"]) == len(other["answers"])
    times = json.loads((tmp_path / "out" / "_times.json").read_text())
    assert sum(block["rows"] for block in times["blocks"]) == len(found)
    assert f"{sum(block['failed'] for block in times['blocks'])} of {len(found)} lines failed" in err


def test_job_writes_parquet_with_the_same_rows(job: Job, tmp_path: Path) -> None:
    # Half a character as an id, which Parquet cannot hold.
    odd = json.dumps({**GOOD, "id": "\ud800"}) + "\n" + json.dumps({**GOOD, "id": "text"}) + "\n"
    (tmp_path / "in" / "c.jsonl").write_text(odd)
    job()
    lines = [line for content in parts(tmp_path / "out").values() for line in map(json.loads, content.splitlines())]
    shutil.rmtree(tmp_path / "out")
    job("--format", "parquet")
    # The folder is read as a whole: what begins with _ is passed over.
    rows = dataset.dataset(tmp_path / "out", format="parquet").to_table().to_pylist()
    for row, line in zip(rows, lines, strict=True):
        given = str(line["id"]).encode("utf-8", "backslashreplace").decode() if "id" in line else None
        assert row == {**dict.fromkeys(row), **line, "id": given}


def test_job_reads_parquet(job: Job, tmp_path: Path, answered_blocks: list[int]) -> None:
    shutil.rmtree(tmp_path / "in")
    (tmp_path / "in").mkdir()
    table = [{**GOOD, "id": number} for number in range(300)] + [{**GOOD, "context": None, "id": 300}]
    parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "in" / "a.parquet")
    assert job().status == 1
    assert len(answered_blocks) > 1
    found = [json.loads(line) for content in parts(tmp_path / "out").values() for line in content.splitlines()]
    assert [(line["line"], line["id"]) for line in found] == [(number + 1, number) for number in range(301)]
    assert ["error" in line for line in found] == [False] * 300 + [True]


def test_job_goes_on_after_an_interruption_at_any_write(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answered_blocks: list[int]
) -> None:
    output = tmp_path / "out"
    assert job().status == 1
    unbroken, blocks = parts(output), len(answered_blocks)
    times = (output / "_times.json").read_bytes()
    again = job()
    assert (again.status, len(answered_blocks)) == (1, blocks), "nothing is done twice"
    assert (output / "_times.json").read_bytes() == times
    write, left = Place.write, 0

    def interrupted(place: Place, content: bytes) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        write(place, content)

    monkeypatch.setattr(Place, "write", interrupted)
    # A manifest, two files for each block, the times.
    for moment in range(2 * blocks + 2):
        shutil.rmtree(output)
        answered_blocks.clear()
        left = moment
        assert job().status == 130
        before = parts(output)
        assert before.items() <= unbroken.items()
        left = 10**6
        assert job().status == 1
        assert parts(output) == unbroken
        # The one that was interrupted alone is done again.
        assert len(answered_blocks) == blocks + (0 < moment <= 2 * blocks)


def test_job_refuses_to_go_on_with_other_settings(job: Job, tmp_path: Path, answered_blocks: list[int]) -> None:
    assert job().status == 1
    before = parts(tmp_path / "out")
    answered_blocks.clear()
    for more, names in [
        (("--top", 2), "(top)"),
        (("--schedule", "1,0.5", "--window", 300), "(schedule, stride, window)"),
        (("--block-tokens", 99), "(block_tokens)"),
        (("--format", "parquet"), "(format)"),
        (("--dtype", "bfloat16"), "(dtype)"),
    ]:
        status, _, err = job(*more)
        assert status == 2
        assert f"made from other settings {names}: name another --output, or delete" in err
    write_questions(tmp_path / "in" / "c.jsonl", 1)
    assert "(input files): name another --output" in job().err
    assert (parts(tmp_path / "out"), answered_blocks) == (before, [])


def test_job_stops_where_an_input_was_changed(job: Job, tmp_path: Path) -> None:
    assert job().status == 1
    next((tmp_path / "out").glob("part-000002*")).unlink()
    content = (tmp_path / "in" / "a.jsonl").read_bytes()
    (tmp_path / "in" / "a.jsonl").write_bytes(content.replace(b"Who", b"Why"))
    status, _, err = job()
    assert status == 2
    assert "a.jsonl was changed since the job was planned" in err
    assert err.count("\n") == 1
    (tmp_path / "in" / "a.jsonl").write_bytes(content)
    assert job().status == 1
    assert "part-000002.jsonl" in parts(tmp_path / "out")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--device", "cuda:1"), "give cpu or cuda"),
        (("--output", "-"), "- is for a pipe"),
        (("--budget", "auto"), "--engine ray knows no cascade.json"),
        (("--input", "s4://bucket/*"), "s4://bucket/*: Protocol not known"),
        (("--input", "nothing-here"), "nothing-here: there are no files"),
        (("--output", "in"), "holds the input"),
        (("--schedule", "1,0.5", "--scorer", "math:sqrt"), "workers cannot import it"),
    ],
)
def test_job_refuses_what_it_cannot_do(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, err = job(*more)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--input", "a", "--output", "b", "--workers", "2"), "--workers is for a cluster: give --engine ray"),
        (("--input", "a", "--output", "b", "--block-tokens", "2"), "--block-tokens is for a cluster"),
        (("--engine", "ray", "--input", "a"), "give --input and --output"),
        (("--engine", "ray", "--question", "?", "--context", "."), "give --input and --output"),
        (("--engine", "ray", "--question", "?", "--input", "a", "--output", "b"), "give either --question and"),
    ],
)
def test_options_of_a_job_go_with_a_job(run: Run, arguments: tuple[str, ...], message: str) -> None:
    status, _, err = run("answer", *arguments)
    assert status == 2
    assert message in err


def test_job_without_ray_names_the_extra(
    run: Run, command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps(GOOD))
    monkeypatch.setitem(sys.modules, "ray", None)
    status, _, err = run(*command, "--engine", "ray")
    assert status == 2
    assert "pip install 'dtbert[ray]'" in err
    assert err.count("\n") == 1
