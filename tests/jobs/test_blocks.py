"""Blocks hold every row of every file once, in order, and know when a file was changed."""

import json
import os
import random
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from dtbert.cli.inputs import Source
from dtbert.jobs.blocks import input_files, plan, read_block, row_cuts
from tests.cli.questions import write_questions

SHARED_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
LINE = st.sampled_from([b"", b" \t", b"{}", b"\xff", b"{" * 30, b"\r", json.dumps({"id": 1, "question": "?"}).encode()])


@given(st.lists(LINE, min_size=1), st.booleans(), st.integers(1, 99))
@SHARED_FOLDER
def test_blocks_of_lines_give_what_the_file_gives(
    tmp_path: Path, lines: list[bytes], ended: bool, block_bytes: int
) -> None:
    path = tmp_path / "questions"
    path.write_bytes(b"\n".join([b"{", *lines]) + b"\n" * ended)
    blocks = plan(input_files(str(path)), block_bytes)
    assert [line for block in blocks for line in read_block(block)] == list(Source(path, "lines", False).lines())
    # Cut at the ends of lines, one after the other.
    assert [block.number for block in blocks] == list(range(len(blocks)))
    content = path.read_bytes()
    assert b"".join(content[block.start : block.start + block.size] for block in blocks) == content
    assert all(content[block.start + block.size - 1] == 10 for block in blocks[:-1])
    # None is larger than it has to be.
    longest = max(map(len, content.splitlines(keepends=True)))
    assert all(block.size < block_bytes + longest for block in blocks)


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 40).map(float)), max_size=6),
    st.integers(1, 200),
)
def test_row_cuts_are_bounded_and_hold_every_row(groups: list[tuple[int, float]], most: int) -> None:
    cuts = list(row_cuts(groups, most))
    assert sum(cuts) == sum(rows for rows, _ in groups)
    sizes = [each for rows, each in groups for _ in range(rows)]
    for cut in cuts:
        size = sum(sizes[:cut])
        assert cut == 1 or size <= most
        # The next row would have been too much.
        assert len(sizes) == cut or size + sizes[cut] > most
        sizes = sizes[cut:]


def rows(count: int) -> list[dict[str, Any]]:
    choose = random.Random(count)
    return [
        {"more": [number], "context": "ab " * choose.randrange(1, 9), "id": number, "question": f"Who is {number}?"}
        for number in range(count)
    ]


@pytest.mark.parametrize("group", [1, 7, 1000])
@pytest.mark.parametrize("block_bytes", [1, 100, 777, 10**9])
def test_blocks_of_parquet_give_what_the_file_gives(tmp_path: Path, group: int, block_bytes: int) -> None:
    path = tmp_path / "questions.pq"
    parquet.write_table(pyarrow.Table.from_pylist(rows(100)), path, row_group_size=group)
    blocks = plan(input_files(str(path)), block_bytes)
    assert [line for block in blocks for line in read_block(block)] == list(Source.of(path).lines())
    assert [block.first for block in blocks] == [
        1 + sum(block.rows for block in blocks[:n]) for n in range(len(blocks))
    ]
    assert (len(blocks) == 1) == (block_bytes == 10**9)
    assert (len(blocks) == 100) == (block_bytes == 1)


def test_blocks_go_on_over_the_files_of_a_folder_or_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for number, name in enumerate(["b.jsonl", "a.jsonl", "deep/c.jsonl"]):
        write_questions(tmp_path / "in" / name, 3 + number)
    for name in ("_note", ".hidden", "deep/_SUCCESS"):
        (tmp_path / "in" / name).write_text("no questions")
    (tmp_path / "in" / "empty.jsonl").touch()
    parquet.write_table(pyarrow.Table.from_pylist(rows(5)), tmp_path / "in" / "d.parquet")
    folder = input_files(str(tmp_path / "in"))
    names = [os.path.relpath(file.name, tmp_path / "in") for file in folder]
    assert names == ["a.jsonl", "b.jsonl", "d.parquet", "deep/c.jsonl", "empty.jsonl"]
    pattern = input_files(str(tmp_path / "in" / "**" / "[ac].jsonl"))
    assert [file.name for file in pattern] == [folder[0].name, folder[3].name]
    blocks = plan(folder, 10**6)
    assert [(block.number, block.file) for block in blocks] == [(n, folder[n].name) for n in range(4)]
    for block in blocks:
        assert read_block(block) == list(Source.of(Path(block.file)).lines())
    # What is there by this name is no pattern.
    (tmp_path / "in").rename(tmp_path / "in[1]")
    assert len(input_files(str(tmp_path / "in[1]"))) == 5
    assert len(input_files(str(tmp_path / "in[1]" / "a.jsonl"))) == 1
    with pytest.raises(FileNotFoundError, match="there are no files"):
        input_files(str(tmp_path / "*.csv"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"question,context\nWho?,Ada.\n", "neither JSON objects, one a line, nor Parquet"),
        (b"\x1f\x8b\x08\0zipped", r"begins with b'\\x1f\\x8b"),
        (b"PAR1 and no more", "damaged Parquet"),
    ],
    ids=["csv", "gzip", "Parquet"],
)
def test_plan_names_a_file_that_holds_no_questions(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"{}\n")
    (tmp_path / "wrong").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        plan(input_files(str(tmp_path)), 1000)
    assert str(tmp_path / "wrong") in str(caught.value)


def test_plan_names_parquet_without_the_columns(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"question": ["?"], "text": ["."]}), tmp_path / "p")
    with pytest.raises(ValueError, match="p has no columns question and context: it has question, text"):
        plan(input_files(str(tmp_path)), 1000)


def test_a_block_is_not_read_from_a_file_that_was_changed(tmp_path: Path) -> None:
    lines, table = tmp_path / "a.jsonl", tmp_path / "b.parquet"
    write_questions(lines, 20)
    parquet.write_table(pyarrow.Table.from_pylist(rows(20)), table)
    first, *_, last = plan(input_files(str(lines)), 500)
    (whole,) = plan(input_files(str(table)), 10**6)
    content = lines.read_bytes()
    lines.write_bytes(content.replace(b"Who", b"Why"))
    parquet.write_table(pyarrow.Table.from_pylist(rows(21)), table)
    for block in (first, whole):
        with pytest.raises(ValueError, match=r"was changed since the job was planned: put it back"):
            read_block(block)
    lines.write_bytes(content[:-1])
    read_block(first)
    with pytest.raises(ValueError, match="was changed"):
        read_block(last)
