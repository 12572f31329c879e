"""What pytest does besides on a GPU: it records each outcome at once, and leaves a process whose device is broken."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

# Of a worker that ends itself; pytest-xdist starts another.
LEFT = 70


class Recorder:
    """Adds each test's outcome to JSON Lines, so that a run that is cut short leaves what it had."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A test that passes is one whose call passes; set-up and tear-down tell of themselves when they do not.
        if report.when != "call" and not report.failed and not report.skipped:
            return
        crash = getattr(report.longrepr, "reprcrash", None)
        text = str(report.longrepr) if crash is None else str(crash.message)
        reason = next((line for line in text.splitlines() if line.strip()), "") if report.failed else ""
        record = {"kind": "test", "name": report.nodeid.removeprefix("tests/gpu/"), "outcome": report.outcome}
        line = json.dumps({**record, "seconds": round(report.duration, 2), "reason": reason[:300]})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"\n{line}\n")


class BrokenDevice:
    """Ends a worker of pytest-xdist after a failed test that broke its device: the next one gets a new worker."""

    def __init__(self, broken: Callable[[], bool]) -> None:
        self._broken, self._failed = broken, False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._failed = self._failed or report.failed

    def pytest_runtest_logfinish(self) -> None:
        if self._failed and self._broken():
            os._exit(LEFT)
        self._failed = False


def device_is_broken() -> bool:
    """Whether an earlier error of the device stays, as an illegal address does."""
    import torch  # here: the process that gives workers their tests needs none

    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
