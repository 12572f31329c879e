"""Jobs over processes that keep their device from one job to the next, and are replaced when a job breaks them."""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Job = dict[str, Any]
Answer = dict[str, Any]

# What a worker prints before an answer: whatever else it prints is no answer.
_MARK = "answer "
NO_TIME = "no time was left"
# A device error that stays: every later call of the process fails too.
_STICKY = ("CUDA error", "CUDA driver error", "[CUDA]", "device-side assert", "illegal memory access")


def run_jobs(
    jobs: Sequence[Job],
    command: Sequence[str],
    done: Callable[[Job, Answer], None],
    *,
    workers: int,
    job_s: float,
    deadline: float,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Have ``workers`` processes answer the jobs; ``done`` gets each job with its answer, as they come.

    A process that dies or takes longer than ``job_s`` costs its job alone, whose answer then says ``error``. Jobs for
    which no time is left until ``deadline`` (`time.monotonic`) are answered so too.
    """
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    lock = threading.Lock()

    def work() -> None:
        worker = _Worker(command, environment)
        try:
            while True:
                try:
                    job = waiting.get_nowait()
                except queue.Empty:
                    return
                seconds = min(job_s, deadline - time.monotonic())
                answer = worker.ask(job, seconds) if seconds > 0 else {"error": NO_TIME}
                with lock:
                    done(job, answer)
        finally:
            worker.stop()

    threads = [threading.Thread(target=work) for _ in range(min(workers, len(jobs)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class _Worker:
    """A process that answers a line with a line; started when it is first asked, and again after it broke."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None) -> None:
        self._command, self._environment = command, {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def ask(self, job: Job, seconds: float) -> Answer:
        process = self._process or self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            self.stop()
            return {"error": f"not finished in {seconds:.0f} s"}
        except OSError:
            line = None
        if line is None:
            code = process.wait()
            self.stop()
            return {"error": f"the process ended with code {code}"}
        answer: Answer = json.loads(line)
        if any(text in str(answer.get("error", "")) for text in _STICKY):
            self.stop()
        return answer

    def _start(self) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self._environment
        )
        # Anew, so that no answer of the process before can be taken for one of this.
        self._process, self._lines = process, queue.SimpleQueue()
        threading.Thread(target=_forward, args=(process, self._lines), daemon=True).start()
        return process

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(2)
            self._process = None


def _forward(process: "subprocess.Popen[str]", lines: "queue.SimpleQueue[str | None]") -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(_MARK):
            lines.put(line.removeprefix(_MARK))
        else:
            print(line, end="", flush=True)
    lines.put(None)


def answer_jobs(answer: Callable[[Job], Answer]) -> None:
    """The loop of a worker: jobs from its input, answers to its output; an error is an answer."""
    for line in sys.stdin:
        try:
            found = answer(json.loads(line))
        except Exception as error:
            text = " ".join(str(error).split())
            found = {"error": f"{type(error).__name__}: {text}"[:300]}
        print(_MARK + json.dumps(found), flush=True)
