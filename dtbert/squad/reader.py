"""Read data sets in SQuAD 1.1's JSON format: articles of paragraphs of questions."""

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from dtbert.files import Json, naming

# The first two bytes of every gzip file.
_GZIP_MAGIC = b"\x1f\x8b"


class MisplacedAnswerError(ValueError):
    """An answer that its context does not have at the place it names."""


class GoldAnswer(NamedTuple):
    """An accepted answer: its text, and the character of the context at which it starts."""

    text: str
    start: int


@dataclass(frozen=True, slots=True)
class SquadQuestion:
    """A question about a paragraph, and the answers that count as right.

    ``answers`` holds at least one; ``context[start : start + len(text)] == text`` for each. ``title`` is the
    article's, or empty where the file names none.
    """

    id: str
    title: str
    question: str
    context: str
    answers: tuple[GoldAnswer, ...]


def read_squad(path: str | PathLike[str], *, misplaced: list[str] | None = None) -> list[SquadQuestion]:
    """All questions of a SQuAD 1.1 file, in the file's order.

    Args:
        path: JSON, plain or compressed with gzip; which of the two is seen from the content.
        misplaced: where given, a question with an answer that the context does not have at its place is left out, and
            what is wrong with it added to this list; otherwise it is an error.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is damaged or not in SQuAD 1.1's format; the message names it and the place inside,
            such as ``data[3].paragraphs[0].qas[12].id``.
    """
    with naming(path):
        questions = list(_questions(_load(Path(path).read_bytes()), misplaced))
        if not questions and not misplaced:
            raise ValueError("holds no questions")
    return questions


def _load(raw: bytes) -> Json:
    if raw.startswith(_GZIP_MAGIC):
        try:
            raw = gzip.decompress(raw)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"damaged gzip file ({error}): fetch it again") from error
    if not raw.strip():
        raise ValueError("the file is empty")
    return Json.parse(raw)


def _questions(document: Json, misplaced: list[str] | None) -> Iterator[SquadQuestion]:
    places: dict[str, str] = {}
    for article in document.field("data").items():
        paragraphs = article.field("paragraphs").items()
        title = _text(article, "title") if "title" in article.value else ""
        for paragraph in paragraphs:
            context = _text(paragraph, "context")
            for entry in paragraph.field("qas").items():
                identifier = _text(entry, "id")
                if identifier in places:
                    raise ValueError(f"{entry.place}.id: {identifier!r} is the id of {places[identifier]} already")
                places[identifier] = entry.place
                question = _text(entry, "question")
                try:
                    answers = tuple(_answer(answer, context) for answer in _answers(entry.field("answers")))
                except MisplacedAnswerError as error:
                    if misplaced is None:
                        raise
                    misplaced.append(f"{identifier}: {error}")
                    continue
                yield SquadQuestion(identifier, title, question, context, answers)


def _answers(answers: Json) -> list[Json]:
    if not answers.items():
        raise answers.error("empty; SQuAD 1.1 has an answer to each question (2.0's others are not read)")
    return answers.items()


def _answer(answer: Json, context: str) -> GoldAnswer:
    text, start = _text(answer, "text"), answer.field("answer_start").of(int)
    if start < 0 or context[start : start + len(text)] != text:
        raise MisplacedAnswerError(f"{answer.place}: the context does not have {text!r} at answer_start {start}")
    return GoldAnswer(text, start)


def _text(parent: Json, name: str) -> str:
    field = parent.field(name)
    text = field.of(str)
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise field.error("holds a lone surrogate, which is no character")
    return text
