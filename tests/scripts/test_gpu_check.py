"""What can be tested of the GPU's tests and benchmark where there is no GPU."""

import contextlib
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from dtbert.profiling.ceilings import Ceilings

ROOT = Path(__file__).resolve().parents[2]
GPU_TESTS = sorted((ROOT / "tests" / "gpu").glob("test_*.py"))


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module as the scripts do."""
    monkeypatch.syspath_prepend(ROOT / "scripts")

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def test_gpu_check_without_a_gpu_says_so_and_exits_with_2() -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([ROOT / "scripts" / "gpu_check.sh"], env=environment, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert "no CUDA GPU" in run.stderr
    assert run.stdout == ""


def test_gpu_check_refuses_unknown_arguments() -> None:
    run = subprocess.run([ROOT / "scripts" / "gpu_check.sh", "--fast"], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (2, "")
    assert "--fast" in run.stderr


def test_there_are_gpu_tests() -> None:
    assert GPU_TESTS


@pytest.mark.parametrize("path", GPU_TESTS, ids=lambda path: path.stem)
def test_gpu_test_file_imports_and_is_marked(path: Path) -> None:
    marks = importlib.import_module(f"tests.gpu.{path.stem}").pytestmark
    assert "gpu" in {mark.name for mark in (marks if isinstance(marks, list) else [marks])}


def test_benchmark_runs_every_section_on_tiny_sizes(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = script("bench_gpu")
    # They take longer than everything else here, and have their own test.
    monkeypatch.setattr(bench, "measure_ceilings", lambda *_: Ceilings(1e12, 1e11))
    output = tmp_path / "bench.json"
    command = "bench_gpu.py --device cpu --tiny --quick --rounds 1 --block-ms 0.1 --commit abc"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--output", str(output)])
    bench.main(bench.arguments())
    results = json.loads(output.read_text("utf-8"))
    assert results["commit"] == "abc"
    assert results["skipped"] == []
    assert {row["section"] for row in results["rows"]} == set(bench.SECTIONS)
    # The CPU has neither cuDNN's attention nor flash attention for sequences end to end; all else is timed.
    absent = {entry["provider"] for row in results["rows"] for entry in row["not_timed"]}
    assert not {name for name in absent if not name.startswith(("sdpa", "varlen_attn", "torch.compile"))}
    assert all(result["ms"] > 0 for row in results["rows"] for result in row["results"])
    assert "share of the measured product rate" in capsys.readouterr().out


def test_benchmark_leaves_out_wrong_and_failing_contenders(script: Any) -> None:
    timing = script("gpu_bench.timing")
    want = torch.ones(3)

    def fail(_: int) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    contenders = [
        timing.Contender("right", lambda _: want.clone(), expected=want),
        timing.Contender("wrong", lambda _: want + 1, expected=want),
        timing.Contender("unwritten", lambda _: want * torch.nan, expected=want),
        timing.Contender("failing", fail, expected=want),
    ]
    row = timing.compare(contenders, torch.device("cpu"), timing.Effort(1, 1e-4, float("inf")))
    assert [result["provider"] for result in row["results"]] == ["right"]
    assert [entry["provider"] for entry in row["not_timed"]] == ["wrong", "unwritten", "failing"]
    assert row["not_timed"][2]["reason"] == "RuntimeError: no such kernel"


def test_time_limit_ends_what_catches_every_exception(script: Any) -> None:
    timing = script("gpu_bench.timing")

    def stubborn() -> None:
        while True:
            with contextlib.suppress(Exception):
                sum(range(1000))

    with pytest.raises(TimeoutError, match="0 s"), timing.time_limit(0.05):
        stubborn()


@pytest.mark.parametrize(("own_ms", "verdict"), [(0.9, "ok"), (1.1, "MISSED"), (None, "no figure")])
def test_aims_compare_with_the_fastest_peer(script: Any, own_ms: float | None, verdict: str) -> None:
    report = script("gpu_bench.report")
    results = [{"provider": "sdpa flash", "ms": 1.0}, {"provider": "sdpa cuDNN", "ms": 2.0}]
    if own_ms is not None:
        results.append({"provider": "dtbert", "ms": own_ms})
    row = {"section": "attention", "work": "32x384", "results": results, "not_timed": []}
    ceilings = {"flops_per_second": 1.0, "bytes_per_second": 1.0, "dtype": "bfloat16"}
    aims = report.aims({"rows": [row], "ceilings": ceilings})
    assert aims[0].verdict == verdict
    assert {aim.verdict for aim in aims[1:]} == {"no figure"}
