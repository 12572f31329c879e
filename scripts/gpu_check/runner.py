"""Starts the parts, stage after stage, each part a process with a limit of its own."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from gpu_check import records

# Of what a part printed last, kept for the summary.
_TAIL = 8
# Until a part that was asked to end is killed.
_GRACE_S = 3.0
# Before its limit a part is told that its time is up, so that it ends by itself.
_MARGIN_S = 3.0


@dataclass(frozen=True)
class Part:
    """A process that ends within the time of its stage.

    Attributes:
        awaits: it is started early, and touches the device once it has read ``go SECONDS`` from its input.
        passes: exit codes that are no failure.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    awaits: bool = True
    passes: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Stage:
    """Parts that run at the same time: alone where they time something.

    Attributes:
        least_s, most_s: under ``least_s`` it is not worth its start; more than ``most_s`` it does not get.
        worth: the lower, the sooner it gets time when there is not enough for all.
    """

    name: str
    parts: tuple[Part, ...]
    least_s: float
    most_s: float
    worth: int


def shares(stages: Sequence[Stage], seconds: float) -> dict[str, float]:
    """Seconds of each stage that runs: the least for those that fit, by worth, and the rest in proportion."""
    chosen, left = [], seconds
    for stage in sorted(stages, key=lambda stage: stage.worth):
        if stage.least_s <= left:
            chosen.append(stage)
            left -= stage.least_s
    room = sum(stage.most_s - stage.least_s for stage in chosen)
    factor = min(1.0, left / room) if room else 0.0
    return {stage.name: stage.least_s + factor * (stage.most_s - stage.least_s) for stage in chosen}


class Running:
    """A part that was started: its output goes to the log as it comes, line by line under its name."""

    def __init__(self, part: Part, log: TextIO) -> None:
        self.part, self._log = part, log
        self.tail: deque[str] = deque(maxlen=_TAIL)
        self.begin = time.monotonic()
        self._limit = float("inf")
        self.timed_out = False
        self.process = subprocess.Popen(
            part.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, **part.environment},
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._log.write(f"[{self.part.name}] {line.rstrip()}\n")
            self._log.flush()
            if line.strip():
                self.tail.append(line.rstrip())

    def go(self, seconds: float) -> None:
        self.begin, self._limit = time.monotonic(), seconds
        assert self.process.stdin is not None
        # One that ended already says so by its exit code.
        with contextlib.suppress(OSError):
            self.process.stdin.write(f"go {max(1.0, seconds - _MARGIN_S):.1f}\n")
            self.process.stdin.close()

    @property
    def ended(self) -> bool:
        """Whether it has ended, by itself or because its time is up."""
        if self.process.poll() is not None:
            return True
        if time.monotonic() - self.begin > self._limit:
            self.timed_out = True
            self.stop()
            return True
        return False

    def stop(self) -> None:
        """End it and all that it started; one that the kernel does not let go of is left behind."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_GRACE_S)
                if number == signal.SIGKILL:
                    break

    def record(self) -> dict[str, Any]:
        """What became of it, with the last lines that it printed."""
        # What it started may outlive it, and hold on to its output.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self._reader.join(_GRACE_S)
        code = self.process.poll()
        verdict = "ok" if code in self.part.passes else f"exit code {code}"
        if code is not None and code < 0:
            verdict = f"killed by {signal.Signals(-code).name}"
        if self.timed_out:
            verdict = f"not finished in {self._limit:.0f} s"
        seconds = round(time.monotonic() - self.begin, 1)
        tail = [] if verdict == "ok" else list(self.tail)
        return {"part": self.part.name, "verdict": verdict, "seconds": seconds, "tail": tail}


class Run:
    """All stages within ``seconds``; each record of a part goes to ``output`` as soon as the part has ended."""

    def __init__(
        self, stages: Sequence[Stage], seconds: float, output: Path, log: TextIO, say: Callable[[str], None] = print
    ) -> None:
        self._stages, self._output, self._log, self._say = list(stages), output, log, say
        self._deadline = time.monotonic() + seconds
        self._begun: dict[str, list[Running]] = {}

    def __call__(self) -> None:
        """Run them; the parts of a stage are started, to prepare, while the stage before runs."""
        try:
            while self._stages:
                chosen = shares(self._stages, self._deadline - time.monotonic())
                stage = self._stages.pop(0)
                # Only now: the stages before may have left more time than they were given.
                if stage.name not in chosen:
                    self._leave_out(stage)
                    continue
                running = self._start(stage, now=True)
                self._say(f"{stage.name}: {chosen[stage.name]:.0f} s at most")
                for part in running:
                    part.go(chosen[stage.name])
                following = next((later for later in self._stages if later.name in chosen), None)
                if following is not None:
                    self._start(following, now=False)
                self._await(running)
        finally:
            for part in (part for parts in self._begun.values() for part in parts):
                if part.process.poll() is None:
                    part.stop()

    def _leave_out(self, stage: Stage) -> None:
        for part in self._begun.pop(stage.name, []):
            part.stop()
        reason = f"left out: too little time ({stage.least_s:.0f} s at least)"
        records.append(self._output, "part", {"part": stage.name, "verdict": reason, "seconds": 0, "tail": []})

    def _start(self, stage: Stage, *, now: bool) -> list[Running]:
        if stage.name not in self._begun:
            self._begun[stage.name] = []
        begun = self._begun[stage.name]
        started = [running.part for running in begun]
        begun += [Running(part, self._log) for part in stage.parts if part not in started and (part.awaits or now)]
        return begun

    def _await(self, running: Sequence[Running]) -> None:
        waiting = list(running)
        while waiting:
            for part in [part for part in waiting if part.ended]:
                waiting.remove(part)
                record = part.record()
                records.append(self._output, "part", record)
                self._say(f"  {part.part.name}: {record['verdict']}, {record['seconds']} s")
            time.sleep(0.02)
