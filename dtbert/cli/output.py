"""What a command writes: JSON to stdout, and files whole or not at all."""

import json
import sys
from pathlib import Path
from typing import Any


def print_json(fields: dict[str, Any]) -> None:
    """Print one JSON object, with its characters as they are where stdout can show them all."""
    unicode = sys.stdout is not None and (sys.stdout.encoding or "").lower() == "utf-8"
    print(json.dumps(fields, ensure_ascii=not unicode))


def check_folder(option: str, path: Path) -> None:
    """Raise FileNotFoundError if there is no folder for the file: said before the work, not after it."""
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{option} {path}: there is no folder {path.parent}")


def write_whole(path: Path, text: str) -> None:
    """Write a text file that is never seen in part."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, "utf-8")
    partial.replace(path)
