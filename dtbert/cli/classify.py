"""`dtbert classify`: the label of a text or of a pair of texts, or those of a file of them."""

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from dtbert.cli import stream
from dtbert.cli.batch import Work
from dtbert.cli.options import SCHEDULE_HELP, add_model_options, add_schedule_options, placement, positive
from dtbert.cli.output import print_json, printable
from dtbert.cli.tasks import load_with_schedule
from dtbert.jobs.lines import Columns, Line, described

if TYPE_CHECKING:
    from dtbert.model import Policy
    from dtbert.text import Label, TextClassifier

SUMMARY = "label a text or a pair of texts, or a file of them"
DESCRIPTION = """\
Label a text, or a pair of texts, by a BERT with a classifier, such as `dtbert
train --task` makes: any BertForSequenceClassification. One whose only label is
a number, such as how similar two texts are, gives that number.

--input is a file of texts, one JSON object a line, such as
  {"id": 7, "text": "A man is eating.", "pair": "Someone eats."}
of which "id" and "pair" may be missing; or an array of such objects, CSV or TSV
whose first line names these columns, or Parquet (where pyarrow is installed);
each but the last may be a .gz.

Each line of --input gives one line of --output, in the same order: "line"
(counted from 1; of other files than lines the number of the object or row), the
"id" if there is one, and "label" and "score", or "error". Blank lines and other
fields are passed over. After an interruption the same command goes on where it
stopped; the file OUTPUT.settings.json is how it knows that it is the same. With
- for either, texts come from stdin, as lines, or labels go to stdout; then
nothing is kept to go on with.

"score" is the label's probability, or the number. A text is read whole: one
longer than the model's positions is an error, for nothing is cut off.

exit status: 0 all labelled, 1 some lines failed, 2 wrong usage or bad input
"""
EXAMPLES = f"""\
examples:
  dtbert classify --model run/best --text "A film worth seeing twice."
  dtbert classify --model run/best --text "A man eats." --pair "He is hungry." \\
    --top 3 --json
  dtbert classify --model run/best --input texts.csv --output labels.jsonl
  dtbert classify --model run/best --input texts.tsv.gz --output labels.jsonl \\
    --budget 0.5
  cat texts.jsonl | dtbert classify --model run/best --input - --output - | jq

{SCHEDULE_HELP}"""

_COLUMNS = Columns("texts", ("text",), ("pair",))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    one = parser.add_argument_group("one text")
    one.add_argument("--text", metavar="TEXT", help="the text itself")
    one.add_argument("--pair", metavar="TEXT", help="a second one, for a model of pairs")
    stream.add_arguments(parser, _COLUMNS, "labels, one JSON object a line")
    parser.add_argument("--top", type=positive, default=1, metavar="K", help="the K best labels, or as many as it has")
    parser.add_argument("--json", action="store_true", help="print one JSON object (--output holds JSON in any case)")
    add_model_options(parser, shipped=False)
    add_schedule_options(parser, budget=True)


def run(arguments: argparse.Namespace) -> int:
    one, many = (
        [name for name in names if getattr(arguments, name) is not None]
        for names in (("text", "pair"), ("input", "output"))
    )
    if "text" in one and not many:
        return _classify_one(arguments)
    if not one and len(many) == 2:
        return stream.run(arguments, _COLUMNS, _work_of)
    raise ValueError("give either --text (and --pair), or --input and --output (see `dtbert classify --help`)")


def _classify_one(arguments: argparse.Namespace) -> int:
    classifier, schedule = load_with_schedule(arguments, _load)
    found = classifier(arguments.text, arguments.pair, schedule=schedule)
    if arguments.json:
        print_json(label_fields(found, arguments.top))
    else:
        for label, score in _best(found, arguments.top):
            print(f"{score:<8.3g}  {printable(label)}")
    return 0


def _load(arguments: argparse.Namespace) -> "TextClassifier":
    from dtbert.text import TextClassifier

    if arguments.model is None:
        raise ValueError(
            "--model is missing, and the model inside dtbert answers questions: name a classifier, such as `dtbert "
            "train --task` makes, or a BertForSequenceClassification of the hub"
        )
    return TextClassifier.load(arguments.model, **placement(arguments))


def _work_of(arguments: argparse.Namespace) -> Work:
    classifier, schedule = load_with_schedule(arguments, _load)
    settings = {"schedule": None if schedule is None else schedule.to_dict(), "top": arguments.top}
    return Work(classifier, partial(_labelled, classifier, schedule, arguments.top), settings)


def _labelled(
    classifier: "TextClassifier", schedule: "Policy | None", top: int, lines: Sequence[Line]
) -> Iterator[tuple[Line, dict[str, Any]]]:
    """Each line, and the JSON fields of its label, or of its error."""
    texts: Any = (line.texts if len(line.texts) == 2 else line.texts[0] for line in lines if line.error is None)
    found = classifier.classify_many(texts, errors="yield", schedule=schedule)
    return described(lines, found, partial(label_fields, top=top))


def label_fields(found: "Label", top: int) -> dict[str, Any]:
    """The JSON fields of the best label, and where ``top`` is above 1 a list of the best as ``labels``."""
    # Six digits: what a float32 knows.
    fields = [{"label": label, "score": float(f"{score:.6g}")} for label, score in _best(found, top)]
    return {**fields[0], "labels": fields} if top > 1 else fields[0]


def _best(found: "Label", top: int) -> list[tuple[str, float]]:
    return sorted(found.scores.items(), key=lambda one: -one[1])[:top]
