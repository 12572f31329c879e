"""`dtbert profile` on a tiny model: output, files, bad input."""

import json
import os
import re
from pathlib import Path

import pytest

from dtbert.profiling import ceilings
from tests.cli.conftest import Run


@pytest.fixture(autouse=True)
def _small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ceilings.PRODUCT_ROWS, "cpu", 64)
    monkeypatch.setitem(ceilings.COPY_BYTES, "cpu", 2**16)


@pytest.fixture
def small(model_folder: Path) -> list[object]:
    return ["profile", "--model", model_folder, "--repeats", 2]


def test_table_is_printed(run: Run, small: list[object]) -> None:
    status, out, err = run(*small, "--batch", 2, "--length", 20)
    assert (status, err) == (0, "")
    assert "batch     2 x 20 tokens, float32\n" in out
    assert "with schedule" not in out


def test_json_holds_steps_layers_and_both_forwards(run: Run, small: list[object], tmp_path: Path) -> None:
    lengths = tmp_path / "lengths.txt"
    lengths.write_text("20\n\n 30 \n")
    status, out, err = run(*small, "--lengths", lengths, "--schedule", "0.5,0.2", "--scorer", "cls", "--json")
    assert (status, err) == (0, "")
    fields = json.loads(out)
    assert (fields["seqlens"], fields["dtype"], fields["backend"]) == ([20, 30], "float32", "cpu")
    assert fields["config"]["num_hidden_layers"] == 2
    assert all(rate > 0 for rate in fields["ceilings"].values())
    assert fields["nothing_dropped"]["schedule"] is None
    dropped = fields["dropped"]
    assert dropped["schedule"]["scorer"] == "cls"
    assert dropped["repeats"] == 2
    assert [layer["layer"] for layer in dropped["layers"]] == [0, 1, None]
    assert [layer["tokens_out"] for layer in dropped["layers"]] == [25, 10, None]
    assert fields["ratio"]["flops"] == dropped["total"]["flops"] / fields["nothing_dropped"]["total"]["flops"] < 1
    for one in [*dropped["steps"], *dropped["layers"], *dropped["layer_steps"], dropped["total"]]:
        assert one["seconds"]["low"] <= one["seconds"]["median"] <= one["seconds"]["high"]
        assert (one["bound"] in ("compute", "memory")) == (one["calls"] > 0)
    for parts in ("steps", "layers", "layer_steps"):
        assert sum(one["flops"] for one in dropped[parts]) == dropped["total"]["flops"]
        assert sum(one["bytes"] for one in dropped[parts]) == dropped["total"]["bytes"]


def test_picture_and_trace_are_written(run: Run, small: list[object], tmp_path: Path) -> None:
    plot, trace = tmp_path / "profile.png", tmp_path / "trace.json"
    arguments = ["--batch", 1, "--length", 9, "--schedule", "5,2", "--plot", plot, "--trace", trace]
    assert run(*small, *arguments).status == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"forward, nothing dropped", "forward, tokens dropped", "layer 1", "layer 1: selection"} <= names


def test_random_weights_need_no_model(run: Run) -> None:
    status, out, _ = run("profile", "--size", "1x24", "--batch", 1, "--length", 4, "--repeats", 1)
    assert status == 0
    assert out.startswith("model     random weights, 1 x 24, 12 heads")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "argument --batch: expected a whole number of at least 1, got '0'"),
        (["--batch", "9" * 9, "--length", "512"], "are more than 2,147,483,647 tokens"),
        (["--repeats", "none"], "argument --repeats: expected a whole number"),
        (["--size", "6by768"], "such as 6x768, got '6by768'"),
        (["--length", "513"], "513 tokens: this model takes 1 to 512"),
        (["--device", "cuda:99"], "device 'cuda:99'"),
        (["--backend", "magic"], "unknown backend 'magic'"),
        (["--schedule", "1,1,1"], "3 entries, the model 2 layers"),
        (["--scorer", "cls"], "it needs --schedule"),
        (["--size", "2x24"], "--model and --revision"),
        (["--plot", "profile.gif"], "the ending must be one of .png"),
        (["--plot", "nowhere/profile.png"], "there is no folder nowhere"),
        (["--size", "6x100"], "multiple of 12, such as 768, got '6x100'"),
        (["--trace", "."], "--trace . is a folder"),
        (["--lengths", __file__, "--trace", __file__], "is the input itself"),
        (["--lengths", "missing.txt"], "missing.txt: No such file"),
    ],
)
def test_bad_input_is_one_line(run: Run, small: list[object], arguments: list[str], message: str) -> None:
    status, out, err = run(*small, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("dtbert: error: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("12\nmany\n", "lengths.txt, line 2: .* at least 1, got 'many'"),
        ("12\n0\n", "line 2: .* got '0'"),
        ("-4\n", "line 1: .* got '-4'"),
        ("3.5\n", "line 1: .* got '3.5'"),
        ("12 13\n", "line 1: .* got '12 13'"),
        ("9" * 5000, "line 1: .* got '9+'"),
        ("\n\n", "no lengths in it"),
        ("600\n", "600 tokens: this model takes 1 to 512"),
    ],
)  # fmt: skip
def test_lengths_that_are_none_are_refused(
    run: Run, small: list[object], tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "lengths.txt"
    path.write_text(text)
    status, _, err = run(*small, "--lengths", path)
    assert status == 2
    assert re.search(message, err)


def test_lengths_stand_alone(run: Run, small: list[object], tmp_path: Path) -> None:
    path = tmp_path / "lengths.txt"
    path.write_bytes(b"\xff\n")
    assert "leave out --batch and --length" in run(*small, "--lengths", path, "--batch", 2).err
    assert r"got '\\xff'" in run(*small, "--lengths", path).err


def test_file_that_cannot_be_written_is_said_before_the_work(
    run: Run, small: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The tests may run as root, to whom nothing is forbidden.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    status, _, err = run(*small, "--trace", tmp_path / "trace.json")
    assert status == 2
    assert "trace.json: no permission" in err
