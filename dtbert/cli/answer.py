"""`dtbert answer`: one question about one text, or a file of them."""

import argparse
from typing import TYPE_CHECKING, Any

from dtbert.cli import cluster, stream
from dtbert.cli.answering import asking, work_of
from dtbert.cli.contexts import given_contexts
from dtbert.cli.options import (
    SCHEDULE_HELP,
    add_answer_options,
    add_model_options,
    add_schedule_options,
    check_threshold_is_used,
    load_for_answers,
    positive,
)
from dtbert.cli.output import print_json
from dtbert.jobs.lines import QUESTIONS, answer_fields

if TYPE_CHECKING:
    from dtbert.qa import Answer

SUMMARY = "answer a question about a text, or a file of questions"
DESCRIPTION = """\
Answer a question by a span of a text, or of the best of several texts, such as
those of a folder (.txt, .text, .md, .rst); or a file of questions, one JSON
object a line, such as
  {"id": 7, "question": "Who wrote it?", "context": "Ada Lovelace wrote it."}
or an array of such objects, CSV or TSV whose first line names these columns, or
Parquet (where pyarrow is installed); each but the last may be a .gz.

Each line of --input gives one line of --output, in the same order: "line"
(counted from 1; of other files than lines the number of the object or row), the
"id" if there is one, and "answer", "start", "end", "score" and "margin", or
"error". Blank lines and other fields are passed over. After an interruption the
same command goes on where it stopped; the file OUTPUT.settings.json is how it
knows that it is the same. With - for either, questions come from stdin, as
lines, or answers go to stdout; then nothing is kept to go on with.

With --engine ray questions go through Ray Data, on this machine or a cluster:
--input is JSON lines or Parquet, as a file, a folder, a pattern or a URL, and
--output a folder, which gets a part for each block of questions.

"start" and "end" count characters of the context from 0; "end" is the first
one after the answer. "score" is the answer's probability among all spans and
that there is no answer; "margin" the logarithm of its odds against the latter.
With --no-answer, which is "" from 0 to 0, that may be the answer, too.

exit status: 0 all answered, 1 some lines failed, 2 wrong usage or bad input
"""
EXAMPLES = f"""\
examples:
  dtbert answer --question "Who wrote it?" --context "Ada Lovelace wrote it."
  dtbert answer --question "Who wrote it?" --file letter.txt --top 3
  dtbert answer --question "Who wrote it?" --file letters/ --no-answer
  dtbert answer --question "Who wrote it?" --context - < letter.txt \\
    --schedule 0.8,0.7,0.6,0.4,0.2,0.1
  dtbert answer --input questions.jsonl --output answers.jsonl --budget 0.5
  cat questions.jsonl | dtbert answer --input - --output - | jq .answer
  dtbert answer --input questions/ --output answers --engine ray --workers 2

{SCHEDULE_HELP}"""

_MARGIN = 50  # characters of context shown on each side of an answer
_MOST_NAMED = 60  # characters of a text that names itself
_ONE, _MANY = ("question", "context", "file", "text"), ("input", "output")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    one = parser.add_argument_group("one question")
    one.add_argument("--question", metavar="Q", help="the question")
    several: dict[str, Any] = {"nargs": "+", "action": "extend"}
    context = "a file in UTF-8, a folder of them, the text itself, or - for stdin"
    best = "; of several the best answers of all"
    one.add_argument("--context", metavar="FILE|TEXT|-", **several, help=context + best)
    one.add_argument("--file", metavar="FILE|-", **several, help="the same, but never the text itself")
    one.add_argument("--text", metavar="TEXT", **several, help="the same, but always the text itself")
    stream.add_arguments(parser, QUESTIONS, "answers, one JSON object a line")
    cluster.add_arguments(parser)
    parser.add_argument("--top", type=positive, default=1, metavar="K", help="the K best answers, of different texts")
    parser.add_argument("--overlap", action="store_true", help="they may share words with better ones")
    parser.add_argument("--json", action="store_true", help="print one JSON object (--output holds JSON in any case)")
    add_model_options(parser)
    add_answer_options(parser)
    add_schedule_options(parser, budget=True, auto=True)


def run(arguments: argparse.Namespace) -> int:
    check_threshold_is_used(arguments, arguments.no_answer)
    cluster.check_arguments(arguments)
    one, many = ([name for name in names if getattr(arguments, name) is not None] for names in (_ONE, _MANY))
    if not many and len(one) > 1 and "question" in one:
        return _answer_one(arguments)
    if not one and len(many) == 2:
        if arguments.engine is not None:
            return cluster.run(arguments)
        return stream.run(arguments, QUESTIONS, work_of)
    raise ValueError(
        "give either --question and --context (or --file, --text), or --input and --output (see `dtbert answer --help`)"
    )


def _answer_one(arguments: argparse.Namespace) -> int:
    contexts = given_contexts(arguments)
    answerer, schedule = load_for_answers(arguments)
    asked = asking(arguments, schedule)
    found: list[tuple[str | None, Answer]]
    if len(contexts) == 1:
        ((only, context),) = contexts.items()
        found = [(only, answer) for answer in answerer.top(arguments.question, context, arguments.top, **asked)]
    else:
        documents = answerer.answer_documents(arguments.question, contexts, arguments.top, **asked)
        found = [(one.document, one.answer) for one in documents]
    several = len(contexts) > 1
    if arguments.json:
        names = [name for name, _ in found] if several else None
        print_json(answer_fields([answer for _, answer in found], arguments.top, names))
        return 0
    for rank, (name, answer) in enumerate(found, start=1):
        text = _shown(answer.text) or "(no answer)"
        print(f"{rank}. {text}" if arguments.top > 1 else text)
        place = f", characters {answer.start} to {answer.end}" if answer.text else ""
        if several and name is not None:
            # A text is its own name.
            place += f' of "{_shown(name[:_MOST_NAMED])}"' if contexts[name] == name else f" of {_shown(name)}"
        print(f"   score {answer.score:.3g}{place}")
        if name is not None and answer.text:
            print(f"   {excerpt(contexts[name], answer.start, answer.end)}")
    return 0


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
