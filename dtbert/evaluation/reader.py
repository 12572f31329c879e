"""Read data sets in SQuAD 1.1's JSON format: articles of paragraphs of questions."""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

# The first two bytes of every gzip file.
_GZIP_MAGIC = b"\x1f\x8b"
_JSON_NAMES = {dict: "an object", list: "a list", str: "a text", int: "a whole number", type(None): "null"}


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
    try:
        questions = list(_questions(_load(Path(path).read_bytes()), misplaced))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not questions and not misplaced:
        raise ValueError(f"{path}: holds no questions")
    return questions


def _load(raw: bytes) -> Any:
    if raw.startswith(_GZIP_MAGIC):
        try:
            raw = gzip.decompress(raw)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"damaged gzip file ({error}): fetch it again") from error
    if not raw.strip():
        raise ValueError("the file is empty")
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start} is 0x{error.object[error.start]:02x})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from error


def _questions(document: Any, misplaced: list[str] | None) -> Iterator[SquadQuestion]:
    places: dict[str, str] = {}
    for article, at in _items(document, "", "data"):
        title = _field(article, at, "title", str) if isinstance(article, dict) and "title" in article else ""
        for paragraph, at_paragraph in _items(article, at, "paragraphs"):
            context = _field(paragraph, at_paragraph, "context", str)
            for entry, at_question in _items(paragraph, at_paragraph, "qas"):
                identifier = _field(entry, at_question, "id", str)
                if identifier in places:
                    raise ValueError(f"{at_question}.id: {identifier!r} is the id of {places[identifier]} already")
                places[identifier] = at_question
                question = _field(entry, at_question, "question", str)
                try:
                    answers = tuple(_answer(answer, place, context) for answer, place in _answers(entry, at_question))
                except MisplacedAnswerError as error:
                    if misplaced is None:
                        raise
                    misplaced.append(f"{identifier}: {error}")
                    continue
                yield SquadQuestion(identifier, title, question, context, answers)


def _answers(entry: Any, at: str) -> list[tuple[Any, str]]:
    answers = _items(entry, at, "answers")
    if not answers:
        raise ValueError(f"{at}.answers: empty; SQuAD 1.1 has an answer to each question (2.0's others are not read)")
    return answers


def _answer(answer: Any, at: str, context: str) -> GoldAnswer:
    text, start = _field(answer, at, "text", str), _field(answer, at, "answer_start", int)
    if start < 0 or context[start : start + len(text)] != text:
        raise MisplacedAnswerError(f"{at}: the context does not have {text!r} at answer_start {start}")
    return GoldAnswer(text, start)


def _items(parent: Any, at: str, name: str) -> list[tuple[Any, str]]:
    """The members of a list field, each with its place in the document."""
    place = f"{at}.{name}" if at else name
    return [(item, f"{place}[{index}]") for index, item in enumerate(_field(parent, at, name, list))]


def _field(parent: Any, at: str, name: str, kind: type[T]) -> T:
    if not isinstance(parent, dict):
        raise ValueError(f"{at or 'the file'}: expected an object with {name!r}, found {_named(parent)}")
    place = f"{at}.{name}" if at else name
    if name not in parent:
        raise ValueError(f"{place}: missing; {at or 'the file'} has {', '.join(sorted(parent)) or 'no fields'}")
    value = parent[name]
    if type(value) is not kind:
        raise ValueError(f"{place}: expected {_JSON_NAMES[kind]}, found {_named(value)}")
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{place}: holds a lone surrogate, which is no character")
    return value


def _named(value: Any) -> str:
    return _JSON_NAMES.get(type(value), repr(value))
