"""What a command writes: JSON to stdout, and files that are checked before the work begins."""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

_MODEL_FILE = re.compile(
    r"(config|tokenizer|tokenizer_config|added_tokens|special_tokens_map|.*\.index)\.json|vocab\.txt|.*\.(safetensors|bin)"
)


def print_json(fields: dict[str, Any]) -> None:
    """Print one JSON object, with its characters as they are where stdout can show them all."""
    unicode = sys.stdout is not None and (sys.stdout.encoding or "").lower() == "utf-8"
    text = json.dumps(fields, ensure_ascii=not unicode)
    # Of the characters that steer terminals JSON escapes those of ASCII alone.
    print(re.sub("[\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", text))


def printable(text: str) -> str:
    """The text without characters that would steer a terminal: their escapes in their place."""
    return "".join(one if one.isprintable() or one in "\n\t" else repr(one)[1:-1] for one in text)


def size_text(size: int) -> str:
    """A file's size in bytes, as people read it."""
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def check_output(option: str, path: Path, *sources: str | Path | None, model: str | None = None) -> None:
    """Raise OSError if the file cannot be written, or is one that is read: said before the work, not after it.

    Args:
        option: what names it on the command line.
        path: the file to write.
        sources: files that the command reads.
        model: where its model comes from, of whose folder no file that makes it up is written.
    """
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{option} {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise IsADirectoryError(f"{option} {path} is a folder: name a file")
    if any(_is_file(path, source) for source in sources if source is not None):
        raise FileExistsError(f"{option} {path} is the input itself: name another file")
    if any(_is_file(path, file) for file in _files_of(model)):
        raise FileExistsError(f"{option} {path} is a file of the model: name another file")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise PermissionError(f"{option} {path}: no permission to write it")


def _files_of(model: str | None) -> list[Path]:
    """The files on this disk that make up a model: those that are read to load it."""
    if model is None:
        return []
    folder = Path(model) if Path(model).is_dir() else Path(model).parent
    return [file for file in folder.glob("*") if _MODEL_FILE.fullmatch(file.name)] if folder.is_dir() else []


def _is_file(path: Path, source: str | Path) -> bool:
    try:
        return path.samefile(source)
    except (OSError, ValueError):  # one is not there; or no name of a file at all, but a schedule in JSON
        return False
