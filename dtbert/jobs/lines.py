"""Lines: questions as they stand in files, and the answers to them as they are written."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtbert.files import Json, text_sha256

if TYPE_CHECKING:
    from dtbert.qa import Answer, QuestionAnswerer
    from dtbert.qa.calls import Asking

# What the names of settings stand for, where an option does not have the same name.
SETTINGS = {"input_sha256": "input", "model_sha256": "the model's weights, config or tokenizer"}

# What is read of a table.
COLUMNS = ("id", "question", "context")


@dataclass(frozen=True, slots=True)
class Line:
    """A question of the input: ``number`` counts lines, objects or rows from 1; ``error`` says what is wrong."""

    number: int
    id: str | int | None = None
    question: str = ""
    context: str = ""
    error: str | None = None


def parse_line(number: int, raw: bytes) -> Line:
    """A line of JSON, or what is wrong with it; whether the model can answer it is seen later."""
    try:
        return line_of(number, Json.parse(raw.rstrip()))
    except ValueError as error:
        return Line(number, error=str(error))


def line_of(number: int, fields: Json) -> Line:
    """A question with its context and perhaps an id, or what is wrong with it."""
    identifier: str | int | None = None
    try:
        if not isinstance(fields.value, dict):
            raise ValueError('expected a JSON object with "question" and "context"')
        if (found := fields.get("id")) is not None:
            found.of(str, int)
            identifier = found.value
        return Line(number, identifier, fields.field("question").of(str), fields.field("context").of(str))
    except ValueError as error:
        return Line(number, identifier, error=str(error))


def question_columns(path: str, there: Sequence[str]) -> list[str]:
    """Those of a table's columns that are read; ValueError, which names the file, where one is missing."""
    if not {"question", "context"} <= set(there):
        raise ValueError(f"{path} has no columns question and context: it has {', '.join(there)}")
    return [name for name in COLUMNS if name in there]


def answered(
    answerer: "QuestionAnswerer", lines: Sequence[Line], top: int, asking: "Asking"
) -> Iterator[tuple[Line, dict[str, Any]]]:
    """Each line, and the JSON fields of its answer, or of its error."""
    pairs = ((line.question, line.context) for line in lines if line.error is None)
    answers = answerer.answer_many(pairs, top_k=top, errors="yield", **asking)
    for line in lines:
        found: Any = next(answers) if line.error is None else line.error
        if isinstance(found, str | TypeError | ValueError):
            yield line, {"error": str(found)}
        else:
            yield line, answer_fields([found] if top == 1 else found, top)


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


def model_sha256(model: Path, answerer: "QuestionAnswerer") -> str:
    """The SHA-256 of all of a model that makes answers: its weights, its config, its tokenizer."""
    from dtbert.weights import weights_sha256

    config, tokenizer = json.dumps(answerer.config.to_dict()), answerer.tokenizer.to_str()
    return text_sha256(f"{weights_sha256(model)}{config}{tokenizer}")
