"""What a command writes: JSON to stdout, and files that are checked before the work begins."""

import json
import os
import sys
from pathlib import Path
from typing import Any


def print_json(fields: dict[str, Any]) -> None:
    """Print one JSON object, with its characters as they are where stdout can show them all."""
    unicode = sys.stdout is not None and (sys.stdout.encoding or "").lower() == "utf-8"
    print(json.dumps(fields, ensure_ascii=not unicode))


def check_output(option: str, path: Path, *sources: str | Path | None) -> None:
    """Raise OSError if the file cannot be written, or is one that is read: said before the work, not after it."""
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{option} {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise IsADirectoryError(f"{option} {path} is a folder: name a file")
    if any(_is_file(path, source) for source in sources if source is not None):
        raise FileExistsError(f"{option} {path} is the input itself: name another file")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise PermissionError(f"{option} {path}: no permission to write it")


def _is_file(path: Path, source: str | Path) -> bool:
    try:
        return path.samefile(source)
    except (OSError, ValueError):  # one is not there; or no name of a file at all, but a schedule in JSON
        return False
