"""The texts that a question is about, as the command line gives them: texts, files, folders, stdin."""

import argparse
import os
import sys
from collections import Counter
from pathlib import Path

from dtbert.cli.inputs import other_kind
from dtbert.cli.output import printable
from dtbert.files import naming, utf8

# What is read of a folder, and what else looks like a file's name.
_TEXT_ENDINGS = (".txt", ".text", ".md", ".rst")
_OTHER_ENDINGS = (".csv", ".docx", ".htm", ".html", ".json", ".jsonl", ".log", ".pdf", ".tex", ".tsv", ".xml")


def given_contexts(arguments: argparse.Namespace) -> dict[str, str]:
    """The texts of ``--context``, ``--file`` and ``--text`` by what names each; of one given twice the first.

    Raises:
        ValueError: a context looks like a file, and there is none; or what is there is no text in UTF-8.
        OSError: a file cannot be read.
    """
    found: dict[str, str] = {}
    for option, read in (("context", _read_context), ("file", _read_file)):
        for argument in getattr(arguments, option) or []:
            if argument not in found:  # stdin can be read once
                found |= read(argument)
    return found | {text: text for text in arguments.text or [] if text not in found}


def _read_context(argument: str) -> dict[str, str]:
    """A file or a folder if there is one of that name, else the text itself."""
    try:
        exists = argument != "" and (argument == "-" or Path(argument).exists())
    except (OSError, ValueError):  # too long for a path, or characters that a path cannot hold
        exists = False
    if exists:
        return _read_file(argument)
    # No text of one word has an answer to look for, other than in scripts without spaces; a file's name is one often.
    if argument.lower().endswith((*_TEXT_ENDINGS, *_OTHER_ENDINGS)) or len(argument.split()) == 1:
        raise ValueError(
            f"--context {argument[:80]!r} looks like a file, and there is none; if it is the text itself: --text"
        )
    return {argument: argument}


def _read_file(argument: str) -> dict[str, str]:
    if argument == "-":
        return {"-": _decoded("stdin", sys.stdin.buffer.read())}
    if not argument:  # as a path it would be this folder
        raise ValueError("--file is empty: name a file, a folder, or - for stdin")
    path = Path(argument)
    return _read_folder(path) if path.is_dir() else {argument: _decoded(argument, path.read_bytes())}


def _read_folder(folder: Path) -> dict[str, str]:
    """The texts of a folder and those in it, by their endings; what is left out is said on stderr."""
    texts: dict[str, str] = {}
    left_out = Counter[str]()
    for place, folders, names in os.walk(folder, onerror=_refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        left_out.update("link to a folder" for name in folders if Path(place, name).is_symlink())
        for file in (Path(place, name) for name in sorted(names) if not name.startswith(".")):
            text = _decoded(str(file), _content(file)) if file.suffix.lower() in _TEXT_ENDINGS else None
            if text is None or not text.strip():
                left_out["empty" if text is not None else file.suffix or "without an ending"] += 1
            else:
                texts[str(file)] = text
    endings = ", ".join(_TEXT_ENDINGS)
    if not texts:
        raise ValueError(f"{folder} holds no texts, which are files that end in {endings}: name the files themselves")
    if left_out:
        kinds = ", ".join(f"{number} {kind}" for kind, number in left_out.most_common())
        message = f"{folder}: {len(texts)} files read, those that end in {endings}; left out: {kinds}"
        print(printable(f"dtbert: {message}"), file=sys.stderr)
    return texts


def _content(file: Path) -> bytes:
    """What is in a file of a folder; ValueError for a pipe or the like, in whose place nobody may be writing."""
    if file.exists() and not file.is_file():
        raise ValueError(f"{file} is no regular file: take it out of the folder, or name the files themselves")
    return file.read_bytes()


def _refuse(error: OSError) -> None:
    # A folder that cannot be read would be passed over in silence.
    raise error


def _decoded(name: str, raw: bytes) -> str:
    if (other := other_kind(raw)) is not None:
        raise ValueError(f"{name} is {other}")
    with naming(name):
        return utf8(raw)
