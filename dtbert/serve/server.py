"""The processes of a service: one answers alone, or several share a socket, each with a model on its own device."""

import logging
import math
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import uvicorn
from prometheus_client.multiprocess import mark_process_dead

from dtbert.qa import QuestionAnswerer
from dtbert.serve.app import create_app
from dtbert.serve.metrics import SHARED_FOLDER
from dtbert.serve.service import Service
from dtbert.serve.settings import Settings

# A process that ends sooner than this after its start will hardly do better when it is started again.
_LEAST_LIFE = 10.0
# Whoever drains gets this many seconds more than the requests have, to end in good order.
_GRACE = 5.0


@dataclass(frozen=True)
class Serving:
    """What is served, where, and by whom.

    Attributes:
        load: arguments of `QuestionAnswerer.load`, but the device.
        devices: of the processes, one each.
        name: of the model, for people.
        settings: limits, and what is done under load.
        host, port: port 0 is any that is free.
        threads: of a CPU, for each process; by default the processors that there are, divided among them.
        drain: seconds that requests have to be answered once the service is to end.
        access_log: whether each request is logged.
    """

    load: Mapping[str, Any]
    devices: tuple[str, ...]
    name: str
    settings: Settings = field(default_factory=Settings)
    host: str = "127.0.0.1"
    port: int = 8000
    threads: int | None = None
    drain: float = 30.0
    access_log: bool = False

    @property
    def threads_each(self) -> int:
        return self.threads or max(1, processors() // len(self.devices))


def serve(serving: Serving) -> int:
    """Serve until a signal ends it: SIGTERM or SIGINT let it answer what it has taken. Returns the exit status.

    Raises:
        OSError: the address is taken, or not this machine's; a file of the model is missing.
        ValueError, TypeError: as `QuestionAnswerer.load` and `Service`.
    """
    listening = _bound(serving.host, serving.port)
    with listening:
        if len(serving.devices) == 1:
            _work(serving, 0, listening)
            return 0
        return _supervise(serving, listening)


def processors() -> int:
    """Processors that this process may use: of a container, what its limit comes to, rounded up."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text("ascii").split()
        count = min(count, math.ceil(int(quota) / int(period)))
    return max(1, count)


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named, for asyncio turns Nagle's algorithm off of TCP alone, and with it the 40 ms by which a client's delayed
    # acknowledgement would hold back an answer's second packet.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except (OSError, OverflowError) as error:
        listening.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise OSError(f"cannot listen on {host}, port {port} ({reason}): name another --host or --port") from error
    listening.set_inheritable(True)
    return listening


class _Server(uvicorn.Server):
    """Says that it is there once it is."""

    def __init__(self, config: uvicorn.Config, greeting: str) -> None:
        super().__init__(config)
        self._greeting = greeting

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self._greeting, file=sys.stderr, flush=True)


def _work(serving: Serving, number: int, listening: socket.socket) -> None:
    """Load the model and answer until a signal comes: what each process does."""
    threads, device = serving.threads_each, serving.devices[number]
    torch.set_num_threads(threads)
    os.environ.setdefault("RAYON_NUM_THREADS", str(threads))  # the tokenizer's
    qa = QuestionAnswerer.load(device=device, **serving.load)
    qa("Who?", "I.")  # what is compiled or laid out at first use
    service = Service(qa, serving.settings, serving.name)
    config = uvicorn.Config(
        create_app(service),
        lifespan="on",
        log_config=None,
        log_level="warning",
        access_log=serving.access_log,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(serving.drain),
    )
    if serving.access_log:
        logging.getLogger("uvicorn.access").setLevel(logging.INFO)
    host, port = listening.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    several = f"process {number + 1} of {len(serving.devices)}, " if len(serving.devices) > 1 else ""
    server = _Server(config, f"dtbert: serving {url} ({several}{device}, {threads} CPU threads); /docs says how to ask")
    # uvicorn raises the signal that ended it once more when all is done: it should be no end by a signal then.
    signal.signal(signal.SIGTERM, lambda *_: setattr(server, "should_exit", True))
    server.run([listening])


def _process(serving: Serving, number: int, listening: socket.socket) -> None:
    """What a process of several begins with."""
    logging.basicConfig(format="dtbert: %(message)s")
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end_with_parent, daemon=True).start()
    with suppress(KeyboardInterrupt):  # a terminal sends it to all processes alike
        try:
            _work(serving, number, listening)
        except (ValueError, TypeError, OSError) as error:
            sys.exit(f"dtbert: process {number + 1}: {error}")


class _Stop:
    """Whether a signal has asked for the end."""

    def __init__(self) -> None:
        self.asked: int | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, _: object) -> None:
        self.asked = number


def _supervise(serving: Serving, listening: socket.socket) -> int:
    """Start a process for each device, start anew what ends, and end them all when a signal comes."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="dtbert-metrics-") as folder:
        # Read by each process when it first imports Prometheus' client.
        os.environ[SHARED_FOLDER] = folder
        stop = _Stop()

        def start(number: int) -> Any:
            process = context.Process(target=_process, args=(serving, number, listening), name=f"dtbert-{number + 1}")
            process.start()
            return process, time.monotonic()

        running = [start(number) for number in range(len(serving.devices))]
        failed = False
        while stop.asked is None and not failed:
            # Signals are seen between two waits.
            wait([process.sentinel for process, _ in running], timeout=0.5)
            for number, (process, began) in enumerate(running):
                if process.is_alive() or stop.asked is not None:
                    continue
                mark_process_dead(process.pid, folder)  # type: ignore[no-untyped-call]
                failed = time.monotonic() - began < _LEAST_LIFE
                if failed:
                    break
                print(f"dtbert: process {number + 1} ended with {process.exitcode}: starting it anew", file=sys.stderr)
                running[number] = start(number)
        _end([process for process, _ in running], serving.drain + _GRACE)
    if failed:
        print("dtbert: error: a process ended right after its start; see above", file=sys.stderr)
        return 2
    return 130 if stop.asked == signal.SIGINT else 0


def _end(processes: list[Any], seconds: float) -> None:
    """Ask processes to end, and end those that do not."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
