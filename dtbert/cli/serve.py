"""`dtbert serve`: answers over HTTP, and a page to try it."""

import argparse
import ipaddress
import logging
import re
from typing import Any

from dtbert.cli.options import add_model_options, add_window_options, positive
from dtbert.cli.output import printable

SUMMARY = "answer questions over HTTP, with a page to try it"
DESCRIPTION = """\
Serve the model over HTTP: a page to try it at /, the API at /docs, counts for
Prometheus at /metrics. Questions that come together go through the model
together. It listens on this machine alone unless --host says otherwise, and
ends in good order on SIGTERM or Ctrl-C: what it has taken it answers.

--device may name several, such as cuda:0,cuda:1: a process for each, or as many
as --workers says, which take turns at the devices. On a CPU each of them has
its part of the processors.

Under load, at most --max-queue windows wait; from then on requests are refused
with status 503 and the seconds after which to ask again. With --shed
budget=0.5 answers are given at that budget before, and say so, from half of the
queue on until a quarter is left; of several budgets each at its part.
"""
EXAMPLES = """\
examples:
  dtbert serve
  dtbert serve --port 8080 --dtype bfloat16 --workers 2 --threads 1
  dtbert serve --shed budget=0.7,0.5 --max-queue 128 --deadline 2s
  dtbert serve --host 0.0.0.0 --api-key-file keys.txt
"""

_UNITS = {"ms": 0.001, "s": 1.0, "min": 60.0}
logger = logging.getLogger("dtbert")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    place = parser.add_argument_group("where")
    place.add_argument("--host", default="127.0.0.1", metavar="H", help="address to listen on (127.0.0.1)")
    place.add_argument("--port", type=_port, default=8000, metavar="N", help="port; 0 is any that is free (8000)")
    place.add_argument("--workers", type=positive, metavar="N", help="processes (default: one for each device)")
    place.add_argument(
        "--api-key-file", metavar="FILE", help="keys, one a line, of which a request must name one as a bearer token"
    )
    place.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="URL",
        help="a page's origin that may ask, such as https://a.b",
    )
    place.add_argument("--access-log", action="store_true", help="a line for each request")
    load = parser.add_argument_group("load")
    load.add_argument(
        "--max-wait", type=seconds, default=0.005, metavar="T", help="time that a request waits for others (5ms)"
    )
    load.add_argument("--batch-tokens", type=positive, metavar="N", help="tokens that go through the model together")
    load.add_argument("--max-queue", type=positive, default=256, metavar="N", help="windows that may wait (256)")
    load.add_argument("--shed", type=_budgets, default=(), metavar="budget=X", help="what is used as the queue fills")
    load.add_argument("--deadline", type=seconds, default=30.0, metavar="T", help="time that a request may take (30s)")
    load.add_argument("--drain", type=seconds, default=30.0, metavar="T", help="time to end in good order (30s)")
    limits = parser.add_argument_group("limits of a request")
    limits.add_argument("--max-body", type=positive, default=2 << 20, metavar="BYTES", help="its size (2097152)")
    limits.add_argument(
        "--max-context", type=positive, default=200_000, metavar="N", help="characters of a text (200000)"
    )
    limits.add_argument("--max-documents", type=positive, default=100, metavar="N", help="documents or questions (100)")
    add_model_options(parser)
    windows = parser.add_argument_group("windows and answers")
    add_window_options(windows)


def run(arguments: argparse.Namespace) -> int:
    try:
        from dtbert.serve.server import Serving, serve
        from dtbert.serve.settings import Settings, read_api_keys
    except ModuleNotFoundError as error:
        raise ValueError(str(error)) from error
    from dtbert.cli.options import placement

    names = ("max_wait", "max_queue", "shed", "max_body", "max_context", "max_documents", "deadline")
    keys = () if arguments.api_key_file is None else read_api_keys(arguments.api_key_file)
    settings = Settings(
        **{name: getattr(arguments, name) for name in names}, api_keys=keys, cors_origins=tuple(arguments.cors_origin)
    )
    if not keys and not _is_loopback(arguments.host):
        logger.warning("--host %s lets other machines in, and there is no --api-key-file", arguments.host)
    placed = placement(arguments)
    devices = _devices(placed.pop("device"), arguments.workers)
    load: dict[str, Any] = {
        "source": arguments.model,
        **placed,
        "window": arguments.window,
        "stride": arguments.stride,
        "batch_tokens": arguments.batch_tokens,
    }
    return serve(
        Serving(
            load=load,
            devices=devices,
            name=printable(arguments.model or "the model inside dtbert"),
            settings=settings,
            host=arguments.host,
            port=arguments.port,
            threads=arguments.threads,
            drain=arguments.drain,
            access_log=arguments.access_log,
        )
    )


def seconds(text: str) -> float:
    """A time such as 5ms, 2s or 1min, in seconds, for argparse."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|min)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"expected a time such as 5ms, 2s or 1min, got {text!r}")
    return float(found[1]) * _UNITS[found[2]]


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, got {text!r}")
    return int(text)


def _budgets(text: str) -> tuple[float, ...]:
    name, _, values = text.partition("=")
    try:
        if name == "budget":
            return tuple(float(value) for value in values.split(","))
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected budget=0.5, or budget=0.7,0.5, got {text!r}")


def _devices(named: str | None, workers: int | None) -> tuple[str, ...]:
    """The device of each process."""
    devices = [device.strip() for device in (named or "cpu").split(",")]
    count = len(devices) if workers is None else workers
    if count < len(devices):
        raise ValueError(f"--workers {count} are fewer than the {len(devices)} devices: each needs a process")
    return tuple(devices[number % len(devices)] for number in range(count))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
