"""Real processes on a real socket: several share it, who goes is dropped, SIGTERM lets them finish."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import httpx
import pytest

from dtbert.serve.server import _bound, processors
from tests.cli.conftest import model_folder  # noqa: F401 - a fixture

BODY = {"question": "Who wrote it?", "context": "Ada wrote the letter in London."}
# So long each request waits for others: it is under way for certain while a test does something else.
WAIT = 2.0


@pytest.fixture
def served(model_folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:  # noqa: F811
    """`dtbert serve` in two processes, and its address."""
    options = f"serve --port 0 --workers 2 --threads 1 --max-wait {WAIT}s --model {model_folder}"
    process = subprocess.Popen(
        [sys.executable, "-m", "dtbert.cli", *options.split()],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    try:
        greetings = [process.stderr.readline() for _ in range(2)]
        found = [re.match(r"dtbert: serving (http://127\.0\.0\.1:\d+) \(process (\d) of 2", line) for line in greetings]
        assert all(found), greetings
        assert {one[2] for one in found if one} == {"1", "2"}
        yield process, str(found[0] and found[0][1])
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def until(url: str, name: str, value: float) -> None:
    """Wait until /metrics has this sample: of all processes, whichever answers."""
    end = time.monotonic() + 60
    with httpx.Client() as client:
        while f"{name} {value}" not in client.get(f"{url}/metrics").text.splitlines():
            assert time.monotonic() < end, f"{name} did not become {value}"
            time.sleep(0.02)


def test_processes_count_together_drop_who_goes_and_finish_at_sigterm(
    served: tuple[subprocess.Popen[str], str],
) -> None:
    process, url = served
    _go_before_the_answer(url)
    until(url, "dtbert_dropped_total", 1.0)
    answers: list[httpx.Response] = []
    asking = [Thread(target=lambda: answers.append(httpx.post(f"{url}/v1/answer", json=BODY))) for _ in range(4)]
    for thread in asking:
        thread.start()
    until(url, "dtbert_queue_windows", 4.0)
    process.send_signal(signal.SIGTERM)
    for thread in asking:
        thread.join()
    assert [answer.status_code for answer in answers] == [200] * 4
    assert process.wait(60) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)
    assert process.stderr is not None
    assert process.stderr.read() == ""


def test_a_packet_of_an_answer_waits_for_no_acknowledgement() -> None:
    async def accepted() -> int:
        waits = asyncio.get_running_loop().create_future()

        async def took(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            waits.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        with _bound("127.0.0.1", 0) as listening:
            async with await asyncio.start_server(took, sock=listening):
                _, client = await asyncio.open_connection(*listening.getsockname())
                client.close()
                return int(await waits)

    assert asyncio.run(accepted())


def _go_before_the_answer(url: str) -> None:
    body = json.dumps(BODY).encode()
    head = (
        f"POST /v1/answer HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
        connection.sendall(head.encode() + body)
        until(url, "dtbert_queue_windows", 1.0)


def test_processors_are_at_least_one_and_no_more_than_there_are() -> None:
    assert 1 <= processors() <= (os.cpu_count() or 1)
