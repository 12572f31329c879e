"""`dtbert train` in a process of its own, which may kill itself: see `test_processes.py`."""

import faulthandler
import gc
import os
import signal
import sys
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

# An optimizer imports it, which takes seconds: once here, for all processes.
import torch._dynamo
from torch.nn.parallel import DistributedDataParallel

from dtbert.cli import main
from dtbert.training.checkpoint import RunFolder


class Kill(NamedTuple):
    """Where a process ends by SIGKILL: at its n-th line of metrics, or around its n-th checkpoint."""

    where: Literal["line", "before checkpoint", "after checkpoint"]
    count: int


def run_train(arguments: list[str], log: Path, kill: Kill | None, environment: dict[str, str]) -> None:
    """Run `dtbert train` with stderr and stdout in a file, and exit with its status.

    One that hangs writes where, and ends with status 1.
    """
    torch.set_num_threads(1)
    os.environ.update(environment)
    sink = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(sink, stream.fileno())
    faulthandler.dump_traceback_later(240, exit=True, file=sink)
    _check_order_of_ends()
    if kill is not None:
        _arm(kill)
    sys.exit(main(["train", *arguments]))


def _check_order_of_ends() -> None:
    # A DistributedDataParallel that outlives its process group may deadlock in its destructor, but seldom does.
    destroy = torch.distributed.destroy_process_group

    def check_and_destroy() -> None:
        assert not [one for one in gc.get_objects() if type(one) is DistributedDataParallel]
        destroy()

    torch.distributed.destroy_process_group = check_and_destroy


def _arm(kill: Kill) -> None:
    counts = {"line": 0, "checkpoint": 0}
    log, write, replace = RunFolder.log, torch.save, Path.replace

    def reached(what: str) -> bool:
        return kill.where.endswith(what) and counts[what] == kill.count

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def log_and_die(self: RunFolder, record: dict[str, Any]) -> None:
        log(self, record)
        counts["line"] += 1
        if reached("line"):
            with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write('{"step": ')
            die()

    def save_and_die(state: object, file: Path) -> None:
        write(state, file)
        counts["checkpoint"] += 1
        if reached("checkpoint") and kill.where.startswith("before"):
            os.truncate(file, 100)
            die()

    def replace_and_die(self: Path, target: Path) -> Path:
        found = replace(self, target)
        if target.name == "checkpoint.pt" and reached("checkpoint"):
            die()
        return found

    RunFolder.log = log_and_die  # type: ignore[method-assign]
    torch.save = save_and_die
    Path.replace = replace_and_die  # type: ignore[method-assign, assignment]
