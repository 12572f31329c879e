"""What the parts share as programs: their arguments, and their turn.

A part prepares early, beside the parts before it, and touches the device when it is told to.
"""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path


def add_part_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--records", type=Path, required=True, help="JSON Lines to add to")
    parser.add_argument("--device", default="cuda", help="where to run (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a trial with --device cpu")
    parser.add_argument("--await-turn", action="store_true", help="prepare, and begin at the line `go SECONDS`")
    parser.add_argument("--worker", action="store_true", help="answer jobs, a line each")


def worker_command(module: str, options: argparse.Namespace, *more: str) -> Sequence[str]:
    """How a part starts one of its own workers."""
    command = [sys.executable, "-m", module, *more, "--records", str(options.records), "--device", options.device]
    return [*command, "--worker", *(["--tiny"] if options.tiny else [])]


def wait_for_turn(awaited: bool) -> float:
    """The moment (`time.monotonic`) by which the part must end; when ``awaited``, once a line says ``go SECONDS``.

    Raises:
        SystemExit: nobody will say so any more.
    """
    if not awaited:
        return math.inf
    words = sys.stdin.readline().split()
    if len(words) != 2 or words[0] != "go":
        raise SystemExit("the run ended before this part's turn")
    return time.monotonic() + float(words[1])
