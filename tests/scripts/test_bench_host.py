"""What the benchmark of the host writes; never how long anything takes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "bench_host.py"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    # A process of its own: it puts stand-ins in the place of torch's functions.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The results of one round, and what was printed."""
    output = tmp_path_factory.mktemp("bench") / "host.json"
    process = run("--rounds", 1, "--output", output)
    assert process.returncode == 0, process.stderr
    return json.loads(output.read_text("utf-8")), process.stdout


def test_every_row_has_its_fields(finished: tuple[dict[str, Any], str]) -> None:
    results, _ = finished
    assert results["skipped"] == []
    assert results["device"]["threads"] == 1
    assert all((results["commit"], *results["device"].values(), *results["versions"].values()))
    units = ["ratio" if "ratio" in row else "microseconds" for row in results["rows"]]
    assert units == ["ratio"] * 4 + ["microseconds"] * 2
    assert len({row["name"] for row in results["rows"]}) == 6
    for row, unit in zip(results["rows"], units, strict=True):
        assert row[unit] > 0
        assert row["met"] == (row[unit] <= row["aim"])
        assert len(row["spread"]) == 2
        assert row["rounds"] == 1
        assert unit == "microseconds" or min(row["own_us"], row["peer_us"]) > 0


def test_every_call_that_would_reach_a_gpu_is_counted(finished: tuple[dict[str, Any], str]) -> None:
    plain, dropping = (row["replaced"] for row in finished[0]["rows"] if "microseconds" in row)
    assert set(plain) == {"launches", "allocations", "products"}
    assert set(dropping) == set(plain)
    assert plain["launches"] < dropping["launches"]
    assert plain["products"] == dropping["products"]


def test_table_names_every_row_and_its_aim(finished: tuple[dict[str, Any], str]) -> None:
    results, printed = finished
    for row in results["rows"]:
        line = next(line for line in printed.splitlines() if f": {row['name']}" in line)
        assert f"aim {row['aim']:g}" in line


def test_rounds_below_1_are_refused() -> None:
    process = run("--rounds", 0)
    assert process.returncode == 2
    assert "--rounds" in process.stderr
