"""What the commands do with tasks of whole texts: the option, the model, and `dtbert evaluate --task`."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dtbert.cli.options import MAX_ANSWER_TOKENS, STRIDE, WINDOW, describe_schedule, placement, resolved, schedule_of
from dtbert.cli.output import check_output, print_json, printable
from dtbert.files import write_whole

if TYPE_CHECKING:
    from dtbert.evaluation import LabelledTexts, TextCost
    from dtbert.model import Policy
    from dtbert.text import SentenceEncoder, TextClassifier

TASK_HELP = """\
tasks:
  NAME is one of GLUE's: cola, sst2, mrpc, stsb, qqp, mnli, mnli-mm, qnli, rte,
  wnli; or classification or regression for files of your own. FILE is then one
  of GLUE's tables, or has JSON objects, one a line or in an array, also
  compressed with gzip. Columns of your own files are text (and pair) and label,
  tables separate them with tabs.
"""
M = TypeVar("M", bound="TextClassifier | SentenceEncoder")

# What is of no use beside --task, with its default.
_OF_QUESTIONS = {
    "window": WINDOW,
    "stride": STRIDE,
    "max_answer_tokens": MAX_ANSWER_TOKENS,
    "no_answer": False,
    "threshold": None,
    "choose_threshold": False,
    "calibrate_cascade": False,
    "agreement": None,
}


def add_task_option(parser: Any) -> None:
    parser.add_argument("--task", metavar="NAME", help="FILE has labelled texts in place of questions: see below")


def check_task_options(arguments: argparse.Namespace) -> None:
    """Raise ValueError for an option that says something of questions alone."""
    for name, default in _OF_QUESTIONS.items():
        if getattr(arguments, name, default) != default:
            raise ValueError(f"--{name.replace('_', '-')} is of questions and windows: it has no part in --task")
    if getattr(arguments, "budget", None) == "auto":
        raise ValueError("--budget auto is of questions: give a number with --task")


def load_with_schedule(
    arguments: argparse.Namespace, load: "Callable[[argparse.Namespace], M]"
) -> "tuple[M, Policy | None]":
    """A model of whole texts, and the schedule that ``--schedule`` gives or ``--budget`` chooses, as it drops by it.

    Raises:
        ValueError, OSError: as `schedule_of` and ``load``; the schedule does not fit the model, or a budget is for one
            that is no classifier.
    """
    from dtbert.text import TextClassifier

    schedule, budget = schedule_of(arguments), getattr(arguments, "budget", None)
    if schedule is not None and budget is not None:
        raise ValueError("--schedule and --budget exclude each other: a budget chooses a schedule")
    model = load(arguments)
    if budget is not None:
        if not isinstance(model, TextClassifier):
            raise ValueError("--budget needs a classifier: for embeddings give --schedule")
        schedule = model.within_budget(budget).schedule
    if schedule is None:
        return model, None
    schedule.check_layers(model.config.num_hidden_layers)
    return model, resolved([schedule], model.own_scorer)[0]


def load_text_model(arguments: argparse.Namespace, with_schedules: bool = True) -> "TextClassifier | SentenceEncoder":
    """The classifier that the options name; a sentence encoder where the checkpoint has no classifier."""
    from dtbert.text import SentenceEncoder, TextClassifier
    from dtbert.weights import has_classifier, resolve_source

    if arguments.model is None:
        raise ValueError("--task needs --model: the model inside dtbert answers questions, and labels no texts")
    placed = placement(arguments)
    source = resolve_source(arguments.model, placed.pop("revision"))
    if has_classifier(source):
        return TextClassifier.load(source, **placed, with_schedules=with_schedules)
    return SentenceEncoder.load(source, **placed)


def read_texts(
    files: Sequence[str], name: str, labels: "Sequence[str] | None", limit: int | None = None
) -> "LabelledTexts":
    """The labelled texts of files, evenly spread ones where there is a limit; damaged lines are named on stderr."""
    from dtbert.evaluation import evenly_spaced, read_task, task_named

    task = task_named(name)
    read = [read_task(file, task, labels) for file in files]
    if len({one.labels for one in read}) > 1:
        # Each has labels that another lacks.
        labels = sorted({label for one in read for label in one.labels})
        read = [read_task(file, task, labels) for file in files]
    for file, one in zip(files, read, strict=True):
        warn(file, "left out", one.damaged)
    examples = [example for one in read for example in one.examples]
    damaged = [line for one in read for line in one.damaged]
    return read[0]._replace(examples=list(evenly_spaced(examples, limit)), damaged=damaged)


def warn(file: str, what: str, lines: list[str]) -> None:
    """Name on stderr what is wrong with lines of a file, the first 20."""
    if not lines:
        return
    more = [f"and {len(lines) - 20} more"] if len(lines) > 20 else []
    for line in [f"{file}: lines {what}: {len(lines)}", *(f"  {one}" for one in lines[:20] + more)]:
        print(printable(f"dtbert: {line}"), file=sys.stderr)


def evaluate_task(arguments: argparse.Namespace) -> int:
    """`dtbert evaluate --task`."""
    from tqdm import tqdm

    from dtbert.evaluation import PreparedTexts, measure_texts, task_named
    from dtbert.text import TextClassifier

    check_task_options(arguments)
    task = task_named(arguments.task)
    if arguments.predictions is not None:
        check_output("--predictions", Path(arguments.predictions), arguments.file, model=arguments.model)
    model, schedule = load_with_schedule(arguments, load_text_model)
    labels = model.labels if isinstance(model, TextClassifier) else None
    data = read_texts([arguments.file], arguments.task, labels, arguments.limit)
    texts = PreparedTexts(model, data)
    warn(arguments.file, "counted as wrong", [f"line {one}: {why}" for one, why in texts.unreadable.items()])
    with tqdm(total=len(texts), unit="text", disable=arguments.quiet or None) as bar:
        found = measure_texts(texts, schedule, bar.update)
    if arguments.predictions is not None:
        lines = {str(one.line): label for one, label in zip(data.examples, found.predictions, strict=True)}
        write_whole(Path(arguments.predictions), json.dumps(lines, ensure_ascii=False) + "\n")
    report = {
        "file": str(arguments.file),
        "task": task.name,
        "model": arguments.model,
        "by": "classifier" if isinstance(model, TextClassifier) else "cosine of embeddings",
        "budget": arguments.budget,
        "schedule": None if schedule is None else schedule.to_dict(),
        "texts": len(texts),
        "left_out": len(data.damaged),
        "unreadable": len(texts.unreadable),
        **found.scores,
        "score": sum(found.scores.values()) / len(found.scores),
        "texts_per_second": found.texts_per_second,
        **_cost_fields(found.cost),
    }
    if arguments.json:
        print_json(report)
    else:
        if schedule is not None or arguments.budget is not None:
            chosen = "schedule" if arguments.budget is None else f"budget {arguments.budget:g} chose"
            print(f"{chosen}: {describe_schedule(schedule)}\n")
        print(_table(report, found.scores))
    return 1 if texts.unreadable else 0


def _cost_fields(cost: "TextCost | None") -> dict[str, Any]:
    if cost is None:
        return {}
    macs = {name: getattr(cost, name) for name in ("executed", "executed_p95", "published", "own_length")}
    macs = {name: count for name, count in macs.items() if count is not None}
    return {
        "tokens_per_text": cost.tokens,
        "macs_per_text": {name: round(count) for name, count in macs.items()},
        "ratio_to_own_length": {name: count / cost.own_length for name, count in macs.items()},
    }


def _table(report: dict[str, Any], scores: dict[str, float]) -> str:
    lines = [f"texts            {report['texts']:8,}"]
    if report["left_out"]:
        lines.append(f"lines left out   {report['left_out']:8,}")
    if report["unreadable"]:
        lines.append(f"not readable     {report['unreadable']:8,}   (counted as wrong)")
    about = "   (cosine of embeddings)" if report["by"] != "classifier" else ""
    lines += [f"{name:<15}  {value:8.2f}{about}" for name, value in scores.items()]
    lines.append(f"texts/s          {report['texts_per_second']:8.1f}")
    if "macs_per_text" not in report:
        return "\n".join(lines)
    lines += ["", "MACs a text            millions   of own length"]
    labels = {"executed": "executed", "published": "published count"} if report["schedule"] else {}
    if "executed_p95" in report["macs_per_text"]:
        labels = {"executed": "executed", "executed_p95": "  95% up to", "published": "published count"}
    for name, label in {**labels, "own_length": "nothing dropped"}.items():
        millions, ratio = report["macs_per_text"][name] / 1e6, report["ratio_to_own_length"][name]
        lines.append(f"  {label:<17} {millions:11,.1f}   {ratio:13.3f}")
    return "\n".join([*lines, f"  {report['tokens_per_text']:.0f} tokens a text"])
