"""`dtbert trace`: which tokens each layer drops, of one question or over a SQuAD file."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dtbert.cli.contexts import given_contexts
from dtbert.cli.options import (
    QUIET_HELP,
    SCHEDULE_HELP,
    add_model_options,
    add_schedule_options,
    add_window_options,
    describe_schedule,
    load_answerer,
    positive,
    resolved,
    schedule_of,
)
from dtbert.cli.output import check_output, print_json, printable
from dtbert.files import write_whole

if TYPE_CHECKING:
    from dtbert.model import Policy
    from dtbert.qa import Answer, QuestionAnswerer, Trace
    from dtbert.tracing import Summary

SUMMARY = "show which tokens each layer drops"
DESCRIPTION = """\
Show which words of a question and a text stay in the model after each layer,
and what that does to the answer: at budgets or schedules, one or several; by
default at a budget of 0.5.

In the text {3 these words} left in layer 3, and [these] are the full model's
answer; a terminal shows what left dimmed, with the layer behind it. Of a text
that takes several windows the one is shown in which the answer stayed longest;
--json and --html have all of them. The page of --html is one file that needs
no network.

With FILE and --summary: over the questions of a SQuAD file, how many answers
are left after each layer, and how much of each class of words: the answer, the
rest of its sentence, the question, punctuation, other words, and [CLS] and
[SEP]. An answer is left while its first and its last token are.
"""
EXAMPLES = f"""\
examples:
  dtbert trace --question "Who wrote it?" --context "Ada Lovelace wrote it."
  dtbert trace --question "Who wrote it?" --context letter.txt \\
    --budget 0.7 0.5 0.25 --html trace.html
  dtbert trace dev-v1.1.json --limit 500 --summary --budget 0.7 0.5 0.33
  dtbert trace dev-v1.1.json --limit 500 --summary --keep-question \\
    --schedule 1,0.5,0.5,0.5,0.5,0.5 --scorer overlap answer answer_overlap

{SCHEDULE_HELP}"""

_DEFAULT_BUDGET = 0.5
_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    one = parser.add_argument_group("one question")
    one.add_argument("--question", metavar="Q", help="the question")
    text: dict[str, Any] = {"nargs": 1, "action": "extend"}
    one.add_argument(
        "--context", metavar="FILE|TEXT|-", **text, help="a file in UTF-8, the text itself, or - for stdin"
    )
    one.add_argument("--file", metavar="FILE|-", **text, help="the same, but never the text itself")
    one.add_argument("--text", metavar="TEXT", **text, help="the same, but always the text itself")
    one.add_argument("--html", metavar="FILE", help="write a page, with budgets and schedules side by side")
    many = parser.add_argument_group("many questions")
    many.add_argument("questions", metavar="FILE", nargs="?", help="questions in SQuAD's format, .json or .json.gz")
    many.add_argument("--summary", action="store_true", help="what is dropped, over all questions of FILE")
    many.add_argument("--limit", type=positive, metavar="N", help="N questions only, evenly spread over the file")
    many.add_argument("--quiet", action="store_true", help=QUIET_HELP)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_model_options(parser)
    add_window_options(parser.add_argument_group("windows"))
    add_schedule_options(parser, budget=True, several=True)


class _Run(NamedTuple):
    """What is traced, under which title; ``budget`` chose the schedule where there is one."""

    title: str
    budget: float | None
    schedule: "Policy | None"


def run(arguments: argparse.Namespace) -> int:
    one = [name for name in ("question", "context", "file", "text") if getattr(arguments, name) is not None]
    if len(one) > 1 and "question" in one and arguments.questions is None:
        if arguments.summary or arguments.limit is not None:
            raise ValueError("--summary and --limit are for a FILE of questions")
        return _trace_one(arguments)
    if arguments.questions is not None and arguments.summary and not one:
        if arguments.html is not None:
            raise ValueError("--html is for one question: give --question and --context")
        return _summarize(arguments)
    raise ValueError(
        "give either --question and --context (or --file, --text), or FILE and --summary (see `dtbert trace --help`)"
    )


def _runs(arguments: argparse.Namespace, schedules: "list[Policy]", answerer: "QuestionAnswerer") -> list[_Run]:
    budgets = arguments.budget or ([] if schedules else [_DEFAULT_BUDGET])
    chosen = [answerer.resolve(answerer.within_budget(budget).schedule) for budget in budgets]
    for schedule in schedules:
        schedule.check_layers(answerer.config.num_hidden_layers)
    return [
        *(_Run(f"budget {one:g}: {describe_schedule(of)}", one, of) for one, of in zip(budgets, chosen, strict=True)),
        *(_Run(describe_schedule(one), None, one) for one in resolved(schedules, answerer.own_scorer)),
    ]


def _schedules(arguments: argparse.Namespace) -> "list[Policy]":
    """Each --schedule by each --scorer."""
    given = (
        schedule_of(argparse.Namespace(**{**vars(arguments), "schedule": spec, "scorer": scorer}))
        for spec in arguments.schedule or [None]
        for scorer in arguments.scorer or [None]
    )
    return [schedule for schedule in given if schedule is not None]


def _trace_one(arguments: argparse.Namespace) -> int:
    contexts = given_contexts(arguments)
    if len(contexts) != 1:
        raise ValueError(f"a trace is of one text, and these are {len(contexts)}: name one of them")
    ((name, context),) = contexts.items()
    if arguments.html is not None:
        check_output("--html", Path(arguments.html), name, model=arguments.model)
    schedules = _schedules(arguments)
    answerer = load_answerer(arguments)
    runs = _runs(arguments, schedules, answerer)
    asked: list[dict[str, Any]] = [
        {"schedule": one.schedule} if one.budget is None else {"budget": one.budget} for one in runs
    ]
    traces = [answerer.trace(arguments.question, context, **how) for how in asked]
    if arguments.html is not None:
        from dtbert.tracing import page

        write_whole(Path(arguments.html), page(traces, [one.title for one in runs]))
    if arguments.json:
        print_json({"traces": [trace.to_dict() for trace in traces]})
        return 0
    print("\n\n".join(_shown(one.title, trace) for one, trace in zip(runs, traces, strict=True)))
    return 0


def _shown(title: str, trace: "Trace") -> str:
    """A trace for a terminal, or for whoever reads what it would print."""
    from dtbert.tracing import Marks, marked

    class Printable(Marks):
        def plain(self, text: str) -> str:
            return printable(text)

    class Dimmed(Printable):
        def kept(self, text: str) -> str:
            return f"\x1b[1m{text}\x1b[22m"

        def dropped(self, text: str, layer: int) -> str:
            return f"\x1b[2m{text}\x1b[36m{str(layer).translate(_SUBSCRIPTS)}\x1b[39;22m"

        def answer(self, text: str) -> str:
            return f"[\x1b[4m{text}\x1b[24m]"

    lines = [title, _answer_line("answer", trace.answer)]
    if trace.survived:
        lines.append("           the same as the full model's")
    else:
        lines.append(_answer_line("full model", trace.full_answer))
    if len(trace.windows) > 1:
        window = trace.windows[trace.answer_window]
        place = f"{trace.answer_window + 1} of {len(trace.windows)}, characters {window.start} to {window.end}"
        lines.append(f"window     {place}")
    return "\n".join([*lines, "", marked(trace, Dimmed() if _has_colors() else Printable()), "", _table(trace)])


def _answer_line(name: str, answer: "Answer") -> str:
    text = " ".join(printable(answer.text).split())
    return f"{name:<10} {text} (score {answer.score:.3g}, characters {answer.start} to {answer.end})"


def _table(trace: "Trace") -> str:
    window = trace.windows[trace.answer_window]
    question = [at for at, token in enumerate(window.tokens) if token.part == "question"]
    rows = [("layer", "tokens", "stay", "of the question", "of the answer")]
    for number, layer in enumerate(window.layers, start=1):
        kept = set(layer.kept)
        of_question, of_answer = (
            f"{len(kept.intersection(part))} of {len(part)}" for part in (question, window.answer)
        )
        rows.append((str(number), str(layer.entered), str(len(kept)), of_question, of_answer))
    table = "\n".join(
        "  ".join(f"{cell:>{len(head)}}" for cell, head in zip(row, rows[0], strict=True)) for row in rows
    )
    return f"{table}\n{trace.work:.2f} of the full model's work on this text"


def _has_colors() -> bool:
    # https://no-color.org
    quiet = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    if quiet or sys.stdout is None:
        return False
    # Where the small numbers cannot be shown, the marks of plain text say the same.
    return sys.stdout.isatty() and (sys.stdout.encoding or "").lower() == "utf-8"


def _summarize(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from dtbert.evaluation import PreparedQuestions, evenly_spaced, read_squad
    from dtbert.tracing import summarize

    schedules = _schedules(arguments)
    questions = evenly_spaced(read_squad(arguments.questions), arguments.limit)
    answerer = load_answerer(arguments)
    runs = _runs(arguments, schedules, answerer)
    prepared = PreparedQuestions(answerer, questions)
    for identifier, reason in prepared.unreadable.items():
        print(printable(f"dtbert: question {identifier} is left out: {reason}"), file=sys.stderr)
    with tqdm(total=len(questions) * (1 + len(runs)), unit="q", disable=arguments.quiet or None) as bar:
        counted, found = summarize(prepared, [one.schedule for one in runs], bar.update)
    if arguments.json:
        print_json(
            {
                "file": str(arguments.questions),
                "model": arguments.model,
                "questions": len(questions),
                "counted": counted,
                "schedules": [_fields(one, summary) for one, summary in zip(runs, found, strict=True)],
            }
        )
    else:
        print(f"{counted:,} of {len(questions):,} questions, those whose answer has a place in the text")
        for one, summary in zip(runs, found, strict=True):
            print(f"\n{one.title}\n{_summary_table(summary)}")
    return 1 if prepared.unreadable else 0


def _fields(one: _Run, summary: "Summary") -> dict[str, Any]:
    return {
        **summary._asdict(),
        "budget": one.budget,
        "schedule": None if one.schedule is None else one.schedule.to_dict(),
        "classes": {name: of_class._asdict() for name, of_class in summary.classes.items()},
    }


def _summary_table(summary: "Summary") -> str:
    figures = f"F1 {summary.f1:.2f}, the full model's answer {summary.same_answer:.3f}, work {summary.work:.2f}"
    numbers = "".join(f"{number:>7}" for number in range(1, len(summary.answers_left) + 1))
    lines = [
        f"  {figures}",
        f"  left after layer      {numbers}    tokens",
        _row("answers, both ends", summary.answers_left),
    ]
    for name, of_class in summary.classes.items():
        lines.append(f"{_row(name, of_class.left)}{of_class.tokens:>10,}")
    return "\n".join(lines)


def _row(name: str, parts: Sequence[float]) -> str:
    return f"  {name:<22}" + "".join(f"{part:7.3f}" for part in parts)
