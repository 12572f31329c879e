"""Lines: questions and texts as they stand in files, and what is written of each."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dtbert.files import Json, text_sha256

if TYPE_CHECKING:
    from dtbert.qa import Answer, QuestionAnswerer
    from dtbert.qa.calls import Asking
    from dtbert.text.running import TextModel

# What the names of settings stand for, where an option does not have the same name.
SETTINGS = {"input_sha256": "input", "model_sha256": "the model's weights, config or tokenizer"}


class Columns(NamedTuple):
    """The texts that are read of a line, beside its id, by the names of their fields or columns.

    Attributes:
        what: what the lines are, in the plural.
        texts: that every line has.
        more: that it may have besides, after those.
        unit: what a progress bar counts.
    """

    what: str
    texts: tuple[str, ...]
    more: tuple[str, ...] = ()
    unit: str = "text"

    @property
    def read(self) -> tuple[str, ...]:
        """All columns that are read."""
        return ("id", *self.texts, *self.more)

    @property
    def names(self) -> str:
        """What a table's columns must be called, in words."""
        return f"column{'s' * (len(self.texts) > 1)} {' and '.join(self.texts)}"

    def of_table(self, path: str, there: Sequence[str]) -> list[str]:
        """Those of a table's columns that are read; ValueError, which names the file, where one is missing."""
        if not set(self.texts) <= set(there):
            raise ValueError(f"{path} has no {self.names}: it has {', '.join(there)}")
        return [name for name in self.read if name in there]


QUESTIONS = Columns("questions", ("question", "context"), unit="q")


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the input: ``number`` counts lines, objects or rows from 1; ``error`` says what is wrong.

    ``texts`` are in the order of its `Columns`.
    """

    number: int
    id: str | int | None = None
    texts: tuple[str, ...] = ()
    error: str | None = None


def parse_line(number: int, raw: bytes, columns: Columns = QUESTIONS) -> Line:
    """A line of JSON, or what is wrong with it; whether the model can read its texts is seen later."""
    try:
        return line_of(number, Json.parse(raw.rstrip()), columns)
    except ValueError as error:
        return Line(number, error=str(error))


def line_of(number: int, fields: Json, columns: Columns = QUESTIONS) -> Line:
    """The texts of an object and perhaps an id, or what is wrong with it."""
    identifier: str | int | None = None
    try:
        if not isinstance(fields.value, dict):
            raise ValueError(f"expected a JSON object with {' and '.join(map(json.dumps, columns.texts))}")
        if (found := fields.get("id")) is not None:
            found.of(str, int)
            identifier = found.value
        more = [one for one in map(fields.get, columns.more) if one is not None]
        texts = [*map(fields.field, columns.texts), *more]
        return Line(number, identifier, tuple(one.of(str) for one in texts))
    except ValueError as error:
        return Line(number, identifier, error=str(error))


def answered(
    answerer: "QuestionAnswerer", lines: Sequence[Line], top: int, asking: "Asking"
) -> Iterator[tuple[Line, dict[str, Any]]]:
    """Each line, and the JSON fields of its answer, or of its error."""
    pairs: Any = (line.texts for line in lines if line.error is None)
    answers = answerer.answer_many(pairs, top_k=top, errors="yield", **asking)
    return described(lines, answers, lambda found: answer_fields([found] if top == 1 else found, top))


def described(
    lines: Sequence[Line], results: Iterator[Any], fields_of: Callable[[Any], dict[str, Any]]
) -> Iterator[tuple[Line, dict[str, Any]]]:
    """Each line, and the JSON fields of its result, or of its error; ``results`` are of the lines without one."""
    for line in lines:
        found = next(results) if line.error is None else line.error
        failed = isinstance(found, str | TypeError | ValueError)
        yield line, {"error": str(found)} if failed else fields_of(found)


def answer_fields(
    answers: "Sequence[Answer]", top: int, documents: Sequence[str | None] | None = None
) -> dict[str, Any]:
    """The JSON fields of the best answer, and where ``top`` is above 1 a list of all as ``answers``."""
    fields: list[dict[str, Any]] = [
        {
            "answer": answer.text,
            "start": answer.start,
            "end": answer.end,
            # Six digits: what a float32 knows.
            "score": float(f"{answer.score:.6g}"),
            "margin": float(f"{answer.margin:.6g}"),
        }
        for answer in answers
    ]
    if documents is not None:
        fields = [{**one, "document": name} for one, name in zip(fields, documents, strict=True)]
    return {**fields[0], "answers": fields} if top > 1 else fields[0]


def dump(line: Line, fields: dict[str, Any]) -> bytes:
    """A line of the output."""
    fields = {"line": line.number, **({} if line.id is None else {"id": line.id}), **fields}
    try:
        return json.dumps(fields, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # an id with half a character, which only an escape can write
        return json.dumps(fields).encode() + b"\n"


def model_sha256(model: Path, loaded: "QuestionAnswerer | TextModel") -> str:
    """The SHA-256 of all of a model that makes answers: its weights, its config, its tokenizer."""
    from dtbert.weights import weights_sha256

    config, tokenizer = json.dumps(loaded.config.to_dict()), loaded.tokenizer.to_str()
    return text_sha256(f"{weights_sha256(model)}{config}{tokenizer}")
