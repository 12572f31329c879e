"""What was measured of a model's weights and lies beside them: files of JSON, read when the model is loaded."""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from dtbert.files import Json
from dtbert.weights import model_folder, weights_sha256

logger = logging.getLogger(__name__)

# The SHA-256 of a model's file of weights, when it is first asked for: to read all of them takes its time.
Digest = Callable[[], str]


class _OfWeights(Protocol):
    @property
    def model_sha256(self) -> str: ...


M = TypeVar("M", bound=_OfWeights)


def read_beside(
    path: Path, name: str, read: Callable[[Path], M], warning: str, digest: Digest | None = None
) -> M | None:
    """The content of a file beside a model's weights; None where there is none.

    Args:
        path: of the model.
        name: of the file.
        read: its content; what it raises is raised.
        warning: for the log, after the file's name, where it was made of other weights.
        digest: of the weights, where somebody else asks for it too.
    """
    file = model_folder(path) / name
    if not file.is_file():
        return None
    found = read(file)
    if found.model_sha256 != (weights_sha256(path) if digest is None else digest()):
        logger.warning("%s %s", file, warning)
    return found


def parse(text: str | bytes, version: int) -> Json:
    """The document in a file of this format; ValueError where it is no JSON, or of another."""
    document = Json.parse(text)
    if document.of(dict).get("format") != version:
        raise ValueError(f"format is {document.value.get('format')!r}, this dtbert reads {version}")
    return document


def text_of(found: Any, version: int, fields: dict[str, Any], name: str, entries: Sequence[str]) -> str:
    """The text of a file: what was measured on which questions, other fields, and a list, an entry a line.

    Args:
        found: has the attributes of `head_of`.
        entries: as JSON.
    """
    head = {
        "format": version,
        "dtbert": found.dtbert_version,
        "model_sha256": found.model_sha256,
        "questions": {
            "file": found.questions_file,
            "count": found.num_questions,
            "ids_sha256": found.question_ids_sha256,
        },
        **fields,
    }
    lines = "".join(f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in head.items())
    body = "\n" + ",\n".join(f"  {entry}" for entry in entries) + "\n " if entries else ""
    return f"{{\n{lines} {json.dumps(name)}: [{body}]\n}}\n"


def head_of(document: Json, names: Sequence[str]) -> dict[str, Any]:
    """What the text of `text_of` begins with, by attribute; ValueError unless it has fields of these names, too."""
    document.exactly(("format", "dtbert", "model_sha256", "questions", *names))
    questions = document.field("questions").exactly(("file", "count", "ids_sha256"))
    return {
        "questions_file": questions.field("file").of(str),
        "num_questions": questions.field("count").of(int),
        "question_ids_sha256": questions.field("ids_sha256").of(str),
        "model_sha256": document.field("model_sha256").of(str),
        "dtbert_version": document.field("dtbert").of(str),
    }
