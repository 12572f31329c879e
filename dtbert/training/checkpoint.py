"""A run's folder: what it needs to go on after any interruption, and the models it made."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dtbert.model import BertForQuestionAnswering
from dtbert.weights import to_hub_tensors

_STATE = "checkpoint.pt"
_RUN = "run.json"
_METRICS = "metrics.jsonl"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt")


class RunFolder:
    """The folder of one run: ``run.json``, ``checkpoint.pt``, ``metrics.jsonl``, and the models ``best`` and ``last``.

    Every file is written beside its place and moved there, so that a reader, or a run that goes on after ``kill -9``,
    finds the old one or the new one, whole.

    Args:
        path: made if it is not there.
        run: what identifies the run; a folder that holds another run is refused.

    Raises:
        ValueError: the folder holds another run; what differs is named.
        FileExistsError: the folder holds files that are not a run's.
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, run: dict[str, Any]) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        description = path / _RUN
        if description.is_file():
            _check_same(path, json.loads(description.read_text("utf-8")), run)
        elif any(not entry.name.endswith(".partial") for entry in path.iterdir()):
            raise FileExistsError(f"{path} has files in it that are not a training run's: name a new or empty folder")
        else:
            self._write(description, lambda partial: partial.write_text(json.dumps(run, indent=2) + "\n", "utf-8"))

    def load_state(self, device: torch.device) -> dict[str, Any] | None:
        """The last state saved, or None at the beginning; later lines of the metrics are taken back."""
        file = self.path / _STATE
        if not file.is_file():
            self._keep_metrics(0)
            return None
        try:
            state: dict[str, Any] = torch.load(file, map_location=device, weights_only=True)
        except Exception as error:
            raise ValueError(f"{file} is damaged ({error}): remove it to start the run again") from error
        self._keep_metrics(state["step"])
        return state

    def save_state(self, state: dict[str, Any]) -> None:
        self._write(self.path / _STATE, lambda partial: torch.save(state, partial))

    def save_model(self, name: str, model: BertForQuestionAnswering, tokenizer_folder: Path) -> None:
        """Write a model that `dtbert.QuestionAnswerer.load` reads to the folder ``name``."""
        folder = self.path / name
        folder.mkdir(exist_ok=True)
        for file in _TOKENIZER_FILES:
            if (tokenizer_folder / file).is_file() and not (folder / file).is_file():
                self._write(folder / file, _copier(tokenizer_folder / file))
        config = {"architectures": ["BertForQuestionAnswering"], **model.config.to_dict()}
        text = json.dumps(config, indent=2) + "\n"
        self._write(folder / "config.json", lambda partial: partial.write_text(text, "utf-8"))
        # Tied or sliced tensors must own their memory to be written.
        tensors: dict[str, Tensor] = {key: value.contiguous() for key, value in to_hub_tensors(model).items()}
        self._write(folder / "model.safetensors", lambda partial: save_file(tensors, partial, {"format": "pt"}))

    def log(self, record: dict[str, Any]) -> None:
        """Add a line to the metrics."""
        with (self.path / _METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def _keep_metrics(self, step: int) -> None:
        # A run that was killed may have logged steps that it now takes again.
        file = self.path / _METRICS
        if not file.is_file():
            return
        lines = file.read_text("utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        self._write(file, lambda partial: partial.write_text("".join(kept), "utf-8"))

    def _write(self, file: Path, write: Callable[[Path], Any]) -> None:
        partial = file.with_name(file.name + ".partial")
        try:
            write(partial)
            with partial.open("rb") as written:
                os.fsync(written.fileno())
            partial.replace(file)
        except Exception as error:
            partial.unlink(missing_ok=True)
            # torch and safetensors raise their own errors when the disk is full.
            raise OSError(f"cannot write {file}: {error}; what was saved before is still there") from error


def _copier(source: Path) -> Callable[[Path], Any]:
    return lambda partial: shutil.copyfile(source, partial)


def _check_same(path: Path, found: dict[str, Any], run: dict[str, Any]) -> None:
    differing = [name for name in sorted({*found, *run}) if found.get(name) != run.get(name)]
    if differing:
        parts = [f"{name} was {found.get(name)!r}, is {run.get(name)!r}" for name in differing]
        raise ValueError(f"{path} holds another run ({'; '.join(parts)}): name another folder, or give its arguments")
