"""A run's folder: what it needs to go on after any interruption, and the models it made."""

import json
import os
import shutil
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from dtbert.files import Json, differing, lock, reason_of, replacing, write_whole
from dtbert.weights.checkpoint import TOKENIZER_FILES, WEIGHT_FILES
from dtbert.weights.kinds import unpickler_says
from dtbert.weights.save import Saved, write_model_files

_STATE = "checkpoint.pt"
_RUN = "run.json"
_METRICS = "metrics.jsonl"
_LOCK = ".lock"


class RunFolder:
    """The folder of one run: ``run.json``, ``checkpoint.pt``, ``metrics.jsonl``, and the models ``best`` and ``last``.

    Every file is written whole, so that a reader, or a run that goes on after ``kill -9``, finds the old one or the new
    one.

    Args:
        path: made if it is not there.
        run: what identifies the run, as plain values; a folder that holds another run is refused.

    Raises:
        ValueError: the folder holds another run; what differs is named.
        FileExistsError: the folder holds files that are not a run's.
        OSError: it cannot be written, or another process trains in it.
    """

    def __init__(self, path: Path, run: dict[str, Any]) -> None:
        self.path = path
        if path.is_file():
            raise FileExistsError(f"{path} is a file: name a new or empty folder")
        path.mkdir(parents=True, exist_ok=True)
        description = path / _RUN
        if not description.is_file() and any(not _is_passing(entry) for entry in path.iterdir()):
            raise FileExistsError(f"{path} has files in it that are not a training run's: name a new or empty folder")
        self._lock = FileIO(path / _LOCK, "a", opener=_no_link)
        if not lock(self._lock):
            raise OSError(f"another process trains in {path}: wait for it, or name another folder")
        if description.is_file():
            _check_same(description, run)
        else:
            write_whole(description, json.dumps(run, indent=2) + "\n")
        for left in path.rglob("*.partial"):  # by a run that was killed
            if left.is_file():
                left.unlink()

    def load_state(self) -> dict[str, Any] | None:
        """The last state saved, on the CPU, or None at the beginning; later lines of the metrics are taken back.

        Raises:
            ValueError: the file is damaged.
        """
        file = self.path / _STATE
        if not file.is_file():
            self._keep_metrics(0)
            return None
        try:
            state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
            step = int(state["step"])
        except Exception as error:
            raise ValueError(
                f"{file} is damaged ({unpickler_says(error)}): remove it to start the run again"
            ) from error
        self._keep_metrics(step)
        return state

    def save_state(self, state: dict[str, Any]) -> None:
        """Replace the last state; OSError where it cannot be written, and the one before stays."""
        with replacing(self.path / _STATE) as partial:
            torch.save(state, partial)

    def has_model(self, name: str) -> bool:
        """Whether `save_model` has written a model of that name."""
        return (self.path / name / WEIGHT_FILES[0]).is_file()

    def save_model(self, name: str, model: Saved, tokenizer_folder: Path) -> None:
        """Write a model, with its tokenizer, to the folder ``name``; OSError as `save_state`."""
        folder = self.path / name
        folder.mkdir(exist_ok=True)
        for file in TOKENIZER_FILES:
            if (tokenizer_folder / file).is_file() and not (folder / file).is_file():
                with replacing(folder / file) as partial:
                    shutil.copyfile(tokenizer_folder / file, partial)
        write_model_files(model, folder)

    def log(self, record: dict[str, Any]) -> None:
        """Add a line to the metrics."""
        file = self.path / _METRICS
        try:
            with file.open("a", encoding="utf-8") as opened:
                opened.write(json.dumps(record) + "\n")
        except OSError as error:
            raise OSError(f"cannot write {file}: {reason_of(error)}; what was saved before is still there") from error

    def last_record(self) -> dict[str, Any]:
        """The last line of the metrics, or nothing."""
        file = self.path / _METRICS
        lines = file.read_text("utf-8").splitlines() if file.is_file() else []
        return json.loads(lines[-1]) if lines else {}

    def _keep_metrics(self, step: int) -> None:
        # A run that was killed may have logged steps that it now takes again, the last one in part.
        file = self.path / _METRICS
        if not file.is_file():
            return
        kept = []
        lines = file.read_text("utf-8", errors="replace").splitlines(keepends=True)
        for line in lines:
            try:
                if not line.endswith("\n") or json.loads(line)["step"] > step:
                    break
            except (ValueError, KeyError, TypeError):
                break
            kept.append(line)
        if len(kept) < len(lines):
            write_whole(file, "".join(kept))


def _no_link(path: str, flags: int) -> int:
    """Open the file of that name itself: a link would lead to one that is not the run's."""
    try:
        return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as error:
        if not Path(path).is_symlink():
            raise
        raise FileExistsError(f"{path} is a link: remove it, or name another folder") from error


def _is_passing(entry: Path) -> bool:
    return entry.name == _LOCK or entry.name.endswith(".partial")


def _check_same(description: Path, run: dict[str, Any]) -> None:
    try:
        found = Json.parse(description.read_bytes()).of(dict)
    except ValueError as error:
        raise ValueError(f"{description} is damaged ({error}): name another folder") from error
    run = json.loads(json.dumps(run))
    parts = [f"{name} was {found.get(name)!r}, is {run.get(name)!r}" for name in differing(found, run)]
    if parts:
        raise ValueError(
            f"{description.parent} holds another run ({'; '.join(parts)}): name another folder, or give its arguments"
        )
