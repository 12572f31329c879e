"""`dtbert answer` with - for --input or --output: questions in and answers out as they come, for pipes.

Each answer is written when its part is done, in order. Nothing goes on where it stopped, so nothing is kept beside.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from dtbert.cli.batch import CHARACTERS_PER_TOKEN, asking, check_source, remaining, results
from dtbert.cli.inputs import Questions
from dtbert.cli.options import load_for_answers
from dtbert.cli.output import check_output, printable
from dtbert.jobs.lines import Line, dump, parse_line

STREAM = "-"


def run(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    name = "stdin" if arguments.input == STREAM else arguments.input
    failed = total = 0
    with _sink(arguments) as sink:
        lines = _stdin_lines() if arguments.input == STREAM else _file_lines(Path(arguments.input))
        answerer, schedule = load_for_answers(arguments)
        # A bar and answers in one terminal would overwrite one another.
        hide = arguments.quiet or (arguments.output == STREAM and sys.stdout.isatty()) or None
        with tqdm(unit="q", disable=hide) as bar:
            left = remaining(lines, 0, CHARACTERS_PER_TOKEN * answerer.batch_tokens)
            for line, fields in results(answerer, left, arguments.top, asking(arguments, schedule)):
                sink.write(dump(line, fields))
                sink.flush()
                total += 1
                if "error" in fields:
                    failed += 1
                    bar.write(printable(f"dtbert: {name}, line {line.number}: {fields['error']}"), file=sys.stderr)
                bar.update()
    if failed:
        print(f"dtbert: {failed} of {total} lines failed", file=sys.stderr)
    return 1 if failed else 0


@contextmanager
def _sink(arguments: argparse.Namespace) -> Iterator[BinaryIO]:
    if arguments.output == STREAM:
        if sys.stdout is None:
            raise ValueError("--output -: there is no stdout")
        yield sys.stdout.buffer
        return
    output = Path(arguments.output)
    check_output("--output", output, model=arguments.model)
    if output.is_file() and output.stat().st_size:
        raise FileExistsError(
            f"--output {output} is there already, and answers to stdin cannot go on in it: remove it, or name another"
        )
    with output.open("wb") as file:
        yield file


def _file_lines(source: Path) -> Iterator[Line]:
    check_source(source)
    return Questions.of(source).lines()


def _stdin_lines() -> Iterator[Line]:
    """The questions on stdin as they come; ValueError where they are no JSON objects, one a line."""
    first = True
    for number, raw in enumerate(sys.stdin.buffer, start=1):
        if not raw.strip():
            continue
        if first and not raw.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
            raise ValueError("--input -: stdin must be JSON objects, one a line; give other kinds as a file")
        first = False
        yield parse_line(number, raw)
