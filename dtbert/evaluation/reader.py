"""Read data sets in SQuAD's JSON format, 1.1's or 2.0's: articles of paragraphs of questions."""

import gzip
import io
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import NamedTuple, Protocol

from dtbert.files import GZIP_MAGIC, Json, naming, text_sha256

# A small file may unpack to more than any memory holds; SQuAD takes 30 million bytes.
_PIECE, _MOST_BYTES = 2**20, 2**31


class GoldAnswer(NamedTuple):
    """An accepted answer: its text, and the character of the context at which it starts.

    ``start`` is None where the file names no place at which the context has the text, and it has it nowhere, or more
    than once: the official metric compares texts alone, and training leaves such an answer out.
    """

    text: str
    start: int | None


@dataclass(frozen=True, slots=True)
class SquadQuestion:
    """A question about a paragraph, and the answers that count as right.

    ``answers`` is empty where the context has none; ``context[start : start + len(text)] == text`` for each whose start
    is known. ``title`` is the article's, or empty where the file names none.
    """

    id: str
    title: str
    question: str
    context: str
    answers: tuple[GoldAnswer, ...]

    @property
    def is_impossible(self) -> bool:
        """Whether the right answer is that the context has none, as SQuAD 2.0 calls it."""
        return not self.answers


def read_squad(path: str | PathLike[str]) -> list[SquadQuestion]:
    """All questions of a SQuAD file, in the file's order, each once.

    An ``id`` may be a whole number, a ``title`` null. An ``answer_start`` may be missing, or count in units of UTF-16
    or in bytes; where it is wrong and the context has the answer's text only once, that is its place. A question has no
    answer where its list of answers is empty, as the official script counts, or missing beside ``is_impossible``. Of
    one that stands there twice, with other answers, all answers count.

    Args:
        path: JSON, plain or compressed with gzip; which of the two is seen from the content.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is damaged or not in SQuAD's format; the message names it and the place inside,
            such as ``data[3].paragraphs[0].qas[12].id``.
    """
    with naming(path):
        questions = _questions(Json.parse(unpacked(Path(path).read_bytes())))
        if not questions:
            raise ValueError("holds no questions")
    return questions


def unpacked(raw: bytes) -> bytes:
    """What a file holds, unpacked if it is compressed with gzip; ValueError where it is damaged, too large or empty."""
    if raw.startswith(GZIP_MAGIC):
        try:
            raw = _gunzip(raw)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"damaged gzip file ({error}): fetch it again") from error
    if not raw.strip():
        raise ValueError("the file is empty")
    return raw


def _gunzip(raw: bytes) -> bytes:
    pieces: list[bytes] = []
    with gzip.GzipFile(fileobj=io.BytesIO(raw)) as packed:
        while piece := packed.read(_PIECE):
            pieces.append(piece)
            if len(pieces) * _PIECE > _MOST_BYTES:
                raise ValueError(f"unpacks to more than {_MOST_BYTES:,} bytes: split it")
    return b"".join(pieces)


def _questions(document: Json) -> list[SquadQuestion]:
    found: dict[str, tuple[SquadQuestion, str]] = {}
    for article in document.field("data").items():
        paragraphs = article.field("paragraphs").items()
        title = article.value.get("title")
        for paragraph in paragraphs:
            context = _text(paragraph, "context")
            for entry in paragraph.field("qas").items():
                number = entry.field("id").of(str, int)
                identifier = _text(entry, "id") if isinstance(number, str) else str(number)
                answers = tuple(_answer(answer, context) for answer in _answers(entry))
                named = title if isinstance(title, str) else ""
                question = SquadQuestion(identifier, named, _text(entry, "question"), context, answers)
                known, place = found.get(identifier, (question, entry.place))
                if (known.question, known.context) != (question.question, context):
                    raise ValueError(f"{entry.place}.id: {identifier!r} is the id of {place} already, another question")
                more = tuple(answer for answer in answers if answer not in known.answers)
                found[identifier] = replace(known, answers=known.answers + more), place
    return [question for question, _ in found.values()]


def _answers(entry: Json) -> list[Json]:
    if entry.get("answers") is None and entry.value.get("is_impossible") is True:
        return []
    return entry.field("answers").items()


def _answer(answer: Json, context: str) -> GoldAnswer:
    text, start = _text(answer, "text"), answer.value.get("answer_start")
    if type(start) is int and start >= 0:
        # Other languages count in units of UTF-16, of which a character beyond U+FFFF takes two, or in bytes.
        for known in (start, _characters(context, start, 2, "utf-16-le"), _characters(context, start, 1, "utf-8")):
            if context.startswith(text, known):
                return GoldAnswer(text, known)
    once = text != "" and context.find(text) == context.rfind(text) >= 0
    return GoldAnswer(text, context.find(text) if once else None)


def _characters(context: str, units: int, size: int, encoding: str) -> int:
    """How many characters the first units of a text are, of so many bytes each."""
    if context.isascii():
        return units
    return len(context.encode(encoding)[: size * units].decode(encoding, "ignore"))


def _text(parent: Json, name: str) -> str:
    field = parent.field(name)
    text = field.of(str)
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise field.error("holds a lone surrogate, which is no character")
    return text


class _Identified(Protocol):
    @property
    def id(self) -> str: ...


def ids_sha256(questions: Iterable[_Identified]) -> str:
    """The SHA-256 of the sorted ids, one a line: what files name the questions by that they were made on."""
    return text_sha256("\n".join(sorted(question.id for question in questions)))
