"""Lines of --input to lines of --output, streamed, and continued after an interruption.

The output itself says how far it has come: one line for each line of the input, in order. What it cannot say, the
input and the options that made it, stands in a file beside it, written before the first line.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from dtbert import __version__
from dtbert.cli.inputs import Source
from dtbert.cli.output import check_output, printable
from dtbert.files import Json, differing, lock, write_whole
from dtbert.jobs.lines import SETTINGS, Columns, Line, dump, model_sha256

if TYPE_CHECKING:
    from dtbert.qa import QuestionAnswerer
    from dtbert.text.running import TextModel

# Lines go through the model a chunk at a time, about what one batch holds: an interruption costs no more. Where chunks
# end is counted from the start of the file, so that a continued run makes the same batches as an unbroken one, and with
# them the same digits.
CHARACTERS_PER_TOKEN = 4  # as English has them
_SPECIAL_TOKENS = 3  # around each line


class Work(NamedTuple):
    """What a command does with lines.

    Attributes:
        model: by which it does.
        fields_of: of some lines, each with the JSON fields that are written of it, or with those of an error.
        settings: what these depend on beside the line and the model.
    """

    model: "QuestionAnswerer | TextModel"
    fields_of: Callable[[Sequence[Line]], Iterator[tuple[Line, dict[str, Any]]]]
    settings: dict[str, Any]


# The work of a command, of its options.
Load = Callable[[argparse.Namespace], Work]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an output has come: its whole lines, how many of them hold an error, and the bytes they take."""

    lines: int
    failed: int
    size: int


# Where the names of streams are, of which some are regular files at times.
_STREAMS = ("/dev", "/dev/fd", "/proc/self/fd")


class Files:
    """The input and the output of a run, which must stay the same files until it ends."""

    def __init__(self, source: Path, output: Path) -> None:
        self.source, self.output = source, output
        self._source = _state(source)
        self._written = (0, 0)

    def writes(self, sink: BinaryIO) -> None:
        """Tell it the open output."""
        found = os.fstat(sink.fileno())
        self._written = (found.st_dev, found.st_ino)

    def check(self) -> None:
        """Raise ValueError if one of them was changed or removed meanwhile."""
        if _state(self.source) != self._source:
            raise ValueError(
                f"{self.source} was changed while it was read, and {self.output} was made of what it was: delete "
                "that, and start again"
            )
        found = _state(self.output)
        if found is None or found[:2] != self._written:
            raise ValueError(f"{self.output} was removed or replaced while it was written: give the command again")


def _state(path: Path) -> tuple[int, int, int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def run(arguments: argparse.Namespace, columns: Columns, load: Load) -> int:
    """Write a line for each line of ``--input``; the exit status."""
    from tqdm import tqdm

    from dtbert.weights import resolve_source

    path, output = Path(arguments.input), Path(arguments.output)
    _check_paths(path, output, arguments.model)
    files = Files(path, output)
    source = Source.of(path, columns)
    # Once: a branch of the hub may move between two questions for it.
    model = resolve_source(arguments.model, arguments.revision)
    work = load(argparse.Namespace(**{**vars(arguments), "model": model, "revision": None}))
    digest, total = source.survey()
    of_model = model_settings(arguments, model_sha256(model, work.model))
    settings = {"input_sha256": digest, **of_model, **work.settings}
    _check_settings(output, settings)
    with output.open("ab") as sink:
        if not lock(sink):
            raise ValueError(f"another process is writing {output}: wait for it, or name another --output")
        files.writes(sink)
        done = progress(source, output)
        if not done.lines:
            write_whole(_settings_path(output), json.dumps(settings) + "\n")
        sink.truncate(done.size)
        failed = done.failed
        left = remaining(source.lines(), done.lines, CHARACTERS_PER_TOKEN * work.model.batch_tokens)
        if done.lines and not arguments.quiet:
            left = _saying_again(left, done.lines, total)
        with tqdm(total=total, initial=done.lines, unit=columns.unit, disable=arguments.quiet or None) as bar:
            for line, fields in results(work, left):
                files.check()
                sink.write(dump(line, fields))
                sink.flush()
                if "error" in fields:
                    failed += 1
                    # Locked here: where Ctrl-C keeps it from taking its lock, tqdm releases it nevertheless, and fails.
                    with bar.get_lock():
                        message = f"dtbert: {path}, line {line.number}: {fields['error']}"
                        bar.write(printable(message), file=sys.stderr, nolock=True)
                bar.update()
        files.check()
    if failed:
        print(f'dtbert: {failed} of {total} lines failed: see "error" in {output}', file=sys.stderr)
    return 1 if failed else 0


def model_settings(arguments: argparse.Namespace, model_digest: str) -> dict[str, Any]:
    """What any output depends on beside the lines: it is gone on with where that and the work's is the same."""
    return {
        "dtbert": __version__,
        "model": arguments.model,
        "revision": arguments.revision,
        "model_sha256": model_digest,
        "dtype": arguments.dtype,
    }


def chunks(lines: Iterator[Line | None], most: int) -> Iterator[list[Line]]:
    """The lines in lists of at most so many characters, or of one line, cut at the same places in each run.

    None among the lines ends a list, too.
    """
    chunk: list[Line] = []
    characters = 0
    for line in lines:
        size = 0 if line is None else sum(map(len, line.texts)) + CHARACTERS_PER_TOKEN * _SPECIAL_TOKENS
        if chunk and (line is None or characters + size > most):
            yield chunk
            chunk, characters = [], 0
        if line is not None:
            chunk.append(line)
            characters += size
    if chunk:
        yield chunk


def remaining(lines: Iterator[Line | None], done: int, most: int) -> Iterator[tuple[list[Line], int]]:
    """The chunks that hold lines after the first ``done`` ones, and how many before these each holds."""
    for chunk in chunks(lines, most):
        if done < len(chunk):
            yield chunk, done
        done = max(0, done - len(chunk))


def _saying_again(left: Iterator[tuple[list[Line], int]], done: int, total: int) -> Iterator[tuple[list[Line], int]]:
    """The same chunks; says what is there, and what of it goes through the model again, if there is more to do."""
    first = next(left, None)
    if first is None:
        return iter(())
    again = f"{first[1]} of them once more, in one batch with the next" if first[1] else "none of them once more"
    print(f"dtbert: going on after {done:,} of {total:,} lines, {again}", file=sys.stderr)
    return chain([first], left)


def results(work: Work, left: Iterator[tuple[list[Line], int]]) -> Iterator[tuple[Line, dict[str, Any]]]:
    """Each line that is `remaining`, and the JSON fields of it, or of its error."""
    for chunk, done in left:
        for index, (line, fields) in enumerate(work.fields_of(chunk)):
            if index >= done:
                yield line, fields


def progress(source: Source, output: Path) -> Progress:
    """How far the output has come; a last line without its end is not counted.

    Raises:
        ValueError: a line is not what this input gives.
    """
    lines = failed = size = 0
    expected = source.lines()
    with output.open("rb") as written:
        for raw in written:
            if not raw.endswith(b"\n"):
                break
            line = next(expected, None)
            try:
                fields = Json.parse(raw).of(dict)
            except ValueError:
                fields = {}
            if line is None or (fields.get("line"), fields.get("id")) != (line.number, line.id):
                raise ValueError(f"{output}: line {lines + 1} does not belong to this input{_afresh(output)}")
            lines, failed, size = lines + 1, failed + ("error" in fields), size + len(raw)
    return Progress(lines, failed, size)


def check_source(source: Path) -> None:
    """Raise ValueError where questions cannot be read from a path more than once, which a pipe forgets."""
    if not source.is_file():
        reason = "it is read more than once; - is stdin" if source.exists() else "there is none"
        reason = "this is a folder, name a file in it" if source.is_dir() else reason
        raise ValueError(f"--input {source} must be a file: {reason}")


def _check_paths(source: Path, output: Path, model: str | None) -> None:
    check_source(source)
    check_output("--output", output, source, model=model)
    record = _settings_path(output)
    for path in (output, record):
        if str(path.absolute().parent) in _STREAMS or (path.exists() and not path.is_file()):
            raise ValueError(f"--output {output}: {path} is no regular file: what was written is read again")
    check_output(f"--output {output} needs a file for its settings:", record, source, model=model)
    if record.is_symlink() or (record.exists() and not _is_record(record)):
        raise FileExistsError(
            f"--output {output} would replace {record}, which is there already and is no run's: name another --output"
        )


def _is_record(path: Path) -> bool:
    """Whether a file holds the settings of a run; one that is damaged does, too, as far as it can be seen."""
    content = path.read_bytes()
    try:
        return "input_sha256" in Json.parse(content).of(dict)
    except ValueError:
        return content.strip() in (b"", b"{") or b'"input_sha256"' in content


def _settings_path(output: Path) -> Path:
    return output.with_name(output.name + ".settings.json")


def _check_settings(output: Path, settings: dict[str, Any]) -> None:
    """Raise ValueError if the output holds lines that were made from another input, or with other options."""
    if not output.exists() or output.stat().st_size == 0:
        return
    record = _settings_path(output)
    try:
        before = Json.parse(record.read_bytes()).of(dict)
        changed = differing(before, settings)
    except FileNotFoundError:
        raise ValueError(
            f"{output} is there already, without the {record.name} that such a run leaves{_afresh(output)}"
        ) from None
    except ValueError as error:
        raise ValueError(f"{record} is damaged ({error}){_afresh(output)}") from error
    if changed:
        names = ", ".join(SETTINGS.get(name, name) for name in changed)
        raise ValueError(f"{output} was made from other settings ({names}){_afresh(output)}")


def _afresh(output: Path) -> str:
    return f": name another --output, or delete {output} to start afresh"
