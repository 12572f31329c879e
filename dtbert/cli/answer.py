"""`dtbert answer`: one question about one text, or a file of them."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dtbert.cli import batch
from dtbert.cli.options import (
    QUIET_HELP,
    SCHEDULE_HELP,
    add_answer_options,
    add_model_options,
    add_schedule_options,
    check_threshold_is_used,
    load_for_schedule,
    positive,
)
from dtbert.cli.output import print_json
from dtbert.files import naming, utf8

if TYPE_CHECKING:
    from dtbert.qa import Answer

SUMMARY = "answer a question about a text, or a file of questions"
DESCRIPTION = """\
Answer a question by a span of a text, or of the best of several texts; or a
file of questions, one JSON object a line, such as
  {"id": 7, "question": "Who wrote it?", "context": "Ada Lovelace wrote it."}
or an array of such objects, CSV or TSV whose first line names these columns, or
Parquet (where pyarrow is installed); each but the last may be a .gz.

Each line of --input gives one line of --output, in the same order: "line"
(counted from 1; of other files than lines the number of the object or row), the
"id" if there is one, and "answer", "start", "end", "score" and "margin", or
"error". Blank lines and other fields are passed over. After an interruption the
same command goes on where it stopped; the file OUTPUT.settings.json is how it
knows that it is the same.

"start" and "end" count characters of the context from 0; "end" is the first
one after the answer. "score" is the answer's probability among all spans and
that there is no answer; "margin" the logarithm of its odds against the latter.
With --no-answer, which is "" from 0 to 0, that may be the answer, too.

exit status: 0 all answered, 1 some lines failed, 2 wrong usage or bad input
"""
EXAMPLES = f"""\
examples:
  dtbert answer --question "Who wrote it?" --context "Ada Lovelace wrote it."
  dtbert answer --question "Who wrote it?" --context letter.txt --top 3
  dtbert answer --question "Who wrote it?" --context letters/*.txt --no-answer
  dtbert answer --question "Who wrote it?" --context - < letter.txt \\
    --schedule 1,1,0.9,0.6,0.4,0.2 --scorer cls
  dtbert answer --input questions.jsonl --output answers.jsonl --budget 0.5

{SCHEDULE_HELP}"""

_FILE_ENDINGS = (".txt", ".md", ".json", ".jsonl", ".html")
_MARGIN = 50  # characters of context shown on each side of an answer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    one = parser.add_argument_group("one question")
    one.add_argument("--question", metavar="Q", help="the question")
    context = "a file in UTF-8, or the text itself, or - for stdin; of several the best answers of all"
    one.add_argument("--context", metavar="FILE|TEXT|-", nargs="+", help=context)
    many = parser.add_argument_group("many questions")
    many.add_argument("--input", metavar="FILE", help="questions, as above")
    many.add_argument("--output", metavar="FILE", help="answers, one JSON object a line")
    many.add_argument("--quiet", action="store_true", help=QUIET_HELP)
    parser.add_argument("--top", type=positive, default=1, metavar="K", help="the K best answers, of different texts")
    parser.add_argument("--overlap", action="store_true", help="they may share words with better ones")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_model_options(parser)
    add_answer_options(parser)
    add_schedule_options(parser, budget=True)


def run(arguments: argparse.Namespace) -> int:
    one = (arguments.question, arguments.context)
    many = (arguments.input, arguments.output)
    check_threshold_is_used(arguments, arguments.no_answer)
    if None not in one and many == (None, None):
        return _answer_one(arguments)
    if None not in many and one == (None, None):
        if arguments.json:
            raise ValueError("--json is for one question: --output holds JSON in any case")
        return batch.run(arguments)
    raise ValueError("give either --question and --context, or --input and --output (see `dtbert answer --help`)")


def _answer_one(arguments: argparse.Namespace) -> int:
    contexts = {argument: read_context(argument) for argument in arguments.context}
    answerer, schedule = load_for_schedule(arguments)
    asking = batch.asking(arguments, schedule)
    found: list[tuple[str | None, Answer]]
    if len(contexts) == 1:
        ((name, context),) = contexts.items()
        found = [(name, answer) for answer in answerer.top(arguments.question, context, arguments.top, **asking)]
    else:
        documents = answerer.answer_documents(arguments.question, contexts, arguments.top, **asking)
        found = [(one.document, one.answer) for one in documents]
    several = len(contexts) > 1
    if arguments.json:
        names = [name for name, _ in found] if several else None
        print_json(batch.answer_fields([answer for _, answer in found], arguments.top, names))
        return 0
    for rank, (name, answer) in enumerate(found, start=1):
        text = _shown(answer.text) or "(no answer)"
        print(f"{rank}. {text}" if arguments.top > 1 else text)
        place = f", characters {answer.start} to {answer.end}" if answer.text else ""
        print(f"   score {answer.score:.3g}{place}" + (f" of {_shown(name)}" if several and name is not None else ""))
        if name is not None and answer.text:
            print(f"   {excerpt(contexts[name], answer.start, answer.end)}")
    return 0


def read_context(argument: str) -> str:
    """The text that ``--context`` stands for.

    Raises:
        ValueError: it looks like a path but nothing is there, or what is there is not UTF-8.
        OSError: the file cannot be read.
    """
    if argument == "-":
        return _decode("stdin", sys.stdin.buffer.read())
    try:
        exists = argument != "" and Path(argument).exists()
    except (OSError, ValueError):  # too long for a path, or characters that a path cannot hold
        exists = False
    if exists:
        return _decode(argument, Path(argument).read_bytes())
    one_word = not any(character.isspace() for character in argument)
    if argument.lower().endswith(_FILE_ENDINGS) or (one_word and ("/" in argument or "\\" in argument)):
        raise ValueError(f"--context {argument!r} looks like a file, and there is none (a text like this: --context -)")
    return argument


def _decode(name: str, raw: bytes) -> str:
    with naming(name):
        return utf8(raw)


def excerpt(context: str, start: int, end: int) -> str:
    """The answer in brackets with some of the text around it, on one line."""
    before, after = context[max(0, start - _MARGIN) : start], context[end : end + _MARGIN]
    if start > _MARGIN:
        before = "..." + (before[before.find(" ") :] if " " in before else before)
    if len(context) - end > _MARGIN:
        after = (after[: after.rfind(" ") + 1] if " " in after else after) + "..."
    return _shown(f"{before}[{context[start:end]}]{after}")


def _shown(text: str) -> str:
    # Control characters of a text must not reach the terminal.
    printable = "".join(character if character.isprintable() else " " for character in text)
    return " ".join(printable.split())
