"""A job on a real Ray cluster of this machine goes on after its driver or a worker was killed."""

import multiprocessing
import os
import random
import signal
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from dtbert.files import Json
from dtbert.jobs.blocks import input_files, plan
from tests.cli.command import run_command
from tests.cli.questions import read, write_questions

ray = pytest.importorskip("ray", reason="needs the extra `ray`: pip install 'dtbert[ray]'")

BLOCK_TOKENS = 250


# A driver is forked by a server that may be older than the cluster, and so not know its token.
NO_TOKEN = {"RAY_AUTH_MODE": "disabled"}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster of two CPUs that outlives the drivers, as a real one does."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in NO_TOKEN.items():
            patch.setenv(name, value)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        started = ray.init(
            address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False
        )
        yield started.address_info["gcs_address"]
        ray.shutdown()


def test_job_survives_kills_of_workers_and_drivers_at_any_moment(
    address: str, model_folder: Path, tmp_path: Path, more_kills: int
) -> None:
    source, output, log = tmp_path / "in", tmp_path / "out", tmp_path / "log"
    source.mkdir()
    for number in range(3):
        write_questions(source / f"{number}.jsonl", 160)
    blocks = plan(input_files(str(source)), 4 * BLOCK_TOKENS)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.cli.command"])

    def start() -> ForkServerProcess:
        job = ["--engine", "ray", "--address", address, "--workers", "2", "--block-tokens", str(BLOCK_TOKENS)]
        arguments = ["answer", "--model", str(model_folder), "--input", str(source), "--output", str(output), *job]
        process = context.Process(target=_driver, args=([*arguments, "--quiet"], log))
        process.start()
        return process

    def done() -> list[Path]:
        return sorted((output / "_blocks").glob("part-*.json"), key=lambda path: path.stat().st_mtime_ns)

    kills = more_kills or 2
    choose = random.Random(0)
    moments = sorted(choose.randrange(1, len(blocks) * 3 // 4) for _ in range(kills))
    driver, before = start(), 0
    for kill, moment in enumerate(moments):
        # A worker of this driver is known by a block that it has done.
        while driver.exitcode is None and len(done()) < max(moment, before + 1):
            driver.join(0.005)
        assert driver.exitcode is None, log.read_text()
        if kill % 2 == 0:
            worker = Json.parse(done()[-1].read_bytes()).field("worker").of(str)
            # It may be one of the killed driver's, which has ended since.
            with suppress(ProcessLookupError):
                os.kill(int(worker.rpartition(":")[2]), signal.SIGKILL)
        else:
            assert driver.pid is not None
            os.kill(driver.pid, signal.SIGKILL)
            driver.join()
            assert driver.exitcode == -signal.SIGKILL
            driver = start()
        before = len(done())
    driver.join()
    assert driver.exitcode == 1, log.read_text()
    assert "Traceback" not in log.read_text()
    found = [line for path in sorted(output.glob("part-*")) for line in read(path)]
    expected = [(file.name, line) for file in input_files(str(source)) for line in numbers(Path(file.name))]
    assert [(line["file"], line["line"]) for line in found] == expected
    assert not list(output.rglob("*.partial"))


def _driver(arguments: list[str], log: Path) -> None:
    os.environ |= NO_TOKEN
    run_command(arguments, log)


def numbers(path: Path) -> list[int]:
    """The numbers of the lines that are not blank."""
    return [number for number, raw in enumerate(path.read_bytes().splitlines(), start=1) if raw.strip()]
