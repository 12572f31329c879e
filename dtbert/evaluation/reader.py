"""Read data sets in SQuAD 1.1's JSON format: articles of paragraphs of questions."""

import gzip
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from dtbert.files import GZIP_MAGIC, Json, naming

# A small file may unpack to more than any memory holds; SQuAD takes 30 million bytes.
_PIECE, _MOST_BYTES = 2**20, 2**31


class GoldAnswer(NamedTuple):
    """An accepted answer: its text, and the character of the context at which it starts.

    ``start`` is None where the file names no place, or one at which the context has another text: the official metric
    compares texts alone, and training leaves such an answer out.
    """

    text: str
    start: int | None


@dataclass(frozen=True, slots=True)
class SquadQuestion:
    """A question about a paragraph, and the answers that count as right.

    ``answers`` holds at least one; ``context[start : start + len(text)] == text`` for each whose start is known.
    ``title`` is the article's, or empty where the file names none.
    """

    id: str
    title: str
    question: str
    context: str
    answers: tuple[GoldAnswer, ...]


def read_squad(path: str | PathLike[str]) -> list[SquadQuestion]:
    """All questions of a SQuAD 1.1 file, in the file's order; one that stands there twice, the same in all, once.

    An ``id`` may be a whole number, and an ``answer_start`` may be missing, or count in units of UTF-16.

    Args:
        path: JSON, plain or compressed with gzip; which of the two is seen from the content.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is damaged or not in SQuAD 1.1's format; the message names it and the place inside,
            such as ``data[3].paragraphs[0].qas[12].id``.
    """
    with naming(path):
        questions = list(_questions(_load(Path(path).read_bytes())))
        if not questions:
            raise ValueError("holds no questions")
    return questions


def _load(raw: bytes) -> Json:
    if raw.startswith(GZIP_MAGIC):
        try:
            raw = _unpacked(raw)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"damaged gzip file ({error}): fetch it again") from error
    if not raw.strip():
        raise ValueError("the file is empty")
    return Json.parse(raw)


def _unpacked(raw: bytes) -> bytes:
    pieces: list[bytes] = []
    with gzip.GzipFile(fileobj=io.BytesIO(raw)) as packed:
        while piece := packed.read(_PIECE):
            pieces.append(piece)
            if len(pieces) * _PIECE > _MOST_BYTES:
                raise ValueError(f"unpacks to more than {_MOST_BYTES:,} bytes: split it")
    return b"".join(pieces)


def _questions(document: Json) -> Iterator[SquadQuestion]:
    seen: dict[str, tuple[SquadQuestion, str]] = {}
    for article in document.field("data").items():
        paragraphs = article.field("paragraphs").items()
        title = _text(article, "title") if "title" in article.value else ""
        for paragraph in paragraphs:
            context = _text(paragraph, "context")
            for entry in paragraph.field("qas").items():
                number = entry.field("id").of(str, int)
                identifier = _text(entry, "id") if isinstance(number, str) else str(number)
                answers = tuple(_answer(answer, context) for answer in _answers(entry.field("answers")))
                question = SquadQuestion(identifier, title, _text(entry, "question"), context, answers)
                known, place = seen.setdefault(identifier, (question, entry.place))
                if known is question:
                    yield question
                elif known != question:
                    raise ValueError(f"{entry.place}.id: {identifier!r} is the id of {place} already, another question")


def _answers(answers: Json) -> list[Json]:
    if not answers.items():
        raise answers.error("empty; SQuAD 1.1 has an answer to each question (2.0's others are not read)")
    return answers.items()


def _answer(answer: Json, context: str) -> GoldAnswer:
    text, named = _text(answer, "text"), answer.get("answer_start")
    start = None if named is None else named.of(int)
    if start is None or start < 0:
        return GoldAnswer(text, None)
    if not context.startswith(text, start):
        # Other languages count a character beyond U+FFFF as two.
        start = len(context.encode("utf-16-le")[: 2 * start].decode("utf-16-le", "ignore"))
    return GoldAnswer(text, start if context.startswith(text, start) else None)


def _text(parent: Json, name: str) -> str:
    field = parent.field(name)
    text = field.of(str)
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise field.error("holds a lone surrogate, which is no character")
    return text
