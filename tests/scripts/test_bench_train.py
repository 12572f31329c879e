"""What the benchmark of training writes; never how long anything takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import bench_train
import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "bench_train.py"


@pytest.mark.usefixtures("built_steps")
def test_every_engine_trains_and_has_its_row(tmp_path: Path) -> None:
    output = tmp_path / "new" / "train.json"
    asked = ("--size", "1x32", "--batch-tokens", 512, "--steps", 1, "--rounds", 1, "--threads", 1)
    # A process of its own, for what it sets is for the whole of one.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, SCRIPT, *map(str, (*asked, "--output", output))]
    process = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    results = json.loads(output.read_text("utf-8"))
    assert results["arguments"] == {"size": ["1x32"], "batch_tokens": 512, "steps": 1, "rounds": 1}
    assert results["device"]["threads"] == 1
    assert all((results["commit"], *results["device"].values(), *results["versions"].values()))
    works = {row["work"] for row in results["rows"]}
    assert "1x32 float32" in works
    own = {f"dtbert{steps}{kind}" for steps in ("", ", torch's steps") for kind in ("", ", LengthDrop")}
    for work in works:
        rows = {row["engine"]: row for row in results["rows"] if row["work"] == work}
        assert set(rows) == {"transformers sdpa", *own}
        assert rows["transformers sdpa"]["ratio"] == 1
        for name, row in rows.items():
            assert row["tokens_per_second"] > 0
            assert row["ratio"] > 0
            assert f"{work:14} {name:34}" in process.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--size", "6x100"), "whole heads of 32, not 6x100"),
        (("--rounds", "0"), "--rounds must be at least 1, not 0"),
        (("--batch-tokens", "100"), "at least 512"),
    ],
)
def test_bad_arguments_are_named(
    arguments: tuple[str, str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_train.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        bench_train.arguments()
    assert says in capsys.readouterr().err
