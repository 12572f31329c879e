"""The command line: `dtbert answer`, `classify`, `embed`, `evaluate`, `trace`, `convert`, `export`, `profile`, `train`,
`search`, `serve` and `build`.

Exit status: 0 all went well, 1 some questions of many failed, 2 wrong usage or bad input, 130 interrupted,
141 whoever read the output has gone.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn

from dtbert import __version__
from dtbert.cli import answer, build, classify, convert, embed, evaluate, export, profile, search, serve, trace, train
from dtbert.cli.output import printable
from dtbert.files import first_line, reason_of

_DESCRIPTION = """\
Question answering with a BERT that drops tokens between layers, to fit any
compute budget.
"""
_EXAMPLE = """\
example:
  dtbert answer --question "Who wrote it?" --context "Ada Lovelace wrote it."

`dtbert COMMAND --help` tells more.
"""

# By name, in the order of the help.
COMMANDS = {
    module.__name__.rpartition(".")[2]: module
    for module in (answer, classify, embed, evaluate, trace, convert, export, profile, train, search, serve, build)
}


class _Parser(argparse.ArgumentParser):
    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            # The command's own help has its options.
            parsed.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        return parsed

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"dtbert: error: {message} (see `{self.prog} --help`)\n")


class PlainFormatter(logging.Formatter):
    """Names in files and texts of servers must not steer the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; it loads nothing heavy."""
    form = argparse.RawDescriptionHelpFormatter
    parser = _Parser("dtbert", description=_DESCRIPTION, epilog=_EXAMPLE, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"dtbert {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        one = commands.add_parser(
            name,
            help=command.SUMMARY,
            description=command.DESCRIPTION,
            epilog=command.EXAMPLES,
            formatter_class=form,
            allow_abbrev=False,
        )
        command.add_arguments(one)
        one.set_defaults(run=command.run, parser=one)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, of ``sys.argv`` by default; errors go to stderr without a traceback. Returns the exit status."""
    # Where it is closed, what is said on stderr would go to stdout, among answers.
    sys.stdin = sys.stdin or Path(os.devnull).open()  # noqa: SIM115 - as long as the process
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character shows its escape; it is no reason to stop.
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler()
    handler.setFormatter(PlainFormatter("dtbert: %(message)s"))
    logging.basicConfig(handlers=[handler])
    try:
        status = _run(argv)
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _forget_output()
        return 141
    except (ValueError, TypeError, OSError) as error:
        return _fail(_message(error))
    except (MemoryError, RuntimeError) as error:
        # torch has no type of its own for a CPU's memory.
        reason = first_line(error)
        if not isinstance(error, MemoryError) and "memory" not in reason:
            raise
        return _fail(f"out of memory{f' ({reason})' if reason else ''}: give a smaller batch, file or model")
    return status


def _fail(message: str) -> int:
    _forget_output()
    print(printable(f"dtbert: error: {message}"), file=sys.stderr)
    return 2


def _run(argv: Sequence[str] | None) -> int:
    try:
        arguments = build_parser().parse_args(argv)
    except SystemExit as stop:  # after --help and --version, or wrong usage; the caller still flushes
        return int(stop.code or 0)
    return int(arguments.run(arguments))


def _forget_output() -> None:
    # What is still buffered would fail again when the interpreter closes stdout, and say so.
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _message(error: Exception) -> str:
    if isinstance(error, IsADirectoryError) and error.filename is not None:
        return f"{error.filename} is a folder: name a file in it"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {reason_of(error)}" if error.filename is not None else reason_of(error)
    return str(error) or type(error).__name__
