"""`dtbert export`: what it writes, and what it says about it."""

import json
from pathlib import Path

import onnxruntime
import pytest

from tests.cli.conftest import Run


def test_export_writes_what_an_app_needs(run: Run, model_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny.onnx"
    status, out, err = run("export", file, "--model", model_folder, "--schedule", "0.9,0.5", "--scorer", "answer")
    assert (status, err) == (0, "")
    first, *files = out.splitlines()
    assert first == f"wrote {file}, which keeps 0.9 0.5 answer"
    assert [Path(line.split()[-1]).name for line in files] == ["tiny.onnx", "tiny.onnx.json", "tokenizer.json"]
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.onnx", "tiny.onnx.json", "tokenizer.json"}
    about = json.loads((tmp_path / "tiny.onnx.json").read_text("utf-8"))
    assert about["schedule"]["length_config"] == [0.9, 0.5]
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_inputs()] == about["inputs"]
    assert [one.name for one in session.get_outputs()] == about["outputs"]


def test_export_again_in_8_bits_gives_the_sizes_as_json(run: Run, model_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny.onnx"
    full = json.loads(run("export", file, "--model", model_folder, "--json").out)
    small = json.loads(run("export", file, "--model", model_folder, "--json", "--int8").out)
    assert full["schedule"] is None
    assert small["bytes"] == {path: Path(path).stat().st_size for path in small["bytes"]}
    assert small["bytes"][str(file)] < full["bytes"][str(file)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x.pt"], "the name of an ONNX file ends in .onnx"),
        (["nowhere/x.onnx"], "there is no folder nowhere"),
        (["x.onnx", "--budget", "0.5"], "this model has no schedules.json"),
        (["x.onnx", "--schedule", "1,0.5", "--scorer", "random"], "cannot compute the scorer 'random'"),
        (["x.onnx", "--schedule", "1,0.5,0.5"], "3 entries, the model 2 layers"),
    ],
)
def test_what_cannot_be_exported_is_one_line(
    run: Run, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run("export", *arguments, "--model", model_folder)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not list(tmp_path.iterdir())
