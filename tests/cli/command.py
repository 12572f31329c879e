"""A command for a process of its own: see `test_batch_survives_kills_at_any_moment`."""

import os
import signal
import sys
from pathlib import Path

import dtbert.qa  # noqa: F401 - loaded once, by the process that the others are copies of
from dtbert.cli import main


def run_command(arguments: list[str], log: Path) -> None:
    """Run `dtbert` with stderr appended to a file, and exit with its status."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT), sys.stderr.fileno())
    # A shell's background jobs, continuous integration's too, inherit Ctrl-C as ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(arguments))
