"""The machinery of gpu_check.sh, by parts that stand in for those of a GPU: they hang, crash, and write half a line."""

import argparse
import importlib
import io
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.scripts.gpu_run import KEY, bad_run, good_run, module

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("_scripts")


def part(name: str, program: str, **options: Any) -> Any:
    return module("runner").Part(name, (sys.executable, "-c", program), **options)


def stage(name: str, *parts: Any, least_s: float = 1, most_s: float = 20, worth: int = 0) -> Any:
    return module("runner").Stage(name, parts, least_s, most_s, worth)


def run(stages: list[Any], folder: Path, seconds: float = 60) -> tuple[dict[str, Any], str]:
    """The record of each part, by name, and the log."""
    log, output = io.StringIO(), folder / "results.jsonl"
    module("runner").Run(stages, seconds, output, log, lambda line: None)()
    found, _ = module("records").read(output)
    return {record["part"]: record for record in found if record["kind"] == "part"}, log.getvalue()


WAITS = "import sys; line = sys.stdin.readline(); "


def test_a_part_that_breaks_costs_itself_alone(tmp_path: Path) -> None:
    hang = part("hangs", WAITS + "print('about to hang', flush=True); import time; time.sleep(600)")
    # No signal that a process can handle ends it.
    stubborn = part(
        "stubborn",
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(600)",
    )
    crash = part("crashes", WAITS + "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    fails = part("fails", WAITS + "sys.exit('a wrong result')")
    good = part("good", WAITS + "print(line)")
    begin = time.monotonic()
    found, log = run(
        [stage("first", hang, stubborn, crash, fails, most_s=3), stage("second", good)], tmp_path, seconds=40
    )
    assert time.monotonic() - begin < 30
    assert found["hangs"]["verdict"] == found["stubborn"]["verdict"] == "not finished in 3 s"
    assert found["hangs"]["tail"] == ["about to hang"]
    assert found["crashes"]["verdict"] == "killed by SIGSEGV"
    assert found["fails"]["verdict"] == "exit code 1"
    assert found["fails"]["tail"] == ["a wrong result"]
    assert found["good"]["verdict"] == "ok"
    assert "[good] go " in log


def test_what_a_part_started_ends_with_it(tmp_path: Path) -> None:
    child = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
    found, log = run([stage("only", part("parent", child + "print(p.pid)"))], tmp_path)
    assert found["parent"]["verdict"] == "ok"
    number = int(log.split()[-1])
    status = Path(f"/proc/{number}/stat")
    assert not status.exists() or status.read_text().split()[2] == "Z"


def test_the_next_stage_prepares_and_waits_for_its_turn(tmp_path: Path) -> None:
    mark = tmp_path / "began"
    first = part("first", WAITS + "import time; time.sleep(1.5)")
    prepares = f"import pathlib, time; pathlib.Path({str(mark)!r}).write_text(str(time.time())); "
    second = part("second", prepares + WAITS + "print('turn', time.time())")
    begin = time.time()
    _, log = run([stage("one", first), stage("two", second)], tmp_path)
    turn = float(log.split("turn")[1].split()[0])
    assert float(mark.read_text()) < turn
    assert turn >= begin + 1.5


def test_a_part_that_does_not_wait_starts_at_its_turn(tmp_path: Path) -> None:
    first = part("first", WAITS + "import time; time.sleep(1); print('end', time.time())")
    second = part("second", "import time; print('begin', time.time())", awaits=False)
    _, log = run([stage("one", first), stage("two", second)], tmp_path)
    assert float(log.split("begin")[1].split()[0]) > float(log.split("end")[1].split()[0])


def test_stages_share_the_time_by_their_worth() -> None:
    shares = module("runner").shares
    stages = [
        stage("cheap", least_s=10, most_s=20, worth=0),
        stage("late", least_s=50, most_s=100, worth=2),
        stage("small", least_s=5, most_s=15, worth=3),
    ]
    assert shares(stages, 200) == {"cheap": 20, "late": 100, "small": 15}
    assert shares(stages, 30) == {"cheap": 17.5, "small": 12.5}
    assert shares(stages, 4) == {}
    assert sum(shares(stages, 80).values()) == pytest.approx(80)


def test_a_stage_without_time_is_left_out_and_says_so(tmp_path: Path) -> None:
    found, _ = run([stage("long", part("long", "1"), least_s=100), stage("short", part("short", "1"))], tmp_path, 30)
    assert found["long"]["verdict"] == "left out: too little time (100 s at least)"
    assert found["short"]["verdict"] == "ok"


def test_half_a_line_costs_that_line_alone(tmp_path: Path) -> None:
    records, path = module("records"), tmp_path / "results.jsonl"
    records.append(path, "row", {"work": 1})
    with path.open("a") as file:
        file.write('{"kind": "row", "wor')
    records.append(path, "row", {"work": 2})
    found, broken = records.read(path)
    assert [record["work"] for record in found] == [1, 2]
    assert broken == 1


WORKER = """
import os, sys, time
from gpu_check.pool import answer_jobs
def answer(job):
    if job["do"] == "exit":
        os._exit(7)
    if job["do"] == "hang":
        time.sleep(600)
    if job["do"] == "stick":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return {"error": "", "process": os.getpid()}
print("a line that is no answer")
answer_jobs(answer)
"""


def test_a_pool_replaces_the_worker_that_a_job_broke() -> None:
    pool, found = module("pool"), {}
    jobs = [
        {"do": do, "place": place}
        for place, do in enumerate(["work", "work", "exit", "work", "stick", "work", "hang", "work"])
    ]
    pool.run_jobs(
        jobs,
        [sys.executable, "-c", WORKER],
        lambda job, answer: found.update({job["place"]: answer}),
        workers=1,
        job_s=5,
        deadline=time.monotonic() + 100,
        environment={"PYTHONPATH": str(ROOT / "scripts")},
    )
    assert found[2]["error"] == "the process ended with code 7"
    assert "illegal memory access" in found[4]["error"]
    assert found[6]["error"] == "not finished in 5 s"
    processes = [found[place]["process"] for place in (0, 1, 3, 5, 7)]
    assert processes[0] == processes[1]
    assert len(set(processes)) == 4


def test_jobs_without_time_are_answered_so() -> None:
    found: list[Any] = []
    command = [sys.executable, "-c", WORKER]
    options = {"workers": 2, "job_s": 5, "deadline": time.monotonic() - 1}
    module("pool").run_jobs([{"do": "work"}] * 3, command, lambda job, answer: found.append(answer), **options)
    assert found == [{"error": "no time was left"}] * 3


def test_summary_of_a_good_run_has_no_failures() -> None:
    summary = module("summary")
    lines = summary.summary(good_run(), 0, 300)
    assert not summary.failed(good_run(), 0)
    assert lines[0] == "no failures"
    assert any(line.startswith("MISSED") and "ms <= 2.4" in line for line in lines)
    assert any("bits equal under both ptxas: 1 of 1" in line for line in lines)
    assert any("default / this 1.20" in line for line in lines)
    assert any("left out for want of time: compiled, the rest of tune" in line for line in lines)


def test_summary_of_a_bad_run_names_each_failure_first() -> None:
    lines = module("summary").summary(bad_run(), 1, 300)
    assert lines[0] == "9 FAILURES"
    named = ("smoke, Triton's", "bits differ", "test test_model.py", "1 configurations", "no figures of steps")
    named += (
        "not timed, graphs",
        "part memcheck: exit code 9: Invalid",
        "part tune: not finished",
        "1 lines of the records",
    )
    for line, start in zip(lines[1:10], named, strict=True):
        assert line.startswith(start)


@pytest.mark.parametrize("count", [0, 30, 500])
def test_summary_fits_whatever_happens(count: int) -> None:
    summary = module("summary")
    test = {"kind": "test", "outcome": "failed", "seconds": 1, "reason": "x" * 400}
    run = [*bad_run(), *({**test, "name": f"test_a.py::test_{number}"} for number in range(count))]
    run += [{**record, "variant": f"v{number}"} for number in range(40) for record in run if record["kind"] == "tuned"]
    lines = summary.summary(run, 3, 300)
    assert len(lines) <= summary.LINES
    assert max(map(len, lines)) <= summary.WIDTH
    assert sum(len(line) + 1 for line in lines) < 12_000
    assert any("model, 32x384" in line for line in lines)
    assert any("NVIDIA H200" in line for line in lines)


def test_summary_of_nothing_says_so() -> None:
    lines = module("summary").summary([], 0, 2)
    assert "no record of the device" in lines


@pytest.mark.parametrize(("fastest", "chosen"), [(0.99, 0), (0.9, 1)])
def test_the_default_stays_where_nothing_is_clearly_faster(fastest: float, chosen: int) -> None:
    tune = module("tune")
    key = tune.keys(False)[0]
    configs = list(key.configs("sm_90"))[:2]
    timed = {
        "results": [{"provider": str(i), "ms": ms, "quartiles_ms": [ms, ms]} for i, ms in enumerate((1.0, fastest))]
    }
    record = tune.choose(key, configs, timed)
    assert record["config"] == configs[chosen]._asdict()
    assert record["default_us"] == 1000


@pytest.mark.parametrize(
    ("errors", "code", "reason"),
    [([], 1, "no configuration is known to be exact"), (["no time was left"], 0, "no time was left")],
)
def test_tuning_times_nothing_that_was_not_held(tmp_path: Path, errors: list[str], code: int, reason: str) -> None:
    options = argparse.Namespace(tiny=True, await_turn=False, records=tmp_path / "records.jsonl")
    for error in errors:
        module("records").append(options.records, "candidate", {**KEY, "config": [], "error": error})
    assert module("tune").time_all(options, torch.device("cpu")) == code
    [skipped] = module("records").of_kind(module("records").read(options.records)[0], "skipped")
    assert skipped["section"] == "tune"
    assert skipped["reason"].startswith(reason)
    assert module("summary").failed([skipped], 0) == bool(code)


def planned(tmp_path: Path, *only: str) -> dict[str, list[str]]:
    """The parts of each stage, by name."""
    options = argparse.Namespace(out=tmp_path, commit="", tiny=True, device="cpu", only=only)
    return {stage.name: [part.name for part in stage.parts] for stage in module("plan").stages(options)}


def test_a_plan_holds_configurations_before_it_times_them(tmp_path: Path) -> None:
    hold = "compile and hold to integers"
    assert planned(tmp_path, "tune", "record") == {"record": ["record"], "check": [hold], "tune": ["tune"]}
    assert planned(tmp_path, "record") == {"record": ["record"]}
    assert planned(tmp_path, "check") == {"check": ["smoke", "memcheck"]}
    everything = list(planned(tmp_path).items())
    assert [name for name, parts in everything if hold in parts] == ["check"]
    assert len(dict(everything)["check"]) == 3
    assert [name for name, _ in everything].index("check") < [name for name, _ in everything].index("tune")


def test_the_sanitizer_waits_for_any_process_that_uses_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = module("plan")
    monkeypatch.setattr(plan, "_sanitizer", lambda: "compute-sanitizer")
    options = argparse.Namespace(out=tmp_path, commit="", tiny=False, device="cuda", only=("check",))
    [part] = [part for part in plan.stages(options)[0].parts if part.name == "memcheck"]
    command = part.command
    # No line tells it that its turn has come.
    assert not part.awaits
    assert "--await-turn" not in command
    assert command[0] == "compute-sanitizer"
    for option, value in (("--target-processes", "all"), ("--launch-timeout", "0"), ("--error-exitcode", "9")):
        assert command[command.index(option) + 1] == value


def test_defaults_are_not_timed_against_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    section, configs = (
        importlib.import_module("gpu_bench.tuned"),
        importlib.import_module("dtbert.kernels.triton.configs"),
    )
    setting = module("tune").setting_for(torch.device("cpu"), True)
    assert list(section.tuned(setting)) == []
    # Another than the default, as a table would name it.
    other = configs.AttentionConfig(64, 64, 64, 4, 1)
    monkeypatch.setattr(section, "config_for", lambda *_: other)
    monkeypatch.setattr(section.Inputs, "attend", lambda self, index: torch.ones(1))
    monkeypatch.setattr(section.Inputs, "attend_and_score", lambda self, score, index: (None, torch.ones(1)))
    rows = list(section.tuned(setting))
    assert len(rows) == 2 * len(setting.works)
    assert {tuple(row["configs"]["tuned"]) for row in rows} == {tuple(other)}
    assert all(len(row["results"]) == 2 for row in rows)


BROKEN_DEVICE = """
import os, pytest
from pathlib import Path
from tests.gpu.plugin import BrokenDevice, Recorder
broken = []
def pytest_configure(config):
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(BrokenDevice(lambda: bool(broken)))
    else:
        config.pluginmanager.register(Recorder(Path("records.jsonl")))
"""
TESTS = """
import conftest, pytest
@pytest.mark.parametrize("place", range(6))
def test_device(place):
    if place == 1:
        conftest.broken.append(place)
    assert not conftest.broken, "CUDA error: an illegal memory access"
"""


def test_a_test_that_breaks_its_device_fails_alone(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    (tmp_path / "conftest.py").write_text(BROKEN_DEVICE)
    (tmp_path / "test_device.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-n", "1", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", "."]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=300)
    found, broken = module("records").read(tmp_path / "records.jsonl")
    outcomes = {name: record["outcome"] for name, record in module("summary").tests(found).items()}
    assert broken == 0
    assert len(outcomes) == 6
    assert [name for name, outcome in outcomes.items() if outcome == "failed"] == ["test_device.py::test_device[1]"]
    reasons = [record["reason"] for record in module("summary").tests(found).values() if record["outcome"] == "failed"]
    assert "illegal memory access" in reasons[0]
