"""Lines in and lines out: from file to file by `batch`, with - for --input or --output as they come, for pipes.

Of what comes from a pipe or goes into one each line is written when its part is done, in order. Nothing goes on where
it stopped, so nothing is kept beside.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from dtbert.cli import batch
from dtbert.cli.batch import CHARACTERS_PER_TOKEN, Load, Work, remaining, results
from dtbert.cli.inputs import Source
from dtbert.cli.output import check_output, printable
from dtbert.jobs.lines import Columns, Line, dump, parse_line

STREAM = "-"

# Writes a line and its fields.
Write = Callable[[Line, dict[str, Any]], object]


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
    lines = _stdin_lines(columns) if arguments.input == STREAM else Source.of(Path(arguments.input), columns).lines()
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


def _stdin_lines(columns: Columns) -> Iterator[Line]:
    """The lines on stdin as they come; ValueError where they are no JSON objects, one a line."""
    first = True
    for number, raw in enumerate(sys.stdin.buffer, start=1):
        if not raw.strip():
            continue
        if first and not raw.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
            raise ValueError("--input -: stdin must be JSON objects, one a line; give other kinds as a file")
        first = False
        yield parse_line(number, raw, columns)
