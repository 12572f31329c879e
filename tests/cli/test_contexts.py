"""The texts that a question is about: files, folders, stdin and texts, told apart or asked about."""

import argparse
import io
import os
import re
from pathlib import Path

import pytest

from dtbert.cli.contexts import given_contexts


def given(*context: object, file: object = (), text: object = ()) -> dict[str, str]:
    names = {"context": context, "file": file, "text": text}
    return given_contexts(argparse.Namespace(**{name: list(map(str, one)) or None for name, one in names.items()}))


def test_context_is_a_file_a_text_or_stdin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "letter"
    path.write_bytes("Zo\u00eb\r\nwrote".encode())
    long = "She wrote it. " * 100_000
    texts = ["Zo\u00eb wrote and/or said it.", long, ""]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("a\r\nb\u00e9".encode()), encoding="ascii"))
    found = given(path, *texts, "-", "-", file=["-"])
    assert list(found.items()) == [
        (str(path), "Zo\u00eb\r\nwrote"),
        *zip(texts, texts, strict=True),
        ("-", "a\r\nb\u00e9"),
    ]
    assert given(path, file=[path], text=["word", "a.txt", str(path)]) == {
        str(path): "Zo\u00eb\r\nwrote",
        "word": "word",
        "a.txt": "a.txt",
    }


@pytest.mark.parametrize(
    "argument",
    [
        "README",
        "a/b",
        "C:\\letter",
        "letter.TXT",
        "my letter.txt",
        "../x.json",
        "paper of 1995.pdf",
        "notes_v2",
        "x" * 999,
    ],
)
def test_context_that_looks_like_a_missing_file_is_asked_about(argument: str) -> None:
    with pytest.raises(
        ValueError, match=re.escape(f"--context {argument[:80]!r} looks like a file, and") + ".* --text"
    ):
        given(argument)
    assert given(text=[argument]) == {argument: argument}
    with pytest.raises(OSError, match=re.escape(argument[-4:])):
        given(file=[argument])


def test_texts_of_a_folder_are_read_and_the_rest_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in {"b.txt": "B b.", "a/c.MD": "C c.", "a/d.rst": " \n", "a/e.png": "\x00", "f": "F"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "g.txt").write_text("G g.")
    expected = {str(tmp_path / "b.txt"): "B b.", str(tmp_path / "a" / "c.MD"): "C c."}
    for context, file in (([tmp_path], []), ([], [tmp_path, tmp_path / "b.txt"])):
        assert given(*context, file=file) == expected
        err = capsys.readouterr().err
        assert err.startswith(f"dtbert: {tmp_path}: 2 files read, those that end in .txt, ")
        assert sorted(err.strip().partition("left out: ")[2].split(", ")) == [
            "1 .png",
            "1 empty",
            "1 without an ending",
        ]
    (tmp_path / "h").mkdir()
    with pytest.raises(ValueError, match="h holds no texts, which are files that end in"):
        given(tmp_path / "h")


def test_files_that_hold_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "letter.txt"
    with pytest.raises(ValueError, match="--file is empty"):
        given(file=[""])
    for raw, message in ((b"caf\xe9", r"not UTF-8 .*byte 4 is 0xe9"), (b"%PDF-1.7\n\xff", "a PDF: take its text out")):
        path.write_bytes(raw)
        for argument in (path, tmp_path):
            with pytest.raises(ValueError, match=rf"letter\.txt.*{message}"):
                given(argument)


def test_a_pipe_in_a_folder_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "b.txt")
    (tmp_path / "a.txt").write_text("A a.")
    with pytest.raises(ValueError, match=r"b\.txt is no regular file: take it out of the folder"):
        given(tmp_path)


def test_folders_that_are_not_read_are_no_secret(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("A a.")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "letters" / "b").symlink_to(tmp_path / "elsewhere")
    assert len(given(tmp_path / "letters")) == 1
    assert capsys.readouterr().err.strip().endswith("left out: 1 link to a folder")

    def refuse(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(PermissionError, match="letters"):
        given(tmp_path / "letters")
