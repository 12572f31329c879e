"""The arithmetic of scripts/simulate_cluster.py: what grows with the machines, and where it ends."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import simulate_cluster
from simulate_cluster import Assumed, Measured, limits, seconds_with

BLOCK = Measured(
    questions=1000,
    read_seconds=1,
    answer_seconds=8,
    write_seconds=1,
    bytes_read=1e6,
    bytes_written=1e5,
    plan_bytes_per_second=1e9,
)
ASSUMED = Assumed(questions=1e9, workers_per_machine=16, read_rate=1e9, write_rate=1e9, request_rate=7e4, task_rate=500)


def test_a_limit_is_where_all_workers_together_need_what_there_is() -> None:
    found = limits(BLOCK, ASSUMED)
    assert found == pytest.approx(
        {"reading": 10_000, "writing": 100_000, "requests": 100_000, "scheduling": 5_000, "blocks": 1e6}
    )
    for name, workers in found.items():
        blocks_per_second = workers / BLOCK.seconds
        if name == "reading":
            assert blocks_per_second * BLOCK.bytes_read == pytest.approx(ASSUMED.read_rate)
        if name == "scheduling":
            assert blocks_per_second == pytest.approx(ASSUMED.task_rate)


def test_twice_the_workers_take_half_as_long_up_to_the_limit() -> None:
    assert seconds_with(1, BLOCK, ASSUMED) == pytest.approx(1e7)
    assert seconds_with(1250, BLOCK, ASSUMED) == pytest.approx(2 * seconds_with(2500, BLOCK, ASSUMED))
    assert seconds_with(5000, BLOCK, ASSUMED) == seconds_with(50_000, BLOCK, ASSUMED) == pytest.approx(2000)
    # A last round is a whole one.
    few = replace(ASSUMED, questions=3000)
    assert [seconds_with(workers, BLOCK, few) for workers in (1, 2, 3, 99)] == [30, 20, 10, 10]


def test_report_says_what_was_measured_assumed_and_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {"read_seconds": 1, "answer_seconds": 8, "write_seconds": 1, "bytes_read": 1e6, "bytes_written": 1e5}
    blocks = [{"rows": 900, **fields}, {"rows": 1100, **fields}, {"rows": 0, **fields, "answer_seconds": 0}]
    times = {"plan_seconds": 2, "input_bytes": 2e9, "blocks": blocks}
    (tmp_path / "_times.json").write_text(json.dumps(times))
    arguments = ["simulate_cluster.py", str(tmp_path), "--read-rate", "1e9", "--machines", "400", "--task-rate", "400"]
    monkeypatch.setattr(sys, "argv", arguments)
    simulate_cluster.main()
    lines = capsys.readouterr().out.splitlines()
    assert "  1,000 questions, 1,000,000 bytes read, 100,000 written" in lines
    assert "  planned first by one process, in 0.278 h at the measured 1,000 MB/s" in lines
    assert "     400     6400     0.694      400,000  scheduling" in lines
    assert "       250.0 machines: scheduling" in lines
    monkeypatch.setattr(sys, "argv", [*arguments, "--json"])
    simulate_cluster.main()
    assert json.loads(capsys.readouterr().out)["workers_at_limits"]["scheduling"] == pytest.approx(4000)


def test_a_folder_without_times_is_wrong_usage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["simulate_cluster.py", str(tmp_path)])
    with pytest.raises(SystemExit):
        simulate_cluster.main()
    assert "_times.json" in capsys.readouterr().err
