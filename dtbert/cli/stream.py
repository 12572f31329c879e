"""Lines in and lines out: from file to file by `batch`, with - for --input or --output as they come, for pipes.

Of what comes from a pipe or goes into one each line is written when its part is done, in order. A part of stdin is what
has come: whoever waits for an answer before asking on gets it. Nothing goes on where it stopped, so nothing is kept
beside.
"""

import argparse
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from io import BufferedReader
from pathlib import Path
from typing import Any, cast

from dtbert.cli import batch
from dtbert.cli.batch import CHARACTERS_PER_TOKEN, Load, Work, check_source, remaining, results
from dtbert.cli.inputs import Source
from dtbert.cli.options import QUIET_HELP
from dtbert.cli.output import check_output, printable
from dtbert.jobs.lines import Columns, Line, dump, parse_line

STREAM = "-"
_READ = 1 << 16  # bytes, what a pipe holds
# Seconds that a line waits for more of a fast writer: little beside a pass through the model, which they then share.
_PATIENCE = 0.005

# Writes a line and its fields.
Write = Callable[[Line, dict[str, Any]], object]


def add_arguments(parser: argparse.ArgumentParser, columns: Columns, written: str) -> None:
    """The options of `run`, by which ``written`` is made of such lines."""
    many = parser.add_argument_group(f"many {columns.what}")
    many.add_argument("--input", metavar="FILE|-", help=f"{columns.what}, as above")
    many.add_argument("--output", metavar="FILE|-", help=written)
    many.add_argument("--quiet", action="store_true", help=QUIET_HELP)


def run(arguments: argparse.Namespace, columns: Columns, load: Load) -> int:
    """Write a line for each line of ``--input``; the exit status."""
    streams = STREAM in (arguments.input, arguments.output)
    return pipe(arguments, columns, load) if streams else batch.run(arguments, columns, load)


@contextmanager
def json_lines(output: str, work: Work) -> Iterator[Write]:
    """What writes lines of JSON to a file, or to stdout, each at once."""
    with nullcontext(sys.stdout.buffer) if output == STREAM else Path(output).open("wb") as sink:

        def write(line: Line, fields: dict[str, Any]) -> None:
            sink.write(dump(line, fields))
            sink.flush()

        yield write


def pipe(
    arguments: argparse.Namespace,
    columns: Columns,
    load: Load,
    writing: Callable[[str, Work], AbstractContextManager[Write]] = json_lines,
) -> int:
    """Write each line as it comes, by ``writing``; the exit status."""
    from tqdm import tqdm

    name = "stdin" if arguments.input == STREAM else arguments.input
    failed = total = 0
    _check_sink(arguments)
    lines = _stdin_lines(columns) if arguments.input == STREAM else _file_lines(Path(arguments.input), columns)
    work = load(arguments)
    # A bar and answers in one terminal would overwrite one another.
    hide = arguments.quiet or (arguments.output == STREAM and sys.stdout.isatty()) or None
    with writing(arguments.output, work) as write, tqdm(unit=columns.unit, disable=hide) as bar:
        for line, fields in results(work, remaining(lines, 0, CHARACTERS_PER_TOKEN * work.model.batch_tokens)):
            write(line, fields)
            total += 1
            if "error" in fields:
                failed += 1
                bar.write(printable(f"dtbert: {name}, line {line.number}: {fields['error']}"), file=sys.stderr)
            bar.update()
    if failed:
        print(f"dtbert: {failed} of {total} lines failed", file=sys.stderr)
    return 1 if failed else 0


def _check_sink(arguments: argparse.Namespace) -> None:
    """Raise ValueError or OSError for an output that cannot be written, or that holds something."""
    if arguments.output == STREAM:
        if sys.stdout is None:
            raise ValueError("--output -: there is no stdout")
        return
    output = Path(arguments.output)
    check_output("--output", output, arguments.input, model=arguments.model)
    if output.is_file() and output.stat().st_size:
        raise FileExistsError(
            f"--output {output} is there already, and a run that keeps nothing beside it cannot go on: remove it, or "
            "name another"
        )


def _file_lines(source: Path, columns: Columns) -> Iterator[Line]:
    check_source(source)
    return Source.of(source, columns).lines()


def _stdin_lines(columns: Columns) -> Iterator[Line | None]:
    """The lines on stdin, None before it waits for more; ValueError where they are no JSON objects, one a line."""
    first, number = True, 0
    for raw in _as_they_come(cast(BufferedReader, sys.stdin.buffer)):
        if raw is None:
            yield None
            continue
        number += 1
        if not raw.strip():
            continue
        if first and not raw.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
            raise ValueError("--input -: stdin must be JSON objects, one a line; give other kinds as a file")
        first = False
        yield parse_line(number, raw, columns)


def _as_they_come(file: BufferedReader) -> Iterator[bytes | None]:
    """A stream's lines, and None where the next may be long in coming."""
    begun = bytearray()
    while found := file.read1(_READ):
        *ends, rest = found.split(b"\n")
        for end in ends:
            yield bytes(begun + end)
            begun.clear()
        begun += rest
        if not _has_more(file):
            yield None
    if begun:
        yield bytes(begun)


def _has_more(file: BufferedReader) -> bool:
    try:
        return bool(select.select([file], [], [], _PATIENCE)[0])
    except (OSError, ValueError):  # nothing that can be waited for: of Windows sockets alone
        return False
