"""Whole-file writes, locks, JSON fields and digests: what is left after a failure, and what is said."""

import errno
import hashlib
import json
import math
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtbert.files import (
    Json,
    file_sha256,
    lock,
    naming,
    new_folder,
    replacing,
    text_sha256,
    write_whole,
)

posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no modes, FIFOs and flock")


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def write_some(path: Path, error: BaseException) -> None:
    path.write_text("ne")
    raise error


def test_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text in ("first Zo\u00eb", "second"):
        before = path.read_text("utf-8") if path.exists() else None
        with replacing(path) as partial:
            partial.write_text(text, "utf-8")
            assert partial.parent == tmp_path
            assert partial.suffix == ".partial"
            assert (path.read_text("utf-8") if path.exists() else None) == before
        assert path.read_text("utf-8") == text
    assert names(tmp_path) == ["a.json"]


def test_two_writers_at_once_write_to_different_files(tmp_path: Path) -> None:
    with replacing(tmp_path / "a") as first, replacing(tmp_path / "a") as second:
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "a").read_text() == "first"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), OSError, "No space left on device"),
        (RuntimeError("[enforce fail] file write failed\nframe #0: ..."), OSError, "file write failed; "),
        (PermissionError(errno.EACCES, "Permission denied", "x"), PermissionError, "Permission denied: 'x'"),
        (KeyboardInterrupt(), KeyboardInterrupt, "^$"),
    ],
    ids=["full disk", "torch", "refused", "interrupted"],
)
def test_write_that_fails_leaves_the_old_file(
    tmp_path: Path, error: BaseException, kind: type[BaseException], message: str
) -> None:
    path = tmp_path / "a.json"
    write_whole(path, "old")
    with pytest.raises(kind, match=message) as caught, replacing(path) as partial:
        write_some(partial, error)
    if kind is not KeyboardInterrupt:
        assert str(caught.value).startswith(f"cannot write {path}: ")
        assert str(caught.value).endswith(" still there")
        assert caught.value.__cause__ is error
    assert names(tmp_path) == ["a.json"]
    assert path.read_text() == "old"


def test_file_that_cannot_be_moved_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "a", "old")

    def refuse(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        write_whole(tmp_path / "a", "new")
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_missing_folder_is_named_and_not_made(tmp_path: Path) -> None:
    path = tmp_path / "no" / "a.json"
    with pytest.raises(FileNotFoundError, match=f"cannot write {path}: No such file or directory$"):
        write_whole(path, "text")
    assert names(tmp_path) == []


@posix
def test_mode_is_that_of_a_plain_open(tmp_path: Path) -> None:
    plain, path = tmp_path / "plain", tmp_path / "a"
    before = os.umask(0o027)
    try:
        plain.write_text("")
        with replacing(path) as partial:
            partial.write_text("")
            partial.chmod(0o600)
        with new_folder(tmp_path / "new") as folder:
            (folder / "b").write_text("")
            (folder / "b").chmod(0o600)
    finally:
        os.umask(before)
    assert mode(path) == mode(plain) == mode(tmp_path / "new" / "b") == 0o640
    for kept in (0o600, 0o664, 0o444):
        path.chmod(kept)
        write_whole(path, "new")
        assert mode(path) == kept


@posix
def test_symlink_stays_and_its_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "a", tmp_path / "link"
    link.symlink_to(target)
    for text in ("made", "replaced"):
        write_whole(link, text)
        assert target.read_text() == text
    with pytest.raises(OSError, match=f"cannot write {link}: boom"), replacing(link):
        raise RuntimeError("boom")
    assert link.is_symlink()
    assert target.read_text() == "replaced"
    assert names(tmp_path / "there") == ["a"]


@posix
def test_device_and_pipe_are_written_directly(tmp_path: Path) -> None:
    write_whole("/dev/null", "nothing")
    assert not Path("/dev/null").is_file()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    write_whole(pipe, "through")
    reader.join(30)
    assert read == ["through"]
    assert names(tmp_path) == ["pipe"]
    code = "from dtbert.files import write_whole; write_whole('/dev/stdout', 'shown')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "shown"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), ValueError("odd"), KeyboardInterrupt()])
def test_folder_that_cannot_be_filled_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "deep" / "er" / "new"
    kind = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OSError
    with pytest.raises(kind) as caught, new_folder(path) as folder:
        write_some(folder / "a", error)
    if kind is OSError:
        reason = (
            str(error) if isinstance(error, ValueError) else "No space left: make room, then give the command again"
        )
        assert str(caught.value) == f"cannot write {path}: {reason}"
    assert names(tmp_path) == []


def test_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(FileExistsError, match=f"{path} is there already"), new_folder(path):
            pass
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as folder:
        (folder / "a").write_text("whole")
        assert names(tmp_path / "empty") == []
    assert (tmp_path / "empty" / "a").read_text() == "whole"
    assert names(tmp_path) == ["empty", "file"]


HOLDER = """
import sys
from dtbert.files import lock

with open(sys.argv[1], "ab") as file:
    print(lock(file), flush=True)
    sys.stdin.read()
"""


@posix
@pytest.mark.parametrize("end", ["closes", "dies"])
def test_lock_is_held_by_one_process_until_it_ends(tmp_path: Path, end: str) -> None:
    path = tmp_path / "a"
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"
        with path.open("ab") as file:
            assert not lock(file)
            if end == "dies":
                holder.kill()
                holder.wait()
            else:
                holder.communicate("")
            assert lock(file)
            assert lock(file)
            with path.open("rb") as other:
                assert not lock(other)
    with path.open("rb") as file:
        assert lock(file)


@posix
def test_lock_without_locks_in_the_file_system_is_granted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with (tmp_path / "a").open("wb") as file:
        assert lock(file)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", r"not JSON .* character 1\)"),
        ('{"a": 1,\n "b" 2}', r"not JSON .*':' .* line 2, character 6\)"),
        (b"[" * 200_000, "not JSON .*recursion"),
        (b"9" * 5000, "not JSON .*limit"),
        (b'"caf\xe9"', "not UTF-8 .*byte 5 is 0xe9"),
    ],
    ids=["empty", "second line", "deep", "long number", "latin-1"],
)
def test_text_that_is_no_json_is_refused(raw: bytes | str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Json.parse(raw)


@dataclass
class Row:
    name: str
    seconds: float
    count: int


DOCUMENT = Json.parse(
    b'\xef\xbb\xbf{"data": [{"id": "a", "count": 3, "big": %d, "none": null, "yes": true}, [1.5]],'
    b' "row": {"name": "n", "seconds": 2, "count": 7}}' % 10**400
)
FIRST, SECOND = DOCUMENT.field("data").items()


def test_fields_of_a_document_are_read_by_their_types() -> None:
    assert FIRST.field("id").of(str) == "a"
    assert FIRST.field("count").of(str, int) == 3
    assert FIRST.field("yes").of(bool)
    assert (FIRST.get("none"), FIRST.get("missing")) == (None, None)
    assert FIRST.get("count") == (3, "data[0].count")
    assert [item.of(float) for item in SECOND.items()] == [1.5]
    assert type(FIRST.field("count").of(float)) is float
    assert DOCUMENT.field("row").record(Row) == Row("n", 2.0, 7)


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda: FIRST.field("id").of(int), 'data[0].id: expected a whole number, found "a"'),
        (lambda: FIRST.field("yes").of(int), "data[0].yes: expected a whole number, found true"),
        (lambda: FIRST.field("yes").of(float), "data[0].yes: expected a finite number, found true"),
        (lambda: FIRST.field("none").of(str, int), "data[0].none: expected a text or a whole number, found null"),
        (lambda: FIRST.field("big").of(float), f"data[0].big: expected a finite number, found 1{'0' * 39}"),
        (lambda: Json(math.nan).of(float), "expected a finite number, found NaN"),
        (lambda: SECOND.of(dict), "data[1]: expected an object, found a list"),
        (lambda: SECOND.items()[0].of(int), "data[1][0]: expected a whole number, found 1.5"),
        (lambda: SECOND.field("id"), "data[1]: expected an object with 'id', found a list"),
        (lambda: SECOND.get("id"), "data[1]: expected an object with 'id', found a list"),
        (lambda: DOCUMENT.field("data").of(str), "data: expected a text, found a list"),
        (lambda: FIRST.items(), "data[0]: expected a list, found an object"),
        (lambda: DOCUMENT.field("id"), "id: missing; the object has data, row"),
        (lambda: Json({}, "at").field("id"), "at.id: missing; the object has no fields"),
        (
            lambda: DOCUMENT.exactly(("data", "more")),
            "expected the fields data, more: missing ['more'], unknown ['row']",
        ),
        (
            lambda: Json({"name": "n", "seconds": "2", "count": 7}, "row").record(Row),
            'row.seconds: expected a finite number, found "2"',
        ),
        (lambda: FIRST.field("id").made(int, "a"), "data[0].id: invalid literal for int() with base 10: 'a'"),
        (lambda: FIRST.made(len, 5), "data[0]: object of type 'int' has no len()"),
    ],
)
def test_wrong_field_is_named_by_its_place(read: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        read()
    assert str(caught.value) == message


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()


@given(st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)))
def test_any_json_is_read_or_refused_with_its_place(value: Any) -> None:
    document = Json.parse(json.dumps({"a": [value]}))
    (item,) = document.field("a").items()
    for kind in (dict, list, str, bool, int, float):
        if type(item.value) is kind and not (kind is float and not math.isfinite(value)):
            assert item.of(kind) == item.value
        elif kind is not float or type(item.value) is not int:
            with pytest.raises(ValueError, match=r"^a\[0\]: .* found "):
                item.of(kind)


def test_naming_says_where_and_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"^a\.json: odd; make it anew$"), naming(Path("a.json"), "; make it anew"):
        raise TypeError("odd")
    with pytest.raises(OSError, match=r"^odd$"), naming("a.json"):
        raise OSError("odd")


def test_digests_are_sha256(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", "Zo\u00eb")
    expected = hashlib.sha256("Zo\u00eb".encode()).hexdigest()
    assert text_sha256("Zo\u00eb") == file_sha256(tmp_path / "a") == expected
