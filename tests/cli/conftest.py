"""A tiny model in a folder, and a way to run a command in this process."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from dtbert.cli import main
from scripts.fuzz import small_model

WORDS = "who what when where wrote it the a an in by to of letter ada zoe paris london 1843 1995 said and , . ?"


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("model") / "tiny", WORDS.split())


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `dtbert` with arguments; gives its exit status and what it printed."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        return Outcome(status, *capsys.readouterr())

    return run


@pytest.fixture
def command(model_folder: Path, tmp_path: Path) -> tuple[str, ...]:
    files = ("--input", str(tmp_path / "q.jsonl"), "--output", str(tmp_path / "a.jsonl"))
    return ("answer", "--model", str(model_folder), *files)
