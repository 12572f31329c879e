"""`dtbert evaluate`: a model at a schedule on a SQuAD file: how right, at what cost, how fast."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtbert.cli.options import (
    SCHEDULE_HELP,
    add_model_options,
    add_schedule_options,
    describe_schedule,
    load_for_schedule,
    positive,
)
from dtbert.cli.output import check_output, print_json
from dtbert.files import write_whole

if TYPE_CHECKING:
    from dtbert.model import LengthSchedule
    from dtbert.qa import QuestionAnswerer
    from dtbert.squad import SquadQuestion

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


@dataclass(frozen=True)
class Cost:
    """Means over the questions: MACs a question, windows a question; and tokens a window."""

    executed: float
    published: float
    own_length: float
    padded: float
    windows: float
    tokens: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="questions in SQuAD 1.1's format, .json or .json.gz")
    parser.add_argument("--limit", type=positive, metavar="N", help="N questions only, evenly spread over the file")
    parser.add_argument("--predictions", metavar="OUT", help="save the answers as JSON, {id: text}")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quiet", action="store_true", help="no progress bar (there is none outside a terminal)")
    add_model_options(parser)
    add_schedule_options(parser, budget=True)


def run(arguments: argparse.Namespace) -> int:
    from dtbert.squad import evaluate, read_squad

    if arguments.predictions is not None:
        check_output("--predictions", Path(arguments.predictions), arguments.file, arguments.schedule)
    questions = spread(read_squad(arguments.file), arguments.limit)
    answerer, schedule = load_for_schedule(arguments)
    good = [question for question in questions if _is_answerable(answerer, question)]
    predictions, seconds = _answer(answerer, good, schedule, arguments.quiet)
    if arguments.predictions is not None:
        write_whole(Path(arguments.predictions), json.dumps(predictions, ensure_ascii=False) + "\n")
    scores = evaluate(questions, predictions)
    report = {
        "file": str(arguments.file),
        "model": arguments.model,
        "budget": arguments.budget,
        "schedule": None if schedule is None else schedule.to_dict(),
        "window": answerer.window,
        "questions": len(questions),
        "missing": list(scores.missing),
        "exact_match": scores.exact_match,
        "f1": scores.f1,
        "questions_per_second": len(good) / seconds if good else 0.0,
        **_cost_fields(cost(answerer, good, schedule) if good else None),
    }
    if arguments.json:
        print_json(report)
    else:
        if arguments.budget is not None:
            print(f"budget {arguments.budget:g} chose: {describe_schedule(schedule)}\n")
        elif schedule is not None:
            print(f"schedule: {describe_schedule(schedule)}\n")
        print(_table(report))
    return 1 if scores.missing else 0


def spread(questions: "list[SquadQuestion]", limit: int | None) -> "list[SquadQuestion]":
    """``limit`` of the questions, at even distances, so that all parts of the file are heard."""
    if limit is None or limit >= len(questions):
        return questions
    return [questions[index * len(questions) // limit] for index in range(limit)]


def _is_answerable(answerer: "QuestionAnswerer", question: "SquadQuestion") -> bool:
    try:
        answerer.check_pair(question.question, question.context)
    except ValueError as error:
        print(f"dtbert: question {question.id} counts as wrong: {error}", file=sys.stderr)
        return False
    return True


def _answer(
    answerer: "QuestionAnswerer", questions: "Sequence[SquadQuestion]", schedule: "LengthSchedule | None", quiet: bool
) -> tuple[dict[str, str], float]:
    """The answers by question id, and the seconds they took."""
    from tqdm import tqdm

    pairs = [(question.question, question.context) for question in questions]
    start = time.perf_counter()
    answers = tqdm(answerer.answer_many(pairs, schedule=schedule), total=len(pairs), unit="q", disable=quiet or None)
    texts = [answer.text for answer in answers]
    seconds = time.perf_counter() - start
    return {question.id: text for question, text in zip(questions, texts, strict=True)}, seconds


def cost(answerer: "QuestionAnswerer", questions: "Sequence[SquadQuestion]", schedule: "LengthSchedule | None") -> Cost:
    """What answering the questions costs with the schedule, and without one; see DESCRIPTION."""
    from dtbert.model import LengthSchedule

    config = answerer.config
    everything = LengthSchedule.ratios([1] * config.num_hidden_layers)
    executed = published = own_length = windows = tokens = 0
    for question in questions:
        for window in answerer.windows(question.question, question.context):
            length, question_length = len(window.input_ids), window.token_type_ids.count(0)
            macs = (schedule or everything).macs(config, length, question_length=question_length)
            executed += macs.executed
            published += macs.published
            own_length += everything.macs(config, length).executed
            windows += 1
            tokens += length
    padded = windows * everything.macs(config, answerer.window).executed
    count = len(questions)
    return Cost(
        executed / count, published / count, own_length / count, padded / count, windows / count, tokens / windows
    )


def _cost_fields(cost: Cost | None) -> dict[str, Any]:
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
