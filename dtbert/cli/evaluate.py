"""`dtbert evaluate`: a model at a schedule on a SQuAD file: how right, at what cost, how fast."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtbert.cli.options import (
    QUIET_HELP,
    SCHEDULE_HELP,
    add_model_options,
    add_schedule_options,
    add_window_options,
    describe_schedule,
    load_for_schedule,
    positive,
)
from dtbert.cli.output import check_output, print_json, printable
from dtbert.files import write_whole

if TYPE_CHECKING:
    from dtbert.evaluation import Cost

SUMMARY = "measure a model and a schedule on a SQuAD file"
DESCRIPTION = """\
Answer the questions of a SQuAD 1.1 file; report the official exact match and F1
in percent, multiply-accumulates (MACs) a question, and questions a second.

MACs are a mean over the questions, each of them the sum over its windows:
  executed          what dtbert computes with the schedule
  published count   the same as the literature counts it, there called FLOPs
  nothing dropped   the same model without a schedule, at each window's length
  padded to 384     that, with every window padded, as the literature has it
"""
EXAMPLES = f"""\
examples:
  dtbert evaluate dev-v1.1.json
  dtbert evaluate dev-v1.1.json.gz --limit 500 --schedule 1,1,0.9,0.6,0.4,0.2
  dtbert evaluate dev-v1.1.json --json --predictions predictions.json

{SCHEDULE_HELP}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="questions in SQuAD 1.1's format, .json or .json.gz")
    parser.add_argument("--limit", type=positive, metavar="N", help="N questions only, evenly spread over the file")
    parser.add_argument("--predictions", metavar="OUT", help="save the answers as JSON, {id: text}")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quiet", action="store_true", help=QUIET_HELP)
    add_model_options(parser)
    add_window_options(parser.add_argument_group("windows"))
    add_schedule_options(parser, budget=True)


def run(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from dtbert.evaluation import evenly_spaced, measure, read_squad

    if arguments.predictions is not None:
        sources = (arguments.file, arguments.schedule)
        check_output("--predictions", Path(arguments.predictions), *sources, model=arguments.model)
    questions = evenly_spaced(read_squad(arguments.file), arguments.limit)
    answerer, schedule = load_for_schedule(arguments)
    with tqdm(total=len(questions), unit="q", disable=arguments.quiet or None) as bar:
        found = measure(answerer, questions, schedule, on_answers=bar.update)
    for identifier, reason in found.unreadable.items():
        print(printable(f"dtbert: question {identifier} counts as wrong: {reason}"), file=sys.stderr)
    if arguments.predictions is not None:
        write_whole(Path(arguments.predictions), json.dumps(found.predictions, ensure_ascii=False) + "\n")
    report = {
        "file": str(arguments.file),
        "model": arguments.model,
        "budget": arguments.budget,
        "schedule": None if schedule is None else schedule.to_dict(),
        "window": answerer.window,
        "questions": len(questions),
        "missing": list(found.scores.missing),
        "exact_match": found.scores.exact_match,
        "f1": found.scores.f1,
        "questions_per_second": found.questions_per_second,
        **_cost_fields(found.cost),
    }
    if arguments.json:
        print_json(report)
    else:
        if arguments.budget is not None:
            print(f"budget {arguments.budget:g} chose: {describe_schedule(schedule)}\n")
        elif schedule is not None:
            print(f"schedule: {describe_schedule(schedule)}\n")
        print(_table(report))
    return 1 if found.unreadable else 0


def _cost_fields(cost: "Cost | None") -> dict[str, Any]:
    if cost is None:
        return {}
    macs = {name: getattr(cost, name) for name in ("executed", "published", "own_length", "padded")}
    return {
        "windows_per_question": cost.windows,
        "tokens_per_window": cost.tokens,
        "macs_per_question": {name: round(count) for name, count in macs.items()},
        "ratio_to_own_length": {name: count / cost.own_length for name, count in macs.items()},
        "ratio_to_padded": {name: count / cost.padded for name, count in macs.items()},
    }


def _table(report: dict[str, Any]) -> str:
    lines = [
        f"questions        {report['questions']:8,}",
        f"exact match      {report['exact_match']:8.2f}",
        f"F1               {report['f1']:8.2f}",
        f"questions/s      {report['questions_per_second']:8.1f}",
    ]
    if report["missing"]:
        lines.insert(1, f"without answer   {len(report['missing']):8,}   (counted as wrong)")
    if "macs_per_question" not in report:
        return "\n".join(lines)
    lines += ["", "MACs a question        millions   of own length   of padded"]
    labels = {"executed": "executed", "published": "published count"} if report["schedule"] else {}
    labels |= {"own_length": "nothing dropped", "padded": f"padded to {report['window']}"}
    for name, label in labels.items():
        millions = report["macs_per_question"][name] / 1e6
        own, padded = report["ratio_to_own_length"][name], report["ratio_to_padded"][name]
        lines.append(f"  {label:<17} {millions:11,.0f}   {own:13.3f}   {padded:9.3f}")
    windows, tokens = report["windows_per_question"], report["tokens_per_window"]
    return "\n".join([*lines, f"  {windows:.2f} windows a question, {tokens:.0f} tokens a window"])
