"""The worker of a job: holds the model, reads a block, answers it, writes its part."""

import os
import socket
from dataclasses import dataclass
from functools import cached_property
from time import perf_counter
from typing import TYPE_CHECKING, Any

from dtbert.jobs.blocks import Block, read_block
from dtbert.jobs.folder import OutputFolder, Record
from dtbert.jobs.lines import Line, answered, dump, model_sha256

if TYPE_CHECKING:
    from dtbert.qa import QuestionAnswerer
    from dtbert.qa.calls import Asking, Reading


@dataclass(frozen=True)
class Answering:
    """How each worker answers.

    Attributes:
        model, revision: as `QuestionAnswerer.load` takes them, on every machine.
        model_sha256: of what the first machine has under this name: a worker that finds another model stops.
        device: of the worker.
        dtype: its name, or None.
        threads: of a worker on the CPU.
        reading, asking: windows and answers.
        top: answers to each question.
    """

    model: str | None
    revision: str | None
    model_sha256: str
    device: str | None
    dtype: str | None
    threads: int
    reading: "Reading"
    asking: "Asking"
    top: int

    def load(self) -> "QuestionAnswerer":
        """The answerer.

        Raises:
            ValueError, TypeError, OSError: as `QuestionAnswerer.load`; or this machine has another model.
        """
        # Read when a text is first tokenized: as many threads as Ray has set aside.
        os.environ["RAYON_NUM_THREADS"] = str(self.threads)
        import torch

        from dtbert.qa import QuestionAnswerer
        from dtbert.weights import resolve_source

        torch.set_num_threads(self.threads)
        path = resolve_source(self.model, self.revision)
        dtype = None if self.dtype is None else getattr(torch, self.dtype)
        answerer = QuestionAnswerer.load(path, device=self.device, dtype=dtype, with_schedules=False, **self.reading)
        if model_sha256(path, answerer) != self.model_sha256:
            raise ValueError(
                f"{path} on {socket.gethostname()} is another model than where the job was started: give a hub id with "
                "its --revision, or a folder that all machines share"
            )
        return answerer


@dataclass
class Worker:
    """Answers blocks, one at a time; the model is loaded for the first."""

    answering: Answering
    output: OutputFolder

    @cached_property
    def answerer(self) -> "QuestionAnswerer":
        """What answers."""
        return self.answering.load()

    def answer(self, block: Block) -> Record:
        """Write the part of a block and its record.

        Raises:
            ValueError, TypeError, OSError: as `read_block`, `Answering.load` and `Place.write`.
        """
        answerer = self.answerer
        began = perf_counter()
        lines = read_block(block)
        read = perf_counter()
        found = [
            (line, {"file": block.file, **fields})
            for line, fields in answered(answerer, lines, self.answering.top, self.answering.asking)
        ]
        answered_at = perf_counter()
        parquet = self.output.format == "parquet"
        content = (
            _parquet(found, self.answering.top > 1)
            if parquet
            else b"".join(dump(line, fields) for line, fields in found)
        )
        self.output.part(block.number).write(content)
        texts = [text for line in lines for text in line.texts]
        record = Record(
            block=block.number,
            rows=len(lines),
            failed=sum("error" in fields for _, fields in found),
            characters=sum(map(len, texts)),
            bytes_read=block.size if block.kind == "lines" else sum(len(text.encode()) for text in texts),
            bytes_written=len(content),
            read_seconds=read - began,
            answer_seconds=answered_at - read,
            write_seconds=perf_counter() - answered_at,
            worker=f"{socket.gethostname()}:{os.getpid()}",
        )
        self.output.write_record(record)
        return record

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """The same for Ray Data: a block's fields in; what is wrong with the job out, or None."""
        try:
            self.answer(Block(**row))
        except (ValueError, TypeError, OSError) as error:
            # Raised, it would arrive as text, with the whole of Ray's traceback.
            return {"error": str(error) or type(error).__name__}
        return {"error": None}


def _parquet(found: list[tuple[Line, dict[str, Any]]], several: bool) -> bytes:
    """A part in Parquet: the fields of the lines as columns, an id as text."""
    import pyarrow
    from pyarrow import parquet

    text = pyarrow.string()
    answer = [
        ("answer", text),
        ("start", pyarrow.int64()),
        ("end", pyarrow.int64()),
        ("score", pyarrow.float64()),
        ("margin", pyarrow.float64()),
    ]
    columns = [("line", pyarrow.int64()), ("id", text), ("file", text), *answer, ("error", text)]
    if several:
        columns.append(("answers", pyarrow.list_(pyarrow.struct(answer))))
    rows = [
        {"line": line.number, "id": None if line.id is None else _whole(str(line.id)), **fields}
        for line, fields in found
    ]
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(rows, pyarrow.schema(columns)), sink)
    return sink.getvalue().to_pybytes()


def _whole(text: str) -> str:
    # Half a character, which JSON can escape and UTF-8 cannot hold, becomes its escape.
    return text.encode("utf-8", "backslashreplace").decode()
