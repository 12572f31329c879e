"""What gpu_check's publish.py makes of the folders of runs."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.scripts.gpu_run import KEY, good_run, module, result, row

pytestmark = pytest.mark.usefixtures("_scripts")


def write(folder: Path, found: list[dict[str, Any]]) -> None:
    (folder / "results.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in found))


def test_publish_writes_figures_picture_table_and_rows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    configs = importlib.import_module("dtbert.kernels.triton.configs")
    tune, publish = module("tune"), module("publish")
    write(tmp_path, good_run())
    record = next(record for record in good_run() if record["kind"] == "tuned")
    tuned = tune.tuned_row(record, configs.AttentionConfig)
    configs.write_table(configs.Table("sm_90", "NVIDIA H200", {"triton": "3.6.0"}, "0123", (tuned,)), tmp_path)
    rows = publish.publish([tmp_path], tmp_path / "docs", tmp_path / "tables")
    assert "| 32x384 tokens | 2.5 ms | 5.5 ms | 2.2 |" in rows
    assert "| 256 SQuAD windows | 32,000/s | 8,533/s | 3.8 |" in rows
    results = json.loads((tmp_path / "docs" / "bench_gpu.json").read_text())
    assert results["failures"] == []
    assert results["passed"] == {"smoke": 2, "same_bits_under_both_ptxas": 1, "configurations": 1, "tests": 1}
    assert {aim["met"] for aim in results["aims"]} == {True, False, None}
    assert (tmp_path / "docs" / "bench_gpu.png").stat().st_size > 10_000
    assert configs.read_table(tmp_path / "tables" / "sm_90.json").rows[0].key == tuple(KEY.values())


def test_rows_have_a_column_for_torch_compile_where_it_was_timed() -> None:
    compiled = row("compiled", "32x384", result("torch.compile max-autotune", 3.75))
    results = importlib.import_module("gpu_bench.report").results_of([*good_run(), compiled])
    lines = module("publish").readme_rows(results).split("\n")
    assert "| torch.compile |" in lines[0]
    assert lines[2:4] == [
        "| 32x384 tokens | 2.5 ms | 5.5 ms | 3.75 ms | 2.2 |",
        "| 1x128 tokens | 0.28 ms | 2.8 ms | - | 10.0 |",
    ]


def test_runs_that_took_some_stages_each_are_published_as_one(tmp_path: Path) -> None:
    run, folders = good_run(), [tmp_path / name for name in ("figures", "again", "checks")]
    checks = [record for record in run if record["kind"] in ("smoke", "memcheck", "test")]
    again = [run[0], row("latency", "1x128", result("dtbert, graphs", 0.27))]
    for folder, records in zip(folders, (run, again, checks), strict=True):
        folder.mkdir()
        write(folder, records)
    found, broken = module("publish").read_runs(folders)
    results = importlib.import_module("gpu_bench.report").results_of(found)
    [latency] = [one for one in results["rows"] if one["section"] == "latency"]
    assert [one["ms"] for one in latency["results"]] == [0.27]
    assert {one["section"] for one in results["rows"]} == {one["section"] for one in run if one["kind"] == "row"}
    assert found[-len(checks) :] == checks
    assert broken == 0


@pytest.mark.parametrize(
    ("second", "error"),
    [
        ([], "no records"),
        ([good_run()[0] | {"commit": "fedc"}], "NVIDIA H200, commit 0123456789abcdef and NVIDIA H200, commit fedc"),
        ([good_run()[0] | {"device": {"name": "NVIDIA H100"}}], "one device"),
    ],
    ids=["no-run", "commit", "device"],
)
def test_publish_refuses_runs_that_do_not_belong_together(tmp_path: Path, second: Any, error: str) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder, records in zip(folders, (good_run(), second), strict=True):
        folder.mkdir()
        write(folder, records)
    with pytest.raises(ValueError, match=error):
        module("publish").publish(folders, tmp_path / "docs", tmp_path / "tables")


def test_publish_refuses_a_run_without_its_device(tmp_path: Path) -> None:
    write(tmp_path, good_run()[1:])
    with pytest.raises(ValueError, match="no record of a device"):
        module("publish").publish([tmp_path], tmp_path / "docs", tmp_path / "tables")
