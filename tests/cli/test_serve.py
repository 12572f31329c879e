"""`dtbert serve`: what its options mean, and what it refuses before it serves."""

import argparse
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from dtbert.cli.serve import seconds
from dtbert.serve import server
from tests.cli.conftest import Run


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[server.Serving]:
    """What would be served."""
    found: list[server.Serving] = []

    def serve(serving: server.Serving) -> int:
        found.append(serving)
        return 0

    monkeypatch.setattr(server, "serve", serve)
    return found


def test_it_serves_this_machine_alone_by_default(run: Run, served: list[server.Serving]) -> None:
    assert run("serve") == (0, "", "")
    (serving,) = served
    assert (serving.host, serving.port, serving.devices) == ("127.0.0.1", 8000, ("cpu",))
    assert (serving.settings.max_wait, serving.settings.cors_origins, serving.settings.api_keys) == (0.005, (), ())


def test_options_say_how_it_is_served(run: Run, served: list[server.Serving], tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("a-key-that-is-long-enough\n")
    options = "--workers 3 --device cuda:0,cuda:1 --max-wait 20ms --shed budget=0.7,0.5 --deadline 2s --dtype bfloat16"
    assert run("serve", *options.split(), "--api-key-file", keys, "--host", "0.0.0.0").status == 0
    (serving,) = served
    assert serving.devices == ("cuda:0", "cuda:1", "cuda:0")
    assert (serving.settings.max_wait, serving.settings.shed, serving.settings.deadline) == (0.02, (0.7, 0.5), 2.0)
    assert str(serving.load["dtype"]) == "torch.bfloat16"
    assert serving.settings.knows("a-key-that-is-long-enough")


def test_other_machines_without_a_key_are_warned_of(
    run: Run, served: list[server.Serving], caplog: pytest.LogCaptureFixture
) -> None:
    run("serve", "--host", "0.0.0.0")
    assert "lets other machines in, and there is no --api-key-file" in caplog.text


def test_cpu_threads_are_divided_among_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "processors", lambda: 8)
    serving: dict[str, Any] = {"load": {}, "name": "m"}
    assert [server.Serving(devices=("cpu",) * n, **serving).threads_each for n in (1, 3, 9)] == [8, 2, 1]
    assert server.Serving(devices=("cpu",) * 3, threads=5, **serving).threads_each == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--max-wait 5", "expected a time such as 5ms, 2s or 1min, got '5'"),
        ("--shed 0.5", "expected budget=0.5, or budget=0.7,0.5, got '0.5'"),
        ("--shed budget=0.5,0.7", "shed must fall from one budget to the next"),
        ("--port 70000", "expected a port from 0 to 65535, got '70000'"),
        ("--workers 1 --device cuda:0,cuda:1", "--workers 1 are fewer than the 2 devices"),
        ("--api-key-file nowhere.txt", "nowhere.txt: No such file"),
    ],
)
def test_what_makes_no_sense_is_refused(run: Run, options: str, message: str) -> None:
    status, out, err = run("serve", *options.split())
    assert (status, out) == (2, "")
    assert message in err


def test_a_port_that_is_taken_is_named(run: Run) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, _, err = run("serve", "--port", port)
    assert status == 2
    assert err == (
        f"dtbert: error: cannot listen on 127.0.0.1, port {port} (Address already in use): "
        "name another --host or --port\n"
    )


def test_a_missing_extra_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("dtbert.serve")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    status, _, err = run("serve")
    assert (status, err) == (
        2,
        "dtbert: error: the service needs uvicorn, which is not installed: pip install 'dtbert[serve]'\n",
    )


@pytest.mark.parametrize(("text", "value"), [("5ms", 0.005), ("0.5s", 0.5), ("2min", 120.0)])
def test_times_have_units(text: str, value: float) -> None:
    assert seconds(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "5", "ms", "-5ms", "5 s", "infs", "1h"])
def test_times_without_units_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected a time"):
        seconds(text)
