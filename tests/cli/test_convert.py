"""`dtbert convert`: what it writes, and what it says about it."""

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Run


@pytest.mark.parametrize(("int8", "weights"), [((), "model.safetensors"), (("--int8",), "model.int8.safetensors")])
def test_convert_writes_a_folder_that_answers(
    run: Run, model_folder: Path, tmp_path: Path, int8: tuple[str, ...], weights: str
) -> None:
    folder = tmp_path / "converted"
    status, out, err = run("convert", model_folder, folder, *int8)
    assert (status, err) == (0, "")
    first, *files = out.splitlines()
    assert first == f"wrote {folder}"
    assert {line.split()[-1] for line in files} == {path.name for path in folder.iterdir()}
    assert weights in out
    assert run("answer", "--model", folder, "--question", "Who?", "--context", "Ada wrote it.").status == 0


def test_convert_as_json_gives_the_sizes(run: Run, model_folder: Path, tmp_path: Path) -> None:
    report = json.loads(run("convert", model_folder, tmp_path / "converted", "--json").out)
    assert report["bytes"] == {path.name: path.stat().st_size for path in Path(report["folder"]).iterdir()}


def test_convert_refuses_what_is_there_already(run: Run, model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    status, out, err = run("convert", model_folder, tmp_path)
    assert (status, out) == (2, "")
    assert f"{tmp_path} is there already" in err
    status, out, err = run("convert", "./nothing", tmp_path / "new")
    assert (status, out) == (2, "")
    assert "no such file or folder: './nothing'" in err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
