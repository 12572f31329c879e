"""`dtbert train` in processes of its own: killed at any moment, and two together."""

import json
import multiprocessing
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import TCPStore

from tests.training.command import Kill, run_train
from tests.training.conftest import write_model, write_questions

TINY = ["--window", "40", "--stride", "8", "--batch-tokens", "64", "--threads", "1"]


@pytest.fixture
def arguments(tmp_path: Path, model_folder: Path) -> list[str]:
    train = write_questions(tmp_path / "train.json", 12)
    dev = write_questions(tmp_path / "dev.json", 2, seed=1, name="dev")
    return ["--model", str(model_folder), "--train", str(train), "--dev", str(dev), *TINY]


def start(arguments: list[str], log: Path, kill: Kill | None = None, **environment: str) -> Any:
    # Each process is a copy of one that has imported what it needs.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.command"])
    process = context.Process(target=run_train, args=(arguments, log, kill, environment))
    process.start()
    return process


def status(process: Any) -> int:
    process.join()
    return int(process.exitcode)


def train(arguments: list[str], log: Path, kill: Kill | None = None) -> int:
    return status(start(arguments, log, kill))


def train_together(
    count: int, arguments: list[str], log: Path, disturb: Callable[[list[Any]], None] = lambda processes: None
) -> list[int]:
    # As torchrun's: it listens before they start, so that nobody else can take its port.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    shared |= {"WORLD_SIZE": str(count), "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        start(arguments, log.with_name(f"{log.name}.{rank}"), RANK=str(rank), LOCAL_RANK=str(rank), **shared)
        for rank in range(count)
    ]
    disturb(processes)
    return [status(process) for process in processes]


def state(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


def test_training_survives_kills_at_any_moment(arguments: list[str], tmp_path: Path, more_kills: int) -> None:
    options = ["--epochs", "2", "--save-every", "2", "--eval-every", "3", "--length-drop", "--layer-dropout", "0.3"]
    arguments = [*arguments, *options, "--num-sandwich", "1", "--learning-rate", "1e-3"]
    log = tmp_path / "log"
    assert train([*arguments, "--out", str(tmp_path / "whole")], log) == 0, log.read_text()
    broken = [*arguments, "--out", str(tmp_path / "broken")]
    for kill in (Kill("line", 1), Kill("before checkpoint", 1), Kill("after checkpoint", 1), Kill("line", 1)):
        assert train(broken, log, kill) == -signal.SIGKILL
    choose = random.Random(0)
    for _ in range(more_kills):
        # The run may have come to its end before the last of them.
        train(
            broken, log, Kill(choose.choice(("line", "before checkpoint", "after checkpoint")), choose.randrange(1, 3))
        )
    assert train(broken, log) == 0, log.read_text()
    whole, mended = state(tmp_path / "whole"), state(tmp_path / "broken")
    assert [name for name in whole if not torch.equal(whole[name], mended[name])] == []
    for name in ("last", "best"):
        files = [tmp_path / run / name / "model.safetensors" for run in ("whole", "broken")]
        assert files[0].read_bytes() == files[1].read_bytes()
    records = [[{**one, "seconds": 0} for one in metrics(tmp_path / run)] for run in ("whole", "broken")]
    assert records[0] == records[1]
    assert not list((tmp_path / "broken").rglob("*.partial"))
    log.unlink()
    assert train(broken, log) == 0
    assert "nothing to do" in log.read_text()


@pytest.mark.parametrize("kind", ["length drop", "teacher"])
def test_two_processes_train_as_one(arguments: list[str], tmp_path: Path, kind: str) -> None:
    arguments = [*arguments, "--hidden-dropout", "0", "--attention-dropout", "0", "--learning-rate", "1e-3"]
    # Layers that a sub-model leaves out, and a projection that the full pass alone has, get their gradients too.
    arguments += ["--length-drop", "--num-sandwich", "1", "--layer-dropout", "0.6", "--epochs", "2"]
    if kind == "teacher":
        teacher = write_model(tmp_path / "teacher", seed=5, hidden_size=48, num_hidden_layers=4)
        arguments += ["--teacher", str(teacher), "--distill", "intermediate"]
    else:
        # Steps of one window leave the second process without one.
        arguments += ["--batch-tokens", "40"]
    assert train([*arguments, "--out", str(tmp_path / "one")], tmp_path / "log") == 0, (tmp_path / "log").read_text()
    statuses = train_together(2, [*arguments, "--out", str(tmp_path / "two")], tmp_path / "log")
    assert statuses == [0, 0], (tmp_path / "log.0").read_text() + (tmp_path / "log.1").read_text()
    one, two = state(tmp_path / "one"), state(tmp_path / "two")
    for name, value in one.items():
        got = two[name].clone()
        # A softmax does not change with the bias of its keys, nor with the span head's: such a gradient is rounding
        # alone, which Adam magnifies.
        if name.endswith("qkv.bias"):
            got[32:64] = value[32:64]
        if name.endswith("span.bias"):
            continue
        torch.testing.assert_close(got, value, rtol=1e-3, atol=2e-5)
    for got, wanted in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert got["tokens"] == wanted["tokens"]
        assert got["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
    # The first process alone speaks.
    assert (tmp_path / "log.1").read_text() == ""
    assert "trained" in (tmp_path / "log.0").read_text()


def test_first_process_says_that_another_one_was_killed(arguments: list[str], tmp_path: Path) -> None:
    log, out = tmp_path / "log", tmp_path / "run"

    def kill_second(processes: list[Any]) -> None:
        while not (out / "metrics.jsonl").exists() and processes[0].exitcode is None:
            processes[0].join(0.01)
        processes[1].kill()

    endless = [*arguments, "--epochs", "1000", "--save-every", "100000", "--eval-every", "100000", "--out", str(out)]
    assert train_together(2, endless, log, kill_second) == [2, -signal.SIGKILL]
    said = (tmp_path / "log.0").read_text()
    assert said.startswith("dtbert: error: another process has ended (")
    assert said.endswith("the same command goes on\n")


def test_error_of_all_processes_is_said_once_and_one_of_the_first_ends_the_others(
    arguments: list[str], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    assert train_together(2, [*arguments, "--train", "absent.json", "--out", str(tmp_path / "run")], log) == [2, 2]
    assert (tmp_path / "log.0").read_text() == "dtbert: error: absent.json: No such file or directory\n"
    assert (tmp_path / "log.1").read_text() == ""
    # The folder cannot be written: the first process alone finds out.
    (tmp_path / "file").write_text("")
    assert train_together(2, [*arguments, "--out", str(tmp_path / "file")], tmp_path / "log2") == [2, 2]
    assert "file is a file: name a new or empty folder" in (tmp_path / "log2.0").read_text()
    assert (tmp_path / "log2.1").read_text() == ""
