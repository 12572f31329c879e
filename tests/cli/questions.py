"""Questions for `dtbert answer --input`, good and bad, and what it writes."""

import json
import random
from pathlib import Path
from typing import Any

from tests.cli.conftest import WORDS

GOOD = {"id": "a", "question": "Who wrote it?", "context": "Ada wrote it in London."}

# Each: a line of the input, the id that its output has, and what its error says.
BAD_LINES: list[tuple[bytes, Any, str]] = [
    (b'{"question": "Who"', None, "at character 19)"),
    (b"[" * 100_000, None, "not JSON"),
    (b'{"id": ' + b"9" * 5000 + b"}", None, "not JSON"),
    (b"caf\xe9", None, "(byte 4 is 0xe9)"),
    (b"[1, 2]", None, '"question" and "context"'),
    (b'{"id": 1.5, "question": "Who?", "context": "Ada."}', None, "id: expected a text or a whole number, found 1.5"),
    (b'{"id": true, "question": "Who?", "context": "Ada."}', None, "id: expected a text or a whole number, found true"),
    (b'{"id": 7, "question": "Who?"}', 7, "context: missing"),
    (b'{"id": "b", "context": "Ada."}', "b", "question: missing"),
    (b'{"id": 8, "question": ["Who?"], "context": "Ada."}', 8, "question: expected a text, found a list"),
    (b'{"question": "Who?", "context": null}', None, "context: expected a text, found null"),
    (b'{"question": "", "context": "Ada."}', None, "the question is empty"),
    (b'{"question": "Who?", "context": " \\n"}', None, "the context is blank"),
    (b'{"question": "Who\\ud800?", "context": "Ada."}', None, "lone surrogate"),
    (b'{"id": "\\udfff", "question": "Who?", "context": "\\udfff"}', "\udfff", "lone surrogate"),
    (json.dumps({"question": "who " * 400, "context": "Ada."}).encode(), None, "the question has 400 tokens"),
    (b'{"question": "Who?", "context": "\\u0000"}', None, "the context has only"),
]


def write_questions(path: Path, count: int) -> Path:
    """Questions over contexts of very different lengths, some bad, some lines blank."""
    choose = random.Random(0)
    words = WORDS.split()
    with path.open("wb") as file:
        for number in range(count):
            context = " ".join(choose.choices(words, k=choose.choice([3, 10, 30, 90])))
            fields = {"id": number, "question": "Who wrote " + choose.choice(words) + "?", "context": context}
            file.write(json.dumps(fields).encode() + b"\n")
            if number % 5 == 3:
                file.write(choose.choice(BAD_LINES[5:])[0] + b"\n" + b" \t\r\n" * choose.randrange(3))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]
