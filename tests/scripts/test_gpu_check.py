"""What can be tested of the GPU's tests and benchmark where there is no GPU."""

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
    environment = {**os.environ, "PYTHON": sys.executable}
    command = [ROOT / "scripts" / "gpu_check.sh", "--fast"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (2, "")
    assert "--fast" in run.stderr


def test_there_are_gpu_tests() -> None:
    assert GPU_TESTS


@pytest.mark.parametrize("path", GPU_TESTS, ids=lambda path: path.stem)
def test_gpu_test_file_imports_and_is_marked(path: Path) -> None:
    marks = importlib.import_module(f"tests.gpu.{path.stem}").pytestmark
    assert "gpu" in {mark.name for mark in (marks if isinstance(marks, list) else [marks])}


def bench(script: Any, monkeypatch: pytest.MonkeyPatch, output: Path, *sections: str) -> list[dict[str, Any]]:
    """The records of these sections on tiny sizes."""
    bench_gpu = script("bench_gpu")
    # They take longer than everything else here, and have their own test.
    ceilings = {"flops_per_second": 1e12, "bytes_per_second": 1e11, "dtype": "float32"}
    monkeypatch.setattr(bench_gpu.machine, "ceilings", lambda *_: ceilings)
    command = f"bench_gpu.py --device cpu --tiny --rounds 1 --block-ms 0.1 --commit abc --records {output}"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--only", *sections])
    assert bench_gpu.main(bench_gpu.arguments()) == 0
    found: list[dict[str, Any]] = script("gpu_check.records").read(output)[0]
    return found


# The kernels of `tuned` have to be interpreted, and torch.compile takes minutes: a trial runs these.
LEFT_TO_TRIALS = {"tuned", "compiled", "compiled_squad", "compiled_latency"}


def test_benchmark_runs_every_section_on_tiny_sizes(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sections = [name for name in script("bench_gpu").SECTIONS if name not in LEFT_TO_TRIALS]
    found = bench(script, monkeypatch, tmp_path / "results.jsonl", *sections)
    results = script("gpu_bench.report").results_of(found)
    assert results["commit"] == "abc"
    assert results["ceilings"]["flops_per_second"] == 1e12
    assert results["skipped"] == []
    assert {row["section"] for row in results["rows"]} == set(sections) - {"record"}
    # The CPU has no cuDNN's attention, no flash attention for sequences end to end, and no graphs.
    absent = {entry["provider"] for row in results["rows"] for entry in row["not_timed"]}
    assert not {name for name in absent if not name.startswith(("sdpa", "varlen_attn", "dtbert, graphs"))}
    assert all(result["ms"] > 0 for row in results["rows"] for result in row["results"])
    shown = capsys.readouterr().out
    assert "share of the measured product rate" in shown
    assert "time saved / executed MACs saved" in shown


def test_a_section_that_breaks_the_device_ends_the_others(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench_gpu, output = script("bench_gpu"), tmp_path / "results.jsonl"

    def broken(_: Any) -> Any:
        yield {"section": "attention", "work": "first", "results": [], "not_timed": []}
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setitem(bench_gpu.KERNELS, "attention", broken)
    command = f"bench_gpu.py --device cpu --tiny --records {output} --only attention steps"
    monkeypatch.setattr(sys, "argv", command.split())
    assert bench_gpu.main(bench_gpu.arguments()) == 1
    results = script("gpu_bench.report").results_of(script("gpu_check.records").read(output)[0])
    assert [row["work"] for row in results["rows"]] == ["first"]
    reasons = {entry["section"]: entry["reason"] for entry in results["skipped"]}
    assert "illegal memory access" in reasons["attention"]
    assert reasons["steps"] == "the device failed in attention"


def test_a_trial_checks_and_tunes_the_interpreted_kernels(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path)}
    command = [ROOT / "scripts" / "gpu_check.sh", "--device", "cpu", "--tiny", "--seconds", "2000"]
    run = subprocess.run([*command, "--only", "check", "tune"], env=environment, capture_output=True, text=True)
    log = (tmp_path / "log.txt").read_text()
    assert run.returncode == 0, run.stdout + log
    assert "no failures" in run.stdout
    assert "memcheck walked 1, 63 tokens" in run.stdout
    assert (tmp_path / "summary.txt").read_text().strip() in run.stdout
    table = json.loads((tmp_path / "interpreter.json").read_text())
    assert {row["kernel"] for row in table["rows"]} == {"attention", "fused_linear"}
    # What comes back from a lent machine: few files, with plain names.
    assert {path.name for path in tmp_path.iterdir()} == {"results.jsonl", "log.txt", "summary.txt", "interpreter.json"}


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


@pytest.mark.parametrize(("own_ms", "verdict"), [(0.9, "met"), (1.1, "MISSED"), (None, "no figure")])
def test_aims_compare_with_the_fastest_peer(script: Any, own_ms: float | None, verdict: str) -> None:
    report = script("gpu_bench.report")
    results = [{"provider": "sdpa flash", "ms": 1.0}, {"provider": "sdpa cuDNN", "ms": 2.0}]
    if own_ms is not None:
        results.append({"provider": "dtbert", "ms": own_ms})
    row = {"section": "attention", "work": "32x384", "results": results, "not_timed": []}
    ceilings = {"flops_per_second": 1.0, "bytes_per_second": 1.0, "dtype": "bfloat16"}
    aims = report.aims({"rows": [row], "ceilings": ceilings})
    assert [aim.verdict for aim in aims if aim.work == "attention, 32x384"] == [verdict]
    assert {aim.verdict for aim in aims if aim.work != "attention, 32x384"} == {"no figure"}
